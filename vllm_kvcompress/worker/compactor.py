"""Runs Jobs: scores a request's tokens, decides each head's pages, and writes the kept tokens into them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.allocation import select
from vllm_kvcompress.paging.job import Job
from vllm_kvcompress.policies.base import LayerObservation, Policy
from vllm_kvcompress.requests.cache import Kept, PagedCache
from vllm_kvcompress.requests.observer import LayerAttention, Observed
from vllm_kvcompress.requests.tables import RequestTable

Listener = Callable[[Job, Tensor, Tensor], None]


@dataclass(frozen=True)
class _Candidates:
    """What a request holds of one layer, below and above the new boundary.

    Attributes:
        pages: `[H, W / N]` int64 physical pages, -1 for padding (see `PagedCache.context`).
        num_scored: columns below the boundary.
        padding: `[H]` int64, leading columns that hold nothing.
        positions: `[H, num_scored + tail]` int64, token positions of the columns.
    """

    pages: Tensor
    num_scored: int
    padding: Tensor
    positions: Tensor


class Compactor:
    """Compacts requests inside a paged cache.

    Attributes:
        listeners: called after each Job with the Job, the page counts `[L, H]` and the kept token positions
            `[pages, N]` in run order, all int64.
    """

    def __init__(self, cache: PagedCache, layers: list[LayerAttention]) -> None:
        """Bind to a cache.

        Args:
            cache: every page of every layer.
            layers: one per layer of its grid.
        """
        self.cache = cache
        self.grid = cache.grid
        self.layers = layers
        self.listeners: list[Listener] = []

    def run(self, job: Job, table: RequestTable | None, observed: Observed | None) -> RequestTable:
        """Compact one request.

        Destination blocks may be source blocks; then everything is gathered before anything is written.

        Args:
            job: what to do.
            table: the result of the request's last compaction, if there was one.
            observed: what was kept of its queries, if its policy needs any; its states are carried over.

        Returns:
            The request's new table.
        """
        assert (table is None) == (not job.previous)
        policy = job.config.build_policy()
        layers = [self._candidates(job, table, index) for index in range(self.grid.num_layers)]

        def observe(index: int) -> LayerObservation:  # one layer at a time: it is a copy of the layer's cache
            return self._observe(job, policy, observed, index, layers[index])

        width = max(layer.num_scored for layer in layers)
        shape = self.grid.num_layers, self.grid.num_heads, width
        scores = torch.full(shape, -torch.inf, device=self.cache.device)
        for index, layer in enumerate(layers):
            if self.cache.scores_windows(policy):
                seen = self._observe(job, policy, observed, index, layer, read=False)
                own = self.cache.window_scores(policy, layer.pages, seen)
            else:
                own = policy.score(observe(index))
            scores[index, :, width - layer.num_scored :] = _ranked(own, layer, finite=True)
        _protect(scores, layers, job.config.sink_tokens)
        counts = job.config.build_allocation().allocate(
            scores,
            len(job.destination) * self.grid.pages_per_block,
            self.grid.block_size,
            torch.stack([(layer.num_scored - layer.padding) // self.grid.block_size for layer in layers]),
        )
        if type(policy).refine is not Policy.refine:
            for index, layer in enumerate(layers):
                own = scores[index, :, width - layer.num_scored :]
                num_kept = counts[index] * self.grid.block_size
                own[:] = _ranked(policy.refine(own.clone(), num_kept, observe(index)), layer)
            _protect(scores, layers, job.config.sink_tokens)
        kept = self._kept(layers, counts, select(scores, counts, self.grid.block_size))
        positions = torch.cat(
            [layer.positions[own.head[:, None], own.tokens] for layer, own in zip(layers, kept, strict=True)]
        )
        destination = torch.tensor(job.destination, device=self.cache.device)
        overlaps = not {*job.previous, *job.source}.isdisjoint(job.destination)
        self.cache.rewrite(kept, self.grid.linear_pages(destination), overlaps)
        for listener in self.listeners:
            listener(job, counts, positions)
        again = job.config.interval is not None
        if observed is not None and again:
            self._carry(job, policy, observed, layers, counts, kept)
        lasting = positions.to(torch.int32) if again else None
        return RequestTable(self.grid, destination, counts, job.boundary, lasting)

    def _candidates(self, job: Job, table: RequestTable | None, index: int) -> _Candidates:
        block_size = self.grid.block_size
        device = self.cache.device
        raw_blocks = torch.tensor(job.source + job.tail, dtype=torch.int64, device=device)
        pages = self.cache.context(index, table, raw_blocks)
        if table is None:
            positions = torch.arange(job.num_tokens, device=device).expand(self.grid.num_heads, -1)
        else:
            positions = table.column_positions(index, job.num_tokens)
        return _Candidates(
            pages=pages,
            num_scored=(pages.shape[1] - len(job.tail)) * block_size,
            padding=(pages < 0).sum(1) * block_size,
            positions=positions,
        )

    def _observe(
        self,
        job: Job,
        policy: Policy,
        observed: Observed | None,
        index: int,
        layer: _Candidates,
        read: bool = True,
    ) -> LayerObservation:
        heads, device = self.grid.num_heads, self.cache.device
        width = layer.num_scored + job.num_tokens - job.boundary
        keys = values = torch.empty(heads, width, 0, device=device)
        if policy.reads_keys and read:
            keys, values = (plain[:, :width] for plain in self.cache.read(layer.pages))
        queries = torch.empty(0, heads, 1, 0, device=device)
        if observed is not None and policy.window:
            queries = observed.window(index, job.num_tokens).unflatten(1, (heads, -1))
        attention = self.layers[index]
        return LayerObservation(
            keys=keys,
            values=values,
            queries=queries,
            scale=attention.scale,
            num_scored=layer.num_scored,
            num_tokens=job.num_tokens,
            logits_soft_cap=attention.logits_soft_cap,
            padding=layer.padding if bool(layer.padding.any()) else None,
            state=None if observed is None else observed.states[index],
            rotary=attention.rotary,
            output_projection=attention.output_projection,
            layer=attention.index,
            kept_positions=lambda: layer.positions,
        )

    def _kept(self, layers: list[_Candidates], counts: Tensor, selected: Tensor) -> list[Kept]:
        """The selected columns `[pages, N]`, layer by layer: `select` counts all from the same last one."""
        width = max(layer.num_scored for layer in layers)
        heads = torch.arange(self.grid.num_heads, device=counts.device)
        return [
            Kept(
                pages=layer.pages[:, : layer.num_scored // self.grid.block_size],
                head=heads.repeat_interleave(of_layer),
                tokens=tokens - (width - layer.num_scored),
            )
            for layer, of_layer, tokens in zip(
                layers, counts, selected.split(counts.sum(1).tolist()), strict=True
            )
        ]

    def _carry(
        self,
        job: Job,
        policy: Policy,
        observed: Observed,
        layers: list[_Candidates],
        counts: Tensor,
        kept: list[Kept],
    ) -> None:
        """Give the policy's states the columns that the new table has."""
        block_size = self.grid.block_size
        for index, (layer, own) in enumerate(zip(layers, kept, strict=True)):
            if observed.states[index] is None:
                continue
            width = int(counts[index].max()) * block_size
            runs = own.tokens.flatten().split((counts[index] * block_size).tolist())
            last = layer.num_scored + job.num_tokens - job.boundary
            tail = torch.arange(layer.num_scored, last, device=counts.device)
            old = torch.full((self.grid.num_heads, width + len(tail)), -1, device=counts.device)
            for head, run in enumerate(runs):
                old[head, width - len(run) : width] = run
            old[:, width:] = tail
            observed.states[index] = policy.carry(observed.states[index], old)


def _protect(scores: Tensor, layers: list[_Candidates], sink_tokens: int) -> None:
    """Set the scores of the attention sinks, which head every run, to +inf."""
    width = scores.shape[-1]
    column = torch.arange(width, device=scores.device)
    for index, layer in enumerate(layers):
        first = layer.padding[:, None] + width - layer.num_scored
        scores[index][(column >= first) & (column < first + sink_tokens)] = torch.inf


def _ranked(scores: Tensor, layer: _Candidates, finite: bool = False) -> Tensor:
    """Scores that leave -inf to padding: one broken score must not rank a token below what does not exist.

    Where they are `finite`, +inf is left to what is protected.
    """
    # (The sum is NaN or infinite if any score is.)
    if not bool(scores.sum().isfinite()):
        limits = torch.finfo(torch.float32)
        high = limits.max if finite else torch.inf
        scores = scores.nan_to_num(nan=limits.min, neginf=limits.min, posinf=high)
    if bool(layer.padding.any()):
        column = torch.arange(scores.shape[1], device=scores.device)
        scores = scores.masked_fill(column < layer.padding[:, None], -torch.inf)
    return scores
