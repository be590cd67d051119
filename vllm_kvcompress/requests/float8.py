"""What the bytes of vLLM's fp8 caches stand for."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# What `--kv-cache-dtype` stores; the cache itself is bytes.
FLOAT8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
# What vLLM's FlashAttention and Triton kernels store, both as the platform's e4m3: neither writes e5m2.
ON_GPU = ("fp8", "fp8_e4m3")
# Whole numbers from 0 on that a dtype holds without rounding, at most.
EXACT = {torch.float8_e4m3fn: 16, torch.float8_e5m2: 8}


@dataclass(frozen=True)
class Float8:
    """What the bytes of a quantized cache stand for: `scale·float8`, with a scale of each layer.

    Attributes:
        dtype: of a byte.
        plain: the model's dtype, to which it is read.
        key_scales: `[L]` float32.
        value_scales: `[L]` float32.
    """

    dtype: torch.dtype
    plain: torch.dtype
    key_scales: Tensor
    value_scales: Tensor

    def read(self, stored: Tensor, scales: Tensor) -> Tensor:
        """Bytes `[X, ...]` in the model's dtype, with the scale of each row `[X]`."""
        scales = scales.view(-1, *[1] * (stored.ndim - 1))
        if stored.device.type != "cpu":  # what the scales are is not asked of a device
            return stored.view(self.dtype).to(self.plain).mul_(scales)
        every = torch.arange(256, dtype=torch.uint8).view(self.dtype).to(self.plain)
        bits = {2: torch.int16, 4: torch.int32}[every.element_size()]  # NumPy has no bfloat16
        # NumPy looks bytes up some ten times faster than torch converts them.
        found = np.take(every.view(bits).numpy(), stored.numpy())
        plain = torch.from_numpy(found).view(self.plain)
        return plain if bool((scales == 1).all()) else plain.mul_(scales)


def by_row(scales: Tensor, num_rows: int) -> Tensor:
    """The scale of each of so many rows, equally many for each layer: `[num_rows]` of `[L]`."""
    return scales.repeat_interleave(num_rows // len(scales))
