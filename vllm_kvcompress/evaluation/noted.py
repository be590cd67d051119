"""What policies note of a prompt, once for all requests that are compacted by it, to whatever budget."""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any
from unittest.mock import patch

from vllm.v1.request import Request

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.paging.job import Job

PROMPTS = 8  # of so many, with a policy each, what was noted last is kept


class NotedOnce:
    """Lets the first request of a prompt and a policy have its context repeated, or compute all of it where
    every query is watched, and hands what was noted to those that come after it.

    What they keep is what they would by themselves: notes hang on prompt and policy alone. For engines in one
    process, whose scheduler and workers can be reached from here.
    """

    def __init__(self, scheduler: Any, worker: Any) -> None:
        """Take the place of what the scheduler asks before it repeats, and before it reads cached blocks."""
        self._scheduler, self._observer = scheduler, worker.compression.observer
        self._noted: OrderedDict[Hashable, list[Any]] = OrderedDict()
        repetitions, compactor = scheduler._repetitions, worker.compactor
        next_part, complete = repetitions.next_part, repetitions.complete
        hit, run, solve = scheduler._get_local_prefix_cache_hit, compactor.run, compactor.solve

        def next_part_unless_noted(owner: Request, config: KVCompressionConfig) -> Request | None:
            return None if self._states(owner) is not None else next_part(owner, config)

        def complete_if_noted(owner_id: str) -> bool:
            return self._states(scheduler.requests[owner_id]) is not None or complete(owner_id)

        def hit_if_noted(request: Request, *args, **kwargs):
            if self._states(request) is None:
                return hit(request, *args, **kwargs)
            with patch.dict(vars(scheduler._tracked[request.request_id].config), observes_all=False):
                return hit(request, *args, **kwargs)

        def run_with_notes(works: Sequence[Any]):
            for work in works:
                self._share(work.job)
            return run(works)

        def solve_with_notes(solve_: Any, observed: Any) -> None:
            if solve_.shares.start == 0:
                self._share(solve_.job)
            solve(solve_, observed)

        repetitions.next_part, repetitions.complete = next_part_unless_noted, complete_if_noted
        scheduler._get_local_prefix_cache_hit = hit_if_noted
        compactor.run, compactor.solve = run_with_notes, solve_with_notes

    def first_of_each(
        self, prompts: Iterable[tuple[Sequence[int], KVCompressionConfig | None]]
    ) -> list[bool]:
        """Of requests that would run together, whether each is to run before those that share its notes."""
        seen: set[Hashable] = set()
        first = []
        for prompt, config in prompts:
            key = None if config is None else _key(prompt, config)
            first.append(key is None or key in self._noted or key not in seen)
            seen.add(key)
        return first

    def _states(self, request: Request) -> list[Any] | None:
        """What was noted for a request that is compacted once its prompt is computed; None if nothing was."""
        tracked = self._scheduler._tracked.get(request.request_id)
        if tracked is None or tracked.held is not None or tracked.point != request.num_prompt_tokens:
            return None
        key = _key(request.prompt_token_ids, tracked.config)
        if key in self._noted:
            self._noted.move_to_end(key)
        return self._noted.get(key)

    def _share(self, job: Job) -> None:
        """Hand what was noted to a request that is about to be compacted, or keep what was noted of it."""
        prompt, observed = self._scheduler.requests[job.request_id].prompt_token_ids, None
        key = _key(prompt, job.config)
        if key is not None and job.num_tokens == len(prompt) and not job.previous_boundary:
            observed = self._observer.of(job.request_id)
        if observed is None:
            return
        if key in self._noted:
            observed.states = list(self._noted[key])
            return
        if any(state is None for state in observed.states):  # it could not wait for them
            return
        self._noted[key] = list(observed.states)
        if len(self._noted) > PROMPTS:
            self._noted.popitem(last=False)


def _key(prompt: Sequence[int], config: KVCompressionConfig) -> Hashable:
    """What notes of a prompt hang on; None if nothing is noted of all of it."""
    notes = config.enabled and config.watches_every_query
    return (tuple(prompt), config.build_policy()) if notes else None
