"""The paged cache as plain keys and values, whatever the kernel's packing."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.policies.base import LayerObservation, Policy
from vllm_kvcompress.requests.cpu_pages import Packing
from vllm_kvcompress.requests.tables import RequestTable


@dataclass(frozen=True)
class Kept:
    """Tokens of one layer that a compaction keeps, page by page in run order.

    Attributes:
        pages: `[H, n]` int64, the pages of each head's tokens in order.
        head: `[M]` int64, the head that each new page belongs to.
        tokens: `[M, N]` int64, which of that head's tokens fill it.
    """

    pages: Tensor
    head: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class PagedCache(ABC):
    """Every page of every layer.

    Attributes:
        grid: the cache's geometry.
    """

    grid: PageGrid

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the pages are."""

    @abstractmethod
    def read(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[H, W·N, D]` of pages `[H, W]`; those of absent pages (-1) are arbitrary."""

    @abstractmethod
    def read_keys(self, pages: Tensor) -> Tensor:
        """Keys `[H, W·N, D]` of pages `[H, W]`, as in `read`."""

    @abstractmethod
    def rewrite(self, kept: Sequence[Kept], target: Tensor, overlaps: bool) -> None:
        """Write the kept tokens of all layers to their new pages.

        Args:
            kept: one per layer.
            target: `[pages]` int64, the new pages in the order of `kept`.
            overlaps: whether a target may be one of the pages that are read.
        """

    def scores_windows(self, policy: Policy) -> bool:
        """Whether `window_scores` answers for this policy, without a copy of the keys."""
        return False

    def window_scores(self, policy: Policy, pages: Tensor, observation: LayerObservation) -> Tensor:
        """What the policy's `score` returns.

        Args:
            policy: one that looks at its window's attention alone.
            pages: `[H, W / N]` int64, of the layer; -1 for padding.
            observation: of the layer, whose keys and values are empty.
        """
        raise NotImplementedError

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


@dataclass(frozen=True)
class PackedCache(PagedCache):
    """Pages as vLLM's CPU kernel packs them.

    Attributes:
        pages: `[L·B·H, 2, N·D]`: packed keys, then packed values.
        key_packing: how keys lie in a page.
        value_packing: how values do.
    """

    pages: Tensor
    key_packing: Packing
    value_packing: Packing

    @property
    def device(self) -> torch.device:
        return self.pages.device

    def read(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        packed = self.pages[pages.clamp(min=0)]
        keys = self.key_packing.unpack(packed[:, :, 0])
        values = self.value_packing.unpack(packed[:, :, 1])
        return keys.flatten(1, 2), values.flatten(1, 2)

    def read_keys(self, pages: Tensor) -> Tensor:
        return self.key_packing.unpack(self.pages[pages.clamp(min=0), 0]).flatten(1, 2)

    def rewrite(self, kept: Sequence[Kept], target: Tensor, overlaps: bool) -> None:
        packed = []
        for layer in kept:
            keys, values = self.read(layer.pages)
            chosen = layer.head[:, None], layer.tokens
            packed.append(
                torch.stack([self.key_packing.pack(keys[chosen]), self.value_packing.pack(values[chosen])], 1)
            )
        self.pages[target] = torch.cat(packed)
