"""Whether and where FlashAttention 3 serves chunks; no GPU is needed to ask."""

import ast
from pathlib import Path
from types import SimpleNamespace

import flash3
import pytest
import torch
import vllm

from vllm_kvcompress.attention import chunks
from vllm_kvcompress.attention.chunks import ChunkRows, flash3_serves
from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.formats import FORMATS
from vllm_kvcompress.kernels.batch import Runs
from vllm_kvcompress.kernels.flash3 import ARGUMENTS, is_missing
from vllm_kvcompress.paging.layout import PageGrid

GPU = torch.device("cuda")


def layer(**other):
    return SimpleNamespace(**{"vllm_flash_attn_version": 3, "sinks": None, "kv_cache_dtype": "auto"} | other)


@pytest.fixture
def said(monkeypatch):
    """What was logged; the variable is set and the operator there."""
    found = []
    monkeypatch.setenv(chunks.VARIABLE, "1")
    monkeypatch.setattr(chunks, "is_missing", lambda device: None)
    monkeypatch.setattr(chunks.logger, "warning", lambda text, *of: found.append(text % of))
    return found


def test_chunks_are_served_by_it_only_where_it_is_asked_for(said, monkeypatch):
    assert flash3_serves([layer(), layer()], torch.bfloat16, GPU)
    for value in ("0", None):
        monkeypatch.setenv(chunks.VARIABLE, value) if value else monkeypatch.delenv(chunks.VARIABLE)
        assert not flash3_serves([layer()], torch.bfloat16, GPU)
    monkeypatch.setenv(chunks.VARIABLE, "yes")
    with pytest.raises(KVCompressionError, match="KV_COMPRESSION_FLASH3 must be 0 or 1, got 'yes'"):
        flash3_serves([layer()], torch.bfloat16, GPU)
    assert not said


@pytest.mark.parametrize(
    ("other", "dtype", "reason"),
    [
        ({"vllm_flash_attn_version": 2}, torch.float16, "another version"),
        ({"sinks": torch.zeros(4)}, torch.bfloat16, "attention sinks"),
        ({"kv_cache_dtype": "fp8"}, torch.bfloat16, "float8"),
        ({}, torch.float32, "float32"),
    ],
)
def test_what_it_cannot_do_stays_with_our_kernel_and_is_said(said, other, dtype, reason):
    assert not flash3_serves([layer(), layer(**other)], dtype, GPU)
    (line,) = said
    assert reason in line and line.startswith("kv-compression: KV_COMPRESSION_FLASH3=1 is of no use: ")


def test_other_backends_have_no_version(said):
    impl = layer()
    del impl.vllm_flash_attn_version
    assert not flash3_serves([impl], torch.bfloat16, GPU) and len(said) == 1


def test_the_operator_is_looked_for_on_hopper_alone_and_by_its_arguments(monkeypatch):
    flash3.register()
    assert "9.x" in is_missing(torch.device("cpu"))
    for capability in ((8, 9), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, own=capability: own)
        assert "9.x" in is_missing(GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert is_missing(GPU) is None
    monkeypatch.setattr("vllm_kvcompress.kernels.flash3.ARGUMENTS", ARGUMENTS[:-1])
    assert "other arguments" in is_missing(GPU)


def test_vllm_passes_the_same_arguments_in_the_same_order():
    source = Path(vllm.__file__).parent / "vllm_flash_attn" / "flash_attn_interface.py"
    (call,) = (
        node
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.ops._vllm_fa3_C.fwd"
    )
    given = [ast.unparse(each) for each in call.args]
    assert not call.keywords and len(given) == len(ARGUMENTS)
    renamed = {"block_table": "page_table", "causal": "is_causal", "real_window_size[0]": "window_size_left"}
    renamed |= {"real_window_size[1]": "window_size_right"}
    for theirs, name in zip(given, ARGUMENTS, strict=True):
        if theirs not in ("None", "True", "0"):
            assert renamed.get(theirs, theirs) == name


def state(**tables):
    """Requests by name: blocks and format of what they are compacted to."""
    runs = Runs(
        *(torch.zeros(4, size, dtype=torch.int32) for size in (9, 5)), torch.zeros(4, dtype=torch.int32)
    )
    made = {
        name: SimpleNamespace(destination=torch.zeros(blocks), format=format)
        for name, (blocks, format) in tables.items()
    }
    slots = {name: 3 - index for index, name in enumerate(made)}
    return SimpleNamespace(tables=made, runs=SimpleNamespace(arrays=runs, slots=slots))


def batch(*lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return SimpleNamespace(max_query_len=max(lengths), query_start_loc_cpu=bounds, num_reqs=len(lengths))


def test_chunks_are_long_rows_over_raw_pages():
    rows = ChunkRows(PageGrid(2, 10, 2, 16), group=4, processors=1)
    known = state(a=(2, None), b=(1, FORMATS["kivi4"]), c=(3, None), d=(1, None))
    rows.show(known, ["a", "b", "new", "c", "d", None], batch(64, 80, 90, 100, 63, 0))
    found = rows.chunks
    assert found.rows.tolist() == [0, 3] and found.query_lens.tolist() == [64, 0, 0, 100, 0, 0]
    first = 64 + 80 + 90
    assert found.tokens.tolist() == [*range(64), *range(first, first + 100)] and found.max_query_len == 100
    assert len(found.pages) == (2 + 3) * 4
    rows.show(known, ["d", "b"], batch(1, 80))
    assert rows.chunks is None, "of the batch before"
    full = ChunkRows(PageGrid(2, 10, 2, 16), group=4, processors=12)
    for length, serves in ((192, True), (160, False)):
        full.show(known, ["a"], batch(length))
        assert (full.chunks is not None) == serves, "tiles of 128 query rows on 12 multiprocessors"
