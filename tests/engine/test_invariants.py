"""Stock where nothing is due, Jobs that all run, batches that do not matter, refusals."""

import json
from dataclasses import replace

import pytest
import torch
from harness import Engine, sampling, tokens
from vllm import EngineArgs
from vllm.config import KVTransferConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm_kvcompress import touch_points
from vllm_kvcompress.plugin import configure


def exact(outputs) -> list:
    """Tokens and log-probabilities to the last bit."""
    return [
        [sorted((token, lp.logprob) for token, lp in top.items()) for top in out.outputs[sample].logprobs]
        for out in outputs
        for sample in range(len(out.outputs))
    ]


def attention_layers(engine: Engine) -> list:
    context = engine.worker.compilation_config.static_forward_context
    return [layer for layer in context.values() if hasattr(layer, "impl")]


# ---------------------------------------------------------------------- 1: installed, not configured


def test_without_configuration_every_class_is_vllms_own(stock, shared_engine):
    own = [
        type(stock.scheduler),
        type(stock.worker),
        type(stock.scheduler.kv_cache_manager.coordinator.single_type_managers[0]),
        *{type(layer.impl) for layer in attention_layers(stock)},
        *{layer.get_attn_backend() for layer in attention_layers(stock)},
    ]
    assert len(own) == 5
    assert [cls.__name__ for cls in own] == [
        type(stock.scheduler).__name__,
        "CPUWorker",
        "FullAttentionManager",
        "CPUAttentionBackendImpl",
        "CPUAttentionBackend",
    ]
    assert all(cls.__module__.startswith("vllm.v1.") for cls in own)
    # The same look at an engine with compression finds nothing of the kind, so the look is sharp.
    assert all("vllm_kvcompress" in type(layer.impl).__module__ for layer in attention_layers(shared_engine))
    assert type(stock.scheduler) in type(shared_engine.scheduler).__mro__[1:]


def test_a_request_option_without_a_configured_engine_is_refused(stock):
    with pytest.raises(VLLMValidationError) as refused:
        stock.add([1, 2, 3], sampling(1, "snapkv:budget=0.5"))
    assert "\n" not in str(refused.value) and "--kv-compression" in str(refused.value)


# ---------------------------------------------------------------------- 2: configured, nothing due


@pytest.mark.parametrize("why", ["short prompts", "off"])
def test_with_nothing_due_outputs_are_stocks_to_the_last_bit(engine, stock, long_ids, why):
    lengths = [5, 31, 33, 60, 64, 90] if why == "short prompts" else [5, 200, 333, 600]
    prompts = [long_ids(length, seed=20 + i) for i, length in enumerate(lengths)]
    compression = None if why == "short prompts" else "off"
    stock.forget_prefixes()
    expected = stock.run_all((prompt, sampling(40)) for prompt in prompts)
    if why == "short prompts":
        # One block at most lies below the 32 window tokens: nothing to free.
        assert max(lengths) < 96
    got = engine.run_all((prompt, sampling(40, compression)) for prompt in prompts)
    assert not engine.sent
    assert exact(got) == exact(expected)


def test_the_first_token_is_stocks_to_the_last_bit(engine, stock, long_ids):
    # The prompt is computed and observed, but compacted only afterwards.
    prompt = long_ids(600, seed=30)
    stock.forget_prefixes()
    (expected,) = exact([stock.run(prompt, sampling(3))])
    (got,) = exact([engine.run(prompt, sampling(3))])
    assert len(engine.compactions) == 1
    assert got[0] == expected[0] and got[1] != expected[1]


# ---------------------------------------------------------------------- 5: Jobs


def test_every_job_that_is_sent_is_executed_once_in_order(engine, long_ids):
    requests = [(long_ids(100 + 37 * i, seed=40 + i), sampling(3 + i % 4)) for i in range(12)]
    engine.run_all(requests)
    assert engine.sent == [compaction.job for compaction in engine.compactions]
    assert len({job.request_id for job in engine.sent}) == len(engine.sent) == len(requests)


def test_a_request_that_ends_with_its_first_token_is_never_compacted(engine, long_ids):
    engine.run(long_ids(300, seed=50), sampling(1))
    assert not engine.sent and not engine.compactions


def test_prompts_are_compacted_when_whole_not_between_chunks(engine, long_ids):
    # 1,300 tokens are computed in three chunks of at most 512.
    engine.run_all([(long_ids(1300, seed=51), sampling(4)), (long_ids(700, seed=52), sampling(4))])
    assert sorted(c.num_computed for c in engine.compactions) == [700, 1300]


# ---------------------------------------------------------------------- 8: the batch does not matter


def test_a_request_keeps_the_same_tokens_alone_and_in_a_batch(engine, long_ids):
    options = [
        "snapkv:budget=0.25",
        "kv_compress:budget=0.25",
        "adakv:budget=0.3",
        "streaming_llm:budget=0.5",
    ]
    requests = [
        (long_ids(200 + 90 * i, seed=60 + i), sampling(6 + i, option)) for i, option in enumerate(options)
    ]
    batch = engine.run_all(requests)
    together = {len(c.positions()) and c.job.num_tokens: c for c in engine.compactions}
    for (prompt, params), in_batch in zip(requests, batch, strict=True):
        alone = engine.run_fresh(prompt, params)
        last, other = engine.compactions[-1], together[len(prompt)]
        assert torch.equal(last.counts, other.counts) and torch.equal(last.kept, other.kept)
        assert tokens(alone) == tokens(in_batch)


# ---------------------------------------------------------------------- 9: refusals

LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=128,
    max_position_embeddings=512,
)
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 128}
DEEPSEEK = {
    **LLAMA,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "first_k_dense_replace": 2,
}
MAMBA = dict(
    architectures=["MambaForCausalLM"],
    model_type="mamba",
    hidden_size=64,
    num_hidden_layers=2,
    state_size=16,
    vocab_size=128,
)
WHISPER = dict(
    architectures=["WhisperForConditionalGeneration"],
    model_type="whisper",
    d_model=64,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    vocab_size=128,
    max_source_positions=64,
    max_target_positions=64,
)

CONFIG = {"method": "snapkv", "budget": 0.25}

# what is wrong: model, engine arguments, compression options, a word that the message must contain
REFUSED = {
    "quantized cache": (LLAMA, dict(kv_cache_dtype="int8_per_token_head"), CONFIG, "kv-cache-dtype"),
    "block size": (LLAMA, dict(block_size=16), CONFIG, "block-size"),
    "connector": (
        LLAMA,
        dict(kv_transfer_config=KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")),
        CONFIG,
        "kv-transfer-config",
    ),
    "own scheduler": (
        LLAMA,
        dict(scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler"),
        CONFIG,
        "scheduler",
    ),
    "sliding window": (MISTRAL, {}, CONFIG, "sliding"),
    "latent attention": (DEEPSEEK, {}, CONFIG, "MLA"),
    "state space alone": (MAMBA, {}, CONFIG, "without attention"),
    "encoder-decoder": (WHISPER, {}, CONFIG, "encoder-decoder"),
    "pooling": (LLAMA, dict(runner="pooling"), CONFIG, "pooling"),
    "unknown method": (LLAMA, {}, {"method": "snpkv"}, "snapkv"),
    "unknown allocation": (LLAMA, {}, {**CONFIG, "allocation": "globl"}, "global"),
    "unknown option": (LLAMA, {}, {**CONFIG, "kernelsize": 7}, "kernel_size"),
    "budget of nothing": (LLAMA, {}, {**CONFIG, "budget": 0}, "budget"),
    "budget above everything": (LLAMA, {}, {**CONFIG, "budget": 1.5}, "budget"),
    "budget in words": (LLAMA, {}, {**CONFIG, "budget": "half"}, "budget"),
    "negative window": (LLAMA, {}, {**CONFIG, "window": -1}, "window"),
    "even kernel": (LLAMA, {}, {**CONFIG, "kernel_size": 4}, "kernel_size"),
    "no such form": (LLAMA, {}, "snapkv:budget", "budget"),
    "wrong type": (LLAMA, {}, 0.25, "kv_compression"),
}


def engine_config(folder, model: dict, compression=None, **arguments):
    (folder / "config.json").write_text(json.dumps(model))
    additional = {} if compression is None else {"additional_config": {"kv_compression": compression}}
    options = dict(skip_tokenizer_init=True, load_format="dummy", dtype="bfloat16", block_size=32)
    return EngineArgs(model=str(folder), **{**options, **additional, **arguments}).create_engine_config()


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_refused_with_one_line(tmp_path, what):
    model, arguments, compression, word = REFUSED[what]
    with pytest.raises(ValueError) as refused:
        engine_config(tmp_path, model, compression, **arguments)
    message = str(refused.value)
    assert "\n" not in message and len(message) < 300
    assert word in message


@pytest.mark.parametrize("what", ["quantized cache", "block size", "sliding window", "own scheduler"])
def test_what_compression_refuses_stock_accepts(tmp_path, what):
    # Otherwise the refusals above might be vLLM's.
    model, arguments, _, _ = REFUSED[what]
    config = engine_config(tmp_path, model, None, **arguments)
    assert "vllm_kvcompress" not in config.parallel_config.worker_cls


def test_an_unknown_vllm_is_refused_by_what_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.34.0")
    engine_config(tmp_path, LLAMA, CONFIG)  # nothing has
    known = touch_points.TABLE["vllm.v1.core.sched.scheduler:Scheduler"]
    other = replace(
        known, overrides={**known.overrides, "schedule": "(self, throttle_prefills=..., gently=...)"}
    )
    monkeypatch.setitem(touch_points.TABLE, "vllm.v1.core.sched.scheduler:Scheduler", other)
    with pytest.raises(ValueError) as refused:
        engine_config(tmp_path, LLAMA, CONFIG)
    message = str(refused.value)
    assert "\n" not in message and "0.34.0" in message
    assert "Scheduler.schedule does not take gently" in message
    engine_config(tmp_path, LLAMA, None)  # who does not ask for compression is not looked at


@pytest.mark.parametrize("compression", [CONFIG, "snapkv:budget=0.25"])
def test_a_supported_configuration_is_accepted(tmp_path, compression):
    config = engine_config(tmp_path, LLAMA, compression)
    assert "vllm_kvcompress" in config.parallel_config.worker_cls
    assert "vllm_kvcompress" in str(config.scheduler_config.scheduler_cls)


def test_a_configuration_that_says_off_changes_nothing(tmp_path):
    config = engine_config(tmp_path, LLAMA, "off")
    assert "vllm_kvcompress" not in config.parallel_config.worker_cls
    assert config.scheduler_config.scheduler_cls is None


@pytest.mark.parametrize(
    "option",
    ["snpkv", "snapkv:budget=2", "snapkv:kernel=3", {"budget": "much"}, {"methd": "snapkv"}, 0.25, "", []],
)
def test_a_bad_request_option_is_refused_with_one_line_and_leaves_nothing(engine, option):
    with pytest.raises(VLLMValidationError) as refused:
        engine.add(list(range(100)), sampling(1, option))
    message = str(refused.value)
    assert message and "\n" not in message
    assert not engine.scheduler.requests


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_the_scheduler_extends_the_one_vllm_would_use(tmp_path, async_scheduling):
    # vLLM's CPU platform always schedules synchronously, so the choice is made here.
    config = engine_config(tmp_path, LLAMA)
    config.scheduler_config.async_scheduling = async_scheduling
    own = config.scheduler_config.get_scheduler_cls()
    config.additional_config = {"kv_compression": CONFIG}
    ours = configure(config).scheduler_config.get_scheduler_cls()
    assert ours is not own and issubclass(ours, own)
    assert issubclass(ours, AsyncScheduler) is async_scheduling
