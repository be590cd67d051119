"""Expected Attention equals a naive reading of its paper, and RoPE is undone and averaged as by matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.policies import POLICIES, LayerObservation
from vllm_kvcompress.policies.rotary import Rotary

SCALE = 0.3

ROTARIES = {
    "neox": (8, True, 1.0),
    "interleaved": (8, False, 1.0),
    "neox, partial": (4, True, 1.0),
    "interleaved, partial": (4, False, 1.0),
    "neox, scaled": (8, True, 1.3),
    "interleaved, partial, scaled": (4, False, 0.8),
}

BEST = torch.finfo(torch.float32).max  # what the tokens that are left out of the softmax score


def cos_sin(positions: int, rotated: int, scaling: float = 1.0) -> torch.Tensor:
    frequency = 100.0 ** (-torch.arange(0, rotated, 2).double() / rotated)
    angle = torch.arange(positions).double()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], 1) * scaling


def matrix(row: torch.Tensor, is_neox: bool, size: int) -> torch.Tensor:
    """The embedding's matrix at one position, element by element; what is not rotated is not scaled."""
    out = torch.eye(size, dtype=torch.float64)
    half = len(row) // 2
    for i in range(half):
        a, b = (i, i + half) if is_neox else (2 * i, 2 * i + 1)
        cos, sin = float(row[i]), float(row[half + i])
        out[a, a], out[a, b], out[b, a], out[b, b] = cos, -sin, sin, cos
    return out


# ---------------------------------------------------------------------- RoPE


@pytest.mark.parametrize("kind", ROTARIES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("first", [0, 17])
def test_undo_inverts_the_embedding(kind, shape, first):
    rotated, is_neox, scaling = ROTARIES[kind]
    table = cos_sin(40, rotated, scaling)
    vectors = torch.randn(5, *shape, 8, dtype=torch.float64)
    turned = torch.stack([v @ matrix(table[first + i], is_neox, 8).T for i, v in enumerate(vectors)]).float()
    given = turned.clone()
    undone = Rotary(table.float(), is_neox).undo(turned, first)
    assert undone.dtype == torch.float32 and torch.equal(turned, given)
    torch.testing.assert_close(undone.double(), vectors, atol=1e-5, rtol=1e-5)


def test_undoing_bfloat16_vectors_is_float32():
    table = cos_sin(40, 8)
    vectors = torch.randn(5, 8).bfloat16()
    turned = Rotary(table.bfloat16(), True).undo(vectors, 3)
    assert turned.dtype == torch.float32
    exact = Rotary(table.bfloat16().float(), True).undo(vectors.float(), 3)
    torch.testing.assert_close(turned, exact)


@pytest.mark.parametrize("kind", ROTARIES)
@pytest.mark.parametrize(("first", "count"), [(0, 1), (5, 30), (30, 25), (39, 3), (60, 4)])
def test_the_mean_matrix_is_the_mean_of_the_matrices(kind, first, count):
    rotated, is_neox, scaling = ROTARIES[kind]
    table = cos_sin(40, rotated, scaling)
    wanted = sum(matrix(table[min(first + i, 39)], is_neox, 8) for i in range(count)) / count
    mean = Rotary(table.float(), is_neox).mean_matrix(first, count, 8)
    torch.testing.assert_close(mean.double(), wanted, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- the scores


class Case:
    """A request of which `num_tokens` tokens are computed; its queries are known before RoPE.

    Attributes:
        queries: `[C, H, G, D]` float64 before RoPE.
        turned: the same after it, float32.
        keys: `[H, C, D]`.
        values: `[H, C, D]`.
    """

    def __init__(self, num_tokens, heads=2, group=2, kind="neox", positions=400, seed=0):
        rotated, self.is_neox, scaling = ROTARIES[kind]
        self.table = cos_sin(positions, rotated, scaling)
        self.rotary = Rotary(self.table.float(), self.is_neox)
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, 8, generator=generator, dtype=torch.float64)

        # With a mean of their own, as queries have.
        self.queries = normal(num_tokens, heads, group) + normal(heads, group)
        self.keys, self.values = normal(heads, num_tokens).float(), normal(heads, num_tokens).float()
        turns = [matrix(self.table[min(i, positions - 1)], self.is_neox, 8) for i in range(num_tokens)]
        pairs = zip(self.queries, turns, strict=True)
        self.turned = torch.stack([vectors @ turn.T for vectors, turn in pairs]).float()

    def observe(self, policy, steps, begin=0):
        """The state when the first `begin` tokens were cached and the others came in steps."""
        state = None
        for size in steps:
            end = begin + size
            keys = self.keys[:, :end]
            nothing = torch.empty(*keys.shape[:2], 0)
            state = policy.observe(
                LayerObservation(
                    keys,
                    nothing,
                    self.turned[begin:end],
                    SCALE,
                    0,
                    num_tokens=end,
                    state=state,
                    rotary=self.rotary,
                )
            )
            begin = end
        return state

    def score(self, policy, state, scored=None, columns=slice(None)):
        num_tokens = self.keys.shape[1]
        keys, values = self.keys[:, columns], self.values[:, columns]
        return policy.score(
            LayerObservation(
                keys,
                values,
                self.turned[:0],
                SCALE,
                keys.shape[1] if scored is None else scored,
                num_tokens=num_tokens,
                state=state,
                rotary=self.rotary,
            )
        )

    def naive(self, future=512, skip=4, epsilon=0.0, begin=0, columns=slice(None)):
        """`[H, W]` float64, one query, one key and one position at a time."""
        num_tokens, heads, group, size = self.queries.shape
        future_positions = [min(num_tokens + i, len(self.table) - 1) for i in range(future)]
        turn = sum(matrix(self.table[p], self.is_neox, size) for p in future_positions) / future
        out = []
        for head in range(heads):
            keys, values = self.keys[head, columns].double(), self.values[head, columns].double()
            expected = [0.0] * len(keys)
            for member in range(group):
                seen = [self.queries[p, head, member] for p in range(max(skip, begin), num_tokens)]
                mean = sum(seen) / len(seen)
                covariance = sum(torch.outer(q - mean, q - mean) for q in seen) / len(seen)
                mean, covariance = turn @ mean, turn @ covariance @ turn.T
                logits = [
                    float(key @ mean) * SCALE + float(key @ covariance @ key) * SCALE**2 / 2
                    for key in keys[skip:]
                ]
                total = sum(math.exp(logit) for logit in logits)
                for column, logit in enumerate(logits, skip):
                    expected[column] += math.exp(logit) / total / group
            row = [(a + epsilon) * float(v.norm()) for a, v in zip(expected, values, strict=True)]
            out.append([BEST] * min(skip, len(row)) + row[skip:])
        return torch.tensor(out, dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.integers(1, 9), min_size=1, max_size=5).filter(lambda steps: sum(steps) > 5),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    kind=st.sampled_from(list(ROTARIES)),
    future=st.sampled_from([1, 7, 40]),
    skip=st.sampled_from([0, 1, 4]),
    epsilon=st.sampled_from([0.0, 0.02]),
    positions=st.sampled_from([50, 400]),
    seed=st.integers(0, 1000),
)
def test_scores_are_the_expected_attention_whatever_the_steps(
    steps, heads, group, kind, future, skip, epsilon, positions, seed
):
    case = Case(sum(steps), heads, group, kind, positions, seed)
    policy = POLICIES["expected_attention"](future=future, skip=skip, epsilon=epsilon)
    score = case.score(policy, case.observe(policy, steps))
    assert score.dtype == torch.float32
    wanted = case.naive(future, skip, epsilon)
    torch.testing.assert_close(score.double(), wanted, atol=1e-6, rtol=1e-3)


def test_defaults_are_the_papers():
    policy = POLICIES["expected_attention"]
    assert policy() == policy(future=512, skip=4, epsilon=0.0)
    case = Case(30, positions=1000)
    wanted = case.naive()
    torch.testing.assert_close(
        case.score(policy(), case.observe(policy(), [30])).double(), wanted, atol=1e-6, rtol=1e-3
    )
    assert (wanted[:, :4] == BEST).all() and (wanted[:, 4:] < 1e3).all()


def test_future_positions_past_the_table_are_its_last():
    policy = POLICIES["expected_attention"](future=30)
    near, far = Case(35, positions=40), Case(35, positions=400)
    near_score = near.score(policy, near.observe(policy, [35]))
    torch.testing.assert_close(near_score.double(), near.naive(30), atol=1e-6, rtol=1e-3)
    assert not torch.allclose(near_score[:, 4:], far.naive(30)[:, 4:].float(), rtol=1e-3)


@pytest.mark.parametrize("steps", [[200], [128, 72], [1] * 8 + [130, 62], [3, 197]])
def test_steps_of_many_queries(steps):
    case = Case(200)
    policy = POLICIES["expected_attention"](future=20)
    score = case.score(policy, case.observe(policy, steps))
    torch.testing.assert_close(score.double(), case.naive(20), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("begin", [2, 4, 12])
def test_queries_of_a_cached_prefix_are_missing(begin):
    case = Case(30)
    policy = POLICIES["expected_attention"](future=20)
    score = case.score(policy, case.observe(policy, [10, 20 - begin], begin))
    torch.testing.assert_close(score.double(), case.naive(20, begin=begin), atol=1e-6, rtol=1e-3)


def test_only_tokens_below_the_boundary_are_scored_but_all_share_the_softmax():
    case = Case(30)
    policy = POLICIES["expected_attention"](future=20)
    state = case.observe(policy, [30])
    assert torch.equal(case.score(policy, state, scored=16), case.score(policy, state)[:, :16])


def test_after_a_compaction_the_future_still_begins_behind_the_last_token():
    case = Case(30)
    policy = POLICIES["expected_attention"](future=20)
    held = [0, 1, 2, 3, 7, 9, 11, 20, 25, 26, 27, 28, 29]
    kept = torch.tensor(held).expand(2, -1)
    state = policy.carry(case.observe(policy, [12, 18]), kept)
    score = case.score(policy, state, columns=held)
    torch.testing.assert_close(score.double(), case.naive(20, columns=held), atol=1e-6, rtol=1e-3)


def test_queries_far_from_the_origin_keep_their_covariance():
    # A mean of 40 beside a deviation of 1: the raw second moments share only their leading digits.
    case = Case(300, heads=1, group=1)
    case.queries += 40
    turns = [matrix(case.table[i], True, 8) for i in range(300)]
    pairs = zip(case.queries, turns, strict=True)
    case.turned = torch.stack([vectors @ turn.T for vectors, turn in pairs]).float()
    case.keys *= 0.05
    policy = POLICIES["expected_attention"](future=200)
    score = case.score(policy, case.observe(policy, [100] * 3))
    torch.testing.assert_close(score.double(), case.naive(200), atol=1e-6, rtol=2e-3)


@pytest.mark.parametrize("options", [{"future": 0}, {"skip": -1}, {"epsilon": -0.5}])
def test_hyper_parameters_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        POLICIES["expected_attention"](**options)


def test_it_says_what_it_needs():
    cls = POLICIES["expected_attention"]
    assert cls.accumulates and cls.needs_rotary and cls().window == 0
