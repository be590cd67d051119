"""What front ends must know of the cache groups that are compacted, where there are others or several."""

from vllm.config import VllmConfig

GROUP = "kv_compression_group"  # in `additional_config`, once the engine has its groups


def block_size(vllm_config: VllmConfig) -> int:
    """Tokens of a block that is compacted; vLLM's own number is that of the group that has fewest."""
    return _group(vllm_config).get("block_size", vllm_config.cache_config.block_size)


def blocks_beside(vllm_config: VllmConfig) -> int:
    """Blocks that a request holds at most of groups that are not compacted, which have the same pool."""
    return _group(vllm_config).get("beside", 0)


def num_groups(vllm_config: VllmConfig) -> int:
    """Groups that are compacted: a request has blocks of its own in each."""
    return _group(vllm_config).get("groups", 1)


def compacted_shape(vllm_config: VllmConfig) -> tuple[int, int] | None:
    """Layers of the model that are compacted and their KV heads, on a rank, where others are not; None if
    that is not known."""
    group = _group(vllm_config)
    return (group["layers"], group["heads"]) if "layers" in group else None


def tokens_of_page(vllm_config: VllmConfig) -> int:
    """Tokens of a page; fewer than a block's where vLLM enlarges blocks for the sake of states."""
    return _group(vllm_config).get("tokens_of_page", block_size(vllm_config))


def shares_contexts(vllm_config: VllmConfig) -> bool:
    """Whether a repetition can read its context in its owner's blocks: states move on with the owner."""
    return "states" not in _group(vllm_config)


def _group(vllm_config: VllmConfig) -> dict[str, int]:
    return (vllm_config.additional_config or {}).get(GROUP, {})
