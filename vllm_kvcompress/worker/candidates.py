"""What requests hold that are to be compacted: which of it may stay, and how it is read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.formats import RECORD, Format, Latent, Matched
from vllm_kvcompress.paging.job import Job
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.requests.cache import PagedCache
from vllm_kvcompress.requests.observer import Observed
from vllm_kvcompress.requests.tables import RequestTable


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
class Task:
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
class Candidates:
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


class Reader:
    """Reads what requests hold in a paged cache."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache, self.grid = cache, cache.grid

    def tasks(self, group: list[Work]) -> list[Task]:
        """Works of one method, with their blocks sent to the cache's device at once."""
        policy, jobs = group[0].job.config.build_policy(), [work.job for work in group]
        policy = policy.later if policy.matches and not jobs[0].solved else policy
        lists = [blocks for job in jobs for blocks in (sum(job.raw, ()), job.destination)]
        sent = self.cache.on_device([block for blocks in lists for block in blocks])
        blocks = iter(sent.split([len(blocks) for blocks in lists]))
        groups = self.grid.num_groups
        return [Task(work, policy, next(blocks).view(groups, -1), next(blocks)) for work in group]

    def candidates(self, task: Task, layers: slice) -> Candidates:
        """What a request holds of some layers."""
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
        return Candidates(
            layers=layers,
            pages=pages,
            num_scored=num_scored,
            padding=padding,
            records=records,
            parts=parts,
            bases=None if table is None else self._old_bases(table, layers),
            positions=None if table is None else lambda: table.column_positions(layers, job.num_tokens),
        )

    def _old_bases(self, table: RequestTable, layers: slice) -> Tensor | None:
        """What some layers' runs begin with, `[l·H, basis_bytes]` uint8; None of formats without."""
        if table.format is None or (basis := table.format.basis) is None:
            return None
        begin = (table.counts.flatten().cumsum(0) - table.counts.flatten()).view_as(table.counts)[layers]
        pages = self.grid.pages_at(table.destination, begin.flatten())
        return self.cache.read_records(pages * self.cache.records_per_page(basis), basis)

    def decoded(self, held: Candidates, format: Format) -> tuple[Tensor, Tensor]:
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

    def biases(self, held: Candidates, format: Format, num_raw: int) -> Tensor | None:
        """What records add to their tokens' logits, and the raw ones behind them do not: `[X, W]` float32."""
        assert held.records is not None
        if not isinstance(format, Matched):
            return None
        own = format.biases(self.cache.read_records(held.records, format), self.cache.head_size)
        return torch.nn.functional.pad(own.flatten(1), (0, num_raw))

    def head_slices(self, num_heads: int, num_tokens: int) -> Iterator[tuple[int, int]]:
        """Heads of which so many tokens are encoded at a time."""
        per_token = 64 * self.cache.head_size  # keys and values, in float32 several times
        at_once = max(1, self.cache.slice_bytes // max(1, num_tokens * per_token))
        for begin in range(0, num_heads, at_once):
            yield begin, min(begin + at_once, num_heads)

    def num_pages(self, work: Work) -> int:
        """Pages of a Job's destination that can be filled."""
        num_pages = len(work.job.destination) * self.grid.pages_per_block
        if self.fills:
            return num_pages
        held = len(work.job.source) * self.grid.num_layers * self.grid.num_heads
        return min(num_pages, held + (0 if work.table is None else work.table.num_pages))

    @property
    def fills(self) -> bool:
        """Whether raw pages fill all blocks: groups of layers may have slots that no layer of theirs has."""
        return self.grid.num_layers == self.grid.num_groups * self.grid.num_slots

    def tokens_of_head(self, task: Task) -> int:
        """What a head keeps of a request, on average."""
        job = task.work.job
        if (format := job.config.record_format) is None:
            tokens = self.num_pages(task.work) * self.grid.block_size
        else:
            per_page = self.cache.records_per_page(format.parts[format.typical])
            tokens = len(job.destination) * self.grid.pages_per_block * per_page * RECORD
        kept = tokens // (self.grid.num_layers * self.grid.num_heads)
        # How much a threshold leaves is not known yet: say a quarter, if there is room.
        return kept if job.config.threshold is None else min(kept, job.boundary // 4)


def longest(table: RequestTable | None, layers: slice) -> int:
    """Tokens of the longest run of some layers."""
    return 0 if table is None else table.longest(layers) * table.unit_tokens


def aligned(requests: list[Candidates], block_size: int) -> Candidates:
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
    return Candidates(requests[0].layers, pages, max(before) * block_size, padding)
