"""The worker of CUDA and ROCm devices."""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_kvcompress.attention.chunks import ChunkRows, flash3_serves
from vllm_kvcompress.attention.gpu import CompressedMetadataBuilder, RowArrays, ShareLists
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.formats.base import NEEDS_HEAD_SIZE, RECORD
from vllm_kvcompress.kernels.attention import merge_bytes, programs_at_once
from vllm_kvcompress.kernels.flash3 import chunk_bytes
from vllm_kvcompress.kernels.moments import merged_bytes
from vllm_kvcompress.kernels.records import prepare
from vllm_kvcompress.kernels.shares import Shares
from vllm_kvcompress.matching import solve_bytes_on
from vllm_kvcompress.paging.job import Job
from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.plan import STAGED_BYTES, Plan, moment_tokens, ring_budget
from vllm_kvcompress.policies.watching import DEVICE_BLOCK_BYTES
from vllm_kvcompress.requests.cache import PagedCache
from vllm_kvcompress.requests.float8 import ON_GPU, Float8
from vllm_kvcompress.requests.runs import RunArrays
from vllm_kvcompress.requests.sums import BYTES as SUM_BYTES
from vllm_kvcompress.requests.sums import PageSums
from vllm_kvcompress.worker.gpu_cache import PlainCache
from vllm_kvcompress.worker.work import Work
from vllm_kvcompress.worker.worker import CompressionWorker, every_page

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

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        grid, device = self.compactor.grid, self.compactor.cache.device
        max_requests = self.scheduler_config.max_num_seqs
        max_blocks = -(-self.model_config.max_model_len // grid.block_size) * grid.num_groups
        self.compression.runs = RunArrays(grid, max_requests, max_blocks, device)
        observer = self.compression.observer
        observer.kernel_writes_rings = True
        if self._kept_in_graphs == "sums":
            observer.sums = PageSums.empty(grid, device)
        # Without rotary embeddings the engine will say that it cannot serve the method.
        rotates = all(layer.rotary is not None for layer in observer.layers)
        observer.keeps_moments = self._kept_in_graphs == "moments" and rotates
        processors, at_once = self._device_size(device)
        longest = self.model_config.max_model_len
        arrays = RowArrays(self._max_rows, device)
        share_lists = ShareLists(grid, self._max_rows, longest, at_once, device)
        chunk_rows = None
        if self._flash3_serves:
            chunk_rows = ChunkRows(grid, self.compacted_layers()[0].num_heads // grid.num_heads, processors)
        for builder in self.builders:
            builder.arrays, builder.share_lists, builder.processors = arrays, share_lists, processors
            builder.chunk_rows = chunk_rows
            builder.format, builder.fills = self._config.record_format, builder is self.builders[0]
        self._keep_noted_steps_out_of_full_graphs()

    def _keep_noted_steps_out_of_full_graphs(self) -> None:
        """Have a step of which spans note anything be none of decoding alone in vLLM's eyes: in full graphs,
        which are of such steps, there is nobody to note it."""
        runner, state = self.model_runner, self.compression
        if self.use_v2_model_runner:
            gather = runner.gather_batch_req_state

            def gather_batch_req_state(scheduler_output: SchedulerOutput, dummy_run: bool):
                batch, uniform_token_count = gather(scheduler_output, dummy_run)
                noted = state.live and state.observer.notes(scheduler_output.num_scheduled_tokens)
                return batch, None if noted else uniform_token_count

            runner.gather_batch_req_state = gather_batch_req_state
        else:
            is_uniform = runner._is_uniform_decode

            def is_uniform_decode(*args, **kwargs) -> bool:
                noted = state.live and state.observer.notes(runner.input_batch.req_ids)
                return not noted and is_uniform(*args, **kwargs)

            runner._is_uniform_decode = is_uniform_decode

    def make_cache(self, grid: PageGrid, layers: Sequence[Attention], builder: Any) -> PagedCache:
        if not isinstance(builder, CompressedMetadataBuilder):
            raise KVCompressionError(
                f"kv-compression cannot read the cache of {type(builder).__name__}; use "
                "--attention-backend FLASH_ATTN or TRITON_ATTN"
            )
        size = layers[0].impl.head_size
        pages = every_page(layers)
        # Else Triton would have our kernels read fewer than 16 bytes of a thread at once, and say nothing.
        assert pages.data_ptr() % 16 == 0 and pages[0].nbytes % 16 == 0
        by_token = pages.view(-1, grid.block_size, 2 * size).split(size, -1)
        shape = grid.num_slots, grid.num_blocks, grid.num_heads
        float8 = None
        if layers[0].impl.kv_cache_dtype in ON_GPU:
            key_scales = torch.cat([layer._k_scale.view(1) for layer in layers])
            value_scales = torch.cat([layer._v_scale.view(1) for layer in layers])
            float8 = Float8(current_platform.fp8_dtype(), self.model_config.dtype, key_scales, value_scales)
        numbers = by_token if float8 is None else [part.view(float8.dtype) for part in by_token]
        for index, layer in enumerate(layers):
            layer.impl.layer_index, layer.impl.content = index, pages.view(torch.uint8)
            layer.impl.keys, layer.impl.values = (part.unflatten(0, shape) for part in numbers)
        if (format := self._config.record_format) is not None:
            prepare(format, size, pages.device, pages.dtype)
        return PlainCache(grid, *by_token, pages, float8=float8)

    def determine_available_memory(self) -> int:
        """Bytes for the cache, less what compacting and its records will take.

        Raises:
            KVCompressionError: that leaves none.
        """
        available = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes:
            return available  # the user's own number
        left = self._less_set_aside(available)
        if left <= 0 < available:
            aside, longest = (available - left) / 2**30, self.model_config.max_model_len
            raise KVCompressionError(
                f"kv-compression method {self._config.method} sets aside {aside:.1f} GiB for requests of "
                f"{longest} tokens, of {available / 2**30:.1f} that are free; lower --max-model-len, raise "
                "--gpu-memory-utilization, or use another method"
            )
        return left

    def _less_set_aside(self, available: int) -> int:
        model, parallel = self.model_config, self.parallel_config
        layers, heads = model.get_num_layers(parallel), model.get_num_kv_heads(parallel)
        query_heads, size = model.get_num_attention_heads(parallel), model.get_head_size()
        group = query_heads // heads
        own = self.compacted_layers()
        if own and len(own) < layers:
            layers, heads, size = len(own), own[0].num_kv_heads, own[0].head_size
            query_heads = own[0].num_heads
        longest, max_num_seqs = model.max_model_len, self.scheduler_config.max_num_seqs
        policy = self._config.build_policy()
        # Scores, their order and positions of a request's tokens, and one layer's keys and values in float32.
        available -= longest * heads * (layers * 32 + size * 12)
        # Compactions come before attention is watched, and nothing of both lasts.
        available -= max(STAGED_BYTES, 4 * DEVICE_BLOCK_BYTES)
        if self._kept_in_graphs == "sums":
            token = 2 * size * (1 if self.cache_config.cache_dtype in ON_GPU else model.dtype.itemsize)
            available = available * token // (token + SUM_BYTES)
        elif self._kept_in_graphs == "moments":
            available -= 4 * 4 * layers * query_heads * size**2  # covariances of a request that is scored
            available -= merged_bytes(self.scheduler_config.max_num_batched_tokens, query_heads, size)
        elif policy.matches:  # of one context at a time; what is solved of it, and of one more
            format = self._config.record_format
            assert format is not None
            solved = -(-longest // RECORD) * format.largest_bytes(size)
            of_head = policy.state_bytes(longest, size, model.dtype.itemsize) + 2 * solved
            a_head = policy.most_fit_bytes(longest, size, self.device.type)
            available -= layers * heads * of_head + max(a_head, solve_bytes_on(self.device.type))
        elif policy.gives_losses:
            available -= 2 * 4 * query_heads * self._config.observed_window * longest  # attention weights
        blocks = longest // self.cache_config.block_size * self._most_groups(layers)
        available -= 4 * max_num_seqs * (blocks + layers * heads)  # runs
        sinks = any(layer.impl.sinks is not None for layer in own)
        available -= self._share_bytes(layers, heads, group, size, sinks)
        if self._flash3_serves:
            tokens = self.scheduler_config.max_num_batched_tokens
            available -= chunk_bytes(tokens, query_heads, size, model.dtype.itemsize)
        per_query = layers * query_heads * size * model.dtype.itemsize
        num_cache_tokens = available // (2 * layers * heads * size * model.dtype.itemsize)
        of_moments = moment_tokens(size, model.dtype.itemsize)
        budget = ring_budget(self._config, max_num_seqs, num_cache_tokens, group, of_moments)
        return available - per_query * budget

    @functools.cached_property
    def _flash3_serves(self) -> bool:
        """Whether FlashAttention 3 serves chunks."""
        impls = [layer.impl for layer in self.compacted_layers()]
        return flash3_serves(impls, self.model_config.dtype, self.device)

    def _most_groups(self, compacted: int) -> int:
        """Cache groups that vLLM makes of so many layers: as large as there are fewest of another kind."""
        kinds = Counter(map(type, self.get_kv_cache_spec().values()))
        return -(-compacted // min(kinds.values(), default=compacted))

    def _share_bytes(self, layers: int, heads: int, group: int, head_size: int, sinks: bool) -> int:
        """Bytes of the lists of shares, of raw rows and of records, and of what shares leave to be merged."""
        processors, at_once = self._device_size(self.device)
        lists = 2 * Shares.num_bytes(self._max_rows, layers, heads, at_once)
        tokens = self.scheduler_config.max_num_batched_tokens
        return lists + merge_bytes(tokens, heads * group, group, head_size, processors, at_once, sinks)

    @property
    def _max_rows(self) -> int:
        captured = self.compilation_config.max_cudagraph_capture_size or 0
        return max(self.scheduler_config.max_num_seqs, captured)

    @staticmethod
    def _device_size(device: torch.device) -> tuple[int, int]:
        """Streaming multiprocessors, and programs of the attention kernels that run at a time."""
        if device.type != "cuda":
            return 1, 1
        properties = torch.cuda.get_device_properties(device)
        processors = properties.multi_processor_count
        return processors, processors * programs_at_once(properties.shared_memory_per_multiprocessor)

    @property
    def _kept_in_graphs(self) -> Literal["sums", "moments"] | None:
        """What a kernel keeps of every query in place of the engine's policy."""
        return self._config.kept_in_graphs(self.vllm_config.speculative_config is not None)

    @property
    def _config(self) -> KVCompressionConfig:
        return KVCompressionConfig.parse(self.vllm_config.additional_config["kv_compression"])

    def compile_or_warm_up_model(self) -> CompilationTimes:
        captures = self.compilation_config.cudagraph_mode.has_full_cudagraphs()
        if captures or self.vllm_config.kernel_config.enable_jit_warmup:
            self.warm_up_kernels()  # nothing may be compiled while a graph is captured
        return super().compile_or_warm_up_model()

    @torch.inference_mode()
    def warm_up_kernels(self) -> None:
        """Compile our GPU kernels by using them, in blocks that nobody has yet."""
        compactor, state = self.compactor, self.compression
        config = self._config
        block_size, grid = compactor.grid.block_size, compactor.grid
        self.builders[0].warm_up(self.model_runner.get_model().modules())
        num_tokens = config.recent_tokens + 4 * block_size
        in_page = None
        if config.record_format is not None:
            in_page = compactor.cache.tokens_per_page(config.record_format)
        plan = Plan.of(config, num_tokens, block_size, page_tokens=in_page)
        blocks = range(1, -(-num_tokens // block_size) * grid.num_groups + 1)
        policy = config.build_policy()
        refused = NEEDS_HEAD_SIZE in self.lacks and config.record_format is not None
        if refused or any(getattr(policy, need, False) for need in self.lacks):  # the engine will say so
            return
        if policy.matches or plan is None or blocks[-1] >= grid.num_blocks:
            return
        if config.watches_every_query and self._kept_in_graphs is None:  # by scores that need no notes
            own = {"allocation": config.allocation or config.preset.allocation}
            if config.record_format is not None:
                own["format"] = config.record_format.name
            config = config.for_request({"method": "knorm", **own})
        groups, num_kept = grid.num_groups, plan.kept_blocks * grid.num_groups
        edge = plan.source_blocks * groups
        sources, tails = (_parts(own, groups) for own in (blocks[:edge], blocks[edge:]))
        name = "kv-compression-warm-up"
        job = Job(
            request_id=name,
            config=config,
            num_tokens=num_tokens,
            boundary=plan.boundary,
            previous_boundary=0,
            previous=(),
            source=sources[0],
            tail=tails[0],
            destination=tuple(blocks[:num_kept]),
            other_sources=sources[1:],
            other_tails=tails[1:],
        )
        if config.observes:
            state.observer.watch(name, config.build_policy())
        state.put(name, *compactor.run([Work(job, None, state.observer.of(name))]))
        elsewhere = replace(job, destination=tuple(blocks[-num_kept:]))
        (table,) = compactor.run([Work(elsewhere, None, state.observer.of(name))])
        if table.format is not None:
            compactor.cache.clear(table.destination)
        state.forget(name)


def _parts(blocks: range, num_parts: int) -> tuple[tuple[int, ...], ...]:
    """Blocks in so many equal parts."""
    size = len(blocks) // num_parts
    return tuple(tuple(blocks[part * size : (part + 1) * size]) for part in range(num_parts))
