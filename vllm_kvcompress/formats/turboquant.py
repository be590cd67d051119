"""TurboQuant: vectors are rotated at random, so that one codebook fits every coordinate."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vllm_kvcompress.formats.base import RECORD, RecordFormat, as_bytes, pack, sections, unpack
from vllm_kvcompress.formats.kivi import value_group

ROTATION, PROJECTION = 0, 1  # seeds


@dataclass(frozen=True)
class TurboQuant(RecordFormat):
    """The length of a vector, and its direction, rotated at random, coordinate by coordinate.

        y = x / ‖x‖ · R,  code_i = argmin_c |y_i - codebook_c|,  x̂ = ‖x‖ · codebook[code] · Rᵀ

    R `[D, D]` is a fixed random orthogonal matrix. The codebook is the Lloyd-Max quantizer of 2^b levels for
    a coordinate of a random unit vector, of density ∝ (1 - t²)^((D-3)/2) on [-1, 1]. Lengths are float16.
    Numbers are cut off at what float16 holds, and NaN counts as 0.

    A record is: key codes `[D, 32·b/8]`, value codes `[32, D·b/8]` (channels in groups of 32, or of 16 where
    D is no multiple of 32), key norms `[32]`, value norms `[32]`.

    Source: Zandieh et al., "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate", arXiv
    2504.19874, the variant "mse". Deviation: channels of outliers get no more bits than others.
    """

    paper: ClassVar[str] = "TurboQuant: Online Vector Quantization (arXiv 2504.19874)"

    @property
    def key_bits(self) -> int:
        """Of a key's code."""
        return self.bits

    def rotation(self, head_size: int) -> Tensor:
        """R `[D, D]` float32 on the CPU: `x @ R` is what is quantized."""
        return orthogonal(head_size, ROTATION)

    def codebook(self, head_size: int) -> Tensor:
        """What the codes of values stand for: `[2**bits]` float32 on the CPU, ascending."""
        return lloyd_max(head_size, self.bits)

    def key_codebook(self, head_size: int) -> Tensor:
        """What the codes of keys stand for: `[2**key_bits]` float32 on the CPU, ascending."""
        return lloyd_max(head_size, self.key_bits)

    def record_bytes(self, head_size: int) -> int:
        return sum(self._sizes(head_size))

    def _sizes(self, head_size: int) -> tuple[int, ...]:
        """Bytes of key codes, signs and value codes, and of the norms of keys, residuals and values."""
        plane, norms, signs = RECORD * head_size // 8, 2 * RECORD, self.bits - self.key_bits
        return plane * self.key_bits, plane * signs, plane * self.bits, norms, norms * signs, norms

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        key_directions, key_norms = _directions(keys)
        key_codes, *residual_norms = self._write_keys(key_directions)
        value_codes, value_norms = write_values(values, self.bits)
        norms = [as_bytes(each) for each in (key_norms, *residual_norms)]
        return torch.cat([key_codes, value_codes, *norms, value_norms], -1)

    def _write_keys(self, directions: Tensor) -> tuple[Tensor, ...]:
        """The codes' bytes of rotated unit vectors `[..., 32, D]`, and float16 norms of residuals if kept."""
        return (pack(_nearest(directions, self.key_bits).transpose(-1, -2), self.key_bits).flatten(-2),)

    def decode(self, records: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
        *codes, value_codes, key_norms, residuals, value_norms = sections(records, self._sizes(head_size))
        key_codes, signs = (part.unflatten(-1, (head_size, -1)) for part in codes)
        keys = self._read_keys(key_codes, signs, _float16(residuals))
        back = _on(records.device, orthogonal, head_size, ROTATION).T
        values = read_values(value_codes, value_norms, head_size, self.bits)
        return _float16(key_norms) * keys @ back, values

    def _read_keys(self, codes: Tensor, signs: Tensor, residual_norms: Tensor) -> Tensor:
        """Rotated directions `[..., 32, D]` of codes `[..., D, 4·key_bits]` and of what says of residuals."""
        return _numbers(unpack(codes, self.key_bits).transpose(-1, -2), codes.shape[-2], self.key_bits)


@dataclass(frozen=True)
class TurboProd(TurboQuant):
    """Keys whose products with queries are right on average; values as in TurboQuant.

    A key's codes have b-1 bits, and one more bit per coordinate says where the residual points:

        r = y - codebook[code],  sign = sgn(r · Sᵀ)
        ⟨q, x⟩ ≈ ‖x‖ · (⟨qR, codebook[code]⟩ + ‖r‖ · √(π/2) / D · ⟨qR · Sᵀ, sign⟩)

    r lives in the rotated space, and ‖r‖ is of the unit vector's residual. The rows of S `[D, D]` are random
    and orthogonal, as long as a normal vector `[D]` is on average; then the mean over S is exact.

    A record is: key codes `[D, 32·(b-1)/8]`, signs `[D, 4]` (bit 1 for +1, row after row of S), value codes
    `[32, D·b/8]`, key norms `[32]`, residual norms `[32]`, value norms `[32]`.

    Source: arXiv 2504.19874, the variant "prod"; the sign bit is from Zandieh et al., "QJL: 1-Bit Quantized
    JL Transform for KV Cache Quantization with Zero Overhead", arXiv 2406.03482. Deviations: the papers draw
    S with independent normal elements; orthogonal rows, as in the code of QJL's authors, leave an error
    of (π/2 - 1)·‖r‖² instead of π/2·‖r‖². Values are summed, not multiplied with queries, and stay "mse".
    """

    @property
    def key_bits(self) -> int:
        return self.bits - 1

    def projection(self, head_size: int) -> Tensor:
        """S `[D, D]` float32 on the CPU: signs are those of `r @ S.T`."""
        return projection(head_size)

    def _write_keys(self, directions: Tensor) -> tuple[Tensor, ...]:
        head_size = directions.shape[-1]
        codes = _nearest(directions, self.key_bits)
        residual = directions - _numbers(codes, head_size, self.key_bits)
        signs = residual @ _on(residual.device, projection, head_size).T >= 0
        planes = [pack(codes.transpose(-1, -2), self.key_bits), pack(signs.transpose(-1, -2), 1)]
        return torch.cat([plane.flatten(-2) for plane in planes], -1), residual.norm(dim=-1).half()

    def _read_keys(self, codes: Tensor, signs: Tensor, residual_norms: Tensor) -> Tensor:
        head_size = codes.shape[-2]
        either = unpack(signs, 1).transpose(-1, -2).float() * 2 - 1
        residual = either @ _on(codes.device, projection, head_size)
        scale = math.sqrt(math.pi / 2) / head_size
        return super()._read_keys(codes, signs, residual_norms) + scale * residual_norms * residual


@dataclass(frozen=True)
class TurboCentred(TurboQuant):
    """TurboQuant of how keys differ from their mean over the record; values as in TurboQuant.

    Where a model adds a bias to its keys they lie far from 0, all on one side: those of Qwen2.5 up to ten
    times as far as they lie from each other. An error in proportion to their length is then larger than all
    that tells them apart (1.5 times at 4 bits in one layer of Qwen2.5-Coder-0.5B, 0.7 % once centred).

    A record is TurboQuant's, then the mean `[D]`, rotated, float16. Source: ours; subtracting what all keys
    share costs attention nothing, and is what KIVI's zeros do.
    """

    def record_bytes(self, head_size: int) -> int:
        return super().record_bytes(head_size) + 2 * head_size

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        limit = torch.finfo(torch.float16)
        keys = keys.float().nan_to_num(0.0, limit.max, limit.min).clamp(limit.min, limit.max)
        # In float64, so that how many records are written together decides no rounding.
        rotation = _on(keys.device, orthogonal, keys.shape[-1], ROTATION).double()
        means = (keys.double().mean(-2) @ rotation).clamp(limit.min, limit.max).half()
        records = super().encode(keys - (means.double() @ rotation.T).float().unsqueeze(-2), values)
        return torch.cat([records, as_bytes(means)], -1)

    def decode(self, records: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
        plain, means = sections(records, [records.shape[-1] - 2 * head_size, 2 * head_size])
        keys, values = super().decode(plain, head_size)
        back = _on(records.device, orthogonal, head_size, ROTATION).T
        return keys + (means.view(torch.float16).float() @ back).unsqueeze(-2), values


def write_values(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Values `[..., 32, D]` by token: the bytes of their codes and norms."""
    directions, norms = _directions(values)
    codes = _nearest(directions, bits).unflatten(-1, (-1, value_group(values.shape[-1])))
    return pack(codes, bits).flatten(-3), as_bytes(norms)


def read_values(codes: Tensor, norms: Tensor, head_size: int, bits: int) -> Tensor:
    """Values `[..., 32, D]` float32 of what `write_values` made."""
    groups = codes.unflatten(-1, (RECORD, head_size // value_group(head_size), -1))
    directions = _numbers(unpack(groups, bits).flatten(-2), head_size, bits)
    return _float16(norms) * directions @ _on(codes.device, orthogonal, head_size, ROTATION).T


def _directions(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated unit vectors `[..., 32, D]` float32 and float16 norms `[..., 32]` of vectors; 0 stays 0."""
    limit = torch.finfo(torch.float16)
    vectors = vectors.float().nan_to_num(0.0, limit.max, limit.min).clamp(limit.min, limit.max)
    norms = vectors.norm(dim=-1)
    units = vectors / torch.where(norms > 0, norms, 1)[..., None]
    rotation = _on(vectors.device, orthogonal, vectors.shape[-1], ROTATION)
    return units @ rotation, norms.clamp(max=limit.max).half()


def _nearest(numbers: Tensor, bits: int) -> Tensor:
    """Codes `[..., D]` int32 of rotated unit vectors."""
    levels = _on(numbers.device, lloyd_max, numbers.shape[-1], bits)
    return torch.bucketize(numbers, (levels[1:] + levels[:-1]) / 2, out_int32=True)


def _numbers(codes: Tensor, head_size: int, bits: int) -> Tensor:
    """What codes of any shape stand for, float32."""
    return _on(codes.device, lloyd_max, head_size, bits)[codes.int()]


def _float16(part: Tensor) -> Tensor:
    """Norms `[..., 32, 1]` float32 of their bytes."""
    return part.view(torch.float16).float()[..., None]


@cache
def _on(device: torch.device, make: Callable[..., Tensor], *arguments: int) -> Tensor:
    return make(*arguments).to(device)


@cache
def orthogonal(head_size: int, seed: int) -> Tensor:
    """A random orthogonal matrix, uniform over all of them: `[D, D]` float32 on the CPU.

    The Q of a matrix of normal numbers, its R having a positive diagonal, which makes it unique; in float64,
    so that what machines compute differently is rounded away.
    """
    normal = np.random.RandomState(seed).standard_normal((head_size, head_size))
    q, r = np.linalg.qr(normal)
    return torch.from_numpy((q * np.sign(np.diag(r))).astype(np.float32))


@cache
def projection(head_size: int) -> Tensor:
    """S of TurboProd: rows as long as a normal vector `[D]` is on average, √2·Γ((D+1)/2) / Γ(D/2)."""
    length = math.sqrt(2) * math.exp(math.lgamma((head_size + 1) / 2) - math.lgamma(head_size / 2))
    return orthogonal(head_size, PROJECTION) * length


@cache
def lloyd_max(head_size: int, bits: int) -> Tensor:
    """The codebook of least mean square error for a coordinate of a random unit vector in D dimensions.

    Each level is the mean of its cell, and cells meet halfway between levels. With t = sin φ the density is
    ∝ cos^(D-2) φ, and the integral of t over a cell has a closed form. The law is symmetric, and so is the
    codebook: only its positive half is computed.

    Returns:
        `[2**bits]` float32 on the CPU, ascending.
    """
    half = 1 << (bits - 1)
    levels = (np.arange(half) + 0.5) / half * 3 / math.sqrt(head_size)
    nodes, weights = np.polynomial.legendre.leggauss(64)
    change = 1.0
    while change > 1e-14:
        edges = np.arcsin(np.concatenate([[0], (levels[1:] + levels[:-1]) / 2, [1]]))
        left, width = edges[:-1, None], np.diff(edges)[:, None]
        mass = np.cos(left + width * (nodes + 1) / 2) ** (head_size - 2) @ weights * width[:, 0] / 2
        means = -np.diff(np.cos(edges) ** (head_size - 1)) / (head_size - 1) / mass
        change, levels = np.abs(means - levels).max(), means
    return torch.from_numpy(np.concatenate([-levels[::-1], levels]).astype(np.float32))


@dataclass(frozen=True)
class Turbo4(TurboQuant):
    """TurboQuant of 4 bits."""

    name: ClassVar[str] = "turbo4"
    bits: ClassVar[int] = 4


@dataclass(frozen=True)
class Turbo3(TurboQuant):
    """TurboQuant of 3 bits."""

    name: ClassVar[str] = "turbo3"
    bits: ClassVar[int] = 3


@dataclass(frozen=True)
class Turbo2(TurboQuant):
    """TurboQuant of 2 bits."""

    name: ClassVar[str] = "turbo2"
    bits: ClassVar[int] = 2


@dataclass(frozen=True)
class TurboProd4(TurboProd):
    """Keys of 3 bits and a sign, values of 4 bits."""

    name: ClassVar[str] = "turbo4_prod"
    bits: ClassVar[int] = 4


@dataclass(frozen=True)
class TurboProd3(TurboProd):
    """Keys of 2 bits and a sign, values of 3 bits."""

    name: ClassVar[str] = "turbo3_prod"
    bits: ClassVar[int] = 3


@dataclass(frozen=True)
class TurboProd2(TurboProd):
    """Keys of 1 bit and a sign, values of 2 bits."""

    name: ClassVar[str] = "turbo2_prod"
    bits: ClassVar[int] = 2


@dataclass(frozen=True)
class TurboCentred4(TurboCentred):
    """TurboQuant of 4 bits, of how keys differ from their mean."""

    name: ClassVar[str] = "turbo4_centred"
    bits: ClassVar[int] = 4


@dataclass(frozen=True)
class TurboCentred3(TurboCentred):
    """TurboQuant of 3 bits, of how keys differ from their mean."""

    name: ClassVar[str] = "turbo3_centred"
    bits: ClassVar[int] = 3


@dataclass(frozen=True)
class TurboCentred2(TurboCentred):
    """TurboQuant of 2 bits, of how keys differ from their mean."""

    name: ClassVar[str] = "turbo2_centred"
    bits: ClassVar[int] = 2
