"""Whose context is repeated and solved for: one at a time, and who waits for it."""

import math

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.request import Request

from vllm_kvcompress.paging.job import Repetition
from vllm_kvcompress.paging.prefixes import Prefixes
from vllm_kvcompress.paging.repetition import Repetitions
from vllm_kvcompress.paging.solving import Solving
from vllm_kvcompress.paging.tracked import TrackedRequests


class Turns:
    """Gives each context its turn.

    What is noted of a context that is repeated and solved for takes memory like its keys: so of one at a
    time.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        tracked: TrackedRequests,
        prefixes: Prefixes,
        repetitions: Repetitions,
        solving: Solving,
    ) -> None:
        self._scheduler, self._tracked, self._prefixes = scheduler, tracked, prefixes
        self._repetitions, self._solving = repetitions, solving

    def is_solved_for(self, request: Request) -> bool:
        """Whether a running request is due and will be compacted once it is solved: its prompt is."""
        tracked = self._tracked.get(request.request_id)
        matches = tracked is not None and tracked.config.matches
        return matches and tracked.point == request.num_prompt_tokens and self._tracked.is_due(request)

    def is_being_repeated(self, owner: Request) -> bool:
        """Whether a due request waits for its repetition, which runs or will after another one."""
        repeating = self._repetitions.repeating(owner.request_id)
        if repeating is None:
            return False
        running = self._scheduler.running
        if any(self._repetitions.of(request.request_id) is not None for request in running):
            return True
        return self._can_start(repeating)

    def is_being_solved(self, request: Request) -> bool:
        """Whether a due request, all of whose context is repeated, waits for the rest of its solution."""
        tracked = self._tracked[request.request_id]
        repeated = self._repetitions.repeating(request.request_id) is None
        own = self._solving.turn == request.request_id
        return own and repeated and tracked.solved < self._solving.num_shares(request.num_prompt_tokens)

    def has_turn(self, request: Request) -> bool:
        """Whether it is this request's turn to be repeated and solved for; it is if it is nobody's."""
        owner = self._scheduler.requests.get(self._solving.turn or "")
        if owner is None or not self.is_solved_for(owner):
            self._solving.turn = request.request_id
        return self._solving.turn == request.request_id

    def is_turn_of(self, request: Request) -> bool:
        """Whether it is this request's that is repeated and solved for."""
        return self._solving.turn == request.request_id and self.is_solved_for(request)

    def waits_for_turn(self, request: Request) -> bool:
        """Whether a due request waits for another one that is repeated or solved for, and gets on."""
        turn = self._solving.turn
        if not self.is_solved_for(request) or turn in (None, request.request_id):
            return False
        owner = self._scheduler.requests[turn]
        return self.is_being_repeated(owner) or self.is_being_solved(owner)

    def shared_with(self, repetition: Repetition) -> tuple[KVCacheBlocks, int]:
        """The blocks of its context that a repetition reads, of every group, and their tokens.

        An owner that went on raw has given back what its windows would have to hold for it; the context is
        then computed again. States have always gone on to the end of what was computed: where there are any,
        the context is computed again from the last state that the prefix cache has of it.
        """
        kv_cache = self._scheduler.kv_cache_manager
        if self._scheduler.has_mamba_layers:
            hashes = self._scheduler.requests[repetition.owner_id].block_hashes
            blocks, num_tokens, _ = kv_cache.coordinator.find_longest_cache_hit(
                hashes, repetition.num_context
            )
            return kv_cache.create_kv_cache_blocks(blocks), num_tokens
        managers = kv_cache.coordinator.single_type_managers
        rows = [manager.req_to_blocks.get(repetition.owner_id, []) for manager in managers]
        sizes = [manager.block_size for manager in managers]
        held = (len(row) * size for row, size in zip(rows, sizes, strict=True))
        alignment = math.lcm(*sizes)
        num_tokens = min(repetition.num_context, *held) // alignment * alignment
        shared = tuple(row[: num_tokens // size] for row, size in zip(rows, sizes, strict=True))
        for manager, row in zip(managers, shared, strict=True):
            seen = row[manager.get_num_skipped_tokens(num_tokens) // manager.block_size :]
            # Windows take blocks over from the prefix cache alone.
            if any(block.is_null for block in seen) or (len(managers) > 1 and not manager.enable_caching):
                return kv_cache.empty_kv_cache_blocks, 0
        return kv_cache.create_kv_cache_blocks(shared), num_tokens

    def _can_start(self, repeating: Request) -> bool:
        """Whether vLLM would admit a repetition now."""
        repetition, scheduler = self._repetitions.of(repeating.request_id), self._scheduler
        assert repetition is not None
        _, num_shared = self.shared_with(repetition)
        needed = scheduler.kv_cache_manager.watermark_blocks
        for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
            # Windows give blocks back on the way. That they have some already is of no use: those go first.
            own = -(-repeating.num_tokens // manager.block_size) - num_shared // manager.block_size
            most = manager.max_admission_blocks_per_request
            if isinstance(manager, MambaManager):
                spec = manager.kv_cache_spec
                most = spec.max_memory_usage_bytes(scheduler.vllm_config) // spec.page_size_bytes
            needed += own if most is None else min(own, most)
        num_active = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
        free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks() + self._prefixes.idle_blocks()
        return num_active < scheduler.max_num_active_reqs and needed <= free
