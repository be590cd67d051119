"""What an engine core tells of the pool and its running requests is what its own accounts say."""

import math
from types import SimpleNamespace

import pytest
from simulation import BLOCK, Simulation, prompt_of

from vllm_kvcompress.paging import repetition, telling
from vllm_kvcompress.paging.statistics import ID_LENGTH, shown_id

SHARES = [0, 0.5, 0.25, 0.125]  # kept at each step of the ladder
PRESSURE = "knorm:budget=0.125,when=pressure,min_freed_tokens=64"


def test_under_pressure_each_requests_blocks_are_those_that_the_pool_misses():
    sim = Simulation(PRESSURE, num_blocks=61)
    names = [sim.add(prompt_of(640, seed), option, 60) for seed, option in enumerate([None, None, "off"])]
    steps, waiting = set(), set()
    while sim._unfinished():
        sim.step()
        told, manager = sim.scheduler.compression_state(), sim.scheduler.compacting_manager
        assert (told.block_size, told.total_blocks) == (BLOCK, 60)
        assert told.used_blocks == 60 - sim.free == told.held_blocks  # nobody shares any
        assert told.compacted_blocks == sum(map(len, manager.compacted.values()))
        assert [each.id for each in told.requests] == [r.request_id for r in sim.scheduler.running]
        assert told.running == len(told.requests)
        assert told.held_blocks == sum(each.held_blocks for each in told.requests)
        for each, request in zip(told.requests, sim.scheduler.running, strict=True):
            assert each.held_blocks == manager.held_blocks(each.id)
            assert each.raw_blocks == -(-request.num_computed_tokens // BLOCK)
            assert (each.prompt_tokens, each.computed_tokens) == (640, request.num_computed_tokens)
            assert each.state == ("compacted" if each.id in manager.compacted else "raw")
            assert (each.state == "raw") == (each.held_blocks == each.raw_blocks)
            off = each.id == names[2]
            assert (each.method, each.steps) == ((None, None) if off else ("knorm", 3))
            assert (each.step is None) == off
            if not off:
                replaced = sum(block.is_null for block in manager.req_to_blocks[each.id])
                kept = len(manager.compacted.get(each.id, ()))
                assert kept == math.ceil(SHARES[each.step] * replaced) and bool(kept) == bool(each.step)
            steps.add(each.step)
        pressed = [each.step / each.steps for each in told.requests if each.steps]
        assert told.pressure == pytest.approx(sum(pressed) / len(pressed) if pressed else 0)
        waiting.add(told.waiting)
    assert {None, 0} < steps and waiting >= {0, 1}
    sim.check_nothing_left()


def test_what_scores_another_requests_context_is_told_apart(monkeypatch):
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [1] * 10)
    monkeypatch.setattr(repetition, "cached_tokenizer_from_config", lambda config: tokenizer)
    sim = Simulation("kvzip:budget=0.25", num_blocks=400)
    sim.add(prompt_of(500), max_tokens=4)
    seen = set()
    while sim._unfinished():
        sim.step()
        seen |= {(":repeat-" in each.id, each.state) for each in sim.scheduler.compression_state().requests}
    assert seen == {(True, "repeating"), (False, "raw"), (False, "compacted")}


def test_no_more_than_a_number_of_requests_are_described(monkeypatch):
    monkeypatch.setattr(telling, "MOST_REQUESTS", 3)
    sim = Simulation("knorm:budget=0.25", num_blocks=200)
    for seed in range(5):
        sim.add(prompt_of(100, seed), max_tokens=20)
    for _ in range(4):
        sim.step()
    told = sim.scheduler.compression_state()
    assert told.running == told.compacted + told.raw == 5 and len(told.requests) == 3
    sim.finish()


def test_a_compacted_request_is_found_by_its_name_as_it_is_shown():
    sim = Simulation("knorm:budget=0.25", num_blocks=200)
    names = ["x" * 100 + end for end in ("-0-1", "-0-2", "-0-3")]
    for name, option in zip(names, [None, None, "off"], strict=True):
        sim.add(prompt_of(300, 1), option, 20, name=name)
    for _ in range(8):
        sim.step()
    find = sim.scheduler.compacted_request
    assert [find(shown_id(name)) for name in names] == [*names[:2], None]
    assert find(names[0]) is None and find("x" * ID_LENGTH) is None and find("") is None
    sim.finish()
    assert find(shown_id(names[0])) is None
