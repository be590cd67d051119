"""Keeps the queries of every watched request's newest tokens, from inside a captured graph."""

import triton
import triton.language as tl
from torch import Tensor

AT_ONCE = 1024  # elements


def write_ring(
    ring: Tensor,
    layer: int,
    query: Tensor,
    slot: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    max_query_len: int,
) -> None:
    """Put a step's queries of one layer where their positions belong.

    The query of position p goes to index p mod C of its request's ring. Of a row with more than C queries
    only the last C are kept, so that no two programs write one place. A rejected draft is overwritten by the
    token that takes its position, but it has cost the oldest query: C must exceed the window by the drafts.

    Args:
        ring: `[S, L, C, Hq, D]`, contiguous in its last two dimensions.
        layer: which of the L layers.
        query: `[T, Hq, D]` in the ring's dtype; rows follow each other as `query_start_loc` says.
        slot: `[R]` int32, each row's ring; -1 for rows that nobody watches.
        seq_lens: `[R]` int32, tokens of each row by position, this step's included.
        query_start_loc: `[R + 1]` int32; a row without queries is padding.
        max_query_len: queries of the longest row, or a bound on it; it fixes the grid.
    """
    _, query_heads, head_size = query.shape
    size = query_heads * head_size
    capacity = ring.shape[2]
    assert ring.dtype == query.dtype and ring.shape[3:] == query.shape[1:]
    assert ring.stride()[3:] == (head_size, 1) and query.stride()[1:] == (head_size, 1)
    _write_kernel[slot.shape[0], min(capacity, max_query_len), triton.cdiv(size, AT_ONCE)](
        ring.select(1, layer),
        query,
        slot,
        seq_lens,
        query_start_loc,
        capacity,
        ring.stride(0),
        ring.stride(2),
        query.stride(0),
        SIZE=size,
        AT_ONCE=AT_ONCE,
    )


@triton.jit(do_not_specialize=["capacity"])
def _write_kernel(
    ring,  # one layer's, [S, C, Hq, D]
    query,
    row_slot,
    seq_lens,
    query_start_loc,
    capacity,
    ring_slot,
    ring_index,
    query_token,
    SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(row_slot + row)
    end = tl.load(query_start_loc + row + 1)
    back = tl.program_id(1) + 1  # 1 for the row's newest token
    token = end - back
    if (slot < 0) | (token < tl.load(query_start_loc + row)):
        return
    index = (tl.load(seq_lens + row) - back) % capacity
    element = tl.program_id(2) * AT_ONCE + tl.arange(0, AT_ONCE)
    content = tl.load(query + token.to(tl.int64) * query_token + element, mask=element < SIZE)
    at = slot.to(tl.int64) * ring_slot + index.to(tl.int64) * ring_index
    tl.store(ring + at + element, content, mask=element < SIZE)
