"""Expected attention: what queries still to come will attend to, from the statistics of those seen."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vllm_kvcompress.policies.base import LayerObservation, Policy, softmax_beside

MOST_FUTURE = 1 << 16
QUERIES = 2048  # that are held in float32 at once


class QueryStatistics(NamedTuple):
    """Running moments of queries before RoPE.

    Attributes:
        seen: queries; a number on the device where a kernel counts them.
        mean: `[H, G, D]` float32.
        scatter: `[H, G, D, D]` float32, Σ (q - mean)(q - mean)ᵀ.
    """

    seen: int | Tensor
    mean: Tensor
    scatter: Tensor


@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """Attention expected of a normally distributed future query, times the length of the value.

        z_i = scale·k_iᵀR̄μ + scale²/2·k_iᵀR̄ΣR̄ᵀk_i
        s_i = (mean over the group of softmax(z)_i + ε)·‖v_i‖₂

    μ and Σ are the mean and covariance of the queries seen so far before RoPE, without the first `skip`; R̄ is
    the mean rotation of the next `future` positions. The softmax leaves out the first `skip` tokens, which
    score the most.

    Source: Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future
    Queries Distribution", arXiv 2510.00636, and its authors' code in kvpress, whose defaults these are.
    Deviations: queries are taken back through RoPE instead of projected again, and moments are merged chunk
    by chunk in float32.

    Attributes:
        future: positions over which the rotation is averaged.
        skip: first tokens, whose queries and keys are outliers.
        epsilon: ε, added before the values' lengths weigh in.
    """

    name: ClassVar[str] = "expected_attention"
    paper: ClassVar[str] = "Expected Attention (arXiv 2510.00636)"
    cost: ClassVar[str] = "moments of all queries; a D x D form per key"
    accumulates: ClassVar[bool] = True
    observes_keys: ClassVar[bool] = False
    stacks_layers: ClassVar[bool] = True
    needs_rotary: ClassVar[bool] = True
    future: int = 512
    skip: int = 4
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.future <= MOST_FUTURE:
            raise ValueError(f"future must be 1 to {MOST_FUTURE} positions, got {self.future}")
        if self.skip < 0 or self.epsilon < 0:
            raise ValueError("skip and epsilon must not be negative")

    @property
    def moments(self) -> int | None:  # type: ignore[override]
        own = type(self)
        if own.observe is not ExpectedAttention.observe or own.carry is not ExpectedAttention.carry:
            return None  # somebody's own state
        return self.skip

    def observe(self, observation: LayerObservation) -> QueryStatistics | None:
        assert observation.rotary is not None
        first = observation.num_tokens - len(observation.queries)
        state: QueryStatistics | None = observation.state
        for begin in range(max(self.skip - first, 0), len(observation.queries), QUERIES):
            some = observation.queries[begin : begin + QUERIES]
            queries = observation.rotary.undo(some, first + begin)
            mean = queries.mean(0)
            centred = (queries - mean).flatten(1, 2).transpose(0, 1)  # [H·G, n, D]
            scatter = (centred.transpose(1, 2) @ centred).unflatten(0, mean.shape[:2])
            new = QueryStatistics(len(queries), mean, scatter)
            state = new if state is None else _merged(state, new)
        return state

    def stack(self, states: list[QueryStatistics | None]) -> QueryStatistics | None:
        found = [state for state in states if state is not None]  # all or none of them
        if not found:
            return None
        mean, scatter = (torch.cat(part) for part in ([s.mean for s in found], [s.scatter for s in found]))
        return QueryStatistics(found[0].seen, mean, scatter)

    def score(self, observation: LayerObservation) -> Tensor:
        assert observation.rotary is not None
        keys, size = observation.keys.float(), observation.keys.shape[-1]
        queries: QueryStatistics | None = observation.state
        lengths = observation.values.float().norm(dim=-1)
        if queries is None:  # a context of outliers alone
            return lengths[:, : observation.num_scored]
        rotation = observation.rotary.mean_matrix(observation.num_tokens, self.future, size)
        mean = queries.mean @ rotation.T
        covariance = rotation @ (queries.scatter / queries.seen) @ rotation.T
        logits = mean @ keys.transpose(1, 2) * observation.scale  # [H, G, W]
        for own, form in zip(logits.unbind(1), covariance.unbind(1), strict=True):
            own += (keys @ form).mul_(keys).sum(-1) * (observation.scale**2 / 2)
        column = torch.arange(keys.shape[1], device=keys.device)
        first = 0 if observation.padding is None else observation.padding[:, None]
        logits.masked_fill_((column < first + self.skip).expand(len(keys), -1)[:, None], -torch.inf)
        expected = softmax_beside(observation.sinks, logits[:, :, None])[:, :, 0].mean(1)  # [H, W]
        scores = (expected + self.epsilon) * lengths
        # The best of all, but finite: only the attention sinks are never dropped.
        scores.masked_fill_(column < first + self.skip, torch.finfo(torch.float32).max)
        if isinstance(queries.seen, Tensor):  # whether there was none is not asked: it would be waited for
            scores = torch.where(queries.seen > 0, scores, lengths)
        return scores[:, : observation.num_scored]


def _merged(a: QueryStatistics, b: QueryStatistics) -> QueryStatistics:
    """Moments of two sets together (Chan et al., 1979)."""
    seen = a.seen + b.seen
    apart = b.mean - a.mean
    mean = a.mean + apart * (b.seen / seen)
    between = apart[..., :, None] * apart[..., None, :] * (a.seen * b.seen / seen)
    return QueryStatistics(seen, mean, a.scatter + b.scatter + between)
