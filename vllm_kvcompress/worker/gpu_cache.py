"""The paged cache on a GPU, read and rewritten by our Triton kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcompress.allocation import Adaptive, Allocation, Global, Profile, Pyramid, Uniform
from vllm_kvcompress.kernels.networks import network_scores
from vllm_kvcompress.kernels.pages import gather_pages, move_pages, scatter_pages
from vllm_kvcompress.kernels.scores import rank_columns, window_scores
from vllm_kvcompress.kernels.selection import adaptive_counts, global_counts, select_columns, whole_pages
from vllm_kvcompress.policies.base import LayerObservation, Policy
from vllm_kvcompress.policies.foresight import Foresight
from vllm_kvcompress.policies.window import WindowPolicy
from vllm_kvcompress.requests.cache import Kept, PagedCache
from vllm_kvcompress.requests.float8 import by_row


@dataclass(frozen=True)
class PlainCache(PagedCache):
    """Pages in which keys and values lie in token order.

    Nothing here waits for the device, but for allocations other than those named in `allocate`.

    Attributes:
        keys: `[S·B·H, N, D]`, a view of the cache; bytes, if it is quantized.
        values: `[S·B·H, N, D]`, likewise, with the same strides.
        whole: `[S·B·H, N·2D]`, both, in the order in which they lie.
    """

    keys: Tensor
    values: Tensor
    whole: Tensor
    slice_bytes: ClassVar[int] = 256 * 2**20

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def head_size(self) -> int:
        return self.keys.shape[2]

    @property
    def content(self) -> Tensor:
        return self.whole.view(torch.uint8)

    @property
    def block_bytes(self) -> int:
        return 2 * self.grid.pages_per_block * self.keys[0].nbytes

    def on_device(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return self._sent(torch.tensor(numbers, dtype=torch.int64))

    def read_keys(self, pages: Tensor, layers: slice | None = None) -> Tensor:
        keys = self.keys[pages.clamp(min=0)].flatten(1, 2)
        return keys if self.float8 is None else self._plain(keys, self.float8.key_scales, layers)

    def read_values(self, pages: Tensor, layers: slice | None = None) -> Tensor:
        values = self.values[pages.clamp(min=0)].flatten(1, 2)
        return values if self.float8 is None else self._plain(values, self.float8.value_scales, layers)

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
        assert isinstance(policy, WindowPolicy)
        layers, jobs = len(scales), len(ends)
        keys, scale = self.keys, self._of_layers(scales)
        if self.float8 is not None:
            keys, scale = keys.view(self.float8.dtype), scale * self.float8.key_scales
        each_end = None if len(set(ends)) == 1 else self.on_device(ends).repeat_interleave(layers)
        return window_scores(
            queries,
            keys,
            pages,
            max(ends),
            num_scored,
            scale.repeat(jobs),
            self._of_layers(soft_caps).repeat(jobs) if any(soft_caps) else None,
            policy.squared,
            policy.kernel_size,
            policy.pooling,
            policy.reduction,
            each_end,
            sink_logits=None if sinks is None else sinks.repeat(jobs, 1),
        )

    def scores_tokens(self, policy: Policy) -> bool:
        return type(policy) is Foresight  # one derived from it may score otherwise

    def token_scores(
        self,
        policy: Policy,
        pages: Tensor,
        layers: slice,
        seen: LayerObservation,
    ) -> Tensor:
        assert isinstance(policy, Foresight) and seen.rotary is not None
        keys, values, dtype, scales = self.keys, self.values, self.keys.dtype, None
        if (float8 := self.float8) is not None:
            keys, values, dtype = keys.view(float8.dtype), values.view(float8.dtype), float8.plain
            of_layers = float8.key_scales[layers], float8.value_scales[layers]
            scales = by_row(of_layers[0], len(pages)), by_row(of_layers[1], len(pages))
        network = policy.network_on(self.device, dtype)
        found = network_scores(
            keys,
            values,
            pages,
            seen.num_scored,
            network.of(seen.layers, seen.first_head, len(pages) // len(seen.layers)),
            seen.rotary.cos_sin,
            seen.rotary.is_neox,
            seen.rotary.first,
            None if seen.kept_positions is None else seen.kept_positions(),
            scales,
        )
        return policy.pooled(found, seen.padding)

    def rank(self, scores: Tensor, padding: Tensor | None, sinks: int) -> None:
        if padding is None:
            padding = torch.zeros(len(scores), dtype=torch.int64, device=self.device)
        rank_columns(scores, padding, sinks)

    def allocate(
        self,
        allocation: Allocation,
        scores: Tensor,
        num_pages: list[int] | Tensor,
        widths: list[int],
        sinks: int,
        capacity: Tensor | None,
    ) -> Tensor:
        block_size, (jobs, layers, heads, width) = self.grid.block_size, scores.shape
        if capacity is None:
            capacity = torch.full((jobs, layers, heads), width // block_size, device=self.device)
        smallest = capacity.clamp(max=max(1, -(-sinks // block_size)))
        pages = num_pages if isinstance(num_pages, Tensor) else self.on_device(num_pages)
        kind = type(allocation)
        if kind is Global:
            return global_counts(scores, pages, block_size, smallest, capacity)
        if kind is Adaptive:
            return adaptive_counts(scores, pages, block_size, smallest, capacity, allocation.alpha)
        bounds = smallest.flatten(1), capacity.flatten(1)
        if kind is Uniform:
            return whole_pages(None, pages, *bounds).view_as(capacity)
        assert not isinstance(num_pages, Tensor), "only the global allocation goes with a threshold"
        if kind is Pyramid:
            each = zip(widths, num_pages, strict=True)
            wanted = [allocation.wanted(layers, heads, own, total, block_size) for own, total in each]
            return whole_pages(self._sent(torch.stack(wanted)), pages, *bounds).view_as(capacity)
        if isinstance(allocation, Profile):
            allocation.check_model(layers, heads)
            return whole_pages(allocation.wanted(pages, *bounds), pages, *bounds).view_as(capacity)
        return super().allocate(allocation, scores, num_pages, widths, sinks, capacity)

    def numbers(self, computed: Tensor) -> list[int] | Tensor:
        return computed

    def select(
        self, scores: Tensor, counts: Tensor, num_pages: int, exact: bool = True
    ) -> tuple[Tensor, Tensor]:
        return select_columns(scores, counts, self.grid.block_size, num_pages, exact)

    def _of_layers(self, numbers: list[float]) -> Tensor:
        return self._sent(torch.tensor(numbers, dtype=torch.float32))

    def _sent(self, small: Tensor) -> Tensor:
        """A tensor of the host on the device, without waiting for the device."""
        if self.device.type != "cuda":
            return small.to(self.device)
        return small.pin_memory().to(self.device, non_blocking=True)
