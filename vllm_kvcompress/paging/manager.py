"""Block accounting: full attention whose prompt blocks can be swapped for fewer compacted ones."""

from collections.abc import Sequence

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from vllm_kvcompress.paging.prefixes import Prefix


class CompactingManager(FullAttentionManager):
    """vLLM's full-attention manager plus one verb, `compact`.

    A request's row of blocks stays positional: position i of the row is block i of its tokens. Compacted
    positions hold the null block, as sliding-window rows do, and the blocks that really hold the kept
    pages are kept beside the row in `compacted`.

    Where vLLM has the layers in several groups, a request has as many rows, and one destination for all: of
    their managers one compacts and keeps the books of all.

    Attributes:
        others: managers of the other groups, whose blocks are compacted with these.
    """

    def __init__(self, kv_cache_spec: KVCacheSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.compacted: dict[str, list[KVCacheBlock]] = {}
        self.peak_blocks: dict[str, int] = {}  # of the requests that are compacted while they are prefilled
        self.borrowers: set[str] = set()  # requests that read another one's blocks and leave nothing behind
        self.attaching: dict[str, Prefix] = {}  # by requests that take one over if they are admitted
        self._released: set[str] = set()
        self.others: list[CompactingManager] = []

    def take_in(self, other: "CompactingManager") -> None:
        """Compact the blocks of another group with these, and keep its books."""
        self.others.append(other)
        other.compacted, other.peak_blocks, other.attaching = self.compacted, self.peak_blocks, self.attaching
        other.borrowers, other._released = self.borrowers, self._released

    @property
    def num_groups(self) -> int:
        """Groups whose blocks are compacted together."""
        return 1 + len(self.others)

    def rows(self, request_id: str) -> list[list[KVCacheBlock]]:
        """A request's rows of blocks, of each group."""
        return [manager.req_to_blocks[request_id] for manager in (self, *self.others)]

    def compact(
        self, request_id: str, begin: int, end: int, num_kept: int, in_place: bool = True
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
        """Swap a request's compacted blocks and the raw ones `[begin, end)` of its rows for new blocks.

        What is no longer needed is freed at once. That is safe because the worker runs the Job before any
        write of the step that is now being scheduled. Raw blocks keep their prefix-cache hashes until they
        are reused.

        Args:
            request_id: the request.
            begin: first raw block of its rows that is compacted.
            end: one past the last.
            num_kept: blocks of the destination, for each group.
            in_place: whether the request's own blocks may be written where the pool has too few free ones.

        Returns:
            Block ids of the previous compaction, of the raw source, group by group, and of the destination;
            or None while neither the pool nor, in place, the request's own unshared blocks can provide that.
        """
        rows = self.rows(request_id)
        previous, source = self.compacted.get(request_id, []), [b for row in rows for b in row[begin:end]]
        destination = self._take_destination(previous, source, num_kept * self.num_groups, in_place)
        if destination is None:
            return None
        for row in rows:
            row[begin:end] = [self._null_block] * (end - begin)
        reused = {block.block_id for block in destination}
        self.block_pool.free_blocks(
            block for block in (*previous, *reversed(source)) if block.block_id not in reused
        )
        self.compacted[request_id] = destination
        ids = (tuple(block.block_id for block in blocks) for blocks in (previous, source, destination))
        return next(ids), next(ids), next(ids)

    def shrink(self, request_id: str, num_kept: int) -> None:
        """Free what of a request's compacted blocks holds nothing: all but the first `num_kept` per group."""
        destination, num_kept = self.compacted[request_id], num_kept * self.num_groups
        self.block_pool.free_blocks(destination[num_kept:])
        self.compacted[request_id] = destination[:num_kept]

    def _take_destination(
        self, previous: list[KVCacheBlock], source: list[KVCacheBlock], num_kept: int, in_place: bool
    ) -> list[KVCacheBlock] | None:
        # New blocks if there are enough: nothing then has to be gathered before it is written. If not,
        # compacted blocks are the request's own, so a later compaction needs few new ones, and never waits.
        free = self.block_pool.get_num_free_blocks()
        if free < num_kept and not in_place:
            return None
        again = [block for block in previous if block.ref_cnt == 1][:num_kept] if free < num_kept else []
        num_new = min(num_kept - len(again), free)
        # A raw block that another request can read must not be written; one that only the prefix cache
        # knows may be, once its entry is gone.
        own = [block for block in source if block.ref_cnt == 1][: num_kept - len(again) - num_new]
        if len(again) + num_new + len(own) < num_kept:
            return None
        self.block_pool.evict_blocks({block.block_id for block in own})
        return again + self.block_pool.get_new_blocks(num_new) + own

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args, apply_admission_cap: bool = False, **kwargs
    ) -> int:
        # Whether a whole prompt fits is asked before it starts; one that is compacted on the way never
        # holds all of its blocks.
        if apply_admission_cap and request_id in self.peak_blocks:
            num_tokens = min(num_tokens, self.peak_blocks[request_id] * self.block_size)
        return super().get_num_blocks_to_allocate(
            request_id, num_tokens, *args, apply_admission_cap=apply_admission_cap, **kwargs
        )

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args, **kwargs
    ) -> None:
        prefix = self.attaching.get(request_id)
        if request_id not in self.borrowers and prefix is None:
            return super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)
        row = self.req_to_blocks[request_id]
        assert not row
        self.block_pool.touch([block for block in new_computed_blocks if not block.is_null])
        row.extend(new_computed_blocks)
        self.num_cached_block[request_id] = len(row)
        if prefix is not None and request_id not in self.compacted:  # of all groups together
            self.block_pool.touch(prefix.compacted)
            self.compacted[request_id] = list(prefix.compacted)

    def block_hashes(self, request: Request) -> Sequence[bytes]:
        """Of a request's full blocks, each of all tokens up to its end."""
        finer = self.block_size // self.block_pool.hash_block_size
        return request.block_hashes if finer == 1 else request.block_hashes[finer - 1 :: finer]

    def held_blocks(self, request_id: str) -> int:
        """Blocks of the pool that the request holds, of all groups: its raw blocks and its compacted ones."""
        rows = (manager.req_to_blocks.get(request_id, ()) for manager in (self, *self.others))
        raw = sum(not block.is_null for row in rows for block in row)
        return raw + len(self.compacted.get(request_id, ()))

    def may_be_cached(self, request_id: str) -> bool:
        """Whether vLLM's prefix cache may have a request's blocks, of this group and of others.

        Whatever is computed on top of compacted context is not what its hash promises.
        """
        return request_id not in self.compacted and request_id not in self.borrowers

    def release(self, request_id: str) -> None:
        """Have the workers forget what a request was compacted to and what they kept of its queries."""
        self._released.add(request_id)

    def take_released(self) -> list[str]:
        """Drain the ids of requests that were released since the last call."""
        released = sorted(self._released)
        self._released.clear()
        return released

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        if self.may_be_cached(request.request_id):
            super().cache_blocks(request, num_tokens, retention_interval, replay_boundaries=replay_boundaries)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks = super().pop_blocks_for_free(request_id)
        destination = self.compacted.pop(request_id, None)
        if destination is None:
            return blocks
        self.release(request_id)
        return destination + blocks
