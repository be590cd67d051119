"""What a configuration means in tokens and blocks: compaction points, plans, peaks, memory for queries."""

import math
from dataclasses import dataclass
from fractions import Fraction

from vllm_kvcompress.config import DEFAULT_WINDOW, KVCompressionConfig
from vllm_kvcompress.formats import RECORD
from vllm_kvcompress.kernels.batch import moment_shape

# Bytes of compacted pages that a compaction on a GPU may write in place of pages that it reads. All that is
# kept is staged then, for which so much memory is set aside; what is larger waits for free blocks.
STAGED_BYTES = 256 * 2**20
SPARE_QUERIES = 32  # kept beyond a window: rejected drafts overwrite the oldest
PROMPTS_AT_ONCE = 32  # for whose queries there is memory on a GPU


@dataclass(frozen=True)
class Plan:
    """What compacting a request will do, known before its scores are.

    Attributes:
        boundary: first token that stays raw, a multiple of the block size.
        source_blocks: blocks below the boundary, as if all of them were raw.
        kept_blocks: blocks of compacted pages that stand for them; with a threshold, at most.
    """

    boundary: int
    source_blocks: int
    kept_blocks: int

    @classmethod
    def of(
        cls,
        config: KVCompressionConfig,
        num_tokens: int,
        block_size: int,
        held: "Plan | None" = None,
        page_tokens: int | None = None,
        budget: float | None = None,
        shared: bool = False,
    ) -> "Plan | None":
        """What compacting a request would do; None if it is left alone.

        That is: if it is disabled, if nothing would be freed, or if a first compaction would free less than
        `min_freed_tokens`, or any under pressure, unless the request is streaming. A threshold keeps
        `kept_blocks` at most and is taken to keep as little as there can be; it may turn out to free nothing.

        Args:
            config: its options.
            num_tokens: tokens computed so far.
            block_size: tokens per block.
            held: its last compaction.
            page_tokens: tokens of a head that a block holds once they are encoded (see `page_tokens`); None
                without a format.
            budget: in place of the options' own.
            shared: whether the blocks of its last compaction are others', and not freed by another one.
        """
        if not config.enabled:
            return None
        source = max(0, num_tokens - config.recent_tokens) // block_size
        source -= source % _blocks_together(config, block_size)
        kept = _kept_blocks(config, source, block_size, page_tokens, budget)
        now = source if held is None else source - held.source_blocks
        if held is not None and not shared:
            now += held.kept_blocks
        first = (held is None or shared) and config.when == "prompt"
        least = config.min_freed_tokens if first or config.when == "pressure" else 1
        fewest = kept
        if config.threshold is not None:  # how much scores above it is known only then
            kept, fewest = min(kept, now), min(kept, _fewest_blocks(config, source, block_size, page_tokens))
            if held is not None and source == held.source_blocks:
                return None
        if (now - fewest) * block_size < least:
            return None
        return cls(source * block_size, source, kept)


def page_tokens(
    config: KVCompressionConfig, block_size: int, tokens_of_page: int, head_size: int, itemsize: int
) -> int | None:
    """Tokens of a head that a block's pages hold once they are encoded; None without a format.

    Args:
        config: whose format it is.
        block_size: tokens of a block as vLLM has them.
        tokens_of_page: those of a page: as many, or fewer where kernels see smaller blocks.
        head_size: channels of a key, and of a value.
        itemsize: bytes of a number of the cache.
    """
    if config.record_format is None:
        return None
    page_bytes = 2 * tokens_of_page * head_size * itemsize
    in_page = config.record_format.tokens_per_page(page_bytes, head_size)
    return block_size // tokens_of_page * in_page


def tokens_read(num_tokens: int, block_size: int, held: Plan | None = None) -> int:
    """Tokens that compacting a request reads of each head, on average.

    Args:
        num_tokens: tokens computed so far.
        block_size: tokens per block.
        held: its last compaction.
    """
    return held.kept_blocks * block_size + num_tokens - held.boundary if held else num_tokens


def next_point(config: KVCompressionConfig, num_prompt_tokens: int, point: int | None = None) -> int | None:
    """The number of computed tokens at which a request is compacted first, or next after `point`.

    It depends on the request alone, so that what is kept does not depend on what else was running; under
    pressure, when that decides, there is none.
    """
    if config.when == "pressure":
        return None
    if point is None or point < num_prompt_tokens:
        if config.when == "prompt":
            return num_prompt_tokens
        assert config.interval is not None
        return min(num_prompt_tokens, (point or 0) + config.interval)
    return None if config.interval is None else point + config.interval


def is_ever_compacted(
    config: KVCompressionConfig,
    num_prompt_tokens: int,
    num_tokens: int,
    block_size: int,
    page_tokens: int | None = None,
) -> bool:
    """Whether a request is compacted before it ends.

    Args:
        config: its options.
        num_prompt_tokens: its prompt's length.
        num_tokens: its length at its end, at most; the last one is sampled and never computed.
        block_size: tokens per block.
        page_tokens: as of `Plan.of`.
    """
    last = num_tokens - 2  # computed before its last step
    point = num_prompt_tokens
    if config.when == "pressure":
        point = last
    elif last < num_prompt_tokens:
        if config.when != "streaming":
            return False
        assert config.interval is not None
        point = last // config.interval * config.interval
    elif config.interval is not None:
        point += (last - num_prompt_tokens) // config.interval * config.interval
    # What a compaction frees only grows with the length, so it is enough to look at the last point.
    return Plan.of(config, point, block_size, page_tokens=page_tokens) is not None


def peak_blocks(
    config: KVCompressionConfig,
    num_prompt_tokens: int,
    num_tokens: int,
    block_size: int,
    beside: bool = False,
    page_tokens: int | None = None,
) -> int:
    """Blocks that a request holds at most.

    Args:
        config: its options.
        num_prompt_tokens: its prompt's length.
        num_tokens: its length at its end.
        block_size: tokens per block.
        beside: whether compacted pages are written beside what they are made of, which is freed afterwards;
            a request that could stay whole may still be served so.
        page_tokens: as of `Plan.of`.
    """
    whole = -(-num_tokens // block_size)
    if not config.enabled or config.interval is None:
        return whole
    raw = -(-(config.interval + config.recent_tokens) // block_size) + 2  # the edges of two boundaries
    raw += _blocks_together(config, block_size) - 1
    bounded = _kept_blocks(config, whole, block_size, page_tokens) * (2 if beside else 1) + raw
    if config.when == "streaming":
        return min(whole, bounded)
    # It stays whole for as long as a first compaction would free too little.
    bounded += -(-config.min_freed_tokens // block_size) - 1
    prompt = -(-num_prompt_tokens // block_size)
    prompt += _kept_blocks(config, prompt, block_size, page_tokens) if beside else 0
    return min(whole, max(prompt, bounded))


def moment_tokens(head_size: int, itemsize: int) -> int:
    """Queries of a head that take as much memory as the moments of all of them.

    Args:
        head_size: D.
        itemsize: bytes of a number of queries.
    """
    return -(-4 * math.prod(moment_shape(1, head_size)) // (head_size * itemsize))


def ring_tokens(config: KVCompressionConfig, of_moments: int = 0, of_columns: int = 0) -> int:
    """Queries for which a request takes memory: those that are kept for its policy's window, with those that
    it recalls, `of_moments` if it keeps the moments of all, and `of_columns` if it keeps a number of each of
    its tokens."""
    policy = config.build_policy()
    own = 0 if policy.moments is None else of_moments
    if policy.moments is None and config.watches_every_query and not policy.matches:
        own += of_columns
    if not config.observed_window:
        return own
    return own + config.observed_window + SPARE_QUERIES + policy.recalled


def ring_budget(
    config: KVCompressionConfig, max_num_seqs: int, num_cache_tokens: int, group: int, of_moments: int = 0
) -> int:
    """Queries for which there is memory on a GPU, where they take from the cache's.

    Enough for some prompts at a time, or for every request if rings last as long as their requests do,
    but no more than an eighth of the memory; requests beyond it wait before they start.

    Args:
        config: the engine's options.
        max_num_seqs: requests that run at a time.
        num_cache_tokens: tokens whose keys and values, in queries' dtype, fit the memory, rings and cache
            together.
        group: query heads of each KV head.
        of_moments: see `moment_tokens`.
    """
    at_once = max_num_seqs if config.compacts_again else min(max_num_seqs, PROMPTS_AT_ONCE)
    wanted = at_once * max(ring_tokens(config, of_moments), DEFAULT_WINDOW + SPARE_QUERIES)
    return min(wanted, num_cache_tokens // 8 * 2 // group)


def _blocks_together(config: KVCompressionConfig, block_size: int) -> int:
    """Blocks that are compacted together, so that with a format they make whole records."""
    return 1 if config.record_format is None else RECORD // math.gcd(RECORD, block_size)


def _kept_blocks(
    config: KVCompressionConfig,
    source: int,
    block_size: int,
    page_tokens: int | None,
    budget: float | None = None,
) -> int:
    in_page = block_size if page_tokens is None else page_tokens
    whole = kept = -(-source * block_size // in_page)
    budget = config.budget if budget is None else budget
    if budget is not None:
        # Through the decimal form, so that a budget of 0.14 keeps 7 blocks of 50 and not 8.
        kept = min(kept, math.ceil(Fraction(str(budget)) * source))
    if config.max_tokens_kept is not None:
        kept = min(kept, config.max_tokens_kept // in_page)
    return min(whole, max(kept, _fewest_blocks(config, source, block_size, page_tokens)))


def _fewest_blocks(config: KVCompressionConfig, source: int, block_size: int, page_tokens: int | None) -> int:
    """Blocks that are kept whatever the scores."""
    in_page = block_size if page_tokens is None else page_tokens
    return max(-(-config.sink_tokens // in_page), min(source, 1))
