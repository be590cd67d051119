"""KIVI: keys quantized by channel, values by token."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcompress.formats.base import RECORD, Format, as_bytes, pack, sections, unpack

GROUP = 32  # channels of a token that share a scale


@dataclass(frozen=True)
class Kivi(Format):
    """Asymmetric quantization: keys per channel over 32 tokens, values per token over 32 channels.

        code = round((x - zero) / scale),  zero = min,  scale = (max - min) / (2^b - 1)

    Zero and scale are float16 and codes are chosen for what they are rounded to, upwards for the scale, so
    that no number is cut off. Of a group of equal float16 numbers the scale is 0 and every code 0. Where D is
    no multiple of 32, the groups of a token have 16 channels.

    A record is: key codes `[D, 32·b/8]`, value codes `[32, D·b/8]` (group after group), key scales `[D]`, key
    zeros `[D]`, value scales `[D/32, 32]`, value zeros `[D/32, 32]`.

    Source: Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv 2402.02750;
    group size and residual as there, the residual being the raw tail. Deviation: evicted tokens leave before
    others are quantized, so that groups are of consecutive kept tokens.
    """

    paper: ClassVar[str] = "KIVI: A Tuning-Free Asymmetric 2bit Quantization (arXiv 2402.02750)"

    def record_bytes(self, head_size: int) -> int:
        return sum(self._sizes(head_size))

    def _sizes(self, head_size: int) -> tuple[int, ...]:
        codes, numbers = RECORD * head_size * self.bits // 8, RECORD * (head_size // value_group(head_size))
        return codes, codes, 2 * head_size, 2 * head_size, 2 * numbers, 2 * numbers

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        head_size = keys.shape[-1]
        group = value_group(head_size)
        of_keys = self._quantize(keys.float().transpose(-1, -2))  # `[..., D, 32]`
        of_values = self._quantize(values.float().unflatten(-1, (-1, group)))  # `[..., 32, groups, group]`
        codes = [pack(each[0], self.bits).flatten(-2) for each in (of_keys, of_values)]
        codes[1] = codes[1].flatten(-2)
        by_group = [part.transpose(-1, -2).flatten(-2) for part in of_values[1:]]
        return torch.cat([*codes, *map(as_bytes, [*of_keys[1:], *by_group])], -1)

    def _quantize(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes `[..., n]` uint8 of numbers `[..., n]`, and float16 scales and zeros `[...]`."""
        limit, levels = torch.finfo(torch.float16), (1 << self.bits) - 1
        numbers = numbers.nan_to_num(0.0, limit.max, limit.min).clamp(limit.min, limit.max)
        low, high = numbers.amin(-1), numbers.amax(-1)
        zero = _rounded(low, up=False)
        scale = _rounded((high - zero.float()) / levels, up=True)
        divisor = torch.where(scale > 0, scale, 1).float()
        codes = ((numbers - zero.float()[..., None]) / divisor[..., None]).round_().clamp_(0, levels)
        return codes.to(torch.uint8), scale, zero

    def decode(self, records: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
        group = value_group(head_size)
        key_codes, value_codes, *numbers = sections(records, self._sizes(head_size))
        key_scale, key_zero, value_scale, value_zero = (part.view(torch.float16).float() for part in numbers)
        keys = unpack(key_codes.unflatten(-1, (head_size, -1)), self.bits).float()
        keys = keys * key_scale[..., None] + key_zero[..., None]
        codes = unpack(value_codes.unflatten(-1, (RECORD, head_size // group, -1)), self.bits).float()
        value_scale, value_zero = (
            part.unflatten(-1, (-1, RECORD)).transpose(-1, -2)[..., None]
            for part in (value_scale, value_zero)
        )
        return keys.transpose(-1, -2).contiguous(), (codes * value_scale + value_zero).flatten(-2)


def value_group(head_size: int) -> int:
    """Channels of a value that share a scale."""
    return GROUP if head_size % GROUP == 0 else GROUP // 2


def _rounded(numbers: Tensor, up: bool) -> Tensor:
    """As float16, towards +inf or -inf."""
    nearest = numbers.half()
    wrong = nearest.float() < numbers if up else nearest.float() > numbers
    towards = torch.full_like(nearest, torch.inf if up else -torch.inf)
    return torch.where(wrong, torch.nextafter(nearest, towards), nearest)


@dataclass(frozen=True)
class Kivi8(Kivi):
    """KIVI of 8 bits."""

    name: ClassVar[str] = "kivi8"
    bits: ClassVar[int] = 8


@dataclass(frozen=True)
class Kivi4(Kivi):
    """KIVI of 4 bits, which the authors advise for models with grouped queries."""

    name: ClassVar[str] = "kivi4"
    bits: ClassVar[int] = 4


@dataclass(frozen=True)
class Kivi2(Kivi):
    """KIVI of 2 bits."""

    name: ClassVar[str] = "kivi2"
    bits: ClassVar[int] = 2
