"""Models some of whose layers keep a state: full attention is compacted, and states stay vLLM's own.

Their blocks are as large as a state, and a page is a part of one head's share of a block. What is kept, and
the answers, are compared with an oracle in `test_oracle.py`.
"""

import random
from collections import Counter

import pytest
import torch
from crowd import (
    compacted,
    compare_with_alone,
    finished,
    in_time,
    members_of_small_crowd,
    serve,
    tolerate,
)
from harness import BLOCK_SIZE, NUM_BLOCKS, STATEFUL, Engine, exact, sampling, tokens
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.core.single_type_kv_cache_manager import MambaManager

from vllm_kvcompress.paging.manager import CompactingManager

BLOCKS = {"lfm2": 96, "granite": 96, "qwen3-next": 288}  # tokens of one


@pytest.fixture(scope="module", params=["lfm2", "granite"])
def name(request) -> str:
    return request.param


# Of Qwen3-Next, in bfloat16, not where the same tokens are computed in other steps: answers differ.
of_all = pytest.mark.parametrize("name", BLOCKS, indirect=True, scope="module")


def started(
    engines, stateful, name: str, compression: str | None = "snapkv:budget=0.25", **options
) -> Engine:
    return engines(stateful[name], compression, **STATEFUL[name] | options)


def emptied(engine: Engine) -> Engine:
    engine.forget_prefixes()
    engine.sent.clear(), engine.compactions.clear(), engine.outputs.clear()
    return engine


@pytest.fixture
def engine(engines, stateful, name):
    """With an empty prefix cache; afterwards nothing may be left in it."""
    found = emptied(started(engines, stateful, name))
    free = found.free
    yield found
    found.check_accounts(), found.check_nothing_left()
    assert found.free == free


@pytest.fixture
def stock(engines, stateful, name, engine):
    return emptied(started(engines, stateful, name, None))


def state_layers(engine: Engine) -> list[MambaBase]:
    context = engine.worker.compilation_config.static_forward_context
    return [layer for layer in context.values() if isinstance(layer, MambaBase)]


# ---------------------------------------------------------------------- whose the groups are


@of_all
def test_states_are_stocks_own_to_the_class_and_pages_are_parts_of_a_blocks(engine, stock, name):
    for index, (manager, plain) in enumerate(zip(engine.managers, stock.managers, strict=True)):
        if index == engine.manager.kv_cache_group_id:
            assert type(manager) is CompactingManager
        else:
            assert type(manager) is type(plain) is MambaManager
            assert manager.kv_cache_spec == plain.kv_cache_spec
        assert manager.block_size == plain.block_size
    kinds = [type(layer) for layer in state_layers(engine)]
    assert len(kinds) == 4 and kinds == [type(layer) for layer in state_layers(stock)]
    grid = engine.worker.compactor.grid
    assert engine.manager.block_size == BLOCKS[name] and grid.block_size == BLOCK_SIZE
    assert engine.parts == BLOCKS[name] // BLOCK_SIZE
    assert grid.num_blocks == NUM_BLOCKS * engine.parts and grid.num_layers == 2


# ---------------------------------------------------------------------- idle


@of_all
@pytest.mark.parametrize("lengths", [[5, 64, 90], [200, 333, 900]], ids=str)
def test_with_nothing_due_outputs_are_stocks_to_the_last_bit(engine, stock, name, long_ids, lengths):
    prompts = [long_ids(length, seed=20 + length) for length in lengths]
    compression = None if max(lengths) < BLOCKS[name] else "off"
    expected = stock.run_all((prompt, sampling(40)) for prompt in prompts)
    got = engine.run_all((prompt, sampling(40, compression)) for prompt in prompts)
    assert not engine.sent
    assert [exact(output) for output in got] == [exact(output) for output in expected]


@of_all
def test_the_first_token_is_stocks_to_the_last_bit(engine, stock, long_ids):
    prompt = long_ids(1201, seed=30)
    expected, got = exact(stock.run(prompt, sampling(3))), exact(engine.run(prompt, sampling(3)))
    assert len(engine.compactions) == 1
    assert got[0] == expected[0] and got[1] != expected[1]


# ---------------------------------------------------------------------- blocks


def held(engine: Engine, request: str) -> list[int]:
    """Blocks of the pool that a live request has in each group, by its rows."""
    id = engine.live(request).request_id
    return [sum(not block.is_null for block in manager.req_to_blocks[id]) for manager in engine.managers]


@of_all
def test_full_attention_gives_blocks_back_and_states_go_on_as_in_stock(engine, stock, name, long_ids):
    prompt, params = long_ids(1201, seed=2), sampling(80)
    whole, ours = stock.add(prompt, params), engine.add(prompt, params)
    freed, own = Counter(), engine.manager.kv_cache_group_id
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step(), stock.step()
        if not engine.llm.llm_engine.has_unfinished_requests():
            break
        plain, found = held(stock, whole), held(engine, ours)
        compacted_to = len(engine.manager.compacted.get(engine.live(ours).request_id, ()))
        freed[plain[own] - found[own] - compacted_to] += 1
        del plain[own], found[own]
        assert found == plain and 0 < max(found) <= 2
        engine.check_accounts()
    stock.finish()
    # Of 12 blocks below the window three stay, of 3 · 4 pages each; of four larger ones one, of 9 · 4.
    gone, stay = (9, 3) if BLOCKS[name] == 96 else (3, 1)
    assert set(freed) == {0, gone} and freed[gone] > 75
    assert engine.compactions[-1].counts.sum() == stay * engine.parts * 4


def test_a_quarter_of_the_full_group_lets_more_requests_run_at_once(engine, stock, long_ids):
    """Of 1,201 tokens: 13 blocks of full attention, 4 with what is kept, beside those of states."""
    prompts = [long_ids(1201, seed=400 + index) for index in range(12)]
    running = {}
    for which, found in {"stock": stock, "ours": engine}.items():
        with found.squeezed(leave=60):
            for prompt in prompts:
                found.add(prompt, sampling(60))
            most, preempted = 0, found.preemptions
            while found.llm.llm_engine.has_unfinished_requests():
                found.step()
                decoding = [
                    request
                    for request in found.scheduler.running
                    if request.num_computed_tokens >= len(prompts[0])
                ]
                most = max(most, len(decoding))
            running[which] = most, found.preemptions - preempted
    (before, _), (after, preempted) = running["stock"], running["ours"]
    print(f"{before} requests at once before, {after} after")
    assert preempted == 0 and after >= 1.75 * before


def test_a_threshold_keeps_whole_blocks_of_the_schedulers(engine, long_ids):
    prompt = long_ids(1201, seed=12)
    free = engine.free
    request = engine.add(prompt, sampling(8, "kvzip:budget=0.9,threshold=0.15,chunk=400"))
    compaction = engine.step_until_compacted(request)
    engine.step()
    pages = int(compaction.counts.sum())
    kept = len(engine.manager.compacted[engine.live(request).request_id])
    assert kept == -(-pages // 12) < len(compaction.job.destination) == 11
    engine.finish()
    assert engine.free == free


@pytest.mark.parametrize("when", ["while it is prefilled", "when due", "after its compaction"])
def test_blocks_of_all_groups_come_back_after_an_abort_and_a_preemption(engine, long_ids, when):
    prompt, params, free = long_ids(1300, seed=6), sampling(150), engine.free
    alone = engine.run_fresh(prompt, params)
    kept = engine.compactions[-1]
    for end in ("abort", "preempt"):
        engine.forget_prefixes()
        request = engine.add(prompt, params)
        if when == "while it is prefilled":
            engine.step(), engine.step()
            assert 0 < engine.live(request).num_computed_tokens < len(prompt)
        elif when == "when due":
            engine.step_until_due(request)
        else:
            engine.compactions.clear()
            engine.step_until_compacted(request)
            for _ in range(120):  # into the next block, so that replay has more than one
                engine.step()
        if end == "abort":
            engine.llm.llm_engine.abort_request([request])
            engine.step()
        else:
            live = engine.live(request)
            engine.scheduler.running.remove(live)
            engine.scheduler._preempt_request(live, 0.0)
            assert engine.free == free
            engine.finish()
            assert tokens(engine.outputs.pop(request)) == tokens(alone)
            assert torch.equal(engine.compactions[-1].kept, kept.kept)
        engine.check_accounts()
        assert engine.free == free


# ---------------------------------------------------------------------- prefix cache


@pytest.fixture(params=["lfm2", "qwen3-next"])
def caching(request, engines, stateful):
    """An engine with a prefix cache; vLLM's CPU build has none that works for Mamba-2."""
    found = emptied(started(engines, stateful, request.param))
    free = found.free
    yield found
    found.check_accounts(), found.check_nothing_left()
    assert found.free == free


def cached_blocks(engine: Engine, hashes) -> list[list[int]]:
    """Which of a request's blocks the prefix cache has, in each group."""
    return [
        [index for index, hash in enumerate(hashes) if engine.pool.get_cached_block(hash, [group])]
        for group in range(len(engine.managers))
    ]


@pytest.mark.parametrize(("name", "size"), [(name, BLOCKS[name]) for name in ("lfm2", "qwen3-next")])
def test_nothing_computed_on_compacted_context_is_offered_to_the_prefix_cache_in_any_group(
    engines, stateful, long_ids, name, size
):
    # Every state at a block's end is cached, where vLLM is asked to.
    engine = emptied(started(engines, stateful, name, prefix_cache_retention_interval=size))
    assert engine.manager.block_size == size
    prompt = long_ids(4 * size + 40, seed=3)
    found = {}
    for compression in (None, "off"):
        engine.forget_prefixes()
        request = engine.add(prompt, sampling(2 * size, compression))
        live = engine.live(request)
        engine.finish()
        assert len(live.block_hashes) == 6
        found[compression] = cached_blocks(engine, live.block_hashes)
    assert len(engine.compactions) == 1
    for group, (own, plain) in enumerate(zip(found[None], found["off"], strict=True)):
        assert max(own) == 3, "the prompt's last whole block"
        assert max(plain) == 5, "without compaction that of the output is there"
        if group == engine.manager.kv_cache_group_id:
            assert own == list(range(4)) and plain == list(range(6))
    engine.check_nothing_left()


def test_a_shorter_hit_lands_where_a_state_is_cached(caching, long_ids):
    engine, size = caching, caching.manager.block_size
    # The hit may not reach into the window, which begins before the last whole block's end.
    prompt = long_ids(4 * size + 10, seed=4)
    for _ in range(2):  # without compaction the state at 4 blocks is kept, and not that at 3
        engine.run(prompt, sampling(2, "off"))
    assert engine.run(prompt, sampling(2, "off")).num_cached_tokens == 4 * size
    alone = engine.run(prompt, sampling(12, "snapkv:budget=0.25"))
    first = engine.compactions[-1]
    assert alone.num_cached_tokens in range(0, 3 * size, size), "no state is at 3 blocks yet"
    # It has stopped there on its way, so that the same prompt goes on from there.
    again = engine.run(prompt, sampling(12, "snapkv:budget=0.25"))
    assert again.num_cached_tokens == 3 * size
    assert torch.equal(engine.compactions[-1].counts, first.counts)
    assert torch.equal(engine.compactions[-1].kept, first.kept)
    assert tokens(again) == tokens(alone)
    # A method that must see every query reads no cached prefix, of no group.
    assert engine.run(prompt, sampling(4, "h2o:budget=0.25")).num_cached_tokens == 0


def test_a_repetition_goes_on_from_a_state_that_the_prefix_cache_has(engines, stateful, long_ids):
    kept = {}
    for caching in (True, False):
        engine = emptied(started(engines, stateful, "lfm2", enable_prefix_caching=caching))
        computed = Counter()
        schedule = engine.scheduler.schedule

        def counted(*args, schedule=schedule, computed=computed, **kwargs):
            output = schedule(*args, **kwargs)
            computed.update({id: n for id, n in output.num_scheduled_tokens.items() if "repeat" in id})
            return output

        engine.scheduler.schedule = counted
        engine.run(long_ids(900, seed=9), sampling(12, "kvzip:budget=0.25,chunk=300"))
        engine.scheduler.schedule = schedule
        kept[caching] = engine.compactions[-1]
        assert len(computed) == 3
        # 864 of 900 tokens are whole blocks; behind them are the part and what asks for it.
        least = 36 if caching else 900
        assert all(least + 300 < own < least + 340 for own in computed.values()), computed
        engine.check_accounts(), engine.check_nothing_left()
    assert torch.equal(kept[True].kept, kept[False].kept) and torch.equal(
        kept[True].counts, kept[False].counts
    )


# ---------------------------------------------------------------------- options together


@pytest.mark.parametrize("compression", ["snapkv:budget=0.25", "h2o:budget=0.25"])
def test_a_prompt_that_is_compacted_on_the_way_gets_to_its_end(engine, long_ids, compression):
    prompt, params = (
        long_ids(1300, seed=13),
        sampling(60, f"{compression},when=streaming,recompact_every=250"),
    )
    alone = engine.run(prompt, params)
    # From 1,250 tokens to the prompt's end a block more would be kept of one.
    points = [compaction.job.num_tokens for compaction in engine.compactions]
    assert points == [250, 500, 750, 1000, 1250]
    assert len(alone.outputs[0].token_ids) == 60
    engine.forget_prefixes()
    request = engine.add(prompt, params)
    while engine.live(request).num_computed_tokens < 1320:
        engine.step()
    live = engine.live(request)
    engine.scheduler.running.remove(live)
    engine.scheduler._preempt_request(live, 0.0)
    engine.finish()
    assert tokens(engine.outputs.pop(request)) == tokens(alone)


def test_under_pressure_room_is_made_and_all_blocks_come_back(engines, stateful, long_ids):
    engine = emptied(started(engines, stateful, "lfm2", "snapkv:budget=0.125,when=pressure"))
    free, preempted = engine.free, engine.preemptions
    with engine.squeezed(leave=60):
        for index in range(8):
            engine.add(long_ids(900, seed=500 + index), sampling(30))
        while engine.llm.llm_engine.has_unfinished_requests():
            engine.step()
            engine.check_accounts()
    assert len(engine.outputs) == 8 and len(engine.compactions) >= 4 and engine.preemptions == preempted
    assert engine.sent == [compaction.job for compaction in engine.compactions]
    engine.check_nothing_left()
    assert engine.free == free


# ---------------------------------------------------------------------- the crowd

POOL = 70  # blocks; a prompt of 700 tokens needs 8 of full attention and up to 4 of states
OPTIONS = [
    None,
    None,
    "snapkv:budget=0.1",
    {"method": "kv_compress", "budget": 0.25},
    "adakv:budget=0.3",
    "snapkv:budget=0.3,recompact_every=6",
    "h2o:budget=0.4,recompact_every=8",
    "kv_compress:budget=0.25,when=streaming,recompact_every=110",
    "kivi:recompact_every=8",
    "kvzip:budget=0.3,chunk=128",
    "off",
]


def test_a_crowd_in_a_small_pool_leaves_nothing_and_nobody_disturbs_another(engine, stock, long_ids):
    members = members_of_small_crowd(long_ids, OPTIONS, 36, (60, 700, 150))
    run = serve(engine, members, POOL, random.Random(8))
    assert run.free_after == run.free_before
    assert run.sent == [compaction.job for compaction in run.compactions]
    assert run.preemptions > 0 and len(run.compactions) > 15 and run.most_running > 3
    assert sum(not finished(run, name) for name in run.members) >= 3, "some are aborted"
    assert any(c.job.previous for c in run.compactions), "some are compacted again as they grow"
    of_request, differences = in_time(compacted(run), engine), []
    chosen = sorted(of_request, key=lambda name: len(of_request[name]), reverse=True)[:12]
    compare_with_alone(run, engine, chosen, differences)
    tolerate(differences, len(chosen))
