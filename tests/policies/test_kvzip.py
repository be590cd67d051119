"""KVzip's importance is the most that any query of the repetition pays to a token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_policies import naive_attention, observe

from vllm_kvcompress.policies import POLICIES, LayerObservation


def without_values(observation: LayerObservation, **changes) -> LayerObservation:
    nothing = torch.empty(*observation.keys.shape[:2], 0)
    return LayerObservation(
        observation.keys,
        nothing,
        observation.queries,
        observation.scale,
        0,
        num_tokens=observation.keys.shape[1],
        logits_soft_cap=observation.logits_soft_cap,
        **changes,
    )


@settings(max_examples=25, deadline=None)
@given(
    context=st.integers(1, 20),
    repetition=st.integers(1, 12),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    softcap=st.sampled_from([0.0, 1.5]),
    seed=st.integers(0, 1000),
)
def test_importance_is_the_maximum_over_queries_and_group(context, repetition, heads, group, softcap, seed):
    observation = observe(context + repetition, repetition, heads, group, softcap=softcap, seed=seed)
    importance = POLICIES["kvzip"]().observe(without_values(observation))
    wanted = naive_attention(observation).amax((1, 2))
    assert importance.dtype == torch.float32
    assert importance.shape == (heads, context + repetition)
    torch.testing.assert_close(importance.double(), wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("repetition", [127, 128, 129, 300])
def test_repetitions_of_many_queries(repetition):
    width = 20 + repetition
    observation = observe(width, repetition, 2, 3)
    importance = POLICIES["kvzip"]().observe(without_values(observation))
    logits = torch.einsum("nhgd,htd->hgnt", observation.queries.double(), observation.keys.double()) * 0.3
    future = torch.ones(repetition, width, dtype=torch.bool).triu(21)
    wanted = logits.masked_fill(future, -torch.inf).softmax(-1).amax((1, 2))
    torch.testing.assert_close(importance.double(), wanted, atol=1e-6, rtol=1e-4)


def test_importance_in_a_bfloat16_cache_is_float32():
    drawn = observe(40, 10, 2, 2)
    observation = LayerObservation(drawn.keys.bfloat16(), drawn.values, drawn.queries.bfloat16(), 0.3, 0)
    importance = POLICIES["kvzip"]().observe(without_values(observation))
    wanted = naive_attention(observation).amax((1, 2))
    assert importance.dtype == torch.float32
    torch.testing.assert_close(importance.double(), wanted, atol=1e-6, rtol=1e-4)


def test_scores_are_the_importance_below_the_boundary():
    importance = torch.rand(3, 40)
    keys = torch.randn(3, 40, 8)
    observation = LayerObservation(keys, keys, torch.empty(0, 3, 1, 8), 0.3, 32, 40, state=importance)
    score = POLICIES["kvzip"]().score(observation)
    assert score.dtype == torch.float32
    assert torch.equal(score, importance[:, :32])


@pytest.mark.parametrize("options", [{"chunk": 0}, {"sinks": -1}])
def test_hyper_parameters_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        POLICIES["kvzip"](**options)


def test_it_says_that_it_needs_a_repetition():
    cls = POLICIES["kvzip"]
    assert cls.repeats and not cls.accumulates
    assert cls().chunk == 2048
