"""What operators see of compression, counted where it is decided."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from vllm_kvcompress.paging.job import Job
from vllm_kvcompress.plan import Plan

CARRIER = "kv_compression"  # under which they travel beside vLLM's own
ID_LENGTH = 64  # of a request's name, as it is shown
TAKEN = "the name is taken; delete the prefix that has it, or use another one"
MOST_REQUESTS = 256  # of one engine that are described one by one; as many prefixes without a name


@dataclass
class CompressionStats:
    """Counts since the last report, and how things stand.

    Attributes:
        compactions: how many there were.
        compacted_requests: how many of them were a request's first, also its first since it was preempted.
        freed_blocks: blocks that they freed where nobody shared them.
        freed_bytes: what these hold, on each worker.
        seconds: that compactions took, on the worker that answers.
        raw: running requests that hold all they computed.
        compacted: running requests that do not.
        raw_blocks: blocks that all of these would hold, were they raw.
        held_blocks: blocks that they hold.
        pressure: mean over the running requests that may be asked to give, from 0 for raw to 1 for the end
            of the ladder.
        prefixes: compacted prefixes that are kept, with a name or without.
        prefix_blocks: blocks that hold them.
        prefix_hits: requests that went on from one, once more if preempted since.
        prefix_hit_tokens: that they did not compute.
        raw_drafts: tokens of speculative decoding that were tried of requests that hold all they computed.
        raw_accepted: those of them that were right.
        compacted_drafts: likewise of requests that are compacted.
        compacted_accepted: likewise.
    """

    compactions: int = 0
    compacted_requests: int = 0
    freed_blocks: int = 0
    freed_bytes: int = 0
    seconds: float = 0.0
    raw: int = 0
    compacted: int = 0
    raw_blocks: int = 0
    held_blocks: int = 0
    pressure: float = 0.0
    prefixes: int = 0
    prefix_blocks: int = 0
    prefix_hits: int = 0
    prefix_hit_tokens: int = 0
    raw_drafts: int = 0
    raw_accepted: int = 0
    compacted_drafts: int = 0
    compacted_accepted: int = 0

    def count_drafts(self, tried: int, accepted: int, compacted: bool) -> None:
        """Add what became of a request's drafts in a step."""
        if compacted:
            self.compacted_drafts += tried
            self.compacted_accepted += accepted
        else:
            self.raw_drafts += tried
            self.raw_accepted += accepted

    def count_hit(self, num_tokens: int) -> None:
        """Add a request that went on from so many tokens of a compacted prefix."""
        self.prefix_hits += 1
        self.prefix_hit_tokens += num_tokens

    def count(self, jobs: Iterable[Job]) -> None:
        """Add a step's compactions."""
        for job in jobs:
            self.compactions += 1
            self.compacted_requests += not job.previous
            num_source = len(job.source) * (1 + len(job.other_sources))
            self.freed_blocks += len(job.previous) + num_source - len(job.destination)

    def add_request(self, num_tokens: int, held: Plan | None, block_size: int, num_groups: int = 1) -> None:
        """Add a running request, by what it was compacted to last; arguments as of `blocks_of`."""
        raw_blocks, held_blocks = blocks_of(num_tokens, held, block_size, num_groups)
        self.raw += held is None
        self.compacted += held is not None
        self.raw_blocks += raw_blocks
        self.held_blocks += held_blocks

    def to_dict(self) -> dict[str, float]:
        """As it travels."""
        return asdict(self)


@dataclass
class RequestState:
    """A running request, as it is shown.

    Attributes:
        id: its name, as `shown_id` has it.
        prompt_tokens: of its prompt.
        computed_tokens: of its prompt and output.
        state: "compacted", "raw", or "repeating" for what vLLM runs in order to score another request's
            context.
        raw_blocks: blocks that it would hold, were it raw.
        held_blocks: blocks that it holds.
        method: by which it is compacted; None if it never is.
        step: steps of its ladder that it has come down, 0 while it is raw; None unless `when` is "pressure".
        steps: of its ladder; None unless `when` is "pressure".
    """

    id: str
    prompt_tokens: int
    computed_tokens: int
    state: str
    raw_blocks: int
    held_blocks: int
    method: str | None
    step: int | None
    steps: int | None


@dataclass
class PrefixState:
    """A compacted prefix, as it is shown to who knows its salt.

    Attributes:
        id: in its engine.
        name: under which it is kept until it is deleted; None for one that goes when it is in the way.
        tokens: of the prompt that it stands for.
        compacted_tokens: of them that are compacted; the others are raw.
        blocks: that hold it.
        bytes: of these, on each worker.
        users: requests that hold its blocks.
        hits: requests that have attached to it.
        method, budget: by which it was compacted, see `KVCompressionConfig`.
        adapter: name of the adapter by which its tokens were computed; None for none.
    """

    id: str
    name: str | None
    tokens: int
    compacted_tokens: int
    blocks: int
    bytes: int
    users: int
    hits: int
    method: str
    budget: float | None
    adapter: str | None

    def to_dict(self) -> dict[str, Any]:
        """As it travels, and is served."""
        return asdict(self)


@dataclass
class EngineState:
    """How things stand in an engine core, for who looks at it.

    Attributes:
        block_size: tokens of a block.
        total_blocks: of the pool that requests can hold.
        used_blocks: of them that somebody holds.
        compacted_blocks: of these that hold compacted pages, of requests and of prefixes.
        running: requests that run.
        waiting: requests that wait.
        raw, compacted, raw_blocks, held_blocks, pressure: as `CompressionStats` has them.
        requests: the first `MOST_REQUESTS` of those that run.
        prefixes, prefix_blocks: as `CompressionStats` has them.
        named_prefixes: compacted prefixes that have a name, under any salt.
    """

    block_size: int
    total_blocks: int
    used_blocks: int
    compacted_blocks: int
    running: int
    waiting: int
    raw: int
    compacted: int
    raw_blocks: int
    held_blocks: int
    pressure: float
    requests: list[RequestState]
    prefixes: int = 0
    prefix_blocks: int = 0
    named_prefixes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As it travels, and is served."""
        return asdict(self)


def shown_id(request_id: str) -> str:
    """A request's name, which its client may have chosen, in `ID_LENGTH` characters at most.

    vLLM's own end of it, which no two requests share, is kept.
    """
    if len(request_id) <= ID_LENGTH:
        return request_id
    end = ID_LENGTH // 2
    return f"{request_id[: ID_LENGTH - end - 1]}…{request_id[-end:]}"


def blocks_of(num_tokens: int, held: Plan | None, block_size: int, num_groups: int = 1) -> tuple[int, int]:
    """Blocks that a request would hold, were it raw, and those that it holds, by its last compaction.

    Args:
        num_tokens: computed so far.
        held: its last compaction.
        block_size: tokens per block.
        num_groups: groups of layers that have blocks of their own.
    """
    whole = -(-num_tokens // block_size)
    holds = whole if held is None else whole - held.source_blocks + held.kept_blocks
    return whole * num_groups, holds * num_groups
