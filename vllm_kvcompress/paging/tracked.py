"""Where the requests stand that are compacted, or that go on from a compacted prefix."""

from dataclasses import dataclass

from vllm.v1.request import Request

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.paging.job import Job
from vllm_kvcompress.paging.prefixes import Prefix
from vllm_kvcompress.plan import Plan, next_point


@dataclass
class Tracked:
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

    def pass_point(self, request: Request) -> None:
        """Go on to the request's next compaction point."""
        num_prompt = request.num_prompt_tokens
        self.point = next_point(self.config, num_prompt, self.point)
        # While it was late nothing was kept of its queries: the next window begins where that begins again.
        since = request.num_computed_tokens + self.config.observed_window if self.late else 0
        while self.point is not None and self.point < since:
            self.point = next_point(self.config, num_prompt, self.point)
        self.late, self.due_since, self.solved = False, None, 0

    def start_again(self, request: Request) -> None:
        """The request was preempted: it has nothing."""
        self.point = next_point(self.config, request.num_prompt_tokens)
        self.held, self.late, self.due_since, self.uncounted = None, False, None, None
        self.solved, self.step, self.prefix, self.prefix_tokens = 0, 0, None, 0


class TrackedRequests(dict[str, Tracked]):
    """These requests, by name."""

    def __init__(self, has_drafts: bool) -> None:
        """
        Args:
            has_drafts: whether there is speculative decoding.
        """
        super().__init__()
        self._has_drafts = has_drafts

    def computed(self, request: Request) -> int:
        """Tokens of a request that are computed for certain, once the steps in flight are done."""
        # Of those (asynchronous scheduling) drafts may be rejected yet.
        drafts = max(request.num_output_placeholders - 1, 0) if self._has_drafts else 0
        return request.num_computed_tokens - drafts

    def is_due(self, request: Request) -> bool:
        """Whether a request has come to its compaction point."""
        tracked = self.get(request.request_id)
        if tracked is None or tracked.point is None:
            return False
        return self.computed(request) >= tracked.point
