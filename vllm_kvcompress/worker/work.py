"""What compactions are given: Jobs, and what is known of their requests."""

from dataclasses import dataclass

from torch import Tensor

from vllm_kvcompress.paging.job import Job
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.requests.observer import Observed
from vllm_kvcompress.requests.tables import RequestTable


@dataclass(frozen=True)
class Work:
    """A Job and what is known of its request.

    Attributes:
        job: what to do.
        table: the result of the request's last compaction, if there was one.
        observed: what was kept of its queries, if its policy needs any; its states are carried over.
        to_come: blocks of its destination, where the Job has none yet.
    """

    job: Job
    table: RequestTable | None = None
    observed: Observed | None = None
    to_come: int = 0

    @property
    def num_blocks(self) -> int:
        """Blocks of its destination."""
        return len(self.job.destination) + self.to_come

    @property
    def policy(self) -> Policy:
        """Which scores: of what is not solved for, that of later compactions."""
        own = self.job.config.build_policy()
        return own.later if own.matches and not self.job.solved else own

    @property
    def method(self) -> tuple[object, ...]:
        """What works must have in common to run together."""
        config = self.job.config
        # How much a threshold keeps is not known before, and tokens are encoded request by request.
        alone = self.job if config.threshold is not None or config.record_format is not None else None
        return config.build_policy(), config.build_allocation(), config.sink_tokens, alone


@dataclass(frozen=True)
class Task:
    """A Work and where it is done.

    Attributes:
        work: what to do.
        policy: which scores.
        raw: `[G, n]` int64, block ids of the Job's raw tokens in each group, on the cache's device.
        destination: `[m]` int64, likewise, of its destination.
    """

    work: Work
    policy: Policy
    raw: Tensor
    destination: Tensor

    @property
    def is_encoded(self) -> bool:
        """Whether some of what it holds is in records."""
        return self.work.table is not None and self.work.table.format is not None
