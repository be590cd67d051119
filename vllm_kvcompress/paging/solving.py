"""When the shares of solves are done, so that nobody who decodes is stalled by them (Attention Matching)."""

import time
from collections.abc import Container

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_kvcompress.paging.job import Solve

# Of the time of others' steps that solves may take beside them, and of their own requests' steps.
BESIDE_OTHERS, ALONE = 0.1, 1.0
LONGEST_STEP = 0.25  # seconds of solves in a step in which nobody decodes
SHORTEST = 1e-3  # seconds of a share, at least
LONGEST_PAUSE = 1.0  # seconds between two steps that count, at most


class Solving:
    """Spreads solves over steps by what their shares have taken so far.

    Beside requests that decode solves have a tenth of the time: a share is sent once that much has passed
    since the last one, never more than one in a step. If only those decode that are solved for, half of the
    time. A share is a head's part on a CPU, where it takes as long as a step or longer, and a layer's on
    others. All ranks of a step do the same shares, as the scheduler says.

    Attributes:
        num_shares: of a request's solves.
        turn: the request whose context is repeated and solved for; None for nobody's.
        without_room: one that is solved for, finds no room to be compacted into, and has passed its turn on.
    """

    turn: str | None = None
    without_room: str | None = None

    def __init__(self, vllm_config: VllmConfig) -> None:
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        layers = -(-model.get_total_num_hidden_layers() // parallel.pipeline_parallel_size)
        heads = model.get_num_kv_heads(parallel) if current_platform.is_cpu() else 1
        self.num_shares = layers * heads
        self._solves: list[Solve] = []
        self._seconds: float | None = None  # of a share, as the last one took; None before the first has
        self._awaited = False  # whether that is on its way: nobody knows how long another one would take
        self._credit = 0.0  # seconds
        self._left = 0  # shares of this step
        self._last = time.monotonic()

    def begin_step(self, others: int, solved_for: int) -> None:
        """Count the shares that this step may have.

        Args:
            others: requests that decode and are not solved for.
            solved_for: those that are, and decode on their raw cache.
        """
        now = time.monotonic()
        passed, self._last = min(max(now - self._last, 0.0), LONGEST_PAUSE), now
        if self._seconds is None:
            self._left = int(not self._awaited)
            return
        if not others and not solved_for:
            self._left = max(1, int(LONGEST_STEP / max(self._seconds, SHORTEST)))
            return
        self._credit = min(self._credit + (BESIDE_OTHERS if others else ALONE) * passed, self._seconds)
        self._left = int(self._credit >= self._seconds)

    def take_shares(self) -> int:
        """The shares that one request may have in this step; no other one has any."""
        left, self._left = self._left, 0
        if left:
            self._credit = 0.0
        return left

    def release(self, request_id: str) -> None:
        """Have it be nobody's turn, if it is this request's."""
        if self.turn == request_id:
            self.turn = None
        if self.without_room == request_id:
            self.without_room = None

    def pass_on(self, request_id: str) -> None:
        """Have it be another one's turn while this request, which is solved for, waits for room.

        What is solved takes memory until it is written: so of one request, beside the one whose turn it is.
        """
        if self.turn == request_id and self.without_room is None:
            self.turn, self.without_room = None, request_id

    def add(self, solve: Solve) -> None:
        """Have it done in this step."""
        self._solves.append(solve)

    def take(self, released: Container[str]) -> list[Solve]:
        """What is to be done in this step, but for requests that were preempted in it."""
        solves, self._solves = self._solves, []
        solves = [solve for solve in solves if solve.job.request_id not in released]
        self._awaited |= bool(solves) and self._seconds is None
        return solves

    def took(self, seconds: float | None) -> None:
        """Note how long a share has taken on a worker; None if it has not said."""
        if seconds is not None:
            self._seconds, self._awaited = seconds, False
            self._last += seconds  # it is no time of a step's own
