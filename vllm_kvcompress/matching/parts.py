"""Long heads, whose tokens are matched part by part."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_kvcompress.matching.fit import Fit, fit
from vllm_kvcompress.matching.problem import Problem, finite
from vllm_kvcompress.matching.reference import Reference, attend
from vllm_kvcompress.matching.selection import select_omp

MOST_SHARE = 1 - 1e-6  # of the softmax that a part has, so that what is beside it has some


@dataclass(frozen=True)
class Own:
    """One more query for each kept column.

    Attributes:
        queries: `[X, t, D]`.
        limits: `[X, t]` int64, of these; None where the problem has no limits.
        sinks: `[X, t]` float32, likewise.
    """

    queries: Tensor
    limits: Tensor | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class _Part:
    """Some of the columns, and what is asked of them.

    Attributes:
        columns: which of the whole.
        problem: of these, with everything else as a sink.
        reference: its attention.
        place: `[X, w]` int64, which of the kept columns are among them.
        there: `[X, w]` bool, whether each is one.
    """

    columns: slice
    problem: Problem
    reference: Reference
    place: Tensor
    there: Tensor

    def own(self, columns: Tensor) -> Tensor:
        """The kept ones `[X, w]` of columns of the whole, as columns of the part."""
        width = self.columns.stop - self.columns.start
        return (columns.gather(1, self.place) - self.columns.start).clamp(0, width - 1)


def fit_by_parts(
    problem: Problem, own: Own, columns: Tensor, present: Tensor, most: int, **options: float
) -> Fit:
    """Biases and values as of `fit`, solved for at most so many columns at a time.

    Attention over all tokens is the mass-weighted mean of attention over parts of them, so parts whose masses
    and outputs are matched one by one are matched together. What is beside a part counts in its softmax, as a
    sink does. Time grows with the number of parts, where it would with the cube of the columns, and memory
    not at all.

    Args:
        problem: X heads, without padding; its queries are for every part.
        own: a query of each kept column, for its part alone.
        columns: `[X, t]` int64, ascending.
        present: `[X, t]` bool.
        most: columns of a part, of the problem's.
        options: of `fit`.
    """
    bias, values = torch.zeros_like(columns, dtype=torch.float32), torch.zeros_like(own.queries).float()
    for part in _parts(problem, own, columns, present, most):
        solved = fit(part.problem, part.reference, part.own(columns), part.there, **options)  # type: ignore[arg-type]
        place = part.place[..., None].expand_as(solved.values)
        bias.scatter_add_(1, part.place, torch.where(part.there, solved.bias, 0.0))
        values.scatter_add_(1, place, torch.where(part.there[..., None], solved.values, 0.0))
    return Fit(bias, values)


def select_by_parts(
    problem: Problem, own: Own, columns: Tensor, present: Tensor, most: int, leading: int = 0
) -> tuple[Tensor, Tensor]:
    """Other columns than these, as many of each part, by orthogonal matching pursuit (`select_omp`).

    What is beside a part counts in its softmax, as a sink does. Time grows with the number of parts, where it
    would with the cube of the columns, and so does memory.

    Args:
        problem: as of `fit_by_parts`.
        own: likewise.
        columns: likewise.
        present: likewise.
        most: likewise.
        leading: so many first columns are kept whatever the queries say; they are among `columns`.

    Returns:
        Columns `[X, t]` int64, ascending, and which are any.
    """
    kept = torch.zeros(*problem.keys.shape[:2], dtype=torch.bool, device=columns.device)
    for part in _parts(problem, own, columns, present, most):
        before, counts = max(leading - part.columns.start, 0), part.there.sum(1)
        width = part.there.shape[1]
        chosen, there = select_omp(part.problem, part.reference, counts, leading=before, most=width)
        kept[:, part.columns].scatter_(1, chosen, there)
    return padded(kept, columns.shape[1])


def _parts(problem: Problem, own: Own, columns: Tensor, present: Tensor, most: int) -> Iterator[_Part]:
    """All columns, at most so many at a time; those without a kept one are left out."""
    assert problem.padding is None
    assert (problem.sinks is None) == (own.sinks is None)
    (heads, tokens, size), queries = problem.keys.shape, problem.queries.shape[1]
    limits = problem.limits
    # A column that a head has not brings it no query either. Whether there is any is asked where asking does
    # not wait for a device.
    if limits is not None or present.is_cuda or not bool(present.all()):
        first = torch.full((heads, queries), tokens, device=columns.device) if limits is None else limits
        second = torch.full_like(columns, tokens) if own.limits is None else own.limits
        limits = torch.cat([first, second.masked_fill(~present, 0)], 1)
    sinks = None
    if problem.sinks is not None and own.sinks is not None:
        sinks = torch.cat([problem.sinks, own.sinks], 1)
    queries_of_all = torch.cat([problem.queries, own.queries], 1)
    whole = replace(problem, queries=queries_of_all, limits=limits, sinks=sinks)
    reference = attend(whole)
    number = torch.arange(columns.shape[1], device=columns.device)
    if tokens <= most:
        yield _Part(slice(0, tokens), whole, reference, number.expand_as(columns), present)
        return
    parts = -(-tokens // most)
    ranges = [slice(tokens * part // parts, tokens * (part + 1) // parts) for part in range(parts)]
    inside = [present & (columns >= some.start) & (columns < some.stop) for some in ranges]
    widths = torch.stack(inside).sum(2).amax(1).tolist()
    for some, mask, width in zip(ranges, inside, widths, strict=True):
        if not width:
            continue
        place, there = padded(mask, width)
        rows = torch.cat([torch.arange(queries, device=columns.device).expand(heads, -1), queries + place], 1)
        of_part = Problem(
            keys=problem.keys[:, some],
            values=problem.values[:, some],
            queries=whole.queries.gather(1, rows[..., None].expand(-1, -1, size)),
            scale=problem.scale,
            logits_soft_cap=problem.logits_soft_cap,
            bias=None if problem.bias is None else problem.bias[:, some],
            limits=None if limits is None else (limits.gather(1, rows) - some.start).clamp(min=0),
        )
        if of_part.limits is not None:
            of_part.limits[:, queries:].masked_fill_(~there, 0)
        alone, total = attend(of_part), reference.log_total.gather(1, rows)
        share = torch.exp(alone.log_mass - finite(total)).clamp(max=MOST_SHARE)
        of_part = replace(of_part, sinks=total + torch.log1p(-share))
        beside = Reference(alone.log_mass, total, alone.outputs * share[..., None], alone.scores)
        yield _Part(some, of_part, beside, place, there)


def padded(kept: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The columns `[X, width]` int64 that `[X, T]` bool says are kept, ascending, and which are any."""
    order = (~kept).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
    return order, kept.gather(1, order)
