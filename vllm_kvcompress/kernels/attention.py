"""Attention of decode and extend rows over compacted pages and the raw tail, in one launch.

A program serves some queries of one row, one KV head with its whole group, and one share of the head's keys.
The keys of a head are counted through its run and on through the raw tail: below `run_pages · N` they lie in
the run, and from there on in the blocks of vLLM's table from the boundary on. A row without compaction has an
empty run and its boundary at 0. Everything below the boundary precedes every query, so one comparison of key
and query numbers is the causal mask of both parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_kvcompress.kernels.arithmetic import DTYPES, dot, tanh
from vllm_kvcompress.kernels.batch import Rows, Runs, Scales
from vllm_kvcompress.kernels.shares import MIN_SHARE, WAVES, Shares
from vllm_kvcompress.kernels.tiles import MAX_TILE, MIN_DOT, TILE_BYTES, Tiles, empty_shares

LOG2_E = 1.4426950408889634
MAX_SPLITS = 64
MOST_MERGED = 32  # of one whose head may be cut by its length


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    runs: Runs,
    rows: Rows,
    layer: int,
    scale: float,
    logits_soft_cap: float = 0.0,
    num_splits: int = 1,
    min_share: int = MIN_SHARE,
    out: Tensor | None = None,
    compacted_only: bool = False,
    scales: Scales | None = None,
    sinks: Tensor | None = None,
    shares: Shares | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every row's newest tokens over what each KV head holds.

        O = softmax(cap·tanh(scale·q·kᵀ / cap))·v, or softmax(scale·q·kᵀ)·v without a cap

    The grid depends on shapes alone and nothing waits for the device, so a CUDA graph can capture the call.
    Tokens behind the last row's are padding: neither read nor written.

    Float8 numbers are multiplied as numbers of out's dtype, which holds them exactly, and sums by their
    scales. A page may lie where another layer's would, so the scales are those of the layer that reads it.

    Args:
        query: `[T, Hq, D]`, float16, bfloat16 or float32, or float8 as the cache is; rows follow each other
            as `query_start_loc` says.
        keys: `[S, B, H, N, D]`, a view of the cache in out's dtype or float8; any strides but 1 for the last.
        values: `[S, B, H, N, D]`, likewise and with the same strides, so that one page offset serves both.
        runs: where compacted rows have their pages.
        rows: the batch.
        layer: which of the L layers; S slots of the cache are as many, unless `Runs.slots` says more.
        scale: softmax scale.
        logits_soft_cap: 0 for none.
        num_splits: most shares that the keys of a head are cut into (see `choose_splits`).
        min_share: least keys of a share; short heads are cut into fewer.
        out: `[T, Hq, D]` for the result, float16, bfloat16 or float32; made if absent, in query's dtype.
        compacted_only: serve the compacted rows of raw pages and leave the others' part of the result alone:
            other kernels write it.
        scales: the layer's, if the cache is float8.
        sinks: `[Hq]`, one more logit of each query head, to which no value belongs; behind the cap.
        shares: what `Shares.cut` has listed of the same rows, with the same `compacted_only`, in place of
            `num_splits` and `min_share`; of no use where a row may have more queries than one tile.

    Returns:
        `out`, and the natural logarithm of the softmax's denominator, `[T, Hq]` float32.
    """
    num_tokens, query_heads, head_size = query.shape
    num_slots, _, heads, _, _ = keys.shape
    group = query_heads // heads
    assert query.stride(2) == keys.stride(4) == values.stride(4) == 1
    assert keys.stride() == values.stride() and keys.dtype == values.dtype
    assert query_heads == group * heads and runs.num_layers(heads) == (len(runs.slots) or num_slots)

    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    assert out.stride(2) == 1 and out.dtype in DTYPES and query.dtype in (out.dtype, keys.dtype)
    assert (keys.dtype == out.dtype) if scales is None else (keys.element_size() == 1)
    lse = torch.empty(num_tokens, query_heads, dtype=torch.float32, device=query.device)
    most_rows = 32 if out.element_size() == 4 else MAX_TILE  # for which there are registers
    tiles = Tiles.of(query, heads, rows, out.dtype, most_rows=most_rows)
    num_rows = rows.seq_lens.shape[0]
    shares = shares if tiles.one and tiles.rows <= MOST_MERGED else None
    if shares is not None:
        programs = shares.num_programs(num_rows), 1, 1
        parts = shares.num_parts, tiles.queries * group
        share_out = torch.empty(*parts, head_size, dtype=torch.float32, device=query.device)
        share_lse = torch.empty(parts, dtype=torch.float32, device=query.device)
        strides = 0, *share_out.stride()[:2], 0, *share_lse.stride()
    else:
        if sinks is not None:  # which shares have in common
            num_splits = max(num_splits, 2)
        programs = tiles.count, heads, num_splits
        share_out, share_lse = out[:, :, None], lse[:, :, None]
        if num_splits > 1:
            share_out, share_lse = empty_shares(query, num_splits)
        strides = *share_out.stride()[:3], *share_lse.stride()
    inner, outer = logit_factors(scale, logits_soft_cap)
    _attend_kernel[programs](
        query,
        keys,
        values,
        share_out,
        share_lse,
        *((None,) * 5 if shares is None else (shares.work, shares.arrived, out, lse, sinks)),
        *((None,) * 3 if scales is None else (scales.query, scales.key, scales.value)),
        runs.destination,
        runs.start,
        runs.boundary,
        runs.format,
        rows.slot,
        rows.block_table,
        rows.seq_lens,
        rows.query_start_loc,
        layer,
        runs.slot_of(layer),
        num_rows,
        min_share,
        inner,
        outer,
        *query.stride()[:2],
        *keys.stride()[:4],
        *strides,
        *((0,) * 4 if shares is None else (*shares.work.stride()[:2], *out.stride()[:2])),
        runs.destination.stride(0),
        runs.start.stride(0),
        rows.block_table.stride(0),
        SHARES=shares is not None,
        SINKS=shares is not None and sinks is not None,
        SOFT_CAP=logits_soft_cap > 0,
        COMPACTED_ONLY=compacted_only,
        KEYS=tiles.keys,
        DTYPE=DTYPES[out.dtype],
        FLOAT8=scales is not None,
        FLOAT8_QUERY=query.dtype != out.dtype,
        **tiles.constants(query, keys),
        **depth(out.element_size(), tiles.channels, tiles.rows, scales is not None, pipelines(query.device)),
    )
    if shares is None and num_splits > 1:
        merge(share_out, share_lse, out, lse, runs, rows, 0, compacted_only, sinks)
    return out, lse


def merge(
    share_out: Tensor,
    share_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    runs: Runs,
    rows: Rows,
    format_id: int,
    compacted_only: bool = True,
    sinks: Tensor | None = None,
) -> None:
    """Put the shares of each head's keys together.

    Args:
        share_out: `[T, Hq, splits, D]` float32, contiguous; never read of a share without keys.
        share_lse: `[T, Hq, splits]` float32, contiguous; -inf where a share has no keys.
        out: `[T, Hq, D]` for the result.
        lse: `[T, Hq]` float32, contiguous, likewise.
        runs: of the compacted rows.
        rows: the batch.
        format_id: of the rows that are served, see `Runs`.
        compacted_only: leave all others alone; else every row is served.
        sinks: `[Hq]`, one more logit of each query head.
    """
    num_tokens, query_heads, num_splits, head_size = share_out.shape
    _merge_kernel[num_tokens, query_heads](
        share_out,
        share_lse,
        out,
        lse,
        sinks,
        runs.format,
        rows.slot,
        rows.query_start_loc,
        format_id,
        rows.seq_lens.shape[0],
        *out.stride()[:2],
        COMPACTED_ONLY=compacted_only,
        SINKS=sinks is not None,
        HEAD_SIZE=head_size,
        CHANNELS=triton.next_power_of_2(head_size),
        SPLITS=num_splits,
        ALL=triton.next_power_of_2(num_splits),
        AT_ONCE=min(16, triton.next_power_of_2(num_splits)),
    )


def pipelines(device: torch.device) -> bool:
    """Whether a device copies to shared memory while it computes: NVIDIA's since compute capability 8.0.

    What is no GPU is taken for one: kernels are interpreted there, or compiled for others.
    """
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def depth(itemsize: int, channels: int, tile_rows: int, float8: bool, pipelined: bool) -> dict[str, int]:
    """Warps and stages of a program, as compiled code is best: keys and values in two buffers each, and
    nothing in memory for want of registers. Two of five stages are the page's number and what it leads to.
    """
    if not pipelined:  # stages mean something else there, and products take more registers
        return {"num_warps": 4, "num_stages": 3}
    if itemsize == 4:
        if tile_rows > MIN_DOT:
            return {"num_warps": 8, "num_stages": 3}
        return {"num_warps": 4, "num_stages": 5 if channels <= 128 else 3}
    if tile_rows > 32:
        return {"num_warps": 8, "num_stages": 5}
    narrow = tile_rows == MIN_DOT and channels <= 128 and not float8
    return {"num_warps": 2 if narrow else 4, "num_stages": 5}


def programs_at_once(shared_bytes: int) -> int:
    """Programs with two buffers of keys and two of values that so much shared memory has room for."""
    return max(1, shared_bytes // (4 * TILE_BYTES + 8 * 1024))


def merge_bytes(
    max_tokens: int, query_heads: int, group: int, head_size: int, processors: int, at_once: int, sinks: bool
) -> int:
    """A bound on the bytes of a layer's results that are still to be merged, in formats of one part.

    Args:
        max_tokens: of a batch.
        query_heads: Hq.
        group: query heads of each KV head.
        head_size: D.
        processors: streaming multiprocessors of the device.
        at_once: see `Shares`.
        sinks: whether the layer has any.
    """
    of_shares = 2 * WAVES * at_once * MOST_MERGED
    # `choose_splits` fills the device four times with tiles of 16 queries, and rounds up to a power of two.
    of_splits = max(2 * 4 * processors * 16 * group, 2 * max_tokens * query_heads * sinks)
    return 4 * max(of_shares, of_splits) * (2 * head_size + 1)


def choose_splits(num_rows: int, heads: int, max_keys: int, processors: int) -> int:
    """How many shares to cut the keys of a head into, so that short batches still fill the device.

    Heads differ in length, so there are more programs than fit at once: long heads then even out. Depends on
    bounds only, never on this step's lengths, for the grid of a captured graph stays what it was.

    Args:
        num_rows: rows of the batch, or tiles of queries if rows have several.
        heads: KV heads.
        max_keys: keys of the longest head.
        processors: streaming multiprocessors of the device.
    """
    wanted = -(-4 * processors // (num_rows * heads))
    useful = -(-max_keys // MIN_SHARE)
    return 1 << max(min(wanted, useful, MAX_SPLITS) - 1, 0).bit_length()


def logit_factors(scale: float, soft_cap: float) -> tuple[float, float]:
    """What dot products are multiplied with before the cap's tanh and after it, for a softmax in base 2."""
    return (scale / soft_cap, soft_cap * LOG2_E) if soft_cap > 0 else (scale * LOG2_E, 1.0)


@triton.jit
def find_row(number, query_start_loc, num_rows, QUERIES: tl.constexpr, SPARE: tl.constexpr):
    """The row of a tile of QUERIES tokens; row r's tiles begin at query_start_loc[r] // QUERIES + r·SPARE.

    One spare tile per row leaves room for its last, incomplete one.
    """
    low = 0
    high = num_rows - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(query_start_loc + middle) // QUERIES + middle * SPARE <= number:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def find_queries(query_start_loc, num_rows, QUERIES: tl.constexpr, ONE_TILE: tl.constexpr):
    """A program's row and the first of its queries there; ONE_TILE: no row has more than QUERIES."""
    if ONE_TILE:
        row, first_query = tl.program_id(0), 0
    else:
        tile = tl.program_id(0)
        row = find_row(tile, query_start_loc, num_rows, QUERIES, 1)
        first_query = (tile - tl.load(query_start_loc + row) // QUERIES - row) * QUERIES
    return row, first_query


@triton.jit
def has_format(slot, formats, wanted):
    """Whether a row is compacted and its runs are of that format."""
    return (slot >= 0) & (tl.load(formats + tl.maximum(slot, 0)) == wanted)


@triton.jit
def find_keys(
    row,
    slot,
    layer,
    head,
    destination,
    start,
    boundary,
    block_table,
    destination_row,
    start_row,
    table_row,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """A head's first linear page and its pages, its row's first raw token, and where their blocks are."""
    compacted = slot >= 0
    state = tl.maximum(slot, 0).to(tl.int64)
    run = start + state * start_row + layer * HEADS + head
    first_page = tl.load(run, mask=compacted, other=0)
    run_pages = tl.load(run + 1, mask=compacted, other=0) - first_page
    raw_from = tl.load(boundary + state, mask=compacted, other=0)
    run_blocks = destination + state * destination_row
    tail_blocks = block_table + row.to(tl.int64) * table_row + raw_from // BLOCK_SIZE
    return first_page, run_pages, raw_from, run_blocks, tail_blocks


@triton.jit
def token_offsets(
    key,
    held,
    run_blocks,
    first_page,
    run_pages,
    tail_blocks,
    own_slot,
    head,
    slot_stride,
    block_stride,
    head_stride,
    token_stride,
    HEADS: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Element offsets of a head's keys, counted through its run and its raw tail, as int64."""
    page = key // BLOCK_SIZE
    linear = first_page + page
    in_run = page < run_pages
    block = tl.load(
        tl.where(in_run, run_blocks + linear // PAGES_PER_BLOCK, tail_blocks + (page - run_pages)),
        mask=held,
        other=0,
    ).to(tl.int64)
    slot = linear % PAGES_PER_BLOCK
    cache_slot = tl.where(in_run, slot // HEADS, own_slot).to(tl.int64)
    head_slot = tl.where(in_run, slot % HEADS, head).to(tl.int64)
    offset = cache_slot * slot_stride + block * block_stride + head_slot * head_stride
    return offset + (key % BLOCK_SIZE) * token_stride


@triton.jit
def arrives_last(arrived, item, count):
    """Whether all other shares of a head have been written, by programs that came before."""
    tl.debug_barrier()  # every thread has written its part before one of them says so to other programs
    last = tl.atomic_add(arrived + item, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(arrived + item, 0)
    return last


@triton.jit
def merged_lse(lse_at, lse_share, count, real):
    """Log-sum-exp `[ROWS]` of all shares of a head.

    In their order, whoever came last, so that sums are the same to the last bit. Past the first cache: other
    programs have written them.
    """
    peak = tl.full(lse_at.shape, -float("inf"), tl.float32)
    total = tl.zeros(lse_at.shape, tl.float32)
    for share in range(0, count):
        own = tl.load(lse_at + share * lse_share, mask=real, other=-float("inf"), cache_modifier=".cg")
        new_peak = tl.maximum(peak, own)
        level = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        total = total * tl.exp(peak - level) + tl.exp(own - level)
        peak = new_peak
    return tl.where(total > 0.0, peak + tl.log(tl.where(total > 0.0, total, 1.0)), -float("inf"))


@triton.jit
def merged(lse, lse_at, out_at, lse_share, out_share, count, real, mask):
    """Result `[ROWS, ·]` of all shares of a head, whose log-sum-exp together is `lse`; see `merged_lse`."""
    level = tl.where(lse == -float("inf"), 0.0, lse)
    result = tl.zeros(mask.shape, tl.float32)
    for share in range(0, count):
        own = tl.load(lse_at + share * lse_share, mask=real, other=-float("inf"), cache_modifier=".cg")
        part = tl.load(out_at + share * out_share, mask=mask, other=0.0, cache_modifier=".cg")
        result += part * tl.exp(own - level)[:, None]
    return result


@triton.jit
def with_sink(lse, sink):
    """Log-sum-exp with one more logit, to which no value belongs, and what is left to the others."""
    peak = tl.maximum(lse, sink)
    level = tl.where(peak == -float("inf"), 0.0, peak)
    own = tl.exp(lse - level)
    total = own + tl.exp(sink - level)
    divisor = tl.where(total > 0.0, total, 1.0)
    return tl.where(total > 0.0, level + tl.log(divisor), -float("inf")), own / divisor


@triton.jit(
    do_not_specialize=[
        "layer",
        "own_slot",
        "num_rows",
        "min_share",
        "destination_row",
        "start_row",
        "table_row",
    ]
)
def _attend_kernel(
    query,
    keys,
    values,
    share_out,  # [T, Hq, splits, D], or if SHARES [places, rows of a tile, D]
    share_lse,  # [T, Hq, splits], or if SHARES [places, rows of a tile]
    work,
    arrived,
    out,
    lse_out,
    sinks,
    query_scale,
    key_scale,
    value_scale,
    destination,
    start,
    boundary,
    formats,
    row_slot,
    block_table,
    seq_lens,
    query_start_loc,
    layer,
    own_slot,  # of the cache, where the layer's raw pages are
    num_rows,
    min_share,
    inner,
    outer,
    query_token,
    query_head,
    slot_stride,
    block_stride,
    head_stride,
    token_stride,
    out_token,
    out_head,
    out_split,
    lse_token,
    lse_head,
    lse_split,
    work_field,
    work_layer,
    final_token,
    final_head,
    destination_row,
    start_row,
    table_row,
    SHARES: tl.constexpr,
    SINKS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    COMPACTED_ONLY: tl.constexpr,
    ONE_TILE: tl.constexpr,
    HEADS: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DTYPE: tl.constexpr,
    FLOAT8: tl.constexpr,
    FLOAT8_QUERY: tl.constexpr,
):
    if SHARES:
        program = tl.program_id(0)
        share_at = work + layer * work_layer + program
        item = tl.load(share_at)
        if item < 0:
            return
        row, head, first_query = item // HEADS, item % HEADS, 0
    else:
        head = tl.program_id(1)
        row, first_query = find_queries(query_start_loc, num_rows, QUERIES, ONE_TILE)
    first_token = tl.load(query_start_loc + row)
    num_queries = tl.load(query_start_loc + row + 1) - first_token
    slot = tl.load(row_slot + row)
    if not SHARES:  # else all others are left out of the work
        idle = first_query >= num_queries
        if COMPACTED_ONLY:
            idle = idle | (not has_format(slot, formats, 0))
        if idle:
            return

    first_page, run_pages, raw_from, run_blocks, tail_blocks = find_keys(
        row,
        slot,
        layer,
        head,
        destination,
        start,
        boundary,
        block_table,
        destination_row,
        start_row,
        table_row,
        HEADS,
        BLOCK_SIZE,
    )
    # The row's first query is that many keys behind the head's first.
    own = run_pages * BLOCK_SIZE - raw_from + tl.load(seq_lens + row) - num_queries
    if SHARES:
        begin, end = tl.load(share_at + work_field), tl.load(share_at + 2 * work_field)
    else:
        split = tl.program_id(2)
        visible = own + tl.minimum(first_query + QUERIES, num_queries)
        share = tl.cdiv(tl.cdiv(visible, tl.num_programs(2)), KEYS) * KEYS
        share = tl.maximum(share, min_share)
        begin = split * share
        end = tl.minimum(begin + share, visible)

    pair = tl.arange(0, ROWS)
    number = first_query + pair // GROUP
    token = (first_token + number).to(tl.int64)
    query_of = head * GROUP + pair % GROUP
    real = (pair < QUERIES * GROUP) & (number < num_queries)
    if not SHARES:
        lse_at = share_lse + token * lse_token + query_of * lse_head + split * lse_split
        if begin >= end:
            tl.store(lse_at, tl.full([ROWS], -float("inf"), tl.float32), mask=real)
            return

    channel = tl.arange(0, CHANNELS)
    in_head = channel < HEAD_SIZE
    real_channels = real[:, None] & in_head[None, :]
    q = tl.load(
        query + (token * query_token + query_of * query_head)[:, None] + channel[None, :],
        mask=real_channels,
        other=0.0,
    ).to(DTYPE)
    if FLOAT8:
        inner *= tl.load(key_scale)
    if FLOAT8_QUERY:
        inner *= tl.load(query_scale)
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, CHANNELS], tl.float32)
    for tile in range(begin, end, KEYS):
        key = tile + tl.arange(0, KEYS)
        held = key < end
        offset = token_offsets(
            key,
            held,
            run_blocks,
            first_page,
            run_pages,
            tail_blocks,
            own_slot,
            head,
            slot_stride,
            block_stride,
            head_stride,
            token_stride,
            HEADS,
            PAGES_PER_BLOCK,
            BLOCK_SIZE,
        )
        k = tl.load(
            keys + offset[None, :] + channel[:, None], mask=held[None, :] & in_head[:, None], other=0.0
        )
        v = tl.load(
            values + offset[:, None] + channel[None, :], mask=held[:, None] & in_head[None, :], other=0.0
        )
        k, v = k.to(DTYPE), v.to(DTYPE)
        logits = dot(q, k) * inner
        if SOFT_CAP:
            logits = tanh(logits) * outer
        seen = held[None, :] & (key[None, :] <= (own + number)[:, None])
        logits = tl.where(seen, logits, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        # A query may see no key of this tile, nor of any before: -inf less -inf must not become NaN.
        level = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weights = tl.exp2(logits - level[:, None])
        shrink = tl.exp2(peak - level)
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None] + dot(weights.to(DTYPE), v)
        peak = new_peak

    some = total > 0.0
    divisor = tl.where(some, total, 1.0)
    lse = tl.where(some, (peak + tl.log2(divisor)) * 0.6931471805599453, -float("inf"))
    result = result / divisor[:, None]
    if FLOAT8:
        result *= tl.load(value_scale)
    if SHARES:
        count = tl.load(share_at + 3 * work_field)
        last = count == 1
        if count > 1:
            mine, place = tl.load(share_at + 4 * work_field), tl.load(share_at + 5 * work_field).to(tl.int64)
            part_lse = share_lse + place * lse_head + pair * lse_split
            part_out = share_out + place * out_head + (pair * out_split)[:, None] + channel[None, :]
            tl.store(part_lse + mine * lse_head, lse, mask=real)
            tl.store(part_out + mine * out_head, result, mask=real_channels)
            last = arrives_last(arrived, item, count)
            if last:
                lse = merged_lse(part_lse, lse_head, count, real)
                result = merged(lse, part_lse, part_out, lse_head, out_head, count, real, real_channels)
        if last:
            if SINKS:
                sink = tl.load(sinks + query_of, mask=real, other=-float("inf")).to(tl.float32)
                lse, left = with_sink(lse, sink)
                result *= left[:, None]
            tl.store(lse_out + token * (HEADS * GROUP) + query_of, lse, mask=real)
            out_at = out + token * final_token + query_of * final_head
            tl.store(out_at[:, None] + channel[None, :], result.to(out.dtype.element_ty), mask=real_channels)
    else:
        tl.store(lse_at, lse, mask=real)
        out_at = share_out + token * out_token + query_of * out_head + split * out_split
        tl.store(
            out_at[:, None] + channel[None, :], result.to(share_out.dtype.element_ty), mask=real_channels
        )


@triton.jit(do_not_specialize=["format_id", "num_rows"])
def _merge_kernel(
    share_out,  # [T, Hq, SPLITS, D] float32
    share_lse,  # [T, Hq, SPLITS] float32; -inf where a share is empty, and its share_out was never written
    out,
    lse,  # [T, Hq] float32
    sinks,  # [Hq]
    formats,
    row_slot,
    query_start_loc,
    format_id,
    num_rows,
    out_token,
    out_head,
    COMPACTED_ONLY: tl.constexpr,
    SINKS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
    ALL: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    idle = token >= tl.load(query_start_loc + num_rows)
    if COMPACTED_ONLY:
        row = find_row(token, query_start_loc, num_rows, 1, 0)
        idle = idle | (not has_format(tl.load(row_slot + row), formats, format_id))
    if idle:
        return
    pair = token * tl.num_programs(1) + head
    every = tl.arange(0, ALL)
    share = tl.load(share_lse + pair * SPLITS + every, mask=every < SPLITS, other=-float("inf"))
    peak = tl.max(share, 0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        peak = tl.maximum(peak, sink)
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    total = tl.sum(tl.exp(share - peak), 0)
    if SINKS:
        total += tl.exp(sink - peak)

    channel = tl.arange(0, CHANNELS)
    in_head = channel < HEAD_SIZE
    result = tl.zeros([CHANNELS], tl.float32)
    for first in range(0, SPLITS, AT_ONCE):
        some = pair * SPLITS + first + tl.arange(0, AT_ONCE)
        present = first + tl.arange(0, AT_ONCE) < SPLITS
        share = tl.load(share_lse + some, mask=present, other=-float("inf"))
        weight = tl.exp(share - peak)
        part = tl.load(
            share_out + some[:, None] * HEAD_SIZE + channel[None, :],
            mask=(share > -float("inf"))[:, None] & in_head[None, :],
            other=0.0,
        )
        result += tl.sum(part * weight[:, None], 0)

    divisor = tl.where(total > 0.0, total, 1.0)
    tl.store(lse + pair, tl.where(total > 0.0, peak + tl.log(divisor), -float("inf")))
    out_at = out + token * out_token + head * out_head + channel
    tl.store(out_at, (result / divisor).to(out.dtype.element_ty), mask=in_head)
