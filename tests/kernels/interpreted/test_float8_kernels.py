"""The kernels read float8 pages as the numbers that their bytes stand for, and move them as bytes."""

from copy import copy

import pytest
import torch
from paged import TOLERANCE, Batch, Row, make_cache

from vllm_kvcompress.kernels.attention import attend
from vllm_kvcompress.kernels.batch import Rows, Scales, moment_shape
from vllm_kvcompress.kernels.moments import add_moments
from vllm_kvcompress.kernels.reference import causal_logits
from vllm_kvcompress.kernels.ring import write_rings
from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.policies import POLICIES
from vllm_kvcompress.requests.cache import Kept
from vllm_kvcompress.requests.float8 import Float8
from vllm_kvcompress.requests.tables import RequestTable
from vllm_kvcompress.worker.gpu_cache import PlainCache

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROWS = {
    "decode": [Row(1, 9, blocks=2, boundary=5), Row(1, 70), Row(1, 1, blocks=1, boundary=2)],
    "mixed": [Row(5, 21, blocks=2, boundary=4), Row(1, 40), Row(5, 5)],
}
SCALES = Scales(*(torch.tensor(scale) for scale in (0.25, 0.07, 3.0)))


@pytest.mark.parametrize(
    ("kind", "dtype", "head_size", "block_size", "rows", "num_splits", "soft_cap", "quantized"),
    [
        (E4M3, torch.bfloat16, 128, 16, "decode", 3, 0.0, True),
        (E4M3, torch.float16, 80, 32, "mixed", 1, 2.0, True),
        (E4M3, torch.float32, 64, 16, "mixed", 3, 0.0, False),
        (E5M2, torch.bfloat16, 96, 48, "mixed", 1, 0.0, False),
        (E5M2, torch.float32, 64, 16, "decode", 1, 2.0, True),
    ],
)
def test_attention_equals_the_reference_over_the_numbers(
    kind, dtype, head_size, block_size, rows, num_splits, soft_cap, quantized
):
    torch.manual_seed(0)
    cache = make_cache(2, 30, 2, block_size, head_size, torch.float32)
    batch = Batch(ROWS[rows], *(8 * part for part in cache), 3)
    batch.keys, batch.values = batch.keys.to(kind), batch.values.to(kind)
    batch.query = (4 * batch.query).to(kind) if quantized else batch.query.to(dtype)
    out = torch.full(batch.query.shape, torch.nan, dtype=dtype)
    arguments = 1, 0.2, soft_cap, num_splits, 16, out
    found, lse = attend(
        batch.query, batch.keys, batch.values, batch.runs, batch.rows, *arguments, scales=SCALES
    )
    plain = copy(batch)
    plain.keys, plain.values = batch.keys.float() * SCALES.key, batch.values.float() * SCALES.value
    plain.query = batch.query.float() * (SCALES.query if quantized else 1)
    wanted, wanted_lse = plain.expected(1, 0.2, soft_cap)
    assert found is out and found.dtype == dtype
    tolerance = TOLERANCE[dtype] * 24  # as large as values are
    torch.testing.assert_close(found[: len(wanted)].float(), wanted, atol=tolerance, rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse[: len(wanted)], wanted_lse, atol=1e-4, rtol=2e-5)
    assert found[len(wanted) :].isnan().all()


def test_a_cache_and_its_scales_go_together():
    batch = Batch(ROWS["decode"], *make_cache(2, 30, 2, 16, 32, torch.float32), 2)
    arguments = batch.runs, batch.rows, 0, 0.2
    float8 = batch.keys.to(E4M3), batch.values.to(E4M3)
    with pytest.raises(AssertionError):
        attend(batch.query, *float8, *arguments)
    with pytest.raises(AssertionError):
        attend(batch.query, batch.keys, batch.values, *arguments, scales=SCALES)


LAYERS, HEADS, BLOCKS, BLOCK_SIZE, SIZE = 2, 2, 6, 16, 32


@pytest.fixture(params=[E4M3, E5M2], ids=str)
def cache(request):
    torch.manual_seed(1)
    pages = (8 * torch.randn(LAYERS * BLOCKS * HEADS, BLOCK_SIZE * 2 * SIZE)).to(request.param)
    keys, values = pages.view(torch.uint8).view(-1, BLOCK_SIZE, 2 * SIZE).split(SIZE, -1)
    float8 = Float8(request.param, torch.float32, torch.tensor([0.5, 0.03]), torch.tensor([0.1, 4.0]))
    grid = PageGrid(LAYERS, BLOCKS, HEADS, BLOCK_SIZE)
    return PlainCache(grid, keys, values, pages.view(torch.uint8), float8=float8)


@pytest.fixture
def context(cache):
    """Pages `[L·H, W]` of a compacted request whose runs lie in both layers' pages."""
    table = RequestTable(cache.grid, torch.tensor([4, 1]), torch.tensor([[1, 3], [2, 2]]), 96, None)
    found = cache.context(slice(0, LAYERS), table, torch.tensor([3, 2]))
    lies_in = found[:, :-2] // (BLOCKS * HEADS)
    assert {*lies_in[2:][found[2:, :-2] >= 0].tolist()} == {0, 1}
    return found


def numbers(part, cache, pages, scales, layer):
    """Of pages `[W]`, read for a layer, `[W·N, D]`."""
    return (part[pages].view(cache.float8.dtype).float() * scales[layer]).flatten(0, 1)


def test_a_page_is_read_with_the_scale_of_the_layer_that_it_serves(cache, context):
    for row, pages in enumerate(context):
        held = pages >= 0
        for read, part, scales in (
            (cache.read_keys, cache.keys, cache.float8.key_scales),
            (cache.read_values, cache.values, cache.float8.value_scales),
        ):
            found = read(context, slice(0, LAYERS))[row].unflatten(0, (-1, BLOCK_SIZE))[held].flatten(0, 1)
            assert torch.equal(found, numbers(part, cache, pages[held], scales, row // HEADS))


def test_what_a_device_reads_does_not_wait_for_it(cache):
    stored, scales = (part.to("meta") for part in (cache.keys, cache.float8.key_scales))
    found = cache.float8.read(stored, scales[torch.zeros(len(stored), dtype=torch.int64, device="meta")])
    assert found.dtype == torch.float32 and found.shape == stored.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_windows_are_scored_by_what_attention_reads(cache, context, dtype):
    window, group, ends = 6, 2, context.shape[1] * BLOCK_SIZE - 5
    queries = torch.randn(LAYERS, window, HEADS * group, SIZE).to(dtype)
    policy = POLICIES["snapkv"](window=window, kernel_size=1)
    scales, soft_caps, num_scored = [0.2, 0.3], [1.5, 2.0], ends - window - 8
    found = cache.window_scores(policy, context, queries, scales, soft_caps, None, num_scored, [ends])
    for row, pages in enumerate(context):
        layer, head = divmod(row, HEADS)
        absent = int((pages < 0).sum())
        held = numbers(cache.keys, cache, pages[absent:], cache.float8.key_scales, layer)
        own = queries[layer].unflatten(1, (HEADS, group))[:, head]
        held, absent = held[: ends - absent * BLOCK_SIZE], absent * BLOCK_SIZE
        attention = causal_logits(own, held, scales[layer], soft_caps[layer]).softmax(-1)
        wanted = attention.sum(1).mean(0)[: num_scored - absent]
        torch.testing.assert_close(found[row, absent:], wanted, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("overlaps", [False, True])
def test_every_byte_is_moved_as_it_is(cache, overlaps):
    cache.whole[:] = (
        torch.arange(256, dtype=torch.uint8).repeat(cache.whole.numel() // 256).view_as(cache.whole)
    )
    cache.whole.view(-1)[::7] = 255  # of which e4m3 and e5m2 make no number
    pages, row = torch.tensor([[3, 8], [20, 5]]), torch.tensor([0, 1])
    columns = torch.stack([torch.arange(0, 32, 2), torch.arange(1, 32, 2)])
    target = torch.tensor([8, 3] if overlaps else [10, 11])
    before = [part[pages].flatten(1, 2) for part in (cache.keys, cache.values)]
    cache.rewrite(Kept(pages, row, columns), target, overlaps)
    for part, old in zip((cache.keys, cache.values), before, strict=True):
        assert torch.equal(part[target], torch.stack([old[0, 0::2], old[1, 1::2]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rings_hold_queries_as_numbers_of_the_models_dtype(dtype):
    torch.manual_seed(2)
    query = (8 * torch.randn(5, 2, 32)).to(E4M3)
    ring = torch.full((2, 9, 2, 32), torch.nan, dtype=dtype)
    rows = torch.tensor([ring.data_ptr()]), torch.tensor([9])
    batch = torch.tensor([12], dtype=torch.int32), torch.tensor([0, 5], dtype=torch.int32)
    scales = Scales(torch.tensor(0.3), *(torch.tensor(torch.nan) for _ in range(2)))
    write_rings(*rows, 1, query, *batch, 5, 9, dtype, scales)
    wanted = (query.float() * 0.3).to(dtype)
    last_bit = (
        2**-7 if dtype == torch.bfloat16 else 0.0
    )  # to which the interpreter cuts off, and does not round
    torch.testing.assert_close(ring[1, torch.arange(7, 12) % 9], wanted, atol=0.0, rtol=last_bit)
    assert torch.equal(scales.read_queries(query, dtype), wanted)
    assert ring[0].isnan().all() and ring[1, 3:7].isnan().all()
    assert scales.read_queries(wanted, dtype) is wanted  # they are numbers already


def test_moments_are_those_of_queries_as_numbers_of_the_models_dtype():
    torch.manual_seed(3)
    query = (8 * torch.randn(5, 2, 32)).to(E4M3)
    scales = Scales(torch.tensor(0.3), *(torch.tensor(torch.nan) for _ in range(2)))
    batch = torch.tensor([12], dtype=torch.int32), torch.tensor([0, 5], dtype=torch.int32)
    rows, table = Rows(batch[0], batch[0][None], *batch, 5), torch.tensor([0.6, 0.8]).expand(12, 2)
    found = []
    for own in (query, scales.read_queries(query, torch.float32)):
        found.append(torch.zeros(1, *moment_shape(2, 32)))
        places = torch.tensor([found[-1].data_ptr()]), torch.tensor([8])
        add_moments(*places, 0, own, rows, table, True, 4, torch.float32, scales)
    assert torch.equal(*found) and found[0][0, 0, 0, -1, 0] == 4 and found[0].isfinite().all()
