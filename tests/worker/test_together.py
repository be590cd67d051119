"""Requests that are compacted in one step keep what each would keep alone."""

import dataclasses

import pytest
from compaction import ByKey, MovingCache, Request, counts_of, kept_of, run_together
from test_compactor import (  # noqa: F401 (fixtures)
    ALLOCATIONS,
    configure,
    key_scores,
    policies,
    profile,
    protected,
    window_scores,
)

from vllm_kvcompress.requests.cache import PackedCache
from vllm_kvcompress.worker.compactor import Compactor


class LastFirst(MovingCache):
    """Writes the last page first, as some program of a kernel may, and notes how many pages at a time."""

    written: list[int]

    def rewrite(self, kept, target, overlaps):
        self.written.append(len(target))
        if overlaps:
            super().rewrite(kept, target, overlaps)
            return
        turned = dataclasses.replace(kept, row=kept.row.flip(0), columns=kept.columns.flip(0))
        super().rewrite(turned, target.flip(0), overlaps)


@pytest.fixture
def three():
    requests = [Request(20 + index, most=200) for index in range(3)]
    first = requests[0]
    first.cache = LastFirst(first.grid, first.cache.pages, *first.packings)
    object.__setattr__(first.cache, "written", [])
    first.compactor = Compactor(first.cache, first.layers)
    first.compactor.listeners.append(lambda job, counts, kept: first.kept.append((counts, kept)))
    for other in requests[1:]:
        other.move_in_with(first)
    return requests


def compact_together(requests, configs, blocks, scores_of=key_scores, raw_tails=(3, 3, 3), turn=None):
    jobs, wanted = [], []
    for request, config, num_blocks, raw_tail in zip(requests, configs, blocks, raw_tails, strict=True):
        job = request.job(config, num_blocks, raw_tail)
        candidates = request.candidates(job)
        scores = protected(scores_of(request, candidates), candidates, config.sink_tokens)
        num_pages = num_blocks * request.grid.pages_per_block
        counts = counts_of(config, candidates, scores, num_pages, request.grid.block_size)
        jobs.append(job)
        wanted.append(kept_of(candidates, scores, counts, request.grid.block_size))
    if turn is not None:
        jobs = turn(jobs)
    run_together(requests, jobs, wanted)
    return jobs


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_requests_of_any_length_compacted_before_or_not(three, allocation, profile):  # noqa: F811
    config = configure("by_key", allocation, profile)
    three[0].compute(45)
    compact_together(three[:1], [config], [4], raw_tails=[3])
    three[1].compute(38)
    compact_together(three[:2], [config] * 2, [3, 5], raw_tails=[3, 6])
    three[0].compute(9)
    three[1].compute(22)
    three[2].compute(57)  # for the first time
    compact_together(three, [config] * 3, [4, 7, 9], raw_tails=[3, 9, 0])
    pages = three[0].grid.pages_per_block
    assert three[0].cache.written == [4 * pages, 8 * pages, 20 * pages], "each time all at once"


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_the_most_recent_tokens_have_a_share_of_what_a_head_keeps_on_average(three, allocation, monkeypatch):
    monkeypatch.setattr(ByKey, "num_recent", lambda self, kept: kept // 3)
    config, pages = configure("by_key", allocation), three[0].grid.pages_per_block
    blocks = {}

    def scores(request, candidates):
        grid = request.grid
        held = sum(len(own) for layer in candidates for own in layer)
        kept = min(blocks[id(request)] * pages * grid.block_size, held) // (grid.num_layers * grid.num_heads)
        assert (recent := kept // 3) >= 2
        plain = key_scores(request, candidates)
        ones = [dict.fromkeys(own[-recent:], 1e30) for layer in candidates for own in layer]
        return [[of | ones.pop(0) for of in layer] for layer in plain]

    for tokens, own in (((41, 30, 57), (3, 4, 5)), ((23, 17, 12), (4, 3, 7))):
        for request, num_tokens in zip(three, tokens, strict=True):
            request.compute(num_tokens)
        blocks |= {id(request): number for request, number in zip(three, own, strict=True)}
        compact_together(three, [config] * 3, own, scores, raw_tails=(5, 6, 9))


@pytest.mark.parametrize("method", ["snapkv", "kv_compress"])
def test_windows_are_each_requests_own(three, method):
    config = configure(f"{method}:window=5,kernel_size=3", "global")
    scores = lambda request, candidates: (  # noqa: E731
        window_scores(request, 5, 3, squared=method == "kv_compress")(request, candidates)
    )
    for request in three:
        request.observer.watch("r", config.build_policy())
    for tokens in ((41, 30, 57), (23, 17, 9)):
        for request, num_tokens in zip(three, tokens, strict=True):
            request.compute(num_tokens)
        compact_together(three, [config] * 3, [4, 3, 4], scores, raw_tails=[5, 7, 9])


def test_each_request_has_its_own_state_and_what_it_keeps_goes_on(three):
    config = configure("h2o:recent=0", "global")
    for request in three:
        request.observer.watch("r", config.build_policy())

    def summed(request, candidates):
        states = request.observer.of("r").states
        out = []
        for layer, heads in enumerate(candidates):
            out.append([])
            for head, own in enumerate(heads):
                raw = request.num_tokens - (own[-1] + 1)
                paid = states[layer][head].tolist()
                out[-1].append(dict(zip(own, paid[len(paid) - raw - len(own) :], strict=False)))
        return out

    for tokens in ((41, 30, 57), (23, 17, 12)):
        for request, num_tokens in zip(three, tokens, strict=True):
            request.compute(num_tokens)
        compact_together(three, [config] * 3, [4, 3, 4], summed)


def test_who_writes_where_an_earlier_one_reads_comes_after_it(three):
    config = configure("by_key", "global")
    for request, num_tokens in zip(three, (41, 30, 57), strict=True):
        request.compute(num_tokens)

    def turn(jobs):
        freed = jobs[0].source[:2], jobs[1].source[:3]
        return [
            jobs[0],
            dataclasses.replace(jobs[1], destination=(*freed[0], *jobs[1].destination[2:])),
            dataclasses.replace(jobs[2], destination=(*freed[1], *jobs[2].destination[3:])),
        ]

    compact_together(three, [config] * 3, [4, 3, 4], turn=turn)
    assert len(three[0].cache.written) == 3


def test_pages_of_an_earlier_ones_last_compaction_are_read_before_they_are_written(three):
    config = configure("by_key", "global")
    for request, num_tokens in zip(three, (41, 30, 57), strict=True):
        request.compute(num_tokens)
    compact_together(three, [config] * 3, [4, 3, 4])
    for request in three:
        request.compute(20)

    def turn(jobs):
        previous = jobs[0].previous[:2]
        return [
            jobs[0],
            dataclasses.replace(jobs[1], destination=(*previous, *jobs[1].destination[2:])),
            jobs[2],
        ]

    compact_together(three, [config] * 3, [4, 3, 4], turn=turn)
    pages = three[0].grid.pages_per_block
    assert three[0].cache.written[1:] == [4 * pages, 7 * pages]


def test_in_place_beside_others(three):
    config = configure("by_key", "global")
    for request, num_tokens in zip(three, (41, 30, 57), strict=True):
        request.compute(num_tokens)

    def turn(jobs):
        own = jobs[1].source[:3][::-1]
        return [jobs[0], dataclasses.replace(jobs[1], destination=own), jobs[2]]

    compact_together(three, [config] * 3, [4, 3, 4], turn=turn)
    assert len(three[0].cache.written) == 1


def test_other_methods_and_more_than_memory_is_meant_for_run_apart(three, monkeypatch):
    for request in three:
        request.compute(41)
    alike, other = configure("by_key", "global"), configure("by_key", "adaptive")
    compact_together(three, [alike, other, other], [4, 3, 4])
    pages = three[0].grid.pages_per_block
    assert three[0].cache.written == [4 * pages, 7 * pages]
    for request in three:
        request.compute(20)
    sinks = [configure("by_key", "adaptive", sinks=number) for number in (2, 2, 3)]
    compact_together(three, sinks, [4, 3, 4])
    assert three[0].cache.written[2:] == [7 * pages, 4 * pages]
    three[0].cache.written.clear()
    for request in three:
        request.compute(20)
    monkeypatch.setattr(PackedCache, "slice_bytes", 6 * three[0].cache.block_bytes)
    compact_together(three, [other] * 3, [3, 4, 3])
    assert three[0].cache.written == [3 * pages, 4 * pages, 3 * pages]
