"""A vLLM engine in the test's own process, opened up: what it compacts, what it holds, step by step."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from vllm import LLM, RequestOutput, SamplingParams
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.sampling_params import RequestOutputKind

from vllm_kvcompress import KVCompressionConfig
from vllm_kvcompress.config import _as_dict as as_dict
from vllm_kvcompress.paging.pressure import Descent
from vllm_kvcompress.plan import Plan

BLOCK_SIZE = 32
WINDOW = 32  # last prompt tokens that stay raw, and whose queries score the others
SINKS = 4
NUM_BLOCKS = 320
# Given queries `[tokens, heads, D]`, as MLA has them, vLLM 0.32's CPU op rotates by wrong strides. PyTorch
# does not, which has the work where vLLM compiles a model.
ROTATES = dict(compilation_config={"custom_ops": ["-rotary_embedding"]})
# What engines of the models that keep states are started with: what vLLM's CPU build computes right. It fails
# with Mamba-2 and a prefix cache, has gated delta networks in bfloat16 alone.
STATEFUL: dict[str, dict] = {
    "lfm2": ROTATES,
    "granite": dict(enable_prefix_caching=False),
    "qwen3-next": dict(dtype="bfloat16"),
}


def start(model: Path, **overrides) -> LLM:
    """An engine in float32, so that greedy tokens do not hang on what else is in the batch.

    Prompts longer than 512 tokens are computed in chunks. Where compression is configured, the short prompts
    of tests are compacted unless it says something else, and all that are due at once.
    """
    options = dict(
        model=str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        max_num_batched_tokens=512,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=NUM_BLOCKS,
        seed=0,
    )
    options |= overrides
    if compression := (options.get("additional_config") or {}).get("kv_compression"):
        ours = KVCompressionConfig.parse({"min_freed_tokens": 1} | as_dict(compression))
        ours = ours.to_dict() | {"max_compaction_tokens": 1 << 20}
        options["additional_config"] = options["additional_config"] | {"kv_compression": ours}
    _ROPE_DICT.clear()  # an engine before may have had its rotary embeddings computed otherwise
    return LLM(**options)


def sampling(max_tokens: int = 12, compression: str | dict | None = None, **options) -> SamplingParams:
    """Greedy, whole outputs only, every token with the runner-up's log-probability."""
    extra = {} if compression is None else {"extra_args": {"kv_compression": compression}}
    defaults = dict(temperature=0.0, ignore_eos=True, logprobs=2, output_kind=RequestOutputKind.FINAL_ONLY)
    return SamplingParams(max_tokens=max_tokens, **{**defaults, **extra, **options})


@dataclass(frozen=True)
class Compaction:
    """One executed Job.

    Attributes:
        counts: `[L, H]` pages of each head.
        kept: `[pages, N]` token positions in run order.
        num_computed: tokens of the request computed when it was compacted.
    """

    job: object
    counts: Tensor
    kept: Tensor
    num_computed: int

    @property
    def request(self) -> str:
        return external_id(self.job.request_id)

    def positions(self) -> list[list[list[int]]]:
        """Kept positions of every layer and head, as the flat runs are cut by the counts."""
        layers, heads = self.counts.shape
        rows, begin, result = self.kept.tolist(), 0, []
        for layer in range(layers):
            result.append([])
            for head in range(heads):
                end = begin + int(self.counts[layer, head])
                result[-1].append([token for row in rows[begin:end] for token in row])
                begin = end
        # Where a threshold says how much is kept, a GPU's lists have room for all that the budget allows.
        assert begin == len(rows) or self.job.config.threshold is not None
        return result


def same_kept(one, other) -> bool:
    return torch.equal(one.counts, other.counts) and torch.equal(one.kept, other.kept)


def external_id(internal_id: str) -> str:
    """The id that was given to `add`: vLLM adds a suffix, and for n > 1 the sample's index in front."""
    return re.fullmatch(r"(?:\d+_)?(.*)-[0-9a-f]+", internal_id)[1]


class Engine:
    """Drives an in-process vLLM engine.

    Attributes:
        sent: Jobs in the order in which the scheduler attached them to steps.
        late: internal ids of the requests that went on raw past a point, for want of room.
        compactions: what the worker did, in order.
        preemptions: how often the scheduler preempted a request.
        preempted: those requests.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        core = llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.worker = core.model_executor.driver_worker.worker
        self.manager = getattr(self.scheduler, "compacting_manager", None)
        self.managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.outputs: dict[str, RequestOutput] = {}
        self.sent: list = []
        self.late: set[str] = set()
        self.compactions: list[Compaction] = []
        self.preemptions = 0
        self.preempted: set[str] = set()
        self._count = 0
        self._watch_preemptions()
        if self.manager is not None:
            self._watch_jobs()

    def _watch_preemptions(self) -> None:
        preempt = self.scheduler._preempt_request

        def counted(request, *args, **kwargs):
            self.preemptions += 1
            self.preempted.add(external_id(request.request_id))
            return preempt(request, *args, **kwargs)

        self.scheduler._preempt_request = counted

    def _watch_jobs(self) -> None:
        schedule = self.scheduler.schedule

        def recorded(*args, **kwargs):
            computed = {id: r.num_computed_tokens for id, r in self.scheduler.requests.items()}
            output = schedule(*args, **kwargs)
            self._computed = computed
            self.sent += output.kv_compression.jobs
            self.late |= set(output.kv_compression.late)
            return output

        def listen(job, counts, kept):
            job = self.as_sent(job)
            self.check_written_blocks(job)
            self.compactions.append(Compaction(job, counts, kept, self._computed[job.request_id]))

        self.scheduler.schedule = recorded
        self.worker.compactor.listeners.append(listen)

    @property
    def parts(self) -> int:
        """Blocks of attention kernels in one of the scheduler's."""
        return self.worker.compactor.grid.num_blocks // len(self.pool.blocks)

    def as_sent(self, job):
        """A Job in the scheduler's blocks, of one in attention kernels', which must be all of these."""
        parts = self.parts
        if parts == 1:
            return job
        whole = {}
        for name in ("previous", "source", "destination"):
            ids = getattr(job, name)
            whole[name] = tuple(id // parts for id in ids[::parts])
            assert ids == tuple(id * parts + part for id in whole[name] for part in range(parts))
        size = self.manager.block_size // parts
        assert len(job.tail) == -(-(job.num_tokens - job.boundary) // size)
        whole["tail"] = tuple(id // parts for id in job.tail[::parts])
        return replace(job, **whole)

    # ------------------------------------------------------------------ driving

    def add(self, prompt: Sequence[int], params: SamplingParams, request: str | None = None) -> str:
        self._count += 1
        request = request or f"r{self._count}"
        self.llm.llm_engine.add_request(request, {"prompt_token_ids": list(prompt)}, params)
        return request

    def step(self) -> None:
        for output in self.llm.llm_engine.step():
            if output.finished:
                self.outputs[output.request_id] = output

    def finish(self) -> None:
        """Step until no request is left."""
        while self.llm.llm_engine.has_unfinished_requests():
            self.step()

    def run(self, prompt: Sequence[int], params: SamplingParams) -> RequestOutput:
        """One request, alone."""
        return self.run_all([(prompt, params)])[0]

    def run_all(self, requests: Iterable[tuple[Sequence[int], SamplingParams]]) -> list[RequestOutput]:
        """Requests in one batch."""
        ids = [self.add(prompt, params) for prompt, params in requests]
        self.finish()
        return [self.outputs.pop(request) for request in ids]

    def run_fresh(self, prompt: Sequence[int], params: SamplingParams) -> RequestOutput:
        """One request alone on an empty prefix cache."""
        self.forget_prefixes()
        return self.run(prompt, params)

    def forget_prefixes(self) -> None:
        assert self.llm.reset_prefix_cache()

    def step_until_due(self, request: str) -> None:
        """Step until the prompt is computed: the next step is the one that compacts."""
        while (live := self.live(request)).num_computed_tokens < live.num_prompt_tokens:
            self.step()

    def step_until_compacted(self, request: str) -> Compaction:
        while (compaction := self.compaction_of(request)) is None:
            assert self.scheduler.requests, f"{request} ended and was not compacted"
            self.step()
        return compaction

    # ------------------------------------------------------------------ looking

    def live(self, request: str):
        """vLLM's own record of a request that has not ended."""
        (found,) = [r for id, r in self.scheduler.requests.items() if external_id(id) == request]
        return found

    def compaction_of(self, request: str) -> Compaction | None:
        """The request's latest compaction."""
        return next((c for c in reversed(self.compactions) if c.request == request), None)

    @property
    def free(self) -> int:
        return self.pool.get_num_free_blocks()

    def held(self, request: str) -> int:
        """Blocks that a live request holds, counted here: its non-null row entries and its compacted ones."""
        id = self.live(request).request_id
        row = self.manager.req_to_blocks[id]
        return sum(not block.is_null for block in row) + len(self.manager.compacted.get(id, ()))

    @contextmanager
    def squeezed(self, leave: int) -> Iterator[None]:
        """A smaller pool: all but `leave` of the free blocks are taken away meanwhile."""
        taken = self.pool.get_new_blocks(self.free - leave)
        try:
            yield
        finally:
            self.pool.free_blocks(taken)

    @contextmanager
    def replaying(self, request: str, points: list[tuple[int, int, int]]) -> Iterator[None]:
        """Compact a request under pressure where a log says so: at so many tokens, below a boundary, into so
        many blocks."""
        scheduler, left = self.scheduler, list(points)
        manager = scheduler.kv_cache_manager
        allocate, lookahead = manager.allocate_slots, scheduler._reserve_prefill_lookahead

        def compacted(asking, *args, **kwargs):
            if left and asking is self.live(request) and scheduler._tracked.computed(asking) == left[0][0]:
                point, boundary, kept = left.pop(0)
                plan = Plan(boundary, boundary // self.manager.block_size, kept)
                descent = Descent(asking, point, 0, plan, 1000)
                assert scheduler._yielding.descend(descent, scheduler._tracked[asking.request_id])
            return allocate(asking, *args, **kwargs)

        def to_the_point(asking, computed, num_tokens):
            if asking is self.live(request) and left and computed < left[0][0]:
                num_tokens = min(num_tokens, left[0][0] - computed)
            return lookahead(asking, computed, num_tokens)

        manager.allocate_slots, scheduler._reserve_prefill_lookahead = compacted, to_the_point
        try:
            yield
        finally:
            manager.allocate_slots, scheduler._reserve_prefill_lookahead = allocate, lookahead
        assert not left, "the request passed a point of the log by"

    # ------------------------------------------------------------------ what must hold at any time

    def check_written_blocks(self, job) -> None:
        """No block that a Job writes can be read by another request or through the prefix cache."""
        for id in job.destination:
            block = self.pool.blocks[id]
            assert block.ref_cnt == 1 and block.block_hash is None
            assert not any(block is other for row in self.rows() for other in row)

    def rows(self) -> Iterator[list]:
        """Every request's blocks by position, of every cache group."""
        for manager in self.managers:
            yield from manager.req_to_blocks.values()

    def check_accounts(self) -> None:
        """Every block is free or held; references are counted right."""
        references: dict[int, int] = {}
        for row in self.rows():
            for block in row:
                if not block.is_null:
                    references[block.block_id] = references.get(block.block_id, 0) + 1
        for prefix in self.scheduler._prefixes:
            for block in (block for row in prefix.tails + prefix.beside for block in row):
                references[block.block_id] = references.get(block.block_id, 0) + 1
        shared = [prefix.compacted for prefix in self.scheduler._prefixes]
        taken_over = self.scheduler._prefixes or self.scheduler._attaching.users
        for blocks in (*self.manager.compacted.values(), *shared):
            for block in blocks:
                assert block.block_hash is None and (taken_over or block.block_id not in references)
                references[block.block_id] = references.get(block.block_id, 0) + 1
        for id, count in references.items():
            assert self.pool.blocks[id].ref_cnt == count
        assert self.pool.get_num_free_blocks() == sum(
            block.ref_cnt == 0 and not block.is_null for block in self.pool.blocks
        )

    def check_nothing_left(self) -> None:
        """No trace of any request, once a further request has told the worker of those that ended."""
        self.run([1, 2, 3], sampling(1, "off"))
        self.step()  # lets the worker hear of that one too
        assert not self.scheduler.requests and not self.scheduler.running and not self.scheduler.waiting
        assert not list(self.rows())
        if self.manager is not None:
            assert not self.scheduler._tracked
            assert not self.scheduler._repetitions._progress and not self.scheduler._repetitions._announced
            assert not self.manager.peak_blocks and not self.manager.borrowers
            assert not self.manager.compacted
            assert not self.manager.attaching and not self.scheduler._attaching.users
            state = self.worker.compression
            assert not state.tables and len(state.observer) == 0
            assert set(state.prefixes) == {prefix.id for prefix in self.scheduler._prefixes}


def tokens(output: RequestOutput, sample: int = 0) -> list[int]:
    return list(output.outputs[sample].token_ids)


def chosen_logprobs(output: RequestOutput) -> list[float]:
    """Of the tokens that were chosen."""
    chosen = zip(tokens(output), output.outputs[0].logprobs, strict=True)
    return [top[token].logprob for token, top in chosen]


def exact(output) -> list:
    """Tokens and log-probabilities to the last bit."""
    return [sorted((token, lp.logprob) for token, lp in top.items()) for top in output.outputs[0].logprobs]


def first_difference(
    one: RequestOutput, other: RequestOutput, sample: int = 0, gap: float = 1e-3
) -> int | None:
    """Index of the first token in which two greedy outputs differ; None if they are the same.

    Raises:
        AssertionError: the difference is more than rounding: where they part, one of them preferred its token
            by more than `gap` in log-probability.
    """
    a, b = tokens(one, sample), tokens(other)
    assert len(a) == len(b)
    for index, (left, right) in enumerate(zip(a, b, strict=True)):
        if left != right:
            for output, which in ((one, sample), (other, 0)):
                ranked = sorted(
                    (lp.logprob for lp in output.outputs[which].logprobs[index].values()), reverse=True
                )
                assert ranked[0] - ranked[1] < gap, f"token {index} of {len(a)}: {a} != {b}"
            return index
    return None
