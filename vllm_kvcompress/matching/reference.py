"""Attention of the reference queries over all tokens: what a smaller set of tokens is to reproduce."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.matching.problem import Problem, exp_, finite, logits
from vllm_kvcompress.matching.units import Units, finish

# Of logits held at a time: on a CPU what stays near its core, elsewhere what is worth a kernel's launch.
CHUNK_BYTES, DEVICE_CHUNK_BYTES = 2**24, 2**26


@dataclass(frozen=True)
class Reference:
    """The attention of a problem's queries over all its columns.

    Attributes:
        log_mass: `[X, n]` float32, logarithm of the columns' sum of exp(logit); -inf where none is seen.
        log_total: `[X, n]` float32, the same with the sink; `log_mass` itself where there are none.
        outputs: `[X, n, D]` float32, 0 where no column is seen.
        scores: `[X, T]` float32, root mean square over the queries of the softmax; higher = keep.
    """

    log_mass: Tensor
    log_total: Tensor
    outputs: Tensor
    scores: Tensor

    @property
    def share(self) -> Tensor:
        """What the columns have of the softmax, `[X, n]`: 1, less the sink's part."""
        return torch.exp(self.log_mass - finite(self.log_total))


def chunk_bytes_on(device_type: str) -> int:
    """What the logits of queries that are attended to at a time may take."""
    return CHUNK_BYTES if device_type == "cpu" else DEVICE_CHUNK_BYTES


def query_chunk(heads: int, queries: int, tokens: int, chunk_bytes: int) -> int:
    """How many queries of each head are attended to at a time."""
    return min(queries, max(1, chunk_bytes // (4 * heads * tokens)))


def attend(problem: Problem, chunk_bytes: int | None = None) -> Reference:
    """As `attending`, at once."""
    return finish(attending(problem, chunk_bytes))


def attending(problem: Problem, chunk_bytes: int | None = None) -> Units[Reference]:
    """The attention of the problem's queries, a few of them at a time, each of these a unit.

    Args:
        problem: X heads.
        chunk_bytes: what the logits may take, but at least one query's: 4 · X · T bytes; as of
            `chunk_bytes_on` where it is not given.
    """
    heads, tokens, size = problem.keys.shape
    count = problem.queries.shape[1]
    queries, keys, values = problem.queries.float(), problem.keys.float(), problem.values.float()
    bias, column = column_bias(problem), torch.arange(tokens, device=keys.device)
    log_mass, log_total = queries.new_empty(2, heads, count)
    outputs, squares = torch.empty_like(queries), queries.new_zeros(heads, 1, tokens)
    chunk = query_chunk(heads, count, tokens, chunk_bytes or chunk_bytes_on(keys.device.type))
    for first in range(0, count, chunk):
        yield min(first + chunk, count) / count
        rows = slice(first, first + chunk)
        seen = None if problem.limits is None else column < problem.limits[:, rows, None]
        weights = logits(problem, queries[:, rows], keys, bias, seen)
        largest = weights.amax(-1)
        if problem.sinks is not None:
            largest = torch.maximum(largest, problem.sinks[:, rows])
        largest = finite(largest)
        exp_(weights.sub_(largest[..., None]))
        mass = weights.sum(-1)
        total = mass if problem.sinks is None else mass + torch.exp(problem.sinks[:, rows] - largest)
        log_mass[:, rows], log_total[:, rows] = mass.log() + largest, total.log() + largest
        norm = torch.where(total > 0, 1 / total, 0.0)
        outputs[:, rows] = torch.bmm(weights, values).mul_(norm[..., None])
        squares.baddbmm_(norm.square()[:, None], weights.square_())
    return Reference(log_mass, log_total, outputs, squares[:, 0].div_(count).sqrt_())


def attention_weights(problem: Problem, reference: Reference, chunk_bytes: int | None = None) -> Tensor:
    """The softmax of all queries over all columns, `[X, n, T]` float32, whole in memory."""
    heads, tokens, _ = problem.keys.shape
    count = problem.queries.shape[1]
    queries, keys = problem.queries.float(), problem.keys.float()
    bias, column = column_bias(problem), torch.arange(tokens, device=keys.device)
    weights = queries.new_empty(heads, count, tokens)
    chunk = query_chunk(heads, count, tokens, chunk_bytes or chunk_bytes_on(keys.device.type))
    for first in range(0, count, chunk):
        rows = slice(first, first + chunk)
        seen = None if problem.limits is None else column < problem.limits[:, rows, None]
        part = logits(problem, queries[:, rows], keys, bias, seen)
        weights[:, rows] = exp_(part.sub_(finite(reference.log_total[:, rows, None])))
    return weights


def column_bias(problem: Problem) -> Tensor | None:
    """What is added to each column's logit, `[X, T]` float32: -inf for padding."""
    held = problem.holds_token()
    if held is None:
        return problem.bias
    bias = torch.zeros_like(held, dtype=torch.float32) if problem.bias is None else problem.bias
    return bias.masked_fill(~held, -torch.inf)
