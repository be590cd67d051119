"""Prompts whose compaction would free too little: they are served as if they were off."""

import pytest
from simulation import BLOCK, Simulation, prompt_of


@pytest.mark.parametrize("mode", [{}, dict(asynchronous=True)])
def test_only_prompts_that_free_enough_are_compacted(mode):
    sim = Simulation("snapkv:budget=0.25,min_freed_tokens=256", **mode)
    short, long = sim.add(prompt_of(383), max_tokens=40), sim.add(prompt_of(384, 1), max_tokens=40)
    assert short not in sim.scheduler._tracked, "it may read the prefix cache to its end, and is never late"
    sim.finish()
    assert [job.request_id for job in sim.jobs] == [long]
    assert sim.answers[short] == Simulation().run(prompt_of(383), "off", 40)
    sim.check_nothing_left()


def test_a_request_may_ask_for_another_least():
    sim = Simulation("snapkv:budget=0.25,min_freed_tokens=256")
    eager = sim.add(prompt_of(200), "snapkv:min_freed_tokens=16")
    patient = sim.add(prompt_of(400, 1), "snapkv:min_freed_tokens=400")
    sim.finish()
    assert sim.jobs_of(eager) and not sim.jobs_of(patient)


@pytest.mark.parametrize("mode", [{}, dict(asynchronous=True), dict(num_drafts=3)])
def test_a_prompt_left_alone_is_looked_at_again_at_its_next_point(mode):
    sim = Simulation("snapkv:budget=0.25,recompact_every=32,min_freed_tokens=256", **mode)
    name = sim.add(prompt_of(200), max_tokens=400)
    sim.finish()
    points = [job.num_tokens for job in sim.jobs]
    # 384 tokens free 16 blocks, and 200 + 6 * 32 are the first point behind them.
    assert points[0] == 392 and (392 - 32) // BLOCK == 22
    # From then on it follows its interval, however little that frees.
    assert all(point % 32 == 8 for point in points) and len(points) >= 4
    assert all(later - sooner <= 64 for sooner, later in zip(points, points[1:], strict=False))
    assert len(sim.answers[name]) == 400
    sim.check_nothing_left()


def test_a_streaming_prompt_follows_its_interval():
    sim = Simulation("knorm:budget=0.25,when=streaming,recompact_every=64,min_freed_tokens=1000")
    sim.run(prompt_of(300))
    assert [job.num_tokens for job in sim.jobs] == [64, 128, 192, 256, 300]
