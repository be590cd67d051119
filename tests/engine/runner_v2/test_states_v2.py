"""States beside compacted layers on Runner V2 and the GPU backend: as on Runner V1 and a CPU."""

import pytest
import torch
from harness import STATEFUL, first_difference, sampling
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


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_same_kept_tokens_and_same_answers(model, start_engine, tmp_path):
    options = OPTIONS | STATEFUL["lfm2"]
    engines = {
        ("v1", "cpu"): start_engine(model, "v1", "cpu", **options),
        ("v2", "gpu"): start_engine(model, "v2", "gpu", asynchronous=True, **options),
    }
    found = {}
    for name, engine in engines.items():
        requests = [
            (prompt(index, length), sampling(6, method, detokenize=False))
            for index, (method, length) in enumerate(REQUESTS)
        ]
        free = engine.free
        outputs = engine.run_all(requests)
        by_request: dict[str, list] = {}
        for compaction in engine.compactions:
            by_request.setdefault(compaction.request, []).append(compaction)
        assert engine.sent == [compaction.job for compaction in engine.compactions]
        engine.check_accounts(), engine.check_nothing_left()
        assert engine.free == free and len(engine.managers) == 2 and engine.parts == 2
        found[name] = outputs, by_request
        # And a prefix of each is what it was, once it was saved and loaded.
        check_saved(engine, prompt(20, 195), "knorm:budget=0.3,window=8", tmp_path / name[0])
        assert engine.free == free
    (plain_outputs, plain), (outputs, compactions) = found.values()
    assert plain.keys() == compactions.keys() and len(plain) == len(REQUESTS) - 1
    for name, events in plain.items():
        assert len(events) == len(compactions[name])
        for one, two in zip(events, compactions[name], strict=True):
            assert torch.equal(one.counts, two.counts) and torch.equal(one.kept, two.kept), one.job
    for (method, _), one, two in zip(REQUESTS, plain_outputs, outputs, strict=True):
        assert first_difference(one, two) is None, method
