"""Block accounting: full attention whose prompt blocks can be swapped for fewer compacted ones."""

from collections.abc import Sequence

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request


class CompactingManager(FullAttentionManager):
    """vLLM's full-attention manager plus one verb, `compact`.

    A request's row of blocks stays positional: position i of the row is block i of its tokens. Compacted
    positions hold the null block, as sliding-window rows do, and the blocks that really hold the kept
    pages are kept beside the row in `compacted`.
    """

    def __init__(self, kv_cache_spec: KVCacheSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.compacted: dict[str, list[KVCacheBlock]] = {}
        self._released: list[str] = []

    def compact(
        self, request_id: str, num_source: int, num_kept: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Swap the first `num_source` blocks of a request for `num_kept` compacted ones.

        The source blocks are freed at once. That is safe because the worker runs the Job before any write of
        the step that is now being scheduled. They keep their prefix-cache hashes until they are reused.

        Returns:
            Source and destination block ids, or None while neither the pool nor the request's own unshared
            blocks can provide the destination.
        """
        row = self.req_to_blocks[request_id]
        source = row[:num_source]
        destination = self._take_destination(source, num_kept)
        if destination is None:
            return None
        row[:num_source] = [self._null_block] * num_source
        reused = {block.block_id for block in destination}
        self.block_pool.free_blocks(block for block in reversed(source) if block.block_id not in reused)
        self.compacted[request_id] = destination
        return tuple(b.block_id for b in source), tuple(b.block_id for b in destination)

    def _take_destination(self, source: list[KVCacheBlock], num_kept: int) -> list[KVCacheBlock] | None:
        num_new = min(num_kept, self.block_pool.get_num_free_blocks())
        # A block that another request can read must not be written; one that only the prefix cache
        # knows may be, once its entry is gone.
        own = [block for block in source if block.ref_cnt == 1][: num_kept - num_new]
        if num_new + len(own) < num_kept:
            return None
        self.block_pool.evict_blocks({block.block_id for block in own})
        return self.block_pool.get_new_blocks(num_new) + own

    def held_blocks(self, request_id: str) -> int:
        """Blocks of the pool that the request holds: its raw blocks and its compacted ones."""
        raw = sum(not block.is_null for block in self.req_to_blocks.get(request_id, ()))
        return raw + len(self.compacted.get(request_id, ()))

    def take_released(self) -> list[str]:
        """Drain the ids of requests whose compacted blocks were returned since the last call."""
        released, self._released = self._released, []
        return released

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        # Whatever is computed on top of compacted context is not what its hash promises.
        if request.request_id in self.compacted:
            return
        super().cache_blocks(request, num_tokens, retention_interval, replay_boundaries=replay_boundaries)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks = super().pop_blocks_for_free(request_id)
        destination = self.compacted.pop(request_id, None)
        if destination is None:
            return blocks
        self._released.append(request_id)
        return destination + blocks
