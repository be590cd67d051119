"""What a request's last queries attend to, read straight from its pages.

Two passes over the keys: the first leaves each query's softmax denominator, one log-sum-exp per tile of
columns; the second adds up each column's attention, or its square, over the window. Nothing of the size
`[Hq, w, W]` is ever held.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_kvcompress.kernels.arithmetic import dot, tanh

TILE_BYTES = 16 * 1024  # of the keys that a program holds, and of the queries that meet them at once
POOLED = 256  # columns per program


def window_columns(
    queries: Tensor,
    keys: Tensor,
    pages: Tensor,
    num_columns: int,
    num_scored: int,
    scale: float,
    logits_soft_cap: float = 0.0,
    squared: bool = False,
) -> Tensor:
    """Attention that each column gets from a window of queries: Σ over the window of A, or of A².

    A = softmax(cap·tanh(scale·q·kᵀ / cap)), causal, over all columns, the window's own included; logits and
    softmax are float32. The queries are those of the last w columns, which every head holds.

    Args:
        queries: `[w, Hq, D]` after RoPE.
        keys: `[P, N, D]`, every page of every layer.
        pages: `[H, n]` int64, the pages of each head's columns; -1 for columns that hold nothing, so that
            heads with less than others can be aligned to the right.
        num_columns: W, at most n·N.
        num_scored: T, at most W: for which columns to answer.
        scale: softmax scale of the layer.
        logits_soft_cap: cap of the logits; 0 for none.
        squared: whether to add up A².

    Returns:
        `[H, G, T]` float32; 0 where there is no page.
    """
    window, query_heads, head_size = queries.shape
    heads = pages.shape[0]
    group = query_heads // heads
    assert queries.stride(2) == keys.stride(2) == pages.stride(1) == 1
    assert 0 < window <= num_columns <= pages.shape[1] * keys.shape[1] and 0 < num_scored <= num_columns
    channels = triton.next_power_of_2(head_size)
    columns = max(16, min(64, TILE_BYTES // (channels * keys.element_size())))

    def launch(tiles: int, lse: Tensor, out: Tensor, add_up: bool) -> None:
        _window_kernel[tiles, heads](
            queries,
            keys,
            pages,
            lse,
            out,
            window,
            num_columns,
            num_scored,
            scale / logits_soft_cap if logits_soft_cap > 0 else scale,
            logits_soft_cap,
            *queries.stride()[:2],
            *keys.stride()[:2],
            pages.stride(0),
            ADD_UP=add_up,
            SQUARED=squared,
            SOFT_CAP=logits_soft_cap > 0,
            GROUP=group,
            BLOCK_SIZE=keys.shape[1],
            HEAD_SIZE=head_size,
            CHANNELS=channels,
            QUERIES=max(16, min(columns, triton.next_power_of_2(window))),
            COLUMNS=columns,
            num_warps=4,
        )

    out = torch.empty(heads, group, num_scored, dtype=torch.float32, device=keys.device)
    tiles = triton.cdiv(num_columns, columns)
    lse = torch.empty(heads, group, window, tiles, dtype=torch.float32, device=keys.device)
    launch(tiles, lse, out, add_up=False)
    launch(triton.cdiv(num_scored, columns), lse.logsumexp(-1), out, add_up=True)
    return out


def pool_columns(
    columns: Tensor,
    num_scored: int,
    kernel_size: int,
    pooling: Literal["max", "avg"],
    reduction: Literal["mean", "sum"],
) -> Tensor:
    """Pool along columns per query head, then reduce over the group.

    Padding counts as in `torch.nn.functional`: never as a maximum, and as zeros in an average.

    Args:
        columns: `[H, G, W]` float32, contiguous.
        num_scored: T, for how many columns to answer; the others still enter the pooling.
        kernel_size: odd.
        pooling: of the columns.
        reduction: of the group.

    Returns:
        `[H, T]` float32.
    """
    heads, group, num_columns = columns.shape
    assert columns.is_contiguous() and kernel_size % 2 == 1 and num_scored <= num_columns
    out = torch.empty(heads, num_scored, dtype=torch.float32, device=columns.device)
    factor = (1 / kernel_size if pooling == "avg" else 1.0) * (1 / group if reduction == "mean" else 1.0)
    _pool_kernel[triton.cdiv(num_scored, POOLED), heads](
        columns,
        out,
        num_columns,
        num_scored,
        factor,
        kernel_size // 2,
        MAX=pooling == "max",
        GROUP=group,
        COLUMNS=POOLED,
    )
    return out


@triton.jit(do_not_specialize=["window", "num_columns", "num_scored", "page_row"])
def _window_kernel(
    queries,
    keys,
    pages,
    lse,  # [H, G, w, tiles] written, or [H, G, w] read if ADD_UP
    out,  # [H, G, T], written if ADD_UP
    window,
    num_columns,
    num_scored,
    inner,
    soft_cap,
    query_token,
    query_head,
    page_stride,
    token_stride,
    page_row,
    ADD_UP: tl.constexpr,
    SQUARED: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    page = tl.load(pages + head * page_row + column // BLOCK_SIZE, mask=column < num_columns, other=-1)
    held = page >= 0
    channel = tl.arange(0, CHANNELS)
    in_head = channel < HEAD_SIZE
    offset = page.to(tl.int64) * page_stride + (column % BLOCK_SIZE) * token_stride
    k = tl.load(keys + offset[None, :] + channel[:, None], mask=held[None, :] & in_head[:, None], other=0.0)

    for member in range(GROUP):
        query_of = head * GROUP + member
        gained = tl.zeros([COLUMNS], tl.float32)
        for first in range(0, window, QUERIES):
            number = first + tl.arange(0, QUERIES)
            real = number < window
            q = tl.load(
                queries + (number * query_token + query_of * query_head)[:, None] + channel[None, :],
                mask=real[:, None] & in_head[None, :],
                other=0.0,
            )
            logits = dot(q, k) * inner
            if SOFT_CAP:
                logits = tanh(logits) * soft_cap
            newest = num_columns - window + number
            seen = (held[None, :] & real[:, None]) & (column[None, :] <= newest[:, None])
            logits = tl.where(seen, logits, -float("inf"))
            at = (query_of * window + number).to(tl.int64)
            if ADD_UP:
                attention = tl.exp(logits - tl.load(lse + at, mask=real, other=0.0)[:, None])
                gained += tl.sum(attention * attention if SQUARED else attention, 0)
            else:
                peak = tl.max(logits, 1)
                some = peak > -float("inf")
                level = tl.where(some, peak, 0.0)
                total = tl.sum(tl.exp(logits - level[:, None]), 1)
                total = level + tl.log(tl.where(some, total, 1.0))
                total = tl.where(some, total, -float("inf"))
                tl.store(lse + at * tl.num_programs(0) + tile, total, mask=real)
        if ADD_UP:
            row = out + query_of.to(tl.int64) * num_scored
            tl.store(row + column, gained, mask=column < num_scored)


@triton.jit(do_not_specialize=["num_columns", "num_scored", "reach"])
def _pool_kernel(
    columns,  # [H, G, W]
    out,  # [H, T]
    num_columns,
    num_scored,
    factor,
    reach,
    MAX: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    head = tl.program_id(1).to(tl.int64)
    outside = -float("inf") if MAX else 0.0
    total = tl.zeros([COLUMNS], tl.float32)
    for member in range(GROUP):
        row = columns + (head * GROUP + member) * num_columns
        pooled = tl.full([COLUMNS], outside, tl.float32)
        for shift in range(-reach, reach + 1):
            at = column + shift
            near = tl.load(row + at, mask=(at >= 0) & (at < num_columns), other=outside)
            pooled = tl.maximum(pooled, near) if MAX else pooled + near
        total += pooled
    tl.store(out + head * num_scored + column, total * factor, mask=column < num_scored)
