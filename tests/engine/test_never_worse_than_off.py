"""Requests that cannot be compacted, now or ever, are served as without compression."""

import pytest
from harness import BLOCK_SIZE, same_kept, sampling, tokens
from vllm.sampling_params import RequestOutputKind
from vllm.v1.request import RequestStatus


def open_session(engine, prompt: list[int]) -> str:
    """A streaming session that has computed its first part and waits for the next, holding its blocks."""
    llm_engine = engine.llm.llm_engine
    given = llm_engine.input_processor.process_inputs(
        "session-0",
        {"prompt_token_ids": prompt},
        sampling(1, "off", output_kind=RequestOutputKind.DELTA),
        llm_engine.get_supported_tasks(),
        resumable=True,
    )
    llm_engine.engine_core.add_request(given)
    while not engine.scheduler.num_waiting_for_streaming_input:
        engine.step()
    return given.request_id


def assert_late(engine, request, prompt, late, on_time, plain) -> None:
    """Raw until it was compacted, and then to what it would have been compacted to when it was due."""
    raw = late.num_computed - len(prompt) + 1
    assert raw > 9 and tokens(engine.outputs[request])[:raw] == tokens(plain)[:raw]
    assert late.job.num_tokens == len(prompt) and same_kept(late, on_time)


def test_an_idle_session_that_shares_the_prompt_stops_nobody(engine, stock, long_ids):
    prompt = long_ids(1000, seed=80)
    plain = stock.run_fresh(prompt, sampling(40, None))
    engine.run_fresh(prompt, sampling(40))
    on_time = engine.compactions.pop()
    engine.forget_prefixes()
    with engine.squeezed(40):
        session = open_session(engine, prompt)
        request = engine.add(prompt, sampling(40))
        engine.step_until_due(request)
        for _ in range(20):
            before = engine.live(request).num_output_tokens
            engine.step()
            assert engine.live(request).num_output_tokens == before + 1, "it waits"
        assert not engine.compactions
        engine.scheduler.finish_requests(session, RequestStatus.FINISHED_ABORTED)
        late = engine.step_until_compacted(request)
        engine.finish()
    assert_late(engine, request, prompt, late, on_time, plain)


@pytest.mark.parametrize(
    "method",
    [
        "snapkv:budget=0.25",
        "h2o:budget=0.25",
        "expected_attention:budget=0.25",
        "tova:budget=0.25,recompact_every=16",
        "h2o:budget=0.25,recompact_every=16",
        "snapkv:budget=0.25,when=streaming,recompact_every=520",
    ],
)
def test_however_late_a_request_keeps_what_it_would_have_kept_when_due(engine, stock, long_ids, method):
    prompt = long_ids(520, seed=84)
    plain = stock.run_fresh(prompt, sampling(100, None))
    engine.run_fresh(prompt, sampling(100, method))
    on_time = engine.compactions[0]
    engine.forget_prefixes()
    engine.compactions.clear()
    request = engine.add(prompt, sampling(100, method))
    engine.step_until_due(request)
    row = list(engine.manager.req_to_blocks[engine.live(request).request_id])
    engine.pool.touch(row)  # somebody else reads them
    with engine.squeezed(2):
        for _ in range(50):  # past the spare queries of a ring, and past later points
            engine.step()
        assert not engine.compactions
    engine.pool.free_blocks(row)
    late = engine.step_until_compacted(request)
    engine.finish()
    assert_late(engine, request, prompt, late, on_time, plain)
    if "recompact_every=16" in method:
        later = [compaction.job.num_tokens for compaction in engine.compactions[1:]]
        window = 1 if "tova" in method else 0
        first = -(-(late.num_computed + window - 520) // 16) * 16 + 520
        assert later and set(later) <= set(range(first, 620, 16)), "its queries are noted again"


@pytest.mark.parametrize(
    "method", ["snapkv", "h2o", "kvzip", "attention_matching", "snapkv:recompact_every=64"]
)
def test_a_request_of_one_token_reads_the_whole_cached_prefix(engine, long_ids, method):
    prompt = long_ids(520, seed=81)
    engine.run_fresh(prompt, sampling(1, "off"))
    assert engine.run(prompt, sampling(1, method)).num_cached_tokens == 520 // BLOCK_SIZE * BLOCK_SIZE
    assert not engine.compactions


def test_an_error_of_the_worker_ends_the_engine_and_says_so(engines, random_model, long_ids):
    engine = engines(random_model, "snapkv:budget=0.5")

    def fails(*args):
        raise RuntimeError("no compaction today")

    engine.worker.compactor.run = fails
    with pytest.raises(RuntimeError, match="no compaction today"):
        engine.llm.generate({"prompt_token_ids": long_ids(300, seed=82)}, sampling(8), use_tqdm=False)
    with pytest.raises(RuntimeError, match="an earlier step failed"):
        engine.llm.generate({"prompt_token_ids": long_ids(300, seed=83)}, sampling(8), use_tqdm=False)
