"""Step after step, each head attends over exactly what it kept and every token since."""

import pytest
import torch
from test_cpu_attention import Layers, batch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

from vllm_kvcompress.attention.cpu import _no_rows
from vllm_kvcompress.kernels.reference import attend
from vllm_kvcompress.requests.observer import LayerAttention, Observer
from vllm_kvcompress.requests.state import CompressionState, RunnerV1Rows
from vllm_kvcompress.requests.tables import SPARE_COLUMNS

BLOCK_SIZE = 32


class Engine:
    """Requests in the cache of `Layers`, and their tokens: `held[name][layer][head]` are (key, value)."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layers = Layers(layers=2, blocks=160, heads=2, group=3, block_size=BLOCK_SIZE)
        self.input_batch, self.model_runner = self, self
        self.req_ids: list[str] = []
        observer = Observer(None, [LayerAttention(0.17, 0.0)] * 2, 6, 64, torch.float32, tables={})
        self.state = CompressionState(RunnerV1Rows(self), observer)
        self.state.live = True
        self.builder = self.layers.builder()
        self.builder.state = self.state
        self.blocks: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}
        self.held: dict[str, list[list[list[tuple[torch.Tensor, torch.Tensor]]]]] = {}
        self.free = list(range(1, 160))

    def page(self, layer: int, block: int, head: int) -> int:
        return (layer * 160 + block) * 2 + head

    def start(self, name: str, num_tokens: int) -> None:
        self.blocks[name], self.lengths[name] = [], 0
        self.held[name] = [[[] for _ in range(2)] for _ in range(2)]
        self.write(name, num_tokens)

    def write(self, name: str, num_tokens: int) -> None:
        """Keys and values of the next tokens, as the layers write them before they attend."""
        for _ in range(num_tokens):
            index, slot = divmod(self.lengths[name], BLOCK_SIZE)
            if index == len(self.blocks[name]):
                self.blocks[name].append(self.free.pop(0))
            for layer in range(2):
                for head in range(2):
                    pair = torch.randn(64) * 2, torch.randn(64)
                    self.held[name][layer][head].append(pair)
                    page = self.page(layer, self.blocks[name][index], head)
                    self.layers.keys[page, slot], self.layers.values[page, slot] = pair
                    self.pack(page)
            self.lengths[name] += 1

    def pack(self, page: int) -> None:
        how, plain = self.layers.packing, (self.layers.keys[page], self.layers.values[page])
        both = [way.pack(part) for way, part in zip(how, plain, strict=True)]
        self.layers.cache[page] = torch.stack(both).view(1, 2 * BLOCK_SIZE, 64)

    def compact(self, name: str, boundary: int, counts: list[list[int]]) -> None:
        """Each head keeps any of its tokens below the boundary; the tail stays where it is."""
        table = self.state.tables.get(name)
        old = 0 if table is None else table.boundary
        destination = [self.free.pop(0) for _ in range(sum(map(sum, counts)) // 4)]
        every = [
            self.page(layer, block, head) for block in destination for layer in (0, 1) for head in (0, 1)
        ]
        for layer, row in enumerate(counts):
            for head, count in enumerate(row):
                own = self.held[name][layer][head]
                num_below = len(own) - (self.lengths[name] - boundary)
                kept = sorted(torch.randperm(num_below)[: count * BLOCK_SIZE].tolist())
                assert len(kept) == count * BLOCK_SIZE
                self.held[name][layer][head] = [own[index] for index in kept] + own[num_below:]
                for begin in range(0, len(kept), BLOCK_SIZE):
                    page = every.pop(0)
                    for slot in range(BLOCK_SIZE):
                        key, value = self.held[name][layer][head][begin + slot]
                        self.layers.keys[page, slot], self.layers.values[page, slot] = key, value
                    self.pack(page)
        for index in range(old // BLOCK_SIZE, boundary // BLOCK_SIZE):
            self.free.append(self.blocks[name][index])
            self.blocks[name][index] = 0  # the null block
        self.layers.compact(name, destination, torch.tensor(counts), boundary)
        self.state.put(name, self.layers.tables[name])

    def finish(self, name: str) -> None:
        self.state.forget(name)
        self.req_ids.remove(name)

    def metadata(self, rows: dict[str, int]) -> CommonAttentionMetadata:
        block_table = torch.full((len(rows), 60), 159, dtype=torch.int32)  # somebody else's behind the last
        for row, name in enumerate(rows):
            block_table[row, : len(self.blocks[name])] = torch.tensor(self.blocks[name])
        return batch([(count, self.lengths[name]) for name, count in rows.items()], block_table)

    def step(self, rows: dict[str, int]) -> None:
        """Compute that many tokens of each request, in that order of rows, and check every head's output."""
        self.req_ids[:] = rows
        for name, count in rows.items():
            self.write(name, count)
        common = self.metadata(rows)
        metadata = self.builder.build(0, common)
        for layer in range(2):
            query = torch.randn(common.num_actual_tokens, 6, 64)
            output = torch.full_like(query, torch.nan)
            own = type("Own", (), {"isa": self.layers.isa, "_k_scale_float": 1.0, "_v_scale_float": 1.0})
            impl, cache = self.layers.impl(layer), self.layers.caches[layer]
            impl.forward(own, query, query, query, cache, metadata, output)
            begin = 0
            for name, count in rows.items():
                for head in range(2):
                    keys, values = map(torch.stack, zip(*self.held[name][layer][head], strict=True))
                    group = slice(3 * head, 3 * head + 3)
                    wanted = attend(query[begin : begin + count, group], keys, values, scale=0.17)
                    got = output[begin : begin + count, group]
                    torch.testing.assert_close(
                        got, wanted, atol=3e-5, rtol=3e-5, msg=f"{name}, layer {layer}"
                    )
                begin += count


def test_a_compacted_request_decodes_into_new_blocks():
    engine = Engine()
    engine.start("a", 3 * BLOCK_SIZE + 20)
    engine.compact("a", 3 * BLOCK_SIZE, [[1, 3], [2, 2]])
    for _ in range(48):
        engine.step({"a": 1})
    assert engine.state.tables["a"].num_tail == [3]


def test_rows_come_go_change_places_and_are_compacted_again():
    engine = Engine()
    for name, num_tokens in (("a", 4 * BLOCK_SIZE + 25), ("b", 3 * BLOCK_SIZE), ("c", 2 * BLOCK_SIZE + 31)):
        engine.start(name, num_tokens)
    engine.compact("a", 4 * BLOCK_SIZE, [[1, 3], [2, 2]])
    engine.compact("c", 2 * BLOCK_SIZE, [[1, 1], [1, 1]])
    orders = [["a", "b", "c"], ["c", "a", "b"], ["b", "c", "a"], ["a", "c"], ["c"], ["b"]]
    for index in range(24):
        names = orders[index % len(orders)]
        engine.step({name: 1 for name in names})
    engine.start("d", 5)  # joins raw, in chunks beside the others' decodes
    engine.step({"a": 1, "d": 40, "c": 1})
    engine.step({"d": 23, "c": 1, "a": 1})
    boundary = engine.lengths["a"] // BLOCK_SIZE * BLOCK_SIZE
    engine.compact("a", boundary, [[2, 3], [1, 2]])  # again, out of what it kept and the tail
    engine.compact("b", 3 * BLOCK_SIZE, [[1, 1], [1, 1]])
    engine.step({"a": 1, "b": 1, "c": 1, "d": 1})
    engine.finish("c")
    for index in range(20):
        names = ["b", "a", "d"] if index % 2 else ["a", "d", "b"]
        engine.step({name: 1 for name in names})
    engine.finish("a")
    engine.step({"b": 1, "d": 1})
    engine.finish("b")
    engine.step({"d": 1})


@pytest.mark.parametrize("chunk", [7, BLOCK_SIZE, 3 * BLOCK_SIZE + 5])
def test_chunks_of_queries_go_over_a_tail_that_outgrows_its_table(chunk):
    engine = Engine()
    engine.start("a", 3 * BLOCK_SIZE + 3)
    engine.start("b", 2 * BLOCK_SIZE)
    engine.compact("a", 3 * BLOCK_SIZE, [[1, 3], [2, 2]])
    engine.compact("b", 2 * BLOCK_SIZE, [[1, 1], [1, 1]])
    width = engine.state.tables["a"].pages.shape[-1]
    while engine.state.tables["a"].num_tail[0] <= SPARE_COLUMNS:
        engine.step({"b": 1, "a": chunk} if engine.lengths["b"] % 2 else {"a": chunk, "b": 1})
    engine.step({"a": 1, "b": 2})
    assert engine.state.tables["a"].pages.shape[-1] > width


def test_a_dummy_batch_is_the_stock_one_while_requests_are_tracked():
    engine = Engine()
    engine.start("a", 2 * BLOCK_SIZE + 3)
    engine.compact("a", 2 * BLOCK_SIZE, [[1, 1], [1, 1]])
    engine.req_ids[:] = ["a"]
    engine.state.live = False
    metadata = engine.builder.build(0, engine.metadata({"a": 1}))
    assert type(metadata).__name__ == "CPUAttentionMetadata"
    assert engine.state.tables["a"].num_tail == [0], "what it shows is no request's"
    engine.state.live = True
    engine.step({"a": 1})


def test_vllm_is_handed_the_rows_that_are_not_compacted_as_a_batch_of_their_own(monkeypatch):
    engine, handed = Engine(), []
    engine.start("a", 2 * BLOCK_SIZE + 3)
    engine.compact("a", 2 * BLOCK_SIZE, [[1, 1], [1, 1]])
    engine.start("b", 40)
    engine.start("c", 90)
    engine.req_ids[:] = ["b", "a", "c"]
    common = engine.metadata({"b": 5, "a": 2, "c": 3})
    monkeypatch.setattr(
        CPUAttentionMetadataBuilder,
        "build",
        lambda self, prefix, batch, fast=False: handed.append((prefix, batch)) or _no_rows(batch),
    )
    metadata = engine.builder.build(7, common)
    (prefix, rest), wanted = *handed, engine.metadata({"b": 5, "c": 3})
    assert prefix == 7 and metadata.rest_tokens.tolist() == [0, 1, 2, 3, 4, 7, 8, 9]
    assert rest.slot_mapping.tolist() == [0, 1, 2, 3, 4, 7, 8, 9]
    for name in ("query_start_loc", "query_start_loc_cpu", "seq_lens", "block_table_tensor"):
        assert torch.equal(getattr(rest, name), getattr(wanted, name)), name
    for name in ("num_reqs", "num_actual_tokens", "max_query_len"):
        assert getattr(rest, name) == getattr(wanted, name), name
    assert metadata.num_actual_tokens == 10


class Span:
    def __init__(self) -> None:
        self.seen: list[tuple[int, torch.Tensor]] = []

    def record(self, layer: int, query: torch.Tensor) -> None:
        self.seen.append((layer, query.clone()))


@pytest.mark.parametrize("compacted", [False, True])
def test_observed_rows_are_shown_each_layers_whole_batch_of_queries(compacted):
    engine, span, asked = Engine(), Span(), []
    engine.start("a", 3 * BLOCK_SIZE + 3)
    engine.start("b", 40)
    if compacted:
        engine.compact("a", 3 * BLOCK_SIZE, [[1, 1], [1, 1]])
    observer = type(
        "Watching",
        (),
        {"__len__": lambda self: 1, "spans": lambda self, *rows: asked.append(rows) or [span]},
    )()
    engine.state.observer = observer
    engine.step({"b": 2, "a": 1})
    assert [layer for layer, _ in span.seen] == [0, 1]
    assert all(query.shape == (3, 6, 64) and query.isfinite().all() for _, query in span.seen)
    ((names, bounds, seq_lens, block_table),) = asked
    assert names == ["b", "a"] and bounds.tolist() == [0, 2, 3]
    assert seq_lens.tolist() == [42, 3 * BLOCK_SIZE + 4] and block_table.shape[0] == 2
