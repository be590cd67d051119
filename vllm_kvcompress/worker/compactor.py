"""Runs Jobs: scores a request's tokens, decides each head's pages, and writes the kept tokens into them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from vllm_kvcompress.allocation import Allocation, Global, Profile, Uniform
from vllm_kvcompress.formats import RECORD, Format, Latent, Matched, Mixed, MixedDim, RecordFormat
from vllm_kvcompress.formats.mixed_dim import half
from vllm_kvcompress.matching import Fit, padded, solve_bytes_on
from vllm_kvcompress.paging.job import Job, Solve
from vllm_kvcompress.policies.base import LayerObservation, Policy
from vllm_kvcompress.requests.cache import Kept, PagedCache, protect
from vllm_kvcompress.requests.observer import LayerAttention, Observed
from vllm_kvcompress.requests.tables import Records, RequestTable

Listener = Callable[[Job, Tensor, Tensor], None]


@dataclass(frozen=True)
class Work:
    """A Job and what is known of its request.

    Attributes:
        job: what to do.
        table: the result of the request's last compaction, if there was one.
        observed: what was kept of its queries, if its policy needs any; its states are carried over.
    """

    job: Job
    table: RequestTable | None = None
    observed: Observed | None = None

    @property
    def method(self) -> tuple[object, ...]:
        """What works must have in common to run together."""
        config = self.job.config
        # How much a threshold keeps is not known before, and tokens are encoded request by request.
        alone = self.job if config.threshold is not None or config.record_format is not None else None
        return config.build_policy(), config.build_allocation(), config.sink_tokens, alone


@dataclass(frozen=True)
class _Task:
    """A Work and where it is done.

    Attributes:
        work: what to do.
        policy: which scores.
        raw: `[G, n]` int64, block ids of the Job's raw tokens in each group, on the cache's device.
        destination: `[m]` int64, likewise, of its destination.
    """

    work: Work
    policy: Policy
    raw: Tensor
    destination: Tensor

    @property
    def is_encoded(self) -> bool:
        """Whether some of what it holds is in records."""
        return self.work.table is not None and self.work.table.format is not None


@dataclass(frozen=True)
class _Candidates:
    """What one request holds of some layers, or several do, their heads one after the other: X = J·l·H.

    Attributes:
        layers: which.
        pages: `[X, W / N]` int64 physical pages, -1 for padding (see `PagedCache.context`).
        num_scored: columns below the new boundary, which all requests have at the same column.
        padding: `[X]` int64, leading columns that hold nothing; None for none.
        records: `[X, E]` int64, what is before the pages, 32 columns each (see `PagedCache.read_records`);
            None for nothing.
        parts: `[X, E]` int64, of which part of their format these are.
        bases: `[X, basis_bytes]` uint8, of heads that have one; arbitrary of others; None for none.
        positions: makes `[X, W]` int64, token positions of the columns; None where column i is token i.
    """

    layers: slice
    pages: Tensor
    num_scored: int
    padding: Tensor | None
    records: Tensor | None = None
    parts: Tensor | None = None
    bases: Tensor | None = None
    positions: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class _Choice:
    """What stays of what one request holds.

    Attributes:
        old: `[X, E]` bool, records.
        raw: `[X, n]` int64, the part of the format that each raw token is written in, -1 for none; None for
            all of them in the only one.
        pages: `[X]` int64, of each head; None for what that needs.
    """

    old: Tensor
    raw: Tensor | None = None
    pages: Tensor | None = None


@dataclass(frozen=True)
class _Solution:
    """What is solved of a request before it is compacted.

    Attributes:
        choice: what stays of it.
        num_kept: raw tokens of each head.
        biases: of head after head, float32 of each kept raw token, in the columns' order.
        values: `[kept, D]` float32, likewise.
    """

    choice: _Choice
    num_kept: list[int]
    biases: list[Tensor]
    values: list[Tensor]


@dataclass(frozen=True)
class _Basis:
    """What one request holds, with the bases of all heads.

    Attributes:
        held: it.
        errors: `[P, X]` float64, what each part of the format leaves out of raw tokens.
    """

    held: _Candidates
    errors: Tensor


class Compactor:
    """Compacts requests inside a paged cache.

    All layers go through few operations together: what is as long as a request's context is made for as many
    layers at a time as fit `PagedCache.slice_bytes`. So do requests that are compacted in the same step.

    Attributes:
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
        self._agree = agree
        self._num_drafting = num_drafting
        self.cache = cache
        self.grid = cache.grid
        self.layers = layers
        self.listeners: list[Listener] = []
        self._solutions: dict[str, _Solution] = {}

    def forget(self, request_id: str) -> None:
        """Drop what was solved of a request."""
        self._solutions.pop(request_id, None)

    def solve(self, solve: Solve, observed: Observed | None) -> None:
        """Solve for biases and values of what some heads of a request keep; with the first share, choose it.

        Nothing is written: the request goes on with its raw tokens until its Job is run.
        """
        work = Work(solve.job, observed=observed)
        (task,) = self._tasks([work])
        num_raw = len(solve.job.source) * self.grid.block_size
        name, format = solve.job.request_id, solve.job.config.record_format
        assert format is not None
        if solve.shares.start == 0:
            held = self._candidates(task, slice(0, self.grid.num_layers))
            choice = self._choose(task, held, format, num_raw, solve.num_blocks)
            assert choice.raw is not None
            self._solutions[name] = _Solution(choice, (choice.raw >= 0).sum(1).tolist(), [], [])
        solution, heads = self._solutions[name], self.grid.num_heads
        total = self.grid.num_layers * heads
        for share in solve.shares:  # one by one: what is solved must not hang on how many a step has
            begin, end = (total * edge // solve.num_shares for edge in (share, share + 1))
            for layer in range(begin // heads, -(-end // heads) if begin < end else 0):
                some = slice(max(begin - layer * heads, 0), min(end - layer * heads, heads))
                self._fit(task, solution, layer, some)

    def _fit(self, task: _Task, solution: _Solution, layer: int, heads: slice) -> None:
        """Solve for some of a layer's heads, as many at a time as memory is meant for."""
        assert solution.choice.raw is not None
        policy, first_row, begin = task.policy, layer * self.grid.num_heads, heads.start
        part = self._candidates(task, slice(layer, layer + 1))
        while begin < heads.stop:
            num_kept = solution.num_kept[first_row + begin : first_row + heads.stop]
            kind = self.cache.device.type
            fitting = [
                n
                for n in range(1, len(num_kept) + 1)
                if policy.fit_bytes(n, part.num_scored, max(num_kept[:n]), self.cache.head_size, kind)
                <= solve_bytes_on(kind)
            ]
            end = begin + max([1, *fitting])
            own, rows = slice(begin, end), slice(first_row + begin, first_row + end)
            seen = self._observe(policy, task, replace(part, pages=part.pages[own]), reads=True)
            num_kept, raw = solution.num_kept[rows], solution.choice.raw[rows]
            if min(num_kept) == part.num_scored:  # all tokens answer as they do
                values = seen.values[:, : part.num_scored].float()
                fit = Fit(torch.zeros_like(values[..., 0]), values)
            else:
                columns, present = padded(raw >= 0, max(num_kept))
                sinks = task.work.job.config.sink_tokens
                columns, present = policy.select(seen, own, columns, present, sinks)
                raw.fill_(-1).scatter_(1, columns, present.long() - 1)
                fit = policy.fit(seen, own, columns, present)
            solution.biases.extend(bias[:num] for bias, num in zip(fit.bias, num_kept, strict=True))
            solution.values.extend(kept[:num] for kept, num in zip(fit.values, num_kept, strict=True))
            begin = end

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
        jobs, tasks = [work.job for work in group], self._tasks(group)
        if (format := jobs[0].config.record_format) is not None:
            yield self._encode(tasks[0], format)
            return
        own = [self._candidates(task, slice(0, self.grid.num_layers)) for task in tasks]
        together = _aligned(own, self.grid.block_size)
        shape = len(jobs), self.grid.num_layers, self.grid.num_heads
        scores = self._scores(tasks, together)
        most_pages = [self._num_pages(task.work) for task in tasks]
        num_pages: list[int] | Tensor = most_pages
        if (threshold := jobs[0].config.threshold) is not None:
            blocks = self.cache.num_blocks_above(scores, threshold, len(jobs[0].destination))
            enough = self._largest(blocks) * self.grid.pages_per_block
            num_pages = self.cache.numbers(enough if self._fills else enough.clamp(max=most_pages[0]))
        known = num_pages if isinstance(num_pages, list) else None
        room = known or most_pages  # pages of each
        capacity = None
        if together.padding is not None:
            capacity = ((together.num_scored - together.padding) // self.grid.block_size).view(shape)
        allocation, sinks = jobs[0].config.build_allocation(), jobs[0].config.sink_tokens
        widths = [each.num_scored for each in own]
        counts = self._allocate(allocation, scores.view(*shape, -1), num_pages, widths, sinks, capacity)
        if type(tasks[0].policy).refine is not Policy.refine:
            self._refine(tasks, together, scores, counts * self.grid.block_size)
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

    def _num_pages(self, work: Work) -> int:
        """Pages of a Job's destination that can be filled."""
        num_pages = len(work.job.destination) * self.grid.pages_per_block
        if self._fills:
            return num_pages
        held = len(work.job.source) * self.grid.num_layers * self.grid.num_heads
        return min(num_pages, held + (0 if work.table is None else work.table.num_pages))

    @property
    def _fills(self) -> bool:
        """Whether raw pages fill all blocks: groups of layers may have slots that no layer of theirs has."""
        return self.grid.num_layers == self.grid.num_groups * self.grid.num_slots

    def _shares(self, allocation: Allocation) -> list[tuple[slice, Allocation]]:
        """Layers that share a part of each block, and how: a model and its draft model apart, so that it
        keeps what it would without, but for how many slots of its groups no layer has."""
        num_layers = self.grid.num_layers
        edge = num_layers - self._num_drafting
        model = slice(0, edge), allocation
        return [model] if edge == num_layers else [model, (slice(edge, num_layers), Uniform())]

    def _pages_of(self, num_blocks: int, layers: slice) -> int:
        """What of the pages of so many blocks is these layers'."""
        return self._share_of(num_blocks * self.grid.pages_per_block, layers)

    def _share_of(self, num_pages: int, layers: slice) -> int:
        """What of so many pages is these layers'; no page is left over."""
        before, end = (num_pages * edge // self.grid.num_layers for edge in (layers.start, layers.stop))
        return end - before

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
        shares, counts = self._shares(allocation), []
        if len(shares) == 1:
            return self.cache.allocate(allocation, scores, num_pages, widths, sinks, capacity)
        assert isinstance(num_pages, list)
        for layers, own in shares:
            seen = scores[:, layers]
            share = [self._share_of(pages, layers) for pages in num_pages]
            most = None if capacity is None else capacity[:, layers]
            counts.append(self.cache.allocate(own, seen, share, widths, sinks, most))
        return torch.cat(counts, 1)

    def _finish(
        self, task: _Task, held: _Candidates, counts: Tensor, columns: Tensor, row: Tensor
    ) -> RequestTable:
        """Tell what a request keeps: `columns` `[M, N]` of the rows `[M]` of what it held."""
        job, observed = task.work.job, task.work.observed
        positions = columns if held.positions is None else held.positions()[row[:, None], columns]
        for listener in self.listeners:
            listener(job, counts, positions)
        again = job.config.compacts_again
        remembered = positions.to(torch.int32) if job.config.remembers else None
        destination = task.destination[: -(-len(columns) // self.grid.pages_per_block)]
        new = RequestTable(self.grid, destination, counts, job.boundary, remembered)
        if observed is not None and again:
            self._carry(task, new, columns - held.num_scored)
        return new

    # ------------------------------------------------------------------ formats

    def _encode(self, task: _Task, format: Format) -> RequestTable:
        """Compact a request to records.

        What is encoded already stays so, record by record. Raw tokens are encoded 32 by 32.
        """
        job, device = task.work.job, self.cache.device
        held = self._candidates(task, slice(0, self.grid.num_layers))
        old = held.pages[:, :0] if held.records is None else held.records
        old_parts = old if held.parts is None else held.parts
        num_raw = len(job.source) * self.grid.block_size
        solution = self._solutions.pop(job.request_id) if job.solved else None
        if isinstance(format, MixedDim):
            basis = self._basis(held, format, num_raw)
            held, choice = basis.held, self._choose_ranks(task, basis, format, num_raw)
        elif solution is None:
            choice = self._choose(task, held, format, num_raw, len(job.destination))
        else:
            choice = solution.choice
        part = torch.arange(len(format.parts), device=device)[:, None, None]
        keep_old = choice.old & (old_parts == part)  # `[P, X, E]`
        num_old = keep_old.sum(2)
        if choice.raw is None:
            num_new = torch.full_like(num_old, num_raw // RECORD)
        else:
            num_new = (choice.raw == part).sum(2) // RECORD
        counts = num_old + num_new
        sizes = [own.record_bytes(self.cache.head_size) for own in format.parts]
        first, pages = format.arrange(counts, self.cache.head_size, self.cache.content.shape[1])
        pages = pages if choice.pages is None else choice.pages
        per_page = tuple(self.cache.records_per_page(own) for own in format.parts)
        records = Records(
            format, *(each.unflatten(1, (self.grid.num_layers, -1)) for each in (counts, first)), per_page
        )

        first_page, units = pages.cumsum(0) - pages, counts.sum(0)
        begin = units.cumsum(0) - units + counts.cumsum(0) - counts  # `[P, X]`, in run order
        overlaps = not job.freed.isdisjoint(job.destination)
        staged: list[tuple[Tensor, Tensor, RecordFormat]] = []
        rows = torch.arange(len(old), device=device)
        if format.basis is not None and held.bases is not None:
            owner = format.needs_basis(counts).nonzero()[:, 0]
            page = self.grid.pages_at(task.destination, first_page[owner])
            per_run = self.cache.records_per_page(format.basis)
            staged.append((page * per_run, held.bases[owner], format.basis))
        row = rows.repeat_interleave(units)
        from_start = torch.empty(len(row), RECORD, dtype=torch.int64, device=device)
        old_columns = torch.arange(old.shape[1] * RECORD, device=device).view(-1, RECORD)
        for number, own in enumerate(format.parts):
            head = rows.repeat_interleave(counts[number])
            of_head = (
                torch.arange(len(head), device=device) - (counts[number].cumsum(0) - counts[number])[head]
            )
            place = of_head + first[number][head]
            target = self.grid.pages_at(task.destination, first_page[head] + place // per_page[number])
            target = target * per_page[number] + place % per_page[number]
            is_old = of_head < num_old[number][head]
            unit = begin[number][head] + of_head
            moved = old[keep_old[number]]
            at_once = max(1, self.cache.slice_bytes // sizes[number])
            for to, source in zip(target[is_old].split(at_once), moved.split(at_once), strict=True):
                staged.append((to, self.cache.read_records(source, own), own))
                if not overlaps:
                    self._write(staged)
            from_start[unit[is_old]] = old_columns.expand(len(old), -1, -1)[keep_old[number]]
            of_raw, columns = None if choice.raw is None else choice.raw == number, []
            new_target = target[~is_old].split(num_new[number].tolist())
            # Without raw tokens, which there may be none of under pressure, records just go.
            for first_head, end in self._head_slices(len(old), num_raw) if num_raw else ():
                content, kept = self._encoded(held, first_head, end, num_raw, of_raw, own, solution)
                columns.append(kept)
                staged.append((torch.cat(new_target[first_head:end]), content, own))
                if not overlaps:
                    self._write(staged)
            if columns:
                from_start[unit[~is_old]] = torch.cat(columns) + old.shape[1] * RECORD
        self._write(staged)
        shared = task.work.table is not None and task.work.table.is_shared
        if not shared and (freed := sorted({*job.previous} - {*job.destination})):
            self.cache.clear(self.cache.on_device(freed))
        return self._finish_encoded(task, held, records, pages, row, from_start)

    def _finish_encoded(
        self,
        task: _Task,
        held: _Candidates,
        records: Records,
        counts: Tensor,
        row: Tensor,
        columns: Tensor,
    ) -> RequestTable:
        """Tell what a request keeps: `columns` `[records, 32]` of the rows of what it held."""
        job, observed = task.work.job, task.work.observed
        shape = self.grid.num_layers, self.grid.num_heads
        positions = columns if held.positions is None else held.positions()[row[:, None], columns]
        again = job.config.compacts_again
        stored = positions.to(torch.int32) if job.config.remembers else None
        new = RequestTable(self.grid, task.destination, counts.view(shape), job.boundary, stored, records)
        for listener in self.listeners:
            listener(job, new.units, positions)
        if observed is not None and again:
            self._carry(task, new, columns - held.num_scored)
        return new

    def _choose(
        self, task: _Task, held: _Candidates, format: Format, num_raw: int, num_blocks: int
    ) -> _Choice:
        """What stays in so many blocks, and the pages of each head.

        A record stays or goes as a whole: each of its tokens counts as their mean. Raw tokens come in
        thirty-twos, the best first.
        """
        job = task.work.job
        old = held.pages[:, :0] if held.records is None else held.records
        parts = format.parts
        if job.config.keeps_all and len(parts) == 1:
            return _Choice(old >= 0)
        scores, width = self._scores([task], held), old.shape[1]
        pages = self._pages_by_scores(task, held, scores, format, num_raw, num_blocks)
        if not isinstance(format, Mixed):
            present = (old >= 0).sum(1) + num_raw // RECORD
            num_units = torch.minimum(pages * self.cache.records_per_page(parts[0]), present)
            keep_old, keep_raw = _best_units(scores, width, num_units)
            return _Choice(keep_old, keep_raw.long() - 1, pages)
        units, order = _units(scores, width)
        written = old if held.parts is None else held.parts
        known = torch.cat([written.masked_fill(old < 0, -2), torch.full_like(units[:, width:], -1).long()], 1)
        sizes = [part.record_bytes(self.cache.head_size) for part in parts]
        chosen = format.choose(units, known, pages, sizes, self.cache.content.shape[1])
        of_raw = chosen[:, width:].repeat_interleave(RECORD, 1)
        return _Choice(chosen[:, :width] >= 0, torch.empty_like(order).scatter_(1, order, of_raw), pages)

    def _pages_by_scores(
        self,
        task: _Task,
        held: _Candidates,
        scores: Tensor,
        format: Format,
        num_raw: int,
        num_blocks: int,
    ) -> Tensor:
        """The pages `[X]` of each head as the allocation splits them; a policy may refine the scores then."""
        job, parts = task.work.job, format.parts
        old = held.pages[:, :0] if held.records is None else held.records
        width = old.shape[1]
        shape = self.grid.num_layers, self.grid.num_heads
        present = ((old >= 0).sum(1) + num_raw // RECORD).view(shape)
        alike = _of_records(scores, width).repeat_interleave(RECORD, 1)
        whole = torch.cat([alike, scores[:, width * RECORD :]], 1).view(*shape, -1)
        pages, tokens = [], []
        for layers, allocation in self._shares(job.config.build_allocation()):
            most = self._pages_of(num_blocks, layers)
            per_page = self.cache.records_per_page(parts[format.typical])
            capacity = (present[layers] + per_page - 1) // per_page
            if (total := int(capacity.sum())) < most and len(parts) > 1:  # there is room for the best part
                per_page = self.cache.records_per_page(parts[0])
                capacity = (present[layers] + per_page - 1) // per_page
                total = int(capacity.sum())
            in_page = per_page * RECORD
            missing = -whole.shape[2] % in_page  # pages need not be full
            # Pages that are not full have room for what would else need new ones.
            padded = torch.nn.functional.pad(whole[layers], (missing, 0), value=-torch.inf)
            counts = allocation.allocate(padded, min(most, total), in_page, capacity)
            pages.append(counts), tokens.append(counts * in_page)
        if type(task.policy).refine is not Policy.refine:
            self._refine([task], held, scores, torch.cat(tokens)[None])
        return torch.cat(pages).flatten()

    # -------------------------------------------------------------------- ranks

    def _choose_ranks(self, task: _Task, basis: _Basis, format: MixedDim, num_raw: int) -> _Choice:
        """What stays and in how many coordinates, by what each token would lose, and the pages of each head.

        With a policy that says losses of its own the heads share the bytes by them, if the allocation is
        `global`; if it is `profile`, by losses times a head's share. Any other allocation splits pages by
        the scores, as for every format.
        """
        job, held, size = task.work.job, basis.held, self.cache.head_size
        old = held.pages[:, :0] if held.records is None else held.records
        known = old if held.parts is None else held.parts.masked_fill(old < 0, -1)
        scores, width, allocation = self._scores([task], held), old.shape[1], job.config.build_allocation()
        protected = scores.isposinf()
        together = task.policy.gives_losses and isinstance(allocation, Global | Profile)
        num_blocks, split = len(job.destination), None
        if not together:
            split = self._pages_by_scores(task, held, scores, format, num_raw, num_blocks)
        if task.policy.gives_losses:
            losses = self._losses(task, held, format)
            for layers, own in self._shares(allocation):
                if isinstance(own, Profile):
                    own.check_model(layers.stop - layers.start, self.grid.num_heads)
                    weight = own.importance(job.config.budget or 1.0, losses.device).flatten()
                    losses[:, : len(weight)] *= weight[:, None]
        else:
            alike = _of_records(scores, width).repeat_interleave(RECORD, 1)
            losses = format.losses_by_rank(torch.cat([alike, scores[:, width * RECORD :]], 1), basis.errors)
        limit = torch.finfo(torch.float32).max
        losses = losses.nan_to_num(0.0, limit, 0.0).clamp(min=0)
        of_records = losses[-1][:, : width * RECORD].unflatten(1, (width, RECORD)).sum(2)
        if not task.policy.gives_losses:  # what a record still has of its tokens
            of_records = of_records * (1 - basis.errors.T.gather(1, known.clamp(min=0)))
        kept = protected[:, : width * RECORD].unflatten(1, (width, RECORD)).any(2)
        of_records = of_records.masked_fill(kept, torch.inf)
        of_raw = losses[:, :, width * RECORD :]
        of_raw[1:].masked_fill_(protected[:, width * RECORD :], torch.inf)
        page_bytes, heads, chosen = self.cache.content.shape[1], self.grid.num_heads, []
        for layers, _ in self._shares(allocation):
            rows = slice(layers.start * heads, layers.stop * heads)
            pages = self._pages_of(num_blocks, layers) if split is None else split[rows]
            own = of_raw[:, rows], of_records[rows], known[rows]
            chosen.append(format.choose(*own, pages, size, page_bytes))
        return _Choice(*(torch.cat(each) for each in zip(*chosen, strict=True)))

    def _losses(self, task: _Task, held: _Candidates, format: MixedDim) -> Tensor:
        """What the policy says of all heads' columns, `[P + 1, X, T]` float64."""
        assert held.bases is not None
        shape = len(format.parts) + 1, len(held.pages), held.num_scored
        losses = torch.zeros(shape, dtype=torch.float64, device=self.cache.device)
        for part in self._slices(task, task.policy):
            rows = slice(part.layers.start * self.grid.num_heads, part.layers.stop * self.grid.num_heads)
            bases = [
                own.bases(held.bases[rows], self.cache.head_size)
                for own in format.parts
                if isinstance(own, Latent)
            ]
            seen = self._observe(task.policy, task, part)
            losses[1:, rows, held.num_scored - part.num_scored :] = task.policy.losses(seen, bases).double()
        return losses

    def _basis(self, held: _Candidates, format: MixedDim, num_raw: int) -> _Basis:
        """The heads' bases, those that they have or new ones, and what ranks in them leave out.

        They are of the cache's own tokens, all of which are there still, whatever chunks they came in.
        """
        size, heads = self.cache.head_size, len(held.pages)
        shape = 2, heads, size, size
        raw = torch.zeros(shape, dtype=torch.float64, device=self.cache.device)  # Σ x·xᵀ of keys and values
        mean = torch.zeros(shape[1:3], dtype=torch.float64, device=self.cache.device)
        before = torch.zeros_like(raw)
        columns = held.num_scored
        for begin, end in self._head_slices(heads, columns):
            if num_raw:
                pages = held.pages[begin:end, : num_raw // self.grid.block_size]
                read = self.cache.read_keys, self.cache.read_values
                tokens = [half(of_pages(pages)).double() for of_pages in read]
                mean[begin:end] = tokens[0].mean(1)
                for own, part in zip(raw, tokens, strict=True):
                    own[begin:end] = part.mT @ part
            if held.records is not None and held.parts is not None:
                present = held.records[begin:end] >= 0
                some = replace(
                    held,
                    records=held.records[begin:end],
                    parts=held.parts[begin:end].masked_fill(~present, -1),
                    bases=None if held.bases is None else held.bases[begin:end],
                )
                for own, decoded in zip(before, self._decoded(some, format), strict=True):
                    part = decoded.flatten(1, 2).double()
                    own[begin:end] = part.mT @ part
        bases = format.basis.of_moments(*(raw + before))
        if held.parts is not None and held.records is not None and held.bases is not None:
            has = ((held.parts > 0) & (held.records >= 0)).any(1)
            bases = torch.where(has[:, None], held.bases, bases)
        errors = format.errors(raw[0], raw[1], mean, num_raw, bases)
        return _Basis(replace(held, bases=bases), errors)

    def _old_bases(self, table: RequestTable, layers: slice) -> Tensor | None:
        """What some layers' runs begin with, `[l·H, basis_bytes]` uint8; None of formats without."""
        if table.format is None or (basis := table.format.basis) is None:
            return None
        begin = (table.counts.flatten().cumsum(0) - table.counts.flatten()).view_as(table.counts)[layers]
        pages = self.grid.pages_at(table.destination, begin.flatten())
        return self.cache.read_records(pages * self.cache.records_per_page(basis), basis)

    def _encoded(
        self,
        held: _Candidates,
        begin: int,
        end: int,
        num_raw: int,
        keep_raw: Tensor | None,
        format: RecordFormat,
        solution: _Solution | None,
    ) -> tuple[Tensor, Tensor]:
        """Records `[n, record_bytes]` of some heads' raw tokens, and the columns `[n, 32]` of these."""
        pages = held.pages[begin:end, : num_raw // self.grid.block_size]
        keys, values = (
            read(pages).reshape(-1, self.cache.head_size)
            for read in (self.cache.read_keys, self.cache.read_values)
        )
        columns = torch.arange(num_raw, device=keys.device).repeat(end - begin)
        if keep_raw is not None:
            kept = keep_raw[begin:end].flatten().nonzero()[:, 0]
            keys, values, columns = keys[kept], values[kept], columns[kept]
        tokens = (-1, RECORD, self.cache.head_size)
        if solution is not None:
            assert isinstance(format, Matched)
            values = torch.cat(solution.values[begin:end])
            biases = torch.cat(solution.biases[begin:end]).view(-1, RECORD)
            return format.encode(keys.view(tokens), values.view(tokens), biases), columns.view(-1, RECORD)
        keys, values, columns = keys.view(tokens), values.view(tokens), columns.view(-1, RECORD)
        if isinstance(format, Latent):
            assert held.bases is not None and keep_raw is not None
            of_head = keep_raw[begin:end].sum(1) // RECORD
            return format.encode(keys, values, held.bases[begin:end].repeat_interleave(of_head, 0)), columns
        return format.encode(keys, values), columns

    def _head_slices(self, num_heads: int, num_tokens: int) -> Iterator[tuple[int, int]]:
        """Heads of which so many tokens are encoded at a time."""
        per_token = (
            64 * self.cache.head_size
        )  # keys and values, in float32 several times, while they are encoded
        at_once = max(1, self.cache.slice_bytes // max(1, num_tokens * per_token))
        for begin in range(0, num_heads, at_once):
            yield begin, min(begin + at_once, num_heads)

    def _write(self, staged: list[tuple[Tensor, Tensor, RecordFormat]]) -> None:
        for target, content, format in staged:
            self.cache.write_records(target, content, format)
        staged.clear()

    # ------------------------------------------------------------------ parts

    def _tasks(self, group: list[Work]) -> list[_Task]:
        policy, jobs = group[0].job.config.build_policy(), [work.job for work in group]
        policy = policy.later if policy.matches and not jobs[0].solved else policy
        lists = [blocks for job in jobs for blocks in (sum(job.raw, ()), job.destination)]
        sent = self.cache.on_device([block for blocks in lists for block in blocks])
        blocks = iter(sent.split([len(blocks) for blocks in lists]))
        groups = self.grid.num_groups
        return [_Task(work, policy, next(blocks).view(groups, -1), next(blocks)) for work in group]

    def _candidates(self, task: _Task, layers: slice) -> _Candidates:
        job, table = task.work.job, task.work.table
        encoded = task.is_encoded
        pages = self.cache.context(layers, None if encoded else table, task.raw)
        num_scored = (pages.shape[1] - len(job.tail)) * self.grid.block_size
        records, parts = table.aligned_records(layers) if table is not None and encoded else (None, None)
        padding = None
        if records is not None:
            num_scored += records.shape[1] * RECORD
            padding = (records < 0).sum(1) * RECORD
        elif table is not None:
            padding = (pages < 0).sum(1) * self.grid.block_size
        return _Candidates(
            layers=layers,
            pages=pages,
            num_scored=num_scored,
            padding=padding,
            records=records,
            parts=parts,
            bases=None if table is None else self._old_bases(table, layers),
            positions=None if table is None else lambda: table.column_positions(layers, job.num_tokens),
        )

    def _slices(self, task: _Task, policy: Policy) -> Iterator[_Candidates]:
        """The layers, as many at a time as the policy scores at once and memory is meant for."""
        job, observed = task.work.job, task.work.observed
        at_once, heads = 1, self.grid.num_heads
        if policy.stacks_layers:
            columns = _longest(task.work.table, slice(None))
            columns += len(job.source + job.tail) * self.grid.block_size
            group = 0 if observed is None or observed.ring is None else observed.ring.shape[2] // heads
            # Keys and attention in float32, or else a number of each token. Who reads values, too, makes
            # several of their kind of both.
            copies = policy.reads_keys and not self._reads_in_place(policy, task)
            per_token = copies * self.cache.head_size * (4 if policy.reads_values else 1)
            per_token = per_token + group * policy.window or 1
            at_once = max(1, self.cache.slice_bytes // (4 * heads * columns * per_token))
        begin = 0
        while begin < len(self.layers):
            end = begin + 1
            while end < min(begin + at_once, len(self.layers)) and self._alike(policy, begin, end):
                end += 1
            yield self._candidates(task, slice(begin, end))
            begin = end

    def _alike(self, policy: Policy, one: int, other: int) -> bool:
        """Whether two layers may be scored as one with more heads."""
        a, b = self.layers[one], self.layers[other]
        if policy.needs_rotary and a.rotary is not None and not a.rotary.same_as(b.rotary):
            return False
        return (a.scale, a.logits_soft_cap) == (b.scale, b.logits_soft_cap)

    def _sinks(self, layers: slice) -> Tensor | None:
        """Some layers' sinks `[l·H, G]`, -inf for those that have none; None if none has."""
        own = [layer.sinks for layer in self.layers[layers]]
        some = next((sinks for sinks in own if sinks is not None), None)
        if some is None:
            return None
        return torch.cat([torch.full_like(some, -torch.inf) if sinks is None else sinks for sinks in own])

    def _scores(self, tasks: list[_Task], together: _Candidates) -> Tensor:
        """The policy's scores `[X, T]`, ready to be compared: padding lowest, then what is no number."""
        sinks, policy = tasks[0].work.job.config.sink_tokens, tasks[0].policy.scored_by
        if self.cache.scores_windows(policy) and together.records is None:
            scores = self._window_scores(policy, tasks, together)
        else:
            shape = len(together.pages), together.num_scored
            scores = torch.full(shape, -torch.inf, device=self.cache.device)
            for task, own in zip(tasks, scores.chunk(len(tasks)), strict=True):
                for part in self._slices(task, policy):
                    self._of(own, part)[:] = self._scores_of(policy, task, part)
                if recent := policy.num_recent(self._tokens_of_head(task)):
                    own[:, -recent:] = torch.inf  # the largest number once they are ranked
        if self._agree is not None:
            scores = self._agree(scores, policy.of_ranks)
        # One broken score must not rank a token below what does not exist, nor above what is protected.
        self.cache.rank(scores, together.padding, sinks)
        return scores

    def _tokens_of_head(self, task: _Task) -> int:
        """What a head keeps of a request, on average."""
        job = task.work.job
        if (format := job.config.record_format) is None:
            tokens = self._num_pages(task.work) * self.grid.block_size
        else:
            per_page = self.cache.records_per_page(format.parts[format.typical])
            tokens = len(job.destination) * self.grid.pages_per_block * per_page * RECORD
        kept = tokens // (self.grid.num_layers * self.grid.num_heads)
        # How much a threshold leaves is not known yet: say a quarter, if there is room.
        return kept if job.config.threshold is None else min(kept, job.boundary // 4)

    def _scores_of(self, policy: Policy, task: _Task, part: _Candidates) -> Tensor:
        """A policy's scores of some layers of a request, `[X, T]`."""
        if not self._reads_in_place(policy, task):
            return policy.score(self._observe(policy, task, part))
        seen = self._observe(policy, task, part, reads=False)
        return self.cache.token_scores(policy, part.pages, part.layers, seen)

    def _reads_in_place(self, policy: Policy, task: _Task) -> bool:
        """Whether the cache itself makes a request's scores, without a copy of what it holds."""
        return self.cache.scores_tokens(policy) and not task.is_encoded

    def _window_scores(self, policy: Policy, tasks: list[_Task], together: _Candidates) -> Tensor:
        """The scores that the cache itself makes of all layers and requests."""
        jobs, queries = [task.work.job for task in tasks], []
        for task in tasks:
            assert task.work.observed is not None
            queries.append(task.work.observed.window(slice(None), task.work.job.num_tokens).transpose(0, 1))
        ends = [together.num_scored + job.num_tokens - job.boundary for job in jobs]
        return self.cache.window_scores(
            policy,
            together.pages,
            queries[0] if len(queries) == 1 else torch.cat(queries),
            [layer.scale for layer in self.layers],
            [layer.logits_soft_cap for layer in self.layers],
            self._sinks(slice(None)),
            together.num_scored,
            ends,
        )

    def _of(self, scores: Tensor, part: _Candidates) -> Tensor:
        """What is a part's of a request's scores `[L·H, T]`."""
        heads = self.grid.num_heads
        rows = slice(part.layers.start * heads, part.layers.stop * heads)
        return scores[rows, scores.shape[1] - part.num_scored :]

    def _refine(self, tasks: list[_Task], together: _Candidates, scores: Tensor, num_kept: Tensor) -> None:
        """Have the policy change its scores `[X, T]` by how many tokens each head keeps, `[J, L, H]`."""
        for task, of_request, kept in zip(tasks, scores.chunk(len(tasks)), num_kept, strict=True):
            for part in self._slices(task, task.policy):
                own = self._of(of_request, part)
                seen = self._observe(task.policy, task, part)
                own[:] = task.policy.refine(own.clone(), kept[part.layers].flatten(), seen)
        least = torch.finfo(torch.float32).min
        scores.nan_to_num_(nan=least, neginf=least, posinf=torch.inf)
        protect(scores, together.padding, tasks[0].work.job.config.sink_tokens)

    def _observe(
        self, policy: Policy, task: _Task, part: _Candidates, reads: bool | None = None
    ) -> LayerObservation:
        """What a policy sees of some layers; of keys and values what it reads, or both, or neither."""
        job, observed = task.work.job, task.work.observed
        rows, device = len(part.pages), self.cache.device
        width = part.num_scored + job.num_tokens - job.boundary
        keys = values = torch.empty(rows, width, 0, device=device)
        raw = width - (0 if part.records is None else part.records.shape[1] * RECORD)
        reads_keys = policy.reads_keys if reads is None else reads
        reads_values = policy.reads_values if reads is None else reads
        bias = None
        if reads_keys:
            keys = self.cache.read_keys(part.pages, part.layers)[:, :raw]
        if reads_values:
            values = self.cache.read_values(part.pages, part.layers)[:, :raw]
        if part.records is not None and (reads_keys or reads_values):
            assert task.work.table is not None and task.work.table.format is not None
            encoded = self._decoded(part, task.work.table.format)
            before = (each.flatten(1, 2).to(keys.dtype) for each in encoded)
            read = reads_keys, reads_values
            keys, values = (
                torch.cat([own, after], 1) if wanted else after
                for own, after, wanted in zip(before, (keys, values), read, strict=True)
            )
            bias = self._biases(part, task.work.table.format, raw) if reads_keys else None
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
            sinks=self._sinks(part.layers),
            padding=part.padding,
            bias=bias,
            state=self._state(policy, observed, part, width),
            rotary=attention.rotary,
            output_projection=attention.output_projection,
            layers=tuple(layer.index for layer in self.layers[part.layers]),
            first_head=attention.first_head,
            kept_positions=part.positions,
        )

    def _state(self, policy: Policy, observed: Observed | None, part: _Candidates, width: int) -> Any:
        """What was noted of the columns of some layers, by the policy or in its place."""
        if observed is None:
            return None
        if observed.sums is not None:
            return observed.sums.read(part.pages)[:, :width]
        if observed.moments is not None:
            return observed.moments.read(part.layers, self.grid.num_heads)
        return policy.stack(observed.states[part.layers])

    def _biases(self, held: _Candidates, format: Format, num_raw: int) -> Tensor | None:
        """What records add to their tokens' logits, and the raw ones behind them do not: `[X, W]` float32."""
        assert held.records is not None
        if not isinstance(format, Matched):
            return None
        own = format.biases(self.cache.read_records(held.records, format), self.cache.head_size)
        return torch.nn.functional.pad(own.flatten(1), (0, num_raw))

    def _decoded(self, held: _Candidates, format: Format) -> tuple[Tensor, Tensor]:
        """Keys and values `[X, E, 32, D]` float32 of records; of absent ones arbitrary."""
        assert held.records is not None and held.parts is not None
        size = self.cache.head_size
        if len(format.parts) == 1:
            (only,) = format.parts
            return only.decode(self.cache.read_records(held.records, only), size)
        keys, values = (
            torch.zeros(*held.records.shape, RECORD, size, device=self.cache.device) for _ in "kv"
        )
        for number, part in enumerate(format.parts):
            own = held.parts == number
            content = self.cache.read_records(held.records[own], part)
            if isinstance(part, Latent):
                assert held.bases is not None
                bases = held.bases[own.nonzero()[:, 0]]
                keys[own], values[own] = part.decode(content, size, bases)
            else:
                keys[own], values[own] = part.decode(content, size)
        return keys, values

    def _carry(self, task: _Task, new: RequestTable, from_end: Tensor) -> None:
        """Give the policy's states the columns of the new table; `from_end`, below 0, are its old ones."""
        job, table, observed = task.work.job, task.work.table, task.work.observed
        assert observed is not None
        policy, states = task.policy.scored_by, observed.states
        if type(policy).carry is Policy.carry or states[0] is None:
            return
        block_size, heads, num_raw = self.grid.block_size, self.grid.num_heads, job.num_tokens - job.boundary
        raw = torch.arange(num_raw, device=from_end.device)
        together = policy.stacks_layers and type(policy).stack is Policy.stack  # so they are `[H, W]`
        at_once = 1
        if together:
            columns = max(state.shape[1] for state in states)
            at_once = max(1, self.cache.slice_bytes // (8 * heads * columns))
        for begin in range(0, len(states), at_once):
            some = slice(begin, min(begin + at_once, len(states)))
            width = len(job.source) * block_size + _longest(table, some)
            old = new.align(some, from_end, -width - 1) + width
            kept = torch.cat([old, (raw + width).expand(len(old), -1)], 1)
            if not together:
                states[begin] = policy.carry(states[begin], kept)
                continue
            after = policy.carry(policy.stack(states[some]), kept)
            for layer, own in zip(range(some.start, some.stop), after.split(heads), strict=True):
                states[layer] = own[:, -(_longest(new, slice(layer, layer + 1)) + num_raw) :]


def _of_records(scores: Tensor, width: int) -> Tensor:
    """Scores `[X, width]` of records, whose tokens `[X, 32·width]` come first: their means."""
    return _means(scores[:, : width * RECORD].unflatten(1, (width, RECORD)))


def _means(scores: Tensor) -> Tensor:
    """The means of 32 scores each, which may be the lowest numbers that there are."""
    return (scores / RECORD).sum(-1)


def _units(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The units of each head: its records, and its raw tokens by thirty-twos, the best first.

    Args:
        scores: `[X, 32·width + T]`, of the tokens in records and of the raw ones; T a multiple of 32.
        width: records.

    Returns:
        `[X, width + T/32]`, the means of their scores; `[X, T]` int64, the raw tokens, the best first.
    """
    raw = scores[:, width * RECORD :]
    order = raw.argsort(dim=1, descending=True, stable=True)
    of_raw = _means(raw.gather(1, order).unflatten(1, (-1, RECORD)))
    return torch.cat([_of_records(scores, width), of_raw], 1), order


def _best_units(scores: Tensor, width: int, num_units: Tensor) -> tuple[Tensor, Tensor]:
    """The best units of each head.

    Args:
        scores: as of `_units`.
        width: likewise.
        num_units: `[X]` int64, how many units each head keeps.

    Returns:
        `[X, width]` bool, the records; `[X, T]` bool, the raw tokens.
    """
    units, order = _units(scores, width)
    ranked = units.argsort(dim=1, descending=True, stable=True)
    best = torch.arange(units.shape[1], device=units.device) < num_units[:, None]
    keep = torch.zeros_like(best).scatter_(1, ranked, best)
    num_new = keep[:, width:].sum(1, keepdim=True) * RECORD
    first = torch.arange(order.shape[1], device=order.device) < num_new
    return keep[:, :width], torch.zeros_like(first).scatter_(1, order, first)


def _longest(table: RequestTable | None, layers: slice) -> int:
    """Tokens of the longest run of some layers."""
    return 0 if table is None else table.longest(layers) * table.unit_tokens


def _aligned(requests: list[_Candidates], block_size: int) -> _Candidates:
    """Several requests' candidates with their boundaries at the same column."""
    if len(requests) == 1:
        return requests[0]
    before = [request.num_scored // block_size for request in requests]
    behind = [request.pages.shape[1] - pages for request, pages in zip(requests, before, strict=True)]
    pages = torch.cat(
        [
            torch.nn.functional.pad(request.pages, (max(before) - left, max(behind) - right), value=-1)
            for request, left, right in zip(requests, before, behind, strict=True)
        ]
    )
    padding = (pages[:, : max(before)] < 0).sum(1) * block_size
    return _Candidates(requests[0].layers, pages, max(before) * block_size, padding)
