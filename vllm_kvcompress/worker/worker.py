"""vLLM's workers, extended: they compact before they compute."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_kvcompress.attention.cpu import CompressedCPUAttentionBackend, CompressedCPUAttentionImpl
from vllm_kvcompress.attention.cpu_pages import learn_packing
from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.paging.job import CompressionStep
from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.worker.cache import PagedCache
from vllm_kvcompress.worker.compactor import Compactor
from vllm_kvcompress.worker.layers import layer_attention
from vllm_kvcompress.worker.observer import Observer
from vllm_kvcompress.worker.state import CompressionState, RunnerV1Rows


class CompressionCPUWorker(CPUWorker):
    """CPU worker whose attention layers can read compacted requests."""

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        with _backend_override(AttentionBackendEnum.CPU_ATTN, CompressedCPUAttentionBackend):
            super().load_model(load_dummy_weights=load_dummy_weights)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        (group,) = self.model_runner.kv_cache_config.kv_cache_groups
        context = self.compilation_config.static_forward_context
        layers: list[Attention] = sorted(
            (context[name] for name in group.layer_names), key=lambda layer: layer.kv_cache.data_ptr()
        )
        impl = layers[0].impl
        num_blocks, num_heads, block_size, _ = layers[0].kv_cache.shape
        grid = PageGrid(len(layers), num_blocks, num_heads, block_size)
        pages = _every_page([layer.kv_cache for layer in layers])
        for index, layer in enumerate(layers):
            assert isinstance(layer.impl, CompressedCPUAttentionImpl)
            layer.impl.layer_index = index
            layer.impl.pages = pages.view(-1, 1, 2 * block_size, impl.head_size)

        ((attention_group,),) = self.model_runner.attn_groups
        builder = attention_group.get_metadata_builder(0)
        dtype = layers[0].kv_cache.dtype
        packing = learn_packing(builder.isa, block_size, impl.head_size, dtype)
        cache = PagedCache(grid, pages.view(-1, 2, block_size * impl.head_size), *packing)
        model = self.model_runner.get_model()
        constants = [layer_attention(model, layer) for layer in layers]
        observer = Observer(cache, constants, impl.num_heads, impl.head_size, dtype, tables={})
        self.compression = CompressionState(RunnerV1Rows(self.model_runner), observer)
        builder.state = self.compression
        self.compactor = Compactor(cache, constants)

    def execute_model(self, scheduler_output: SchedulerOutput):
        step: CompressionStep = scheduler_output.kv_compression
        state = self.compression
        for request_id in (*step.released, *scheduler_output.finished_req_ids):
            state.forget(request_id)
        for observation in step.observations:
            state.observer.watch(observation.request_id, observation.config.build_policy())
        for repetition in step.repetitions:
            state.observer.watch_repetition(repetition)
        for job in step.jobs:
            observed = state.observer.of(job.request_id)
            assert (observed is None) == (not job.config.observes)
            table = self.compactor.run(job, state.tables.get(job.request_id), observed)
            state.tables[job.request_id] = table
            if job.config.interval is None:
                state.observer.forget(job.request_id)
        return super().execute_model(scheduler_output)


@contextmanager
def _backend_override(backend: AttentionBackendEnum, cls: type) -> Iterator[None]:
    """Let the layers built inside choose `cls` where they would choose `backend`.

    Undone afterwards, so that another engine in this process still gets vLLM's own.
    """
    register_backend(backend, f"{cls.__module__}.{cls.__qualname__}")
    _cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        backend.clear_override()
        _cached_get_attn_backend.cache_clear()


def _every_page(caches: list[torch.Tensor]) -> torch.Tensor:
    """One tensor `[L·B·H, N·2D]` over the caches `[B, H, N, 2D]` of all layers, in address order."""
    first = caches[0]
    stride = first.numel() * first.element_size()
    contiguous = all(
        cache.is_contiguous() and cache.data_ptr() == first.data_ptr() + index * stride
        for index, cache in enumerate(caches)
    )
    if not contiguous:
        raise KVCompressionError(
            "kv-compression: the KV cache of this model is not one [layer, block, head] array; "
            "run it without --kv-compression"
        )
    num_blocks, num_heads, block_size, content = first.shape
    num_pages = len(caches) * num_blocks * num_heads
    return first.as_strided((num_pages, block_size * content), (block_size * content, 1))
