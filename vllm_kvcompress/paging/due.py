"""The requests that are due: which of them are compacted in a step, which wait, and which go on raw."""

import math
from collections.abc import Callable
from dataclasses import replace

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.paging.compactions import Compactions
from vllm_kvcompress.paging.job import Job, Solve
from vllm_kvcompress.paging.manager import CompactingManager
from vllm_kvcompress.paging.repetition import Repetitions
from vllm_kvcompress.paging.solving import Solving
from vllm_kvcompress.paging.tracked import Tracked, TrackedRequests
from vllm_kvcompress.paging.turns import Turns
from vllm_kvcompress.plan import Plan, tokens_read


class Due:
    """Compacts the requests of one scheduler that are due.

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

    Attributes:
        deferred: blocks that due requests will be compacted into, whose turn has not come or that wait for
            free ones.
        abandoned: repeating requests that are to be ended.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        manager: CompactingManager,
        tracked: TrackedRequests,
        compactions: Compactions,
        repetitions: Repetitions,
        solving: Solving,
        turns: Turns,
        repeat: Callable[[Request], None],
    ) -> None:
        """
        Args:
            scheduler: whose requests these are.
            manager: of their blocks.
            tracked: its requests that are compacted.
            compactions: by which they are.
            repetitions: of their contexts.
            solving: for what they keep.
            turns: for both.
            repeat: takes a repeating request up.
        """
        self._scheduler, self._manager, self._tracked = scheduler, manager, tracked
        self._compactions, self._repetitions, self._solving = compactions, repetitions, solving
        self._turns, self._repeat = turns, repeat
        self.deferred: dict[str, int] = {}
        self.abandoned: list[str] = []
        self._watermark_blocks = scheduler.kv_cache_manager.watermark_blocks

    def compact(self) -> tuple[list[Job], list[str]]:
        """Compact what is due; the Jobs, and the requests that go on raw from this step on."""
        due = self._for_longest()
        self._compactions.begin_step()
        self.deferred = {}
        jobs = [job for job in map(self._compact, due) if job is not None]
        if jobs:  # which have made room for others
            jobs += self._compact_others(due, {job.request_id for job in jobs})
        # Who waits to be admitted leaves them the blocks, like vLLM's watermark: of the largest, since what
        # one frees serves the next.
        reserved = max(self.deferred.values(), default=0)
        self._scheduler.kv_cache_manager.watermark_blocks = self._watermark_blocks + reserved
        late, waiting = [], [request for request in due if self.waits(request)]
        if not jobs and len(waiting) == len(self._scheduler.running):  # for each other
            waiting = []
        for request in filter(self._tracked.is_due, due):
            tracked = self._tracked[request.request_id]
            awaits_answer = tracked.uncounted is not None
            if tracked.config.waits:
                awaits_answer |= self._turns.is_being_repeated(request) or self._turns.is_being_solved(
                    request
                )
                awaits_answer |= self._turns.waits_for_turn(request)
            if tracked.late or awaits_answer or request in waiting:
                continue
            tracked.late = True
            late.append(request.request_id)
        return jobs, late

    def give_up(self) -> list[str]:
        """Solve no further for those who would have ended by then; the others have their turn."""
        hopeless = []
        for request in filter(self._turns.is_solved_for, self._scheduler.running):
            tracked = self._tracked[request.request_id]
            if self.ends_unsolved(request, tracked.config, request.num_computed_tokens, tracked.solved):
                self.abandoned += self._repetitions.abandon(request.request_id)
                self._solving.release(request.request_id)
                tracked.pass_point(request)
                tracked.late = tracked.point is None
                hopeless.append(request.request_id)
        return hopeless

    def ends_unsolved(
        self, request: Request, config: KVCompressionConfig, num_computed: int, solved: int = 0
    ) -> bool:
        """Whether a request will have ended before it is solved for: it has a token in each step, at least,
        and a head's shares at most."""
        if not config.matches or config.waits:
            return False
        end = min(request.num_prompt_tokens + request.max_tokens, self._scheduler.max_model_len)
        num_prompt, solving = request.num_prompt_tokens, self._solving
        heads = -(-(solving.num_shares(num_prompt) - solved) // solving.shares_of_head(num_prompt))
        return end - 1 - num_computed < heads + self._repetitions.fewest_steps(request, config)

    def waits(self, request: Request) -> bool:
        """Whether a due request waits for its turn rather than go on raw: where that takes many blocks."""
        manager, name = self._manager, request.request_id
        if name not in self.deferred:
            return False
        if self._tracked[name].config.prefix is not None:  # it is there for that alone
            return True
        peak = manager.peak_blocks.get(name, math.inf) * manager.num_groups
        full = manager.held_blocks(name) >= peak
        return request.is_prefill_chunk or full

    def _for_longest(self) -> list[Request]:
        """The requests that are due, the longest first."""
        due = [request for request in self._scheduler.running if self._tracked.is_due(request)]
        tracked = {request: self._tracked[request.request_id] for request in due}
        for each in tracked.values():
            if each.due_since is None:
                each.due_since = self._scheduler.current_step
        return sorted(due, key=lambda request: tracked[request].due_since)

    def _compact_others(self, due: list[Request], compacted: set[str]) -> list[Job]:
        """Compact who found no room before; whoever was compacted and is due again has its turn next step."""
        is_due = self._tracked.is_due
        again = [request for request in due if is_due(request) and request.request_id in compacted]
        self.deferred |= {request.request_id: 0 for request in again}
        others = (request for request in due if is_due(request) and request not in again)
        return [job for job in map(self._compact, others) if job is not None]

    def _compact(self, request: Request) -> Job | None:
        """Compact a request that is due; None if there is no room yet, or nothing would be freed."""
        block_size, solving = self._manager.block_size, self._solving
        tracked = self._tracked[request.request_id]
        config, point, held = tracked.config, tracked.point, tracked.held
        assert point is not None
        in_page, shared = self._compactions.page_tokens(config), tracked.prefix is not None
        plan = Plan.of(config, point, block_size, held, in_page, shared=shared)
        if plan is None:
            tracked.pass_point(request)
            return None
        if tracked.uncounted is not None:  # the answer is on its way
            return None
        solved = self._turns.is_solved_for(request)
        if solved and tracked.solved < solving.num_shares(point) and not self._turns.has_turn(request):
            return None
        if config.repeats and (solved or not config.matches) and not self._repeated(request, config):
            return None
        job = replace(self._compactions.job(request, tracked, point, plan), solved=solved)
        if solved and not self._solved(tracked, job, plan.kept_blocks):
            return None
        reads = tokens_read(point, block_size, held)
        if not self._compactions.bears(reads):
            self.deferred[request.request_id] = self._compactions.kept_blocks(plan)
            solving.pass_on(request.request_id)
            return None
        swapped = self._compactions.swapped(job, tracked, plan)
        if swapped is None:  # it is tried again at the next step
            if not self._compactions.in_place(plan):
                self.deferred[request.request_id] = self._compactions.kept_blocks(plan)
            solving.pass_on(request.request_id)
            return None
        solving.release(request.request_id)
        self._compactions.count(reads)
        self._repetitions.abandon(request.request_id)  # all is repeated
        tracked.pass_point(request)
        tracked.uncounted = swapped if config.threshold is not None else None
        return swapped

    def _repeated(self, request: Request, config: KVCompressionConfig) -> bool:
        """Whether the model has repeated all of a request's context; goes on with it if not."""
        repeating = self._repetitions.next_part(request, config)
        if repeating is not None:
            self._repeat(repeating)
        return self._repetitions.complete(request.request_id)

    def _solved(self, tracked: Tracked, job: Job, num_blocks: int) -> bool:
        """Whether all is solved for a Job once this step's shares are; goes on with it if not."""
        num_shares = self._solving.num_shares(job.num_tokens)
        if tracked.solved < num_shares:
            most = num_shares if tracked.config.waits else self._solving.shares_of_head(job.num_tokens)
            taken = self._solving.take_shares(min(most, num_shares - tracked.solved))
            shares = range(tracked.solved, tracked.solved + taken)
            if shares:
                self._solving.add(Solve(job, num_blocks, shares, num_shares))
                tracked.solved = shares.stop
        return tracked.solved == num_shares
