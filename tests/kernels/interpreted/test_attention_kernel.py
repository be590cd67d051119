"""The attention kernel equals the plain PyTorch reference, output and log-sum-exp."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import TOLERANCE, Batch, Row, make_cache, pairwise

from vllm_kvcompress.kernels.attention import MAX_SPLITS, attend, choose_splits

LSE_TOLERANCE = 2e-5  # float32 whatever the dtype of the cache

ROWS = {
    "decode": [Row(1, 9, blocks=2, boundary=5), Row(1, 70), Row(1, 1, blocks=1, boundary=2)],
    "drafts": [Row(2, 18, blocks=3, boundary=4), Row(2, 2), Row(2, 2, blocks=1, boundary=3)],
    "mixed": [Row(5, 21, blocks=2, boundary=4), Row(1, 40), Row(5, 5)],
    "chunk": [Row(17, 33, blocks=3, boundary=3), Row(1, 3, blocks=1, boundary=1)],
}
GRID = {
    "block_size": [16, 32, 48],
    "head_size": [64, 80, 96, 128, 256],
    "dtype": list(TOLERANCE),
    "group": [1, 3, 4, 7, 8],
    "num_splits": [1, 3, 8],
    "rows": list(ROWS),
    "logits_soft_cap": [0.0, 2.0],
    "scale": [0.125, 0.31],
    "interleaved": [True, False],
}


def assert_equals_reference(batch, layer, scale=0.2, logits_soft_cap=0.0, num_splits=1, min_share=16):
    dtype = batch.query.dtype
    out = torch.full_like(batch.query, torch.nan)
    arguments = layer, scale, logits_soft_cap, num_splits, min_share
    found, lse = attend(batch.query, batch.keys, batch.values, batch.runs, batch.rows, *arguments, out=out)
    wanted, wanted_lse = batch.expected(layer, scale, logits_soft_cap)
    assert found is out
    tolerance = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(found[: len(wanted)].float(), wanted, **tolerance)
    torch.testing.assert_close(lse[: len(wanted)], wanted_lse, atol=LSE_TOLERANCE, rtol=LSE_TOLERANCE)
    assert found[len(wanted) :].isnan().all()  # padding tokens are left alone


@pytest.mark.parametrize("case", pairwise(GRID), ids=lambda case: "-".join(map(str, case.values())))
def test_equals_the_reference_for_every_pair_of_options(case):
    torch.manual_seed(0)
    heads = 1 if case["rows"] == "chunk" else 2  # many queries are slow to interpret
    cache = make_cache(
        2, 30, heads, case["block_size"], case["head_size"], case["dtype"], interleaved=case["interleaved"]
    )
    batch = Batch(ROWS[case["rows"]], *cache, case["group"])
    assert_equals_reference(batch, 1, case["scale"], case["logits_soft_cap"], case["num_splits"])


@st.composite
def geometries(draw):
    """Layers, heads, rows; anything from no compaction at all to runs many pages longer than the tail."""
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        query_len = draw(st.sampled_from([0, 1, 1, 2, 6]))
        tail = max(1, query_len + draw(st.integers(0, 40)))
        blocks = draw(st.integers(0, 3))
        rows.append(Row(query_len, tail, blocks, blocks + draw(st.integers(0, 3)) if blocks else 0))
    return layers, heads, rows


@settings(max_examples=15)
@given(geometries(), st.sampled_from([1, 2, 5]), st.integers(0, 1000))
def test_equals_the_reference_whatever_the_geometry(geometry, num_splits, seed):
    layers, heads, rows = geometry
    torch.manual_seed(seed)
    batch = Batch(rows, *make_cache(layers, 30, heads, 16, 32, torch.float32), group=2)
    assert_equals_reference(batch, seed % layers, num_splits=num_splits, min_share=32)


@pytest.mark.parametrize("rows", ["decode", "mixed"])
def test_layers_of_several_groups_read_raw_tokens_in_the_slot_that_they_share(rows):
    torch.manual_seed(4)
    batch = Batch(ROWS[rows], *make_cache(2, 30, 2, 16, 64, torch.float32), group=3, slots=(0, 0, 1, 0, 1))
    for layer in range(5):
        assert_equals_reference(batch, layer, num_splits=2)


def test_a_loose_bound_on_the_query_length_changes_nothing():
    """A captured graph knows no more than a bound."""
    torch.manual_seed(5)
    batch = Batch(ROWS["decode"], *make_cache(2, 30, 2, 16, 64, torch.float32), group=3)
    batch.rows = replace(batch.rows, max_query_len=40)
    assert_equals_reference(batch, 0)


@pytest.mark.parametrize("rows", ["drafts", "mixed"])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_rows_of_another_kernel_are_left_alone(rows, num_splits):
    torch.manual_seed(7)
    batch = Batch(ROWS[rows], *make_cache(2, 30, 2, 16, 64, torch.float32), group=3)
    out = torch.full_like(batch.query, torch.nan)
    arguments = 1, 0.2, 0.0, num_splits, 16
    attend(
        batch.query, batch.keys, batch.values, batch.runs, batch.rows, *arguments, out, compacted_only=True
    )
    wanted, _ = batch.expected(1, 0.2, 0.0)
    bounds = batch.rows.query_start_loc.tolist()
    for index, row in enumerate(ROWS[rows]):
        own = slice(bounds[index], bounds[index + 1])
        if row.blocks:
            torch.testing.assert_close(out[own], wanted[own], atol=1e-5, rtol=1e-5)
        else:
            assert out[own].isnan().all()
    assert out[bounds[-1] :].isnan().all()


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_sinks_are_in_the_softmax_of_every_query(num_splits, soft_cap):
    torch.manual_seed(8)
    batch = Batch(ROWS["mixed"], *make_cache(2, 30, 2, 16, 64, torch.float32), group=3)
    sinks = torch.tensor([-3.0, 0.0, 1.0, 4.0, 200.0, -torch.inf])
    arguments = 1, 0.2, soft_cap, num_splits, 16
    found, lse = attend(
        batch.query, batch.keys, batch.values, batch.runs, batch.rows, *arguments, sinks=sinks
    )
    plain, plain_lse = batch.expected(1, 0.2, soft_cap)
    # What is left to the tokens is Z / (Z + exp(sink)).
    wanted = plain * torch.sigmoid(plain_lse - sinks)[..., None]
    torch.testing.assert_close(found[: len(wanted)], wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[: len(wanted)], torch.logaddexp(plain_lse, sinks), atol=2e-5, rtol=2e-5)
    batch.sinks = sinks
    torch.testing.assert_close(batch.expected(1, 0.2, soft_cap)[0], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", ["decode", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_512_channels_equal_the_reference(rows, dtype):
    torch.manual_seed(9)
    batch = Batch(ROWS[rows], *make_cache(1, 30, 2, 16, 512, dtype), group=4)
    assert_equals_reference(batch, 0, num_splits=2)


def test_pages_beyond_the_reach_of_32_bit_offsets_are_read(tmp_path):
    block_stride, blocks = 2**27, 20  # elements: the last blocks are out of a 32-bit offset's reach
    sparse = torch.from_file(
        str(tmp_path / "cache"), shared=True, size=block_stride * blocks, dtype=torch.float16
    )
    cache = sparse.as_strided((2, blocks, 2, 16, 128), (2 * 16 * 128, block_stride, 16 * 128, 128, 1))
    cache.copy_(torch.randn(cache.shape))
    torch.manual_seed(6)
    batch = Batch(ROWS["decode"], cache[..., :64], cache[..., 64:], group=1)
    used = torch.cat([batch.runs.destination.flatten(), *batch.tails])
    assert int(used.max()) * block_stride > 2**31
    assert_equals_reference(batch, 1)


def test_splits_fill_the_device_and_no_more():
    assert choose_splits(num_rows=1, heads=8, max_keys=131072, processors=132) == MAX_SPLITS
    assert choose_splits(num_rows=16, heads=8, max_keys=131072, processors=132) == 8
    assert choose_splits(num_rows=128, heads=8, max_keys=131072, processors=132) == 1
    assert choose_splits(num_rows=1, heads=8, max_keys=200, processors=132) == 1
