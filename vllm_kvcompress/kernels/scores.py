"""What requests' last queries attend to, read straight from their pages, for all layers of all Jobs at once.

Two passes over the keys: the first leaves each query's softmax denominator, one log-sum-exp per tile of
columns; the second adds up each column's attention, or its square, over the window. Nothing of the size
`[Hq, w, W]` is ever held.

Rows are (Job, layer, head)s in that order, X = J·L·H of them. A Job's columns are aligned with those of the
others at its boundary, so that one column is the first raw token of all; what it holds less is padding.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_kvcompress.kernels.arithmetic import dot, tanh
from vllm_kvcompress.kernels.tiles import keys_at_once

MOST_COLUMNS = 64  # whose keys a program holds
POOLED = 256  # columns per program
SCRATCH_BYTES = 256 * 2**20  # of what `window_scores` holds beside its result
MOST = tl.constexpr(torch.finfo(torch.float32).max)


def window_scores(
    queries: Tensor,
    keys: Tensor,
    pages: Tensor,
    num_columns: int,
    num_scored: int,
    scale: Tensor,
    logits_soft_cap: Tensor | None,
    squared: bool,
    kernel_size: int,
    pooling: Literal["max", "avg"],
    reduction: Literal["mean", "sum"],
    ends: Tensor | None = None,
    padding: Tensor | None = None,
    sinks: int = 0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """`window_columns`, then `pool_columns` of those before the window, in bounded memory.

    Some layers are scored at a time where all would need too much: 4 launches for each such part.

    Arguments as of the two.

    Returns:
        `[X, T]` float32.
    """
    layers, window, query_heads, _ = queries.shape
    heads = pages.shape[0] // layers
    columns = max(16, num_columns - window)
    tiles = triton.cdiv(num_columns, _tile_columns(queries))
    of_layer = 4 * query_heads * (columns + window * tiles)
    at_once = max(1, SCRATCH_BYTES // of_layer)
    out = torch.empty(len(pages), num_scored, dtype=torch.float32, device=keys.device)
    for first in range(0, layers, at_once):
        own, rows = slice(first, first + at_once), slice(first * heads, (first + at_once) * heads)
        attention = window_columns(
            queries[own],
            keys,
            pages[rows],
            num_columns,
            num_columns - window,
            scale[own],
            None if logits_soft_cap is None else logits_soft_cap[own],
            squared,
            None if ends is None else ends[own],
            None if sink_logits is None else sink_logits[rows],
        )
        pool_columns(
            attention,
            num_scored,
            kernel_size,
            pooling,
            reduction,
            None if ends is None else ends[own],
            window,
            None if padding is None else padding[rows],
            sinks,
            out[rows],
        )
    return out


def window_columns(
    queries: Tensor,
    keys: Tensor,
    pages: Tensor,
    num_columns: int,
    num_scored: int,
    scale: float | Tensor,
    logits_soft_cap: float | Tensor | None = None,
    squared: bool = False,
    ends: Tensor | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention that each column gets from a window of queries: Σ over the window of A, or of A².

    A = softmax(cap·tanh(scale·q·kᵀ / cap)), causal, over all columns, the window's own included; logits and
    softmax are float32. The queries are those of the last w columns, which every head holds.

    Args:
        queries: `[J·L, w, Hq, D]` after RoPE, or `[w, Hq, D]` of one layer.
        keys: `[P, N, D]`, every page of every layer, in queries' dtype or float8.
        pages: `[X, n]` int64, the pages of each row's columns; -1 for columns that hold nothing.
        num_columns: W, at most n·N.
        num_scored: T, at most W: for which columns to answer.
        scale: softmax scale, `[J·L]` float32 on the device, or one of all layers; times that of float8 keys.
        logits_soft_cap: cap of the logits, likewise; 0 or None for none.
        squared: whether to add up A².
        ends: `[J·L]` int32 or int64, how many of the W columns are each Job's; None for all.
        sink_logits: `[X, G]` float32, one more logit of each query head, to which no column belongs; -inf for
            none.

    Returns:
        `[X, G, T]` float32; 0 where there is no page.
    """
    queries = queries if queries.dim() == 4 else queries[None]
    layers, window, query_heads, head_size = queries.shape
    rows, block_size = pages.shape[0], keys.shape[1]
    heads = rows // layers
    group = query_heads // heads
    assert rows == layers * heads and query_heads == heads * group
    assert queries.stride(3) == keys.stride(2) == pages.stride(1) == 1
    assert 0 < window <= num_columns <= pages.shape[1] * block_size and 0 < num_scored <= num_columns
    soft_cap = isinstance(logits_soft_cap, Tensor) or bool(logits_soft_cap)
    scales = _by_layer(scale, layers, keys.device)
    caps = scales
    if soft_cap and logits_soft_cap is not None:
        caps = _by_layer(logits_soft_cap, layers, keys.device)
    assert len(scales) == len(caps) == layers and (ends is None or len(ends) == layers)
    columns = _tile_columns(queries)

    def launch(tiles: int, lse: Tensor, out: Tensor, add_up: bool) -> None:
        _window_kernel[(rows, tiles)](
            queries,
            keys,
            pages,
            lse,
            out,
            ends,
            scales,
            caps,
            window,
            num_columns,
            num_scored,
            *queries.stride()[:3],
            *keys.stride()[:2],
            pages.stride(0),
            ADD_UP=add_up,
            SQUARED=squared,
            SOFT_CAP=soft_cap,
            ENDS=ends is not None,
            HEADS=heads,
            GROUP=group,
            BLOCK_SIZE=block_size,
            HEAD_SIZE=head_size,
            CHANNELS=triton.next_power_of_2(head_size),
            QUERIES=max(16, min(columns, triton.next_power_of_2(window))),
            COLUMNS=columns,
            num_warps=4,
        )

    out = torch.empty(rows, group, num_scored, dtype=torch.float32, device=keys.device)
    tiles = triton.cdiv(num_columns, columns)
    parts = torch.empty(rows, tiles, group * window, dtype=torch.float32, device=keys.device)
    lse = torch.empty(rows, group * window, dtype=torch.float32, device=keys.device)
    launch(tiles, parts, out, add_up=False)
    _log_sum_kernel[(rows, triton.cdiv(group * window, 64))](
        parts, lse, tiles, group * window, ENTRIES=64, TILES=32
    )
    if sink_logits is not None:
        lse = torch.logaddexp(lse, sink_logits.repeat_interleave(window, 1))
    launch(triton.cdiv(num_scored, columns), lse, out, add_up=True)
    return out


def pool_columns(
    columns: Tensor,
    num_scored: int,
    kernel_size: int,
    pooling: Literal["max", "avg"],
    reduction: Literal["mean", "sum"],
    ends: Tensor | None = None,
    window: int = 0,
    padding: Tensor | None = None,
    sinks: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Pool along columns per query head, then reduce over the group; then rank, if padding is given.

    Padding counts as in `torch.nn.functional`: never as a maximum, and as zeros in an average.

    Args:
        columns: `[X, G, W]` float32, contiguous.
        num_scored: T, for how many columns to answer; the others still enter the pooling.
        kernel_size: odd.
        pooling: of the columns.
        reduction: of the group.
        ends: `[J·L]` int32 or int64: a Job's columns from ends - window on do not enter; None for none such.
        window: w.
        padding: `[X]` int64, leading columns that hold nothing: makes the scores those of `rank_columns`.
        sinks: tokens that head each row and are protected.
        out: `[X, T]`, contiguous, for the result; made if absent.

    Returns:
        `[X, T]` float32.
    """
    rows, group, num_columns = columns.shape
    assert columns.is_contiguous() and kernel_size % 2 == 1 and num_scored <= num_columns
    if out is None:
        out = torch.empty(rows, num_scored, dtype=torch.float32, device=columns.device)
    factor = (1 / kernel_size if pooling == "avg" else 1.0) * (1 / group if reduction == "mean" else 1.0)
    _pool_kernel[(rows, triton.cdiv(num_scored, POOLED))](
        columns,
        out,
        ends,
        padding,
        num_columns,
        num_scored,
        window,
        sinks,
        factor,
        kernel_size // 2,
        rows if ends is None else rows // len(ends),
        MAX=pooling == "max",
        ENDS=ends is not None,
        RANKED=padding is not None,
        GROUP=group,
        COLUMNS=POOLED,
    )
    return out


def rank_columns(scores: Tensor, padding: Tensor, sinks: int) -> None:
    """Give -inf to padding alone and +inf to the sinks alone, in place; NaN becomes the lowest number.

    Args:
        scores: `[X, T]` float32, contiguous, written.
        padding: `[X]` int64, leading columns that hold nothing.
        sinks: tokens that head each row and are protected.
    """
    rows, num_columns = scores.shape
    assert scores.is_contiguous()
    _rank_kernel[(rows, triton.cdiv(num_columns, 1024))](scores, padding, num_columns, sinks, COLUMNS=1024)


def _tile_columns(queries: Tensor) -> int:
    """Columns whose keys a program holds, in the dtype of queries `[..., D]`."""
    return keys_at_once(queries.shape[-1], queries.dtype, MOST_COLUMNS)


def _by_layer(value: float | Tensor, layers: int, device: torch.device) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((layers,), value, device=device)


@triton.jit(do_not_specialize=["window", "num_columns", "num_scored", "page_row"])
def _window_kernel(
    queries,
    keys,
    pages,
    lse,  # [X, tiles, G·w] written, or [X, G·w] read if ADD_UP
    out,  # [X, G, T], written if ADD_UP
    ends,
    scales,
    soft_caps,
    window,
    num_columns,
    num_scored,
    query_layer,
    query_token,
    query_head,
    page_stride,
    token_stride,
    page_row,
    ADD_UP: tl.constexpr,
    SQUARED: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    ENDS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    layer, head = row // HEADS, row % HEADS
    end = num_columns
    if ENDS:
        end = tl.load(ends + layer).to(tl.int32)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    page = tl.load(pages + row * page_row + column // BLOCK_SIZE, mask=column < end, other=-1)
    if tl.max(page, 0) < 0:  # as of a short Job beside a long one
        number = tl.arange(0, QUERIES)
        for member in range(GROUP):
            if ADD_UP:
                at = out + (row * GROUP + member) * num_scored + column
                tl.store(at, tl.zeros([COLUMNS], tl.float32), mask=column < num_scored)
            else:
                at = lse + ((row * tl.num_programs(1) + tile) * GROUP + member) * window
                for first in range(0, window, QUERIES):
                    nothing = tl.full([QUERIES], -float("inf"), tl.float32)
                    tl.store(at + first + number, nothing, mask=first + number < window)
        return

    held = page >= 0
    channel = tl.arange(0, CHANNELS)
    in_head = channel < HEAD_SIZE
    offset = page.to(tl.int64) * page_stride + (column % BLOCK_SIZE) * token_stride
    k = tl.load(keys + offset[None, :] + channel[:, None], mask=held[None, :] & in_head[:, None], other=0.0)
    k = k.to(queries.dtype.element_ty)
    inner = tl.load(scales + layer)
    if SOFT_CAP:
        soft_cap = tl.load(soft_caps + layer)
        capped = soft_cap > 0
        inner = inner / tl.where(capped, soft_cap, 1.0)

    for member in range(GROUP):
        own_queries = queries + layer * query_layer + (head * GROUP + member) * query_head
        gained = tl.zeros([COLUMNS], tl.float32)
        for first in range(0, window, QUERIES):
            number = first + tl.arange(0, QUERIES)
            real = number < window
            q = tl.load(
                own_queries + (number * query_token)[:, None] + channel[None, :],
                mask=real[:, None] & in_head[None, :],
                other=0.0,
            )
            logits = dot(q, k) * inner
            if SOFT_CAP:
                if capped:
                    logits = tanh(logits) * soft_cap
            newest = end - window + number
            seen = (held[None, :] & real[:, None]) & (column[None, :] <= newest[:, None])
            logits = tl.where(seen, logits, -float("inf"))
            if ADD_UP:
                level = tl.load(lse + (row * GROUP + member) * window + number, mask=real, other=0.0)
                attention = tl.exp(logits - level[:, None])
                gained += tl.sum(attention * attention if SQUARED else attention, 0)
            else:
                peak = tl.max(logits, 1)
                some = peak > -float("inf")
                level = tl.where(some, peak, 0.0)
                total = tl.sum(tl.exp(logits - level[:, None]), 1)
                total = level + tl.log(tl.where(some, total, 1.0))
                total = tl.where(some, total, -float("inf"))
                at = ((row * tl.num_programs(1) + tile) * GROUP + member) * window + number
                tl.store(lse + at, total, mask=real)
        if ADD_UP:
            own_out = out + (row * GROUP + member) * num_scored
            tl.store(own_out + column, gained, mask=column < num_scored)


@triton.jit(do_not_specialize=["tiles", "size"])
def _log_sum_kernel(parts, lse, tiles, size, ENTRIES: tl.constexpr, TILES: tl.constexpr):
    """Log-sum-exp over the tiles: of `[X, tiles, size]`, `[X, size]`."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    peak = tl.full([ENTRIES], -float("inf"), tl.float32)
    total = tl.zeros([ENTRIES], tl.float32)
    for begin in range(0, tiles, TILES):
        tile = begin + tl.arange(0, TILES)
        part = tl.load(
            parts + ((row * tiles + tile) * size)[:, None] + entry[None, :],
            mask=(tile < tiles)[:, None] & (entry < size)[None, :],
            other=-float("inf"),
        )
        higher = tl.maximum(peak, tl.max(part, 0))
        level = tl.where(higher > -float("inf"), higher, 0.0)
        total = total * tl.exp(peak - level) + tl.sum(tl.exp(part - level[None, :]), 0)
        peak = higher
    some = total > 0
    found = tl.where(some, peak, 0.0) + tl.log(tl.where(some, total, 1.0))
    tl.store(lse + row * size + entry, tl.where(some, found, -float("inf")), mask=entry < size)


@triton.jit
def _ranked(score, column, padding, sinks):
    score = tl.where(score == score, score, -MOST)
    score = tl.minimum(tl.maximum(score, -MOST), MOST)
    score = tl.where(column < padding + sinks, float("inf"), score)
    return tl.where(column < padding, -float("inf"), score)


@triton.jit(do_not_specialize=["num_columns", "num_scored", "window", "sinks", "reach", "rows_of_end"])
def _pool_kernel(
    columns,  # [X, G, W]
    out,  # [X, T]
    ends,
    padding,
    num_columns,
    num_scored,
    window,
    sinks,
    factor,
    reach,
    rows_of_end,
    MAX: tl.constexpr,
    ENDS: tl.constexpr,
    RANKED: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = num_columns
    if ENDS:
        end = tl.minimum(end, tl.load(ends + row // rows_of_end).to(tl.int32) - window)
    outside = -float("inf") if MAX else 0.0
    total = tl.zeros([COLUMNS], tl.float32)
    for member in range(GROUP):
        own = columns + (row * GROUP + member) * num_columns
        pooled = tl.full([COLUMNS], outside, tl.float32)
        for shift in range(-reach, reach + 1):
            at = column + shift
            near = tl.load(own + at, mask=(at >= 0) & (at < end), other=outside)
            pooled = tl.maximum(pooled, near) if MAX else pooled + near
        total += pooled
    total *= factor
    if RANKED:
        total = _ranked(total, column, tl.load(padding + row), sinks)
    tl.store(out + row * num_scored + column, total, mask=column < num_scored)


@triton.jit(do_not_specialize=["sinks"])  # a multiple of 16 columns is read 16 bytes at once
def _rank_kernel(scores, padding, num_columns, sinks, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    own = scores + row * num_columns + column
    score = tl.load(own, mask=column < num_columns, other=0.0)
    tl.store(own, _ranked(score, column, tl.load(padding + row), sinks), mask=column < num_columns)
