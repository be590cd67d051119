"""The KV cache spec that selects our block manager; importing this module registers it with vLLM."""

from dataclasses import dataclass

from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_kvcompress.paging.manager import CompactingManager


@dataclass(frozen=True, kw_only=True)
class CompactableSpec(FullAttentionSpec):
    """Full attention whose blocks below a boundary may be replaced by compacted pages."""

    @classmethod
    def of(cls, spec: FullAttentionSpec) -> "CompactableSpec":
        """The same spec, managed by `CompactingManager`."""
        return replace_as(spec, cls)


# vLLM registers its own specs lazily and only into an empty registry, so they must come first.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(CompactableSpec, CompactingManager, uniform_type_base_spec=FullAttentionSpec)
