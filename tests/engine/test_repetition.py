"""KVzip's repetition: a request of its own that nobody sees, waits for nobody and leaves nothing."""

from types import SimpleNamespace

import pytest
import torch
from harness import first_difference, same_kept, sampling, tokens
from vllm.exceptions import VLLMValidationError
from vllm.v1.request import RequestStatus

from vllm_kvcompress.paging.repetition import FIRST
from vllm_kvcompress.requests.observer import RepeatedSpan
from vllm_kvcompress.worker.gpu import CompressionGPUWorker

# A step computes 512 tokens, so that a part takes two of them.
OPTIONS = "kvzip:budget=0.25,chunk=600"


def repeating(engine) -> list[str]:
    return [name for name in engine.scheduler.requests if ":repeat-" in name]


def step_until_repeating(engine) -> None:
    while not repeating(engine):
        engine.step()


def test_a_context_is_repeated_part_by_part_and_then_compacted(engine, long_ids, monkeypatch):
    seen, announced = [], engine.scheduler._repetitions.announced
    monkeypatch.setattr(
        engine.scheduler._repetitions, "announced", lambda ids: seen.extend(r := announced(ids)) or r
    )
    name = engine.add(long_ids(640, seed=30), sampling(8, "kvzip:budget=0.25,chunk=256"))
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        engine.check_accounts()
        assert len(repeating(engine)) <= 1
    assert [(part.begin, part.end, part.num_context) for part in seen] == [
        (0, 256, 640),
        (256, 512, 640),
        (512, 640, 640),
    ]
    (compaction,) = engine.compactions
    assert compaction.job.num_tokens == 640
    assert list(engine.outputs) == [name], "repetitions are nobody's output"
    engine.outputs.clear()


def test_other_requests_get_a_token_in_every_step_meanwhile(engine, stock, long_ids):
    other = sampling(40, "off")
    plain = stock.run(long_ids(100, seed=31), sampling(40))
    decoding = engine.add(long_ids(100, seed=31), other)
    engine.step_until_due(decoding)
    name = engine.add(long_ids(1300, seed=32), sampling(4, OPTIONS))
    during = 0
    while engine.llm.llm_engine.has_unfinished_requests():
        busy = bool(repeating(engine))
        before = engine.live(decoding).num_output_tokens if decoding not in engine.outputs else None
        engine.step()
        if before is not None and decoding not in engine.outputs:
            assert engine.live(decoding).num_output_tokens == before + 1
            during += busy
    assert during >= 2
    assert first_difference(engine.outputs.pop(decoding), plain) is None
    assert engine.compaction_of(name)
    engine.outputs.clear()


@pytest.mark.parametrize("more_steps", [0, 1])
def test_an_owner_aborted_while_its_context_is_repeated_takes_the_repetition_along(
    engine, long_ids, more_steps
):
    free = engine.free
    name = engine.add(long_ids(640, seed=33), sampling(8, OPTIONS))
    step_until_repeating(engine)
    for _ in range(more_steps):
        engine.step()
    engine.llm.llm_engine.abort_request([name])
    engine.finish()
    engine.step()
    assert not repeating(engine) and engine.free == free


def test_all_requests_may_end_at_once_while_a_context_is_repeated(engine, long_ids):
    free = engine.free
    name = engine.add(long_ids(640, seed=36), sampling(8, OPTIONS))
    step_until_repeating(engine)
    ended = engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert not engine.scheduler.requests and len(ended) == 1
    engine.llm.llm_engine.abort_request([name])
    engine.finish()
    engine.step()
    assert engine.free == free


@pytest.mark.parametrize("victim", ["owner", "repetition"])
def test_a_preemption_while_a_context_is_repeated_changes_nothing(engine, long_ids, victim):
    prompt, params = long_ids(640, seed=34), sampling(8, OPTIONS)
    alone = engine.run_fresh(prompt, params)
    reference = engine.compactions[-1]
    engine.forget_prefixes()
    name = engine.add(prompt, params)
    step_until_repeating(engine)
    (request,) = (
        [engine.live(name)]
        if victim == "owner"
        else [r for r in engine.scheduler.running if ":repeat-" in r.request_id]
    )
    engine.scheduler.running.remove(request)
    engine.scheduler._preempt_request(request, 0.0)
    engine.finish()
    assert torch.equal(engine.compactions[-1].kept, reference.kept)
    assert first_difference(engine.outputs.pop(name), alone) is None


def test_in_a_full_pool_contexts_are_repeated_one_after_the_other(engine, long_ids):
    params = sampling(4, OPTIONS)
    prompts = [long_ids(448, seed=40 + i) for i in range(3)]
    alone = [engine.run_fresh(prompt, params) for prompt in prompts]
    engine.forget_prefixes()
    with engine.squeezed(46):  # three prompts of 14 blocks and not one repetition of 15
        together = engine.run_all((prompt, params) for prompt in prompts)
    for one, other in zip(alone, together, strict=True):
        assert first_difference(one, other) is None


def test_a_prompt_without_room_for_its_repetition_is_refused_with_one_line(engine, long_ids):
    with pytest.raises(VLLMValidationError, match="needs 256 tokens behind the prompt of 3900") as error:
        engine.add(long_ids(3900, seed=35), sampling(4, OPTIONS))
    assert "\n" not in str(error.value)


def test_two_contexts_that_are_due_at_once_do_not_block_each_other(engine, long_ids):
    params = sampling(8, OPTIONS)
    prompts = [long_ids(256, seed=50), long_ids(1300, seed=51)]
    alone = []
    for prompt in prompts:
        engine.run_fresh(prompt, params)
        alone.append(engine.compactions[-1])
    engine.forget_prefixes()
    with engine.squeezed(8 + 41 + 15):  # room for the smaller repetition, not for the larger one
        names = [engine.add(prompt, params) for prompt in reversed(prompts)]
        for _ in range(300):
            engine.step()
        assert not engine.llm.llm_engine.has_unfinished_requests()
    for name, compaction in zip(reversed(names), alone, strict=True):
        late = engine.compaction_of(name)
        assert late is None or same_kept(late, compaction)
    assert engine.compaction_of(names[1]), "the smaller one had room"
    engine.outputs.clear()


def test_a_context_whose_repetition_has_no_room_goes_on_as_without_compression(engine, stock, long_ids):
    plain = stock.run(long_ids(640, seed=55), sampling(30))
    alone = engine.run_fresh(long_ids(640, seed=55), sampling(30, OPTIONS))
    (on_time,) = engine.compactions
    engine.forget_prefixes()
    name = engine.add(long_ids(640, seed=55), sampling(30, OPTIONS))
    engine.step_until_due(name)
    with engine.squeezed(4):
        for _ in range(10):
            before = engine.live(name).num_output_tokens
            engine.step()
            assert engine.live(name).num_output_tokens == before + 1
    late = engine.step_until_compacted(name)
    engine.finish()
    raw = late.num_computed - 640 + 1
    assert raw > 10 and same_kept(late, on_time)
    answer = tokens(engine.outputs.pop(name))
    assert answer[:raw] == tokens(plain)[:raw] and tokens(alone)[1:] != tokens(plain)[1:]


def test_a_neighbour_that_grows_and_a_context_without_room_for_its_repetition_both_go_on(
    engine, stock, long_ids
):
    plain = stock.run(long_ids(224, seed=53), sampling(120))
    uncompressed = stock.run(long_ids(640, seed=52), sampling(200))
    with engine.squeezed(40):
        name = engine.add(long_ids(640, seed=52), sampling(200, OPTIONS))
        other = engine.add(long_ids(224, seed=53), sampling(120, "off"))
        for _ in range(500):
            engine.step()
        assert not engine.llm.llm_engine.has_unfinished_requests()
    assert not engine.compactions, "the pool never had room for the repetition"
    assert first_difference(engine.outputs.pop(other), plain) is None
    assert first_difference(engine.outputs.pop(name), uncompressed) is None


def test_an_owner_that_ends_with_its_first_token_leaves_no_repetition(engine, long_ids):
    free = engine.free
    engine.run(long_ids(640, seed=54), sampling(1, OPTIONS))
    assert not repeating(engine) and not engine.compactions
    assert engine.free == free


def test_another_policy_may_stand_on_the_repetition(engine, long_ids):
    engine.run(long_ids(400, seed=55), sampling(4, "criticalkv:base=kvzip,budget=0.25,chunk=256"))
    assert len(engine.compactions) == 1


def test_steps_with_a_repetition_are_none_of_decoding_alone(engine, long_ids, monkeypatch):
    """As Runner V1 is told on a GPU, whose full graphs are for these."""
    runner, state = engine.worker.model_runner, engine.worker.compression
    monkeypatch.setattr(state.observer, "kernel_writes_rings", True)
    monkeypatch.setattr(runner, "_is_uniform_decode", runner._is_uniform_decode)  # put back afterwards
    told = SimpleNamespace(model_runner=runner, compression=state, use_v2_model_runner=False)
    CompressionGPUWorker._keep_noted_steps_out_of_full_graphs(told)
    is_uniform, record, answers, noted = runner._is_uniform_decode, RepeatedSpan.record, [], []
    monkeypatch.setattr(
        runner,
        "_is_uniform_decode",
        lambda *args, **own: answers.append(is_uniform(*args, **own)) or answers[-1],
    )
    monkeypatch.setattr(
        RepeatedSpan, "record", lambda span, *args: noted.append(span.tokens) or record(span, *args)
    )
    # Behind the context's blocks come the words that ask, and a part: together one more than a step has.
    part = 513 - len(engine.scheduler._repetitions._encode(FIRST))
    engine.add(long_ids(640, seed=33), sampling(6, f"kvzip:budget=0.25,chunk={part}"))
    found, alone = [], 0
    while engine.llm.llm_engine.has_unfinished_requests():
        answers.clear(), noted.clear()
        engine.step()
        found.append((*answers, bool(noted)))
        alone += any(tokens.stop - tokens.start == 1 for tokens in noted)
    assert all(len(each) == 2 for each in found)
    assert (True, True) not in found and (True, False) in found and alone
    engine.outputs.clear()
