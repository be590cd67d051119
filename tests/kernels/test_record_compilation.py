"""The kernel over encoded pages compiles for GPUs that are not there, in registers and shared memory."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under the interpreter", allow_module_level=True)

from vllm_kvcompress.formats import FORMATS  # noqa: E402
from vllm_kvcompress.formats.mixed_dim import Latent, MixedDim, Vectors  # noqa: E402
from vllm_kvcompress.kernels.batch import Rows, Runs  # noqa: E402
from vllm_kvcompress.kernels.compiled import compile_decode  # noqa: E402
from vllm_kvcompress.kernels.records import attend_records  # noqa: E402


def int32(*shape):
    return torch.zeros(*shape, dtype=torch.int32)


class OneRank(MixedDim):
    """A format of one of its parts, so that no other's kernel is compiled after it."""

    def __init__(self, divisor):
        object.__setattr__(self, "of", (Vectors() if divisor == 1 else Latent(divisor),))

    @property
    def parts(self):
        return self.of


def attend(name, dtype, head_size, group, query_len, splits, soft_cap=0.0):
    cache = torch.zeros(2, 4, 2, 64, 2 * head_size, dtype=dtype)
    pages = cache.flatten(0, 2).flatten(1).view(torch.uint8)
    format = name if isinstance(name, OneRank) else FORMATS[name]
    parts = int32(3, len(format.parts), 4)
    runs = Runs(int32(3, 4), int32(3, 5), int32(3), encoded=parts, first=parts)
    rows = Rows(int32(2), int32(2, 4), int32(2), int32(3), query_len)
    query = torch.zeros(2 * query_len, 2 * group, head_size, dtype=dtype)
    arguments = 0, format, 1, 0.1, soft_cap, splits
    attend_records(query, pages, *cache.split(head_size, -1), runs, rows, *arguments)


@pytest.mark.parametrize("compiled", [80, 90, 100], indirect=True)
@pytest.mark.parametrize(
    ("name", "merge", "wide_loads"),
    [
        ("kivi4", "_merge_kernel", 8),
        ("kivi2", "_merge_kernel", 2),
        ("turbo4", "_merge_rotated_kernel", 8),
        ("k4v3", "_merge_rotated_kernel", 4),
    ],
)
def test_decode_rows_fit_registers_and_read_16_bytes_at_once(compiled, name, merge, wide_loads):
    attend(name, torch.bfloat16, head_size=128, group=4, query_len=1, splits=8)
    compiled.assert_fit("_records_kernel", merge)
    compiled.assert_in_registers()
    code = compiled["_records_kernel"].asm["ptx"]
    assert code.count("ld.global.v4.b32") >= wide_loads  # one tile before the loop and one in it
    assert "st.shared.b16" not in code  # unpacked numbers go to the tensor cores' layout in rows


@pytest.mark.parametrize(
    ("name", "dtype", "head_size", "group", "query_len", "splits"),
    [
        ("kivi8", torch.bfloat16, 128, 4, 1, 8),
        ("turbo3", torch.float16, 80, 7, 2, 1),
        ("turbo4_prod", torch.bfloat16, 128, 4, 1, 8),
        ("turbo4_centred", torch.bfloat16, 64, 4, 1, 8),
        ("kivi4", torch.float32, 256, 8, 40, 1),
        ("kivi4", torch.bfloat16, 512, 8, 40, 8),
        ("turbo4", torch.float32, 256, 8, 40, 1),
        ("k8v4", torch.float16, 80, 7, 1, 1),
        ("k4v2", torch.bfloat16, 64, 7, 2, 8),
        ("auto", torch.bfloat16, 128, 4, 1, 1),  # shares of several parts are merged, if only one of each
    ],
)
def test_every_kind_of_rows_fits_shared_memory(compiled, name, dtype, head_size, group, query_len, splits):
    attend(name, dtype, head_size, group, query_len, splits, soft_cap=30.0)
    merge = "_merge_kernel" if name.startswith("kivi") else "_merge_rotated_kernel"
    merged = splits > 1 or len(FORMATS[name].parts) > 1
    compiled.assert_fit("_records_kernel", *[merge] * merged)


@pytest.mark.parametrize("compiled", [80, 90, 100], indirect=True)
@pytest.mark.parametrize("name", ["kivi8", "kivi4", "turbo4", "k4v3"])
def test_decode_rows_are_served_in_one_launch_that_fits_registers(compiled, name):
    compile_decode(name)
    assert compiled.launches == ["_records_kernel"]
    compiled.assert_fit("_records_kernel")
    code = compiled.code("_records_kernel")
    assert code.record_loop.products > 0 and code.record_loop.spills == 0
    assert code.stack <= 32, "a few numbers, outside the loop"
    assert code.registers <= 168 or name != "kivi4", "three programs at a time"


@pytest.mark.parametrize("compiled", [80, 90, 100], indirect=True)
@pytest.mark.parametrize("divisor", [1, 4, 8])
@pytest.mark.parametrize("head_size", [64, 128])
def test_decode_rows_of_every_rank_fit_registers(compiled, divisor, head_size):
    attend(OneRank(divisor), torch.bfloat16, head_size, group=4, query_len=1, splits=8)
    compiled.assert_fit("_latents_kernel", "_merge_kernel")
    compiled.assert_in_registers()
    code = compiled["_latents_kernel"].asm["ptx"]
    assert "mma.sync" in code


@pytest.mark.parametrize("divisor", [1, 4, 8])
@pytest.mark.parametrize(
    ("dtype", "head_size", "group", "query_len", "splits"),
    [
        (torch.float16, 80, 7, 2, 1),
        (torch.float32, 256, 8, 40, 1),
        (torch.bfloat16, 128, 8, 16, 4),
        (torch.float32, 64, 1, 1, 1),
    ],
)
def test_every_rank_fits_shared_memory(compiled, divisor, dtype, head_size, group, query_len, splits):
    attend(OneRank(divisor), dtype, head_size, group, query_len, splits, soft_cap=30.0)
    compiled.assert_fit("_latents_kernel", "_merge_kernel")
