"""The paged cache on a GPU, read and rewritten by our Triton kernels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.kernels.pages import gather_pages, move_pages, scatter_pages
from vllm_kvcompress.kernels.scores import pool_columns, window_columns
from vllm_kvcompress.policies.base import LayerObservation, Policy
from vllm_kvcompress.policies.window import WindowPolicy
from vllm_kvcompress.requests.cache import Kept, PagedCache

STAGED_BYTES = 256 * 2**20  # of a compaction in place; more waits in the host's memory


@dataclass(frozen=True)
class PlainCache(PagedCache):
    """Pages in which keys and values lie in token order.

    Attributes:
        keys: `[L·B·H, N, D]`, a view of the cache.
        values: `[L·B·H, N, D]`, likewise, with the same strides.
    """

    keys: Tensor
    values: Tensor

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def read(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        present = pages.clamp(min=0)
        return self.keys[present].flatten(1, 2), self.values[present].flatten(1, 2)

    def read_keys(self, pages: Tensor) -> Tensor:
        return self.keys[pages.clamp(min=0)].flatten(1, 2)

    def rewrite(self, kept: Sequence[Kept], target: Tensor, overlaps: bool) -> None:
        targets = target.split([len(layer.head) for layer in kept])
        if not overlaps:
            for layer, own in zip(kept, targets, strict=True):
                move_pages(self.keys, self.values, layer.pages, layer.head, layer.tokens, own)
            return
        num_bytes = 2 * target.numel() * self.keys[0].numel() * self.keys.element_size()
        stage = self.device if num_bytes <= STAGED_BYTES else torch.device("cpu")
        staged = []
        for layer in kept:
            pages = gather_pages(self.keys, self.values, layer.pages, layer.head, layer.tokens)
            staged.append([part.to(stage) for part in pages])
        for pages, own in zip(staged, targets, strict=True):
            scatter_pages(*(part.to(self.device) for part in pages), self.keys, self.values, own)

    def scores_windows(self, policy: Policy) -> bool:
        return isinstance(policy, WindowPolicy)

    def window_scores(self, policy: Policy, pages: Tensor, observation: LayerObservation) -> Tensor:
        assert isinstance(policy, WindowPolicy)
        queries = observation.queries.flatten(1, 2)
        width = observation.keys.shape[1]
        columns = window_columns(
            queries,
            self.keys,
            pages,
            width,
            width - len(queries),
            observation.scale,
            observation.logits_soft_cap,
            policy.squared,
        )
        pooling, reduction = policy.pooling, policy.reduction
        return pool_columns(columns, observation.num_scored, policy.kernel_size, pooling, reduction)
