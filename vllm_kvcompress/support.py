"""What compression does not support yet, refused at start-up with one line each."""

import functools
from collections.abc import Mapping

import torch
import vllm
from vllm import envs
from vllm.config import CUDAGraphMode, ModelConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.formats.base import CHANNELS, NEEDS_HEAD_SIZE
from vllm_kvcompress.formats.hybrid import Hybrid
from vllm_kvcompress.formats.turboquant import TurboQuant
from vllm_kvcompress.log import logger
from vllm_kvcompress.paging.groups import block_size, compacted_shape, tokens_of_page
from vllm_kvcompress.plan import page_tokens
from vllm_kvcompress.policies import Policy
from vllm_kvcompress.policies.foresight import Foresight
from vllm_kvcompress.requests.float8 import FLOAT8, ON_GPU
from vllm_kvcompress.touch_points import check_touch_points

CPU_BLOCK_SIZE = 32  # vLLM's CPU kernel takes multiples of it unsplit
MAX_HEAD_SIZE = 512  # of our GPU kernels, which hold some keys and values in shared memory
MAX_WIDE = 256  # likewise of numbers of 4 bytes, and of formats that rotate
CPU_LATENT = 576  # channels of the latents that vLLM's CPU kernel reads
LATENTS_LACK = {  # as in `LACKS`, of every model with multi-head latent attention (MLA)
    NEEDS_HEAD_SIZE: "it caches latents (MLA), and formats are of keys and values",
    "needs_rotary": "its query heads share latents (MLA), which have no keys before rotation, nor values",
    "needs_output_projection": "its query heads share latents (MLA), which are not its projection's values",
    "needs_own_keys": "its keys are normalised latents (MLA)",
}
OFFLOADS = "which copies blocks by the hash of their tokens after compaction has given them to others"
CONNECTORS = {  # of vLLM's own: what keeps each from it
    "OffloadingConnector": OFFLOADS,
    "SimpleCPUOffloadConnector": OFFLOADS,
    "ExampleConnector": "with which the queries that methods look at are computed elsewhere",
    "NixlConnector": "which reads and writes blocks by position, and compacted ones have none",
    "MultiConnector": "which is made of others that are refused",
}
UNTRIED_CONNECTOR = "which was not tried on blocks that compaction moves"
NO_DRAFT_MODEL = ("ngram", "suffix")  # ways to speculate
DRAFT_MODELS = ("draft_model", "eagle", "eagle3", "mtp")  # those that were tried
LACKS = "kv_compression_lacks"  # in `additional_config`: what the workers found missing in the model


def check_supported(vllm_config: VllmConfig) -> None:
    """Refuse an engine configuration that compression cannot serve.

    Raises:
        KVCompressionError: one line that names the feature and what to do.
    """
    check_touch_points(vllm.__version__)
    for present, feature, remedy in _refusals(vllm_config):
        if present:
            raise KVCompressionError(f"kv-compression does not support {feature}; {remedy}")


def check_method(config: KVCompressionConfig, vllm_config: VllmConfig) -> None:
    """Refuse a method that needs what this model or engine has not.

    What the model has not is known once the workers have looked at it.

    Raises:
        KVCompressionError: one line that names it and what to do.
    """
    model = vllm_config.model_config
    policy = config.build_policy()
    if policy.needs_rotary and model.uses_mrope:
        raise KVCompressionError(
            f"kv-compression method {config.method} needs one-dimensional rotary position embeddings, "
            "which this model has not; use another method"
        )
    if model.use_mla:
        _check_needs(config, LATENTS_LACK)
    if (problem := _scorer_problem(config, policy, model)) is not None:
        raise KVCompressionError(f"kv-compression method {config.method} {problem}")
    if (problem := _format_problem(config, vllm_config)) is not None:
        raise KVCompressionError(f"kv-compression: {problem}")
    _check_needs(config, (vllm_config.additional_config or {}).get(LACKS, {}))
    speculative = vllm_config.speculative_config
    drafts = speculative is not None and speculative.method not in NO_DRAFT_MODEL
    if drafts and (what := _beside_drafts(config)) is not None:
        raise KVCompressionError(f"kv-compression does not support {what}")
    if config.repeats and 1 in _most_at_once(vllm_config):
        raise KVCompressionError(
            f"kv-compression method {config.method} repeats the prompt in a request of its own; "
            "use --max-num-seqs and --max-num-active-seqs 2 or more"
        )
    if config.repeats and vllm_config.aux_output_config.enabled:
        # A repetition reads all of its owner's blocks, also those whose auxiliary outputs are not at hand.
        raise KVCompressionError(
            f"kv-compression method {config.method} does not work with auxiliary outputs; "
            "remove --enable-return-routed-experts or use another method"
        )
    if config.repeats and model.skip_tokenizer_init:
        raise KVCompressionError(
            f"kv-compression method {config.method} needs the tokenizer; remove --skip-tokenizer-init"
        )
    if config.matches and config.observes_all and not current_platform.is_cpu():
        raise KVCompressionError(
            f"kv-compression: what {config.method} notes of every running prompt's own queries has no memory "
            "set aside for it on a GPU; use queries=repeat"
        )
    parallel = vllm_config.parallel_config
    if config.matches and parallel.distributed_executor_backend == "external_launcher":
        # Each rank has a scheduler of its own, and a clock: they would not solve in the same steps.
        raise KVCompressionError(
            f"kv-compression method {config.method} is solved for by one scheduler's clock; "
            "use another --distributed-executor-backend or another method"
        )
    if config.threshold is not None and parallel.pipeline_parallel_size > 1:
        raise KVCompressionError(
            "kv-compression: threshold needs all layers in one worker; remove it or --pipeline-parallel-size"
        )
    shape = compacted_shape(vllm_config)
    if shape is None and not _has_other_layers(model):
        shape = model.get_num_layers(parallel), model.get_num_kv_heads(parallel)
    try:
        if shape is not None:  # else it is asked again once the engine has its groups
            config.build_allocation().check_model(*shape)
    except ValueError as error:
        raise KVCompressionError(f"kv-compression: {error}") from None
    if config.prefix is not None or config.prefix_share:
        _check_prefixes(config, vllm_config)


def _check_prefixes(config: KVCompressionConfig, vllm_config: VllmConfig) -> None:
    """Refuse compacted prefixes where there cannot be any."""
    model, option = vllm_config.model_config, "prefix" if config.prefix is not None else "prefix_share"
    if not vllm_config.cache_config.enable_prefix_caching:
        raise KVCompressionError(
            f"kv-compression: compacted prefixes are found by vLLM's prefix cache; leave {option} out, or "
            "remove --no-enable-prefix-caching"
        )
    if model.is_hybrid and vllm_config.cache_config.mamba_cache_mode != "align":
        raise KVCompressionError(
            "kv-compression: compacted prefixes of models some of whose layers keep states need "
            f"--mamba-cache-mode align; leave {option} out, or set it"
        )
    if config.observed_window and not config.matches:
        _warn_of_queries(config.method, option)


@functools.cache
def _warn_of_queries(method: str, option: str) -> None:
    """Say once of a method that it keeps what one prompt's end asks for, and others will ask for more."""
    logger.warning(
        "kv-compression: %s keeps what the last queries of a prompt look at, and who goes on from it as a "
        "prefix asks something else; with %s better use kvzip, attention_matching, expected_attention, "
        "foresight, keydiff or knorm",
        method,
        option,
    )


def _beside_drafts(config: KVCompressionConfig) -> str | None:
    """What of a method cannot be done for the layers of a draft model, and what to do; None if all can."""
    if config.prefix is not None or config.prefix_share:
        return "compacted prefixes with a draft model; leave prefix and prefix_share out"
    what = None
    if config.observes_all or config.repeats:  # some of a draft model's queries come twice, others never
        what = f"{config.method} (it watches every query)"
    elif config.threshold is not None:
        what = "threshold"
    return what and f"{what} with a draft model; use another method"


def _check_needs(config: KVCompressionConfig, lacks: Mapping[str, str]) -> None:
    """Refuse a method that needs what a model lacks, as `LACKS` has it."""
    policy = config.build_policy()
    for need, reason in lacks.items():
        of_formats = need == NEEDS_HEAD_SIZE and config.record_format is not None
        if getattr(policy, need, False) or of_formats:
            raise KVCompressionError(
                f"kv-compression method {config.method} cannot serve this model: {reason}; use another method"
            )


def check_watched(request: KVCompressionConfig, engine: KVCompressionConfig, vllm_config: VllmConfig) -> None:
    """Refuse what a request asks of this engine's workers, if they have no memory or no graphs for it.

    Raises:
        KVCompressionError: one line that names it and what to do.
    """
    mode = vllm_config.compilation_config.cudagraph_mode
    format = request.record_format
    if request.matches and not current_platform.is_cpu() and not _has_memory(request, engine, vllm_config):
        raise KVCompressionError(
            f"kv-compression method {request.method} would take more memory than is set aside for it; "
            "start the server with it, and these options"
        )
    if mode.has_full_cudagraphs() and format is not None and format != engine.record_format:
        raise KVCompressionError(
            f"full CUDA graphs have no place for the format {format.name}; start the server with it, "
            "or with --enforce-eager"
        )
    speculates = vllm_config.speculative_config is not None
    kept = engine.kept_in_graphs(speculates)
    watched = kept is not None and request.kept_in_graphs(speculates) == kept
    # Workers keep out of full graphs what is watched, but out of those of decoding alone; and for an engine's
    # own method that is watched otherwise they have no others.
    of_any_step = mode.mixed_mode() == CUDAGraphMode.FULL and (kept or not engine.watches_every_query)
    if of_any_step and request.watches_every_query and not watched:
        raise KVCompressionError(
            f"kv-compression method {request.method} watches every query, for which full CUDA graphs of "
            "every step have no place; start the server with it, or with cudagraph_mode FULL_AND_PIECEWISE"
        )


def _has_memory(request: KVCompressionConfig, engine: KVCompressionConfig, vllm_config: VllmConfig) -> bool:
    """Whether what a request notes and solves for takes no more than what the engine was started with."""
    if not engine.matches:
        return False
    model = vllm_config.model_config
    longest, size = model.max_model_len, model.get_head_size()
    kind = current_platform.device_type

    def takes(config: KVCompressionConfig) -> tuple[int, int, int]:
        policy, format = config.build_policy(), config.record_format
        assert format is not None
        noted = policy.state_bytes(longest, size, model.dtype.itemsize)
        return noted, format.largest_bytes(size), policy.most_fit_bytes(longest, size, kind)

    return all(own <= most for own, most in zip(takes(request), takes(engine), strict=True))


def encoded_tokens(config: KVCompressionConfig, vllm_config: VllmConfig) -> int | None:
    """Tokens of a head that a block of this engine's cache holds once they are encoded; None without a
    format."""
    shape = vllm_config.model_config.get_head_size(), _itemsize(vllm_config)
    return page_tokens(config, block_size(vllm_config), tokens_of_page(vllm_config), *shape)


def _itemsize(vllm_config: VllmConfig) -> int:
    """Bytes of a number of this engine's cache."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    dtype = model.dtype if cache.cache_dtype == "auto" else getattr(torch, cache.cache_dtype, torch.uint8)
    return dtype.itemsize


def _format_problem(config: KVCompressionConfig, vllm_config: VllmConfig) -> str | None:
    """Why a format cannot serve this engine; None if it can, or there is none."""
    format = config.record_format
    if format is None:
        return None
    cache = vllm_config.cache_config
    if cache.cache_dtype in FLOAT8:
        return (
            f"the format {format.name} writes what --kv-cache-dtype {cache.cache_dtype} has rounded; use one"
        )
    head_size = vllm_config.model_config.get_head_size()
    if head_size % CHANNELS:
        return (
            f"formats need a multiple of {CHANNELS} channels, and the model has {head_size}; "
            f"use {config.method} without {format.name}"
        )
    rotates = format.basis is not None
    rotates |= any(isinstance(part.plain, TurboQuant | Hybrid) for part in format.parts)
    if rotates and head_size > MAX_WIDE and not current_platform.is_cpu():
        return (
            f"{format.name} rotates heads of up to {MAX_WIDE} channels on a GPU, and the model has "
            f"{head_size}; use a kivi format"
        )
    if not cache.block_size:  # it is chosen later
        return None
    size = tokens_of_page(vllm_config)
    if not format.holds_more(2 * size * head_size * _itemsize(vllm_config), head_size, size):
        return (
            f"{format.name} is written in records of {format.largest_bytes(head_size)} bytes, and a page has "
            f"no room for more tokens than raw at --block-size {size}; use a larger one"
        )
    return None


def _scorer_problem(config: KVCompressionConfig, policy: Policy, model: ModelConfig) -> str | None:
    """Why a policy that reads a scorer cannot serve this model; None if it can, or reads none."""
    while (base := getattr(policy, "base", None)) is not None:
        policy = base
    if not isinstance(policy, Foresight):
        return None
    train = f"`vllm-kvcompress calibrate {model.model} --scorer` trains one"
    if not policy.scorer:
        return f"needs a scorer of this model, and none was found; {train}"
    scorer = policy.network
    layers, heads, size = scorer.shape
    shape = model.get_total_num_hidden_layers(), model.get_total_num_kv_heads(), model.get_head_size()
    if (layers, heads, size) != shape:
        text = "{} layers of {} KV heads of {} channels"
        return (
            f"was given a scorer for {text.format(*scorer.shape)}, "
            f"and the model has {text.format(*shape)}; {train}"
        )
    if not scorer.serves(model.hf_text_config):
        return f"was given a scorer of {scorer.model}, which is another model; {train}"
    return None


def _refusals(config: VllmConfig):
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    other_model = "serve this model without --kv-compression"
    text = model.hf_text_config
    layer_types = set(getattr(text, "layer_types", None) or ())
    window = model.get_sliding_window()
    own_dtype = str(model.dtype).removeprefix("torch.")
    speculative = config.speculative_config
    scheme = getattr(config.quant_config, "kv_cache_scheme", None)
    # "auto" is what the user of a checkpoint that chooses for itself has already.
    own_cache = f"use --kv-cache-dtype {own_dtype}"
    if model.dtype == torch.float32:  # there is no such option
        own_cache = "use --dtype bfloat16 --kv-cache-dtype bfloat16"
    on_cpu = current_platform.is_cpu()
    yield (
        not on_cpu and not current_platform.is_cuda_alike(),
        f"{current_platform.device_name} devices",
        "use vLLM on CUDA, ROCm or a CPU",
    )
    yield from _latent_refusals(config)
    yield parallel.use_ubatching, "dual batch overlap", "remove --enable-dbo and --ubatch-size"
    yield (
        not on_cpu and model.get_head_size() > (MAX_WIDE if model.dtype == torch.float32 else MAX_HEAD_SIZE),
        f"attention heads of {model.get_head_size()} channels of {own_dtype} on a GPU",
        other_model,
    )
    yield model.runner_type != "generate", f"the {model.runner_type} runner", other_model
    yield model.is_encoder_decoder, "encoder-decoder models", other_model
    yield model.is_attention_free, "models without attention", other_model
    slides = slides_windows(model)
    yield (
        slides and not _has_full_attention(text),
        f"sliding-window attention over fewer tokens ({window}) than --max-model-len in every layer",
        f"use --max-model-len {window} or less, or serve this model without --kv-compression",
    )
    chunks = "chunked_attention" in layer_types
    yield chunks and not _has_full_attention(text), "attention within chunks in every layer", other_model
    yield (
        (slides or chunks or model.is_hybrid)
        and bool(config.scheduler_config.disable_hybrid_kv_cache_manager),
        "windows, chunks or states in one cache group with full attention",
        "remove --disable-hybrid-kv-cache-manager",
    )
    yield (
        model.is_hybrid and cache.prefix_match_unit is not None,
        "prefixes that end within a block",
        "remove --prefix-match-unit",
    )
    other_types = layer_types - {"full_attention", "sliding_attention", "chunked_attention"}
    yield (
        bool(other_types) and not model.is_hybrid,
        f"hybrid attention ({', '.join(sorted(map(str, other_types)))})",
        other_model,
    )
    yield model.uses_alibi or "Step1ForCausalLM" in model.architectures, "ALiBi", other_model
    yield parallel.decode_context_parallel_size > 1, "decode context parallelism", "remove -dcp"
    yield parallel.prefill_context_parallel_size > 1, "prefill context parallelism", "remove -pcp"
    transfer = config.kv_transfer_config
    connector = getattr(transfer, "kv_connector", None)
    yield (
        transfer is not None,
        f"the KV connector {connector}, {CONNECTORS.get(connector, UNTRIED_CONNECTOR)}",
        "remove --kv-transfer-config",
    )
    yield (
        config.ec_transfer_config is not None,
        "encoder-cache connectors, which were not tried",
        "remove --ec-transfer-config",
    )
    yield (
        cache.cache_dtype not in ("auto", "float16", "bfloat16", "float32", *FLOAT8),
        f"the quantized cache {cache.cache_dtype}, which --kv-cache-dtype or the checkpoint asks for",
        own_cache,
    )
    yield (
        # Layers make of this the dtype of the cache, as long as no other is asked for.
        cache.cache_dtype == "auto" and scheme is not None,
        "the quantized cache that the checkpoint asks for (kv_cache_scheme)",
        own_cache,
    )
    yield (
        not on_cpu and cache.cache_dtype in FLOAT8 and cache.cache_dtype not in ON_GPU,
        f"--kv-cache-dtype {cache.cache_dtype} on a GPU, which FLASH_ATTN and TRITON_ATTN do not write",
        "use --kv-cache-dtype fp8",
    )
    yield (
        not on_cpu and cache.cache_dtype in FLOAT8 and (scheme or {}).get("strategy") == "attn_head",
        "a quantized cache with a scale of each head (kv_cache_scheme) on a GPU",
        own_cache,
    )
    yield (
        not on_cpu and cache.cache_dtype not in ("auto", own_dtype, *FLOAT8),
        f"--kv-cache-dtype {cache.cache_dtype} with a model in {model.dtype} on a GPU",
        f"use --kv-cache-dtype {own_dtype}",
    )
    yield (
        cache.cache_dtype in FLOAT8 and bool(cache.kv_cache_dtype_skip_layers),
        f"--kv-cache-dtype {cache.cache_dtype} for some layers alone",
        "remove --kv-cache-dtype-skip-layers",
    )
    yield model.rswa_window is not None, "reference sliding-window attention", other_model
    yield envs.VLLM_BATCH_INVARIANT, "batch-invariant mode", "unset VLLM_BATCH_INVARIANT"
    yield (
        # From 0.33 on there is only the second one, and no such variable.
        parallel.distributed_executor_backend == "ray"
        and not getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", True),
        "the first Ray executor, which passes workers by",
        "unset VLLM_USE_RAY_V2_EXECUTOR_BACKEND",
    )
    yield cache.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill", "remove the flag"
    yield (
        # vLLM's own default on CPU is a multiple; from 0.33 on it is set after this.
        on_cpu
        and not model.use_mla  # whose kernel has a block size of its own
        and cache.user_specified_block_size
        and cache.block_size % CPU_BLOCK_SIZE != 0,
        f"--block-size {cache.block_size} on CPU",
        f"use a multiple of {CPU_BLOCK_SIZE}",
    )
    drafts = speculative is not None and speculative.method not in NO_DRAFT_MODEL
    yield (
        drafts and (not on_cpu or speculative.method not in DRAFT_MODELS),
        f"speculative decoding with the draft model of {speculative.method if drafts else ''}"
        + ("" if on_cpu else " on a GPU, where no kernel notes what it asks for"),
        "use ngram speculation or none",
    )
    yield (
        drafts and (chunks or model.use_mla),
        "a draft model beside chunks or latents (MLA)",
        "use ngram speculation or none",
    )
    yield (
        # Which vLLM 0.32 has written with the blocks of the first cache group, whichever it is in.
        drafts and slides and speculative.method == "draft_model",
        "a draft model of its own beside windows, as vLLM gives it the blocks of these",
        "use EAGLE, MTP, ngram speculation or none",
    )
    yield (
        drafts and config.parallel_config.pipeline_parallel_size > 1,
        "a draft model and pipeline parallelism",
        "remove --pipeline-parallel-size or --speculative-config",
    )
    yield (
        speculative is not None and model.is_hybrid,
        "speculative decoding of a model that keeps states",
        "remove --speculative-config",
    )


def _latent_refusals(config: VllmConfig):
    """What of multi-head latent attention (MLA) is not supported, as `_refusals` has it."""
    model, cache, text = config.model_config, config.cache_config, config.model_config.hf_text_config
    if not model.use_mla:
        return
    what, other_model = "multi-head latent attention (MLA)", "serve this model without --kv-compression"
    own_dtype = str(model.dtype).removeprefix("torch.")
    # DeepSeek V3.2 and V4, and whoever has their indexer.
    is_sparse = hasattr(text, "index_topk") or hasattr(text, "compress_ratios")
    yield is_sparse, f"sparse {what}, whose indexer chooses tokens by position (DSA)", other_model
    yield (
        not current_platform.is_cpu(),
        f"{what} on a GPU, where none of vLLM's kernels for it was tried on compacted pages",
        other_model,
    )
    yield (
        torch.cpu._is_amx_tile_supported()
        and config.attention_config.backend != AttentionBackendEnum.CPU_MLA,
        f"{what} with the backend AMX_MLA",
        "use --attention-backend CPU_MLA",
    )
    yield (
        model.get_head_size() != CPU_LATENT,
        f"latents of {model.get_head_size()} channels, which vLLM's CPU kernel for {what} does not read",
        other_model,
    )
    yield slides_windows(model), f"{what} beside layers that slide a window", other_model
    yield model.is_hybrid, f"{what} beside state-space or linear layers", other_model
    yield (
        cache.cache_dtype not in ("auto", own_dtype),
        f"--kv-cache-dtype {cache.cache_dtype} with {what}",
        "use --kv-cache-dtype auto",
    )


def _has_other_layers(model: ModelConfig) -> bool:
    """Whether some layers are not compacted: they keep states, attend within chunks or slide a window."""
    types = getattr(model.hf_text_config, "layer_types", None) or ()
    return model.is_hybrid or "chunked_attention" in types or slides_windows(model)


def slides_windows(model: ModelConfig) -> bool:
    """Whether layers of a model slide a window, which the longest request outgrows."""
    window = model.get_sliding_window()
    return window is not None and window < model.max_model_len


def _has_full_attention(text) -> bool:
    """Whether some layers of a model that slides windows attend to all tokens, as its configuration says."""
    types = getattr(text, "layer_types", None) or ()
    return "full_attention" in types or 0 in (getattr(text, "hybrid_layer_pattern", None) or ())


def _most_at_once(config: VllmConfig) -> tuple[int, int | None]:
    """Bounds on the requests that run at a time: how many have a place, how many are admitted to one."""
    return config.scheduler_config.max_num_seqs, config.scheduler_config.max_num_active_seqs
