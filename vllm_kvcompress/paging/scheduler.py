"""vLLM's schedulers, extended by the decision when a request is compacted."""

import time

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_kvcompress.config import KVCompressionConfig, Plan
from vllm_kvcompress.paging.job import CompressionStep, Job, Observation
from vllm_kvcompress.paging.manager import CompactingManager


class _Compression:
    """Mixed into a vLLM scheduler: before each `schedule()` it compacts the requests that are due.

    A request is due once its whole prompt is computed. Its first token is sampled before that, so
    compaction never delays it.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.compression = KVCompressionConfig.parse(self.vllm_config.additional_config["kv_compression"])
        (self.compacting_manager,) = self.kv_cache_manager.coordinator.single_type_managers
        assert isinstance(self.compacting_manager, CompactingManager)
        self._plans: dict[str, tuple[KVCompressionConfig, Plan]] = {}

    # ------------------------------------------------------------------ vLLM's scheduler, extended

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        params = request.sampling_params
        # A resumable request is a streaming session, whose prompt is never complete: it stays raw.
        if params is None or request.resumable:
            return
        config = self.compression.for_request((params.extra_args or {}).get("kv_compression"))
        plan = config.plan(request.num_prompt_tokens, self.compacting_manager.block_size)
        if plan is not None:
            self._plans[request.request_id] = config, plan

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        jobs = self._compact_due()
        while self._all_wait() and len(self.running) > 1:
            # Requests that share blocks in a full pool wait for each other. Once one of them is gone, the
            # others hold blocks of their own and are compacted before it can come back.
            victim = max(self.running, key=lambda request: (request.priority, request.arrival_time))
            self.running.remove(victim)
            self._preempt_request(victim, time.monotonic())
            jobs += self._compact_due()
        output = super().schedule(throttle_prefills)
        compacted = self.compacting_manager.compacted
        output.kv_compression = CompressionStep(
            released=self.compacting_manager.take_released(),
            # A request may have been preempted after its Job was made; its blocks are gone by now.
            jobs=[job for job in jobs if job.request_id in compacted],
            observations=self._observations(output),
        )
        return output

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        num_new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        # Whatever follows the prompt is computed on compacted context, also when a preempted request replays
        # its output or the pool has no room for the compaction yet: a request's answer must not depend on
        # how full the pool was. So no chunk runs past the prompt's end before the request is compacted.
        if self._pending(request):
            until_prompt_end = request.num_prompt_tokens - num_computed_tokens
            num_new_tokens = min(num_new_tokens, max(until_prompt_end, 0))
        return num_new_tokens

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        blocks, num_hit, shared_prefix_boundary, diverged = super()._get_local_prefix_cache_hit(request)
        if self._pending(request):
            # Queries behind a prefix hit are never computed. The hit gives way to the observation window,
            # so that what a request keeps does not depend on what happened to be cached.
            config, _ = self._plans[request.request_id]
            block_size = self.compacting_manager.block_size
            limit = (request.num_prompt_tokens - config.observed_window) // block_size * block_size
            if num_hit > limit:
                num_hit = limit
                kept = blocks.blocks[0][: limit // block_size]
                blocks = self.kv_cache_manager.create_kv_cache_blocks((list(kept),))
        return blocks, num_hit, shared_prefix_boundary, diverged

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        self._plans.pop(request.request_id, None)

    # ------------------------------------------------------------------ compaction

    def _pending(self, request: Request) -> bool:
        request_id = request.request_id
        return request_id in self._plans and request_id not in self.compacting_manager.compacted

    def _due(self, request: Request) -> bool:
        return self._pending(request) and request.num_computed_tokens >= request.num_prompt_tokens

    def _compact_due(self) -> list[Job]:
        return [
            job
            for request in self.running
            if self._due(request) and (job := self._compact(request)) is not None
        ]

    def _all_wait(self) -> bool:
        """Whether requests run, but each of them waits for blocks to be compacted into."""
        return bool(self.running) and all(self._due(request) for request in self.running)

    def _compact(self, request: Request) -> Job | None:
        manager = self.compacting_manager
        config, plan = self._plans[request.request_id]
        num_prompt_blocks = -(-request.num_prompt_tokens // manager.block_size)
        row = manager.req_to_blocks[request.request_id]
        tail = tuple(block.block_id for block in row[plan.source_blocks : num_prompt_blocks])
        swapped = manager.compact(request.request_id, plan.source_blocks, plan.kept_blocks)
        if swapped is None:  # it waits, and is tried again at the next step
            return None
        source, destination = swapped
        return Job(
            request_id=request.request_id,
            config=config,
            num_prompt_tokens=request.num_prompt_tokens,
            boundary=plan.boundary,
            source=source,
            tail=tail,
            destination=destination,
        )

    def _observations(self, output: SchedulerOutput) -> list[Observation]:
        started = [new.req_id for new in output.scheduled_new_reqs]
        started += output.scheduled_cached_reqs.resumed_req_ids
        return [
            Observation(request_id, self.requests[request_id].num_prompt_tokens, window)
            for request_id in started
            if request_id in self._plans and (window := self._plans[request_id][0].observed_window)
        ]


class CompressionScheduler(_Compression, Scheduler):
    """Synchronous scheduling."""


class AsyncCompressionScheduler(_Compression, AsyncScheduler):
    """Asynchronous scheduling: steps in flight run before the step whose Jobs free their blocks."""
