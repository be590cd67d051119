"""A float8 cache on the GPU's path is what a plain one of the same numbers would be, moved as bytes."""

import pytest
import torch
from alike import prompt
from harness import first_difference, sampling
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention import attention as layers
from vllm.v1.attention.backends import triton_attn
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

OPTIONS = dict(
    skip_tokenizer_init=True,
    max_model_len=512,
    max_num_batched_tokens=160,
    max_num_seqs=12,
    num_gpu_blocks_override=80,
    additional_config={"kv_compression": "snapkv:budget=0.4,window=8"},
)
REQUESTS = {  # method: prompt tokens
    "off": 40,
    "kv_compress:budget=0.4,window=8": 165,  # heads compete: runs lie in the other layer's pages
    "snapkv:budget=0.3,window=8,recompact_every=3": 101,  # of 104 tokens one block more is compacted
    "h2o:budget=0.3,window=8": 100,
    "criticalkv:budget=0.4,window=8": 100,
}
KEY_SCALES, VALUE_SCALES = (0.125, 0.0625, 0.25, 0.125, 0.03125), (0.03125, 0.25, 0.125, 0.5, 0.0625)
QUERY_SCALE = 0.25
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(scope="module", autouse=True)
def stock():
    """Layers differ in their scales, and PyTorch writes the cache: Triton's interpreter rounds otherwise.

    A plain cache is given the numbers that the bytes of a float8 one stand for.
    """
    default = layers.set_default_quant_scales

    def of_layer(layer, register_buffer=False):
        default(layer, register_buffer)
        if not register_buffer:
            index = int(layer.layer_name.split(".")[2])
            layer._k_scale.fill_(KEY_SCALES[index]), layer._v_scale.fill_(VALUE_SCALES[index])
            layer._q_scale.fill_(QUERY_SCALE)

    def write(key, value, key_cache, value_cache, slots, cache_dtype, *scales):
        real = slots >= 0
        places = slots[real] // key_cache.shape[1], slots[real] % key_cache.shape[1]
        for new, cache, scale in zip((key, value), (key_cache, value_cache), scales, strict=True):
            stored = (new[: len(slots)][real] / scale).to(FLOAT8)
            if cache.dtype == FLOAT8:
                cache.view(torch.uint8)[places] = stored.view(torch.uint8)
            else:
                cache[places] = stored.to(cache.dtype) * scale

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "set_default_quant_scales", of_layer)
        patch.setattr(triton_attn, "triton_reshape_and_cache_flash", write)
        yield


@pytest.fixture(scope="module")
def engines(tiny, start_engine):
    """One with a float8 cache, one with a plain one."""
    return [start_engine(tiny, "v2", "gpu", kv_cache_dtype=kind, **OPTIONS) for kind in ("fp8", "auto")]


def assert_same(engines, methods) -> None:
    """They keep the same tokens and answer the same."""
    requests = [
        (prompt(index, REQUESTS[method]), sampling(5, method, detokenize=False))
        for index, method in enumerate(methods)
    ]
    results = []
    for engine in engines:
        engine.forget_prefixes(), engine.compactions.clear()
        outputs = engine.run_all(requests)
        engine.check_accounts(), engine.check_nothing_left()
        results.append((outputs, sorted(engine.compactions, key=lambda each: each.request)))
    (outputs, compactions), (plain_outputs, plain_compactions) = results
    assert len(compactions) == len(methods) - ("off" in methods) + 1  # one of them a second time
    for one, other in zip(compactions, plain_compactions, strict=True):
        assert torch.equal(one.counts, other.counts) and torch.equal(one.kept, other.kept), one.job
    for method, *pair in zip(methods, outputs, plain_outputs, strict=True):
        assert first_difference(*pair) is None, method
        assert_logprobs(*pair)


def assert_logprobs(one, other) -> None:
    for left, right in zip(one.outputs[0].logprobs, other.outputs[0].logprobs, strict=True):
        assert left.keys() == right.keys()
        for token, seen in left.items():
            assert abs(seen.logprob - right[token].logprob) < 1e-3


def test_same_kept_tokens_and_same_answers_as_a_plain_cache_of_the_same_numbers(engines):
    cache, plain = (engine.worker.compactor.cache for engine in engines)
    assert cache.keys.dtype == torch.uint8 and plain.keys.dtype == torch.float32
    assert cache.float8.key_scales.tolist() == list(KEY_SCALES[:2]) and plain.float8 is None
    assert_same(engines, list(REQUESTS))


def test_queries_that_are_float8_too_are_read_by_their_scale(engines, monkeypatch):
    """As FlashAttention 3 and vLLM's Triton kernel have them on CUDA; here stock's is given plain ones."""
    seen = []

    def layers_of(engine):
        context = engine.worker.compilation_config.static_forward_context
        return [layer for layer in context.values() if isinstance(layer, Attention)]

    def quantized(query, scale):
        return (query / scale).clamp(-448, 448).to(FLOAT8), scale

    def rounded(query, scale):
        return quantized(query, scale)[0].to(query.dtype) * scale, scale

    for engine, quantize in zip(engines, (quantized, rounded), strict=True):
        for layer in layers_of(engine):
            monkeypatch.setattr(layer, "query_quant", quantize)
            monkeypatch.setattr(layer.impl, "supports_quant_query_input", True)
            monkeypatch.setattr(layer, "kv_cache_dtype", "fp8")  # stock asserts it where it quantizes queries
    forward = TritonAttentionImpl.forward

    def with_plain_queries(self, layer, query, *args):
        seen.append(query.dtype)
        plain = query if query.dtype != FLOAT8 else query.float() * QUERY_SCALE
        return forward(self, layer, plain, *args)

    monkeypatch.setattr(TritonAttentionImpl, "forward", with_plain_queries)
    assert_same(engines, [method for method in REQUESTS if method.startswith(("snapkv", "h2o"))])
    assert set(seen) == {FLOAT8, torch.float32}
    worker = engines[0].worker
    worker.builders[0].warm_up(worker.model_runner.get_model().modules())  # by such queries, too


def test_nothing_compacted_is_bit_identical_to_stock(engines, tiny, start_engine):
    stock = start_engine(
        tiny, "v2", "stock gpu", kv_cache_dtype="fp8", **{**OPTIONS, "additional_config": {}}
    )
    batch = [(prompt(40 + i, 30 + 25 * i), sampling(2, detokenize=False)) for i in range(2)]
    off = [(tokens, sampling(2, "off", detokenize=False)) for tokens, _ in batch]
    for plain, ours in zip(stock.run_all(batch), engines[0].run_all(off), strict=True):
        assert ours.outputs[0].token_ids == plain.outputs[0].token_ids
        assert ours.outputs[0].logprobs == plain.outputs[0].logprobs
