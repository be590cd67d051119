"""Models some of whose layers slide a window or attend within chunks: full attention is compacted, and those
stay vLLM's own.

What is kept, and the answers, are compared with an oracle in `test_oracle.py`.
"""

import json
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
from harness import BLOCK_SIZE, Engine, chosen_logprobs, exact, first_difference, sampling, tokens
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.attention import attention
from vllm.model_executor.layers.attention.chunked_local_attention import (
    ChunkedLocalAttention,
    create_chunked_local_attention_backend,
)
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
)
from vllm.v1.core.single_type_kv_cache_manager import ChunkedLocalAttentionManager, SlidingWindowManager

from vllm_kvcompress import profiles
from vllm_kvcompress.evaluation.host import cache_groups
from vllm_kvcompress.paging.manager import CompactingManager

SLIDING = 128  # tokens of a window, or of a chunk
HYBRIDS = ["gemma3", "gpt-oss", "padded", "llama4"]
STARTED = {"padded": dict(max_model_len=2048)}  # of the engine: it holds three blocks of others' one
# Blocks; a prompt of 700 tokens needs 22 of each group of full attention and, at most, 42 of windows.
POOL = {"gemma3": 110, "gpt-oss": 110, "padded": 200, "llama4": 110}


@pytest.fixture(scope="module", params=HYBRIDS)
def name(request) -> str:
    return request.param


# Of Gemma 4, whose windows have twice the tokens in a block and whose last layers read others' caches, what
# hangs on that alone.
also_gemma4 = pytest.mark.parametrize("name", [*HYBRIDS, "gemma4"], indirect=True, scope="module")


@pytest.fixture
def engine(engines, hybrids, name):
    """With an empty prefix cache; afterwards nothing may be left in it."""
    found = engines(hybrids[name], "snapkv:budget=0.25", **STARTED.get(name, {}))
    found.forget_prefixes()
    found.sent.clear(), found.compactions.clear(), found.outputs.clear()
    free = found.free
    yield found
    found.check_accounts(), found.check_nothing_left()
    assert found.free == free


@pytest.fixture
def stock(engines, hybrids, name, engine):
    found = engines(hybrids[name], **STARTED.get(name, {}))
    found.forget_prefixes()
    return found


def layers_of(engine: Engine, local: bool) -> list:
    """Those that slide a window or attend within chunks, or those that attend to all tokens."""
    context = engine.worker.compilation_config.static_forward_context
    return [
        layer
        for layer in context.values()
        if hasattr(layer, "impl")
        and (isinstance(layer, ChunkedLocalAttention) or layer.impl.sliding_window == SLIDING) == local
    ]


# ---------------------------------------------------------------------- whose the groups are


@also_gemma4
def test_evaluations_make_room_for_all_groups(engine, hybrids, name):
    assert 1 < len(engine.managers) <= cache_groups(str(hybrids[name])) <= 2 * len(engine.managers)


def test_windows_and_chunks_are_stocks_own_to_the_class(engine, stock, name):
    local, backend = SlidingWindowManager, CPUAttentionBackend
    if name == "llama4":
        local = ChunkedLocalAttentionManager
        backend = create_chunked_local_attention_backend(CPUAttentionBackend, SLIDING)
    assert {type(manager) for manager in engine.managers} == {CompactingManager, local}
    assert len(engine.managers) == len(stock.managers) > 1
    groups = engine.worker.model_runner.attn_groups
    for manager, (group,), (plain,) in zip(
        engine.managers, groups, stock.worker.model_runner.attn_groups, strict=True
    ):
        if type(manager) is local:
            assert group.backend is plain.backend is backend
            assert type(group.get_metadata_builder(0)) is backend.get_builder_cls()
            assert group.kv_cache_spec == plain.kv_cache_spec
    own = layers_of(engine, local=True)
    assert len(own) == len(layers_of(stock, local=True)) > 0
    for layer in own:
        assert type(layer.impl) is CPUAttentionBackendImpl and layer.attn_backend is backend
    # The same look at the other layers finds ours, so the look is sharp.
    full = layers_of(engine, local=False)
    assert len(full) == engine.worker.compactor.grid.num_layers > 0
    assert all("vllm_kvcompress" in type(layer.impl).__module__ for layer in full)


def test_windows_get_stocks_metadata_also_beside_compacted_requests(engine, long_ids, monkeypatch):
    seen = Counter()
    forward = CPUAttentionBackendImpl.forward

    def looked_at(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
        if attn_metadata is not None and type(self) is CPUAttentionBackendImpl:
            seen[type(attn_metadata)] += 1
        return forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)

    monkeypatch.setattr(CPUAttentionBackendImpl, "forward", looked_at)
    engine.run(long_ids(400, seed=1), sampling(8))
    assert len(engine.compactions) == 1
    assert set(seen) == {CPUAttentionMetadata}


# ---------------------------------------------------------------------- idle


@also_gemma4
@pytest.mark.parametrize("lengths", [[5, 64, 90], [200, 333, 900]], ids=str)
def test_with_nothing_due_outputs_are_stocks_to_the_last_bit(engine, stock, long_ids, lengths):
    prompts = [long_ids(length, seed=20 + length) for length in lengths]
    compression = None if max(lengths) < 96 else "off"
    expected = stock.run_all((prompt, sampling(40)) for prompt in prompts)
    got = engine.run_all((prompt, sampling(40, compression)) for prompt in prompts)
    assert not engine.sent
    assert [exact(output) for output in got] == [exact(output) for output in expected]


@also_gemma4
def test_the_first_token_is_stocks_to_the_last_bit(engine, stock, long_ids):
    prompt = long_ids(900, seed=30)
    expected, got = exact(stock.run(prompt, sampling(3))), exact(engine.run(prompt, sampling(3)))
    assert len(engine.compactions) == 1
    assert got[0] == expected[0] and got[1] != expected[1]


# ---------------------------------------------------------------------- blocks


def held(engine: Engine, request: str) -> list[int]:
    """Blocks of the pool that a live request has in each group, by its rows."""
    id = engine.live(request).request_id
    return [sum(not block.is_null for block in manager.req_to_blocks[id]) for manager in engine.managers]


@also_gemma4
def test_full_attention_gives_blocks_back_and_windows_go_on_as_in_stock(engine, stock, long_ids):
    prompt, params = long_ids(1201, seed=2), sampling(80)
    whole, ours = stock.add(prompt, params), engine.add(prompt, params)
    freed, steps, own = 0, 0, engine.manager.num_groups
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step(), stock.step()
        if not engine.llm.llm_engine.has_unfinished_requests():
            break
        plain, found = held(stock, whole), held(engine, ours)
        job = engine.compactions[-1].job if engine.compactions else None
        compacted_to = len(engine.manager.compacted.get(engine.live(ours).request_id, ()))
        assert compacted_to == (len(job.destination) if job else 0)
        gone = -compacted_to
        for index, manager in enumerate(engine.managers):
            if not isinstance(manager, CompactingManager):
                assert found[index] == plain[index] <= 512 // BLOCK_SIZE + SLIDING // BLOCK_SIZE + 1
                continue
            gone += plain[index] - found[index]
        freed = max(freed, gone)
        engine.check_accounts()
        steps += 1
    stock.finish()
    assert freed == (36 - 9) * own and steps > 80  # of 1,168 tokens below the window a quarter stays


def test_layers_of_several_groups_share_one_destination(engines, hybrids, long_ids):
    engine = engines(hybrids["padded"], "snapkv:budget=0.25", **STARTED["padded"])
    engine.forget_prefixes()
    free = engine.free
    own = [m.kv_cache_group_id for m in (engine.manager, *engine.manager.others)]
    config = engine.scheduler.kv_cache_config
    assert [len(config.kv_cache_groups[group].layer_names) for group in own] == [2, 2, 1]
    grid = engine.worker.compactor.grid
    assert grid.groups == (0, 1, 2, 0, 1) and grid.slots == (0, 0, 0, 1, 1)
    prompt = long_ids(640, seed=14)
    request = engine.add(prompt, sampling(40, "kv_compress:budget=0.25"))
    compaction = engine.step_until_compacted(request)
    # Of 19 blocks below the window five of each group stay, where there is room for two layers.
    assert len(compaction.job.destination) == 5 * 3 and compaction.counts.sum() == 5 * 3 * 2 * 2
    assert compaction.counts.sum(1).unique().numel() > 1, "layers of all groups compete"
    engine.check_accounts(), engine.finish()
    # Room for all of them: what no raw page fills is not filled by anything.
    whole = engine.run(prompt, sampling(40, "off"))
    for options in ("snapkv:budget=0.9", "kv_compress:budget=0.9,recompact_every=8"):
        answer = engine.run(prompt, sampling(40, options))
        compaction = engine.compactions[-1]
        assert (compaction.counts == compaction.job.boundary // BLOCK_SIZE).all()
        assert first_difference(answer, whole) is None
        assert chosen_logprobs(answer) == pytest.approx(chosen_logprobs(whole), abs=1e-3)
    engine.check_nothing_left()
    assert engine.free == free


def test_of_requests_compacted_together_each_leaves_room_in_its_own_blocks(engines, hybrids, long_ids):
    engine = engines(hybrids["padded"], "snapkv:budget=0.25", **STARTED["padded"])
    prompts = [long_ids(256, seed=seed) for seed in (15, 16)]
    whole, answers = (
        [engine.forget_prefixes(), engine.run_all((prompt, sampling(20, method)) for prompt in prompts)][1]
        for method in ("off", "snapkv:budget=0.85")
    )
    for compaction in engine.compactions[-2:]:
        assert compaction.num_computed == 256 and (compaction.counts == 7).all()
        assert len(compaction.job.destination) == 6 * 3, "each has room for six layers, and there are five"
    for answer, full in zip(answers, whole, strict=True):
        assert first_difference(answer, full) is None
        assert chosen_logprobs(answer) == pytest.approx(chosen_logprobs(full), abs=1e-3)
    engine.check_nothing_left()


def test_nothing_computed_on_compacted_context_is_offered_to_the_prefix_cache_in_any_group(
    engines, hybrids, name, long_ids
):
    options = STARTED.get(name, {})
    if name != "llama4":  # windows, too, have every block cached, where vLLM is asked to; chunks always
        options = options | {"prefix_cache_retention_interval": BLOCK_SIZE}
    engine = engines(hybrids[name], "snapkv:budget=0.25", **options)
    engine.compactions.clear()
    prompt = long_ids(400, seed=3)
    point, end = len(prompt) // BLOCK_SIZE, (len(prompt) + 199) // BLOCK_SIZE

    def run(compression) -> list[list[int]]:
        """Which of the request's blocks the prefix cache has afterwards, in each group."""
        engine.forget_prefixes()
        request = engine.add(prompt, sampling(200, compression))
        live = engine.live(request)
        engine.finish()
        assert len(live.block_hashes) == end
        hashes = list(enumerate(live.block_hashes))
        return [
            [index for index, hash in hashes if engine.pool.get_cached_block(hash, [group])]
            for group in range(len(engine.managers))
        ]

    for group, (own, plain) in enumerate(zip(run(None), run("off"), strict=True)):
        assert own == list(range(point)) and plain == list(range(end)), group
    assert len(engine.compactions) == 1
    engine.check_nothing_left()


def test_a_cached_prefix_gives_way_to_the_observation_window_in_every_group(engine, long_ids):
    prompt = long_ids(650, seed=4)
    params = sampling(12, "snapkv:budget=0.25")
    alone = engine.run_fresh(prompt, params)
    assert alone.num_cached_tokens == 0
    first = engine.compactions[-1]
    # The last 32 tokens' queries score, so they are computed, whatever is cached.
    again = engine.run(prompt, params)
    assert again.num_cached_tokens == 608
    engine.forget_prefixes()
    for end in (5, 6):  # the second one finds out what both share: vLLM keeps the windows before its end
        engine.run(prompt[:600] + long_ids(60, seed=end), sampling(2, "off"))
    shared = engine.run(prompt, params)
    assert shared.num_cached_tokens == 576
    for output, compaction in zip((again, shared), engine.compactions[-2:], strict=True):
        assert torch.equal(compaction.kept, first.kept) and torch.equal(compaction.counts, first.counts)
        assert tokens(output) == tokens(alone)
    # A method that must see every query reads no cached prefix, of no group.
    assert engine.run(prompt, sampling(4, "h2o:budget=0.25")).num_cached_tokens == 0


@pytest.mark.parametrize("when", ["while it is prefilled", "when due", "after its compaction"])
def test_blocks_of_all_groups_come_back_after_an_abort_and_a_preemption(engine, long_ids, when):
    prompt, params, free = long_ids(1300, seed=6), sampling(30), engine.free
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


@pytest.mark.parametrize("method", ["kvzip:", "attention_matching:waits=true,references=64,"])
def test_a_repetition_computes_the_context_again_if_its_owners_windows_have_moved_on(
    engine, name, long_ids, method
):
    prompt, params = long_ids(640, seed=9), sampling(260, method + "budget=0.25,chunk=300")
    alone = engine.run_fresh(prompt, params)
    kept, free = engine.compactions[-1], engine.free
    assert kept.num_computed == len(prompt) and len(alone.outputs[0].token_ids) == 260
    engine.forget_prefixes()
    request = engine.add(prompt, params)
    engine.step_until_due(request)
    live = engine.live(request)
    # Too few for the repetition. The prompt ends with a chunk, whose eight blocks are free in the next step.
    with engine.squeezed(leave=6 if name == "llama4" else 12):
        while live.num_computed_tokens < len(prompt) + SLIDING + BLOCK_SIZE:
            engine.step()
        assert live.request_id in engine.late and not engine.compactions[1:]
    while len(engine.compactions) < 2:
        engine.step()
    engine.finish()
    late = engine.compactions[-1]
    assert late.num_computed > len(prompt) + SLIDING and late.job.num_tokens == len(prompt)
    assert torch.equal(late.kept, kept.kept) and torch.equal(late.counts, kept.counts)
    assert engine.free == free


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="which vLLM's CPU kernel takes for it")
def test_bytes_of_a_quantized_cache_are_read_by_their_layers_scales_in_any_group(
    engines, hybrids, long_ids, monkeypatch
):
    default = attention.set_default_quant_scales

    def of_layer(layer, register_buffer=False):
        default(layer, register_buffer)
        powers = divmod(int(layer.layer_name.split(".")[2]), 3)
        layer._k_scale_float, layer._v_scale_float = (2.0**-power for power in powers)

    monkeypatch.setattr(attention, "set_default_quant_scales", of_layer)
    options = STARTED["padded"] | dict(kv_cache_dtype="fp8")
    engine = engines(hybrids["padded"], "snapkv:budget=0.25", **options)
    float8 = engine.worker.compactor.cache.float8
    assert len(set(zip(float8.key_scales.tolist(), float8.value_scales.tolist(), strict=True))) == 5
    prompt = long_ids(640, seed=14)
    whole = engine.run(prompt, sampling(20, "off"))
    for options in ("knorm:budget=0.9", "kv_compress:budget=0.9,recompact_every=8"):
        answer = engine.run(prompt, sampling(20, options))
        compaction = engine.compactions[-1]
        assert (compaction.counts == compaction.job.boundary // BLOCK_SIZE).all()
        assert first_difference(answer, whole) is None
        assert chosen_logprobs(answer) == pytest.approx(chosen_logprobs(whole), abs=1e-3)
    request = engine.add(prompt, sampling(20, "h2o:budget=0.25,recompact_every=8"))
    engine.step_until_compacted(request)
    engine.check_accounts(), engine.finish()
    engine.check_nothing_left()


def test_under_pressure_room_is_made_in_all_groups(engines, hybrids, long_ids):
    engine = engines(hybrids["padded"], "snapkv:budget=0.25", **STARTED["padded"])
    engine.forget_prefixes()
    engine.sent.clear(), engine.compactions.clear(), engine.outputs.clear()
    free, preempted = engine.free, engine.preemptions
    with engine.squeezed(leave=160):
        for index in range(6):
            engine.add(
                long_ids(700, seed=500 + index), sampling(30, "knorm:budget=0.125,when=pressure,window=32")
            )
        while engine.llm.llm_engine.has_unfinished_requests():
            engine.step()
            engine.check_accounts()
    assert len(engine.outputs) == 6 and len(engine.compactions) >= 3 and engine.preemptions == preempted
    assert engine.sent == [compaction.job for compaction in engine.compactions]
    engine.check_nothing_left()
    assert engine.free == free


def test_a_head_profile_is_of_the_layers_that_are_compacted(
    engines, hybrids, long_ids, tmp_path, monkeypatch
):
    engine = engines(hybrids["gemma3"], "snapkv:budget=0.25")
    monkeypatch.setattr(profiles, "FOLDER", tmp_path)  # of those that come with the package
    pages = [[8, 4], [6, 2]]
    for name, own in {"full": pages, "every": pages * 3}.items():
        content = {"version": 1, "model": "random", "num_layers": len(own), "num_kv_heads": 2}
        shares = [[[each / 5 for each in layer] for layer in own]]
        (tmp_path / f"{name}.json").write_text(json.dumps(content | {"budgets": [0.25], "shares": shares}))
    # Of 19 blocks five stay, 20 pages.
    engine.run(long_ids(640, seed=15), sampling(4, "snapkv:budget=0.25,allocation=profile:full"))
    assert engine.compactions[-1].counts.tolist() == pages
    with pytest.raises(VLLMValidationError, match="every is for 6 layers of 2 KV heads, but .* has 2 of 2"):
        engine.add(long_ids(640), sampling(4, "snapkv:budget=0.25,allocation=profile:every"))


# ---------------------------------------------------------------------- the crowd

OPTIONS = [
    None,
    None,
    "snapkv:budget=0.1",
    {"method": "kv_compress", "budget": 0.25},
    "adakv:budget=0.3",
    "foresight:budget=0.9,threshold=1e4,recompact_every=8",
    "snapkv:budget=0.3,recompact_every=6",
    "h2o:budget=0.4,recompact_every=8",
    "kv_compress:budget=0.25,when=streaming,recompact_every=96",
    "kivi:recompact_every=8",
    "kvzip:budget=0.3,chunk=128",
    "attention_matching:budget=0.3,chunk=128,references=64,waits=true",
    "off",
]


def test_a_crowd_in_a_small_pool_leaves_nothing_and_nobody_disturbs_another(engine, stock, name, long_ids):
    members = members_of_small_crowd(long_ids, OPTIONS, 50, (40, 700, 100))
    run = serve(engine, members, POOL[name], random.Random(8))
    assert run.free_after == run.free_before
    assert run.sent == [compaction.job for compaction in run.compactions]
    assert run.preemptions > 0 and len(run.compactions) > 20 and run.most_running > 3
    assert sum(not finished(run, name) for name in run.members) >= 3, "some are aborted"
    assert any(output.num_cached_tokens for output in run.outputs.values())
    assert any(c.job.previous for c in run.compactions), "some are compacted again as they grow"
    of_request, differences = in_time(compacted(run), engine), []
    chosen = sorted(of_request, key=lambda name: len(of_request[name]), reverse=True)[:20]
    compare_with_alone(run, engine, chosen, differences)
    tolerate(differences, len(chosen))
