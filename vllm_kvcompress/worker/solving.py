"""Solves for what a request keeps, a share at a time, before it is compacted to it."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from vllm_kvcompress.formats import RECORD, Matched
from vllm_kvcompress.matching import Fit, padded, solve_bytes_on, within
from vllm_kvcompress.paging.job import Job, Solve
from vllm_kvcompress.requests.observer import Observed
from vllm_kvcompress.worker.candidates import Candidates, Reader
from vllm_kvcompress.worker.choosing import Choice, Choosing
from vllm_kvcompress.worker.scoring import Scoring
from vllm_kvcompress.worker.work import Task, Work


@contextlib.contextmanager
def _all_of_float32() -> Iterator[None]:
    """Have float32 multiplied as such, whatever the model is served with (`VLLM_FLOAT32_MATMUL_PRECISION`).

    With mantissas cut to ten bits least squares are of other numbers than attention.
    """
    served = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(served)


class Solution:
    """What is solved of a request before it is compacted.

    Attributes:
        choice: what stays of it.
        raw: `[X, W]`, of all heads, what of the raw tokens does (see `Choice`).
        num_kept: raw tokens of each head that do.
        records: of head after head, `[kept / 32, record_bytes]` uint8, in the columns' order: what is solved
            for is held in no more bytes than it is going to have.
    """

    def __init__(self, choice: Choice) -> None:
        assert choice.raw is not None
        self.choice, self.raw = choice, choice.raw
        self.num_kept: list[int] = (choice.raw >= 0).sum(1).tolist()
        self.records: list[Tensor] = []
        self._units: Iterator[float] = iter(())
        self._done = 0.0
        self._next: float | None = None  # where the next unit ends

    def begin(self, units: Iterator[float]) -> None:
        """Have these to do: before each is done, they say where it ends, in heads."""
        self._units, self._next = units, next(units, None)

    def go_on(self, until: float) -> None:
        """Do what belongs before a point, in heads: each unit where its middle lies.

        So what is solved hangs on no step, nor on when each share has its turn.
        """
        while self._next is not None and (self._done + self._next) / 2 < until:
            self._done, self._next = self._next, next(self._units, None)


class Solver:
    """Solves for biases and values, and holds them until they are taken."""

    def __init__(self, reader: Reader, scoring: Scoring, choosing: Choosing) -> None:
        self._cache, self._grid = reader.cache, reader.grid
        self._reader, self._scoring, self._choosing = reader, scoring, choosing
        self._solutions: dict[str, Solution] = {}

    @_all_of_float32()
    def solve(self, solve: Solve, observed: Observed | None) -> None:
        """As `Compactor.solve`."""
        name, total = solve.job.request_id, self._grid.num_layers * self._grid.num_heads
        if solve.shares.start == 0:
            work = Work(solve.job, observed=observed, to_come=solve.num_blocks)
            (task,) = self._reader.tasks([work])
            num_raw, format = len(solve.job.source) * self._grid.block_size, solve.job.config.record_format
            assert format is not None
            held = self._reader.candidates(task, slice(0, self._grid.num_layers))
            solution = Solution(self._choosing.choose(task, held, format, num_raw))
            self._solutions[name] = solution
            solution.begin(self._solving(task, solution))
        self._solutions[name].go_on(total * solve.shares.stop / solve.num_shares)

    def _solving(self, task: Task, solution: Solution) -> Iterator[float]:
        """Solve for all heads, on a CPU one by one, elsewhere as many of a layer at a time as memory is meant
        for; before each unit of it, says how many heads are done with it."""
        heads = self._grid.num_heads
        for layer in range(self._grid.num_layers):
            part = self._reader.candidates(task, slice(layer, layer + 1))
            rows = slice(layer * heads, (layer + 1) * heads)
            while rows.start < rows.stop:
                count = 1 if self._one_by_one else self._at_once(task, part, solution.num_kept[rows])
                some = slice(rows.start, rows.start + count)
                yield from self._solve_for(task, part, solution, layer, some)
                rows = slice(some.stop, rows.stop)

    @property
    def _one_by_one(self) -> bool:
        return self._cache.device.type == "cpu"

    def _at_once(self, task: Task, part: Candidates, num_kept: list[int]) -> int:
        """How many of these heads are solved for at a time."""
        size, kind = self._cache.head_size, self._cache.device.type
        for count in range(len(num_kept), 1, -1):
            takes = task.policy.fit_bytes(count, part.num_scored, max(num_kept[:count]), size, kind)
            if takes <= solve_bytes_on(kind):
                return count
        return 1

    def _solve_for(
        self, task: Task, part: Candidates, solution: Solution, layer: int, rows: slice
    ) -> Iterator[float]:
        """Solve for some of a layer's heads, which are rows of all; units as of `_solving`."""
        policy, first, config = task.policy, layer * self._grid.num_heads, task.work.job.config
        own = slice(rows.start - first, rows.stop - first)
        seen = self._scoring.observe(policy, task, replace(part, pages=part.pages[own]), reads=True)
        num_kept, raw = solution.num_kept[rows], solution.raw[rows]
        if min(num_kept) == part.num_scored:  # all tokens answer as they do
            yield float(rows.stop)
            values = seen.values[:, : part.num_scored].float()
            fit = Fit(torch.zeros_like(values[..., 0]), values)
            columns = torch.arange(part.num_scored, device=raw.device).expand(len(raw), -1)
        else:
            columns, present = padded(raw >= 0, max(num_kept))
            units = policy.solve(seen, own, columns, present, config.sink_tokens)
            columns, present, fit = yield from within(units, rows.start, rows.stop)
            raw.fill_(-1).scatter_(1, columns, present.long() - 1)
        assert isinstance(config.record_format, Matched)
        heads = range(len(num_kept))
        keys = torch.cat([seen.keys[head, columns[head, : num_kept[head]]] for head in heads])
        values = torch.cat([fit.values[head, : num_kept[head]] for head in heads])
        biases = torch.cat([fit.bias[head, : num_kept[head]] for head in heads])
        keys, values = (each.view(-1, RECORD, self._cache.head_size) for each in (keys, values))
        records = config.record_format.encode(keys, values, biases.view(-1, RECORD))
        solution.records.extend(records.split([num // RECORD for num in num_kept]))

    def forget(self, request_id: str) -> None:
        """Drop what was solved of a request."""
        self._solutions.pop(request_id, None)

    def take(self, job: Job) -> Solution | None:
        """What was solved for a Job, which is forgotten; None if it was not solved for."""
        return self._solutions.pop(job.request_id) if job.solved else None
