"""Memory: what is stated is enough, and not far above what is taken."""

from dataclasses import replace

import pytest
import torch
from allocated import measured
from plain_attention import draw

from vllm_kvcompress.matching import attend, fit, peak_bytes, select_highest, select_omp


@pytest.mark.parametrize("omp", [False, True])
@pytest.mark.parametrize("features", ["plain", "all"])
@pytest.mark.parametrize(
    ("heads", "tokens", "queries", "columns", "size"),
    [(2, 1500, 256, 32, 32), (4, 400, 100, 160, 16), (2, 300, 700, 50, 64)],
)
def test_stated_memory_suffices(tmp_path, heads, tokens, queries, columns, size, features, omp):
    problem = draw(heads, tokens, queries, size, features)
    names = ("keys", "values", "queries")
    problem = replace(problem, **{name: getattr(problem, name).bfloat16() for name in names})
    wanted = torch.full((heads,), columns)

    def solve():
        reference = attend(problem, chunk_bytes=2**20)
        if omp:
            return fit(problem, reference, *select_omp(problem, reference, wanted, chunk_bytes=2**20))
        return fit(problem, reference, *select_highest(problem, reference, wanted))

    stated = peak_bytes(heads, tokens, queries, columns, size, omp=omp, chunk_bytes=2**20)
    taken = measured(tmp_path / "trace.json", solve)
    assert taken <= stated <= 2 * taken
