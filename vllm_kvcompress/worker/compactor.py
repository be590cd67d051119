"""Runs Jobs: scores a request's tokens, decides each head's pages, and writes the kept tokens into them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.paging.job import Job
from vllm_kvcompress.policies.base import LayerObservation, Policy
from vllm_kvcompress.requests.cache import Kept, PagedCache
from vllm_kvcompress.requests.observer import LayerAttention, Observed
from vllm_kvcompress.requests.tables import RequestTable

Listener = Callable[[Job, Tensor, Tensor], None]


@dataclass(frozen=True)
class _Task:
    """A Job and what it is run on.

    Attributes:
        job: what to do.
        policy: which scores.
        table: the result of the request's last compaction, if there was one.
        observed: what was kept of its queries, if the policy needs any.
        raw: `[n]` int64, block ids of the Job's raw tokens, on the cache's device.
    """

    job: Job
    policy: Policy
    table: RequestTable | None
    observed: Observed | None
    raw: Tensor


@dataclass(frozen=True)
class _Candidates:
    """What a request holds of some layers, their heads one after the other: X = l·H.

    Attributes:
        layers: which.
        pages: `[X, W / N]` int64 physical pages, -1 for padding (see `PagedCache.context`).
        num_scored: columns below the new boundary.
        padding: `[X]` int64, leading columns that hold nothing; None for none.
        positions: makes `[X, W]` int64, token positions of the columns; None where column i is token i.
    """

    layers: slice
    pages: Tensor
    num_scored: int
    padding: Tensor | None
    positions: Callable[[], Tensor] | None


class Compactor:
    """Compacts requests inside a paged cache.

    All layers go through few operations together: what is as long as a request's context is made for as many
    layers at a time as fit `PagedCache.slice_bytes`.

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
        policy, block_size = job.config.build_policy(), self.grid.block_size
        task = _Task(job, policy, table, observed, self.cache.on_device(job.source + job.tail))
        whole = self._candidates(task, slice(0, self.grid.num_layers))
        scores = self._scores(task, whole)
        num_pages = len(job.destination) * self.grid.pages_per_block
        capacity = None
        if whole.padding is not None:
            capacity = ((whole.num_scored - whole.padding) // block_size).view(scores.shape[:2])
        allocation, sinks = job.config.build_allocation(), job.config.sink_tokens
        counts = self.cache.allocate(allocation, scores, num_pages, sinks, capacity)
        if type(policy).refine is not Policy.refine:
            self._refine(task, whole, scores, counts)
        columns, row = self.cache.select(scores, counts, num_pages)
        positions = columns if whole.positions is None else whole.positions()[row[:, None], columns]
        destination = self.cache.on_device(job.destination)
        overlaps = not {*job.previous, *job.source}.isdisjoint(job.destination)
        self.cache.rewrite(Kept(whole.pages, row, columns), self.grid.linear_pages(destination), overlaps)
        for listener in self.listeners:
            listener(job, counts, positions)
        again = job.config.interval is not None
        new = RequestTable(
            self.grid, destination, counts, job.boundary, positions.to(torch.int32) if again else None
        )
        if observed is not None and again:
            self._carry(task, new, columns - whole.num_scored)
        return new

    def _candidates(self, task: _Task, layers: slice) -> _Candidates:
        job, table = task.job, task.table
        pages = self.cache.context(layers, table, task.raw)
        return _Candidates(
            layers=layers,
            pages=pages,
            num_scored=(pages.shape[1] - len(job.tail)) * self.grid.block_size,
            padding=None if table is None else (pages < 0).sum(1) * self.grid.block_size,
            positions=None if table is None else lambda: table.column_positions(layers, job.num_tokens),
        )

    def _slices(self, task: _Task, whole: _Candidates) -> Iterator[_Candidates]:
        """The layers, as many at a time as the policy scores at once and memory is meant for."""
        policy, observed = task.policy, task.observed
        at_once, heads = 1, self.grid.num_heads
        if self.cache.scores_windows(policy):  # in memory of bounds of its own
            at_once = len(self.layers)
        elif policy.stacks_layers:
            columns = whole.pages.shape[1] * self.grid.block_size
            group = 0 if observed is None or observed.ring is None else observed.ring.shape[2] // heads
            # Keys and attention in float32.
            per_layer = 4 * heads * columns * (self.cache.head_size + group * policy.window)
            at_once = max(1, self.cache.slice_bytes // per_layer)
        begin = 0
        while begin < len(self.layers):
            end = begin + 1
            while end < min(begin + at_once, len(self.layers)) and self._alike(begin, end):
                end += 1
            yield self._candidates(task, slice(begin, end))
            begin = end

    def _alike(self, one: int, other: int) -> bool:
        """Whether two layers may be scored as one with more heads."""
        a, b = self.layers[one], self.layers[other]
        return (a.scale, a.logits_soft_cap) == (b.scale, b.logits_soft_cap)

    def _scores(self, task: _Task, whole: _Candidates) -> Tensor:
        """The policy's scores `[L, H, T]`, ready to be compared: padding lowest, then what is no number."""
        scores = torch.full((len(whole.pages), whole.num_scored), -torch.inf, device=self.cache.device)
        policy, heads = task.policy, self.grid.num_heads
        for part in self._slices(task, whole):
            if self.cache.scores_windows(policy):
                own = self.cache.window_scores(policy, part.pages, self._observe(task, part, read=False))
            else:
                own = policy.score(self._observe(task, part))
            rows = slice(part.layers.start * heads, part.layers.stop * heads)
            scores[rows, whole.num_scored - part.num_scored :] = own
        # One broken score must not rank a token below what does not exist, nor above what is protected.
        limits = torch.finfo(torch.float32)
        scores.nan_to_num_(nan=limits.min, neginf=limits.min, posinf=limits.max)
        return self._protected(task.job, whole, scores)

    def _refine(self, task: _Task, whole: _Candidates, scores: Tensor, counts: Tensor) -> None:
        """Have the policy change its scores `[L, H, T]` by how many tokens each head keeps."""
        for layer in range(self.grid.num_layers):
            part = self._candidates(task, slice(layer, layer + 1))
            own = scores[layer, :, whole.num_scored - part.num_scored :]
            num_kept = counts[layer] * self.grid.block_size
            own[:] = task.policy.refine(own.clone(), num_kept, self._observe(task, part))
        least = torch.finfo(torch.float32).min
        scores.nan_to_num_(nan=least, neginf=least, posinf=torch.inf)
        self._protected(task.job, whole, scores)

    def _protected(self, job: Job, whole: _Candidates, scores: Tensor) -> Tensor:
        """As `[L, H, T]`, changed in place: padding at -inf; the sinks, which head every run, at +inf."""
        sinks, padding = job.config.sink_tokens, whole.padding
        flat = scores.view(len(whole.pages), -1)
        if padding is None:
            flat[:, :sinks] = torch.inf
        else:
            behind = torch.arange(whole.num_scored, device=scores.device) - padding[:, None]
            flat.masked_fill_(behind < 0, -torch.inf)
            flat.masked_fill_((behind >= 0) & (behind < sinks), torch.inf)
        return flat.view(self.grid.num_layers, self.grid.num_heads, -1)

    def _observe(self, task: _Task, part: _Candidates, read: bool = True) -> LayerObservation:
        job, policy, observed = task.job, task.policy, task.observed
        rows, device = len(part.pages), self.cache.device
        width = part.num_scored + job.num_tokens - job.boundary
        keys = values = torch.empty(rows, width, 0, device=device)
        if policy.reads_keys and read:
            keys = self.cache.read_keys(part.pages)[:, :width]
        if policy.reads_values and read:
            values = self.cache.read_values(part.pages)[:, :width]
        queries = torch.empty(0, rows, 1, 0, device=device)
        if observed is not None and policy.window:
            queries = observed.window(part.layers, job.num_tokens).flatten(1, 2).unflatten(1, (rows, -1))
        first = part.layers.start
        attention = self.layers[first]
        return LayerObservation(
            keys=keys,
            values=values,
            queries=queries,
            scale=attention.scale,
            num_scored=part.num_scored,
            num_tokens=job.num_tokens,
            logits_soft_cap=attention.logits_soft_cap,
            padding=part.padding,
            state=None if observed is None else observed.states[first],
            rotary=attention.rotary,
            output_projection=attention.output_projection,
            layer=attention.index,
            kept_positions=part.positions,
            num_layers=part.layers.stop - first,
        )

    def _carry(self, task: _Task, new: RequestTable, from_end: Tensor) -> None:
        """Give the policy's states the columns of the new table; `from_end`, below 0, are its old ones."""
        job, table, observed = task.job, task.table, task.observed
        assert observed is not None
        raw = torch.arange(job.num_tokens - job.boundary, device=from_end.device)
        raw = raw.expand(self.grid.num_heads, -1)
        for layer, state in enumerate(observed.states):
            if state is None:
                continue
            own = slice(layer, layer + 1)
            width = (len(job.source) + (table.longest(own) if table else 0)) * self.grid.block_size
            old = new.align(own, from_end, -width - 1) + width
            observed.states[layer] = task.policy.carry(state, torch.cat([old, raw + width], 1))
