"""Allocations spend the page budget exactly, starve no head, and are optimal for their objective."""

import functools
import itertools
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_kvcompress.allocation import (
    ALLOCATIONS,
    Adaptive,
    Allocation,
    Global,
    Profile,
    Uniform,
    get_allocation,
    select,
    whole_pages,
)

FOLDER = tempfile.TemporaryDirectory(prefix="head-profiles-")


def write_profile(path: Path, shares, budgets=(0.25,), **changes) -> str:
    """A head profile as a file; `shares` is `[budgets][L][H]`."""
    content = {"version": 1, "model": "tiny", "budgets": budgets, "shares": shares}
    content |= {"num_layers": len(shares[0]), "num_kv_heads": len(shares[0][0])} | changes
    path.write_text(json.dumps(content))
    return str(path)


@functools.cache
def any_profile(layers: int, heads: int, even: bool = False) -> str:
    """A file whose shares are even, or very skewed, some of them zero."""
    draw = torch.Generator().manual_seed(layers * 100 + heads)
    shares = torch.ones(2, layers, heads)
    if not even:
        shares = torch.rand(shares.shape, generator=draw) ** 4 * (
            torch.rand(shares.shape, generator=draw) > 0.2
        )
        shares[:, 0, 0] += 0.01
    return write_profile(Path(FOLDER.name, f"{layers}-{heads}-{even}.json"), shares.tolist(), (0.5, 0.1))


def made(name: str, scores: torch.Tensor, even: bool = False) -> Allocation:
    """The allocation of that name, for a model whose heads have these scores."""
    cls = ALLOCATIONS[name]
    return cls(any_profile(*scores.shape[:2], even)) if cls is Profile else cls()


@st.composite
def problems(draw, max_layers=4, max_heads=4, max_pages=6):
    layers, heads = draw(st.integers(1, max_layers)), draw(st.integers(1, max_heads))
    largest, page = draw(st.integers(1, max_pages)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    scores = torch.rand(layers, heads, largest * page, generator=generator)
    if draw(st.booleans()):
        scores = (scores * 3).round()  # many ties
    num_sinks = draw(st.integers(0, min(3, largest * page)))
    scores[..., :num_sinks] = torch.inf
    smallest = max(1, -(-num_sinks // page))
    pages = draw(st.integers(layers * heads * smallest, layers * heads * largest))
    return scores, pages, page, num_sinks


@pytest.mark.parametrize("name", ALLOCATIONS)
@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_the_budget_is_spent_exactly_and_protected_tokens_are_kept(name, problem):
    scores, num_pages, page, num_sinks = problem
    counts = made(name, scores).allocate(scores, num_pages, page)
    assert counts.dtype == torch.int64 and counts.shape == scores.shape[:2]
    assert int(counts.sum()) == num_pages
    assert int(counts.min()) >= 1 and int(counts.max()) <= scores.shape[-1] // page
    kept = select(scores, counts, page)
    assert kept.shape == (num_pages, page)
    for run in kept.split(counts.flatten().tolist()):
        assert set(range(num_sinks)) <= set(run.flatten().tolist())


@settings(max_examples=60, deadline=None)
@given(problem=problems(max_layers=2, max_heads=2, max_pages=4))
def test_global_frees_the_cheapest_pages_of_all_splits(problem):
    scores, num_pages, page, num_sinks = problem
    layers, heads, num_tokens = scores.shape
    largest, smallest = num_tokens // page, max(1, -(-num_sinks // page))
    ascending = scores.view(-1, num_tokens).sort(-1).values

    def cost(counts) -> float:
        return sum(
            float(ascending[head, (i + 1) * page - 1])
            for head, count in enumerate(counts)
            for i in range(largest - count)
        )

    best = min(
        cost(split)
        for split in itertools.product(range(smallest, largest + 1), repeat=layers * heads)
        if sum(split) == num_pages
    )
    found = cost(Global().allocate(scores, num_pages, page).flatten().tolist())
    assert found == pytest.approx(best, rel=1e-6)


def slow_adaptive(scores, pages, page, alpha, smallest):
    """Ada-KV in one layer, token by token, then the whole-page split closest to it (brute force)."""
    heads, num_tokens = scores.shape
    tokens = sorted(
        ((-float(scores[h, t]), h, t) for h in range(heads) for t in range(num_tokens)),
    )[: pages * page]
    wanted = [
        ((1 - alpha) * sum(h == head for _, h, _ in tokens) + alpha * pages * page / heads) / page
        for head in range(heads)
    ]
    splits = [
        split
        for split in itertools.product(range(smallest, num_tokens // page + 1), repeat=heads)
        if sum(split) == pages
    ]
    return wanted, min(sum((w - c) ** 2 for w, c in zip(wanted, split, strict=True)) for split in splits)


@settings(max_examples=60, deadline=None)
@given(problem=problems(max_layers=1, max_heads=4, max_pages=4), alpha=st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_adaptive_is_the_whole_page_split_closest_to_ada_kv(problem, alpha):
    scores, num_pages, page, num_sinks = problem
    counts = Adaptive(alpha=alpha).allocate(scores, num_pages, page)[0].tolist()
    smallest = max(1, -(-num_sinks // page))
    wanted, best = slow_adaptive(scores[0], num_pages, page, alpha, smallest)
    assert sum((w - c) ** 2 for w, c in zip(wanted, counts, strict=True)) == pytest.approx(best, abs=1e-4)


def test_adaptive_gives_every_layer_the_same_share():
    scores = torch.rand(3, 4, 64)
    scores[0] += 10
    assert Adaptive().allocate(scores, 3 * 4 * 2, 8).sum(-1).tolist() == [8, 8, 8]


def test_uniform_is_even():
    assert Uniform().allocate(torch.rand(2, 2, 80), 11, 10).tolist() == [[3, 3], [3, 2]]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_whole_pages_keep_their_sum_and_stay_within_one_page_where_bounds_allow(data):
    wanted = torch.tensor(data.draw(st.lists(st.floats(1, 6), min_size=1, max_size=6)), dtype=torch.float64)
    pages = round(float(wanted.sum()))
    if not len(wanted) <= pages <= 6 * len(wanted):
        return
    counts = whole_pages(
        wanted, pages, torch.ones(len(wanted), dtype=torch.int64), torch.full((len(wanted),), 6)
    )
    assert int(counts.sum()) == pages and int(counts.min()) >= 1 and int(counts.max()) <= 6


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("num_pages", [3, 17])
def test_an_impossible_budget_is_refused(name, num_pages):
    with pytest.raises(ValueError, match="cannot be split"):
        made(name, torch.rand(2, 2, 32)).allocate(torch.rand(2, 2, 32), num_pages, 8)


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_select_takes_the_highest_scores_in_position_order(problem):
    scores, num_pages, page, _ = problem
    counts = Global().allocate(scores, num_pages, page)
    kept = select(scores, counts, page).split(counts.flatten().tolist())
    for head, run in enumerate(kept):
        row = scores.view(-1, scores.shape[-1])[head].tolist()
        best = sorted(range(len(row)), key=lambda t: (-row[t], t))[: run.numel()]
        assert run.flatten().tolist() == sorted(best)


@pytest.mark.parametrize("name", ALLOCATIONS)
@settings(max_examples=60, deadline=None)
@given(problem=problems(), data=st.data())
def test_heads_with_protected_tokens_of_their_own_get_room_for_them(name, problem, data):
    scores, _, page, _ = problem
    layers, heads, num_tokens = scores.shape
    amounts = st.lists(st.integers(0, num_tokens), min_size=layers * heads, max_size=layers * heads)
    protected = data.draw(amounts)
    scores = scores.nan_to_num(posinf=9.0)
    for row, amount in zip(scores.view(-1, num_tokens), protected, strict=True):
        row[torch.randperm(num_tokens, generator=torch.Generator().manual_seed(amount))[:amount]] = torch.inf
    needed = [[max(1, -(-protected[x * heads + y] // page)) for y in range(heads)] for x in range(layers)]
    # Layers share evenly before their heads compete, but never get less than their heads need.
    num_pages = data.draw(st.integers(sum(map(sum, needed)), layers * heads * num_tokens // page))
    counts = made(name, scores).allocate(scores, num_pages, page)
    assert int(counts.sum()) == num_pages
    assert (counts >= torch.tensor(needed)).all() and int(counts.max()) <= num_tokens // page
    runs = select(scores, counts, page).split(counts.flatten().tolist())
    for row, run in zip(scores.view(-1, num_tokens), runs, strict=True):
        assert set(row.isposinf().nonzero().flatten().tolist()) <= set(run.flatten().tolist())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whole_pages_are_the_closest_split_within_the_bounds(data):
    heads, largest = data.draw(st.integers(1, 4)), 4
    wanted = data.draw(st.lists(st.floats(0, 6, width=32), min_size=heads, max_size=heads))
    smallest = data.draw(st.lists(st.integers(1, largest), min_size=heads, max_size=heads))
    pages = data.draw(st.integers(sum(smallest), heads * largest))
    counts = whole_pages(
        torch.tensor(wanted), pages, torch.tensor(smallest), torch.full((len(wanted),), largest)
    ).tolist()

    def distance(split) -> float:
        return sum((w - c) ** 2 for w, c in zip(wanted, split, strict=True))

    splits = itertools.product(*(range(low, largest + 1) for low in smallest))
    best = min(distance(split) for split in splits if sum(split) == pages)
    assert sum(counts) == pages and all(low <= c for low, c in zip(smallest, counts, strict=True))
    assert distance(counts) == pytest.approx(best, abs=1e-4)


# ---------------------------------------------------------------------- heads that hold fewer tokens


@st.composite
def uneven_problems(draw, max_layers=3, max_heads=4, largest=4):
    """Heads that hold as many pages of tokens as their capacity says, some of them protected."""
    layers, heads, page = (
        draw(st.integers(1, max_layers)),
        draw(st.integers(1, max_heads)),
        draw(st.integers(1, 4)),
    )
    cells = layers * heads
    capacity = draw(st.lists(st.integers(1, largest), min_size=cells, max_size=cells))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    scores = torch.rand(cells, largest * page, generator=generator)
    if draw(st.booleans()):
        scores = (scores * 3).round()  # many ties
    needed = []
    for row, most in zip(scores, capacity, strict=True):
        first = (largest - most) * page
        protected = draw(st.integers(0, most * page))
        row[:first], row[first : first + protected] = -torch.inf, torch.inf
        needed.append(max(1, -(-protected // page)))
    pages = draw(st.integers(sum(needed), sum(capacity)))
    shape = layers, heads
    return (
        scores.view(*shape, -1),
        pages,
        page,
        torch.tensor(capacity).view(shape),
        torch.tensor(needed).view(shape),
    )


@pytest.mark.parametrize("name", [name for name, cls in ALLOCATIONS.items() if cls.argument is None])
@settings(max_examples=60, deadline=None)
@given(problem=uneven_problems())
def test_the_budget_is_spent_within_what_each_head_holds(name, problem):
    scores, num_pages, page, capacity, needed = problem
    counts = ALLOCATIONS[name]().allocate(scores, num_pages, page, capacity)
    assert counts.dtype == torch.int64 and counts.shape == capacity.shape
    assert int(counts.sum()) == num_pages
    assert (counts >= needed).all() and (counts <= capacity).all()
    runs = select(scores, counts, page).split(counts.flatten().tolist())
    for row, most, run in zip(scores.flatten(0, 1), capacity.flatten().tolist(), runs, strict=True):
        tokens = run.flatten().tolist()
        first = len(row) - most * page
        assert min(tokens) >= first, "a column that holds nothing"
        best = sorted(range(first, len(row)), key=lambda t: (-float(row[t]), t))[: len(tokens)]  # noqa: B023
        assert tokens == sorted(best)


@settings(max_examples=60, deadline=None)
@given(problem=uneven_problems(max_layers=2, max_heads=2))
def test_global_frees_the_cheapest_pages_that_are_held(problem):
    scores, num_pages, page, capacity, needed = problem
    bounds = list(zip(needed.flatten().tolist(), capacity.flatten().tolist(), strict=True))
    held = [
        sorted(row.tolist())[-most * page :]
        for row, (_, most) in zip(scores.flatten(0, 1), bounds, strict=True)
    ]

    def cost(counts) -> float:
        return sum(
            tokens[(i + 1) * page - 1]
            for tokens, count in zip(held, counts, strict=True)
            for i in range(len(tokens) // page - count)
        )

    splits = itertools.product(*(range(least, most + 1) for least, most in bounds))
    best = min(cost(split) for split in splits if sum(split) == num_pages)
    counts = Global().allocate(scores, num_pages, page, capacity)
    assert cost(counts.flatten().tolist()) == pytest.approx(best, rel=1e-6, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(problem=uneven_problems(max_layers=1, max_heads=4), alpha=st.sampled_from([0.0, 0.2, 1.0]))
def test_adaptive_is_the_closest_split_that_the_heads_can_fill(problem, alpha):
    scores, num_pages, page, capacity, needed = problem
    wanted, _ = slow_adaptive(scores[0], num_pages, page, alpha, 0)
    splits = itertools.product(
        *(range(low, high + 1) for low, high in zip(needed[0].tolist(), capacity[0].tolist(), strict=True))
    )
    distance = {
        split: sum((w - c) ** 2 for w, c in zip(wanted, split, strict=True))
        for split in splits
        if sum(split) == num_pages
    }
    counts = Adaptive(alpha=alpha).allocate(scores, num_pages, page, capacity)[0].tolist()
    assert distance[tuple(counts)] == pytest.approx(min(distance.values()), abs=1e-4)


@pytest.mark.parametrize("name", [name for name, cls in ALLOCATIONS.items() if cls.argument is None])
def test_a_full_capacity_is_as_none(name):
    scores = torch.rand(3, 2, 32)
    full = torch.full((3, 2), 8)
    for pages in (6, 20, 48):
        counts = ALLOCATIONS[name]().allocate(scores, pages, 4, full)
        assert torch.equal(counts, ALLOCATIONS[name]().allocate(scores, pages, 4))


@pytest.mark.parametrize("name", [name for name, cls in ALLOCATIONS.items() if cls.argument is None])
def test_more_pages_than_the_heads_hold_are_refused(name):
    scores = torch.rand(1, 2, 32)
    scores[0, 1, :16] = -torch.inf
    capacity = torch.tensor([[4, 2]])
    assert ALLOCATIONS[name]().allocate(scores, 6, 8, capacity).tolist() == [[4, 2]]
    with pytest.raises(ValueError, match="can fill 6; lower budget"):
        ALLOCATIONS[name]().allocate(scores, 7, 8, capacity)


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_equal_scores_favour_the_earlier_head(name):
    scores = torch.zeros(1, 4, 32)
    counts = made(name, scores, even=True).allocate(scores, 10, 8)[0]
    assert int(counts.sum()) == 10 and (counts.diff() <= 0).all()


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_a_head_without_numbers_breaks_neither_the_budget_nor_the_other_heads(name):
    scores = torch.rand(2, 2, 32)
    scores[0, 1, 3:] = torch.nan
    scores[..., :2] = torch.inf
    counts = made(name, scores).allocate(scores, 8, 4)
    assert int(counts.sum()) == 8 and int(counts.min()) >= 1
    runs = select(scores, counts, 4).split(counts.flatten().tolist())
    assert {0, 1, 2} <= set(runs[1].flatten().tolist())
    best = scores[1, 0].sort(descending=True).indices[: runs[2].numel()]
    assert runs[2].flatten().tolist() == sorted(best.tolist())


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_what_is_no_number_ranks_below_every_number(name):
    scores = torch.rand(2, 2, 32, generator=torch.Generator().manual_seed(0)) - 1
    scores[..., ::3] = torch.nan
    lowest = scores.nan_to_num(nan=-torch.inf)
    counts = made(name, scores).allocate(scores, 12, 4)
    assert torch.equal(counts, made(name, scores).allocate(lowest, 12, 4))
    assert torch.equal(select(scores, counts, 4), select(lowest, counts, 4))


def test_allocating_and_selecting_leave_the_scores_alone():
    scores = torch.rand(2, 2, 32)
    before = scores.clone()
    for allocation in ALLOCATIONS.values():
        select(scores, made(allocation.name, scores).allocate(scores, 8, 4), 4)
    assert torch.equal(scores, before)


def test_an_allocation_is_found_by_its_name():
    assert get_allocation("global") is Global
    with pytest.raises(ValueError, match="use one of uniform, adaptive, pyramid, global, profile"):
        get_allocation("globe")


def test_pyramid_falls_on_a_line_and_spends_exactly_the_budget():
    # 5 layers of 2 heads, 64 tokens in pages of 4; 80 pages: a mean of 32 tokens, the last layer ⌊32/20⌋ = 1,
    # the first 63, so the line is 63, 47.5, 32, 16.5, 1 tokens.
    counts = ALLOCATIONS["pyramid"]().allocate(torch.rand(5, 2, 64), 80, 4)
    assert int(counts.sum()) == 80
    for layer, tokens in zip(counts.tolist(), [63, 47.5, 32, 16.5, 1], strict=True):
        for pages in layer:
            assert abs(4 * pages - tokens) <= 4


def test_a_pyramid_that_would_overflow_is_cut_at_all_tokens():
    # A mean of 40 of 64 tokens: the first layer would get 78, so it gets 64 and the last 16.
    counts = ALLOCATIONS["pyramid"]().allocate(torch.rand(3, 1, 64), 30, 4)
    assert counts.flatten().tolist() == [16, 10, 4]


def test_pyramid_of_one_layer_is_the_mean():
    assert ALLOCATIONS["pyramid"]().allocate(torch.rand(1, 2, 64), 8, 4).tolist() == [[4, 4]]


def test_a_pyramid_needs_a_positive_beta():
    with pytest.raises(ValueError, match="beta must be at least 1"):
        ALLOCATIONS["pyramid"](beta=0)


# ---------------------------------------------------------------------- head profiles


def test_a_profile_gives_each_head_its_share(tmp_path):
    path = write_profile(tmp_path / "p.json", [[[2, 1], [0.5, 0.5]]])
    assert Profile(path).allocate(torch.rand(2, 2, 400), 40, 4).tolist() == [[20, 10], [5, 5]]


def test_what_one_head_cannot_take_the_others_share_in_proportion(tmp_path):
    path = write_profile(tmp_path / "p.json", [[[10, 2, 1, 0.001]]])
    # The first head is full at 20 pages and the last one keeps a page; 12 remain, for 2 : 1.
    assert Profile(path).allocate(torch.rand(1, 4, 80), 33, 4).tolist() == [[20, 8, 4, 1]]


def test_the_host_reads_no_page_that_a_profile_wants(tmp_path):
    path = write_profile(tmp_path / "p.json", [[[2, 1]], [[1, 1]]], (0.5, 0.125))
    names = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function._schema.name)
            return function(*args, **(kwargs or {}))

    profile, ones = Profile(path), torch.ones(2, 2, dtype=torch.int64)
    with Operations():
        wanted = profile.wanted(torch.tensor([10, 6]), ones, 10 * ones)
    assert wanted[0].tolist() == pytest.approx([20 / 3, 10 / 3]) and len(names) < 80
    assert not {"aten::_local_scalar_dense", "aten::nonzero"} & {*names}


def slow_profile(shares, total, smallest, largest):
    """The level at which the heads' clamped shares add up to the total, by bisection."""
    shares = [max(share, 1e-6 * max(shares)) for share in shares]

    def at(level):
        bounds = zip(shares, smallest, largest, strict=True)
        return [min(max(level * share, low), high) for share, low, high in bounds]

    lower, upper = 0.0, 1e12
    for _ in range(300):
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if sum(at(middle)) < total else (lower, middle)
    return at(upper)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_profile_is_the_whole_page_split_closest_to_its_clamped_shares(data):
    heads, page, largest = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)), 4
    shares = data.draw(st.lists(st.floats(0, 8, width=16), min_size=heads, max_size=heads))
    shares[data.draw(st.integers(0, heads - 1))] += 0.5
    capacity = data.draw(st.lists(st.integers(1, largest), min_size=heads, max_size=heads))
    sinks = [data.draw(st.integers(0, most * page)) for most in capacity]
    smallest = [max(1, -(-count // page)) for count in sinks]
    scores = torch.rand(1, heads, largest * page)
    for row, count, most in zip(scores[0], sinks, capacity, strict=True):
        first = (largest - most) * page
        row[:first], row[first : first + count] = -torch.inf, torch.inf
    total = data.draw(st.integers(sum(smallest), sum(capacity)))
    path = write_profile(Path(FOLDER.name, "drawn.json"), [[shares]], num_layers=1)
    counts = Profile(path).allocate(scores, total, page, torch.tensor([capacity]))[0].tolist()

    wanted = slow_profile(shares, total, smallest, capacity)
    assert sum(wanted) == pytest.approx(total, rel=1e-6)
    splits = itertools.product(*(range(low, high + 1) for low, high in zip(smallest, capacity, strict=True)))
    distances = {
        split: sum((w - c) ** 2 for w, c in zip(wanted, split, strict=True))
        for split in splits
        if sum(split) == total
    }
    assert distances[tuple(counts)] == pytest.approx(min(distances.values()), abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(problem=problems(), data=st.data())
def test_a_larger_share_never_gets_fewer_pages(problem, data):
    scores, num_pages, page, _ = problem
    layers, heads, _ = scores.shape
    drawn = st.lists(st.integers(0, 100), min_size=layers * heads, max_size=layers * heads)
    shares = torch.tensor(data.draw(drawn))
    shares[0] += 1
    path = write_profile(Path(FOLDER.name, "sorted.json"), [shares.view(layers, heads).tolist()])
    counts = Profile(path).allocate(scores, num_pages, page).flatten()
    assert int(counts.sum()) == num_pages
    for one, other in itertools.combinations(range(layers * heads), 2):
        if shares[one] != shares[other]:
            assert (shares[one] > shares[other]) == (counts[one] > counts[other]) or counts[one] == counts[
                other
            ]


@pytest.mark.parametrize(
    ("budget", "expected"), [(0.5, [4, 4]), (0.25, [3, 2]), (0.125, [2, 0]), (0.01, [2, 0]), (0.9, [4, 4])]
)
def test_shares_are_linear_in_the_logarithm_of_the_budget(tmp_path, budget, expected):
    path = write_profile(tmp_path / "p.json", [[[4, 4]], [[2, 0]]], (0.5, 0.125))
    shares = Profile(path).profile.at(torch.tensor([0.3, budget]))
    assert shares.shape == (2, 1, 2) and shares[1, 0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no head profile"),
        ("not json", "is not a head profile"),
        ("[1, 2]", "is not a head profile"),
        ("{}", "is not a head profile"),
        ({"version": 2}, "has version 2, and this package reads version 1"),
        ({"num_layers": 3}, "is damaged"),
        ({"shares": "many"}, "is damaged"),
        ({"shares": [[[1, -1], [1, 1]]]}, "is damaged"),
        ({"shares": [[[1, float("nan")], [1, 1]]]}, "is damaged"),
        ({"shares": [[[0, 0], [0, 0]]]}, "is damaged"),
        ({"shares": [[[1, 1], [1]]]}, "is damaged"),
        ({"budgets": [0.0]}, "is damaged"),
        ({"budgets": []}, "is damaged"),
        ({"budgets": [0.5, 0.25]}, "is damaged"),
        ({"budgets": None}, "is damaged"),
        ({"model": None, "num_kv_heads": None}, "is damaged"),
    ],
    ids=str,
)
def test_a_profile_that_cannot_be_read_is_one_line(tmp_path, content, says):
    path = tmp_path / "p.json"
    if isinstance(content, dict):
        write_profile(path, [[[1, 1], [1, 1]]])
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    elif content is not None:
        path.write_text(content)
    with pytest.raises(ValueError) as caught:
        Profile(str(path))
    assert says in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_profile_is_for_models_of_its_shape(tmp_path):
    profile = Profile(write_profile(tmp_path / "p.json", [[[1, 1], [1, 1]]]))
    profile.check_model(2, 2)
    with pytest.raises(ValueError, match="is for 2 layers of 2 KV heads, but .* has 2 of 1; use"):
        profile.check_model(2, 1)
    with pytest.raises(ValueError, match="is for 2 layers"):
        profile.allocate(torch.rand(1, 2, 32), 4, 8)
    Uniform().check_model(2, 1)


def test_a_profile_is_read_once_and_again_when_it_has_changed(tmp_path, monkeypatch):
    reads = []
    read_text = Path.read_text
    path = write_profile(tmp_path / "p.json", [[[1, 3]]])
    monkeypatch.setattr(Path, "read_text", lambda self: reads.append(self) or read_text(self))
    before, again = Profile(path), Profile(path)
    assert len(reads) == 1 and before == again
    write_profile(tmp_path / "p.json", [[[3, 1]]])
    os.utime(path, ns=(1, 1))
    assert Profile(path).allocate(torch.rand(1, 2, 80), 8, 4).tolist() == [[6, 2]]
    assert len(reads) == 2
    (tmp_path / "p.json").unlink()
    assert before.allocate(torch.rand(1, 2, 80), 8, 4).tolist() == [[2, 6]]  # what has been read stays


def test_profiles_of_the_package_go_by_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr("vllm_kvcompress.profiles.FOLDER", tmp_path)
    write_profile(tmp_path / "tiny-model.json", [[[1, 3]]])
    assert Profile("tiny-model").profile.shape == (1, 2)
    with pytest.raises(ValueError, match=r"there is no head profile huge-model: .*\(tiny-model\)$"):
        Profile("huge-model")
