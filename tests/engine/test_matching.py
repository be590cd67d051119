"""Attention Matching in the engine: solved for beside others' steps, and attended to as solved."""

import json

import pytest
import torch
from harness import first_difference, same_kept, sampling, tokens
from vllm.v1.request import RequestStatus

from vllm_kvcompress import profiles
from vllm_kvcompress.policies.attention_matching import Attended

OPTIONS = "attention_matching:budget=0.05,chunk=600,references=256,waits="
RAW, WAITS = OPTIONS + "false", OPTIONS + "true"


@pytest.fixture(autouse=True)
def nothing_solved_is_left(engine):
    yield
    engine.check_nothing_left()
    assert not engine.worker.compactor._solver._solutions
    assert not engine.scheduler._solving._solves


def solutions(engine):
    return engine.worker.compactor._solver._solutions


def step_until_solving(engine) -> None:
    while not solutions(engine):
        engine.step()
        assert engine.scheduler.requests, "it was solved within a step"


@pytest.fixture
def on_time(engine, long_ids):
    """The compaction and the answer of a request that waited for it."""
    output = engine.run_fresh(long_ids(640, seed=3), sampling(40, WAITS))
    (compaction,) = engine.compactions
    engine.compactions.clear()
    engine.forget_prefixes()
    return compaction, output


def test_a_request_decodes_on_its_raw_cache_until_it_is_solved(engine, stock, long_ids, on_time):
    prompt = long_ids(640, seed=3)
    plain = stock.run(prompt, sampling(80))
    name = engine.add(prompt, sampling(80, RAW))
    engine.step_until_due(name)
    late = engine.step_until_compacted(name)
    engine.finish()
    raw = late.num_computed - 640 + 1
    assert raw > 12, "a share a step at most, of twelve heads"
    assert same_kept(late, on_time[0]) and late.job.num_tokens == 640
    answer = tokens(engine.outputs.pop(name))
    assert answer[:raw] == tokens(plain)[:raw]
    assert answer != tokens(plain)


def test_a_request_that_waits_answers_the_same_beside_others(engine, long_ids, on_time):
    requests = [(long_ids(640, seed=3), sampling(40, WAITS)), (long_ids(300, seed=4), sampling(40, "off"))]
    requests += [(long_ids(500, seed=5), sampling(40, WAITS))]
    together = engine.run_all(requests)
    assert first_difference(together[0], on_time[1]) is None
    first = next(c for c in engine.compactions if c.job.num_tokens == 640)
    assert same_kept(first, on_time[0]) and first.num_computed == 640
    assert len(engine.compactions) == 2


@pytest.mark.parametrize("ends", ["aborted", "all at once"])
def test_who_ends_in_the_middle_leaves_nothing(engine, long_ids, ends):
    free = engine.free
    name = engine.add(long_ids(640, seed=3), sampling(40, RAW))
    step_until_solving(engine)
    if ends == "all at once":
        engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    engine.llm.llm_engine.abort_request([name])
    engine.finish()
    engine.step()
    assert engine.free == free and not engine.compactions


@pytest.mark.parametrize("options", [RAW, WAITS])
def test_a_preemption_in_the_middle_changes_nothing(engine, long_ids, on_time, options):
    if options == WAITS:  # else all is solved in one step
        engine.step_until_due(engine.add(long_ids(40, seed=9), sampling(300, "off")))
    name = engine.add(long_ids(640, seed=3), sampling(60, options))
    step_until_solving(engine)
    request = engine.live(name)
    engine.scheduler.running.remove(request)
    engine.scheduler._preempt_request(request, 0.0)
    late = engine.step_until_compacted(name)
    engine.finish()
    assert same_kept(late, on_time[0])
    if options == WAITS:
        assert tokens(engine.outputs.pop(name))[:40] == tokens(on_time[1])
    engine.outputs.clear()


def test_a_preempted_repetition_counts_no_query_twice(engine, long_ids, on_time):
    name = engine.add(long_ids(640, seed=3), sampling(40, WAITS))
    engine.step_until_due(name)
    observed = engine.worker.compression.observer.of(engine.live(name).request_id)
    while not observed.repeated:  # a step computes 512 tokens, so that the first part takes two
        engine.step()
    (request,) = [r for r in engine.scheduler.running if ":repeat-" in r.request_id]
    engine.scheduler.running.remove(request)
    engine.scheduler._preempt_request(request, 0.0)
    engine.finish()
    assert same_kept(engine.compactions[-1], on_time[0])
    assert tokens(engine.outputs.pop(name)) == tokens(on_time[1])


def test_in_a_full_pool_a_request_goes_on_raw(engine, stock, long_ids):
    plain = stock.run(long_ids(640, seed=3), sampling(30))
    name = engine.add(long_ids(640, seed=3), sampling(30, RAW))
    engine.step_until_due(name)
    with engine.squeezed(2):
        engine.finish()
    assert not engine.compactions
    assert first_difference(engine.outputs.pop(name), plain) is None


def test_a_cached_prefix_is_read_and_what_is_matched_never_enters_it(engine, stock, long_ids, on_time):
    plain = stock.run(long_ids(640, seed=3), sampling(20))
    engine.run_fresh(long_ids(640, seed=3), sampling(40, WAITS))
    hit = engine.run(long_ids(640, seed=3), sampling(40, WAITS))
    assert hit.num_cached_tokens == 608, "repetitions need none of the prompt's own queries"
    assert tokens(hit) == tokens(on_time[1])
    assert first_difference(engine.run(long_ids(640, seed=3), sampling(20, "off")), plain) is None


def test_the_prompts_own_queries_need_no_repetition(engine, long_ids):
    options = RAW.replace("chunk=600", "queries=prompt")
    name = engine.add(long_ids(640, seed=6), sampling(60, options))
    while engine.compaction_of(name) is None:
        engine.step()
        assert not any(":repeat-" in other for other in engine.scheduler.requests)
    engine.finish()
    engine.outputs.clear()


def test_a_self_study_is_observed_as_it_is_written(engine, long_ids):
    options = WAITS.replace("chunk=600", "queries=self-study,answer_tokens=12")
    name = engine.add(long_ids(400, seed=6), sampling(20, options))
    engine.step_until_due(name)
    observed = engine.worker.compression.observer.of(engine.live(name).request_id)
    noted: list[tuple[str, int]] = []
    seen = 0
    while engine.compaction_of(name) is None:
        if observed.repeated and observed.repeated[0] not in noted:
            noted.append(observed.repeated[0])
            assert len(set(observed.repeated.values())) == 1, "every layer's queries are"
            assert observed.states[0].squares.shape[1] == 400
        seen = seen if observed.states[0] is None else observed.states[0].seen
        engine.step()
    assert len({name for name, _ in noted}) == 4
    # Each answer is observed token by token, all but its last, which is sampled and not computed.
    for study in sorted({name for name, _ in noted}):
        own = [position for name, position in noted if name == study]
        assert own == list(range(own[0], own[0] + 12)) and own[0] > 405
    assert seen == sum(max(p for n, p in noted if n == s) - 400 for s in {n for n, _ in noted})
    engine.finish()
    engine.outputs.clear()


def test_a_profile_says_how_many_pages_each_head_has(engine, long_ids, tmp_path, monkeypatch):
    # Of 19 blocks 2 stay, 24 pages of six records; a head has 19 records.
    pages = [[4, 1, 1], [2, 2, 2], [1, 4, 2], [1, 2, 2]]
    content = {"version": 1, "model": "random", "num_layers": 4, "num_kv_heads": 3, "budgets": [0.1]}
    shares = [[[own / 2 for own in layer] for layer in pages]]
    (tmp_path / "of-random.json").write_text(json.dumps({**content, "shares": shares}))
    monkeypatch.setattr(profiles, "FOLDER", tmp_path)  # of those that come with the package
    options = WAITS.replace("0.05", "0.1") + ",allocation=profile:of-random"
    name = engine.add(long_ids(640, seed=3), sampling(20, options))
    compaction = engine.step_until_compacted(name)
    table = engine.worker.compression.tables[compaction.job.request_id]
    assert table.counts.tolist() == pages
    assert compaction.counts.tolist() == [[min(6 * own, 19) for own in layer] for layer in pages]
    assert all(kept[:4] == [0, 1, 2, 3] for layer in compaction.positions() for kept in layer)
    records, _ = table.aligned_records(slice(None))
    written = engine.worker.compactor.cache.read_records(records[records >= 0], table.format)
    biases = table.format.biases(written, 32)
    assert float((biases.abs() > 1e-3).float().mean()) > 0.5, "solved for, but where a head keeps all"
    engine.finish()
    engine.outputs.clear()


def test_matching_differs_from_keeping_the_same_tokens(engine, long_ids, on_time):
    plain = engine.run_fresh(long_ids(640, seed=3), sampling(40, WAITS + ",bias=false,values=false"))
    assert same_kept(engine.compactions[-1], on_time[0])
    assert tokens(plain) != tokens(on_time[1])


@pytest.mark.parametrize("format", ["kivi4", "turbo3", "k8v4"])
def test_any_quantizing_format_may_hold_what_is_matched(engine, long_ids, format):
    options = WAITS.replace("matching", f"matching+{format}")
    name = engine.add(long_ids(640, seed=3), sampling(8, options))
    engine.step_until_compacted(name)
    table = engine.worker.compression.tables[engine.live(name).request_id]
    assert table.format.name == f"matched {format}"
    engine.finish()
    engine.outputs.clear()


def test_what_is_matched_is_compacted_again_alone_or_beside_others_or_after_a_preemption(engine, long_ids):
    params = sampling(120, WAITS.replace("0.05", "0.1") + ",recompact_every=48")
    alone = engine.run_fresh(long_ids(640, seed=3), params)
    reference = list(engine.compactions)
    assert [(c.job.num_tokens, c.job.solved) for c in reference] == [(640, True), (688, False), (736, False)]
    assert any(token >= 640 for layer in reference[2].positions() for own in layer for token in own)
    for preempted in (False, True):
        engine.forget_prefixes()
        engine.compactions.clear()
        other = engine.add(long_ids(300, seed=4), sampling(150, "off"))
        name = engine.add(long_ids(640, seed=3), params)
        while preempted and sum(c.request == name for c in engine.compactions) < 2:
            engine.step()
        if preempted:
            engine.compactions.clear()
            request = engine.live(name)
            engine.scheduler.running.remove(request)
            engine.scheduler._preempt_request(request, 0.0)
        engine.finish()
        again = [c for c in engine.compactions if c.request == name]
        assert all(same_kept(*both) for both in zip(again, reference, strict=True))
        assert first_difference(engine.outputs.pop(name), alone) is None
        engine.outputs.pop(other)


@pytest.mark.parametrize("recalled", [0, 20, 64])
def test_of_a_context_that_is_solved_for_recalled_queries_alone_are_kept(engine, long_ids, recalled):
    options = WAITS + f",recompact_every=48,recalled={recalled}"
    name, sampled = engine.add(long_ids(640, seed=3), sampling(60, options)), []
    engine.step_until_due(name)
    observed = engine.worker.compression.observer.of(engine.live(name).request_id)
    while engine.compaction_of(name) is None:
        if isinstance(observed.states[0], Attended):
            sampled[:] = [state.sample for state in observed.states]
        engine.step()
    assert observed.ring.shape[1] == 64
    if not recalled:
        assert observed.states == [None] * 4
    else:
        expected = [sample[:: -(-len(sample) // recalled)] for sample in sampled]
        assert all(torch.equal(*both) for both in zip(observed.states, expected, strict=True))
        assert 0 < len(observed.states[0]) <= recalled
    engine.finish()
    engine.outputs.clear()
