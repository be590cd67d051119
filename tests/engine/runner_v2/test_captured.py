"""A replayed graph stays right: its kernels know no more than the arrays that were there at its capture."""

import pytest
import torch
from harness import first_difference, sampling
from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture

METHODS = ["snapkv:budget=0.3,window=8,recompact_every=3", "adakv:budget=0.3,window=8", "off"]


@pytest.fixture(scope="module")
def engine(tiny, start_engine):
    return start_engine(
        tiny,
        "v2",
        "gpu",
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_batched_tokens=384,
        max_num_seqs=4,
        num_gpu_blocks_override=40,
        additional_config={"kv_compression": "snapkv:budget=0.4,window=8"},
    )


def assert_warm_up_leaves_nothing(engine):
    heard = len(engine.compactions)
    engine._computed = {"kv-compression-warm-up": 0}
    engine.check_written_blocks = lambda job: None
    engine.worker.warm_up_kernels()
    del engine.check_written_blocks
    assert len(engine.compactions) == heard + 2, "in place, and elsewhere"
    state = engine.worker.compression
    assert not state.tables and not state.runs.slots and not len(state.observer)
    engine.compactions.clear()


def test_the_warm_up_leaves_nothing_behind(engine):
    assert_warm_up_leaves_nothing(engine)


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


def test_decoding_with_the_metadata_of_the_capture_changes_nothing(engine, monkeypatch):
    requests = []
    for index, method in enumerate(METHODS):
        prompt = torch.randint(3, 300, (101,), generator=torch.Generator().manual_seed(index)).tolist()
        requests.append((prompt, sampling(7 - index, method, detokenize=False)))
    engine.forget_prefixes()
    wanted = engine.run_all(requests)
    compactions = list(engine.compactions)
    assert len(compactions) == 3  # one of them a second time, by what the rings hold of decoded tokens

    runner = engine.worker.model_runner
    graphs = {num_rows: captured(runner, num_rows) for num_rows in (1, 2, 3, 4)}
    prepare, replayed = runner.model_state.prepare_attn, []

    def replay(batch, *args, **kwargs):
        fresh = prepare(batch, *args, **kwargs)  # fills the arrays, as before a replay
        if batch.num_reqs != batch.num_tokens:
            return fresh
        rows = batch.num_reqs + (batch.num_reqs == 3)  # once with a row of padding
        replayed.append(rows)
        return graphs[rows]

    monkeypatch.setattr(runner.model_state, "prepare_attn", replay)
    engine.forget_prefixes(), engine.compactions.clear()
    found = engine.run_all(requests)
    assert {1, 2, 4} == set(replayed)
    for one, two in zip(compactions, engine.compactions, strict=True):
        assert torch.equal(one.counts, two.counts) and torch.equal(one.kept, two.kept)
    for one, two in zip(wanted, found, strict=True):
        assert one.outputs[0].token_ids == two.outputs[0].token_ids
        assert first_difference(one, two) is None
