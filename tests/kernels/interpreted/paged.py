"""Random caches and batches for the kernels' tests."""

import itertools
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.kernels.batch import Rows, Runs
from vllm_kvcompress.kernels.reference import attend_paged

# Of the output, and of pages: what rounding to the dtype and the order of summation may cost.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Row:
    """A row of a batch.

    Attributes:
        query_len: its tokens in this step.
        tail: raw tokens, this step's included.
        blocks: blocks that it is compacted to; 0 if it is not compacted.
        boundary: first raw token, in blocks; 0 if it is not compacted.
    """

    query_len: int
    tail: int
    blocks: int = 0
    boundary: int = 0


def make_cache(layers, blocks, heads, block_size, head_size, dtype, interleaved=True):
    """Random keys and values `[S, B, H, N, D]`, views of pages that are `[N, 2D]` or `[2, N, D]`."""
    if interleaved:
        cache = torch.randn(layers, blocks, heads, block_size, 2 * head_size).to(dtype)
        return cache[..., :head_size], cache[..., head_size:]
    cache = torch.randn(layers, blocks, heads, 2, block_size, head_size).to(dtype)
    return cache.unbind(3)


class Batch:
    """Rows with runs of random lengths, some of them empty, in blocks of random ids.

    Attributes:
        runs: in slots that are not the rows' order.
        rows: with one padding row at the end.
        query: `[T, Hq, D]`, with two padding tokens at the end.
        sinks: `[Hq]`, if there are any.
    """

    sinks: Tensor | None = None

    def __init__(
        self, rows: list[Row], keys: Tensor, values: Tensor, group: int, slots: tuple[int, ...] = ()
    ) -> None:
        """Have rows; of the layers of one cache group where several share the cache's slots, as in `Runs`."""
        num_slots, num_blocks, heads, block_size, head_size = keys.shape
        self.keys, self.values, self._rows = keys, values, rows
        free = iter((torch.randperm(num_blocks - 1) + 1).tolist())  # block 0 is vLLM's null block
        states = torch.randperm(len(rows) + 2)
        pages, runs = num_slots * heads, (len(slots) or num_slots) * heads
        self.runs = Runs(
            destination=torch.zeros(len(states), max(row.blocks for row in rows) + 1, dtype=torch.int32),
            start=torch.zeros(len(states), runs + 1, dtype=torch.int32),
            boundary=torch.zeros(len(states), dtype=torch.int32),
            slots=slots,
        )
        width = max(row.boundary + -(-row.tail // block_size) for row in rows)
        # Positions below the boundary hold the null block; a padding row's table is never read.
        block_table = torch.zeros(len(rows) + 1, width, dtype=torch.int32)
        slot_of = torch.full((len(rows) + 1,), -1, dtype=torch.int32)
        self.tails = []
        for index, row in enumerate(rows):
            tail = torch.tensor([next(free) for _ in range(-(-row.tail // block_size))])
            block_table[index, row.boundary : row.boundary + len(tail)] = tail
            self.tails.append(tail)
            if row.blocks:
                slot = slot_of[index] = int(states[index])
                destination = torch.tensor([next(free) for _ in range(row.blocks)])
                self.runs.destination[slot, : row.blocks] = destination
                self.runs.boundary[slot] = row.boundary * block_size
                # Cut points at random: neighbours that coincide are heads that kept nothing.
                cuts = torch.randint(0, row.blocks * pages + 1, (runs - 1,)).sort().values
                self.runs.start[slot, 1:runs] = cuts
                self.runs.start[slot, runs] = row.blocks * pages
        lens = torch.tensor([row.query_len for row in rows] + [0])
        seq_lens = [row.boundary * block_size + row.tail for row in rows] + [0]
        self.rows = Rows(
            slot=slot_of,
            block_table=block_table,
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            query_start_loc=torch.cat([torch.zeros(1), lens.cumsum(0)]).to(torch.int32),
            max_query_len=int(lens.max()),
        )
        self.query = torch.randn(int(lens.sum()) + 2, heads * group, head_size).to(keys.dtype)

    def as_own(self, layer: int) -> tuple[int, slice]:
        """A layer as the reference has layers, each in its own slot: that slot, and the runs that count."""
        slot, heads = self.runs.slot_of(layer), self.keys.shape[2]
        return slot, slice((layer - slot) * heads, None)

    def expected(self, layer: int, scale: float, logits_soft_cap: float) -> tuple[Tensor, Tensor]:
        """Output `[tokens, Hq, D]` and log-sum-exp `[tokens, Hq]` of all rows, by the reference."""
        parts, (own_slot, counted) = [], self.as_own(layer)
        for index, row in enumerate(self._rows):
            begin, end = self.rows.query_start_loc[index : index + 2].tolist()
            slot = int(self.rows.slot[index])
            destination, start = torch.empty(0).long(), torch.zeros_like(self.runs.start[0]).long()
            if row.blocks:
                destination = self.runs.destination[slot, : row.blocks].long()
                start = self.runs.start[slot].long()
            parts.append(
                attend_paged(
                    self.query[begin:end],
                    self.keys,
                    self.values,
                    destination,
                    start[counted],
                    self.tails[index],
                    row.tail,
                    own_slot,
                    scale,
                    logits_soft_cap,
                    self.sinks,
                )
            )
        outputs, lses = zip(*parts, strict=True)
        return torch.cat(outputs), torch.cat(lses)


def pairwise(grid: dict[str, list]) -> list[dict]:
    """Few cases in which every two values of different options meet, found greedily."""
    names = list(grid)
    missing = {(a, x, b, y) for a, b in itertools.combinations(names, 2) for x in grid[a] for y in grid[b]}
    draw, cases = random.Random(0), []
    while missing:
        a, x, b, y = min(missing, key=str)
        anchor = {a: x, b: y}
        best, met = None, set()
        for _ in range(100):
            case = {name: anchor.get(name, draw.choice(values)) for name, values in grid.items()}
            pairs = {(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2)} & missing
            if len(pairs) > len(met):
                best, met = case, pairs
        cases.append(best)
        missing -= met
    return cases
