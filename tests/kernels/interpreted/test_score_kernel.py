"""The score kernels equal what the policies compute in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from paged import make_cache

from vllm_kvcompress.kernels.reference import causal_logits
from vllm_kvcompress.kernels.scores import pool_columns, window_columns

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32


def window_attention(queries, keys, scale, soft_cap):
    """Attention `[G, w, n]` of one KV head's group `[w, G, D]`."""
    return causal_logits(queries, keys, scale, soft_cap).softmax(-1)


@pytest.mark.parametrize(
    ("block_size", "head_size", "dtype", "group", "window", "soft_cap", "squared", "missing", "interleaved"),
    [
        (16, 64, HALF, 1, 1, 0.0, False, (0, 0), True),
        (16, 80, BRAIN, 3, 32, 2.0, True, (1, 0), True),
        (32, 96, FLOAT, 4, 8, 0.0, True, (0, 2), False),
        (32, 256, HALF, 3, 70, 0.0, False, (1, 0), False),
        (48, 128, BRAIN, 7, 8, 2.0, False, (0, 0), True),
        (48, 64, FLOAT, 8, 32, 0.0, True, (2, 1), True),
        (48, 256, BRAIN, 1, 5, 2.0, True, (0, 1), False),
    ],
)
def test_columns_equal_attention_summed_over_the_window(
    block_size, head_size, dtype, group, window, soft_cap, squared, missing, interleaved
):
    torch.manual_seed(1)
    heads, num_pages = 2, 4
    keys, _ = make_cache(1, 20, heads, block_size, head_size, dtype, interleaved)
    keys = keys.flatten(0, 2)
    pages = torch.randperm(40)[: heads * num_pages].view(heads, num_pages)
    for head, absent in enumerate(missing):
        pages[head, :absent] = -1  # this head holds less than others
    num_columns = num_pages * block_size - 5
    queries = (2 * torch.randn(window, heads * group, head_size)).to(dtype)
    scale, num_scored = 0.11, num_columns - window
    found = window_columns(queries, keys, pages, num_columns, num_scored, scale, soft_cap, squared)

    assert found.shape == (heads, group, num_scored)
    for head, own in enumerate(queries.unflatten(1, (heads, group)).unbind(1)):
        absent = missing[head] * block_size
        held = keys[pages[head, missing[head] :]].flatten(0, 1)[: num_columns - absent]
        attention = window_attention(own, held, scale, soft_cap)
        wanted = (attention.square() if squared else attention).sum(1)[:, : num_scored - absent]
        torch.testing.assert_close(found[head, :, absent:], wanted, atol=2e-6, rtol=5e-5)
        assert not found[head, :, :absent].any()


def test_every_column_may_be_scored_and_its_attention_then_sums_to_the_window():
    torch.manual_seed(2)
    keys, _ = make_cache(1, 8, 2, 16, 64, HALF)
    pages = torch.randperm(16)[:8].view(2, 4)
    queries = torch.randn(10, 4, 64).to(HALF)
    found = window_columns(queries, keys.flatten(0, 2), pages, 60, 60, 0.1)
    torch.testing.assert_close(found.sum(-1), torch.full((2, 2), 10.0))


@pytest.mark.parametrize("num_columns", [5, 700])
@pytest.mark.parametrize(
    ("kernel_size", "pooling", "reduction"), [(7, "max", "mean"), (5, "avg", "mean"), (1, "max", "sum")]
)
def test_pooling_equals_torch(num_columns, kernel_size, pooling, reduction):
    torch.manual_seed(3)
    columns = torch.rand(2, 3, num_columns)
    pool = F.max_pool1d if pooling == "max" else F.avg_pool1d
    pooled = pool(columns, kernel_size, stride=1, padding=kernel_size // 2)
    wanted = (pooled.mean(1) if reduction == "mean" else pooled.sum(1))[:, : num_columns - 2]
    found = pool_columns(columns, num_columns - 2, kernel_size, pooling, reduction)
    torch.testing.assert_close(found, wanted)
