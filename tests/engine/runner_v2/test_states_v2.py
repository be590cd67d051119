"""States beside compacted layers on Runner V2 and the GPU backend: as on Runner V1 and a CPU."""

import pytest
import torch
from alike import assert_same, prompt, served
from harness import STATEFUL
from pinned import check_saved

OPTIONS = dict(
    skip_tokenizer_init=True,
    max_model_len=512,
    max_num_batched_tokens=128,
    max_num_seqs=8,
    num_gpu_blocks_override=120,
    additional_config={"kv_compression": "snapkv:budget=0.4,window=8"},
)
REQUESTS = [  # method, prompt tokens: in chunks of at most 128 tokens
    ("h2o:budget=0.3,window=8,recompact_every=2", 140),
    ("snapkv+kivi8:budget=0.3,window=8", 150),
    ("off", 70),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two short convolutions, whose states are as large as 64 tokens of two layers of full attention."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        layer_types=["conv", "full_attention"] * 2,
        conv_L_cache=48,
        conv_dim=128,
        block_dim=128,
        block_ff_dim=128,
        block_multiple_of=32,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    path = tmp_path_factory.mktemp("lfm2")
    Lfm2ForCausalLM(config).save_pretrained(path)
    return path


def test_same_kept_tokens_and_same_answers(model, start_engine, tmp_path):
    options = OPTIONS | STATEFUL["lfm2"]
    engines = {
        ("v1", "cpu"): start_engine(model, "v1", "cpu", **options),
        ("v2", "gpu"): start_engine(model, "v2", "gpu", asynchronous=True, **options),
    }
    found = []
    for name, engine in engines.items():
        free = engine.free
        assert len(engine.managers) == 2 and engine.parts == 2
        found.append(served(engine, REQUESTS, 6))
        # And a prefix of each is what it was, once it was saved and loaded.
        check_saved(engine, prompt(20, 195), "knorm:budget=0.3,window=8", tmp_path / name[0])
        assert engine.free == free
    assert len(found[0][1]) == len(REQUESTS) - 1
    assert_same(*found, REQUESTS)
