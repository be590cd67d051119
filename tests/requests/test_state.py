"""What a worker knows of requests: put, found again, and gone once they are forgotten."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.paging.job import Repetition
from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.requests.observer import LayerAttention, Observer
from vllm_kvcompress.requests.runs import RunArrays
from vllm_kvcompress.requests.state import CompressionState, RunnerV1Rows, RunnerV2Rows
from vllm_kvcompress.requests.tables import RequestTable

GRID = PageGrid(2, 50, 2, 4)
CPU = torch.device("cpu")


def table(counts, destination, boundary: int) -> RequestTable:
    return RequestTable(GRID, torch.tensor(destination), torch.tensor(counts), boundary, None)


def state(runs: RunArrays | None = None) -> CompressionState:
    cache = SimpleNamespace(grid=GRID, device=CPU)
    observer = Observer(cache, [LayerAttention(1.0, 0.0)] * 2, 4, 8, torch.float32, tables={})
    return CompressionState(SimpleNamespace(), observer, runs)


# ---------------------------------------------------------------------- run arrays


def test_the_arrays_tell_where_each_heads_run_begins_and_ends():
    runs = RunArrays(GRID, 3, 5, CPU)
    runs.put("a", table([[1, 3], [2, 2]], [9, 4], 24))
    slot = runs.slots["a"]
    assert runs.arrays.destination[slot].tolist() == [9, 4, 0, 0, 0]
    assert runs.arrays.start[slot].tolist() == [0, 1, 4, 6, 8]
    assert runs.arrays.boundary[slot] == 24
    assert runs.arrays.destination.dtype == runs.arrays.start.dtype == torch.int32
    assert runs.arrays.boundary.dtype == torch.int32


def arrays_of(runs: RunArrays) -> list[torch.Tensor]:
    return [value for value in vars(runs.arrays).values() if isinstance(value, torch.Tensor)]


def test_a_later_compaction_is_written_where_the_request_already_is():
    runs = RunArrays(GRID, 3, 5, CPU)
    runs.put("a", table([[1, 3], [2, 2]], [9, 4], 24))
    runs.put("b", table([[1, 1], [1, 1]], [7], 16))
    slot, places = runs.slots["a"], [array.data_ptr() for array in arrays_of(runs)]
    runs.put("a", table([[4, 4], [2, 2]], [1, 2, 3], 40))
    assert runs.slots["a"] == slot != runs.slots["b"]
    assert runs.arrays.destination[slot, :3].tolist() == [1, 2, 3]
    assert runs.arrays.start[slot].tolist() == [0, 4, 8, 10, 12] and runs.arrays.boundary[slot] == 40
    assert runs.arrays.destination[runs.slots["b"], 0] == 7
    assert [array.data_ptr() for array in arrays_of(runs)] == places


def test_every_slot_is_given_out_and_given_out_again():
    runs = RunArrays(GRID, 2, 5, CPU)
    one = table([[1, 1], [1, 1]], [7], 16)
    for name in ("a", "b"):
        runs.put(name, one)
    assert sorted(runs.slots.values()) == [0, 1]
    for name in map(str, range(5)):
        freed = runs.slots["a"] if "a" in runs.slots else runs.slots[str(int(name) - 1)]
        runs.drop("a")
        runs.drop(str(int(name) - 1))
        runs.drop("never known")
        runs.put(name, one)
        assert runs.slots == {"b": runs.slots["b"], name: freed}


# ---------------------------------------------------------------------- the state


def test_it_is_active_only_while_it_serves_and_knows_a_request():
    one = state()
    assert not one.active
    one.live = True
    assert not one.active
    one.put("a", table([[1, 1], [1, 1]], [7], 16))
    assert one.active
    one.live = False  # a dummy batch, while requests are tracked
    assert not one.active
    one.live = True
    one.forget("a")
    assert not one.active
    one.observer.watch("b", KVCompressionConfig().build_policy())
    assert one.active


@pytest.mark.parametrize("on_gpu", [False, True])
def test_forgetting_a_request_leaves_nothing_of_it(on_gpu):
    one = state(RunArrays(GRID, 3, 5, CPU) if on_gpu else None)
    one.live = True
    for name in ("a", "b"):
        one.observer.watch(name, KVCompressionConfig().build_policy())
        one.put(name, table([[1, 1], [1, 1]], [7], 16))
    one.observer.watch_repetition(Repetition("a:repeat-0", "a", 0, 4, 20))
    one.forget("a")
    one.forget("a:repeat-0")
    one.forget("nobody")
    assert set(one.tables) == {"b"} and one.tables is one.observer.tables
    assert one.observer.of("a") is None and len(one.observer) == 1
    assert one.observer.ring("a") is None and one.observer.ring("b") is not None
    assert one.observer.spans(["a:repeat-0"], torch.tensor([0, 1]), torch.tensor([1]), torch.ones(1, 1)) == []
    if on_gpu:
        assert set(one.runs.slots) == {"b"}
        assert one.runs.arrays.boundary[one.runs.slots["b"]] == 16


# ---------------------------------------------------------------------- rows


def test_rows_of_runner_v1_are_its_batch_and_then_of_no_request():
    batch = SimpleNamespace(req_ids=["a", "b", "c"])
    rows = RunnerV1Rows(SimpleNamespace(input_batch=batch))
    assert rows.request_ids(SimpleNamespace(num_reqs=2)) == ["a", "b"]
    assert rows.request_ids(SimpleNamespace(num_reqs=5)) == ["a", "b", "c", None, None]


def test_rows_of_runner_v2_are_found_by_their_place():
    ids = {4: "a", 0: "b"}
    plain = SimpleNamespace(is_hybrid=False)
    rows = RunnerV2Rows(SimpleNamespace(req_states=SimpleNamespace(index_to_req_id=ids), model_config=plain))
    index = torch.tensor([0, 4, 2])
    assert rows.request_ids(SimpleNamespace(req_idx=index, num_reqs=5)) == ["b", "a", None, None, None]


def test_rows_of_a_model_that_keeps_states_are_those_of_the_batch_that_was_made_ready_last():
    batches = []
    runner = SimpleNamespace(
        req_states=SimpleNamespace(index_to_req_id={4: "a", 0: "b"}),
        model_config=SimpleNamespace(is_hybrid=True),
        model_state=SimpleNamespace(
            prepare_attn=lambda batch, *args, **kwargs: batches.append((args, kwargs))
        ),
    )
    rows = RunnerV2Rows(runner)
    for places, expected in (([0, 4], ["b", "a", None]), ([4], ["a", None, None])):
        runner.model_state.prepare_attn(
            SimpleNamespace(idx_mapping_np=np.array(places)), 1, for_capture=False
        )
        assert rows.request_ids(SimpleNamespace(req_idx=None, num_reqs=3)) == expected
    assert batches == [((1,), {"for_capture": False})] * 2, "vLLM's own is called as ever"
