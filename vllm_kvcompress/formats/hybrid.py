"""Keys as KIVI writes them, values as TurboQuant does: each where it loses least."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcompress.formats import kivi, turboquant
from vllm_kvcompress.formats.base import RECORD, RecordFormat, sections


@dataclass(frozen=True)
class Hybrid(RecordFormat):
    """KIVI's keys and TurboQuant's values.

    Channels of keys differ in offset and range, for which KIVI has a zero and a scale of each, where a random
    rotation spreads the largest channels' error over all. Values have no such channels, and there one norm
    for each token takes a quarter of the bytes of KIVI's scales and zeros, or less. An error in a key changes
    all weights, one in a value only adds to the sum: so values take fewer bits.

    A record is: key codes `[D, 32·b/8]`, value codes `[32, D·v/8]`, key scales `[D]`, key zeros `[D]`, value
    norms `[32]`, with b `bits` and v `value_bits`; all as there.

    Source: ours, of arXiv 2402.02750 and arXiv 2504.19874.

    Attributes:
        value_bits: of a value's code.
    """

    paper: ClassVar[str] = "KIVI's keys (arXiv 2402.02750) and TurboQuant's values (arXiv 2504.19874)"
    value_bits: ClassVar[int]

    def record_bytes(self, head_size: int) -> int:
        return sum(self._sizes(head_size))

    def _sizes(self, head_size: int) -> tuple[int, ...]:
        plane = RECORD * head_size // 8
        return plane * self.bits, plane * self.value_bits, 2 * head_size, 2 * head_size, 2 * RECORD

    def rotation(self, head_size: int) -> Tensor:
        """R `[D, D]` float32 on the CPU, of values alone."""
        return turboquant.orthogonal(head_size, turboquant.ROTATION)

    def codebook(self, head_size: int) -> Tensor:
        """What the codes of values stand for: `[2**value_bits]` float32 on the CPU, ascending."""
        return turboquant.lloyd_max(head_size, self.value_bits)

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        key_codes, *of_keys = kivi.write_keys(keys, self.bits)
        value_codes, norms = turboquant.write_values(values, self.value_bits)
        return torch.cat([key_codes, value_codes, *of_keys, norms], -1)

    def decode(self, records: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
        key_codes, value_codes, scale, zero, norms = sections(records, self._sizes(head_size))
        values = turboquant.read_values(value_codes, norms, head_size, self.value_bits)
        return kivi.read_keys(key_codes, scale, zero, self.bits), values


@dataclass(frozen=True)
class K8V4(Hybrid):
    """Keys of 8 bits, values of 4."""

    name: ClassVar[str] = "k8v4"
    bits: ClassVar[int] = 8
    value_bits: ClassVar[int] = 4


@dataclass(frozen=True)
class K4V4(Hybrid):
    """Keys and values of 4 bits."""

    name: ClassVar[str] = "k4v4"
    bits: ClassVar[int] = 4
    value_bits: ClassVar[int] = 4


@dataclass(frozen=True)
class K4V3(Hybrid):
    """Keys of 4 bits, values of 3."""

    name: ClassVar[str] = "k4v3"
    bits: ClassVar[int] = 4
    value_bits: ClassVar[int] = 3


@dataclass(frozen=True)
class K4V2(Hybrid):
    """Keys of 4 bits, values of 2."""

    name: ClassVar[str] = "k4v2"
    bits: ClassVar[int] = 4
    value_bits: ClassVar[int] = 2
