"""H2O and the full KV-Compress: sums over every query, however the prompt was cut into steps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_policies import naive_attention

from vllm_kvcompress.allocation import select
from vllm_kvcompress.policies import POLICIES, LayerObservation, Policy

NAMES = ["h2o", "kv_compress_full"]
SIZE, SCALE = 8, 0.3


def draw(num_tokens: int, heads: int, group: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys `[H, P, D]` and every token's queries `[P, H, G, D]`."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(heads, num_tokens, SIZE, generator=generator)
    return keys, torch.randn(num_tokens, heads, group, SIZE, generator=generator) * 2


def observation(keys, queries, state=None, softcap=0.0, scored=0, padding=None) -> LayerObservation:
    nothing = torch.empty(*keys.shape[:2], 0)
    return LayerObservation(
        keys,
        nothing,
        queries,
        SCALE,
        scored,
        num_tokens=keys.shape[1],
        logits_soft_cap=softcap,
        padding=padding,
        state=state,
    )


def observe_in_steps(policy: Policy, keys, queries, steps, softcap=0.0) -> torch.Tensor:
    """The state once all queries have passed, `steps` tokens at a time."""
    state, begin = None, 0
    for size in steps:
        end = begin + size
        state = policy.observe(observation(keys[:, :end], queries[begin:end], state, softcap))
        assert state.shape == (len(keys), end)
        begin = end
    assert begin == keys.shape[1]
    return state


def paid(name: str, attention: torch.Tensor) -> torch.Tensor:
    """What each column was paid by `[H, G, n, W]`: `[H, W]`."""
    return (attention**2 if name == "kv_compress_full" else attention).sum((1, 2))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(
    steps=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    softcap=st.sampled_from([0.0, 1.5]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_scores_are_sums_over_all_queries_whatever_the_steps(name, steps, heads, group, softcap, seed, data):
    num_tokens = sum(steps)
    keys, queries = draw(num_tokens, heads, group, seed)
    policy = POLICIES[name]()
    state = observe_in_steps(policy, keys, queries, steps, softcap)
    wanted = paid(name, naive_attention(observation(keys, queries, softcap=softcap)))

    scored = data.draw(st.integers(0, num_tokens - min(policy.window, num_tokens)))
    last = queries[num_tokens - policy.window :] if policy.window <= num_tokens else queries
    score = policy.score(observation(keys, last, state, softcap, scored))
    assert score.dtype == torch.float32 and score.shape == (heads, scored)
    torch.testing.assert_close(score.double(), wanted[:, :scored], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [[300], [128, 172], [129, 1, 170], [1] * 4 + [256, 40]])
def test_steps_of_many_queries(name, steps):
    keys, queries = draw(300, 2, 3)
    logits = torch.einsum("nhgd,htd->hgnt", queries.double(), keys.double()) * SCALE
    future = torch.ones(300, 300, dtype=torch.bool).triu(1)
    wanted = paid(name, logits.masked_fill(future, -torch.inf).softmax(-1))
    state = observe_in_steps(POLICIES[name](), keys, queries, steps)
    torch.testing.assert_close(state.double(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_queries_of_a_cached_prefix_are_missing_and_its_tokens_scored_by_the_others(name):
    keys, queries = draw(20, 2, 2)
    state = POLICIES[name]().observe(observation(keys, queries[12:]))
    wanted = paid(name, naive_attention(observation(keys, queries[12:])))
    torch.testing.assert_close(state.double(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_sums_of_a_bfloat16_cache_are_float32(name):
    keys, queries = (t.bfloat16() for t in draw(40, 2, 2))
    policy = POLICIES[name]()
    state = observe_in_steps(policy, keys, queries, [30, 10])
    score = policy.score(observation(keys, queries[:0], state, scored=40))
    assert score.dtype == torch.float32
    wanted = paid(name, naive_attention(observation(keys, queries)))
    torch.testing.assert_close(score.double(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_sums_of_kept_tokens_are_carried(name):
    state = torch.tensor([[1.0, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    kept = torch.tensor([[0, 2, 3, 4], [-1, -1, 1, 4]])
    assert POLICIES[name]().carry(state, kept).tolist() == [[1, 3, 4, 5], [0, 0, 7, 10]]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(data=st.data(), heads=st.integers(1, 3), seed=st.integers(0, 1000))
def test_sums_go_on_after_a_compaction(name, data, heads, seed):
    before, after, group = 12, data.draw(st.integers(1, 5)), 2
    keys, queries = draw(before + after, heads, group, seed)
    policy = POLICIES[name]()
    state = observe_in_steps(policy, keys[:, :before], queries[:before], [before])
    chosen = [sorted(data.draw(st.sets(st.integers(0, before - 1), min_size=1))) for _ in range(heads)]
    width = max(map(len, chosen))
    kept = torch.tensor([[-1] * (width - len(own)) + own for own in chosen])
    padding = torch.tensor([width - len(own) for own in chosen])
    held = torch.stack(
        [
            torch.cat([torch.full((int(empty), SIZE), 1e4), row[own], row[before:]])
            for row, own, empty in zip(keys, chosen, padding, strict=True)
        ]
    )
    state = policy.carry(state, kept)
    assert state.shape == (heads, width)
    state = policy.observe(observation(held, queries[before:], state, padding=padding))

    first = paid(name, naive_attention(observation(keys[:, :before], queries[:before])))
    for head, own in enumerate(chosen):
        empty = int(padding[head])
        alone = observation(held[head : head + 1, empty:], queries[before:, head : head + 1])
        wanted = paid(name, naive_attention(alone))[0]
        wanted[: len(own)] += first[head, own]
        torch.testing.assert_close(state[head, empty:].double(), wanted, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------- H2O's recent tokens


@pytest.mark.parametrize("recent", [0.0, 0.25, 0.5, 1.0])
def test_h2o_protects_the_most_recent_tokens_of_what_each_head_keeps(recent):
    keys, queries = draw(24, 4, 1)
    scores = torch.rand(4, 20)
    scores[:, 0] = torch.inf
    scores[3, :9] = -torch.inf  # holds nothing
    kept = torch.tensor([1, 8, 20, 11])
    refined = POLICIES["h2o"](recent=recent).refine(
        scores.clone(), kept, observation(keys, queries[:0], scored=20)
    )
    assert refined.dtype == torch.float32
    for head, count in enumerate(kept.tolist()):
        protected = int(scores[head].isposinf().sum())
        newest = min(int(recent * count), count - protected)
        wanted = scores[head].tolist()
        for column in range(20 - newest, 20):
            wanted[column] = torch.inf
        assert refined[head].tolist() == wanted


def test_half_of_what_h2o_keeps_is_recent_by_default():
    assert POLICIES["h2o"]() == POLICIES["h2o"](recent=0.5)


def test_h2o_keeps_the_heavy_hitters_outside_the_recent_window():
    scores = torch.tensor([[5.0, 1, 9, 8, 2, 7, 3, 4], [8, 7, 6, 5, 4, 3, 2, 1]])
    keys, queries = draw(8, 2, 1)
    refined = POLICIES["h2o"]().refine(scores, torch.tensor([4, 4]), observation(keys, queries[:0], scored=8))
    # The best two of the first six, and the last two.
    assert select(refined[None], torch.tensor([[1, 1]]), 4).tolist() == [[2, 3, 6, 7], [0, 1, 6, 7]]


def test_the_full_kv_compress_leaves_scores_alone():
    keys, queries = draw(24, 2, 1)
    scores = torch.rand(2, 20)
    refined = POLICIES["kv_compress_full"]().refine(
        scores.clone(), torch.tensor([4, 8]), observation(keys, queries[:0], scored=20)
    )
    assert torch.equal(refined, scores)


@pytest.mark.parametrize("recent", [-0.1, 1.5])
def test_a_recent_share_out_of_range_is_refused(recent):
    with pytest.raises(ValueError, match="recent"):
        POLICIES["h2o"](recent=recent)


@pytest.mark.parametrize("name", NAMES)
def test_they_say_that_they_watch_every_query(name):
    assert POLICIES[name].accumulates and not POLICIES[name].repeats
