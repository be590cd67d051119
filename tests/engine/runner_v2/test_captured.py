"""A replayed graph stays right: its kernels know no more than the arrays that were there at its capture."""

import pytest
import torch
from alike import prompt, replay_captures, warm_up
from harness import first_difference, sampling

METHODS = ["snapkv:budget=0.3,window=8,recompact_every=3", "adakv:budget=0.3,window=8", "off"]


@pytest.fixture(scope="module")
def engine(tiny, start_engine):
    return start_engine(
        tiny,
        "v2",
        "gpu",
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_batched_tokens=384,
        max_num_seqs=4,
        num_gpu_blocks_override=40,
        additional_config={"kv_compression": "snapkv:budget=0.4,window=8"},
    )


def test_the_warm_up_leaves_nothing_behind(engine):
    warm_up(engine)


def test_decoding_with_the_metadata_of_the_capture_changes_nothing(engine, monkeypatch):
    requests = [
        (prompt(index, 101), sampling(7 - index, method, detokenize=False))
        for index, method in enumerate(METHODS)
    ]
    engine.forget_prefixes()
    wanted = engine.run_all(requests)
    compactions = list(engine.compactions)
    assert len(compactions) == 3  # one of them a second time, by what the rings hold of decoded tokens

    replayed = replay_captures(engine, monkeypatch)
    engine.forget_prefixes(), engine.compactions.clear()
    found = engine.run_all(requests)
    assert {1, 2, 4} == set(replayed)
    for one, two in zip(compactions, engine.compactions, strict=True):
        assert torch.equal(one.counts, two.counts) and torch.equal(one.kept, two.kept)
    for one, two in zip(wanted, found, strict=True):
        assert one.outputs[0].token_ids == two.outputs[0].token_ids
        assert first_difference(one, two) is None
