"""Attention over compacted pages equals dense attention over exactly the kept tokens."""

from types import SimpleNamespace

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, _get_attn_isa

from vllm_kvcompress.attention.cpu import (
    CompressedCPUAttentionImpl,
    CompressedCPUAttentionMetadataBuilder,
)
from vllm_kvcompress.kernels.reference import attend
from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.requests.cache import Kept, PackedCache
from vllm_kvcompress.requests.cpu_pages import learn_packing
from vllm_kvcompress.requests.float8 import FLOAT8, Float8
from vllm_kvcompress.requests.tables import BatchTables, RequestTable

needs_float8 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's CPU kernel reads such a cache with AVX-512 alone"
)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class Layers:
    """A cache of random pages, its builder and one impl per layer, as the worker would bind them."""

    def __init__(
        self,
        layers=2,
        blocks=60,
        heads=2,
        group=3,
        block_size=32,
        head_size=64,
        dtype=torch.float32,
        cache_dtype="auto",
    ):
        self.grid = PageGrid(layers, blocks, heads, block_size)
        self.group, self.head_size, self.dtype = group, head_size, dtype
        self.isa = _get_attn_isa(dtype, block_size, head_size, cache_dtype)
        self.packing = learn_packing(self.isa, block_size, head_size, dtype, cache_dtype)
        self.cache_dtype = cache_dtype
        key_scale, value_scale = (1.0, 1.0) if cache_dtype == "auto" else (0.25, 2.0)
        self.layer = SimpleNamespace(isa=self.isa, _k_scale_float=key_scale, _v_scale_float=value_scale)
        num_pages = layers * blocks * heads
        self.keys = torch.randn(num_pages, block_size, head_size).to(dtype)
        self.values = torch.randn(num_pages, block_size, head_size).to(dtype)
        stored = self.keys, self.values
        if cache_dtype != "auto":
            kind = FLOAT8[cache_dtype]
            stored = [part.float().to(kind).view(torch.uint8) for part in stored]
            scales = key_scale, value_scale
            self.keys, self.values = (
                part.view(kind).float() * scale for part, scale in zip(stored, scales, strict=True)
            )
        packed = torch.stack([how.pack(part) for how, part in zip(self.packing, stored, strict=True)], 1)
        self.cache = packed.contiguous().view(num_pages, 1, 2 * block_size, head_size)
        self.caches = self.cache.view(layers, blocks, heads, block_size, 2 * head_size)
        self.tables: dict[str, RequestTable] = {}
        self.request_ids: list[str] = []

    def builder(self) -> CompressedCPUAttentionMetadataBuilder:
        builder = object.__new__(CompressedCPUAttentionMetadataBuilder)
        builder.num_kv_heads, builder.num_heads = self.grid.num_heads, self.grid.num_heads * self.group
        builder.head_dim, builder.dtype, builder.isa = self.head_size, self.dtype, self.isa
        builder.block_size, builder.window_size = self.grid.block_size, -1
        builder.kv_cache_dtype = self.cache_dtype
        builder.is_cross_attention = builder.is_encoder_only_attention = False
        builder.state = SimpleNamespace(
            active=True,
            tables=self.tables,
            batch=BatchTables(),
            rows=SimpleNamespace(request_ids=lambda metadata: self.request_ids[: metadata.num_reqs]),
            observer=SimpleNamespace(spans=lambda *_: []),
        )
        return builder

    def impl(self, layer: int, cls=CompressedCPUAttentionImpl, softcap: float = 0.0):
        impl = object.__new__(cls)
        impl.num_heads, impl.num_kv_heads = self.grid.num_heads * self.group, self.grid.num_heads
        impl.head_size, impl.num_queries_per_kv = self.head_size, self.group
        impl.scale, impl.logits_soft_cap, impl.sliding_window = 0.17, softcap, -1
        impl.alibi_slopes = impl.sinks = None
        impl.kv_cache_dtype, impl.attn_type = self.cache_dtype, "decoder"
        impl.is_fp8_kv_cache = self.cache_dtype != "auto"
        impl.layer_index, impl.pages = layer, self.cache
        return impl

    def compact(self, request_id: str, destination: list[int], counts: torch.Tensor, boundary: int) -> None:
        self.tables[request_id] = RequestTable(
            self.grid,
            torch.tensor(destination),
            counts,
            boundary,
            positions=torch.zeros(int(counts.sum()), self.grid.block_size),
        )

    def plain(self, pages: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.tensor(pages)
        return self.keys[index].flatten(0, 1)[:length], self.values[index].flatten(0, 1)[:length]


def batch(rows: list[tuple[int, int]], block_table: torch.Tensor) -> CommonAttentionMetadata:
    """Metadata of rows given as (query length, sequence length)."""
    query_start_loc = torch.tensor([0] + [q for q, _ in rows]).cumsum(0).to(torch.int32)
    seq_lens = torch.tensor([s for _, s in rows], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=query_start_loc,
        query_start_loc_cpu=query_start_loc,
        seq_lens=seq_lens,
        num_reqs=len(rows),
        num_actual_tokens=int(query_start_loc[-1]),
        max_query_len=max(q for q, _ in rows),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=block_table,
        slot_mapping=torch.arange(int(query_start_loc[-1])),
    )


def expected_pages(layers: Layers, counts, destination, tail, layer: int, head: int) -> list[int]:
    """Pages of one head, spelled out without the code under test."""
    grid = layers.grid
    per_block = grid.num_layers * grid.num_heads
    flat = counts.flatten().tolist()
    start = sum(flat[: layer * grid.num_heads + head])
    run = range(start, start + flat[layer * grid.num_heads + head])
    physical = []
    for p in run:
        block, slot = destination[p // per_block], p % per_block
        physical.append(
            ((slot // grid.num_heads) * grid.num_blocks + block) * grid.num_heads + slot % grid.num_heads
        )
    return physical + [(layer * grid.num_blocks + b) * grid.num_heads + head for b in tail]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("heads", "group", "head_size", "block_size"), [(2, 3, 64, 32), (3, 1, 80, 64), (1, 8, 128, 32)]
)
@pytest.mark.parametrize("query_lens", [(1, 1, 1), (1, 5, 1), (7, 40, 3)], ids=str)
def test_compacted_and_raw_rows_equal_dense_attention_over_their_tokens(
    dtype, heads, group, head_size, block_size, query_lens
):
    compare_with_dense(Layers(2, 60, heads, group, block_size, head_size, dtype), query_lens)


@needs_float8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cache_dtype", FLOAT8)
def test_so_do_rows_of_a_quantized_cache(dtype, cache_dtype):
    # The kernel may round what it has scaled.
    layers = Layers(2, 60, 2, 3, 32, 64, dtype, cache_dtype)
    compare_with_dense(layers, (1, 5, 1), 3e-2)


def compare_with_dense(layers: Layers, query_lens, tolerance: float | None = None) -> None:
    torch.manual_seed(0)
    dtype, heads, group, head_size = layers.dtype, layers.grid.num_heads, layers.group, layers.head_size
    block_size, tolerance = layers.grid.block_size, tolerance or TOLERANCE[dtype]
    per_block = layers.grid.pages_per_block
    boundary = 10 * block_size
    specs = {"a": ([5, 11, 7], boundary, 2), "b": None, "c": ([40, 20], boundary, 1)}
    block_table = torch.zeros(3, 16, dtype=torch.int32)
    block_table[0, 10:12], block_table[2, 10:11] = torch.tensor([30, 13]), torch.tensor([31])
    block_table[1, :9] = torch.arange(45, 54)
    counts = {}
    for request_id, spec in specs.items():
        if spec is not None:
            destination = spec[0]
            shares = torch.ones(per_block, dtype=torch.int64)
            for _ in range(per_block * (len(destination) - 1)):
                shares[torch.multinomial(torch.rand(per_block), 1)] += 1
            counts[request_id] = shares.view(2, heads)
            layers.compact(request_id, destination, counts[request_id], boundary)
    layers.request_ids = list(specs)
    seq_lens = [boundary + block_size + 9, 8 * block_size + 3, boundary + block_size - 2]
    common = batch(list(zip(query_lens, seq_lens, strict=True)), block_table)
    metadata = layers.builder().build(0, common)

    for layer in range(2):
        query = torch.randn(common.num_actual_tokens, heads * group, head_size).to(dtype)
        output = torch.full_like(query, torch.nan)
        layers.impl(layer).forward(
            layers.layer,
            query,
            query,
            query,
            layers.caches[layer],
            metadata,
            output,
        )
        for row, (request_id, spec) in enumerate(specs.items()):
            begin, end = common.query_start_loc[row : row + 2].tolist()
            for head in range(heads):
                if spec is None:
                    raw = block_table[row, :9].tolist()
                    pages = expected_pages(
                        layers, torch.zeros(2, heads, dtype=torch.int64), [], raw, layer, head
                    )
                    length = seq_lens[row]
                else:
                    tail = block_table[row, 10 : 10 + spec[2]].tolist()
                    pages = expected_pages(layers, counts[request_id], spec[0], tail, layer, head)
                    length = int(counts[request_id][layer, head]) * block_size + seq_lens[row] - boundary
                keys, values = layers.plain(pages, length)
                group_of = slice(head * group, (head + 1) * group)
                wanted = attend(query[begin:end, group_of], keys, values, scale=0.17)
                torch.testing.assert_close(
                    output[begin:end, group_of].float(), wanted, atol=tolerance, rtol=tolerance
                )


def test_a_batch_without_compacted_rows_is_the_stock_call_bit_for_bit():
    torch.manual_seed(0)
    layers = Layers(dtype=torch.bfloat16)
    layers.request_ids = ["a", "b"]
    block_table = torch.arange(1, 21, dtype=torch.int32).view(2, 10)
    common = batch([(1, 300), (4, 77)], block_table)
    metadata = layers.builder().build(0, common)
    query = torch.randn(5, 6, 64).to(torch.bfloat16)
    layer = SimpleNamespace(isa=layers.isa, _k_scale_float=1.0, _v_scale_float=1.0)
    outputs = []
    for cls in (CompressedCPUAttentionImpl, CPUAttentionBackendImpl):
        output = torch.empty_like(query)
        layers.impl(1, cls).forward(layer, query, query, query, layers.caches[1], metadata, output)
        outputs.append(output)
    assert type(metadata).__name__ == "CPUAttentionMetadata"
    assert torch.equal(*outputs)


def test_heads_as_sequences_equal_stock_attention_bit_for_bit_when_nothing_is_dropped():
    torch.manual_seed(0)
    layers = Layers(layers=1, dtype=torch.bfloat16)
    block_table = torch.zeros(1, 10, dtype=torch.int32)
    block_table[0] = torch.arange(3, 13)
    # A run in page order of the very blocks: every head keeps all of its pages.
    heads = layers.grid.num_heads
    layers.compact("a", list(range(20, 28)), torch.full((1, heads), 8), 8 * 32)
    for head in range(heads):
        for page in range(8):
            linear = head * 8 + page
            target = (20 + linear // heads) * heads + linear % heads
            layers.cache[target] = layers.cache[(3 + page) * heads + head]
    layers.request_ids = ["a"]
    common = batch([(1, 300)], block_table)
    builder = layers.builder()
    compacted = builder.build(0, common)
    builder.state.active = False
    stock = builder.build(0, common)
    query = torch.randn(1, 6, 64).to(torch.bfloat16)
    layer = SimpleNamespace(isa=layers.isa, _k_scale_float=1.0, _v_scale_float=1.0)
    outputs = []
    for metadata in (compacted, stock):
        output = torch.empty_like(query)
        layers.impl(0).forward(layer, query, query, query, layers.caches[0], metadata, output)
        outputs.append(output)
    assert compacted.compacted is not None
    assert torch.equal(*outputs)


def test_logits_soft_cap_reaches_compacted_rows():
    torch.manual_seed(0)
    layers = Layers(layers=1)
    layers.compact("a", [4], torch.tensor([[1, 1]]), 64)
    layers.request_ids = ["a"]
    block_table = torch.tensor([[0, 0, 9]], dtype=torch.int32)
    metadata = layers.builder().build(0, batch([(1, 70)], block_table))
    query = torch.randn(1, 6, 64) * 5
    output = torch.empty_like(query)
    layer = SimpleNamespace(isa=layers.isa, _k_scale_float=1.0, _v_scale_float=1.0)
    layers.impl(0, softcap=2.0).forward(layer, query, query, query, layers.caches[0], metadata, output)
    pages = expected_pages(layers, torch.tensor([[1, 1]]), [4], [9], 0, 1)
    wanted = attend(query[:, 3:], *layers.plain(pages, 32 + 6), scale=0.17, logits_soft_cap=2.0)
    torch.testing.assert_close(output[:, 3:], wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("block_size", "head_size"), [(32, 64), (64, 80), (128, 128)])
def test_packing_reads_what_the_op_wrote_and_writes_what_the_op_would(dtype, block_size, head_size):
    isa = _get_attn_isa(dtype, block_size, head_size)
    packing = learn_packing(isa, block_size, head_size, dtype)
    cache = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype)
    plain = torch.randn(2, block_size, 1, head_size).to(dtype)
    ops.cpu_attn_reshape_and_cache(*plain, *cache.chunk(2, dim=2), torch.arange(block_size), isa)
    for stored, written, way in zip(cache.view(2, -1), plain, packing, strict=True):
        assert torch.equal(way.unpack(stored), written[:, 0])
        assert torch.equal(way.pack(written[:, 0]), stored)


@needs_float8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cache_dtype", FLOAT8)
def test_bytes_are_read_as_what_the_op_wrote_and_moved_as_they_are(dtype, cache_dtype):
    layers, heads, blocks, block_size, head_size = 2, 2, 4, 32, 64
    isa, kind = _get_attn_isa(dtype, block_size, head_size, cache_dtype), FLOAT8[cache_dtype]
    packing = learn_packing(isa, block_size, head_size, dtype, cache_dtype)
    scales = torch.tensor([0.5, 2.0]), torch.tensor([1.0, 0.25])
    pages = torch.zeros(layers * blocks * heads, 2, block_size * head_size, dtype=torch.uint8)
    plain = torch.randn(2, layers, blocks, heads, block_size, head_size).to(dtype)
    for layer in range(layers):
        held = pages.view(layers, blocks, heads, 2 * block_size, head_size)[layer]
        keys, values = (part[layer].transpose(1, 2).flatten(0, 1).contiguous() for part in plain)
        slots = torch.arange(blocks * block_size)
        key_scale, value_scale = (float(each[layer]) for each in scales)
        ops.cpu_attn_reshape_and_cache(
            keys, values, *held.chunk(2, 2), slots, isa, key_scale, value_scale, cache_dtype
        )
    grid = PageGrid(layers, blocks, heads, block_size)
    cache = PackedCache(grid, pages, *packing, float8=Float8(kind, dtype, *scales))
    both = slice(0, layers)
    every = grid.layer_pages(both, torch.tensor([2, 0]))
    step = {torch.float8_e4m3fn: 2**-3, torch.float8_e5m2: 2**-2}[kind]  # between neighbours
    for part, read in zip(plain, (cache.read_keys, cache.read_values), strict=True):
        found, written = read(every, both), part[:, [2, 0]].transpose(1, 2).flatten(0, 1).flatten(1, 2)
        assert found.dtype == dtype and not torch.equal(found, written)
        assert ((found - written).abs() <= step * written.abs() + 0.02).all()
    row, columns = torch.tensor([0, 3]), torch.stack([torch.arange(0, 64, 2), torch.arange(1, 64, 2)])
    target = torch.tensor([7, 15])
    before = [read(every, both) for read in (cache.read_keys, cache.read_values)]
    cache.rewrite(Kept(every, row, columns), target, False)
    for own, read in zip(before, (cache.read_keys, cache.read_values), strict=True):
        assert torch.equal(read(target[:, None], both), torch.stack([own[0, 0::2], own[3, 1::2]]))


@needs_float8
def test_a_run_in_another_layers_pages_has_its_own_layers_scale():
    layers, heads, blocks, block_size, head_size = 2, 2, 6, 32, 64
    grid = PageGrid(layers, blocks, heads, block_size)
    pages = torch.randint(0, 120, (layers * blocks * heads, 2, block_size * head_size), dtype=torch.uint8)
    plain = learn_packing("vec", block_size, head_size, torch.float32, "fp8")
    one, own = torch.ones(layers), torch.tensor([0.5, 2.0])
    unscaled, scaled = (
        PackedCache(grid, pages, *plain, float8=Float8(torch.float8_e4m3fn, torch.float32, scales, one))
        for scales in (one, own)
    )
    table = RequestTable(grid, torch.tensor([4, 1]), torch.tensor([[1, 3], [2, 2]]), 96, None)
    for layer in range(layers):
        its = slice(layer, layer + 1)
        context = scaled.context(its, table, torch.tensor([3]))
        in_run = context[context >= 0][:-1] // (blocks * heads)
        found, wanted = scaled.read_keys(context, its), unscaled.read_keys(context, its) * own[layer]
        assert torch.equal(found, wanted)
        assert set(in_run.tolist()) == {0, 1}, "its run lies in both layers' pages"


@needs_float8
def test_layers_that_share_a_slot_have_each_its_own_scale():
    """Of several cache groups, whose raw blocks too are in the same slot."""
    heads, blocks, block_size, head_size = 2, 6, 32, 64
    grid = PageGrid(3, blocks, heads, block_size, num_groups=2, groups=(0, 1, 0), slots=(0, 0, 1))
    pages = torch.randint(0, 120, (2 * blocks * heads, 2, block_size * head_size), dtype=torch.uint8)
    plain = learn_packing("vec", block_size, head_size, torch.float32, "fp8")
    one, own = torch.ones(3), torch.tensor([0.5, 2.0, 3.0])
    unscaled, scaled = (
        PackedCache(grid, pages, *plain, float8=Float8(torch.float8_e4m3fn, torch.float32, scales, scales))
        for scales in (one, own)
    )
    context = scaled.context(slice(0, 3), None, torch.tensor([[3, 1], [2, 5]]))
    of_row = own.repeat_interleave(heads)[:, None, None]
    for read, wanted in (
        (scaled.read_keys, unscaled.read_keys(context, slice(0, 3))),
        (scaled.read_values, unscaled.read_values(context, slice(0, 3))),
    ):
        assert torch.equal(read(context, slice(0, 3)), wanted * of_row)
        some = context[2:].repeat_interleave(2, 0)  # of two requests
        assert torch.equal(read(some, slice(1, 3)), (wanted * of_row)[2:].repeat_interleave(2, 0))
