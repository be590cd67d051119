"""Compactions into records: which tokens, in which bytes, where; against lists of records."""

import itertools
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor
from worker.compaction import Absolute, ByKey, ByTable, Request

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.formats import FORMATS, RECORD, RecordFormat
from vllm_kvcompress.matching import Fit
from vllm_kvcompress.paging.job import Job, Solve
from vllm_kvcompress.plan import Plan
from vllm_kvcompress.policies import POLICIES
from vllm_kvcompress.requests.cache import PackedCache
from vllm_kvcompress.worker import solving
from vllm_kvcompress.worker.compactor import Compactor
from vllm_kvcompress.worker.work import Work

BLOCK, SIZE = 32, 16
SINGLE = [name for name, format in FORMATS.items() if format.parts == (format,)]


@pytest.fixture(autouse=True)
def policies(monkeypatch):
    for policy in (ByKey, Absolute, ByTable):
        monkeypatch.setitem(POLICIES, policy.name, policy)


@dataclass
class Head:
    """What one head holds below the boundary: the content of its records and the positions in each."""

    content: list[Tensor] = field(default_factory=list)
    positions: list[list[int]] = field(default_factory=list)

    def scores(self, format: RecordFormat) -> list[list[float]]:
        """Of the tokens of each record, as `by_key` has them: the keys are what was written."""
        return [format.decode(own, SIZE)[0][:, 0].tolist() for own in self.content]


class Encoded(Request):
    """A request whose tokens become records."""

    def __init__(self, format: str, seed: int = 0, packings=("plain", "plain")) -> None:
        super().__init__(seed, block_size=BLOCK, size=SIZE, most=2700, packings=packings)
        self.format = FORMATS[format]
        self.per_page = 2 * BLOCK * SIZE * 4 // self.format.record_bytes(SIZE)
        assert self.per_page > 1
        layers, heads = range(self.grid.num_layers), range(self.grid.num_heads)
        self.heads = {(layer, head): Head() for layer in layers for head in heads}

    def record(self, layer: int, head: int, positions: list[int]) -> Tensor:
        both = self.keys[layer, head, positions], self.values[layer, head, positions]
        return self.format.encode(*both)

    def compact(
        self, config: KVCompressionConfig, num_blocks: int, raw_tail: int = 3, reuse: str = "none"
    ) -> Job:
        """Run one Job and check everything that it leaves."""
        job = self.job(config, num_blocks, raw_tail, reuse)
        fresh = list(range(self.boundary, job.boundary))
        wanted = self._wanted(config, fresh, num_blocks * self.grid.pages_per_block)
        before = self.cache.pages.clone()
        (table,) = self.compactor.run([Work(job, self.observer.tables.get("r"), self.observer.of("r"))])
        self.taken = set(job.destination)
        self._check_bytes(job, table, wanted, before)
        self._take_records(job, table, wanted)
        return job

    def _wanted(
        self, config: KVCompressionConfig, fresh: list[int], num_pages: int
    ) -> dict[tuple[int, int], Head]:
        """Old records that stay, then new ones of raw tokens in position order."""
        units = {at: self._units(at, config, fresh) for at in self.heads}
        wanted = {}
        for (at, head), pages in zip(self.heads.items(), self._pages(config, units, num_pages), strict=True):
            # Of equals the earlier: records before raw tokens.
            ranked = sorted(units[at], key=lambda unit: -unit[0])[: pages * self.per_page]
            old = sorted(number for _, number, _ in ranked if number is not None)
            new = sorted(token for _, number, tokens in ranked if number is None for token in tokens)
            kept = Head([head.content[i] for i in old], [head.positions[i] for i in old])
            for begin in range(0, len(new), RECORD):
                own = new[begin : begin + RECORD]
                kept.content.append(self.record(*at, own))
                kept.positions.append(own)
            wanted[at] = kept
        return wanted

    def _units(self, at: tuple[int, int], config: KVCompressionConfig, fresh: list[int]):
        """What stays or goes together: a score, a record's number or None, and the tokens."""
        head = self.heads[at]
        units = []
        for number, (scores, positions) in enumerate(
            zip(head.scores(self.format), head.positions, strict=True)
        ):
            protected = [
                math.inf if p < config.sink_tokens else s for s, p in zip(scores, positions, strict=True)
            ]
            units.append((sum(protected) / RECORD, number, positions))
        score = {p: math.inf if p < config.sink_tokens else float(self.keys[*at, p, 0]) for p in fresh}
        best = sorted(fresh, key=lambda p: (-score[p], p))
        for begin in range(0, len(best), RECORD):
            own = best[begin : begin + RECORD]
            units.append((sum(score[p] for p in own) / RECORD, None, own))
        return units

    def _pages(self, config: KVCompressionConfig, units, num_pages: int) -> list[int]:
        """Pages of each head: all that it needs, as many for each, or where one less costs most."""
        need = [-(-len(own) // self.per_page) for own in units.values()]
        if config.keeps_all:
            assert sum(need) == num_pages
            return need
        if config.allocation == "uniform":
            each, more = divmod(num_pages, len(need))
            pages = [each + (index < more) for index in range(len(need))]
            assert all(own <= most for own, most in zip(pages, need, strict=True))
            return pages
        pages = list(need)
        in_page = self.per_page * RECORD
        tokens = []
        for at, own in units.items():
            scores = []
            for mean, number, positions in own:
                if number is not None:
                    scores += [mean] * RECORD
                else:
                    scores += [
                        math.inf if p < config.sink_tokens else float(self.keys[*at, p, 0]) for p in positions
                    ]
            tokens.append(sorted(scores))
        while sum(pages) > num_pages:
            # The page that a head gives up next holds what is left of its worst tokens.
            cost = [
                own[len(own) - (pages[head] - 1) * in_page - 1] if pages[head] > 1 else math.inf
                for head, own in enumerate(tokens)
            ]
            cheapest = min(range(len(cost)), key=lambda head: (cost[head], -head))
            pages[cheapest] -= 1
        return pages

    def _check_bytes(self, job: Job, table, wanted: dict[tuple[int, int], Head], before: Tensor) -> None:
        """The runs hold the records, one behind the other, and no other page has changed."""
        linear = self.linear(list(job.destination))
        content, size = self.cache.content, self.format.record_bytes(SIZE)
        begin = 0
        for (layer, head), kept in wanted.items():
            pages = int(table.counts[layer, head])
            assert pages * self.per_page >= len(kept.content) > (pages - 1) * self.per_page
            for number, record in enumerate(kept.content):
                page = linear[begin + number // self.per_page]
                at = (
                    content.shape[1] - (self.per_page - number % self.per_page) * size
                )  # the last one ends it
                assert torch.equal(content[page, at : at + size], record), (layer, head, number)
            begin += pages
        assert begin == len(linear), "every page of the destination is filled"
        untouched = torch.ones(len(content), dtype=torch.bool)
        untouched[linear] = False
        freed = self.linear(sorted({*job.previous} - {*job.destination}))
        assert not self.cache.pages[freed].any(), "whoever gets them may multiply what is in them with 0"
        untouched[freed] = False
        assert torch.equal(self.cache.pages[untouched], before[untouched])

    def _take_records(self, job: Job, table, wanted: dict[tuple[int, int], Head]) -> None:
        records, positions = self.kept[-1]
        assert records.flatten().tolist() == [len(kept.content) for kept in wanted.values()]
        assert positions.tolist() == [own for kept in wanted.values() for own in kept.positions]
        assert torch.equal(table.units, records) and table.boundary == job.boundary
        if job.config.interval is not None:
            assert torch.equal(table.positions.long(), positions)
        self.observer.tables["r"] = table
        self.heads, self.destination = wanted, list(job.destination)
        for index in range(self.boundary // BLOCK, job.boundary // BLOCK):
            self._free(self.raw.pop(index))
        for block in job.previous:
            self._free(block)
        self.boundary = job.boundary


def configure(format: str, **options) -> KVCompressionConfig:
    return KVCompressionConfig("by_key", recompact_every=1, format=format, **options)


@pytest.mark.parametrize(
    ("name", "allocation", "reuse"),
    [("kivi4", *rest) for rest in itertools.product(["uniform", "global"], ["none", "source", "previous"])]
    + [(name, "global", "both") for name in SINGLE],
)
def test_each_head_keeps_its_best_records_time_after_time(name, allocation, reuse):
    ragged = False
    for seed in range(2):
        request = Encoded(name, seed, ("transposed", "plain") if seed else ("shuffled", "plain"))
        config = configure(name, allocation=allocation, budget=0.5)
        page = request.per_page * RECORD // BLOCK  # blocks that become one
        request.compute(BLOCK * 4 * page + 5)
        request.compact(config, 2, reuse="source" if reuse == "both" else reuse)
        for tokens, blocks in ((3 * page * BLOCK, 3), (page * BLOCK, 3), (BLOCK, 2)):
            request.compute(tokens)
            request.compact(config, blocks, reuse=reuse)
            ragged |= len({len(head.content) for head in request.heads.values()}) > 1
    assert ragged == (allocation != "uniform")


@pytest.mark.parametrize("reuse", ["none", "previous"])
@pytest.mark.parametrize("name", SINGLE)
def test_every_token_stays_and_is_encoded_once(name, reuse):
    request = Encoded(name)
    config = KVCompressionConfig("kivi", format=name)
    request.compute(1)
    for tokens in (300, 40, 128, 128):
        request.compute(tokens)
        records = (request.num_tokens - 3) // RECORD
        first = [head.content[:] for head in request.heads.values()]
        request.compact(config, -(-records // request.per_page), reuse=reuse)
        for head, before in zip(request.heads.values(), first, strict=True):
            assert [p for own in head.positions for p in own] == list(range(request.boundary))
            assert all(map(torch.equal, head.content[: len(before)], before))


def test_scores_that_are_no_numbers_leave_whole_records():
    request = Encoded("kivi2")
    config = configure("kivi2", budget=0.5)
    request.keys[0, 0, ::2, 0] = torch.nan
    request.keys[1, 1, :, 0] = -torch.inf
    blocks = 4 * request.per_page * RECORD // BLOCK
    request.compute(BLOCK * blocks + 3)
    for _ in range(2):
        job = request.job(config, 2, 3)
        (table,) = request.compactor.run([Work(job, request.observer.tables.get("r"))])
        records, positions = request.kept[-1]
        assert (records.flatten() == 2 * request.per_page).all()
        for own in positions.split((records.flatten()).tolist()):
            assert len(own.flatten().unique()) == own.numel() and own.min() == 0
        request.observer.tables["r"] = table
        request.destination, request.boundary = list(job.destination), job.boundary
        request.raw = {i: block for i, block in request.raw.items() if i * BLOCK >= job.boundary}
        request.compute(BLOCK * 2)


@pytest.mark.parametrize("name", ["kivi4", "auto"])
def test_the_most_recent_tokens_have_a_share_of_what_a_head_keeps_in_records(name, monkeypatch):
    shares = []

    def half(self, kept):
        shares.append(kept // 2)
        return shares[-1]

    monkeypatch.setattr(ByKey, "num_recent", half)
    request = Encoded("k4v3" if name == "auto" else name)
    config = configure(name, budget=0.5, allocation="uniform")
    request.compute(BLOCK * 8 * request.per_page + 3)
    job = request.job(config, 3, 3)
    request.compactor.run([Work(job, None)])
    records, positions = request.kept[-1]
    kept = 3 * request.per_page * RECORD  # a page of each head is a block's
    assert shares == [kept // 2]
    for own in positions.split(records.flatten().tolist()):
        assert set(range(job.boundary - kept // 2, job.boundary)) <= set(own.flatten().tolist())
        if name != "auto":  # which may keep more tokens in fewer bits
            assert len(own.flatten()) == kept


def test_what_is_forgotten_leaves_no_bytes_that_are_no_numbers():
    from vllm_kvcompress.requests.state import CompressionState

    request = Encoded("kivi4")
    request.compute(400)
    job = request.compact(KVCompressionConfig("kivi"), -(-(397 // RECORD) // request.per_page))
    state = CompressionState(rows=None, observer=request.observer)
    pages = request.linear(list(job.destination))
    assert request.cache.pages[pages].isnan().any() or request.cache.pages[pages].any()
    state.forget("r")
    assert not request.cache.pages[pages].any()


@pytest.mark.parametrize("allocation", ["uniform", "global", "adaptive", "pyramid"])
@pytest.mark.parametrize("budget", [0.1, 0.25, 0.3])
@pytest.mark.parametrize("step", [32, 64, 256])
def test_as_many_blocks_as_the_scheduler_plans_are_never_too_many(allocation, budget, step):
    """Pages that were left with room take what is new: then a head needs no more pages."""
    request = Encoded("kivi4", 1)
    config = configure("kivi4", allocation=allocation, budget=budget, window=3)
    in_page, held, compacted = request.per_page * RECORD, None, 0
    request.write(640)
    while request.num_tokens + step < request.most:
        plan = Plan.of(config, request.num_tokens, BLOCK, held, in_page)
        if plan is not None:
            job = request.job(config, plan.kept_blocks, request.num_tokens - plan.boundary)
            assert job.boundary == plan.boundary
            (table,) = request.compactor.run([Work(job, request.observer.tables.get("r"))])
            pages = len(job.destination) * request.grid.pages_per_block
            full = table.counts * request.per_page
            assert int(table.counts.sum()) <= pages
            assert bool(((table.units <= full) & (table.units > full - request.per_page)).all())
            if int(table.counts.sum()) < pages:  # then all that there is stays
                held_before = request.observer.tables.get("r")
                old = 0 if held_before is None else held_before.units
                assert torch.equal(
                    table.units, old + len(job.source) * BLOCK // RECORD * torch.ones_like(table.units)
                )
            assert table.pages.shape[:2] == table.counts.shape
            request.observer.tables["r"] = table
            request.free += [*job.source, *job.previous]
            request.raw = {i: block for i, block in request.raw.items() if i * BLOCK >= job.boundary}
            request.destination, request.boundary = list(job.destination), job.boundary
            held, compacted = plan, compacted + 1
        request.write(step)
    assert compacted > 5


# ---------------------------------------------------------------------- what is solved for


def matched(
    steps: list[range], num_shares: int, keys: str = "attention", num_blocks: int = 2, recent: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The pages and the kept tokens of a request whose shares are solved in these steps."""
    request = Encoded("k8v4", 17)
    config = KVCompressionConfig.parse(
        f"attention_matching:queries=prompt,keys={keys},format=k8v4,references=32,window=1,sink_tokens=2,"
        f"recent={recent}"
    )
    request.observer.watch("r", config.build_policy())
    for tokens in (100, 300, 1):
        request.compute(tokens)
    job, observed = replace(request.job(config, num_blocks, 1), solved=True), request.observer.of("r")
    for shares in steps:
        before = request.cache.pages.clone()
        solve = Solve(replace(job, destination=()), num_blocks, shares, num_shares)
        request.compactor.solve(solve, observed)
        assert torch.equal(request.cache.pages, before), "nothing is written yet"
    request.compactor.run([Work(job, None, observed)])
    return request.cache.pages.view(torch.uint8), request.kept[-1][1]  # bytes, which are no numbers


@pytest.mark.parametrize(
    ("num_shares", "keys"), [(3, "attention"), (6, "attention"), (10, "attention"), (6, "omp")]
)
def test_whatever_shares_are_solved_in_a_step_the_same_is_written(num_shares, keys):
    # Of 6 heads; where a rank has fewer layers than another, some of its shares are of none.
    pages, kept = matched([range(num_shares)], num_shares, keys)
    assert len(kept) < 6 * 384 // RECORD, "some tokens are dropped"
    for steps in (
        [range(share, share + 1) for share in range(num_shares)],
        [range(0, 2), range(2, num_shares)],
    ):
        again, also = matched(steps, num_shares, keys)
        assert torch.equal(pages, again) and torch.equal(kept, also)


def test_of_what_is_solved_for_every_head_may_have_the_most_recent_tokens():
    without, kept = (matched([range(6)], 6, recent=recent)[1] for recent in (0.0, 0.25))
    assert len(kept) == len(without) == 6 * 256 // RECORD  # of 384 tokens, in the mean of six heads
    recent = torch.arange(384 - 64, 384)
    assert (kept.flatten() == recent[:, None]).sum(1).eq(6).all()
    assert not (without.flatten() == recent[:, None]).sum(1).eq(6).all()


def test_nothing_is_solved_for_a_head_that_keeps_all_of_its_tokens(monkeypatch):
    def solve(*_):
        raise AssertionError("it is")

    given = []
    monkeypatch.setattr(POLICIES["attention_matching"], "solve", solve)
    monkeypatch.setattr(solving, "Fit", lambda *of_head: given.append(Fit(*of_head)) or given[-1])
    _, kept = matched([range(6)], 6, num_blocks=6)
    assert len(kept) == 6 * 384 // RECORD
    request = Encoded("k8v4", 17)
    request.compute(401)
    for fit, values in zip(given, request.values.flatten(0, 1), strict=True):
        assert torch.equal(fit.values[0], values[:384]) and not fit.bias.any()


def test_heads_are_read_one_by_one_as_they_are_solved_for(monkeypatch):
    read: list[int] = []
    for name in ("read_keys", "read_values"):
        reading = getattr(PackedCache, name)
        monkeypatch.setattr(
            PackedCache,
            name,
            lambda self, pages, *own, reading=reading: read.append(len(pages)) or reading(self, pages, *own),
        )
    solve, before = Compactor.solve, []

    def solved(self, solve_, *args):
        if not before:
            read.clear()  # by whoever noted the prompt's queries
        solve(self, solve_, *args)
        before.append(len(read))

    monkeypatch.setattr(Compactor, "solve", solved)
    matched([range(share, share + 1) for share in range(6)], 6)
    # Keys and values of one head, and of the next one once the share before it is done.
    assert before == [4, 6, 8, 10, 12, 12] and read[:12] == [1] * 12


def test_float32_is_multiplied_as_such_while_it_is_solved_for(monkeypatch):
    policy, seen = POLICIES["attention_matching"], set()
    solve = policy.solve

    def solved(*args):
        units = solve(*args)
        while True:
            seen.add(torch.get_float32_matmul_precision())
            try:
                end = next(units)
            except StopIteration as done:
                return done.value
            yield end

    monkeypatch.setattr(policy, "solve", solved)
    torch.set_float32_matmul_precision("medium")
    try:
        matched([range(0, 3), range(3, 6)], 6)
        assert torch.get_float32_matmul_precision() == "medium", "the model's own"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == {"highest"}


def test_so_many_heads_are_solved_for_at_a_time_as_memory_is_meant_for(monkeypatch):
    policy, given = POLICIES["attention_matching"], []
    solve = policy.solve

    def noted(self, observation, heads, columns, *others):
        given.append((heads, columns.shape))
        return solve(self, observation, heads, columns, *others)

    monkeypatch.setattr(policy, "solve", noted)
    monkeypatch.setattr(solving, "solve_bytes_on", lambda _: 1 << 40)
    matched([range(3)], 3)
    assert [heads for heads, _ in given] == [slice(0, 1), slice(1, 2)] * 3, "on a CPU one by one"
    given.clear()
    monkeypatch.setattr(solving.Solver, "_one_by_one", False)
    matched([range(3)], 3)
    assert [heads for heads, _ in given] == [slice(0, 2)] * 3
    widest = max(shape[1] for _, shape in given)
    given.clear()
    monkeypatch.setattr(
        policy, "fit_bytes", lambda self, heads, tokens, columns, *_: heads * (1 + (columns > widest // 2))
    )
    monkeypatch.setattr(solving, "solve_bytes_on", lambda _: 2)
    matched([range(3)], 3)
    together = [heads for heads, shape in given if shape[1] > widest // 2]
    assert together and all(heads.stop - heads.start == 1 for heads in together)
    assert sorted((heads.start, heads.stop) for heads, _ in given)[0][0] == 0
    assert sum(heads.stop - heads.start for heads, _ in given) == 6
