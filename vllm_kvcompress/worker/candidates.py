"""What requests hold that are to be compacted, of which some may stay."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.formats import RECORD, Format, Latent, Matched
from vllm_kvcompress.requests.cache import PagedCache
from vllm_kvcompress.requests.tables import RequestTable
from vllm_kvcompress.worker.work import Task, Work


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

    @property
    def old(self) -> Tensor:
        """`[X, E]` int64, the records; E = 0 where there are none."""
        return self.pages[:, :0] if self.records is None else self.records


class Reader:
    """Reads what requests hold in a paged cache."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache, self.grid = cache, cache.grid

    def tasks(self, group: list[Work]) -> list[Task]:
        """Works of one method, with their blocks sent to the cache's device at once."""
        policy, jobs = group[0].policy, [work.job for work in group]
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
        """Heads of which so many tokens are read at a time, to be encoded or to make bases of."""
        per_token = 64 * self.cache.head_size  # keys and values, in float32 several times, meanwhile
        at_once = max(1, self.cache.slice_bytes // max(1, num_tokens * per_token))
        for begin in range(0, num_heads, at_once):
            yield begin, min(begin + at_once, num_heads)


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
