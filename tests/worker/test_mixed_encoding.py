"""Compactions into records of several kinds: which tokens, in which bytes, where; against lists."""

from dataclasses import dataclass

import pytest
import torch
from formats.test_mixed import walked
from worker.compaction import ByKey, Request

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.formats import FORMATS, RECORD, Mixed
from vllm_kvcompress.policies import POLICIES
from vllm_kvcompress.worker.work import Work

BLOCK, SIZE = 128, 16
MIXED = [name for name, format in FORMATS.items() if isinstance(format, Mixed)]


@pytest.fixture(autouse=True)
def policies(monkeypatch):
    monkeypatch.setitem(POLICIES, ByKey.name, ByKey)


@dataclass
class Record:
    part: int
    content: torch.Tensor
    positions: list[int]


class Encoded(Request):
    """A request whose tokens become records of the parts of a format."""

    def __init__(self, format: Mixed, seed: int) -> None:
        super().__init__(seed, block_size=BLOCK, size=SIZE, most=2600, packings=("transposed", "plain"))
        self.format = format
        self.sizes = [part.record_bytes(SIZE) for part in format.parts]
        layers, heads = range(self.grid.num_layers), range(self.grid.num_heads)
        self.heads: dict[tuple[int, int], list[Record]] = {(la, he): [] for la in layers for he in heads}

    def compact(self, config: KVCompressionConfig, num_blocks: int, reuse: str) -> None:
        """Run one Job and check everything that it leaves."""
        job = self.job(config, num_blocks, 3, reuse)
        fresh = list(range(self.boundary, job.boundary))
        before = self.cache.pages.clone()
        (table,) = self.compactor.run([Work(job, self.observer.tables.get("r"), None)])
        counts, positions = self.kept[-1]
        assert int(table.counts.sum()) == num_blocks * self.grid.pages_per_block
        linear, begin = self.linear(list(job.destination)), 0
        untouched = torch.ones(len(before), dtype=torch.bool)
        kept_positions = iter(positions.tolist())
        for at, old in self.heads.items():
            pages = int(table.counts[at])
            wanted = self._wanted(at, old, fresh, pages, config.sink_tokens)
            assert int(counts[at]) == len(wanted)
            of_parts = [sum(record.part == part for record in wanted) for part in range(len(self.sizes))]
            assert table.records.counts[(slice(None), *at)].tolist() == of_parts
            places, needed = walked(of_parts, self.sizes, before[0].nbytes)
            assert needed <= pages
            for record, (page, byte) in zip(wanted, (p for part in places for p in part), strict=True):
                content = self.cache.content[linear[begin + page], byte : byte + self.sizes[record.part]]
                assert torch.equal(content, record.content), at
                assert next(kept_positions) == record.positions
            begin += pages
            self.heads[at] = wanted
        assert next(kept_positions, None) is None
        freed = self.linear(sorted({*job.previous} - {*job.destination}))
        assert not self.cache.pages[freed].any()
        untouched[linear + freed] = False
        assert torch.equal(self.cache.pages[untouched], before[untouched])
        self.observer.tables["r"], self.destination = table, list(job.destination)
        self.taken = set(job.destination)
        for index in range(self.boundary // BLOCK, job.boundary // BLOCK):
            self._free(self.raw.pop(index))
        for block in job.previous:
            self._free(block)
        self.boundary = job.boundary

    def _wanted(self, at, old: list[Record], fresh: list[int], pages: int, sinks: int) -> list[Record]:
        """Part after part: old records in their order, then raw tokens by position."""

        def mean(scores, positions):
            return sum(torch.inf if p < sinks else s for s, p in zip(scores, positions, strict=True)) / RECORD

        units = []
        for record in old:
            keys, _ = self.format.parts[record.part].decode(record.content, SIZE)
            units.append((mean(keys[:, 0].tolist(), record.positions), record.part, record))
        score = {p: float("inf") if p < sinks else float(self.keys[*at, p, 0]) for p in fresh}
        best = sorted(fresh, key=lambda p: (-score[p], p))
        for first in range(0, len(best), RECORD):
            own = best[first : first + RECORD]
            units.append((sum(score[p] for p in own) / RECORD, -1, own))
        scores, known = (torch.tensor([[unit[i] for unit in units]]) for i in (0, 1))
        chosen = self.format.choose(scores.float(), known, torch.tensor([pages]), self.sizes, self.page_bytes)
        wanted = []
        for number, part in enumerate(self.format.parts):
            mine = [unit for unit, own in zip(units, chosen[0].tolist(), strict=True) if own == number]
            wanted += [record for _, known_part, record in mine if known_part >= 0]
            new = sorted(p for _, known_part, own in mine if known_part < 0 for p in own)
            for first in range(0, len(new), RECORD):
                own = new[first : first + RECORD]
                both = self.keys[at][own], self.values[at][own]
                wanted.append(Record(number, part.encode(*both), own))
        return wanted

    @property
    def page_bytes(self) -> int:
        return self.cache.content.shape[1]


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("reuse", ["none", "previous", "source"])
def test_each_head_has_its_best_in_most_bits_time_after_time(name, allocation, reuse):
    request = Encoded(FORMATS[name], 0)
    options = {"allocation": allocation, "format": name, "budget": 0.5, "recompact_every": 1}
    config = KVCompressionConfig("by_key", **options)
    request.compute(1100)
    request.compact(config, 1, "none" if reuse == "previous" else reuse)
    seen = set()
    for tokens in (500, 128, 300):
        request.compute(tokens)
        request.compact(config, 2, reuse)
        seen |= {record.part for own in request.heads.values() for record in own}
    assert seen == set(range(len(request.sizes)))
