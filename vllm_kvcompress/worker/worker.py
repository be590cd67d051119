"""vLLM's workers, extended: they compact before they compute."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_kvcompress.attention.cpu import CompressedCPUAttentionImpl
from vllm_kvcompress.attention.cpu_pages import learn_packing
from vllm_kvcompress.attention.gpu import CompressedAttentionImpl, RowArrays
from vllm_kvcompress.attention.runs import RunArrays
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.paging.job import CompressionStep, Job
from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.worker.cache import PackedCache, PagedCache
from vllm_kvcompress.worker.compactor import Compactor
from vllm_kvcompress.worker.gpu_cache import PlainCache
from vllm_kvcompress.worker.layers import layer_attention
from vllm_kvcompress.worker.observer import Observer, ring_shape
from vllm_kvcompress.worker.state import CompressionState, RunnerV1Rows, RunnerV2Rows

PROMPTS_AT_ONCE = 8  # whose query rings are taken from the memory for the cache


class CompressionWorker(Worker):
    """Put before a stock worker.

    Attributes:
        backends: what to choose where vLLM would choose a backend, as `module.Class`.
        compression: what is known of requests, shared with the attention builder.
        compactor: runs Jobs.
    """

    backends: ClassVar[Mapping[AttentionBackendEnum, str]]
    compression: CompressionState
    compactor: Compactor
    _serving = False

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        with _backend_overrides(self.backends):
            super().load_model(load_dummy_weights=load_dummy_weights)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        (group,) = self.model_runner.kv_cache_config.kv_cache_groups
        context = self.compilation_config.static_forward_context
        layers: list[Attention] = sorted(
            (context[name] for name in group.layer_names), key=lambda layer: layer.kv_cache.data_ptr()
        )
        impl, first = layers[0].impl, layers[0].kv_cache
        num_blocks, num_heads, block_size, _ = first.shape
        grid = PageGrid(len(layers), num_blocks, num_heads, block_size)
        pages = _every_page([layer.kv_cache for layer in layers])
        ((attention_group,),) = self.model_runner.attn_groups
        builder = attention_group.get_metadata_builder(0)
        for index, layer in enumerate(layers):
            layer.impl.layer_index = index

        cache: PagedCache
        if on_cpu := isinstance(impl, CompressedCPUAttentionImpl):
            for layer in layers:
                layer.impl.pages = pages.view(-1, 1, 2 * block_size, impl.head_size)
            packing = learn_packing(builder.isa, block_size, impl.head_size, first.dtype)
            cache = PackedCache(grid, pages.view(-1, 2, block_size * impl.head_size), *packing)
        elif not isinstance(impl, CompressedAttentionImpl):
            raise KVCompressionError(
                f"kv-compression cannot read the cache of {attention_group.backend.get_name()}; use "
                "--attention-backend FLASH_ATTN or TRITON_ATTN"
            )
        else:
            by_token = pages.view(-1, block_size, 2 * impl.head_size).split(impl.head_size, -1)
            cache = PlainCache(grid, *by_token)
            by_block = [part.unflatten(0, (len(layers), num_blocks, num_heads)) for part in by_token]
            for layer in layers:
                layer.impl.keys, layer.impl.values = by_block

        model = self.model_runner.get_model()
        constants = [layer_attention(model, layer) for layer in layers]
        observer = Observer(
            cache, constants, impl.num_heads, impl.head_size, first.dtype, {}, kernel_writes_rings=not on_cpu
        )
        rows = (RunnerV2Rows if self.use_v2_model_runner else RunnerV1Rows)(self.model_runner)
        self.compression = CompressionState(rows, observer)
        self.compactor = Compactor(cache, constants)
        builder.state = self.compression
        if not on_cpu:
            max_requests = self.scheduler_config.max_num_seqs
            max_blocks = -(-self.model_config.max_model_len // block_size)
            self.compression.runs = RunArrays(grid, max_requests, max_blocks, first.device)
            max_rows = max(max_requests, self.compilation_config.max_cudagraph_capture_size or 0)
            builder.arrays = RowArrays(max_rows, first.device)
            if first.is_cuda:
                builder.processors = torch.cuda.get_device_properties(first.device).multi_processor_count

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput):
        step: CompressionStep | None = getattr(scheduler_output, "kv_compression", None)
        if step is None and self._serving:
            raise RuntimeError("kv-compression: a step came without word from the compression scheduler")
        if step is not None:  # else vLLM warms its kernels up, with requests of its own
            self._serving = True
            self._compact(step, scheduler_output.finished_req_ids)
        drafts = scheduler_output.scheduled_spec_decode_tokens
        self.compression.observer.num_drafts = {name: len(tokens) for name, tokens in drafts.items()}
        self.compression.live = True
        try:
            return super().execute_model(scheduler_output)
        finally:
            self.compression.live = False

    @torch.inference_mode()
    def warm_up_kernels(self) -> None:
        """Compile our GPU kernels by using them, in blocks that nobody has yet."""
        compactor, state = self.compactor, self.compression
        config = KVCompressionConfig.parse(self.vllm_config.additional_config["kv_compression"])
        block_size, grid = compactor.grid.block_size, compactor.grid
        ((attention_group,),) = self.model_runner.attn_groups
        attention_group.get_metadata_builder(0).warm_up(self.model_runner.get_model().modules())
        num_tokens = config.recent_tokens + 4 * block_size
        plan, blocks = config.plan(num_tokens, block_size), range(1, -(-num_tokens // block_size) + 1)
        if config.watches_every_query or plan is None or blocks[-1] >= grid.num_blocks:
            return
        name = "kv-compression-warm-up"
        job = Job(
            request_id=name,
            config=config,
            num_tokens=num_tokens,
            boundary=plan.boundary,
            previous_boundary=0,
            previous=(),
            source=tuple(blocks[: plan.source_blocks]),
            tail=tuple(blocks[plan.source_blocks :]),
            destination=tuple(blocks[: plan.kept_blocks]),
        )
        if config.observes:
            state.observer.watch(name, config.build_policy())
        state.put(name, compactor.run(job, None, state.observer.of(name)))
        elsewhere = replace(job, destination=tuple(blocks[-plan.kept_blocks :]))
        compactor.run(elsewhere, None, state.observer.of(name))
        state.forget(name)

    def _compact(self, step: CompressionStep, finished: set[str]) -> None:
        state = self.compression
        for request_id in (*step.released, *finished):
            state.forget(request_id)
        for observation in step.observations:
            state.observer.watch(observation.request_id, observation.config.build_policy())
        for repetition in step.repetitions:
            state.observer.watch_repetition(repetition)
        for job in step.jobs:
            observed = state.observer.of(job.request_id)
            assert (observed is None) == (not job.config.observes)
            state.observer.settle(job)
            state.put(job.request_id, self.compactor.run(job, state.tables.get(job.request_id), observed))
            if job.config.interval is None:
                state.observer.forget(job.request_id)


class CompressionCPUWorker(CompressionWorker, CPUWorker):
    """CPU worker whose attention layers can read compacted requests."""

    backends = {AttentionBackendEnum.CPU_ATTN: "vllm_kvcompress.attention.cpu.CompressedCPUAttentionBackend"}


_FLASH = "vllm_kvcompress.attention.flash_attn.CompressedFlashAttentionBackend"
_TRITON = "vllm_kvcompress.attention.gpu.CompressedTritonAttentionBackend"
_UNREADABLE = "vllm_kvcompress.attention.gpu.UnreadableBackend"


class CompressionGPUWorker(CompressionWorker):
    """CUDA and ROCm worker whose attention layers can read compacted requests."""

    backends = {
        AttentionBackendEnum.FLASH_ATTN: _FLASH,
        AttentionBackendEnum.TRITON_ATTN: _TRITON,
        AttentionBackendEnum.FLASHINFER: _UNREADABLE,
        AttentionBackendEnum.TRITON_FLASHINFER: _UNREADABLE,
        AttentionBackendEnum.TRITON_FLASH_ATTN: _UNREADABLE,
        AttentionBackendEnum.FLEX_ATTENTION: _UNREADABLE,
        AttentionBackendEnum.ROCM_ATTN: _UNREADABLE,
        AttentionBackendEnum.ROCM_AITER_FA: _UNREADABLE,
        AttentionBackendEnum.ROCM_AITER_UNIFIED_ATTN: _UNREADABLE,
    }

    def determine_available_memory(self) -> int:
        """Bytes for the cache, less what query rings will take."""
        available = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes:
            return available  # the user's own number
        config = KVCompressionConfig.parse(self.vllm_config.additional_config["kv_compression"])
        at_once = self.scheduler_config.max_num_seqs
        if config.interval is None:  # a ring goes when its prompt has been compacted
            at_once = min(at_once, PROMPTS_AT_ONCE)
        model, parallel = self.model_config, self.parallel_config
        shape = ring_shape(
            model.get_num_layers(parallel),
            config.build_policy(),
            model.get_num_attention_heads(parallel),
            model.get_head_size(),
        )
        return available - at_once * shape.numel() * model.dtype.itemsize

    def compile_or_warm_up_model(self) -> CompilationTimes:
        if self.vllm_config.kernel_config.enable_jit_warmup:
            self.warm_up_kernels()
        return super().compile_or_warm_up_model()


@contextmanager
def _backend_overrides(backends: Mapping[AttentionBackendEnum, str]) -> Iterator[None]:
    """Let the layers built inside choose these backends where they would choose the keys.

    Undone afterwards, so that another engine in this process still gets vLLM's own.
    """
    for backend, path in backends.items():
        register_backend(backend, path)
    _cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        for backend in backends:
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
