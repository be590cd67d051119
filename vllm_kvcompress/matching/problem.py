"""What is matched: heads, their tokens, and the queries that they are to answer alike."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """X KV heads of T tokens each, and n reference queries for each of them.

    Attributes:
        keys: `[X, T, D]` of any floating dtype, after RoPE.
        values: `[X, T, D]`.
        queries: `[X, n, D]`, of all the query heads that share the KV head, after RoPE and q-norm.
        scale: the softmax scale.
        logits_soft_cap: logits are cap · tanh(scale · q·k / cap); 0 for none.
        padding: `[X]` int64, leading columns that hold no token, only finite numbers.
        sinks: `[X, n]` float32, a logit that each query's softmax also sums over and that has no value.
        bias: `[X, T]` float32 that is added to the columns' logits, where they were matched before.
        limits: `[X, n]` int64, a query sees the columns below its limit; without it, all of them.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    scale: float
    logits_soft_cap: float = 0.0
    padding: Tensor | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    limits: Tensor | None = None

    def __post_init__(self) -> None:
        heads, tokens, size = self.keys.shape
        queries = self.queries.shape[1]
        expected = {
            "values": (heads, tokens, size),
            "queries": (heads, queries, size),
            "padding": (heads,),
            "sinks": (heads, queries),
            "bias": (heads, tokens),
            "limits": (heads, queries),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name} must be {list(shape)} beside these keys, not {list(tensor.shape)}")

    def holds_token(self) -> Tensor | None:
        """Whether each column `[X, T]` holds a token, None where all do."""
        if self.padding is None:
            return None
        return torch.arange(self.keys.shape[1], device=self.keys.device) >= self.padding[:, None]


def logits(
    problem: Problem, queries: Tensor, keys: Tensor, bias: Tensor | None, seen: Tensor | None
) -> Tensor:
    """The logits that some of the queries give to some of the columns.

    Args:
        problem: for scale and soft cap.
        queries: `[X, r, D]` float32.
        keys: `[X, c, D]` float32.
        bias: `[X, c]` float32, -inf for a column that is not there.
        seen: `[X, r, c]`, or broadcast to it, whether a query sees a column.

    Returns:
        `[X, r, c]` float32, -inf for what is not seen.
    """
    result = torch.bmm(queries, keys.mT)
    if cap := problem.logits_soft_cap:
        result.mul_(problem.scale / cap).tanh_().mul_(cap)
    else:
        result.mul_(problem.scale)
    if bias is not None:
        result.add_(bias[:, None])
    if seen is not None:
        result.masked_fill_(~seen, -torch.inf)
    return result


def exp_(log: Tensor) -> Tensor:
    """The exponential of logarithms of at most about 0, in place; exactly 0 below e⁻⁴⁰.

    Less does not count beside 1 in float32, and denormal numbers make matrix products many times slower.
    """
    return torch.threshold_(log, -40.0, -torch.inf).exp_()


def finite(log: Tensor) -> Tensor:
    """Logarithms to subtract: 0 for those of nothing, so that exp(-inf - log) is 0."""
    return log.masked_fill(log == -torch.inf, 0.0)
