"""When requests are compacted, on which blocks, and what they hold, without a model: see `simulation`."""

import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
from simulation import ALL_AT_ONCE, BLOCK, Simulation, configured, on_a_gpu, prompt_of

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.paging import repetition, scheduler
from vllm_kvcompress.paging.repetition import longest_repetition
from vllm_kvcompress.paging.rings import memory_for_rings, of_moments
from vllm_kvcompress.paging.tracked import Tracked
from vllm_kvcompress.plan import ring_budget

MODES = [
    pytest.param({}, id="sync"),
    pytest.param(dict(asynchronous=True), id="async"),
    pytest.param(dict(num_drafts=3), id="drafts"),
    pytest.param(dict(asynchronous=True, num_drafts=3), id="async-drafts"),
]
ASK = 10  # tokens of a repetition's instruction


@pytest.fixture(autouse=True)
def words(monkeypatch):
    """A tokenizer for the instructions of repetitions."""
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [1] * ASK)
    monkeypatch.setattr(repetition, "cached_tokenizer_from_config", lambda config: tokenizer)


def hit_of(sim: Simulation, prompt, compression=None) -> int:
    """Tokens that a second request with the same prompt takes from the prefix cache."""
    sim.run(prompt, "off", 1)
    name = sim.add(prompt, compression, 2)
    new = [each for each in sim.step().scheduled_new_reqs if each.req_id == name]
    sim.finish()
    sim.check_nothing_left()
    return new[0].num_computed_tokens


# ---------------------------------------------------------------------- when, and which blocks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_tokens", [64, 65, 79, 80, 255, 256, 257, 496, 511, 512, 513, 700])
def test_a_prompt_is_compacted_once_when_it_is_computed(num_tokens, mode):
    sim = Simulation("snapkv:budget=0.25", **mode)
    name = sim.add(prompt_of(num_tokens), max_tokens=20)
    job = sim.step_until_compacted(name)
    source = (num_tokens - 32) // BLOCK
    assert (job.num_tokens, job.boundary, job.previous_boundary) == (num_tokens, source * BLOCK, 0)
    assert len(job.source) == source and not job.previous
    assert len(job.tail) == math.ceil((num_tokens - source * BLOCK) / BLOCK)
    assert len(job.destination) == math.ceil(source / 4)
    assert sim.manager.held_blocks(name) == sim.held(name)
    raw = sim.held(name) - len(job.destination)
    drafts = sim.scheduler.num_spec_tokens  # rejected ones have had a place too
    ends = (sim.computed(name) - job.boundary, sim.computed(name) - job.boundary + drafts)
    assert math.ceil(ends[0] / BLOCK) <= raw <= math.ceil(ends[1] / BLOCK)
    sim.finish()
    assert len(sim.jobs) == 1 and len(sim.answers[name]) == 20
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options, num_prompt, points",
    [
        ("recompact_every=40", 200, [200, 240, 280, 320]),
        ("recompact_every=16", 192, [192, 208, 224, 240, 256, 272, 288, 304, 320]),
        ("when=streaming,recompact_every=100", 250, [100, 200, 250, 350]),
        ("when=streaming,recompact_every=64", 256, [64, 128, 192, 256, 320, 384]),
    ],
)
def test_compactions_come_at_their_points_and_no_chunk_crosses_one(options, num_prompt, points, mode):
    sim = Simulation(f"snapkv:budget=0.25,{options}", **mode)
    name = sim.add(prompt_of(num_prompt), max_tokens=140)
    while name in sim.scheduler.requests:
        sim.step()
        tracked = sim.scheduler._tracked.get(name)
        if tracked is not None and tracked.point is not None:
            assert sim.computed(name) <= tracked.point
    reached = [point for point in points if point < num_prompt + 140 - 1]
    found = [job.num_tokens for job in sim.jobs]
    # A point at which nothing would be freed has no Job.
    assert set(found) <= set(reached) and found == sorted(found) and len(found) >= len(reached) // 2
    assert num_prompt in found
    sim.check_nothing_left()


def test_the_first_token_is_not_delayed():
    sim = Simulation()
    name = sim.add(prompt_of(256))
    sim.step()
    assert len(sim.answers[name]) == 1 and not sim.jobs
    sim.step()
    assert len(sim.answers[name]) == 2 and len(sim.jobs) == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_point_at_which_nothing_is_freed_is_passed_over(mode):
    sim = Simulation("snapkv:budget=0.25,when=streaming,recompact_every=20", **mode)
    name = sim.add(prompt_of(150), max_tokens=4)
    sim.finish()
    # Of 20 and 40 tokens, no two blocks lie below the window of 32.
    assert [job.num_tokens for job in sim.jobs][0] == 80 and len(sim.answers[name]) == 4
    sim.check_nothing_left()


@pytest.mark.parametrize("compression", ["off", "snapkv:budget=1", "snapkv:budget=0.25,window=240"])
def test_requests_that_would_free_nothing_are_left_alone(compression):
    sim = Simulation()
    name = sim.add(prompt_of(256), compression)
    assert name not in sim.scheduler._tracked
    sim.finish()
    assert not sim.jobs and hit_of(sim, prompt_of(256, 1), compression) == 240


def test_a_prompt_of_one_token_is_not_compacted_where_vllm_pads_its_first_step_with_drafts():
    sim = Simulation("snapkv:budget=0.25,recompact_every=40", num_drafts=3)
    name = sim.add([5], max_tokens=150)
    sim.finish()
    assert not sim.jobs and len(sim.answers[name]) == 150
    plain = Simulation("snapkv:budget=0.25,recompact_every=40")
    plain.run([5], max_tokens=150)
    assert plain.jobs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["snapkv", "knorm", "tova", "h2o", "expected_attention"])
@pytest.mark.parametrize("every", [1, 6, 40])
def test_drafts_and_steps_in_flight_change_neither_answer_nor_compactions(method, every, mode):
    options = f"{method}:budget=0.3,recompact_every={every}"
    runs = []
    for kwargs in ({}, mode):
        sim = Simulation(options, **kwargs)
        answer = sim.run(prompt_of(200), max_tokens=90)
        # (The last token may be in flight when its request is due once more, for nothing.)
        runs.append((answer, [(j.num_tokens, j.boundary) for j in sim.jobs if j.num_tokens < 200 + 90 - 1]))
        sim.check_nothing_left()
    assert runs[0][1] and runs[0] == runs[1]


# ---------------------------------------------------------------------- prefix cache


@pytest.mark.parametrize(
    "compression, num_tokens, hit",
    [
        ("off", 512, 496),
        ("snapkv:budget=0.25", 512, 480),
        ("snapkv:budget=0.25", 511, 464),
        ("snapkv:budget=0.25,window=100", 512, 400),
        ("knorm:budget=0.25", 512, 496),
        ("knorm:budget=0.25", 513, 512),
        ("tova:budget=0.25", 513, 512),
        ("h2o:budget=0.25", 512, 0),
        ("snapkv:budget=0.25,when=streaming,recompact_every=200", 512, 160),
        ("snapkv:budget=0.25,when=streaming,recompact_every=16", 512, 0),
        ("knorm:budget=0.25,when=streaming,recompact_every=160", 512, 144),
    ],
)
def test_a_prefix_hit_gives_way_to_the_queries_that_are_needed(compression, num_tokens, hit):
    assert hit_of(Simulation(), prompt_of(num_tokens), compression) == hit


@pytest.mark.parametrize("mode", MODES[2:])
@pytest.mark.parametrize("method", ["knorm", "tova", "streaming_llm"])
@pytest.mark.parametrize("num_tokens", [2 * BLOCK + 1, 8 * BLOCK + 1, 32 * BLOCK + 1])
def test_of_a_cached_prompt_enough_is_computed_for_a_step_of_drafts(method, num_tokens, mode):
    prompt, options = prompt_of(num_tokens), f"{method}:budget=0.25,window=1,recompact_every=30"
    options = options if method != "knorm" else f"{method}:budget=0.25,recompact_every=30"
    alone = Simulation(options).run(prompt, max_tokens=80)
    sim = Simulation(options, **mode)
    other = sim.add(prompt_of(100, 9), "off", 60)  # beside whom vLLM pads the first step
    sim.run(prompt, "off", 1)
    assert sim.run(prompt, max_tokens=80) == alone
    sim.finish(other)
    sim.check_nothing_left()


@pytest.mark.parametrize("compression", ["off", "knorm:budget=0.25"])
def test_what_is_computed_on_compacted_context_is_never_hit(compression):
    sim = Simulation("knorm:budget=0.25")
    prompt = prompt_of(400)
    longer = prompt + sim.run(prompt, max_tokens=100) + [7] * 20
    fresh = Simulation("knorm:budget=0.25").run(longer, compression)
    assert sim.run(longer, compression) == fresh
    sim.check_nothing_left()


# ---------------------------------------------------------------------- preemption and ends

STATES = ["waiting", "computing", "due", "compacted", "compacted again"]


def bring(sim: Simulation, name: str, state: str) -> None:
    if state == "computing":
        sim.step()
    elif state == "due":
        sim.step_until_due(name)
    elif state == "compacted":
        sim.step_until_compacted(name)
    elif state == "compacted again":
        while len(sim.jobs_of(name)) < 2:
            sim.step()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("state", STATES)
def test_an_aborted_request_gives_everything_back(state, mode):
    sim = Simulation("snapkv:budget=0.25,recompact_every=32", **mode)
    name = sim.add(prompt_of(600), max_tokens=200)
    bring(sim, name, state)
    sim.abort(name)
    assert sim.free == sim.free_at_start
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["snapkv", "h2o", "knorm"])
@pytest.mark.parametrize("state", STATES[1:])
@pytest.mark.parametrize("when", ["prompt", "streaming"])
def test_a_preempted_request_keeps_and_answers_what_it_would_have(state, method, when, mode):
    options = f"{method}:budget=0.25,recompact_every=64,when={when}"
    alone = Simulation(options, **mode)
    answer = alone.run(prompt_of(500), max_tokens=150)
    sim = Simulation(options, **mode)
    name = sim.add(prompt_of(500), max_tokens=150)
    bring(sim, name, state)
    before = len(sim.jobs)
    sim.preempt(name)
    assert sim.free == sim.free_at_start
    sim.finish()
    assert sim.answers[name] == answer
    again = [(job.num_tokens, job.boundary, len(job.destination)) for job in sim.jobs[before:]]
    assert again == [(job.num_tokens, job.boundary, len(job.destination)) for job in alone.jobs]
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
def test_requests_in_a_full_pool_finish_as_they_would_alone(mode):
    prompts = [prompt_of(300, seed) for seed in range(4)]
    alone = [Simulation(**mode).run(prompt, max_tokens=120) for prompt in prompts]
    sim = Simulation(num_blocks=52, **mode)
    names = [sim.add(prompt, max_tokens=120) for prompt in prompts]
    sim.finish()
    assert [sim.answers[name] for name in names] == alone
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_blocks", [34, 36, 40])
def test_requests_that_share_a_prompt_in_a_full_pool_do_not_wait_for_each_other(num_blocks, mode):
    alone = Simulation(**mode)
    expected = alone.run(prompt_of(500), max_tokens=40)
    sim = Simulation(num_blocks=num_blocks, **mode)
    names = [sim.add(prompt_of(500), max_tokens=40) for _ in range(3)]
    sim.finish()
    assert all(sim.answers[name] == expected or name in sim.worker.late for name in names)
    assert {compaction(job) for job in sim.jobs} <= {compaction(job) for job in alone.jobs}
    sim.check_nothing_left()


def compaction(job) -> tuple[int, int, int]:
    """What a Job does, wherever its blocks are."""
    return job.num_tokens, job.boundary, len(job.destination)


@pytest.mark.parametrize("when", STATES[1:])
def test_all_requests_may_end_at_once(when):
    sim = Simulation("snapkv:budget=0.25,recompact_every=32")
    names = [sim.add(prompt_of(300, seed), max_tokens=200) for seed in range(3)]
    bring(sim, names[0], when)
    sim.scheduler.finish_requests(None, scheduler.RequestStatus.FINISHED_ABORTED)
    sim.check_nothing_left()


def test_a_streaming_session_stays_raw_to_its_last_part():
    sim = Simulation()
    name = sim.add(prompt_of(300), max_tokens=4, resumable=True)
    sim.finish()
    sim.add(prompt_of(200, 1), max_tokens=4, name=name, resumable=True)
    assert name not in sim.scheduler._tracked
    sim.finish()
    assert not sim.jobs and len(sim.answers[name]) == 8
    sim.close(name)
    sim.check_nothing_left()


def test_the_last_part_of_a_session_may_come_before_the_one_before_is_computed():
    sim = Simulation()
    name = sim.add(prompt_of(300), max_tokens=4, resumable=True)
    sim.step()
    sim.close(name)
    assert name not in sim.scheduler._tracked
    sim.finish()
    assert not sim.jobs
    sim.check_nothing_left()


# ---------------------------------------------------------------------- admission


def test_a_prompt_larger_than_the_pool_is_admitted_by_its_peak_and_never_holds_more():
    sim = Simulation("knorm:budget=0.1,when=streaming,recompact_every=128", num_blocks=30)
    name = sim.add(prompt_of(2000), max_tokens=100)
    peak = sim.manager.peak_blocks[name]
    assert peak == math.ceil(0.1 * math.ceil(2100 / BLOCK)) + (128 + 32) // BLOCK + 2
    most = 0
    while name in sim.scheduler.requests:
        sim.step()
        if name in sim.scheduler.requests:
            most = max(most, sim.held(name))
    assert peak - 4 <= most <= peak and len(sim.answers[name]) == 100
    sim.check_nothing_left()


def test_a_peak_counts_no_token_beyond_the_models_length():
    sim = Simulation("knorm:budget=0.5,when=streaming,recompact_every=64", max_model_len=1024)
    name = sim.add(prompt_of(500), max_tokens=5000)
    assert sim.manager.peak_blocks[name] == 32 + 6 + 2


def test_prompts_that_are_compacted_at_their_end_have_no_peak():
    sim = Simulation("snapkv:budget=0.25,recompact_every=32")
    sim.add(prompt_of(500))
    assert not sim.manager.peak_blocks


# ---------------------------------------------------------------------- memory for queries


@pytest.fixture
def gpu(monkeypatch):
    on_a_gpu(monkeypatch)


def test_only_device_memory_for_queries_is_counted(gpu, monkeypatch):
    sim = Simulation("snapkv:budget=0.25,recompact_every=40", num_blocks=700, max_num_seqs=16)
    config = sim.scheduler.compression
    assert sim.scheduler._rings.budget == ring_budget(config, 16, 700 * BLOCK * 8 // 7, 2) == 16 * 64
    small = Simulation("snapkv:budget=0.25,recompact_every=40", num_blocks=70, max_num_seqs=16)
    assert small.scheduler._rings.budget == 70 * BLOCK * 8 // 7 // 8 * 2 // 2 == 160
    dtype = small.scheduler.vllm_config.model_config.dtype
    # Of a cache of bytes as many tokens are less memory.
    of_bytes = memory_for_rings(small.scheduler.vllm_config, config, 16, 70 * BLOCK, torch.uint8)
    assert of_bytes == 70 * BLOCK // dtype.itemsize * 8 // 7 // 8 * 2 // 2 < 160
    monkeypatch.undo()
    assert Simulation().scheduler._rings.budget == math.inf


@pytest.mark.parametrize("again", [False, True])
def test_requests_wait_for_memory_for_their_queries(gpu, again):
    sim = Simulation("snapkv:budget=0.25" + ",recompact_every=40" * again)
    sim.scheduler._rings.budget = 2 * 64
    names = [sim.add(prompt_of(300, seed), max_tokens=20 + 10 * seed) for seed in range(3)]
    started = {}
    while sim._unfinished():
        for new in sim.step().scheduled_new_reqs:
            started[new.req_id] = sim.steps, {job.request_id for job in sim.jobs}, set(sim.scheduler.requests)
        assert sim.scheduler._rings.taken <= 2 * 64
    assert started[names[1]][0] <= 2
    _, compacted, left = started[names[2]]
    if again:  # a ring lasts as long as its request
        assert names[0] not in left
    else:
        assert names[0] in compacted and names[0] in left
    sim.check_nothing_left()


def test_requests_wait_for_memory_for_the_moments_of_their_queries(gpu):
    sim = Simulation("expected_attention:budget=0.25,recompact_every=40")  # they last as long as requests
    own = of_moments(sim.scheduler.vllm_config)
    assert own == 34, "a part, its mean and its count, of as many float32 numbers as a query's"
    sim.scheduler._rings.budget = 2 * own
    names = [sim.add(prompt_of(300, seed), max_tokens=20 + 10 * seed) for seed in range(3)]
    left = {}
    while sim._unfinished():
        for new in sim.step().scheduled_new_reqs:
            left[new.req_id] = set(names) - set(sim.scheduler.requests)
        assert sim.scheduler._rings.taken <= 2 * own
    assert not left[names[1]] and names[0] in left[names[2]]
    sim.check_nothing_left()


@pytest.mark.parametrize("method", ["h2o", "kvzip"])
@pytest.mark.parametrize("engine", ["snapkv", "h2o"])
def test_requests_wait_for_memory_for_a_number_of_each_token_that_no_kernel_has_a_place_for(
    gpu, engine, method
):
    rings = Simulation(f"{engine}:budget=0.25").scheduler._rings
    # Of two query heads of 16 channels in float32 a query takes as much as 32 numbers.
    rings.budget, each = 2 * 10, 10 * 32
    config = KVCompressionConfig.parse(f"{method}:budget=0.25")
    kept = engine == method == "h2o"  # its kernels have one beside the pages
    assert rings.start(config, each) and rings.start(config, each)
    assert rings.taken == (0 if kept else 20)
    assert rings.start(config, 1) == kept
    rings.begin_step([(Tracked(config, point=each), each - 31)])
    assert rings.taken == (0 if kept else 10) and rings.start(config, each)


def test_one_request_starts_however_little_memory_there_is(gpu):
    sim = Simulation("snapkv:budget=0.25,window=500")
    sim.scheduler._rings.budget = 10
    names = [sim.add(prompt_of(800, seed)) for seed in range(2)]
    sim.finish()
    assert all(len(sim.answers[name]) == 8 for name in names)
    plain = Simulation()
    plain.scheduler._rings.budget = 0
    plain.add(prompt_of(100), "knorm:budget=0.25"), plain.add(prompt_of(100, 1), "knorm:budget=0.25")
    plain.step()
    assert len(plain.scheduler.running) == 2, "a policy without a window needs none"


# ---------------------------------------------------------------------- repetition


def repeating(sim: Simulation) -> list:
    return [r for name, r in sim.scheduler.requests.items() if ":repeat-" in name]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_tokens", [100, 512, 645])
def test_a_context_is_repeated_part_by_part_then_compacted_and_nothing_is_left(num_tokens, mode):
    sim = Simulation("kvzip:budget=0.25,chunk=200", max_num_batched_tokens=64, **mode)
    name = sim.add(prompt_of(num_tokens), max_tokens=20)
    parts, ids = [], set()
    while name in sim.scheduler.requests:
        output = sim.step()
        parts += [(part.begin, part.end, part.num_context) for part in output.kv_compression.repetitions]
        assert len(repeating(sim)) <= 1
        ids |= {r.request_id for r in repeating(sim)}
    edges = [*range(0, num_tokens, 200), num_tokens]
    assert parts == [(*edge, num_tokens) for edge in itertools.pairwise(edges)]
    assert len(ids) == len(parts) and len(sim.answers[name]) == 20
    (job,) = sim.jobs
    assert job.num_tokens == num_tokens
    sim.check_nothing_left()


def test_a_repetition_is_asked_for_as_its_owner_was():
    sim = Simulation("kvzip:budget=0.25,chunk=200", policy="priority", max_num_batched_tokens=64)
    fields = dict(client_index=3, arrival_time=12.5, lora_request=None)
    sim.add(prompt_of(500), priority=7, **fields)
    while not repeating(sim):
        sim.step()
    (first,) = repeating(sim)
    assert (first.priority, first.client_index, first.arrival_time) == (7, 3, 12.5)
    assert first.sampling_params.max_tokens == 1 and first.sampling_params.temperature == 0
    assert first.prompt_token_ids == prompt_of(500) + [1] * ASK + prompt_of(500)[:200]
    while repeating(sim) in ([], [first]):
        sim.step()
    (second,) = repeating(sim)
    # Where the next part starts is said by the last words of the one before.
    assert second.prompt_token_ids[500:] == [1] * ASK + prompt_of(500)[192:400]
    assert second.priority == 7


def test_a_repetition_has_its_owners_adapter():
    adapter = SimpleNamespace(lora_int_id=1)
    repetitions = repetition.Repetitions(configured("kvzip:budget=0.25", 100))
    owner = SimpleNamespace(
        request_id="a",
        prompt_token_ids=prompt_of(50),
        client_index=0,
        arrival_time=0.0,
        lora_request=adapter,
        priority=0,
    )
    config = scheduler.KVCompressionConfig.parse("kvzip:budget=0.25")
    assert repetitions.next_part(owner, config).lora_request is adapter
    assert repetitions.next_part(owner, config) is None, "one part at a time"
    assert not repetitions.complete("a") and repetitions.abandon("a") == ["a:repeat-0"]
    assert repetitions.abandon("a") == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("end", ["abort", "abort all", "preempt"])
def test_an_owner_that_goes_takes_its_repetition_along(end, steps, mode):
    sim = Simulation("kvzip:budget=0.25,chunk=200", max_num_batched_tokens=64, **mode)
    name = sim.add(prompt_of(500), max_tokens=12)
    while not repeating(sim):
        sim.step()
    for _ in range(steps):
        sim.step()
    if end == "preempt":
        sim.preempt(name)
        sim.finish()
        assert sim.answers[name] == Simulation("kvzip:budget=0.25,chunk=200").run(prompt_of(500), None, 12)
    elif end == "abort":
        sim.abort(name)
    else:
        sim.scheduler.finish_requests(None, scheduler.RequestStatus.FINISHED_ABORTED)
    sim.check_nothing_left()


@pytest.mark.parametrize("steps", [0, 1])
def test_a_repetition_that_is_preempted_comes_back(steps):
    sim = Simulation("kvzip:budget=0.25,chunk=400", max_num_batched_tokens=128)
    name = sim.add(prompt_of(500), max_tokens=12)
    while not any(r in sim.scheduler.running for r in repeating(sim)):
        sim.step()
    for _ in range(steps):
        sim.step()
    sim.preempt(repeating(sim)[0].request_id)
    assert sim.scheduler.kv_holding_waiting, "before anybody who waits for its owner's blocks"
    sim.finish()
    assert sim.answers[name] == Simulation("kvzip:budget=0.25,chunk=400").run(prompt_of(500), None, 12)
    sim.check_nothing_left()


def test_a_repetition_starts_ahead_of_requests_that_wait():
    sim = Simulation("kvzip:budget=0.25,chunk=400", max_num_seqs=2)
    owner = sim.add(prompt_of(200), max_tokens=80)  # it goes on meanwhile: no seat is free for its repetition
    waiting = [sim.add(prompt_of(60, seed), "off", 40) for seed in (1, 2, 3)]
    sim.step_until_compacted(owner)
    assert all(name in sim.scheduler.requests for name in waiting[1:])
    sim.finish()
    sim.check_nothing_left()


def test_what_is_left_for_a_repetition():
    tight = configured("kvzip:budget=0.25", 101, watermark=0.1, max_model_len=4096)
    # 100 usable blocks less 10 of the watermark; a context of 333 tokens takes 21 and has 13 in its last.
    assert (
        longest_repetition(tight, 333, tight.cache_config.num_gpu_blocks) == (90 - 21) * BLOCK - 333 % BLOCK
    )
    assert longest_repetition(tight, 320, tight.cache_config.num_gpu_blocks) == (90 - 20) * BLOCK
    roomy = configured("kvzip:budget=0.25", 10_000, max_model_len=1024)
    assert longest_repetition(roomy, 300, roomy.cache_config.num_gpu_blocks) == 724
    unknown = configured("kvzip:budget=0.25", 10, max_model_len=1024)
    unknown.cache_config.num_gpu_blocks = None
    assert longest_repetition(unknown, 300, unknown.cache_config.num_gpu_blocks) == 724


def test_a_repetition_is_no_longer_than_what_is_left():
    sim = Simulation("kvzip:budget=0.25", num_blocks=60)  # chunk=2048
    name = sim.add(prompt_of(600), max_tokens=4)
    parts = []
    while name in sim.scheduler.requests:
        parts += sim.step().kv_compression.repetitions
    room = longest_repetition(configured("kvzip:budget=0.25", 60), 600, 60)
    assert (parts[0].begin, parts[0].end) == (0, room - ASK - 1)
    assert parts[1].end - parts[1].begin <= room - ASK - 8 - 1
    assert parts[-1].end == 600
    sim.check_nothing_left()


# ---------------------------------------------------------------------- everything at once

MENU = [
    "off",
    "snapkv:budget=0.25",
    "snapkv:budget=0.2,recompact_every=24",
    "knorm:budget=0.3,when=streaming,recompact_every=64",
    "h2o:budget=0.25,recompact_every=32",
    "kvzip:budget=0.25,chunk=100",
    "streaming_llm:budget=0.1",
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(12))
def test_in_any_crowd_a_request_is_what_it_is_alone_or_goes_on_raw_and_nothing_is_left(seed, mode):
    random_ = random.Random(seed)
    num_blocks, policy = random_.choice([50, 60, 80]), random_.choice(["fcfs", "priority"])
    options = dict(policy=policy, watermark=random_.choice([0.0, 0.05]), max_num_batched_tokens=128, **mode)
    options["max_compaction_tokens"] = None if seed % 2 else ALL_AT_ONCE
    sim = Simulation(num_blocks=num_blocks, **options)
    members = []
    for _ in range(24):
        prompt = prompt_of(random_.randint(1, 480), random_.choice([0, 1, 2, random_.random()]))
        members.append((prompt, random_.choice(MENU), random_.choice([1, 5, 30, 60])))
    queue, names, aborted = list(members), {}, set()
    while queue or sim._unfinished():
        assert sim.steps < 5000, "requests wait while nothing runs"
        for _ in range(random_.choice([0, 0, 1, 3])):
            if queue:
                member = queue.pop()
                name = sim.add(*member, priority=random_.randrange(3))
                names[name] = member
        sim.step()
        if sim.scheduler.running and random_.random() < 0.05:
            victim = random_.choice(sim.scheduler.running)
            if victim.num_stale_output_tokens == 0:
                sim.preempt(victim.request_id)
        alive = [name for name in names if name in sim.scheduler.requests]
        if alive and random_.random() < 0.02:
            aborted.add(name := random_.choice(alive))
            sim.abort(name)
    sim.check_nothing_left()
    assert sim.jobs and len(aborted) < len(names)
    for name, (prompt, compression, max_tokens) in names.items():
        if name not in aborted:
            alone = Simulation()
            answer = alone.run(prompt, compression, max_tokens)
            assert len(sim.answers[name]) == max_tokens
            if name not in sim.worker.late:
                assert sim.answers[name] == answer, (name, compression)
            first = [compaction(job) for job in sim.jobs if job.request_id == name][:1]
            assert first == [compaction(job) for job in alone.jobs][: len(first)]
