"""What others learn of compacted prefixes: those who ask for one, those who attach, and operators."""

import json

import pytest
from simulation import BLOCK, Simulation, prompt_of
from test_prefixes import KEEPS, PINS, forget_raw, pin
from test_scheduler import MODES
from vllm.v1.core.sched.interface import PauseState

BLOCK_BYTES = BLOCK * 2 * 2 * 16 * 4  # tokens, keys and values, heads, channels, bytes of float32
DOCUMENT = prompt_of(40 * BLOCK + 5)


def asks(sim: Simulation, prompt, name="document", compression=PINS, max_tokens=2, **fields) -> dict:
    """What the client of a request is told of the prefix that it should leave."""
    own, option = f"asks-{len(sim.answers)}", f"{compression},prefix={name}"
    request = sim.add(prompt, option, max_tokens, name=own, **fields)
    sim.finish(request)
    return sim.told[request]["prefix"]


def names(sim: Simulation, salt: str | None) -> list[str | None]:
    return [each.name for each in sim.scheduler.prefixes(salt)]


# ---------------------------------------------------------------------- listing and deleting


def test_a_listing_describes_the_prefixes_of_one_salt_and_tells_no_salt():
    sim = Simulation(KEEPS, num_blocks=400, max_model_len=1280)
    for salt in (None, "mine", "yours"):
        pin(sim, DOCUMENT, f"of-{salt and salt[0]}", cache_salt=salt)
    sim.add(prompt_of(30 * BLOCK, 1), cache_salt="mine", max_tokens=2)
    sim.finish()
    forget_raw(sim)
    attached = sim.add(DOCUMENT + prompt_of(9, 2), cache_salt="mine", max_tokens=20)
    sim.step()
    assert names(sim, None) == ["of-None"] and names(sim, "yours") == ["of-y"] and names(sim, "other") == []
    named, unnamed = sim.scheduler.prefixes("mine")
    assert named.to_dict() == {
        "id": named.id,
        "name": "of-m",
        "tokens": 40 * BLOCK,
        "compacted_tokens": 38 * BLOCK,  # all but the last 32
        "blocks": 12,  # a quarter of 38, and two
        "bytes": 12 * BLOCK_BYTES,
        "users": 1,
        "hits": 1,
        "method": "knorm",
        "budget": 0.25,
        "adapter": None,
    }
    assert (unnamed.name, unnamed.tokens, unnamed.users) == (None, 30 * BLOCK, 0)
    assert "mine" not in json.dumps([each.to_dict() for each in sim.scheduler.prefixes("mine")])
    sim.finish(attached)
    assert sim.scheduler.prefixes("mine")[0].users == 0
    sim.check_nothing_left()


def test_all_that_have_a_name_are_listed_and_of_the_others_those_that_were_used_last(monkeypatch):
    from vllm_kvcompress.paging import telling

    monkeypatch.setattr(telling, "MOST_REQUESTS", 2)
    sim = Simulation(KEEPS, num_blocks=400, max_model_len=1280)
    for number in (3, 1, 2):
        pin(sim, prompt_of(30 * BLOCK, number), f"d{number}")
    tokens = [BLOCK * length for length in (25, 30, 35)]
    for number, length in enumerate(tokens):
        sim.run(prompt_of(length + 1, 10 + number), max_tokens=2)
    told = sim.scheduler.prefixes(None)
    assert [each.name for each in told] == ["d1", "d2", "d3", None, None]
    assert [each.tokens for each in told[3:]] == [tokens[2], tokens[1]]
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
def test_a_prefix_is_deleted_by_who_knows_its_name_and_its_salt_also_while_it_is_used(mode):
    sim = Simulation(PINS, max_model_len=1280, **mode)
    free = sim.free
    pin(sim, DOCUMENT, cache_salt="mine")
    users = [sim.add(DOCUMENT + prompt_of(9, n), cache_salt="mine", max_tokens=20) for n in (1, 2)]
    for _ in range(4):
        sim.step()
    delete = sim.scheduler.delete_prefix
    assert [delete("document", None), delete("document", "yours"), delete("docu", "mine")] == [False] * 3
    assert delete("document", "mine") and not delete("document", "mine")
    assert names(sim, "mine") == []
    assert asks(sim, DOCUMENT, cache_salt="mine")["kept"], "the name is free again"
    sim.finish()
    assert all(sim.worker.attached[name] == 40 * BLOCK for name in users)
    assert delete("document", "mine") and sim.free == free
    sim.check_nothing_left()


def test_a_prefix_may_be_deleted_before_any_worker_heard_of_it():
    sim = Simulation(PINS, max_model_len=1280)
    pin(sim, DOCUMENT)
    assert sim.scheduler.leaving.kept and sim.scheduler.delete_prefix("document", None)
    sim.check_nothing_left()


# ---------------------------------------------------------------------- what a request is told


@pytest.mark.parametrize("mode", MODES)
def test_who_asks_for_a_prefix_is_told_what_is_kept(mode):
    sim = Simulation(PINS, max_model_len=1280, **mode)
    told = asks(sim, DOCUMENT)
    (listed,) = sim.scheduler.prefixes(None)
    assert told == {"kept": True, "engine": 0} | listed.to_dict()
    sim.check_nothing_left()


def test_or_why_it_is_not(monkeypatch):
    sim = Simulation("knorm:budget=0.25,min_freed_tokens=256", num_blocks=101, max_model_len=60 * BLOCK)
    assert asks(sim, DOCUMENT)["kept"]

    def why(prompt, name="another", compression="knorm:budget=0.25", max_tokens=2) -> str:
        told = asks(sim, prompt, name, compression, max_tokens)
        assert told.keys() == {"kept", "name", "reason"}
        assert (told["kept"], told["name"], len(told["reason"].splitlines())) == (False, name, 1)
        return told["reason"]

    assert "name is taken" in why(prompt_of(40 * BLOCK, 1), "document")
    assert "fewer than min_freed_tokens=256" in why(prompt_of(20 * BLOCK, 2))  # 18 blocks to 5: 208 tokens
    assert "fewer than min_freed_tokens=256" in why(prompt_of(9, 2))
    # 57 blocks to 15, and two behind them; with the 12 of two others fewer than 60 of 100 remain.
    large = prompt_of(59 * BLOCK, 3)
    assert asks(sim, prompt_of(40 * BLOCK, 4), "second")["kept"]
    assert "its 17 blocks and 24 of other names would leave fewer of 100 than 60" in why(large)
    sim.scheduler.delete_prefix("second", None)
    assert asks(sim, large, "second")["kept"]
    sim.scheduler.delete_prefix("second", None)
    again = "knorm:budget=0.25,recompact_every=32"
    assert "some of its output" in why(prompt_of(30 * BLOCK, 5), compression=again, max_tokens=150)
    with monkeypatch.context() as patched:
        patched.setattr(sim.manager, "compact", lambda *args: None)
        assert "no room to compact" in why(prompt_of(40 * BLOCK, 6))
    assert names(sim, None) == ["document"]
    sim.check_nothing_left()


def test_who_ends_before_it_is_compacted_leaves_nothing():
    sim = Simulation(PINS, max_model_len=1280)
    first = sim.run(DOCUMENT, "off", 1)
    request = sim.add(DOCUMENT, f"{PINS},prefix=document", 9)
    sim.scheduler.requests[request].sampling_params.stop_token_ids = first
    sim.scheduler.requests[request].sampling_params.ignore_eos = False
    sim.finish()
    assert sim.answers[request] == first
    assert sim.told[request]["prefix"]["reason"] == "the request ended before its prompt was compacted"
    sim.check_nothing_left()


def test_a_prefix_with_a_name_may_be_made_of_another_one():
    sim = Simulation(PINS, max_model_len=1280)
    one = asks(sim, DOCUMENT, "one")
    two = asks(sim, DOCUMENT + prompt_of(100, 2), "two")
    assert two["kept"] and two["compacted_tokens"] == one["compacted_tokens"]
    assert two["tokens"] == (len(DOCUMENT) + 100) // BLOCK * BLOCK
    shared = sim.scheduler._take_stats().prefix_blocks
    assert shared < one["blocks"] + two["blocks"] and shared == 12 + 6
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
def test_who_attaches_is_told_how_many_tokens_it_did_not_compute(mode):
    sim = Simulation(KEEPS, max_model_len=1600, **mode)
    pin(sim, DOCUMENT)
    forget_raw(sim)
    plain, long = (sim.add(DOCUMENT + prompt_of(n, n), max_tokens=20) for n in (9, 700))
    other = sim.add(prompt_of(600, 5), max_tokens=20)
    sim.finish()
    assert sim.told[plain]["prefix_tokens"] == 40 * BLOCK and sim.told[plain]["compacted_tokens"] == 608
    # It was compacted again itself.
    assert sim.told[long]["prefix_tokens"] == 40 * BLOCK and sim.told[long]["compacted_tokens"] > 608
    assert "prefix_tokens" not in sim.told[other] and "prefix" not in sim.told[plain]
    sim.check_nothing_left()


def test_who_starts_again_after_the_prefix_is_gone_is_told_nothing_of_it():
    sim = Simulation(PINS, max_model_len=1280)
    pin(sim, DOCUMENT)
    name = sim.add(DOCUMENT + prompt_of(9, 1), max_tokens=20)
    for _ in range(4):
        sim.step()
    assert name in sim.worker.attached
    sim.preempt(name)
    assert sim.scheduler.delete_prefix("document", None)
    sim.finish()
    assert "prefix_tokens" not in sim.told[name]
    sim.check_nothing_left()


# ---------------------------------------------------------------------- what operators see


@pytest.mark.parametrize("mode", MODES)
def test_prefixes_and_hits_are_counted_and_shared_blocks_once(mode):
    sim = Simulation(KEEPS, num_blocks=300, max_model_len=1600, **mode)
    prompt, hits, tokens = prompt_of(20 * BLOCK), 0, 0
    pin(sim, DOCUMENT, "document", cache_salt="salt")
    sim.scheduler._take_stats()
    for turn in range(6):
        forget_raw(sim)
        name = sim.add(prompt, max_tokens=20)
        sim.step()
        state, held = sim.scheduler.compression_state(), sim.manager.compacted.get(name, [])
        compacted = {block.block_id for each in sim.scheduler._prefixes for block in each.compacted}
        assert state.compacted_blocks == len(compacted | {block.block_id for block in held})
        sim.finish()
        hits, tokens = hits + (turn > 0), tokens + sim.worker.attached.get(name, 0)
        prompt = prompt + sim.answers[name] + prompt_of(30, turn + 1)
    prefixes, stats = list(sim.scheduler._prefixes), sim.scheduler._take_stats()
    assert (stats.prefix_hits, stats.prefix_hit_tokens) == (hits, tokens) and hits == 5
    blocks = [{block.block_id for block in each.blocks} for each in prefixes]
    assert stats.prefix_blocks == len(set.union(*blocks)) < sum(map(len, blocks))
    state = sim.scheduler.compression_state()
    assert (stats.prefixes, state.prefixes, state.named_prefixes) == (len(prefixes), len(prefixes), 1)
    assert state.prefix_blocks == stats.prefix_blocks
    again = sim.scheduler._take_stats()
    assert (again.prefix_hits, again.prefix_hit_tokens) == (0, 0) and again.prefixes == stats.prefixes
    sim.scheduler.reset_prefix_cache()
    assert sim.scheduler._take_stats().prefix_blocks == 0
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
def test_what_is_told_last_is_how_things_stand_once_nothing_runs(mode):
    """An engine core steps, and tells, while its scheduler says that there is something to do."""
    engine = "knorm:budget=0.125,when=pressure,min_freed_tokens=16"
    sim = Simulation(engine, num_blocks=90, log_stats=True, max_model_len=1280, **mode)
    told = []

    def step_on() -> dict:
        while sim.scheduler.has_requests():
            output = sim.scheduler.schedule()
            outputs = sim.scheduler.update_from_output(output, sim.worker.execute(output))
            told.append(outputs[0].scheduler_stats.kv_connector_stats["kv_compression"])
        return told[-1]

    for seed in range(3):
        sim.add(prompt_of(30 * BLOCK, seed), max_tokens=60)
    last = step_on()
    assert max(each["pressure"] for each in told) > 0 and max(each["compacted"] for each in told) > 0
    nothing = {"raw": 0, "compacted": 0, "raw_blocks": 0, "held_blocks": 0, "pressure": 0.0}
    assert last.items() >= (nothing | {"prefixes": 0, "prefix_blocks": 0}).items()
    name = sim.add(prompt_of(30 * BLOCK, 4), max_tokens=60)
    sim.scheduler.schedule()
    sim.abort(name)
    assert step_on().items() >= nothing.items()
    sim.add(prompt_of(30 * BLOCK, 5), "knorm:budget=0.25,prefix=document", 2)
    last = step_on()
    (prefix,) = sim.scheduler._prefixes
    assert last.items() >= (nothing | {"prefixes": 1, "prefix_blocks": len(prefix.blocks)}).items()
    num = len(told)
    assert sim.scheduler.delete_prefix("document", None)
    assert step_on().items() >= (nothing | {"prefixes": 0, "prefix_blocks": 0}).items()
    assert len(told) == num + 1 and not sim.worker.prefixes, "workers hear of it, too"


def test_an_engine_that_is_paused_makes_no_step_for_what_it_could_tell():
    sim = Simulation(PINS, max_model_len=1280)
    pin(sim, DOCUMENT)
    sim.step()
    sim.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    sim.scheduler.reset_prefix_cache()
    assert not sim.scheduler.has_requests()
    sim.scheduler.set_pause_state(PauseState.UNPAUSED)
    assert sim.scheduler.has_requests()
    sim.step()
    assert not sim.scheduler.has_requests()
    sim.check_nothing_left()
