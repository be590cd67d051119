"""What the kernel adds to each token's sum is what plain PyTorch says that the queries pay to it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import Batch, Row, make_cache, pairwise

from vllm_kvcompress.kernels.reference import causal_logits, with_sinks
from vllm_kvcompress.kernels.sums import ATTENTION, NOT, PAUSED, SQUARES, add_attention

TOLERANCE = dict(atol=2e-5, rtol=2e-5)  # float32 whatever the dtype of the cache: the order of sums
ROWS = {
    "decode": [Row(1, 9, blocks=2, boundary=5), Row(1, 70), Row(1, 1, blocks=1, boundary=2)],
    "drafts": [Row(2, 18, blocks=3, boundary=4), Row(2, 2), Row(2, 2, blocks=1, boundary=3)],
    "mixed": [Row(5, 21, blocks=2, boundary=4), Row(1, 40), Row(5, 5)],
    "chunk": [Row(37, 43, blocks=3, boundary=3), Row(1, 3, blocks=1, boundary=1), Row(60, 60)],
}
GRID = {
    "block_size": [16, 48],
    "head_size": [64, 80, 128],
    "dtype": [torch.float32, torch.float16, torch.bfloat16],
    "group": [1, 3, 4],
    "num_splits": [1, 3, 8],
    "num_shares": [1, 5],
    "rows": list(ROWS),
    "logits_soft_cap": [0.0, 2.0],
    "sinks": [False, True],
}


def pages_of(batch, index, layer, head):
    """Physical pages of a row's head, spelled out: its run's, then those of its raw tail."""
    num_slots, num_blocks, heads, block_size, _ = batch.keys.shape
    row, slot = batch._rows[index], int(batch.rows.slot[index])
    pages = []
    if row.blocks:
        begin, end = batch.runs.start[slot, layer * heads + head :][:2].tolist()
        for linear in range(begin, end):
            block, place = divmod(linear, num_slots * heads)
            of_slot, of_head = divmod(place, heads)
            block = int(batch.runs.destination[slot, block])
            pages.append((of_slot * num_blocks + block) * heads + of_head)
    own_slot = batch.runs.slots[layer] if batch.runs.slots else layer
    tail = [(own_slot * num_blocks + block) * heads + head for block in batch.tails[index].tolist()]
    return pages + tail, len(pages) * block_size + row.tail


def wanted_sums(batch, sums, added, layer, scale, soft_cap):
    """The sums afterwards, row by row and head by head."""
    layers, num_blocks, heads, block_size, size = batch.keys.shape
    sums, flat = sums.clone(), batch.keys.reshape(-1, block_size, size)
    group = batch.query.shape[1] // heads
    for index, how in enumerate(added[: len(batch._rows)].tolist()):
        begin, end = batch.rows.query_start_loc[index : index + 2].tolist()
        for head in range(heads) if how != NOT and end > begin else ():
            pages, length = pages_of(batch, index, layer, head)
            own = sums[pages].flatten()
            own[length - (end - begin) : length] = 0.0
            if how != PAUSED:
                query = batch.query[begin:end, head * group : (head + 1) * group]
                sinks = None if batch.sinks is None else batch.sinks[head * group : (head + 1) * group]
                logits = causal_logits(query, flat[pages].flatten(0, 1)[:length], scale, soft_cap)
                attention = with_sinks(logits, sinks).double().softmax(-1)[..., :length]
                own[:length] += (attention**2 if how == SQUARES else attention).sum((0, 1)).float()
            sums[pages] = own.view(-1, block_size)
    return sums


def assert_adds(batch, added, layer, scale=0.2, soft_cap=0.0, num_splits=1, num_shares=1, min_share=16):
    layers, num_blocks, heads, block_size, _ = batch.keys.shape
    sums = torch.rand(layers * num_blocks * heads, block_size)  # what was there before, and garbage
    wanted = wanted_sums(batch, sums, added, layer, scale, soft_cap)
    add_attention(
        sums,
        added,
        batch.query,
        batch.keys,
        batch.runs,
        batch.rows,
        layer,
        scale,
        soft_cap,
        num_splits,
        num_shares,
        min_share,
        sinks=batch.sinks,
    )
    torch.testing.assert_close(sums, wanted, **TOLERANCE)
    return sums


@pytest.mark.parametrize("case", pairwise(GRID), ids=lambda case: "-".join(map(str, case.values())))
def test_equals_plain_pytorch_for_every_pair_of_options(case):
    torch.manual_seed(0)
    heads = 1 if case["rows"] == "chunk" else 2  # many queries are slow to interpret
    cache = make_cache(2, 30, heads, case["block_size"], case["head_size"], case["dtype"])
    batch = Batch(ROWS[case["rows"]], *cache, case["group"])
    if case["sinks"]:
        batch.sinks = torch.randn(heads * case["group"]) * 3
    added = torch.tensor([SQUARES, ATTENTION, ATTENTION, ATTENTION])[: len(batch.rows.slot)]
    splits = case["num_splits"], case["num_shares"]
    assert_adds(batch, added, 1, 0.3, case["logits_soft_cap"], *splits)


@st.composite
def geometries(draw):
    """Layers, heads, rows; anything from no compaction at all to runs many pages longer than the tail."""
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        query_len = draw(st.sampled_from([0, 1, 1, 2, 6, 20]))
        tail = max(1, query_len + draw(st.integers(0, 40)))
        blocks = draw(st.integers(0, 3))
        rows.append(Row(query_len, tail, blocks, blocks + draw(st.integers(0, 3)) if blocks else 0))
    added = draw(st.lists(st.sampled_from([NOT, ATTENTION, SQUARES, PAUSED]), min_size=4, max_size=4))
    return layers, heads, rows, torch.tensor(added)


@settings(max_examples=20)
@given(geometries(), st.sampled_from([1, 2, 5]), st.sampled_from([1, 4]), st.integers(0, 1000))
def test_equals_plain_pytorch_whatever_the_geometry_and_who_is_watched(geometry, splits, shares, seed):
    layers, heads, rows, added = geometry
    torch.manual_seed(seed)
    batch = Batch(rows, *make_cache(layers, 40, heads, 16, 32, torch.float32), group=2)
    assert_adds(batch, added, seed % layers, num_splits=splits, num_shares=shares, min_share=32)


@pytest.mark.parametrize("rows", ["decode", "mixed"])
def test_layers_of_several_groups_have_sums_of_raw_tokens_in_the_slot_that_they_share(rows):
    torch.manual_seed(4)
    batch = Batch(ROWS[rows], *make_cache(2, 30, 2, 16, 64, torch.float32), group=3, slots=(0, 0, 1))
    for layer in range(3):
        assert_adds(batch, torch.full((4,), ATTENTION), layer, num_splits=2, num_shares=2)


def test_a_loose_bound_on_the_query_length_changes_nothing():
    """A captured graph knows no more than a bound."""
    torch.manual_seed(5)
    batch = Batch(ROWS["decode"], *make_cache(2, 30, 2, 16, 64, torch.float32), group=3)
    batch.rows = replace(batch.rows, max_query_len=40)
    assert_adds(batch, torch.full((4,), ATTENTION), 0, num_splits=3, num_shares=2)


def test_what_is_summed_is_the_same_to_the_last_bit_beside_other_rows():
    torch.manual_seed(6)
    batch = Batch(ROWS["mixed"], *make_cache(2, 30, 2, 16, 64, torch.float32), group=3)
    alone, together = (
        assert_adds_to_zero(batch, torch.tensor(added)) for added in ([ATTENTION, 0, 0, 0], [ATTENTION] * 4)
    )
    (pages, _), (other, _) = pages_of(batch, 0, 1, 0), pages_of(batch, 1, 1, 0)
    assert torch.equal(alone[pages], together[pages])
    assert not alone[other].any() and together[other].any()


def assert_adds_to_zero(batch, added):
    sums = torch.zeros(batch.keys[..., 0].numel() // 16, 16)
    add_attention(sums, added, batch.query, batch.keys, batch.runs, batch.rows, 1, 0.2, min_share=16)
    return sums
