"""Moments that a kernel keeps are what the policy itself would have kept, and are asked of it alone."""

from dataclasses import dataclass, replace

import torch

from vllm_kvcompress.kernels.batch import MOMENT_ROWS
from vllm_kvcompress.policies import POLICIES, LayerObservation
from vllm_kvcompress.policies.criticalkv import CriticalKV
from vllm_kvcompress.policies.expected_attention import ExpectedAttention, QueryStatistics
from vllm_kvcompress.policies.h2o import H2O
from vllm_kvcompress.policies.rotary import Rotary
from vllm_kvcompress.requests.moments import QueryMoments

LAYERS, HEADS, GROUP, SIZE = 3, 2, 2, 40  # of which one part has 8 rows


def filled() -> tuple[QueryMoments, QueryStatistics]:
    """Moments of 7 queries, written where the kernel writes them; the same, layer by layer."""
    queries = torch.randn(7, LAYERS, HEADS * GROUP, SIZE)
    mean = queries.mean(0)
    centred = (queries - mean).flatten(1, 2).transpose(0, 1)
    scatter = (centred.transpose(1, 2) @ centred).unflatten(0, mean.shape[:2])  # [L, Hq, D, D]
    moments = QueryMoments.empty(LAYERS, HEADS * GROUP, SIZE, 4, torch.device("cpu"))
    content = moments.content.fill_(torch.nan)
    for row in range(SIZE):
        content[:, :, row // MOMENT_ROWS, row % MOMENT_ROWS] = scatter[:, :, row]
    content[..., MOMENT_ROWS, :] = mean[:, :, None]
    content[..., MOMENT_ROWS + 1, 0] = 7
    return moments, QueryStatistics(7, mean, scatter)


def test_layers_are_read_as_one_with_all_their_heads():
    moments, wanted = filled()
    found = moments.read(slice(1, 3), HEADS)
    assert found.seen == 7 and found.mean.shape == (2 * HEADS, GROUP, SIZE)
    assert torch.equal(found.mean.view(2, -1, SIZE), wanted.mean[1:])
    assert torch.equal(found.scatter.view(2, -1, SIZE, SIZE), wanted.scatter[1:])


def test_scores_are_the_same_whether_a_number_or_the_device_counts():
    moments, wanted = filled()
    shape = HEADS, GROUP, SIZE
    own = QueryStatistics(7, wanted.mean[0].view(shape), wanted.scatter[0].view(*shape, SIZE))
    values = torch.randn(HEADS, 11, SIZE)
    seen = LayerObservation(
        torch.randn(HEADS, 11, SIZE),
        values,
        torch.empty(0, HEADS, GROUP, SIZE),
        0.05,
        9,
        num_tokens=11,
        rotary=Rotary.identity(99),
    )
    policy = ExpectedAttention()
    score = policy.score(replace(seen, state=moments.read(slice(0, 1), HEADS)))
    assert torch.equal(score, policy.score(replace(seen, state=own)))
    none = QueryMoments.empty(LAYERS, HEADS * GROUP, SIZE, 4, torch.device("cpu"))
    score = policy.score(replace(seen, state=none.read(slice(0, 1), HEADS)))
    assert torch.equal(score, policy.score(seen)) and torch.equal(score, values[:, :9].norm(dim=-1))


def test_a_kernel_keeps_them_of_requests_that_ask_and_are_not_paused(observer):
    observer.keeps_moments = True
    for name, policy in (
        ("e", ExpectedAttention(skip=9)),
        ("c", CriticalKV(ExpectedAttention())),
        ("h", H2O()),
    ):
        observer.watch(name, policy)
    assert observer.moments("e").skip == 9 and observer.moments("c").skip == 4
    assert observer.moments("e").content.shape[:2] == (2, 4) and not observer.moments("e").content.any()
    assert observer.moments("h") is None and observer.moments("nobody") is None
    assert observer.notes("ech"), "for sums there is no place"
    observer.forget("h")
    assert not observer.notes("ech")
    bounds, seq_lens = torch.tensor([0, 1, 2]), torch.tensor([5, 5])
    assert observer.spans(["e", "c"], bounds, seq_lens, torch.zeros(2, 2).long()) == []
    kept = observer.moments("e")
    observer.pause("e")
    assert observer.moments("e") is None and not observer.notes("ech")
    observer.resume("e")
    assert observer.moments("e") is kept


def test_where_no_kernel_keeps_them_spans_note_what_accumulates(observer):
    assert not observer.keeps_moments
    observer.watch("e", ExpectedAttention())
    assert observer.moments("e") is None and observer.notes("e")


def test_what_observes_in_a_way_of_its_own_is_not_kept_in_its_place():
    @dataclass(frozen=True)
    class Halved(ExpectedAttention):
        def observe(self, observation):
            return super().observe(replace(observation, queries=observation.queries / 2))

    assert Halved().moments is None and CriticalKV(Halved()).moments is None
    assert ExpectedAttention(skip=0).moments == 0 and CriticalKV().moments is None
    kept = {name for name, policy in POLICIES.items() if policy().moments is not None}
    assert kept == {"expected_attention"}
