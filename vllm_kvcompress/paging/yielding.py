"""Requests that are compacted where blocks run short (`when="pressure"`)."""

from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.log import logger
from vllm_kvcompress.paging.compactions import Compactions
from vllm_kvcompress.paging.job import Job
from vllm_kvcompress.paging.manager import CompactingManager
from vllm_kvcompress.paging.prefixes import Prefixes
from vllm_kvcompress.paging.pressure import Descent, descents, least_loss
from vllm_kvcompress.paging.tracked import Tracked, TrackedRequests
from vllm_kvcompress.plan import tokens_read

EARLY = 8  # no more than this part of the pool is kept free to compact into


class Yielding:
    """Compacts them.

    Under pressure nobody is due. Where vLLM finds too few blocks to admit a request or to go on with one,
    requests are compacted, one by one, until there are enough, before anybody is preempted; for one that
    waits only if there can be enough. No compaction frees less than `min_freed_tokens`, and no request gets
    back what it gave: so a server between two loads does not compact and refill.

    Attributes:
        names: of the requests.
        given: their Jobs of this step.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        manager: CompactingManager,
        tracked: TrackedRequests,
        prefixes: Prefixes,
        compactions: Compactions,
    ) -> None:
        self._scheduler, self._manager, self._tracked = scheduler, manager, tracked
        self._prefixes, self._compactions = prefixes, compactions
        self.names: set[str] = set()
        self.given: list[Job] = []
        self._has_run: set[str] = set()  # requests that were running before this step

    def begin_step(self) -> None:
        """To be called before anything of a step is scheduled."""
        self.given = []
        self._has_run = {request.request_id for request in self._scheduler.running} if self.names else set()
        if self.names:
            self._keep_room()

    def make_room(self, asking: Request, lacking: int, hit: KVCacheBlocks | None) -> bool:
        """Compact requests for one that found too few blocks; False if that is of no use.

        Args:
            asking: the request that is about to be admitted or to go on.
            lacking: blocks that it lacks.
            hit: the cached blocks that it is about to take over, which nobody holds yet.
        """
        if not self.names:
            return False
        pool = self._manager.block_pool
        awaited = [block for row in (hit.blocks if hit else ()) for block in row if not block.is_null]
        pool.touch(awaited)  # or they might be compacted into
        num_given = len(self.given)
        self._give(self._givers(), lacking, bounded=asking.status != RequestStatus.RUNNING)
        pool.free_blocks(reversed(awaited))
        return len(self.given) > num_given

    def _keep_room(self) -> None:
        """Compact while there are still blocks to compact into, where a large request needs them.

        On a GPU no more than `STAGED_BYTES` are rewritten in place, and when the last block is taken a larger
        request could give nothing.
        """
        pool, growth = self._manager.block_pool, len(self._scheduler.running)
        free = pool.get_num_free_blocks() + self._prefixes.idle_blocks()
        if current_platform.is_cpu() or free > pool.num_gpu_blocks // EARLY:
            return
        givers = self._givers()
        ends = [found[-1].plan for _, found in givers]
        large = [self._compactions.kept_blocks(plan) for plan in ends if not self._compactions.in_place(plan)]
        if large and free - growth < min(large):
            self._give(givers, growth)

    def _give(
        self, givers: list[tuple[KVCompressionConfig, list[Descent]]], lacking: int, bounded: bool = False
    ) -> None:
        """Compact requests until so many blocks are free, if there can be; those that would exceed the bound
        of a step in one of the next."""
        block_size, num_groups = self._manager.block_size, self._manager.num_groups
        for descent in least_loss(givers, -(-lacking // num_groups), block_size):
            tracked = self._tracked[descent.request.request_id]
            reads = tokens_read(descent.point, block_size, tracked.held)
            if bounded and not self._compactions.bears(reads):
                return
            if self.descend(descent, tracked):
                self._compactions.count(reads)

    def _givers(self) -> list[tuple[KVCompressionConfig, list[Descent]]]:
        """Options of the requests that may be compacted in this step, and what each could give."""
        given = {job.request_id for job in self.given}
        names = (self.names & self._has_run) - given
        requests = [request for request in self._scheduler.running if request.request_id in names]
        return [(self._tracked[r.request_id].config, found) for r in requests if (found := self._descents(r))]

    def _descents(self, request: Request) -> list[Descent]:
        """What a request could give, each more than the one before."""
        tracked, point = self._tracked[request.request_id], self._tracked.computed(request)
        if point - tracked.observed_from < tracked.config.observed_window:
            return []
        longest = self._scheduler.max_model_len
        if point >= min(request.num_prompt_tokens + request.max_tokens, longest) - 1:
            return []  # it ends with the step in flight
        if request.is_prefill_chunk and _wants_prompt_logprobs(request.sampling_params):
            return []  # they are of raw context
        in_page, block_size = self._compactions.page_tokens(tracked.config), self._manager.block_size
        shared = tracked.prefix is not None
        every = descents(
            request, tracked.config, point, tracked.step, tracked.held, block_size, in_page, shared
        )
        compactions, free = self._compactions, self._manager.block_pool.get_num_free_blocks()
        return [
            each
            for each in every
            if compactions.in_place(each.plan) or compactions.kept_blocks(each.plan) <= free
        ]

    def descend(self, descent: Descent, tracked: Tracked) -> bool:
        """Compact a request down to a step of its ladder, if that frees what it should."""
        request, plan, manager = descent.request, descent.plan, self._manager
        job = self._compactions.job(request, tracked, descent.point, plan)
        row = manager.req_to_blocks[request.request_id]
        begin = job.previous_boundary // manager.block_size
        held = manager.compacted.get(request.request_id, ())
        shared = sum(block.ref_cnt > 1 for block in row[begin : plan.source_blocks])
        if tracked.prefix is None:  # else they are not counted
            shared += sum(block.ref_cnt > 1 for block in held)
        if (descent.freed - shared) * manager.block_size < tracked.config.min_freed_tokens:
            return False
        swapped = self._compactions.swapped(job, tracked, plan)
        if swapped is None:
            return False
        self._withdraw(request, descent.point)
        tracked.step = descent.step
        self.given.append(swapped)
        logger.debug(
            "kv-compression: under pressure %s was compacted at %d tokens to %d blocks below %d",
            request.request_id,
            descent.point,
            plan.kept_blocks,
            plan.boundary,
        )
        return True

    def _withdraw(self, request: Request, point: int) -> None:
        """Take back from the prefix cache what a request computes from a token on in this step.

        vLLM offers blocks when it schedules them. Once the request is compacted they will not be what their
        hash promises. Nobody has taken them over, for who had would share all before them, too.
        """
        managers = self._scheduler.kv_cache_manager.coordinator.single_type_managers
        rows = (
            manager.req_to_blocks[request.request_id][point // manager.block_size :] for manager in managers
        )
        offered = [block for row in rows for block in row if block.block_hash is not None]
        assert all(block.ref_cnt == 1 for block in offered)
        self._manager.block_pool.evict_blocks({block.block_id for block in offered})


def _wants_prompt_logprobs(params: SamplingParams | None) -> bool:
    return params is not None and not (params.prompt_logprobs is params.prompt_logprob_token_ids is None)
