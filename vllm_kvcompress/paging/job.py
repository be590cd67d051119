"""What the scheduler tells the workers, attached to each `SchedulerOutput` as `kv_compression`."""

from dataclasses import dataclass, field

from vllm_kvcompress.config import KVCompressionConfig


@dataclass(frozen=True)
class Job:
    """One compaction. Self-contained: no block table is needed to run it.

    Attributes:
        request_id: vLLM's request id.
        config: the request's own resolved options.
        num_prompt_tokens: P, tokens whose queries and keys the policy may look at.
        boundary: first token that stays raw, a multiple of the block size.
        source: block ids that hold tokens `[0, boundary)`, raw; freed once the Job has run.
        tail: block ids that hold tokens `[boundary, P)`, raw; they stay.
        destination: block ids that receive the kept pages; may overlap `source`.
    """

    request_id: str
    config: KVCompressionConfig
    num_prompt_tokens: int
    boundary: int
    source: tuple[int, ...]
    tail: tuple[int, ...]
    destination: tuple[int, ...]


@dataclass(frozen=True)
class Observation:
    """Asks the workers to keep the queries of a prompt's last `window` tokens until its Job arrives."""

    request_id: str
    num_prompt_tokens: int
    window: int


@dataclass(frozen=True)
class CompressionStep:
    """Everything a worker has to do before the forward pass of one step, in this order.

    Attributes:
        released: requests whose compacted pages were returned (preempted or finished) before this step runs.
        jobs: compactions to run now, in order: a later Job may write blocks that an earlier one freed.
        observations: requests whose prompt starts to be computed in this step.
    """

    released: list[str] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
