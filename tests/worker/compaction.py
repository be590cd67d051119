"""One request in a cache of random pages, and what compacting it must leave: lists of token positions.

Nothing here uses the code under test but the objects that it is handed.
"""

import bisect
import dataclasses
import math
import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.paging.job import Job
from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.policies import LayerObservation, Policy
from vllm_kvcompress.requests.cache import PackedCache
from vllm_kvcompress.requests.cpu_pages import Packing
from vllm_kvcompress.requests.observer import LayerAttention, Observer
from vllm_kvcompress.requests.tables import RequestTable
from vllm_kvcompress.worker.compactor import Compactor
from vllm_kvcompress.worker.work import Work

SCALE = 0.4
FIRST_LAYER = 5  # as on a later pipeline rank


@dataclass(frozen=True)
class ByKey(Policy):
    """The first element of a token's key is its score."""

    name: ClassVar[str] = "by_key"
    paper: ClassVar[str] = "none"
    cost: ClassVar[str] = "none"

    def score(self, observation: LayerObservation) -> Tensor:
        return observation.keys[:, : observation.num_scored, 0].float().clone()


@dataclass(frozen=True)
class Absolute(ByKey):
    """Scores that may be compared with a threshold."""

    name: ClassVar[str] = "absolute"
    absolute: ClassVar[bool] = True


@dataclass(frozen=True)
class ByTable(Policy):
    """Scores by layer and position: `TABLE[layer][head, position]`."""

    name: ClassVar[str] = "by_table"
    paper: ClassVar[str] = "none"
    cost: ClassVar[str] = "none"
    reads_keys: ClassVar[bool] = False
    table: ClassVar[dict[int, Tensor]] = {}

    def score(self, observation: LayerObservation) -> Tensor:
        return self.table[observation.layer].gather(1, observation.positions())[:, : observation.num_scored]


def packing(kind: str, block_size: int, size: int) -> Packing:
    plain = torch.arange(block_size * size)
    order = {
        "plain": plain,
        "transposed": plain.view(block_size, size).T.reshape(-1),
        "shuffled": plain[torch.randperm(len(plain), generator=torch.Generator().manual_seed(7))],
    }[kind]
    return Packing(order, block_size, size)


def check_pages(kept) -> None:
    """Whatever is copied is there, also what fills pages that nobody reads."""
    row = kept.row[:, None]
    assert (kept.pages[row, kept.columns // (kept.columns.shape[1])] >= 0).all()


class MovingCache(PackedCache):
    """Writes page after page where it is told that no target is read, as a kernel on a GPU does."""

    def rewrite(self, kept, target, overlaps):
        check_pages(kept)
        if overlaps:
            super().rewrite(kept, target, overlaps)
            return
        for row, columns, page in zip(kept.row.tolist(), kept.columns, target.tolist(), strict=True):
            own = kept.pages[row : row + 1]
            both = self.read_keys(own), self.read_values(own)
            how = self.key_packing, self.value_packing
            packed = [way.pack(plain[0, columns]) for way, plain in zip(how, both, strict=True)]
            self.pages[page] = torch.stack(packed)


class Request:
    """Attributes:
    held: per layer and head, the positions that the head still has below `boundary`, ascending.
    keys, values: `[L, H, most, D]`, of every token that it will have.
    queries: `[L, most, Hq, D]`, likewise.
    """

    def __init__(
        self, seed=0, layers=3, heads=2, group=2, block_size=4, size=6, most=120, packings=("plain", "plain")
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.random = random.Random(seed)
        self.most = most
        num_blocks = 3 * most // block_size
        self.grid = PageGrid(layers, num_blocks, heads, block_size)
        self.packings = [packing(kind, block_size, size) for kind in packings]
        pages = torch.randn(layers * num_blocks * heads, 2, block_size * size, generator=draw)
        self.cache = MovingCache(self.grid, pages, *self.packings)
        self.keys = torch.randn(layers, heads, most, size, generator=draw)
        # Heads whose scores and attention differ in weight, so that allocations differ.
        self.keys *= torch.rand(layers, heads, 1, 1, generator=draw) * 3 + 0.2
        self.keys[..., 0] += torch.randn(layers, heads, 1, generator=draw)
        self.values = torch.randn(layers, heads, most, size, generator=draw)
        self.queries = torch.randn(layers, most, heads * group, size, generator=draw) * 2
        self.layers = [LayerAttention(SCALE, 0.0, index=FIRST_LAYER + 2 * layer) for layer in range(layers)]
        self.observer = Observer(self.cache, self.layers, heads * group, size, torch.float32, tables={})
        self.compactor = Compactor(self.cache, self.layers)
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.compactor.listeners.append(lambda job, counts, kept: self.kept.append((counts, kept)))
        self.free = list(range(1, num_blocks))
        self.random.shuffle(self.free)
        self.num_tokens, self.boundary = 0, 0
        self.raw: dict[int, int] = {}  # block of the tokens from index·block_size on
        self.destination: list[int] = []
        self.taken: set[int] = set()  # of what was freed in the last step
        self.held: list[list[list[int]]] = [[[] for _ in range(heads)] for _ in range(layers)]

    def move_in_with(self, other: "Request") -> None:
        """Have one pool and one compactor with a request of the same shape; before either has computed."""
        self.cache, self.compactor, self.kept = other.cache, other.compactor, other.kept
        self.observer = dataclasses.replace(self.observer, cache=other.cache, _observed={}, _repetitions={})
        self.free = [other.free.pop() for _ in range(len(other.free) // 2)]

    # ------------------------------------------------------------------ pages, spelled out

    def page(self, layer: int, block: int, head: int) -> int:
        return layer * self.grid.num_blocks * self.grid.num_heads + block * self.grid.num_heads + head

    def linear(self, destination: list[int]) -> list[int]:
        """Every page of some blocks: block by block, in it layer by layer, in it head by head."""
        layers, heads = range(self.grid.num_layers), range(self.grid.num_heads)
        return [self.page(layer, block, head) for block in destination for layer in layers for head in heads]

    def packed(self, layer: int, head: int, positions: list[int]) -> Tensor:
        """What the page of these tokens holds."""
        both = self.keys[layer, head, positions], self.values[layer, head, positions]
        return torch.stack(
            [plain.flatten()[how.order] for plain, how in zip(both, self.packings, strict=True)]
        )

    # ------------------------------------------------------------------ steps

    def compute(self, num_tokens: int, num_drafts: int = 0) -> None:
        """A step: keys and values of the next tokens are written, and their queries shown to the observer."""
        begin = self.num_tokens
        self.write(num_tokens)
        self.observer.num_drafts = {"r": num_drafts}
        bounds, seq_lens = torch.tensor([0, num_tokens]), torch.tensor([self.num_tokens])
        for span in self.observer.spans(["r"], bounds, seq_lens, self.block_table()[None]):
            for layer in range(self.grid.num_layers):
                span.record(layer, self.queries[layer, begin : self.num_tokens])

    def block_table(self, width: int = 0) -> Tensor:
        """Blocks by position, `[W]` int32."""
        table = torch.zeros(max(width, 1 + max(self.raw, default=0)), dtype=torch.int32)
        for index, block in self.raw.items():
            table[index] = block
        return table

    def write(self, num_tokens: int) -> None:
        """Keys and values of the next tokens are in their blocks."""
        size, begin, end = self.grid.block_size, self.num_tokens, self.num_tokens + num_tokens
        for index in range(begin // size, -(-end // size)):
            block = self.raw.get(index)
            if block is None:
                block = self.raw[index] = self.free.pop()
            tokens = list(range(index * size, index * size + size))
            for layer in range(self.grid.num_layers):
                for head in range(self.grid.num_heads):
                    self.cache.pages[self.page(layer, block, head)] = self.packed(layer, head, tokens)
        self.num_tokens = end

    def job(self, config: KVCompressionConfig, num_blocks: int, raw_tail: int, reuse: str = "none") -> Job:
        """A Job that leaves at least `raw_tail` raw tokens and writes to blocks of what `reuse` names."""
        size = self.grid.block_size
        boundary = (self.num_tokens - raw_tail) // size * size
        source = [self.raw[index] for index in range(self.boundary // size, boundary // size)]
        tail = [self.raw[index] for index in range(boundary // size, -(-self.num_tokens // size))]
        own = {
            "none": [],
            "source": list(source),
            "previous": list(self.destination),
            "both": [*source, *self.destination],
        }[reuse]
        self.random.shuffle(own)
        destination = own[:num_blocks]
        if reuse == "both" and self.destination and not {*destination} & {*self.destination}:
            destination[0] = self.destination[0]
        destination += [self.free.pop() for _ in range(num_blocks - len(destination))]
        self.random.shuffle(destination)
        return Job(
            request_id="r",
            config=config,
            num_tokens=self.num_tokens,
            boundary=boundary,
            previous_boundary=self.boundary,
            previous=tuple(self.destination),
            source=tuple(source),
            tail=tuple(tail),
            destination=tuple(destination),
        )

    def candidates(self, job: Job) -> list[list[list[int]]]:
        """Per layer and head, the positions that may be kept."""
        fresh = list(range(self.boundary, job.boundary))
        return [[own + fresh for own in heads] for heads in self.held]

    def run(self, job: Job, wanted: list[list[list[int]]]) -> None:
        """Run the Job and check everything it leaves: `wanted` are the kept positions per layer and head."""
        run_together([self], [job], [wanted])

    def _filled(self, job: Job, wanted: list[list[list[int]]]) -> tuple[Job, list[int]]:
        """The Job with what of its destination is filled, and the pages of the rest, which are freed."""
        pages = sum(len(own) for heads in wanted for own in heads) // self.grid.block_size
        filled, rest = divmod(pages, self.grid.pages_per_block)
        assert rest == 0 and (filled == len(job.destination) or job.config.threshold is not None)
        self.free += job.destination[filled:]
        unused = self.linear(list(job.destination[filled:]))
        return dataclasses.replace(job, destination=job.destination[:filled]), unused

    def _write(self, pages: Tensor, job: Job, wanted: list[list[list[int]]]) -> None:
        """Put the kept tokens where the Job should have put them."""
        target, size = iter(self.linear(list(job.destination))), self.grid.block_size
        for layer, heads in enumerate(wanted):
            for head, own in enumerate(heads):
                for begin in range(0, len(own), size):
                    pages[next(target)] = self.packed(layer, head, own[begin : begin + size])
        assert next(target, None) is None, "every page of the destination is filled"

    def _take(
        self, job: Job, wanted: list[list[list[int]]], new: RequestTable, counts: Tensor, kept: Tensor
    ) -> None:
        """Check what the Job says that it left, and go on with it."""
        lengths, size = counts.flatten().tolist(), self.grid.block_size
        kept = kept[: sum(lengths)]
        runs = kept.split(lengths)
        got = [run.flatten().tolist() for run in runs]
        assert got == [own for heads in wanted for own in heads]
        assert torch.equal(new.counts, counts) and new.boundary == job.boundary
        assert new.destination.tolist()[: new.num_blocks] == list(job.destination)
        if job.config.interval is None:
            assert new.positions is None
        else:
            assert new.positions.dtype == torch.int32 and new.positions.tolist()[: len(kept)] == kept.tolist()
        self.observer.tables["r"] = new
        self.held, self.destination = wanted, list(job.destination)
        for index in range(self.boundary // size, job.boundary // size):
            self._free(self.raw.pop(index))
        for block in job.previous:
            self._free(block)
        self.boundary = job.boundary

    def _free(self, block: int) -> None:
        """Somebody else has it now, and writes what would show wherever it is read."""
        if block in self.taken:
            return
        for layer in range(self.grid.num_layers):
            for head in range(self.grid.num_heads):
                self.cache.pages[self.page(layer, block, head)] = 1e6
        self.free.insert(0, block)

    # ------------------------------------------------------------------ attention, token by token

    def attention(self, layer: int, query_head: int, position: int) -> dict[int, float]:
        """What the query at a position pays to each position that its head holds, in float64."""
        head = query_head // (self.queries.shape[2] // self.grid.num_heads)
        seen = self.held[layer][head] + list(range(self.boundary, position + 1))
        logits = self.keys[layer, head, seen].double() @ self.queries[layer, position, query_head].double()
        return dict(zip(seen, (logits * SCALE).softmax(0).tolist(), strict=True))


def run_together(requests: list[Request], jobs: list[Job], wanted: list[list[list[list[int]]]]) -> None:
    """Run a Job of each of several requests with one pool, and check everything that is left."""
    cache, compactor = requests[0].cache, requests[0].compactor
    expected, told = cache.pages.clone(), len(requests[0].kept)
    works = []
    for request, job in zip(requests, jobs, strict=True):
        request.observer.settle(job)
        works.append(Work(job, request.observer.tables.get("r"), request.observer.of("r")))
    tables = compactor.run(works)
    for request in requests:
        request.taken = {block for job in jobs for block in job.destination}
    each = []
    for request, job, kept in zip(requests, jobs, wanted, strict=True):
        job, unused = request._filled(job, kept)
        expected[unused] = cache.pages[unused]  # nobody reads them
        request._write(expected, job, kept)
        each.append((request, job, kept))
    assert torch.equal(cache.pages, expected), "no other page is touched"
    said = requests[0].kept[told:]
    for (request, job, kept), new, (counts, positions) in zip(each, tables, said, strict=True):
        request._take(job, kept, new, counts, positions)


# ---------------------------------------------------------------------- selection and allocations, in loops


def kept_of(candidates, scores, counts, block_size: int) -> list[list[list[int]]]:
    """The best candidates of each head: the earlier one wins a tie. `scores` are dictionaries by position."""
    out = []
    for positions, of_heads, pages in zip(candidates, scores, counts, strict=True):
        out.append([])
        for own, score, count in zip(positions, of_heads, pages, strict=True):
            best = sorted(own, key=lambda position: (-score[position], position))  # noqa: B023 (used at once)
            out[-1].append(sorted(best[: count * block_size]))
    return out


def counts_of(config: KVCompressionConfig, candidates, scores, num_pages: int, block_size: int):
    """Pages `[L][H]`; `scores` are dictionaries by position, +inf for what is protected."""
    lists = [
        [[score[p] for p in own] for own, score in zip(*of_layer, strict=True)]
        for of_layer in zip(candidates, scores, strict=True)
    ]
    low = [[max(1, -(-own.count(math.inf) // block_size)) for own in heads] for heads in lists]
    high = [[len(own) // block_size for own in heads] for heads in lists]
    return ALLOCATE[config.build_allocation().name](config, lists, num_pages, block_size, low, high)


def whole(wanted: list[float], total: int, low: list[int], high: list[int]) -> list[int]:
    pages = [min(max(math.floor(w), a), b) for w, a, b in zip(wanted, low, high, strict=True)]
    heads = range(len(pages))
    while sum(pages) < total:
        pages[max((h for h in heads if pages[h] < high[h]), key=lambda h: wanted[h] - pages[h])] += 1
    while sum(pages) > total:
        pages[max((h for h in reversed(heads) if pages[h] > low[h]), key=lambda h: pages[h] - wanted[h])] -= 1
    return pages


def _flat(rows: list[list[int]]) -> list[int]:
    return [each for row in rows for each in row]


def _rows(flat: list[int], like: list[list[int]]) -> list[list[int]]:
    heads = len(like[0])
    return [flat[begin : begin + heads] for begin in range(0, len(flat), heads)]


def _uniform(config, lists, total, size, low, high):
    wanted = [total / len(_flat(low))] * len(_flat(low))
    return _rows(whole(wanted, total, _flat(low), _flat(high)), low)


def _adaptive(config, lists, total, size, low, high):
    alpha, heads = config.build_allocation().alpha, len(low[0])
    shares = whole([total / len(low)] * len(low), total, [sum(r) for r in low], [sum(r) for r in high])
    counts = []
    for of_heads, share, least, most in zip(lists, shares, low, high, strict=True):
        pooled = sorted((-score, head) for head, own in enumerate(of_heads) for score in own)
        taken = [head for _, head in pooled[: share * size]]
        wanted = [(1 - alpha) * taken.count(head) / size + alpha * share / heads for head in range(heads)]
        counts.append(whole(wanted, share, least, most))
    return counts


def _pyramid(config, lists, total, size, low, high):
    layers, heads = len(low), len(low[0])
    longest = max(len(own) for of_heads in lists for own in of_heads)
    mean = total * size / (layers * heads)
    last = mean // config.build_allocation().beta
    first = 2 * mean - last
    if first >= longest:
        first, last = longest, 2 * mean - longest
    wanted = [(first + (last - first) * layer / (layers - 1)) / size for layer in range(layers)]
    flat = whole([w for w in wanted for _ in range(heads)], total, _flat(low), _flat(high))
    return _rows(flat, low)


def _global(config, lists, total, size, low, high):
    counts = [list(row) for row in high]
    costs = [[sorted(own) for own in of_heads] for of_heads in lists]
    cells = [(layer, head) for layer in range(len(low)) for head in range(len(low[0]))]

    def cost(cell):  # the best token that must go for the next page of this head
        layer, head = cell
        return costs[layer][head][(high[layer][head] - counts[layer][head]) * size + size - 1]

    while sum(_flat(counts)) > total:
        # (The first of the reversed ones: later heads lose ties.)
        layer, head = min((c for c in reversed(cells) if counts[c[0]][c[1]] > low[c[0]][c[1]]), key=cost)
        counts[layer][head] -= 1
    return counts


def _profile(config, lists, total, size, low, high):
    profile = config.build_allocation().profile
    place = math.log(total / sum(_flat(high)))
    known = [math.log(budget) for budget in profile.budgets]
    place = min(max(place, known[0]), known[-1])
    after = min(max(bisect.bisect_left(known, place), 1), len(known) - 1)
    part = (place - known[after - 1]) / (known[after] - known[after - 1])
    before, later = (profile.shares[index].flatten().tolist() for index in (after - 1, after))
    shares = [(1 - part) * a + part * b for a, b in zip(before, later, strict=True)]

    def at(level):
        bounds = zip(shares, _flat(low), _flat(high), strict=True)
        return [min(max(level * share, a), b) for share, a, b in bounds]

    lower, upper = 0.0, 1e9
    for _ in range(200):
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if sum(at(middle)) < total else (lower, middle)
    return _rows(whole(at(upper), total, _flat(low), _flat(high)), low)


ALLOCATE = {
    "uniform": _uniform,
    "adaptive": _adaptive,
    "pyramid": _pyramid,
    "global": _global,
    "profile": _profile,
}
