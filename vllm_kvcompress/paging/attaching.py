"""Requests that go on from a compacted prefix."""

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.paging.manager import CompactingManager
from vllm_kvcompress.paging.prefixes import Prefix, Prefixes
from vllm_kvcompress.paging.tracked import Tracked, TrackedRequests
from vllm_kvcompress.plan import next_point


class Attaching:
    """Finds a request's compacted prefix, and drops one for who finds too few blocks.

    Attributes:
        configs: options of the requests that may attach to a prefix, or leave one.
        users: what requests attached to, until they end.
    """

    def __init__(
        self, scheduler: Scheduler, manager: CompactingManager, tracked: TrackedRequests, prefixes: Prefixes
    ) -> None:
        self._scheduler, self._manager, self._tracked = scheduler, manager, tracked
        self._prefixes = prefixes
        self.configs: dict[str, KVCompressionConfig] = {}
        self.users: dict[str, Prefix] = {}
        self._attached: dict[str, str] = {}  # prefixes, by the request that attached to it in this step

    def hit(self, request: Request, num_hit: int) -> tuple[tuple[list[KVCacheBlock], ...], int] | None:
        """The rows of a request that takes a compacted prefix over, one of each group, and their tokens; None
        if what vLLM has of it is as long.

        Args:
            request: one that is about to be admitted.
            num_hit: tokens that vLLM's prefix cache has of it.
        """
        manager, name = self._manager, request.request_id
        manager.attaching.pop(name, None)
        config = self.configs.get(name)
        if config is None or not self._prefixes or request.skip_reading_prefix_cache:
            return None
        most = request.num_tokens - (2 if self._scheduler.num_spec_tokens else 1)
        if name in self._tracked and _goes_on_compacted(config):
            # As with a hit of vLLM's: the window is to be observed.
            most = min(most, request.num_prompt_tokens - max(config.observed_window, 1))
        most = max(most, 0) // manager.block_size
        found = self._prefixes.find(manager.block_hashes(request), config.content, most)
        if found is None or found[1] * manager.block_size <= num_hit:
            return None
        prefix, end = found
        manager.attaching[name] = prefix
        return self._rows(prefix, end), end * manager.block_size

    def _rows(self, prefix: Prefix, end: int) -> tuple[list[KVCacheBlock], ...]:
        """Of each group the row of a request that takes over so many blocks."""
        own, num_compacted = self._manager, prefix.plan.source_blocks
        tails, beside, null, rows = iter(prefix.tails), iter(prefix.beside), own._null_block, []
        for manager in self._scheduler.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, CompactingManager):
                rows.append([null] * num_compacted + list(next(tails)[: end - num_compacted]))
            else:
                seen = next(beside)
                num_blocks = end * own.block_size // manager.block_size
                rows.append([null] * (num_blocks - len(seen)) + list(seen))
        return tuple(rows)

    def attach(self, request: Request, hit: KVCacheBlocks) -> int:
        """Note that a request that has just been admitted goes on from a compacted prefix; its tokens."""
        name, config = request.request_id, self.configs[request.request_id]
        prefix = self._manager.attaching.pop(name)
        num_tokens = len(hit.blocks[self._manager.kv_cache_group_id]) * self._manager.block_size
        self._prefixes.use(prefix)
        self.users[name] = prefix
        self._attached[name] = prefix.id
        tracked = self._tracked.setdefault(name, Tracked(config, None, is_due_ever=False))
        tracked.held, tracked.prefix, tracked.prefix_tokens = prefix.plan, prefix, num_tokens
        if config.when == "pressure":
            steps = enumerate(config.ladder_steps)
            tracked.step = next(n for n, step in steps if (step or 0.0) <= (prefix.kept or 0.0))
        tracked.point = self.point_behind(request, num_tokens)
        return num_tokens

    def point_behind(self, request: Request, num_tokens: int) -> int | None:
        """The first compaction point of a request that goes on from so many tokens of a compacted prefix."""
        config, tracked = self.configs[request.request_id], self._tracked.get(request.request_id)
        point = None if tracked is None or not _goes_on_compacted(config) else tracked.point
        while point is not None and point < num_tokens + max(config.observed_window, 1):
            point = next_point(config, request.num_prompt_tokens, point)
        return point

    def only_reads(self, request_id: str) -> bool:
        """Whether a request has attached to a prefix and is never compacted itself."""
        return request_id in self.users and not _goes_on_compacted(self.configs[request_id])

    def detach(self, request: Request) -> None:
        """Note that a request holds nothing any more."""
        name = request.request_id
        if (prefix := self.users.pop(name, None)) is None:
            return
        prefix.users -= 1
        if name in self._tracked and not self._tracked[name].is_due_ever:
            del self._tracked[name]

    def drop_for(self, asking: Request, lacking: int, only: bool) -> bool:
        """Drop a prefix that nobody holds for a request that found too few blocks; False if there is none.

        Args:
            asking: the request.
            lacking: blocks that it lacks.
            only: whether nothing else can give. Then for one that waits behind others none goes if all of
                them together would not admit it.
        """
        manager = self._manager
        own, running = manager.attaching.get(asking.request_id), self._scheduler.running
        spared = () if own is None else (own,)
        waits = asking.status != RequestStatus.RUNNING and running
        if waits and only and self._prefixes.idle_blocks(spared) < lacking:
            return False
        if self._prefixes.make_room(spared):
            return True
        if own is not None and not running and own.name is None and not own.users:
            # With it alone there is no room: at the next step it is done without.
            del manager.attaching[asking.request_id]
            self._prefixes.drop(own)
        return False

    def take_attached(self) -> dict[str, str]:
        """Drain the prefixes, by the request that has attached to it since the last call."""
        attached, self._attached = self._attached, {}
        return attached


def _goes_on_compacted(config: KVCompressionConfig) -> bool:
    """Whether what goes on from a compacted prefix may be compacted with it: if neither all queries nor all
    of the context are asked for, and how much is kept is known before."""
    return not (config.observes_all or config.repeats or config.threshold is not None)
