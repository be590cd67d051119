"""The kernels over float8 pages compile for GPUs that are not there, in registers and shared memory.

vLLM has no float8 cache below compute capability 8.9 where attention is FlashAttention's or Triton's, because
Triton does not know e4m3 there.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under the interpreter", allow_module_level=True)

from vllm_kvcompress.kernels.attention import attend  # noqa: E402
from vllm_kvcompress.kernels.batch import Rows, Runs, Scales  # noqa: E402
from vllm_kvcompress.kernels.pages import gather_pages, move_pages, scatter_pages  # noqa: E402
from vllm_kvcompress.kernels.ring import write_rings  # noqa: E402
from vllm_kvcompress.kernels.scores import window_scores  # noqa: E402

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SCALES = Scales(*torch.ones(3).unbind())


def int32(*shape):
    return torch.zeros(*shape, dtype=torch.int32)


def attend_float8(kind, dtype, head_size, group, query_len, splits, quantized, soft_cap=0.0):
    cache = torch.zeros(2, 4, 2, 16, 2 * head_size, dtype=torch.uint8).view(kind)
    runs = Runs(int32(3, 4), int32(3, 5), int32(3))
    rows = Rows(int32(2), int32(2, 4), int32(2), int32(3), query_len)
    out = torch.zeros(2 * query_len, 2 * group, head_size, dtype=dtype)
    query = out.to(kind) if quantized else out
    keys, values = cache.split(head_size, -1)
    arguments = 0, 0.1, soft_cap, splits
    attend(query, keys, values, runs, rows, *arguments, out=out, compacted_only=True, scales=SCALES)


@pytest.mark.parametrize("compiled", [89, 90, 100], indirect=True)
@pytest.mark.parametrize("quantized", [False, True])
def test_decode_rows_fit_registers_and_read_16_bytes_at_once(compiled, quantized):
    attend_float8(E4M3, torch.bfloat16, 128, 4, query_len=1, splits=8, quantized=quantized)
    compiled.assert_fit("_attend_kernel", "_merge_kernel")
    compiled.assert_in_registers()
    code = compiled["_attend_kernel"].asm["ptx"]
    assert "cp.async.cg.shared.global" in code or "ld.global.v4.b32" in code
    assert "e4m3x2" in code, "hardware makes numbers of the bytes"


@pytest.mark.parametrize("compiled", [89, 90, 100], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "head_size", "group", "query_len", "splits", "quantized"),
    [
        (torch.float16, 80, 7, 40, 1, True),
        (torch.bfloat16, 128, 4, 40, 1, True),
        (torch.bfloat16, 256, 8, 1, 4, True),
        (torch.float32, 256, 8, 40, 1, False),
    ],
)
def test_every_kind_of_rows_fits_shared_memory(
    compiled, dtype, head_size, group, query_len, splits, quantized
):
    attend_float8(E4M3, dtype, head_size, group, query_len, splits, quantized, soft_cap=30.0)
    compiled.assert_fit("_attend_kernel", *["_merge_kernel"][: splits - 1])


@pytest.mark.parametrize("compiled", [80, 90, 100], indirect=True)
def test_e5m2_is_read_by_every_gpu(compiled):
    attend_float8(E5M2, torch.bfloat16, 128, 4, query_len=1, splits=8, quantized=False)
    compiled.assert_fit("_attend_kernel", "_merge_kernel")
    compiled.assert_in_registers()


@pytest.mark.parametrize("compiled", [89, 90, 100], indirect=True)
@pytest.mark.parametrize(
    ("block_size", "head_size", "dtype"), [(16, 128, torch.bfloat16), (32, 64, torch.float16)]
)
def test_windows_and_rings_fit_registers_and_shared_memory(compiled, block_size, head_size, dtype):
    keys = torch.zeros(27, block_size, 2 * head_size, dtype=torch.uint8).view(E4M3)[..., :head_size]
    queries, pages = torch.zeros(1, 32, 8, head_size, dtype=dtype), torch.zeros(2, 13, dtype=torch.int64)
    scales, soft_caps = torch.ones(2, 1).unbind()
    columns = 13 * block_size, 10 * block_size
    window_scores(queries, keys, pages, *columns, scales, soft_caps, False, 7, "max", "mean")
    batch = torch.zeros(1).long(), torch.zeros(1).long(), 1, queries[0].to(E4M3), int32(1), int32(2)
    write_rings(*batch, 32, 64, dtype, SCALES)
    compiled.assert_fit("_window_kernel", "_log_sum_kernel", "_pool_kernel", "_write_kernel")
    compiled.assert_in_registers()


@pytest.mark.parametrize("compiled", [80, 90, 100], indirect=True)
@pytest.mark.parametrize(("block_size", "head_size"), [(16, 128), (32, 80)])
def test_bytes_are_moved_by_every_gpu(compiled, block_size, head_size):
    cache = torch.zeros(27, block_size, 2 * head_size, dtype=torch.uint8).split(head_size, -1)
    pages, row = torch.zeros(2, 13, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    tokens = torch.zeros(1, block_size, dtype=torch.int64)
    move_pages(*cache, pages, row, tokens, row)
    scatter_pages(*gather_pages(*cache, pages, row, tokens), *cache, row)
    compiled.assert_fit("_copy_kernel")
    compiled.assert_in_registers()
