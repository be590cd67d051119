"""Blocks that may be compacted, and what of them attention kernels see as a block."""

from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from vllm_kvcompress.paging.spec import CompactableSpec


class CompactableBlocks(AttentionBackend):
    """Put before a stock backend: its blocks may be compacted, and are split as their spec says."""

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return CompactableSpec.of(super().customize_spec(spec))

    @classmethod
    def get_supported_kernel_block_sizes(
        cls, kv_cache_spec: KVCacheSpec | None = None
    ) -> list[int | MultipleOf]:
        size = getattr(kv_cache_spec, "kernel_block_size", None)  # of a `CompactableSpec`
        return super().get_supported_kernel_block_sizes(kv_cache_spec) if size is None else [size]
