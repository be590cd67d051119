"""Due requests that find no room: they go on raw, are compacted once they can be, and are on time again."""

from types import SimpleNamespace

import pytest
from simulation import Simulation, on_a_gpu, prompt_of

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.paging import repetition
from vllm_kvcompress.plan import is_ever_compacted

PROMPT = prompt_of(1000)


def beside_an_idle_session(
    options: str, num_blocks: int = 70, max_tokens: int = 200
) -> tuple[Simulation, str]:
    """A request that shares its prompt with a session, which idles and leaves no room to compact it."""
    sim = Simulation(options, num_blocks=num_blocks)
    sim.add(PROMPT, max_tokens=1, name="session", resumable=True)
    sim.finish()
    return sim, sim.add(PROMPT, max_tokens=200, name="late")


def step_until_late(sim: Simulation, name: str) -> None:
    while name not in sim.worker.late:
        sim.step()
    assert sim.scheduler._tracked[name].late and not sim.jobs_of(name)


def test_a_late_request_answers_as_off_does_until_it_is_compacted_as_it_would_have_been():
    sim, name = beside_an_idle_session("snapkv:budget=0.25")
    step_until_late(sim, name)
    for _ in range(10):
        sim.step()
    plain = Simulation("snapkv:budget=0.25").run(PROMPT, "off", 200)
    answered = len(sim.answers[name])
    assert answered >= 10 and sim.answers[name] == plain[:answered]
    sim.close("session")
    sim.finish()
    (job,) = sim.jobs_of(name)
    assert (job.num_tokens, job.boundary) == (1000, 960) and len(sim.answers[name]) == 200
    assert sim.answers[name] != plain
    sim.check_nothing_left()


@pytest.mark.parametrize("steps", [3, 30, 70])
@pytest.mark.parametrize("method", ["snapkv", "knorm"])
def test_once_there_is_room_a_late_request_is_on_time_again(method, steps):
    sim, name = beside_an_idle_session(f"{method}:budget=0.25,recompact_every=24", 75)
    step_until_late(sim, name)
    for _ in range(steps):
        sim.step()
    sim.close("session")
    sim.step()
    assert sim.jobs_of(name) and not sim.scheduler._tracked[name].late
    while name in sim.scheduler.requests:
        sim.step()  # the worker looks for the queries of each Job's window
        tracked = sim.scheduler._tracked.get(name)
        assert tracked is None or sim.computed(name) <= tracked.point
    assert [job.num_tokens for job in sim.jobs_of(name)][-1] >= 1000 + 200 - 60
    sim.check_nothing_left()


def test_a_late_request_that_is_preempted_is_on_time_when_it_comes_back():
    sim, name = beside_an_idle_session("snapkv:budget=0.25")
    step_until_late(sim, name)
    sim.close("session")
    sim.preempt(name)
    answered = len(sim.answers[name])
    while not sim.jobs_of(name):
        sim.step()
        assert sim.computed(name) <= 1000 or sim.jobs_of(name)
    assert not sim.scheduler._tracked[name].late and len(sim.answers[name]) <= answered + 1
    sim.finish()
    sim.check_nothing_left()


def test_room_that_one_compaction_makes_serves_others_in_the_same_step():
    sim = Simulation(num_blocks=90, max_num_batched_tokens=2048)
    sim.add(PROMPT, max_tokens=1, name="session", resumable=True)
    sim.finish()
    # Looked at first, the sharing one finds no room; the other is compacted into its own blocks.
    sharing = sim.add(PROMPT, max_tokens=20)
    own = sim.add(prompt_of(200, 5), max_tokens=20)
    while not sim.jobs_of(own):
        sim.step()
    assert [job.request_id for job in sim.last.kv_compression.jobs] == [own, sharing]
    assert not sim.last.kv_compression.late


def test_nobody_overtakes_a_request_that_waits_for_memory_for_its_queries(monkeypatch):
    on_a_gpu(monkeypatch)
    sim = Simulation()
    sim.scheduler._rings.budget, sim.scheduler._rings.taken = 200, 100

    def start(options: str) -> bool:
        return sim.scheduler._rings.start(KVCompressionConfig.parse(options), 100)

    assert not start("snapkv:window=300")
    assert not start("snapkv:window=32"), "though there is memory for this one"
    assert start("knorm"), "who needs none takes nothing away"


@pytest.mark.parametrize("watermark", [0.0, 0.1, 0.2])
def test_owners_whose_repetitions_do_not_fit_beside_each_other_go_on(watermark, monkeypatch):
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [1] * 10)
    monkeypatch.setattr(repetition, "cached_tokenizer_from_config", lambda config: tokenizer)
    for num_blocks in range(40, 80):
        sim = Simulation("kvzip:budget=0.25,chunk=200", num_blocks=num_blocks, watermark=watermark)
        names = [sim.add(prompt_of(300, seed), max_tokens=40) for seed in range(2)]
        sim.finish()
        assert all(len(sim.answers[name]) == 40 for name in names)
        sim.check_nothing_left()


def test_a_point_counts_only_where_a_request_is_compacted_not_where_it_ends():
    config = KVCompressionConfig.parse("snapkv:budget=0.25,window=80,when=streaming,recompact_every=100")
    # Of 190 prompt tokens and one of output the last point is 100, where only one block is below the window.
    assert not is_ever_compacted(config, 190, 191, 16)
    assert is_ever_compacted(config, 290, 291, 16)
