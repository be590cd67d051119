"""A compaction's kernels compile for GPUs that are not there, are few, and wait for nothing."""

import os
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under the interpreter", allow_module_level=True)

from triton.runtime.jit import JITFunction  # noqa: E402

from vllm_kvcompress.kernels.networks import network_scores  # noqa: E402
from vllm_kvcompress.kernels.pages import gather_pages, move_pages, scatter_pages  # noqa: E402
from vllm_kvcompress.kernels.scores import rank_columns, window_scores  # noqa: E402
from vllm_kvcompress.kernels.selection import (  # noqa: E402
    adaptive_counts,
    global_counts,
    select_columns,
    whole_pages,
)

GROUP, WINDOW, KEPT = 4, 32, 3  # pages that each head keeps
NO_LAUNCH = {
    "empty",
    "new_empty",
    "empty_like",
    "view",
    "slice",
    "split",
    "select",
    "detach",
    "alias",
    "as_strided",
}
NO_LAUNCH |= {"_unsafe_view", "expand", "unsqueeze", "t", "transpose", "lift_fresh", "unbind"}


class Operations(TorchDispatchMode):
    """What PyTorch itself would launch, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in NO_LAUNCH:
            self.launches.append(name)
        return func(*args, **(kwargs or {}))


class Step:
    """The Jobs of a step, with everything that a compaction reads."""

    def __init__(self, jobs=2, layers=2, heads=2, block_size=16, head_size=64, dtype=torch.bfloat16):
        self.rows, self.page_size = jobs * layers * heads, block_size
        self.num_scored, self.num_columns = 10 * block_size, 13 * block_size
        cache = torch.zeros(self.rows * 13 + 1, block_size, 2 * head_size, dtype=dtype)
        self.keys, self.values = cache.split(head_size, -1)
        self.queries = torch.zeros(jobs * layers, WINDOW, heads * GROUP, head_size, dtype=dtype)
        self.pages = torch.zeros(self.rows, 13, dtype=torch.int64)
        self.scale, self.soft_cap = torch.ones(jobs * layers), torch.ones(jobs * layers)
        self.ends = torch.full((jobs * layers,), self.num_columns)
        self.padding = torch.zeros(self.rows, dtype=torch.int64)
        self.smallest, self.largest = torch.ones(2, jobs, layers, heads, dtype=torch.int64) * torch.tensor(
            [1, 10]
        ).view(2, 1, 1, 1)
        self.num_pages = torch.full((jobs,), KEPT * layers * heads)
        self.target = torch.zeros(KEPT * self.rows, dtype=torch.int64)

    def score(self, squared=False):
        arguments = self.queries, self.keys, self.pages, self.num_columns, self.num_scored, self.scale
        ends = self.ends, self.padding, 4
        return window_scores(*arguments, self.soft_cap, squared, 7, "max", "mean", *ends).view(
            *self.smallest.shape, -1
        )

    def finish(self, scores, counts, overlaps):
        tokens, head = select_columns(
            scores.flatten(0, 2), counts.flatten(), self.page_size, KEPT * self.rows
        )
        self.move(head, tokens, overlaps)

    def move(self, head, tokens, overlaps):
        if overlaps:
            staged = gather_pages(self.keys, self.values, self.pages, head, tokens)
            scatter_pages(*staged, self.keys, self.values, self.target[: len(head)])
        else:
            move_pages(self.keys, self.values, self.pages, head, tokens, self.target[: len(head)])

    def bounds(self):
        return self.num_pages, self.page_size, self.smallest, self.largest


def uniform(step):
    scores = step.score()
    even = whole_pages(None, step.num_pages, step.smallest.flatten(1), step.largest.flatten(1))
    step.finish(scores, even, overlaps=False)


def competing(step):
    scores = step.score(squared=True)
    step.finish(scores, global_counts(scores, *step.bounds()), overlaps=True)


def adaptive(step):
    scores = step.score()
    step.finish(scores, adaptive_counts(scores, *step.bounds(), 0.2), overlaps=False)


@pytest.mark.parametrize("compiled", [80, 90, 100], indirect=True)
@pytest.mark.parametrize(
    ("block_size", "head_size", "dtype"), [(16, 128, torch.bfloat16), (32, 64, torch.float16)]
)
def test_scoring_and_moving_fit_registers_and_shared_memory(compiled, block_size, head_size, dtype):
    step = Step(1, 1, 2, block_size, head_size, dtype)
    step.score()
    step.move(
        torch.zeros(1, dtype=torch.int64), torch.zeros(1, block_size, dtype=torch.int64), overlaps=False
    )
    compiled.assert_fit("_window_kernel", "_log_sum_kernel", "_pool_kernel", "_copy_kernel")
    compiled.assert_in_registers()
    for name in ("_window_kernel", "_copy_kernel"):
        assert not re.search(r"(ld|st)\.global\S*\.[bf]16", compiled[name].asm["ptx"]), "numbers one by one"
    assert "cp.async.cg.shared.global" in compiled["_window_kernel"].asm["ptx"]  # those of 16 bytes
    for access in ("ld.global.v4.b32", "st.global.v4.b32"):
        assert access in compiled["_copy_kernel"].asm["ptx"]


@pytest.mark.parametrize(
    ("compiled", "head_size", "dtype", "width", "read"),
    [
        (80, 64, torch.bfloat16, 64, None),
        (80, 128, torch.bfloat16, 64, None),
        (90, 128, torch.bfloat16, 64, None),
        (100, 128, torch.bfloat16, 64, None),
        (90, 128, torch.float16, 16, torch.float8_e4m3fn),
        (80, 256, torch.bfloat16, 64, None),
        (90, 512, torch.bfloat16, 64, None),
        (80, 128, torch.float32, 130, None),
    ],
    indirect=["compiled"],
)
def test_networks_fit_registers_and_shared_memory(compiled, head_size, dtype, width, read):
    step = Step(1, 1, 2, 32, head_size, read or dtype)
    up, of_units = torch.zeros(2, 2 * head_size, width, dtype=dtype), torch.zeros(2, width, dtype=dtype)
    network = up, of_units, of_units, torch.zeros(2)
    scales = None if read is None else (torch.ones(2), torch.ones(2))
    table = torch.zeros(1000, head_size)
    network_scores(step.keys, step.values, step.pages, 320, network, table, True, 0, None, scales)
    compiled.assert_fit("_network_kernel")
    compiled.assert_in_registers()
    vectors = re.findall(r"ld\.global\S*\.v\d\.b\d+|cp\.async\.cg", compiled["_network_kernel"].asm["ptx"])
    assert vectors, "numbers one by one"


@pytest.mark.parametrize("compiled", [80, 90, 100], indirect=True)
def test_selection_fits_registers_and_shared_memory(compiled):
    scores, heads = torch.zeros(1, 32, 8, 64), torch.ones(1, 32, 8, dtype=torch.int64)
    bounds = torch.tensor([256]), 16, heads, 4 * heads
    global_counts(scores, *bounds)
    adaptive_counts(scores, *bounds, 0.2)
    many = torch.ones(1, 1600, dtype=torch.int64)  # 40 layers of 40 heads
    whole_pages(torch.ones(many.shape), torch.tensor([1600]), many, many)
    select_columns(scores.flatten(0, 2), heads.flatten(), 16, 256)
    rank_columns(scores.flatten(0, 2), heads.flatten(), 4)
    searches = "_begin_global_kernel", "_end_global_kernel", "_begin_adaptive_kernel", "_end_adaptive_kernel"
    compiled.assert_fit(*searches, "_digit_kernel", "_whole_pages_kernel", "_select_kernel", "_rank_kernel")
    compiled.assert_in_registers()
    for name in ("_digit_kernel", "_select_kernel", "_rank_kernel"):  # which read every score
        assert "ld.global.v4.b32" in compiled[name].asm["ptx"], name


@pytest.mark.parametrize(("head_size", "dtype"), [(256, torch.float32), (512, torch.bfloat16)])
def test_wide_heads_fit_shared_memory(compiled, head_size, dtype):
    step = Step(1, 1, 2, 48, head_size, dtype)
    step.score()
    step.move(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 48, dtype=torch.int64), overlaps=True)
    compiled.assert_fit("_window_kernel", "_log_sum_kernel", "_pool_kernel", "_copy_kernel")


@pytest.fixture
def counted(monkeypatch):
    """Names of the kernels that are launched, or would be."""
    names = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: names.append(self.__name__))
    return names


@pytest.mark.parametrize(
    ("policy", "launches"), [(uniform, 4 + 1 + 2 + 1), (competing, 4 + 6 + 2 + 2), (adaptive, 4 + 6 + 2 + 1)]
)
@pytest.mark.parametrize(("jobs", "layers"), [(1, 2), (4, 2), (1, 16)])
def test_launches_grow_neither_with_layers_nor_with_jobs(counted, policy, launches, jobs, layers):
    step = Step(jobs, layers)
    with Operations() as operations:
        policy(step)
    # All of PyTorch's is the sum from which runs start: nothing there waits for the device.
    assert operations.launches == ["cumsum"]
    assert len(counted) + len(operations.launches) == launches, counted
