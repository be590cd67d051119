"""What a small network of each KV head makes of cached keys and values, read straight from their pages.

One launch for all layers that share a rotary embedding. Neither what is read nor hidden units are ever held
outside a program: in PyTorch they would be written and read some ten times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_kvcompress.kernels.arithmetic import DTYPES, before_rotation, dot

COLUMNS, UNITS = 64, 64  # at once, at most
WIDE_BYTES, WIDE_UNITS = 8 * 1024, 32  # of heads with larger keys, or there are too few registers


def network_scores(
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    num_scored: int,
    network: tuple[Tensor, Tensor, Tensor, Tensor],
    cos_sin: Tensor,
    is_neox: bool,
    first_rotated: int = 0,
    positions: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """w₂ᵀ·gelu(W₁·[R_i⁻¹k_i; v_i] + b₁) + b₂ of each column.

    Products are of the network's dtype, sums, the exact GELU and what follows are float32.

    Args:
        keys: `[P, N, D]` after RoPE, every page of every layer.
        values: `[P, N, D]`, with the same strides.
        pages: `[X, n]` int64, the pages of each row's columns; negative for columns that hold nothing.
        num_scored: T, at most n·N: for how many columns to answer.
        network: of each row W₁ `[X, 2D, M]` in the dtype to compute in, b₁ and w₂ `[X, M]`, b₂ `[X]`.
        cos_sin: `[positions, R]`, cosines of the R/2 angles, then their sines; R <= D elements are rotated.
        is_neox: whether element i is paired with i + R/2; otherwise 2i with 2i + 1.
        first_rotated: the first element that is rotated.
        positions: `[X, T]` int64, of the columns' tokens; their numbers if it is not given.
        scales: of float8 keys and of such values, `[X]` float32 each.

    Returns:
        `[X, T]` float32; 0 where there is no page.
    """
    (rows, _), (_, block_size, head_size) = pages.shape, keys.shape
    up, up_bias, down, down_bias = network
    dtype, width = up.dtype, up.shape[2]
    assert up.shape == (rows, 2 * head_size, width) and up_bias.shape == down.shape == (rows, width)
    assert keys.stride() == values.stride() and keys.stride(2) == pages.stride(1) == cos_sin.stride(1) == 1
    assert all(each.is_contiguous() for each in network) and num_scored <= pages.shape[1] * block_size
    channels = triton.next_power_of_2(head_size)
    of_key = channels * up.element_size()
    is_wide = of_key > 256
    columns = max(16, min(COLUMNS, WIDE_BYTES // of_key)) if is_wide else COLUMNS
    units = min(WIDE_UNITS if is_wide else UNITS, triton.next_power_of_2(width))
    out = torch.empty(rows, num_scored, dtype=torch.float32, device=keys.device)
    key_scales, value_scales = scales or (None, None)
    _network_kernel[rows, triton.cdiv(num_scored, columns)](
        keys,
        values,
        pages,
        positions,
        cos_sin,
        key_scales,
        value_scales,
        up,
        up_bias,
        down,
        down_bias,
        out,
        num_scored,
        width,
        *keys.stride()[:2],
        pages.stride(0),
        0 if positions is None else positions.stride(0),
        cos_sin.stride(0),
        DTYPE=DTYPES[dtype],
        FLOAT8=scales is not None,
        NEOX=is_neox,
        BLOCK_SIZE=block_size,
        HEAD_SIZE=head_size,
        CHANNELS=channels,
        ROTATED=cos_sin.shape[1],
        FIRST=first_rotated,
        UNITS=max(16, units),
        COLUMNS=columns,
        num_warps=4,
        num_stages=2,
    )
    return out


@triton.jit(do_not_specialize=["num_scored", "page_row", "position_row"])
def _network_kernel(
    keys,
    values,
    pages,
    positions,
    cos_sin,
    key_scales,
    value_scales,
    up,
    up_bias,
    down,
    down_bias,
    out,
    num_scored,
    width,
    page_stride,
    token_stride,
    page_row,
    position_row,
    table_row,
    DTYPE: tl.constexpr,
    FLOAT8: tl.constexpr,
    NEOX: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROTATED: tl.constexpr,
    FIRST: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = column < num_scored
    page = tl.load(pages + row * page_row + column // BLOCK_SIZE, mask=real, other=-1)
    held = page >= 0
    if tl.max(page, 0) < 0:  # as of a short head beside a long one
        tl.store(out + row * num_scored + column, tl.zeros([COLUMNS], tl.float32), mask=real)
        return
    position = column.to(tl.int64)
    if positions is not None:
        position = tl.load(positions + row * position_row + column, mask=held, other=0)
    key_factor, value_factor = 1.0, 1.0
    if FLOAT8:
        key_factor, value_factor = tl.load(key_scales + row), tl.load(value_scales + row)
    offset = page * page_stride + (column % BLOCK_SIZE) * token_stride
    channel = tl.arange(0, CHANNELS)
    k = before_rotation(
        keys + offset, cos_sin, position, channel, held, key_factor, table_row,
        DTYPE, FLOAT8, NEOX, HEAD_SIZE, ROTATED, FIRST,
    ).to(DTYPE)  # fmt: skip
    in_head = channel < HEAD_SIZE
    there = held[:, None] & in_head[None, :]
    v = tl.load((values + offset)[:, None] + channel[None, :], mask=there, other=0.0)
    if FLOAT8:
        v = v.to(tl.float32) * value_factor
    v = v.to(DTYPE)
    score = tl.zeros([COLUMNS], tl.float32) + tl.load(down_bias + row)
    of_keys = up + row * (2 * HEAD_SIZE) * width
    for first in range(0, width, UNITS):
        unit = first + tl.arange(0, UNITS)
        is_unit = unit < width
        at = channel[:, None] * width + unit[None, :]
        mask = in_head[:, None] & is_unit[None, :]
        hidden = dot(k, tl.load(of_keys + at, mask=mask, other=0.0))
        hidden += dot(v, tl.load(of_keys + HEAD_SIZE * width + at, mask=mask, other=0.0))
        hidden += tl.load(up_bias + row * width + unit, mask=is_unit, other=0.0).to(tl.float32)[None, :]
        hidden = 0.5 * hidden * (1.0 + tl.erf(hidden * 0.7071067811865476))
        weight = tl.load(down + row * width + unit, mask=is_unit, other=0.0).to(tl.float32)
        score += tl.sum(hidden * weight[None, :], 1)
    tl.store(out + row * num_scored + column, tl.where(held, score, 0.0), mask=real)
