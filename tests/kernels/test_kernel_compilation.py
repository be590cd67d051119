"""Every kernel compiles for a GPU that is not there, and fits its shared memory."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under the interpreter", allow_module_level=True)

from vllm_kvcompress.kernels.attention import attend  # noqa: E402
from vllm_kvcompress.kernels.batch import Rows, Runs  # noqa: E402
from vllm_kvcompress.kernels.ring import write_rings  # noqa: E402


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


def test_rings(compiled):
    queries = torch.zeros(32, 8, 128, dtype=torch.bfloat16)
    write_rings(torch.zeros(1).long(), torch.zeros(1).long(), 1, queries, int32(1), int32(2), 32, 64)
    compiled.assert_fit("_write_kernel")
