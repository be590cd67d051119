"""The kernel over vectors in several ranks equals the plain PyTorch reference, output and log-sum-exp."""

import pytest
import torch
from paged import Row
from test_record_attention import RecordBatch, assert_equals_reference, make_batch

NAME = "mixed_dim"


RUNS = {
    "decode": [Row(1, 9, blocks=8, boundary=10), Row(1, 1, blocks=6, boundary=8)],
    "extend": [Row(5, 7, blocks=8, boundary=10), Row(2, 30, blocks=6, boundary=8)],
    "chunk": [Row(19, 33, blocks=8, boundary=10)],
}


@pytest.mark.parametrize(
    ("rows", "head_size", "dtype", "group", "num_splits", "soft_cap"),
    [
        ("decode", 64, torch.float32, 3, 2, 0.0),
        ("decode", 128, torch.bfloat16, 8, 1, 0.0),
        ("extend", 80, torch.float16, 1, 3, 2.0),
        ("extend", 48, torch.float32, 7, 1, 0.0),
        ("chunk", 64, torch.bfloat16, 4, 1, 1.0),
        ("decode", 16, torch.float32, 2, 1, 0.0),
        ("decode", 256, torch.float16, 2, 2, 0.0),
    ],
)
def test_equals_the_reference_in_every_rank(rows, head_size, dtype, group, num_splits, soft_cap):
    torch.manual_seed(0)
    rows = RUNS[rows]
    batch = RecordBatch(rows, [NAME] * len(rows), group, torch.randn(2, 40, 1, 64, 2 * head_size).to(dtype))
    slots = [batch.rows.slot[row] for row, _ in batch.rows_of(NAME)]
    tokens = [_tokens(batch, slots, layer).sum(1) for layer in (0, 1)]
    layer = int(tokens[1].min() > tokens[0].min())
    assert tokens[layer].min() > 0, "there is something in every rank"
    assert_equals_reference(batch, NAME, layer, 0.2, soft_cap, num_splits, 32)


def _tokens(batch, slots, layer):
    """Tokens `[P, R·H]` in each rank of the heads of a layer."""
    heads = batch.keys.shape[2]
    own = slice(layer * heads, (layer + 1) * heads)
    return torch.cat([batch.runs.encoded[slot, :3, own] for slot in slots], 1)


def test_raw_tokens_may_have_a_bias():
    torch.manual_seed(1)
    batch = make_batch("extend", NAME, group=3)
    bias = torch.randn(batch.keys.shape[:-1])
    assert_equals_reference(batch, NAME, logits_soft_cap=2.0, num_splits=2, bias=bias)


def test_sinks_are_in_the_softmax_of_every_query():
    torch.manual_seed(2)
    batch = make_batch("decode", NAME, group=3)
    sinks = torch.tensor([-3.0, 0.0, 1.0, 4.0, 200.0, -torch.inf])
    out = torch.empty_like(batch.query)
    batch.launch(NAME, 1, 0.2, 2.0, 1, 64, out, sinks=sinks)
    for tokens, wanted, _ in batch.expected_of(NAME, 1, 0.2, 2.0, sinks=sinks):
        torch.testing.assert_close(out[tokens], wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("empty", [(0,), (1, 2), (0, 1, 2)])
def test_heads_may_have_no_records_of_some_ranks(empty):
    torch.manual_seed(3)
    batch = make_batch("decode", NAME, group=2)
    batch.runs.encoded[:, list(empty)] = 0
    assert_equals_reference(batch, NAME, num_splits=2)


def test_rows_of_other_formats_are_left_alone():
    torch.manual_seed(4)
    rows = [Row(1, 9, blocks=3, boundary=5), Row(2, 9, blocks=3, boundary=5), Row(1, 5)]
    batch = RecordBatch(rows, [NAME, "kivi4", None], 2, torch.randn(2, 40, 1, 32, 128))
    assert_equals_reference(batch, NAME)
    assert_equals_reference(batch, "kivi4")
