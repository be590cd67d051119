"""A head whose first columns hold nothing scores its tokens as if those columns were not there."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.policies import POLICIES, LayerObservation, Policy
from vllm_kvcompress.policies.rotary import Rotary

SIZE, WINDOW, GROUP = 8, 4, 2
GARBAGE = 1e4

POLICIES_AND_OPTIONS = {
    "snapkv": ("snapkv", {"window": WINDOW}),
    "snapkv, wide": ("snapkv", {"window": WINDOW, "kernel_size": 15}),
    "snapkv, avg": ("snapkv", {"window": WINDOW, "pooling": "avg", "kernel_size": 5}),
    "kv_compress": ("kv_compress", {"window": WINDOW}),
    "mixed_dim_kv": ("mixed_dim_kv", {"window": WINDOW}),
    "knorm": ("knorm", {}),
    "keydiff": ("keydiff", {}),
    "h2o": ("h2o", {}),
    "kv_compress_full": ("kv_compress_full", {}),
    "expected_attention": ("expected_attention", {"future": 16}),
    "expected_attention, epsilon": ("expected_attention", {"future": 16, "skip": 1, "epsilon": 0.1}),
}

# Past the tokens that are held, as after a compaction.
COMPUTED = 90


def rotary() -> Rotary:
    angle = torch.arange(COMPUTED + 60)[:, None] * 100.0 ** (-torch.arange(0, SIZE, 2) / SIZE)
    return Rotary(torch.cat([angle.cos(), angle.sin()], 1), True)


def padded(padding: list[int], rest: int, new: int, softcap: float, seed: int) -> LayerObservation:
    """Heads that hold `rest - padding` tokens and `new` ones that all share, whose queries are observed."""
    generator = torch.Generator().manual_seed(seed)
    heads, width = len(padding), rest + new
    keys = torch.randn(heads, width, SIZE, generator=generator)
    values = torch.randn(heads, width, SIZE, generator=generator)
    for head, empty in enumerate(padding):
        keys[head, :empty], values[head, :empty] = GARBAGE, -GARBAGE
        keys[head, :empty:2] *= -1
    return LayerObservation(
        keys,
        values,
        torch.randn(new, heads, GROUP, SIZE, generator=generator) * 2,
        scale=0.3,
        num_scored=rest,
        num_tokens=COMPUTED,
        logits_soft_cap=softcap,
        padding=torch.tensor(padding),
        rotary=rotary(),
    )


def alone(observation: LayerObservation, head: int) -> LayerObservation:
    """What one head holds."""
    empty = int(observation.padding[head])
    return dataclasses.replace(
        observation,
        keys=observation.keys[head : head + 1, empty:],
        values=observation.values[head : head + 1, empty:],
        queries=observation.queries[:, head : head + 1],
        num_scored=observation.num_scored - empty,
        padding=None,
    )


def score(policy: Policy, observation: LayerObservation) -> torch.Tensor:
    state = None
    if policy.accumulates:
        nothing = observation.values[..., :0]
        state = policy.observe(dataclasses.replace(observation, values=nothing))
    queries = observation.queries[len(observation.queries) - policy.window :]
    return policy.score(dataclasses.replace(observation, queries=queries, state=state))


@pytest.mark.parametrize("case", POLICIES_AND_OPTIONS)
@settings(max_examples=20, deadline=None)
@given(
    data=st.data(),
    rest=st.integers(1, 20),
    more=st.integers(0, 6),
    heads=st.integers(1, 4),
    softcap=st.sampled_from([0.0, 1.5]),
    seed=st.integers(0, 1000),
)
def test_scores_are_those_of_the_head_without_its_padding(case, data, rest, more, heads, softcap, seed):
    name, options = POLICIES_AND_OPTIONS[case]
    padding = data.draw(st.lists(st.integers(0, rest - 1), min_size=heads, max_size=heads))
    observation = padded(padding, rest, WINDOW + more, softcap, seed)
    policy = POLICIES[name](**options)
    scores = score(policy, observation)
    assert scores.shape == (heads, rest)
    for head, empty in enumerate(padding):
        wanted = score(policy, alone(observation, head))[0]
        torch.testing.assert_close(scores[head, empty:], wanted, atol=1e-6, rtol=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    rest=st.integers(1, 20),
    data=st.data(),
    heads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_tova_does_not_look_at_what_no_head_holds(rest, data, heads, seed):
    # Its scores are a mean over heads, so the heads stay together.
    empty = data.draw(st.integers(0, rest - 1))
    observation = padded([empty] * heads, rest, 1, 0.0, seed)
    together = dataclasses.replace(
        observation,
        keys=observation.keys[:, empty:],
        values=observation.values[:, empty:],
        num_scored=rest - empty,
        padding=None,
    )
    policy = POLICIES["tova"]()
    torch.testing.assert_close(
        policy.score(observation)[:, empty:], policy.score(together), atol=1e-6, rtol=1e-4
    )


def test_streaming_llm_prefers_later_tokens_of_what_a_head_holds():
    scores = POLICIES["streaming_llm"]().score(padded([3, 0], 10, 4, 0.0, 0))
    assert (scores[0, 3:].diff() > 0).all() and (scores[1].diff() > 0).all()


def test_kvzip_does_not_look_at_what_a_head_does_not_hold():
    observation = padded([3, 0, 7], 10, 6, 0.0, 0)
    policy = POLICIES["kvzip"]()
    importance = policy.observe(dataclasses.replace(observation, values=observation.values[..., :0]))
    for head, empty in enumerate(observation.padding.tolist()):
        wanted = policy.observe(alone(observation, head))[0]
        torch.testing.assert_close(importance[head, empty:], wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("case", POLICIES_AND_OPTIONS)
def test_padding_of_zero_is_no_padding(case):
    name, options = POLICIES_AND_OPTIONS[case]
    policy = POLICIES[name](**options)
    observation = padded([0, 0], 20, 6, 0.0, 0)
    without = dataclasses.replace(observation, padding=None)
    torch.testing.assert_close(score(policy, observation), score(policy, without), atol=0, rtol=1e-6)
