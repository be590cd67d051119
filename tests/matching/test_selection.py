"""Kept keys: the highest attention, and orthogonal matching pursuit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from plain_attention import FEATURES, attention, draw
from scipy.optimize import nnls as scipy_nnls

from vllm_kvcompress.matching import attend, select_highest, select_omp

SELECTIONS = [select_highest, select_omp]


def counts(*numbers):
    return torch.tensor(numbers)


def pursuit(softmax, count):
    """One token at a time, all weights fitted after each."""
    share, chosen, left = softmax.sum(1), [], softmax.sum(1)
    while len(chosen) < count:
        match = left @ softmax
        match[chosen] = -np.inf
        chosen.append(int(match.argmax()))
        left = share - softmax[:, chosen] @ scipy_nnls(softmax[:, chosen], share)[0]
    return chosen


@pytest.mark.parametrize("features", FEATURES)
def test_highest_are_the_largest_root_mean_squares(features):
    problem = draw(features=features)
    columns, present = select_highest(problem, attend(problem), counts(7, 7, 7))
    assert present.all()
    for head in range(3):
        scores = (attention(problem, head)[0] ** 2).mean(0)
        assert set(columns[head].tolist()) == set(np.argsort(-scores)[:7].tolist())


@pytest.mark.parametrize("features", ["plain", "soft cap", "sinks", "limits", "padding", "bias"])
def test_omp_one_at_a_time_is_the_textbook_s(features):
    problem = draw(features=features, queries=30)
    columns, _ = select_omp(problem, attend(problem), counts(10, 10, 10), step=1, refit_every=1)
    for head in range(3):
        assert columns[head].tolist() == pursuit(attention(problem, head)[0], 10)


@pytest.mark.parametrize(("step", "refit_every"), [(1, 1), (1, 2), (4, 1), (4, 2)])
def test_omp_explains_more_mass_than_the_highest(step, refit_every):
    problem = draw(queries=80, tokens=150)
    reference = attend(problem)

    def left(columns):
        mass = []
        for head in range(3):
            softmax = attention(problem, head)[0]
            mass.append(scipy_nnls(softmax[:, columns[head].tolist()], softmax.sum(1))[1])
        return np.array(mass)

    pursued, _ = select_omp(problem, reference, counts(32, 32, 32), step, refit_every)
    highest, _ = select_highest(problem, reference, counts(32, 32, 32))
    assert (left(pursued) < 0.9 * left(highest)).all()


@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("features", ["plain", "padding", "all"])
def test_heads_of_different_counts_choose_as_if_alone(select, features):
    problem = draw(features=features, queries=60)
    reference = attend(problem)
    wanted = counts(3, 17, 10)
    columns, present = select(problem, reference, wanted)
    assert torch.equal(present.sum(1), wanted)
    for head, count in enumerate(wanted.tolist()):
        alone, all_there = select(problem, reference, counts(count, count, count))
        assert all_there.all() and torch.equal(columns[head, :count], alone[head])


@pytest.mark.parametrize("select", SELECTIONS)
def test_a_head_has_no_more_than_its_tokens_each_of_them_once(select):
    problem = replace(draw(), padding=counts(14, 2, 18))
    columns, present = select(problem, attend(problem), counts(40, 39, 90))
    assert columns.shape == (3, 40)
    for head in range(3):
        kept = columns[head][present[head]].tolist()
        assert sorted(kept) == list(range(problem.padding[head], 40))


@pytest.mark.parametrize("select", SELECTIONS)
def test_no_tokens_wanted_of_any_head(select):
    problem = draw()
    columns, present = select(problem, attend(problem), counts(0, 0, 0))
    assert columns.shape == present.shape == (3, 0)


def test_leading_tokens_are_pursued_before_all_others():
    problem = draw(queries=60)
    reference = attend(problem)
    columns, present = select_omp(problem, reference, counts(12, 6, 9), leading=5, most=12)
    freely, _ = select_omp(problem, reference, counts(12, 12, 12))
    for head in range(3):
        assert {0, 1, 2, 3, 4} <= set(columns[head][present[head]].tolist())
        assert not {0, 1, 2, 3, 4} <= set(freely[head].tolist())
