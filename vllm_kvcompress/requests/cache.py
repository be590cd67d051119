"""The paged cache as plain keys and values, whatever the kernel's packing."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcompress.allocation import Allocation, select
from vllm_kvcompress.formats import Format, RecordFormat
from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.policies.base import LayerObservation, Policy
from vllm_kvcompress.requests.cpu_pages import Packing
from vllm_kvcompress.requests.float8 import Float8, by_row
from vllm_kvcompress.requests.tables import RequestTable


@dataclass(frozen=True)
class Kept:
    """Tokens that a compaction keeps, page by page in run order.

    Attributes:
        pages: `[L·H, n]` int64, the pages of each head's columns; -1 for columns that hold nothing.
        row: `[M]` int64, the row of `pages` that each new page belongs to.
        columns: `[M, N]` int64, which of that row's columns fill it.
    """

    pages: Tensor
    row: Tensor
    columns: Tensor


@dataclass(frozen=True)
class PagedCache(ABC):
    """Every page of every layer.

    Attributes:
        grid: the cache's geometry.
        float8: what the bytes of a quantized cache are; None for one in the model's own dtype.
        slice_bytes: of what is as long as a context, how much to make at a time.
    """

    grid: PageGrid
    float8: Float8 | None = field(default=None, kw_only=True)
    slice_bytes: ClassVar[int] = 8 * 2**20  # more would not stay in a core's own cache

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the pages are."""

    @property
    @abstractmethod
    def head_size(self) -> int:
        """D."""

    def on_device(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Numbers, or rows of equally many, as int64 where the pages are."""
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)

    @property
    @abstractmethod
    def block_bytes(self) -> int:
        """Bytes of a block of all slots."""

    @property
    @abstractmethod
    def content(self) -> Tensor:
        """`[S·B·H, page_bytes]` uint8, the pages as bytes; a view."""

    @property
    def packed_orders(self) -> tuple[Tensor, ...]:
        """In which order the numbers of a page lie, where that is the kernel's own."""
        return ()

    def tokens_per_page(self, format: Format) -> int:
        """Tokens that a page holds at least once they are encoded."""
        return format.tokens_per_page(self.content.shape[1], self.head_size)

    def records_per_page(self, format: RecordFormat) -> int:
        """Records that a page holds, the last of which ends where it does."""
        return self.content.shape[1] // format.record_bytes(self.head_size)

    def read_records(self, records: Tensor, format: RecordFormat) -> Tensor:
        """Records as they are, `[..., record_bytes]` uint8.

        Args:
            records: int64 of any shape: a page times the records of a page, plus the place in it; -1 for
                none, of which the content is arbitrary.
            format: theirs.
        """
        records, per_page = records.clamp(min=0), self.records_per_page(format)
        return self._records(format)[records // per_page, records % per_page]

    def write_records(self, records: Tensor, content: Tensor, format: RecordFormat) -> None:
        """Put records `[..., record_bytes]` where `records` says, as in `read_records`."""
        per_page = self.records_per_page(format)
        self._records(format)[records // per_page, records % per_page] = content

    def clear(self, blocks: Tensor) -> None:
        """Have blocks `[n]` that held records hold numbers again: 0.

        Kernels multiply what is behind a row's last token with 0, and bytes may stand for infinity.
        """
        grid = self.grid
        self.content.view(grid.num_slots, grid.num_blocks, -1).index_fill_(1, blocks, 0)

    def _records(self, format: RecordFormat) -> Tensor:
        """`[L·B·H, records, record_bytes]`, a view."""
        pages, size = self.content, format.record_bytes(self.head_size)
        shape = len(pages), self.records_per_page(format), size
        before = pages.storage_offset() + pages.shape[1] - shape[1] * size
        return pages.as_strided(shape, (pages.stride(0), size, 1), before)

    @abstractmethod
    def read_keys(self, pages: Tensor, layers: slice | None = None) -> Tensor:
        """Keys `[X, W·N, D]` of pages `[X, W]`; of absent ones (-1) arbitrary.

        Args:
            pages: which.
            layers: that they are read for, equally many rows for each, one after the other; of a quantized
                cache, where a page does not tell whose scale its bytes have.
        """

    @abstractmethod
    def read_values(self, pages: Tensor, layers: slice | None = None) -> Tensor:
        """Values `[X, W·N, D]` of pages `[X, W]`, as in `read_keys`."""

    def _plain(self, stored: Tensor, scales: Tensor, layers: slice | None) -> Tensor:
        """Bytes `[X, n, D]` as numbers, by the scales, of `[L]`, of the layers that they are read for."""
        assert self.float8 is not None and layers is not None
        return self.float8.read(stored, by_row(scales[layers], len(stored)))

    @abstractmethod
    def rewrite(self, kept: Kept, target: Tensor, overlaps: bool) -> None:
        """Write the kept tokens to their new pages.

        Args:
            kept: of all layers.
            target: `[M]` int64, the new pages.
            overlaps: whether a target may be one of the pages that are read.
        """

    def scores_windows(self, policy: Policy) -> bool:
        """Whether `window_scores` answers for this policy, without a copy of the keys."""
        return False

    def window_scores(
        self,
        policy: Policy,
        pages: Tensor,
        queries: Tensor,
        scales: list[float],
        soft_caps: list[float],
        sinks: Tensor | None,
        num_scored: int,
        ends: list[int],
    ) -> Tensor:
        """What the policy's `score` returns for all layers of J requests, X = J·L·H.

        Args:
            policy: one that looks at its window's attention alone.
            pages: `[X, W / N]` int64; -1 for padding.
            queries: `[J·L, w, Hq, D]`, of each request's last w tokens.
            scales: softmax scale of each layer.
            soft_caps: soft cap of each layer's logits; 0 for none.
            sinks: `[L·H, G]` float32, one more logit of each query head, -inf for none; None for none at all.
            num_scored: T, columns to score.
            ends: how many of the columns are each request's, the window included.

        Returns:
            `[X, T]` float32.
        """
        raise NotImplementedError

    def scores_tokens(self, policy: Policy) -> bool:
        """Whether `token_scores` answers for this policy, without a copy of keys and values."""
        return False

    def token_scores(
        self,
        policy: Policy,
        pages: Tensor,
        layers: slice,
        seen: LayerObservation,
    ) -> Tensor:
        """What the policy's `score` returns for some layers of one request, X = l·H.

        Args:
            policy: one that looks at a token's key and value alone.
            pages: `[X, W / N]` int64; -1 for padding.
            layers: which of the cache's.
            seen: what it would be given, without keys and values.

        Returns:
            `[X, T]` float32.
        """
        raise NotImplementedError

    def rank(self, scores: Tensor, padding: Tensor | None, sinks: int) -> None:
        """Make scores comparable, in place: padding -inf and the sinks +inf, alone; NaN the lowest number.

        Args:
            scores: `[X, T]` float32.
            padding: `[X]` int64, leading columns that hold nothing; None for none.
            sinks: tokens that head each row and are protected.
        """
        limits = torch.finfo(torch.float32)
        scores.nan_to_num_(nan=limits.min, neginf=limits.min, posinf=limits.max)
        protect(scores, padding, sinks)

    def allocate(
        self,
        allocation: Allocation,
        scores: Tensor,
        num_pages: list[int] | Tensor,
        widths: list[int],
        sinks: int,
        capacity: Tensor | None,
    ) -> Tensor:
        """What the allocation decides for each of J requests, in pages of raw tokens.

        Args:
            allocation: one of all.
            scores: `[J, L, H, T]` as `Allocation.allocate` takes them, without NaN.
            num_pages: pages that each request spends, as `numbers` has them.
            widths: columns that each request has, the last ones.
            sinks: tokens of each head that are protected.
            capacity: `[J, L, H]` int64, or None, likewise.

        Returns:
            `[J, L, H]` int64.
        """
        capacities = [None] * len(scores) if capacity is None else capacity
        assert not isinstance(num_pages, Tensor)
        of_requests = zip(scores, num_pages, widths, capacities, strict=True)
        return torch.stack(
            [
                allocation.allocate(own[..., own.shape[-1] - width :], total, self.grid.block_size, most)
                for own, total, width, most in of_requests
            ]
        )

    def num_blocks_above(self, scores: Tensor, threshold: float, most: int) -> Tensor:
        """Blocks that hold every page with a token above a threshold, and one page of each head.

        Args:
            scores: `[X, T]` as in `allocate`, of one request.
            threshold: tokens above it are to be kept.
            most: at most so many blocks.

        Returns:
            `[1]` int64.
        """
        pages = ((scores > threshold).sum(1) + self.grid.block_size - 1) // self.grid.block_size
        total = pages.clamp(min=1).sum(0, keepdim=True)
        return ((total + self.grid.pages_per_block - 1) // self.grid.pages_per_block).clamp(max=most)

    def numbers(self, computed: Tensor) -> list[int] | Tensor:
        """Numbers that a device has computed, on the host unless it would have to wait for them."""
        return computed.tolist()

    def select(
        self, scores: Tensor, counts: Tensor, num_pages: int, exact: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The columns that fill each head's pages, and the row of each page.

        Args:
            scores: `[X, T]`, as in `allocate`.
            counts: `[X]` int64, pages of each row.
            num_pages: M, their sum.
            exact: whether it is; else the host does not know it, and they may sum to less.

        Returns:
            `[M, N]` int64 as of `allocation.select`, and `[M]` int64, its row; behind the last one any page
            that is there.
        """
        assert exact
        rows = torch.arange(len(counts), device=counts.device)
        row = rows.repeat_interleave(counts, output_size=num_pages)
        return select(scores[None], counts[None], self.grid.block_size), row

    def context(self, layers: slice, table: RequestTable | None, raw: Tensor) -> Tensor:
        """Pages of some layers' context: a request's runs, if it has any, then its raw blocks.

        Heads keep different numbers of pages, so runs are aligned at their ends: column for column, all heads
        share the raw tokens behind them.

        Args:
            layers: which.
            table: what the request is compacted to; None if it is not.
            raw: `[G, n]` int64, block ids of the raw tokens in each group; `[n]` of the layers' own.

        Returns:
            `[l·H, W]` int64, -1 where a head has no page.
        """
        positional = self.grid.layer_pages(layers, raw)
        return positional if table is None else torch.cat([table.right_aligned(layers), positional], 1)


def protect(scores: Tensor, padding: Tensor | None, sinks: int) -> None:
    """Give -inf to padding, and +inf to the sinks, which head every row; arguments as of `rank`."""
    if padding is None:
        scores[:, :sinks] = torch.inf
        return
    behind = torch.arange(scores.shape[1], device=scores.device) - padding[:, None]
    scores.masked_fill_(behind < 0, -torch.inf)
    scores.masked_fill_((behind >= 0) & (behind < sinks), torch.inf)


@dataclass(frozen=True)
class HostCache(PagedCache):
    """Pages that are read and written by PyTorch alone.

    Attributes:
        pages: `[L·B·H, ...]`, as the subclass has them.
    """

    pages: Tensor

    @property
    def device(self) -> torch.device:
        return self.pages.device

    @property
    def content(self) -> Tensor:
        return self.pages.flatten(1).view(torch.uint8)

    @property
    def block_bytes(self) -> int:
        return self.grid.pages_per_block * self.pages[0].nbytes

    def rewrite(self, kept: Kept, target: Tensor, overlaps: bool) -> None:
        if overlaps:  # all is gathered before anything is written
            self.pages[target] = self._new_pages(kept.pages, kept.row, kept.columns)
            return
        at_once = max(1, self.slice_bytes // self.pages[0].nbytes)
        parts = (part.split(at_once) for part in (kept.row, kept.columns, target))
        for row, columns, own in zip(*parts, strict=True):
            self.pages[own] = self._new_pages(kept.pages, row, columns)

    @abstractmethod
    def _new_pages(self, pages: Tensor, row: Tensor, columns: Tensor) -> Tensor:
        """The kept tokens as stored, `[M, ...]`; arguments as in `Kept`."""


@dataclass(frozen=True)
class PackedCache(HostCache):
    """Pages `[L·B·H, 2, N·D]` as vLLM's CPU kernel packs them: keys, then values.

    Attributes:
        key_packing: how keys lie in a page.
        value_packing: how values do.
    """

    key_packing: Packing
    value_packing: Packing

    @property
    def head_size(self) -> int:
        return self.key_packing.head_size

    @property
    def packed_orders(self) -> tuple[Tensor, ...]:
        return self.key_packing.order, self.value_packing.order

    def read_keys(self, pages: Tensor, layers: slice | None = None) -> Tensor:
        keys = self.key_packing.unpack(self._rows(pages, 0)).flatten(1, 2)
        return keys if self.float8 is None else self._plain(keys, self.float8.key_scales, layers)

    def read_values(self, pages: Tensor, layers: slice | None = None) -> Tensor:
        values = self.value_packing.unpack(self._rows(pages, 1)).flatten(1, 2)
        return values if self.float8 is None else self._plain(values, self.float8.value_scales, layers)

    def _rows(self, pages: Tensor, part: int) -> Tensor:
        """Keys (0) or values (1) of pages `[X, W]` as stored, `[X, W, N·D]`."""
        rows = self.pages.flatten(0, 1).index_select(0, pages.clamp(min=0).flatten() * 2 + part)
        return rows.view(*pages.shape, -1)

    def _new_pages(self, pages: Tensor, row: Tensor, columns: Tensor) -> Tensor:
        elements, block_size = self.pages.view(-1), self.grid.block_size
        page, token = pages[row[:, None], columns // block_size], columns % block_size
        first = page * self.pages[0].numel()
        keys = self.key_packing.gather(elements, first, token)
        values = self.value_packing.gather(elements, first + self.pages.shape[2], token)
        return torch.stack([keys, values], 1)
