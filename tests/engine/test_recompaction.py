"""Compaction that goes on: long outputs within a budget, and prompts larger than the pool."""

import math
from fractions import Fraction

import pytest
import torch
from harness import BLOCK_SIZE, SINKS, WINDOW, first_difference, sampling, tokens
from vllm.exceptions import VLLMValidationError

EVERY = 64


def blocks_of(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


def expected_points(num_prompt: int, num_tokens: int, every: int, streaming: bool) -> list[int]:
    points = [*range(every, num_prompt, every)] if streaming else []
    points.append(num_prompt)
    while points[-1] + every < num_tokens:
        points.append(points[-1] + every)
    return points


@pytest.mark.parametrize("method", ["snapkv", "kv_compress", "h2o", "keydiff:allocation=adaptive"])
def test_a_long_output_stays_within_its_budget(engine, long_ids, method):
    separator = "," if ":" in method else ":"
    options = f"{method}{separator}budget=0.25,recompact_every={EVERY}"
    name = engine.add(long_ids(500, seed=3), sampling(150, options))
    held, most = {}, 0
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        if engine.scheduler.requests:
            computed = engine.live(name).num_computed_tokens
            held[computed] = engine.held(name)
            engine.check_accounts()
    jobs = [c.job for c in engine.compactions]
    assert [job.num_tokens for job in jobs] == expected_points(500, 650, EVERY, streaming=False)
    boundary = 0
    for job in jobs:
        source = (job.num_tokens - WINDOW) // BLOCK_SIZE
        assert job.boundary == source * BLOCK_SIZE and job.previous_boundary == boundary
        assert len(job.destination) == math.ceil(Fraction("0.25") * source)
        boundary = job.boundary
    for computed, blocks in held.items():
        if computed > 500:
            last = max(job.num_tokens for job in jobs if job.num_tokens < computed)
            source = (last - WINDOW) // BLOCK_SIZE
            kept = math.ceil(Fraction("0.25") * source)
            most = max(most, blocks)
            assert blocks == kept + blocks_of(computed) - source, computed
    assert most <= math.ceil(650 * 0.25 / BLOCK_SIZE) + blocks_of(EVERY + WINDOW) + 1


def test_a_fixed_number_of_tokens_bounds_the_blocks_of_any_output(engine, long_ids):
    options = f"snapkv:budget=1.0,max_tokens_kept=128,recompact_every={EVERY}"
    name = engine.add(long_ids(200, seed=4), sampling(300, options))
    held = []
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        if engine.scheduler.requests and engine.compaction_of(name):
            held.append(engine.held(name))
    assert max(held[-100:]) == max(held[50:150]), "it does not grow"
    assert max(held) <= 128 // BLOCK_SIZE + blocks_of(EVERY + WINDOW) + 1
    assert all(len(c.job.destination) == 4 for c in engine.compactions[1:])


def test_a_short_prompt_is_compacted_once_its_output_is_long(engine, long_ids):
    name = engine.add(long_ids(20, seed=5), sampling(200, f"snapkv:budget=0.25,recompact_every={EVERY}"))
    engine.finish()
    engine.outputs.pop(name)
    assert [c.job.num_tokens for c in engine.compactions] == [
        20 + 2 * EVERY,
        20 + 3 * EVERY,
    ]  # earlier nothing would be freed


def test_what_a_head_keeps_comes_from_what_it_kept_before_and_the_new_tokens(engine, long_ids):
    options = f"kv_compress:budget=0.25,recompact_every={EVERY}"
    engine.run(long_ids(500, seed=6), sampling(140, options))
    assert len(engine.compactions) > 2
    for before, after in zip(engine.compactions, engine.compactions[1:], strict=False):
        assert int(after.counts.sum()) == len(after.job.destination) * after.counts.numel()
        fresh = set(range(before.job.boundary, after.job.boundary))
        rows = zip(before.positions(), after.positions(), strict=True)
        for old, new in ((o, n) for layer in rows for o, n in zip(*layer, strict=True)):
            assert new == sorted(set(new)) and new[:SINKS] == list(range(SINKS))
            assert set(new) <= set(old) | fresh
    assert any(
        set(new) & set(range(500, 1000)) for layer in engine.compactions[-1].positions() for new in layer
    ), "tokens of the output are kept too"


@pytest.mark.parametrize("when", ["prompt", "streaming"])
def test_a_request_preempted_between_two_compactions_ends_as_if_it_never_was(engine, long_ids, when):
    prompt = long_ids(400, seed=7)
    params = sampling(90, f"snapkv:budget=0.25,when={when},recompact_every={EVERY}")
    alone = engine.run(prompt, params)
    reference = list(engine.compactions)
    engine.forget_prefixes()
    engine.compactions.clear()
    name = engine.add(prompt, params)
    while sum(c.request == name for c in engine.compactions) < len(reference) - 1:
        engine.step()
    for _ in range(5):
        engine.step()
    request = engine.live(name)
    engine.scheduler.running.remove(request)
    engine.scheduler._preempt_request(request, 0.0)
    engine.compactions.clear()
    engine.finish()
    for again, first in zip(engine.compactions, reference, strict=True):
        assert again.job.num_tokens == first.job.num_tokens
        assert torch.equal(again.counts, first.counts) and torch.equal(again.kept, first.kept)
    assert first_difference(engine.outputs.pop(name), alone) is None


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_request_aborted_around_a_later_compaction_gives_every_block_back(engine, long_ids, steps):
    free = engine.free
    name = engine.add(long_ids(300, seed=8), sampling(400, f"snapkv:budget=0.25,recompact_every={EVERY}"))
    while sum(c.request == name for c in engine.compactions) < 2:
        engine.step()
    for _ in range(steps):
        engine.step()
    engine.llm.llm_engine.abort_request([name])
    engine.finish()
    engine.step()
    assert engine.free == free


@pytest.mark.parametrize("method", ["snapkv", "kv_compress", "h2o", "expected_attention", "keydiff"])
def test_a_streamed_prompt_is_compacted_chunk_by_chunk(engine, long_ids, method):
    options = f"{method}:budget=0.25,when=streaming,recompact_every=128"
    name = engine.add(long_ids(1000, seed=9), sampling(8, options))
    most = 0
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        if engine.scheduler.requests:
            most = max(most, engine.held(name))
    points = [c.job.num_tokens for c in engine.compactions]
    # Up to the first few points nothing would be freed.
    assert points == [p for p in expected_points(1000, 1008, 128, streaming=True) if p >= points[0]]
    assert points[0] <= 128
    assert most <= math.ceil(0.25 * 1000 / BLOCK_SIZE) + blocks_of(128 + WINDOW) + 2
    assert len(tokens(engine.outputs.pop(name))) == 8


def test_a_streamed_request_is_the_same_alone_and_in_a_batch(engine, long_ids):
    params = sampling(24, "snapkv:budget=0.25,when=streaming,recompact_every=96")
    prompts = [long_ids(length, seed=20 + length) for length in (300, 555, 700)]
    alone = [engine.run_fresh(prompt, params) for prompt in prompts]
    engine.forget_prefixes()
    for one, other in zip(alone, engine.run_all((p, params) for p in prompts), strict=True):
        assert first_difference(one, other) is None


def test_a_streamed_prompt_does_not_depend_on_what_is_cached(engine, long_ids):
    prompt = long_ids(600, seed=11)
    params = sampling(12, "snapkv:budget=0.25,when=streaming,recompact_every=96")
    fresh = engine.run_fresh(prompt, params)
    kept = engine.compactions[-1].kept
    engine.forget_prefixes()
    engine.run(prompt, sampling(1, "off"))  # leaves the whole prompt in the prefix cache
    again = engine.run(prompt, params)
    assert torch.equal(engine.compactions[-1].kept, kept)
    assert first_difference(fresh, again) is None


@pytest.fixture(scope="module")
def small_pool(engines, random_model):
    """An engine whose pool holds 767 tokens and whose requests may have 4096."""
    config = "snapkv:budget=0.25,when=streaming,recompact_every=128,max_tokens_kept=256"
    return engines(random_model, config, num_gpu_blocks_override=25)


def test_stock_refuses_a_pool_smaller_than_its_longest_request(random_model):
    from harness import start

    with pytest.raises(ValueError, match="max_model_len|max seq len"):
        start(random_model, num_gpu_blocks_override=25)


def test_a_prompt_several_times_larger_than_the_pool_is_served(small_pool, long_ids):
    free = small_pool.free
    assert free == 24
    name = small_pool.add(long_ids(2500, seed=12), sampling(100))
    most = 0
    while small_pool.llm.llm_engine.has_unfinished_requests():
        small_pool.step()
        small_pool.check_accounts()
        most = max(most, free - small_pool.free)
    assert len(tokens(small_pool.outputs.pop(name))) == 100
    assert most <= 16 and small_pool.preemptions == 0
    assert small_pool.free == free


def test_several_such_prompts_wait_for_each_other_in_a_small_pool(small_pool, long_ids):
    free = small_pool.free
    params = sampling(16)
    prompts = [long_ids(1000, seed=13 + i) for i in range(3)]
    together = small_pool.run_all((p, params) for p in prompts)
    small_pool.forget_prefixes()
    for prompt, output in zip(prompts, together, strict=True):
        assert first_difference(output, small_pool.run(prompt, params)) is None
    assert small_pool.free == free


@pytest.mark.parametrize("option", ["off", "snapkv:when=prompt,recompact_every=none"])
def test_a_request_that_the_small_pool_could_not_hold_is_refused_with_one_line(small_pool, long_ids, option):
    with pytest.raises(VLLMValidationError, match="blocks of the pool's 24") as error:
        small_pool.add(long_ids(1000, seed=2), sampling(8, option))
    assert "\n" not in str(error.value)
    small_pool.run(long_ids(300, seed=2), sampling(8, option))  # this one fits
