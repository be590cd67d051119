"""Pages per head and kept tokens are those that `allocation` decides on, ties included."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_kvcompress import allocation
from vllm_kvcompress.kernels import selection
from vllm_kvcompress.kernels.selection import adaptive_counts, global_counts, select_columns, whole_pages

LOWEST = torch.finfo(torch.float32).min
SCORES = {
    "distinct": lambda shape: torch.randn(shape),
    "tiny": lambda shape: torch.rand(shape) * 1e-40,  # denormal numbers
    "tied": lambda shape: torch.randint(-1, 3, shape).float(),
    "equal": lambda shape: torch.full(shape, -2.5),
    "zeros": lambda shape: torch.randint(-1, 2, shape) * torch.tensor(0.0),  # -0 equals 0
    "extreme": lambda shape: torch.tensor([LOWEST, -LOWEST, 1.0, -torch.inf, torch.nan])[
        torch.randint(0, 5, shape)
    ],
}
KINDS = pytest.mark.parametrize("kind", SCORES)
jobs = st.builds(
    dict,
    jobs=st.integers(1, 2),
    layers=st.integers(1, 2),
    heads=st.integers(1, 3),
    page_size=st.sampled_from([1, 2, 16, 48]),
    pages=st.integers(1, 7),
    sinks=st.integers(0, 5),
    ragged=st.booleans(),
    spread=st.floats(0, 1),
    seed=st.integers(0, 1000),
)


def random_jobs(kind, jobs, layers, heads, page_size, pages, sinks, ragged, spread, seed):
    """Scores `[J, L, H, T]`, pages `[J]`, bounds `[J, L, H]` as `allocate` makes them; sinks protected."""
    torch.manual_seed(seed)
    scores = SCORES[kind]((jobs, layers, heads, pages * page_size))
    largest = torch.full(scores.shape[:3], pages)
    if ragged:
        largest = torch.randint(1, pages + 1, scores.shape[:3])
    column = torch.arange(scores.shape[3])
    first = ((pages - largest) * page_size)[..., None]
    scores[column < first] = -torch.inf
    scores[(column >= first) & (column < first + sinks)] = torch.inf
    protected = scores.isposinf().sum(-1)
    smallest = ((protected + page_size - 1) // page_size).clamp(min=1)
    least, most = smallest.sum((1, 2)), largest.sum((1, 2))
    num_pages = least + (spread * (most - least)).long()
    return scores, num_pages, page_size, smallest, largest


def expected_counts(allocate, scores, num_pages, page_size, largest):
    own = zip(scores, num_pages.tolist(), largest, strict=True)
    return torch.stack([allocate.allocate(each, pages, page_size, most) for each, pages, most in own])


@pytest.fixture(autouse=True)
def short_tiles(monkeypatch):
    """So that rows need several, as long ones do."""
    monkeypatch.setattr(selection, "AT_ONCE", 256)


@KINDS
@settings(max_examples=3)
@given(jobs)
def test_global_counts_are_those_of_the_allocation(kind, case):
    scores, num_pages, page_size, smallest, largest = random_jobs(kind, **case)
    found = global_counts(scores, num_pages, page_size, smallest, largest)
    assert torch.equal(found, expected_counts(allocation.Global(), scores, num_pages, page_size, largest))


@KINDS
@settings(max_examples=3)
@given(jobs, st.sampled_from([0.0, 0.2, 0.37, 1.0]))
def test_adaptive_counts_are_those_of_the_allocation(kind, case, alpha):
    scores, num_pages, page_size, smallest, largest = random_jobs(kind, **case)
    found = adaptive_counts(scores, num_pages, page_size, smallest, largest, alpha)
    wanted = expected_counts(allocation.Adaptive(alpha), scores, num_pages, page_size, largest)
    assert torch.equal(found, wanted)


@settings(max_examples=30)
@given(jobs)
def test_an_even_split_is_that_of_the_uniform_allocation(case):
    scores, num_pages, page_size, smallest, largest = random_jobs("tied", **case)
    found = whole_pages(None, num_pages, smallest.flatten(1), largest.flatten(1))
    wanted = expected_counts(allocation.Uniform(), scores, num_pages, page_size, largest)
    assert torch.equal(found.view_as(wanted), wanted)


@KINDS
@settings(max_examples=3)
@given(jobs)
def test_columns_are_those_that_the_allocation_selects(kind, case):
    scores, num_pages, page_size, smallest, largest = random_jobs(kind, **case)
    counts = whole_pages(None, num_pages, smallest.flatten(1), largest.flatten(1)).flatten()
    columns, rows = select_columns(scores.flatten(0, 2), counts, page_size, int(counts.sum()))
    assert torch.equal(columns, allocation.select(scores.flatten(0, 1), counts, page_size))
    assert torch.equal(rows, torch.arange(len(counts)).repeat_interleave(counts))


@pytest.mark.parametrize("tile", [1024, selection.AT_ONCE])
def test_long_rows_are_counted_and_selected_whole(tile, monkeypatch):
    monkeypatch.setattr(selection, "AT_ONCE", tile)
    scores, num_pages, page_size, smallest, largest = random_jobs(
        "tied", 1, 1, 2, 16, 300, 4, ragged=True, spread=0.3, seed=1
    )
    found = global_counts(scores, num_pages, page_size, smallest, largest)
    wanted = expected_counts(allocation.Global(), scores, num_pages, page_size, largest)
    assert torch.equal(found, wanted)
    columns, _ = select_columns(scores.flatten(0, 2), found.flatten(), page_size, int(num_pages))
    assert torch.equal(columns, allocation.select(scores[0], found[0], page_size))


def test_positions_and_runs_follow_from_a_selection_as_documented():
    torch.manual_seed(0)
    counts = torch.tensor([2, 1, 0, 3])  # of two Jobs
    columns, rows = select_columns(torch.rand(4, 12), counts, 4, 6)
    padding, positions = torch.tensor([0, 4, 8, 0]), torch.randint(0, 99, (4, 12), dtype=torch.int32)
    start = torch.zeros(2, 3, dtype=torch.int32)
    torch.cumsum(counts.view(2, -1), 1, dtype=torch.int32, out=start[:, 1:])
    assert start.tolist() == [[0, 2, 3], [0, 0, 3]]
    found = positions[rows[:, None], columns], columns - padding[rows, None]
    for page, row in enumerate([0, 0, 1, 3, 3, 3]):
        assert torch.equal(found[0][page], positions[row, columns[page]])
        assert torch.equal(found[1][page], columns[page] - padding[row])


def test_a_row_without_pages_is_passed_over():
    columns, rows = select_columns(torch.ones(3, 8), torch.tensor([1, 0, 2]), 4, 3)
    assert columns.flatten().tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]
    assert rows.tolist() == [0, 2, 2]


heads = st.tuples(
    st.sampled_from([0, 5, 48, 53, 101, 149, 287]), st.sampled_from([0, 0, 1, 5, 40]), st.integers(0, 9)
)


@settings(max_examples=20)
@given(
    st.lists(st.lists(heads, min_size=1, max_size=9), min_size=1, max_size=2),
    st.floats(0, 1),
    st.sampled_from([torch.float32, torch.float64]),
)
@example([[(101, 5, 3), (5, 0, 8)]], 0.75, torch.float64)
@example([[(0, 40, 9), (144, 0, 0), (287, 0, 9)]], 1.0, torch.float32)
@example([[(149, 0, 9)] * 3], 0.26, torch.float32)  # loses two pages
@example([[(149, 0, 9)] * 3], 0.41, torch.float32)  # gains two
def test_pages_are_rounded_as_the_allocation_does(rows, spread, dtype):
    """Wanted are 48ths of pages, so that there are ties, beside bounds that need not be near them.

    They are such that adding pages to them does not round: otherwise the two may serve ties differently.
    """
    width = max(map(len, rows))
    padded = torch.tensor([row + [(0, 0, 0)] * (width - len(row)) for row in rows])
    wanted, smallest, room = (part.contiguous() for part in padded.unbind(2))
    wanted, largest = (wanted / 48).mul(4096).round().div(4096).to(dtype), smallest + room
    least, most = smallest.sum(1), largest.sum(1)
    num_pages = least + (spread * (most - least)).long()
    found = whole_pages(wanted, num_pages, smallest, largest)
    for index, own in enumerate(found):
        args = wanted[index], int(num_pages[index]), smallest[index], largest[index]
        assert torch.equal(own, allocation.whole_pages(*args))
