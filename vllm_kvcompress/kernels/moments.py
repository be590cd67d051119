"""Keeps mean and covariance of watched requests' queries before RoPE, from inside a captured graph.

Queries are taken back through RoPE as they are read, and added tile by tile: the moments of a tile, about its
own mean, are merged with those of all before it (Chan et al., 1979), so that a mean far from the origin costs
no digits. Each program has some rows of one head's covariance, and a mean and a count of its own beside them:
what it reads nobody else writes, and what is kept is the same to the last bit whatever else runs.

Of a chunk each program adds up so many queries, wherever its row is in the batch: the first one to what is
kept, the others for a second kernel, which merges theirs likewise, one after the other.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_kvcompress.kernels.arithmetic import DTYPES, before_rotation, dot
from vllm_kvcompress.kernels.attention import find_row, pipelines
from vllm_kvcompress.kernels.batch import MOMENT_ROWS, Rows, Scales, moment_shape
from vllm_kvcompress.kernels.tiles import MIN_DOT

AT_ONCE = 2048  # elements of the queries that a program works on at once
BUFFER_BYTES = 48 * 1024  # of those that it reads meanwhile, with what rotates them
MOST_PROGRAMS = 2048  # of rows that decode: most of a graph's have nothing to do
SEGMENT = 512  # queries of a row that a program adds up


def add_moments(
    address: Tensor,
    skip: Tensor,
    layer: int,
    query: Tensor,
    rows: Rows,
    cos_sin: Tensor,
    is_neox: bool,
    first_rotated: int = 0,
    dtype: torch.dtype | None = None,
    scales: Scales | None = None,
) -> None:
    """Add a step's queries of one layer to the moments of their requests.

        n ← n + 1, μ ← mean of all q, S ← Σ (q - μ)(q - μ)ᵀ,  q before RoPE

    One launch, or two where a row may have more queries than `SEGMENT`; grids depend on shapes alone. Moments
    are given by address, so that a captured graph serves requests that come and go; float32 throughout.

    Args:
        address: `[R]` int64, of each row's moments, contiguous float32 `[L, *moment_shape(Hq, D)]`; 0 for
            rows that nobody watches.
        skip: `[R]` int64, positions from 0 on whose queries are left out.
        layer: which of the L layers.
        query: `[T, Hq, D]` after RoPE; rows follow each other as `query_start_loc` says.
        rows: the batch; only lengths and starts are read.
        cos_sin: `[positions, R]`, cosines of the R/2 angles, then their sines; R <= D elements are rotated.
        is_neox: whether element i is paired with i + R/2; otherwise 2i with 2i + 1.
        first_rotated: the first element that is rotated.
        dtype: of the model; query's if it is not given.
        scales: the layer's, if queries are float8.
    """
    dtype = dtype or query.dtype
    num_tokens, query_heads, head_size = query.shape
    _, parts, _, _ = moment_shape(query_heads, head_size)
    float8 = query.dtype != dtype
    assert query.stride(2) == cos_sin.stride(1) == 1 and cos_sin.shape[1] % 2 == 0
    channels = triton.next_power_of_2(head_size)
    queries = max(MIN_DOT, min(64, AT_ONCE // channels))
    read = 2 * queries * channels * (query.element_size() + cos_sin.element_size())
    buffers = min(2, BUFFER_BYTES // read) if pipelines(query.device) else 0
    num_rows, programs = rows.seq_lens.shape[0], query_heads * parts
    if rows.max_query_len <= queries and channels <= 256:  # wider ones have no registers to loop with
        programs = min(programs, max(1, MOST_PROGRAMS // num_rows))
    split, work = rows.max_query_len > SEGMENT, None
    if split:
        shape = num_tokens // SEGMENT, *moment_shape(query_heads, head_size)
        work = torch.empty(shape, dtype=torch.float32, device=query.device)
    constants = dict(PARTS=parts, HEAD_SIZE=head_size, CHANNELS=channels, ROWS=MOMENT_ROWS, SEGMENT=SEGMENT)
    _moment_kernel[num_tokens // SEGMENT + num_rows if split else num_rows, programs](
        address,
        skip,
        layer,
        query,
        cos_sin,
        work,
        rows.seq_lens,
        rows.query_start_loc,
        num_rows,
        scales.query if float8 and scales is not None else None,
        *query.stride()[:2],
        cos_sin.stride(0),
        DTYPE=DTYPES[dtype],
        FLOAT8=float8,
        NEOX=is_neox,
        HEADS=query_heads,
        ALL=programs == query_heads * parts,
        SPLIT=split,
        ROTATED=cos_sin.shape[1],
        FIRST=first_rotated,
        QUERIES=queries,
        num_warps=8,
        num_stages=1 + buffers,
        **constants,
    )
    if split:
        _merge_moments_kernel[num_rows, programs](
            address,
            skip,
            layer,
            work,
            rows.seq_lens,
            rows.query_start_loc,
            HEADS=query_heads,
            num_warps=8,
            **constants,
        )


def merged_bytes(max_tokens: int, query_heads: int, head_size: int) -> int:
    """A bound on the bytes of a layer's moments that are still to be merged.

    Args:
        max_tokens: of a batch.
        query_heads: Hq.
        head_size: D.
    """
    return 4 * (max_tokens // SEGMENT) * math.prod(moment_shape(query_heads, head_size))


@triton.jit
def _part_of(
    moments, layer, item,
    HEADS: tl.constexpr, PARTS: tl.constexpr, HEAD_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Where some rows of one head's covariance are, with their mean and count."""
    own = moments + (layer * (HEADS * PARTS) + item).to(tl.int64) * ((ROWS + 2) * HEAD_SIZE)
    if HEAD_SIZE % 4 == 0:  # PyTorch's memory begins at such an address, and so does every part of it
        own = tl.multiple_of(own, 16)
    return own


@triton.jit
def _load_part(
    own, item, size, PARTS: tl.constexpr, HEAD_SIZE: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Scatter `[ROWS, CHANNELS]`, mean `[CHANNELS]`, that of the own rows and a count; zeros if size is 0."""
    channel, line = tl.arange(0, CHANNELS), tl.arange(0, ROWS)
    mine = item % PARTS * ROWS + line
    held = (mine < size)[:, None] & (channel < size)[None, :]
    mean_at = own + ROWS * HEAD_SIZE
    scatter = tl.load(own + line[:, None] * HEAD_SIZE + channel[None, :], mask=held, other=0.0)
    mean = tl.load(mean_at + channel, mask=channel < size, other=0.0)
    my_mean = tl.load(mean_at + mine, mask=mine < size, other=0.0)
    return scatter, mean, my_mean, tl.where(size > 0, tl.load(mean_at + HEAD_SIZE), 0.0)


@triton.jit
def _store_part(
    own, item, scatter, mean, seen,
    PARTS: tl.constexpr, HEAD_SIZE: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """As of `_load_part`."""
    channel, line = tl.arange(0, CHANNELS), tl.arange(0, ROWS)
    held = (item % PARTS * ROWS + line < HEAD_SIZE)[:, None] & (channel < HEAD_SIZE)[None, :]
    mean_at = own + ROWS * HEAD_SIZE
    tl.store(own + line[:, None] * HEAD_SIZE + channel[None, :], scatter, mask=held)
    tl.store(mean_at + channel, mean, mask=channel < HEAD_SIZE)
    tl.store(mean_at + HEAD_SIZE, seen)


@triton.jit
def _merge(scatter, mean, my_mean, seen, other_scatter, other_mean, my_other_mean, count):
    """The moments of two sets of queries together (Chan et al., 1979)."""
    apart, my_apart = other_mean - mean, my_other_mean - my_mean
    share = count / (seen + count)
    scatter += other_scatter
    scatter += my_apart[:, None] * apart[None, :] * (seen * share)
    return scatter, mean + apart * share, my_mean + my_apart * share, seen + count


@triton.jit
def _add_to_part(
    item, own, size, query, cos_sin, shift, begin, end,
    scale, query_token, query_head, table_row,
    DTYPE: tl.constexpr, FLOAT8: tl.constexpr, NEOX: tl.constexpr, PARTS: tl.constexpr,
    HEAD_SIZE: tl.constexpr, CHANNELS: tl.constexpr, ROTATED: tl.constexpr, FIRST: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Add queries from token `begin` up to `end`, whose positions are `shift` further, to some rows of one
    head's covariance; or if size is 0 write theirs alone.
    """
    head, channel = item // PARTS, tl.arange(0, CHANNELS)
    mine = item % PARTS * ROWS + tl.arange(0, ROWS)
    scatter, mean, my_mean, seen = _load_part(own, item, size, PARTS, HEAD_SIZE, CHANNELS, ROWS)
    factor = tl.load(scale) if FLOAT8 else 1.0
    for first in range(begin, end, QUERIES):
        token = first + tl.arange(0, QUERIES)
        real, position = token < end, token + shift
        at = query + head * query_head + token.to(tl.int64) * query_token
        every = before_rotation(
            at, cos_sin, position, channel, real, factor, table_row,
            DTYPE, FLOAT8, NEOX, HEAD_SIZE, ROTATED, FIRST,
        )  # fmt: skip
        some = before_rotation(
            at, cos_sin, position, mine, real, factor, table_row,
            DTYPE, FLOAT8, NEOX, HEAD_SIZE, ROTATED, FIRST,
        )  # fmt: skip
        count = tl.minimum(end - first, QUERIES).to(tl.float32)
        tile_mean, my_tile_mean = tl.sum(every, 0) / count, tl.sum(some, 0) / count
        centred = tl.where(real[:, None], every - tile_mean[None, :], 0.0)
        my_centred = tl.where(real[:, None], some - my_tile_mean[None, :], 0.0)
        product = dot(tl.trans(my_centred), centred)
        scatter, mean, my_mean, seen = _merge(
            scatter, mean, my_mean, seen, product, tile_mean, my_tile_mean, count
        )
    _store_part(own, item, scatter, mean, seen, PARTS, HEAD_SIZE, CHANNELS, ROWS)


@triton.jit(do_not_specialize=["layer", "num_rows"])
def _moment_kernel(
    address,
    skip,
    layer,
    query,
    cos_sin,
    work,  # [T // SEGMENT, Hq, PARTS, ROWS + 2, D], if SPLIT
    seq_lens,
    query_start_loc,
    num_rows,
    scale,
    query_token,
    query_head,
    table_row,
    DTYPE: tl.constexpr,
    FLOAT8: tl.constexpr,
    NEOX: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    ALL: tl.constexpr,
    SPLIT: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROTATED: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    row, segment = tl.program_id(0), 0
    if SPLIT:
        row = find_row(tl.program_id(0), query_start_loc, num_rows, SEGMENT, 1)
        segment = tl.program_id(0) - tl.load(query_start_loc + row) // SEGMENT - row
    place = tl.load(address + row)
    if place == 0:
        return
    first_token = tl.load(query_start_loc + row)
    num_queries = tl.load(query_start_loc + row + 1) - first_token
    first_position = tl.load(seq_lens + row) - num_queries
    begin = tl.maximum(tl.load(skip + row) - first_position, segment * SEGMENT).to(tl.int32)
    end = num_queries
    if SPLIT:
        end = tl.minimum(num_queries, (segment + 1) * SEGMENT)
    if begin >= end:
        return
    shift, first, last = first_position - first_token, first_token + begin, first_token + end
    moments = place.to(tl.pointer_type(tl.float32))
    if ALL:
        item = tl.program_id(1)
        base, unit, size = moments, layer, HEAD_SIZE
        if SPLIT:
            if segment > 0:  # of these a row has no more than whole segments end in it
                base, unit, size = work, first_token // SEGMENT + segment - 1, 0
        own = _part_of(base, unit, item, HEADS, PARTS, HEAD_SIZE, ROWS)
        _add_to_part(
            item, own, size, query, cos_sin, shift, first, last,
            scale, query_token, query_head, table_row,
            DTYPE, FLOAT8, NEOX, PARTS, HEAD_SIZE, CHANNELS, ROTATED, FIRST, ROWS, QUERIES,
        )  # fmt: skip
    else:
        for item in range(tl.program_id(1), HEADS * PARTS, tl.num_programs(1)):
            own = _part_of(moments, layer, item, HEADS, PARTS, HEAD_SIZE, ROWS)
            _add_to_part(
                item, own, HEAD_SIZE, query, cos_sin, shift, first, last,
                scale, query_token, query_head, table_row,
                DTYPE, FLOAT8, NEOX, PARTS, HEAD_SIZE, CHANNELS, ROTATED, FIRST, ROWS, QUERIES,
            )  # fmt: skip


@triton.jit(do_not_specialize=["layer"])
def _merge_moments_kernel(
    address,
    skip,
    layer,
    work,  # as above
    seq_lens,
    query_start_loc,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    row, item = tl.program_id(0), tl.program_id(1)
    place = tl.load(address + row)
    if place == 0:
        return
    first_token = tl.load(query_start_loc + row)
    num_queries = tl.load(query_start_loc + row + 1) - first_token
    begin = tl.maximum(tl.load(skip + row) - tl.load(seq_lens + row) + num_queries, 0).to(tl.int32)
    if (num_queries <= SEGMENT) | (begin >= num_queries):
        return
    moments = place.to(tl.pointer_type(tl.float32))
    own = _part_of(moments, layer, item, HEADS, PARTS, HEAD_SIZE, ROWS)
    scatter, mean, my_mean, seen = _load_part(own, item, HEAD_SIZE, PARTS, HEAD_SIZE, CHANNELS, ROWS)
    for segment in range(tl.maximum(begin // SEGMENT, 1), tl.cdiv(num_queries, SEGMENT)):
        unit = first_token // SEGMENT + segment - 1
        other = _part_of(work, unit, item, HEADS, PARTS, HEAD_SIZE, ROWS)
        other_scatter, other_mean, my_other_mean, count = _load_part(
            other, item, HEAD_SIZE, PARTS, HEAD_SIZE, CHANNELS, ROWS
        )
        scatter, mean, my_mean, seen = _merge(
            scatter, mean, my_mean, seen, other_scatter, other_mean, my_other_mean, count
        )
    _store_part(own, item, scatter, mean, seen, PARTS, HEAD_SIZE, CHANNELS, ROWS)
