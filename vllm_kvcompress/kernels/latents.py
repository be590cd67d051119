"""Attention of decode and extend rows over pages of full and of shortened vectors and the raw tail.

One launch for each rank: a program serves some queries of one row, one KV head with its whole group, and one
share of the tokens that the head has in that rank. Queries are turned into the head's basis once, only the
coordinates that are there are multiplied and summed, and the sum of values is turned back once, at the end:
no key or value has all of its channels anywhere. The launch of full vectors reads the raw tail, too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_kvcompress.formats.base import RECORD
from vllm_kvcompress.formats.mixed_dim import MixedDim, Vectors
from vllm_kvcompress.kernels.arithmetic import dot, tanh
from vllm_kvcompress.kernels.attention import (
    LOG2_E,
    find_queries,
    has_format,
    logit_factors,
    merge,
)
from vllm_kvcompress.kernels.batch import Rows, Runs
from vllm_kvcompress.kernels.tiles import MIN_DOT, MOST_RAW, Tiles, empty_shares

CHANNELS_AT_ONCE = 64  # of a basis
BITS_OF_E = tl.constexpr(LOG2_E)
TOKENS = tl.constexpr(RECORD)


def attend_latents(
    query: Tensor,
    pages: Tensor,
    keys: Tensor,
    values: Tensor,
    runs: Runs,
    rows: Rows,
    layer: int,
    format: MixedDim,
    format_id: int,
    scale: float,
    logits_soft_cap: float,
    num_splits: int,
    min_share: int,
    out: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention of the rows of a `MixedDim`; arguments and what it returns are as of `attend_records`."""
    num_tokens, query_heads, head_size = query.shape
    share_out, share_lse = empty_shares(query, num_splits * len(format.parts))
    lse = torch.empty(num_tokens, query_heads, dtype=torch.float32, device=query.device)
    for number, part in enumerate(format.parts):
        own = slice(number * num_splits, (number + 1) * num_splits)
        shares = share_out[:, :, own], share_lse[:, :, own]
        where = layer, part, format.basis.record_bytes(head_size), format_id, number
        arguments = scale, logits_soft_cap, min_share, *shares, bias
        _attend_rank(query, pages, keys, values, runs, rows, *where, *arguments)
    merge(share_out, share_lse, out, lse, runs, rows, format_id, sinks=sinks)
    return out, lse


def _attend_rank(
    query: Tensor,
    pages: Tensor,
    keys: Tensor,
    values: Tensor,
    runs: Runs,
    rows: Rows,
    layer: int,
    part: Vectors,
    basis_bytes: int,
    format_id: int,
    number: int,
    scale: float,
    logits_soft_cap: float,
    min_share: int,
    share_out: Tensor,
    share_lse: Tensor,
    bias: Tensor | None,
) -> None:
    """Attention over the records of one rank, and over the raw tail if it is the first."""
    head_size, num_splits = query.shape[2], share_lse.shape[2]
    _, num_blocks, heads, _, _ = keys.shape
    page_bytes, record_bytes, rank = pages.shape[1], part.record_bytes(head_size), part.rank(head_size)
    tiles = Tiles.of(query, heads, rows, query.dtype, MOST_RAW)
    inner, outer = logit_factors(scale, logits_soft_cap)
    flat = pages.flatten()
    records, bases = (flat[page_bytes % size :].view(torch.float16) for size in (record_bytes, basis_bytes))
    _latents_kernel[tiles.count, heads, num_splits](
        query,
        records,
        bases,
        keys,
        values,
        share_lse if bias is None else bias,
        share_out,
        share_lse,
        runs.destination,
        runs.start,
        runs.boundary,
        runs.format,
        runs.encoded[:, number],
        runs.first[:, number],
        rows.slot,
        rows.block_table,
        rows.seq_lens,
        rows.query_start_loc,
        layer,
        runs.slot_of(layer),
        format_id,
        rows.seq_lens.shape[0],
        num_blocks,
        min_share,
        inner,
        outer,
        *query.stride()[:2],
        *keys.stride()[:4],
        *((0, 0, 0, 0) if bias is None else bias.stride()),
        *share_out.stride()[:3],
        *share_lse.stride(),
        runs.destination.stride(0),
        runs.start.stride(0),
        runs.encoded.stride(0),
        rows.block_table.stride(0),
        SOFT_CAP=logits_soft_cap > 0,
        RAW_BIAS=bias is not None,
        AT_ONCE=min(CHANNELS_AT_ONCE, tiles.channels),
        RANK=rank,
        COORDINATES=max(MIN_DOT, triton.next_power_of_2(rank)),
        WIDEST=basis_bytes // (4 * head_size),
        RAW=tiles.keys,
        PAGE_BYTES=page_bytes,
        RECORD_BYTES=record_bytes,
        **tiles.constants(query, keys),
        num_warps=4,
    )


@triton.jit
def _half_offset(
    place,
    run_blocks,
    first_page,
    num_blocks,
    HEADS: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    RECORD_BYTES: tl.constexpr,
):
    """Offset of what is at a run's place, int64, in float16 numbers."""
    PER_PAGE: tl.constexpr = PAGE_BYTES // RECORD_BYTES
    linear = first_page + place // PER_PAGE
    block = tl.load(run_blocks + linear // PAGES_PER_BLOCK).to(tl.int64)
    slot = linear % PAGES_PER_BLOCK
    page = (block + slot // HEADS * num_blocks) * HEADS + slot % HEADS
    return page * (PAGE_BYTES // 2) + place % PER_PAGE * (RECORD_BYTES // 2)


@triton.jit(
    do_not_specialize=[
        "layer",
        "own_slot",
        "format_id",
        "num_rows",
        "num_blocks",
        "min_share",
        "destination_row",
        "start_row",
        "part_row",
        "table_row",
    ]
)
def _latents_kernel(
    query,
    records,  # the pages from the first one's first place on, as float16
    bases,  # likewise, places being a basis's
    keys,
    values,
    bias,
    share_out,  # [T, Hq, splits, D]
    share_lse,  # [T, Hq, splits]
    destination,
    start,
    boundary,
    formats,
    encoded,  # tokens in this rank
    first,  # place of each run's first record of it
    row_slot,
    block_table,
    seq_lens,
    query_start_loc,
    layer,
    own_slot,
    format_id,
    num_rows,
    num_blocks,
    min_share,
    inner,
    outer,
    query_token,
    query_head,
    slot_stride,
    block_stride,
    head_stride,
    token_stride,
    bias_slot,
    bias_block,
    bias_head,
    bias_token,
    out_token,
    out_head,
    out_split,
    lse_token,
    lse_head,
    lse_split,
    destination_row,
    start_row,
    part_row,
    table_row,
    SOFT_CAP: tl.constexpr,
    RAW_BIAS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    HEADS: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    RANK: tl.constexpr,
    COORDINATES: tl.constexpr,
    WIDEST: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    RAW: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    RECORD_BYTES: tl.constexpr,
):
    FULL: tl.constexpr = RANK == HEAD_SIZE
    head, split = tl.program_id(1), tl.program_id(2)
    row, first_query = find_queries(query_start_loc, num_rows, QUERIES, ONE_TILE)
    first_token = tl.load(query_start_loc + row)
    num_queries = tl.load(query_start_loc + row + 1) - first_token
    slot = tl.load(row_slot + row)
    if (first_query >= num_queries) | (not has_format(slot, formats, format_id)):
        return

    state = slot.to(tl.int64)
    first_page = tl.load(start + state * start_row + layer * HEADS + head)
    run = state * part_row + layer * HEADS + head
    num_encoded = tl.load(encoded + run)
    first_place = tl.load(first + run)
    raw_from = tl.load(boundary + state)
    run_blocks = destination + state * destination_row
    tail_blocks = block_table + row.to(tl.int64) * table_row + raw_from // BLOCK_SIZE

    # The row's first query is that many tokens behind the head's first.
    own = num_encoded - raw_from + tl.load(seq_lens + row) - num_queries
    visible = own + tl.minimum(first_query + QUERIES, num_queries) if FULL else num_encoded
    share = tl.maximum(tl.cdiv(visible, tl.num_programs(2)), min_share)
    share = tl.cdiv(share, TOKENS) * TOKENS
    begin = split * share
    end = tl.minimum(begin + share, visible)

    pair = tl.arange(0, ROWS)
    number = first_query + pair // GROUP
    token = (first_token + number).to(tl.int64)
    query_of = head * GROUP + pair % GROUP
    real = (pair < QUERIES * GROUP) & (number < num_queries)
    lse_at = share_lse + token * lse_token + query_of * lse_head + split * lse_split
    if begin >= end:
        tl.store(lse_at, tl.full([ROWS], -float("inf"), tl.float32), mask=real)
        return

    query_at = query + token * query_token + query_of * query_head
    coordinate = tl.arange(0, COORDINATES)
    there = coordinate < RANK
    if FULL:
        q = tl.load(query_at[:, None] + coordinate[None, :], mask=real[:, None] & there[None, :], other=0.0)
    else:
        turned = tl.zeros([ROWS, COORDINATES], tl.float32)
        basis = _half_offset(
            0, run_blocks, first_page, num_blocks, HEADS, PAGES_PER_BLOCK, PAGE_BYTES, 4 * HEAD_SIZE * WIDEST
        )
        for channels in tl.static_range(0, CHANNELS, AT_ONCE):
            channel = channels + tl.arange(0, AT_ONCE)
            in_head = channel < HEAD_SIZE
            part = tl.load(
                query_at[:, None] + channel[None, :], mask=real[:, None] & in_head[None, :], other=0.0
            )
            directions = tl.load(
                bases + basis + channel[:, None] * WIDEST + coordinate[None, :],
                mask=in_head[:, None] & there[None, :],
                other=0.0,
            )
            turned += dot(part, directions.to(tl.float32).to(part.dtype))
        q = turned.to(query.dtype.element_ty)

    peak = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, COORDINATES], tl.float32)
    member = tl.arange(0, TOKENS)
    last = first_place + tl.minimum(end, num_encoded) // TOKENS
    for place in tl.range(first_place + begin // TOKENS, last, num_stages=2):
        at = _half_offset(
            place, run_blocks, first_page, num_blocks, HEADS, PAGES_PER_BLOCK, PAGE_BYTES, RECORD_BYTES
        )
        k = tl.load(
            records + at + TOKENS * RANK + coordinate[:, None] * TOKENS + member[None, :],
            mask=there[:, None],
            other=0.0,
        )
        v = tl.load(
            records + at + member[:, None] * RANK + coordinate[None, :], mask=there[None, :], other=0.0
        )
        some = dot(q, k.to(tl.float32).to(q.dtype)) * inner
        if SOFT_CAP:
            some = tanh(some) * outer
        new_peak = tl.maximum(peak, tl.max(some, 1))
        w = tl.exp2(some - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(w, 1)
        result = result * shrink[:, None] + dot(w.to(q.dtype), v.to(tl.float32).to(q.dtype))
        peak = new_peak

    if FULL:
        head_offset = own_slot.to(tl.int64) * slot_stride + head * head_stride
        for tile in tl.range(tl.maximum(begin, num_encoded), end, RAW, num_stages=3):
            key = tile + tl.arange(0, RAW)
            held = key < end
            raw = key - num_encoded
            block = tl.load(tail_blocks + raw // BLOCK_SIZE, mask=held, other=0).to(tl.int64)
            offset = head_offset + block * block_stride + raw % BLOCK_SIZE * token_stride
            mask = held[None, :] & there[:, None]
            k = tl.load(keys + offset[None, :] + coordinate[:, None], mask=mask, other=0.0)
            some = dot(q, k) * inner
            if SOFT_CAP:
                some = tanh(some) * outer
            if RAW_BIAS:
                of_raw = own_slot.to(tl.int64) * bias_slot + block * bias_block + head * bias_head
                of_raw += raw % BLOCK_SIZE * bias_token
                some += tl.load(bias + of_raw, mask=held, other=0.0)[None, :] * BITS_OF_E
            seen = held[None, :] & (key[None, :] <= (own + number)[:, None])
            some = tl.where(seen, some, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(some, 1))
            # A query may see no token of this tile, nor of any before: -inf less -inf must not become NaN.
            level = tl.where(new_peak == -float("inf"), 0.0, new_peak)
            w = tl.exp2(some - level[:, None])
            shrink = tl.exp2(peak - level)
            total = total * shrink + tl.sum(w, 1)
            mask = held[:, None] & there[None, :]
            v = tl.load(values + offset[:, None] + coordinate[None, :], mask=mask, other=0.0)
            result = result * shrink[:, None] + dot(w.to(v.dtype), v)
            peak = new_peak

    some_seen = total > 0.0
    divisor = tl.where(some_seen, total, 1.0)
    lse = tl.where(some_seen, (peak + tl.log2(divisor)) * 0.6931471805599453, -float("inf"))
    tl.store(lse_at, lse, mask=real)
    result = result / divisor[:, None]
    out_at = share_out + token * out_token + query_of * out_head + split * out_split
    if FULL:
        tl.store(out_at[:, None] + coordinate[None, :], result, mask=real[:, None] & there[None, :])
    else:
        for channels in tl.static_range(0, CHANNELS, AT_ONCE):
            channel = channels + tl.arange(0, AT_ONCE)
            in_head = channel < HEAD_SIZE
            directions = tl.load(
                bases + basis + HEAD_SIZE * WIDEST + coordinate[:, None] * HEAD_SIZE + channel[None, :],
                mask=there[:, None] & in_head[None, :],
                other=0.0,
            )
            back = dot(result.to(q.dtype), directions.to(tl.float32).to(q.dtype))
            tl.store(out_at[:, None] + channel[None, :], back, mask=real[:, None] & in_head[None, :])
