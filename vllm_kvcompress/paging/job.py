"""What the scheduler tells the workers, attached to each `SchedulerOutput` as `kv_compression`, and hears."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from vllm_kvcompress.config import KVCompressionConfig


@dataclass(frozen=True)
class Job:
    """One compaction. Self-contained: no block table is needed to run it.

    Attributes:
        request_id: vLLM's request id.
        config: the request's own resolved options.
        num_tokens: tokens computed so far, whose keys and queries the policy may look at.
        boundary: first token that stays raw, a multiple of the block size.
        previous_boundary: the boundary of the request's last compaction; 0 for the first one.
        previous: block ids of its last compaction's pages; freed once the Job has run.
        source: block ids that hold tokens `[previous_boundary, boundary)`, raw; likewise freed.
        tail: block ids that hold tokens `[boundary, num_tokens)`, raw; they stay.
        destination: block ids that receive the kept pages; may overlap `previous` and `source`. With a
            threshold, as many as may be needed.
        solved: whether biases and values of what is kept are solved for before it is run.
        other_sources: where layers are in several cache groups of vLLM's, `source` of each other group.
        other_tails: likewise, `tail`.
    """

    request_id: str
    config: KVCompressionConfig
    num_tokens: int
    boundary: int
    previous_boundary: int
    previous: tuple[int, ...]
    source: tuple[int, ...]
    tail: tuple[int, ...]
    destination: tuple[int, ...]
    solved: bool = False
    other_sources: tuple[tuple[int, ...], ...] = ()
    other_tails: tuple[tuple[int, ...], ...] = ()

    @property
    def raw(self) -> list[tuple[int, ...]]:
        """Block ids of the raw tokens, of each group: equally many."""
        sources, tails = (self.source, *self.other_sources), (self.tail, *self.other_tails)
        return [source + tail for source, tail in zip(sources, tails, strict=True)]

    @property
    def freed(self) -> set[int]:
        """Block ids that are freed once it has run, unless they are of the destination."""
        return {block for blocks in (self.previous, self.source, *self.other_sources) for block in blocks}

    def split(self, num_parts: int, block_size: int) -> "Job":
        """The same in smaller blocks.

        Args:
            num_parts: of each block.
            block_size: tokens of a part.
        """

        def parts(ids: tuple[int, ...]) -> tuple[int, ...]:
            return parts_of(ids, num_parts)

        num_tail = -(-(self.num_tokens - self.boundary) // block_size)
        return replace(
            self,
            previous=parts(self.previous),
            source=parts(self.source),
            tail=parts(self.tail)[:num_tail],
            destination=parts(self.destination),
            other_sources=tuple(map(parts, self.other_sources)),
            other_tails=tuple(parts(tail)[:num_tail] for tail in self.other_tails),
        )


def parts_of(ids: Sequence[int], num_parts: int) -> tuple[int, ...]:
    """Blocks as attention kernels see them, of which so many are one of the scheduler's."""
    return tuple(id * num_parts + part for id in ids for part in range(num_parts))


@dataclass(frozen=True)
class Solve:
    """A share of the work before a Job that says `solved`: for what is kept biases and values are.

    The shares of a request come in order, and then its Job, of the same tokens.

    Attributes:
        job: as the Job will be, without a destination.
        num_blocks: blocks of the destination.
        shares: which of `num_shares` equal parts of the heads' solves.
        num_shares: see `shares`.
    """

    job: Job
    num_blocks: int
    shares: range
    num_shares: int


@dataclass(frozen=True)
class CompressionReport:
    """What a worker tells the scheduler, attached to the `ModelRunnerOutput` of a step as `kv_compression`.

    Attributes:
        kept_blocks: of the step's Jobs with a threshold, by request id: the first so many blocks of the
            destination hold all that is kept. The others are read by nobody.
        solving_seconds: what a share of the last solves took that are done; None if no others were since the
            last report. A GPU does them after their step has been sent off.
        compaction_seconds: what compactions took that are done and were not told before.
    """

    kept_blocks: dict[str, int]
    solving_seconds: float | None = None
    compaction_seconds: float = 0.0


@dataclass(frozen=True)
class Observation:
    """Asks the workers to keep what a request's policy needs of its queries, from this step on."""

    request_id: str
    config: KVCompressionConfig


@dataclass(frozen=True)
class Repetition:
    """Announces a request that repeats a part of another one's context, whose attention scores that part.

    Attributes:
        request_id: the repeating request; its tokens `[num_context, ...)` are the repetition.
        owner_id: the request whose context it repeats.
        begin: first token of the part.
        end: one past its last token.
        num_context: tokens of the context, which the two requests share.
    """

    request_id: str
    owner_id: str
    begin: int
    end: int
    num_context: int


@dataclass(frozen=True)
class Loaded:
    """A prefix that the workers have read from files, and the blocks that it is to be in.

    Attributes:
        prefix_id: its name.
        destination: block ids of its compacted pages.
        tails: of each group that is compacted, block ids of the raw ones behind them.
        beside: of each group that is not compacted, block ids of what its layers see behind the end.
    """

    prefix_id: str
    destination: tuple[int, ...]
    tails: tuple[tuple[int, ...], ...]
    beside: tuple[tuple[int, ...], ...] = ()

    def split(self, num_parts: int) -> "Loaded":
        """The same in smaller blocks, so many of each; but for those of other groups."""
        tails = tuple(parts_of(tail, num_parts) for tail in self.tails)
        return replace(self, destination=parts_of(self.destination, num_parts), tails=tails)


@dataclass(frozen=True)
class CompressionStep:
    """Everything a worker has to do before the forward pass of one step, in this order.

    Attributes:
        kept: the requests, by the prefix, what they were compacted to is kept as.
        released: requests that were preempted, or ended compacted, before this step runs. Their compacted
            pages were returned; what is kept of their queries begins again when they do.
        loaded: prefixes that come from files.
        attached: the prefix, by the request, that requests which start in this step go on with.
        dropped: prefixes that no other request will attach to.
        solves: what to solve for Jobs of later steps, before anything is written.
        jobs: compactions to run now, in order: a later Job may write blocks that an earlier one freed.
        late: requests that are due, but go on raw while there is no room for their compacted pages, or until
            the compactions before them are done. What is kept of their queries stays as it is, so that later
            they keep what they would have kept now.
        unsolved: requests that will end before they could be solved for: what is noted of their contexts, and
            what of them is solved, is dropped. They stay raw, or are compacted once their output is longer.
        observations: requests that start to be computed in this step.
        repetitions: repeating requests that start to be computed in this step.
    """

    kept: dict[str, str] = field(default_factory=dict)
    released: list[str] = field(default_factory=list)
    loaded: list[Loaded] = field(default_factory=list)
    attached: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    solves: list[Solve] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    unsolved: list[str] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    repetitions: list[Repetition] = field(default_factory=list)
