"""The KV cache spec that selects our block manager; importing this module registers it with vLLM."""

from dataclasses import dataclass, replace
from typing import Self

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, MLAAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.paging.manager import CompactingManager
from vllm_kvcompress.plan import page_tokens, peak_blocks


@dataclass(frozen=True, kw_only=True)
class CompactableSpec(FullAttentionSpec):
    """Full attention whose blocks below a boundary may be replaced by compacted pages.

    Attributes:
        kernel_block_size: tokens of the blocks that attention kernels see, into which vLLM splits its own; a
            page is one head's share of such a block. None where blocks are not split.
    """

    kernel_block_size: int | None = None

    @classmethod
    def of(cls, spec: FullAttentionSpec) -> Self:
        """The same spec, managed by `CompactingManager`."""
        return replace_as(spec, cls)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        merged = super().merge(specs)  # of the fields that vLLM knows; or it says that they are not alike
        return replace(merged, kernel_block_size=specs[0].kernel_block_size)

    @property
    def tokens_of_page(self) -> int:
        """Tokens that a page holds raw."""
        return self.kernel_block_size or self.block_size

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of the longest request: less than `max_model_len` where requests never hold all they have."""
        longest = vllm_config.model_config.max_model_len
        config = KVCompressionConfig.parse(vllm_config.additional_config["kv_compression"])
        if config.when != "streaming":
            return super().max_memory_usage_bytes(vllm_config)
        beside = not current_platform.is_cpu()
        shape = self.tokens_of_page, self.head_size, self.dtype.itemsize
        in_page = page_tokens(config, self.block_size, *shape)
        return peak_blocks(config, longest, longest, self.block_size, beside, in_page) * self.page_size_bytes


@dataclass(frozen=True, kw_only=True)
class CompactableLatentSpec(CompactableSpec, MLAAttentionSpec):
    """Likewise of latents (MLA), of which a layer has one per token."""

    head_size_v: int = 0  # vLLM's own default for latents, not the one of keys and values


def compactable_groups(kv_cache_config: KVCacheConfig) -> list[int]:
    """Which of the groups are compacted, together; the others are vLLM's own affair.

    Raises:
        KVCompressionError: none is, or they are not alike.
    """
    groups = kv_cache_config.kv_cache_groups
    own = [index for index, group in enumerate(groups) if isinstance(group.kv_cache_spec, CompactableSpec)]
    what = None if own else "has none, or of several shapes"
    if any(groups[index].kv_cache_spec != groups[own[0]].kv_cache_spec for index in own):
        what = "has them of several shapes"
    elif any(groups[index].kv_cache_spec.page_size_padded is not None for index in own):
        what = "has them in blocks that are padded, as others are larger"
    if what is None:
        return own
    raise KVCompressionError(
        "kv-compression needs layers of full attention of one shape in vLLM's KV cache, "
        f"and this model {what}; serve it without --kv-compression"
    )


# vLLM registers its own specs lazily and only into an empty registry, so they must come first.
KVCacheSpecRegistry._ensure_registered()
for _spec in (CompactableSpec, CompactableLatentSpec):
    KVCacheSpecRegistry.register(_spec, CompactingManager, uniform_type_base_spec=FullAttentionSpec)
