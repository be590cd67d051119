"""How vLLM's CPU kernel packs keys and values inside a page."""

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm import _custom_ops as ops


@dataclass(frozen=True)
class Packing:
    """A permutation of the `N·D` elements of one page.

    `packed[i] = plain[order[i]]`, with both flattened and plain being `[N, D]`.
    """

    order: Tensor
    block_size: int
    head_size: int

    def __post_init__(self) -> None:
        plain = torch.arange(self.block_size * self.head_size)
        transposed = plain.view(self.block_size, self.head_size).T.reshape(-1)
        object.__setattr__(self, "_identity", torch.equal(self.order, plain))
        object.__setattr__(self, "_transposed", torch.equal(self.order, transposed))
        object.__setattr__(self, "_inverse", torch.argsort(self.order))

    def unpack(self, packed: Tensor) -> Tensor:
        """`[..., N·D]` as stored to `[..., N, D]`; a view where the packing allows one."""
        if self._transposed:
            return packed.unflatten(-1, (self.head_size, self.block_size)).transpose(-1, -2)
        plain = packed if self._identity else packed[..., self._inverse]
        return plain.unflatten(-1, (self.block_size, self.head_size))

    def pack(self, plain: Tensor) -> Tensor:
        """`[..., N, D]` to `[..., N·D]` as stored."""
        if self._transposed:
            return plain.transpose(-1, -2).flatten(-2)
        return plain.flatten(-2) if self._identity else plain.flatten(-2)[..., self.order]


def learn_packing(isa: str, block_size: int, head_size: int, dtype: torch.dtype) -> tuple[Packing, Packing]:
    """Ask the cache-writing op itself where it puts each element.

    Each element's index is written digit by digit (base 128: exact in every supported dtype) and read back.

    Returns:
        The packing of keys and of values.

    Raises:
        RuntimeError: the op does not permute elements, so pages could not be rewritten.
    """
    base, num_elements = 128, block_size * head_size
    index = torch.arange(num_elements).view(block_size, 1, head_size)
    orders = torch.zeros(2, num_elements, dtype=torch.int64)
    place = 1
    while place < num_elements:
        digit = (index // place % base).to(dtype)
        cache = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype)
        keys, values = cache.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(digit, digit.clone(), keys, values, torch.arange(block_size), isa)
        orders += cache.view(2, num_elements).to(torch.int64) * place
        place *= base
    for order in orders:
        if not torch.equal(order.sort().values, torch.arange(num_elements)):
            raise RuntimeError(f"kv-compression: the CPU attention ISA {isa!r} does not store plain elements")
    keys, values = (Packing(order, block_size, head_size) for order in orders)
    return keys, values
