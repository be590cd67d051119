"""FlashAttention for the rows that are not compacted."""

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from vllm_kvcompress.attention.gpu import (
    CompressedAttentionImpl,
    CompressedBackend,
    CompressedMetadataBuilder,
)


class _FlashBuilder(CompressedMetadataBuilder, FlashAttentionBackend.get_builder_cls()):
    pass


class _FlashImpl(CompressedAttentionImpl, FlashAttentionBackend.get_impl_cls()):
    stock = FlashAttentionBackend.get_impl_cls()


class CompressedFlashAttentionBackend(CompressedBackend, FlashAttentionBackend):
    """vLLM's FlashAttention backend whose blocks may be compacted."""

    stock = FlashAttentionBackend

    @staticmethod
    def get_impl_cls() -> type[_FlashImpl]:
        return _FlashImpl

    @staticmethod
    def get_builder_cls() -> type[_FlashBuilder]:
        return _FlashBuilder
