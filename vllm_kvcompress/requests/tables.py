"""What requests are compacted to, and block tables in which every KV head is a sequence of its own."""

import functools
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.formats import RECORD, Format
from vllm_kvcompress.paging.layout import PageGrid

SPARE_COLUMNS = 8  # raw-tail pages a table can take before it is widened


@dataclass(frozen=True)
class Records:
    """What a request's runs hold in records.

    Attributes:
        format: how they are written.
        counts: `[P, L, H]` int64, records of each of the format's parts.
        first: `[P, L, H]` int64, the place of each part's first one (see `formats.arrange`).
        per_page: of each part, records that a page holds.
    """

    format: Format
    counts: Tensor
    first: Tensor
    per_page: tuple[int, ...]


class RequestTable:
    """What one request is compacted to.

    A head's tokens are in units that fill its pages one after the other: a unit is a whole page of `N` raw
    tokens, or with a format a record of 32.

    Attributes:
        grid: the cache's geometry.
        destination: `[n]` int64, its compacted blocks.
        counts: `[L, H]` int64, pages of each head; they sum to `n·S·H`, or less with a format, or where
            blocks have room that no layer of theirs fills.
        boundary: first raw token, a multiple of the block size; tokens below it are in the runs.
        positions: `[units, unit_tokens]` int32, the kept tokens' positions in the sequence, in run order;
            None if nobody will ask.
        records: what the pages hold; None for raw tokens.
        units: `[L, H]` int64, units of each head; of a format its last page may hold fewer than it could.
        unit_tokens: of a unit.
        num_tail: raw blocks that `pages` shows, of each group of layers.
    """

    def __init__(
        self,
        grid: PageGrid,
        destination: Tensor,
        counts: Tensor,
        boundary: int,
        positions: Tensor | None,
        records: Records | None = None,
    ) -> None:
        self.grid = grid
        self.destination = destination
        self.counts = counts
        self.boundary = boundary
        self.positions = positions
        self.records = records
        self.units = counts if records is None else records.counts.sum(0)
        self.unit_tokens = grid.block_size if records is None else RECORD
        self.num_tail = [0] * grid.num_groups
        self._holders = [1]  # of the pages, as many tables
        self._on_host = torch.cat([counts.amax(1), self.units.amax(1), counts.sum()[None]])
        self._arrived: torch.cuda.Event | None = None
        if counts.is_cuda:  # asked for once the step is done or the request is compacted again
            self._on_host = self._on_host.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def shared(self) -> "RequestTable":
        """The same pages for another holder, with a raw tail of its own."""
        other = copy(self)
        other.num_tail = [0] * self.grid.num_groups
        other.__dict__.pop("pages", None)
        self._holders[0] += 1
        return other

    def let_go(self) -> bool:
        """Note that its holder has no use for it any more; whether nobody has any for the pages."""
        self._holders[0] -= 1
        return not self._holders[0]

    @property
    def is_held(self) -> bool:
        """Whether anybody has a use for the pages."""
        return self._holders[0] > 0

    @property
    def is_shared(self) -> bool:
        """Whether the pages are others', too."""
        return self._holders[0] > 1

    @property
    def format(self) -> Format | None:
        """How the pages are written; None for raw."""
        return None if self.records is None else self.records.format

    @functools.cached_property
    def _numbers(self) -> list[int]:
        """Pages of the longest run of each layer, units of it, and pages of all runs."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._on_host.tolist()

    @property
    def num_pages(self) -> int:
        """Pages of all runs."""
        return self._numbers[-1]

    @property
    def num_blocks(self) -> int:
        """Blocks of the destination that hold anything, the first ones."""
        return -(-self.num_pages // self.grid.pages_per_block)

    @functools.cached_property
    def _ends(self) -> Tensor:
        """`[L, H]` int64, one past each run's last unit, counted through all runs."""
        return self.units.flatten().cumsum(0).view_as(self.units)

    @functools.cached_property
    def run_tokens(self) -> Tensor:
        """`[L, H]` int32, tokens that each head kept below the boundary."""
        return (self.units * self.unit_tokens).to(torch.int32)

    @functools.cached_property
    def pages(self) -> Tensor:
        """`[L, H, W]` int32 physical pages, in token order: a head's run, then its share of the raw tail.

        Entries past a head's length are 0.
        """
        width = max(self._numbers[: len(self.counts)]) + SPARE_COLUMNS
        pages = torch.zeros(*self.counts.shape, width, dtype=torch.int32, device=self.counts.device)
        in_run = torch.arange(width, device=pages.device) < self.counts[..., None]
        # Runs follow each other in (layer, head) order, which is the order a boolean mask is filled in.
        pages[in_run] = self.grid.linear_pages(self.destination)[: self.num_pages].to(torch.int32)
        return pages

    def longest(self, layers: slice) -> int:
        """Units of the longest run of some layers."""
        return max(self._numbers[len(self.counts) : -1][layers])

    def right_aligned(self, layers: slice) -> Tensor:
        """Pages of some layers' raw runs, every head's last one in the last column.

        Returns:
            `[l·H, W]` int64, -1 before a head's first page. W is the longest run's.
        """
        unit, present = self._aligned(layers)
        return self.grid.pages_at(self.destination, unit).masked_fill_(~present, -1)

    def aligned_records(self, layers: slice) -> tuple[Tensor, Tensor]:
        """Where some layers' records are, every head's last one in the last column.

        Returns:
            `[l·H, W]` int64, a page times the records of a page plus the place in it, -1 before a head's
            first record; and `[l·H, W]` int64, of which part of the format each is. W is the longest run's.
        """
        assert self.records is not None
        unit, present = self._aligned(layers)
        heads = slice(*(edge * self.grid.num_heads for edge in layers.indices(len(self.counts))[:2]))
        pages_before, units_before = (
            (each.flatten().cumsum(0) - each.flatten())[heads, None] for each in (self.counts, self.units)
        )
        of_head = (unit - units_before).clamp_(min=0)
        ends = self.records.counts.flatten(1).cumsum(0)[:, heads, None]
        part = (of_head >= ends[:-1]).sum(0)
        # From the run's first record to the part's first place.
        shift = self.records.first.flatten(1)[:, heads] - ends[:, :, 0]
        shift += self.records.counts.flatten(1)[:, heads]
        place = of_head + shift.T.gather(1, part)
        per_page = torch.tensor(self.records.per_page, device=part.device)[part]
        pages = self.grid.pages_at(self.destination, pages_before + place // per_page)
        return (pages * per_page + place % per_page).masked_fill_(~present, -1), part

    def align(self, layers: slice, of_units: Tensor, nothing: int) -> Tensor:
        """What is known of each unit's tokens, `[units, unit_tokens]`, in the columns of
        `right_aligned` or `aligned_records`.

        Returns:
            `[l·H, W·unit_tokens]`, `nothing` before a head's first token.
        """
        unit, present = self._aligned(layers)
        return of_units[unit].masked_fill_(~present[..., None], nothing).flatten(1)

    def column_positions(self, layers: slice, num_tokens: int) -> Tensor:
        """Token positions of the columns of `right_aligned` or `aligned_records`, then of the raw tail.

        Returns:
            `[l·H, W]` int64, 0 before a head's first token.
        """
        assert self.positions is not None
        own = self.align(layers, self.positions, 0).long()
        tail = torch.arange(self.boundary, num_tokens, device=own.device)
        return torch.cat([own, tail.expand(len(own), -1)], 1)

    def _aligned(self, layers: slice) -> tuple[Tensor, Tensor]:
        """Units `[l·H, W]` int64 of some layers' runs aligned at their ends, and which there are."""
        units, ends = self.units[layers].reshape(-1, 1), self._ends[layers].reshape(-1, 1)
        from_end = torch.arange(-self.longest(layers), 0, device=units.device)
        present = from_end >= -units
        return (ends + from_end).masked_fill_(~present, 0), present

    def num_tail_blocks(self, seq_len: int) -> int:
        """Blocks that the raw tail of a sequence of `seq_len` tokens spans."""
        return -(-(seq_len - self.boundary) // self.grid.block_size)

    def append_tail(self, block_ids: Tensor, group: int = 0) -> None:
        """Add a group's next raw blocks (`[m]` int64) to the rows of all heads of its layers."""
        columns = self.counts[..., None] + self.num_tail[group] + torch.arange(len(block_ids))
        pages, raw = self.pages, self.grid.positional_pages(block_ids).to(torch.int32)
        self.num_tail[group] += len(block_ids)
        missing = int(columns.max()) + 1 - pages.shape[-1]
        if missing > 0:
            pages = torch.nn.functional.pad(pages, (0, missing + SPARE_COLUMNS))
        if self.grid.groups:
            own = list(self.grid.layers_of_groups[group])
            pages[own] = pages[own].scatter_(2, columns[own], raw[own])
        else:
            pages.scatter_(2, columns, raw)
        self.pages = pages


def tables_of(
    request_ids: Sequence[str | None], tables: Mapping[str, RequestTable]
) -> dict[int, RequestTable]:
    """The tables of a batch's compacted rows, by row.

    Args:
        request_ids: one per row; None for rows of no request.
        tables: by request id.
    """
    found = ((row, tables.get(name)) for row, name in enumerate(request_ids) if name is not None)
    return {row: table for row, table in found if table is not None}


def extend(tables: Mapping[int, RequestTable], seq_lens: Tensor, block_table: Tensor, group: int = 0) -> None:
    """Show tables the raw blocks that their requests have by now.

    Args:
        tables: by row of the batch.
        seq_lens: `[R]`, tokens of each row.
        block_table: `[R, W]`, vLLM's blocks by position.
        group: of layers, whose blocks they are.
    """
    for (row, table), seq_len in zip(tables.items(), seq_lens[list(tables)].tolist(), strict=True):
        first = table.boundary // table.grid.block_size
        num_tail = table.num_tail_blocks(seq_len)
        if num_tail > (shown := table.num_tail[group]):
            table.append_tail(block_table[row, first + shown : first + num_tail].to(torch.int64), group)


class BatchTables:
    """Tables of a batch's compacted rows for all layers at once, rebuilt only when a row changes.

    Attributes:
        pages: `[L, R·H, W]` int32.
        run_tokens: `[L, R·H]` int32, run length minus boundary; plus the sequence length it is the number
            of tokens that a head attends over.
        counts: `[L, R, H]` int32, pages of each run.
        records: `[L, P, R, H]` int32, records of each part in it; none where pages are raw.
        first: `[L, P, R, H]` int32, the place of each part's first one.
        most_records: `[P]`, records of each part of the run that has most of it.
    """

    def __init__(self) -> None:
        self._key: tuple[tuple[int, ...], ...] = ()
        self._tables: list[RequestTable] = []

    def update(self, tables: Sequence[RequestTable]) -> None:
        """Show the given requests, one row of H sequences each, in order."""
        key = tuple((id(table), *table.num_tail) for table in tables)
        if key == self._key:
            return
        self._key = key
        self._tables = list(tables)  # keeps the ids in `key` from being reused
        layers, heads = tables[0].counts.shape
        width = max(table.pages.shape[-1] for table in tables)
        pages = torch.zeros(layers, len(tables), heads, width, dtype=torch.int32)
        for row, table in enumerate(tables):
            pages[:, row, :, : table.pages.shape[-1]] = table.pages
        self.pages = pages.view(layers, -1, width)
        self.run_tokens = torch.stack([t.run_tokens - t.boundary for t in tables], 1).view(layers, -1)
        self.counts = torch.stack([table.counts for table in tables], 1).to(torch.int32)
        self.records, self.first = (
            torch.stack(of_tables, 2).transpose(0, 1).to(torch.int32).contiguous() if of_tables else None
            for of_tables in (
                [table.records.counts for table in tables if table.records],
                [table.records.first for table in tables if table.records],
            )
        )
        self.most_records = [] if self.records is None else self.records.amax((0, 2, 3)).tolist()

    def seq_lens(self, seq_lens: Tensor) -> Tensor:
        """Physical lengths `[L, R·H]` int32 of rows whose logical lengths are `[R]` int32."""
        heads = self.run_tokens.shape[1] // seq_lens.shape[0]
        return self.run_tokens + seq_lens.to(torch.int32).repeat_interleave(heads)
