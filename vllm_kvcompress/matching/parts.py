"""Long heads, whose tokens are matched part by part."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_kvcompress.matching.fit import INTERIOR, NEWTON, Fit, fit
from vllm_kvcompress.matching.memory import parts_at_once, parts_of
from vllm_kvcompress.matching.problem import Problem, finite
from vllm_kvcompress.matching.reference import Reference, attend, attending
from vllm_kvcompress.matching.selection import select_omp
from vllm_kvcompress.matching.units import Units, within

FACTORS = INTERIOR + NEWTON + 1  # factorisations of a part's system
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
class _Parts:
    """Some parts of the columns, as if each were heads of its own, and what is asked of them.

    Attributes:
        windows: of each part, which columns of the whole; equally many. A first one that is another part's is
            the problem's padding.
        problem: of these, with everything else as a sink; the heads of the first part, then the next one's.
        reference: its attention.
        place: of each part, `[X, w]` int64, which of the kept columns are among its own.
        there: of each part, `[X, w]` bool, whether each is one.
    """

    windows: Sequence[slice]
    problem: Problem
    reference: Reference
    place: Sequence[Tensor]
    there: Sequence[Tensor]

    def own(self, columns: Tensor) -> Tensor:
        """The kept ones `[P·X, w]` of columns `[X, t]` of the whole, as columns of the parts."""
        most = self.problem.keys.shape[1] - 1
        placed = zip(self.windows, self.place, strict=True)
        return _cat([(columns.gather(1, place) - some.start).clamp(0, most) for some, place in placed])

    def present(self) -> Tensor:
        return _cat(self.there)


def fit_by_parts(
    problem: Problem,
    own: Own,
    columns: Tensor,
    present: Tensor,
    most: int,
    most_kept: int | None = None,
    **options: float,
) -> Units[Fit]:
    """Biases and values as of `fit`, solved for at most so many columns at a time.

    Attention over all tokens is the mass-weighted mean of attention over parts of them, so parts whose masses
    and outputs are matched one by one are matched together. What is beside a part counts in its softmax, as a
    sink does. Solving takes time that grows with the number of parts, where it would with the cube of the
    columns; the attention over all that comes before grows with the product of columns and queries, of which
    each kept column brings one. As many parts as `parts_at_once` says are solved for together, as if they
    were other heads. A unit is these, or a few queries' attention.

    Args:
        problem: X heads, without padding; its queries are for every part.
        own: a query of each kept column, for its part alone.
        columns: `[X, t]` int64, ascending.
        present: `[X, t]` bool.
        most: columns of a part, of the problem's.
        most_kept: kept columns of a part, on average; None for any number.
        options: of `fit`.
    """
    bias, values = torch.zeros_like(columns, dtype=torch.float32), torch.zeros_like(own.queries).float()
    parts = parts_of(problem.keys.shape[1], columns.shape[1], most, most_kept)

    def each(some: _Parts) -> None:
        solved = fit(some.problem, some.reference, some.own(columns), some.present(), **options)  # type: ignore[arg-type]
        biases, matched = (tensor.chunk(len(some.windows)) for tensor in (solved.bias, solved.values))
        for place, there, added, means in zip(some.place, some.there, biases, matched, strict=True):
            bias.scatter_add_(1, place, torch.where(there, added, 0.0))
            at = place[..., None].expand_as(means)
            values.scatter_add_(1, at, torch.where(there[..., None], means, 0.0))

    yield from _by_parts(problem, own, columns, present, parts, each)
    return Fit(bias, values)


def select_by_parts(
    problem: Problem, own: Own, columns: Tensor, present: Tensor, most: int, leading: int = 0
) -> Units[tuple[Tensor, Tensor]]:
    """Other columns than these, as many of each part, by orthogonal matching pursuit (`select_omp`).

    What is beside a part counts in its softmax, as a sink does. Time, but that of the attention over all,
    grows with the number of parts, where it would with the cube of the columns, and so does memory. Units are
    as of `fit_by_parts`.

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
    kept = torch.zeros(*problem.keys.shape[:2], dtype=torch.int8, device=columns.device)
    parts = parts_of(kept.shape[1], columns.shape[1], most)

    def each(some: _Parts) -> None:
        there = some.present()
        before = max(leading - some.windows[0].start, 0)
        chosen, found = select_omp(
            some.problem, some.reference, there.sum(1), leading=before, most=there.shape[1]
        )
        count = len(some.windows)
        for window, which, are in zip(some.windows, chosen.chunk(count), found.chunk(count), strict=True):
            kept[:, window].scatter_add_(1, which, are.to(torch.int8))

    yield from _by_parts(problem, own, columns, present, parts, each, leading, omp=True)
    return padded(kept > 0, columns.shape[1])


def _with_own(problem: Problem, own: Own, present: Tensor) -> Problem:
    """The problem, whose queries are followed by the kept columns' own."""
    assert problem.padding is None
    assert (problem.sinks is None) == (own.sinks is None)
    (heads, tokens, _), queries, limits = problem.keys.shape, problem.queries.shape[1], problem.limits
    # A column that a head has not brings it no query either. Whether there is any is asked where asking does
    # not wait for a device.
    if limits is not None or not present.is_cpu or not bool(present.all()):
        first = torch.full((heads, queries), tokens, device=present.device) if limits is None else limits
        second = torch.full_like(present, tokens, dtype=first.dtype) if own.limits is None else own.limits
        limits = torch.cat([first, second.masked_fill(~present, 0)], 1)
    sinks = None
    if problem.sinks is not None and own.sinks is not None:
        sinks = torch.cat([problem.sinks, own.sinks], 1)
    return replace(problem, queries=torch.cat([problem.queries, own.queries], 1), limits=limits, sinks=sinks)


def _attention_share(problem: Problem, kept: int, parts: int) -> float:
    """About what part of the work the attention over all columns is, by floating point operations."""
    (tokens, size), queries, width = problem.keys.shape[1:], problem.queries.shape[1], kept / parts
    attention = 4 * size * tokens * (queries + kept)
    again = 0 if parts == 1 else 4 * size * tokens * (queries + width)
    systems = parts * ((queries + width) * width * (6 * size + 4 * width) + FACTORS * width**3 / 3)
    return attention / (attention + again + systems)


def _by_parts(
    problem: Problem,
    own: Own,
    columns: Tensor,
    present: Tensor,
    parts: int,
    each: Callable[[_Parts], None],
    leading: int = 0,
    *,
    omp: bool = False,
) -> Units[None]:
    """Attend to all columns, then do `each` to them in so many parts, some of which are made together.

    Parts without a kept column are left out, those with leading ones are made alone.
    """
    (heads, tokens, size), queries = problem.keys.shape, problem.queries.shape[1]
    whole, begin = _with_own(problem, own, present), _attention_share(problem, columns.shape[1], parts)
    reference = yield from within(attending(whole), 0.0, begin)
    if parts == 1:
        place = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
        yield 1.0
        each(_Parts([slice(0, tokens)], whole, reference, [place], [present]))
        return
    edges = [-(-tokens * edge // parts) for edge in range(parts + 1)]  # the first part has as many as any
    inside = [
        present & (columns >= begin) & (columns < end) for begin, end in zip(edges, edges[1:], strict=False)
    ]
    widths = torch.stack(inside).sum(2).amax(1).tolist()
    at_once = parts_at_once(
        heads, tokens, edges[1], queries, columns.shape[1], max(widths), size, columns.device.type, omp=omp
    )
    group: list[int] = []
    for part in range(parts):
        if widths[part]:
            group.append(part)
        full = len(group) == at_once or edges[part] < leading or part == parts - 1
        if group and full:
            width = max(widths[some] for some in group)
            ranges, masks = [edges[some : some + 2] for some in group], [inside[some] for some in group]
            yield begin + (1 - begin) * ((part + 1) / parts)
            each(_together(whole, reference, queries, ranges, masks, width))
            group = []


def _together(
    whole: Problem,
    reference: Reference,
    queries: int,
    ranges: Sequence[Sequence[int]],
    inside: Sequence[Tensor],
    width: int,
) -> _Parts:
    """Parts of some ranges of the columns, each with those of the kept columns `[X, t]` that are inside."""
    heads, _, size = whole.keys.shape
    length = max(end - begin for begin, end in ranges)  # of the first of all, too: no window begins below 0
    windows = [slice(end - length, end) for _, end in ranges]
    place, there = zip(*(padded(mask, width) for mask in inside), strict=True)
    number = torch.arange(queries, device=whole.keys.device).expand(heads, -1)
    rows = [torch.cat([number, queries + some], 1) for some in place]
    limits = padding = None
    if whole.limits is not None:
        limits = torch.cat(
            [
                (whole.limits.gather(1, row) - window.start).clamp(min=0)
                for row, window in zip(rows, windows, strict=True)
            ]
        )
    elif heads * len(windows) > 1:
        limits = torch.full((heads * len(windows), queries + width), length, device=number.device)
    if limits is not None:
        limits[:, queries:].masked_fill_(~_cat(there), 0)  # what a head or a part has fewer of
    absent = [length - (end - begin) for begin, end in ranges]
    if any(absent):
        padding = torch.cat([torch.full_like(number[:, 0], some) for some in absent])
    problem = Problem(
        keys=_cat([whole.keys[:, window] for window in windows]),
        values=_cat([whole.values[:, window] for window in windows]),
        queries=_cat([whole.queries.gather(1, row[..., None].expand(-1, -1, size)) for row in rows]),
        scale=whole.scale,
        logits_soft_cap=whole.logits_soft_cap,
        padding=padding,
        bias=None if whole.bias is None else _cat([whole.bias[:, window] for window in windows]),
        limits=limits,
    )
    alone, total = attend(problem), _cat([reference.log_total.gather(1, row) for row in rows])
    share = torch.exp(alone.log_mass - finite(total)).clamp(max=MOST_SHARE)
    problem = replace(problem, sinks=total + torch.log1p(-share))
    beside = Reference(alone.log_mass, total, alone.outputs * share[..., None], alone.scores)
    return _Parts(windows, problem, beside, place, there)


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    """Of several, one after the other; of one, itself."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def padded(kept: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The columns `[X, width]` int64 that `[X, T]` bool says are kept, ascending, and which are any."""
    order = (~kept).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
    return order, kept.gather(1, order)
