"""Long heads, whose tokens are matched part by part."""

from dataclasses import replace

import torch
from torch import Tensor

from vllm_kvcompress.matching.fit import Fit, fit
from vllm_kvcompress.matching.problem import Problem, finite
from vllm_kvcompress.matching.reference import Reference, attend

MOST_SHARE = 1 - 1e-6  # of the softmax that a part has, so that what is beside it has some


def fit_by_parts(
    problem: Problem,
    own: Tensor,
    own_limits: Tensor | None,
    columns: Tensor,
    present: Tensor,
    most: int,
    **options: float,
) -> Fit:
    """Biases and values as of `fit`, solved for at most so many columns at a time.

    Attention over all tokens is the mass-weighted mean of attention over parts of them, so parts whose masses
    and outputs are matched one by one are matched together. What is beside a part counts in its softmax, as a
    sink does. Time grows with the number of parts, where it would with the cube of the columns, and memory
    not at all.

    Args:
        problem: X heads, without padding; its queries are for every part.
        own: `[X, t, D]`, one more query for each column, for its part alone.
        own_limits: `[X, t]` int64, of these; None where the problem has no limits.
        columns: `[X, t]` int64, ascending.
        present: `[X, t]` bool.
        most: columns of a part, of the problem's.
        options: of `fit`.
    """
    assert problem.padding is None
    if problem.sinks is not None:
        raise ValueError("sinks are those of the problem's queries: of a column's own none are known")
    (heads, tokens, size), queries = problem.keys.shape, problem.queries.shape[1]
    limits = problem.limits
    # A column that a head has not brings it no query either. Whether there is any is asked where asking does
    # not wait for a device.
    if limits is not None or present.is_cuda or not bool(present.all()):
        first = torch.full((heads, queries), tokens, device=own.device) if limits is None else limits
        second = torch.full_like(columns, tokens) if own_limits is None else own_limits
        limits = torch.cat([first, second.masked_fill(~present, 0)], 1)
    whole = replace(problem, queries=torch.cat([problem.queries, own], 1), limits=limits)
    reference = attend(whole)
    if tokens <= most:
        return fit(whole, reference, columns, present, **options)  # type: ignore[arg-type]
    parts = -(-tokens // most)
    ranges = [(tokens * part // parts, tokens * (part + 1) // parts) for part in range(parts)]
    inside = [present & (columns >= begin) & (columns < end) for begin, end in ranges]
    widths = torch.stack(inside).sum(2).amax(1).tolist()
    bias, values = (
        torch.zeros_like(own[..., 0], dtype=torch.float32),
        torch.zeros_like(own, dtype=torch.float32),
    )
    for (begin, end), mask, width in zip(ranges, inside, widths, strict=True):
        if not width:
            continue
        place, there = padded(mask, width)
        rows = torch.cat([torch.arange(queries, device=own.device).expand(len(own), -1), queries + place], 1)
        of_part = Problem(
            keys=problem.keys[:, begin:end],
            values=problem.values[:, begin:end],
            queries=whole.queries.gather(1, rows[..., None].expand(-1, -1, size)),
            scale=problem.scale,
            logits_soft_cap=problem.logits_soft_cap,
            bias=None if problem.bias is None else problem.bias[:, begin:end],
            limits=None if limits is None else (limits.gather(1, rows) - begin).clamp(min=0),
        )
        if of_part.limits is not None:
            of_part.limits[:, queries:].masked_fill_(~there, 0)
        alone, total = attend(of_part), reference.log_total.gather(1, rows)
        share = torch.exp(alone.log_mass - finite(total)).clamp(max=MOST_SHARE)
        of_part = replace(of_part, sinks=total + torch.log1p(-share))
        beside = Reference(alone.log_mass, total, alone.outputs * share[..., None], alone.scores)
        own_columns = (columns.gather(1, place) - begin).clamp(0, end - begin - 1)
        solved = fit(of_part, beside, own_columns, there, **options)  # type: ignore[arg-type]
        bias.scatter_add_(1, place, torch.where(there, solved.bias, 0.0))
        values.scatter_add_(
            1, place[..., None].expand(-1, -1, size), torch.where(there[..., None], solved.values, 0.0)
        )
    return Fit(bias, values)


def padded(kept: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The columns `[X, width]` int64 that `[X, T]` bool says are kept, ascending, and which are any."""
    order = (~kept).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
    return order, kept.gather(1, order)
