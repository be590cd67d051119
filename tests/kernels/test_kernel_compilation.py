"""Every kernel compiles for a GPU that is not there, and fits its shared memory."""

import os
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under the interpreter", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from vllm_kvcompress.kernels.attention import attend  # noqa: E402
from vllm_kvcompress.kernels.batch import Rows, Runs  # noqa: E402
from vllm_kvcompress.kernels.pages import gather_pages, scatter_pages  # noqa: E402
from vllm_kvcompress.kernels.ring import write_rings  # noqa: E402
from vllm_kvcompress.kernels.scores import pool_columns, window_columns  # noqa: E402

SHARED_BYTES = 99 * 1024  # per block, of the GPUs of compute capability 8.6, which have the least since 8.0


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Kernels by name, compiled for compute capability 8.0 instead of launched."""
    found, launch = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        found[self.__name__] = launch(self, *args, grid=grid, warmup=True, **kwargs)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    absent = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 80, 32),
        get_current_device=lambda: -1,  # no device's kernels are replaced by these
        get_current_stream=lambda device=None: 0,
    )
    monkeypatch.setattr(driver, "_active", absent)
    return found


def assert_fit(found, *names):
    assert set(found) == set(names)
    for kernel in found.values():
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SHARED_BYTES


def int32(*shape):
    return torch.zeros(*shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("dtype", "head_size", "group", "query_len", "splits"),
    [(torch.bfloat16, 128, 4, 1, 8), (torch.float16, 80, 7, 40, 1), (torch.float32, 256, 8, 40, 1)],
)
def test_attention(compiled, dtype, head_size, group, query_len, splits):
    cache = torch.zeros(2, 4, 2, 16, 2 * head_size, dtype=dtype)
    runs = Runs(int32(3, 4), int32(3, 5), int32(3))
    rows = Rows(int32(2), int32(2, 4), int32(2), int32(3), query_len)
    query = torch.zeros(2 * query_len, 2 * group, head_size, dtype=dtype)
    arguments = 0, 0.1, 30.0, splits
    attend(query, *cache.split(head_size, -1), runs, rows, *arguments, compacted_only=splits > 1)
    assert_fit(compiled, "_attend_kernel", *["_merge_kernel"][: splits - 1])


@pytest.mark.parametrize(("dtype", "head_size"), [(torch.bfloat16, 128), (torch.float32, 256)])
def test_compaction(compiled, dtype, head_size):
    keys, values = torch.zeros(40, 16, 2 * head_size, dtype=dtype).split(head_size, -1)
    pages = torch.arange(20).view(2, 10)
    queries = torch.zeros(32, 8, head_size, dtype=dtype)
    columns = window_columns(queries, keys, pages, 150, 100, 0.1)
    pool_columns(columns, 100, 7, "max", "mean")
    staged = gather_pages(keys, values, pages, torch.zeros(3).long(), torch.zeros(3, 16).long())
    scatter_pages(*staged, keys, values, torch.arange(3))
    write_rings(torch.zeros(1).long(), torch.zeros(1).long(), 1, queries, int32(1), int32(2), 32, 64)
    assert_fit(compiled, "_window_kernel", "_pool_kernel", "_copy_kernel", "_write_kernel")
