"""Writes what stays of a request into the records of a format."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.formats import RECORD, Format, Latent, MixedDim, RecordFormat
from vllm_kvcompress.requests.tables import Records
from vllm_kvcompress.worker.bases import with_bases
from vllm_kvcompress.worker.candidates import Candidates, Reader
from vllm_kvcompress.worker.choosing import Choosing
from vllm_kvcompress.worker.solving import Solution
from vllm_kvcompress.worker.work import Task


@dataclass(frozen=True)
class Encoded:
    """What a request held, and what it was compacted to, in run order.

    Attributes:
        held: what it held.
        records: what its pages hold.
        num_pages: `[X]` int64, of each head.
        row: `[records]` int64, whose each record is.
        columns: `[records, 32]` int64, its tokens' columns of what was held.
    """

    held: Candidates
    records: Records
    num_pages: Tensor
    row: Tensor
    columns: Tensor


class Encoder:
    """Compacts requests to records."""

    def __init__(self, reader: Reader, choosing: Choosing) -> None:
        self._cache, self._grid = reader.cache, reader.grid
        self._reader, self._choosing = reader, choosing

    def encode(self, task: Task, format: Format, solution: Solution | None) -> Encoded:
        """Compact a request to records, to what was solved for it if anything was.

        What is encoded already stays so, record by record. Raw tokens are encoded 32 by 32.
        """
        job, device = task.work.job, self._cache.device
        held = self._reader.candidates(task, slice(0, self._grid.num_layers))
        old = held.old
        old_parts = old if held.parts is None else held.parts
        num_raw = len(job.source) * self._grid.block_size
        if isinstance(format, MixedDim):
            held, errors = with_bases(self._reader, held, format, num_raw)
            choice = self._choosing.choose_ranks(task, held, errors, format, num_raw)
        elif solution is None:
            choice = self._choosing.choose(task, held, format, num_raw)
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
        sizes = [own.record_bytes(self._cache.head_size) for own in format.parts]
        first, num_pages = format.arrange(counts, self._cache.head_size, self._cache.content.shape[1])
        num_pages = num_pages if choice.num_pages is None else choice.num_pages
        per_page = tuple(self._cache.records_per_page(own) for own in format.parts)
        records = Records(
            format, *(each.unflatten(1, (self._grid.num_layers, -1)) for each in (counts, first)), per_page
        )

        first_page, units = num_pages.cumsum(0) - num_pages, counts.sum(0)
        begin = units.cumsum(0) - units + counts.cumsum(0) - counts  # `[P, X]`, in run order
        overlaps = not job.freed.isdisjoint(job.destination)
        staged: list[tuple[Tensor, Tensor, RecordFormat]] = []
        rows = torch.arange(len(old), device=device)
        if format.basis is not None and held.bases is not None:
            owner = format.needs_basis(counts).nonzero()[:, 0]
            page = self._grid.pages_at(task.destination, first_page[owner])
            per_run = self._cache.records_per_page(format.basis)
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
            target = self._grid.pages_at(task.destination, first_page[head] + place // per_page[number])
            target = target * per_page[number] + place % per_page[number]
            is_old = of_head < num_old[number][head]
            unit = begin[number][head] + of_head
            moved = old[keep_old[number]]
            at_once = max(1, self._cache.slice_bytes // sizes[number])
            for to, source in zip(target[is_old].split(at_once), moved.split(at_once), strict=True):
                staged.append((to, self._cache.read_records(source, own), own))
                if not overlaps:
                    self._write(staged)
            from_start[unit[is_old]] = old_columns.expand(len(old), -1, -1)[keep_old[number]]
            of_raw, columns = None if choice.raw is None else choice.raw == number, []
            new_target = target[~is_old].split(num_new[number].tolist())
            # Without raw tokens, which there may be none of under pressure, records just go.
            for first_head, end in self._reader.head_slices(len(old), num_raw) if num_raw else ():
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
            self._cache.clear(self._cache.on_device(freed))
        return Encoded(held, records, num_pages, row, from_start)

    def _encoded(
        self,
        held: Candidates,
        begin: int,
        end: int,
        num_raw: int,
        keep_raw: Tensor | None,
        format: RecordFormat,
        solution: Solution | None,
    ) -> tuple[Tensor, Tensor]:
        """Records `[n, record_bytes]` of some heads' raw tokens, and the columns `[n, 32]` of these."""
        columns = torch.arange(num_raw, device=held.pages.device).repeat(end - begin)
        kept = None if keep_raw is None else keep_raw[begin:end].flatten().nonzero()[:, 0]
        columns = (columns if kept is None else columns[kept]).view(-1, RECORD)
        if solution is not None:
            return torch.cat(solution.records[begin:end]), columns
        pages = held.pages[begin:end, : num_raw // self._grid.block_size]
        keys, values = (
            read(pages).reshape(-1, self._cache.head_size)
            for read in (self._cache.read_keys, self._cache.read_values)
        )
        if kept is not None:
            keys, values = keys[kept], values[kept]
        tokens = (-1, RECORD, self._cache.head_size)
        keys, values = keys.view(tokens), values.view(tokens)
        if isinstance(format, Latent):
            assert held.bases is not None and keep_raw is not None
            of_head = keep_raw[begin:end].sum(1) // RECORD
            return format.encode(keys, values, held.bases[begin:end].repeat_interleave(of_head, 0)), columns
        return format.encode(keys, values), columns

    def _write(self, staged: list[tuple[Tensor, Tensor, RecordFormat]]) -> None:
        for target, content, format in staged:
            self._cache.write_records(target, content, format)
        staged.clear()
