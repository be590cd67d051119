"""What it takes to compact a request: a Job, blocks to compact into, and a place among the step's others."""

from collections.abc import Sequence
from dataclasses import replace

from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheGroupSpec
from vllm.v1.request import Request

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.paging.job import Job
from vllm_kvcompress.paging.manager import CompactingManager
from vllm_kvcompress.paging.prefixes import Prefixes
from vllm_kvcompress.paging.tracked import Tracked
from vllm_kvcompress.plan import STAGED_BYTES, Plan, page_tokens


class Compactions:
    """Compacts requests of one pool, those that are due and those that give under pressure.

    Attributes:
        block_bytes: of a block of the compacted layers, on each worker.
    """

    def __init__(
        self,
        groups: Sequence[KVCacheGroupSpec],
        manager: CompactingManager,
        prefixes: Prefixes,
        most_read: int,
    ) -> None:
        """
        Args:
            groups: the layers that are compacted.
            manager: of their blocks.
            prefixes: which go where there is no room to compact into.
            most_read: tokens that the compactions of a step may read, unless it is one alone.
        """
        self._spec = groups[0].kv_cache_spec
        self.block_bytes = self._spec.page_size_bytes * max(len(group.layer_names) for group in groups)
        self._manager, self._prefixes, self._most_read = manager, prefixes, most_read
        self._read = 0  # tokens, in this step

    def begin_step(self) -> None:
        """Nothing is read yet."""
        self._read = 0

    def bears(self, num_tokens: int) -> bool:
        """Whether a compaction that reads so many tokens may be one of this step's."""
        return not self._read or self._read + num_tokens <= self._most_read

    def count(self, num_tokens: int) -> None:
        """Note what one reads."""
        self._read += num_tokens

    def page_tokens(self, config: KVCompressionConfig) -> int | None:
        """Tokens of a head that a block of this cache holds once they are encoded; None without a format."""
        spec = self._spec
        shape = spec.tokens_of_page, spec.head_size, spec.dtype.itemsize
        return page_tokens(config, spec.block_size, *shape)

    def kept_blocks(self, plan: Plan) -> int:
        """Blocks of the pool that a request is compacted into: those of the plan, for each group."""
        return plan.kept_blocks * self._manager.num_groups

    def in_place(self, plan: Plan) -> bool:
        """Whether a compaction may write blocks that it reads."""
        return current_platform.is_cpu() or self.kept_blocks(plan) * self.block_bytes <= STAGED_BYTES

    def job(self, request: Request, tracked: Tracked, point: int, plan: Plan) -> Job:
        """What compacting a request is, without the blocks that it is compacted into."""
        manager, held = self._manager, tracked.held
        begin = held.source_blocks if held else 0
        rows = [[block.block_id for block in row] for row in manager.rows(request.request_id)]
        source, *sources = (tuple(row[begin : plan.source_blocks]) for row in rows)
        tail, *tails = (tuple(row[plan.source_blocks : -(-point // manager.block_size)]) for row in rows)
        return Job(
            request_id=request.request_id,
            config=tracked.config,
            num_tokens=point,
            boundary=plan.boundary,
            previous_boundary=held.boundary if held else 0,
            previous=(),
            source=source,
            tail=tail,
            destination=(),
            other_sources=tuple(sources),
            other_tails=tuple(tails),
        )

    def swapped(self, job: Job, tracked: Tracked, plan: Plan) -> Job | None:
        """Swap a Job's blocks for new ones; None if there is no room."""
        begin, end = job.previous_boundary, job.boundary
        block_size = self._manager.block_size
        asked = job.request_id, begin // block_size, end // block_size, plan.kept_blocks, self.in_place(plan)
        while (swapped := self._manager.compact(*asked)) is None:
            if not self._prefixes.make_room():
                return None
        previous, _, destination = swapped
        tracked.held, tracked.prefix = plan, None
        return replace(job, previous=previous, destination=destination)
