"""Blocks that attention kernels see as several: what of the scheduler's words changes for a worker."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from vllm_kvcompress import KVCompressionConfig
from vllm_kvcompress.attention.cpu import CompressedCPUAttentionBackend
from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.paging.job import Job, Loaded
from vllm_kvcompress.paging.spec import CompactableSpec, compactable_groups

SHAPE = dict(num_kv_heads=2, head_size=32, dtype=torch.float32)
PLAIN = FullAttentionSpec(block_size=96, **SHAPE)
SPLIT = replace(CompactableSpec.of(PLAIN), kernel_block_size=32)


def test_a_job_in_smaller_blocks_names_all_of_each_block_and_of_the_last_what_holds_a_token():
    config = KVCompressionConfig.parse("snapkv:budget=0.5")
    job = Job("a", config, 330, 288, 96, previous=(4,), source=(9, 2), tail=(7,), destination=(2, 5))
    split = job.split(3, 32)
    assert split.previous == (12, 13, 14) and split.source == (27, 28, 29, 6, 7, 8)
    assert split.destination == (6, 7, 8, 15, 16, 17)
    assert split.tail == (21, 22)  # of 42 tokens
    assert replace(split, previous=(4,), source=(9, 2), tail=(7,), destination=(2, 5)) == job
    several = replace(job, other_sources=((3, 1),), other_tails=((6,),))
    assert several.raw == [(9, 2, 7), (3, 1, 6)] and several.freed == {4, 9, 2, 3, 1}
    others = several.split(3, 32)
    assert others.raw == [split.source + split.tail, (9, 10, 11, 3, 4, 5, 18, 19)]


def test_a_loaded_prefix_in_smaller_blocks_has_those_of_other_groups_whole():
    loaded = Loaded("a", destination=(4, 2), tails=((7,), (1,)), beside=((9, 8), ()))
    split = Loaded("a", (12, 13, 14, 6, 7, 8), ((21, 22, 23), (3, 4, 5)), ((9, 8), ()))
    assert loaded.split(3) == split and loaded.split(1) == loaded


def test_a_spec_keeps_how_its_blocks_are_split():
    assert CompactableSpec.merge([SPLIT, SPLIT]) == SPLIT and SPLIT.tokens_of_page == 32
    assert CompactableSpec.of(PLAIN).tokens_of_page == 96
    assert SPLIT.page_size_bytes == PLAIN.page_size_bytes == 2 * 2 * 96 * 32 * 4
    with pytest.raises(AssertionError):  # by which vLLM finds out that there are several groups
        CompactableSpec.merge([SPLIT, SlidingWindowSpec(block_size=96, sliding_window=64, **SHAPE)])
    sizes = CompressedCPUAttentionBackend.get_supported_kernel_block_sizes
    assert sizes(SPLIT) == [32] and sizes(PLAIN) == sizes() != [32]


def groups(*specs) -> SimpleNamespace:
    """vLLM's configuration of a cache with such groups behind one of its own."""
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=each) for each in (PLAIN, *specs)])


def test_groups_that_are_alike_are_compacted_together():
    assert compactable_groups(groups(SPLIT, PLAIN, replace(SPLIT))) == [1, 3]
    with pytest.raises(
        KVCompressionError, match="of one shape .* has them of several shapes; serve"
    ) as error:
        compactable_groups(groups(SPLIT, CompactableSpec.of(PLAIN)))
    assert "\n" not in str(error.value)
    with pytest.raises(KVCompressionError, match="has none, or of several shapes; serve"):
        compactable_groups(groups())


def test_padded_blocks_are_refused_in_one_line():
    assert compactable_groups(groups(SPLIT)) == [1]
    padded = replace(SPLIT, page_size_padded=SPLIT.page_size_bytes + 4096)
    with pytest.raises(KVCompressionError, match="has them in blocks that are padded, .*; serve it") as error:
        compactable_groups(groups(padded))
    assert "\n" not in str(error.value)
