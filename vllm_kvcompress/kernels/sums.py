"""Adds up what queries pay to each token of watched requests, from inside a captured graph.

The sum of a token is kept where its key is: one number beside each place of a page. So nothing grows with a
request, and what a graph captured is right whoever comes and goes. Attention is computed a second time, in
two passes: the first leaves the softmax's denominator of each query, the second adds, each program to the
sums of keys that are its alone. Nothing of the size of the attention is ever held, and sums come out the same
to the last bit whatever else runs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_kvcompress.kernels.arithmetic import DTYPES, dot, tanh
from vllm_kvcompress.kernels.attention import (
    MIN_SHARE,
    depth,
    find_keys,
    find_queries,
    logit_factors,
    merged_lse,
    pipelines,
    token_offsets,
    with_sink,
)
from vllm_kvcompress.kernels.batch import Rows, Runs, Scales
from vllm_kvcompress.kernels.tiles import MAX_TILE, MIN_DOT, Tiles

NOT, ATTENTION, SQUARES, PAUSED = range(4)  # what is added up of a row
_NOT, _SQUARES, _PAUSED = tl.constexpr(NOT), tl.constexpr(SQUARES), tl.constexpr(PAUSED)


def add_attention(
    sums: Tensor,
    added: Tensor,
    query: Tensor,
    keys: Tensor,
    runs: Runs,
    rows: Rows,
    layer: int,
    scale: float,
    logits_soft_cap: float = 0.0,
    num_splits: int = 1,
    num_shares: int = 1,
    min_share: int = MIN_SHARE,
    dtype: torch.dtype | None = None,
    scales: Scales | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Add to each token of a layer what this step's queries pay to it.

        sum_i += Σ over the group Σ over the row's queries of A_i, or of A_i²
        A = softmax(cap·tanh(scale·q·kᵀ / cap)), or softmax(scale·q·kᵀ) without a cap, causal

    The sums of this step's own tokens begin at 0, whatever their places held. Two launches, whose grids
    depend on shapes alone. Logits and softmax are float32.

    Args:
        sums: `[S·B·H, N]` float32, written: of page (s·B + b)·H + h.
        added: `[R]` int64, what is added up of each row: `NOT`, `ATTENTION`, `SQUARES`, or `PAUSED`, for
            which sums of new tokens become 0 and nothing is added. Rows are compacted to raw pages, or not.
        query: `[T, Hq, D]`, as `attention.attend` takes it.
        keys: `[S, B, H, N, D]`, a view of the cache in `dtype` or float8, whose tokens follow each other at
            one distance through all pages.
        runs: where compacted rows have their pages.
        rows: the batch.
        layer: which of the L layers, as `attend` takes it.
        scale: softmax scale.
        logits_soft_cap: 0 for none.
        num_splits: shares that the keys of a tile of queries are cut into by the first pass.
        num_shares: shares that the keys of a head are cut into by the second.
        min_share: least keys of a share.
        dtype: of the model; query's if it is not given.
        scales: the layer's, if the cache is float8.
        sinks: `[Hq]`, one more logit of each query head, to which no token belongs; behind the cap.
    """
    num_tokens, query_heads, _ = query.shape
    num_slots, num_blocks, heads, block_size, _ = keys.shape
    dtype, token = dtype or query.dtype, keys.stride(3)
    page = block_size * token
    assert keys.stride() == (num_blocks * heads * page, heads * page, page, token, 1)
    assert sums.is_contiguous() and sums.shape == (num_slots * num_blocks * heads, block_size)
    assert query.stride(2) == 1 and sums.dtype == torch.float32

    most_rows = MIN_DOT if dtype.itemsize == 4 else MAX_TILE  # for which there are registers
    tiles = Tiles.of(query, heads, rows, dtype, most_rows=most_rows)
    num_rows = rows.seq_lens.shape[0]
    levels = torch.empty(num_tokens, query_heads, num_splits, dtype=torch.float32, device=query.device)
    inner, outer = logit_factors(scale, logits_soft_cap)
    arguments = (
        query,
        keys,
        levels,
        added,
        *((None,) * 2 if scales is None else (scales.query, scales.key)),
        runs.destination,
        runs.start,
        runs.boundary,
        rows.slot,
        rows.block_table,
        rows.seq_lens,
        rows.query_start_loc,
        runs.slot_of(layer),
        layer - runs.slot_of(layer),  # as layer and slot apart, registers would not suffice
        num_rows,
        min_share,
        inner,
        outer,
        *query.stride()[:2],
        *keys.stride()[:3],
        runs.destination.stride(0),
        runs.start.stride(0),
        rows.block_table.stride(0),
    )
    how = depth(dtype.itemsize, tiles.channels, tiles.rows, scales is not None, pipelines(query.device))
    constants = dict(
        SOFT_CAP=logits_soft_cap > 0,
        TOKEN=token,
        KEYS=tiles.keys,
        DTYPE=DTYPES[dtype],
        FLOAT8=scales is not None,
        FLOAT8_QUERY=query.dtype != dtype,
        **tiles.constants(query, keys),
        **how,
    )
    _level_kernel[tiles.count, heads, num_splits](*arguments, **constants)
    _add_kernel[num_rows, heads, num_shares](
        *arguments, sums, sinks, num_splits, SINKS=sinks is not None, SPLIT=num_splits > 1, **constants
    )


@triton.jit
def _factor(inner, query_scale, key_scale, FLOAT8: tl.constexpr, FLOAT8_QUERY: tl.constexpr):
    """What products are multiplied with first, float8's scales included."""
    if FLOAT8:
        inner *= tl.load(key_scale)
    if FLOAT8_QUERY:
        inner *= tl.load(query_scale)
    return inner


@triton.jit
def _tile_queries(
    query, first, until, first_token, head, query_token, query_head,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, HEAD_SIZE: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A row's queries from a first one on: numbers, tokens, heads, which are there, and themselves."""
    pair, channel = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    number = first + pair // GROUP
    token = (first_token + number).to(tl.int64)
    query_of = head * GROUP + pair % GROUP
    real = (pair < QUERIES * GROUP) & (number < until)
    q = tl.load(
        query + (token * query_token + query_of * query_head)[:, None] + channel[None, :],
        mask=real[:, None] & (channel < HEAD_SIZE)[None, :],
        other=0.0,
    ).to(DTYPE)
    return number, token, query_of, real, q


@triton.jit
def _tile_keys(
    keys, key, held, run_blocks, first_page, run_pages, tail_blocks, own_slot, head,
    slot_stride, block_stride, head_stride,
    TOKEN: tl.constexpr, HEADS: tl.constexpr, PAGES_PER_BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Where a tile's keys are, and themselves, `[CHANNELS, KEYS]`."""
    channel = tl.arange(0, CHANNELS)
    offset = token_offsets(
        key, held, run_blocks, first_page, run_pages, tail_blocks, own_slot, head,
        slot_stride, block_stride, head_stride, TOKEN, HEADS, PAGES_PER_BLOCK, BLOCK_SIZE,
    )  # fmt: skip
    mask = held[None, :] & (channel < HEAD_SIZE)[:, None]
    return offset, tl.load(keys + offset[None, :] + channel[:, None], mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _tile_logits(
    q,
    k,
    key,
    held,
    last_seen,
    inner,
    outer,
    SOFT_CAP: tl.constexpr,
):
    """Logits `[ROWS, KEYS]` in base 2; -inf where there is no key, or it is behind the last that is seen."""
    logits = dot(q, k) * inner
    if SOFT_CAP:
        logits = tanh(logits) * outer
    return tl.where(held[None, :] & (key[None, :] <= last_seen[:, None]), logits, -float("inf"))


@triton.jit(
    do_not_specialize=[
        "own_slot",
        "behind",
        "num_rows",
        "min_share",
        "destination_row",
        "start_row",
        "table_row",
    ],
)
def _level_kernel(
    query,
    keys,
    levels,  # [T, Hq, splits], written: logarithms of what each split has of the denominator
    added,
    query_scale,
    key_scale,
    destination,
    start,
    boundary,
    row_slot,
    block_table,
    seq_lens,
    query_start_loc,
    own_slot,
    behind,  # which layer it is, less that slot
    num_rows,
    min_share,
    inner,
    outer,
    query_token,
    query_head,
    slot_stride,
    block_stride,
    head_stride,
    destination_row,
    start_row,
    table_row,
    SOFT_CAP: tl.constexpr,
    ONE_TILE: tl.constexpr,
    HEADS: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKEN: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DTYPE: tl.constexpr,
    FLOAT8: tl.constexpr,
    FLOAT8_QUERY: tl.constexpr,
):
    head, split, splits = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    row, first_query = find_queries(query_start_loc, num_rows, QUERIES, ONE_TILE)
    how = tl.load(added + row)
    first_token = tl.load(query_start_loc + row)
    num_queries = tl.load(query_start_loc + row + 1) - first_token
    if (how == _NOT) | (how == _PAUSED) | (first_query >= num_queries):
        return
    slot = tl.load(row_slot + row)
    first_page, run_pages, raw_from, run_blocks, tail_blocks = find_keys(
        row, slot, own_slot + behind, head, destination, start, boundary, block_table,
        destination_row, start_row, table_row, HEADS, BLOCK_SIZE,
    )  # fmt: skip
    own = run_pages * BLOCK_SIZE - raw_from + tl.load(seq_lens + row) - num_queries
    visible = own + tl.minimum(first_query + QUERIES, num_queries)
    share = tl.maximum(tl.cdiv(tl.cdiv(visible, splits), KEYS) * KEYS, min_share)
    begin = split * share
    end = tl.minimum(begin + share, visible)

    number, token, query_of, real, q = _tile_queries(
        query, first_query, num_queries, first_token, head, query_token, query_head,
        GROUP, QUERIES, HEAD_SIZE, CHANNELS, ROWS, DTYPE,
    )  # fmt: skip
    level_at = levels + (token * (HEADS * GROUP) + query_of) * splits + split
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    inner = _factor(inner, query_scale, key_scale, FLOAT8, FLOAT8_QUERY)
    for tile in range(begin, end, KEYS):
        key = tile + tl.arange(0, KEYS)
        held = key < end
        _, k = _tile_keys(
            keys, key, held, run_blocks, first_page, run_pages, tail_blocks, own_slot, head,
            slot_stride, block_stride, head_stride,
            TOKEN, HEADS, PAGES_PER_BLOCK, BLOCK_SIZE, HEAD_SIZE, CHANNELS, DTYPE,
        )  # fmt: skip
        logits = _tile_logits(q, k, key, held, own + number, inner, outer, SOFT_CAP)
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        level = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        total = total * tl.exp2(peak - level) + tl.sum(tl.exp2(logits - level[:, None]), 1)
        peak = new_peak
    some = total > 0.0
    found = (peak + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453
    tl.store(level_at, tl.where(some, found, -float("inf")), mask=real)


@triton.jit
def _whole_level(level_at, sinks, query_of, splits, real, SPLIT: tl.constexpr, SINKS: tl.constexpr):
    """Logarithm `[ROWS]` in base 2 of each query's denominator, the sink's part included; 0 for no query."""
    if SPLIT:
        level = merged_lse(level_at, 1, splits, real)
    else:
        level = tl.load(level_at, mask=real, other=0.0)
    if SINKS:
        level, _ = with_sink(level, tl.load(sinks + query_of, mask=real, other=0.0).to(tl.float32))
    return tl.where(real, level * 1.4426950408889634, 0.0)


@triton.jit
def _gained(logits, level, real, squares):
    """What a tile of queries pays to each of a tile's keys, or its squares, `[KEYS]`."""
    paid = tl.where(real[:, None], tl.exp2(logits - level[:, None]), 0.0)
    return tl.sum(tl.where(squares, paid * paid, paid), 0)


@triton.jit(
    do_not_specialize=[
        "own_slot",
        "behind",
        "num_rows",
        "min_share",
        "splits",
        "destination_row",
        "start_row",
        "table_row",
    ],
)
def _add_kernel(
    query,
    keys,
    levels,  # [T, Hq, splits]
    added,
    query_scale,
    key_scale,
    destination,
    start,
    boundary,
    row_slot,
    block_table,
    seq_lens,
    query_start_loc,
    own_slot,
    behind,  # which layer it is, less that slot
    num_rows,
    min_share,
    inner,
    outer,
    query_token,
    query_head,
    slot_stride,
    block_stride,
    head_stride,
    destination_row,
    start_row,
    table_row,
    sums,  # [S·B·H, N], written
    sinks,
    splits,
    SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    ONE_TILE: tl.constexpr,
    HEADS: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKEN: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DTYPE: tl.constexpr,
    FLOAT8: tl.constexpr,
    FLOAT8_QUERY: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    how = tl.load(added + row)
    if how == _NOT:
        return
    first_token = tl.load(query_start_loc + row)
    num_queries = tl.load(query_start_loc + row + 1) - first_token
    slot = tl.load(row_slot + row)
    first_page, run_pages, raw_from, run_blocks, tail_blocks = find_keys(
        row, slot, own_slot + behind, head, destination, start, boundary, block_table,
        destination_row, start_row, table_row, HEADS, BLOCK_SIZE,
    )  # fmt: skip
    own = run_pages * BLOCK_SIZE - raw_from + tl.load(seq_lens + row) - num_queries
    share = tl.maximum(tl.cdiv(tl.cdiv(own + num_queries, tl.num_programs(2)), KEYS) * KEYS, min_share)
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, own + num_queries)
    paying = tl.where(how == _PAUSED, 0, num_queries)

    inner = _factor(inner, query_scale, key_scale, FLOAT8, FLOAT8_QUERY)
    squares = how == _SQUARES
    if ONE_TILE:
        number, token, query_of, real, q = _tile_queries(
            query, 0, paying, first_token, head, query_token, query_head,
            GROUP, QUERIES, HEAD_SIZE, CHANNELS, ROWS, DTYPE,
        )  # fmt: skip
        level_at = levels + (token * (HEADS * GROUP) + query_of) * splits
        level = _whole_level(level_at, sinks, query_of, splits, real, SPLIT, SINKS)
    for tile in range(begin, end, KEYS):
        key = tile + tl.arange(0, KEYS)
        held = key < end
        offset, k = _tile_keys(
            keys, key, held, run_blocks, first_page, run_pages, tail_blocks, own_slot, head,
            slot_stride, block_stride, head_stride,
            TOKEN, HEADS, PAGES_PER_BLOCK, BLOCK_SIZE, HEAD_SIZE, CHANNELS, DTYPE,
        )  # fmt: skip
        place = sums + offset // TOKEN
        gained = tl.load(place, mask=held & (key < own), other=0.0)
        if ONE_TILE:
            logits = _tile_logits(q, k, key, held, own + number, inner, outer, SOFT_CAP)
            gained += _gained(logits, level, real, squares)
        else:
            # Queries before the tile's first key see none of it.
            for first in range(tl.maximum(tile - own, 0) // QUERIES * QUERIES, paying, QUERIES):
                number, token, query_of, real, q = _tile_queries(
                    query, first, paying, first_token, head, query_token, query_head,
                    GROUP, QUERIES, HEAD_SIZE, CHANNELS, ROWS, DTYPE,
                )  # fmt: skip
                level_at = levels + (token * (HEADS * GROUP) + query_of) * splits
                level = _whole_level(level_at, sinks, query_of, splits, real, SPLIT, SINKS)
                logits = _tile_logits(q, k, key, held, own + number, inner, outer, SOFT_CAP)
                gained += _gained(logits, level, real, squares)
        tl.store(place, gained, mask=held)
