"""Block accounting of compaction on vLLM's real block pool."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash

from vllm_kvcompress.paging.spec import CompactableSpec

BLOCK = 32


def manager_of(num_blocks: int, others: int = 0):
    """A manager, which has taken in others of the same pool."""
    spec = CompactableSpec(block_size=BLOCK, num_kv_heads=2, head_size=64, dtype=torch.float32)
    pool = BlockPool(num_blocks, enable_caching=True, hash_block_size=BLOCK)
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    cls = KVCacheSpecRegistry.get_manager_class(spec)
    given = dict(block_pool=pool, enable_caching=True, scheduler_block_size=BLOCK)
    manager = cls(spec, kv_cache_group_id=0, **given)
    for group in range(1, 1 + others):
        manager.take_in(cls(spec, kv_cache_group_id=group, **given))
    return manager


def request_of(request_id: str, num_tokens: int, salt: str = ""):
    hashes = [BlockHash(f"{salt}{i}".encode()) for i in range(num_tokens // BLOCK)]
    return SimpleNamespace(request_id=request_id, block_hashes=hashes, shared_prefix_boundary=0)


def admit(manager, request, num_tokens: int, hit: int = 0) -> None:
    """Give a request blocks for `num_tokens`, the first `hit` of them from the prefix cache."""
    hits = [manager.block_pool.get_cached_block(h, [0])[0] for h in request.block_hashes[:hit]]
    manager.add_local_computed_blocks(request.request_id, hits, hit * BLOCK, 0)
    manager.allocate_new_blocks(request.request_id, num_tokens, num_tokens)
    manager.cache_blocks(request, num_tokens, replay_boundaries=())


def test_compaction_returns_all_but_the_kept_blocks_and_the_raw_tail():
    manager = manager_of(30)
    free = manager.block_pool.get_num_free_blocks()
    admit(manager, request_of("a", 10 * BLOCK), 10 * BLOCK)
    _, source, destination = manager.compact("a", 0, 8, 2)
    assert (len(source), len(destination)) == (8, 2)
    assert manager.held_blocks("a") == 2 + 2
    assert manager.block_pool.get_num_free_blocks() == free - 4
    assert all(block.is_null for block in manager.req_to_blocks["a"][:8])
    manager.free("a")
    assert manager.block_pool.get_num_free_blocks() == free
    assert manager.take_released() == ["a"] and manager.take_released() == []
    assert not manager.compacted


def test_source_blocks_stay_in_the_prefix_cache_after_they_are_freed():
    manager = manager_of(30)
    request = request_of("a", 10 * BLOCK)
    admit(manager, request, 10 * BLOCK)
    _, source, _ = manager.compact("a", 0, 8, 2)
    found = [manager.block_pool.get_cached_block(h, [0])[0].block_id for h in request.block_hashes[:8]]
    assert tuple(found) == source


def test_blocks_computed_on_compacted_context_never_enter_the_prefix_cache():
    manager = manager_of(30)
    request = request_of("a", 12 * BLOCK)
    admit(manager, request, 10 * BLOCK)
    manager.compact("a", 0, 8, 2)
    manager.allocate_new_blocks("a", 12 * BLOCK, 12 * BLOCK)
    manager.cache_blocks(request, 12 * BLOCK, replay_boundaries=())
    assert manager.block_pool.get_cached_block(request.block_hashes[9], [0]) is not None
    assert manager.block_pool.get_cached_block(request.block_hashes[10], [0]) is None


def test_a_full_pool_reuses_the_requests_own_blocks_and_drops_their_cache_entries():
    manager = manager_of(11)
    request = request_of("a", 10 * BLOCK)
    admit(manager, request, 10 * BLOCK)
    assert manager.block_pool.get_num_free_blocks() == 0
    _, source, destination = manager.compact("a", 0, 8, 2)
    assert set(destination) <= set(source)
    for block_id, block_hash in zip(source, request.block_hashes, strict=False):
        cached = manager.block_pool.get_cached_block(block_hash, [0])
        assert (cached is None) == (block_id in destination)
    assert manager.block_pool.get_num_free_blocks() == 6
    manager.free("a")
    assert manager.block_pool.get_num_free_blocks() == 10


@pytest.mark.parametrize("num_shared", [7, 8])
def test_a_block_that_another_request_reads_is_never_a_destination(num_shared):
    manager = manager_of(13)
    first, second = request_of("a", 10 * BLOCK), request_of("b", 10 * BLOCK)
    admit(manager, first, 10 * BLOCK)
    shared = {b.block_id for b in manager.req_to_blocks["a"][:num_shared]}
    admit(manager, second, 10 * BLOCK if num_shared == 8 else 9 * BLOCK, hit=num_shared)
    assert manager.block_pool.get_num_free_blocks() == 0
    before = list(manager.req_to_blocks["b"])
    swapped = manager.compact("b", 0, 8, 2)
    if swapped is None:
        assert manager.req_to_blocks["b"] == before and "b" not in manager.compacted
    else:
        assert not shared & set(swapped[2])
    assert (swapped is None) == (num_shared >= 7)
    manager.free("a")
    manager.free("b")
    assert manager.block_pool.get_num_free_blocks() == 12


@pytest.mark.parametrize("roomy", [True, False])
def test_a_later_compaction_takes_new_blocks_or_the_earlier_ones_again_and_returns_the_rest(roomy):
    manager = manager_of(30 if roomy else 15)
    free = manager.block_pool.get_num_free_blocks()
    admit(manager, request_of("a", 10 * BLOCK), 10 * BLOCK)
    _, _, first = manager.compact("a", 0, 8, 4)
    manager.allocate_new_blocks("a", 16 * BLOCK, 16 * BLOCK)
    previous, source, destination = manager.compact("a", 8, 14, 3)
    assert previous == first and len(source) == 6
    if roomy:
        assert set(destination).isdisjoint(previous + source)
    else:
        assert destination == first[:3]
    assert manager.held_blocks("a") == 3 + 2
    assert manager.block_pool.get_num_free_blocks() == free - 5
    manager.free("a")
    assert manager.block_pool.get_num_free_blocks() == free


def test_a_growing_compaction_in_a_full_pool_uses_the_requests_own_blocks():
    manager = manager_of(15)
    admit(manager, request_of("a", 10 * BLOCK), 10 * BLOCK)
    manager.compact("a", 0, 8, 2)
    manager.allocate_new_blocks("a", 20 * BLOCK, 20 * BLOCK)
    assert manager.block_pool.get_num_free_blocks() == 0
    previous, source, destination = manager.compact("a", 8, 18, 6)
    assert set(previous) < set(destination) <= set(previous) | set(source)
    assert manager.held_blocks("a") == 6 + 2


def test_a_request_that_reads_anothers_blocks_gives_them_back_and_is_never_cached():
    manager = manager_of(30)
    owner, other = request_of("a", 8 * BLOCK), request_of("b", 8 * BLOCK, "b")
    admit(manager, owner, 8 * BLOCK)
    free = manager.block_pool.get_num_free_blocks()
    shared = list(manager.req_to_blocks["a"][:6])
    manager.borrowers.add("b")
    manager.add_local_computed_blocks("b", shared, 6 * BLOCK, 0)
    manager.allocate_new_blocks("b", 8 * BLOCK, 8 * BLOCK)
    manager.cache_blocks(other, 8 * BLOCK, replay_boundaries=())
    assert all(block.ref_cnt == 2 for block in shared)
    assert manager.block_pool.get_cached_block(other.block_hashes[7], [0]) is None
    manager.free("b")
    assert all(block.ref_cnt == 1 for block in shared)
    assert manager.block_pool.get_num_free_blocks() == free


def test_a_request_that_is_compacted_on_the_way_asks_for_its_peak_alone():
    manager = manager_of(30)
    asked = dict(
        new_computed_blocks=[],
        total_computed_tokens=0,
        num_local_computed_tokens=0,
        num_tokens_main_model=100 * BLOCK,
        apply_admission_cap=True,
    )
    assert manager.get_num_blocks_to_allocate("a", 100 * BLOCK, **asked) == 100
    manager.peak_blocks["a"] = 12
    assert manager.get_num_blocks_to_allocate("a", 100 * BLOCK, **asked) == 12
    assert manager.get_num_blocks_to_allocate("a", 5 * BLOCK, **asked) == 5


@pytest.mark.parametrize("roomy", [True, False])
def test_blocks_of_several_groups_are_swapped_together_and_all_come_back(roomy):
    manager = manager_of(60 if roomy else 31, others=2)
    managers, pool = (manager, *manager.others), manager.block_pool
    free, request = pool.get_num_free_blocks(), request_of("a", 12 * BLOCK)
    for each in managers:
        admit(each, request, 10 * BLOCK)
    rows = [[block.block_id for block in row[:8]] for row in manager.rows("a")]
    previous, source, destination = manager.compact("a", 0, 8, 2)
    assert not previous and list(source) == sum(rows, []) and len(destination) == 6
    assert set(destination).isdisjoint(source) == roomy
    assert manager.held_blocks("a") == 6 + 3 * 2 == free - pool.get_num_free_blocks()
    for each in managers:
        assert all(block.is_null for block in each.req_to_blocks["a"][:8])
        each.allocate_new_blocks("a", 12 * BLOCK, 12 * BLOCK)
        each.cache_blocks(request, 12 * BLOCK, replay_boundaries=())
        group = [each.kv_cache_group_id]
        assert pool.get_cached_block(request.block_hashes[9], group) is not None
        assert pool.get_cached_block(request.block_hashes[10], group) is None
    again, source, destination = manager.compact("a", 8, 11, 3)
    assert len(again) == 6 and len(source) == 9 and len(destination) == 9
    manager.shrink("a", 1)
    assert manager.held_blocks("a") == 3 + 3 == free - pool.get_num_free_blocks()
    for each in managers[::-1]:
        each.free("a")
    assert pool.get_num_free_blocks() == free
    assert manager.take_released() == ["a"] and not any(each.take_released() for each in managers)
