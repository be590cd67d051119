"""What a scheduler tells of compression: to vLLM's metrics, to clients, and to who looks at an engine."""

from typing import Any

from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from vllm_kvcompress.paging.attaching import Attaching
from vllm_kvcompress.paging.compactions import Compactions
from vllm_kvcompress.paging.leaving import Leaving
from vllm_kvcompress.paging.manager import CompactingManager
from vllm_kvcompress.paging.prefixes import Prefix, Prefixes
from vllm_kvcompress.paging.repetition import Repetitions
from vllm_kvcompress.paging.statistics import (
    CARRIER,
    MOST_REQUESTS,
    CompressionStats,
    EngineState,
    PrefixState,
    RequestState,
    blocks_of,
    shown_id,
)
from vllm_kvcompress.paging.tracked import TrackedRequests


class Telling:
    """Mixed into a vLLM scheduler that has these."""

    compacting_manager: CompactingManager
    leaving: Leaving
    _stats: CompressionStats
    _tracked: TrackedRequests
    _prefixes: Prefixes
    _attaching: Attaching
    _compactions: Compactions
    _repetitions: Repetitions

    def make_stats(self, *args, **kwargs) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            # The one field of vLLM's that takes anything; connectors, whose it is, are refused.
            assert stats.kv_connector_stats is None
            stats.kv_connector_stats = {CARRIER: self._take_stats().to_dict()}
        return stats

    def _take_stats(self) -> CompressionStats:
        """What was counted since the last call, and how things stand."""
        stats, self._stats = self._stats, CompressionStats()
        stats.freed_bytes = stats.freed_blocks * self._compactions.block_bytes
        self._add_running(stats)
        return stats

    def _add_running(self, stats: CompressionStats) -> None:
        """Fill in how things stand."""
        steps: list[float] = []
        for request in self.running:
            tracked = self._tracked.get(request.request_id)
            held = None if tracked is None else tracked.held
            manager = self.compacting_manager
            stats.add_request(request.num_computed_tokens, held, manager.block_size, manager.num_groups)
            if tracked is not None and tracked.config.when == "pressure":
                steps.append(tracked.steps_down / len(tracked.config.ladder_steps))
        stats.pressure = sum(steps) / len(steps) if steps else 0.0
        stats.prefixes, stats.prefix_blocks = len(self._prefixes), self._prefixes.held_blocks

    def compression_state(self) -> EngineState:
        """How things stand, for who looks at it."""
        stats, pool, compacted = CompressionStats(), self.kv_cache_manager.block_pool, self.compacting_manager
        self._add_running(stats)
        usable = pool.num_gpu_blocks - 1  # one is vLLM's null block
        pages = *compacted.compacted.values(), *(prefix.compacted for prefix in self._prefixes)
        return EngineState(
            block_size=compacted.block_size,
            total_blocks=usable,
            used_blocks=usable - pool.get_num_free_blocks(),
            compacted_blocks=len({block.block_id for blocks in pages for block in blocks}),
            running=len(self.running),
            waiting=self.get_request_counts()[1],
            raw=stats.raw,
            compacted=stats.compacted,
            raw_blocks=stats.raw_blocks,
            held_blocks=stats.held_blocks,
            pressure=stats.pressure,
            requests=[self._state_of(request) for request in self.running[:MOST_REQUESTS]],
            prefixes=stats.prefixes,
            prefix_blocks=stats.prefix_blocks,
            named_prefixes=sum(prefix.name is not None for prefix in self._prefixes),
        )

    def _state_of(self, request: Request) -> RequestState:
        tracked = self._tracked.get(request.request_id)
        held = None if tracked is None else tracked.held
        repeats = self._repetitions.of(request.request_id) is not None
        manager = self.compacting_manager
        shape = manager.block_size, manager.num_groups
        raw_blocks, held_blocks = blocks_of(request.num_computed_tokens, held, *shape)
        yields = tracked is not None and tracked.config.when == "pressure"
        return RequestState(
            id=shown_id(request.request_id),
            prompt_tokens=request.num_prompt_tokens,
            computed_tokens=request.num_computed_tokens,
            state="repeating" if repeats else "raw" if held is None else "compacted",
            raw_blocks=raw_blocks,
            held_blocks=held_blocks,
            method=None if tracked is None else tracked.config.method,
            step=tracked.steps_down if yields else None,
            steps=len(tracked.config.ladder_steps) if yields else None,
        )

    def compacted_request(self, shown: str) -> str | None:
        """The whole name of a running request that is compacted; None if there is none of this one."""
        names = (request.request_id for request in self.running)
        return next(
            (n for n in names if n in self.compacting_manager.compacted and shown_id(n) == shown), None
        )

    def prefixes(self, salt: str | None) -> list[PrefixState]:
        """The compacted prefixes under a salt: those that have a name, and some of the others."""
        own = [prefix for prefix in self._prefixes if prefix.salt == salt]
        named = sorted((prefix for prefix in own if prefix.name is not None), key=lambda each: each.name)
        unnamed = [prefix for prefix in reversed(own) if prefix.name is None]  # used last first
        return [self._state_of_prefix(prefix) for prefix in named + unnamed[:MOST_REQUESTS]]

    def has_prefix(self, name: str, salt: str | None) -> bool:
        """Whether there is a compacted prefix of this name under this salt."""
        return self._prefixes.named(name, salt) is not None

    def delete_prefix(self, name: str, salt: str | None) -> bool:
        """Keep a prefix no longer; who holds its blocks goes on. False if there is none of this name."""
        prefix = self._prefixes.named(name, salt)
        if prefix is not None:
            self._prefixes.drop(prefix)
        return prefix is not None

    def _state_of_prefix(self, prefix: Prefix) -> PrefixState:
        return PrefixState(
            id=prefix.id,
            name=prefix.name,
            tokens=len(prefix.hashes) * self.compacting_manager.block_size,
            compacted_tokens=prefix.plan.boundary,
            blocks=len(prefix.blocks),
            bytes=len(prefix.blocks) * self._compactions.block_bytes,
            users=prefix.users,
            hits=prefix.hits,
            method=prefix.config.method,
            budget=prefix.config.budget,
            adapter=prefix.adapter,
        )

    def _connector_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """vLLM's parameters of a response, with what was kept of a request that was compacted."""
        delayed, told = super()._connector_finished(request)
        own: dict[str, Any] = {}
        tracked = self._tracked.get(request.request_id)
        if tracked is not None and tracked.held is not None:
            held, block_size = tracked.held, self.compacting_manager.block_size
            own = {"method": tracked.config.method, "compacted_tokens": held.boundary}
            own["kept_tokens"] = held.kept_blocks * block_size
            if tracked.prefix_tokens:
                own["prefix_tokens"] = tracked.prefix_tokens
        config = self._attaching.configs.get(request.request_id)
        left = self.leaving.leave(request, config)
        if config is not None and config.prefix is not None:
            own |= {"method": config.method, "prefix": self._told_of(left, config.prefix)}
        return delayed, {**(told or {}), CARRIER: own} if own else told

    def _told_of(self, left: Prefix | str, name: str) -> dict[str, Any]:
        """What the client hears of a prefix that its request should leave under a name."""
        if isinstance(left, str):
            return {"kept": False, "name": name, "reason": left}
        engine = self.vllm_config.parallel_config.data_parallel_index
        return {"kept": True, "engine": engine, **self._state_of_prefix(left).to_dict()}
