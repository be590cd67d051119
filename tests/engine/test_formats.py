"""Requests whose tokens are kept in fewer bytes: what they hold, how they grow, and beside others."""

import random
from collections import Counter

import pytest
import torch
from crowd import Member, Run, compacted, finished, in_time, serve
from harness import BLOCK_SIZE, WINDOW, Engine, first_difference, sampling

from vllm_kvcompress import KVCompressionConfig
from vllm_kvcompress.formats import FORMATS, RECORD

EVERY = 128


@pytest.fixture
def in_page(engine):
    """Makes the tokens of a page of a format, in float32."""
    size = engine.manager.kv_cache_spec.head_size
    return lambda name: FORMATS[name].tokens_per_page(2 * BLOCK_SIZE * size * 4, size)


@pytest.mark.parametrize(
    ("options", "format"),
    [
        ("kivi", "kivi4"),
        ("turboquant+turbo2", "turbo2"),
        ("kivi+kivi8", "kivi8"),
        ("kivi+k4v3", "k4v3"),
        ("kivi+auto", "auto"),  # with room for every token in its best part
    ],
)
def test_every_token_stays_in_the_bytes_that_the_format_takes(engine, long_ids, in_page, options, format):
    name = engine.add(long_ids(1000, seed=3), sampling(300, options))
    engine.step_until_compacted(name)
    while engine.llm.llm_engine.has_unfinished_requests():
        compaction = engine.compaction_of(name)
        job, computed = compaction.job, engine.live(name).num_computed_tokens
        assert job.boundary == (job.num_tokens - WINDOW) // BLOCK_SIZE * BLOCK_SIZE
        assert compaction.counts.unique().tolist() == [job.boundary // RECORD]
        assert compaction.kept.view(*compaction.counts.shape, -1).unique(dim=1).shape[1] == 1
        assert compaction.kept.flatten()[: job.boundary].tolist() == list(range(job.boundary))
        encoded = -(-job.boundary // in_page(format))
        assert len(job.destination) == encoded
        assert engine.held(name) == encoded + -(-computed // BLOCK_SIZE) - job.boundary // BLOCK_SIZE
        engine.check_accounts()
        engine.step()
    points = [c.job.num_tokens for c in engine.compactions if c.request == name]
    assert points == [1000, 1000 + EVERY, 1000 + 2 * EVERY]


def test_at_a_budget_a_format_keeps_more_tokens(engine, long_ids, in_page):
    prompt, kept = long_ids(1000, seed=3), {}
    for options in ("snapkv:budget=0.125", "snapkv+kivi4:budget=0.125", "snapkv+turbo2:budget=0.125"):
        engine.forget_prefixes()
        name = engine.add(prompt, sampling(4, options))
        compaction = engine.step_until_compacted(name)
        engine.finish()
        # Of 30 blocks an eighth, or as many as hold every token.
        assert len(compaction.job.destination) == (3 if "turbo2" in options else 4)
        kept[options] = int((compaction.kept >= 0).sum()) / compaction.counts.numel() / 960
    once, four, two = kept.values()
    assert once == pytest.approx(4 * BLOCK_SIZE / 960)
    assert four == pytest.approx(4 * in_page("kivi4") / 960) and two == 1.0


def test_blocks_that_held_records_are_as_good_as_new(engine, stock, long_ids):
    # vLLM's own kernel multiplies what lies behind a row's last token with 0.
    prompts = [long_ids(45, seed=600 + index) for index in range(24)]
    expected = [stock.run(prompt, sampling(20)) for prompt in prompts]
    engine.forget_prefixes()
    with engine.squeezed(44):
        engine.run(long_ids(1000, seed=5), sampling(140, "kivi+kivi2"))
        for prompt, alone in zip(prompts, expected, strict=True):
            assert first_difference(engine.run(prompt, sampling(20, "off")), alone) is None


def test_a_cached_prefix_is_read_and_nothing_encoded_enters_it(engine, stock, long_ids):
    prompt = long_ids(700, seed=8)
    engine.run_fresh(prompt, sampling(1, "off"))
    engine.run(prompt, sampling(140, "kivi"))
    again = engine.run(prompt, sampling(20, "off"))
    assert again.num_cached_tokens >= 640
    assert first_difference(again, stock.run_fresh(prompt, sampling(20))) is None


# ---------------------------------------------------------------------- a crowd

OPTIONS = [
    None,
    "off",
    "kivi:recompact_every=8",
    "kivi+kivi2:recompact_every=8",
    "turboquant",
    "turboquant+turbo3_prod:recompact_every=32",
    "snapkv+kivi4:budget=0.1,recompact_every=8",
    "kv_compress+turbo2:budget=0.2,recompact_every=8",
    "foresight+kivi2:budget=0.1",
    "adakv+kivi8:budget=0.3",
    "pyramidkv+turbo4:budget=0.2",
    "h2o+kivi4:budget=0.2",
    "kvzip+kivi4:budget=0.2,chunk=128",
    "kivi:when=streaming,recompact_every=96",
    "snapkv+kivi4:budget=0.2,when=streaming,recompact_every=96",
    "snapkv+k4v3:budget=0.1,recompact_every=8",
    "foresight+auto:budget=0.1",
    "kv_compress+auto:budget=0.2,recompact_every=8",
    "streaming_llm+auto:budget=0.2,when=streaming,recompact_every=96",
    "mixed_dim_kv:budget=0.15,recompact_every=8",
    "kv_compress+mixed_dim:budget=0.2,when=streaming,recompact_every=96",
]
ONCE_WRITTEN = 0.1  # in log-probability: what lies between two codes may be written either way


@pytest.fixture(scope="module")
def run(shared_engine: Engine, long_ids) -> Run:
    draw = random.Random(5)
    members = {}
    for index in range(90):
        members[f"encoded{index}"] = Member(
            prompt=long_ids(int(draw.triangular(40, 700, 200)), seed=300 + index % 60),
            max_tokens=draw.randint(8, 60),
            samples=2 if draw.random() < 0.1 else 1,
            compression=OPTIONS[index % len(OPTIONS)],
            steps_to_live=draw.randint(0, 30) if draw.random() < 0.15 else None,
        )
    return serve(shared_engine, members, 40, random.Random(6))


def test_a_crowd_of_formats_gives_every_block_back(run, engine):
    assert run.preemptions > 0 and run.most_running > 3
    formats = Counter(c.job.config.record_format for c in run.compactions)
    assert len(formats) == len({KVCompressionConfig.parse(o or "snapkv").record_format for o in OPTIONS})
    assert sum(bool(c.job.previous) for c in run.compactions) > 20
    assert any(set(c.job.destination) & {*c.job.source, *c.job.previous} for c in run.compactions)
    assert run.free_after == run.free_before
    engine.check_nothing_left()
    assert run.sent == [compaction.job for compaction in run.compactions]


def test_members_of_a_crowd_of_formats_are_what_they_are_alone(run, engine):
    of_request = {
        name: own
        for name, own in in_time(compacted(run), engine).items()
        if own[0].job.config.record_format is not None
    }
    assert len(of_request) > 25
    parted = 0
    for name, own in sorted(of_request.items())[:25]:
        member = run.members[name]
        engine.compactions.clear()
        alone = engine.run_fresh(member.prompt, member.params())
        first = next(c for c in engine.compactions if not c.job.previous)
        for compaction in own:
            if not compaction.job.previous:
                assert torch.equal(compaction.kept, first.kept), name
        print(name, member.compression, len(member.prompt))
        for sample in range(len(run.outputs[name].outputs)):
            parted += first_difference(run.outputs[name], alone, sample, ONCE_WRITTEN) is not None
    assert parted <= 5
    assert all(finished(run, name) for name in of_request)
