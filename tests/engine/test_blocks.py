"""Blocks: how many a request holds, which it may write, what others may read, and that all come back."""

import math
from fractions import Fraction

import pytest
import torch
from harness import BLOCK_SIZE, SINKS, WINDOW, first_difference, same_kept, sampling, tokens

from vllm_kvcompress.plan import SPARE_QUERIES


@pytest.mark.parametrize("budget", [0.5, 0.25, 0.125])
def test_a_compacted_request_holds_its_budget_and_the_raw_tail(engine, long_ids, budget):
    free = engine.free
    request = engine.add(long_ids(1500, seed=1), sampling(4, f"snapkv:budget={budget}"))
    engine.step_until_due(request)
    assert engine.held(request) == free - engine.free == 47  # ceil(1500 / 32)

    compaction = engine.step_until_compacted(request)
    # 45 blocks lie below the last 32 tokens, two are the raw tail.
    kept = math.ceil(Fraction(budget) * 45)
    assert compaction.job.boundary == 45 * BLOCK_SIZE
    assert len(compaction.job.source) == 45 and len(compaction.job.destination) == kept
    assert engine.held(request) == free - engine.free == kept + 2
    assert engine.manager.held_blocks(engine.live(request).request_id) == kept + 2
    engine.check_accounts()

    engine.finish()
    assert engine.free == free


def test_the_raw_tail_grows_as_tokens_are_decoded(engine, long_ids):
    # 320 tokens: 9 blocks below the window, of which 3 are kept, and one raw.
    request = engine.add(long_ids(320, seed=2), sampling(36))
    engine.step_until_compacted(request)
    held = {}
    while engine.scheduler.requests:
        held[engine.live(request).num_computed_tokens] = engine.held(request)
        engine.step()
    assert held and all(blocks == 3 + math.ceil((n - 288) / BLOCK_SIZE) for n, blocks in held.items())
    assert set(held.values()) == {3 + 2, 3 + 3}


@pytest.mark.parametrize("when", ["computing the prompt", "due", "compacted"])
def test_an_aborted_request_gives_every_block_back(engine, long_ids, when):
    free = engine.free
    request = engine.add(long_ids(600, seed=3), sampling(50))
    if when == "computing the prompt":
        engine.step()
        assert engine.live(request).num_computed_tokens < 600
    elif when == "due":
        engine.step_until_due(request)
    else:
        engine.step_until_compacted(request)
        engine.step()
    assert engine.free < free
    engine.llm.llm_engine.abort_request([request])
    engine.finish()
    assert engine.free == free
    engine.check_nothing_left()


def test_a_second_request_with_the_same_prompt_hits_the_prefix_cache_and_is_exact(engine, long_ids):
    prompt = long_ids(520, seed=4)
    engine.forget_prefixes()
    first = engine.run(prompt, sampling(16))
    second = engine.run(prompt, sampling(16))
    assert first.num_cached_tokens == 0 and second.num_cached_tokens > 0
    one, other = engine.compactions
    assert same_kept(one, other)
    assert tokens(second) == tokens(first)


def test_requests_that_share_a_live_prefix_do_not_disturb_each_other(engine, stock, long_ids):
    prompt, tight = long_ids(520, seed=5), "snapkv:budget=0.1"
    alone = engine.run_fresh(prompt, sampling(20, tight))
    plain = stock.run_fresh(prompt, sampling(20, None))
    assert tokens(alone) != tokens(plain), "the prompt must tell compacted from uncompressed"

    engine.forget_prefixes()
    engine.compactions.clear()
    first = engine.add(prompt, sampling(20, tight))
    engine.step_until_due(first)
    # Both read the first one's raw blocks: one to be compacted in turn, one to stay as it is.
    second, off = engine.add(prompt, sampling(20, tight)), engine.add(prompt, sampling(20, "off"))
    engine.step_until_compacted(second)
    engine.check_accounts()
    third = engine.add(prompt, sampling(20, "off"))  # reads blocks that both have freed by now
    engine.finish()
    assert engine.outputs[second].num_cached_tokens > 0
    assert engine.outputs[off].num_cached_tokens > 0 and engine.outputs[third].num_cached_tokens > 0
    assert tokens(engine.outputs[first]) == tokens(engine.outputs[second]) == tokens(alone)
    assert tokens(engine.outputs[off]) == tokens(engine.outputs[third]) == tokens(plain)
    assert same_kept(engine.compaction_of(first), engine.compaction_of(second))


@pytest.mark.parametrize("compression", ["off", "kv_compress:budget=0.2"])
def test_a_prompt_that_extends_a_compacted_request_reads_no_tainted_block(engine, long_ids, compression):
    prompt = long_ids(400, seed=6)
    first = engine.run(prompt, sampling(60))  # ends in its 15th block
    assert len(engine.compactions) == 1
    longer = prompt + tokens(first) + long_ids(10, seed=60)
    # Of the first request only the prompt was computed on full context: 12 whole blocks.
    again = engine.run(longer, sampling(16, compression))
    assert 0 < again.num_cached_tokens <= 400 // BLOCK_SIZE * BLOCK_SIZE

    fresh = engine.run_fresh(longer, sampling(16, compression))
    assert fresh.num_cached_tokens == 0
    assert first_difference(again, fresh) is None
    if compression != "off":
        assert same_kept(*engine.compactions[-2:])


@pytest.mark.parametrize("leave", [0, 2])
def test_in_a_full_pool_a_request_is_compacted_into_its_own_blocks(engine, long_ids, leave):
    prompt = long_ids(520, seed=8)
    expected = engine.run_fresh(prompt, sampling(16))
    roomy = engine.compactions[-1]
    assert not set(roomy.job.source) & set(roomy.job.destination)

    engine.forget_prefixes()
    request = engine.add(prompt, sampling(16))
    engine.step_until_due(request)
    with engine.squeezed(leave):
        crowded = engine.step_until_compacted(request)
        assert crowded.num_computed == len(prompt), "compacted when due, not later"
        own = set(crowded.job.source) & set(crowded.job.destination)
        assert len(own) == len(crowded.job.destination) - leave == 4 - leave
        assert engine.held(request) == 4 + 2  # 15 blocks below the window, a quarter kept; two raw
        engine.check_accounts()
        engine.finish()
    assert same_kept(crowded, roomy)
    assert tokens(engine.outputs[request]) == tokens(expected)

    # The overwritten blocks must not be found under their old hashes.
    again = engine.run(prompt, sampling(16))
    assert tokens(again) == tokens(expected)


def test_in_a_full_pool_blocks_that_others_read_are_left_alone(engine, stock, long_ids):
    prompt = long_ids(520, seed=9)
    expected = engine.run_fresh(prompt, sampling(16))
    roomy = engine.compactions[-1]
    plain = stock.run_fresh(prompt, sampling(16, None))

    engine.forget_prefixes()
    reader = engine.add(prompt, sampling(8, "off"))
    engine.step_until_due(reader)
    request = engine.add(prompt, sampling(16))
    with engine.squeezed(2):  # what the second request needs beside the 15 blocks that it shares
        # `check_written_blocks` looks at every destination when it is written.
        late = engine.step_until_compacted(request)
        engine.finish()
    assert tokens(engine.outputs[reader]) == tokens(plain)[:8]
    # Until the blocks are there it answers as without compression; then it keeps what it always would have.
    raw = late.num_computed - len(prompt) + 1
    assert 8 > raw > 1 and tokens(expected)[1] != tokens(plain)[1]
    assert tokens(engine.outputs[request])[:raw] == tokens(plain)[:raw]
    assert late.job.num_tokens == len(prompt) and same_kept(late, roomy)


def test_in_a_full_pool_requests_that_share_every_block_do_not_wait_for_each_other(engine, stock, long_ids):
    prompt = long_ids(520, seed=12)
    plain = stock.run_fresh(prompt, sampling(16, None))

    # Both hit 15 cached blocks and take the last four besides: none is left to be compacted into.
    engine.run_fresh(prompt, sampling(1, "off"))
    engine.compactions.clear()
    with engine.squeezed(15 + 4):
        one, other = engine.add(prompt, sampling(16)), engine.add(prompt, sampling(16))
        engine.step()
        assert engine.free == 0 and engine.live(one).num_computed_tokens == len(prompt)
        for _ in range(16):  # a token in every step, as without compression
            engine.check_accounts()
            engine.step()
        assert not engine.scheduler.requests and engine.free == 15 + 4
    assert not engine.compactions
    assert tokens(engine.outputs[one]) == tokens(engine.outputs[other]) == tokens(plain)


def test_a_preempted_request_is_compacted_again_to_the_same_tokens(engine, long_ids):
    prompt = long_ids(520, seed=10)
    expected = engine.run_fresh(prompt, sampling(40))

    engine.forget_prefixes()
    engine.compactions.clear()
    request = engine.add(prompt, sampling(40))
    engine.step_until_compacted(request)
    for _ in range(20):
        engine.step()
    before, live = engine.preemptions, engine.live(request)
    assert engine.llm.reset_prefix_cache(reset_running_requests=True)
    assert engine.preemptions == before + 1 and live.num_output_tokens > 20
    assert live.request_id not in engine.manager.compacted
    engine.finish()
    first, second = engine.compactions
    assert same_kept(first, second)
    assert second.num_computed == len(prompt), "the output is computed again on compacted context"
    assert first_difference(engine.outputs[request], expected) is None


@pytest.mark.parametrize("num_tokens", [63, 64, 95, 96, 97])
def test_a_prompt_too_short_to_free_a_block_is_left_alone(engine, stock, long_ids, num_tokens):
    # Below the 32 window tokens two whole blocks are needed for a budget of one half to free one.
    prompt = long_ids(num_tokens, seed=11)
    output = engine.run_fresh(prompt, sampling(8, "snapkv:budget=0.5"))
    if num_tokens < 96:
        assert not engine.compactions
        assert tokens(output) == tokens(stock.run_fresh(prompt, sampling(8, None)))
    else:
        (compaction,) = engine.compactions
        assert len(compaction.job.source) == 2 and len(compaction.job.destination) == 1
        assert all(kept[:SINKS] == list(range(SINKS)) for row in compaction.positions() for kept in row)


def test_a_policy_that_watches_every_query_reads_no_cached_prefix(engine, long_ids):
    prompt, params = long_ids(400, seed=61), sampling(6, "h2o:budget=0.25")
    fresh = engine.run_fresh(prompt, params)
    again = engine.run(prompt, params)
    assert again.num_cached_tokens == 0
    assert engine.run(prompt, sampling(6, "snapkv:budget=0.25")).num_cached_tokens > 0
    first, second = engine.compactions[:2]
    assert torch.equal(first.kept, second.kept)
    assert tokens(again) == tokens(fresh)


def test_no_more_requests_start_than_there_is_memory_for_their_queries(engine, long_ids, monkeypatch):
    ring = WINDOW + SPARE_QUERIES
    monkeypatch.setattr(engine.scheduler._rings, "budget", 2 * ring)
    # As on a GPU; a window that is larger than the budget comes alone.
    options = ["snapkv:budget=0.25"] * 4 + [
        f"snapkv:budget=0.25,window={3 * ring}",
        "streaming_llm:budget=0.25",
    ]
    for index, option in enumerate(options):
        engine.add(long_ids(400, seed=60 + index), sampling(4, option))
    most = 0
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        rings = [seen.ring.shape[1] for seen in engine.worker.compression.observer._observed.values()]
        assert sum(rings) <= 2 * ring or len(rings) == 1
        most = max(most, len(rings))
    assert most == 2 and len(engine.compactions) == len(options)
