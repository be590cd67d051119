"""A compaction on the kernels keeps and writes what the lists of `worker/test_compactor.py` say."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_kvcompress import scorers
from vllm_kvcompress.policies.foresight import Foresight
from vllm_kvcompress.policies.rotary import Rotary
from vllm_kvcompress.requests.cache import PagedCache
from vllm_kvcompress.worker.gpu_cache import PlainCache

sys.path.insert(0, str(Path(__file__).parents[2] / "worker"))

import compaction
from test_compactor import (  # noqa: F401 (fixtures, and a test that pytest finds here)
    ALLOCATIONS,
    compact,
    compact_above,
    configure,
    draw_table,
    policies,
    profile,
    table_scores,
    test_scores_that_are_no_numbers_rank_last_and_infinite_ones_behind_what_is_protected,
    window_scores,
)
from test_together import compact_together


@dataclass(frozen=True)
class Plain(PlainCache):
    """Attributes: pages: the same, `[L·B·H, 2, N·D]`."""

    pages: Tensor

    def rewrite(self, kept, target, overlaps):
        compaction.check_pages(kept)
        super().rewrite(kept, target, overlaps)


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch):
    def make(grid, pages, key_packing, value_packing):
        shape = grid.block_size, key_packing.head_size
        keys, values = (part.unflatten(1, shape) for part in pages.unbind(1))
        return Plain(grid, keys, values, pages.flatten(1), pages)

    monkeypatch.setattr(compaction, "MovingCache", make)
    # Allocations of our own never go through the host.
    monkeypatch.setattr(PagedCache, "allocate", None)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_each_head_keeps_its_best_tokens_in_its_own_pages_time_after_time(allocation, profile):  # noqa: F811
    request = compaction.Request(1)
    config = configure("by_key", allocation, profile)
    for tokens, blocks, reuse in ((43, 4, "none"), (17, 5, "none"), (12, 3, "both")):
        request.compute(tokens)
        counts = compact(request, config, blocks, reuse=reuse)
    assert (len({count for row in counts for count in row}) > 1) == (allocation != "uniform")


@pytest.mark.parametrize("allocation", ["uniform", "adaptive", "global"])
def test_sinks_of_more_than_a_page_take_the_pages_that_they_need(allocation):
    request = compaction.Request(4)
    draw_table(request)
    for table in compaction.ByTable.table.values():
        table[0] += 10  # so the other head would keep its sinks alone: 5 tokens of pages of 4
    config = configure("by_table", allocation, sinks=5)
    request.compute(43)
    counts = compact(request, config, 3, table_scores)
    assert {tuple(row) for row in counts} == ({(3, 3)} if allocation == "uniform" else {(4, 2)})


@pytest.fixture
def two():
    requests = [compaction.Request(20 + index) for index in range(2)]
    requests[1].move_in_with(requests[0])
    return requests


@pytest.mark.parametrize("allocation", ["adaptive", "pyramid", "global"])
def test_requests_of_one_step_are_compacted_by_the_same_launches(two, allocation, profile, monkeypatch):  # noqa: F811
    config = configure("kv_compress:window=5,kernel_size=3", allocation, profile)
    scored = []
    score = PlainCache.window_scores
    monkeypatch.setattr(PlainCache, "window_scores", lambda *given: scored.append(1) or score(*given))
    scores = lambda request, candidates: (  # noqa: E731
        window_scores(request, 5, 3, squared=True)(request, candidates)
    )
    for request in two:
        request.observer.watch("r", config.build_policy())
    for tokens, blocks in (((41, 26), (4, 3)), ((9, 23), (4, 4))):
        for request, num_tokens in zip(two, tokens, strict=True):
            request.compute(num_tokens)
        compact_together(two, [config] * 2, blocks, scores, raw_tails=[5, 7])
    assert len(scored) == 2


def test_all_layers_windows_are_scored_on_the_pages():
    request = compaction.Request(12)
    config = configure("kv_compress:window=5,kernel_size=3", "global")
    request.observer.watch("r", config.build_policy())
    for tokens, blocks in ((41, 4), (23, 4)):
        request.compute(tokens)
        compact(request, config, blocks, window_scores(request, 5, 3, squared=True), raw_tail=5)


@pytest.mark.parametrize("pooling", [1, 3])
def test_networks_score_all_layers_tokens_on_the_pages(pooling, tmp_path, monkeypatch):
    angles = torch.arange(200)[:, None] * torch.tensor([1.0, 0.2])
    rotary = Rotary(torch.cat([angles.cos(), angles.sin()], 1), True)  # of 4 of the 6 channels
    request = compaction.Request(17)
    request.layers[:] = (dataclasses.replace(layer, rotary=rotary, first_head=1) for layer in request.layers)
    last, draw = request.layers[-1].index, torch.Generator().manual_seed(2)
    shapes = (12, 5), (5,), (5,), ()
    own = scorers.Scorer("", "", *(torch.randn(last + 1, 3, *shape, generator=draw) for shape in shapes))
    scorers.write(tmp_path / "scorer", own)
    own = scorers.load(str(tmp_path / "scorer"))  # as rounded as it is written

    def scores(request, candidates):
        found = []
        for layer, heads in zip(request.layers, candidates, strict=True):
            of_heads = []
            for head, positions in enumerate(heads):
                at, number = torch.tensor(positions), len(found)
                before = rotary.undo_at(request.keys[number, head, at], at)
                inputs = torch.cat([before, request.values[number, head, at]], 1)
                up, up_bias, down, bias = (
                    getattr(own, name)[layer.index, 1 + head].float() for name in scorers.TENSORS
                )
                logs = (F.gelu(inputs @ up + up_bias) @ down + bias).tolist()
                reach = pooling // 2
                near = [logs[max(i - reach, 0) : i + reach + 1] for i in range(len(logs))]
                of_heads.append(dict(zip(positions, map(max, near), strict=True)))
            found.append(of_heads)
        return found

    monkeypatch.setattr(Foresight, "score", None)  # PyTorch's part, which copies
    config = configure(f"foresight:scorer={tmp_path / 'scorer'},pooling={pooling}", "global")
    for tokens, blocks, reuse in ((43, 4, "none"), (17, 5, "none"), (12, 3, "both")):
        request.compute(tokens)
        compact(request, config, blocks, scores, reuse=reuse)


@pytest.mark.parametrize("threshold", [1.0, 1000.0])
def test_as_much_is_kept_as_scores_above_a_threshold(threshold):
    request = compaction.Request(
        11
    )  # whose first head's run is not the longest: its first columns are padding
    config = configure(f"absolute:threshold={threshold}", "global")
    for tokens, most, reuse in ((43, 7, "none"), (17, 9, "previous"), (12, 3, "none")):
        request.compute(tokens)
        compact_above(request, config, most, reuse)
