"""Moves kept tokens from the pages where they are to the pages where they shall be.

Destination blocks may be source blocks, so a compaction gathers everything before it scatters anything.
"""

import triton
import triton.language as tl
from torch import Tensor

TOKENS = 32  # copied by a program, of whichever pages


def gather_pages(
    keys: Tensor, values: Tensor, pages: Tensor, head: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Bring the kept tokens together, page by page.

    Args:
        keys: `[P, N, D]`, every page of every layer: a view of the cache.
        values: `[P, N, D]`, likewise, with the same strides.
        pages: `[X, n]` int64, the pages of each (Job, layer, head)'s tokens in order; those without
            a kept token may be -1.
        head: `[M]` int64, the row of `pages` that fills each new page.
        tokens: `[M, N]` int64, which of that row's tokens, in order.

    Returns:
        Keys and values `[M, N, D]` of the new pages.
    """
    staged = keys.new_empty(2, len(tokens), *keys.shape[1:])
    _copy(keys, values, staged[0], staged[1], source=(pages, head, tokens), target=None)
    return staged[0], staged[1]


def scatter_pages(
    staged_keys: Tensor, staged_values: Tensor, keys: Tensor, values: Tensor, target: Tensor
) -> None:
    """Write new pages to their places.

    Args:
        staged_keys: `[M, N, D]`.
        staged_values: `[M, N, D]`.
        keys: `[P, N, D]`, written.
        values: `[P, N, D]`, written; strides as keys'.
        target: `[M]` int64, a page of its own for each.
    """
    _copy(staged_keys, staged_values, keys, values, source=None, target=target)


def move_pages(
    keys: Tensor, values: Tensor, pages: Tensor, head: Tensor, tokens: Tensor, target: Tensor
) -> None:
    """Gather and scatter at once, without a second copy: only if no target is a source page.

    Arguments as of `gather_pages` and `scatter_pages`.
    """
    _copy(keys, values, keys, values, source=(pages, head, tokens), target=target)


def _copy(
    keys: Tensor,
    values: Tensor,
    to_keys: Tensor,
    to_values: Tensor,
    source: tuple[Tensor, Tensor, Tensor] | None,
    target: Tensor | None,
) -> None:
    num_tokens = keys.shape[1] * (len(target) if target is not None else len(to_keys))
    if num_tokens == 0:
        return
    assert keys.stride() == values.stride() and to_keys.stride() == to_values.stride()
    assert keys.stride(2) == to_keys.stride(2) == 1
    pages, head, tokens = (None, None, None) if source is None else source
    assert source is None or (pages.stride(1) == 1 and tokens.is_contiguous())
    _copy_kernel[(triton.cdiv(num_tokens, TOKENS),)](
        keys,
        values,
        to_keys,
        to_values,
        pages,
        head,
        tokens,
        target,
        num_tokens,
        *keys.stride()[:2],
        *to_keys.stride()[:2],
        0 if source is None else pages.stride(0),
        GATHER=source is not None,
        SCATTER=target is not None,
        BLOCK_SIZE=keys.shape[1],
        HEAD_SIZE=keys.shape[2],
        CHANNELS=triton.next_power_of_2(keys.shape[2]),
        AT_ONCE=TOKENS,
    )


@triton.jit(do_not_specialize=["num_tokens", "pages_row"])
def _copy_kernel(
    keys,
    values,
    to_keys,
    to_values,
    pages,
    head,
    tokens,
    target,
    num_tokens,
    page_stride,
    token_stride,
    to_page_stride,
    to_token_stride,
    pages_row,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64) * AT_ONCE + tl.arange(0, AT_ONCE)  # over all new pages
    inside = number < num_tokens
    new_page, place = number // BLOCK_SIZE, number % BLOCK_SIZE
    if GATHER:
        token = tl.load(tokens + number, mask=inside, other=0)
        row = tl.load(head + new_page, mask=inside, other=0).to(tl.int64) * pages_row
        page = tl.load(pages + row + token // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        read = page * page_stride + (token % BLOCK_SIZE) * token_stride
    else:
        read = new_page * page_stride + place * token_stride
    if SCATTER:
        to_page = tl.load(target + new_page, mask=inside, other=0).to(tl.int64)
    else:
        to_page = new_page
    write = to_page * to_page_stride + place * to_token_stride

    channel = tl.arange(0, CHANNELS)
    mask = inside[:, None] & (channel < HEAD_SIZE)[None, :]
    read = read[:, None] + channel[None, :]
    write = write[:, None] + channel[None, :]
    k = tl.load(keys + read, mask=mask)
    v = tl.load(values + read, mask=mask)
    tl.store(to_keys + write, k, mask=mask)
    tl.store(to_values + write, v, mask=mask)
