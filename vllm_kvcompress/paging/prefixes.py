"""Compacted prefixes: what requests were compacted to, kept for later ones that begin alike."""

import itertools
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.plan import Plan


@dataclass(eq=False)
class Prefix:
    """A compacted prefix, read by whom it fits and written by nobody.

    Attributes:
        id: what the workers call it.
        name: under which it is kept until it is deleted; None for one that goes when it is in the way.
        config: the options by which it was compacted.
        hashes: of its blocks as if all were raw, each of all tokens up to its end, with adapter, salt and
            pictures: one per block of compacted tokens and of the tail.
        tokens: of which it is; None where tokens do not say it all (pictures, embeddings).
        plan: its compaction.
        kept: fraction of the raw bytes that this was given.
        compacted: its compacted blocks.
        tails: of each group that is compacted, raw blocks behind them, computed on top of them; all are full.
        beside: of each other group of the cache what its layers see behind the end: the last blocks of
            windows, those of the chunk that it ends in, the block of a state. Without these a request can
            take over no less than all.
        salt: without which nobody may see it; None for nobody's.
        adapter: name of the adapter by which its tokens were computed; None for none.
        users: requests that hold its blocks, as many as did not end.
        hits: requests that have attached to it.
    """

    id: str
    name: str | None
    config: KVCompressionConfig
    hashes: tuple[bytes, ...]
    tokens: tuple[int, ...] | None
    plan: Plan
    kept: float | None
    compacted: tuple[KVCacheBlock, ...]
    tails: tuple[tuple[KVCacheBlock, ...], ...]
    beside: tuple[tuple[KVCacheBlock, ...], ...] = ()
    salt: str | None = None
    adapter: str | None = None
    users: int = 0
    hits: int = 0

    @property
    def blocks(self) -> tuple[KVCacheBlock, ...]:
        """All that it holds."""
        return self.compacted + tuple(block for row in self.tails + self.beside for block in row)


class Prefixes:
    """The prefixes of one pool, whose blocks they hold a reference of.

    Attributes:
        keeps_unnamed: whether there may be some without a name.
    """

    def __init__(self, pool: BlockPool, share: float) -> None:
        """
        Args:
            pool: whose blocks these are.
            share: part of it that prefixes without a name may hold.
        """
        self._pool = pool
        self.keeps_unnamed = share > 0
        self._most = int(share * (pool.num_gpu_blocks - 1))
        self._kept: OrderedDict[str, Prefix] = OrderedDict()  # by id, used longest ago first
        self._found: dict[tuple[bytes, str], list[Prefix]] = {}  # by the end of what is compacted
        self._holders: Counter[int] = Counter()  # how many hold a block
        self._unnamed: Counter[int] = Counter()  # how many of those without a name
        self._ids = itertools.count()
        self._dropped: list[str] = []

    def __iter__(self) -> Iterator[Prefix]:
        return iter(self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def new_id(self) -> str:
        """For a prefix; no request has such a name."""
        return f"prefix-{next(self._ids)}"

    def named(self, name: str, salt: str | None) -> Prefix | None:
        """The prefix of this name under this salt."""
        return next((each for each in self if each.name == name and each.salt == salt), None)

    def find(self, hashes: Sequence[bytes], content: str, most: int) -> tuple[Prefix, int] | None:
        """The prefix that spares most of these tokens.

        Args:
            hashes: of the blocks of a request's tokens.
            content: see `KVCompressionConfig.content`.
            most: blocks of these that it may stand for.

        Returns:
            It, and the blocks that it stands for: those that are compacted and some of its tail, or all.
        """
        best: tuple[Prefix, int] | None = None
        for end, block_hash in enumerate(hashes[:most] if self._kept else (), 1):
            for prefix in self._found.get((block_hash, content), ()):
                pairs = zip(prefix.hashes[end:], hashes[end:most], strict=False)
                num = end + sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
                if prefix.beside and num < len(prefix.hashes):
                    continue
                if best is None or num > best[1]:
                    best = prefix, num
        return best

    def use(self, prefix: Prefix) -> None:
        """Note that a request attaches to a prefix."""
        prefix.users += 1
        prefix.hits += 1
        self._kept.move_to_end(prefix.id)

    def keep(self, prefix: Prefix) -> bool:
        """Keep a prefix, for which others may have to go; False if there is no place for it, or one like it.

        Those without a name that it goes on from are the next to go.
        """
        if prefix.name is None:
            for each in self._found.get(self._key(prefix), ()):
                if each.hashes == prefix.hashes:
                    self._kept.move_to_end(each.id)
                    return False
        held = {block.block_id for block in prefix.blocks}
        if prefix.name is None and len(held) > self._most:
            return False
        self._pool.touch(prefix.blocks)
        for each in list(self):
            before = len(each.hashes) <= len(prefix.hashes) and each.name is None
            if before and each.hashes[-1] == prefix.hashes[len(each.hashes) - 1]:  # of all tokens up to there
                self._kept.move_to_end(each.id, last=False)
        self._kept[prefix.id] = prefix
        self._found.setdefault(self._key(prefix), []).append(prefix)
        self._holders.update(held)
        if prefix.name is None:
            self._unnamed.update(held)
            while len(self._unnamed) > self._most:
                self.drop(next(each for each in self if each.name is None))
        return True

    def drop(self, prefix: Prefix) -> None:
        """Give a prefix's blocks back; those that requests hold stay theirs."""
        del self._kept[prefix.id]
        found = self._found[self._key(prefix)]
        found.remove(prefix)
        if not found:
            del self._found[self._key(prefix)]
        held = {block.block_id for block in prefix.blocks}
        self._holders -= Counter(held)
        if prefix.name is None:
            self._unnamed -= Counter(held)
        self._pool.free_blocks(reversed(prefix.blocks))
        self._dropped.append(prefix.id)

    def make_room(self, spared: Collection[Prefix] = ()) -> bool:
        """Drop the prefix without a name that was used longest ago and that no request holds.

        Args:
            spared: not these.
        """
        idle = (each for each in self if each.name is None and not each.users and each not in spared)
        prefix = next(idle, None)
        if prefix is not None:
            self.drop(prefix)
        return prefix is not None

    def idle_blocks(self, spared: Collection[Prefix] = ()) -> int:
        """Blocks that nobody holds but prefixes without a name, other than these."""
        blocks, held = self._pool.blocks, {block.block_id for each in spared for block in each.blocks}
        return sum(blocks[name].ref_cnt == num for name, num in self._unnamed.items() if name not in held)

    @property
    def held_blocks(self) -> int:
        """Blocks of all prefixes."""
        return len(self._holders)

    @property
    def named_blocks(self) -> int:
        """Blocks of prefixes that have a name."""
        return len({block.block_id for each in self if each.name is not None for block in each.blocks})

    @property
    def has_dropped(self) -> bool:
        """Whether there is something for `take_dropped`."""
        return bool(self._dropped)

    def take_dropped(self) -> list[str]:
        """Drain the ids of prefixes that were dropped since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    @staticmethod
    def _key(prefix: Prefix) -> tuple[bytes, str]:
        return prefix.hashes[prefix.plan.source_blocks - 1], prefix.config.content
