"""How many pages each head gets, and which tokens fill them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


class Allocation(ABC):
    """Splits a request's page budget over its layers and heads. Subclasses are dataclasses of options."""

    name: ClassVar[str]
    paper: ClassVar[str]

    def allocate(self, scores: Tensor, num_pages: int, page_size: int) -> Tensor:
        """Decide each head's pages.

        Every head gets at least one page, which must hold its protected tokens, and at most T / page_size.

        Args:
            scores: `[L, H, T]` float32, higher = keep; +inf marks protected tokens. T is a multiple of
                `page_size`.
            num_pages: pages to spend, all of them.
            page_size: tokens per page.

        Returns:
            `[L, H]` int64, summing to `num_pages`.

        Raises:
            ValueError: the budget is too small for one page per head and the protected tokens, or larger
                than the heads can fill.
        """
        layers, heads, num_tokens = scores.shape
        largest = num_tokens // page_size
        # The protected tokens are the same for every head (the sinks), so one head tells.
        protected = int(torch.isposinf(scores[0, 0]).sum())
        smallest = max(1, -(-protected // page_size))
        if not layers * heads * smallest <= num_pages <= layers * heads * largest:
            raise ValueError(
                f"{num_pages} pages cannot be split over {layers}x{heads} heads that take {smallest} to "
                f"{largest} pages each"
            )
        return self._allocate(scores, num_pages, page_size, smallest)

    @abstractmethod
    def _allocate(self, scores: Tensor, num_pages: int, page_size: int, smallest: int) -> Tensor:
        """As `allocate`, arguments checked; `smallest` pages are every head's minimum."""


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same number of pages for every head; a remainder goes to the first ones."""

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "the common default"

    def _allocate(self, scores: Tensor, num_pages: int, page_size: int, smallest: int) -> Tensor:
        layers, heads, _ = scores.shape
        each, remainder = divmod(num_pages, layers * heads)
        counts = torch.full((layers * heads,), each)
        counts[:remainder] += 1
        return counts.view(layers, heads)


@dataclass(frozen=True)
class Adaptive(Allocation):
    """Heads of one layer compete for the layer's tokens (Ada-KV).

    The scores of a layer's heads are pooled, its top H·b tokens are taken and counted per head: c_h. The
    head's budget is (1-α)·c_h + α·b tokens. Tokens become whole pages by largest remainder, within each
    head's minimum and maximum, so that the layer spends exactly its share.

    Source: Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM
    Inference", arXiv 2407.11550, Algorithm 1.

    Attributes:
        alpha: α, the share of the budget that stays uniform, 0 to 1.
    """

    name: ClassVar[str] = "adaptive"
    paper: ClassVar[str] = "Ada-KV: Adaptive Budget Allocation (arXiv 2407.11550)"
    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, got {self.alpha}")

    def _allocate(self, scores: Tensor, num_pages: int, page_size: int, smallest: int) -> Tensor:
        layers, heads, num_tokens = scores.shape
        per_layer = Uniform()._allocate(scores[:, :1], num_pages, page_size, smallest).flatten().tolist()
        counts = torch.empty(layers, heads, dtype=torch.int64)
        for layer, pages in enumerate(per_layer):
            # Sorted stably rather than by topk, so that ties fall the same way everywhere.
            order = scores[layer].flatten().sort(descending=True, stable=True).indices
            chosen = torch.bincount(order[: pages * page_size] // num_tokens, minlength=heads)
            tokens = (1 - self.alpha) * chosen + self.alpha * pages * page_size / heads
            counts[layer] = whole_pages(tokens / page_size, pages, smallest, num_tokens // page_size)
        return counts


@dataclass(frozen=True)
class Global(Allocation):
    """All heads of all layers compete for the request's pages (KV-Compress).

    Within a head tokens are sorted by ascending score; the cost of freeing its i-th page is the score of the
    last token that must go for it. The cheapest pages over all layers and heads are freed, which minimises
    the total cost, since a head's costs ascend.

    Source: Rehg, "KV-Compress", arXiv 2410.00161, §3.3 and Algorithm 1.
    """

    name: ClassVar[str] = "global"
    paper: ClassVar[str] = "KV-Compress: block eviction over all heads (arXiv 2410.00161)"

    def _allocate(self, scores: Tensor, num_pages: int, page_size: int, smallest: int) -> Tensor:
        layers, heads, num_tokens = scores.shape
        largest = num_tokens // page_size
        ascending = scores.view(layers * heads, num_tokens).sort(dim=-1).values
        cost = ascending[:, page_size - 1 :: page_size][:, : largest - smallest]
        num_freed = layers * heads * largest - num_pages
        # Stable, and a head's own costs ascend, so the freed pages of a head are always its cheapest.
        freed = cost.flatten().sort(stable=True).indices[:num_freed]
        freed_of = torch.bincount(freed // max(cost.shape[1], 1), minlength=layers * heads)
        return (largest - freed_of).view(layers, heads)


def whole_pages(wanted: Tensor, num_pages: int, smallest: int, largest: int) -> Tensor:
    """Round wanted pages to whole ones that sum to `num_pages`, each between `smallest` and `largest`.

    Whole parts first; then the pages still missing go to (or surplus ones come from) the heads that are
    furthest below (above) what they wanted, one page at a time, the first head on ties.

    Args:
        wanted: `[heads]` float.

    Returns:
        `[heads]` int64.
    """
    counts = wanted.floor().to(torch.int64).clamp(smallest, largest)
    while (missing := num_pages - int(counts.sum())) != 0:
        step = 1 if missing > 0 else -1
        room = counts < largest if missing > 0 else counts > smallest
        deficit = torch.where(room, (wanted - counts) * step, -torch.inf)
        counts[deficit.argmax()] += step
    return counts


ALLOCATIONS: dict[str, type[Allocation]] = {cls.name: cls for cls in (Uniform, Adaptive, Global)}


def select(scores: Tensor, counts: Tensor, page_size: int) -> Tensor:
    """The tokens that fill each head's pages: its highest-scored ones, in position order.

    Args:
        scores: `[L, H, T]` float32, higher = keep; the earlier token wins a tie.
        counts: `[L, H]` int64, pages of each head.
        page_size: tokens per page.

    Returns:
        `[pages, page_size]` int64 token positions: run after run in (layer, head) order, ascending within.
    """
    num_tokens = scores.shape[-1]
    flat = scores.reshape(-1, num_tokens)
    order = flat.sort(dim=-1, descending=True, stable=True).indices
    # `in_rank[h, r]` says that the token of rank r stays; scattered back it says so of the token itself.
    in_rank = torch.arange(num_tokens) < counts.view(-1, 1) * page_size
    keep = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, in_rank)
    return keep.nonzero()[:, 1].view(-1, page_size)
