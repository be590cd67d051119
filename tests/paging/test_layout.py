"""Linear pages of a compacted request are distinct, and are the pages of its blocks."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.paging.layout import PageGrid


@given(layers=st.integers(1, 5), heads=st.integers(1, 4), blocks=st.integers(2, 12), data=st.data())
def test_linear_pages_are_exactly_the_pages_of_the_blocks(layers, heads, blocks, data):
    grid = PageGrid(layers, blocks, heads, block_size=32)
    chosen = data.draw(st.lists(st.integers(1, blocks - 1), unique=True, min_size=1))
    linear = grid.linear_pages(torch.tensor(chosen)).tolist()
    cache = torch.arange(layers * blocks * heads).view(layers, blocks, heads)
    per_block = layers * heads
    assert linear == [
        int(cache[p % per_block // heads, chosen[p // per_block], p % heads])
        for p in range(len(chosen) * per_block)
    ]
    assert sorted(linear) == sorted(cache[:, chosen].flatten().tolist())


@given(layers=st.integers(1, 5), heads=st.integers(1, 4), blocks=st.integers(2, 12))
def test_positional_pages_keep_each_layer_and_head_in_its_slot(layers, heads, blocks):
    grid = PageGrid(layers, blocks, heads, block_size=32)
    cache = torch.arange(layers * blocks * heads).view(layers, blocks, heads)
    ids = torch.tensor([blocks - 1, 0])
    assert torch.equal(grid.positional_pages(ids), cache[:, ids].permute(0, 2, 1))
    for layer in range(layers):
        own = grid.layer_pages(slice(layer, layers), ids).view(-1, heads, 2)
        assert torch.equal(own, cache[layer:, ids].transpose(1, 2))
