"""A compaction keeps what an independent selection over token lists keeps, where the layout says it is."""

import dataclasses
import itertools
import json
import math
from typing import ClassVar

import pytest
import torch
from compaction import (
    FIRST_LAYER,
    SCALE,
    Absolute,
    ByKey,
    ByTable,
    Request,
    counts_of,
    kept_of,
    run_together,
)

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.paging.job import Repetition
from vllm_kvcompress.policies import POLICIES, register_policy
from vllm_kvcompress.policies.base import LayerObservation
from vllm_kvcompress.requests.cache import PackedCache
from vllm_kvcompress.requests.observer import LayerAttention
from vllm_kvcompress.worker.compactor import Compactor
from vllm_kvcompress.worker.work import Work

ALLOCATIONS = ["uniform", "adaptive", "pyramid", "global", "profile"]
BLOCK_SIZE = 4


@dataclasses.dataclass(frozen=True)
class Spy(ByKey):
    """Notes all that it is shown."""

    name: ClassVar[str] = "spy"
    accumulates: ClassVar[bool] = True
    seen: ClassVar[dict[str, list]] = {}
    window: int = 3

    def observe(self, observation):
        self.seen["observe"].append(observation)
        return ("state", len(self.seen["observe"]))

    def score(self, observation):
        self.seen["score"].append(observation)
        return super().score(observation)

    def carry(self, state, kept):
        self.seen["carry"].append((state, kept.clone()))
        return ("carried", *state)

    def refine(self, scores, kept, observation):
        self.seen["refine"].append((scores.clone(), kept.clone(), observation))
        return scores


@dataclasses.dataclass(frozen=True)
class Against(ByKey):
    """A `refine` that turns everything round, the sinks too."""

    name: ClassVar[str] = "against"

    def refine(self, scores, kept, observation):
        return -scores


@pytest.fixture(scope="module", autouse=True)
def policies():
    mine = (Absolute, ByKey, ByTable, Spy, Against)
    for policy in mine:
        register_policy(policy)
    yield
    for policy in mine:
        del POLICIES[policy.name]


@pytest.fixture
def profile(tmp_path):
    shares = (torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(3)) ** 2 + 0.05).tolist()
    content = {"version": 1, "model": "tiny", "budgets": [0.2, 0.8], "shares": shares}
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(content | {"num_layers": 3, "num_kv_heads": 2}))
    return path


def configure(text: str, allocation: str = "uniform", profile=None, every: int | None = 16, sinks: int = 2):
    form = {"allocation": f"profile:{profile}" if allocation == "profile" else allocation}
    method, _, options = text.partition(":")
    form |= {"method": method, "sink_tokens": sinks, "recompact_every": every}
    if allocation == "adaptive":
        form["alpha"] = 0.07  # of which no two heads' remainders tie
    return KVCompressionConfig.parse(form | dict(pair.split("=") for pair in options.split(",") if pair))


def protected(scores, candidates, sinks: int = 2):
    """Scores with the first tokens of every head, which are the sequence's, at +inf."""
    return [
        [score | dict.fromkeys(own[:sinks], math.inf) for own, score in zip(*layer, strict=True)]
        for layer in zip(candidates, scores, strict=True)
    ]


def key_scores(request: Request, candidates):
    return [
        [{p: float(request.keys[layer, head, p, 0]) for p in own} for head, own in enumerate(heads)]
        for layer, heads in enumerate(candidates)
    ]


def compact(request, config, num_blocks, scores_of=key_scores, chosen_by=None, raw_tail=3, reuse="none"):
    """Run one Job and check it against the lists; the page counts."""
    job = request.job(config, num_blocks, raw_tail, reuse)
    candidates = request.candidates(job)
    scores = protected(scores_of(request, candidates), candidates, config.sink_tokens)
    num_pages = num_blocks * request.grid.pages_per_block
    counts = counts_of(config, candidates, scores, num_pages, request.grid.block_size)
    if chosen_by is not None:
        scores = protected(chosen_by(scores, counts, candidates), candidates, config.sink_tokens)
    request.run(job, kept_of(candidates, scores, counts, request.grid.block_size))
    return counts


# ---------------------------------------------------------------------- what is kept, and where


@pytest.mark.parametrize("reuse", ["none", "source", "previous", "both"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_each_head_keeps_its_best_tokens_in_its_own_pages_time_after_time(allocation, reuse, profile):
    packings = {"none": "plain", "source": "transposed", "previous": "shuffled", "both": "transposed"}[reuse]
    ragged = False
    for seed in range(3):
        request = Request(seed, packings=(packings, "plain"))
        config = configure("by_key", allocation, profile)
        request.compute(43)
        compact(request, config, 4, reuse="source" if reuse == "both" else reuse)
        for tokens, blocks in ((17, 5), (12, 3), (16, 4)):
            request.compute(tokens)
            counts = compact(request, config, blocks, reuse=reuse)
            ragged |= len({count for row in counts for count in row}) > 1
    assert ragged == (allocation != "uniform"), "else runs of different length were not tried"


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_no_head_is_given_more_pages_than_it_has_tokens_for(allocation, profile):
    request = Request(16)
    request.compute(51)
    compact(request, configure("by_key", "global"), 4)
    lengths = {len(own) for heads in request.held for own in heads}
    assert min(lengths) < 12 < 24 < max(lengths)
    request.compute(8)
    compact(request, configure("by_key", allocation, profile), 5)  # of 6 that are held


def test_one_page_per_head_and_every_page_of_every_head_are_budgets_too():
    request = Request(1)
    request.compute(30)
    compact(request, configure("by_key", "global"), 1)  # one page each
    request.compute(10)
    compact(request, configure("by_key", "adaptive"), 4)  # all that each head has
    assert {len(own) for heads in request.held for own in heads} == {16}


def test_a_compaction_where_nothing_raw_is_left_behind_the_boundary():
    request = Request(2)
    request.compute(40)
    compact(request, configure("by_key"), 3, raw_tail=0)
    request.compute(24)
    compact(request, configure("by_key", "global"), 4, raw_tail=0)
    assert request.boundary == 64


def draw_table(request) -> None:
    draw = torch.Generator().manual_seed(5)
    for layer in request.layers:
        ByTable.table[layer.index] = torch.rand(2, request.most, generator=draw)


def table_scores(request, candidates):
    tables = [ByTable.table[FIRST_LAYER + 2 * layer].tolist() for layer in range(3)]
    return [
        [{p: tables[layer][head][p] for p in own} for head, own in enumerate(heads)]
        for layer, heads in enumerate(candidates)
    ]


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_layer_and_positions_tell_a_policy_which_tokens_it_scores(allocation):
    request = Request(3)
    draw_table(request)
    config = configure("by_table", allocation)
    for tokens, blocks in ((45, 3), (20, 4), (13, 4)):
        request.compute(tokens)
        compact(request, config, blocks, table_scores)


def test_streaming_keeps_the_sinks_and_the_newest_tokens_without_a_look_at_keys():
    request = Request(4)
    newest = lambda request, candidates: [  # noqa: E731
        [{p: float(p) for p in own} for own in heads] for heads in candidates
    ]
    config = configure("streaming_llm")
    for tokens in (40, 17):
        request.compute(tokens)
        compact(request, config, 3, newest)
    last = request.boundary
    assert request.held[1][1] == [0, 1, *range(last - 10, last)]


def test_a_request_that_is_compacted_once_keeps_no_positions():
    request = Request(5)
    request.compute(30)
    compact(request, configure("by_key", every=None), 2)
    assert request.observer.tables["r"].positions is None


# ---------------------------------------------------------------------- scores that are not numbers


@pytest.mark.parametrize("allocation", ["uniform", "adaptive", "global"])
def test_scores_that_are_no_numbers_rank_last_and_infinite_ones_behind_what_is_protected(allocation):
    request = Request(6)
    draw_table(request)
    limits = torch.finfo(torch.float32)
    means = {math.inf: limits.max, -math.inf: limits.min}
    for table in ByTable.table.values():
        table[:, ::5], table[:, 1::5], table[:, 2::5] = math.nan, -math.inf, math.inf
    ByTable.table[FIRST_LAYER][1] = math.nan  # not one number
    ByTable.table[FIRST_LAYER + 2][0] = math.inf
    ByTable.table[FIRST_LAYER + 2][1] = -math.inf

    def meant(request, candidates):
        return [
            [{p: limits.min if s != s else means.get(s, s) for p, s in own.items()} for own in heads]
            for heads in table_scores(request, candidates)
        ]

    config = configure("by_table", allocation, sinks=3)
    for tokens, blocks in ((46, 4), (20, 5), (13, 5)):
        request.compute(tokens)
        compact(request, config, blocks, meant)


# ---------------------------------------------------------------------- as much as scores above a threshold


def blocks_above(scores, threshold: float, most: int, grid) -> int:
    """Blocks that hold every page with a token above the threshold, and a page of each head."""
    pages = 0
    for heads in scores:
        for own in heads:
            above = sum(score > threshold for score in own.values())
            pages += max(1, math.ceil(above / grid.block_size))
    return min(math.ceil(pages / grid.pages_per_block), most)


def compact_above(request, config, most: int, reuse="none") -> int:
    job = request.job(config, most, 3, reuse)
    candidates = request.candidates(job)
    scores = protected(key_scores(request, candidates), candidates, config.sink_tokens)
    kept = blocks_above(scores, config.threshold, most, request.grid)
    num_pages = kept * request.grid.pages_per_block
    counts = counts_of(config, candidates, scores, num_pages, request.grid.block_size)
    request.run(job, kept_of(candidates, scores, counts, request.grid.block_size))
    return kept


@pytest.mark.parametrize("reuse", ["none", "source", "previous"])
def test_a_threshold_keeps_the_pages_with_a_better_token_and_fills_their_blocks(reuse):
    sizes = set()
    for seed, threshold in itertools.product(range(3), (0.2, 1.0, 2.5, 1000.0)):
        request = Request(seed)
        config = configure(f"absolute:threshold={threshold}", "global")
        for tokens, most in ((43, 7), (17, 9), (12, 3)):
            request.compute(tokens)
            sizes.add((compact_above(request, config, most, reuse), most))
    assert {(1, 7), (7, 7)} & sizes and len(sizes) > 6, "few and many tokens are above it"


def test_every_head_keeps_a_page_where_no_token_is_above_the_threshold_and_none_protected():
    request = Request(3)
    request.compute(43)
    assert compact_above(request, configure("absolute:threshold=1000", "global", sinks=0), 7) == 1


def test_the_largest_of_all_ranks_is_kept_and_no_others_are_run_with_it():
    requests = [Request(20 + index, most=200) for index in range(2)]
    requests[1].move_in_with(requests[0])
    config = configure("absolute:threshold=1000", "global")
    asked = []
    requests[0].compactor._largest = lambda own: asked.append(own.tolist()) or own + 2
    jobs, wanted = [], []
    for request in requests:
        request.compute(43)
        job = request.job(config, 5, 3)
        candidates = request.candidates(job)
        scores = protected(key_scores(request, candidates), candidates, config.sink_tokens)
        counts = counts_of(config, candidates, scores, 3 * request.grid.pages_per_block, BLOCK_SIZE)
        jobs.append(job)
        wanted.append(kept_of(candidates, scores, counts, BLOCK_SIZE))
    run_together(requests, jobs, wanted)
    assert asked == [[1], [1]]


# ---------------------------------------------------------------------- scores refined


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_sinks_stay_whatever_refine_says_of_them(allocation):
    def turned(scores, counts, candidates):
        return [[{p: -s for p, s in own.items()} for own in heads] for heads in scores]

    request = Request(7)
    config = configure("against", allocation, sinks=3)
    for tokens, blocks in ((40, 3), (20, 3), (16, 4)):
        request.compute(tokens)
        compact(request, config, blocks, chosen_by=turned)
        assert all(own[:3] == [0, 1, 2] for heads in request.held for own in heads)


# ---------------------------------------------------------------------- what policies are shown


def check_columns(request, seen, layer: int, positions: list[list[int]], num_tokens: int, values: bool):
    """`positions` per head, right-aligned in what was seen."""
    assert seen.layer == FIRST_LAYER + 2 * layer
    assert seen.num_tokens == num_tokens and seen.scale == SCALE
    width = max(map(len, positions))
    assert seen.keys.shape[1] == width and seen.positions().shape == (len(positions), width)
    empty = [width - len(own) for own in positions]
    assert (seen.padding.tolist() if seen.padding is not None else [0] * len(empty)) == empty
    for head, (own, skip) in enumerate(zip(positions, empty, strict=True)):
        assert seen.positions()[head, skip:].tolist() == own
        assert seen.holds()[head].tolist() == [False] * skip + [True] * len(own)
        assert torch.equal(seen.keys[head, skip:], request.keys[layer, head, own])
        if values:
            assert torch.equal(seen.values[head, skip:], request.values[layer, head, own])


def test_policies_see_their_layers_tokens_positions_queries_and_state():
    request = Request(8)
    config = configure("spy:window=3", "global")
    projection, rotary = (lambda: torch.ones(1)), object()
    for constants in (request.layers,):
        constants[:] = [
            dataclasses.replace(one, output_projection=projection, rotary=rotary, logits_soft_cap=9.0)
            for one in constants
        ]
    request.observer.watch("r", config.build_policy())
    state = {layer: None for layer in range(3)}
    for tokens, blocks in ((31, 2), (10, None), (11, 3), (14, 3)):
        Spy.seen = {"observe": [], "score": [], "refine": [], "carry": []}
        held, boundary, first = request.held, request.boundary, request.num_tokens
        request.compute(tokens)
        end = request.num_tokens
        whole = [[own + list(range(boundary, end)) for own in heads] for heads in held]
        for layer, seen in enumerate(Spy.seen["observe"]):
            check_columns(request, seen, layer, whole[layer], end, values=False)
            assert seen.num_scored == seen.keys.shape[1] and seen.values.shape[-1] == 0
            assert torch.equal(seen.queries.flatten(1, 2), request.queries[layer, first:end])
            assert seen.queries.shape[1:3] == (2, 2) and seen.rotary is rotary
            assert seen.state == state[layer] and seen.logits_soft_cap == 9.0
            state[layer] = ("state", layer + 1)
        assert len(Spy.seen["observe"]) == 3
        if blocks is None:
            continue
        counts = compact(request, config, blocks)
        assert [len(Spy.seen[name]) for name in ("score", "refine", "carry")] == [3, 3, 3]
        for layer in range(3):
            scores, kept, again = Spy.seen["refine"][layer]
            assert kept.tolist() == [BLOCK_SIZE * count for count in counts[layer]]
            for seen in (Spy.seen["score"][layer], again):
                check_columns(request, seen, layer, whole[layer], end, values=True)
                # Columns below the boundary are scored.
                assert seen.keys.shape[1] - seen.num_scored == end - request.boundary
                assert torch.equal(seen.queries.flatten(1, 2), request.queries[layer, end - 3 : end])
                assert seen.state == state[layer] and seen.logits_soft_cap == 9.0
                assert seen.rotary is rotary and seen.output_projection is projection
            for head, own in enumerate(whole[layer]):
                skip = scores.shape[1] - (len(own) - (end - request.boundary))
                ours = [-math.inf] * skip + [math.inf] * 2
                ours += request.keys[layer, head, own[2:], 0].tolist()[: scores.shape[1] - skip - 2]
                assert scores[head].tolist() == ours
            carried, old = Spy.seen["carry"][layer]
            assert carried == state[layer]
            kept_and_tail = [own + list(range(request.boundary, end)) for own in request.held[layer]]
            width = max(map(len, kept_and_tail))
            for head, own in enumerate(kept_and_tail):
                before = whole[layer][head]
                offset = max(map(len, whole[layer])) - len(before)
                columns = [-1] * (width - len(own)) + [offset + before.index(position) for position in own]
                assert old[head].tolist() == columns
            state[layer] = ("carried", *state[layer])
        assert request.observer.of("r").states == list(state.values())


def test_nothing_is_carried_where_nothing_comes_after():
    request = Request(9)
    config = configure("spy", every=None)
    request.observer.watch("r", config.build_policy())
    Spy.seen = {"observe": [], "score": [], "refine": [], "carry": []}
    request.compute(31)
    compact(request, config, 2)
    assert not Spy.seen["carry"]


# ---------------------------------------------------------------------- methods that look at queries


@pytest.mark.parametrize("allocation", ["adaptive", "global"])
@pytest.mark.parametrize("method", ["h2o", "kv_compress_full"])
def test_sums_over_every_query_go_on_through_compactions(method, allocation):
    request = Request(10, most=140)
    config = configure(method, allocation)
    request.observer.watch("r", config.build_policy())
    sums = [[{} for _ in range(2)] for _ in range(3)]

    def compute(num_tokens):
        for position in range(request.num_tokens, request.num_tokens + num_tokens):
            for layer in range(3):
                for query_head in range(4):
                    own = sums[layer][query_head // 2]
                    for seen, paid in request.attention(layer, query_head, position).items():
                        own[seen] = own.get(seen, 0.0) + (paid if method == "h2o" else paid**2)
        request.compute(num_tokens)

    def recent(scores, counts, candidates):
        if method != "h2o":
            return scores
        out = []
        for heads, pages, own in zip(scores, counts, candidates, strict=True):
            out.append([])
            for score, count, positions in zip(heads, pages, own, strict=True):
                newest = min(count * BLOCK_SIZE // 2, count * BLOCK_SIZE - 2)
                out[-1].append(score | dict.fromkeys(positions[len(positions) - newest :], math.inf))
        return out

    summed = lambda request, candidates: [  # noqa: E731
        [{p: sums[layer][head][p] for p in own} for head, own in enumerate(heads)]
        for layer, heads in enumerate(candidates)
    ]
    lengths = set()
    for chunks, blocks in (((30, 15), 4), ((1, 1, 9), 5), ((18,), 4), ((7, 13), 5)):
        for chunk in chunks:
            compute(chunk)
        counts = compact(request, config, blocks, summed, recent)
        lengths |= {count for row in counts for count in row}
        for layer, state in enumerate(request.observer.of("r").states):
            for head in range(2):
                held = request.held[layer][head] + list(range(request.boundary, request.num_tokens))
                sums[layer][head] = {position: sums[layer][head][position] for position in held}
                wanted = torch.tensor(list(sums[layer][head].values()), dtype=torch.float64)
                torch.testing.assert_close(
                    state[head, state.shape[1] - len(held) :].double(), wanted, atol=1e-5, rtol=1e-5
                )
                assert not state[head, : state.shape[1] - len(held)].any()
    assert len(lengths) > 2


def window_scores(request, window: int, kernel: int, squared: bool):
    """Attention of the last queries, pooled over what each head holds before them, by position."""
    newest = range(request.num_tokens - window, request.num_tokens)

    def scores(request, candidates):
        out = []
        for layer, heads in enumerate(candidates):
            out.append([])
            for head in range(len(heads)):
                held = request.held[layer][head] + list(range(request.boundary, newest[0]))
                total = dict.fromkeys(held, 0.0)
                for query_head in (2 * head, 2 * head + 1):
                    summed = dict.fromkeys(held, 0.0)
                    for position in newest:
                        paid = request.attention(layer, query_head, position)
                        for one in held:
                            summed[one] += paid[one] ** 2 if squared else paid[one]
                    for index, one in enumerate(held):
                        around = held[max(index - kernel // 2, 0) : index + kernel // 2 + 1]
                        total[one] += max(summed[each] for each in around)
                out[-1].append(total)
        return out

    return scores


@pytest.mark.parametrize("method", ["snapkv", "kv_compress"])
def test_the_window_of_each_compaction_is_the_last_queries_before_it(method):
    request = Request(11)
    config = configure(f"{method}:window=5,kernel_size=3", "global")
    request.observer.watch("r", config.build_policy())
    for chunks, blocks in (((30, 11), 4), ((1,) * 9, 4), ((22,), 5)):
        for chunk in chunks:
            request.compute(chunk)
        scores = window_scores(request, 5, 3, squared=method == "kv_compress")
        # (A max-pooled score is shared by neighbours, of which the earlier one is kept.)
        compact(request, config, blocks, scores, raw_tail=5)


def test_a_cache_that_scores_windows_itself_is_shown_the_pages_instead_of_the_keys():
    shown = []

    class Scoring(PackedCache):
        def scores_windows(self, policy):
            return policy.name == "snapkv"

        def window_scores(self, policy, pages, queries, scales, soft_caps, sinks, num_scored, ends):
            assert (scales, soft_caps, sinks) == ([SCALE] * 3, [0.0] * 3, None)
            (width,) = ends
            assert width == num_scored + request.num_tokens - boundary
            shown.append(pages)
            padding = (pages < 0).sum(1) * BLOCK_SIZE
            queries = queries.transpose(0, 1).flatten(1, 2).unflatten(1, (len(pages), -1))
            keys = self.read_keys(pages)[:, :width]
            empty = keys[..., :0]
            return policy.score(LayerObservation(keys, empty, queries, SCALE, num_scored, padding=padding))

    request = Request(12)
    request.cache = Scoring(request.grid, request.cache.pages, *request.packings)
    request.compactor = Compactor(request.cache, request.layers)
    request.compactor.listeners.append(lambda job, counts, kept: request.kept.append((counts, kept)))
    config = configure("snapkv:window=5,kernel_size=3", "global")
    request.observer.watch("r", config.build_policy())
    for tokens, blocks in ((41, 4), (23, 4)):
        request.compute(tokens)
        boundary = (request.num_tokens - 5) // BLOCK_SIZE * BLOCK_SIZE
        compact(request, config, blocks, window_scores(request, 5, 3, squared=False), raw_tail=5)
    assert [len(pages) for pages in shown] == [6, 6], "all heads of all layers are shown at once"


# ---------------------------------------------------------------------- KVzip's repetitions


def repetition(request: Request, begin: int, end: int, chunks: list[int], asked: int):
    """A request that shares the context's full blocks and computes the rest itself, then repeats a part.

    Returns what each position of the part was paid at most, per layer and head: `[L][H][end - begin]`.
    """
    size, context = request.grid.block_size, request.num_tokens
    shared = context // size
    name, length = f"r:repeat-{begin}", asked + end - begin
    draw = torch.Generator().manual_seed(begin)
    keys = torch.randn(3, 2, length + size, request.keys.shape[3], generator=draw)
    queries = torch.randn(3, length, 4, request.keys.shape[3], generator=draw) * 2
    total = context + length
    blocks = [request.raw[index] for index in range(shared)]
    blocks += [request.free.pop() for _ in range(-(-total // size) - shared)]
    for layer in range(3):
        for head in range(2):
            whole = torch.cat([request.keys[layer, head, :context], keys[layer, head]])
            for index in range(shared, len(blocks)):
                plain = whole[index * size : index * size + size]
                page = request.cache.pages[request.page(layer, blocks[index], head)]
                page[0] = plain.flatten()[request.packings[0].order]
    request.observer.watch_repetition(Repetition(name, "r", begin, end, context))
    computed, block_table = shared * size, torch.tensor([blocks], dtype=torch.int32)
    while computed < total:
        chunk = min(chunks.pop(0) if chunks else total, total - computed)
        spans = request.observer.spans(
            [None, name],
            torch.tensor([0, 2, 2 + chunk]),
            torch.tensor([9, computed + chunk]),
            torch.cat([torch.full_like(block_table, 1), block_table]),
        )
        assert len(spans) == 1
        for layer in range(3):
            batch = torch.full((2 + chunk, 4, request.keys.shape[3]), 50.0)
            for index in range(chunk):
                if (repeated := computed + index - context) >= 0:
                    batch[2 + index] = queries[layer, repeated]
            spans[0].record(layer, batch)
        computed += chunk
    request.observer.forget(name)
    sinks = list(range(min(4, begin)))
    most = [[[0.0] * (end - begin) for _ in range(2)] for _ in range(3)]
    for layer in range(3):
        for query_head in range(4):
            head = query_head // 2
            for index in range(length):
                own = [request.keys[layer, head, p] for p in [*sinks, *range(begin, end)]]
                own += list(keys[layer, head, : index + 1])
                logits = torch.stack(own).double() @ queries[layer, index, query_head].double() * SCALE
                paid = logits.softmax(0).tolist()[len(sinks) : len(sinks) + end - begin]
                most[layer][head] = [max(pair) for pair in zip(most[layer][head], paid, strict=True)]
    return most


@pytest.mark.parametrize("context", [26, 28, 29])
@pytest.mark.parametrize("chunks", [[], [1] * 8, [3, 5]], ids=str)
def test_each_part_of_a_context_scores_by_its_own_repetition_in_any_chunks(context, chunks):
    request = Request(13, block_size=BLOCK_SIZE)
    config = configure("kvzip", "adaptive", every=None)
    request.observer.watch("r", config.build_policy())
    request.compute(context)
    assert request.observer.of("r").states == [None] * 3, "the context's own queries do not count"
    most = [[[] for _ in range(2)] for _ in range(3)]
    for begin, end in ((0, 2), (2, 13), (13, context)):
        part = repetition(request, begin, end, list(chunks), asked=3)
        for layer in range(3):
            for head in range(2):
                most[layer][head] += part[layer][head]
    for layer, state in enumerate(request.observer.of("r").states):
        torch.testing.assert_close(state.double(), torch.tensor(most[layer]).double(), atol=1e-6, rtol=1e-5)
    repeated = lambda request, candidates: [  # noqa: E731
        [{p: most[layer][head][p] for p in own} for head, own in enumerate(heads)]
        for layer, heads in enumerate(candidates)
    ]
    compact(request, config, 2, repeated)


# ---------------------------------------------------------------------- drafts


def test_drafts_accepted_before_a_compaction_are_observed_with_it():
    left = []
    for speculated in (False, True):
        request = Request(14)
        config = configure("h2o", "global")
        request.observer.watch("r", config.build_policy())
        left.append([])
        for tokens, blocks in ((33, 3), (20, 4), (13, 4)):
            request.compute(tokens)
            if speculated:
                request.compute(6, num_drafts=4)
                request.num_tokens -= 2  # two drafts are rejected
            else:
                request.compute(4)
            job = request.job(config, blocks, 3)
            request.observer.settle(job)
            work = Work(job, request.observer.tables.get("r"), request.observer.of("r"))
            (table,) = request.compactor.run([work])
            request.observer.tables["r"] = table
            request.boundary, request.destination = job.boundary, list(job.destination)
            left[-1] += [table.positions, *(state.clone() for state in request.observer.of("r").states)]
    for alone, drafted in zip(*left, strict=True):
        torch.testing.assert_close(alone, drafted, atol=1e-5, rtol=1e-5)


def test_layers_have_their_own_scale_and_soft_cap():
    request = Request(15)
    request.layers[:] = [
        LayerAttention(0.1 + layer, 2.0 * layer, index=FIRST_LAYER + 2 * layer) for layer in range(3)
    ]
    config = configure("spy", "uniform")
    request.observer.watch("r", config.build_policy())
    Spy.seen = {"observe": [], "score": [], "refine": [], "carry": []}
    request.compute(31)
    compact(request, config, 2)
    for name in ("observe", "score"):
        shown = [(seen.scale, seen.logits_soft_cap) for seen in Spy.seen[name]]
        assert shown == [(0.1, 0.0), (1.1, 2.0), (2.1, 4.0)]
