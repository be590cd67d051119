"""Mixed formats: which thirty-twos get how many bits, and where parts of a run lie."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.formats import FORMATS, Mixed, arrange

MIXED = [format for format in FORMATS.values() if isinstance(format, Mixed)]


def walked(counts: list[int], sizes: list[int], page_bytes: int) -> tuple[list[list[tuple[int, int]]], int]:
    """Where each record begins, (page, byte), if they are put down one by one, and pages in all.

    A record's place ends a whole number of records before its page does.
    """
    page, used = -1, page_bytes
    begins = []
    for count, size in zip(counts, sizes, strict=True):
        own = []
        for _ in range(count):
            places = [page_bytes - n * size for n in range(page_bytes // size, 0, -1)]
            free = [at for at in places if at >= used]
            if not free:
                page, used = page + 1, 0
                free = places
            own.append((page, free[0]))
            used = free[0] + size
        begins.append(own)
    return begins, page + 1


@given(
    counts=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 100), min_size=3, max_size=3),
    page_bytes=st.integers(100, 300),
)
def test_parts_follow_each_other_without_overlap(counts, sizes, page_bytes):
    first, pages = arrange(torch.tensor(counts).T, sizes, page_bytes)
    for run, own in enumerate(counts):
        begins, needed = walked(own, sizes, page_bytes)
        assert int(pages[run]) == needed
        for part, size in enumerate(sizes):
            per_page = page_bytes // size
            place = [int(first[part, run]) + number for number in range(own[part])]
            found = [(at // per_page, page_bytes - (per_page - at % per_page) * size) for at in place]
            assert found == begins[part]
        taken = sorted((page, at, at + size) for part, size in enumerate(sizes) for page, at in begins[part])
        for (page, _, end), (next_page, begin, _) in itertools.pairwise(taken):
            assert next_page > page or begin >= end
        assert all(0 <= begin and end <= page_bytes for _, begin, end in taken)


def loss(format: Mixed, choice, ranks) -> float:
    return sum(
        (rank + 1) ** -format.decay * (1 if part < 0 else format.errors[part])
        for part, rank in zip(choice, ranks, strict=True)
    )


@pytest.mark.parametrize("format", MIXED, ids=lambda format: format.name)
@pytest.mark.parametrize("seed", range(6))
def test_no_other_choice_of_as_many_bytes_loses_less(format, seed):
    """Against every choice there is of five thirty-twos, two of which may be written already."""
    draw = torch.Generator().manual_seed(seed)
    sizes, page_bytes = [part.record_bytes(64) for part in format.parts], 8192
    scores = torch.randn(1, 5, generator=draw)
    known = torch.full((1, 5), -1)
    if seed % 2:
        known[0, :2] = torch.randint(-2, len(sizes), (2,), generator=draw)
    order = sorted((i for i in range(5) if known[0, i] != -2), key=lambda i: -float(scores[0, i]))
    rank = [order.index(i) if i in order else 0 for i in range(5)]
    options = [
        [-1] if own == -2 else [-1, *range(len(sizes))] if own == -1 else [-1, own]
        for own in known[0].tolist()
    ]
    some_dropped = some_kept = False
    for pages in (1, 2, 3):
        (chosen,) = format.choose(scores, known, torch.tensor([pages]), sizes, page_bytes).tolist()
        assert all(own in allowed for own, allowed in zip(chosen, options, strict=True))
        counts = [chosen.count(part) for part in range(len(sizes))]
        assert walked(counts, sizes, page_bytes)[1] <= pages
        spent = sum(sizes[own] for own in chosen if own >= 0)
        least = min(
            loss(format, other, rank)
            for other in itertools.product(*options)
            if sum(sizes[own] for own in other if own >= 0) <= spent
        )
        assert loss(format, chosen, rank) == pytest.approx(least)
        some_dropped |= -1 in chosen
        some_kept |= max(chosen) >= 0
    assert some_kept and (some_dropped or seed)


@pytest.mark.parametrize("format", MIXED, ids=lambda format: format.name)
def test_the_best_ranks_have_the_most_bits_and_pages_are_filled(format):
    sizes, page_bytes = [part.record_bytes(64) for part in format.parts], 128 * 256
    scores = torch.rand(3, 200, generator=torch.Generator().manual_seed(3))
    pages = torch.tensor([2, 5, 400])
    chosen = format.choose(scores, torch.full((3, 200), -1), pages, sizes, page_bytes)
    worst = len(sizes)
    for own, order in zip(chosen, scores.argsort(dim=1, descending=True), strict=True):
        bits = [worst if part < 0 else part for part in own[order].tolist()]
        assert bits == sorted(bits)
    assert (chosen[2] == 0).all(), "with room for everything all is as good as it can be"
    for own, room in zip(chosen[:2].tolist(), pages.tolist(), strict=False):
        counts = [own.count(part) for part in range(len(sizes))]
        assert all(counts) and walked(counts, sizes, page_bytes)[1] == room
        spent = sum(count * size for count, size in zip(counts, sizes, strict=True))
        assert spent > room * (page_bytes - max(sizes)) - max(sizes)


@pytest.mark.parametrize("format", MIXED, ids=lambda format: format.name)
def test_protected_ones_stay_and_broken_ones_go_first(format):
    sizes = [part.record_bytes(64) for part in format.parts]
    scores = torch.tensor([[-3.0, torch.inf, torch.finfo(torch.float32).min, 2.0, 1.0, 0.0]])
    chosen = format.choose(scores, torch.full((1, 6), -1), torch.tensor([1]), sizes, 3 * min(sizes))
    assert chosen[0, 1] >= 0 and chosen[0, 2] == -1
    absent = torch.tensor([[-1, -2, -1, -1, -1, -1]])
    assert format.choose(scores, absent, torch.tensor([9]), sizes, 3 * max(sizes))[0, 1] == -1
