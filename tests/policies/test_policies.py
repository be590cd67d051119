"""Each policy equals a naive reading of its paper: one query head, one query, one token at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.policies import POLICIES, LayerObservation


def naive_attention(observation: LayerObservation) -> torch.Tensor:
    """`[H, G, w, P]` float64 attention over repeated keys, query by query."""
    window, heads, group, _ = observation.queries.shape
    num_tokens = observation.keys.shape[1]
    out = torch.zeros(heads, group, window, num_tokens, dtype=torch.float64)
    for head in range(heads):
        for member in range(group):
            for index in range(window):
                position = num_tokens - window + index
                logits = [
                    float(observation.queries[index, head, member].double() @ key.double())
                    * observation.scale
                    for key in observation.keys[head, : position + 1]
                ]
                if cap := observation.logits_soft_cap:
                    logits = [cap * math.tanh(value / cap) for value in logits]
                out[head, member, index, : position + 1] = torch.tensor(logits).double().softmax(-1)
    return out


def naive_pool(row: torch.Tensor, kernel: int, how: str) -> torch.Tensor:
    padded = [0.0] * (kernel // 2) + row.tolist() + [0.0] * (kernel // 2)
    windows = [padded[i : i + kernel] for i in range(len(row))]
    return torch.tensor([max(w) if how == "max" else sum(w) / kernel for w in windows], dtype=torch.float64)


def observe(num_tokens, window, heads, group, size=8, scored=None, softcap=0.0, seed=0) -> LayerObservation:
    generator = torch.Generator().manual_seed(seed)
    return LayerObservation(
        keys=torch.randn(heads, num_tokens, size, generator=generator),
        values=torch.randn(heads, num_tokens, size, generator=generator),
        queries=torch.randn(window, heads, group, size, generator=generator) * 2,
        scale=0.3,
        num_scored=num_tokens - window if scored is None else scored,
        logits_soft_cap=softcap,
    )


SHAPES = dict(
    rest=st.integers(1, 20),
    window=st.integers(1, 5),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    kernel=st.sampled_from([1, 3, 7]),
    softcap=st.sampled_from([0.0, 1.5]),
    seed=st.integers(0, 1000),
)


@settings(max_examples=25, deadline=None)
@given(pooling=st.sampled_from(["max", "avg"]), **SHAPES)
def test_snapkv_is_the_groups_mean_of_the_pooled_window_attention(
    rest, window, heads, group, kernel, softcap, seed, pooling
):
    observation = observe(rest + window, window, heads, group, softcap=softcap, seed=seed)
    attention = naive_attention(observation)
    wanted = torch.stack(
        [
            torch.stack([naive_pool(a.sum(0)[:rest], kernel, pooling) for a in attention[head]]).mean(0)
            for head in range(heads)
        ]
    )
    score = POLICIES["snapkv"](window=window, kernel_size=kernel, pooling=pooling).score(observation)
    torch.testing.assert_close(score.double(), wanted, atol=1e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(**SHAPES)
def test_kv_compress_is_the_groups_sum_of_the_pooled_squared_attention(
    rest, window, heads, group, kernel, softcap, seed
):
    observation = observe(rest + window, window, heads, group, softcap=softcap, seed=seed)
    attention = naive_attention(observation)
    wanted = torch.stack(
        [
            torch.stack([naive_pool((a**2).sum(0)[:rest], kernel, "max") for a in attention[head]]).sum(0)
            for head in range(heads)
        ]
    )
    score = POLICIES["kv_compress"](window=window, kernel_size=kernel).score(observation)
    torch.testing.assert_close(score.double(), wanted, atol=1e-5, rtol=1e-4)


def test_streaming_llm_prefers_later_tokens_and_reads_no_keys():
    empty = torch.empty(3, 40, 0)
    observation = LayerObservation(empty, empty, torch.empty(0, 3, 1, 0), scale=1.0, num_scored=32)
    score = POLICIES["streaming_llm"]().score(observation)
    assert score.shape == (3, 32) and score.dtype == torch.float32
    assert (score.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("name", ["snapkv", "kv_compress"])
def test_only_tokens_below_the_boundary_are_scored_but_pooling_sees_beyond_it(name):
    observation = observe(40, 4, 2, 2, scored=20)
    whole = POLICIES[name](window=4).score(observe(40, 4, 2, 2))
    assert torch.equal(POLICIES[name](window=4).score(observation), whole[:, :20])


@pytest.mark.parametrize("name", ["snapkv", "kv_compress"])
def test_scores_of_a_bfloat16_cache_are_float32(name):
    observation = observe(40, 4, 2, 2)
    low = LayerObservation(
        observation.keys.bfloat16(), observation.values, observation.queries.bfloat16(), 0.3, 36
    )
    score = POLICIES[name](window=4).score(low)
    assert score.dtype == torch.float32
    assert not torch.equal(score, score.bfloat16().float())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("snapkv", {"kernel_size": 4}),
        ("snapkv", {"pooling": "sum"}),
        ("kv_compress", {"kernel_size": 0}),
        ("snapkv", {"window": 0}),
        ("kv_compress", {"window": 0}),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(name, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        POLICIES[name](**options)


@settings(max_examples=25, deadline=None)
@given(**{name: SHAPES[name] for name in ("rest", "heads", "group", "softcap", "seed")})
def test_tova_is_the_last_querys_attention_averaged_over_all_heads(rest, heads, group, softcap, seed):
    observation = observe(rest + 1, 1, heads, group, softcap=softcap, seed=seed)
    attention = naive_attention(observation)
    wanted = sum(attention[h, g, 0, :rest] for h in range(heads) for g in range(group)) / (heads * group)
    score = POLICIES["tova"]().score(observation)
    torch.testing.assert_close(score.double(), wanted.expand(heads, rest), atol=1e-5, rtol=1e-4)


def test_knorm_keeps_small_keys():
    observation = observe(20, 0, 2, 1, scored=16)
    score = POLICIES["knorm"]().score(observation)
    for head in range(2):
        for token in range(16):
            norm = math.sqrt(sum(float(x) ** 2 for x in observation.keys[head, token]))
            assert float(score[head, token]) == pytest.approx(-norm, rel=1e-5)


def test_keydiff_is_the_cosine_to_the_mean_direction_of_all_keys():
    observation = observe(20, 0, 2, 1, scored=16)
    score = POLICIES["keydiff"]().score(observation)
    for head in range(2):
        keys = [key.double() / key.double().norm() for key in observation.keys[head]]
        mean = sum(keys) / len(keys)
        for token in range(16):
            cosine = float(keys[token] @ mean) / float(mean.norm())
            assert float(score[head, token]) == pytest.approx(-cosine, abs=1e-5)
