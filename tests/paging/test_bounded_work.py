"""The compactions of one step are bounded; whoever has been due for longest goes first."""

import random

import pytest
from simulation import BLOCK, Simulation, prompt_of

from vllm_kvcompress.plan import Plan, tokens_read

MODES = [
    pytest.param({}, id="sync"),
    pytest.param(dict(asynchronous=True), id="async"),
    pytest.param(dict(num_drafts=3), id="drafts"),
    pytest.param(dict(asynchronous=True, num_drafts=3), id="async-drafts"),
]


def read_by(job) -> int:
    """Tokens that a Job reads, counted in its blocks: what was kept, and what is raw."""
    return len(job.previous) * BLOCK + job.num_tokens - job.previous_boundary


def burst(sim: Simulation, lengths, **options) -> list[str]:
    """Requests whose prompts are computed in the same step."""
    return [sim.add(prompt_of(length, 10 + seed), **options) for seed, length in enumerate(lengths)]


def test_a_burst_of_prompts_is_compacted_in_several_steps_the_oldest_first():
    sim = Simulation(max_num_batched_tokens=4096, max_compaction_tokens=1000, num_blocks=400)
    names = burst(sim, [400] * 6, max_tokens=30)
    alone = Simulation("snapkv:budget=0.25")
    plain = [alone.run(prompt_of(400, 10 + seed), max_tokens=30) for seed in range(6)]
    sim.step()  # all prompts
    made = []
    for _ in range(4):
        made.append([job.request_id for job in sim.step().kv_compression.jobs])
    assert made == [names[:2], names[2:4], names[4:], []]
    sim.finish()
    # They keep what they would have kept in time, and those who were not late answer the same.
    for job in sim.jobs:
        (own,) = [each for each in alone.jobs if each.request_id == f"r{names.index(job.request_id)}"]
        assert (job.num_tokens, job.boundary, len(job.destination)) == (
            400,
            own.boundary,
            len(own.destination),
        )
    late = [name not in names[:2] for name in names]
    assert [name in sim.worker.late for name in names] == late
    assert [sim.answers[name] != answer for name, answer in zip(names, plain, strict=True)] == late
    assert all(len(sim.answers[name]) == 30 for name in names)
    sim.check_nothing_left()


def test_nobody_decodes_less_for_it():
    sim = Simulation(max_num_batched_tokens=4096, max_compaction_tokens=500, num_blocks=400)
    names = burst(sim, [400] * 4, max_tokens=30)
    for steps in range(1, 8):
        sim.step()
        assert [len(sim.answers[name]) for name in names] == [steps] * 4
    assert len(sim.jobs) == 4


@pytest.mark.parametrize("bound", [1, 399, 400])
def test_one_compaction_is_made_whatever_its_size(bound):
    sim = Simulation(max_num_batched_tokens=4096, max_compaction_tokens=bound, num_blocks=400)
    names = burst(sim, [400, 600, 100], max_tokens=30)
    sim.step()
    assert [[job.request_id for job in sim.step().kv_compression.jobs] for _ in range(3)] == [
        [name] for name in names
    ]


def test_the_bound_is_the_engines_tokens_of_a_step_unless_it_is_given():
    sim = Simulation(max_num_batched_tokens=800, max_compaction_tokens=None, num_blocks=400)
    burst(sim, [300, 250, 150, 100], max_tokens=30)
    sim.step()
    assert len(sim.step().kv_compression.jobs) == 4
    sim = Simulation(max_num_batched_tokens=800, max_compaction_tokens=None, num_blocks=400)
    burst(sim, [900, 700], max_tokens=30)
    assert [len(sim.step().kv_compression.jobs) for _ in range(5)] == [0, 0, 1, 1, 0]


def test_a_later_compaction_reads_what_was_kept_and_what_is_raw():
    held = Plan(boundary=320, source_blocks=20, kept_blocks=5)
    assert tokens_read(352, BLOCK) == 352
    assert tokens_read(416, BLOCK, held) == 5 * BLOCK + 96


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bound", [1, 500])
@pytest.mark.parametrize("seed", range(2))
def test_no_step_reads_more_than_the_bound_or_one_compaction(seed, bound, mode):
    random_ = random.Random(seed)
    sim = Simulation(max_num_batched_tokens=512, max_compaction_tokens=bound, num_blocks=150, **mode)
    options = [
        "snapkv:budget=0.25,recompact_every=24",
        "knorm:budget=0.3",
        "h2o:budget=0.3,recompact_every=16",
    ]
    options.append("knorm:budget=0.3,when=streaming,recompact_every=64")
    names = []
    for _ in range(16):
        length = random_.randint(30, 450)
        names.append(sim.add(prompt_of(length, random_.random()), random_.choice(options), 50))
    most = 0
    while sim._unfinished():
        read = [read_by(job) for job in sim.step().kv_compression.jobs]
        assert len(read) <= 1 or sum(read) <= bound
        most = max(most, len(read))
    assert all(len(sim.answers[name]) == 50 for name in names)
    assert most > 1 or bound == 1
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
def test_who_is_due_is_not_overtaken_by_those_who_are_due_later(mode):
    size = dict(max_num_batched_tokens=1024, num_blocks=900, max_num_seqs=64)
    sim = Simulation(max_compaction_tokens=1, **size, **mode)
    # More than one of these is due in every step, and all are ahead of the others in vLLM's order.
    greedy = [sim.add(prompt_of(60, seed), "knorm:budget=0.1,recompact_every=16", 120) for seed in range(32)]
    sim.step_until_compacted(greedy[0])
    names = [sim.add(prompt_of(200, 20 + seed), "snapkv:budget=0.25", 200) for seed in range(3)]
    due, compacted = {}, {}
    while len(compacted) < len(names):
        sim.step()
        for name in names:
            if sim.jobs_of(name):
                compacted.setdefault(name, sim.steps)
            elif sim.scheduler._tracked.is_due(sim.scheduler.requests[name]):
                due.setdefault(name, sim.steps)
    # Before each of them only those who were due when it became due.
    assert all(compacted[name] - due[name] <= len(greedy) + len(names) for name in names)
    sim.finish()
    sim.check_nothing_left()


def test_a_streaming_prompt_waits_for_its_turn_and_holds_no_more_than_its_peak():
    config = "knorm:budget=0.1,when=streaming,recompact_every=128"
    sim = Simulation(config, max_num_batched_tokens=1024, max_compaction_tokens=1, num_blocks=200)
    names = burst(sim, [1500] * 5, max_tokens=100)
    peaks = {name: sim.manager.peak_blocks[name] for name in names}
    while sim._unfinished():
        output = sim.step()
        for name in filter(sim.scheduler.requests.__contains__, names):
            assert sim.held(name) <= peaks[name]
            computed, point = sim.computed(name), sim.scheduler._tracked[name].point
            if point is not None and point < 1500:
                assert computed <= point and name not in output.kv_compression.late
    alone = Simulation(config, num_blocks=200)
    answers = [alone.run(prompt_of(1500, 10 + seed), max_tokens=100) for seed in range(5)]
    same = [sim.answers[name] == answer for name, answer in zip(names, answers, strict=True)]
    assert same == [name not in sim.worker.late for name in names]
    assert sum(len(sim.jobs_of(name)) for name in names) > 5 * 1500 // 128
    sim.check_nothing_left()


def test_an_output_waits_too_where_going_on_would_break_its_peak():
    sim = Simulation("knorm:budget=0.1,when=streaming,recompact_every=64", max_compaction_tokens=1)
    name = sim.add(prompt_of(64 * 3), max_tokens=200)
    sim.step_until_compacted(name)
    while sim.computed(name) <= 64 * 3:
        sim.step()
    sim.manager.peak_blocks[name] = sim.held(name)
    # Somebody older is compacted in every step.
    sim.scheduler._due.deferred = {name}
    request = sim.scheduler.requests[name]
    assert not request.is_prefill_chunk and sim.scheduler._due.waits(request)
    sim.manager.peak_blocks[name] += 1
    assert not sim.scheduler._due.waits(request)


@pytest.mark.parametrize("mode", MODES[:2])
def test_a_preempted_request_waits_for_its_turn_while_it_replays_its_answer(mode):
    options = "snapkv:budget=0.25,recompact_every=64"
    sim = Simulation(max_num_batched_tokens=1024, max_compaction_tokens=1, num_blocks=400, **mode)
    name = sim.add(prompt_of(300, 3), options, max_tokens=200)
    while len(sim.jobs_of(name)) < 3:
        sim.step()
    sim.preempt(name)
    others = burst(sim, [250] * 3, max_tokens=20)
    sim.finish()
    assert len(sim.jobs_of(name)) > 3 and all(sim.jobs_of(other) for other in others)
    assert sim.answers[name] == Simulation(options).run(prompt_of(300, 3), max_tokens=200) or (
        name in sim.worker.late
    )
    sim.check_nothing_left()
