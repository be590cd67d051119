"""What policies say of the tokens that requests hold."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from vllm_kvcompress.formats import RECORD
from vllm_kvcompress.policies.base import LayerObservation, Policy
from vllm_kvcompress.requests.cache import protect
from vllm_kvcompress.requests.observer import LayerAttention, Observed
from vllm_kvcompress.requests.tables import RequestTable
from vllm_kvcompress.worker.candidates import Candidates, Reader, longest
from vllm_kvcompress.worker.room import Room
from vllm_kvcompress.worker.work import Task


class Scoring:
    """Shows policies what requests hold, and has them score it."""

    def __init__(
        self,
        reader: Reader,
        room: Room,
        layers: list[LayerAttention],
        agree: Callable[[Tensor, Literal["mean", "max"]], Tensor] | None,
    ) -> None:
        """With one of `layers` per layer of the cache's grid; `agree` as of `Compactor`."""
        self._cache, self._grid = reader.cache, reader.grid
        self._reader, self._room, self._layers, self._agree = reader, room, layers, agree

    def scores(self, tasks: list[Task], together: Candidates) -> Tensor:
        """The policy's scores `[X, T]`, ready to be compared: padding lowest, then what is no number."""
        sinks, policy = tasks[0].work.job.config.sink_tokens, tasks[0].policy.scored_by
        if self._cache.scores_windows(policy) and together.records is None:
            scores = self._window_scores(policy, tasks, together)
        else:
            shape = len(together.pages), together.num_scored
            scores = torch.full(shape, -torch.inf, device=self._cache.device)
            for task, own in zip(tasks, scores.chunk(len(tasks)), strict=True):
                for part in self.slices(task, policy):
                    self._own(own, part)[:] = self._scores_of(policy, task, part)
                if recent := policy.num_recent(self._room.tokens_of_head(task)):
                    own[:, -recent:] = torch.inf  # the largest number once they are ranked
        if self._agree is not None:
            scores = self._agree(scores, policy.of_ranks)
        # One broken score must not rank a token below what does not exist, nor above what is protected.
        self._cache.rank(scores, together.padding, sinks)
        return scores

    def refine(self, tasks: list[Task], together: Candidates, scores: Tensor, num_kept: Tensor) -> None:
        """Have the policy change its scores `[X, T]` by how many tokens each head keeps, `[J, L, H]`."""
        for task, of_request, kept in zip(tasks, scores.chunk(len(tasks)), num_kept, strict=True):
            for part in self.slices(task, task.policy):
                own = self._own(of_request, part)
                seen = self.observe(task.policy, task, part)
                own[:] = task.policy.refine(own.clone(), kept[part.layers].flatten(), seen)
        least = torch.finfo(torch.float32).min
        scores.nan_to_num_(nan=least, neginf=least, posinf=torch.inf)
        protect(scores, together.padding, tasks[0].work.job.config.sink_tokens)

    def observe(
        self, policy: Policy, task: Task, part: Candidates, reads: bool | None = None
    ) -> LayerObservation:
        """What a policy sees of some layers; of keys and values what it reads, or both, or neither."""
        job, observed = task.work.job, task.work.observed
        rows, device = len(part.pages), self._cache.device
        width = part.num_scored + job.num_tokens - job.boundary
        keys = values = torch.empty(rows, width, 0, device=device)
        raw = width - (0 if part.records is None else part.records.shape[1] * RECORD)
        reads_keys = policy.reads_keys if reads is None else reads
        reads_values = policy.reads_values if reads is None else reads
        bias = None
        if reads_keys:
            keys = self._cache.read_keys(part.pages, part.layers)[:, :raw]
        if reads_values:
            values = self._cache.read_values(part.pages, part.layers)[:, :raw]
        if part.records is not None and (reads_keys or reads_values):
            assert task.work.table is not None and task.work.table.format is not None
            encoded = self._reader.decoded(part, task.work.table.format)
            before = (each.flatten(1, 2).to(keys.dtype) for each in encoded)
            read = reads_keys, reads_values
            keys, values = (
                torch.cat([own, after], 1) if wanted else after
                for own, after, wanted in zip(before, (keys, values), read, strict=True)
            )
            bias = self._reader.biases(part, task.work.table.format, raw) if reads_keys else None
        queries = torch.empty(0, rows, 1, 0, device=device)
        if observed is not None and policy.window:
            queries = observed.window(part.layers, job.num_tokens).flatten(1, 2).unflatten(1, (rows, -1))
        first = part.layers.start
        attention = self._layers[first]
        return LayerObservation(
            keys=keys,
            values=values,
            queries=queries,
            scale=attention.scale,
            num_scored=part.num_scored,
            num_tokens=job.num_tokens,
            logits_soft_cap=attention.logits_soft_cap,
            sinks=self._sinks(part.layers),
            padding=part.padding,
            bias=bias,
            state=self._state(policy, observed, part, width),
            rotary=attention.rotary,
            output_projection=attention.output_projection,
            layers=tuple(layer.index for layer in self._layers[part.layers]),
            first_head=attention.first_head,
            kept_positions=part.positions,
        )

    def slices(self, task: Task, policy: Policy) -> Iterator[Candidates]:
        """The layers, as many at a time as the policy scores at once and memory is meant for."""
        job, observed = task.work.job, task.work.observed
        at_once, heads = 1, self._grid.num_heads
        if policy.stacks_layers:
            columns = longest(task.work.table, slice(None))
            columns += len(job.source + job.tail) * self._grid.block_size
            group = 0 if observed is None or observed.ring is None else observed.ring.shape[2] // heads
            # Keys and attention in float32, or else a number of each token. Who reads values, too, makes
            # several of their kind of both.
            copies = policy.reads_keys and not self._reads_in_place(policy, task)
            per_token = copies * self._cache.head_size * (4 if policy.reads_values else 1)
            per_token = per_token + group * policy.window or 1
            at_once = max(1, self._cache.slice_bytes // (4 * heads * columns * per_token))
        begin = 0
        while begin < len(self._layers):
            end = begin + 1
            while end < min(begin + at_once, len(self._layers)) and self._alike(policy, begin, end):
                end += 1
            yield self._reader.candidates(task, slice(begin, end))
            begin = end

    def carry(self, task: Task, new: RequestTable, from_end: Tensor) -> None:
        """Give the policy's states the columns of the new table; `from_end`, below 0, are its old ones."""
        job, table, observed = task.work.job, task.work.table, task.work.observed
        assert observed is not None
        policy, states = task.policy.scored_by, observed.states
        if type(policy).carry is Policy.carry or states[0] is None:
            return
        heads, num_raw = self._grid.num_heads, job.num_tokens - job.boundary
        raw = torch.arange(num_raw, device=from_end.device)
        together = policy.stacks_layers and type(policy).stack is Policy.stack  # so they are `[H, W]`
        at_once = 1
        if together:
            columns = max(state.shape[1] for state in states)
            at_once = max(1, self._cache.slice_bytes // (8 * heads * columns))
        for begin in range(0, len(states), at_once):
            some = slice(begin, min(begin + at_once, len(states)))
            width = len(job.source) * self._grid.block_size + longest(table, some)
            old = new.align(some, from_end, -width - 1) + width
            kept = torch.cat([old, (raw + width).expand(len(old), -1)], 1)
            if not together:
                states[begin] = policy.carry(states[begin], kept)
                continue
            after = policy.carry(policy.stack(states[some]), kept)
            for layer, own in zip(range(some.start, some.stop), after.split(heads), strict=True):
                states[layer] = own[:, -(longest(new, slice(layer, layer + 1)) + num_raw) :]

    def _alike(self, policy: Policy, one: int, other: int) -> bool:
        """Whether two layers may be scored as one with more heads."""
        a, b = self._layers[one], self._layers[other]
        if policy.needs_rotary and a.rotary is not None and not a.rotary.same_as(b.rotary):
            return False
        return (a.scale, a.logits_soft_cap) == (b.scale, b.logits_soft_cap)

    def _sinks(self, layers: slice) -> Tensor | None:
        """Some layers' sinks `[l·H, G]`, -inf for those that have none; None if none has."""
        own = [layer.sinks for layer in self._layers[layers]]
        some = next((sinks for sinks in own if sinks is not None), None)
        if some is None:
            return None
        return torch.cat([torch.full_like(some, -torch.inf) if sinks is None else sinks for sinks in own])

    def _scores_of(self, policy: Policy, task: Task, part: Candidates) -> Tensor:
        """A policy's scores of some layers of a request, `[X, T]`."""
        if not self._reads_in_place(policy, task):
            return policy.score(self.observe(policy, task, part))
        seen = self.observe(policy, task, part, reads=False)
        return self._cache.token_scores(policy, part.pages, part.layers, seen)

    def _reads_in_place(self, policy: Policy, task: Task) -> bool:
        """Whether the cache itself makes a request's scores, without a copy of what it holds."""
        return self._cache.scores_tokens(policy) and not task.is_encoded

    def _window_scores(self, policy: Policy, tasks: list[Task], together: Candidates) -> Tensor:
        """The scores that the cache itself makes of all layers and requests."""
        jobs, queries = [task.work.job for task in tasks], []
        for task in tasks:
            assert task.work.observed is not None
            queries.append(task.work.observed.window(slice(None), task.work.job.num_tokens).transpose(0, 1))
        ends = [together.num_scored + job.num_tokens - job.boundary for job in jobs]
        return self._cache.window_scores(
            policy,
            together.pages,
            queries[0] if len(queries) == 1 else torch.cat(queries),
            [layer.scale for layer in self._layers],
            [layer.logits_soft_cap for layer in self._layers],
            self._sinks(slice(None)),
            together.num_scored,
            ends,
        )

    def _own(self, scores: Tensor, part: Candidates) -> Tensor:
        """What is a part's of a request's scores `[L·H, T]`."""
        return scores[self._grid.rows(part.layers), scores.shape[1] - part.num_scored :]

    def _state(self, policy: Policy, observed: Observed | None, part: Candidates, width: int) -> Any:
        """What was noted of the columns of some layers, by the policy or in its place."""
        if observed is None:
            return None
        if observed.sums is not None:
            return observed.sums.read(part.pages)[:, :width]
        if observed.moments is not None:
            return observed.moments.read(part.layers, self._grid.num_heads)
        return policy.stack(observed.states[part.layers])
