"""What a decode step launches in a layer, and how much memory waits to be merged; no kernel runs."""

import math
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is launched under the interpreter", allow_module_level=True)

from triton.runtime.jit import JITFunction  # noqa: E402

from vllm_kvcompress.formats import FORMATS  # noqa: E402
from vllm_kvcompress.kernels.attention import (  # noqa: E402
    attend,
    choose_splits,
    depth,
    merge_bytes,
    programs_at_once,
)
from vllm_kvcompress.kernels.batch import Rows, Runs  # noqa: E402
from vllm_kvcompress.kernels.moments import add_moments, merged_bytes  # noqa: E402
from vllm_kvcompress.kernels.records import attend_records  # noqa: E402
from vllm_kvcompress.kernels.ring import write_rings  # noqa: E402
from vllm_kvcompress.kernels.shares import Shares  # noqa: E402
from vllm_kvcompress.kernels.sums import add_attention  # noqa: E402

HEADS, HEAD_SIZE, PROCESSORS, AT_ONCE = 2, 64, 132, 3 * 132


def int32(*shape):
    return torch.zeros(*shape, dtype=torch.int32)


@pytest.fixture
def launched(monkeypatch):
    """Pairs of a kernel's name and its grid."""
    found = []
    monkeypatch.setattr(
        JITFunction, "run", lambda self, *args, grid, **kwargs: found.append((self.__name__, grid))
    )
    return found


@pytest.fixture
def allocated(monkeypatch):
    """Bytes of every tensor that is made empty."""
    found, empty = [], torch.empty

    def noted(*args, **kwargs):
        made = empty(*args, **kwargs)
        found.append(made.nbytes)
        return made

    monkeypatch.setattr(torch, "empty", noted)
    return found


def serve(name, num_rows, query_len, group, with_shares=True, sinks=None):
    cache = torch.zeros(1, 4, HEADS, 64, 2 * HEAD_SIZE, dtype=torch.bfloat16)
    rows = Rows(int32(num_rows), int32(num_rows, 4), int32(num_rows), int32(num_rows + 1), query_len)
    query = torch.zeros(num_rows * query_len, HEADS * group, HEAD_SIZE, dtype=torch.bfloat16)
    shares = Shares.empty(num_rows, 1, HEADS, AT_ONCE, "cpu") if with_shares else None
    parts = 1 if name == "raw" else len(FORMATS[name].parts)
    places = int32(3, parts, HEADS)
    runs = Runs(int32(3, 4), int32(3, HEADS + 1), int32(3), encoded=places, first=places)
    num_tiles = max(num_rows, len(query) // 16)
    how = dict(num_splits=choose_splits(num_tiles, HEADS, 131072, PROCESSORS), shares=shares, sinks=sinks)
    batch = *cache.split(HEAD_SIZE, -1), runs, rows, 0
    if name == "raw":
        attend(query, *batch, 0.1, out=torch.zeros_like(query), **how)
    else:
        pages = cache.flatten(0, 2).flatten(1).view(torch.uint8)
        attend_records(query, pages, *batch, FORMATS[name], 1, 0.1, out=torch.zeros_like(query), **how)


@pytest.mark.parametrize("sinks", [None, torch.zeros(8)])
@pytest.mark.parametrize(("name", "kernel"), [("raw", "_attend_kernel"), ("turbo4", "_records_kernel")])
@pytest.mark.parametrize(("query_len", "num_rows"), [(1, 1), (1, 256), (5, 3)])
def test_a_layer_is_one_launch_whose_grid_shapes_alone_decide(
    launched, name, kernel, query_len, num_rows, sinks
):
    serve(name, num_rows, query_len, group=4, sinks=sinks)
    ((launch, grid),) = launched
    assert launch == kernel and math.prod(grid) == 4 * AT_ONCE + num_rows * HEADS


@pytest.mark.parametrize(("name", "launches"), [("auto", 5), ("mixed_dim", 4)])
def test_formats_of_several_parts_are_a_launch_for_each_and_one_that_merges(launched, name, launches):
    serve(name, 2, 1, group=4)
    assert len(launched) == launches


@pytest.mark.parametrize("name", ["raw", "turbo4"])
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize(
    ("num_rows", "query_len"), [(1, 1), (256, 1), (40, 4), (40, 8), (64, 16), (1, 1024), (2, 4096)]
)
def test_what_is_to_be_merged_fits_what_is_set_aside(launched, allocated, name, group, num_rows, query_len):
    for sinks in (None, torch.zeros(HEADS * group)):
        del allocated[:]
        serve(name, num_rows, query_len, group, sinks=sinks)
        query_heads, tokens = HEADS * group, num_rows * query_len
        own = allocated[-2:] if len(allocated) > 1 else []  # results and their log-sum-exps, for all shares
        bound = merge_bytes(tokens, query_heads, group, HEAD_SIZE, PROCESSORS, AT_ONCE, sinks is not None)
        assert sum(own) <= bound
        assert launched


@pytest.mark.parametrize(("shared", "wanted"), [(233472, 3), (167936, 2), (102400, 1), (65536, 1)])
def test_programs_at_once_are_those_whose_buffers_fit(shared, wanted):
    assert programs_at_once(shared) == wanted


def test_short_models_and_few_rows_launch_no_more_than_could_be_of_use():
    def programs(max_keys, num_rows):
        return Shares.empty(64, 1, 8, AT_ONCE, "cpu", max_keys).num_programs(num_rows)

    assert programs(32768, 1) == AT_ONCE + 8
    assert programs(131072, 1) == 2 * AT_ONCE + 8
    assert programs(131072, 64) == 4 * AT_ONCE + 64 * 8


def test_gpus_that_do_not_pipeline_have_four_warps():
    """With two, code for compute capability 7.5 has most of its registers in memory."""
    assert depth(2, 128, 16, float8=False, pipelined=False)["num_warps"] == 4
    assert depth(2, 128, 16, float8=False, pipelined=True) == {"num_warps": 2, "num_stages": 5}


def test_lists_of_shares_take_what_is_said_of_them():
    shares = Shares.empty(5, 3, HEADS, 7, "cpu")
    held = sum(part.nbytes for part in (shares.work, shares.ends, shares.arrived))
    assert Shares.num_bytes(5, 3, HEADS, 7) == held


@pytest.mark.parametrize(("num_rows", "query_len"), [(1, 1), (256, 1), (3, 4096)])
def test_two_launches_add_up_what_any_number_of_rows_is_paid(launched, num_rows, query_len):
    keys = torch.zeros(3, 4, HEADS, 64, 2 * HEAD_SIZE, dtype=torch.bfloat16)[..., :HEAD_SIZE]
    rows = Rows(int32(num_rows), int32(num_rows, 4), int32(num_rows), int32(num_rows + 1), query_len)
    query = torch.zeros(num_rows * query_len, HEADS * 4, HEAD_SIZE, dtype=torch.bfloat16)
    runs = Runs(int32(3, 4), int32(3, 3 * HEADS + 1), int32(3))
    added = torch.zeros(num_rows, dtype=torch.int64)
    add_attention(torch.zeros(12 * HEADS, 64), added, query, keys, runs, rows, 1, 0.1, 0.0, 4, 8)
    tiles = num_rows if query_len == 1 else len(query) // 16 + num_rows
    assert launched == [("_level_kernel", (tiles, HEADS, 4)), ("_add_kernel", (num_rows, HEADS, 8))]


@pytest.mark.parametrize(
    ("num_rows", "query_len", "programs"), [(1, 1, 24), (256, 1, 8), (3, 512, 24), (256, 100, 24)]
)
def test_one_launch_keeps_moments_with_few_programs_where_rows_decode(
    launched, num_rows, query_len, programs
):
    rows = Rows(int32(num_rows), int32(num_rows, 4), int32(num_rows), int32(num_rows + 1), query_len)
    query = torch.zeros(num_rows * query_len, 8, 80, dtype=torch.bfloat16)
    add_moments(*torch.zeros(2, num_rows).long(), 1, query, rows, torch.zeros(99, 80), True)
    assert launched == [("_moment_kernel", (num_rows, programs))]


def test_a_long_chunk_is_shared_out_and_what_is_to_be_merged_fits_what_is_set_aside(launched, allocated):
    rows = Rows(int32(3), int32(3, 4), int32(3), int32(4), 4096)
    query = torch.zeros(8192, 8, 80, dtype=torch.bfloat16)
    table = torch.zeros(99, 80)
    del allocated[:]
    add_moments(*torch.zeros(2, 3).long(), 1, query, rows, table, True)
    assert launched == [("_moment_kernel", (8192 // 512 + 3, 24)), ("_merge_moments_kernel", (3, 24))]
    assert sum(allocated) == merged_bytes(8192, 8, 80) == 4 * 16 * 8 * 3 * 34 * 80


def test_rings_are_written_by_few_programs_however_long_rows_may_be(launched):
    queries = torch.zeros(8192, 32, 128, dtype=torch.bfloat16)
    write_rings(
        torch.zeros(256).long(), torch.zeros(256).long(), 1, queries, int32(256), int32(257), 8192, 8192
    )
    assert launched == [("_write_kernel", (256, 16, 4))]
