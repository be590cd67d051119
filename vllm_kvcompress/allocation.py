"""How many pages each head gets, and which tokens fill them."""

import functools
import heapq
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vllm_kvcompress import profiles


class Allocation(ABC):
    """Splits a request's page budget over its layers and heads. Subclasses are dataclasses of options.

    Attributes:
        name: what users write.
        paper: title and arXiv id.
        argument: the option that users write behind the name, as in `NAME:ARGUMENT`; None for none.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    argument: ClassVar[str | None] = None

    def check_model(self, num_layers: int, num_kv_heads: int) -> None:  # noqa: B027 (most fit any model)
        """Refuse a model that this allocation is not for, before any request is served.

        Args:
            num_layers: L of the cache that one worker holds.
            num_kv_heads: H of it.

        Raises:
            ValueError: in one line, why not.
        """

    def allocate(
        self, scores: Tensor, num_pages: int, page_size: int, capacity: Tensor | None = None
    ) -> Tensor:
        """Decide each head's pages.

        Every head gets at least one page and enough for its protected tokens, and at most its capacity.
        Equal scores are resolved in favour of the earlier layer, head and token, so the same scores always
        give the same pages. NaN counts as the lowest score.

        Args:
            scores: `[L, H, T]` float32, higher = keep; +inf marks protected tokens. T is a multiple of
                `page_size`.
            num_pages: pages to spend, all of them.
            page_size: tokens per page.
            capacity: `[L, H]` int64, pages that each head could fill; None for T / page_size. Of a head with
                fewer tokens, the first T - capacity·page_size scores are -inf and stand for nothing.

        Returns:
            `[L, H]` int64 on the scores' device, summing to `num_pages`.

        Raises:
            ValueError: the budget is too small for one page per head and the protected tokens, or larger
                than the heads can fill.
        """
        layers, heads, num_tokens = scores.shape
        assert num_tokens % page_size == 0
        scores = _comparable(scores)
        if capacity is None:
            capacity = torch.full((layers, heads), num_tokens // page_size, device=scores.device)
        protected = torch.isposinf(scores).sum(-1)
        smallest = ((protected + page_size - 1) // page_size).clamp(min=1)
        least, most = int(smallest.sum()), int(capacity.sum())
        if not least <= num_pages <= most:
            raise ValueError(
                f"{num_pages} pages cannot be split over {layers}x{heads} heads, which need {least} and can "
                f"fill {most}; {'raise' if num_pages < least else 'lower'} budget"
            )
        return self._allocate(scores, num_pages, page_size, smallest, capacity)

    @abstractmethod
    def _allocate(
        self, scores: Tensor, num_pages: int, page_size: int, smallest: Tensor, largest: Tensor
    ) -> Tensor:
        """As `allocate`, arguments checked; `smallest`, `largest` `[L, H]` int64 bound each head's pages."""


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same number of pages for every head; a remainder goes to the first ones."""

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "the common default"

    def _allocate(
        self, scores: Tensor, num_pages: int, page_size: int, smallest: Tensor, largest: Tensor
    ) -> Tensor:
        even = torch.full_like(smallest, num_pages, dtype=torch.float32) / smallest.numel()
        counts = whole_pages(even.flatten(), num_pages, smallest.flatten(), largest.flatten())
        return counts.view_as(smallest)


@dataclass(frozen=True)
class Adaptive(Allocation):
    """Heads of one layer compete for the layer's tokens (Ada-KV).

    The scores of a layer's heads are pooled, its top H·b tokens are taken and counted per head: c_h. The
    head's budget is (1-α)·c_h + α·b tokens. Tokens become whole pages by largest remainder, within each
    head's minimum and maximum, so that the layer spends exactly its share. Layers share evenly.

    Source: Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM
    Inference", arXiv 2407.11550, Algorithm 1. Deviation: the paper rounds to tokens, here to whole pages.

    Attributes:
        alpha: α, the share of the budget that stays uniform, 0 to 1.
    """

    name: ClassVar[str] = "adaptive"
    paper: ClassVar[str] = "Ada-KV: Adaptive Budget Allocation (arXiv 2407.11550)"
    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, got {self.alpha}")

    def _allocate(
        self, scores: Tensor, num_pages: int, page_size: int, smallest: Tensor, largest: Tensor
    ) -> Tensor:
        layers, heads, num_tokens = scores.shape
        even = torch.full((layers,), num_pages / layers, device=scores.device)
        shares = whole_pages(even, num_pages, smallest.sum(1), largest.sum(1))
        kept = shares * page_size  # tokens of each layer

        ascending = _ascending(scores.reshape(layers, heads * num_tokens))
        threshold = ascending.gather(1, (ascending.shape[1] - kept)[:, None])[:, :, None]
        chosen = (scores > threshold).sum(-1)
        tied = (scores == threshold).sum(-1)
        # The layer's tied tokens fill it up in head order.
        missing = (kept - chosen.sum(1))[:, None] - (tied.cumsum(1) - tied)
        chosen += torch.minimum(missing.clamp(min=0), tied)

        wanted = ((1 - self.alpha) * chosen + self.alpha * kept[:, None] / heads) / page_size
        lists = (of_layers.tolist() for of_layers in (wanted, shares, smallest, largest))
        rows = [_whole_pages(*of_layer) for of_layer in zip(*lists, strict=True)]
        return torch.tensor(rows, device=scores.device)


@dataclass(frozen=True)
class Global(Allocation):
    """All heads of all layers compete for the request's pages (KV-Compress).

    Within a head tokens are sorted by ascending score; the cost of freeing its i-th page is the score of the
    last token that must go for it. The cheapest pages over all layers and heads are freed, which minimises
    the total cost, since a head's costs ascend.

    Source: Rehg, "KV-Compress", arXiv 2410.00161.
    """

    name: ClassVar[str] = "global"
    paper: ClassVar[str] = "KV-Compress: block eviction over all heads (arXiv 2410.00161)"

    def _allocate(
        self, scores: Tensor, num_pages: int, page_size: int, smallest: Tensor, largest: Tensor
    ) -> Tensor:
        num_tokens = scores.shape[-1]
        cost = _ascending(scores.reshape(-1, num_tokens))[:, page_size - 1 :: page_size]
        page = torch.arange(cost.shape[1], device=scores.device)  # the first ones stand for nothing
        absent = cost.shape[1] - largest.view(-1, 1)
        may_go = (page >= absent) & (page < cost.shape[1] - smallest.view(-1, 1))
        head = may_go.nonzero()[:, 0]
        # Earlier heads win ties, so later ones free first; a head's own costs ascend, so whichever of its
        # pages are freed, their number is that of its cheapest.
        num_freed = int(largest.sum()) - num_pages
        freed = cost[may_go].flip(0).sort(stable=True).indices[:num_freed]
        freed_of = torch.bincount(head.flip(0)[freed], minlength=smallest.numel())
        return largest - freed_of.view_as(largest)


@dataclass(frozen=True)
class Pyramid(Allocation):
    """Lower layers keep more, on a straight line from the first to the last (PyramidKV).

    With b the mean budget of a head in tokens, the last layer gets ⌊b/β⌋ and the first 2b minus that; where
    the first would exceed all T tokens it gets T and the last 2b - T. Heads of a layer share evenly. Tokens
    become whole pages by largest remainder, so that exactly the budget is spent.

    Source: Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
    arXiv 2406.02069. Deviation: the authors' rounding to tokens overspends slightly.

    Attributes:
        beta: β, how much less than the mean the last layer gets, at least 1.
    """

    name: ClassVar[str] = "pyramid"
    paper: ClassVar[str] = "PyramidKV: Pyramidal Information Funneling (arXiv 2406.02069)"
    beta: int = 20

    def __post_init__(self) -> None:
        if self.beta < 1:
            raise ValueError(f"beta must be at least 1, got {self.beta}")

    def _allocate(
        self, scores: Tensor, num_pages: int, page_size: int, smallest: Tensor, largest: Tensor
    ) -> Tensor:
        layers, heads, num_tokens = scores.shape
        wanted = self.wanted(layers, heads, num_tokens, num_pages, page_size).to(scores.device)
        counts = whole_pages(wanted, num_pages, smallest.flatten(), largest.flatten())
        return counts.view_as(smallest)

    def wanted(self, layers: int, heads: int, num_tokens: int, num_pages: int, page_size: int) -> Tensor:
        """Pages that each head should have, `[L·H]` float64, before they are made whole."""
        mean = num_pages * page_size / (layers * heads)
        last = float(mean // self.beta)
        first = 2 * mean - last
        if first >= num_tokens:
            first, last = float(num_tokens), 2 * mean - num_tokens
        line = torch.linspace(first, last, layers, dtype=torch.float64, device="cpu")
        if layers == 1:
            line = torch.full_like(line, mean)
        return (line / page_size).repeat_interleave(heads)


@dataclass(frozen=True)
class Profile(Allocation):
    """Each head gets what it needed when the model was measured on calibration text.

    A head wants its share of the profile times the mean. What a head cannot take, because it has no more
    tokens or less than its minimum, is shared by the others in proportion. Shares are those of the fraction
    of the heads' tokens that the budget pays for, linear in its logarithm between the measured ones.

    Source: Zweiger et al., "Fast KV Compaction via Attention Matching", arXiv 2602.16284, head budgets.

    Attributes:
        path: a file that `vllm-kvcompress calibrate` wrote, or the name of one that comes with the package.
    """

    name: ClassVar[str] = "profile"
    paper: ClassVar[str] = "Fast KV Compaction via Attention Matching: head budgets (arXiv 2602.16284)"
    argument: ClassVar[str | None] = "path"
    path: str = ""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("allocation profile needs a head profile; write allocation=profile:PATH")
        _ = self.profile  # a file that cannot be read is refused here

    @functools.cached_property
    def profile(self) -> profiles.HeadProfile:
        """The file's content, which stays this allocation's if the file changes."""
        return profiles.load(self.path)

    def check_model(self, num_layers: int, num_kv_heads: int) -> None:
        layers, heads = self.profile.shape
        if (num_layers, num_kv_heads) != (layers, heads):
            raise ValueError(
                f"the head profile {self.path} is for {layers} layers of {heads} KV heads, but each worker "
                f"of this engine has {num_layers} of {num_kv_heads}; use a profile of this model, without "
                "tensor or pipeline parallelism"
            )

    def _allocate(
        self, scores: Tensor, num_pages: int, page_size: int, smallest: Tensor, largest: Tensor
    ) -> Tensor:
        self.check_model(*smallest.shape)
        low, high = smallest.flatten(), largest.flatten()
        (wanted,) = self.wanted(torch.tensor([num_pages], device=low.device), low[None], high[None])
        return whole_pages(wanted, num_pages, low, high).view_as(smallest)

    def wanted(self, num_pages: Tensor, smallest: Tensor, largest: Tensor) -> Tensor:
        """Pages that each head should have, before they are made whole; the host reads none of them.

        Args:
            num_pages: `[J]` int64, of each request.
            smallest: `[J, L·H]` int64.
            largest: `[J, L·H]` int64.

        Returns:
            `[J, L·H]` float64.
        """
        device = num_pages.device
        if device not in self._on_devices:
            self._on_devices[device] = self.profile.to(device)
        shares = self._on_devices[device].at(num_pages / largest.sum(1)).flatten(1)
        return in_proportion(shares, num_pages, smallest, largest)

    def importance(self, budget: float, device: torch.device) -> Tensor:
        """What heads' losses may be weighted with, `[L, H]` float64: their shares at a budget."""
        return self.profile.to(device).at(torch.tensor([budget], device=device))[0]

    @functools.cached_property
    def _on_devices(self) -> dict[torch.device, profiles.HeadProfile]:
        return {}


def in_proportion(shares: Tensor, totals: Tensor, smallest: Tensor, largest: Tensor) -> Tensor:
    """Split totals in proportion to shares; what a bound takes from or adds to a head, the others share.

        wanted_h = clamp(level·share_h, smallest_h, largest_h),  Σ wanted = total

    Args:
        shares: `[J, heads]` float64, not negative; a head without any still takes what no other head can.
        totals: `[J]`, Σ smallest <= total <= Σ largest of each row.
        smallest: `[J, heads]` int64.
        largest: `[J, heads]` int64.

    Returns:
        `[J, heads]` float64.
    """
    shares = shares.clamp(min=1e-6 * shares.amax(1, keepdim=True))
    # Each sum is piecewise linear in the level, and bends where a head meets a bound.
    levels = torch.cat([smallest / shares, largest / shares], 1).sort(1).values
    bounds = smallest[:, None], largest[:, None]
    filled = (levels[:, :, None] * shares[:, None]).clamp(*bounds).sum(2)
    level = _interpolated(totals[:, None].to(filled.dtype), filled, levels)
    return (level * shares).clamp(smallest, largest)


def _interpolated(at: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Row by row, what is at `at` if `values` are at the ascending `known`; constant beyond the ends."""
    after = torch.searchsorted(known, at).clamp(1, known.shape[1] - 1)
    x0, x1, y0, y1 = (of.gather(1, index) for of in (known, values) for index in (after - 1, after))
    return torch.lerp(y0, y1, ((at - x0) / (x1 - x0).clamp(min=1e-300)).clamp(0, 1))


def whole_pages(wanted: Tensor, num_pages: int, smallest: Tensor, largest: Tensor) -> Tensor:
    """Round wanted pages to whole ones that sum to `num_pages`, each between `smallest` and `largest`.

    Largest remainder: whole parts first; then the pages still missing go to (or surplus ones come from) the
    heads that are furthest below (above) what they wanted, one page at a time; on ties the first head gains
    and the last one loses. This minimises Σ (count - wanted)² within the bounds.

    Args:
        wanted: `[heads]` float.
        num_pages: what the counts sum to; Σ smallest <= num_pages <= Σ largest.
        smallest: `[heads]` int64.
        largest: `[heads]` int64.

    Returns:
        `[heads]` int64.
    """
    # On plain numbers: they are a few hundred at most, and a tensor operation per page would cost more.
    counts = _whole_pages(wanted.tolist(), num_pages, smallest.tolist(), largest.tolist())
    return torch.tensor(counts, device=wanted.device)


def _whole_pages(want: list[float], num_pages: int, low: list[int], high: list[int]) -> list[int]:
    counts = [min(max(int(w), least), most) for w, least, most in zip(want, low, high, strict=True)]
    missing = num_pages - sum(counts)
    step = 1 if missing > 0 else -1
    heads = [h for h, c in enumerate(counts) if (c < high[h] if missing > 0 else c > low[h])]
    heap = [((counts[h] - want[h]) * step, h * step) for h in heads]
    heapq.heapify(heap)
    for _ in range(abs(missing)):
        excess, signed = heapq.heappop(heap)
        head = signed * step
        counts[head] += step
        if low[head] < counts[head] < high[head]:
            heapq.heappush(heap, (excess + 1, signed))
    return counts


ALLOCATIONS: dict[str, type[Allocation]] = {
    cls.name: cls for cls in (Uniform, Adaptive, Pyramid, Global, Profile)
}


def get_allocation(name: str) -> type[Allocation]:
    """The allocation of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in ALLOCATIONS:
        raise ValueError(f"unknown allocation {name!r}; use one of {', '.join(ALLOCATIONS)}")
    return ALLOCATIONS[name]


def select(scores: Tensor, counts: Tensor, page_size: int) -> Tensor:
    """The tokens that fill each head's pages: its highest-scored ones, in position order.

    Args:
        scores: `[L, H, T]` float32, higher = keep; the earlier token wins a tie, NaN counts as the lowest.
            A head with fewer tokens has -inf before its first one, as in `allocate`.
        counts: `[L, H]` int64, pages of each head, 1 to T / page_size.
        page_size: tokens per page.

    Returns:
        `[pages, page_size]` int64 token positions: run after run in (layer, head) order, ascending in each.
    """
    num_tokens = scores.shape[-1]
    flat = _comparable(scores).reshape(-1, num_tokens)
    kept = counts.reshape(-1, 1).to(flat.device) * page_size
    threshold = _ascending(flat).gather(1, num_tokens - kept)
    keep = flat > threshold
    tied = flat == threshold
    missing = kept - keep.sum(1, keepdim=True)
    keep |= tied & (tied.cumsum(1, dtype=torch.int32) <= missing)
    return keep.nonzero()[:, 1].view(-1, page_size)


def _comparable(scores: Tensor) -> Tensor:
    """The scores with NaN as -inf: one broken head must not break the order, and with it the page counts."""
    # The sum is NaN if any score is (or if infinities of both signs meet, then nothing changes).
    return torch.where(scores.isnan(), -torch.inf, scores) if scores.sum().isnan() else scores


def _ascending(rows: Tensor) -> Tensor:
    """Each row's values sorted. NumPy's vectorised sort is some 20 times faster than torch's on CPU."""
    if rows.is_cpu:
        return torch.from_numpy(np.sort(rows.numpy(), axis=-1))
    return rows.sort(dim=-1).values
