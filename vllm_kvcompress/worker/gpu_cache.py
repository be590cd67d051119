"""The paged cache on a GPU, read and rewritten by our Triton kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcompress.allocation import Adaptive, Allocation, Global, Pyramid, Uniform
from vllm_kvcompress.kernels.pages import gather_pages, move_pages, scatter_pages
from vllm_kvcompress.kernels.scores import window_scores
from vllm_kvcompress.kernels.selection import adaptive_counts, global_counts, select_columns, whole_pages
from vllm_kvcompress.policies.base import LayerObservation, Policy
from vllm_kvcompress.policies.window import WindowPolicy
from vllm_kvcompress.requests.cache import Kept, PagedCache


@dataclass(frozen=True)
class PlainCache(PagedCache):
    """Pages in which keys and values lie in token order.

    Nothing here waits for the device, but for allocations other than those named in `allocate`.

    Attributes:
        keys: `[L·B·H, N, D]`, a view of the cache.
        values: `[L·B·H, N, D]`, likewise, with the same strides.
    """

    keys: Tensor
    values: Tensor
    slice_bytes: ClassVar[int] = 256 * 2**20

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def head_size(self) -> int:
        return self.keys.shape[2]

    def on_device(self, numbers: Sequence[int]) -> Tensor:
        return self._sent(torch.tensor(numbers, dtype=torch.int64))

    def read_keys(self, pages: Tensor) -> Tensor:
        return self.keys[pages.clamp(min=0)].flatten(1, 2)

    def read_values(self, pages: Tensor) -> Tensor:
        return self.values[pages.clamp(min=0)].flatten(1, 2)

    def rewrite(self, kept: Kept, target: Tensor, overlaps: bool) -> None:
        source = kept.pages, kept.row, kept.columns
        if not overlaps:
            move_pages(self.keys, self.values, *source, target)
            return
        # The scheduler has large destinations beside what is read.
        staged = gather_pages(self.keys, self.values, *source)
        scatter_pages(*staged, self.keys, self.values, target)

    def scores_windows(self, policy: Policy) -> bool:
        return isinstance(policy, WindowPolicy)

    def window_scores(self, policy: Policy, pages: Tensor, observation: LayerObservation) -> Tensor:
        assert isinstance(policy, WindowPolicy)
        layers = observation.num_layers, -1
        queries = observation.queries.unflatten(1, layers).flatten(2, 3).transpose(0, 1)  # [l, w, Hq, D]
        cap = observation.logits_soft_cap
        return window_scores(
            queries,
            self.keys,
            pages,
            observation.keys.shape[1],
            observation.num_scored,
            torch.full((len(queries),), observation.scale, device=self.device),
            torch.full((len(queries),), cap, device=self.device) if cap else None,
            policy.squared,
            policy.kernel_size,
            policy.pooling,
            policy.reduction,
        )

    def allocate(
        self, allocation: Allocation, scores: Tensor, num_pages: int, sinks: int, capacity: Tensor | None
    ) -> Tensor:
        block_size, (layers, heads, width) = self.grid.block_size, scores.shape
        if capacity is None:
            capacity = torch.full((layers, heads), width // block_size, device=self.device)
        smallest = capacity.clamp(max=max(1, -(-sinks // block_size)))
        pages = torch.full((1,), num_pages, device=self.device)
        bounds = smallest[None].contiguous(), capacity[None].contiguous()
        flat = [bound.flatten(1) for bound in bounds]
        kind = type(allocation)
        if kind is Global:
            return global_counts(scores[None], pages, block_size, *bounds)[0]
        if kind is Adaptive:
            return adaptive_counts(scores[None], pages, block_size, *bounds, allocation.alpha)[0]
        if kind is Uniform:
            return whole_pages(None, pages, *flat).view_as(capacity)
        if kind is Pyramid:
            wanted = allocation.wanted(layers, heads, width, num_pages, block_size)
            return whole_pages(self._sent(wanted)[None], pages, *flat).view_as(capacity)
        return super().allocate(allocation, scores, num_pages, sinks, capacity)

    def select(self, scores: Tensor, counts: Tensor, num_pages: int) -> tuple[Tensor, Tensor]:
        return select_columns(scores.flatten(0, 1), counts.flatten(), self.grid.block_size, num_pages)

    def _sent(self, small: Tensor) -> Tensor:
        """A tensor of the host on the device, without waiting for the device."""
        if self.device.type != "cuda":
            return small.to(self.device)
        return small.pin_memory().to(self.device, non_blocking=True)
