"""Heads are cut into shares by their own lengths, and what is put together of them is the reference's."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import TOLERANCE, Batch, Row, make_cache, pairwise

from vllm_kvcompress.kernels.attention import attend
from vllm_kvcompress.kernels.prediction import cut_evenly
from vllm_kvcompress.kernels.shares import WAVES, Shares

ROWS = {
    "decode": [Row(1, 9, blocks=2, boundary=5), Row(1, 70), Row(1, 1, blocks=1, boundary=2)],
    "drafts": [Row(2, 18, blocks=3, boundary=4), Row(2, 2), Row(2, 2, blocks=1, boundary=3)],
}
LONG = [Row(2, 300, blocks=4, boundary=5), Row(1, 260), Row(1, 3, blocks=1, boundary=3)]


def lengths(batch, layer, compacted_only):
    """Keys of each row's heads, by a loop."""
    heads, block_size = batch.keys.shape[2:4]
    found = []
    for index in range(len(batch.rows.seq_lens)):
        slot, seq_len = int(batch.rows.slot[index]), int(batch.rows.seq_lens[index])
        begin, end = batch.rows.query_start_loc[index : index + 2].tolist()
        for head in range(heads):
            if end == begin or (slot < 0 and compacted_only):
                found.append(0)
            elif slot < 0:
                found.append(seq_len)
            else:
                first, last = batch.runs.start[slot, layer * heads + head :][:2].tolist()
                found.append((last - first) * block_size + seq_len - int(batch.runs.boundary[slot]))
    return found


def cut(batch, at_once, compacted_only=False, align=16, min_share=16):
    _, _, heads, block_size, _ = batch.keys.shape
    layers = batch.runs.num_layers(heads)
    longest = max(max(lengths(batch, layer, False)) for layer in range(layers))
    shares = Shares.empty(len(batch.rows.seq_lens) + 2, layers, heads, at_once, "cpu", longest)
    shares.cut(batch.runs, batch.rows, block_size, 0, compacted_only, align, min_share)
    return shares


def assert_equals_reference(batch, layer, at_once=4, scale=0.2, logits_soft_cap=0.0, min_share=16):
    dtype = batch.query.dtype
    out = torch.full_like(batch.query, torch.nan)
    align = max(16, min(128, 16384 // (batch.query.shape[2] * out.element_size())))
    shares = cut(batch, at_once, align=align, min_share=min_share)
    _, lse = attend(
        batch.query,
        batch.keys,
        batch.values,
        batch.runs,
        batch.rows,
        layer,
        scale,
        logits_soft_cap,
        out=out,
        shares=shares,
    )
    wanted, wanted_lse = batch.expected(layer, scale, logits_soft_cap)
    tolerance = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(out[: len(wanted)].float(), wanted, **tolerance)
    torch.testing.assert_close(lse[: len(wanted)], wanted_lse, atol=2e-5, rtol=2e-5)
    assert out[len(wanted) :].isnan().all()  # padding tokens are left alone
    assert not shares.arrived.any(), "ready for the next layer"
    return shares


@settings(max_examples=12)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 900), st.integers(0, 6)), min_size=1, max_size=4
    ),
    heads=st.integers(1, 3),
    at_once=st.sampled_from([1, 3, 8, 50]),
    compacted_only=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_key_is_in_one_share_and_none_is_long(rows, heads, at_once, compacted_only, seed):
    torch.manual_seed(seed)
    rows = [Row(queries, tail, blocks, blocks) for queries, tail, blocks in rows]
    batch = Batch(rows, *make_cache(2, 300, heads, 16, 16, torch.float32), group=1)
    shares = cut(batch, at_once, compacted_only, min_share=48)
    assert shares.num_programs(len(batch.rows.seq_lens)) <= shares.work.shape[2]
    for layer in range(2):
        wanted = lengths(batch, layer, compacted_only)
        item, begin, end, count, number, place = shares.work[:, layer].tolist()
        busy = sum(one >= 0 for one in item)
        assert all(one < 0 for one in item[busy:]), "idle programs are the last"
        assert busy <= shares.num_programs(len(batch.rows.seq_lens))
        next_key = [0] * len(wanted)
        for program in range(busy):
            own = item[program]
            assert begin[program] == next_key[own] < end[program] <= wanted[own]
            assert begin[program] % 16 == 0
            assert number[program] == program - item.index(own) and count[program] == item.count(own)
            next_key[own] = end[program]
        assert next_key == wanted
        cut_heads = [program for program in range(busy) if count[program] > 1]
        assert [place[program] + number[program] for program in cut_heads] == list(range(len(cut_heads)))
        assert len(cut_heads) <= shares.num_parts
        sizes = [stop - start for start, stop in zip(begin[:busy], end[:busy], strict=True)]
        fair = sum(wanted) / max(1, at_once // 2)
        assert max(sizes, default=0) <= max(48, fair) + 16


def test_many_keys_are_cut_for_several_waves_and_few_for_one():
    batch = Batch([Row(1, 9)], *make_cache(1, 4, 2, 16, 16, torch.float32), group=1)
    for length, wanted in ((8 * 1024, 8), (64 * 1024, WAVES * 8)):
        batch.rows = replace(batch.rows, seq_lens=torch.tensor([length // 2, 0], dtype=torch.int32))
        busy = int((cut(batch, at_once=8, min_share=256).work[0] >= 0).sum())
        assert 0.7 * wanted <= busy <= wanted


@pytest.mark.parametrize("seq_lens", [[70, 3000, 129], [20000, 1, 900]])
@pytest.mark.parametrize("at_once", [3, 40])
def test_the_model_of_the_kernel_has_the_same_shares(seq_lens, at_once):
    batch = Batch([Row(1, 9)] * 3, *make_cache(1, 4, 2, 16, 16, torch.float32), group=1)
    batch.rows = replace(batch.rows, seq_lens=torch.tensor([*seq_lens, 0], dtype=torch.int32))
    shares = cut(batch, at_once, align=128, min_share=256)
    item, begin, end = shares.work[:3, 0]
    found = (end - begin)[item >= 0].tolist()
    assert found == cut_evenly([length for length in seq_lens for _ in range(2)], at_once)


def test_shares_of_a_batch_before_are_forgotten():
    torch.manual_seed(0)
    batch = Batch(ROWS["decode"], *make_cache(2, 30, 2, 16, 16, torch.float32), group=1)
    shares = cut(batch, at_once=8)
    assert (shares.work[0] >= 0).any()
    batch.rows = replace(batch.rows, slot=torch.full_like(batch.rows.slot, -1))
    shares.cut(batch.runs, batch.rows, 16)
    assert (shares.work[0] < 0).all()


GRID = {
    "block_size": [16, 32, 48],
    "head_size": [64, 80, 128, 256],
    "dtype": list(TOLERANCE),
    "group": [1, 3, 4, 8],
    "at_once": [1, 4, 40],
    "rows": list(ROWS),
    "logits_soft_cap": [0.0, 2.0],
}


@pytest.mark.parametrize("case", pairwise(GRID), ids=lambda case: "-".join(map(str, case.values())))
def test_equals_the_reference_for_every_pair_of_options(case):
    torch.manual_seed(0)
    cache = make_cache(2, 30, 2, case["block_size"], case["head_size"], case["dtype"])
    batch = Batch(ROWS[case["rows"]], *cache, case["group"])
    shares = assert_equals_reference(batch, 1, case["at_once"], logits_soft_cap=case["logits_soft_cap"])
    most = int(shares.work[3, 1][shares.work[0, 1] >= 0].max())
    assert case["at_once"] < 4 or case["head_size"] < 128 or most > 1, "something is merged"


def test_layers_of_several_groups_have_shares_of_their_own():
    torch.manual_seed(4)
    batch = Batch(LONG, *make_cache(2, 60, 2, 16, 64, torch.float32), group=2, slots=(0, 0, 1))
    for layer in range(3):
        assert_equals_reference(batch, layer)


def test_a_captured_graph_of_more_rows_reads_the_shares_of_fewer():
    """Its grid, its rows and its bound on queries are larger, and the arrays have changed since."""
    torch.manual_seed(5)
    batch = Batch(LONG, *make_cache(2, 60, 2, 16, 64, torch.float32), group=3)
    shares = cut(batch, at_once=24, align=64)
    assert shares.work[3, 1].max() > 2
    rows = batch.rows
    padded = replace(
        rows,
        slot=torch.nn.functional.pad(rows.slot, (0, 1), value=-1),
        seq_lens=torch.nn.functional.pad(rows.seq_lens, (0, 1)),
        query_start_loc=torch.cat([rows.query_start_loc, rows.query_start_loc[-1:]]),
        block_table=torch.nn.functional.pad(rows.block_table, (0, 0, 0, 1)),
        max_query_len=4,
    )
    out = torch.full_like(batch.query, torch.nan)
    attend(batch.query, batch.keys, batch.values, batch.runs, padded, 1, 0.2, out=out, shares=shares)
    wanted, _ = batch.expected(1, 0.2, 0.0)
    torch.testing.assert_close(out[: len(wanted)], wanted, atol=1e-5, rtol=1e-5)
    assert out[len(wanted) :].isnan().all()


def test_rows_of_another_kernel_are_left_alone():
    torch.manual_seed(7)
    batch = Batch(ROWS["drafts"], *make_cache(2, 30, 2, 16, 64, torch.float32), group=3)
    shares = cut(batch, at_once=4, compacted_only=True, align=64)
    out = torch.full_like(batch.query, torch.nan)
    attend(
        batch.query,
        batch.keys,
        batch.values,
        batch.runs,
        batch.rows,
        1,
        0.2,
        out=out,
        compacted_only=True,
        shares=shares,
    )
    wanted, _ = batch.expected(1, 0.2, 0.0)
    bounds = batch.rows.query_start_loc.tolist()
    for index, row in enumerate(ROWS["drafts"]):
        own = slice(bounds[index], bounds[index + 1])
        if row.blocks:
            torch.testing.assert_close(out[own], wanted[own], atol=1e-5, rtol=1e-5)
        else:
            assert out[own].isnan().all()
    assert out[bounds[-1] :].isnan().all()


@pytest.mark.parametrize("at_once", [1, 24])
def test_sinks_are_in_the_softmax_of_every_query(at_once):
    torch.manual_seed(8)
    batch = Batch(LONG, *make_cache(2, 60, 2, 16, 64, torch.float32), group=3)
    batch.sinks = torch.tensor([-3.0, 0.0, 1.0, 4.0, 200.0, -torch.inf])
    shares = cut(batch, at_once, align=64)
    assert (shares.work[3, 1].max() > 2) == (at_once > 1)
    found, lse = attend(
        batch.query,
        batch.keys,
        batch.values,
        batch.runs,
        batch.rows,
        1,
        0.2,
        2.0,
        sinks=batch.sinks,
        shares=shares,
    )
    wanted, wanted_lse = batch.expected(1, 0.2, 2.0)
    torch.testing.assert_close(found[: len(wanted)], wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[: len(wanted)], wanted_lse, atol=2e-5, rtol=2e-5)
    assert not shares.arrived.any(), "ready for the next layer"
