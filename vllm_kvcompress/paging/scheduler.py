"""vLLM's schedulers, extended by the decision when a request is compacted."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from vllm.platforms import current_platform
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.paging.attaching import Attaching
from vllm_kvcompress.paging.compactions import Compactions
from vllm_kvcompress.paging.due import Due
from vllm_kvcompress.paging.job import CompressionReport, CompressionStep, Observation
from vllm_kvcompress.paging.leaving import Leaving
from vllm_kvcompress.paging.manager import CompactingManager
from vllm_kvcompress.paging.prefixes import Prefixes
from vllm_kvcompress.paging.repetition import Repetitions
from vllm_kvcompress.paging.rings import Rings, memory_for_rings
from vllm_kvcompress.paging.solving import Solving
from vllm_kvcompress.paging.spec import compactable_groups
from vllm_kvcompress.paging.statistics import CompressionStats
from vllm_kvcompress.paging.telling import Telling
from vllm_kvcompress.paging.tracked import Tracked, TrackedRequests
from vllm_kvcompress.paging.turns import Turns
from vllm_kvcompress.paging.yielding import Yielding
from vllm_kvcompress.plan import is_ever_compacted, next_point, peak_blocks


class _Compression(Telling):
    """Mixed into a vLLM scheduler: before each `schedule()` it compacts the requests that are due, and while
    it schedules those that give what they have under pressure.

    How much a threshold keeps is known only where the scores are. Such a Job is given as many blocks as its
    budget allows; with the step's output comes the number that it filled, and the others are freed. Until
    then the request waits if it is due again: what it keeps must not depend on when the answer comes.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.compression = KVCompressionConfig.parse(self.vllm_config.additional_config["kv_compression"])
        own, coordinator = compactable_groups(self.kv_cache_config), self.kv_cache_manager.coordinator
        manager, *others = (coordinator.single_type_managers[index] for index in own)
        assert isinstance(manager, CompactingManager)
        for other in others:
            manager.take_in(other)
        self.compacting_manager = manager
        self._is_hybrid = len(coordinator.single_type_managers) > 1
        if self._is_hybrid:
            coordinator.cache_blocks = self._unless_compacted(coordinator.cache_blocks)
            coordinator.remove_skipped_blocks = self._but_for_prefixes(coordinator.remove_skipped_blocks)
        coordinator.get_num_blocks_to_allocate = self._noting_blocks(coordinator.get_num_blocks_to_allocate)
        self.kv_cache_manager.allocate_slots = self._or_compact(self.kv_cache_manager.allocate_slots)
        groups = [self.kv_cache_config.kv_cache_groups[index] for index in own]
        self._asked = 0  # blocks, last
        self._stats = CompressionStats()
        self._tracked = tracked = TrackedRequests(has_drafts=self.num_spec_tokens > 0)
        self._prefixes = prefixes = Prefixes(self.kv_cache_manager.block_pool, self.compression.prefix_share)
        self._attaching = Attaching(self, manager, tracked, prefixes)
        self.leaving = Leaving(self, manager, tracked, prefixes)
        most_read = self.compression.max_compaction_tokens or self.scheduler_config.max_num_batched_tokens
        self._compactions = Compactions(groups, manager, prefixes, most_read)
        self._yielding = Yielding(self, manager, tracked, prefixes, self._compactions)
        self._repetitions = Repetitions(self.vllm_config)
        self._solving = Solving(self.vllm_config)
        self._turns = Turns(self, tracked, prefixes, self._repetitions, self._solving)
        self._due = Due(
            self,
            manager,
            tracked,
            self._compactions,
            self._repetitions,
            self._solving,
            self._turns,
            self._repeat,
        )
        num_tokens = self.kv_cache_config.num_blocks // len(own) * manager.block_size
        of_what = self.max_num_running_reqs, num_tokens, groups[0].kv_cache_spec.dtype
        budget = memory_for_rings(self.vllm_config, self.compression, *of_what)
        self._rings = Rings(budget, self.vllm_config, self.compression)

    def _unless_compacted(self, cache_blocks: Callable[[Request, int], None]) -> Callable[..., None]:
        """What offers blocks of all groups to the prefix cache: those of windows, too, may have been computed
        on top of compacted context."""
        manager = self.compacting_manager

        def cached(request: Request, num_computed_tokens: int) -> None:
            if manager.may_be_cached(request.request_id):
                cache_blocks(request, num_computed_tokens)

        return cached

    def _but_for_prefixes(self, remove_skipped_blocks: Callable[..., None]) -> Callable[..., None]:
        """What gives back the blocks that windows and states have moved on from: but for those that are seen
        from where a prefix of the request would end."""

        def removed(request_id: str, processed_computed_tokens: int, *args, **kwargs) -> None:
            config = self._attaching.configs.get(request_id)
            if config is not None and request_id in self._tracked and self.leaving.is_wanted(config):
                end = self.leaving.end(self.requests[request_id], config)
                processed_computed_tokens = min(processed_computed_tokens, end)
            remove_skipped_blocks(request_id, processed_computed_tokens, *args, **kwargs)

        return removed

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
                        self._stats.count_hit(self._attaching.attach(request, kwargs["new_computed_blocks"]))
                    return blocks
                only = not self._yielding.names
                if self._attaching.drop_for(request, self._lacking(request), only):
                    continue
                hit = kwargs.get("new_computed_blocks")
                if not self._yielding.make_room(request, self._lacking(request), hit):
                    return None

        return allocated

    def _lacking(self, asking: Request) -> int:
        """Blocks that vLLM has just found to be too few for a request."""
        lacking = self._asked - self.kv_cache_manager.block_pool.get_num_free_blocks()
        if asking.status != RequestStatus.RUNNING and self.running:
            lacking += self.kv_cache_manager.watermark_blocks
        return lacking

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
            if config.enabled:
                self._attaching.configs[request.request_id] = config

    def _track(self, request: Request, config: KVCompressionConfig) -> None:
        """Remember a request that will be compacted."""
        block_size, num_prompt = self.compacting_manager.block_size, request.num_prompt_tokens
        num_tokens = min(num_prompt + request.max_tokens, self.max_model_len)
        in_page = self._compactions.page_tokens(config)
        if not is_ever_compacted(config, num_prompt, num_tokens, block_size, in_page):
            return
        if self.num_spec_tokens and num_prompt == 1:  # vLLM pads its first step with drafts
            return
        if config.interval is None and self._due.ends_unsolved(request, config, num_prompt):
            return
        self._tracked[request.request_id] = Tracked(config, next_point(config, num_prompt))
        if config.when == "pressure":
            self._yielding.names.add(request.request_id)
        if config.when == "streaming":
            beside = not current_platform.is_cpu()
            peak = peak_blocks(config, num_prompt, num_tokens, block_size, beside, in_page)
            self.compacting_manager.peak_blocks[request.request_id] = peak

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        own = [self._turns.is_turn_of(request) for request in self.running if self._is_served(request)]
        self._solving.begin_step(others=False in own, decodes=True in own)
        unsolved = self._due.give_up()
        jobs, late = self._due.compact()
        self._end_abandoned()
        running = ((self._tracked.get(request.request_id), request.num_tokens) for request in self.running)
        self._rings.begin_step((tracked, tokens) for tracked, tokens in running if tracked is not None)
        decoding = sum(self._decodes(request) for request in self.running)
        left = self.max_num_scheduled_tokens - decoding * (1 + self.num_spec_tokens)
        self._repetitions.begin_step(decoding, max(left, 0))
        self._yielding.begin_step()
        output = super().schedule(throttle_prefills)
        jobs += self._yielding.given
        compacted = self.compacting_manager.compacted
        started = [new.req_id for new in output.scheduled_new_reqs]
        started += output.scheduled_cached_reqs.resumed_req_ids
        for name in self._yielding.names.intersection(started):
            self._tracked[name].observed_from = self._first_observed(name, output)
        released = self.compacting_manager.take_released()
        # A request may have been preempted after its Job was made, or its share was given out; its blocks are
        # gone by now.
        jobs = [job for job in jobs if job.request_id in compacted]
        self._stats.count(jobs)
        output.kv_compression = CompressionStep(
            kept=self.leaving.take_kept(),
            released=released,
            loaded=self.leaving.take_loaded(),
            attached=self._attaching.take_attached(),
            dropped=self._prefixes.take_dropped(),
            solves=self._solving.take(released),
            jobs=jobs,
            late=[name for name in (*unsolved, *late) if (own := self._tracked.get(name)) and own.late],
            unsolved=[name for name in unsolved if name not in released],
            observations=self._observations(started),
            repetitions=self._repetitions.announced(started),
        )
        return output

    def _first_observed(self, name: str, output: SchedulerOutput) -> int:
        """The first token of a request that started in this step whose query is computed."""
        return self.requests[name].num_computed_tokens - output.num_scheduled_tokens[name]

    def _observations(self, started: list[str]) -> list[Observation]:
        return [
            Observation(request_id, self._tracked[request_id].config)
            for request_id in started
            if request_id in self._tracked
            and self._tracked[request_id].config.observes
            and not self._attaching.only_reads(request_id)  # nor writes what is kept beside its pages
        ]

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
            point = self._attaching.point_behind(request, num_computed_tokens)
        if point is not None:
            num_new_tokens = min(num_new_tokens, max(point - num_computed_tokens, 0))
        if tracked is not None and request.status != RequestStatus.RUNNING:
            if not self._rings.start(tracked.config, request.num_tokens):
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
        return self._is_served(request) and not request.is_prefill_chunk

    def _is_served(self, request: Request) -> bool:
        """Whether somebody waits for what steps do for a running request, its prompt or its output."""
        tracked = self._tracked.get(request.request_id)
        waits = tracked is not None and not tracked.late and self._tracked.is_due(request)
        return not (waits or self._repetitions.of(request.request_id) is not None)

    def _get_local_prefix_cache_hit(
        self, request: Request, *args, **kwargs
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        manager = self.compacting_manager
        if (repetition := self._repetitions.of(request.request_id)) is not None:
            return *self._turns.shared_with(repetition), 0, False
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
        if (compacted := self._attaching.hit(request, num_hit)) is not None:
            rows, num_hit = compacted
            blocks = self.kv_cache_manager.create_kv_cache_blocks(rows)
        return blocks, num_hit, shared_prefix_boundary, diverged

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
        self._attaching.detach(request)
        tracked = self._tracked.get(request.request_id)
        if tracked is not None:
            tracked.start_again(request)
            self._solving.release(request.request_id)
            self.compacting_manager.release(request.request_id)  # what is kept of its queries, too
            # vLLM preempts while it schedules, when the repetition may be in the batch already: it is ended
            # before the next one.
            self._due.abandoned += self._repetitions.abandon(request.request_id)

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
        self._attaching.detach(request)
        # An owner that ends before it is compacted needs no repetition any more.
        repeating = self._repetitions.abandon(request.request_id)
        super().finish_requests(repeating, RequestStatus.FINISHED_ABORTED)
        self._tracked.pop(request.request_id, None)
        self._yielding.names.discard(request.request_id)
        self.compacting_manager.peak_blocks.pop(request.request_id, None)
        self.compacting_manager.borrowers.discard(request.request_id)
        self.compacting_manager.attaching.pop(request.request_id, None)
        self._attaching.configs.pop(request.request_id, None)
        self._repetitions.ended(request.request_id)
        self._solving.release(request.request_id)

    def has_finished_requests(self) -> bool:
        # vLLM steps once more after the last request, with nothing to compute: workers hear of its end, and
        # gauges are right. So it must be of prefixes that come and go while nothing runs.
        if super().has_finished_requests():
            return True
        untold = self._prefixes.has_dropped or self.leaving.has_loaded
        return untold and self.pause_state == PauseState.UNPAUSED  # an engine that sleeps makes no step

    def reset_prefix_cache(self, *args, **kwargs) -> bool:
        for prefix in list(self._prefixes):
            self._prefixes.drop(prefix)
        return super().reset_prefix_cache(*args, **kwargs)

    def _repeat(self, repeating: Request) -> None:
        """Take up a request that repeats another one's context."""
        self.compacting_manager.borrowers.add(repeating.request_id)
        super().add_request(repeating)

    def _end_abandoned(self) -> None:
        abandoned, self._due.abandoned = self._due.abandoned, []
        super().finish_requests(abandoned, RequestStatus.FINISHED_ABORTED)


class CompressionScheduler(_Compression, Scheduler):
    """Synchronous scheduling."""


class AsyncCompressionScheduler(_Compression, AsyncScheduler):
    """Asynchronous scheduling: steps in flight run before the step whose Jobs free their blocks."""
