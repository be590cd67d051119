"""Every touch on vLLM in one table: what is extended, wrapped, called or read, as the known versions have it.

Any other vLLM is compared with the table, by its source, and refused by what has changed.
"""

import ast
import functools
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.source import Source

WRITTEN_AGAINST = {"0.32": "0.32.0", "0.33": "0.33.0"}
READ, ABSENT = "", None  # in place of a signature: there, but no function; not there
Signature = str | None | Mapping[str, str | None]  # or one per minor version, where they differ


@dataclass(frozen=True)
class Touched:
    """What is touched of a class, or of a module.

    Attributes:
        reads: names that must be there: attributes, and functions that are passed whatever they are given.
        calls: functions that are called; they may come to take more, if they need not be given it.
        overrides: methods that are extended, whose parameters must be these.
        serving: whether an engine needs it, not the measuring commands alone.
    """

    reads: str = ""
    calls: Mapping[str, Signature] = field(default_factory=dict)
    overrides: Mapping[str, Signature] = field(default_factory=dict)
    serving: bool = True


TABLE: dict[str, Touched] = {
    # start-up, and what a configuration says
    "vllm.engine.arg_utils:EngineArgs": Touched(
        reads="additional_config from_cli_args create_engine_config",
        calls={
            "add_cli_args": "(parser)",
        },
    ),
    "vllm.v1.engine.input_processor:InputProcessor": Touched(
        reads="__init__ process_inputs vllm_config",
        calls={
            "_validate_params": "(self, params, supported_tasks)",
        },
    ),
    "vllm.v1.engine:EngineCoreRequest": Touched(
        reads="mm_features prompt_embeds prompt_token_ids resumable sampling_params",
    ),
    "vllm.utils": Touched(
        reads="random_uuid",
        calls={
            "length_from_prompt_token_ids_or_embeds": "(prompt_token_ids, prompt_embeds)",
        },
    ),
    "vllm.logger": Touched(
        calls={
            "init_logger": "(name)",
        },
    ),
    "vllm.entrypoints.serve.engine.serving:BaseServing": Touched(
        calls={
            "_check_model": "(self, request)",
            "_maybe_get_adapters": "(self, request, supports_default_mm_loras=...)",
        },
    ),
    "vllm.entrypoints.pooling.base.serving:PoolingBaseServing": Touched(),
    "vllm.entrypoints.openai.chat_completion.protocol:BatchChatCompletionRequest": Touched(
        reads="to_chat_completion_request",
    ),
    # what the workers found reaches every front end
    "vllm.v1.engine:EngineCoreReadyResponse": Touched(),
    "vllm.v1.engine.core:EngineCore": Touched(
        reads="request_block_hasher scheduler vllm_config",
        calls={
            "__init__": (
                "(self, vllm_config, executor_class, log_stats, executor_fail_callback=..., "
                "include_finished_set=...)"
            ),
            "_initialize_kv_caches": "(self, vllm_config)",
            "collective_rpc": "(self, method, timeout=..., args=..., kwargs=...)",
        },
    ),
    "vllm.v1.engine.core:EngineCoreProc": Touched(
        calls={
            "_make_ready_response": "(self)",
            "run_busy_loop": "(self)",
        },
    ),
    "vllm.v1.engine.core:DPEngineCoreProc": Touched(
        calls={
            "run_busy_loop": "(self)",
        },
    ),
    "vllm.v1.engine.core_client:MPClient": Touched(
        calls={
            "_apply_ready_response": "(self, payload)",
        },
    ),
    # what a server shows
    "vllm.plugins": Touched(
        calls={
            "load_endpoint_plugins": "(supported_tasks=...)",
        },
    ),
    "vllm.plugins.endpoint_plugins.interface:EndpointPlugin": Touched(
        reads="name required_tasks",
        overrides={
            "attach_router": "(self, app)",
            "init_state": "(self, engine_client, state, args)",
        },
    ),
    "vllm.entrypoints.serve.middleware.authenticate:AuthenticationMiddleware": Touched(
        calls={
            "__init__": "(self, app, tokens)",
            "verify_token": "(self, headers)",
        },
    ),
    "vllm.v1.engine.async_llm:AsyncLLM": Touched(
        reads="engine_core generate model_config vllm_config",
    ),
    "vllm.entrypoints.serve": Touched(reads="create_error_response"),
    "vllm.entrypoints.serve.engine.protocol:ErrorResponse": Touched(reads="error"),
    "vllm.entrypoints.serve.tokenize.protocol:TokenizeChatRequest": Touched(
        reads="add_generation_prompt messages model"
    ),
    "vllm.entrypoints.serve.tokenize.protocol:TokenizeCompletionRequest": Touched(reads="model prompt"),
    "vllm.entrypoints.serve.tokenize.serving:ServingTokenization": Touched(
        calls={
            "create_tokenize": "(self, request, raw_request)",
        },
    ),
    "vllm.inputs": Touched(
        calls={
            "tokens_input": "(prompt_token_ids, *, prompt=..., cache_salt=...)",
        },
    ),
    "vllm.lora.request:LoRARequest": Touched(),
    "vllm.outputs:RequestOutput": Touched(reads="kv_transfer_params"),
    "vllm.exceptions": Touched(reads="GracefulHTTPError VLLMClientError"),
    # what a program asks of its own engine
    "vllm.v1.engine.llm_engine:LLMEngine": Touched(reads="engine_core vllm_config"),
    "vllm.v1.engine.core_client:InprocClient": Touched(reads="engine_core"),
    "vllm.v1.engine.core_client:SyncMPClient": Touched(
        calls={
            "call_utility": "(self, method, *args)",
        },
    ),
    "vllm.v1.engine.core_client:AsyncMPClient": Touched(
        reads="core_engines",
        calls={
            "call_utility_all_async": "(self, method, *args)",
        },
    ),
    "vllm.exceptions:VLLMValidationError": Touched(
        calls={
            "__init__": "(self, message, *, parameter=..., value=...)",
        },
    ),
    "vllm.sampling_params:SamplingParams": Touched(
        reads="extra_args max_tokens n prompt_logprob_token_ids prompt_logprobs",
    ),
    "vllm:SamplingParams": Touched(),
    "vllm.envs": Touched(
        reads="VLLM_API_KEY VLLM_BATCH_INVARIANT VLLM_CPU_ATTN_SPLIT_KV",
        calls={
            "VLLM_USE_RAY_V2_EXECUTOR_BACKEND": {"0.32": READ, "0.33": ABSENT},
        },
    ),
    "vllm.platforms.interface:Platform": Touched(
        reads="device_name device_type",
        calls={
            "fp8_dtype": "(cls)",
            "is_cpu": "(self)",
            "is_cuda_alike": "(self)",
        },
    ),
    "vllm.platforms": Touched(
        reads="current_platform",
    ),
    "vllm.config:VllmConfig": Touched(
        reads=(
            "additional_config attention_config aux_output_config cache_config compilation_config "
            "ec_transfer_config kernel_config kv_transfer_config model_config parallel_config quant_config "
            "scheduler_config speculative_config"
        ),
    ),
    "vllm.config": Touched(
        calls={
            "get_current_vllm_config": "()",
        },
    ),
    "vllm.config.cache": Touched(reads="CacheDType", serving=False),
    "vllm.config:AuxOutputConfig": Touched(
        reads="enabled",
    ),
    "vllm.config:CacheConfig": Touched(
        reads=(
            "block_size cache_dtype enable_prefix_caching kv_cache_memory_bytes kv_sharing_fast_prefill "
            "num_gpu_blocks "
            "prefix_match_unit user_specified_block_size"
        ),
    ),
    "vllm.config:CompilationConfig": Touched(
        reads="cudagraph_mode max_cudagraph_capture_size static_forward_context",
    ),
    "vllm.config:CUDAGraphMode": Touched(
        reads="FULL",
        calls={
            "has_full_cudagraphs": "(self)",
            "mixed_mode": "(self)",
        },
    ),
    "vllm.config:KernelConfig": Touched(
        reads="enable_jit_warmup",
    ),
    "vllm.config:ModelConfig": Touched(
        reads=(
            "dtype hf_text_config is_attention_free is_encoder_decoder is_hybrid max_model_len model "
            "rswa_window runner_type skip_tokenizer_init use_mla uses_mrope"
        ),
        calls={
            "get_head_size": "(self)",
            "get_num_attention_heads": "(self, parallel_config, arch_config=...)",
            "get_num_kv_heads": "(self, parallel_config, arch_config=...)",
            "get_num_layers": "(self, parallel_config)",
            "get_sliding_window": "(self)",
            "get_total_num_hidden_layers": "(self)",
            "get_total_num_kv_heads": "(self)",
        },
    ),
    "vllm.config:ParallelConfig": Touched(
        reads=(
            "data_parallel_index data_parallel_rank_local data_parallel_size data_parallel_size_local "
            "decode_context_parallel_size distributed_executor_backend local_engines_only "
            "prefill_context_parallel_size use_ubatching worker_cls"
        ),
    ),
    "vllm.config:SchedulerConfig": Touched(
        reads=(
            "async_scheduling disable_hybrid_kv_cache_manager max_num_batched_tokens max_num_seqs "
            "scheduler_cls watermark"
        ),
    ),
    "vllm.config:AttentionConfig": Touched(
        reads="backend",
    ),
    "vllm.config:SpeculativeConfig": Touched(
        reads="method",
        calls={
            "use_eagle": "(self)",
            "uses_draft_model": "(self)",
        },
    ),
    # the scheduler's side
    "vllm.v1.core.sched.scheduler:Scheduler": Touched(
        reads=(
            "__init__ current_step has_mamba_layers kv_cache_config kv_cache_manager kv_holding_waiting "
            "max_model_len max_num_active_reqs max_num_running_reqs max_num_scheduled_tokens num_spec_tokens "
            "num_waiting_for_streaming_input pause_state requests running scheduler_config "
            "vllm_config waiting"
        ),
        calls={
            "get_request_counts": "(self)",
        },
        overrides={
            "_connector_finished": "(self, request)",
            "_free_blocks": "(self, request)",
            "_get_local_prefix_cache_hit": {
                "0.32": "(self, request)",
                "0.33": "(self, request, max_cache_hit_length=...)",
            },
            "_handle_blocked_waiting_request": "(self, request)",
            "_holds_kv_blocks": "(request)",
            "_preempt_request": "(self, request, timestamp, drop_stale_output=...)",
            "_reserve_prefill_lookahead": "(self, request, num_computed_tokens, num_new_tokens)",
            "add_request": "(self, request)",
            "finish_requests": "(self, request_ids, finished_status)",
            "has_finished_requests": "(self)",
            "make_stats": (
                "(self, spec_decoding_stats=..., kv_connector_stats=..., cudagraph_stats=..., "
                "perf_stats=..., ec_connector_stats=...)"
            ),
            "reset_prefix_cache": "(self, reset_running_requests=..., reset_connector=...)",
            "schedule": "(self, throttle_prefills=...)",
            "update_from_output": "(self, scheduler_output, model_runner_output)",
        },
    ),
    "vllm.v1.metrics.stats:SchedulerStats": Touched(reads="kv_connector_stats"),
    "vllm.v1.metrics.loggers:PrometheusStatLogger": Touched(reads="_counter_cls _gauge_cls"),
    "vllm.v1.metrics.loggers:StatLoggerManager": Touched(
        reads="engine_indexes",
        overrides={
            "__init__": (
                "(self, vllm_config, engine_idxs=..., custom_stat_loggers=..., enable_default_loggers=..., "
                "aggregate_engine_logging=..., client_count=...)"
            ),
            "log": "(self)",
            "record": "(self, scheduler_stats, iteration_stats, mm_cache_stats=..., engine_idx=...)",
        },
    ),
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler": Touched(reads="__init__"),
    "vllm.v1.core.sched.interface:PauseState": Touched(reads="UNPAUSED"),
    "vllm.v1.core.sched.output:SchedulerOutput": Touched(
        reads=(
            "finished_req_ids num_scheduled_tokens scheduled_cached_reqs scheduled_new_reqs "
            "scheduled_spec_decode_tokens"
        ),
    ),
    "vllm.v1.core.sched.output:NewRequestData": Touched(
        reads="req_id",
    ),
    "vllm.v1.core.sched.output:CachedRequestData": Touched(
        reads="resumed_req_ids",
    ),
    "vllm.v1.core.sched.request_queue:RequestQueue": Touched(
        calls={
            "peek_request": "(self)",
            "prepend_request": "(self, request)",
            "remove_request": "(self, request)",
        },
    ),
    "vllm.v1.core.kv_cache_manager:KVCacheManager": Touched(
        reads="block_pool coordinator watermark_blocks",
        calls={
            "create_kv_cache_blocks": "(self, blocks)",
        },
        overrides={
            "allocate_slots": (
                "(self, request, num_new_tokens, num_new_computed_tokens=..., new_computed_blocks=..., "
                "num_lookahead_tokens=..., num_external_computed_tokens=..., delay_cache_blocks=..., "
                "num_encoder_tokens=..., full_sequence_must_fit=..., reserved_blocks=..., "
                "has_scheduled_reqs=..., skip_zeroing_group_ids=...)"
            ),
        },
    ),
    "vllm.v1.core.kv_cache_manager:KVCacheBlocks": Touched(
        reads="blocks",
    ),
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator": Touched(
        reads="single_type_managers",
        calls={
            "find_longest_cache_hit": "(self, block_hashes, max_cache_hit_length)",
        },
        overrides={
            "cache_blocks": "(self, request, num_computed_tokens)",
            "remove_skipped_blocks": "(self, request_id, processed_computed_tokens, num_prompt_tokens=...)",
            "get_num_blocks_to_allocate": (
                "(self, request_id, num_tokens, new_computed_blocks, num_encoder_tokens, "
                "total_computed_tokens, num_local_computed_tokens, num_tokens_main_model, "
                "apply_admission_cap=..., prefill_end=...)"
            ),
        },
    ),
    "vllm.v1.core.kv_cache_utils:KVCacheBlock": Touched(
        reads="block_hash block_id is_null ref_cnt",
    ),
    "vllm.v1.core.block_pool:BlockPool": Touched(
        reads="blocks num_gpu_blocks",
        calls={
            "evict_blocks": "(self, block_ids)",
            "free_blocks": "(self, ordered_blocks)",
            "get_cached_block": "(self, block_hash, kv_cache_group_ids)",
            "get_new_blocks": "(self, num_blocks)",
            "get_num_free_blocks": "(self)",
            "touch": "(self, blocks)",
        },
    ),
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager": Touched(
        reads="block_size enable_caching max_admission_blocks_per_request req_to_blocks",
        calls={
            "get_num_skipped_tokens": "(self, num_computed_tokens)",
        },
    ),
    "vllm.v1.core.single_type_kv_cache_manager:MambaManager": Touched(
        reads="has_prefill_checkpoint_blocks kv_cache_spec mamba_cache_mode",
    ),
    "vllm.v1.core.single_type_kv_cache_manager:ChunkedLocalAttentionManager": Touched(),
    "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager": Touched(),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager": Touched(
        reads="__init__ _null_block block_pool block_size num_cached_block req_to_blocks",
        overrides={
            "add_local_computed_blocks": (
                "(self, request_id, new_computed_blocks, num_local_computed_tokens, "
                "num_external_computed_tokens)"
            ),
            "cache_blocks": "(self, request, num_tokens, retention_interval=..., *, replay_boundaries)",
            "get_num_blocks_to_allocate": (
                "(self, request_id, num_tokens, new_computed_blocks, total_computed_tokens, "
                "num_local_computed_tokens, num_tokens_main_model, apply_admission_cap=..., "
                "prefill_end=...)"
            ),
            "pop_blocks_for_free": "(self, request_id)",
        },
    ),
    "vllm.v1.request:Request": Touched(
        reads=(
            "all_token_ids arrival_time block_hashes cache_salt client_index is_prefill_chunk lora_request "
            "max_tokens mm_features num_computed_tokens num_output_placeholders num_prompt_tokens num_tokens "
            "priority prompt_embeds prompt_token_ids request_id resumable sampling_params "
            "skip_reading_prefix_cache status"
        ),
        calls={
            "append_output_token_ids": "(self, token_ids)",
            "__init__": (
                "(self, request_id, prompt_token_ids, sampling_params, pooling_params, client_index=..., "
                "arrival_time=..., prompt_embeds=..., prompt_is_token_ids=..., mm_features=..., "
                "lora_request=..., cache_salt=..., priority=..., trace_headers=..., block_hasher=..., "
                "resumable=..., session_id=..., reasoning_ended=..., reasoning_parser_kwargs=..., "
                "abort_immediately=..., kv_hints=...)"
            ),
        },
    ),
    "vllm.v1.request:RequestStatus": Touched(
        reads="FINISHED_ABORTED RUNNING",
    ),
    "vllm.v1.kv_cache_interface": Touched(
        calls={
            "get_kv_quant_mode": "(kv_cache_dtype)",
            "replace_as": "(spec, target_cls, *, drop=..., **changes)",
        },
    ),
    "vllm.v1.kv_cache_interface:KVQuantMode": Touched(reads="NONE"),
    "vllm.v1.kv_cache_interface:KVCacheSpec": Touched(
        calls={
            "max_memory_usage_bytes": "(self, vllm_config)",
        },
    ),
    "vllm.v1.kv_cache_interface:AttentionSpec": Touched(
        reads="dtype head_size",
    ),
    "vllm.v1.kv_cache_interface:FullAttentionSpec": Touched(
        reads="block_size page_size_bytes",
        overrides={
            "merge": "(cls, specs)",
            "max_memory_usage_bytes": "(self, vllm_config)",
        },
    ),
    "vllm.v1.kv_cache_interface:MLAAttentionSpec": Touched(
        reads="head_size_v",
        overrides={
            "merge": "(cls, specs)",
        },
    ),
    "vllm.v1.kv_cache_interface:KVCacheConfig": Touched(
        reads="has_mamba_layers kv_cache_groups num_blocks",
    ),
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": Touched(
        reads="kv_cache_spec layer_names",
    ),
    "vllm.v1.kv_cache_interface:KVCacheLayout": Touched(
        reads="LBHNC",
    ),
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry": Touched(
        calls={
            "_ensure_registered": "(cls, vllm_config=...)",
            "register": "(cls, kvcache_spec_cls, manager_class=..., uniform_type_base_spec=...)",
        },
    ),
    "vllm.tokenizers": Touched(
        calls={
            "cached_tokenizer_from_config": "(model_config, **kwargs)",
        },
    ),
    # the workers
    "vllm.v1.worker.gpu_worker:Worker": Touched(
        reads=(
            "cache_config compilation_config device lora_config model_config model_runner parallel_config "
            "rank scheduler_config use_v2_model_runner vllm_config"
        ),
        overrides={
            "compile_or_warm_up_model": "(self)",
            "determine_available_memory": "(self)",
            "execute_model": "(self, scheduler_output)",
            "get_kv_cache_spec": "(self)",
            "initialize_from_config": "(self, kv_cache_config)",
            "load_model": "(self, *, load_dummy_weights=...)",
            "sample_tokens": "(self, grammar_output)",
        },
    ),
    "vllm.v1.outputs:AsyncModelRunnerOutput": Touched(overrides={"get_output": "(self)"}),
    "vllm.v1.outputs:ModelRunnerOutput": Touched(reads="req_id_to_index sampled_token_ids"),
    "vllm.v1.engine:EngineCoreOutputs": Touched(),
    "vllm.v1.worker.cpu_worker:CPUWorker": Touched(
        reads="model_runner",
        overrides={
            "compile_or_warm_up_model": "(self)",
            "determine_available_memory": "(self)",
        },
    ),
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner": Touched(
        calls={
            "_zero_block_ids": "(self, block_ids)",
        },
    ),
    "vllm.v1.worker.worker_base:CompilationTimes": Touched(),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": Touched(
        reads="attn_groups input_batch kv_cache_config",
        calls={
            "get_model": "(self)",
        },
        overrides={
            "_is_uniform_decode": (
                "(max_num_scheduled_tokens, uniform_decode_query_len, num_tokens, num_reqs, "
                "force_uniform_decode=...)"
            ),
        },
    ),
    "vllm.v1.worker.gpu_input_batch:InputBatch": Touched(
        reads="req_ids",
    ),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": Touched(
        reads="attn_groups kv_cache_config model_config model_state req_states",
        calls={
            "get_model": "(self)",
        },
        overrides={
            "gather_batch_req_state": "(self, scheduler_output, dummy_run)",
        },
    ),
    "vllm.v1.worker.gpu.model_states.mamba_hybrid:MambaHybridModelState": Touched(
        calls={
            "prepare_attn": (
                "(self, input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, "
                "kv_cache_config, for_capture=..., ubatch_idx=..., model_specific_attn_metadata=...)"
            ),
        },
    ),
    "vllm.v1.worker.gpu.input_batch:InputBatch": Touched(
        reads="idx_mapping_np",
    ),
    "vllm.v1.worker.gpu.states:RequestState": Touched(
        reads="index_to_req_id",
    ),
    "vllm.v1.worker.utils:AttentionGroup": Touched(
        reads="kv_cache_group_id",
        calls={
            "get_metadata_builder": "(self, ubatch_id=...)",
        },
    ),
    "vllm.model_executor.layers.attention:Attention": Touched(
        reads=(
            "attn_backend impl kv_cache kv_sharing_target_layer_name layer_name query_quant sliding_window"
        ),
    ),
    "vllm.model_executor.layers.attention:MLAAttention": Touched(
        reads="attn_backend impl kv_cache layer_name sliding_window",
    ),
    "vllm.model_executor.layers.attention.mla_attention:MLAAttention": Touched(
        reads="qk_nope_head_dim",
        calls={
            # Sets W_UK_T.
            "process_weights_after_loading": "(self, act_dtype)",
        },
    ),
    "vllm.model_executor.layers.mamba.abstract:MambaBase": Touched(),
    "vllm.model_executor.layers.linear:RowParallelLinear": Touched(
        reads="params_dtype quant_method",
    ),
    "vllm.model_executor.layers.linear:LinearMethodBase": Touched(
        calls={
            "apply": "(self, layer, x, bias=...)",
        },
    ),
    "vllm.model_executor.models.utils": Touched(
        calls={
            "extract_layer_index": "(layer_name, num_attn_module=...)",
        },
    ),
    # attention
    "vllm.v1.attention.backend:AttentionBackend": Touched(
        reads="validate_configuration",
        overrides={
            "customize_spec": "(cls, spec)",
            "get_builder_cls": "()",
            "get_impl_cls": "()",
            "get_supported_kernel_block_sizes": "(kv_cache_spec=...)",
            "supported_kv_cache_layouts": "(cls)",
        },
    ),
    "vllm.v1.attention.backend:MultipleOf": Touched(),
    "vllm.v1.attention.backend:AttentionCGSupport": Touched(
        reads="UNIFORM_BATCH",
    ),
    "vllm.v1.attention.backend:AttentionImplBase": Touched(
        reads="__new__",
    ),
    "vllm.v1.attention.backend:AttentionImpl": Touched(
        reads="__init__ head_size kv_cache_dtype num_heads scale",
        overrides={
            "forward": (
                "(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=..., "
                "output_block_scale=...)"
            ),
            "fused_output_quant_supported": "(self, quant_key)",
        },
    ),
    "vllm.v1.attention.backend:AttentionLayer": Touched(
        reads="_k_scale _k_scale_float _q_scale _v_scale _v_scale_float"
    ),
    "vllm.v1.attention.backend:AttentionMetadataBuilder": Touched(
        reads="__init__ supports_update_block_table vllm_config",
        overrides={
            "build": "(self, common_prefix_len, common_attn_metadata, fast_build=...)",
            "build_for_cudagraph_capture": "(self, common_attn_metadata)",
            "get_cudagraph_support": "(cls, vllm_config, kv_cache_spec)",
        },
    ),
    "vllm.v1.attention.backend:AttentionType": Touched(
        reads="DECODER",
    ),
    "vllm.v1.attention.backend:CommonAttentionMetadata": Touched(
        reads=(
            "block_table_tensor max_query_len max_seq_len num_actual_tokens num_reqs query_start_loc "
            "query_start_loc_cpu req_idx seq_lens seq_lens_cpu_upper_bound slot_mapping"
        ),
        calls={
            "naive_query_lens": "(self)",
            "replace": "(self, **kwargs)",
        },
    ),
    "vllm.v1.attention.backends.registry:AttentionBackendEnum": Touched(
        reads=(
            "CPU_ATTN CPU_MLA FLASHINFER FLASH_ATTN FLEX_ATTENTION ROCM_AITER_FA ROCM_AITER_UNIFIED_ATTN "
            "ROCM_ATTN TRITON_ATTN TRITON_FLASHINFER TRITON_FLASH_ATTN"
        ),
        calls={
            "clear_override": "(self)",
        },
    ),
    "vllm.v1.attention.backends.registry": Touched(
        calls={
            "register_backend": "(backend, class_path=..., is_mamba=...)",
        },
    ),
    "vllm.model_executor.layers.attention.chunked_local_attention": Touched(reads="get_attn_backend"),
    "vllm.v1.attention.selector": Touched(
        calls={
            "_cached_get_attn_backend": (
                "(backend, attn_selector_config, num_heads=..., *, _run_kv_cache_dtype=...)"
            ),
        },
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend": Touched(
        overrides={
            "customize_spec": "(cls, spec)",
            "get_builder_cls": "()",
            "get_impl_cls": "()",
            "get_supported_kernel_block_sizes": "(kv_cache_spec=...)",
        },
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl": Touched(
        reads=(
            "__init__ alibi_slopes attn_type head_size kv_cache_dtype kv_sharing_target_layer_name "
            "logits_soft_cap num_heads num_kv_heads num_queries_per_kv scale sinks sliding_window"
        ),
        overrides={
            "forward": (
                "(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=..., "
                "output_block_scale=...)"
            ),
        },
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadata": Touched(
        reads="num_actual_tokens",
        calls={
            "__init__": (
                "(self, num_actual_tokens, max_query_len, query_start_loc, max_seq_len, seq_lens, "
                "block_table, slot_mapping, scheduler_metadata, causal=..., dynamic_causal=..., "
                "use_sdpa_prefill=..., num_decode_tokens=..., sdpa_attn_masks=..., sdpa_start_loc=..., "
                "encoder_cache=...)"
            ),
        },
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder": Touched(
        reads="block_size dtype head_dim isa kv_cache_dtype num_heads num_kv_heads",
        overrides={
            "build": "(self, common_prefix_len, common_attn_metadata, fast_build=...)",
        },
    ),
    # latents
    "vllm.v1.attention.backends.mla.cpu_mla:CPUMLABackend": Touched(
        overrides={
            "get_impl_cls": "()",
        },
    ),
    "vllm.v1.attention.backends.mla.cpu_mla:CPUMLAImpl": Touched(
        reads="__init__ kv_lora_rank",
        overrides={
            "forward_mqa": "(self, q, kv_c_and_k_pe_cache, attn_metadata, layer)",
        },
    ),
    "vllm.model_executor.layers.attention.mla_attention:MLACommonBackend": Touched(
        overrides={
            "customize_spec": "(cls, spec)",
            "get_builder_cls": "()",
        },
    ),
    "vllm.model_executor.layers.attention.mla_attention:MLACommonMetadataBuilder": Touched(
        reads="__init__",
        overrides={
            "build": "(self, common_prefix_len, common_attn_metadata, fast_build=...)",
        },
    ),
    "vllm.model_executor.layers.attention.mla_attention:MLACommonMetadata": Touched(
        reads="decode num_decode_tokens num_decodes num_prefills",
    ),
    "vllm.model_executor.layers.attention.mla_attention:MLACommonDecodeMetadata": Touched(
        reads="block_table",
    ),
    "vllm.model_executor.layers.attention.mla_attention:MLACommonBaseImpl": Touched(
        overrides={
            "forward_mha": (
                "(self, q, kv_c_normed, k_pe, kv_c_and_k_pe_cache, attn_metadata, k_scale, output, "
                "output_scale=...)"
            ),
        },
    ),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend": Touched(
        overrides={
            "get_builder_cls": "()",
            "get_impl_cls": "()",
            "get_supported_kernel_block_sizes": "(cls, kv_cache_spec=...)",
        },
    ),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder": Touched(
        overrides={
            "build": "(self, common_prefix_len, common_attn_metadata, fast_build=...)",
            "get_cudagraph_support": "(cls, vllm_config, kv_cache_spec)",
        },
    ),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl": Touched(
        reads=(
            "__init__ alibi_slopes attn_type kv_sharing_target_layer_name logits_soft_cap sinks "
            "sliding_window vllm_flash_attn_version"
        ),
        overrides={
            "forward": (
                "(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=..., "
                "output_block_scale=...)"
            ),
        },
    ),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionBackend": Touched(
        overrides={
            "customize_spec": "(cls, spec)",
            "get_builder_cls": "()",
            "get_impl_cls": "()",
            "get_supported_kernel_block_sizes": "(kv_cache_spec=...)",
        },
    ),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadataBuilder": Touched(
        overrides={
            "build": "(self, common_prefix_len, common_attn_metadata, fast_build=...)",
            "build_for_cudagraph_capture": "(self, common_attn_metadata)",
            "get_cudagraph_support": "(cls, vllm_config, kv_cache_spec)",
        },
    ),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl": Touched(
        reads=(
            "__init__ alibi_slopes attn_type kv_sharing_target_layer_name logits_soft_cap sinks "
            "sliding_window"
        ),
        overrides={
            "forward": (
                "(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=..., "
                "output_block_scale=...)"
            ),
            "fused_output_quant_supported": "(self, quant_key)",
        },
    ),
    "vllm._custom_ops": Touched(
        calls={
            "cpu_attention_with_kv_cache": (
                "(query, key_cache, value_cache, output, query_start_loc, seq_lens, scale, causal, "
                "alibi_slopes, sliding_window, block_table, softcap, scheduler_metadata, s_aux, "
                "dynamic_causal=..., k_scale=..., v_scale=..., kv_cache_dtype=...)"
            ),
            "cpu_attn_get_scheduler_metadata": (
                "(num_reqs, num_heads, num_kv_heads, head_dim, seq_lens, dtype, query_start_loc, causal, "
                "sliding_window_size, isa, enable_kv_split, dynamic_causal=..., kv_cache_dtype=...)"
            ),
            "cpu_attn_reshape_and_cache": (
                "(key, value, key_cache, value_cache, slot_mapping, isa, k_scale=..., v_scale=..., "
                "kv_cache_dtype=...)"
            ),
        },
    ),
    "vllm.utils.torch_utils": Touched(
        reads="PIN_MEMORY",
    ),
    # the measuring commands
    "vllm:LLM": Touched(reads="generate llm_engine", serving=False),
    "vllm.sampling_params:RequestOutputKind": Touched(
        reads="CUMULATIVE",
        serving=False,
    ),
    "vllm.v1.sample.logits_processor:AdapterLogitsProcessor": Touched(
        reads="is_argmax_invariant",
        overrides={
            "new_req_logits_processor": "(self, params)",
        },
        serving=False,
    ),
    "vllm.benchmarks.serve": Touched(
        calls={
            "add_cli_args": "(parser)",
            "main": "(args)",
        },
        serving=False,
    ),
    "vllm.utils.argparse_utils:FlexibleArgumentParser": Touched(
        overrides={
            "error": "(self, message)",
        },
        serving=False,
    ),
    # `check`, which makes an engine without weights
    "vllm.plugins:load_general_plugins": Touched(serving=False),
    "vllm.utils.torch_utils:set_default_torch_dtype": Touched(serving=False),
    "vllm.model_executor.model_loader": Touched(
        calls={
            "register_model_loader": "(load_format)",
        },
        serving=False,
    ),
    "vllm.model_executor.model_loader.base_loader:BaseModelLoader": Touched(
        calls={
            "create_model": "(self, vllm_config, model_config, prefix=...)",
        },
        overrides={
            "download_model": "(self, model_config)",
            "load_model": "(self, vllm_config, model_config, prefix=...)",
            "load_weights": "(self, model, model_config)",
        },
        serving=False,
    ),
    "vllm.v1.executor.abstract:Executor": Touched(
        reads="vllm_config",
        overrides={
            "compile_or_warm_up_model": "(self)",
            "determine_available_memory": "(self)",
            "initialize_from_config": "(self, kv_cache_configs)",
        },
        serving=False,
    ),
    "vllm.v1.executor.uniproc_executor:UniProcExecutor": Touched(reads="driver_worker", serving=False),
    "vllm.v1.kv_cache_interface:ChunkedLocalAttentionSpec": Touched(
        reads="attention_chunk_size", serving=False
    ),
    "vllm.v1.kv_cache_interface:MambaSpec": Touched(reads="mamba_type", serving=False),
    "vllm.v1.kv_cache_interface:SlidingWindowSpec": Touched(reads="sliding_window", serving=False),
    "vllm.entrypoints.openai": Touched(
        reads="api_server",
        serving=False,
    ),
    "vllm.distributed.parallel_state": Touched(
        calls={
            "get_pp_group": "()",
            "get_tp_group": "()",
        },
    ),
    "vllm.forward_context": Touched(
        calls={
            "set_forward_context": (
                "(attn_metadata, vllm_config, num_tokens=..., num_tokens_across_dp=..., "
                "cudagraph_runtime_mode=..., batch_descriptor=..., ubatch_slices=..., slot_mapping=..., "
                "skip_compiled=..., is_padding=...)"
            ),
        },
    ),
}


def check_touch_points(version: str) -> None:
    """Refuse a vLLM in which something that is touched has changed; say so where only the number is new.

    A version that this was written against costs no look at its source, any other about a second.

    Raises:
        KVCompressionError: one line that names what has changed first.
    """
    release = version.partition("+")[0]
    if release in WRITTEN_AGAINST.values():
        return
    minor = ".".join(release.split(".")[:2])
    changed = list(changes(installed(), minor, serving=True))
    if changed:
        more = f", and {len(changed) - 2} more" if len(changed) > 2 else ""
        raise KVCompressionError(
            f"kv-compression does not support vLLM {version}: {'; '.join(changed[:2])}{more}; "
            f"install vLLM {' or '.join(WRITTEN_AGAINST)}"
        )
    if minor not in WRITTEN_AGAINST:
        logging.getLogger("vllm.kv_compression").warning(
            "kv-compression was not tried with vLLM %s; nothing that it touches has another signature there",
            version,
        )


def changes(source: Source, minor: str, serving: bool = False) -> Iterator[str]:
    """What of the table a vLLM has otherwise, in words.

    Args:
        source: of that vLLM.
        minor: as which version it should be; if unknown, as any that is known.
        serving: leave out what only the measuring commands need.
    """
    for place, touched in TABLE.items():
        module, _, owner = place.partition(":")
        if serving and not touched.serving:
            continue
        if owner and source.find(module, owner) is None:
            yield f"{module}.{owner} is gone"
            continue
        names = dict.fromkeys(touched.reads.split()) | touched.calls | touched.overrides
        for name, known in names.items():
            found = source.find(module, f"{owner}.{name}".strip("."))
            where = f"{module}.{owner}.{name}".replace("..", ".")
            if name in touched.reads.split():
                if found is None:
                    yield f"{where} is gone"
                continue
            expected = _known(known, minor)
            if found is None:
                if ABSENT not in expected:
                    yield f"{where} is gone"
                continue
            signature = found.signature or READ
            if not any(_fits(signature, wanted, name in touched.calls) for wanted in expected):
                yield f"{where} {_difference(signature, expected[-1])}"


def _known(signature: Signature, minor: str) -> list[str | None]:
    if not isinstance(signature, Mapping):
        return [signature]
    return [signature[minor]] if minor in signature else list(signature.values())


def _fits(found: str, wanted: str | None, may_take_more: bool) -> bool:
    """Whether a signature is the wanted one, or takes all that the wanted one takes and needs no more."""
    if found == wanted or not wanted or not found:
        return found == wanted
    if not may_take_more:
        return False
    ours, theirs = _parameters(wanted), _parameters(found)
    same = all(theirs.get(name) == parameter for name, parameter in ours.items())
    return same and all(optional for name, (_, optional) in theirs.items() if name not in ours)


def _difference(found: str, wanted: str | None) -> str:
    if not wanted or not found:
        return (
            "is back" if wanted is ABSENT else "is a function no more" if wanted else "has become a function"
        )
    theirs, ours = _parameters(found), _parameters(wanted)
    new = ", ".join(name for name in theirs if name not in ours)
    gone = ", ".join(name for name in ours if name not in theirs)
    words = [f"takes {new}" if new else "", f"does not take {gone}" if gone else ""]
    return " and ".join(filter(None, words)) or f"takes {found}"


def _parameters(signature: str) -> dict[str, tuple[int, bool]]:
    """Of each parameter its position, -1 for those given by name, and whether it may be left out."""
    arguments = ast.parse(f"def f{signature}: pass").body[0].args
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    parameters = {arg.arg: (index, index >= required) for index, arg in enumerate(positional)}
    for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters[arg.arg] = (-1, default is not None)
    for arg in filter(None, [arguments.vararg, arguments.kwarg]):
        parameters[f"*{arg.arg}"] = (-1, True)
    return parameters


@functools.cache
def installed() -> Source:
    """The source of the vLLM of this interpreter."""
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return Source(Path(spec.origin).parent)


def main() -> int:
    """Print what the installed vLLM, whatever its version, has changed of the table."""
    namespace: dict[str, str] = {}
    exec((Path(find_spec("vllm").origin).parent / "_version.py").read_text(encoding="utf-8"), namespace)
    version = namespace["__version__"]
    minor = ".".join(version.split(".")[:2])
    against = minor if minor in WRITTEN_AGAINST else list(WRITTEN_AGAINST)[-1]
    changed = list(changes(installed(), against))
    print("\n".join(changed) or "nothing that is touched has changed")
    print(f"vLLM {version} against the table for {against}: {len(changed)} changes", file=sys.stderr)
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main())
