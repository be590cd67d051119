"""The crowd of `../test_randomised.py`, shortened, on Runner V2 and the GPU backend."""

import random

import pytest
import torch
from crowd import Member, compacted, compare_with_alone, finished, in_time, serve, tolerate

OPTIONS = [
    None,
    "kv_compress:budget=0.3,window=8",
    "snapkv:budget=0.3,window=8,recompact_every=3",
    "h2o:budget=0.4,window=8",
    "foresight:budget=0.6,window=8,threshold=30,recompact_every=3",
    "kivi+kivi2:window=8,recompact_every=3",
    "snapkv+auto:budget=0.3,window=8,recompact_every=3",
    "mixed_dim_kv:budget=0.4,window=8,recompact_every=3",
    "off",
]
POOL = 9  # blocks; the longest prompt needs 5


class Quiet(Member):
    def params(self, samples: int = 1):
        params = super().params(samples)
        params.detokenize = False
        return params


@pytest.fixture(scope="module")
def engine(tiny, start_engine):
    return start_engine(
        tiny,
        "v2",
        "gpu",
        asynchronous=True,
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_batched_tokens=128,
        max_num_seqs=6,
        num_gpu_blocks_override=24,
        additional_config={"kv_compression": "snapkv:budget=0.4,window=8"},
    )


def test_a_crowd_in_a_small_pool(engine):
    random_ = random.Random(3)
    members = {}
    for index in range(14):
        generator = torch.Generator().manual_seed(index // 2)  # every two share their prefix
        prompt = torch.randint(3, 300, (random_.randint(60, 140),), generator=generator).tolist()
        steps_to_live = 4 if index in (3, 8) else None
        members[f"crowd{index}"] = Quiet(prompt, 6, 1, OPTIONS[index % len(OPTIONS)], steps_to_live)
    run = serve(engine, members, POOL, random_)
    assert run.free_after == run.free_before
    engine.check_nothing_left()
    assert run.sent == [compaction.job for compaction in run.compactions]
    assert run.preemptions or engine.late, "the pool was large enough"
    assert run.most_running > 1
    assert any(job.config.threshold is not None for job in run.sent)
    ended = [name for name in members if finished(run, name)]
    assert 8 <= len(ended) < len(members)
    chosen = list(in_time(compacted(run), engine))
    assert len(chosen) >= 5
    differences: list = []
    compare_with_alone(run, engine, chosen[:4], differences)
    tolerate(differences, len(chosen))
