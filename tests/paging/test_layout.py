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


GROUPED = PageGrid(5, 12, 2, block_size=32, num_groups=3, groups=(0, 1, 2, 0, 1), slots=(0, 0, 0, 1, 1))


def test_layers_of_several_groups_have_slots_together_and_blocks_of_their_own():
    cache = torch.arange(2 * 12 * 2).view(2, 12, 2)
    ids = torch.tensor([[3, 4, 5], [6, 7, 8], [9, 10, 11]])
    pages = GROUPED.positional_pages(ids)
    for layer, (group, slot) in enumerate(zip(GROUPED.groups, GROUPED.slots, strict=True)):
        assert torch.equal(pages[layer], cache[slot, ids[group]].T)
        own = GROUPED.layer_pages(slice(layer, layer + 1), ids[group])
        assert torch.equal(own, pages[layer])
    assert torch.equal(GROUPED.layer_pages(slice(1, 4), ids), pages[1:4].flatten(0, 1))
    assert len(pages.unique()) == pages.numel()


def test_a_compacted_page_of_any_group_may_be_in_any_slot_of_any_block():
    cache = torch.arange(2 * 12 * 2).view(2, 12, 2)
    chosen = torch.tensor([9, 2])
    linear = GROUPED.linear_pages(chosen)
    assert torch.equal(linear, cache[:, chosen].transpose(0, 1).flatten())
