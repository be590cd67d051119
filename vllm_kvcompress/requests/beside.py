"""What layers that are not compacted have in their blocks: a prefix holds some of these as they are."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from vllm.v1.kv_cache_interface import KVCacheGroupSpec

from vllm_kvcompress.paging.job import parts_of


@dataclass(frozen=True)
class Beside:
    """A group of layers that slide a window, attend within chunks or keep a state, as one worker has it.

    Attributes:
        num_blocks: B, of the pool.
        caches: by name, `[B·P, ...]` of each layer, whose attention kernels see P blocks in one; one for each
            tensor of a state. None where all of the layers are on other pipeline ranks.
        layout: what a block is, and what it holds of each layer.
    """

    num_blocks: int
    caches: Mapping[str, Tensor]
    layout: str

    @classmethod
    def of(cls, group: KVCacheGroupSpec, layers: Mapping[str, Any], num_blocks: int) -> Self:
        """
        Args:
            group: vLLM's.
            layers: by name, those of them that have a cache of their own, on this rank.
            num_blocks: B.
        """
        caches = {}
        for name, layer in layers.items():
            own = layer.kv_cache
            parts = (own,) if isinstance(own, Tensor) else own
            caches |= {f"{name}.{number}": part for number, part in enumerate(parts)}
        shapes = [(name, str(cache.dtype), *cache.shape[1:]) for name, cache in caches.items()]
        return cls(num_blocks, caches, json.dumps([repr(group.kv_cache_spec), shapes]))

    def places(self, blocks: Sequence[int]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of each cache its name, itself, and which of its rows these blocks are, int64."""
        for name, cache in self.caches.items():
            rows = parts_of(blocks, len(cache) // self.num_blocks)
            yield name, cache, torch.tensor(rows, dtype=torch.int64, device=cache.device)
