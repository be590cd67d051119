"""Latents (MLA) on Runner V2 and vLLM's CPU backend, scheduled asynchronously: as on Runner V1."""

import pytest
import torch
from alike import assert_same, served
from harness import ROTATES

OPTIONS = dict(
    skip_tokenizer_init=True,
    max_model_len=512,
    max_num_seqs=8,
    num_gpu_blocks_override=160,
    additional_config={"kv_compression": "snapkv:budget=0.4,window=8"},
    **ROTATES,
)
REQUESTS = [  # method, prompt tokens
    ("kv_compress:budget=0.3,window=8", 120),
    ("snapkv:budget=0.3,window=8,recompact_every=4", 150),
    ("h2o:budget=0.3,window=8,recompact_every=4", 133),
    ("kv_compress:budget=0.3,window=8,when=streaming,recompact_every=64", 230),
    ("off", 140),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=320,
        hidden_size=96,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=24,
        n_routed_experts=4,
        first_k_dense_replace=2,
        max_position_embeddings=2048,
        initializer_range=0.15,
    )
    path = tmp_path_factory.mktemp("deepseek")
    DeepseekV2ForCausalLM(config).save_pretrained(path)
    return path


def test_same_kept_tokens_and_same_answers(model, start_engine):
    found = [
        served(start_engine(model, runner, "cpu", asynchronous=runner == "v2", **OPTIONS), REQUESTS, 20)
        for runner in ("v1", "v2")
    ]
    compactions = found[0][1]
    assert len(compactions) == len(REQUESTS) - 1
    assert any(len(events) > 1 for events in compactions.values())
    assert_same(*found, REQUESTS)
