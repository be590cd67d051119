"""Attention layers that cannot be served compacted."""

from collections.abc import Collection

from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType
from vllm.v1.kv_cache_interface import KVQuantMode, get_kv_quant_mode

from vllm_kvcompress.config import KVCompressionError


def refuse_layer(impl: AttentionImpl, window: int | None, reads: Collection[str] = ()) -> None:
    """Refuse what attention over kept tokens would compute wrongly.

    Args:
        impl: a layer's implementation.
        window: tokens that it attends over, if it slides a window, which each backend stores in its own way.
            One no shorter than the longest request is full attention.
        reads: quantized caches that it reads, as `--kv-cache-dtype` has them.

    Raises:
        KVCompressionError: one line that names the feature and what to do.
    """
    unsupported = {
        "attention sinks": impl.sinks is not None,
        "ALiBi": impl.alibi_slopes is not None,
        "sliding-window attention": window is not None
        and window < get_current_vllm_config().model_config.max_model_len,
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
