"""The CPU worker. Importing vLLM's makes this process one without GPUs: it replaces parts of torch."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.kernels.cpu_records import compiled_steps
from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.requests.cache import PackedCache, PagedCache
from vllm_kvcompress.requests.cpu_pages import learn_packing
from vllm_kvcompress.requests.float8 import FLOAT8, Float8
from vllm_kvcompress.requests.latents import LatentCache
from vllm_kvcompress.worker.worker import CompressionWorker, every_page


class CompressionCPUWorker(CompressionWorker, CPUWorker):
    """CPU worker whose attention layers can read compacted requests."""

    backends = {
        AttentionBackendEnum.CPU_ATTN: "vllm_kvcompress.attention.cpu.CompressedCPUAttentionBackend",
        AttentionBackendEnum.CPU_MLA: "vllm_kvcompress.attention.cpu_mla.CompressedCPUMLABackend",
    }

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        runner, num_parts = self.model_runner, self._num_parts
        if num_parts == 1 or self.use_v2_model_runner:
            return
        # Blocks are zeroed before they hold anything: vLLM's Runner V1 on a CPU knows none that are split.
        zero, parts = runner._zero_block_ids, range(num_parts)
        runner._zero_block_ids = lambda ids: zero([id * num_parts + part for id in ids for part in parts])

    def make_cache(self, grid: PageGrid, layers: Sequence[Attention], builder: Any) -> PagedCache:
        pages, size = every_page(layers), layers[0].impl.head_size
        for index, layer in enumerate(layers):
            layer.impl.layer_index = index
        if self.model_config.use_mla:
            latents = pages.view(-1, grid.block_size, size)
            for layer in layers:
                layer.impl.pages, layer.impl.layer = latents, layer
            return LatentCache(grid, latents, latent_size=layers[0].impl.kv_lora_rank)
        for layer in layers:
            layer.impl.pages = pages.view(-1, 1, 2 * grid.block_size, size)
        stored, plain, cache_dtype = pages.dtype, self.model_config.dtype, builder.kv_cache_dtype
        float8 = None
        if cache_dtype in FLOAT8:
            key_scales = torch.tensor([layer._k_scale_float for layer in layers])
            value_scales = torch.tensor([layer._v_scale_float for layer in layers])
            float8 = Float8(FLOAT8[cache_dtype], plain, key_scales, value_scales)
            stored = plain
        config = KVCompressionConfig.parse(self.vllm_config.additional_config["kv_compression"])
        if config.record_format is not None:  # else once a request asks for one
            compiled_steps()
        builder.has_sinks = any(layer.impl.sinks is not None for layer in layers)
        packing = learn_packing(builder.isa, grid.block_size, size, stored, cache_dtype)
        return PackedCache(grid, pages.view(-1, 2, grid.block_size * size), *packing, float8=float8)
