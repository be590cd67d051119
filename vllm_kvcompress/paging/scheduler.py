"""vLLM's schedulers, extended by the decision when a request is compacted."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.paging.job import (
    CompressionReport,
    CompressionStep,
    Job,
    Loaded,
    Observation,
    Repetition,
    Solve,
)
from vllm_kvcompress.paging.manager import CompactingManager
from vllm_kvcompress.paging.prefixes import Prefix, Prefixes
from vllm_kvcompress.paging.pressure import Descent, descents, least_loss
from vllm_kvcompress.paging.repetition import Repetitions
from vllm_kvcompress.paging.solving import Solving
from vllm_kvcompress.paging.spec import compactable_group
from vllm_kvcompress.paging.statistics import (
    CARRIER,
    MOST_REQUESTS,
    TAKEN,
    CompressionStats,
    EngineState,
    PrefixState,
    RequestState,
    blocks_of,
    shown_id,
)
from vllm_kvcompress.plan import (
    STAGED_BYTES,
    Plan,
    is_ever_compacted,
    next_point,
    page_tokens,
    peak_blocks,
    ring_budget,
    ring_tokens,
    tokens_read,
)

EARLY = 8  # under pressure no more than this part of the pool is kept free to compact into

logger = init_logger("vllm.kv_compression")  # under the name whose messages vLLM shows


@dataclass
class _Tracked:
    """Where a request stands.

    Attributes:
        config: its own resolved options.
        point: computed tokens at which it is compacted next; None if it is not again.
        held: its last compaction.
        late: whether it goes on raw, past its point, until it can be compacted.
        due_since: number of the step in which it was found due; None while it is not.
        uncounted: its last Job, if that has a threshold and how much it keeps is not known yet.
        solved: shares of its next Job that are solved.
        step: of its ladder, the step that it was compacted at last; 0 before.
        prefix: the compacted prefix that it goes on from, until it is compacted itself.
        prefix_tokens: of one, that it did not compute.
        is_due_ever: whether it would be compacted without that.
        observed_from: computed tokens when it last started, whose queries nobody has seen.
    """

    config: KVCompressionConfig
    point: int | None
    held: Plan | None = None
    late: bool = False
    due_since: int | None = None
    uncounted: Job | None = None
    solved: int = 0
    step: int = 0
    prefix: Prefix | None = None
    prefix_tokens: int = 0
    is_due_ever: bool = True
    observed_from: int = 0

    @property
    def steps_down(self) -> int:
        """Steps of its ladder that it has come down; 0 while it is raw."""
        return 0 if self.held is None else self.step + 1


class _Compression:
    """Mixed into a vLLM scheduler: before each `schedule()` it compacts the requests that are due.

    A request is due once the tokens up to its next compaction point are computed: first the whole prompt
    (its first token is sampled before that, so compaction never delays it), or a part of it when streaming.

    Compression is never worse than none: while there is no room for its compacted pages, a due request goes
    on raw. Once there is, it keeps what it would have kept at its point.

    Nor does a burst of prompts stall those who decode: the compactions of a step read no more than
    `max_compaction_tokens`, unless it is one alone. Who has been due for longest comes first. The others go
    on raw, too, or wait if their prompts are still being computed: a whole chunk on top of what should be
    compacted would take more blocks than a streaming prompt was admitted for.

    On a GPU no more than `STAGED_BYTES` are rewritten in place. A larger request is due until enough blocks
    are free, which those who wait to be admitted leave to it. It goes on raw meanwhile, or waits while its
    prompt is being computed, but only for as long as somebody else moves on: else it, too, goes on, until
    vLLM preempts somebody. One that is alone has room: for all its raw blocks, or for a peak that counts
    compacted pages twice.

    Under pressure nobody is due. Where vLLM finds too few blocks to admit a request or to go on with one,
    requests are compacted, one by one, until there are enough, before anybody is preempted; for one that
    waits only if there can be enough. No compaction frees less than `min_freed_tokens`, and no request gets
    back what it gave: so a server between two loads does not compact and refill.

    How much a threshold keeps is known only where the scores are. Such a Job is given as many blocks as its
    budget allows; with the step's output comes the number that it filled, and the others are freed. Until
    then the request waits if it is due again: what it keeps must not depend on when the answer comes.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.compression = KVCompressionConfig.parse(self.vllm_config.additional_config["kv_compression"])
        index, coordinator = compactable_group(self.kv_cache_config), self.kv_cache_manager.coordinator
        self.compacting_manager = coordinator.single_type_managers[index]
        assert isinstance(self.compacting_manager, CompactingManager)
        self._group = index
        self._is_hybrid = len(coordinator.single_type_managers) > 1
        self._shares_contexts = not self.has_mamba_layers
        if self._is_hybrid:
            coordinator.cache_blocks = self._unless_compacted(coordinator.cache_blocks)
        self._tracked: dict[str, _Tracked] = {}
        self._yielding: set[str] = set()  # requests that are compacted under pressure
        self._has_run: set[str] = set()  # those that were running before this step
        self._given: list[Job] = []  # by them, in this step
        self._asked = 0  # blocks, last
        self._stats = CompressionStats()
        coordinator.get_num_blocks_to_allocate = self._noting_blocks(coordinator.get_num_blocks_to_allocate)
        self.kv_cache_manager.allocate_slots = self._or_compact(self.kv_cache_manager.allocate_slots)
        self._prefixes = Prefixes(self.kv_cache_manager.block_pool, self.compression.prefix_share)
        self._configs: dict[str, KVCompressionConfig] = {}  # of requests that may attach to a prefix
        self._kept: dict[str, str] = {}  # requests, by the prefix that each leaves behind
        self._attached: dict[str, str] = {}  # prefixes, by the request that attached to it in this step
        self._loaded: list[Loaded] = []
        self._users: dict[str, Prefix] = {}  # what requests attached to, until they end
        self._repetitions = Repetitions(self.vllm_config)
        self._solving = Solving(self.vllm_config)
        self._abandoned: list[str] = []  # repeating requests to be ended
        most = self.compression.max_compaction_tokens
        self._most_read = most or self.scheduler_config.max_num_batched_tokens
        self._read = 0  # tokens, by the compactions of this step
        # Blocks that due requests will be compacted into, whose turn has not come or that wait for free ones.
        self._deferred: dict[str, int] = {}
        self._watermark_blocks = self.kv_cache_manager.watermark_blocks
        group = self.kv_cache_config.kv_cache_groups[index]
        self._spec = group.kv_cache_spec
        self._block_bytes = self._spec.page_size_bytes * len(group.layer_names)
        self._ring_tokens = 0
        self._ring_awaited = False  # in this step somebody was refused one
        self._ring_budget = self._memory_for_rings()

    def _unless_compacted(self, cache_blocks: Callable[[Request, int], None]) -> Callable[..., None]:
        """What offers blocks of all groups to the prefix cache: those of windows, too, may have been computed
        on top of compacted context."""
        manager = self.compacting_manager

        def cached(request: Request, num_computed_tokens: int) -> None:
            if manager.may_be_cached(request.request_id):
                cache_blocks(request, num_computed_tokens)

        return cached

    def _noting_blocks(self, get_num_blocks_to_allocate: Callable[..., int]) -> Callable[..., int]:
        """vLLM's count of the blocks that a request takes; it tells nobody how many it lacks."""

        def counted(*args, **kwargs) -> int:
            self._asked = get_num_blocks_to_allocate(*args, **kwargs)
            return self._asked

        return counted

    def _or_compact(
        self, allocate_slots: Callable[..., KVCacheBlocks | None]
    ) -> Callable[..., KVCacheBlocks | None]:
        """vLLM's allocation. Before it fails prefixes go, and under pressure requests are compacted."""

        def allocated(request: Request, *args, **kwargs) -> KVCacheBlocks | None:
            while True:
                blocks = allocate_slots(request, *args, **kwargs)
                if blocks is not None:
                    if request.request_id in self.compacting_manager.attaching:
                        self._attach(request, kwargs["new_computed_blocks"])
                    return blocks
                if self._drop_prefix(request):
                    continue
                if not self._yielding or not self._make_room(request, kwargs.get("new_computed_blocks")):
                    return None

        return allocated

    def _memory_for_rings(self) -> float:
        """Queries for which the workers have set memory aside; host memory is not counted."""
        if current_platform.is_cpu():
            return math.inf
        model, parallel = self.vllm_config.model_config, self.vllm_config.parallel_config
        group = model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
        left = self.kv_cache_config.num_blocks * self.compacting_manager.block_size
        left = left * self._spec.dtype.itemsize // model.dtype.itemsize
        # What is left is seven eighths of the memory, or more.
        return ring_budget(self.compression, self.max_num_running_reqs, left * 8 // 7, group)

    # ------------------------------------------------------------------ vLLM's scheduler, extended

    def add_request(self, request: Request) -> None:
        # A resumable request is a streaming session, whose prompt is never complete: it stays raw, up to its
        # last part, which is not resumable.
        session = request.resumable or request.request_id in self.requests
        params = request.sampling_params
        config = None
        if params is not None and not session:
            config = self.compression.for_request((params.extra_args or {}).get("kv_compression"))
        super().add_request(request)
        if config is not None:
            self._track(request, config)
            if config.enabled and not self._is_hybrid:
                self._configs[request.request_id] = config

    def _track(self, request: Request, config: KVCompressionConfig) -> None:
        """Remember a request that will be compacted."""
        block_size, num_prompt = self.compacting_manager.block_size, request.num_prompt_tokens
        num_tokens = min(num_prompt + request.max_tokens, self.max_model_len)
        in_page = self._page_tokens(config)
        if not is_ever_compacted(config, num_prompt, num_tokens, block_size, in_page):
            return
        if self.num_spec_tokens and num_prompt == 1:  # vLLM pads its first step with drafts
            return
        if config.interval is None and self._ends_unsolved(request, config, num_prompt):
            return
        self._tracked[request.request_id] = _Tracked(config, next_point(config, num_prompt))
        if config.when == "pressure":
            self._yielding.add(request.request_id)
        if config.when == "streaming":
            beside = not current_platform.is_cpu()
            peak = peak_blocks(config, num_prompt, num_tokens, block_size, beside, in_page)
            self.compacting_manager.peak_blocks[request.request_id] = peak

    def _page_tokens(self, config: KVCompressionConfig) -> int | None:
        """Tokens of a head that a block of this cache holds once they are encoded; None without a format."""
        spec = self._spec
        shape = spec.tokens_of_page, spec.head_size, spec.dtype.itemsize
        return page_tokens(config, spec.block_size, *shape)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        solved_for = [self._is_solved_for(request) for request in self.running if self._decodes(request)]
        self._solving.begin_step(solved_for.count(False), solved_for.count(True))
        unsolved = self._give_up()
        jobs, late = self._compact_due()
        self._end_abandoned()
        self._ring_tokens, self._ring_awaited = self._rings(), False
        decoding = sum(self._decodes(request) for request in self.running)
        left = self.max_num_scheduled_tokens - decoding * (1 + self.num_spec_tokens)
        self._repetitions.begin_step(decoding, max(left, 0))
        self._given = []
        self._has_run = {request.request_id for request in self.running} if self._yielding else set()
        if self._yielding:
            self._keep_room()
        output = super().schedule(throttle_prefills)
        jobs += self._given
        compacted = self.compacting_manager.compacted
        started = [new.req_id for new in output.scheduled_new_reqs]
        started += output.scheduled_cached_reqs.resumed_req_ids
        for name in self._yielding.intersection(started):
            self._tracked[name].observed_from = self._first_observed(name, output)
        released = self.compacting_manager.take_released()
        # A request may have been preempted after its Job was made, or its share was given out; its blocks are
        # gone by now.
        jobs = [job for job in jobs if job.request_id in compacted]
        self._stats.count(jobs)
        kept, attached, loaded = self._kept, self._attached, self._loaded
        self._kept, self._attached, self._loaded = {}, {}, []
        output.kv_compression = CompressionStep(
            kept=kept,
            released=released,
            loaded=loaded,
            attached=attached,
            dropped=self._prefixes.take_dropped(),
            solves=self._solving.take(released),
            jobs=jobs,
            late=[name for name in (*unsolved, *late) if (own := self._tracked.get(name)) and own.late],
            unsolved=[name for name in unsolved if name not in released],
            observations=self._observations(started),
            repetitions=self._repetitions.announced(started),
        )
        return output

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        num_new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        # Whatever follows a compaction point is computed on compacted context, also when a preempted request
        # replays its output. So no chunk runs past the point before the request is compacted, unless there is
        # no room for that.
        tracked = self._tracked.get(request.request_id)
        point = None if tracked is None or tracked.late else tracked.point
        if request.request_id in self.compacting_manager.attaching:
            point = self._point_behind(request, num_computed_tokens)
        if point is not None:
            num_new_tokens = min(num_new_tokens, max(point - num_computed_tokens, 0))
        if tracked is not None and request.status != RequestStatus.RUNNING and not self._start_ring(tracked):
            return 0  # it goes on waiting
        num_new_tokens = self._repetitions.bounded(request.request_id, num_new_tokens)
        if num_new_tokens:
            self._repetitions.take_turn(request.request_id)
        return num_new_tokens

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        # vLLM looks past who is not ready, but 0.32 not past who gets no tokens.
        ready = self._repetitions.bounded(request.request_id, 1) > 0
        return ready and super()._handle_blocked_waiting_request(request)

    def _decodes(self, request: Request) -> bool:
        """Whether a running request goes on with its output; a repetition has none that anybody waits for."""
        tracked = self._tracked.get(request.request_id)
        waits = tracked is not None and not tracked.late and self._due(request)
        return not (waits or request.is_prefill_chunk or self._repetitions.of(request.request_id) is not None)

    def _start_ring(self, tracked: _Tracked) -> bool:
        """Count in the query ring of a request that is about to start, if there is memory for it."""
        needed = ring_tokens(tracked.config)
        # Nobody who needs a ring overtakes one that waits for one. Who needs none may go on, where vLLM looks
        # past a request that cannot start (0.33; in 0.32 all behind it wait): it takes nothing of rings away.
        if needed and self._ring_tokens and self._ring_tokens + needed > self._ring_budget:
            self._ring_awaited = True
        if needed and self._ring_awaited:
            return False
        self._ring_tokens += needed
        return True

    def _rings(self) -> int:
        """Queries kept of the running requests."""
        running = (self._tracked.get(request.request_id) for request in self.running)
        return sum(
            ring_tokens(tracked.config)
            for tracked in running
            if tracked is not None and (tracked.held is None or tracked.config.compacts_again)
        )

    def _get_local_prefix_cache_hit(
        self, request: Request, *args, **kwargs
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        manager = self.compacting_manager
        if (repetition := self._repetitions.of(request.request_id)) is not None:
            return *self._shared_with(repetition), 0, False
        blocks, num_hit, shared_prefix_boundary, diverged = super()._get_local_prefix_cache_hit(
            request, *args, **kwargs
        )
        tracked = self._tracked.get(request.request_id)
        if tracked is not None and tracked.point is not None:
            # Queries behind a prefix hit are never computed. The hit gives way to the observation window,
            # so that what a request keeps does not depend on what happened to be cached. At least one token
            # is left to compute: only a running request can be compacted.
            # Of fewer than two tokens vLLM makes a step of drafts, which may not run past the point.
            uncached = max(tracked.config.observed_window, 2 if self.num_spec_tokens else 1)
            limit = max(tracked.point - uncached, 0) // manager.block_size * manager.block_size
            if tracked.config.observes_all:
                limit = 0
            if limit and self._is_hybrid:
                # Of windows vLLM caches the blocks before the end of a prompt and before this boundary
                # alone. Where the observation window begins the same prompt will go on.
                shared_prefix_boundary = min(shared_prefix_boundary or limit, limit)
            if num_hit > limit:
                blocks, num_hit = self._shorter_hit(request, blocks, limit)
        if (row := self._compacted_hit(request, num_hit)) is not None:
            num_hit = len(row) * manager.block_size
            blocks = self.kv_cache_manager.create_kv_cache_blocks((row,))
        return blocks, num_hit, shared_prefix_boundary, diverged

    def _shared_with(self, repetition: Repetition) -> tuple[KVCacheBlocks, int]:
        """The blocks of its context that a repetition reads, of every group, and their tokens.

        An owner that went on raw has given back what its windows would have to hold for it; the context is
        then computed again. States have always gone on to the end of what was computed: where there are any,
        the context is computed again from the last state that the prefix cache has of it.
        """
        if not self._shares_contexts:
            hashes = self.requests[repetition.owner_id].block_hashes
            coordinator = self.kv_cache_manager.coordinator
            blocks, num_tokens, _ = coordinator.find_longest_cache_hit(hashes, repetition.num_context)
            return self.kv_cache_manager.create_kv_cache_blocks(blocks), num_tokens
        managers = self.kv_cache_manager.coordinator.single_type_managers
        rows = [manager.req_to_blocks.get(repetition.owner_id, []) for manager in managers]
        sizes = [manager.block_size for manager in managers]
        held = (len(row) * size for row, size in zip(rows, sizes, strict=True))
        alignment = math.lcm(*sizes)
        num_tokens = min(repetition.num_context, *held) // alignment * alignment
        shared = tuple(row[: num_tokens // size] for row, size in zip(rows, sizes, strict=True))
        for manager, row in zip(managers, shared, strict=True):
            seen = row[manager.get_num_skipped_tokens(num_tokens) // manager.block_size :]
            # Windows take blocks over from the prefix cache alone.
            if any(block.is_null for block in seen) or (self._is_hybrid and not manager.enable_caching):
                return self.kv_cache_manager.empty_kv_cache_blocks, 0
        return self.kv_cache_manager.create_kv_cache_blocks(shared), num_tokens

    def _shorter_hit(self, request: Request, blocks: KVCacheBlocks, limit: int) -> tuple[KVCacheBlocks, int]:
        """The cached prefix of no more than `limit` tokens, a multiple of the block size, in a longer one."""
        found: Sequence[list[KVCacheBlock]] = (
            list(blocks.blocks[0][: limit // self.compacting_manager.block_size]),
        )
        if self._is_hybrid:  # a shorter one has other blocks of windows, which may not be cached
            coordinator = self.kv_cache_manager.coordinator
            found, limit, _ = coordinator.find_longest_cache_hit(request.block_hashes, limit)
        return self.kv_cache_manager.create_kv_cache_blocks(found), limit

    def _holds_kv_blocks(self, request: Request) -> bool:
        # vLLM admits holders of blocks before anybody else, because nobody behind whom they waited might ever
        # get blocks. The same holds for a repetition: its owner holds blocks until it is done.
        return self._repetitions.of(request.request_id) is not None or super()._holds_kv_blocks(request)

    def _preempt_request(self, request: Request, *args, **kwargs) -> None:
        super()._preempt_request(request, *args, **kwargs)
        if self._repetitions.of(request.request_id) is not None:
            self.waiting.remove_request(request)
            self.kv_holding_waiting.prepend_request(request)
        self._detach(request)
        tracked = self._tracked.get(request.request_id)
        if tracked is not None:  # it starts again from nothing
            tracked.point = next_point(tracked.config, request.num_prompt_tokens)
            tracked.held, tracked.late, tracked.due_since, tracked.uncounted = None, False, None, None
            tracked.solved, tracked.step, tracked.prefix, tracked.prefix_tokens = 0, 0, None, 0
            self._solving.release(request.request_id)
            self.compacting_manager.release(request.request_id)  # what is kept of its queries, too
            # vLLM preempts while it schedules, when the repetition may be in the batch already: it is ended
            # before the next one.
            self._abandoned += self._repetitions.abandon(request.request_id)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        report: CompressionReport | None = getattr(model_runner_output, "kv_compression", None)
        self._solving.took(report.solving_seconds if report is not None else None)
        self._stats.seconds += report.compaction_seconds if report is not None else 0.0
        for job in scheduler_output.kv_compression.jobs:
            tracked = self._tracked.get(job.request_id)
            # It may have ended or been preempted since; then all its blocks are free.
            if job.config.threshold is None or tracked is None or tracked.uncounted is not job:
                continue
            if report is None or job.request_id not in report.kept_blocks:
                raise RuntimeError("kv-compression: a step ended without word of what a threshold keeps")
            kept = report.kept_blocks[job.request_id]
            self.compacting_manager.shrink(job.request_id, kept)
            assert tracked.held is not None
            tracked.held, tracked.uncounted = replace(tracked.held, kept_blocks=kept), None
        self._count_drafts(scheduler_output, model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _count_drafts(self, scheduled: SchedulerOutput, output: ModelRunnerOutput) -> None:
        """Note how many drafts of raw and of compacted requests were right."""
        for name, drafts in scheduled.scheduled_spec_decode_tokens.items():
            if (index := output.req_id_to_index.get(name)) is None:
                continue
            sampled = output.sampled_token_ids[index]
            if len(sampled):
                compacted = name in self.compacting_manager.compacted
                self._stats.count_drafts(len(drafts), len(sampled) - 1, compacted)

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        # Repetitions end before their owners do, also where all requests end: they must not end twice.
        if request_ids is None:
            request_ids = self.requests
        names = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        repeating = [part for name in names for part in self._repetitions.abandon(name)]
        super().finish_requests(repeating, RequestStatus.FINISHED_ABORTED)
        return super().finish_requests(names, finished_status)

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        self._detach(request)
        # An owner that ends before it is compacted needs no repetition any more.
        repeating = self._repetitions.abandon(request.request_id)
        super().finish_requests(repeating, RequestStatus.FINISHED_ABORTED)
        self._tracked.pop(request.request_id, None)
        self._yielding.discard(request.request_id)
        self.compacting_manager.peak_blocks.pop(request.request_id, None)
        self.compacting_manager.borrowers.discard(request.request_id)
        self.compacting_manager.attaching.pop(request.request_id, None)
        self._configs.pop(request.request_id, None)
        self._repetitions.ended(request.request_id)
        self._solving.release(request.request_id)

    # ------------------------------------------------------------------ what is told

    def make_stats(self, *args, **kwargs) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            # The one field of vLLM's that takes anything; connectors, whose it is, are refused.
            assert stats.kv_connector_stats is None
            stats.kv_connector_stats = {CARRIER: self._take_stats().to_dict()}
        return stats

    def _take_stats(self) -> CompressionStats:
        """What was counted since the last call, and how things stand."""
        stats, self._stats = self._stats, CompressionStats()
        stats.freed_bytes = stats.freed_blocks * self._block_bytes
        self._add_running(stats)
        return stats

    def _add_running(self, stats: CompressionStats) -> None:
        """Fill in how things stand."""
        steps: list[float] = []
        for request in self.running:
            tracked = self._tracked.get(request.request_id)
            held = None if tracked is None else tracked.held
            stats.add_request(request.num_computed_tokens, held, self.compacting_manager.block_size)
            if tracked is not None and tracked.config.when == "pressure":
                steps.append(tracked.steps_down / len(tracked.config.ladder_steps))
        stats.pressure = sum(steps) / len(steps) if steps else 0.0
        stats.prefixes, stats.prefix_blocks = len(self._prefixes), self._prefixes.held_blocks

    def compression_state(self) -> EngineState:
        """How things stand, for who looks at it."""
        stats, pool, compacted = CompressionStats(), self.kv_cache_manager.block_pool, self.compacting_manager
        self._add_running(stats)
        usable = pool.num_gpu_blocks - 1  # one is vLLM's null block
        pages = *compacted.compacted.values(), *(prefix.compacted for prefix in self._prefixes)
        return EngineState(
            block_size=compacted.block_size,
            total_blocks=usable,
            used_blocks=usable - pool.get_num_free_blocks(),
            compacted_blocks=len({block.block_id for blocks in pages for block in blocks}),
            running=len(self.running),
            waiting=self.get_request_counts()[1],
            raw=stats.raw,
            compacted=stats.compacted,
            raw_blocks=stats.raw_blocks,
            held_blocks=stats.held_blocks,
            pressure=stats.pressure,
            requests=[self._state_of(request) for request in self.running[:MOST_REQUESTS]],
            prefixes=stats.prefixes,
            prefix_blocks=stats.prefix_blocks,
            named_prefixes=sum(prefix.name is not None for prefix in self._prefixes),
        )

    def _state_of(self, request: Request) -> RequestState:
        tracked = self._tracked.get(request.request_id)
        held = None if tracked is None else tracked.held
        repeats = self._repetitions.of(request.request_id) is not None
        raw_blocks, held_blocks = blocks_of(
            request.num_computed_tokens, held, self.compacting_manager.block_size
        )
        yields = tracked is not None and tracked.config.when == "pressure"
        return RequestState(
            id=shown_id(request.request_id),
            prompt_tokens=request.num_prompt_tokens,
            computed_tokens=request.num_computed_tokens,
            state="repeating" if repeats else "raw" if held is None else "compacted",
            raw_blocks=raw_blocks,
            held_blocks=held_blocks,
            method=None if tracked is None else tracked.config.method,
            step=tracked.steps_down if yields else None,
            steps=len(tracked.config.ladder_steps) if yields else None,
        )

    def compacted_request(self, shown: str) -> str | None:
        """The whole name of a running request that is compacted; None if there is none of this one."""
        names = (request.request_id for request in self.running)
        return next(
            (n for n in names if n in self.compacting_manager.compacted and shown_id(n) == shown), None
        )

    def prefixes(self, salt: str | None) -> list[PrefixState]:
        """The compacted prefixes under a salt: those that have a name, and some of the others."""
        own = [prefix for prefix in self._prefixes if prefix.salt == salt]
        named = sorted((prefix for prefix in own if prefix.name is not None), key=lambda each: each.name)
        unnamed = [prefix for prefix in reversed(own) if prefix.name is None]  # used last first
        return [self._state_of_prefix(prefix) for prefix in named + unnamed[:MOST_REQUESTS]]

    def has_prefix(self, name: str, salt: str | None) -> bool:
        """Whether there is a compacted prefix of this name under this salt."""
        return self._prefixes.named(name, salt) is not None

    def delete_prefix(self, name: str, salt: str | None) -> bool:
        """Keep a prefix no longer; who holds its blocks goes on. False if there is none of this name."""
        prefix = self._prefixes.named(name, salt)
        if prefix is not None:
            self._prefixes.drop(prefix)
        return prefix is not None

    def _state_of_prefix(self, prefix: Prefix) -> PrefixState:
        return PrefixState(
            id=prefix.id,
            name=prefix.name,
            tokens=len(prefix.hashes) * self.compacting_manager.block_size,
            compacted_tokens=prefix.plan.boundary,
            blocks=len(prefix.blocks),
            bytes=len(prefix.blocks) * self._block_bytes,
            users=prefix.users,
            hits=prefix.hits,
            method=prefix.config.method,
            budget=prefix.config.budget,
            adapter=prefix.adapter,
        )

    def _connector_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """vLLM's parameters of a response, with what was kept of a request that was compacted."""
        delayed, told = super()._connector_finished(request)
        own: dict[str, Any] = {}
        tracked = self._tracked.get(request.request_id)
        if tracked is not None and tracked.held is not None:
            held, block_size = tracked.held, self.compacting_manager.block_size
            own = {"method": tracked.config.method, "compacted_tokens": held.boundary}
            own["kept_tokens"] = held.kept_blocks * block_size
            if tracked.prefix_tokens:
                own["prefix_tokens"] = tracked.prefix_tokens
        left, config = self._leave_prefix(request), self._configs.get(request.request_id)
        if config is not None and config.prefix is not None:
            own |= {"method": config.method, "prefix": self._told_of(left, config.prefix)}
        return delayed, {**(told or {}), CARRIER: own} if own else told

    def _told_of(self, left: Prefix | str, name: str) -> dict[str, Any]:
        """What the client hears of a prefix that its request should leave under a name."""
        if isinstance(left, str):
            return {"kept": False, "name": name, "reason": left}
        engine = self.vllm_config.parallel_config.data_parallel_index
        return {"kept": True, "engine": engine, **self._state_of_prefix(left).to_dict()}

    # ------------------------------------------------------------------ compaction

    def _due(self, request: Request) -> bool:
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.point is None:
            return False
        return self._computed(request) >= tracked.point

    def _computed(self, request: Request) -> int:
        """Tokens of a request that are computed for certain, once the steps in flight are done."""
        # Of those (asynchronous scheduling) drafts may be rejected yet.
        drafts = max(request.num_output_placeholders - 1, 0) if self.num_spec_tokens else 0
        return request.num_computed_tokens - drafts

    def _compact_due(self) -> tuple[list[Job], list[str]]:
        """Compact what is due; the Jobs, and the requests that go on raw from this step on."""
        due = self._due_for_longest()
        self._read, self._deferred = 0, {}
        jobs = [job for job in map(self._compact, due) if job is not None]
        if jobs:  # which have made room for others
            jobs += self._compact_others(due, {job.request_id for job in jobs})
        # Who waits to be admitted leaves them the blocks, like vLLM's watermark: of the largest, since what
        # one frees serves the next.
        reserved = max(self._deferred.values(), default=0)
        self.kv_cache_manager.watermark_blocks = self._watermark_blocks + reserved
        late, waiting = [], [request for request in due if self._waits(request)]
        if not jobs and len(waiting) == len(self.running):  # for each other
            waiting = []
        for request in filter(self._due, due):
            tracked = self._tracked[request.request_id]
            awaits_answer = tracked.uncounted is not None
            if tracked.config.waits:
                awaits_answer |= self._is_being_repeated(request) or self._is_being_solved(request)
                awaits_answer |= self._waits_for_turn(request)
            if tracked.late or awaits_answer or request in waiting:
                continue
            tracked.late = True
            late.append(request.request_id)
        return jobs, late

    def _give_up(self) -> list[str]:
        """Solve no further for those who would have ended by then; the others have their turn."""
        hopeless = []
        for request in filter(self._is_solved_for, self.running):
            tracked = self._tracked[request.request_id]
            if self._ends_unsolved(request, tracked.config, request.num_computed_tokens, tracked.solved):
                self._abandoned += self._repetitions.abandon(request.request_id)
                self._solving.release(request.request_id)
                self._pass_point(request, tracked)
                tracked.late = tracked.point is None
                hopeless.append(request.request_id)
        return hopeless

    def _ends_unsolved(
        self, request: Request, config: KVCompressionConfig, num_computed: int, solved: int = 0
    ) -> bool:
        """Whether a request will have ended before it is solved for: it has a token in each step, at least,
        and a share at most."""
        if not config.matches or config.waits:
            return False
        end = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
        shares = self._solving.num_shares - solved
        return end - 1 - num_computed < shares + self._repetitions.fewest_steps(request, config)

    def _compact_others(self, due: list[Request], compacted: set[str]) -> list[Job]:
        """Compact who found no room before; whoever was compacted and is due again has its turn next step."""
        again = [request for request in due if self._due(request) and request.request_id in compacted]
        self._deferred |= {request.request_id: 0 for request in again}
        others = (request for request in due if self._due(request) and request not in again)
        return [job for job in map(self._compact, others) if job is not None]

    def _due_for_longest(self) -> list[Request]:
        """The requests that are due, the longest first."""
        due = [request for request in self.running if self._due(request)]
        tracked = {request: self._tracked[request.request_id] for request in due}
        for each in tracked.values():
            if each.due_since is None:
                each.due_since = self.current_step
        return sorted(due, key=lambda request: tracked[request].due_since)

    def _waits(self, request: Request) -> bool:
        """Whether a due request waits for its turn rather than go on raw: where that takes many blocks."""
        manager, name = self.compacting_manager, request.request_id
        if name not in self._deferred:
            return False
        if self._tracked[name].config.prefix is not None:  # it is there for that alone
            return True
        full = name in manager.peak_blocks and manager.held_blocks(name) >= manager.peak_blocks[name]
        return request.is_prefill_chunk or full

    def _is_being_repeated(self, owner: Request) -> bool:
        """Whether a due request waits for its repetition, which runs or will after another one."""
        repeating = self._repetitions.repeating(owner.request_id)
        if repeating is None:
            return False
        if any(self._repetitions.of(request.request_id) is not None for request in self.running):
            return True
        return self._can_start(repeating)

    def _is_being_solved(self, request: Request) -> bool:
        """Whether a due request, all of whose context is repeated, waits for the rest of its solution."""
        tracked = self._tracked[request.request_id]
        repeated = self._repetitions.repeating(request.request_id) is None
        own = self._solving.turn == request.request_id
        return own and repeated and tracked.solved < self._solving.num_shares

    def _has_turn(self, request: Request) -> bool:
        """Whether it is this request's turn to be repeated and solved for; it is if it is nobody's.

        What is noted of a context for that takes memory like its keys: so of one context at a time.
        """
        owner = self.requests.get(self._solving.turn or "")
        if owner is None or not self._is_solved_for(owner):
            self._solving.turn = request.request_id
        return self._solving.turn == request.request_id

    def _waits_for_turn(self, request: Request) -> bool:
        """Whether a due request waits for another one that is repeated or solved for, and gets on."""
        turn = self._solving.turn
        if not self._is_solved_for(request) or turn in (None, request.request_id):
            return False
        owner = self.requests[turn]
        return self._is_being_repeated(owner) or self._is_being_solved(owner)

    def _can_start(self, repeating: Request) -> bool:
        """Whether vLLM would admit a repetition now."""
        repetition = self._repetitions.of(repeating.request_id)
        assert repetition is not None
        _, num_shared = self._shared_with(repetition)
        needed = self.kv_cache_manager.watermark_blocks
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            # Windows give blocks back on the way. That they have some already is of no use: those go first.
            own = -(-repeating.num_tokens // manager.block_size) - num_shared // manager.block_size
            most = manager.max_admission_blocks_per_request
            if isinstance(manager, MambaManager):
                spec = manager.kv_cache_spec
                most = spec.max_memory_usage_bytes(self.vllm_config) // spec.page_size_bytes
            needed += own if most is None else min(own, most)
        num_active = len(self.running) + self.num_waiting_for_streaming_input
        free = self.kv_cache_manager.block_pool.get_num_free_blocks() + self._prefixes.idle_blocks()
        return num_active < self.max_num_active_reqs and needed <= free

    def _compact(self, request: Request) -> Job | None:
        """Compact a request that is due; None if there is no room yet, or nothing would be freed."""
        manager = self.compacting_manager
        tracked = self._tracked[request.request_id]
        config, point, held = tracked.config, tracked.point, tracked.held
        assert point is not None
        shared = tracked.prefix is not None
        plan = Plan.of(config, point, manager.block_size, held, self._page_tokens(config), shared=shared)
        if plan is None:
            self._pass_point(request, tracked)
            return None
        if tracked.uncounted is not None:  # the answer is on its way
            return None
        solved = self._is_solved_for(request)
        if solved and tracked.solved < self._solving.num_shares and not self._has_turn(request):
            return None
        if config.repeats and (solved or not config.matches) and not self._repeated(request, config):
            return None
        job = replace(self._job(request, tracked, point, plan), solved=solved)
        if solved and not self._solved(tracked, job, plan.kept_blocks):
            return None
        reads = tokens_read(point, manager.block_size, held)
        if self._read and self._read + reads > self._most_read:
            self._deferred[request.request_id] = plan.kept_blocks
            self._solving.pass_on(request.request_id)
            return None
        in_place = self._in_place(plan)
        swapped = self._swapped(job, tracked, plan)
        if swapped is None:  # it is tried again at the next step
            if not in_place:
                self._deferred[request.request_id] = plan.kept_blocks
            self._solving.pass_on(request.request_id)
            return None
        self._solving.release(request.request_id)
        self._read += reads
        self._repetitions.abandon(request.request_id)  # all is repeated
        self._pass_point(request, tracked)
        tracked.uncounted = swapped if config.threshold is not None else None
        return swapped

    def _job(self, request: Request, tracked: _Tracked, point: int, plan: Plan) -> Job:
        """What compacting a request is, without the blocks that it is compacted into."""
        manager, held = self.compacting_manager, tracked.held
        begin = held.source_blocks if held else 0
        row = [block.block_id for block in manager.req_to_blocks[request.request_id]]
        return Job(
            request_id=request.request_id,
            config=tracked.config,
            num_tokens=point,
            boundary=plan.boundary,
            previous_boundary=held.boundary if held else 0,
            previous=(),
            source=tuple(row[begin : plan.source_blocks]),
            tail=tuple(row[plan.source_blocks : -(-point // manager.block_size)]),
            destination=(),
        )

    def _in_place(self, plan: Plan) -> bool:
        """Whether a compaction may write blocks that it reads."""
        return current_platform.is_cpu() or plan.kept_blocks * self._block_bytes <= STAGED_BYTES

    def _swapped(self, job: Job, tracked: _Tracked, plan: Plan) -> Job | None:
        """Swap a Job's blocks for new ones; None if there is no room."""
        begin, end = job.previous_boundary, job.boundary
        block_size, in_place = self.compacting_manager.block_size, self._in_place(plan)
        asked = job.request_id, begin // block_size, end // block_size, plan.kept_blocks, in_place
        while (swapped := self.compacting_manager.compact(*asked)) is None:
            if not self._prefixes.make_room():
                return None
        previous, _, destination = swapped
        tracked.held, tracked.prefix = plan, None
        return replace(job, previous=previous, destination=destination)

    def _solved(self, tracked: _Tracked, job: Job, num_blocks: int) -> bool:
        """Whether all is solved for a Job once this step's shares are; goes on with it if not."""
        num_shares = self._solving.num_shares
        if tracked.solved < num_shares:
            shares = range(tracked.solved, min(tracked.solved + self._solving.take_shares(), num_shares))
            if shares:
                self._solving.add(Solve(job, num_blocks, shares, num_shares))
                tracked.solved = shares.stop
        return tracked.solved == num_shares

    def _is_solved_for(self, request: Request) -> bool:
        """Whether a running request is due and will be compacted once it is solved: its prompt is."""
        tracked = self._tracked.get(request.request_id)
        matches = tracked is not None and tracked.config.matches
        return matches and tracked.point == request.num_prompt_tokens and self._due(request)

    def _pass_point(self, request: Request, tracked: _Tracked) -> None:
        """Go on to a request's next compaction point."""
        config, num_prompt = tracked.config, request.num_prompt_tokens
        tracked.point = next_point(config, num_prompt, tracked.point)
        # While it was late nothing was kept of its queries: the next window begins where that begins again.
        since = request.num_computed_tokens + config.observed_window if tracked.late else 0
        while tracked.point is not None and tracked.point < since:
            tracked.point = next_point(config, num_prompt, tracked.point)
        tracked.late, tracked.due_since, tracked.solved = False, None, 0

    def _observations(self, started: list[str]) -> list[Observation]:
        return [
            Observation(request_id, self._tracked[request_id].config)
            for request_id in started
            if request_id in self._tracked and self._tracked[request_id].config.observes
        ]

    # ------------------------------------------------------------------ pressure

    def _make_room(self, asking: Request, hit: KVCacheBlocks | None) -> bool:
        """Compact requests for one that found too few blocks; False if that is of no use.

        Args:
            asking: the request that is about to be admitted or to go on.
            hit: the cached blocks that it is about to take over, which nobody holds yet.
        """
        pool = self.kv_cache_manager.block_pool
        waits = asking.status != RequestStatus.RUNNING
        lacking = self._asked - pool.get_num_free_blocks()
        if waits and self.running:
            lacking += self.kv_cache_manager.watermark_blocks
        awaited = [block for row in (hit.blocks if hit else ()) for block in row if not block.is_null]
        pool.touch(awaited)  # or they might be compacted into
        num_given = len(self._given)
        self._give(self._givers(), lacking, bounded=waits)
        pool.free_blocks(reversed(awaited))
        return len(self._given) > num_given

    def _keep_room(self) -> None:
        """Compact while there are still blocks to compact into, where a large request needs them.

        On a GPU no more than `STAGED_BYTES` are rewritten in place, and when the last block is taken a larger
        request could give nothing.
        """
        pool = self.kv_cache_manager.block_pool
        free, growth = pool.get_num_free_blocks() + self._prefixes.idle_blocks(), len(self.running)
        if current_platform.is_cpu() or free > pool.num_gpu_blocks // EARLY:
            return
        givers = self._givers()
        ends = [found[-1].plan for _, found in givers]
        large = [plan.kept_blocks for plan in ends if not self._in_place(plan)]
        if large and free - growth < min(large):
            self._give(givers, growth)

    def _give(
        self, givers: list[tuple[KVCompressionConfig, list[Descent]]], lacking: int, bounded: bool = False
    ) -> None:
        """Compact requests until so many blocks are free, if there can be; those that would exceed the bound
        of a step in one of the next."""
        block_size = self.compacting_manager.block_size
        for descent in least_loss(givers, lacking, block_size):
            tracked = self._tracked[descent.request.request_id]
            reads = tokens_read(descent.point, block_size, tracked.held)
            if bounded and self._read and self._read + reads > self._most_read:
                return
            if self._descend(descent, tracked):
                self._read += reads

    def _givers(self) -> list[tuple[KVCompressionConfig, list[Descent]]]:
        """Options of the requests that may be compacted in this step, and what each could give."""
        given = {job.request_id for job in self._given}
        names = (self._yielding & self._has_run) - given
        requests = [request for request in self.running if request.request_id in names]
        return [(self._tracked[r.request_id].config, found) for r in requests if (found := self._descents(r))]

    def _descents(self, request: Request) -> list[Descent]:
        """What a request could give, each more than the one before."""
        tracked, point = self._tracked[request.request_id], self._computed(request)
        if point - tracked.observed_from < tracked.config.observed_window:
            return []
        if point >= min(request.num_prompt_tokens + request.max_tokens, self.max_model_len) - 1:
            return []  # it ends with the step in flight
        if request.is_prefill_chunk and _wants_prompt_logprobs(request.sampling_params):
            return []  # they are of raw context
        in_page, block_size = self._page_tokens(tracked.config), self.compacting_manager.block_size
        shared = tracked.prefix is not None
        every = descents(
            request, tracked.config, point, tracked.step, tracked.held, block_size, in_page, shared
        )
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return [each for each in every if self._in_place(each.plan) or each.plan.kept_blocks <= free]

    def _descend(self, descent: Descent, tracked: _Tracked) -> bool:
        """Compact a request down to a step of its ladder, if that frees what it should."""
        request, plan, manager = descent.request, descent.plan, self.compacting_manager
        job = self._job(request, tracked, descent.point, plan)
        row = manager.req_to_blocks[request.request_id]
        begin = job.previous_boundary // manager.block_size
        held = manager.compacted.get(request.request_id, ())
        shared = sum(block.ref_cnt > 1 for block in row[begin : plan.source_blocks])
        if tracked.prefix is None:  # else they are not counted
            shared += sum(block.ref_cnt > 1 for block in held)
        if (descent.freed - shared) * manager.block_size < tracked.config.min_freed_tokens:
            return False
        swapped = self._swapped(job, tracked, plan)
        if swapped is None:
            return False
        self._withdraw(request, descent.point)
        tracked.step = descent.step
        self._given.append(swapped)
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
        managers = self.kv_cache_manager.coordinator.single_type_managers
        rows = (
            manager.req_to_blocks[request.request_id][point // manager.block_size :] for manager in managers
        )
        offered = [block for row in rows for block in row if block.block_hash is not None]
        assert all(block.ref_cnt == 1 for block in offered)
        self.kv_cache_manager.block_pool.evict_blocks({block.block_id for block in offered})

    def _first_observed(self, name: str, output: SchedulerOutput) -> int:
        """The first token of a request that started in this step whose query is computed."""
        return self.requests[name].num_computed_tokens - output.num_scheduled_tokens[name]

    # ------------------------------------------------------------------ compacted prefixes

    def _compacted_hit(self, request: Request, num_hit: int) -> list[KVCacheBlock] | None:
        """The row of a request that takes a compacted prefix over; None if what vLLM has of it is as long."""
        manager, name = self.compacting_manager, request.request_id
        manager.attaching.pop(name, None)
        config = self._configs.get(name)
        if config is None or not self._prefixes or request.skip_reading_prefix_cache:
            return None
        most = request.num_tokens - (2 if self.num_spec_tokens else 1)
        if name in self._tracked and _goes_on_compacted(config):
            # As with a hit of vLLM's: the window is to be observed.
            most = min(most, request.num_prompt_tokens - max(config.observed_window, 1))
        found = self._prefixes.find(request.block_hashes, config.content, max(most, 0) // manager.block_size)
        if found is None or found[1] * manager.block_size <= num_hit:
            return None
        prefix, end = found
        manager.attaching[name] = prefix
        num_compacted = prefix.plan.source_blocks
        return [manager._null_block] * num_compacted + list(prefix.tail[: end - num_compacted])

    def _attach(self, request: Request, hit: KVCacheBlocks) -> None:
        """Note that a request that has just been admitted goes on from a compacted prefix."""
        name, config = request.request_id, self._configs[request.request_id]
        prefix = self.compacting_manager.attaching.pop(name)
        num_tokens = len(hit.blocks[0]) * self.compacting_manager.block_size
        self._prefixes.use(prefix)
        self._stats.prefix_hits += 1
        self._stats.prefix_hit_tokens += num_tokens
        self._users[name] = prefix
        self._attached[name] = prefix.id
        tracked = self._tracked.setdefault(name, _Tracked(config, None, is_due_ever=False))
        tracked.held, tracked.prefix, tracked.prefix_tokens = prefix.plan, prefix, num_tokens
        if config.when == "pressure":
            steps = enumerate(config.ladder_steps)
            tracked.step = next(n for n, step in steps if (step or 0.0) <= (prefix.kept or 0.0))
        tracked.point = self._point_behind(request, num_tokens)

    def _point_behind(self, request: Request, num_tokens: int) -> int | None:
        """The first compaction point of a request that goes on from so many tokens of a compacted prefix."""
        config, tracked = self._configs[request.request_id], self._tracked.get(request.request_id)
        point = None if tracked is None or not _goes_on_compacted(config) else tracked.point
        while point is not None and point < num_tokens + max(config.observed_window, 1):
            point = next_point(config, request.num_prompt_tokens, point)
        return point

    def _detach(self, request: Request) -> None:
        """Note that a request holds nothing any more."""
        name = request.request_id
        if (prefix := self._users.pop(name, None)) is None:
            return
        prefix.users -= 1
        if name in self._tracked and not self._tracked[name].is_due_ever:
            del self._tracked[name]

    def _drop_prefix(self, asking: Request) -> bool:
        """Drop a prefix that nobody holds for a request that found too few blocks; False if there is none, or
        if all of them together would not admit it."""
        manager = self.compacting_manager
        own = manager.attaching.get(asking.request_id)
        spared = () if own is None else (own,)
        lacking = self._asked - manager.block_pool.get_num_free_blocks()
        if asking.status != RequestStatus.RUNNING and self.running:
            lacking += self.kv_cache_manager.watermark_blocks
            if not self._yielding and self._prefixes.idle_blocks(spared) < lacking:
                return False
        if self._prefixes.make_room(spared):
            return True
        if own is not None and not self.running and own.name is None and not own.users:
            # With it alone there is no room: at the next step it is done without.
            del manager.attaching[asking.request_id]
            self._prefixes.drop(own)
        return False

    def _leave_prefix(self, request: Request) -> Prefix | str:
        """Keep what a request that ends was compacted to, if it should be; else why not, in one line."""
        manager, name = self.compacting_manager, request.request_id
        config = self._configs.get(name)
        if config is None or (config.prefix is None and not self.compression.prefix_share):
            return "nobody asked for it"
        tracked = self._tracked.get(name)
        if tracked is None or name not in manager.compacted or tracked.uncounted is not None:
            return self._uncompacted(tracked, config)
        assert tracked.held is not None
        if not request.block_hashes:
            return "the server runs without prefix caching"
        # Whatever follows may be of drafts, or is yet to be computed.
        num_tokens = min(request.num_computed_tokens, request.num_tokens - 1)
        if config.prefix is not None:
            num_tokens = min(num_tokens, request.num_prompt_tokens)
        begin, end = tracked.held.source_blocks, num_tokens // manager.block_size
        if begin > end:
            return "some of its output was compacted with the prompt; ask for fewer max_tokens"
        prefix = Prefix(
            id=self._prefixes.new_id(),
            name=config.prefix,
            config=config,
            hashes=tuple(request.block_hashes[:end]),
            tokens=None if config.prefix is None else self._tokens_of(request, end * manager.block_size),
            plan=tracked.held,
            kept=config.ladder_steps[tracked.step] if config.when == "pressure" else config.budget,
            compacted=tuple(manager.compacted[name]),
            tail=tuple(manager.req_to_blocks[name][begin:end]),
            salt=request.cache_salt,
            adapter=request.lora_request.lora_name if request.lora_request else None,
        )
        if config.prefix is not None and (problem := self._unnameable(prefix)) is not None:
            return problem
        if not self._prefixes.keep(prefix):
            return "there is one like it, or it is larger than prefix_share"
        if config.prefix is not None:
            # A raw copy that nobody reads would be taken instead, and compacted each time.
            found = (manager.block_pool.get_cached_block(each, [self._group]) for each in prefix.hashes)
            idle = {blocks[0].block_id for blocks in found if blocks and not blocks[0].ref_cnt}
            manager.block_pool.evict_blocks(idle)
        self._kept[prefix.id] = name
        return prefix

    def _tokens_of(self, request: Request, num_tokens: int) -> tuple[int, ...] | None:
        if request.prompt_embeds is not None or request.mm_features:
            return None
        return tuple(request.all_token_ids[:num_tokens])

    def describe_prefix(self, prefix: Prefix) -> dict[str, Any]:
        """What must be known of a prefix to load it again, but for its tokens."""
        return {
            "name": prefix.name,
            "salt": prefix.salt,
            "config": prefix.config.to_dict(),
            "boundary": prefix.plan.boundary,
            "kept_blocks": prefix.plan.kept_blocks,
            "kept": prefix.kept,
            "block_size": self.compacting_manager.block_size,
        }

    def prefix_to_save(self, name: str, salt: str | None) -> tuple[Prefix, tuple[str, ...]]:
        """A prefix, and the names by which workers know it.

        Raises:
            KVCompressionError: there is none, or it cannot be saved.
        """
        prefix = self._prefixes.named(name, salt)
        if prefix is None:
            raise KVCompressionError(f"there is no prefix {name!r}")
        if prefix.adapter is not None or prefix.tokens is None:
            raise KVCompressionError("prefixes of an adapter, pictures or embeddings cannot be saved")
        names = (prefix.id, self._kept[prefix.id]) if prefix.id in self._kept else (prefix.id,)
        return prefix, names

    def load_prefix(self, about: dict[str, Any], request: Request, prefix_id: str) -> Prefix:
        """Take blocks for a prefix that the workers have read.

        Args:
            about: what `describe_prefix` said of it.
            request: one whose prompt it is.
            prefix_id: as the workers call it.

        Raises:
            KVCompressionError: there is no room, or its name is taken.
        """
        manager, pool = self.compacting_manager, self.kv_cache_manager.block_pool
        num_kept, num_source = about["kept_blocks"], about["boundary"] // manager.block_size
        needed = num_kept + len(request.block_hashes) - num_source
        while pool.get_num_free_blocks() < needed and self._prefixes.make_room():
            pass
        if pool.get_num_free_blocks() < needed:
            raise KVCompressionError(
                f"the prefix takes {needed} blocks, and {pool.get_num_free_blocks()} are free"
            )
        blocks = pool.get_new_blocks(needed)
        prefix = Prefix(
            id=prefix_id,
            name=about["name"],
            config=KVCompressionConfig.parse(about["config"]),
            hashes=tuple(request.block_hashes),
            tokens=self._tokens_of(request, request.num_tokens),
            plan=Plan(about["boundary"], num_source, num_kept),
            kept=about["kept"],
            compacted=tuple(blocks[:num_kept]),
            tail=tuple(blocks[num_kept:]),
            salt=about["salt"],
        )
        problem = self._unnameable(prefix)
        if problem is None:
            self._prefixes.keep(prefix)
            ids = [block.block_id for block in blocks]
            self._loaded.append(Loaded(prefix_id, tuple(ids[:num_kept]), tuple(ids[num_kept:])))
        pool.free_blocks(reversed(blocks))  # a prefix has references of its own
        if problem is not None:
            raise KVCompressionError(problem)
        return prefix

    def new_prefix_id(self) -> str:
        """For a prefix that is to be loaded."""
        return self._prefixes.new_id()

    def _uncompacted(self, tracked: _Tracked | None, config: KVCompressionConfig) -> str:
        """Why a request that ends was not compacted."""
        if tracked is None or (tracked.held is None and tracked.point is None):
            least = config.min_freed_tokens
            return f"the prompt is short: compacting it would free fewer than min_freed_tokens={least} tokens"
        if tracked.late:
            return "the pool had no room to compact the prompt; try again when fewer requests run"
        return "the request ended before its prompt was compacted"

    def _unnameable(self, prefix: Prefix) -> str | None:
        """Why a prefix may not be kept until it is deleted; None if it may."""
        assert prefix.name is not None
        if self._prefixes.named(prefix.name, prefix.salt) is not None:
            return TAKEN
        pool, block_size = self.kv_cache_manager.block_pool, self.compacting_manager.block_size
        usable, longest = pool.num_gpu_blocks - 1, -(-self.max_model_len // block_size)
        own, others = len(prefix.blocks), self._prefixes.named_blocks
        if usable - others - own >= longest:  # of whom vLLM has promised to serve
            return None
        return (
            f"its {own} blocks and {others} of other names would leave fewer of {usable} than {longest}, for "
            "--max-model-len; delete a prefix or lower it"
        )

    def reset_prefix_cache(self, *args, **kwargs) -> bool:
        for prefix in list(self._prefixes):
            self._prefixes.drop(prefix)
        return super().reset_prefix_cache(*args, **kwargs)

    # ------------------------------------------------------------------ repetition

    def _repeated(self, request: Request, config: KVCompressionConfig) -> bool:
        """Whether the model has repeated all of a request's context; goes on with it if not."""
        repeating = self._repetitions.next_part(request, config)
        if repeating is not None:
            self.compacting_manager.borrowers.add(repeating.request_id)
            super().add_request(repeating)
        return self._repetitions.complete(request.request_id)

    def _end_abandoned(self) -> None:
        abandoned, self._abandoned = self._abandoned, []
        super().finish_requests(abandoned, RequestStatus.FINISHED_ABORTED)


def _goes_on_compacted(config: KVCompressionConfig) -> bool:
    """Whether what goes on from a compacted prefix may be compacted with it: if neither all queries nor all
    of the context are asked for, and how much is kept is known before."""
    return not (config.observes_all or config.repeats or config.threshold is not None)


def _wants_prompt_logprobs(params: SamplingParams | None) -> bool:
    return params is not None and not (params.prompt_logprobs is params.prompt_logprob_token_ids is None)


class CompressionScheduler(_Compression, Scheduler):
    """Synchronous scheduling."""


class AsyncCompressionScheduler(_Compression, AsyncScheduler):
    """Asynchronous scheduling: steps in flight run before the step whose Jobs free their blocks."""
