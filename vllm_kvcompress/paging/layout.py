"""Where a page lies: the arithmetic that ties linear pages to vLLM's blocks."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PageGrid:
    """The cache as vLLM lays it out, `[S, B, H, N, C]`, seen as `S·B·H` pages.

    Layers of several cache groups of vLLM's share a slot: their pages are in the same bytes of different
    blocks. So each group has blocks of its own for what is raw, and a compacted page of any layer may be in
    any slot of any block.

    Attributes:
        num_layers: L, layers that hold KV on this rank.
        num_blocks: B, blocks of the pool (the null block included).
        num_heads: H, KV heads on this rank.
        block_size: N, tokens per page.
        num_groups: G, groups of layers that have blocks of their own, here or on another pipeline rank.
        groups: of each layer, its group; empty for one of all.
        slots: of each layer, which of S it has in these; empty where each has its own.
    """

    num_layers: int
    num_blocks: int
    num_heads: int
    block_size: int
    num_groups: int = 1
    groups: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()

    @property
    def num_slots(self) -> int:
        """S, layers that a block has room for."""
        return max(self.slots) + 1 if self.slots else self.num_layers

    @property
    def pages_per_block(self) -> int:
        """Pages that one block holds: one per slot and head."""
        return self.num_slots * self.num_heads

    def linear_pages(self, block_ids: Tensor) -> Tensor:
        """Physical pages of all linear pages of a compacted request, `[n·S·H]` int64; see `pages_at`."""
        linear = torch.arange(len(block_ids) * self.pages_per_block, device=block_ids.device)
        return self.pages_at(block_ids, linear)

    def pages_at(self, block_ids: Tensor, linear: Tensor) -> Tensor:
        """Physical pages of some linear pages of a compacted request.

        Args:
            block_ids: `[n]` int64, the request's destination blocks in order.
            linear: int64 of any shape, which of its pages.

        Returns:
            Of the same shape: the page (slot, block, head slot) that each linear page occupies.
        """
        block, place = block_ids[linear // self.pages_per_block], linear % self.pages_per_block
        return self._index(place // self.num_heads, block, place % self.num_heads)

    def positional_pages(self, block_ids: Tensor) -> Tensor:
        """Physical pages of raw blocks, where each layer and head keeps its own slot.

        Args:
            block_ids: `[G, n]` int64, blocks of each group; `[n]` for all layers as if they were theirs.

        Returns:
            `[L, H, n]` int64.
        """
        return self.layer_pages(slice(None), block_ids).unflatten(0, (self.num_layers, self.num_heads))

    def layer_pages(self, layers: slice, block_ids: Tensor) -> Tensor:
        """`positional_pages` of some layers alone, their heads one after the other, `[l·H, n]` int64."""
        device = block_ids.device
        slot = torch.arange(*layers.indices(self.num_layers), device=device)
        if self.slots:
            slot = _sent(self.slots, device)[layers]
        if block_ids.ndim == 2:
            own = _sent(self.groups, device)[layers] if self.groups else slice(None)
            block_ids = block_ids[own, None]
        head = torch.arange(self.num_heads, device=device)[:, None]
        return self._index(slot[:, None, None], block_ids, head).flatten(0, 1)

    def rows(self, layers: slice) -> slice:
        """The heads of some layers among those of all, one after the other, `L·H`."""
        return slice(layers.start * self.num_heads, layers.stop * self.num_heads)

    @functools.cached_property
    def layers_of_groups(self) -> tuple[tuple[int, ...], ...]:
        """The layers of each group."""
        groups = self.groups or (0,) * self.num_layers
        return tuple(
            tuple(layer for layer, own in enumerate(groups) if own == group)
            for group in range(self.num_groups)
        )

    def _index(self, slot: Tensor | int, block: Tensor, head: Tensor) -> Tensor:
        return (slot * self.num_blocks + block) * self.num_heads + head


@functools.cache
def _sent(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers on a device, for which the host waits once."""
    return torch.tensor(numbers, device=device)
