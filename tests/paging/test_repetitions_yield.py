"""Repetitions yield to others' decoding: they have a bounded part of each step, one of them at a time."""

from types import SimpleNamespace

import pytest
from simulation import BLOCK, Simulation, prompt_of

from vllm_kvcompress.paging import repetition

MODES = [pytest.param({}, id="sync"), pytest.param(dict(asynchronous=True), id="async")]


@pytest.fixture(autouse=True)
def words(monkeypatch):
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [1] * 10)
    monkeypatch.setattr(repetition, "cached_tokenizer_from_config", lambda config: tokenizer)


def repeated(output) -> dict[str, int]:
    """Tokens that repetitions compute in a step."""
    return {name: n for name, n in output.num_scheduled_tokens.items() if ":repeat-" in name}


def neighbours(sim: Simulation, count: int = 4) -> list[str]:
    return [sim.add(prompt_of(500, 30 + seed), "kvzip:budget=0.25", 4) for seed in range(count)]


@pytest.mark.parametrize("mode", MODES)
def test_beside_a_decoding_client_one_repetition_computes_a_quarter_of_a_step(mode):
    sim = Simulation("kvzip:budget=0.25", max_num_batched_tokens=256, num_blocks=400, **mode)
    client = sim.add(prompt_of(60), "off", 200)
    sim.step()
    names = neighbours(sim)
    most = 0
    while len(sim.answers[client]) < 190:
        output = sim.step()
        given = repeated(output)
        assert len(given) <= 1 and sum(given.values()) <= 64
        assert client in output.num_scheduled_tokens, "it decodes in every step"
        most = max(most, sum(given.values()))
    assert most == 64 and any(sim.jobs_of(name) for name in names)
    sim.finish()
    assert all(sim.jobs_of(name) and len(sim.answers[name]) == 4 for name in names)
    sim.check_nothing_left()


def test_when_nobody_decodes_there_is_no_bound():
    sim = Simulation("kvzip:budget=0.25", max_num_batched_tokens=256, num_blocks=400)
    neighbours(sim, 2)
    most, at_once = 0, 0
    while sim._unfinished():
        given = repeated(sim.step())
        most, at_once = max(most, sum(given.values())), max(at_once, len(given))
    assert most == 256 and at_once == 2
    sim.check_nothing_left()


def test_repetitions_that_began_alone_yield_once_somebody_decodes():
    sim = Simulation("kvzip:budget=0.25", max_num_batched_tokens=512, num_blocks=400)
    neighbours(sim)
    while sum(map(len, [repeated(sim.step())])) == 0:
        pass
    client = sim.add(prompt_of(20), "off", 100)
    while not sim.answers[client]:
        sim.step()
    while len(sim.answers[client]) < 100:
        given = repeated(sim.step())
        assert len(given) <= 1 and sum(given.values()) <= 128
    sim.finish()
    sim.check_nothing_left()


def test_a_prompt_that_waits_behind_repetitions_is_admitted_beside_them():
    sim = Simulation("kvzip:budget=0.25", max_num_batched_tokens=256, num_blocks=400)
    client = sim.add(prompt_of(60), "off", 300)
    sim.step()
    names = neighbours(sim)
    while not all(sim.answers[name] for name in names):
        sim.step()
    sim.step()
    assert sim.scheduler.kv_holding_waiting, "repetitions of the other neighbours"
    late = sim.add(prompt_of(40, 9), "off", 5)
    sim.step()
    assert len(sim.answers[late]) == 1, "in its first step"
    sim.finish()
    assert all(sim.jobs_of(name) for name in names) and len(sim.answers[client]) == 300
    sim.check_nothing_left()


def test_who_decodes_is_never_left_out_for_a_repetition():
    # 13 clients verify 3 drafts each, 52 tokens of a step's 64: a quarter, taken first, would leave one out.
    sim = Simulation("kvzip:budget=0.25", max_num_batched_tokens=64, num_blocks=900, num_drafts=3)
    first = sim.add(prompt_of(2, 49), "off", 400)
    sim.step()
    owner = sim.add(prompt_of(300, 5), "kvzip:budget=0.25", 4)
    while not repeated(sim.step()):
        pass
    clients = [first] + [sim.add(prompt_of(2, 50 + seed), "off", 400) for seed in range(12)]
    while not all(sim.answers[name] for name in clients):
        sim.step()
    for _ in range(5):
        output = sim.step()
        assert all(output.num_scheduled_tokens[name] == 4 for name in clients)
        assert sum(repeated(output).values()) == 64 - 13 * 4
    sim.finish()
    assert sim.jobs_of(owner)
    sim.check_nothing_left()


def test_the_part_of_a_step_is_a_block_at_least():
    sim = Simulation("kvzip:budget=0.25", max_num_batched_tokens=32, num_blocks=400)
    client = sim.add(prompt_of(10), "off", 400)
    sim.step()
    sim.add(prompt_of(100, 5), "kvzip:budget=0.25", 4)
    given = set()
    while len(sim.answers[client]) < 60:
        given.add(sum(repeated(sim.step()).values()))
    assert max(given) == BLOCK
    sim.finish()
    sim.check_nothing_left()
