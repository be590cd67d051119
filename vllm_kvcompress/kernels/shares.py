"""Cuts the keys of each head into shares by the head's own length, for rows of few queries.

Heads of one row may differ a hundredfold in length, and a captured graph's grid cannot follow. So a kernel is
launched with as many programs as could be of use, and what each of them attends over is looked up: once a
step, before all layers, one kernel lists the shares of every layer by the lengths of this step. The shares of
a layer are nearly alike, and where there is little to read there are as many as the device runs at a time.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_kvcompress.kernels.batch import Rows, Runs

MIN_SHARE = 256  # keys: a shorter share costs more to merge than it saves
ENOUGH = 1024  # keys of a share: there are no shorter ones but to fill the device once
WAVES = 4  # most times that shares fill the device, beside the heads that are not cut
AT_ONCE = 1024  # heads or programs
FIELDS = 6


@dataclass(frozen=True)
class Shares:
    """What each program of a kernel attends over, in arrays that stay in place for captured graphs.

    Attributes:
        work: `[6, L, P]` int32, of each layer's programs: the row times H plus the KV head, or -1 if there is
            nothing to do; the first key and the one behind the last; how many shares the head is cut into,
            and which of them this is; and the place of the first one among `num_parts`, if there are several.
        ends: `[2, L, R·H]` int32, one past the last program of each head, and past its last place.
        arrived: `[R·H]` int32, programs of a head that are done; all 0 between launches.
        heads: H.
        at_once: programs that the device runs at a time.
        max_keys: a bound on the keys of a head.
    """

    work: Tensor
    ends: Tensor
    arrived: Tensor
    heads: int
    at_once: int
    max_keys: int

    @classmethod
    def empty(
        cls,
        max_rows: int,
        layers: int,
        heads: int,
        at_once: int,
        device: torch.device | str,
        max_keys: int = 2**20,
    ) -> "Shares":
        """Room for the shares of so many rows, with nothing to do."""
        items = max_rows * heads
        return cls(
            work=torch.full((FIELDS, layers, WAVES * at_once + items), -1, dtype=torch.int32, device=device),
            ends=torch.zeros(2, layers, items, dtype=torch.int32, device=device),
            arrived=torch.zeros(items, dtype=torch.int32, device=device),
            heads=heads,
            at_once=at_once,
            max_keys=max_keys,
        )

    @staticmethod
    def num_bytes(max_rows: int, layers: int, heads: int, at_once: int) -> int:
        """Bytes of an `empty` of the same arguments."""
        items = max_rows * heads
        return 4 * (FIELDS * layers * (WAVES * at_once + items) + 2 * layers * items + items)

    def num_programs(self, num_rows: int) -> int:
        """How many programs a batch of so many rows may need."""
        assert num_rows * self.heads <= len(self.arrived)
        return self._most_waves(num_rows) * self.at_once + num_rows * self.heads

    def _most_waves(self, num_rows: int) -> int:
        """How often shares of so many rows may fill the device: idle programs of a graph take time, too."""
        wanted = num_rows * self.heads * self.max_keys // (self.at_once * ENOUGH)
        return min(max(wanted, 1), WAVES)

    @property
    def num_parts(self) -> int:
        """Places for what shares of heads that are cut leave to be merged: every other program is alone."""
        return 2 * WAVES * self.at_once

    def cut(
        self,
        runs: Runs,
        rows: Rows,
        block_size: int,
        format_id: int = 0,
        compacted_only: bool = True,
        align: int = 128,
        min_share: int = MIN_SHARE,
    ) -> None:
        """List the shares of a batch, of all layers.

        Args:
            runs: where compacted rows have their pages.
            rows: the batch.
            block_size: tokens of a raw page.
            format_id: of the rows that are served, see `Runs`; of records, those of the first part count.
            compacted_only: serve no others; else every row of raw pages.
            align: keys that shares begin at multiples of.
            min_share: least keys of a share, but for a head's last.
        """
        layers, num_rows = self.ends.shape[1], rows.seq_lens.shape[0]
        assert num_rows * self.heads <= len(self.arrived)
        assert runs.start.shape[1] == layers * self.heads + 1
        _cut_kernel[(layers,)](
            self.work,
            self.ends,
            runs.start,
            runs.boundary,
            runs.format,
            runs.encoded,
            rows.slot,
            rows.seq_lens,
            rows.query_start_loc,
            num_rows,
            self.ends.shape[2],
            self.work.shape[2],
            self.at_once,
            self._most_waves(num_rows),
            format_id,
            min_share,
            runs.start.stride(0),
            runs.encoded.stride(0),
            HEADS=self.heads,
            BLOCK_SIZE=block_size,
            RECORDS=format_id > 0,
            COMPACTED_ONLY=compacted_only,
            ALIGN=align,
            ENOUGH=ENOUGH,
            AT_ONCE=AT_ONCE,
        )


@triton.jit
def _lengths(
    item,
    present,
    layer,
    batch,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RECORDS: tl.constexpr,
    COMPACTED_ONLY: tl.constexpr,
):
    """Keys of heads, run and raw tail; 0 where others serve the row or it has no query."""
    runs, rows, format_id, (start_row, part_row) = batch
    start, boundary, formats, encoded = runs
    row_slot, seq_lens, query_start_loc = rows
    row, head = item // HEADS, item % HEADS
    slot = tl.load(row_slot + row, mask=present, other=-1)
    compacted = present & (slot >= 0)
    state = tl.maximum(slot, 0).to(tl.int64)
    served = compacted & (tl.load(formats + state, mask=compacted, other=-1) == format_id)
    if not COMPACTED_ONLY:
        served = served | (present & (slot < 0))
    queries = tl.load(query_start_loc + row + 1, mask=served, other=0)
    queries -= tl.load(query_start_loc + row, mask=served, other=0)
    if RECORDS:
        held = tl.load(encoded + state * part_row + layer * HEADS + head, mask=served, other=0)
    else:
        run = start + state * start_row + layer * HEADS + head
        pages = tl.load(run + 1, mask=served & compacted, other=0)
        held = (pages - tl.load(run, mask=served & compacted, other=0)) * BLOCK_SIZE
    raw_from = tl.load(boundary + state, mask=served & compacted, other=0)
    length = held + tl.load(seq_lens + row, mask=served, other=0) - raw_from
    return tl.where(served & (queries > 0), length, 0)


@triton.jit
def _count(length, most, ALIGN: tl.constexpr):
    """How many shares heads are cut into, none longer than `most`, and keys of each but the last."""
    count = tl.maximum(tl.cdiv(length, most), 1)
    share = tl.cdiv(tl.cdiv(length, count), ALIGN) * ALIGN
    return tl.cdiv(length, tl.maximum(share, 1)), share


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "max_items",
        "max_programs",
        "at_once",
        "most_waves",
        "format_id",
        "min_share",
    ]
)
def _cut_kernel(
    work,  # [FIELDS, L, max_programs]
    item_ends,  # [2, L, max_items]
    start,
    boundary,
    formats,
    encoded,
    row_slot,
    seq_lens,
    query_start_loc,
    num_rows,
    max_items,
    max_programs,
    at_once,
    most_waves,
    format_id,
    min_share,
    start_row,
    part_row,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RECORDS: tl.constexpr,
    COMPACTED_ONLY: tl.constexpr,
    ALIGN: tl.constexpr,
    ENOUGH: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    layer = tl.program_id(0)
    num_layers = tl.num_programs(0)
    items = num_rows * HEADS
    runs, rows = (start, boundary, formats, encoded), (row_slot, seq_lens, query_start_loc)
    batch = runs, rows, format_id, (start_row, part_row)
    keys, some = tl.zeros([AT_ONCE], tl.int64), tl.zeros([AT_ONCE], tl.int32)
    for first in range(0, items, AT_ONCE):
        item = first + tl.arange(0, AT_ONCE)
        length = _lengths(item, item < items, layer, batch, HEADS, BLOCK_SIZE, RECORDS, COMPACTED_ONLY)
        keys += length
        some += (length > 0).to(tl.int32)
    total, active = tl.sum(keys, 0), tl.sum(some, 0)
    waves = tl.minimum(tl.maximum(total // (at_once.to(tl.int64) * ENOUGH), 1), most_waves).to(tl.int32)
    # No more shares than `room` and one for each head: every head's last may be short.
    room = tl.maximum(waves * at_once - active, waves * at_once // 2)
    most = tl.maximum(tl.cdiv(total, tl.maximum(room, 1)), min_share).to(tl.int32)
    most = tl.cdiv(most, ALIGN) * ALIGN

    used, places = 0, 0
    cut_ends = item_ends + num_layers * max_items
    for first in range(0, items, AT_ONCE):
        item = first + tl.arange(0, AT_ONCE)
        length = _lengths(item, item < items, layer, batch, HEADS, BLOCK_SIZE, RECORDS, COMPACTED_ONLY)
        count, _ = _count(length, most, ALIGN)
        tl.store(item_ends + layer * max_items + item, used + tl.cumsum(count, 0), mask=item < items)
        used += tl.sum(count, 0)
        if_cut = tl.where(count > 1, count, 0)
        tl.store(cut_ends + layer * max_items + item, places + tl.cumsum(if_cut, 0), mask=item < items)
        places += tl.sum(if_cut, 0)
    tl.debug_barrier()  # what one thread wrote, others read

    highest = 1
    while highest < items:
        highest *= 2
    for first in range(0, max_programs, AT_ONCE):
        program = first + tl.arange(0, AT_ONCE)
        busy = program < used
        item = tl.zeros([AT_ONCE], tl.int32)  # heads that end before the program
        step = highest
        while step > 0:
            more = item + step
            before = busy & (more <= items)
            end = tl.load(item_ends + layer * max_items + more - 1, mask=before, other=0)
            item = tl.where(before & (end <= program), more, item)
            step = step // 2
        length = _lengths(item, busy, layer, batch, HEADS, BLOCK_SIZE, RECORDS, COMPACTED_ONLY)
        count, share = _count(length, most, ALIGN)
        own = tl.load(item_ends + layer * max_items + item, mask=busy, other=0) - count
        place = tl.load(cut_ends + layer * max_items + item, mask=busy, other=0) - count
        begin = (program - own) * share
        at = work + layer * max_programs + program
        field = num_layers * max_programs
        inside = program < max_programs
        tl.store(at, tl.where(busy, item, -1), mask=inside)
        tl.store(at + field, begin, mask=inside & busy)
        tl.store(at + 2 * field, tl.minimum(begin + share, length), mask=inside & busy)
        tl.store(at + 3 * field, count, mask=inside & busy)
        tl.store(at + 4 * field, program - own, mask=inside & busy)
        tl.store(at + 5 * field, place, mask=inside & busy)
