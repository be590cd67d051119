"""CriticalKV: half of what a head keeps by another policy's scores, the rest by those times ‖W_O v‖."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_policies import observe

from vllm_kvcompress.allocation import select
from vllm_kvcompress.policies import POLICIES, LayerObservation

HIDDEN = 12


def with_projection(observation: LayerObservation, seed: int = 0) -> LayerObservation:
    heads, _, size = observation.values.shape
    group = observation.queries.shape[2]
    generator = torch.Generator().manual_seed(seed + 1)
    projection = torch.randn(heads, group, size, HIDDEN, generator=generator)
    return dataclasses.replace(observation, output_projection=lambda: projection)


def naive(scores, kept, observation, first_stage=0.5, epsilon=1e-4) -> list[list[float]]:
    """One token, one query head and one element of the output at a time; equal scores favour the earlier."""
    projection = observation.output_projection().double()
    out = []
    for head, row in enumerate(scores.double().tolist()):
        refined = []
        for token, score in enumerate(row):
            value = observation.values[head, token].double()
            lengths = [sum(abs(float(x)) for x in value @ member) for member in projection[head]]
            length = sum(lengths) / len(lengths)
            refined.append(score if math.isinf(score) else (score + epsilon) * length)
        first = max(1, int(first_stage * int(kept[head]))) if first_stage else 0
        for token in sorted(range(len(row)), key=lambda t: (-row[t], t))[:first]:
            refined[token] = math.inf
        out.append(refined)
    return out


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    num_tokens=st.integers(2, 20),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    first_stage=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    epsilon=st.sampled_from([1e-4, 0.3]),
    seed=st.integers(0, 1000),
)
def test_tokens_are_taken_in_two_stages(data, num_tokens, heads, group, first_stage, epsilon, seed):
    observation = with_projection(observe(num_tokens + 4, 4, heads, group, seed=seed), seed)
    scores = torch.rand(heads, num_tokens, generator=torch.Generator().manual_seed(seed))
    scores[:, : data.draw(st.integers(0, num_tokens - 1))] = torch.inf
    kept = data.draw(st.lists(st.integers(1, num_tokens), min_size=heads, max_size=heads))
    policy = POLICIES["criticalkv"](first_stage=first_stage, epsilon=epsilon)
    refined = policy.refine(scores.clone(), torch.tensor(kept), observation)
    assert refined.dtype == torch.float32
    wanted = torch.tensor(naive(scores, kept, observation, first_stage, epsilon))
    torch.testing.assert_close(refined, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kept", "first"), [(1, 1), (3, 1), (4, 2), (20, 10)])
def test_the_first_stage_is_never_empty(kept, first):
    observation = with_projection(observe(24, 4, 1, 2))
    scores = torch.rand(1, 20)
    refined = POLICIES["criticalkv"]().refine(scores.clone(), torch.tensor([kept]), observation)
    chosen = set(refined[0].isposinf().nonzero().flatten().tolist())
    assert chosen == set(scores[0].topk(first).indices.tolist())


def test_defaults_are_the_papers():
    observation = with_projection(observe(40, 32, 2, 2))
    scores, kept = torch.rand(2, 8), torch.tensor([4, 6])
    refined = POLICIES["criticalkv"]().refine(scores.clone(), kept, observation)
    wanted = torch.tensor(naive(scores, kept, observation))
    torch.testing.assert_close(refined, wanted, atol=1e-5, rtol=1e-4)
    assert refined.isposinf().sum(1).tolist() == [2, 3]


@pytest.mark.parametrize("name", ["snapkv", "kv_compress", "tova", "knorm", "keydiff", "streaming_llm"])
def test_scores_are_the_base_policys(name):
    base = POLICIES[name]()
    policy = POLICIES["criticalkv"](base=base)
    assert policy.window == base.window
    observation = with_projection(observe(60, base.window, 2, 2, scored=20))
    assert torch.equal(policy.score(observation), base.score(observation))


def test_the_base_is_snapkv_unless_told_otherwise():
    base = POLICIES["snapkv"]()
    assert POLICIES["criticalkv"]() == POLICIES["criticalkv"](base=base)
    assert POLICIES["criticalkv"]().window == base.window
    observation = with_projection(observe(60, base.window, 2, 2))
    assert torch.equal(POLICIES["criticalkv"]().score(observation), base.score(observation))


def test_protected_tokens_stay_protected_even_if_their_values_are_zero():
    observation = observe(24, 4, 2, 2)
    observation.values[:, :6] = 0
    scores = torch.rand(2, 20)
    scores[:, :6] = torch.inf
    refined = POLICIES["criticalkv"]().refine(
        scores.clone(), torch.tensor([8, 8]), with_projection(observation)
    )
    assert refined[:, :6].isposinf().all() and not refined.isnan().any()


@pytest.mark.parametrize("garbage", [0.0, 1e4])
def test_columns_that_hold_nothing_are_never_taken(garbage):
    observation = observe(24, 4, 2, 2)
    padding = torch.tensor([0, 12])
    observation.values[1, :12] = garbage
    observation = dataclasses.replace(with_projection(observation), padding=padding)
    scores = torch.rand(2, 20)
    scores[1, :12] = -torch.inf
    refined = POLICIES["criticalkv"]().refine(scores.clone(), torch.tensor([8, 8]), observation)
    assert not (refined[1, :12] > -torch.inf).any()
    alone = LayerObservation(
        observation.keys[1:, 12:],
        observation.values[1:, 12:],
        observation.queries[:, 1:],
        0.3,
        8,
        output_projection=lambda: observation.output_projection()[1:],
    )
    wanted = torch.tensor(naive(scores[1:, 12:], [8], alone))[0]
    torch.testing.assert_close(refined[1, 12:], wanted, atol=1e-5, rtol=1e-4)
    kept = select(refined[None], torch.tensor([[1, 1]]), 8)
    assert kept[1].tolist() == list(range(12, 20))


def test_values_of_a_bfloat16_cache_are_projected_in_float32():
    drawn = observe(24, 4, 2, 2)
    low = LayerObservation(drawn.keys.bfloat16(), drawn.values.bfloat16(), drawn.queries.bfloat16(), 0.3, 20)
    low = with_projection(low)
    scores = torch.rand(2, 20)
    refined = POLICIES["criticalkv"]().refine(scores.clone(), torch.tensor([4, 4]), low)
    assert refined.dtype == torch.float32
    wanted = torch.tensor(naive(scores, [4, 4], low))
    torch.testing.assert_close(refined, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"first_stage": -0.1}, {"first_stage": 1.5}, {"epsilon": -1.0}])
def test_hyper_parameters_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        POLICIES["criticalkv"](**options)


@pytest.mark.parametrize("name", ["h2o", "kv_compress_full", "expected_attention", "kvzip"])
def test_it_needs_what_its_base_needs(name):
    base, policy = POLICIES[name](), POLICIES["criticalkv"](base=POLICIES[name]())
    assert policy.accumulates == base.accumulates and policy.repeats == base.repeats
    assert policy.needs_rotary == base.needs_rotary


def test_a_base_that_accumulates_observes_and_is_carried():
    base, policy = POLICIES["h2o"](), POLICIES["criticalkv"](base=POLICIES["h2o"]())
    observation = observe(24, 24, 2, 2)
    state = policy.observe(observation)
    assert torch.equal(state, base.observe(observation))
    kept = torch.tensor([[0, 2, 23], [-1, 5, 23]])
    assert torch.equal(policy.carry(state, kept), base.carry(state, kept))
    seen = dataclasses.replace(observation, state=state, num_scored=20)
    assert torch.equal(policy.score(seen), base.score(seen))


def test_the_bases_own_protection_comes_first():
    # H2O's most recent half of eight is all of the first stage; the rest is chosen among the others.
    observation = with_projection(observe(24, 4, 2, 2))
    scores = torch.rand(2, 20)
    policy = POLICIES["criticalkv"](base=POLICIES["h2o"]())
    refined = policy.refine(scores.clone(), torch.tensor([8, 8]), observation)
    recent = scores.clone()
    recent[:, 16:] = torch.inf
    wanted = torch.tensor(naive(recent, [8, 8], observation))
    torch.testing.assert_close(refined, wanted, atol=1e-5, rtol=1e-4)
    assert refined.isposinf().sum(1).tolist() == [4, 4]


def test_it_does_not_stand_on_itself():
    with pytest.raises(ValueError, match="base"):
        POLICIES["criticalkv"](base=POLICIES["criticalkv"]())
