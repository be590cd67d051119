"""KIVI: keys quantized by channel, values by token."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcompress.formats.base import RECORD, RecordFormat, as_bytes, pack, sections, unpack

GROUP = 32  # channels of a token that share a scale


@dataclass(frozen=True)
class Kivi(RecordFormat):
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
        of_keys = write_keys(keys, self.bits)
        of_values = quantize(values.float().unflatten(-1, (-1, value_group(values.shape[-1]))), self.bits)
        codes = pack(of_values[0], self.bits).flatten(-3)  # `[..., 32, groups, group]`
        by_group = [as_bytes(part.transpose(-1, -2).flatten(-2)) for part in of_values[1:]]
        return torch.cat([of_keys[0], codes, *of_keys[1:], *by_group], -1)

    def decode(self, records: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
        group = value_group(head_size)
        key_codes, value_codes, scale, zero, scales, zeros = sections(records, self._sizes(head_size))
        codes = unpack(value_codes.unflatten(-1, (RECORD, head_size // group, -1)), self.bits).float()
        of_token = (
            part.view(torch.float16).float().unflatten(-1, (-1, RECORD)).transpose(-1, -2)[..., None]
            for part in (scales, zeros)
        )
        value_scale, value_zero = of_token
        values = (codes * value_scale + value_zero).flatten(-2)
        return read_keys(key_codes, scale, zero, self.bits), values


def write_keys(keys: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys `[..., 32, D]` by channel: the bytes of their codes, scales and zeros."""
    codes, scale, zero = quantize(keys.float().transpose(-1, -2), bits)
    return pack(codes, bits).flatten(-2), as_bytes(scale), as_bytes(zero)


def read_keys(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Keys `[..., 32, D]` float32 of what `write_keys` made."""
    scale, zero = (part.view(torch.float16).float()[..., None] for part in (scales, zeros))
    numbers = unpack(codes.unflatten(-1, (scale.shape[-2], -1)), bits).float()
    return (numbers * scale + zero).transpose(-1, -2).contiguous()


def quantize(numbers: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[..., n]` uint8 of numbers `[..., n]`, and float16 scales and zeros `[...]`."""
    limit, levels = torch.finfo(torch.float16), (1 << bits) - 1
    numbers = numbers.nan_to_num(0.0, limit.max, limit.min).clamp(limit.min, limit.max)
    low, high = numbers.amin(-1), numbers.amax(-1)
    zero = _rounded(low, up=False)
    scale = _rounded((high - zero.float()) / levels, up=True)
    divisor = torch.where(scale > 0, scale, 1).float()
    codes = ((numbers - zero.float()[..., None]) / divisor[..., None]).round_().clamp_(0, levels)
    return codes.to(torch.uint8), scale, zero


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
