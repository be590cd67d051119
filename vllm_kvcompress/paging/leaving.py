"""Compacted prefixes that come into being: left by requests that end, or read from files."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    MambaManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.request import Request

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.paging.groups import blocks_beside
from vllm_kvcompress.paging.job import Loaded
from vllm_kvcompress.paging.manager import CompactingManager
from vllm_kvcompress.paging.prefixes import Prefix, Prefixes
from vllm_kvcompress.paging.statistics import TAKEN
from vllm_kvcompress.paging.tracked import Tracked, TrackedRequests
from vllm_kvcompress.plan import Plan


class Leaving:
    """Keeps what requests were compacted to, and tells what must be known to save and to load it.

    Attributes:
        alignment: tokens of which a prefix has a multiple, so that it ends with a block of every group.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        manager: CompactingManager,
        tracked: TrackedRequests,
        prefixes: Prefixes,
    ) -> None:
        """
        Args:
            scheduler: whose requests these are.
            manager: of the blocks of layers that are compacted.
            tracked: its requests that are compacted.
            prefixes: among which they are kept.
        """
        self._scheduler, self._manager, self._tracked = scheduler, manager, tracked
        self._prefixes = prefixes
        managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        self._others = [each for each in managers if not isinstance(each, CompactingManager)]
        self.alignment = math.lcm(*(each.block_size for each in managers))
        self.kept: dict[str, str] = {}  # requests, by the prefix that each has left since the last step
        self._loaded: list[Loaded] = []

    def leave(self, request: Request, config: KVCompressionConfig | None) -> Prefix | str:
        """Keep what a request that ends was compacted to, if it should be; else why not, in one line.

        Args:
            request: the request.
            config: its options; None if it can leave nothing.
        """
        manager, name = self._manager, request.request_id
        if config is None or not self.is_wanted(config):
            return "nobody asked for it"
        tracked = self._tracked.get(name)
        if tracked is None or name not in manager.compacted or tracked.uncounted is not None:
            return _uncompacted(tracked, config)
        assert tracked.held is not None
        if not request.block_hashes:
            return "the server runs without prefix caching"
        # Whatever follows may be of drafts, or is yet to be computed.
        computed = request.num_computed_tokens // self.alignment * self.alignment
        num_tokens = min(self.end(request, config), computed)
        begin, end = tracked.held.source_blocks, num_tokens // manager.block_size
        if begin > end:
            return "some of its output was compacted with the prompt; ask for fewer max_tokens"
        unknown = next((each for each in self._others if not _keeps_what_is_seen(each)), None)
        if unknown is not None:
            kind = type(unknown.kv_cache_spec).__name__
            return f"vLLM does not keep at the ends of blocks what its layers of {kind} see there"
        beside = self._beside(name, num_tokens)
        if beside is None:
            return "its windows or states have gone on; ask again"
        prefix = Prefix(
            id=self._prefixes.new_id(),
            name=config.prefix,
            config=config,
            hashes=tuple(manager.block_hashes(request)[:end]),
            tokens=None if config.prefix is None else _tokens_of(request, end * manager.block_size),
            plan=tracked.held,
            kept=config.ladder_steps[tracked.step] if config.when == "pressure" else config.budget,
            compacted=tuple(manager.compacted[name]),
            tails=tuple(tuple(row[begin:end]) for row in manager.rows(name)),
            beside=beside,
            salt=request.cache_salt,
            adapter=request.lora_request.lora_name if request.lora_request else None,
        )
        if config.prefix is not None and (problem := self._unnameable(prefix)) is not None:
            return problem
        if not self._prefixes.keep(prefix):
            return "there is one like it, or it is larger than prefix_share"
        if config.prefix is not None:
            self._forget_raw(prefix.hashes)
        self.kept[prefix.id] = name
        return prefix

    def _forget_raw(self, hashes: Sequence[bytes]) -> None:
        """Drop raw copies that nobody reads: they would be taken instead of the prefix, and compacted each
        time."""
        pool = self._manager.block_pool
        for manager in (self._manager, *self._manager.others):
            group = [manager.kv_cache_group_id]
            for each in hashes:  # which several requests may have computed
                while (copies := pool.get_cached_block(each, group)) and not copies[0].ref_cnt:
                    pool.evict_blocks({copies[0].block_id})

    def is_wanted(self, config: KVCompressionConfig) -> bool:
        """Whether a request with these options should leave a prefix, if it is compacted."""
        return config.prefix is not None or self._prefixes.keeps_unnamed

    def end(self, request: Request, config: KVCompressionConfig) -> int:
        """Tokens of a request that a prefix would stand for, once those known so far are computed."""
        num_tokens = request.num_tokens - 1
        if config.prefix is not None:
            num_tokens = min(num_tokens, request.num_prompt_tokens)
        return num_tokens // self.alignment * self.alignment

    def _beside(self, name: str, num_tokens: int) -> tuple[tuple[KVCacheBlock, ...], ...] | None:
        """Of each group that is not compacted the blocks of a request that its layers see behind so many of
        its tokens; None if some are given back."""
        beside = []
        for manager, num_seen in zip(self._others, self.seen_blocks(num_tokens), strict=True):
            end = num_tokens // manager.block_size
            seen = manager.req_to_blocks[name][end - num_seen : end]
            if any(block.is_null for block in seen):
                return None
            beside.append(tuple(seen))
        return tuple(beside)

    def seen_blocks(self, num_tokens: int) -> list[int]:
        """Of each group that is not compacted, how many blocks its layers see behind so many tokens."""
        return [
            num_tokens // each.block_size - each.get_num_skipped_tokens(num_tokens) // each.block_size
            for each in self._others
        ]

    def describe(self, prefix: Prefix) -> dict[str, Any]:
        """What must be known of a prefix to load it again, but for its tokens."""
        return {
            "name": prefix.name,
            "salt": prefix.salt,
            "config": prefix.config.to_dict(),
            "boundary": prefix.plan.boundary,
            "kept_blocks": prefix.plan.kept_blocks,
            "kept": prefix.kept,
            "block_size": self._manager.block_size,
        }

    def to_save(self, name: str, salt: str | None) -> tuple[Prefix, tuple[str, ...]]:
        """A prefix, and the names by which workers know it.

        Raises:
            KVCompressionError: there is none, or it cannot be saved.
        """
        prefix = self._prefixes.named(name, salt)
        if prefix is None:
            raise KVCompressionError(f"there is no prefix {name!r}")
        if prefix.adapter is not None or prefix.tokens is None:
            raise KVCompressionError("prefixes of an adapter, pictures or embeddings cannot be saved")
        names = (prefix.id, self.kept[prefix.id]) if prefix.id in self.kept else (prefix.id,)
        return prefix, names

    def load(self, about: dict[str, Any], request: Request, prefix_id: str) -> Prefix:
        """Take blocks for a prefix that the workers have read.

        Args:
            about: what `describe` said of it.
            request: one whose prompt it is.
            prefix_id: as the workers call it.

        Raises:
            KVCompressionError: there is no room, or its name is taken.
        """
        manager, pool = self._manager, self._manager.block_pool
        num_kept, num_source = about["kept_blocks"], about["boundary"] // manager.block_size
        hashes = manager.block_hashes(request)
        num_groups = manager.num_groups
        numbers = [num_kept * num_groups] + [len(hashes) - num_source] * num_groups
        numbers += self.seen_blocks(request.num_tokens)
        needed = sum(numbers)
        while pool.get_num_free_blocks() < needed and self._prefixes.make_room():
            pass
        if pool.get_num_free_blocks() < needed:
            raise KVCompressionError(
                f"the prefix takes {needed} blocks, and {pool.get_num_free_blocks()} are free"
            )
        blocks = pool.get_new_blocks(needed)
        in_order = iter(blocks)
        compacted, *raw = [tuple(itertools.islice(in_order, number)) for number in numbers]
        prefix = Prefix(
            id=prefix_id,
            name=about["name"],
            config=KVCompressionConfig.parse(about["config"]),
            hashes=tuple(hashes),
            tokens=_tokens_of(request, request.num_tokens),
            plan=Plan(about["boundary"], num_source, num_kept),
            kept=about["kept"],
            compacted=compacted,
            tails=tuple(raw[:num_groups]),
            beside=tuple(raw[num_groups:]),
            salt=about["salt"],
        )
        problem = self._unnameable(prefix)
        if problem is None:
            self._prefixes.keep(prefix)
            tails, beside = (tuple(map(_ids, rows)) for rows in (prefix.tails, prefix.beside))
            self._loaded.append(Loaded(prefix_id, _ids(compacted), tails, beside))
        pool.free_blocks(reversed(blocks))  # a prefix has references of its own
        if problem is not None:
            raise KVCompressionError(problem)
        return prefix

    def new_id(self) -> str:
        """For a prefix that is to be loaded."""
        return self._prefixes.new_id()

    @property
    def has_loaded(self) -> bool:
        """Whether there is something for `take_loaded`."""
        return bool(self._loaded)

    def take_kept(self) -> dict[str, str]:
        """Drain the requests, by the prefix that each has left since the last call."""
        kept, self.kept = self.kept, {}
        return kept

    def take_loaded(self) -> list[Loaded]:
        """Drain the prefixes that were loaded since the last call."""
        loaded, self._loaded = self._loaded, []
        return loaded

    def _unnameable(self, prefix: Prefix) -> str | None:
        """Why a prefix may not be kept until it is deleted; None if it may."""
        assert prefix.name is not None
        if self._prefixes.named(prefix.name, prefix.salt) is not None:
            return TAKEN
        manager, scheduler = self._manager, self._scheduler
        usable = manager.block_pool.num_gpu_blocks - 1
        longest = -(-scheduler.max_model_len // manager.block_size) * manager.num_groups
        longest += blocks_beside(scheduler.vllm_config)
        own, others = len(prefix.blocks), self._prefixes.named_blocks
        if usable - others - own >= longest:  # of whom vLLM has promised to serve
            return None
        return (
            f"its {own} blocks and {others} of other names would leave fewer of {usable} than {longest}, for "
            "--max-model-len; delete a prefix or lower it"
        )


def _keeps_what_is_seen(manager: SingleTypeKVCacheManager) -> bool:
    """Whether blocks of a group that a request has moved on from stay what they were at their ends."""
    if isinstance(manager, MambaManager):
        return manager.mamba_cache_mode == "align" and not manager.has_prefill_checkpoint_blocks
    return isinstance(manager, SlidingWindowManager | ChunkedLocalAttentionManager)


def _ids(blocks: Sequence[KVCacheBlock]) -> tuple[int, ...]:
    return tuple(block.block_id for block in blocks)


def _tokens_of(request: Request, num_tokens: int) -> tuple[int, ...] | None:
    if request.prompt_embeds is not None or request.mm_features:
        return None
    return tuple(request.all_token_ids[:num_tokens])


def _uncompacted(tracked: Tracked | None, config: KVCompressionConfig) -> str:
    """Why a request that ends was not compacted."""
    if tracked is None or (tracked.held is None and tracked.point is None):
        least = config.min_freed_tokens
        return f"the prompt is short: compacting it would free fewer than min_freed_tokens={least} tokens"
    if tracked.late:
        return "the pool had no room to compact the prompt; try again when fewer requests run"
    return "the request ended before its prompt was compacted"
