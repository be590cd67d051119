"""How vLLM's CPU kernel packs keys and values inside a page."""

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm import _custom_ops as ops

from vllm_kvcompress.requests.float8 import EXACT, FLOAT8

Digits = list[tuple[int, int]]  # (size, stride)


@dataclass(frozen=True)
class Packing:
    """A permutation of the `N·D` elements of one page.

    `packed[i] = plain[order[i]]`, with both flattened and plain being `[N, D]`.

    Kernels store pages tile by tile, so that token and channel each decide a part of an element's place. Such
    pages are unpacked as strided views are copied, and tokens are moved without being unpacked. Both parts
    are numbers of a few digits: a token's tile, its place in the tile, and so on.
    """

    order: Tensor
    block_size: int
    head_size: int

    def __post_init__(self) -> None:
        place = torch.argsort(self.order).view(self.block_size, self.head_size)
        tokens, channels = _digits(place[:, 0] - place[0, 0]), _digits(place[0])
        regular = torch.equal(place, place[:, :1] + place[:1] - place[0, 0])
        object.__setattr__(self, "_place", place)
        object.__setattr__(self, "_digits", (tokens, channels) if regular and tokens and channels else None)

    @property
    def places(self) -> Tensor:
        """Where each element of a page is stored, `[N, D]` int64."""
        return self._place

    def unpack(self, packed: Tensor) -> Tensor:
        """`[..., N·D]` as stored to `[..., N, D]`; a view where the packing allows one."""
        shape = *packed.shape[:-1], self.block_size, self.head_size
        if self._digits is None:
            return packed[..., self._place.flatten()].view(shape)
        stored, tokens, channels, unit = self._in_units(packed)
        digits = tokens + channels
        sizes, strides = [size for size, _ in digits], [stride for _, stride in digits]
        plain = stored.as_strided((*shape[:-2], *sizes), (*stored.stride()[:-1], *strides))
        return plain.reshape(*shape[:-1], -1).view(packed.dtype)

    def pack(self, plain: Tensor) -> Tensor:
        """`[..., N, D]` to `[..., N·D]` as stored."""
        return plain.flatten(-2)[..., self.order]

    def gather(self, elements: Tensor, first: Tensor, token: Tensor) -> Tensor:
        """New pages of tokens from other ones.

        Args:
            elements: one-dimensional, what is stored.
            first: `[M, N]` int64, where the page begins that each of a new page's tokens is in.
            token: `[M, N]` int64, which token of that page it is.

        Returns:
            `[M, N·D]` as stored.
        """
        if self._digits is None:
            own, channel = self.order // self.head_size, self.order % self.head_size
            return elements.take(first[:, own] + self._place[token[:, own], channel])
        stored, tokens, channels, unit = self._in_units(elements)
        digits = tokens + channels
        # Where each element of a new page is: one dimension per digit, in the order in which they are stored.
        row = (first + self._place[:, 0][token]) // unit
        row = row.view(-1, *[size for size, _ in tokens], *[1] * len(channels))
        channel = (self._place[0, ::unit] - self._place[0, 0]) // unit
        channel = channel.view(1, *[1] * len(tokens), *[size for size, _ in channels])
        order = sorted(range(len(digits)), key=lambda digit: -digits[digit][1])
        order = [0, *[1 + digit for digit in order]]
        return stored.take(row.permute(order) + channel.permute(order)).flatten(1).view(elements.dtype)

    def _in_units(self, stored: Tensor) -> tuple[Tensor, Digits, Digits, int]:
        """The stored elements, their digits, and how many that lie together are moved as one number."""
        assert self._digits is not None
        tokens, channels = self._digits
        size, stride = channels[-1]
        for unit, dtype in ((8, torch.int64), (4, torch.int32)):
            unit //= stored.element_size()
            if unit > 1 and stride == 1 and size % unit == 0 and stored.stride(-1) == 1:
                tokens = [(size, stride // unit) for size, stride in tokens]
                channels = [(size, stride // unit) for size, stride in channels[:-1]]
                return stored.view(dtype), tokens, [*channels, (size // unit, 1)], unit
        return stored, tokens, channels, 1


def _digits(offsets: Tensor) -> Digits | None:
    """Sizes and strides that give these offsets, the last digit counting fastest; None if there are none."""
    digits: Digits = []
    rest = offsets
    while len(rest) > 1:
        stride = int(rest[1])
        size = next((i for i in range(2, len(rest)) if rest[i] != i * stride), len(rest))
        if len(rest) % size:
            return None
        digits.insert(0, (size, stride))
        rest = rest[::size]
    value = torch.zeros(1, dtype=torch.int64)
    for size, stride in digits:
        value = (value[:, None] + torch.arange(size) * stride).flatten()
    return digits if torch.equal(value, offsets) else None


def learn_packing(
    isa: str, block_size: int, head_size: int, dtype: torch.dtype, cache_dtype: str = "auto"
) -> tuple[Packing, Packing]:
    """Ask the cache-writing op itself where it puts each element.

    Each element's index is written digit by digit, to a base that is exact in the cache, and read back.

    Args:
        isa: of vLLM's CPU attention.
        block_size: N.
        head_size: D.
        dtype: of keys and values.
        cache_dtype: of the cache, as `--kv-cache-dtype` has it.

    Returns:
        The packing of keys and of values.

    Raises:
        RuntimeError: the op does not permute elements, so pages could not be rewritten.
    """
    float8 = FLOAT8.get(cache_dtype)
    base, num_elements = EXACT.get(float8, 128), block_size * head_size
    index = torch.arange(num_elements).view(block_size, 1, head_size)
    orders = torch.zeros(2, num_elements, dtype=torch.int64)
    place = 1
    while place < num_elements:
        digit = (index // place % base).to(dtype)
        cache = torch.zeros(1, 1, 2 * block_size, head_size, dtype=torch.uint8 if float8 else dtype)
        keys, values = cache.chunk(2, dim=2)
        slots = torch.arange(block_size)
        ops.cpu_attn_reshape_and_cache(
            digit, digit.clone(), keys, values, slots, isa, kv_cache_dtype=cache_dtype
        )
        held = cache.view(2, num_elements)
        orders += (held.view(float8).float() if float8 else held).to(torch.int64) * place
        place *= base
    for order in orders:
        if not torch.equal(order.sort().values, torch.arange(num_elements)):
            raise RuntimeError(f"kv-compression: the CPU attention ISA {isa!r} does not store plain elements")
    keys, values = (Packing(order, block_size, head_size) for order in orders)
    return keys, values
