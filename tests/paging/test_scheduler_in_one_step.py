"""What may happen to several requests, or to one twice, within one call of `schedule`."""

from types import SimpleNamespace

import pytest
from simulation import Simulation, on_a_gpu, prompt_of

from vllm_kvcompress.paging import repetition


@pytest.mark.parametrize("num_tokens", [255, 256, 257, 512])
def test_blocks_reserved_for_drafts_ahead_are_not_part_of_the_tail(num_tokens):
    sim = Simulation("snapkv:budget=0.25,recompact_every=48")
    sim.scheduler.num_lookahead_tokens = 3
    sim.add(prompt_of(num_tokens), max_tokens=120)
    sim.finish()  # the worker counts each Job's tail
    assert len(sim.jobs) == 3
    sim.check_nothing_left()


def test_a_request_preempted_after_its_job_was_made_is_not_compacted():
    # Two requests need a block each when the third, in a full pool, is compacted and returns one.
    sim = Simulation(num_blocks=22, max_num_batched_tokens=512)
    others = [sim.add(prompt_of(64, seed), "off", 4) for seed in (1, 2)]
    name = sim.add(prompt_of(200), "snapkv:budget=0.9", 4)
    sim.step()
    assert sim.free == 0 and name in {request.request_id for request in sim.scheduler.running}
    sim.step()
    assert sim.preempted == [name] and not sim.jobs
    sim.finish()
    assert len(sim.jobs) == 1 and all(len(sim.answers[each]) == 4 for each in (*others, name))
    sim.check_nothing_left()


def test_requests_that_start_together_share_the_memory_for_queries(monkeypatch):
    on_a_gpu(monkeypatch)
    sim = Simulation("snapkv:budget=0.25")
    sim.scheduler._rings.budget = 2 * 64
    names = [sim.add(prompt_of(80, seed)) for seed in range(3)]
    assert sorted(sim.step().num_scheduled_tokens) == names[:2]
    sim.finish()
    sim.check_nothing_left()


@pytest.mark.parametrize("num_owners", [2, 3])
def test_owners_that_leave_no_place_for_a_repetition_do_not_wait_for_it(num_owners, monkeypatch):
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [1] * 10)
    monkeypatch.setattr(repetition, "cached_tokenizer_from_config", lambda config: tokenizer)
    sim = Simulation("kvzip:budget=0.25,chunk=200", max_num_seqs=2)
    names = [sim.add(prompt_of(200, seed), max_tokens=20) for seed in range(num_owners)]
    sim.finish()
    assert all(len(sim.answers[name]) == 20 for name in names)
    sim.check_nothing_left()
