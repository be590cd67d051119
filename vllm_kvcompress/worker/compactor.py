"""Runs Jobs: has tokens scored, decides each head's pages, and has the kept ones written into them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from vllm_kvcompress.allocation import Allocation
from vllm_kvcompress.paging.job import Job, Solve
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.requests.cache import Kept, PagedCache
from vllm_kvcompress.requests.observer import LayerAttention, Observed
from vllm_kvcompress.requests.tables import Records, RequestTable
from vllm_kvcompress.worker.candidates import Candidates, Reader, aligned
from vllm_kvcompress.worker.choosing import Choosing
from vllm_kvcompress.worker.encoding import Encoder
from vllm_kvcompress.worker.room import Room
from vllm_kvcompress.worker.scoring import Scoring
from vllm_kvcompress.worker.solving import Solver
from vllm_kvcompress.worker.work import Task, Work

Listener = Callable[[Job, Tensor, Tensor], None]


class Compactor:
    """Compacts requests inside a paged cache.

    All layers go through few operations together: what is as long as a request's context is made for as many
    layers at a time as fit `PagedCache.slice_bytes`. So do requests that are compacted in the same step.

    Attributes:
        cache: every page of every layer.
        grid: how it is laid out.
        layers: one per layer of the grid.
        listeners: called after each Job with the Job, the page counts `[L, H]` and the kept token positions
            `[pages, N]` in run order, all int64; with a format, the counts of records and `[records, 32]`.
    """

    def __init__(
        self,
        cache: PagedCache,
        layers: list[LayerAttention],
        largest: Callable[[Tensor], Tensor] = lambda own: own,
        agree: Callable[[Tensor, Literal["mean", "max"]], Tensor] | None = None,
        num_drafting: int = 0,
    ) -> None:
        """Bind to a cache.

        Args:
            cache: every page of every layer.
            layers: one per layer of its grid.
            largest: makes of a number `[1]` int64 the largest of all tensor-parallel ranks, which have the
                same blocks but other heads.
            agree: makes of scores what all these ranks say together, where they have the same latents but
                other query heads (see `Policy.of_ranks`); None where no rank has what another one has.
            num_drafting: how many of the layers, the last ones, are a draft model's.
        """
        self._largest = largest
        self.cache = cache
        self.grid = cache.grid
        self.layers = layers
        self.listeners: list[Listener] = []
        self._reader, self._room = Reader(cache), Room(cache, num_drafting)
        self._scoring = Scoring(self._reader, self._room, layers, agree)
        self._choosing = Choosing(cache, self._room, self._scoring)
        self._solver = Solver(self._reader, self._scoring, self._choosing)
        self._encoder = Encoder(self._reader, self._choosing)

    def forget(self, request_id: str) -> None:
        """Drop what was solved of a request."""
        self._solver.forget(request_id)

    def solve(self, solve: Solve, observed: Observed | None) -> None:
        """Solve for biases and values of what some heads of a request keep; with the first share, choose it.

        Nothing is written: the request goes on with its raw tokens until its Job is run.
        """
        self._solver.solve(solve, observed)

    def run(self, works: Sequence[Work]) -> list[RequestTable]:
        """Compact requests, each at most once, as if one after the other.

        Destination blocks may be source blocks, of the same request or of an earlier one.

        Args:
            works: in order.

        Returns:
            The requests' new tables.
        """
        return [table for group in self._groups(works) for table in self._run_together(group)]

    def _groups(self, works: Sequence[Work]) -> Iterator[list[Work]]:
        """Works of one method of which none writes where an earlier one reads, within bounded memory."""
        group: list[Work] = []
        reads: set[int] = set()
        num_blocks, most = 0, self.cache.slice_bytes // self.cache.block_bytes
        for work in works:
            job = work.job
            num_blocks += len(job.destination)
            waits = not reads.isdisjoint(job.destination)
            if group and (waits or num_blocks > most or work.method != group[0].method):
                yield group
                group, reads, num_blocks = [], set(), len(job.destination)
            group.append(work)
            reads |= job.freed
        if group:
            yield group

    def _run_together(self, group: list[Work]) -> Iterator[RequestTable]:
        jobs, tasks = [work.job for work in group], self._reader.tasks(group)
        if (format := jobs[0].config.record_format) is not None:
            (task,) = tasks
            new = self._encoder.encode(task, format, self._solver.take(task.work.job))
            yield self._finish(task, new.held, new.num_pages, new.columns, new.row, new.records)
            return
        own = [self._reader.candidates(task, slice(0, self.grid.num_layers)) for task in tasks]
        together = aligned(own, self.grid.block_size)
        shape = len(jobs), self.grid.num_layers, self.grid.num_heads
        scores = self._scoring.scores(tasks, together)
        most_pages = [self._room.num_pages(task.work) for task in tasks]
        num_pages: list[int] | Tensor = most_pages
        if (threshold := jobs[0].config.threshold) is not None:
            blocks = self.cache.num_blocks_above(scores, threshold, len(jobs[0].destination))
            enough = self._largest(blocks) * self.grid.pages_per_block
            num_pages = self.cache.numbers(enough if self._room.fills else enough.clamp(max=most_pages[0]))
        known = num_pages if isinstance(num_pages, list) else None
        room = known or most_pages  # pages of each
        capacity = None
        if together.padding is not None:
            capacity = ((together.num_scored - together.padding) // self.grid.block_size).view(shape)
        allocation, sinks = jobs[0].config.build_allocation(), jobs[0].config.sink_tokens
        widths = [each.num_scored for each in own]
        counts = self._allocate(allocation, scores.view(*shape, -1), num_pages, widths, sinks, capacity)
        if type(tasks[0].policy).refine is not Policy.refine:
            self._scoring.refine(tasks, together, scores, counts * self.grid.block_size)
        columns, row = self.cache.select(scores, counts.flatten(), sum(room), known is not None)
        target = self.grid.linear_pages(torch.cat([task.destination for task in tasks]))
        if sum(room) < len(target):  # each leaves its own last pages empty
            whole = target.split([len(task.destination) * self.grid.pages_per_block for task in tasks])
            target = torch.cat([pages[:filled] for pages, filled in zip(whole, room, strict=True)])
        overlaps = any(not job.freed.isdisjoint(job.destination) for job in jobs)
        moved = Kept(together.pages, row, columns)
        self.cache.rewrite(moved, target, overlaps)
        observed = tasks[0].work.observed
        again = any(job.config.compacts_again for job in jobs)
        if observed is not None and observed.sums is not None and again:
            observed.sums.move(moved, target)
        parts = columns.split(room), row.split(room)
        for index, (task, held, kept, rows) in enumerate(zip(tasks, own, *parts, strict=True)):
            # As columns of the request's own.
            if len(tasks) > 1:
                kept, rows = kept - (together.num_scored - held.num_scored), rows - index * len(held.pages)
            yield self._finish(task, held, counts[index], kept, rows)

    def _allocate(
        self,
        allocation: Allocation,
        scores: Tensor,
        num_pages: list[int] | Tensor,
        widths: list[int],
        sinks: int,
        capacity: Tensor | None,
    ) -> Tensor:
        """As `PagedCache.allocate`, for each share apart."""
        shares, counts = self._room.split(allocation), []
        if len(shares) == 1:
            return self.cache.allocate(allocation, scores, num_pages, widths, sinks, capacity)
        assert isinstance(num_pages, list)
        for layers, own in shares:
            seen = scores[:, layers]
            share = [self._room.share_of(pages, layers) for pages in num_pages]
            most = None if capacity is None else capacity[:, layers]
            counts.append(self.cache.allocate(own, seen, share, widths, sinks, most))
        return torch.cat(counts, 1)

    def _finish(
        self,
        task: Task,
        held: Candidates,
        counts: Tensor,
        columns: Tensor,
        row: Tensor,
        records: Records | None = None,
    ) -> RequestTable:
        """Tell what a request keeps, in `counts` pages of each head: units, each of which is some `columns`
        `[M, unit_tokens]` of a row `[M]` of what it held."""
        job, observed, destination = task.work.job, task.work.observed, task.destination
        positions = columns if held.positions is None else held.positions()[row[:, None], columns]
        remembered = positions.to(torch.int32) if job.config.remembers else None
        # A unit is a page: how many blocks hold any is known without a look at the device.
        if records is None:
            destination = destination[: -(-len(columns) // self.grid.pages_per_block)]
        shape = self.grid.num_layers, self.grid.num_heads
        new = RequestTable(self.grid, destination, counts.view(shape), job.boundary, remembered, records)
        for listener in self.listeners:
            listener(job, new.units, positions)
        if observed is not None and job.config.compacts_again:
            self._scoring.carry(task, new, columns - held.num_scored)
        return new
