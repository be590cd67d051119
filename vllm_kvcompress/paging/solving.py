"""When the shares of solves are done, so that nobody who decodes is stalled by them (Attention Matching)."""

import time
from collections import deque
from collections.abc import Container

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_kvcompress.paging.job import Solve

# Of the time of others' steps that solves may take beside them, and of their own requests' steps.
BESIDE_OTHERS, ALONE = 0.1, 1.0
LONGEST_STEP = 0.25  # seconds of solves in a step of nobody's, and of more than one share in any
SHORTEST = 1e-3  # seconds of a share, at least
LONGEST_PAUSE = 1.0  # seconds between two steps that count, at most
SHARE_TOKENS = 1024  # of the context: a head's solve has a share for each so many
SHARES = 4  # last ones of which the mean says what one takes


class Solving:
    """Spreads solves over steps by what their shares have taken so far.

    Beside others' steps solves have a tenth of the time: a share is sent once that much has passed since the
    last one, and more than one in a step only if the step before was that long. If nobody is served but the
    request that is solved for, half of the time; if it waits for that, all of it. A head's solve has shares
    by how long the context is, so that none takes long; on others than a CPU all heads of a layer are solved
    for together. All ranks of a step do the same shares, as the scheduler says.

    Attributes:
        turn: the request whose context is repeated and solved for; None for nobody's.
        without_room: one that is solved for, finds no room to be compacted into, and has passed its turn on.
    """

    turn: str | None = None
    without_room: str | None = None

    def __init__(self, vllm_config: VllmConfig) -> None:
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        layers = -(-model.get_total_num_hidden_layers() // parallel.pipeline_parallel_size)
        heads = model.get_num_kv_heads(parallel) if current_platform.is_cpu() else 1
        self._heads = layers * heads
        self._solves: list[Solve] = []
        self._seconds: deque[float] = deque(maxlen=SHARES)  # that the last shares took
        self._awaited = False  # whether that is on its way: nobody knows how long another one would take
        self._credit = 0.0  # seconds
        self._left = 0  # shares of this step
        self._last = time.monotonic()

    def shares_of_head(self, num_tokens: int) -> int:
        """Into how many shares the solve of a head of so many tokens is cut."""
        return -(-num_tokens // SHARE_TOKENS)

    def num_shares(self, num_tokens: int) -> int:
        """Into how many shares the solves of a request of so many tokens are."""
        return self._heads * self.shares_of_head(num_tokens)

    def begin_step(self, others: bool, decodes: bool) -> None:
        """Count the shares that this step may have.

        Args:
            others: whether it is one of somebody's who is not solved for: waits for a turn, or has none.
            decodes: whether the request that is solved for decodes on its raw cache.
        """
        now = time.monotonic()
        passed, self._last = min(max(now - self._last, 0.0), LONGEST_PAUSE), now
        if not self._seconds:
            self._left = int(not self._awaited)
            return
        seconds = self._share_seconds
        if not others and not decodes:
            self._left = max(1, int(LONGEST_STEP / seconds))
            return
        earned = min((BESIDE_OTHERS if others else ALONE) * passed, LONGEST_STEP)
        self._credit = min(self._credit + earned, max(earned, seconds))
        self._left = int(self._credit / seconds)

    def take_shares(self, most: int) -> int:
        """The shares that one request has in this step, of so many that it may have; no other one has any."""
        taken, self._left = min(self._left, most), 0
        if taken and self._seconds:
            self._credit = max(self._credit - taken * self._share_seconds, 0.0)
        return taken

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
        self._awaited |= bool(solves) and not self._seconds
        return solves

    def took(self, seconds: float | None) -> None:
        """Note how long a share has taken on a worker; None if it has not said."""
        if seconds is not None:
            self._seconds.append(seconds)
            self._awaited = False
            self._last += seconds  # it is no time of a step's own

    @property
    def _share_seconds(self) -> float:
        return max(sum(self._seconds) / len(self._seconds), SHORTEST)
