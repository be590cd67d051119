"""All layers of all Jobs are scored at once as each is alone, whatever the Jobs' lengths."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from vllm_kvcompress.kernels import scores as kernels
from vllm_kvcompress.kernels.reference import causal_logits
from vllm_kvcompress.kernels.scores import rank_columns, window_columns, window_scores

JOBS, LAYERS, HEADS, GROUP, BLOCK_SIZE, HEAD_SIZE, WINDOW = 3, 2, 2, 3, 16, 32, 9
SCORED, PAGES = 12 * BLOCK_SIZE, 14  # columns below the boundary, and pages of the longest Job
TAILS = 9, 31, 16  # tokens of each Job from the boundary on: all of its window
ENDS = torch.tensor([SCORED + tail for tail in TAILS]).repeat_interleave(LAYERS)
ABSENT = torch.tensor([[0, 0, 0, 0], [1, 0, 3, 2], [10, 9, 9, 11]]).view(JOBS, LAYERS, HEADS)  # pages
SINKS = 3


class Batch:
    """Jobs of 12, 11 and 3 pages below their boundaries; what is left of the last page is NaN."""

    def __init__(self, dtype: torch.dtype = torch.float32, soft_cap: bool = False) -> None:
        torch.manual_seed(0)
        rows = JOBS * LAYERS * HEADS
        self.keys = torch.randn(rows * PAGES + 1, BLOCK_SIZE, HEAD_SIZE).to(dtype)
        self.queries = (2 * torch.randn(JOBS * LAYERS, WINDOW, HEADS * GROUP, HEAD_SIZE)).to(dtype)
        self.pages = torch.randperm(rows * PAGES).view(JOBS, LAYERS, HEADS, PAGES)
        for job, tail in enumerate(TAILS):
            last, filled = divmod(SCORED + tail, BLOCK_SIZE)
            if filled:
                self.keys[self.pages[job, :, :, last], filled:] = torch.nan
            self.pages[job, :, :, last + bool(filled) :] = -1
        self.pages[torch.arange(PAGES) < ABSENT[..., None]] = -1
        self.scale = torch.tensor([0.1, 0.3, 0.2, 0.4, 0.15, 0.25])
        self.soft_cap = torch.tensor([2.0, 5.0, 3.0, 0.0, 4.0, 8.0]) if soft_cap else None
        self.padding = (ABSENT * BLOCK_SIZE).flatten()

    def arguments(self):
        flat = self.pages.flatten(0, 2)
        return self.queries, self.keys, flat, int(ENDS.max()), SCORED, self.scale, self.soft_cap

    def attention(self, job: int, layer: int, head: int) -> torch.Tensor:
        """`[G, w, n]` over what the head holds."""
        return self.logits(job, layer, head).softmax(-1)

    def logits(self, job: int, layer: int, head: int) -> torch.Tensor:
        """What that is the softmax of."""
        page = self.pages[job, layer, head]
        held = self.keys[page[page >= 0]].flatten(0, 1)
        held = held[: SCORED + TAILS[job] - int(ABSENT[job, layer, head]) * BLOCK_SIZE]
        own = self.queries[job * LAYERS + layer].unflatten(1, (HEADS, GROUP))[:, head]
        scale = float(self.scale[job * LAYERS + layer])
        cap = 0.0 if self.soft_cap is None else float(self.soft_cap[job * LAYERS + layer])
        return causal_logits(own, held, scale, cap)


INDICES = list(itertools.product(range(JOBS), range(LAYERS), range(HEADS)))


@pytest.mark.parametrize(
    ("dtype", "soft_cap", "squared"),
    [(torch.float32, True, False), (torch.float16, False, True), (torch.bfloat16, True, True)],
)
def test_columns_of_every_job_and_layer_equal_those_of_one(dtype, soft_cap, squared):
    batch = Batch(dtype, soft_cap)
    found = window_columns(*batch.arguments(), squared=squared, ends=ENDS)
    assert found.shape == (JOBS * LAYERS * HEADS, GROUP, SCORED)
    for own, index in zip(found, INDICES, strict=True):
        attention = batch.attention(*index)
        first = int(ABSENT[index]) * BLOCK_SIZE
        wanted = (attention.square() if squared else attention).sum(1)[:, : SCORED - first]
        torch.testing.assert_close(own[:, first:], wanted, atol=2e-6, rtol=5e-5)
        assert not own[:, :first].any()


@pytest.mark.parametrize("squared", [False, True])
def test_sinks_are_in_the_softmax_of_every_query(squared):
    batch = Batch(soft_cap=True)
    sinks = torch.randn(JOBS * LAYERS * HEADS, GROUP, generator=torch.Generator().manual_seed(1)) + 3
    sinks[0] = -torch.inf  # a layer that has none
    found = window_columns(*batch.arguments(), squared=squared, ends=ENDS, sink_logits=sinks)
    for own, sink, index in zip(found, sinks, INDICES, strict=True):
        logits = batch.logits(*index)
        several = torch.cat([logits, sink[:, None, None].expand(-1, WINDOW, 1)], 2).softmax(-1)[..., :-1]
        first = int(ABSENT[index]) * BLOCK_SIZE
        wanted = (several.square() if squared else several).sum(1)[:, : SCORED - first]
        torch.testing.assert_close(own[:, first:], wanted, atol=2e-6, rtol=5e-5)


@pytest.mark.parametrize(("pooling", "reduction"), [("max", "mean"), ("avg", "sum")])
def test_scores_are_pooled_within_each_job_and_ranked(pooling, reduction):
    batch = Batch()
    found = window_scores(
        *batch.arguments(), False, 7, pooling, reduction, ENDS, padding=batch.padding, sinks=SINKS
    )
    pool = F.max_pool1d if pooling == "max" else F.avg_pool1d
    for own, index in zip(found, INDICES, strict=True):
        summed = batch.attention(*index).sum(1)[:, :-WINDOW]
        pooled = pool(summed, 7, stride=1, padding=3)
        first = int(ABSENT[index]) * BLOCK_SIZE
        wanted = (pooled.mean(0) if reduction == "mean" else pooled.sum(0))[: SCORED - first]
        if pooling == "avg" and first:  # zeros before a first token count either way
            assert torch.equal(own[:first], torch.full((first,), -torch.inf))
        torch.testing.assert_close(own[first + SINKS :], wanted[SINKS:], atol=2e-6, rtol=5e-5)
        assert own[:first].isneginf().all() and own[first : first + SINKS].isposinf().all()


def test_little_memory_takes_more_launches_for_the_same_scores(monkeypatch):
    batch = Batch(soft_cap=True)
    arguments = *batch.arguments(), True, 7, "max", "sum", ENDS, batch.padding, SINKS
    at_once = window_scores(*arguments)
    launches = []
    for name in ("_window_kernel", "_log_sum_kernel", "_pool_kernel"):
        launch = getattr(kernels, name)
        monkeypatch.setattr(launch, "pre_run_hooks", [lambda *args, **kwargs: launches.append(1)])
    monkeypatch.setattr(kernels, "SCRATCH_BYTES", 1)
    assert torch.equal(window_scores(*arguments), at_once)
    assert len(launches) == 4 * JOBS * LAYERS


def test_ranked_scores_leave_infinity_to_padding_and_sinks():
    limits = torch.finfo(torch.float32)
    scores = torch.randn(2, 1500)
    scores[:, :9] = torch.tensor([5.0, torch.nan, 1.0, torch.nan, -torch.inf, torch.inf, 2.0, torch.nan, 3.0])
    found = scores.clone()
    rank_columns(found, torch.tensor([2, 0]), 1)
    inf, low, high = torch.inf, limits.min, limits.max
    assert found[0, :9].tolist() == [-inf, -inf, inf, low, low, high, 2.0, low, 3.0]
    assert found[1, :9].tolist() == [inf, low, 1.0, low, low, high, 2.0, low, 3.0]
    assert torch.equal(found[:, 9:], scores[:, 9:])


def test_the_sum_over_tiles_follows_a_peak_that_comes_late():
    tiles, size = 70, 9  # more than are read at once
    parts = torch.randn(2, tiles, size, generator=torch.Generator().manual_seed(0)) * 3
    parts[0, 50] += 30
    parts[1, 3] += 30
    out = torch.empty(2, size)
    kernels._log_sum_kernel[(2, 1)](parts, out, tiles, size, ENTRIES=16, TILES=32)
    torch.testing.assert_close(out, parts.logsumexp(1), atol=1e-5, rtol=1e-5)
