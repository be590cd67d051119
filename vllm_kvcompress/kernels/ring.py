"""Keeps the queries of every watched request's newest tokens, from inside a captured graph."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_kvcompress.kernels.arithmetic import DTYPES
from vllm_kvcompress.kernels.batch import Scales

AT_ONCE = 1024  # elements
MOST_PROGRAMS = 16  # for the queries of a row; each writes every 16th


def write_rings(
    address: Tensor,
    capacity: Tensor,
    layer: int,
    query: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    max_query_len: int,
    max_capacity: int,
    dtype: torch.dtype | None = None,
    scales: Scales | None = None,
) -> None:
    """Put a step's queries of one layer where their positions belong.

    The query of position p goes to index p mod C of its request's ring, a contiguous `[L, C, Hq, D]`. Rings
    are given by address, so that a captured graph serves requests that come and go. Of a row with more than C
    queries only the last C are kept, so that no two programs write one place. A rejected draft is overwritten
    by the token that takes its position, but it has cost the oldest query: C must exceed the window by the
    drafts.

    Args:
        address: `[R]` int64, of each row's ring; 0 for rows that nobody watches.
        capacity: `[R]` int64, C of each row's ring.
        layer: which of the L layers.
        query: `[T, Hq, D]`; rows follow each other as `query_start_loc` says.
        seq_lens: `[R]` int32, tokens of each row by position, this step's included.
        query_start_loc: `[R + 1]` int32; a row without queries is padding.
        max_query_len: queries of the longest row, or a bound on it, which bounds the grid.
        max_capacity: the largest C, or a bound on it; likewise.
        dtype: of the rings; query's if it is not given.
        scales: the layer's, if queries are float8.
    """
    dtype = dtype or query.dtype
    float8 = query.dtype != dtype
    _, query_heads, head_size = query.shape
    size = query_heads * head_size
    assert query.stride()[1:] == (head_size, 1)
    programs = min(max_capacity, max_query_len, MOST_PROGRAMS)
    _write_kernel[seq_lens.shape[0], programs, triton.cdiv(size, AT_ONCE)](
        address,
        capacity,
        layer,
        query,
        seq_lens,
        query_start_loc,
        scales.query if float8 and scales is not None else None,
        query.stride(0),
        DTYPE=DTYPES[dtype],
        FLOAT8=float8,
        SIZE=size,
        AT_ONCE=AT_ONCE,
    )


@triton.jit(do_not_specialize=["layer"])
def _write_kernel(
    address,
    capacity,
    layer,
    query,
    seq_lens,
    query_start_loc,
    scale,
    query_token,
    DTYPE: tl.constexpr,
    FLOAT8: tl.constexpr,
    SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    row = tl.program_id(0)
    ring = tl.load(address + row)
    if ring == 0:
        return
    length = tl.load(capacity + row)
    begin, end = tl.load(query_start_loc + row), tl.load(query_start_loc + row + 1)
    seq_len = tl.load(seq_lens + row)
    element = tl.program_id(2) * AT_ONCE + tl.arange(0, AT_ONCE)
    last = tl.minimum(length, end - begin).to(tl.int32)
    for back in range(tl.program_id(1) + 1, last + 1, tl.num_programs(1)):  # 1 for the row's newest token
        index = (seq_len - back) % length
        token = (end - back).to(tl.int64)
        content = tl.load(query + token * query_token + element, mask=element < SIZE)
        if FLOAT8:
            content = (content.to(tl.float32) * tl.load(scale)).to(DTYPE)
        place = ring.to(tl.pointer_type(DTYPE)) + (layer * length + index) * SIZE
        if SIZE % 8 == 0:  # PyTorch's memory begins at such an address, and so does every query of it
            place = tl.multiple_of(place, 16)
        tl.store(place + element, content, mask=element < SIZE)
