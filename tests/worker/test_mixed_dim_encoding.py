"""Compactions into coordinates: what each head is left with, byte by byte, and whose bases these are."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from formats.test_mixed import walked
from worker.compaction import SCALE, ByKey, Request

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.formats.mixed_dim import Basis, Latent, MixedDim
from vllm_kvcompress.policies import POLICIES
from vllm_kvcompress.policies.mixed_dim import MixedDimKV
from vllm_kvcompress.worker.bases import with_bases
from vllm_kvcompress.worker.work import Work

BLOCK, SIZE, WINDOW = 32, 16, 8
FORMAT = MixedDim()
SIZES = [part.record_bytes(SIZE) for part in FORMAT.parts]


@pytest.fixture(autouse=True)
def policies(monkeypatch):
    monkeypatch.setitem(POLICIES, ByKey.name, ByKey)


@dataclass(eq=False)
class Record:
    part: int
    content: torch.Tensor
    positions: list[int]


class Ranked(Request):
    """A request whose heads keep tokens in several ranks, of keys that have few directions."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, block_size=BLOCK, size=SIZE, most=1400, packings=("transposed", "plain"))
        draw = torch.Generator().manual_seed(seed)
        layers, heads = self.grid.num_layers, self.grid.num_heads
        for each in self.keys, self.values:
            few = torch.randn(layers, heads, SIZE, SIZE, generator=draw)
            few *= torch.logspace(0, -6, SIZE)[:, None]
            each[:] = each @ few
        self.heads = {(la, he): [] for la in range(layers) for he in range(heads)}
        self.bases: dict[tuple[int, int], torch.Tensor] = {}
        self.seen: set[int] = set()

    def compact(self, config: KVCompressionConfig, num_blocks: int, reuse: str) -> None:
        """Run one Job and check everything that it leaves."""
        job = self.job(config, num_blocks, WINDOW, reuse)
        fresh = list(range(self.boundary, job.boundary))
        before = self.cache.pages.clone()
        self.observer.settle(job)
        observed = self.observer.of("r")
        (table,) = self.compactor.run([Work(job, self.observer.tables.get("r"), observed)])
        counts, positions = self.kept[-1]
        most = num_blocks * self.grid.pages_per_block
        assert 0 < int(table.counts.sum()) <= most and int(table.counts.min()) >= 1
        linear, begin = self.linear(list(job.destination)), 0
        kept_positions, page_bytes = iter(positions.tolist()), before[0].nbytes
        for at, old in self.heads.items():
            pages = [self.cache.content[page] for page in linear[begin : begin + int(table.counts[at])]]
            begin += len(pages)
            of_parts = table.records.counts[(slice(None), *at)].tolist()
            assert sum(of_parts) == int(counts[at])
            basis = [1] if any(of_parts[1:]) else []
            sizes = [Basis().record_bytes(SIZE)] * len(basis) + SIZES
            places, needed = walked(basis + of_parts, sizes, page_bytes)
            assert needed <= len(pages)
            read = [
                [pages[page][byte : byte + size] for page, byte in own]
                for own, size in zip(places, sizes, strict=True)
            ]
            if basis:
                self._check_basis(at, read.pop(0)[0], fresh + [p for r in old for p in r.positions])
            elif not any(of_parts[1:]):
                self.bases.pop(at, None)
            found = []
            for part, own in enumerate(read):
                for content in own:
                    found.append(Record(part, content.clone(), next(kept_positions)))
            self._check(at, old, found, fresh, config.sink_tokens)
            self.heads[at] = found
        assert next(kept_positions, None) is None
        freed = self.linear(sorted({*job.previous} - {*job.destination}))
        assert not self.cache.pages[freed].any()
        untouched = torch.ones(len(before), dtype=torch.bool)
        untouched[linear + freed] = False
        assert torch.equal(self.cache.pages[untouched], before[untouched])
        self.observer.tables["r"], self.destination = table, list(job.destination)
        self.taken = set(job.destination)
        for index in range(self.boundary // BLOCK, job.boundary // BLOCK):
            self._free(self.raw.pop(index))
        for block in job.previous:
            self._free(block)
        self.boundary = job.boundary

    def _check_basis(self, at, basis, tokens: list[int]) -> None:
        """It is the one that the head had, or of what it holds."""
        if at in self.bases:
            assert torch.equal(basis, self.bases[at])
            return
        self.bases[at] = basis.clone()
        for ours, data in zip(Basis().decode(basis, SIZE), (self.keys, self.values), strict=True):
            rows = np.linalg.svd(data[at][sorted(tokens)].double().numpy())[2][: SIZE // 4]
            assert np.abs(ours.double().numpy() @ ours.T.double().numpy() - rows.T @ rows).max() < 5e-3

    def _check(self, at, old: list[Record], found: list[Record], fresh: list[int], sinks: int) -> None:
        kept = [p for record in found for p in record.positions]
        assert len(kept) == len(set(kept))
        for part in range(len(SIZES)):
            mine = [record for record in found if record.part == part]
            moved = [record for record in mine if record.positions[0] not in fresh]
            before = [record for record in old if record.part == part]
            places = [[b.positions for b in before].index(record.positions) for record in moved]
            assert places == sorted(places) and mine[: len(moved)] == moved
            for record, place in zip(moved, places, strict=True):
                assert torch.equal(record.content, before[place].content)
            new = [record for record in mine if record.positions[0] in fresh]
            in_order = [p for record in new for p in record.positions]
            assert in_order == sorted(in_order) and set(in_order) <= set(fresh)
            for record in new:
                own = FORMAT.parts[part]
                basis = [self.bases[at]] if isinstance(own, Latent) else []
                both = self.keys[at][record.positions], self.values[at][record.positions]
                expected = own.encode(*both, *basis).view(torch.float16)
                close = torch.testing.assert_close
                close(record.content.clone().view(torch.float16), expected, atol=2e-3, rtol=2e-3)
                self.seen.add(part)
        whole = {p for record in found if record.part == 0 for p in record.positions}
        assert set(range(sinks)) <= whole, "what is protected has all of its coordinates"


@pytest.mark.parametrize(
    ("method", "allocation"),
    [("by_key", "uniform"), ("by_key", "global"), ("mixed_dim_kv", "global"), ("mixed_dim_kv", "adaptive")],
)
@pytest.mark.parametrize("reuse", ["none", "previous", "source"])
def test_heads_have_what_their_pages_say_time_after_time(method, allocation, reuse):
    request = Ranked(0)
    options = {"allocation": allocation, "format": "mixed_dim", "budget": 0.5, "recompact_every": 1}
    config = KVCompressionConfig(method, window=WINDOW if method == "mixed_dim_kv" else None, **options)
    if method == "mixed_dim_kv":
        request.observer.watch("r", config.build_policy())
    request.compute(600)
    request.compact(config, 4, "none" if reuse == "previous" else reuse)
    for tokens, blocks in ((200, 5), (96, 4), (300, 6)):
        request.compute(tokens)
        request.compact(config, blocks, reuse)
    assert request.seen == {0, 1, 2}


@pytest.mark.parametrize("chunks", [[600], [37, 200, 363]])
def test_losses_are_those_of_the_window_token_by_token(chunks):
    """Against loops in float64, whatever chunks the prompt came in."""
    request = Ranked(1)
    config = KVCompressionConfig("mixed_dim_kv", window=WINDOW, budget=0.5)
    request.observer.watch("r", config.build_policy())
    for chunk in chunks:
        request.compute(chunk)
    job = request.job(config, 3, WINDOW)
    compactor, policy = request.compactor, config.build_policy()
    reader = compactor._reader
    (task,) = reader.tasks([Work(job, None, request.observer.of("r"))])
    held, _ = with_bases(reader, reader.candidates(task, slice(0, 3)), FORMAT, len(job.source) * BLOCK)
    found = compactor._choosing._losses(task, held, FORMAT)
    assert isinstance(policy, MixedDimKV) and found.shape == (4, 6, job.boundary)
    for at in ((0, 1), (2, 0)):
        keys, values = request.keys[at].double(), request.values[at].double()
        bases = [part.bases(held.bases[at[0] * 2 + at[1]], SIZE) for part in FORMAT.parts[1:]]
        for token in (0, 5, 333, job.boundary - 1):
            lost = [0.0, 0.0, 0.0]
            for position in range(600 - WINDOW, 600):
                for member in range(2):
                    query = request.queries[at[0], position, 2 * at[1] + member].double()
                    weight = (keys[: position + 1] @ query * SCALE).softmax(0)
                    a, away = float(weight[token]), weight @ values[: position + 1] - values[token]
                    lost[2] += a / (1 - a) * float(away.norm())
                    for rank, (of_keys, of_values) in enumerate(bases):
                        of_keys, of_values = of_keys.double(), of_values.double()
                        key = keys[token] - of_keys @ (of_keys.T @ keys[token])
                        value = values[token] - of_values @ (of_values.T @ values[token])
                        logit = abs(float(query @ key)) * SCALE
                        lost[rank] += a * (logit * float(away.norm()) + float(value.norm()))
            row = found[:, at[0] * 2 + at[1], token].tolist()
            assert row[0] == 0 and row[1:] == pytest.approx(lost, rel=2e-3, abs=1e-7)
    assert math.isfinite(float(found.sum()))


def test_heads_are_weighted_by_their_profile(tmp_path):
    from vllm_kvcompress import profiles

    shares = torch.ones(1, 3, 2, dtype=torch.float64)
    shares[0, 1, 0] = 30.0
    path = tmp_path / "profile.json"
    settings = ("m", "snapkv", [0.5], shares, [0.5], torch.zeros(3, 2, 1), {})
    profiles.write(path, *settings)
    pages = {}
    for allocation in ("global", f"profile:{path}"):
        request = Ranked(2)
        config = KVCompressionConfig(
            "mixed_dim_kv", allocation=allocation, window=WINDOW, budget=0.25, recompact_every=1
        )
        request.observer.watch("r", config.build_policy())
        request.compute(900)
        request.compact(config, 5, "none")
        pages[allocation] = request.observer.tables["r"].counts
    weighted, plain = pages[f"profile:{path}"], pages["global"]
    assert int(weighted[1, 0]) > int(plain[1, 0]) and int(weighted.sum()) <= 30
