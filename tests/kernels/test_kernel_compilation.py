"""Every kernel compiles for a GPU that is not there, and fits its shared memory."""

import os

import flash3
import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under the interpreter", allow_module_level=True)

from vllm_kvcompress.kernels.attention import attend  # noqa: E402
from vllm_kvcompress.kernels.batch import Rows, Runs  # noqa: E402
from vllm_kvcompress.kernels.compiled import compile_decode  # noqa: E402
from vllm_kvcompress.kernels.flash3 import Chunk, Chunks, attend_chunks  # noqa: E402
from vllm_kvcompress.kernels.moments import add_moments  # noqa: E402
from vllm_kvcompress.kernels.ring import write_rings  # noqa: E402
from vllm_kvcompress.kernels.shares import Shares  # noqa: E402
from vllm_kvcompress.kernels.sums import add_attention  # noqa: E402


def int32(*shape):
    return torch.zeros(*shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("dtype", "head_size", "group", "query_len", "splits"),
    [
        (torch.bfloat16, 128, 4, 1, 8),
        (torch.float16, 80, 7, 40, 1),
        (torch.float32, 256, 8, 40, 1),
        (torch.bfloat16, 512, 8, 40, 8),
    ],
)
def test_attention(compiled, dtype, head_size, group, query_len, splits):
    cache = torch.zeros(2, 4, 2, 16, 2 * head_size, dtype=dtype)
    runs = Runs(int32(3, 4), int32(3, 5), int32(3))
    rows = Rows(int32(2), int32(2, 4), int32(2), int32(3), query_len)
    query = torch.zeros(2 * query_len, 2 * group, head_size, dtype=dtype)
    arguments = 0, 0.1, 30.0, splits
    attend(query, *cache.split(head_size, -1), runs, rows, *arguments, compacted_only=splits > 1)
    compiled.assert_fit("_attend_kernel", *["_merge_kernel"][: splits - 1])


@pytest.mark.parametrize("compiled", [80, 90, 100], indirect=True)
@pytest.mark.parametrize("query_len", [1, 4])
def test_decode_rows_are_read_16_bytes_at_once_into_two_buffers_in_one_launch(compiled, query_len):
    compile_decode("raw", query_len=query_len)
    assert compiled.launches == ["_attend_kernel"]
    compiled.assert_fit("_attend_kernel")
    compiled.assert_in_registers()
    code = compiled.code("_attend_kernel")
    widths = dict(code.tail_loop.loads)
    assert code.buffers == 2, "a tile is read while another is worked on"
    assert widths[16] >= 16 and sum(widths.values()) - widths[16] <= 4, "but for the pages' numbers"
    assert code.tail_loop.spills == 0


@pytest.mark.parametrize("compiled", [80, 90, 100], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "head_size", "buffers"),
    [(torch.bfloat16, 64, 2), (torch.bfloat16, 256, 2), (torch.float16, 80, 2), (torch.float32, 128, 2)],
)
def test_other_heads_are_read_into_two_buffers_too(compiled, dtype, head_size, buffers):
    cache = torch.zeros(2, 4, 2, 16, 2 * head_size, dtype=dtype)
    runs, rows = Runs(int32(3, 4), int32(3, 5), int32(3)), Rows(int32(2), int32(2, 4), int32(2), int32(3), 1)
    query, shares = torch.zeros(2, 8, head_size, dtype=dtype), Shares.empty(2, 2, 2, 16, "cpu")
    attend(query, *cache.split(head_size, -1), runs, rows, 0, 0.1, 30.0, shares=shares)
    compiled.assert_fit("_attend_kernel")
    compiled.assert_in_registers()
    assert compiled.code("_attend_kernel").buffers == buffers


@pytest.mark.parametrize("compiled", [80, 90, 100], indirect=True)
@pytest.mark.parametrize("format_id", [0, 1])
def test_shares_are_listed_in_registers(compiled, format_id):
    runs, rows = Runs(int32(3, 4), int32(3, 5), int32(3)), Rows(int32(2), int32(2, 4), int32(2), int32(3), 1)
    Shares.empty(2, 2, 2, 16, "cpu").cut(runs, rows, 16, format_id)
    compiled.assert_fit("_cut_kernel")
    compiled.assert_in_registers()


@pytest.mark.parametrize("compiled", [80, 90, 100], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "head_size", "query_len", "splits"),
    [(torch.bfloat16, 128, 1, 8), (torch.bfloat16, 128, 4096, 1), (torch.float32, 128, 512, 1)],
)
def test_sums_are_added_up_in_registers_with_keys_16_bytes_at_once(
    compiled, dtype, head_size, query_len, splits
):
    keys = torch.zeros(2, 4, 2, 16, 2 * head_size, dtype=dtype)[..., :head_size]
    runs = Runs(int32(3, 4), int32(3, 5), int32(3))
    rows = Rows(int32(2), int32(2, 4), int32(2), int32(3), query_len)
    query, added = torch.zeros(2 * query_len, 8, head_size, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    add_attention(torch.zeros(16, 16), added, query, keys, runs, rows, 0, 0.1, 0.0, splits, 4)
    assert compiled.launches == ["_level_kernel", "_add_kernel"]
    compiled.assert_in_registers()
    for name in compiled.launches:
        code = compiled.code(name)
        widths = dict(max((loop for loop in code.loops if loop.copies), key=lambda loop: loop.products).loads)
        assert code.buffers >= 2, "a tile is read while another is worked on"
        assert widths[16] >= 4 and sum(widths.values()) - widths[16] <= 4


@pytest.mark.parametrize("compiled", [80, 90, 100], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "head_size", "is_neox", "num_rows", "query_len"),
    [
        (torch.bfloat16, 128, True, 2, 4096),
        (torch.bfloat16, 128, True, 512, 1),
        (torch.float32, 256, False, 512, 1),
        (torch.bfloat16, 512, True, 512, 1),
    ],
)
def test_moments_are_kept_in_registers_with_queries_16_bytes_at_once(
    compiled, dtype, head_size, is_neox, num_rows, query_len
):
    rows = Rows(int32(num_rows), int32(num_rows, 4), int32(num_rows), int32(num_rows + 1), query_len)
    query, places = torch.zeros(16, 8, head_size, dtype=dtype), torch.zeros(2, num_rows, dtype=torch.int64)
    add_moments(*places, 1, query, rows, torch.zeros(99, head_size, dtype=dtype), is_neox)
    compiled.assert_fit("_moment_kernel", *["_merge_moments_kernel"][: query_len // 4096])
    compiled.assert_in_registers()
    code = compiled.code("_moment_kernel")
    widths = dict(max(code.loops, key=lambda loop: loop.products).loads)
    if is_neox:
        assert widths[16] >= 4 and set(widths) <= {16, 4}, "but for the program's own rows"
    if head_size == 128:
        assert code.buffers == 2, "a tile is read while another is worked on"


def test_rings(compiled):
    queries = torch.zeros(32, 8, 128, dtype=torch.bfloat16)
    write_rings(torch.zeros(1).long(), torch.zeros(1).long(), 1, queries, int32(1), int32(2), 32, 64)
    compiled.assert_fit("_write_kernel")
    assert "st.global.v4.b32" in compiled["_write_kernel"].asm["ptx"]
    assert "st.global.b16" not in compiled["_write_kernel"].asm["ptx"]


@pytest.mark.parametrize("compiled", [90], indirect=True)
@pytest.mark.parametrize(("dtype", "head_size"), [(torch.bfloat16, 128), (torch.float16, 80)])
def test_what_flash_attention_3_found_is_merged_16_bytes_at_once(compiled, dtype, head_size):
    flash3.register()
    cache, runs = (
        torch.zeros(2, 4, 2, 16, 2 * head_size, dtype=dtype),
        Runs(int32(3, 4), int32(3, 5), int32(3)),
    )
    rows = Rows(int32(2), int32(2, 4), 64 + int32(2), 64 * torch.arange(3, dtype=torch.int32), 64)
    query = torch.zeros(128, 8, head_size, dtype=dtype)
    chunks = Chunks.of([Chunk(row, 64 * row, 64, row, 1) for row in range(2)], runs, 2, (2, 4, 2, 16))
    own = runs, rows, chunks, 0, 0.1, 64, torch.empty_like(query)
    attend_chunks(query, *cache.split(head_size, -1), *own)
    compiled.assert_fit("_merge_runs_kernel")
    compiled.assert_in_registers()
    assert "ld.global.v4" in compiled["_merge_runs_kernel"].asm["ptx"]
