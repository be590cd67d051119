"""Solves for what a request keeps, a share at a time, before it is compacted to it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_kvcompress.matching import Fit, padded, solve_bytes_on
from vllm_kvcompress.paging.job import Job, Solve
from vllm_kvcompress.requests.observer import Observed
from vllm_kvcompress.worker.candidates import Reader
from vllm_kvcompress.worker.choosing import Choice, Choosing
from vllm_kvcompress.worker.scoring import Scoring
from vllm_kvcompress.worker.work import Task, Work


@dataclass(frozen=True)
class Solution:
    """What is solved of a request before it is compacted.

    Attributes:
        choice: what stays of it.
        num_kept: raw tokens of each head.
        biases: of head after head, float32 of each kept raw token, in the columns' order.
        values: `[kept, D]` float32, likewise.
    """

    choice: Choice
    num_kept: list[int]
    biases: list[Tensor]
    values: list[Tensor]


class Solver:
    """Solves for biases and values, and holds them until they are taken."""

    def __init__(self, reader: Reader, scoring: Scoring, choosing: Choosing) -> None:
        self._cache, self._grid = reader.cache, reader.grid
        self._reader, self._scoring, self._choosing = reader, scoring, choosing
        self._solutions: dict[str, Solution] = {}

    def solve(self, solve: Solve, observed: Observed | None) -> None:
        """As `Compactor.solve`."""
        work = Work(solve.job, observed=observed)
        (task,) = self._reader.tasks([work])
        num_raw = len(solve.job.source) * self._grid.block_size
        name, format = solve.job.request_id, solve.job.config.record_format
        assert format is not None
        if solve.shares.start == 0:
            held = self._reader.candidates(task, slice(0, self._grid.num_layers))
            choice = self._choosing.choose(task, held, format, num_raw, solve.num_blocks)
            assert choice.raw is not None
            self._solutions[name] = Solution(choice, (choice.raw >= 0).sum(1).tolist(), [], [])
        solution, heads = self._solutions[name], self._grid.num_heads
        total = self._grid.num_layers * heads
        for share in solve.shares:  # one by one: what is solved must not hang on how many a step has
            begin, end = (total * edge // solve.num_shares for edge in (share, share + 1))
            for layer in range(begin // heads, -(-end // heads) if begin < end else 0):
                some = slice(max(begin - layer * heads, 0), min(end - layer * heads, heads))
                self._fit(task, solution, layer, some)

    def _fit(self, task: Task, solution: Solution, layer: int, heads: slice) -> None:
        """Solve for some of a layer's heads, as many at a time as memory is meant for."""
        assert solution.choice.raw is not None
        policy, first_row, begin = task.policy, layer * self._grid.num_heads, heads.start
        part = self._reader.candidates(task, slice(layer, layer + 1))
        while begin < heads.stop:
            num_kept = solution.num_kept[first_row + begin : first_row + heads.stop]
            kind = self._cache.device.type
            fitting = [
                n
                for n in range(1, len(num_kept) + 1)
                if policy.fit_bytes(n, part.num_scored, max(num_kept[:n]), self._cache.head_size, kind)
                <= solve_bytes_on(kind)
            ]
            end = begin + max([1, *fitting])
            own, rows = slice(begin, end), slice(first_row + begin, first_row + end)
            seen = self._scoring.observe(policy, task, replace(part, pages=part.pages[own]), reads=True)
            num_kept, raw = solution.num_kept[rows], solution.choice.raw[rows]
            if min(num_kept) == part.num_scored:  # all tokens answer as they do
                values = seen.values[:, : part.num_scored].float()
                fit = Fit(torch.zeros_like(values[..., 0]), values)
            else:
                columns, present = padded(raw >= 0, max(num_kept))
                sinks = task.work.job.config.sink_tokens
                columns, present = policy.select(seen, own, columns, present, sinks)
                raw.fill_(-1).scatter_(1, columns, present.long() - 1)
                fit = policy.fit(seen, own, columns, present)
            solution.biases.extend(bias[:num] for bias, num in zip(fit.bias, num_kept, strict=True))
            solution.values.extend(kept[:num] for kept, num in zip(fit.values, num_kept, strict=True))
            begin = end

    def forget(self, request_id: str) -> None:
        """Drop what was solved of a request."""
        self._solutions.pop(request_id, None)

    def take(self, job: Job) -> Solution | None:
        """What was solved for a Job, which is forgotten; None if it was not solved for."""
        return self._solutions.pop(job.request_id) if job.solved else None
