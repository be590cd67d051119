"""Our schedulers driven by a worker that computes nothing, but knows what every block holds.

A key stands for what attention would write for a token: a hash of the token, all before it, and every
compaction that they were computed on. Sampling is a hash too. So an answer changes with whatever would
change a model's, and a block that holds anything but what its reader expects is found where it is read.
"""

import functools
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.config import _as_dict as as_dict
from vllm_kvcompress.paging import compactions, rings, scheduler, yielding
from vllm_kvcompress.paging.groups import GROUP
from vllm_kvcompress.paging.job import CompressionReport, CompressionStep, Job, Loaded, Solve
from vllm_kvcompress.paging.scheduler import AsyncCompressionScheduler, CompressionScheduler
from vllm_kvcompress.paging.spec import CompactableSpec
from vllm_kvcompress.plan import SPARE_QUERIES
from vllm_kvcompress.plugin import _group

BLOCK = 16
VOCABULARY = 1000
SHORT_PROMPTS = {"min_freed_tokens": 1}  # are compacted, unless a test says something else
ALL_AT_ONCE = 1 << 20  # tokens: whoever is due is compacted in that step
MOST_STEPS = 5000

Key = int


def on_a_gpu(monkeypatch) -> None:
    """Schedule as for a GPU."""
    for module in (compactions, rings, scheduler, yielding):
        monkeypatch.setattr(module, "current_platform", SimpleNamespace(is_cpu=lambda: False))


@functools.cache
def _model_folder() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix="simulated-model-")
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=1 << 16,
    )
    (Path(folder.name) / "config.json").write_text(json.dumps(config))
    return folder


@functools.cache
def _model_config(max_model_len: int) -> ModelConfig:
    init_none_hash(sha256)
    return ModelConfig(
        model=_model_folder().name, skip_tokenizer_init=True, max_model_len=max_model_len, dtype="float32"
    )


def configured(
    compression: str,
    num_blocks: int,
    *,
    max_model_len: int = 4096,
    max_num_seqs: int = 16,
    max_num_batched_tokens: int = 256,
    num_drafts: int = 0,
    watermark: float = 0.0,
    policy: str = "fcfs",
    asynchronous: bool = False,
    data_parallel_size: int = 1,
    prefix_caching: bool = True,
    max_compaction_tokens: int | None = ALL_AT_ONCE,
) -> VllmConfig:
    """What an engine core's configuration is once its cache is made."""
    own = KVCompressionConfig.parse(SHORT_PROMPTS | as_dict(compression)).to_dict()
    ours = own | {"max_compaction_tokens": max_compaction_tokens}
    model = _model_config(max_model_len)
    parallel = ParallelConfig(data_parallel_size=data_parallel_size)
    speculative = None
    if num_drafts:
        speculative = SpeculativeConfig(
            method="ngram_gpu" if asynchronous else "ngram",
            num_speculative_tokens=num_drafts,
            prompt_lookup_max=3,
            target_model_config=model,
            target_parallel_config=parallel,
        )
    vllm_config = VllmConfig(
        model_config=model,
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=prefix_caching),
        scheduler_config=SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            is_encoder_decoder=False,
            watermark=watermark,
            policy=policy,
            async_scheduling=asynchronous,
        ),
        parallel_config=parallel,
        speculative_config=speculative,
        device_config=DeviceConfig("cpu"),
        additional_config={"kv_compression": ours},
    )
    vllm_config.cache_config.num_gpu_blocks = num_blocks
    return vllm_config


@dataclass
class Row:
    """What the worker knows of a request.

    Attributes:
        tokens: its prompt and all it sampled.
        blocks: by position, of each group; stale are those below `boundary` of the groups that are compacted,
            and those that others have moved on from.
        keys: of its computed tokens.
        destination: its compacted blocks.
        boundary: first raw token.
        history: a hash of its compactions.
        compacted_by: the request whose Job filled `destination`.
        drafts: tokens to verify next.
    """

    tokens: list[int]
    blocks: list[list[int]]
    keys: list[Key]
    destination: tuple[int, ...] = ()
    boundary: int = 0
    history: int = 0
    compacted_by: str = ""
    drafts: list[int] = field(default_factory=list)

    def key(self, position: int, token: int, before: Sequence[Key], history: int | None = None) -> Key:
        previous = before[position - 1] if position else 0
        return hash((previous, token, self.history if history is None else history))


@dataclass
class Record:
    """Positions of the queries that are kept of a request.

    Attributes:
        ring: slot to position.
        capacity: of the ring; 0 for none.
        seen: how many queries from the first token on were observed without a gap.
    """

    capacity: int
    ring: dict[int, int] = field(default_factory=dict)
    seen: int = 0
    paused: bool = False

    def resume(self, num_tokens: int) -> None:
        """Go on, behind the queries of tokens that were computed meanwhile, which nobody kept."""
        if self.paused:
            self.paused, self.seen = False, num_tokens

    def note(self, position: int) -> None:
        if self.paused:
            return
        if self.capacity:
            self.ring[position % self.capacity] = position
        if position <= self.seen:
            self.seen = max(self.seen, position + 1)


class FakeWorker:
    """Follows the scheduler's word and asserts that every block is what its reader takes it for."""

    def __init__(
        self, scheduler, num_compacted: int = 1, window: int = 0, chunk: int = 0, seed: int = 0
    ) -> None:
        self.scheduler = scheduler
        self.num_compacted = num_compacted  # groups: the first ones
        self.window, self.chunk = window, chunk  # tokens of the other group's, one of them; 0 without one
        self.rows: dict[str, Row] = {}
        self.prefixes: dict[str, Row] = {}  # what their requests were, up to the end of the prefix
        self.attached: dict[str, int] = {}  # requests to the tokens that they took from a prefix
        self.read: dict[str, Row] = {}  # prefixes that are to be loaded
        self.loaded = 0  # prefixes that were
        self.records: dict[str, Record] = {}
        self.repeating: dict[str, object] = {}
        self.repeated: dict[str, set[int]] = {}  # owner to the positions that were repeated
        self.blocks: dict[int, dict[int, tuple[int, Key]]] = {}  # block to slot to group and key
        self.compacted: dict[int, tuple[str, int]] = {}  # block to (request, history)
        self.jobs: list[Job] = []
        self.late: set[str] = set()  # requests that went on raw past a point
        self.solved: dict[str, list[Solve]] = {}  # of requests that are not compacted yet
        self.share_seconds = 0.01  # that it says a share of a solve takes
        self._random = random.Random(seed)

    # ------------------------------------------------------------------ one step

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        step: CompressionStep = output.kv_compression
        for prefix, name in step.kept.items():
            self._keep(prefix, name)
        for name in (*step.released, *output.finished_req_ids):
            self._forget(name)
        loaded = [self._load(each) for each in step.loaded]
        for name in output.preempted_req_ids or ():
            self.rows[name].blocks, self.rows[name].keys = [], []
        attaching = {name: self.prefixes[prefix] for name, prefix in step.attached.items()}
        for prefix in step.dropped:
            del self.prefixes[prefix]
        held = [*self.prefixes.values(), *attaching.values()]
        for row in loaded:
            if any(row is other for other in held):
                self._write_loaded(row)
        for name in step.unsolved:
            assert name in self.rows
            self.solved.pop(name, None), self.repeated.pop(name, None)
            self.records[name].resume(len(self.rows[name].keys))
        for solve in step.solves:
            self._solve(solve)
        kept_blocks = {}
        for job in step.jobs:
            kept = self._run(job)
            if job.config.threshold is not None:
                kept_blocks[job.request_id] = kept
        self.late |= set(step.late)
        for name in step.late:
            if name in self.records:
                self.records[name].paused = True
        for observation in step.observations:
            policy = observation.config.build_policy()
            self.records[observation.request_id] = Record(
                policy.window + SPARE_QUERIES if policy.window else 0
            )
        for repetition in step.repetitions:
            self.repeating[repetition.request_id] = repetition
        self._update_rows(output, attaching)
        running = {request.request_id for request in self.scheduler.running}
        assert self.records.keys() <= running, "queries are kept whose memory the scheduler does not count"
        self._check_owners()
        sampled = {name: self._forward(name, n, output) for name, n in output.num_scheduled_tokens.items()}
        names = list(sampled)
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[sampled[name] for name in names],
        )
        if kept_blocks or step.solves:
            result.kv_compression = CompressionReport(
                kept_blocks, self.share_seconds if step.solves else None
            )
        return result

    def take_drafts(self) -> DraftTokenIds:
        drafting = {name: row.drafts for name, row in self.rows.items() if row.drafts}
        return DraftTokenIds(list(drafting), list(drafting.values()))

    def _forget(self, name: str) -> None:
        row = self.rows.get(name)
        if row is not None:  # (its tokens are kept: a preempted request comes back with them)
            row.destination, row.boundary, row.history, row.blocks, row.keys = (), 0, 0, [], []
        self.records.pop(name, None)
        self.repeating.pop(name, None)
        self.solved.pop(name, None)

    def _keep(self, prefix: str, name: str) -> None:
        row = self.rows[name]
        assert row.destination, "what is kept was not compacted"
        kept = next((each for each in self.scheduler._prefixes if each.id == prefix), None)
        if kept is None:  # and dropped again
            self.prefixes[prefix] = Row([], [], [])
            return
        end = len(kept.hashes) * BLOCK
        assert end <= len(row.keys), "a prefix has tokens that are not computed"
        assert tuple(block.block_id for block in kept.compacted) == row.destination
        held = [[block.block_id for block in own] for own in kept.tails + kept.beside]
        seen = self._seen(row.blocks, row.boundary, end)
        assert len(kept.tails) == self.num_compacted and held == seen
        self.prefixes[prefix] = replace(
            row, tokens=row.tokens[:end], blocks=self._placed(seen, end), keys=row.keys[:end]
        )

    def _load(self, loaded: Loaded) -> Row:
        """A prefix that was read is in these blocks, once it is written there."""
        saved = self.read.pop(loaded.prefix_id)
        seen, end = [*map(list, loaded.tails), *map(list, loaded.beside)], len(saved.keys)
        before = self._seen(saved.blocks, saved.boundary, end)
        assert [*map(len, seen)] == [*map(len, before)] and len(loaded.tails) == self.num_compacted
        assert len(loaded.destination) == len(saved.destination)
        row = replace(saved, destination=loaded.destination, blocks=self._placed(seen, end))
        self.prefixes[loaded.prefix_id] = row
        self.loaded += 1
        return row

    def _write_loaded(self, row: Row) -> None:
        others = (each for each in (*self.rows.values(), *self.prefixes.values()) if each is not row)
        taken = {block for each in others for block in self._readable_of(each)}
        assert not taken & self._readable_of(row), "a prefix is loaded into what somebody reads"
        for block in row.destination:
            self.blocks.pop(block, None)
            self.compacted[block] = (row.compacted_by, row.history)
        for group, blocks in enumerate(row.blocks):
            for position, key in enumerate(row.keys):
                if block := blocks[position // BLOCK]:
                    self.compacted.pop(block, None)
                    self.blocks.setdefault(block, {})[position % BLOCK] = group, key

    def _attach(self, name: str, prefix: Row, computed: int) -> None:
        row = self.rows[name]
        assert row.tokens[:computed] == prefix.tokens[:computed], "a prefix is of other tokens"
        assert prefix.boundary <= computed <= len(prefix.keys) and computed % BLOCK == 0
        assert len(row.blocks) == self.num_compacted or computed == len(prefix.keys)
        assert [own[: computed // BLOCK] for own in row.blocks] == [
            own[: computed // BLOCK] for own in prefix.blocks
        ]
        row.keys, row.destination, row.boundary = prefix.keys[:computed], prefix.destination, prefix.boundary
        row.history, row.compacted_by = prefix.history, prefix.compacted_by
        self.attached[name] = computed

    def _update_rows(self, output: SchedulerOutput, attaching: dict[str, Row]) -> None:
        for new in output.scheduled_new_reqs:
            row = self.rows.get(new.req_id)
            computed = new.num_computed_tokens
            tokens = list(new.prompt_token_ids)
            keys = row.keys[:computed] if row is not None else []
            self.rows[new.req_id] = row = Row(tokens, [list(own) for own in new.block_ids], keys)
            if new.req_id in attaching:
                self._attach(new.req_id, attaching.pop(new.req_id), computed)
            self._read_hit(row, computed)
        cached = output.scheduled_cached_reqs
        for name, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            row = self.rows[name]
            if name in cached.resumed_req_ids:
                assert not row.destination, "a request came back, but its compacted pages were not released"
                row.blocks, row.keys = [list(own) for own in blocks], []
                if name in attaching:
                    self._attach(name, attaching.pop(name), computed)
                self._read_hit(row, computed)
            else:
                for own, more in zip(row.blocks, blocks or (), strict=False):
                    own += more
        assert not attaching, "a request is attached that does not start"

    def _read_hit(self, row: Row, computed: int) -> None:
        """Keys that are taken from the prefix cache were computed on raw context."""
        for position in range(len(row.keys), computed):
            row.keys.append(row.key(position, row.tokens[position], row.keys, 0))

    def _forward(self, name: str, num_tokens: int, output: SchedulerOutput) -> list[int]:
        row = self.rows[name]
        drafts = list(output.scheduled_spec_decode_tokens.get(name, ()))
        if drafts:
            given = row.drafts + [-1] * len(drafts)
            drafts = [draft if draft >= 0 else known for draft, known in zip(drafts, given, strict=False)]
        begin = len(row.keys)
        tokens = row.tokens[begin : begin + num_tokens - len(drafts)]
        assert len(tokens) == num_tokens - len(drafts), "tokens were scheduled that nobody knows"
        self._check_reads(name, row)
        keys = list(row.keys)
        for token in tokens + drafts:
            position = len(keys)
            keys.append(row.key(position, token, keys))
            self._write(name, row, position, keys[-1])
        end = begin + len(tokens)
        self._observe(name, row, begin, end, len(keys))
        row.drafts = []
        if end < len(row.tokens):
            assert not drafts
            row.keys = keys
            return []
        sampled = [_sample(keys[end - 1])]
        for index, draft in enumerate(drafts):
            if draft != sampled[-1]:
                break
            sampled.append(_sample(keys[end + index]))
        row.keys = keys[: end + len(sampled) - 1]
        row.tokens += sampled
        row.drafts = self._draft(row)
        return sampled

    def _draft(self, row: Row) -> list[int]:
        keys, drafts = list(row.keys), []
        for position in range(len(keys), len(keys) + self.scheduler.num_spec_tokens):
            token = drafts[-1] if drafts else row.tokens[-1]
            keys.append(row.key(position, token, keys))
            right = _sample(keys[-1])
            drafts.append(right if self._random.random() < 0.7 else (right + 1) % VOCABULARY)
        return drafts

    def _observe(self, name: str, row: Row, begin: int, end: int, last: int) -> None:
        """Tokens `[begin, end)` and drafts `[end, last)` were computed."""
        for position in range(begin, last):
            if name in self.records:
                self.records[name].note(position)
        repetition = self.repeating.get(name)
        if repetition is not None and end == len(row.tokens):
            part = self.rows[repetition.owner_id].tokens[repetition.begin : repetition.end]
            tracked = self.scheduler._tracked[repetition.owner_id]
            if not tracked.config.build_policy().study_tokens:
                assert row.tokens[-len(part) :] == part
            positions = range(repetition.begin, repetition.end)
            self.repeated.setdefault(repetition.owner_id, set()).update(positions)

    # ------------------------------------------------------------------ compaction

    def _solve(self, solve: Solve) -> None:
        job, name = solve.job, solve.job.request_id
        row, before = self.rows[name], self.solved.setdefault(name, [])
        assert not row.destination and not job.destination and solve.shares and job.solved
        assert solve.shares.start == (before[-1].shares.stop if before else 0), "shares come in order"
        assert solve.shares.stop <= solve.num_shares and all(job == other.job for other in before)
        for group, raw in enumerate(job.raw):
            self._check_keys(group, raw, row, 0, job.num_tokens)
        if job.config.repeats:
            assert self.repeated[name] == set(range(job.num_tokens)), "it is solved for what is not repeated"
        before.append(solve)

    def _run(self, job: Job) -> int:
        """Compact a request; into how many blocks, which with a threshold depends on what it holds."""
        row, blocks = self.rows[job.request_id], self.scheduler.kv_cache_manager.block_pool.blocks
        assert job.num_tokens <= len(row.keys), "a Job looks at tokens that are not computed"
        assert job.previous == row.destination and job.previous_boundary == row.boundary
        assert job.boundary % BLOCK == 0 and job.boundary >= job.previous_boundary
        assert job.boundary > job.previous_boundary or len(job.destination) < len(job.previous)
        assert job.boundary <= job.num_tokens
        sources, tails = (job.source, *job.other_sources), (job.tail, *job.other_tails)
        assert len(sources) == len(tails) == self.num_compacted
        assert {len(own) for own in sources} == {(job.boundary - job.previous_boundary) // BLOCK}
        assert {len(own) for own in tails} == {-(-(job.num_tokens - job.boundary) // BLOCK)}
        for block in job.previous:
            assert self.compacted[block] == (row.compacted_by, row.history)
        for group, raw in enumerate(job.raw):
            self._check_keys(group, raw, row, job.previous_boundary, job.num_tokens)
        self._check_queries(job, row)
        assert len(set(job.destination)) == len(job.destination) > 0 and 0 not in job.destination
        for block in job.destination:
            assert blocks[block].block_hash is None, "the prefix cache can read a destination"
            for name in self.rows:
                if name != job.request_id and block in self._readable(name):
                    raise AssertionError(f"{name} can read a destination of {job.request_id}")
            for name, prefix in self.prefixes.items():
                assert block not in self._readable_of(prefix), f"{name} has a destination of {job.request_id}"
        assert not any(set(tail) & set(job.destination) for tail in tails)
        if job.solved:
            solves = self.solved.pop(job.request_id)
            assert solves[-1].shares.stop == solves[-1].num_shares, "it is not all solved"
            assert (
                replace(job, destination=()) == solves[0].job and len(job.destination) == solves[0].num_blocks
            )
        kept, rest = divmod(len(job.destination), self.num_compacted)
        assert not rest
        if job.config.threshold is not None:
            kept = 1 + hash((row.history, row.keys[job.num_tokens - 1])) % kept
        row.history = hash((row.history, job.boundary, job.num_tokens, kept))
        row.destination, row.boundary = job.destination[: kept * self.num_compacted], job.boundary
        row.compacted_by = job.request_id
        for block in job.destination:  # also what is not kept may be written
            self.blocks.pop(block, None)
            self.compacted[block] = (job.request_id, row.history)
        if not job.config.compacts_again:
            self.records.pop(job.request_id, None)
        elif job.request_id in self.records:
            self.records[job.request_id].resume(len(row.keys))
        self.jobs.append(job)
        return kept

    def _check_queries(self, job: Job, row: Row) -> None:
        policy, record = job.config.build_policy(), self.records.get(job.request_id)
        assert (record is not None) == job.config.observes
        if policy.window and not job.solved:
            wanted = set(range(job.num_tokens - policy.window, job.num_tokens))
            assert wanted <= set(record.ring.values()), "queries of the window are gone"
        if policy.accumulates:
            assert record.seen >= job.num_tokens, "the policy has not seen every query"
        if policy.repeats and (job.solved or not policy.matches):
            assert self.repeated.pop(job.request_id) == set(range(job.num_tokens))

    # ------------------------------------------------------------------ blocks

    def _readable(self, name: str) -> set[int]:
        """Blocks that a request may read from now on."""
        return self._readable_of(self.rows[name])

    def _readable_of(self, row: Row) -> set[int]:
        if not row.keys:
            return set()
        seen = self._seen(row.blocks, row.boundary, len(row.keys))
        return {*row.destination, *(block for own in seen for block in own)}

    def _seen(self, blocks: Sequence[list[int]], boundary: int, end: int) -> list[list[int]]:
        """Of blocks by position, of each group, those that are read from a token on, of whose row is raw from
        another on."""
        first = [boundary // BLOCK] * self.num_compacted + [self._first_seen(end) // BLOCK]
        return [own[begin : -(-end // BLOCK)] for own, begin in zip(blocks, first, strict=False)]

    @staticmethod
    def _placed(seen: list[list[int]], end: int) -> list[list[int]]:
        """These blocks by position, the last ones of a row of whole blocks."""
        return [[0] * (end // BLOCK - len(own)) + own for own in seen]

    def _first_seen(self, num_tokens: int) -> int:
        """The first token that is in the window, or in the chunk, of one behind so many."""
        if self.chunk:
            return num_tokens // self.chunk * self.chunk
        return max(num_tokens - self.window + 1, 0)

    def _check_reads(self, name: str, row: Row) -> None:
        for block in row.destination:
            written = self.compacted.get(block)
            assert written == (row.compacted_by, row.history), "compacted pages were overwritten"
        end = len(row.keys)
        for group, seen in enumerate(self._seen(row.blocks, row.boundary, end)):
            if end:
                self._check_keys(group, seen, row, (-(-end // BLOCK) - len(seen)) * BLOCK, end)

    def _check_keys(self, group: int, blocks: Sequence[int], row: Row, begin: int, end: int) -> None:
        for position in range(begin, end):
            block = blocks[(position - begin) // BLOCK]
            held = self.blocks.get(block, {}).get(position % BLOCK)
            wanted = group, row.keys[position]
            assert held == wanted, f"block {block} does not hold token {position} of group {group}"

    def _write(self, name: str, row: Row, position: int, key: Key) -> None:
        assert position >= row.boundary
        for group, own in enumerate(row.blocks):
            self._write_into(own[position // BLOCK], name, position, group, key)

    def _write_into(self, block: int, name: str, position: int, group: int, key: Key) -> None:
        assert block != 0, "a token was written into the null block"
        slots = self.blocks.setdefault(block, {})
        if slots.get(position % BLOCK) == (group, key):
            return
        for prefix, kept in self.prefixes.items():
            assert block not in self._readable_of(kept), f"{name} writes a block of {prefix}"
        for other, reader in self.rows.items():
            if other == name or block not in self._readable(other):
                continue
            # vLLM lets a request hit blocks that another one computes in the same step.
            assert block not in reader.destination, "compacted pages are written"
            end = len(reader.keys)
            seen = self._seen(reader.blocks, reader.boundary, end)
            own = next(own for own in seen if block in own)
            read = reader.keys[(-(-end // BLOCK) - len(own) + own.index(block)) * BLOCK :][:BLOCK]
            assert read[position % BLOCK :][:1] == [key], f"{name} writes a block that {other} can read"
        self.compacted.pop(block, None)
        slots[position % BLOCK] = group, key

    def _check_owners(self) -> None:
        """No live request reads a block that is free."""
        blocks = self.scheduler.kv_cache_manager.block_pool.blocks
        for request in self.scheduler.running:
            for block in self._readable(request.request_id):
                assert blocks[block].ref_cnt > 0, f"{request.request_id} reads block {block}, which is free"
        for name, prefix in self.prefixes.items():
            for block in self._readable_of(prefix):
                assert blocks[block].ref_cnt > 0, f"{name} has block {block}, which is free"


def _sample(key: Key) -> int:
    return 2 + hash((key, 1)) % (VOCABULARY - 2)


class Simulation:
    """An engine core's scheduler and a fake worker, step by step.

    Attributes:
        answers: request to its output tokens, also of requests that have ended.
        told: request that has ended to what its response carries beside them.
    """

    def __init__(
        self,
        compression: str = "snapkv:budget=0.25",
        num_blocks: int = 200,
        log_stats: bool = False,
        window: int = 0,
        chunk: int = 0,
        num_compacted: int = 1,
        **options,
    ) -> None:
        vllm_config = configured(compression, num_blocks, **options)
        shape = dict(block_size=BLOCK, num_kv_heads=2, head_size=16, dtype=torch.float32)
        groups = [
            KVCacheGroupSpec([f"layers.{number}"], CompactableSpec(**shape))
            for number in range(num_compacted)
        ]
        if window:
            spec = SlidingWindowSpec(**shape, sliding_window=window)
            groups.append(KVCacheGroupSpec(["layers.9"], spec))
        if chunk:
            spec = ChunkedLocalAttentionSpec(**shape, attention_chunk_size=chunk)
            groups.append(KVCacheGroupSpec(["layers.9"], spec))
        kv_cache_config = KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)
        vllm_config.additional_config[GROUP] = _group(kv_cache_config, vllm_config)
        kind = AsyncCompressionScheduler if options.get("asynchronous") else CompressionScheduler
        self.scheduler = kind(
            vllm_config=vllm_config,
            kv_cache_config=kv_cache_config,
            structured_output_manager=StructuredOutputManager(vllm_config),
            block_size=BLOCK,
            log_stats=log_stats,
        )
        self.worker = FakeWorker(self.scheduler, num_compacted, window, chunk)
        self.manager = self.scheduler.compacting_manager
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.free_at_start = self.free
        self.answers: dict[str, list[int]] = {}
        self.told: dict[str, dict] = {}
        self.steps = 0
        self.preempted: list[str] = []
        self.last: SchedulerOutput | None = None
        self._in_flight: list[tuple[SchedulerOutput, ModelRunnerOutput]] = []
        self._depth = 2 if options.get("asynchronous") else 1
        self._hasher = get_request_block_hasher(BLOCK, sha256)

    # ------------------------------------------------------------------ driving

    def add(
        self,
        prompt: Sequence[int],
        compression: str | None = None,
        max_tokens: int = 8,
        name: str | None = None,
        *,
        resumable: bool = False,
        priority: int = 0,
        **fields,
    ) -> str:
        name = name or f"r{len(self.answers)}"
        extra = None if compression is None else {"kv_compression": compression}
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, extra_args=extra)
        request = Request(
            name,
            list(prompt),
            params,
            None,
            block_hasher=self._hasher,
            resumable=resumable,
            priority=priority,
            **{"arrival_time": float(len(self.answers))} | fields,
        )
        self.answers.setdefault(name, [])
        self.scheduler.add_request(request)
        return name

    def close(self, name: str) -> None:
        """The last part of a streaming session, which is not resumable, as vLLM's front end sends it."""
        self.scheduler.add_request(Request(name, prompt_of(300, 3), SamplingParams(max_tokens=9), None))

    def step(self) -> SchedulerOutput:
        """One schedule, and the output of the oldest step in flight once enough are."""
        self.steps += 1
        assert self.steps < MOST_STEPS, "the requests of this test should have ended by now"
        output = self.scheduler.schedule()
        self.last = output
        self.preempted += output.preempted_req_ids or ()
        self._in_flight.append((output, self.worker.execute(output)))
        if len(self._in_flight) == self._depth or not output.num_scheduled_tokens:
            self._deliver()
        self.check_accounts()
        return output

    def _deliver(self) -> None:
        output, answered = self._in_flight.pop(0)
        for outputs in self.scheduler.update_from_output(output, answered).values():
            for each in outputs.outputs:
                self.answers.setdefault(each.request_id, []).extend(each.new_token_ids)
                if each.finish_reason is not None:
                    self.told[each.request_id] = (each.kv_transfer_params or {}).get("kv_compression", {})
        if self.scheduler.num_spec_tokens and self._depth == 1 and output.num_scheduled_tokens:
            self.scheduler.update_draft_token_ids(self.worker.take_drafts())

    def finish(self, *names: str) -> None:
        """Step until these requests, or all, have ended; fail if nothing goes on."""
        idle = 0
        while any(name in self.scheduler.requests for name in names or self._unfinished()):
            output = self.step()
            told = output.kv_compression
            idle = 0 if output.num_scheduled_tokens or told.jobs or told.solves else idle + 1
            assert idle < 5, "requests wait while nothing runs"

    def _unfinished(self) -> list[str]:
        waiting = RequestStatus.WAITING_FOR_STREAMING_REQ
        return [name for name, r in self.scheduler.requests.items() if r.status != waiting]

    def run(self, prompt: Sequence[int], compression: str | None = None, max_tokens: int = 8) -> list[int]:
        """One request, alone, to its end."""
        name = self.add(prompt, compression, max_tokens)
        self.finish(name)
        return self.answers[name]

    def step_until_due(self, name: str) -> None:
        while not self.scheduler._tracked.is_due(self.scheduler.requests[name]):
            self.step()

    def step_until_compacted(self, name: str) -> Job:
        while not (jobs := self.jobs_of(name)):
            self.step()
        return jobs[-1]

    def abort(self, *names: str) -> None:
        self.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)

    def preempt(self, name: str) -> None:
        """As a full pool would, between two steps."""
        request = self.scheduler.requests[name]
        self.scheduler.running.remove(request)
        self.scheduler._preempt_request(request, 0.0)

    def saved(self, name: str) -> tuple[dict, list[int], Row] | None:
        """What a file has of a prefix: its description, its tokens, and what the worker knows of it; None if
        that has not heard of it."""
        leaving = self.scheduler.leaving
        prefix, names = leaving.to_save(name, None)
        known = self.worker.prefixes | self.worker.rows
        row = next((known[each] for each in names if each in known), None)
        if row is None:
            return None
        end = len(prefix.tokens)
        row = replace(row, tokens=row.tokens[:end], keys=row.keys[:end])
        return leaving.describe(prefix), list(prefix.tokens), row

    def load(self, about: dict, tokens: list[int], row: Row) -> bool:
        """As an engine core does; whether there was room and a name for it."""
        leaving = self.scheduler.leaving
        name = leaving.new_id()
        request = Request(
            name,
            tokens,
            SamplingParams(max_tokens=1),
            None,
            cache_salt=about["salt"],
            block_hasher=self._hasher,
        )
        self.worker.read[name] = row
        try:
            leaving.load(about, request, name)
        except KVCompressionError:
            del self.worker.read[name]
            return False
        return True

    # ------------------------------------------------------------------ looking

    @property
    def free(self) -> int:
        return self.pool.get_num_free_blocks()

    @property
    def jobs(self) -> list[Job]:
        return self.worker.jobs

    def jobs_of(self, name: str) -> list[Job]:
        return [job for job in self.jobs if job.request_id == name]

    def computed(self, name: str) -> int:
        return self.scheduler.requests[name].num_computed_tokens

    def held(self, name: str) -> int:
        row = self.manager.req_to_blocks[name]
        return sum(not block.is_null for block in row) + len(self.manager.compacted.get(name, ()))

    def check_accounts(self) -> None:
        """Every reference of every block is that of a row, a compaction or a prefix."""
        references: dict[int, int] = {}
        prefixes = [prefix.blocks for prefix in self.scheduler._prefixes]
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        rows = [row for manager in managers for row in manager.req_to_blocks.values()]
        for row in (*rows, *self.manager.compacted.values(), *prefixes):
            for block in row:
                if not block.is_null:
                    references[block.block_id] = references.get(block.block_id, 0) + 1
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == references.get(block.block_id, 0)

    def check_nothing_left(self) -> None:
        scheduler = self.scheduler
        while self._in_flight:
            self._deliver()
        assert not scheduler.requests and not scheduler.running
        assert not scheduler.waiting and not scheduler.kv_holding_waiting
        assert not scheduler._tracked and not scheduler._due.abandoned
        assert not scheduler._repetitions._progress and not scheduler._repetitions._announced
        assert not self.manager.peak_blocks and not self.manager.borrowers
        assert not self.manager.compacted and not self.manager.req_to_blocks
        assert (
            not scheduler._attaching.users and not scheduler._attaching.configs and not self.manager.attaching
        )
        for prefix in list(scheduler._prefixes):
            assert not prefix.users
            scheduler._prefixes.drop(prefix)
        self.step()  # the worker hears of the last ones
        assert not self.worker.prefixes and not self.worker.read
        assert not self.worker.records and not self.worker.repeating and not self.worker.solved
        assert not self.scheduler._solving._solves
        assert self.free == self.free_at_start


def prompt_of(num_tokens: int, seed: int = 0) -> list[int]:
    """Random tokens; those of one seed are prefixes of each other."""
    random_ = random.Random(seed)
    return [random_.randrange(2, VOCABULARY) for _ in range(num_tokens)]
