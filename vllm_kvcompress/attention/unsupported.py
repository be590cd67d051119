"""Attention layers that are vLLM's own affair, and those that cannot be served compacted."""

from collections.abc import Collection
from typing import ClassVar

from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType
from vllm.v1.kv_cache_interface import KVQuantMode, get_kv_quant_mode

from vllm_kvcompress.config import KVCompressionError


def slides(window: int | None) -> bool:
    """Whether a layer that attends over so many tokens slides a window: no longer one is full attention.

    While a configuration is current, as it is while layers are made.
    """
    return window is not None and window < get_current_vllm_config().model_config.max_model_len


class OwnLayer:
    """Put before an implementation of ours: layers that slide a window are made as vLLM's own.

    Attributes:
        stock: what these are made as.
    """

    stock: ClassVar[type[AttentionImpl]]

    def __new__(
        cls, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, *args, **kwargs
    ):
        given = num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, *args
        return cls.stock(*given, **kwargs) if slides(sliding_window) else super().__new__(cls)


def refuse_layer(impl: AttentionImpl, reads: Collection[str] = ()) -> None:
    """Refuse what attention over kept tokens would compute wrongly.

    Args:
        impl: a layer's implementation.
        reads: quantized caches that it reads, as `--kv-cache-dtype` has them.

    Raises:
        KVCompressionError: one line that names the feature and what to do.
    """
    unsupported = {
        "attention sinks": impl.sinks is not None,
        "ALiBi": impl.alibi_slopes is not None,
        f"the quantized cache {impl.kv_cache_dtype}": get_kv_quant_mode(impl.kv_cache_dtype)
        != KVQuantMode.NONE
        and impl.kv_cache_dtype not in reads,
        "cross-layer KV sharing": impl.kv_sharing_target_layer_name is not None,
        f"{impl.attn_type} attention": impl.attn_type != AttentionType.DECODER,
    }
    for feature, present in unsupported.items():
        if present:
            raise KVCompressionError(
                f"kv-compression does not support {feature}, which this model uses; "
                "serve it without --kv-compression"
            )
