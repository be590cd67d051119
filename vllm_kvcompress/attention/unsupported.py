"""Attention layers that are vLLM's own affair, and those that cannot be served compacted."""

from collections.abc import Collection
from typing import ClassVar

from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType
from vllm.v1.kv_cache_interface import KVQuantMode, get_kv_quant_mode

from vllm_kvcompress.config import KVCompressionError


def slides(window: int | None, longest: int) -> bool:
    """Whether a layer that attends over so many tokens, if it is bounded, slides a window.

    One no shorter than the longest request is full attention.
    """
    return window is not None and window < longest


class OwnLayer:
    """Put before an implementation of ours: layers that slide a window are made as vLLM's own.

    Attributes:
        stock: what these are made as.
        PLACE: the attributes that say where a layer's pages are.
        layer_index: of the grid's layers, the one whose cache it reads; set once the cache exists.
        is_observed: whether its queries are noted: not those of a layer that reads another one's cache.
    """

    stock: ClassVar[type[AttentionImpl]]
    PLACE: ClassVar[tuple[str, ...]]
    layer_index: int
    is_observed = True

    def __new__(
        cls, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, *args, **kwargs
    ):
        given = num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, *args
        longest = get_current_vllm_config().model_config.max_model_len
        return cls.stock(*given, **kwargs) if slides(sliding_window, longest) else super().__new__(cls)

    def share(self, owner: "OwnLayer") -> None:
        """Read the cache of another layer, which is written by that one."""
        for name in self.PLACE:
            setattr(self, name, getattr(owner, name))
        self.is_observed = False


def refuse_layer(impl: AttentionImpl, reads: Collection[str] = ()) -> None:
    """Refuse what attention over kept tokens would compute wrongly.

    Args:
        impl: a layer's implementation.
        reads: quantized caches that it reads, as `--kv-cache-dtype` has them.

    Raises:
        KVCompressionError: one line that names the feature and what to do.
    """
    unsupported = {
        "ALiBi": impl.alibi_slopes is not None,
        f"the quantized cache {impl.kv_cache_dtype}": get_kv_quant_mode(impl.kv_cache_dtype)
        != KVQuantMode.NONE
        and impl.kv_cache_dtype not in reads,
        f"{impl.attn_type} attention": impl.attn_type != AttentionType.DECODER,
    }
    for feature, present in unsupported.items():
        if present:
            raise KVCompressionError(
                f"kv-compression does not support {feature}, which this model uses; "
                "serve it without --kv-compression"
            )
