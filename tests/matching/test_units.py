"""Work in units: what it comes to, and that each says before it is done where it ends."""

import pytest
import torch
from torch.testing import assert_close

from vllm_kvcompress.matching import (
    Own,
    Problem,
    attend,
    finish,
    fit_by_parts,
    select_by_parts,
    within,
)
from vllm_kvcompress.matching import parts as parts_module
from vllm_kvcompress.matching.reference import attending


def work():
    yield 0.25
    yield 1.0
    return "done"


def problem_of(tokens: int, kept: int, heads: int = 2, queries: int = 70):
    torch.manual_seed(tokens)
    keys, values = torch.randn(2, heads, tokens, 16)
    problem = Problem(keys, values, torch.randn(heads, queries, 16), 0.25)
    columns = torch.stack([torch.randperm(tokens)[:kept].sort().values for _ in range(heads)])
    return problem, Own(torch.randn(heads, kept, 16)), columns, torch.ones_like(columns, dtype=torch.bool)


def test_work_is_finished_and_may_be_a_part_of_other_work():
    assert finish(work()) == "done"
    assert finish(within(work(), 0.5, 0.9)) == "done"
    assert list(within(work(), 0.5, 0.9)) == pytest.approx([0.6, 0.9])


def test_attention_has_a_unit_for_each_of_its_chunks():
    problem, *_ = problem_of(300, 30)
    ends = list(attending(problem, 4 * 2 * 300 * 20))  # twenty queries of two heads
    assert ends == pytest.approx([20 / 70, 40 / 70, 60 / 70, 1.0])
    assert_close(finish(attending(problem, 4 * 2 * 300 * 20)).outputs, attend(problem).outputs)


@pytest.mark.parametrize("made", [fit_by_parts, select_by_parts])
@pytest.mark.parametrize("parts", [1, 5])
def test_units_of_a_solve_go_up_to_its_end_and_none_is_all_of_it(made, parts, monkeypatch):
    monkeypatch.setattr(parts_module, "parts_at_once", lambda *args, **kwargs: 1)
    ends = list(made(*problem_of(500, 60), 500 // parts))
    assert len(ends) == 1 + parts and 0 < ends[0] < 1 and ends[-1] == 1.0
    steps = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    assert steps[0] > 0 and steps == pytest.approx([steps[0]] * parts), "parts are alike"


@pytest.mark.parametrize("most", [500, 100])
def test_between_units_anything_may_happen(most):
    asked = problem_of(500, 60)
    units, others, solved = fit_by_parts(*asked, most), fit_by_parts(*problem_of(400, 50), most), None
    while solved is None:
        try:
            next(units)
        except StopIteration as done:
            solved = done.value
        next(others, None)
    wanted = finish(fit_by_parts(*asked, most))
    assert torch.equal(solved.bias, wanted.bias) and torch.equal(solved.values, wanted.values)
    units, chosen = select_by_parts(*asked, most), None
    while chosen is None:
        try:
            next(units)
        except StopIteration as done:
            chosen, _ = done.value
        next(others, None)
    assert torch.equal(chosen, finish(select_by_parts(*asked, most))[0])


def test_the_more_a_head_keeps_the_less_of_its_work_is_attention_over_all():
    problem, *_ = problem_of(4096, 8, queries=2048)
    shares = [parts_module._attention_share(problem, kept, max(1, kept // 512)) for kept in (64, 512, 2048)]
    assert 1 > shares[0] > shares[1] > shares[2] > 0
