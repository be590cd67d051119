"""Runs Jobs: scores a request's tokens, decides each head's pages, and writes the kept tokens into them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.allocation import select
from vllm_kvcompress.attention.cpu_pages import Packing
from vllm_kvcompress.attention.tables import RequestTable
from vllm_kvcompress.paging.job import Job
from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.policies.base import LayerObservation

Listener = Callable[[Job, Tensor, Tensor], None]


@dataclass(frozen=True)
class LayerAttention:
    """A layer's own attention constants: policies must not guess them."""

    scale: float
    logits_soft_cap: float


class Compactor:
    """Compacts requests inside a paged cache.

    Attributes:
        listeners: called after each Job with the Job, the page counts `[L, H]` and the kept token positions
            `[pages, N]` in run order, all int64.
    """

    def __init__(
        self,
        grid: PageGrid,
        pages: Tensor,
        packing: tuple[Packing, Packing],
        layers: list[LayerAttention],
    ) -> None:
        """Bind to a cache.

        Args:
            grid: the cache's geometry.
            pages: `[L·B·H, 2, N·D]`, every page of every layer: packed keys, then packed values.
            packing: how keys and values lie in a page.
            layers: one per layer of the grid.
        """
        self.grid = grid
        self.pages = pages
        self.key_packing, self.value_packing = packing
        self.layers = layers
        self.listeners: list[Listener] = []

    def run(self, job: Job, queries: Tensor | None) -> RequestTable:
        """Compact one request.

        Everything is gathered before anything is written, because destination blocks may be source blocks.

        Args:
            job: what to do.
            queries: `[L, w, Hq, D]` of the prompt's last tokens; None when the policy looks at none.

        Returns:
            The request's new table.
        """
        scores = self._score(job, queries)
        scores[..., : job.config.sink_tokens] = torch.inf
        counts = job.config.build_allocation().allocate(
            scores, len(job.destination) * self.grid.pages_per_block, self.grid.block_size
        )
        kept = select(scores, counts, self.grid.block_size)
        packed = self._gather(job, counts, kept)
        destination = torch.tensor(job.destination)
        self.pages[self.grid.linear_pages(destination)] = packed
        for listener in self.listeners:
            listener(job, counts, kept)
        return RequestTable(self.grid, destination, counts, job.boundary)

    def _score(self, job: Job, queries: Tensor | None) -> Tensor:
        """Importance of every token below the boundary, `[L, H, T]` float32."""
        policy = job.config.build_policy()
        heads, num_tokens = self.grid.num_heads, job.num_prompt_tokens
        blocks = self._pages_of(job.source + job.tail)
        absent = torch.empty(heads, num_tokens, 0)
        scores = torch.empty(self.grid.num_layers, heads, job.boundary)
        for index, layer in enumerate(self.layers):
            keys, values = self._read(blocks[index]) if policy.reads_keys else (absent, absent)
            window = torch.empty(0, heads, 1, 0) if queries is None else queries[index]
            observation = LayerObservation(
                keys=keys[:, :num_tokens],
                values=values[:, :num_tokens],
                queries=window.unflatten(1, (heads, -1)) if queries is not None else window,
                scale=layer.scale,
                logits_soft_cap=layer.logits_soft_cap,
                num_scored=job.boundary,
            )
            scores[index] = policy.score(observation)
        return scores

    def _gather(self, job: Job, counts: Tensor, kept: Tensor) -> Tensor:
        """The kept tokens, packed: `[pages, 2, N·D]` in run order."""
        blocks = self._pages_of(job.source)
        out = self.pages.new_empty(len(kept), *self.pages.shape[1:])
        begin = 0
        for index in range(self.grid.num_layers):
            end = begin + int(counts[index].sum())
            head = torch.repeat_interleave(torch.arange(self.grid.num_heads), counts[index])[:, None]
            tokens = kept[begin:end]
            keys, values = self._read(blocks[index])
            out[begin:end, 0] = self.key_packing.pack(keys[head, tokens])
            out[begin:end, 1] = self.value_packing.pack(values[head, tokens])
            begin = end
        return out

    def _pages_of(self, blocks: tuple[int, ...]) -> Tensor:
        return self.grid.positional_pages(torch.tensor(blocks, dtype=torch.int64))

    def _read(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Plain keys and values `[H, T, D]` of a layer's pages `[H, n]`."""
        packed = self.pages[pages]
        keys = self.key_packing.unpack(packed[:, :, 0])
        values = self.value_packing.unpack(packed[:, :, 1])
        return keys.flatten(1, 2), values.flatten(1, 2)
