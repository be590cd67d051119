"""What several kernels compute with."""

import torch
import triton
import triton.language as tl

# Three products of TF32 halves: float32's accuracy on tensor cores. Without them the kernels would spill.
FLOAT32_PRODUCT = tl.constexpr("ieee" if torch.version.hip else "tf32x3")
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def dot(a, b):
    """Matrix product, accumulated in float32."""
    if INTERPRETED:
        # Triton's interpreter keeps bfloat16 as uint16 and would multiply the bit patterns.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=FLOAT32_PRODUCT)


@triton.jit
def tanh(x):
    """tanh of a float32 tensor; where the exponential overflows, the limit is right."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def before_rotation(
    vectors,
    cos_sin,
    position,
    channel,
    there,
    factor,
    table_row,
    DTYPE: tl.constexpr,
    FLOAT8: tl.constexpr,
    NEOX: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROTATED: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Some channels of queries or keys before RoPE, `[n, channels]` float32; 0 where there is none.

    Args:
        vectors: `[n]`, where each begins.
        cos_sin: `[positions, R]`, cosines of the R/2 angles, then their sines.
        position: `[n]`, of each.
        channel: which.
        there: `[n]`, whether there is one.
        factor: what float8 numbers are multiplied with, to be of DTYPE then.
        table_row: stride of the table's positions.
        DTYPE: the model's.
        FLOAT8: whether they are float8.
        NEOX: whether element i is paired with i + R/2; otherwise 2i with 2i + 1.
        HEAD_SIZE: D.
        ROTATED: R, elements that are rotated.
        FIRST: the first of them.
    """
    HALF: tl.constexpr = ROTATED // 2
    inside = channel - FIRST
    if NEOX:
        left = inside < HALF
        pair, angle = tl.where(left, channel + HALF, channel - HALF), tl.where(left, inside, inside - HALF)
    else:
        left = inside % 2 == 0
        pair, angle = tl.where(left, channel + 1, channel - 1), inside // 2
    mask = there[:, None] & (channel < HEAD_SIZE)[None, :]
    turned = mask
    if ROTATED != HEAD_SIZE:
        turned = mask & ((inside >= 0) & (inside < ROTATED))[None, :]
    own = tl.load(vectors[:, None] + channel[None, :], mask=mask, other=0.0)
    other = tl.load(vectors[:, None] + pair[None, :], mask=turned, other=0.0)
    if FLOAT8:
        own = (own.to(tl.float32) * factor).to(DTYPE)
        other = (other.to(tl.float32) * factor).to(DTYPE)
    table = cos_sin + (position.to(tl.int64) * table_row)[:, None] + angle[None, :]
    cos = tl.load(table, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(table + HALF, mask=turned, other=0.0).to(tl.float32)
    other = other.to(tl.float32)
    # Their squares do not sum to 1 where the embedding also scales (YaRN).
    return (own.to(tl.float32) * cos + tl.where(left[None, :], other, -other) * sin) / (cos * cos + sin * sin)
