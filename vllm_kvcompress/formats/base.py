"""How kept tokens are written in a page: what every format must answer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

RECORD = 32  # tokens that are encoded together
CHANNELS = 16  # head sizes are multiples of it
NEEDS_HEAD_SIZE = "needs_known_head_size"  # said of a model whose configuration has another than its layers


class Format(ABC):
    """Writes keys and values of one KV head in fewer bytes.

    Tokens are encoded in records of 32, and a page holds as many whole records as fit its bytes. A record
    says all that is needed to read it, unless its run begins with a basis for all, so records are moved
    between pages as they are and never encoded twice.

    A head's records are in its run part after part: all of the first kind of record, then all of the next.
    Records of a kind are one behind the other and end where the page ends, so what a page has left behind
    the last record of one kind takes the first ones of the next (see `arrange`).

    Attributes:
        name: what users write.
        paper: title and arXiv id.
        keeps_all: whether every token may stay, in fewer bytes.
        typical: the part whose tokens per page stand for all while heads compete for pages.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    keeps_all: ClassVar[bool] = True
    typical: ClassVar[int] = 0

    @property
    @abstractmethod
    def parts(self) -> "tuple[RecordFormat, ...]":
        """The kinds of records, in the order in which a head has them."""

    def tokens_per_page(self, page_bytes: int, head_size: int) -> int:
        """Tokens that a page of so many bytes holds at least; 0 if not even one record fits."""
        return page_bytes // max(part.record_bytes(head_size) for part in self.parts) * RECORD

    @property
    def basis(self) -> "RecordFormat | None":
        """What lies in the first place of a run's first page where its records need it to be read; None for
        formats whose records say all."""
        return None

    def needs_basis(self, counts: Tensor) -> Tensor:
        """Which runs, of records `[P, ...]` int64 of each part, begin with a basis: `[...]` bool."""
        return torch.zeros_like(counts[0], dtype=torch.bool)

    def largest_bytes(self, head_size: int) -> int:
        """Bytes of the largest that a page must hold."""
        parts = self.parts if self.basis is None else (*self.parts, self.basis)
        return max(part.record_bytes(head_size) for part in parts)

    def holds_more(self, page_bytes: int, head_size: int, block_size: int) -> bool:
        """Whether a page may hold more tokens than raw, which is so many."""
        return self.tokens_per_page(page_bytes, head_size) > block_size

    def arrange(self, counts: Tensor, head_size: int, page_bytes: int) -> tuple[Tensor, Tensor]:
        """Where the parts of runs lie, of records `[P, ...]` int64 of each; returns as `arrange` does."""
        sizes = [part.record_bytes(head_size) for part in self.parts]
        if self.basis is None:
            return arrange(counts, sizes, page_bytes)
        bases = self.needs_basis(counts).long()[None]
        sizes = [self.basis.record_bytes(head_size), *sizes]
        first, pages = arrange(torch.cat([bases, counts]), sizes, page_bytes)
        return first[1:], pages


class RecordFormat(Format):
    """A format that is one kind of record.

    Inside a record all numbers lie in little-endian order, codes first. Codes of b bits stand for 32 numbers
    (or for 16) in planes: byte j of w holds those of the numbers j, j + w, j + 2w, … from its lowest bits on.
    Keys' codes are channel after channel, each of 32 tokens; values' are token after token.

    Subclasses are dataclasses of the format's options.

    Attributes:
        bits: of a code.
    """

    bits: ClassVar[int]

    @property
    def parts(self) -> "tuple[RecordFormat, ...]":
        return (self,)

    @property
    def plain(self) -> "RecordFormat":
        """The format of keys and values, where more than these is written."""
        return self

    def bias_at(self, head_size: int) -> int:
        """Bytes of a record before float32 `[32]` that are added to its tokens' logits; -1 for none."""
        return -1

    @abstractmethod
    def record_bytes(self, head_size: int) -> int:
        """Bytes of 32 tokens' keys and values, with all that belongs to them."""

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        """Write records.

        Args:
            keys: `[..., 32, D]`, after RoPE, of any float dtype; D is a multiple of 16.
            values: `[..., 32, D]`.

        Returns:
            `[..., record_bytes]` uint8.
        """

    @abstractmethod
    def decode(self, records: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
        """Read records `[..., record_bytes]`.

        Returns:
            Keys and values `[..., 32, D]` float32: what attention reads.
        """

    def rotation(self, head_size: int) -> Tensor | None:
        """The orthogonal `[D, D]` float32 on the CPU by which keys and values are multiplied before they are
        written, so that attention may be computed there; None if they are written as they are."""
        return None


def arrange(records: Tensor, sizes: Sequence[int], page_bytes: int) -> tuple[Tensor, Tensor]:
    """Where the parts of runs lie.

    Records of one size have places in a page, the last of which ends where the page does; a run's places are
    counted from its first page on.

    Args:
        records: `[P, ...]` int64, how many there are of each part.
        sizes: bytes of a part's records.
        page_bytes: bytes of a page.

    Returns:
        `[P, ...]` int64, the place of each part's first record, and `[...]` int64, pages in all.
    """
    pages, free = torch.zeros_like(records[0]), torch.zeros_like(records[0])
    first = []
    for count, size in zip(records, sizes, strict=True):
        per_page = page_bytes // size
        begin = pages * per_page - free // size
        end = begin + count
        pages = torch.maximum(pages, (end + per_page - 1) // per_page)
        free = torch.where(count > 0, (pages * per_page - end) * size, free)
        first.append(begin)
    return torch.stack(first), pages


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `[..., n]` of b bits in planes.

    Args:
        codes: integers below 2**bits; n is 32 or 16.
        bits: 1, 2, 4 or 8; 3 bits are two of 2 and 1.

    Returns:
        `[..., n·b / 8]` uint8.
    """
    if bits == 3:
        return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], -1)
    each = 8 // bits
    planes = codes.to(torch.uint8).unflatten(-1, (each, -1))
    packed = planes[..., 0, :].clone()
    for plane in range(1, each):
        packed |= planes[..., plane, :] << (bits * plane)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes `[..., n]` uint8 of what `pack` made."""
    if bits == 3:
        low, high = packed.split([packed.shape[-1] // 3 * 2, packed.shape[-1] // 3], -1)
        return unpack(low, 2) | unpack(high, 1) << 2
    planes = [packed >> (bits * plane) & (1 << bits) - 1 for plane in range(8 // bits)]
    return torch.cat(planes, -1)


def as_bytes(numbers: Tensor) -> Tensor:
    """The bytes `[..., k]` uint8 of numbers `[...]`, k of each row one behind the other."""
    return numbers.contiguous().view(torch.uint8)


def sections(records: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Records `[..., record_bytes]` cut into parts of so many bytes, each contiguous."""
    return tuple(part.contiguous() for part in records.split(list(sizes), -1))
