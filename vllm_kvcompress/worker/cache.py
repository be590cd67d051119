"""The paged cache as plain keys and values, whatever the kernel's packing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.attention.cpu_pages import Packing
from vllm_kvcompress.attention.tables import RequestTable
from vllm_kvcompress.paging.layout import PageGrid


@dataclass(frozen=True)
class PagedCache:
    """Every page of every layer.

    Attributes:
        grid: the cache's geometry.
        pages: `[L·B·H, 2, N·D]`: packed keys, then packed values.
        key_packing: how keys lie in a page.
        value_packing: how values do.
    """

    grid: PageGrid
    pages: Tensor
    key_packing: Packing
    value_packing: Packing

    def context(self, layer: int, table: RequestTable | None, raw: Tensor) -> Tensor:
        """Pages of one layer's context: a request's runs, if it has any, then its raw blocks.

        Heads keep different numbers of pages, so runs are aligned at their ends: column for column, all heads
        share the raw tokens behind them.

        Args:
            layer: index.
            table: what the request is compacted to; None if it is not.
            raw: `[n]` int64, block ids of the raw tokens.

        Returns:
            `[H, W]` int64, -1 where a head has no page.
        """
        positional = self.grid.layer_pages(layer, raw)
        return positional if table is None else torch.cat([table.right_aligned(layer), positional], 1)

    def read(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[H, W·N, D]` of pages `[H, W]`; those of absent pages (-1) are arbitrary."""
        packed = self.pages[pages.clamp(min=0)]
        keys = self.key_packing.unpack(packed[:, :, 0])
        values = self.value_packing.unpack(packed[:, :, 1])
        return keys.flatten(1, 2), values.flatten(1, 2)

    def read_keys(self, pages: Tensor) -> Tensor:
        """Keys `[H, W·N, D]` of pages `[H, W]`, as in `read`."""
        return self.key_packing.unpack(self.pages[pages.clamp(min=0), 0]).flatten(1, 2)

    def pack(self, keys: Tensor, values: Tensor) -> Tensor:
        """Pages `[n, 2, N·D]` of keys and values `[n, N, D]`."""
        return torch.stack([self.key_packing.pack(keys), self.value_packing.pack(values)], 1)
