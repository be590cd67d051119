"""A hastened interpreter computes what Triton's own does, bit by bit."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

HERE = Path(__file__).parent


def test_kernels_compute_the_same():
    paths = map(str, (HERE, HERE / "interpreted", HERE.parent, *sys.path))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", "import test_interpreter; test_interpreter.main()"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]


def main() -> None:
    """In a process of its own, in which nothing is hastened at first."""
    from interpreter import hasten

    before = [*computed()], [*types()]
    hasten()
    after = [*computed()], [*types()]
    assert len(before[0]) == len(after[0]) > 5
    for one, other in zip(before[0], after[0], strict=True):
        assert one.dtype == other.dtype and one.isfinite().any()
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert before[1] == after[1]


def computed() -> Iterator[torch.Tensor]:
    """Attention over records and raw pages, and a choice of pages by histograms and running sums."""
    from test_record_attention import make_batch
    from test_selection_kernel import random_jobs

    from vllm_kvcompress.kernels.selection import global_counts

    torch.manual_seed(0)
    for name, dtype in (
        ("kivi4", torch.float32),
        ("matched kivi4", torch.bfloat16),
        ("turbo4", torch.float16),
    ):
        batch = make_batch("extend", name, 3, dtype=dtype)
        out = torch.zeros_like(batch.query)
        for rows in (name, "raw"):
            lse = batch.launch(rows, 1, 0.2, 2.0, 3, 64, out)
            yield from (lse[tokens] for _, tokens in batch.rows_of(rows))
        yield out
    yield global_counts(*random_jobs("tied", 2, 2, 3, 16, 5, 3, True, 0.5, 1))


def types() -> Iterator[tuple]:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    for element in (tl.int1, tl.int32, tl.uint8, tl.bfloat16, tl.pointer_type(tl.float32)):
        yield element.name, _get_np_dtype(element)
        for shape in ([4], [tl.constexpr(4), 8], [2, 1]):
            made = tl.block_type(element, shape)
            tensor = tl.tensor(TensorHandle(torch.zeros(1, dtype=torch.uint8).numpy(), element), made)
            yield made.name, str(made.shape), made.numel, _get_np_dtype(made)
            yield str(tensor.shape), tensor.numel.value, tensor.dtype.name, type(tensor.shape[0])
    for wrong in ([3], [], [2**21, 2], (2, 1)):
        with pytest.raises((ValueError, TypeError, AssertionError)) as refused:
            tl.block_type(tl.int32, wrong)
        yield type(refused.value), str(refused.value)
