"""Heads that are matched part by part answer as if they were matched at once, or nearly."""

from dataclasses import replace

import pytest
import torch

from vllm_kvcompress.matching import (
    Own,
    Problem,
    attend,
    finish,
    fit,
    fit_by_parts,
    select_by_parts,
    select_omp,
)
from vllm_kvcompress.matching import parts as parts_module

SIZE, SCALE = 16, 0.25


@pytest.fixture(autouse=True, params=[1, 2, 99])
def at_once(request, monkeypatch):
    """Parts that are solved for together."""
    monkeypatch.setattr(parts_module, "parts_at_once", lambda *_, **__: request.param)


def draw(tokens=240, queries=150, heads=2, seed=0, **fields) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    shape = heads, tokens, SIZE
    keys, values = (torch.randn(shape, generator=generator) for _ in "kv")
    return Problem(keys, values, torch.randn(heads, queries, SIZE, generator=generator) * 2, SCALE, **fields)


def chosen(problem: Problem, counts: list[int]):
    """The best columns of each head, ascending, one query for each, and which are there."""
    scores = attend(problem).scores
    most = max(counts)
    columns = scores.argsort(1, descending=True)[:, :most]
    present = torch.arange(most) < torch.tensor(counts)[:, None]
    columns, order = columns.masked_fill(~present, 10**6).sort(1)
    present = present.gather(1, order)
    columns = columns.where(present, torch.zeros_like(columns))
    generator = torch.Generator().manual_seed(9)
    own = torch.randn(len(counts), most, SIZE, generator=generator) * 2
    return columns, present, own


def drawn_sinks(queries: int, heads: int):
    """As much as a few of the largest of a query's logits."""
    return torch.randn(heads, queries, generator=torch.Generator().manual_seed(6)) + 6


def dense(queries, keys, values, bias):
    logits = queries.double() @ keys.double().mT * SCALE + bias[:, None].double()
    return logits.softmax(-1) @ values.double(), logits.logsumexp(-1)


def errors(problem: Problem, queries, columns, present, bias, values) -> tuple[float, float]:
    """Of outputs and of masses, on queries that nothing was fitted to."""
    wanted, mass = dense(queries, problem.keys, problem.values, torch.zeros(problem.keys.shape[:2]))
    keys = problem.keys.gather(1, columns[..., None].expand(-1, -1, SIZE))
    got, own = dense(queries, keys, values, bias.masked_fill(~present, -torch.inf))
    return float((got - wanted).square().mean()), float((own - mass).square().mean())


@pytest.mark.parametrize("sunk", [False, True])
def test_a_head_of_one_part_is_matched_at_once(sunk):
    columns, present, own = chosen(draw(), [40, 25])
    sinks = drawn_sinks(190, heads=2) if sunk else None
    problem = draw(sinks=None if sinks is None else sinks[:, :150])
    for head in range(2):
        rows, there = slice(head, head + 1), present[head]
        queries = torch.cat([problem.queries[rows], own[rows, there]], 1)
        of_head = of_own = None
        if sinks is not None:
            of_head, of_own = torch.cat([sinks[rows, :150], sinks[rows, 150:][:, there]], 1), sinks[:, 150:]
        alone = Problem(problem.keys[rows], problem.values[rows], queries, SCALE, sinks=of_head)
        wanted = fit(alone, attend(alone), columns[rows, there], present[rows, there])
        got = finish(fit_by_parts(problem, Own(own, sinks=of_own), columns, present, 240))
        torch.testing.assert_close(got.bias[rows, there], wanted.bias, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(got.values[rows, there], wanted.values, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("most", [120, 100])
def test_parts_answer_nearly_as_well_as_the_whole(most):
    problem = draw(queries=600)
    columns, present, own = chosen(problem, [60, 45])
    held_out = draw(seed=5).queries
    at_once = finish(fit_by_parts(problem, Own(own), columns, present, 240))
    by_parts = finish(fit_by_parts(problem, Own(own), columns, present, most))
    plain = problem.values.gather(1, columns[..., None].expand(-1, -1, SIZE))
    whole = errors(problem, held_out, columns, present, at_once.bias, at_once.values)
    parts = errors(problem, held_out, columns, present, by_parts.bias, by_parts.values)
    pruned = errors(problem, held_out, columns, present, torch.zeros_like(at_once.bias), plain)
    for one, other, without in zip(whole, parts, pruned, strict=True):
        assert other < 2 * one and other < without / 2


def test_a_part_has_so_many_kept_columns_on_average():
    problem = draw()
    columns, present, own = chosen(problem, [60, 45])
    got = finish(fit_by_parts(problem, Own(own), columns, present, 240, 20))
    wanted = finish(fit_by_parts(problem, Own(own), columns, present, 80))
    assert torch.equal(got.bias, wanted.bias) and torch.equal(got.values, wanted.values)
    whole = finish(fit_by_parts(problem, Own(own), columns, present, 240, 60))
    assert torch.equal(whole.values, finish(fit_by_parts(problem, Own(own), columns, present, 240)).values)
    assert not torch.equal(whole.values, wanted.values)


def test_where_each_part_can_be_matched_exactly_the_whole_is():
    # Each part has ten different keys, eight times each, whose values differ.
    generator = torch.Generator().manual_seed(1)
    distinct = torch.randn(2, 20, SIZE, generator=generator)
    keys = distinct.repeat_interleave(8, 1)  # the first eighty columns are of the first ten keys
    values = torch.randn(2, 160, SIZE, generator=generator)
    problem = Problem(keys, values, torch.randn(2, 300, SIZE, generator=generator) * 2, SCALE)
    columns = torch.arange(0, 160, 8).expand(2, -1).contiguous()
    present = torch.ones_like(columns, dtype=torch.bool)
    own = torch.randn(2, 20, SIZE, generator=generator)
    solved = finish(fit_by_parts(problem, Own(own), columns, present, 80, bias_ridge=1e-9, value_ridge=1e-7))
    torch.testing.assert_close(solved.bias, torch.full_like(solved.bias, 8.0).log(), atol=2e-2, rtol=0)
    means = values.unflatten(1, (20, 8)).mean(2)
    torch.testing.assert_close(solved.values, means, atol=2e-2, rtol=0)


def test_heads_of_different_counts_are_matched_as_they_are_alone():
    problem = draw(heads=3)
    counts = [50, 7, 33]
    columns, present, own = chosen(problem, counts)
    together = finish(fit_by_parts(problem, Own(own), columns, present, 70))
    assert not together.values[~present].any() and not together.bias[~present].any()
    for head, count in enumerate(counts):
        rows = slice(head, head + 1)
        alone = Problem(problem.keys[rows], problem.values[rows], problem.queries[rows], SCALE)
        there = present[head]
        assert int(there.sum()) == count
        single = finish(
            fit_by_parts(alone, Own(own[rows, there]), columns[rows, there], there[None, there], 70)
        )
        torch.testing.assert_close(together.bias[rows, there], single.bias, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(together.values[rows, there], single.values, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("tokens", [240, 237])
@pytest.mark.parametrize("features", ["plain", "limits", "sinks", "bias"])
def test_parts_together_are_matched_as_each_is_alone(monkeypatch, tokens, features):
    generator = torch.Generator().manual_seed(3)
    problem, own = draw(tokens), draw(queries=40, seed=9).queries
    columns = torch.stack([torch.randperm(tokens, generator=generator)[:40].sort().values for _ in "ab"])
    present = (torch.arange(40) < torch.tensor([[40], [25]])).contiguous()
    limits = sinks = of_own = None
    if features == "limits":
        drawn = torch.randint(30, tokens + 1, (2, 190), generator=generator)
        problem, limits = replace(problem, limits=drawn[:, :150]), drawn[:, 150:]
    elif features == "sinks":
        sinks = drawn_sinks(190, heads=2)
        problem, of_own = replace(problem, sinks=sinks[:, :150]), sinks[:, 150:]
    elif features == "bias":
        problem = replace(problem, bias=torch.randn(2, tokens, generator=generator))
    asked = problem, Own(own, limits, of_own), columns, present, 70
    got, chosen = finish(fit_by_parts(*asked)), finish(select_by_parts(*asked, leading=3))
    monkeypatch.setattr(parts_module, "parts_at_once", lambda *_, **__: 1)
    wanted, alone = finish(fit_by_parts(*asked)), finish(select_by_parts(*asked, leading=3))
    torch.testing.assert_close(got.bias, wanted.bias, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(got.values, wanted.values, atol=2e-3, rtol=2e-3)
    assert all(map(torch.equal, chosen, alone))


def test_a_part_without_a_kept_column_is_left_out():
    problem = draw()
    columns = torch.tensor([[1, 2, 3], [1, 2, 200]])
    present = torch.ones_like(columns, dtype=torch.bool)
    own = draw(seed=3).queries[:, :3]
    solved = finish(fit_by_parts(problem, Own(own), columns, present, 80))
    assert bool(torch.isfinite(solved.bias).all() and torch.isfinite(solved.values).all())


def test_queries_see_the_columns_of_a_part_below_their_limits():
    limits = torch.randint(1, 241, (2, 150), generator=torch.Generator().manual_seed(2))
    problem = draw(limits=limits)
    columns, present, own = chosen(problem, [40, 25])
    own_limits = columns + 1
    one = finish(fit_by_parts(problem, Own(own, own_limits), columns, present, 120))
    # Whatever lies beyond every limit counts for nothing: here all of the second part.
    below = limits.clamp(max=120)
    values = problem.values.clone()
    cut = Problem(problem.keys, values, problem.queries, SCALE, limits=below)
    first = finish(fit_by_parts(cut, Own(own, own_limits.clamp(max=120)), columns, present, 120))
    values[:, 120:] = 99.0
    again = finish(fit_by_parts(cut, Own(own, own_limits.clamp(max=120)), columns, present, 120))
    in_first = present & (columns < 120)
    assert torch.equal(first.values[in_first], again.values[in_first])
    assert not torch.allclose(one.values[in_first], first.values[in_first])


@pytest.mark.parametrize(("limited", "sunk"), [(False, False), (True, False), (False, True)])
def test_a_part_is_matched_to_its_columns_with_all_others_as_a_sink(limited, sunk):
    drawn = draw(heads=1)
    generator = torch.Generator().manual_seed(2)
    limits = torch.randint(30, 241, (1, 150), generator=generator) if limited else None
    sinks = drawn_sinks(190, heads=1)
    of_queries, of_own = (sinks[:, :150], sinks[:, 150:]) if sunk else (None, None)
    problem = Problem(drawn.keys, drawn.values, drawn.queries, SCALE, limits=limits, sinks=of_queries)
    columns, present, own = chosen(drawn, [40])
    own_limits = torch.randint(30, 241, (1, 40), generator=generator) if limited else None
    got = finish(fit_by_parts(problem, Own(own, own_limits, of_own), columns, present, 120))
    for begin, end in ((0, 120), (120, 240)):
        inside = (columns[0] >= begin) & (columns[0] < end)
        assert 0 < int(inside.sum()) < 40
        queries = torch.cat([drawn.queries, own[:, inside]], 1)
        logits = queries[0].double() @ drawn.keys[0].double().T * SCALE
        of_part = None
        if limited:
            seen = torch.cat([limits, own_limits[:, inside]], 1)
            logits.masked_fill_(torch.arange(240) >= seen[0, :, None], -torch.inf)
            of_part = (seen - begin).clamp(min=0)
        beside = torch.cat([logits[:, :begin], logits[:, end:]], 1)
        if sunk:
            sink = torch.cat([sinks[0, :150], sinks[0, 150:][inside]])
            beside = torch.cat([beside, sink[:, None].double()], 1)
        beside, rows = beside.logsumexp(1), slice(begin, end)
        alone = Problem(
            drawn.keys[:, rows],
            drawn.values[:, rows],
            queries,
            SCALE,
            sinks=beside[None].float(),
            limits=of_part,
        )
        wanted = fit(alone, attend(alone), columns[:, inside] - begin, present[:, inside])
        torch.testing.assert_close(got.bias[:, inside], wanted.bias, atol=5e-3, rtol=5e-3)
        torch.testing.assert_close(got.values[:, inside], wanted.values, atol=5e-3, rtol=5e-3)


def test_tokens_are_pursued_in_each_part_with_all_others_as_a_sink():
    drawn = draw(heads=1)
    columns, present, own = chosen(drawn, [40])
    got, there = finish(select_by_parts(drawn, Own(own), columns, present, 120, leading=3))
    assert there.all() and bool((got.diff(dim=1) > 0).all()), "ascending, each once"
    assert got[0, :3].tolist() == [0, 1, 2]
    assert 10 < len(set(got[0].tolist()) & set(columns[0].tolist())) < 40, "other tokens than those"
    for begin, end in ((0, 120), (120, 240)):
        inside = (columns[0] >= begin) & (columns[0] < end)
        queries = torch.cat([drawn.queries, own[:, inside]], 1)
        logits = queries[0].double() @ drawn.keys[0].double().T * SCALE
        beside = torch.cat([logits[:, :begin], logits[:, end:]], 1).logsumexp(1)
        rows = slice(begin, end)
        of_part, beside = (drawn.keys[:, rows], drawn.values[:, rows]), beside[None].float()
        alone = Problem(*of_part, queries, SCALE, sinks=beside)
        count = inside.sum()[None]
        wanted, _ = select_omp(alone, attend(alone), count, leading=3 if begin == 0 else 0)
        in_part = got[0][(got[0] >= begin) & (got[0] < end)]
        assert (wanted[0].sort().values + begin).tolist() == in_part.tolist()


def test_what_is_pursued_of_heads_of_different_counts_is_what_is_of_each_alone():
    problem, counts = draw(heads=3), [50, 7, 33]
    columns, present, own = chosen(problem, counts)
    together, there = finish(select_by_parts(problem, Own(own), columns, present, 70))
    assert torch.equal(there.sum(1), torch.tensor(counts))
    for head in range(3):
        rows, kept = slice(head, head + 1), present[head]
        alone = Problem(problem.keys[rows], problem.values[rows], problem.queries[rows], SCALE)
        one, _ = finish(
            select_by_parts(alone, Own(own[rows, kept]), columns[rows, kept], kept[None, kept], 70)
        )
        assert together[head][there[head]].tolist() == one[0].tolist()


def test_what_keeps_all_of_its_tokens_loses_none_beside_a_longer_part():
    problem, own = draw(237), draw(queries=237, seed=9).queries
    columns = torch.arange(237).expand(2, -1).contiguous()
    got, there = finish(select_by_parts(problem, Own(own), columns, columns >= 0, 70))
    assert there.all() and torch.equal(got, columns)
