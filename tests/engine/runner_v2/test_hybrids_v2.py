"""Windows, chunks and sinks beside compacted layers, on Runner V2 and the GPU backend: as on V1 and a CPU."""

import pytest
import torch
from alike import assert_same, prompt, served
from pinned import check_saved

OPTIONS = dict(
    skip_tokenizer_init=True,
    max_model_len=512,
    max_num_batched_tokens=128,
    max_num_seqs=8,
    num_gpu_blocks_override=120,
    additional_config={"kv_compression": "snapkv:budget=0.4,window=8"},
)
REQUESTS = [  # method, prompt tokens: all but the first in chunks of at most 128 tokens
    ("kv_compress:budget=0.3,window=8", 120),
    ("adakv:budget=0.3,window=8", 150),
    ("h2o:budget=0.3,window=8,recompact_every=3", 133),
    ("snapkv+kivi8:budget=0.3,window=8", 330),
    ("off", 140),
]


@pytest.fixture(scope="module", params=["gemma3", "gpt-oss", "llama4"])
def model(request, tmp_path_factory):
    """Two layers that slide a window over 64 tokens or attend within chunks of 64, and two of full attention,
    one after the other."""
    from transformers import (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        GptOssConfig,
        GptOssForCausalLM,
        Llama4ForCausalLM,
        Llama4TextConfig,
    )

    torch.manual_seed(0)
    common = dict(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    if request.param == "gemma3":
        made = Gemma3ForCausalLM(Gemma3TextConfig(**common, query_pre_attn_scalar=32))
    elif request.param == "llama4":
        chunked = dict(
            layer_types=["chunked_attention", "full_attention"] * 2,
            no_rope_layers=[1, 0] * 2,
            attention_chunk_size=64,
            intermediate_size_mlp=128,
            interleave_moe_layer_step=2,
            num_local_experts=2,
            num_experts_per_tok=1,
        )
        made = Llama4ForCausalLM(Llama4TextConfig(**common | chunked))
    else:
        made = GptOssForCausalLM(GptOssConfig(**common, num_local_experts=2, num_experts_per_tok=1))
        for layer in made.model.layers:
            layer.self_attn.k_proj.weight.data *= 0.1  # or sinks would not show
            layer.self_attn.sinks.data = 4.0 + 4 * torch.rand(4)
    path = tmp_path_factory.mktemp(request.param)
    made.save_pretrained(path)
    return path


def test_same_kept_tokens_and_same_answers(model, start_engine, tmp_path):
    engines = {
        ("v1", "cpu"): start_engine(model, "v1", "cpu", **OPTIONS),
        ("v2", "gpu"): start_engine(model, "v2", "gpu", asynchronous=True, **OPTIONS),
    }
    found = []
    for name, engine in engines.items():
        free = engine.free
        assert len(engine.managers) == 2
        found.append(served(engine, REQUESTS, 8))
        # And a prefix of each is what it was, once it was saved and loaded.
        check_saved(engine, prompt(20, 130), "knorm:budget=0.3,window=8", tmp_path / name[0])
        assert engine.free == free
    assert len(found[0][1]) == len(REQUESTS) - 1
    assert_same(*found, REQUESTS)
