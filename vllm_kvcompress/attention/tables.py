"""Block tables in which every KV head is a sequence of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_kvcompress.paging.layout import PageGrid

SPARE_COLUMNS = 8  # raw-tail pages a table can take before it is widened


class RequestTable:
    """Pages of one compacted request, per layer and head: its run, then its share of the raw tail.

    Attributes:
        boundary: first raw token; tokens below it are in the runs.
        run_tokens: `[L, H]` int32, tokens that each head kept below the boundary.
        positions: `[pages, N]` int32, their positions in the sequence, in run order.
        pages: `[L, H, W]` int32 physical pages, in token order; entries past a head's length are 0.
    """

    def __init__(
        self, grid: PageGrid, destination: Tensor, counts: Tensor, boundary: int, positions: Tensor
    ) -> None:
        """Lay out the runs.

        Args:
            grid: the cache's geometry.
            destination: `[n]` int64, the request's compacted blocks.
            counts: `[L, H]` int64, pages of each head; they sum to `n·L·H`.
            boundary: first raw token, a multiple of the block size.
            positions: `[n·L·H, N]`, the kept tokens' positions, in run order.
        """
        self.grid = grid
        self.positions = positions.to(torch.int32)
        self.boundary = boundary
        self.counts = counts
        self.run_tokens = (counts * grid.block_size).to(torch.int32)
        self.num_tail = 0
        width = int(counts.max())
        self.pages = torch.zeros(*counts.shape, width + SPARE_COLUMNS, dtype=torch.int32)
        in_run = torch.arange(self.pages.shape[-1]) < counts[..., None]
        # Runs follow each other in (layer, head) order, which is the order a boolean mask is filled in.
        self.pages[in_run] = grid.linear_pages(destination).to(torch.int32)

    def right_aligned(self, layer: int) -> Tensor:
        """Pages of a layer's runs, every head's last page in the last column, `[H, W]` int64; -1 before."""
        counts = self.counts[layer]
        width = int(counts.max())
        column = torch.arange(width) - (width - counts[:, None])
        pages = self.pages[layer].long().gather(1, column.clamp(min=0))
        return pages.where(column >= 0, -1)

    def right_aligned_positions(self, layer: int) -> Tensor:
        """Token positions of `right_aligned`'s columns, `[H, W·N]` int64; 0 before a head's first."""
        counts = self.counts[layer]
        first = int(self.counts[:layer].sum())
        of_layer = self.positions[first : first + int(counts.sum())]
        width = int(counts.max())
        out = torch.zeros(len(counts), width, self.grid.block_size, dtype=torch.int64)
        out[torch.arange(width) >= width - counts[:, None]] = of_layer.long()
        return out.flatten(1)

    def num_tail_blocks(self, seq_len: int) -> int:
        """Blocks that the raw tail of a sequence of `seq_len` tokens spans."""
        return -(-(seq_len - self.boundary) // self.grid.block_size)

    def append_tail(self, block_ids: Tensor) -> None:
        """Add the next raw blocks (`[m]` int64) to every head's row."""
        columns = self.counts[..., None] + self.num_tail + torch.arange(len(block_ids))
        self.num_tail += len(block_ids)
        missing = int(columns.max()) + 1 - self.pages.shape[-1]
        if missing > 0:
            self.pages = torch.nn.functional.pad(self.pages, (0, missing + SPARE_COLUMNS))
        self.pages.scatter_(2, columns, self.grid.positional_pages(block_ids).to(torch.int32))


class BatchTables:
    """Tables of a batch's compacted rows for all layers at once, rebuilt only when a row changes.

    Attributes:
        pages: `[L, R·H, W]` int32.
        run_tokens: `[L, R·H]` int32, run length minus boundary; plus the sequence length it is the number
            of tokens that a head attends over.
    """

    def __init__(self) -> None:
        self._key: tuple[tuple[int, int], ...] = ()
        self._tables: list[RequestTable] = []

    def update(self, tables: Sequence[RequestTable]) -> None:
        """Show the given requests, one row of H sequences each, in order."""
        key = tuple((id(table), table.num_tail) for table in tables)
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

    def seq_lens(self, seq_lens: Tensor) -> Tensor:
        """Physical lengths `[L, R·H]` int32 of rows whose logical lengths are `[R]` int32."""
        heads = self.run_tokens.shape[1] // seq_lens.shape[0]
        return self.run_tokens + seq_lens.to(torch.int32).repeat_interleave(heads)
