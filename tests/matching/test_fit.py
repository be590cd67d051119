"""What is fitted reproduces mass and output, on the queries it was fitted to and on others."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from plain_attention import FEATURES, attention, compacted, draw, fitted

from vllm_kvcompress.matching import Fit, Problem, attend, fit, nnls, select_highest, select_omp
from vllm_kvcompress.matching.fit import _match_outputs

EXACT = {"bias_ridge": 0.0, "value_ridge": 0.0}


def everyone(problem: Problem, count: int) -> torch.Tensor:
    return torch.full((problem.keys.shape[0],), count)


def errors(problem: Problem, columns, present, got: Fit, beside=0.0) -> tuple[np.ndarray, np.ndarray]:
    """Of the outputs, relative, and of the logarithm of the mass, root mean squares: `[X]` each.

    Args:
        beside: mass of further tokens that are attended to, over that of all columns; their values are 0.
    """
    outputs, masses = [], []
    for head in range(problem.keys.shape[0]):
        kept, there = columns[head][present[head]].tolist(), present[head]
        prior = 0.0 if problem.bias is None else problem.bias[head, kept]
        mass, output = compacted(
            problem, head, kept, (got.bias[head][there] - prior).tolist(), got.values[head][there]
        )
        _, full_mass, full = attention(problem, head)
        with_others = [own / (own + beside * full_mass) for own in (mass, full_mass)]
        output, full = (of * part[:, None] for of, part in zip((output, full), with_others, strict=True))
        outputs.append(np.linalg.norm(output - full) / np.linalg.norm(full))
        masses.append(np.sqrt(np.square(np.log(mass / full_mass)).mean()))
    return np.array(outputs), np.array(masses)


def halves(problem: Problem) -> tuple[Problem, Problem]:
    """The same tokens, with every other query each."""
    return replace(problem, queries=problem.queries[:, ::2]), replace(
        problem, queries=problem.queries[:, 1::2]
    )


def repeated(
    multiplicities: list[int], heads: int = 2, size: int = 8, queries: int = 60
) -> tuple[Problem, Problem]:
    """Tokens of few distinct keys, each so many times with other values; two halves of the queries."""
    distinct = draw(heads, len(multiplicities), queries, size)
    times = torch.tensor(multiplicities)
    keys = distinct.keys.repeat_interleave(times, 1)
    values = torch.randn(keys.shape, generator=torch.Generator().manual_seed(3))
    return halves(replace(distinct, keys=keys, values=values))


def test_repeated_keys_are_replaced_by_one_each_exactly():
    times = [1, 5, 2, 12, 3, 7]
    problem, others = repeated(times)
    firsts = torch.tensor([0, *np.cumsum(times)[:-1]])
    columns = firsts.expand(2, -1)
    present = torch.ones_like(columns, dtype=torch.bool)
    got = fit(problem, attend(problem), columns, present, **EXACT)
    torch.testing.assert_close(got.bias, torch.tensor(times).log().expand(2, -1), atol=2e-2, rtol=0)
    means = torch.stack([part.mean(1) for part in problem.values.split(times, 1)], 1)
    torch.testing.assert_close(got.values, means, atol=3e-2, rtol=0)
    output, mass = errors(others, columns, present, got)
    assert (output < 2e-3).all() and (mass < 2e-3).all()
    near = fit(problem, attend(problem), columns, present)
    output, mass = errors(others, columns, present, near)
    assert (output < 0.1).all() and (mass < 0.1).all()


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(("bias_ridge", "value_ridge"), [(1e-3, 1e-2), (1e-2, 1e-4)])
def test_factors_and_values_are_the_least_squares(features, bias_ridge, value_ridge):
    problem = draw(features=features, queries=40, sharpness=1.0)
    reference = attend(problem)
    columns, present = select_highest(problem, reference, everyone(problem, 9))
    got = fit(problem, reference, columns, present, bias_ridge=bias_ridge, value_ridge=value_ridge)
    for head in range(3):
        kept = columns[head].tolist()
        w, values = fitted(problem, head, kept, bias_ridge, value_ridge)
        prior = 0.0 if problem.bias is None else problem.bias[head, kept].numpy()
        np.testing.assert_allclose(got.bias[head], np.log(w) + prior, atol=5e-3)
        np.testing.assert_allclose(got.values[head], values, atol=5e-3)


@pytest.mark.parametrize("select", [select_highest, select_omp])
def test_matched_beats_the_same_keys_pruned_on_other_queries(select):
    problem, others = halves(draw(heads=4, tokens=150, queries=160, sharpness=0.7))
    reference = attend(problem)
    kept = select(problem, reference, everyone(problem, 24))
    error = {
        (bias, values): errors(others, *kept, fit(problem, reference, *kept, bias=bias, values=values))
        for bias in (False, True)
        for values in (False, True)
    }
    pruned, matched = error[False, False], error[True, True]
    assert (matched[0] < 0.8 * pruned[0]).all() and (matched[1] < 0.7 * pruned[1]).all()
    assert error[True, False][1] == pytest.approx(matched[1])  # values have no part in the mass
    assert (matched[0] < error[True, False][0]).all()
    assert error[False, True][1] == pytest.approx(pruned[1])


@pytest.mark.parametrize("select", [select_highest, select_omp])
def test_without_biases_what_is_matched_has_too_little_beside_what_else_is_attended_to(select):
    """Alone, values that are fitted without them do nearly as well."""
    problem, others = halves(draw(heads=4, tokens=150, queries=600))
    reference = attend(problem)
    kept = select(problem, reference, everyone(problem, 24))
    matched, unbiased = (
        errors(others, *kept, fit(problem, reference, *kept, bias=bias), beside=3.0)[0]
        for bias in (True, False)
    )
    assert matched.mean() < 0.85 * unbiased.mean()


def test_values_drawn_toward_their_own_serve_other_queries_better():
    problem, others = halves(draw(heads=4, tokens=150, queries=60, sharpness=1.0))
    reference = attend(problem)
    kept = select_highest(problem, reference, everyone(problem, 40))
    loose = fit(problem, reference, *kept, value_ridge=0.0)
    drawn = fit(problem, reference, *kept)
    assert (errors(problem, *kept, loose)[0] < errors(problem, *kept, drawn)[0]).all()
    drawn_error, loose_error = (errors(others, *kept, got)[0] for got in (drawn, loose))
    assert (drawn_error < loose_error).all() and drawn_error.mean() < 0.8 * loose_error.mean()


@pytest.mark.parametrize("select", [select_highest, select_omp])
def test_more_keys_of_the_same_order_leave_less(select):
    problem = draw(tokens=80, queries=80)
    reference = attend(problem)
    columns, present = select(problem, reference, everyone(problem, 64))
    outputs, masses = [], []
    for count in (8, 16, 32, 64):
        some = columns[:, :count], present[:, :count]
        got = fit(problem, reference, *some, bias_ridge=1e-6, value_ridge=1e-6, largest_factor=1e4)
        output, _ = errors(problem, *some, got)
        outputs.append(output)
        softmax = [attention(problem, head)[0] for head in range(3)]
        w = got.bias[:, :count].exp().double().numpy()
        masses.append(
            [np.linalg.norm(a[:, c] @ f - 1) for a, c, f in zip(softmax, columns[:, :count], w, strict=True)]
        )
    assert (np.diff(np.array(masses), axis=0) < 1e-4).all()
    assert (np.diff(np.array(outputs), axis=0) < 0).all()


@pytest.mark.parametrize("features", FEATURES)
def test_all_tokens_kept_change_nothing(features):
    problem = draw(features=features)
    reference = attend(problem)
    columns, present = select_highest(problem, reference, everyone(problem, 40))
    got = fit(problem, reference, columns, present)
    prior = torch.zeros(3, 40) if problem.bias is None else problem.bias
    expected = prior.gather(1, columns).masked_fill(~present, 0.0)
    torch.testing.assert_close(got.bias, expected, atol=2e-3, rtol=0)
    own = problem.values.gather(1, columns[..., None].expand(-1, -1, 8)) * present[..., None]
    torch.testing.assert_close(got.values, own, atol=2e-3, rtol=0)


@pytest.mark.parametrize("features", ["plain", "all"])
def test_heads_of_different_counts_are_fitted_as_if_alone(features):
    problem = draw(features=features, queries=60)
    reference = attend(problem)
    columns, present = select_highest(problem, reference, torch.tensor([5, 20, 12]))
    got = fit(problem, reference, columns, present)
    assert not got.bias[~present].any() and not got.values[~present].any()
    for head, count in enumerate((5, 20, 12)):
        alone = fit(problem, reference, columns[:, :count], torch.ones_like(present[:, :count]))
        torch.testing.assert_close(got.bias[head, :count], alone.bias[head], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(got.values[head, :count], alone.values[head], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("queries", [15, 60])
def test_heads_in_another_order(queries):
    problem = draw(features="all", queries=queries)
    order = torch.tensor([2, 0, 1])
    tensors = ("keys", "values", "queries", "padding", "sinks", "bias", "limits")
    other = replace(problem, **{name: getattr(problem, name)[order] for name in tensors})
    results = []
    for some in (problem, other):
        reference = attend(some)
        results.append(fit(some, reference, *select_omp(some, reference, everyone(some, 20))))
    torch.testing.assert_close(results[1].bias, results[0].bias[order], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(results[1].values, results[0].values[order], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("ridge", [1e-3, 1e-1])
def test_fewer_queries_than_keys_and_more_give_the_same(ridge):
    random = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 12, 30, generator=random).softmax(-1)
    outputs, own = torch.randn(2, 12, 5, generator=random), torch.randn(2, 30, 5, generator=random)
    few = _match_outputs(weights, outputs, own, ridge)
    nothing = torch.zeros(2, 20, 30), torch.zeros(2, 20, 5)  # queries that see nothing
    many = _match_outputs(
        torch.cat([weights, nothing[0]], 1), torch.cat([outputs, nothing[1]], 1), own, ridge
    )
    torch.testing.assert_close(few, many, atol=5e-3, rtol=5e-3)
    assert (few - own).abs().max() > 0.2


def test_without_a_ridge_values_are_the_least_squares_and_stay_finite_where_many_are():
    random = torch.Generator().manual_seed(0)
    weights = (2 * torch.randn(3, 80, 20, generator=random)).softmax(-1)
    weights[1, :, 7] = weights[1, :, 3]  # for one head, no least squares are the only ones
    outputs, own = torch.randn(3, 80, 5, generator=random), torch.randn(3, 20, 5, generator=random)
    got = _match_outputs(weights, outputs, own, 0.0)
    for head in range(3):
        a, y = weights[head].double().numpy(), outputs[head].double().numpy()
        expected = np.linalg.lstsq(a, y, rcond=None)[0]
        assert np.linalg.norm(a @ got[head].numpy() - y) <= (1 + 1e-5) * np.linalg.norm(a @ expected - y)
        if head != 1:
            np.testing.assert_allclose(got[head], expected, atol=1e-2)


def test_bfloat16_is_fitted_in_float32():
    problem = draw(queries=60)
    half = {name: getattr(problem, name).bfloat16() for name in ("keys", "values", "queries")}
    results = []
    for tensors in (half, {name: tensor.float() for name, tensor in half.items()}):
        some = replace(problem, **tensors)
        reference = attend(some)
        results.append(fit(some, reference, *select_highest(some, reference, everyone(some, 9))))
    assert results[0].bias.dtype == results[0].values.dtype == torch.float32
    assert torch.equal(results[0].bias, results[1].bias) and torch.equal(results[0].values, results[1].values)


def test_matched_tokens_are_matched_again():
    problem, others = halves(draw(heads=4, tokens=150, queries=160, sharpness=0.7))
    reference = attend(problem)
    columns, present = select_highest(problem, reference, everyone(problem, 48))
    first = fit(problem, reference, columns, present)
    keys = problem.keys.gather(1, columns[..., None].expand(-1, -1, 8))
    again = replace(problem, keys=keys, values=first.values, bias=first.bias)
    between = attend(again)
    some = select_highest(again, between, everyone(again, 24))
    second, pruned = (fit(again, between, *some, bias=on, values=on) for on in (True, False))
    kept = columns.gather(1, some[0])
    matched, plain = (errors(others, kept, some[1], got) for got in (second, pruned))
    assert (matched[0] < 0.8 * plain[0]).all() and (matched[1] < 0.7 * plain[1]).all()


@pytest.mark.parametrize("select", [select_highest, select_omp])
@pytest.mark.parametrize(
    "case", ["equal keys", "no values", "no keys", "one token", "huge logits", "sees nothing"]
)
def test_degenerate_heads_are_finite(select, case):
    problem = draw(features="limits" if case == "sees nothing" else "plain")
    changed = {
        "equal keys": lambda: {"keys": problem.keys[:, :1].expand(-1, 40, -1)},
        "no values": lambda: {"values": torch.zeros_like(problem.values)},
        "no keys": lambda: {"keys": torch.zeros_like(problem.keys)},
        "one token": lambda: {"keys": problem.keys[:, :1], "values": problem.values[:, :1]},
        "huge logits": lambda: {"keys": 1e4 * problem.keys},
        "sees nothing": lambda: {"limits": torch.zeros_like(problem.limits)},
    }
    problem = replace(problem, **changed[case]())
    reference = attend(problem)
    for count in (1, 9, 40):
        kept = select(problem, reference, everyone(problem, count))
        got = fit(problem, reference, *kept)
        assert got.bias.isfinite().all() and got.values.isfinite().all()
        if case == "equal keys" and count <= 9:  # what 40 equal tokens weigh, bounded by e³ each
            mass = got.bias.exp().sum(1)
            torch.testing.assert_close(
                mass, torch.full((3,), min(40.0, count * math.exp(3))), rtol=1e-3, atol=0
            )
        if case == "no values":
            assert not got.values.any()
        if case == "one token":
            torch.testing.assert_close(got.values, problem.values)


def test_the_host_waits_for_nothing(monkeypatch):
    problem = draw(features="all", queries=60)
    reference = attend(problem)
    kept = select_omp(problem, reference, everyone(problem, 9))

    def read(*_):
        raise AssertionError("the host reads a tensor")

    for name in ("item", "cpu", "tolist", "__bool__", "__int__", "__float__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, read)
    attend(problem)
    fit(problem, reference, *kept, value_ridge=0.0)
    nnls(reference.outputs, reference.share)
