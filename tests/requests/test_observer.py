"""Records of queries are by position: no chunking, draft or neighbour in the batch changes what they hold."""

import dataclasses
from typing import ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode

from vllm_kvcompress.paging.job import Job, Repetition
from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.plan import SPARE_QUERIES
from vllm_kvcompress.policies import Policy
from vllm_kvcompress.requests.cache import PackedCache
from vllm_kvcompress.requests.cpu_pages import Packing
from vllm_kvcompress.requests.observer import LayerAttention, Observer, QuerySpan, RepeatedSpan
from vllm_kvcompress.requests.tables import RequestTable

LAYERS, HEADS, GROUP, SIZE, BLOCK_SIZE, NUM_BLOCKS = 2, 2, 2, 6, 4, 60
GRID = PageGrid(LAYERS, NUM_BLOCKS, HEADS, BLOCK_SIZE)


@dataclasses.dataclass(frozen=True)
class Window(Policy):
    name: ClassVar[str] = "window_of_a_test"
    paper: ClassVar[str] = "none"
    cost: ClassVar[str] = "none"
    window: int = 5

    def score(self, observation):
        raise AssertionError("not called")


@dataclasses.dataclass(frozen=True)
class Diary(Window):
    """Its state is the list of the queries that it was shown, with their positions."""

    accumulates: ClassVar[bool] = True
    window: int = 0

    def observe(self, observation):
        end = observation.num_tokens
        shown = range(end - len(observation.queries), end)
        return [
            *(observation.state or []),
            *zip(shown, observation.queries.flatten(1).tolist(), strict=True),
        ]


@pytest.fixture
def observer() -> Observer:
    plain = Packing(torch.arange(BLOCK_SIZE * SIZE), BLOCK_SIZE, SIZE)
    pages = torch.randn(LAYERS * NUM_BLOCKS * HEADS, 2, BLOCK_SIZE * SIZE)
    cache = PackedCache(GRID, pages, plain, plain)
    layers = [LayerAttention(0.3, 0.0, index=layer) for layer in range(LAYERS)]
    return Observer(cache, layers, HEADS * GROUP, SIZE, torch.float32, tables={})


QUERIES = torch.randn(LAYERS, 200, HEADS * GROUP, SIZE, generator=torch.Generator().manual_seed(0))


def window_of(observed, layer: int, num_tokens: int) -> torch.Tensor:
    """One layer's queries `[w, Hq, D]`."""
    return observed.window(slice(layer, layer + 1), num_tokens)[:, 0]


def step(observer: Observer, begin: int, end: int, num_drafts: int = 0, name: str = "r", other=None) -> None:
    """Tokens of one request in a batch whose first row is somebody else's and whose last one is padding."""
    observer.num_drafts = {name: num_drafts} if num_drafts else {}
    block_table = torch.arange(NUM_BLOCKS - 1)[None].repeat(3, 1)
    bounds, seq_lens = torch.tensor([0, 2, 2 + end - begin]), torch.tensor([7, end])
    for span in observer.spans(["stranger", name, None], bounds, seq_lens, block_table):
        for layer in range(LAYERS):
            drawn = QUERIES if other is None else other
            query = torch.cat([torch.full((2, HEADS * GROUP, SIZE), 99.0), drawn[layer, begin:end]])
            span.record(layer, query)
            query.fill_(-1e9)  # the buffer is used again


# ---------------------------------------------------------------------- rings


@pytest.mark.parametrize(
    "steps", [[90], [37, 53], [1] * 90, [5] * 18, [89, 1], [1, 89], [36, 1, 37, 16]], ids=str
)
@pytest.mark.parametrize("window", [1, 5, 33])
def test_a_ring_holds_the_last_queries_whatever_the_steps(observer, steps, window):
    observer.watch("r", Window(window))
    assert observer.ring("r").shape == (LAYERS, window + SPARE_QUERIES, HEADS * GROUP, SIZE)
    done = 0
    for size in steps:
        step(observer, done, done + size)
        done += size
        for layer in range(LAYERS) if done >= window else ():
            shown = window_of(observer.of("r"), layer, done)
            assert torch.equal(shown, QUERIES[layer, done - window : done])
    # Earlier windows are there while nothing new has taken their place: rejected drafts were computed after.
    for layer in range(LAYERS):
        back = window_of(observer.of("r"), layer, 90 - SPARE_QUERIES)
        assert torch.equal(back, QUERIES[layer, 90 - SPARE_QUERIES - window : 90 - SPARE_QUERIES])


class NoPlaceTwice(TorchFunctionMode):
    """Which of two values written to one place stays is left open by torch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__setitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            for places in index:
                assert not isinstance(places, torch.Tensor) or places.unique().numel() == places.numel()
        return func(*args, **(kwargs or {}))


def test_a_chunk_longer_than_the_ring_writes_each_slot_once(observer):
    observer.watch("r", Window(5))
    with NoPlaceTwice():
        step(observer, 0, 90)
        with pytest.raises(AssertionError):
            observer.ring("r")[0, torch.tensor([3, 3])] = 0.0


def test_rejected_drafts_leave_the_window_as_if_they_had_never_been(observer):
    observer.watch("r", Window(5))
    step(observer, 0, 40)
    step(observer, 40, 46, num_drafts=5, other=torch.full_like(QUERIES, 7.0))
    step(observer, 40, 41)  # none was accepted
    for layer in range(LAYERS):
        assert torch.equal(window_of(observer.of("r"), layer, 41), QUERIES[layer, 36:41])


def test_tokens_computed_again_after_a_preemption_leave_the_same_window(observer):
    observer.watch("r", Window(5))
    step(observer, 0, 70)
    observer.forget("r")
    assert observer.of("r") is None
    observer.watch("r", Window(5))
    assert not observer.ring("r").any()
    step(observer, 0, 70)
    assert torch.equal(window_of(observer.of("r"), 1, 70), QUERIES[1, 65:70])


def test_requests_have_rings_of_their_own(observer):
    observer.watch("r", Window(5))
    observer.watch("s", Window(5))
    step(observer, 0, 20)
    assert not observer.ring("s").any() and observer.ring("r").any()
    assert len(observer) == 2


def test_a_policy_without_a_window_has_no_ring(observer):
    observer.watch("r", Diary())
    assert observer.ring("r") is None and observer.ring("nobody") is None
    step(observer, 0, 20)


# ---------------------------------------------------------------------- every query


def diary(observer: Observer, layer: int) -> list[tuple[int, list[float]]]:
    return observer.of("r").states[layer]


def entries(layer: int, num_tokens: int) -> list[tuple[int, list[float]]]:
    return list(enumerate(QUERIES[layer, :num_tokens].flatten(1).tolist()))


@pytest.mark.parametrize("steps", [[30], [7, 23], [1] * 30])
def test_every_query_is_shown_once_and_in_order_whatever_the_steps(observer, steps):
    observer.watch("r", Diary())
    done = 0
    for size in steps:
        step(observer, done, done + size)
        done += size
    assert [diary(observer, layer) for layer in range(LAYERS)] == [entries(layer, 30) for layer in range(2)]


@pytest.mark.parametrize("accepted", [0, 1, 3, 4])
def test_drafts_are_shown_once_they_are_accepted(observer, accepted):
    observer.watch("r", Diary())
    step(observer, 0, 20)
    step(observer, 20, 25, num_drafts=4)
    assert diary(observer, 0) == entries(0, 21)
    begin = 21 + accepted
    step(observer, begin, begin + 3, num_drafts=2)  # goes on behind what was accepted
    assert diary(observer, 0) == entries(0, begin + 1)
    step(observer, begin + 3, begin + 4)  # all were
    for layer in range(LAYERS):
        assert diary(observer, layer) == entries(layer, begin + 4)
    assert not observer.of("r").drafts


@pytest.mark.parametrize("accepted", [0, 2, 4])
def test_a_compaction_waits_for_no_draft_that_was_accepted(observer, accepted):
    observer.watch("r", Diary())
    step(observer, 0, 25, num_drafts=4)
    num_tokens = 21 + accepted
    blocks = tuple(range(-(-num_tokens // BLOCK_SIZE)))
    job = Job("r", None, num_tokens, 20, 0, (), blocks[:5], blocks[5:], (40,))
    observer.settle(job)
    for layer in range(LAYERS):
        assert diary(observer, layer) == entries(layer, num_tokens)
    assert not observer.of("r").drafts
    observer.settle(job)  # nothing waits any more
    observer.settle(dataclasses.replace(job, request_id="nobody"))
    assert diary(observer, 0) == entries(0, num_tokens)


def test_keys_of_a_compacted_request_are_its_runs_and_then_its_raw_blocks(observer):
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Look(Diary):
        def observe(self, observation):
            seen.append(dataclasses.replace(observation, queries=observation.queries.clone()))

    counts = torch.tensor([[1, 3], [2, 2]])
    kept = torch.arange(8 * BLOCK_SIZE, dtype=torch.int32).view(8, BLOCK_SIZE) * 2
    observer.tables["r"] = RequestTable(GRID, torch.tensor([50, 45]), counts, 64, kept)
    observer.watch("r", Look())
    step(observer, 64, 70)

    def page(layer, block, head):
        return observer.cache.pages[(layer * NUM_BLOCKS + block) * HEADS + head, 0].view(BLOCK_SIZE, SIZE)

    runs = [page(layer, block, head) for block in (50, 45) for layer in (0, 1) for head in (0, 1)]
    for layer, first in ((0, 0), (1, 4)):
        shown = seen[layer]
        begin = first
        for head in range(HEADS):
            own = runs[begin : begin + counts[layer, head]]
            positions = kept[begin : begin + counts[layer, head]].flatten().tolist()
            begin += int(counts[layer, head])
            raw = torch.cat([page(layer, 16, head), page(layer, 17, head)])[:6]
            wanted = torch.cat([*own, raw])
            assert torch.equal(shown.keys[head, -len(wanted) :], wanted)
            assert shown.positions()[head, -len(wanted) :].tolist() == [*positions, *range(64, 70)]
        padding = shown.padding
        assert ([0, 0] if padding is None else padding.tolist()) == ([8, 0] if layer == 0 else [0, 0])
        assert shown.num_scored == shown.keys.shape[1] and shown.num_tokens == 70
        assert torch.equal(shown.queries.flatten(1, 2), QUERIES[layer, 64:70])


# ---------------------------------------------------------------------- which rows are noted


@pytest.mark.parametrize("policy", [Window(5), Diary(3)], ids=["window", "diary"])
def test_a_paused_record_stays_as_it_is_until_it_goes_on(observer, policy):
    for name in ("r", "s"):
        observer.watch(name, policy)
        step(observer, 0, 20, name=name)
    before = observer.ring("r").clone(), [list(state or []) for state in observer.of("r").states]
    observer.pause("r")
    observer.pause("nobody")
    assert observer.ring("r") is None and observer.ring("s") is not None, "no kernel writes it either"
    for name in ("r", "s"):
        step(observer, 20, 40, name=name)
    held = observer.of("r")
    assert torch.equal(held.ring, before[0]) and [list(state or []) for state in held.states] == before[1]
    assert torch.equal(window_of(held, 1, 20), QUERIES[1, 20 - policy.window : 20])
    assert torch.equal(window_of(observer.of("s"), 1, 40), QUERIES[1, 40 - policy.window : 40])
    held.paused = False
    step(observer, 40, 50)
    assert torch.equal(window_of(observer.of("r"), 1, 50), QUERIES[1, 50 - policy.window : 50])


def test_rows_without_a_record_are_passed_over(observer):
    observer.watch("r", Window(5))
    observer.watch("s", Diary())
    names = [None, "stranger", "s", "r", None]
    bounds, seq_lens = torch.tensor([0, 1, 3, 6, 10, 10]), torch.tensor([5, 6, 7, 8, 0])
    spans = observer.spans(names, bounds, seq_lens, torch.ones(5, 9, dtype=torch.int32))
    assert [(type(span), span.tokens, span.first) for span in spans] == [
        (QuerySpan, slice(3, 6), 4),
        (QuerySpan, slice(6, 10), 4),
    ]
    assert [span.observed for span in spans] == [observer.of("s"), observer.of("r")]


def test_drafts_are_counted_for_their_own_request(observer):
    for name in ("r", "s"):
        observer.watch(name, Diary())
    observer.num_drafts = {"s": 2}
    spans = observer.spans(["r", "s"], torch.tensor([0, 3, 6]), torch.tensor([9, 9]), torch.ones(2, 9))
    assert [span.num_drafts for span in spans] == [0, 2]


@pytest.mark.parametrize("seq_len", [33, 35, 36, 37])
def test_a_rows_blocks_are_those_of_its_raw_tokens(observer, seq_len):
    observer.watch("r", Window(5))
    table = RequestTable(GRID, torch.tensor([50]), torch.ones(2, 2, dtype=torch.int64), 24, None)
    observer.tables["r"] = table
    block_table = torch.arange(40)[None] + 100
    (span,) = observer.spans(["r"], torch.tensor([0, 1]), torch.tensor([seq_len]), block_table)
    assert span.context.blocks.tolist() == [106 + index for index in range(-(-(seq_len - 24) // 4))]
    assert span.context.table is table
    observer.tables.clear()
    (span,) = observer.spans(["r"], torch.tensor([0, 1]), torch.tensor([seq_len]), block_table)
    assert span.context.blocks.tolist() == [100 + index for index in range(-(-seq_len // 4))]
    assert span.context.blocks.dtype == torch.int64


def test_where_a_kernel_writes_rings_spans_are_for_policies_that_watch_every_query(observer):
    observer.kernel_writes_rings = True
    rows = ["w", "d", "r:repeat-0"], torch.tensor([0, 1, 2, 3]), torch.tensor([9, 9, 9]), torch.ones(3, 9)
    observer.watch("w", Window(5))
    assert not observer.notes(rows[0]) and observer.spans(*rows) == []
    observer.watch("d", Diary(3))
    assert observer.notes(rows[0]) and not observer.notes(["w", None, "r:repeat-0"])
    (span,) = observer.spans(*rows)
    assert span.observed is observer.of("d") and not span.ring
    span.record(0, torch.ones(3, HEADS * GROUP, SIZE))
    assert not observer.ring("d").any(), "the kernel does"
    observer.forget("d")
    assert not observer.notes(rows[0])
    repetition = Repetition("r:repeat-0", "w", 0, 4, 8)
    observer.watch_repetition(repetition)
    assert observer.notes(rows[0]) and not observer.notes(["w", None]), "in the steps that it is part of"
    (span,) = observer.spans(*rows)
    assert isinstance(span, RepeatedSpan) and span.part is repetition
    assert span.observed is observer.of("w") and span.tokens == slice(2, 3)
    observer.forget("r:repeat-0")
    assert not observer.notes(rows[0])


def test_without_such_a_kernel_every_record_needs_spans(observer):
    assert not observer.notes(["w"])
    observer.watch("w", Window(5))
    assert observer.notes(["w"])
    (span,) = observer.spans(["w"], torch.tensor([0, 1]), torch.tensor([9]), torch.ones(1, 9))
    assert span.ring


def test_a_repetition_whose_owner_is_gone_is_passed_over(observer):
    observer.watch_repetition(Repetition("r:repeat-0", "r", 0, 4, 8))
    rows = ["r:repeat-0"], torch.tensor([0, 1]), torch.tensor([9]), torch.ones(1, 9)
    assert observer.spans(*rows) == []


def test_queries_of_a_repetition_are_noted_once_and_those_of_drafts_never(observer):
    @dataclasses.dataclass(frozen=True)
    class Noting(Diary):
        def repeat(self, observation, part):
            assert (part.columns, part.num_context) == (slice(0, 4), 8)
            end = observation.num_tokens
            return [*(observation.state or ()), *range(end - len(observation.queries), end)]

    observer.watch("r", Noting(3))
    observer.watch_repetition(Repetition("one", "r", 0, 4, 8))
    observer.watch_repetition(Repetition("two", "r", 0, 4, 8))

    def step(name: str, first: int, count: int, drafts: int = 0) -> None:
        observer.num_drafts = {name: drafts}
        rows = [name], torch.tensor([0, count]), torch.tensor([first + count]), torch.ones(1, 9)
        (span,) = observer.spans(*rows)
        span.record(0, torch.ones(count, HEADS * GROUP, SIZE))

    step("one", 6, 5)  # the context's last tokens again
    step("one", 11, 3, drafts=2)
    step("one", 6, 7)  # it was preempted, and goes on from where it was
    step("two", 8, 2)
    assert observer.of("r").states[0] == [8, 9, 10, 11, 12, 8, 9]


def test_a_ring_has_the_queries_dtype(observer):
    half = dataclasses.replace(observer, dtype=torch.float16)
    half.watch("h", Window(2))
    assert half.ring("h").dtype == torch.float16


def test_keys_are_read_for_those_that_observe_them(observer):
    shown = []

    @dataclasses.dataclass(frozen=True)
    class Blind(Diary):
        observes_keys: ClassVar[bool] = False

        def observe(self, observation):
            shown.append(observation.keys.shape)
            return super().observe(observation)

    observer.watch("r", Blind())
    step(observer, 0, 30)
    assert shown == [(HEADS, 30, 0)] * LAYERS
    observer.watch("r", Diary())
    step(observer, 0, 30)
    assert len(observer.of("r").states[0]) == 30
