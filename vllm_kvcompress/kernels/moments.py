"""Keeps mean and covariance of watched requests' queries before RoPE, from inside a captured graph.

Queries are taken back through RoPE as they are read, and added tile by tile: the moments of a tile, about its
own mean, are merged with those of all before it (Chan et al., 1979), so that a mean far from the origin costs
no digits. Each program has some rows of one head's covariance, and a mean and a count of its own beside them:
what it reads nobody else writes, and what is kept is the same to the last bit whatever else runs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_kvcompress.kernels.arithmetic import DTYPES, before_rotation, dot
from vllm_kvcompress.kernels.attention import pipelines
from vllm_kvcompress.kernels.batch import MOMENT_ROWS, Rows, Scales, moment_shape
from vllm_kvcompress.kernels.tiles import MIN_DOT

AT_ONCE = 2048  # elements of the queries that a program works on at once
BUFFER_BYTES = 48 * 1024  # of those that it reads meanwhile, with what rotates them
MOST_PROGRAMS = 2048  # of rows that decode: most of a graph's have nothing to do


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

    One launch, whose grid depends on shapes alone. Moments are given by address, so that a captured graph
    serves requests that come and go; float32 throughout.

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
    _, query_heads, head_size = query.shape
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
    _moment_kernel[num_rows, programs](
        address,
        skip,
        layer,
        query,
        cos_sin,
        rows.seq_lens,
        rows.query_start_loc,
        scales.query if float8 and scales is not None else None,
        *query.stride()[:2],
        cos_sin.stride(0),
        DTYPE=DTYPES[dtype],
        FLOAT8=float8,
        NEOX=is_neox,
        HEADS=query_heads,
        PARTS=parts,
        ALL=programs == query_heads * parts,
        HEAD_SIZE=head_size,
        CHANNELS=channels,
        ROTATED=cos_sin.shape[1],
        FIRST=first_rotated,
        ROWS=MOMENT_ROWS,
        QUERIES=queries,
        num_warps=8,
        num_stages=1 + buffers,
    )


@triton.jit
def _add_to_part(
    item, moments, layer, query, cos_sin, first_token, first_position, begin, num_queries,
    scale, query_token, query_head, table_row,
    DTYPE: tl.constexpr, FLOAT8: tl.constexpr, NEOX: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr,
    HEAD_SIZE: tl.constexpr, CHANNELS: tl.constexpr, ROTATED: tl.constexpr, FIRST: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Add a row's queries from `begin` on to some rows of one head's covariance."""
    head, part = item // PARTS, item % PARTS
    own = moments + (layer * (HEADS * PARTS) + item).to(tl.int64) * ((ROWS + 2) * HEAD_SIZE)
    if HEAD_SIZE % 4 == 0:  # PyTorch's memory begins at such an address, and so does every part of it
        own = tl.multiple_of(own, 16)
    channel, line = tl.arange(0, CHANNELS), tl.arange(0, ROWS)
    mine = part * ROWS + line
    scatter_at = own + line[:, None] * HEAD_SIZE + channel[None, :]
    held = (mine < HEAD_SIZE)[:, None] & (channel < HEAD_SIZE)[None, :]
    mean_at = own + ROWS * HEAD_SIZE
    seen_at = mean_at + HEAD_SIZE
    seen = tl.load(seen_at)
    mean = tl.load(mean_at + channel, mask=channel < HEAD_SIZE, other=0.0)
    my_mean = tl.load(mean_at + mine, mask=mine < HEAD_SIZE, other=0.0)
    scatter = tl.load(scatter_at, mask=held, other=0.0)
    factor = tl.load(scale) if FLOAT8 else 1.0
    for first in range(begin, num_queries, QUERIES):
        number = first + tl.arange(0, QUERIES)
        real = number < num_queries
        position = first_position + number
        token = (first_token + number).to(tl.int64)
        at = query + head * query_head + token * query_token
        every = before_rotation(
            at, cos_sin, position, channel, real, factor, table_row,
            DTYPE, FLOAT8, NEOX, HEAD_SIZE, ROTATED, FIRST,
        )  # fmt: skip
        some = before_rotation(
            at, cos_sin, position, mine, real, factor, table_row,
            DTYPE, FLOAT8, NEOX, HEAD_SIZE, ROTATED, FIRST,
        )  # fmt: skip
        count = tl.minimum(num_queries - first, QUERIES).to(tl.float32)
        tile_mean, my_tile_mean = tl.sum(every, 0) / count, tl.sum(some, 0) / count
        centred = tl.where(real[:, None], every - tile_mean[None, :], 0.0)
        my_centred = tl.where(real[:, None], some - my_tile_mean[None, :], 0.0)
        apart, my_apart = tile_mean - mean, my_tile_mean - my_mean
        share = count / (seen + count)
        scatter += dot(tl.trans(my_centred), centred)
        scatter += my_apart[:, None] * apart[None, :] * (seen * share)
        mean += apart * share
        my_mean += my_apart * share
        seen += count
    tl.store(scatter_at, scatter, mask=held)
    tl.store(mean_at + channel, mean, mask=channel < HEAD_SIZE)
    tl.store(seen_at, seen)


@triton.jit(do_not_specialize=["layer"])
def _moment_kernel(
    address,
    skip,
    layer,
    query,
    cos_sin,
    seq_lens,
    query_start_loc,
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
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROTATED: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    row = tl.program_id(0)
    place = tl.load(address + row)
    if place == 0:
        return
    first_token = tl.load(query_start_loc + row)
    num_queries = tl.load(query_start_loc + row + 1) - first_token
    first_position = tl.load(seq_lens + row) - num_queries
    begin = tl.maximum(tl.load(skip + row) - first_position, 0).to(tl.int32)
    if begin >= num_queries:
        return
    moments = place.to(tl.pointer_type(tl.float32))
    if ALL:
        _add_to_part(
            tl.program_id(1), moments, layer, query, cos_sin, first_token, first_position, begin, num_queries,
            scale, query_token, query_head, table_row,
            DTYPE, FLOAT8, NEOX, HEADS, PARTS, HEAD_SIZE, CHANNELS, ROTATED, FIRST, ROWS, QUERIES,
        )  # fmt: skip
    else:
        for item in range(tl.program_id(1), HEADS * PARTS, tl.num_programs(1)):
            _add_to_part(
                item, moments, layer, query, cos_sin, first_token, first_position, begin, num_queries,
                scale, query_token, query_head, table_row,
                DTYPE, FLOAT8, NEOX, HEADS, PARTS, HEAD_SIZE, CHANNELS, ROTATED, FIRST, ROWS, QUERIES,
            )  # fmt: skip
