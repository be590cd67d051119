"""Memory: what is stated is enough, and not far above what is taken."""

import json
from dataclasses import replace

import pytest
import torch
from plain_attention import draw
from torch.profiler import ProfilerActivity, profile

from vllm_kvcompress.matching import attend, fit, peak_bytes, select_highest, select_omp


def measured(path, function) -> int:
    """The most that PyTorch's allocator had given away at a time while the function ran."""
    function()  # what libraries keep from their first call
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    record.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return max(torch.tensor(held).cumsum(0).tolist())


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
