"""Requests that stay raw until blocks run short (`when=pressure`): who gives, how much, and when."""

import random

import pytest
from simulation import BLOCK, Simulation, prompt_of

from vllm_kvcompress.paging.job import Job
from vllm_kvcompress.paging.pressure import Descent
from vllm_kvcompress.plan import Plan

MODES = [
    pytest.param({}, id="sync"),
    pytest.param(dict(asynchronous=True), id="async"),
    pytest.param(dict(num_drafts=3), id="drafts"),
    pytest.param(dict(asynchronous=True, num_drafts=3), id="async-drafts"),
]
PRESSURE = "knorm:budget=0.125,when=pressure,min_freed_tokens=64"


def log(jobs: list[Job]) -> list[tuple[int, int, int]]:
    """Of each compaction the tokens computed, those below its boundary, and the blocks that it kept."""
    return [(job.num_tokens, job.boundary, len(job.destination)) for job in jobs]


def replayed(prompt, compression: str, max_tokens: int, jobs: list[Job]) -> list[int]:
    """What a request answers alone, compacted at the points of a log; drafts might skip one."""
    sim = Simulation(num_blocks=400)
    name, left = sim.add(prompt, compression, max_tokens), list(log(jobs))
    scheduler, allocate = sim.scheduler, sim.scheduler.kv_cache_manager.allocate_slots

    def compacted(request, *args, **kwargs):
        if left and request.request_id == name and scheduler._tracked.computed(request) == left[0][0]:
            point, boundary, kept = left.pop(0)
            plan = Plan(boundary, boundary // BLOCK, kept)
            assert scheduler._yielding.descend(
                Descent(request, point, 0, plan, 1000), scheduler._tracked[name]
            )
        return allocate(request, *args, **kwargs)

    def to_the_point(request, computed, num_tokens):
        return min(num_tokens, left[0][0] - computed) if left and computed < left[0][0] else num_tokens

    scheduler.kv_cache_manager.allocate_slots = compacted
    scheduler._reserve_prefill_lookahead = to_the_point
    sim.finish()
    assert not left, "the request passed a point of the log by"
    sim.check_nothing_left()
    return sim.answers[name]


def stepped(sim: Simulation, num_steps: int) -> Simulation:
    for _ in range(num_steps):
        sim.step()
    return sim


# ---------------------------------------------------------------------- with room


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["knorm", "snapkv"])
def test_with_room_every_step_is_as_with_compression_off(method, mode):
    steps = []
    for compression in (f"{method}:budget=0.25,when=pressure", "off"):
        sim = Simulation(compression, num_blocks=200, **mode)
        for seed, length in enumerate([300, 40, 700, 300]):
            sim.add(prompt_of(length, seed % 3), max_tokens=40)
        scheduled = []
        while sim._unfinished():
            output = sim.step()
            hits = [new.num_computed_tokens for new in output.scheduled_new_reqs]
            scheduled.append((dict(output.num_scheduled_tokens), hits, sim.free))
        assert not sim.jobs
        steps.append((scheduled, sim.answers))
        sim.check_nothing_left()
    assert steps[0] == steps[1]


# ---------------------------------------------------------------------- to admit


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["knorm", "snapkv", "knorm+k4v3"])
def test_a_request_that_would_wait_is_admitted_and_each_answers_as_its_log_says(method, mode):
    """A pool of 60 blocks, two prompts of 40 each."""
    compression = f"{method}:budget=0.125,when=pressure,min_freed_tokens=64"
    sim = Simulation(compression, num_blocks=61, **mode)
    prompts = {f"r{seed}": prompt_of(640, seed) for seed in (0, 1)}
    for prompt in prompts.values():
        sim.add(prompt, max_tokens=60)
    while "r1" not in {request.request_id for request in sim.scheduler.running}:
        assert sim.steps < 12, "it waits"
        sim.step()
    assert "r0" in sim.scheduler.requests and len(sim.jobs_of("r0")) == 1
    sim.finish()
    assert not sim.preempted
    sim.check_nothing_left()
    if len(mode) == 2:  # drafts of the step in flight were computed before
        return
    for name, prompt in prompts.items():
        again = replayed(prompt, compression, 60, sim.jobs_of(name))
        assert sim.answers[name] == again


def test_nothing_is_compacted_for_a_request_that_cannot_be_admitted_anyway():
    sim = Simulation("knorm:budget=0.5,when=pressure,min_freed_tokens=64", num_blocks=61)
    sim.add(prompt_of(640, 0), max_tokens=30)
    sim.add(prompt_of(900, 1), max_tokens=2)  # 57 blocks; at half its size the first one leaves 39
    stepped(sim, 20)
    assert not sim.jobs and sim.computed("r1") == 0
    sim.finish()
    assert not sim.jobs
    sim.check_nothing_left()


def test_the_watermark_is_left_free_for_those_who_run():
    """41 blocks of 60 and two that are set aside: to admit one of 17 somebody must give."""
    admitted = {}
    for watermark in (0.0, 0.05):
        sim = Simulation(PRESSURE, num_blocks=61, watermark=watermark)
        sim.add(prompt_of(656, 0), max_tokens=30)
        stepped(sim, 4)
        sim.add(prompt_of(272, 1), max_tokens=2)
        stepped(sim, 1)
        admitted[watermark] = bool(sim.computed("r1"))
        assert bool(sim.jobs) == bool(watermark)
        sim.finish()
        sim.check_nothing_left()
    assert admitted == {0.0: True, 0.05: True}


@pytest.mark.parametrize("mode", MODES)
def test_the_cached_prefix_of_a_request_that_is_admitted_is_not_compacted_into(mode):
    """Its blocks are free until it takes them over, and the only free ones."""
    sim = Simulation(PRESSURE, num_blocks=61, **mode)
    sim.run(prompt_of(300, 2), "off", 1)
    sim.add(prompt_of(640, 0), max_tokens=40)
    while sim.scheduler.requests["r1"].is_prefill_chunk or not sim.computed("r1"):
        sim.step()
    sim.add(prompt_of(500, 2), max_tokens=20)
    new = [each for each in sim.step().scheduled_new_reqs if each.req_id == "r2"]
    assert sim.jobs_of("r1") and new[0].num_computed_tokens == 288
    sim.finish()
    sim.check_nothing_left()
    assert sim.answers["r2"] == Simulation().run(prompt_of(500, 2), "off", 20)


def test_compactions_that_admit_read_no_more_in_a_step_than_they_may():
    sim = Simulation(PRESSURE, num_blocks=124, max_compaction_tokens=700, max_num_batched_tokens=1024)
    for seed in range(3):
        sim.add(prompt_of(640, seed), max_tokens=60)
    while sim.computed("r2") < 640:
        sim.step()
    sim.add(prompt_of(1200, 3), max_tokens=2)
    at = []
    while not sim.computed("r3"):
        before = len(sim.jobs)
        sim.step()
        at.append(len(sim.jobs) - before)
    assert at == [1, 1, 1]
    sim.finish()
    sim.check_nothing_left()


# ---------------------------------------------------------------------- rather than preempt


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["knorm", "snapkv"])
def test_requests_are_compacted_before_anybody_is_preempted(method, mode):
    preempted = {}
    for compression in ("off", f"{method}:budget=0.25,when=pressure,min_freed_tokens=64"):
        sim = Simulation(compression, num_blocks=61, **mode)
        prompts = [prompt_of(460, seed) for seed in (0, 1)]
        for prompt in prompts:
            sim.add(prompt, max_tokens=80)
        sim.finish()
        sim.check_nothing_left()
        preempted[compression] = bool(sim.preempted)
        for index, prompt in enumerate(prompts):
            jobs = sim.jobs_of(f"r{index}")
            assert sim.answers[f"r{index}"] == replayed(prompt, compression, 80, jobs)
    assert list(preempted.values()) == [True, False] and sim.jobs


def test_a_request_may_give_for_itself():
    sim = Simulation(PRESSURE, num_blocks=41)
    answer = sim.run(prompt_of(600, 0), None, 100)
    assert sim.jobs and not sim.preempted
    assert answer == replayed(prompt_of(600, 0), PRESSURE, 100, sim.jobs)


@pytest.mark.parametrize("logprobs", [False, True])
def test_a_prompt_may_be_compacted_while_it_is_computed_unless_its_logprobs_are_wanted(logprobs):
    """Nobody else can give: the one that decodes is as small as it gets."""
    sim = Simulation(PRESSURE, num_blocks=61, max_num_batched_tokens=64)
    sim.add(prompt_of(200, 0), "off", max_tokens=300)
    stepped(sim, 6)
    sim.add(prompt_of(700, 1), max_tokens=4)
    if logprobs:
        sim.scheduler.requests["r1"].sampling_params.prompt_logprobs = 1
    while not sim.jobs and not sim.preempted and sim.steps < 400:
        sim.step()
        if sim.scheduler.requests.get("r1") is None:
            break
        if sim.computed("r1") >= 256 and len(sim.answers) == 2:
            name = sim.add(prompt_of(160, 2), "off", max_tokens=2)
            assert name == "r2"
    early = [job for job in sim.jobs_of("r1") if job.num_tokens < 700]
    assert bool(early) != logprobs
    sim.finish()
    sim.check_nothing_left()


# ---------------------------------------------------------------------- who, and how far


def test_a_ladder_is_climbed_down_step_by_step_and_not_below_the_budget():
    """As far as it must be for who asks, by a step or by two; later also as far again."""
    kept = []
    for lengths in ([320, 224, 256], [800, 256]):
        sim = Simulation("knorm:budget=0.2,when=pressure,min_freed_tokens=64,ladder=0.6,0.4", num_blocks=101)
        sim.add(prompt_of(1440, 0), max_tokens=400)
        stepped(sim, 8)
        for seed, length in enumerate(lengths, 1):
            sim.add(prompt_of(length, seed), "off", max_tokens=400)
            stepped(sim, 6)
        sim.finish("r0")
        kept.append([round(len(job.destination) / (job.boundary // BLOCK), 1) for job in sim.jobs_of("r0")])
        assert kept[-1] == sorted(kept[-1], reverse=True) and kept[-1][-1] == 0.2
    assert kept[0][:3] == [0.6, 0.4, 0.2] and kept[1][:2] == [0.4, 0.2]


def test_who_frees_most_for_the_least_loss_gives_first():
    sim = Simulation(PRESSURE, num_blocks=130)
    for seed, length in enumerate([400, 900, 560]):
        sim.add(prompt_of(length, seed), max_tokens=60)
    while len(sim.scheduler.running) < 3 or any(r.is_prefill_chunk for r in sim.scheduler.running):
        sim.step()
    sim.add(prompt_of(200, 9), max_tokens=2)
    stepped(sim, 1)
    assert [job.request_id for job in sim.jobs] == ["r1"]
    sim.finish()


@pytest.mark.parametrize(("priorities", "who"), [((0, 0), "r1"), ((1, 0), "r0")])
def test_among_equals_the_least_important_gives_first_then_the_youngest(priorities, who):
    sim = Simulation(PRESSURE, num_blocks=86, policy="priority")
    for seed, priority in enumerate(priorities):
        sim.add(prompt_of(640, seed), max_tokens=60, priority=priority)
    while len(sim.scheduler.running) < 2 or any(r.is_prefill_chunk for r in sim.scheduler.running):
        sim.step()
    sim.add(prompt_of(200, 9), max_tokens=2)
    stepped(sim, 1)
    assert [job.request_id for job in sim.jobs] == [who]
    sim.finish()


def test_who_shares_its_prompt_gives_nothing_for_it_frees_nothing():
    sim = Simulation(PRESSURE, num_blocks=71)
    for _ in range(2):
        sim.add(prompt_of(640, 0), max_tokens=60)
        stepped(sim, 4)
    sim.add(prompt_of(700, 1), max_tokens=2)
    while sim.scheduler.requests.keys() >= {"r0", "r1", "r2"}:
        sim.step()
    assert not sim.jobs
    sim.finish()
    sim.check_nothing_left()


def test_a_compaction_frees_as_much_as_it_must_also_a_later_one():
    """Between two of them the output has grown by that."""
    sim = Simulation("knorm:budget=0.25,when=pressure,min_freed_tokens=96,ladder=0.25", num_blocks=65)
    sim.add(prompt_of(200, 1), "off", max_tokens=620, name="off")
    sim.add(prompt_of(300, 0), max_tokens=620)
    sim.finish()
    jobs = sim.jobs
    assert len(jobs) >= 2
    for job, after in zip(jobs, jobs[1:], strict=False):
        freed = len(job.destination) + (after.boundary - job.boundary) // BLOCK - len(after.destination)
        assert freed * BLOCK >= 96
    sim.check_nothing_left()


def test_a_window_that_was_not_seen_is_waited_for():
    """Behind a prefix hit a request has few queries; one that wants keys alone gives at once."""
    given = {}
    for method in ("snapkv", "knorm"):
        sim = Simulation(f"{method}:budget=0.25,when=pressure,min_freed_tokens=64", num_blocks=61)
        sim.run(prompt_of(640, 0), "off", 1)
        sim.add(prompt_of(640, 0), max_tokens=100, name="hit")
        stepped(sim, 3)
        assert sim.computed("hit") > 640
        sim.add(prompt_of(500, 1), max_tokens=2, name="asks")
        sim.step()
        given[method] = bool(sim.jobs)
        while not sim.jobs:
            sim.step()
        assert sim.jobs[0].num_tokens - 624 >= (32 if method == "snapkv" else 1)
        sim.finish()
        sim.check_nothing_left()
    assert given == {"snapkv": False, "knorm": True}


def test_what_was_computed_on_compacted_context_is_never_hit():
    sim = Simulation(PRESSURE, num_blocks=61)
    sim.add(prompt_of(640, 0), max_tokens=200)
    stepped(sim, 5)
    sim.add(prompt_of(600, 1), max_tokens=2)
    sim.finish()
    assert sim.jobs_of("r0")
    conversation = prompt_of(640, 0) + sim.answers["r0"]
    name = sim.add(conversation, max_tokens=1)
    new = [each for each in sim.step().scheduled_new_reqs if each.req_id == name]
    assert new[0].num_computed_tokens <= sim.jobs_of("r0")[0].num_tokens
    sim.finish()
    sim.check_nothing_left()


def test_nor_is_what_it_computes_in_the_step_in_which_it_is_compacted():
    """vLLM offers a block to the prefix cache when it is scheduled, before somebody else asks for room."""
    sim = Simulation(PRESSURE, num_blocks=61, max_num_batched_tokens=64)
    sim.add(prompt_of(700, 0), max_tokens=60)
    while sim.computed("r0") < 704:
        sim.step()
    while sim.computed("r0") < 719:  # the next token fills a block
        sim.step()
    sim.add(prompt_of(600, 1), max_tokens=2)
    sim.step()
    assert [job.num_tokens for job in sim.jobs] == [719]
    sim.finish("r0")
    conversation = prompt_of(700, 0) + sim.answers["r0"]
    again = sim.add(conversation[:740], "off", max_tokens=1)
    sim.finish()
    sim.check_nothing_left()
    assert sim.answers[again] == Simulation().run(conversation[:740], "off", 1)
    new = sim.add(conversation[:740], "off", max_tokens=1)
    hits = [each.num_computed_tokens for each in sim.step().scheduled_new_reqs if each.req_id == new]
    assert hits == [736]


def test_nor_is_a_request_compacted_whose_blocks_of_this_step_somebody_has_taken_over():
    sim = Simulation(PRESSURE, num_blocks=65, max_num_batched_tokens=128)
    sim.add(prompt_of(700, 0), max_tokens=60)
    while sim.computed("r0") < 719:
        sim.step()
    conversation = prompt_of(700, 0) + sim.answers["r0"]
    sim.add(conversation + prompt_of(20, 3), "off", max_tokens=2)
    sim.add(prompt_of(600, 1), max_tokens=2)
    sim.step()
    assert sim.computed("r1") == len(conversation) + 20 and not sim.jobs
    sim.finish()
    sim.check_nothing_left()


def test_who_decodes_gives_before_those_whose_prompts_are_being_computed():
    """Also for these, and though a larger prompt would give more for the same loss."""
    sim = Simulation(PRESSURE, num_blocks=128, max_num_batched_tokens=64)
    sim.add(prompt_of(400, 0), max_tokens=200)
    for seed in range(2, 8):  # they grow, and cannot give
        sim.add(prompt_of(80, seed), "off", max_tokens=200)
    while sim.scheduler.requests["r6"].is_prefill_chunk or not sim.computed("r6"):
        sim.step()
    sim.add(prompt_of(1000, 1), max_tokens=4)
    sim.step()
    assert sim.computed("r7") and not sim.jobs
    while not sim.jobs:
        sim.step()
    assert sim.jobs[0].request_id == "r0" and sim.computed("r7") > 700
    assert sim.scheduler.requests["r7"].is_prefill_chunk
    sim.finish()
    sim.check_nothing_left()


def test_a_preempted_request_is_raw_again():
    sim = Simulation(PRESSURE, num_blocks=61)
    sim.add(prompt_of(640, 0), max_tokens=200)
    stepped(sim, 5)
    sim.add(prompt_of(750, 1), max_tokens=100)
    sim.step_until_compacted("r0")
    tracked = sim.scheduler._tracked["r0"]
    assert tracked.step == 1
    sim.preempt("r0")
    assert (tracked.step, tracked.held) == (0, None)
    sim.finish()
    sim.check_nothing_left()


# ---------------------------------------------------------------------- everything at once

MENU = [
    PRESSURE,
    "snapkv:budget=0.2,when=pressure,min_freed_tokens=16,ladder=0.7,0.5,0.3",
    "knorm+k4v3:budget=0.1,when=pressure,min_freed_tokens=32",
    "off",
    "snapkv:budget=0.25",
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(10))
def test_in_any_crowd_each_request_answers_as_its_log_says_and_nothing_is_left(seed, mode):
    random_ = random.Random(seed)
    num_blocks, policy = random_.choice([50, 60, 80]), random_.choice(["fcfs", "priority"])
    options = dict(policy=policy, watermark=random_.choice([0.0, 0.05]), max_num_batched_tokens=128, **mode)
    options["max_compaction_tokens"] = random_.choice([None, 200])
    sim = Simulation(PRESSURE, num_blocks=num_blocks, **options)
    queue, names, aborted, hit = [], {}, set(), set()
    for _ in range(24):
        prompt = prompt_of(random_.randint(1, 480), random_.choice([0, 1, 2, random_.random()]))
        queue.append((prompt, random_.choice(MENU), random_.choice([1, 5, 30, 60, 150])))
    since: dict[str, int] = {}  # jobs of a request that a preemption undid
    while queue or sim._unfinished():
        for _ in range(random_.choice([0, 0, 1, 3])):
            if queue:
                member = queue.pop()
                names[sim.add(*member, priority=random_.randrange(3))] = member
        seen = len(sim.preempted)
        running = [request.request_id for request in sim.scheduler.running]
        before = {name: len(sim.jobs_of(name)) for name in running}
        output = sim.step()
        hit |= {new.req_id for new in output.scheduled_new_reqs if new.num_computed_tokens}
        for name in sim.preempted[seen:]:
            since[name] = before.get(name, 0)
        if sim.scheduler.running and random_.random() < 0.03:
            victim = random_.choice(sim.scheduler.running)
            if victim.num_stale_output_tokens == 0:
                sim.preempt(victim.request_id)
                since[victim.request_id] = len(sim.jobs_of(victim.request_id))
        alive = [name for name in names if name in sim.scheduler.requests]
        if alive and random_.random() < 0.02:
            aborted.add(name := random_.choice(alive))
            sim.abort(name)
    sim.check_nothing_left()
    pressed = [job for job in sim.jobs if job.config.when == "pressure"]
    assert pressed
    for name, (prompt, compression, max_tokens) in names.items():
        if name in aborted:
            continue
        assert len(sim.answers[name]) == max_tokens
        if name in since or "pressure" not in compression or len(mode) == 2:
            continue
        assert sim.answers[name] == replayed(prompt, compression, max_tokens, sim.jobs_of(name))
