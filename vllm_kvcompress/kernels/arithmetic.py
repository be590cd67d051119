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
