"""Kept tokens arrive where they shall, even where their own blocks were."""

import pytest
import torch
from paged import make_cache

from vllm_kvcompress.kernels.pages import TOKENS, gather_pages, move_pages, scatter_pages


def kept_tokens(block_size: int, head_size: int, dtype: torch.dtype, interleaved: bool):
    """A cache `[P, N, D]`, pages `[4, 5]` of four (layer, head)s, and what three of them keep."""
    torch.manual_seed(4)
    keys, values = make_cache(2, 12, 2, block_size, head_size, dtype, interleaved)
    pages = torch.randperm(48)[:20].view(4, 5)
    head = torch.tensor([0, 0, 0, 2, 3, 3])
    tokens = torch.stack([torch.randperm(5 * block_size)[:block_size].sort().values for _ in head])
    return keys.flatten(0, 2), values.flatten(0, 2), pages, head, tokens


def plain(cache, pages, head, tokens):
    """The same by indexing."""
    block_size = cache.shape[1]
    return cache[pages[head[:, None], tokens // block_size], tokens % block_size]


SHAPES = pytest.mark.parametrize(
    ("block_size", "head_size", "dtype", "interleaved"),
    [(16, 64, torch.float16, True), (32, 80, torch.bfloat16, False), (48, 256, torch.float32, True)],
)


@SHAPES
def test_destination_blocks_may_be_source_blocks(block_size, head_size, dtype, interleaved):
    keys, values, pages, head, tokens = kept_tokens(block_size, head_size, dtype, interleaved)
    target = pages.flatten()[torch.randperm(20)[: len(head)]]
    untouched = torch.ones(len(keys), dtype=torch.bool)
    untouched[target] = False
    wanted = plain(keys, pages, head, tokens), plain(values, pages, head, tokens)
    others = keys[untouched], values[untouched]

    scatter_pages(*gather_pages(keys, values, pages, head, tokens), keys, values, target)

    assert torch.equal(keys[target], wanted[0]) and torch.equal(values[target], wanted[1])
    assert torch.equal(keys[untouched], others[0]) and torch.equal(values[untouched], others[1])


@SHAPES
def test_moving_to_free_pages_needs_no_second_copy(block_size, head_size, dtype, interleaved):
    keys, values, pages, head, tokens = kept_tokens(block_size, head_size, dtype, interleaved)
    free = torch.tensor(sorted(set(range(48)) - set(pages.flatten().tolist())))[: len(head)]
    wanted = plain(keys, pages, head, tokens), plain(values, pages, head, tokens)
    move_pages(keys, values, pages, head, tokens, free)
    assert torch.equal(keys[free], wanted[0]) and torch.equal(values[free], wanted[1])


def test_a_request_that_keeps_nothing_changes_nothing():
    keys, values, pages, head, tokens = kept_tokens(16, 64, torch.float16, True)
    before = keys.clone()
    staged = gather_pages(keys, values, pages, head[:0], tokens[:0])
    scatter_pages(*staged, keys, values, head[:0])
    assert staged[0].shape == (0, 16, 64) and torch.equal(keys, before)


def test_pages_beyond_the_reach_of_32_bit_offsets_are_moved(tmp_path):
    stride, num_pages = 2**27, 20  # elements
    sparse = torch.from_file(
        str(tmp_path / "cache"), shared=True, size=stride * num_pages, dtype=torch.float16
    )
    cache = sparse.as_strided((num_pages, 16, 128), (stride, 128, 1))
    cache.copy_(torch.randn(cache.shape))
    keys, values = cache[..., :64], cache[..., 64:]
    tokens = torch.arange(32)[16 * (torch.arange(16) % 2) + torch.arange(16)][None]  # of both pages in turn
    wanted = torch.cat([keys[18], keys[17]])[tokens[0]], torch.cat([values[18], values[17]])[tokens[0]]
    move_pages(keys, values, torch.tensor([[18, 17]]), torch.tensor([0]), tokens, torch.tensor([19]))
    assert torch.equal(keys[19], wanted[0]) and torch.equal(values[19], wanted[1])


@pytest.mark.parametrize("num_pages", [1, 5])
def test_programs_copy_tokens_of_several_pages_and_not_beyond_the_last(num_pages):
    keys, values, pages, head, tokens = kept_tokens(16, 64, torch.float16, True)
    assert TOKENS > 16 and num_pages * 16 % TOKENS
    target = torch.tensor(sorted(set(range(48)) - set(pages.flatten().tolist())))[:num_pages]
    others = torch.ones(48, dtype=torch.bool)
    others[target] = False
    before = keys[others], values[others]
    move_pages(keys, values, pages, head[:num_pages], tokens[:num_pages], target)
    assert torch.equal(keys[target], plain(keys, pages, head[:num_pages], tokens[:num_pages]))
    assert torch.equal(keys[others], before[0]) and torch.equal(values[others], before[1])
