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
        """Physical page of every linear page of a compacted request.

        Args:
            block_ids: `[n]` int64, the request's destination blocks in order.

        Returns:
            `[n·L·H]` int64; entry p is the page (layer slot, block, head slot) that linear page p occupies.
        """
        layer, head = self._slots()
        return self._index(layer, block_ids[:, None, None], head).reshape(-1)

    def positional_pages(self, block_ids: Tensor) -> Tensor:
        """Physical pages of raw blocks, where each layer and head keeps its own slot.

        Args:
            block_ids: `[n]` int64.

        Returns:
            `[L, H, n]` int64.
        """
        layer, head = self._slots()
        return self._index(layer[..., None], block_ids, head[..., None])

    def layer_pages(self, layer: int, block_ids: Tensor) -> Tensor:
        """`positional_pages` of one layer alone, `[H, n]` int64."""
        return self._index(torch.tensor(layer), block_ids, torch.arange(self.num_heads)[:, None])

    def _slots(self) -> tuple[Tensor, Tensor]:
        return torch.arange(self.num_layers)[:, None], torch.arange(self.num_heads)[None, :]

    def _index(self, layer: Tensor, block: Tensor, head: Tensor) -> Tensor:
        return (layer * self.num_blocks + block) * self.num_heads + head
