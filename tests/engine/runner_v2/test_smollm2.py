"""SmolLM2's first layers for a few tokens: Runner V2 and the GPU backend against V1 on vLLM's CPU kernel."""

from pathlib import Path

import pytest
import torch
from harness import first_difference, sampling

NUM_LAYERS = 4  # each costs the interpreter as much


@pytest.fixture
def first_layers(smollm2, tokenizer, tmp_path) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, num_hidden_layers=NUM_LAYERS)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_same_kept_tokens_and_same_answer(first_layers, long_ids, start_engine):
    options = dict(
        max_model_len=256,
        num_gpu_blocks_override=24,
        additional_config={"kv_compression": "kv_compress:budget=0.4,window=8"},
    )
    v1 = start_engine(first_layers, "v1", "cpu", **options)
    v2 = start_engine(first_layers, "v2", "gpu", **options)
    request = long_ids(72), sampling(3)
    one, two = v1.run(*request), v2.run(*request)
    for ours, theirs in zip(v1.compactions, v2.compactions, strict=True):
        assert torch.equal(ours.counts, theirs.counts) and torch.equal(ours.kept, theirs.kept)
    assert len(v2.compactions) == 1 and v2.compactions[0].counts.shape == (NUM_LAYERS, 3)
    assert first_difference(one, two) is None
