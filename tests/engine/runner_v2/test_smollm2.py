"""SmolLM2's first layers for a few tokens: Runner V2 and the GPU backend against V1 on vLLM's CPU kernel."""

import torch
from harness import first_difference, sampling


def test_same_kept_tokens_and_same_answer(smollm2, long_ids, start_engine):
    options = dict(
        max_model_len=256,
        num_gpu_blocks_override=24,
        hf_overrides={"num_hidden_layers": 4},  # each costs the interpreter as much
        additional_config={"kv_compression": "kv_compress:budget=0.4,window=8"},
    )
    v1, v2 = start_engine(smollm2, "v1", "cpu", **options), start_engine(smollm2, "v2", "gpu", **options)
    request = long_ids(72), sampling(3)
    one, two = v1.run(*request), v2.run(*request)
    assert v1.compactions[0].counts.shape == (4, 3)
    for ours, theirs in zip(v1.compactions, v2.compactions, strict=True):
        assert torch.equal(ours.counts, theirs.counts) and torch.equal(ours.kept, theirs.kept)
    assert len(v2.compactions) == 1
    assert first_difference(one, two) is None
