"""How much a threshold keeps is known one step later: see `simulation`, whose worker answers by content."""

import pytest
from simulation import BLOCK, Simulation, prompt_of
from test_scheduler import MODES

THRESHOLD = "foresight:budget=0.5,threshold=0.1"


def shape(job) -> tuple[int, int, int]:
    return job.num_tokens, job.boundary, len(job.destination)


@pytest.mark.parametrize("mode", MODES)
def test_blocks_that_nothing_fills_are_freed_with_the_steps_output(mode):
    sim = Simulation(THRESHOLD, **mode)
    name = sim.add(prompt_of(600), max_tokens=60)
    job = sim.step_until_compacted(name)
    kept = len(sim.worker.rows[name].destination)
    assert 1 <= kept < len(job.destination) == 18  # half of 35 blocks below the window
    if mode.get("asynchronous"):  # its output is on its way
        assert len(sim.manager.compacted[name]) == 18
        sim.step()
    assert [block.block_id for block in sim.manager.compacted[name]] == list(job.destination[:kept])
    assert sim.scheduler._tracked[name].held.kept_blocks == kept
    sim.finish()
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("every", [1, 6, 40])
def test_drafts_and_steps_in_flight_change_neither_answer_nor_compactions(every, mode):
    runs = []
    for kwargs in ({}, mode):
        sim = Simulation(f"{THRESHOLD},recompact_every={every}", **kwargs)
        answer = sim.run(prompt_of(200), max_tokens=90)
        runs.append((answer, [shape(job) for job in sim.jobs if job.num_tokens < 200 + 90 - 1]))
        assert not sim.worker.late
        sim.check_nothing_left()
    assert len(runs[0][1]) > 1 and runs[0] == runs[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("every", [64, 256])
def test_a_prompt_that_is_compacted_while_it_is_computed_waits_for_the_answer(every, mode):
    runs = []
    for kwargs in ({}, mode):
        sim = Simulation(f"{THRESHOLD},when=streaming,recompact_every={every}", num_blocks=80, **kwargs)
        names = [sim.add(prompt_of(700, seed), max_tokens=20) for seed in range(3)]
        sim.finish()
        runs.append([(sim.answers[name], [shape(job) for job in sim.jobs_of(name)]) for name in names])
        sim.check_nothing_left()
    assert runs[0] == runs[1] and len(runs[0][0][1]) > 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("end", ["abort", "preempt"])
@pytest.mark.parametrize("job", [1, 2])
def test_who_ends_before_the_answer_comes_gives_everything_back(end, job, mode):
    options = f"{THRESHOLD},recompact_every=64"
    alone = Simulation(options, **mode)
    answer = alone.run(prompt_of(500), max_tokens=150)
    sim = Simulation(options, **mode)
    name = sim.add(prompt_of(500), max_tokens=150)
    while len(sim.jobs) < job:
        sim.step()
    getattr(sim, end)(name)
    assert sim.free == sim.free_at_start
    if end == "preempt":
        sim.finish()
        assert sim.answers[name] == answer
        assert [shape(each) for each in sim.jobs[job:]] == [shape(each) for each in alone.jobs]
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
def test_in_a_full_pool_they_finish_as_they_would_alone(mode):
    prompts = [prompt_of(300, seed) for seed in range(4)]
    alone = [Simulation(THRESHOLD, **mode).run(prompt, max_tokens=120) for prompt in prompts]
    sim = Simulation(THRESHOLD, num_blocks=60, **mode)
    names = [sim.add(prompt, max_tokens=120) for prompt in prompts]
    sim.finish()
    assert sim.preempted or sim.worker.late
    assert [sim.answers[name] for name in names if name not in sim.worker.late] == [
        answer for answer, name in zip(alone, names, strict=True) if name not in sim.worker.late
    ]
    sim.check_nothing_left()


def test_a_step_that_says_nothing_of_it_is_an_error():
    sim = Simulation(THRESHOLD)
    name = sim.add(prompt_of(600), max_tokens=60)
    sim.step_until_due(name)
    run = sim.worker.execute

    def silent(output):
        result = run(output)
        del result.kv_compression
        return result

    sim.worker.execute = silent
    with pytest.raises(RuntimeError, match="without word of what a threshold keeps"):
        sim.step()


def test_what_is_kept_is_at_most_what_the_budget_allows():
    for seed in range(20):
        sim = Simulation("foresight:budget=0.25,threshold=0.1")
        name = sim.add(prompt_of(400, seed), max_tokens=4)
        job = sim.step_until_compacted(name)
        assert len(sim.manager.compacted[name]) <= len(job.destination) == -(-(400 - 32) // BLOCK // 4)
