"""Every refusal is one line that names the feature; what is not refused passes."""

import json
from types import SimpleNamespace

import pytest
import torch
from vllm import envs
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.paging.groups import GROUP
from vllm_kvcompress.support import check_method, check_supported, check_watched


def engine_config(**changes):
    """What `check_supported` reads of a `VllmConfig`, with dotted changes."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            runner_type="generate",
            is_encoder_decoder=False,
            use_mla=False,
            is_hybrid=False,
            is_attention_free=False,
            get_sliding_window=lambda: None,
            max_model_len=4096,
            uses_alibi=False,
            architectures=["LlamaForCausalLM"],
            get_head_size=lambda: 64,
            dtype=torch.float16,
            rswa_window=None,
            hf_text_config=SimpleNamespace(layer_types=["full_attention"] * 2, model_type="llama"),
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            pipeline_parallel_size=1,
            use_ubatching=False,
            distributed_executor_backend=None,
        ),
        cache_config=SimpleNamespace(
            cache_dtype="auto",
            kv_cache_dtype_skip_layers=[],
            kv_sharing_fast_prefill=False,
            block_size=32,
            prefix_match_unit=None,
            user_specified_block_size=True,
        ),
        attention_config=SimpleNamespace(backend=None),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        kv_transfer_config=None,
        ec_transfer_config=None,
        speculative_config=None,
        quant_config=None,
    )
    for path, value in changes.items():
        *parents, name = path.split("__")
        place = config
        for parent in parents:
            place = getattr(place, parent)
        assert hasattr(place, name)
        setattr(place, name, value)
    return config


REFUSED = {
    "reference sliding-window attention": {"model_config__rswa_window": 512},
    "dual batch overlap": {"parallel_config__use_ubatching": True},
    "the pooling runner": {"model_config__runner_type": "pooling"},
    "encoder-decoder models": {"model_config__is_encoder_decoder": True},
    "models without attention": {"model_config__is_attention_free": True},
    "states in one cache group with full attention; remove --disable-hybrid-kv-cache-manager": {
        "model_config__is_hybrid": True,
        "scheduler_config__disable_hybrid_kv_cache_manager": True,
    },
    "speculative decoding of a model that keeps states; remove --speculative-config": {
        "model_config__is_hybrid": True,
        "speculative_config": SimpleNamespace(method="ngram"),
    },
    "prefixes that end within a block; remove --prefix-match-unit": {
        "model_config__is_hybrid": True,
        "cache_config__prefix_match_unit": 16,
    },
    "sliding-window attention over fewer tokens (4095) than --max-model-len in every layer": {
        "model_config__get_sliding_window": lambda: 4095,
        "model_config__hf_text_config__layer_types": None,
    },
    "(4095) than --max-model-len in every layer": {
        "model_config__get_sliding_window": lambda: 4095,
        "model_config__hf_text_config__layer_types": ["sliding_attention"] * 2,
    },
    "windows, chunks or states in one cache group with full attention; remove --disable-hybrid-kv": {
        "model_config__get_sliding_window": lambda: 4095,
        "scheduler_config__disable_hybrid_kv_cache_manager": True,
    },
    "attention within chunks in every layer": {
        "model_config__hf_text_config__layer_types": ["chunked_attention"] * 2
    },
    "chunks or states in one cache group with full attention": {
        "model_config__hf_text_config__layer_types": ["full_attention", "chunked_attention"],
        "scheduler_config__disable_hybrid_kv_cache_manager": True,
    },
    "hybrid attention (dilated_attention)": {
        "model_config__hf_text_config__layer_types": ["full_attention", "dilated_attention"]
    },
    "ALiBi": {"model_config__uses_alibi": True},
    "ALiBi;": {"model_config__architectures": ["Step1ForCausalLM"]},
    "the quantized cache that the checkpoint asks for": {
        "quant_config": SimpleNamespace(kv_cache_scheme={"num_bits": 8})
    },
    "decode context parallelism": {"parallel_config__decode_context_parallel_size": 2},
    "prefill context parallelism": {"parallel_config__prefill_context_parallel_size": 2},
    "OffloadingConnector, which copies blocks by the hash of their tokens after compaction has given": {
        "kv_transfer_config": SimpleNamespace(kv_connector="OffloadingConnector")
    },
    "ExampleConnector, with which the queries that methods look at are computed elsewhere; remove": {
        "kv_transfer_config": SimpleNamespace(kv_connector="ExampleConnector")
    },
    "SomeConnector, which was not tried on blocks that compaction moves; remove --kv-transfer-config": {
        "kv_transfer_config": SimpleNamespace(kv_connector="SomeConnector")
    },
    "encoder-cache connectors": {"ec_transfer_config": SimpleNamespace()},
    "nvfp4, which --kv-cache-dtype or the checkpoint asks for; use --kv-cache-dtype float16": {
        "cache_config__cache_dtype": "nvfp4"
    },
    "--kv-cache-dtype fp8 for some layers alone": {
        "cache_config__cache_dtype": "fp8",
        "cache_config__kv_cache_dtype_skip_layers": ["0"],
    },
    "--kv-sharing-fast-prefill": {"cache_config__kv_sharing_fast_prefill": True},
    "--block-size 16": {"cache_config__block_size": 16},
    "speculative decoding with the draft model of medusa; use ngram": {
        "speculative_config": SimpleNamespace(method="medusa")
    },
    "a draft model beside chunks or latents (MLA); use ngram": {
        "speculative_config": SimpleNamespace(method="eagle"),
        "model_config__hf_text_config__layer_types": ["full_attention", "chunked_attention"],
    },
    "a draft model of its own beside windows, as vLLM gives it the blocks of these; use EAGLE": {
        "speculative_config": SimpleNamespace(method="draft_model"),
        "model_config__hf_text_config__layer_types": ["full_attention", "sliding_attention"],
        "model_config__get_sliding_window": lambda: 128,
    },
    "a draft model and pipeline parallelism; remove": {
        "speculative_config": SimpleNamespace(method="draft_model"),
        "parallel_config__pipeline_parallel_size": 2,
    },
}

on_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="these are the limits on CPU")


@on_cpu
@pytest.mark.parametrize("feature", REFUSED)
def test_a_refusal_is_one_line_that_names_the_feature(feature):
    with pytest.raises(KVCompressionError) as error:
        check_supported(engine_config(**REFUSED[feature]))
    assert feature in str(error.value)
    assert "\n" not in str(error.value)


LATENTS = {"model_config__use_mla": True, "model_config__get_head_size": lambda: 576}


@on_cpu
@pytest.mark.parametrize(
    ("feature", "changes"),
    {
        "sparse multi-head latent attention (MLA)": {
            "model_config__hf_text_config": SimpleNamespace(index_topk=2048)
        },
        "(MLA), whose indexer": {"model_config__hf_text_config": SimpleNamespace(compress_ratios=[4])},
        "latents of 288 channels": {"model_config__get_head_size": lambda: 288},
        "beside layers that slide a window": {"model_config__get_sliding_window": lambda: 128},
        "(MLA) beside state-space or linear layers": {"model_config__is_hybrid": True},
        "--kv-cache-dtype fp8 with multi-head latent attention (MLA); use --kv-cache-dtype auto": {
            "cache_config__cache_dtype": "fp8"
        },
        "--kv-cache-dtype bfloat16 with multi-head": {"cache_config__cache_dtype": "bfloat16"},
    }.items(),
)
def test_of_latents_what_is_not_supported_is_refused_by_name(feature, changes):
    with pytest.raises(KVCompressionError) as error:
        check_supported(engine_config(**LATENTS | changes))
    assert feature in str(error.value) and "\n" not in str(error.value)


@on_cpu
def test_latents_are_served_by_vllms_reference_backend_alone(monkeypatch):
    own_size = {"cache_config__block_size": 16}  # whatever was asked for, as vLLM sets it
    check_supported(engine_config(**LATENTS | own_size))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    with pytest.raises(KVCompressionError, match="backend AMX_MLA; use --attention-backend CPU_MLA"):
        check_supported(engine_config(**LATENTS))
    asked = {"attention_config__backend": AttentionBackendEnum.CPU_MLA}
    check_supported(engine_config(**LATENTS | own_size | asked))


def test_latents_are_refused_on_a_gpu(on_gpu):
    with pytest.raises(KVCompressionError, match=r"\(MLA\) on a GPU, .*; serve this model without") as error:
        check_supported(engine_config(**LATENTS))
    assert "\n" not in str(error.value)


@on_cpu
@pytest.mark.parametrize(
    "accepted",
    [
        {},
        {"speculative_config": SimpleNamespace(method="ngram")},
        {"cache_config__block_size": 64},
        # vLLM's placeholder for the default that it has not chosen yet.
        {"cache_config__block_size": 16, "cache_config__user_specified_block_size": False},
        {"cache_config__cache_dtype": "float32"},
        {"cache_config__cache_dtype": "fp8"},
        {"cache_config__cache_dtype": "fp8_e5m2"},
        {"model_config__get_sliding_window": lambda: 4096},  # nobody outgrows it
        {
            "model_config__get_sliding_window": lambda: 128,
            "model_config__hf_text_config__layer_types": ["sliding_attention", "full_attention"],
        },
        {"model_config__hf_text_config__layer_types": ["chunked_attention", "full_attention"]},
        {"scheduler_config__disable_hybrid_kv_cache_manager": True},  # a model without windows
        {"model_config__hf_text_config": SimpleNamespace(model_type="gemma3n_text", num_kv_shared_layers=1)},
        {"model_config__hf_text_config__model_type": "gpt_oss"},  # sinks
        {
            "model_config__is_hybrid": True,
            "model_config__hf_text_config__layer_types": ["linear_attention", "full_attention"],
        },
        {
            "cache_config__cache_dtype": "float16",
            "quant_config": SimpleNamespace(kv_cache_scheme={"num_bits": 8}),
        },
    ],
)
def test_what_is_supported_passes(accepted):
    check_supported(engine_config(**accepted))


def test_the_environment_may_ask_for_what_is_not_supported(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(KVCompressionError, match="batch-invariant mode; unset"):
        check_supported(engine_config())
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")
    on_ray = engine_config(parallel_config__distributed_executor_backend="ray")
    if hasattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND"):
        with pytest.raises(KVCompressionError, match="the first Ray executor.*; unset"):
            check_supported(on_ray)
    else:  # there is no first one any more
        check_supported(on_ray)


@pytest.fixture
def on_gpu(monkeypatch):
    platform = SimpleNamespace(
        is_cpu=lambda: False, is_cuda_alike=lambda: True, device_name="cuda", device_type="cuda"
    )
    monkeypatch.setattr("vllm_kvcompress.support.current_platform", platform)
    return platform


def test_a_gpu_takes_small_blocks_and_heads_of_up_to_512_channels(on_gpu, monkeypatch):
    check_supported(engine_config(cache_config__block_size=16))
    check_supported(engine_config(cache_config__cache_dtype="float16"))
    with pytest.raises(
        KVCompressionError, match="dtype bfloat16 with a model in torch.float16 on a GPU; use"
    ):
        check_supported(engine_config(cache_config__cache_dtype="bfloat16"))
    wide = {"model_config__get_head_size": lambda: 512}
    check_supported(engine_config(**wide))
    for changes in ({"model_config__dtype": torch.float32}, {"model_config__get_head_size": lambda: 576}):
        with pytest.raises(KVCompressionError, match="attention heads of 5.. channels of .* on a GPU; serve"):
            check_supported(engine_config(**{**wide, **changes}))
    served = engine_config(**wide)
    served.additional_config = {}
    served.model_config.uses_mrope = False
    served.model_config.get_sliding_window = lambda: None
    with pytest.raises(KVCompressionError, match="turbo4 rotates heads of up to 256 channels on a GPU, and"):
        check_method(KVCompressionConfig.parse("snapkv+turbo4:budget=0.1"), served)
    monkeypatch.setattr(on_gpu, "is_cuda_alike", lambda: False)
    with pytest.raises(KVCompressionError, match="does not support cuda devices; use vLLM on"):
        check_supported(engine_config())


@pytest.mark.parametrize("cache_dtype", ["fp8", "fp8_e4m3"])
def test_a_gpu_takes_the_float8_caches_that_its_backends_write(on_gpu, cache_dtype):
    scheme = {"num_bits": 8, "strategy": "tensor"}
    check_supported(engine_config(cache_config__cache_dtype=cache_dtype))
    quantized = SimpleNamespace(kv_cache_scheme=scheme)
    check_supported(engine_config(cache_config__cache_dtype=cache_dtype, quant_config=quantized))
    scheme["strategy"] = "attn_head"
    with pytest.raises(KVCompressionError, match="a scale of each head .* on a GPU; use .* float16"):
        check_supported(engine_config(cache_config__cache_dtype=cache_dtype, quant_config=quantized))
    with pytest.raises(KVCompressionError, match=f"{cache_dtype} for some layers alone"):
        check_supported(
            engine_config(
                cache_config__cache_dtype=cache_dtype, cache_config__kv_cache_dtype_skip_layers=["0"]
            )
        )


@pytest.mark.parametrize(
    "cache_dtype",
    ["fp8_per_token_head", "int8_per_token_head", "int4_per_token_head", "nvfp4", "turboquant_k8v4"],
)
def test_a_gpu_is_refused_other_quantized_caches_by_name(on_gpu, cache_dtype):
    with pytest.raises(KVCompressionError, match=f"the quantized cache {cache_dtype}, .*; use"):
        check_supported(engine_config(cache_config__cache_dtype=cache_dtype))


def test_e5m2_is_refused_on_a_gpu_as_neither_backend_writes_it(on_gpu):
    with pytest.raises(
        KVCompressionError, match="fp8_e5m2 on a GPU, which FLASH_ATTN and TRITON_ATTN do"
    ) as e:
        check_supported(engine_config(cache_config__cache_dtype="fp8_e5m2"))
    assert str(e.value).endswith("; use --kv-cache-dtype fp8") and "\n" not in str(e.value)


def in_graphs(mode="FULL_AND_PIECEWISE", speculates=False):
    return SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode[mode]),
        speculative_config=object() if speculates else None,
    )


@pytest.mark.parametrize("method", ["h2o", "kvzip", "expected_attention", "criticalkv:base=kv_compress_full"])
def test_a_request_cannot_have_every_query_watched_in_graphs_of_every_step_without_a_place_for_it(method):
    def check(own, mode="FULL", **more):
        check_watched(request, KVCompressionConfig.parse(own), in_graphs(mode, **more))

    def assert_refused(own, **more):
        with pytest.raises(KVCompressionError, match=f"{request.method} watches every query.*; start") as e:
            check(own, **more)
        assert "\n" not in str(e.value) and str(e.value).endswith("cudagraph_mode FULL_AND_PIECEWISE")

    request, snapkv = KVCompressionConfig.parse(method), KVCompressionConfig.parse("snapkv")
    for mode in ("NONE", "PIECEWISE", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"):
        for own in ("snapkv", "h2o", "kvzip"):  # what it watches is kept out of graphs of decoding alone
            check(own, mode), check(own, mode, speculates=True)
    check("kvzip")  # whose workers have no others
    check("expected_attention", speculates=True)
    check("h2o", speculates=True)
    check_watched(snapkv, snapkv, in_graphs("FULL"))
    assert_refused("snapkv")
    assert_refused("expected_attention" if method != "expected_attention" else "h2o")
    if method == "expected_attention":
        check("criticalkv:base=expected_attention")
        assert_refused("snapkv", speculates=True)
    elif method == "kvzip":
        assert_refused("h2o")
    else:  # whose kernel adds up squares, too
        check("h2o")
        assert_refused("snapkv", speculates=True)


def test_a_request_cannot_have_what_is_matched_without_the_servers_memory_and_graphs_for_it(monkeypatch):
    request, snapkv = KVCompressionConfig.parse("attention_matching"), KVCompressionConfig.parse("snapkv")
    check_watched(request, snapkv, in_graphs("NONE"))  # a CPU's memory is not counted
    check_watched(request, KVCompressionConfig.parse("attention_matching:references=9"), in_graphs())
    for other in ("snapkv", "kvzip", "snapkv+k4v3"):  # whose records have no biases
        with pytest.raises(KVCompressionError, match="no place for the format matched k4v3; start"):
            check_watched(request, KVCompressionConfig.parse(other), in_graphs())
    on_gpu = SimpleNamespace(is_cpu=lambda: False, device_type="cuda")
    monkeypatch.setattr("vllm_kvcompress.support.current_platform", on_gpu)
    graphs = in_graphs("NONE")
    graphs.model_config = SimpleNamespace(max_model_len=4096, get_head_size=lambda: 64, dtype=torch.bfloat16)
    for other in ("snapkv", "kvzip", "attention_matching:references=9"):
        with pytest.raises(
            KVCompressionError, match="attention_matching would take more memory.*; start"
        ) as e:
            check_watched(request, KVCompressionConfig.parse(other), graphs)
        assert "\n" not in str(e.value)
    for own in (request, KVCompressionConfig.parse("attention_matching:references=9000")):
        check_watched(request, own, graphs)
    wide = KVCompressionConfig.parse("attention_matching+k8v4")  # whose records take more
    check_watched(request, wide, graphs)
    with pytest.raises(KVCompressionError, match="attention_matching would take more memory"):
        check_watched(wide, request, graphs)


def test_a_head_profile_of_another_model_is_refused_at_start_up(tmp_path):
    path = tmp_path / "profile.json"
    content = {"version": 1, "model": "tiny", "num_layers": 2, "num_kv_heads": 1}
    path.write_text(json.dumps({**content, "budgets": [0.25], "shares": [[[1], [2]]]}))
    compression = KVCompressionConfig.parse(f"snapkv:allocation=profile:{path}")

    def engine(layers, heads, window=None, types=None, group=None):
        model = SimpleNamespace(
            get_num_layers=lambda _: layers,
            get_num_kv_heads=lambda _: heads,
            use_mla=False,
            get_sliding_window=lambda: window,
            hf_text_config=SimpleNamespace(layer_types=types),
            is_hybrid=False,
            max_model_len=4096,
        )
        additional = {} if group is None else {GROUP: group}
        return SimpleNamespace(
            model_config=model, parallel_config=None, additional_config=additional, speculative_config=None
        )

    check_method(compression, engine(2, 1))
    with pytest.raises(KVCompressionError, match="is for 2 layers of 1 KV heads, but .* has 30 of 3; use"):
        check_method(compression, engine(30, 3))
    check_method(compression, engine(2, 1, 4096))
    # Of whose layers not all are compacted: which are is known once the engine has its groups.
    check_method(compression, engine(30, 3, 128))
    check_method(compression, engine(30, 3, 128, group={"layers": 2, "heads": 1}))
    check_method(compression, engine(30, 3, types=["chunked_attention", "full_attention"]))
    with pytest.raises(KVCompressionError, match="is for 2 layers of 1 KV heads, but .* has 5 of 2; use"):
        check_method(compression, engine(30, 3, 128, group={"layers": 5, "heads": 2}))


WINDOWS, STATES = dict(get_sliding_window=lambda: 128), dict(is_hybrid=True)
CHUNKS = dict(hf_text_config=SimpleNamespace(layer_types=["chunked_attention", "full_attention"]))


def _engine_of(mamba_cache_mode: str = "align", **changes):
    plain = dict(
        get_num_layers=lambda _: 2,
        get_num_kv_heads=lambda _: 1,
        use_mla=False,
        get_sliding_window=lambda: None,
        hf_text_config=SimpleNamespace(layer_types=None),
        is_hybrid=False,
        max_model_len=4096,
    )
    return SimpleNamespace(
        model_config=SimpleNamespace(**plain | changes),
        cache_config=SimpleNamespace(enable_prefix_caching=True, mamba_cache_mode=mamba_cache_mode),
        parallel_config=None,
        additional_config={},
        speculative_config=None,
    )


@pytest.mark.parametrize(
    ("engine", "problem"),
    [
        (_engine_of(), None),
        (_engine_of(**WINDOWS), None),
        (_engine_of(**STATES), None),
        (_engine_of("all", **STATES), "keep states need --mamba-cache-mode align; leave prefix_share out"),
        (_engine_of(**CHUNKS), None),
    ],
)
def test_prefixes_of_models_with_other_layers_are_served_or_refused_at_start_up(engine, problem):
    share = KVCompressionConfig.parse("streaming_llm:prefix_share=0.5")
    check_method(KVCompressionConfig.parse("streaming_llm"), engine)
    if problem is None:
        return check_method(share, engine)
    with pytest.raises(KVCompressionError, match=problem):
        check_method(share, engine)


def test_ranks_with_a_scheduler_each_cannot_solve_by_the_clock():
    def engine(executor):
        model = SimpleNamespace(
            uses_mrope=False,
            use_mla=False,
            hf_text_config=SimpleNamespace(rope_parameters={"rope_type": "default"}),
            get_num_layers=lambda parallel: 2,
            get_num_kv_heads=lambda parallel: 2,
            get_head_size=lambda: 64,
            dtype=torch.bfloat16,
            skip_tokenizer_init=False,
            is_hybrid=False,
            get_sliding_window=lambda: None,
            max_model_len=4096,
        )
        return SimpleNamespace(
            model_config=model,
            cache_config=SimpleNamespace(cache_dtype="auto", block_size=32),
            parallel_config=SimpleNamespace(distributed_executor_backend=executor),
            scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_active_seqs=None),
            aux_output_config=SimpleNamespace(enabled=False),
            additional_config={},
            speculative_config=None,
        )

    for options in ("attention_matching", "attention_matching:queries=prompt"):
        check_method(KVCompressionConfig.parse(options), engine("mp"))
        with pytest.raises(KVCompressionError, match="one scheduler's clock; use another --distributed-ex"):
            check_method(KVCompressionConfig.parse(options), engine("external_launcher"))


def test_a_repetition_needs_a_place_and_cannot_return_auxiliary_outputs():
    def engine(enabled=False, most=8, active=None, window=None, executor="mp"):
        model = SimpleNamespace(
            uses_mrope=False,
            use_mla=False,
            hf_text_config=SimpleNamespace(rope_parameters={"rope_type": "default"}),
            get_num_layers=lambda parallel: 2,
            get_num_kv_heads=lambda parallel: 2,
            skip_tokenizer_init=False,
            is_hybrid=False,
            get_sliding_window=lambda: window,
            max_model_len=4096,
        )
        return SimpleNamespace(
            model_config=model,
            parallel_config=SimpleNamespace(distributed_executor_backend=executor),
            scheduler_config=SimpleNamespace(max_num_seqs=most, max_num_active_seqs=active),
            aux_output_config=SimpleNamespace(enabled=enabled),
            additional_config={},
            speculative_config=None,
        )

    check_method(KVCompressionConfig.parse("kvzip"), engine(False))
    check_method(KVCompressionConfig.parse("snapkv"), engine(True))
    check_method(KVCompressionConfig.parse("kvzip"), engine(executor="external_launcher"))
    with pytest.raises(KVCompressionError, match="kvzip does not work with auxiliary outputs; remove"):
        check_method(KVCompressionConfig.parse("kvzip"), engine(True))
    for places in ({"most": 1}, {"active": 1}):
        check_method(KVCompressionConfig.parse("snapkv"), engine(**places))
        with pytest.raises(
            KVCompressionError, match="use --max-num-seqs and --max-num-active-seqs 2 or more"
        ):
            check_method(KVCompressionConfig.parse("kvzip"), engine(**places))
