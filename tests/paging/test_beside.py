"""On a GPU compacted pages above a bound are never written in place: the request waits for free blocks."""

import pytest
from simulation import BLOCK, Simulation, on_a_gpu, prompt_of

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.paging import compactions
from vllm_kvcompress.plan import STAGED_BYTES, Plan, next_point, peak_blocks

BLOCK_BYTES = 2 * 2 * BLOCK * 16 * 4  # keys and values, 2 heads of 16 channels, float32, one layer


@pytest.fixture
def gpu(monkeypatch):
    """A GPU on which only 3 blocks may be rewritten in place."""
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(compactions, "STAGED_BYTES", 3 * BLOCK_BYTES)


def in_place(job) -> bool:
    return bool(set(job.destination) & {*job.source, *job.previous})


def full(num_tokens: int, room: int, **options) -> tuple[Simulation, str, str]:
    """A client, and a request that is due in a pool that has room for so many more blocks."""
    num_blocks = 1 + 4 + -(-num_tokens // BLOCK) + room
    sim = Simulation("snapkv:budget=0.25", num_blocks=num_blocks, max_num_batched_tokens=2048, **options)
    client = sim.add(prompt_of(40, 7), "off", 23)
    name = sim.add(prompt_of(num_tokens), max_tokens=60)
    sim.step_until_due(name)
    return sim, client, name


def test_what_may_be_staged_is_256_mib():
    assert STAGED_BYTES == 256 * 2**20


def test_a_large_request_waits_for_free_blocks_and_goes_on_raw(gpu):
    sim, client, name = full(510, 6)
    sim.step()
    assert not sim.jobs and sim.scheduler._tracked[name].late
    plain = Simulation().run(prompt_of(510), "off", 60)
    sim.finish(client)
    answered = len(sim.answers[name])
    assert sim.answers[name] == plain[:answered] and answered > 15
    sim.finish()
    (job,) = sim.jobs
    assert (job.num_tokens, len(job.destination)) == (510, 8) and not in_place(job)
    sim.check_nothing_left()


def pressed(num_blocks: int, **options) -> Simulation:
    """A large request and a small one grow under pressure until the pool is full."""
    compression = "knorm:budget=0.125,when=pressure,min_freed_tokens=64"
    sim = Simulation(compression, num_blocks=num_blocks, max_num_batched_tokens=2048, **options)
    sim.add(prompt_of(1600), max_tokens=200)
    sim.add(prompt_of(100, 1), "off", max_tokens=200)
    return sim


def test_under_pressure_a_large_request_gives_while_there_is_room_to_do_it_in(gpu):
    """It would keep 12 blocks at least. Without any free one nobody could give, and one be preempted."""
    sim = pressed(128)
    while not sim.jobs:
        sim.step()
        assert not sim.preempted
    (job,) = sim.jobs
    assert not in_place(job) and 0 < sim.free
    sim.finish()
    assert not sim.preempted
    sim.check_nothing_left()


def test_under_pressure_a_step_that_finds_no_room_gives_way_to_a_deeper_one(gpu):
    """With 15 free blocks 13 fit, half or a quarter of a hundred do not."""
    sim = pressed(128)
    while sim.free > 15:
        sim.step()
        assert not sim.jobs
    sim.add(prompt_of(400, 2), "off", max_tokens=2)
    sim.step()
    (job,) = sim.jobs
    assert len(job.destination) <= 13 and not in_place(job) and sim.computed("r2")
    sim.finish()
    sim.check_nothing_left()


def test_elsewhere_it_is_compacted_in_place_also_under_pressure():
    sim = pressed(128)
    while not sim.jobs:
        sim.step()
    assert sim.free == 0 or in_place(sim.jobs[0])
    sim.finish()
    sim.check_nothing_left()


def test_elsewhere_it_is_compacted_in_place():
    sim, _, name = full(510, 3)
    sim.step()
    (job,) = sim.jobs_of(name)
    assert in_place(job)


def test_a_small_request_is_compacted_in_place_on_a_gpu(gpu):
    sim, _, name = full(222, 1)  # 11 blocks below the window, 3 of which stay
    sim.step()
    (job,) = sim.jobs_of(name)
    assert len(job.destination) == 3 and in_place(job)


def test_who_waits_to_be_admitted_leaves_it_the_blocks(gpu):
    sim, client, name = full(510, 6)  # it is compacted into 8
    waiting = [sim.add(prompt_of(30, 20 + seed), "off", 10) for seed in range(6)]
    while not sim.jobs_of(name):
        sim.step()
        assert sim.jobs_of(name) or not any(sim.answers[other] for other in waiting)
    assert client not in sim.scheduler.requests, "whose blocks made the room"
    sim.finish()
    assert sim.scheduler.kv_cache_manager.watermark_blocks == sim.scheduler._due._watermark_blocks
    assert all(len(sim.answers[other]) == 10 for other in waiting)
    sim.check_nothing_left()


def test_a_request_alone_in_a_pool_that_it_fills_goes_on_raw_to_its_end(gpu):
    sim = Simulation("snapkv:budget=0.5", num_blocks=1 + 34, max_num_batched_tokens=2048)
    answer = sim.run(prompt_of(500), max_tokens=40)
    assert not sim.jobs and answer == Simulation().run(prompt_of(500), "off", 40)
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", [{}, dict(asynchronous=True)])
@pytest.mark.parametrize("num_blocks", [48, 60, 80])
def test_streaming_prompts_larger_than_the_pool_end_beside_each_other(gpu, num_blocks, mode):
    options = "knorm:budget=0.1,when=streaming,recompact_every=128"
    sim = Simulation(options, num_blocks=num_blocks, max_num_batched_tokens=512, **mode)
    names = [sim.add(prompt_of(1300, seed), max_tokens=40) for seed in range(3)]
    assert sim.manager.peak_blocks[names[0]] == 2 * 9 + 10 + 2
    sim.finish()
    assert all(len(sim.answers[name]) == 40 for name in names)
    assert not any(in_place(job) and len(job.destination) > 3 for job in sim.jobs)
    sim.check_nothing_left()


def test_one_alone_is_compacted_at_each_point_in_a_pool_of_its_peak(gpu):
    options = "knorm:budget=0.1,when=streaming,recompact_every=128"
    sim = Simulation(options, num_blocks=1 + 2 * 14 + 12, max_num_batched_tokens=512)
    name = sim.add(prompt_of(2000), max_tokens=100)
    assert sim.manager.peak_blocks[name] == 2 * 14 + 12
    sim.finish()
    assert not sim.worker.late and len(sim.jobs) >= 2000 // 128
    assert sim.answers[name] == Simulation(options).run(prompt_of(2000), max_tokens=100)


@pytest.mark.parametrize("options", ["", ",recompact_every=100", ",when=streaming,recompact_every=64"])
@pytest.mark.parametrize("budget", [0.1, 0.25, 0.9])
@pytest.mark.parametrize("num_prompt", [10, 300, 1000])
def test_a_peak_counts_pages_that_are_written_beside_those_they_are_made_of(budget, options, num_prompt):
    config = KVCompressionConfig.parse(f"snapkv:budget={budget}{options}")
    for num_tokens in (num_prompt + 7, num_prompt + 1500):
        peak = peak_blocks(config, num_prompt, num_tokens, BLOCK, beside=True)
        assert peak <= -(-num_tokens // BLOCK)
        held, point, most = None, next_point(config, num_prompt), 0
        for computed in range(1, num_tokens + 1):
            raw = -(-computed // BLOCK) - (held.source_blocks if held else 0)
            now = raw + (held.kept_blocks if held else 0)
            if computed == point:
                plan = Plan.of(config, computed, BLOCK, held)
                now += plan.kept_blocks if plan else 0
                held, point = plan or held, next_point(config, num_prompt, point)
            most = max(most, now)
        assert most <= peak or peak == -(-num_tokens // BLOCK), "or it can stay whole"
