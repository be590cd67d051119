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

    def linear_pages(self, block_ids: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
        """Physical page of linear pages of a compacted request.

        Args:
            block_ids: `[n]` int64, the request's destination blocks in order.
            begin: first linear page wanted.
            end: one past the last; None for n·L·H.

        Returns:
            `[end - begin]` int64: the page (layer slot, block, head slot) that each linear page occupies.
        """
        end = len(block_ids) * self.pages_per_block if end is None else end
        linear = torch.arange(begin, end, device=block_ids.device)
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

    def layer_pages(self, layer: int, block_ids: Tensor) -> Tensor:
        """`positional_pages` of one layer alone, `[H, n]` int64."""
        return self._index(layer, block_ids, self._heads(block_ids))

    def _heads(self, block_ids: Tensor) -> Tensor:
        return torch.arange(self.num_heads, device=block_ids.device)[:, None]

    def _index(self, layer: Tensor | int, block: Tensor, head: Tensor) -> Tensor:
        return (layer * self.num_blocks + block) * self.num_heads + head
