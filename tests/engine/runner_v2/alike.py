"""What engines of one model keep and answer, to be compared; captures in place of a step's own metadata."""

import torch
from harness import Engine, first_difference, sampling
from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def served(engine: Engine, requests, num_tokens: int = 5):
    """Some requests in one batch, of a method and so many prompt tokens each.

    Returns:
        Outputs in the order of the requests, and compactions by a request's place in it.
    """
    engine.forget_prefixes(), engine.compactions.clear(), engine.sent.clear()
    first, free = engine._count + 1, engine.free
    outputs = engine.run_all(
        (prompt(index, length), sampling(num_tokens, method, detokenize=False))
        for index, (method, length) in enumerate(requests)
    )
    found: dict[int, list] = {}
    for compaction in engine.compactions:
        found.setdefault(int(compaction.request.removeprefix("r")) - first, []).append(compaction)
    assert engine.sent == [compaction.job for compaction in engine.compactions]
    engine.check_accounts(), engine.check_nothing_left()
    engine.forget_prefixes()
    assert engine.free == free
    return outputs, found


def assert_same(one, other, requests) -> None:
    """Two engines that `served` these requests kept the same tokens and gave the same answers."""
    (outputs, compactions), (others, other_compactions) = one, other
    assert compactions.keys() == other_compactions.keys()
    for name, events in compactions.items():
        for ours, theirs in zip(events, other_compactions[name], strict=True):
            assert torch.equal(ours.counts, theirs.counts) and torch.equal(ours.kept, theirs.kept), ours.job
    for (method, _), ours, theirs in zip(requests, outputs, others, strict=True):
        assert first_difference(ours, theirs) is None, method


def captured(runner, num_rows: int) -> dict:
    """The metadata, and with it every argument of every kernel, of a full graph of decode rows."""
    return prepare_inputs_to_capture(
        num_rows,
        num_rows,
        runner.model_state,
        runner.input_buffers,
        runner.block_tables,
        runner.attn_groups,
        runner.kv_cache_config,
        full_cudagraph=True,
        max_query_len=1,
    ).attn_metadata


def replay_captures(engine: Engine, monkeypatch) -> list[int]:
    """From now on have steps that vLLM takes for decoding alone use the metadata that was there at a capture.

    Returns:
        The rows of each such step, filled as they are served.
    """
    runner = engine.worker.model_runner
    graphs = {num_rows: captured(runner, num_rows) for num_rows in (1, 2, 4)}
    prepare, gather, replayed = runner.model_state.prepare_attn, runner.gather_batch_req_state, []
    uniform_token_count = None

    def gather_batch_req_state(*args):
        nonlocal uniform_token_count
        state, uniform_token_count = gather(*args)
        return state, uniform_token_count

    def replay(batch, *args, **kwargs):
        fresh = prepare(batch, *args, **kwargs)  # fills the arrays, as before a replay
        if uniform_token_count != 1:
            return fresh
        rows = batch.num_reqs + (batch.num_reqs == 3)  # once with a row of padding
        replayed.append(rows)
        return graphs[rows]

    monkeypatch.setattr(runner, "gather_batch_req_state", gather_batch_req_state)
    monkeypatch.setattr(runner.model_state, "prepare_attn", replay)
    return replayed


def warm_up(engine: Engine) -> list:
    """The Jobs of a warm-up, which leaves nothing behind."""
    heard = len(engine.compactions)
    engine._computed = {"kv-compression-warm-up": 0}
    engine.check_written_blocks = lambda job: None
    engine.worker.warm_up_kernels()
    del engine.check_written_blocks
    jobs = [compaction.job for compaction in engine.compactions[heard:]]
    assert len(jobs) == 2, "in place, and elsewhere"
    state = engine.worker.compression
    assert not state.tables and not state.runs.slots and not len(state.observer)
    engine.compactions.clear()
    return jobs
