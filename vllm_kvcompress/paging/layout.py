"""Where a page lies: the arithmetic that ties linear pages to vLLM's blocks."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PageGrid:
    """The cache as vLLM lays it out, `[L, B, H, N, C]`, seen as `L·B·H` pages.

    Attributes:
        num_layers: L, layers that hold KV on this rank.
        num_blocks: B, blocks of the pool (the null block included).
        num_heads: H, KV heads on this rank.
        block_size: N, tokens per page.
    """

    num_layers: int
    num_blocks: int
    num_heads: int
    block_size: int

    @property
    def pages_per_block(self) -> int:
        """Pages that one block holds: one per layer and head."""
        return self.num_layers * self.num_heads

    def linear_pages(self, block_ids: Tensor) -> Tensor:
        """Physical pages of all linear pages of a compacted request, `[n·L·H]` int64; see `pages_at`."""
        linear = torch.arange(len(block_ids) * self.pages_per_block, device=block_ids.device)
        return self.pages_at(block_ids, linear)

    def pages_at(self, block_ids: Tensor, linear: Tensor) -> Tensor:
        """Physical pages of some linear pages of a compacted request.

        Args:
            block_ids: `[n]` int64, the request's destination blocks in order.
            linear: int64 of any shape, which of its pages.

        Returns:
            Of the same shape: the page (layer slot, block, head slot) that each linear page occupies.
        """
        block, slot = block_ids[linear // self.pages_per_block], linear % self.pages_per_block
        return self._index(slot // self.num_heads, block, slot % self.num_heads)

    def positional_pages(self, block_ids: Tensor) -> Tensor:
        """Physical pages of raw blocks, where each layer and head keeps its own slot.

        Args:
            block_ids: `[n]` int64.

        Returns:
            `[L, H, n]` int64.
        """
        layer = torch.arange(self.num_layers, device=block_ids.device)[:, None, None]
        return self._index(layer, block_ids, self._heads(block_ids))

    def layer_pages(self, layers: slice, block_ids: Tensor) -> Tensor:
        """`positional_pages` of some layers alone, their heads one after the other, `[l·H, n]` int64."""
        layer = torch.arange(*layers.indices(self.num_layers), device=block_ids.device)[:, None, None]
        return self._index(layer, block_ids, self._heads(block_ids)).flatten(0, 1)

    def _heads(self, block_ids: Tensor) -> Tensor:
        return torch.arange(self.num_heads, device=block_ids.device)[:, None]

    def _index(self, layer: Tensor | int, block: Tensor, head: Tensor) -> Tensor:
        return (layer * self.num_blocks + block) * self.num_heads + head
