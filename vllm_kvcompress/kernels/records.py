"""Attention of decode and extend rows over pages of encoded tokens and the raw tail, in one softmax.

A program serves some queries of one row, one KV head with its whole group, and one share of the head's
tokens, which are counted through the records of its run and on through the raw tail. Everything encoded
precedes every query. A record's codes lie in planes (see `formats.base.pack`), and no number leaves its
plane: the tokens of a plane of keys have logits of their own, and the channels of a plane of values have sums
of their own. So whatever a thread has loaded it unpacks itself.

Formats that rotate are served where they are: the query is rotated before the kernel, which adds up encoded
values and raw ones apart. The encoded part is rotated back at the end, by the kernel that merges the shares
if there are several.
"""

from dataclasses import dataclass
from functools import cache
from math import pi, sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_kvcompress.formats.base import RECORD, Format, RecordFormat
from vllm_kvcompress.formats.hybrid import Hybrid
from vllm_kvcompress.formats.kivi import Kivi, value_group
from vllm_kvcompress.formats.mixed_dim import MixedDim
from vllm_kvcompress.formats.turboquant import TurboCentred, TurboProd, TurboQuant
from vllm_kvcompress.kernels.arithmetic import dot, tanh
from vllm_kvcompress.kernels.attention import (
    LOG2_E,
    MOST_MERGED,
    arrives_last,
    find_queries,
    find_row,
    has_format,
    logit_factors,
    merge,
    merged,
    merged_lse,
    pipelines,
    with_sink,
)
from vllm_kvcompress.kernels.batch import Rows, Runs
from vllm_kvcompress.kernels.latents import attend_latents
from vllm_kvcompress.kernels.shares import MIN_SHARE, Shares
from vllm_kvcompress.kernels.tiles import MIN_DOT, MOST_RAW, Tiles, empty_shares

HEADS_AT_ONCE = 16  # of a program that rotates back
COLUMNS_AT_ONCE = 32  # of the rotation
BITS_OF_E = tl.constexpr(LOG2_E)
TOKENS = tl.constexpr(RECORD)


@dataclass(frozen=True)
class Layout:
    """Where a record's parts lie.

    Attributes:
        key_bits: of a key's code.
        bits: of a value's code.
        group: channels of a value whose codes are packed together.
        parts: bytes before each of: key codes, key signs, value codes, and of float16 numbers. These are
            KIVI's key scales and zeros or TurboQuant's key norms and norms of residuals; then KIVI's value
            scales and value zeros or TurboQuant's value norms and keys' mean.
        size: bytes of the record.
        signed: whether keys have a bit of their residual.
        centred: whether it has keys' mean.
    """

    key_bits: int
    bits: int
    group: int
    parts: tuple[int, ...]
    size: int
    signed: bool
    centred: bool

    @classmethod
    def of(cls, format: RecordFormat, head_size: int) -> "Layout":
        """That of a format's records."""
        group = value_group(head_size)
        signed, centred = isinstance(format, TurboProd), isinstance(format, TurboCentred)
        by_channel, by_token = 2 * head_size, 2 * RECORD
        if isinstance(format, Kivi):
            numbers = [by_channel, by_channel, *[by_token * (head_size // group)] * 2]
        elif isinstance(format, Hybrid):
            numbers = [by_channel, by_channel, by_token, 0]
        elif isinstance(format, TurboQuant):
            numbers = [by_token, by_token * signed, by_token, by_channel * centred]
        else:
            raise NotImplementedError(f"no kernel reads records of {format.name}")
        key_bits, bit_of_each = format.bits - signed, RECORD * head_size // 8
        value_bits = format.value_bits if isinstance(format, Hybrid) else format.bits
        codes = (bit_of_each * bits for bits in (key_bits, signed, value_bits))
        sizes = [*codes, *numbers]
        parts = tuple(sum(sizes[:part]) for part in range(len(sizes)))
        return cls(key_bits, value_bits, group, parts, sum(sizes), signed, centred)


@cache
def constants(
    format: RecordFormat, head_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """What a rotating format's records are read with, made once: a captured graph must find it in place.

    Returns:
        R and, if keys have signs, also R·Sᵀ·√(π/2) / D, both `[D, D]` of the dtype; Rᵀ `[D, D]` float32; the
        codebooks of keys and of values, of the dtype. Where only values are rotated, their codebook twice.
    """
    rotation = format.rotation(head_size)
    assert rotation is not None and isinstance(format, TurboQuant | Hybrid)
    turn = [rotation]
    if isinstance(format, TurboProd):
        turn.append(rotation @ format.projection(head_size).T * (sqrt(pi / 2) / head_size))
    turn = [each.to(device, dtype) for each in turn]
    book = format.codebook(head_size)
    books = [format.key_codebook(head_size) if isinstance(format, TurboQuant) else book, book]
    back = rotation.T.contiguous().to(device)
    return turn[0], turn[-1], back, *(book.to(device, dtype) for book in books)


def _rotates(format: RecordFormat) -> bool:
    """Whether values are rotated, and it may be keys."""
    return isinstance(format.plain, TurboQuant | Hybrid)


def uses_shares(format: Format) -> bool:
    """Whether the rows of a format are served by lists of shares: one kernel sees all of a head's tokens."""
    return len(format.parts) == 1 and not isinstance(format, MixedDim)


def prepare(format: Format, head_size: int, device: torch.device, dtype: torch.dtype) -> None:
    """Make what a format is read with, which cannot be made while a graph is captured; arguments as of
    `constants`."""
    for part in format.parts:
        if _rotates(part):
            constants(part.plain, head_size, device, dtype)


def attend_records(
    query: Tensor,
    pages: Tensor,
    keys: Tensor,
    values: Tensor,
    runs: Runs,
    rows: Rows,
    layer: int,
    format: Format,
    format_id: int,
    scale: float,
    logits_soft_cap: float = 0.0,
    num_splits: int = 1,
    min_share: int = MIN_SHARE,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    shares: Shares | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the rows of one format over what each KV head holds; all other rows are left alone.

    With b for a token's bias, 0 if there is none:

        O = softmax(cap·tanh(scale·q·kᵀ / cap) + b)·v, or softmax(scale·q·kᵀ + b)·v without a cap

    The grid depends on shapes alone and nothing waits for the device, so a CUDA graph can capture the call,
    but not the first one of a format.

    Args:
        query: `[T, Hq, D]`, float16, bfloat16 or float32; rows follow each other as `query_start_loc` says.
        pages: `[S·B·H, page_bytes]` uint8, contiguous: the cache in the order of (slot, block, head).
        keys: `[S, B, H, N, D]`, a view of the same memory in query's dtype; of it the raw tail is read.
        values: `[S, B, H, N, D]`, likewise and with the same strides.
        runs: where compacted rows have their pages, with `format`, `encoded` and `first`.
        rows: the batch.
        layer: which of the L layers, as `attend` takes it.
        format: of the records.
        format_id: what `runs.format` says of it.
        scale: softmax scale.
        logits_soft_cap: 0 for none.
        num_splits: most shares that the tokens of a head are cut into (see `choose_splits`).
        min_share: least tokens of a share.
        out: `[T, Hq, D]` for the result; made if absent.
        bias: `[S, B, H, N]` float32, of raw tokens.
        sinks: `[Hq]`, one more logit of each query head, to which no value belongs; behind the cap.
        shares: what `Shares.cut` has listed of the same rows and format, in place of `num_splits` and
            `min_share`; of no use to formats of several parts, nor where a row may have more queries than one
            tile.

    Returns:
        `out`, and the natural logarithm of the softmax's denominator, `[T, Hq]` float32.
    """
    num_tokens, query_heads, head_size = query.shape
    num_slots, num_blocks, heads, block_size, _ = keys.shape
    group = query_heads // heads
    num_pages, page_bytes = pages.shape
    sizes = [format.largest_bytes(head_size), *(part.record_bytes(head_size) for part in format.parts)]
    assert query.stride(2) == keys.stride(4) == values.stride(4) == 1
    assert keys.stride() == values.stride() and keys.dtype == values.dtype == query.dtype
    assert query_heads == group * heads and runs.num_layers(heads) == (len(runs.slots) or num_slots)
    assert pages.dtype == torch.uint8 and pages.is_contiguous()
    assert num_pages == num_slots * num_blocks * heads and max(sizes) <= page_bytes
    assert all(size % 4 == 0 for size in [page_bytes, *sizes])

    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    assert out.stride(2) == 1
    if isinstance(format, MixedDim):
        caches = query, pages, keys, values
        last = scale, logits_soft_cap, num_splits, min_share, out, bias, sinks
        return attend_latents(*caches, runs, rows, layer, format, format_id, *last)
    lse = torch.empty(num_tokens, query_heads, dtype=torch.float32, device=query.device)
    rotated = _rotates(format.parts[0])
    assert all(_rotates(part) == rotated for part in format.parts)
    sums = 2 if rotated else 1  # encoded and raw, of which one is still to be rotated back
    tiles = Tiles.of(query, heads, rows, query.dtype, MOST_RAW)
    cache = pages, keys, values
    if shares is not None and uses_shares(format) and tiles.one and tiles.rows <= MOST_MERGED:
        parts = shares.num_parts, tiles.queries * group
        share_out = torch.empty(*parts, sums, head_size, dtype=torch.float32, device=query.device)
        share_lse = torch.empty(parts, dtype=torch.float32, device=query.device)
        where = layer, format.parts[0], format_id, 0, True
        last = share_out, share_lse, bias, shares, out, lse, sinks
        _attend_part(query, *cache, runs, rows, *where, scale, logits_soft_cap, min_share, *last)
        return out, lse
    if sinks is not None:  # which shares have in common
        num_splits = max(num_splits, 2)
    all_splits = num_splits * len(format.parts)
    if all_splits > 1:
        share_out, share_lse = empty_shares(query, all_splits, sums)
    else:
        share_out, share_lse = out[:, :, None, None], lse[:, :, None]
    for number, part in enumerate(format.parts):
        own = slice(number * num_splits, (number + 1) * num_splits)
        tail = number == len(format.parts) - 1  # it reads the tail, too
        of_part = share_out[:, :, own], share_lse[:, :, own]
        where = layer, part, format_id, number, tail
        _attend_part(query, *cache, runs, rows, *where, scale, logits_soft_cap, min_share, *of_part, bias)
    if rotated and all_splits > 1:
        back = constants(format.parts[0].plain, head_size, query.device, query.dtype)[2]
        _merge_rotated_kernel[num_tokens, triton.cdiv(query_heads, HEADS_AT_ONCE)](
            share_out,
            share_lse,
            back,
            out,
            lse,
            sinks,
            runs.format,
            rows.slot,
            rows.query_start_loc,
            format_id,
            rows.seq_lens.shape[0],
            query_heads,
            *out.stride()[:2],
            SINKS=sinks is not None,
            HEAD_SIZE=head_size,
            CHANNELS=triton.next_power_of_2(head_size),
            SPLITS=all_splits,
            ALL=triton.next_power_of_2(all_splits),
            AT_ONCE=HEADS_AT_ONCE,
            COLUMNS=min(COLUMNS_AT_ONCE, triton.next_power_of_2(head_size)),
            num_warps=4,
        )
    elif all_splits > 1:
        merge(share_out[:, :, :, 0], share_lse, out, lse, runs, rows, format_id, sinks=sinks)
    return out, lse


def _attend_part(
    query: Tensor,
    pages: Tensor,
    keys: Tensor,
    values: Tensor,
    runs: Runs,
    rows: Rows,
    layer: int,
    format: RecordFormat,
    format_id: int,
    number: int,
    tail: bool,
    scale: float,
    logits_soft_cap: float,
    min_share: int,
    share_out: Tensor,
    share_lse: Tensor,
    bias: Tensor | None,
    shares: Shares | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Attention over one part of a format, and over the raw tail or not; arguments as of `attend_records`.

    Args:
        query: the rows' queries.
        pages: the cache, as bytes.
        keys: and as numbers.
        values: likewise.
        runs: where the runs are.
        rows: the batch.
        layer: which.
        format: of the part.
        format_id: of the whole.
        number: which part it is.
        tail: whether the raw tail is read, too.
        scale: softmax scale.
        logits_soft_cap: 0 for none.
        min_share: least tokens of a share.
        share_out: `[T, Hq, splits, 1, D]` for the result of each share; 2 of a format that rotates. With
            shares `[places, rows of a tile, 1, D]`.
        share_lse: `[T, Hq, splits]` likewise, or `[places, rows of a tile]`.
        bias: of raw tokens.
        shares: what each program attends over; the rest is for what is put together of them.
        out: for the result.
        lse: likewise.
        sinks: of the layer.
    """
    head_size = query.shape[2]
    _, num_blocks, heads, _, _ = keys.shape
    # The layer's slot is chosen here, and strides of layers are 0: with a slot to hold registers would not
    # suffice (k4v3 on 10.0).
    own_slot = runs.slot_of(layer)
    own = keys[own_slot], values[own_slot]
    page_bytes, record_bytes = pages.shape[1], format.record_bytes(head_size)
    bias_at, format = format.bias_at(head_size), format.plain
    layout, rotated = Layout.of(format, head_size), _rotates(format)
    keys_rotated = isinstance(format, TurboQuant)
    assert record_bytes == layout.size + (4 * RECORD if bias_at >= 0 else 0)
    turned, projected, turn, _, key_codebook, codebook = (query,) * 6
    if rotated:
        turn, project, _, key_codebook, codebook = constants(format, head_size, query.device, query.dtype)
    if keys_rotated:
        turned = projected = query @ turn
    if layout.signed:
        projected = query @ project
    tiles, num_rows = Tiles.of(query, heads, rows, query.dtype, MOST_RAW), rows.seq_lens.shape[0]
    row_bytes = tiles.channels * query.element_size()
    width = RECORD * min(layout.key_bits, 2 if layout.key_bits == 3 else 8) // 8  # tokens of a plane of keys
    records = 1 if width == RECORD else max(2, MIN_DOT // width)
    if shares is None:
        programs = tiles.count, heads, share_lse.shape[2]
        strides = *share_out.stride()[:4], *share_lse.stride()
        final = (None,) * 5, (0,) * 4
    else:
        assert out is not None and lse is not None
        programs = shares.num_programs(num_rows), 1, 1
        strides = 0, *share_out.stride()[:3], 0, *share_lse.stride()
        final = (shares.work, shares.arrived, out, lse, sinks), (*shares.work.stride()[:2], *out.stride()[:2])
    inner, outer = logit_factors(scale, logits_soft_cap)
    from_first_place = pages.flatten()[page_bytes % record_bytes :]
    _records_kernel[programs](
        query,
        turned,
        projected,
        turn,
        *(from_first_place.view(dtype) for dtype in (torch.int32, torch.int16, torch.float32)),
        *own,
        key_codebook,
        codebook,
        share_lse if bias is None else bias[own_slot],
        share_out,
        share_lse,
        *final[0],
        runs.destination,
        runs.start,
        runs.boundary,
        runs.format,
        runs.encoded[:, number],
        runs.first[:, number],
        rows.slot,
        rows.block_table,
        rows.seq_lens,
        rows.query_start_loc,
        layer,
        format_id,
        num_rows,
        num_blocks,
        min_share,
        inner,
        outer,
        *query.stride()[:2],
        *turned.stride()[:2],
        0,
        *keys.stride()[1:4],
        *((0, 0, 0, 0) if bias is None else (0, *bias.stride()[1:])),
        *strides,
        *final[1],
        runs.destination.stride(0),
        runs.start.stride(0),
        runs.encoded.stride(0),
        rows.block_table.stride(0),
        SOFT_CAP=logits_soft_cap > 0,
        RAW_BIAS=bias is not None,
        BIAS_AT=bias_at,
        RAW=tiles.keys,
        PAGE_BYTES=page_bytes,
        RECORD_BYTES=record_bytes,
        ROTATED=rotated,
        KEYS_ROTATED=keys_rotated,
        SIGNED=layout.signed,
        SHARES=shares is not None,
        SINKS=shares is not None and sinks is not None,
        SPLIT=share_out.shape[-2] > 1,
        TAIL=tail,
        MIXED=not (number == 0 and tail),
        CENTRED=layout.centred,
        KEY_BITS=layout.key_bits,
        VALUE_BITS=layout.bits,
        VALUE_GROUP=layout.group,
        PARTS=layout.parts,
        RECORDS=records,
        CHUNKS=max(1, tiles.channels * width // 1024) if records > 1 else 1,
        num_warps=4,
        num_stages=1,
        **tiles.constants(query, keys),
        **_registers(layout, rotated, row_bytes, shares is not None, query.device),
    )


def _registers(
    layout: Layout, rotated: bool, row_bytes: int, shares: bool, device: torch.device
) -> dict[str, int]:
    """A bound on registers where they suffice for two programs at a time without it, for three with it."""
    plain_4_bits = layout.key_bits == layout.bits == 4 and not rotated
    if not (pipelines(device) and shares and plain_4_bits and row_bytes <= 256):
        return {}
    return {"maxnreg": 168}


@triton.jit
def _record_offset(
    place,
    end,
    run_blocks,
    first_page,
    num_blocks,
    HEADS: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    RECORD_BYTES: tl.constexpr,
):
    """Offset of the record at a run's place, int64, counted in 4 bytes; from `end` on that of the last.

    A run without records is given some page of the null block.
    """
    PER_PAGE: tl.constexpr = PAGE_BYTES // RECORD_BYTES
    place = tl.maximum(tl.minimum(place, end - 1), 0)
    linear = first_page + place // PER_PAGE
    block = tl.load(run_blocks + linear // PAGES_PER_BLOCK, mask=end > 0, other=0).to(tl.int64)
    slot = linear % PAGES_PER_BLOCK
    page = (block + slot // HEADS * num_blocks) * HEADS + slot % HEADS
    return page * (PAGE_BYTES // 4) + place % PER_PAGE * (RECORD_BYTES // 4)


@triton.jit
def _record_offsets(
    place,
    end,
    run_blocks,
    first_page,
    num_blocks,
    HEADS: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    RECORD_BYTES: tl.constexpr,
    RECORDS: tl.constexpr,
):
    """Those of RECORDS records, one after the other: scalars, of which any layout can be made."""
    offsets = ()
    for one in tl.static_range(RECORDS):
        offsets = offsets + (
            _record_offset(
                place + one,
                end,
                run_blocks,
                first_page,
                num_blocks,
                HEADS,
                PAGES_PER_BLOCK,
                PAGE_BYTES,
                RECORD_BYTES,
            ),
        )
    return offsets


@triton.jit
def _as_vector(scalars, COUNT: tl.constexpr, TIMES: tl.constexpr):
    """Scalars as a tensor, TIMES over, by arithmetic that keeps what is known of their alignment."""
    number = tl.arange(0, COUNT * TIMES) % COUNT
    vector = tl.zeros([COUNT * TIMES], tl.int64) + scalars[0]
    for one in tl.static_range(1, COUNT):
        vector += (number == one).to(tl.int64) * (scalars[one] - scalars[0])
    return vector


@triton.jit
def _load_words(words, at, mask):
    """Words with one dimension more, along which their codes can be spread without moving them."""
    return tl.load(words + tl.expand_dims(at, -1), mask=tl.expand_dims(mask, -1), other=0)


@triton.jit
def _load_pair(halves, at, mask, FIRST_AT: tl.constexpr, SECOND_AT: tl.constexpr):
    """Two float16 that belong together in one int32, so that they are moved together."""
    first = tl.load(halves + at + FIRST_AT // 2, mask=mask, other=0).to(tl.int32)
    second = tl.load(halves + at + SECOND_AT // 2, mask=mask, other=0).to(tl.int32)
    return (first & 0xFFFF) | (second << 16)


@triton.jit
def _first(pair):
    return pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _second(pair):
    return (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_keys(
    words,
    halves,
    offsets,
    KEYS_ROTATED: tl.constexpr,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
    RECORDS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Of R records' keys the codes `[c·R, D·w/4c, 1]`, four to a word; then `[c·R, D/c, 1]` words of every
    third bit if codes have 3, and of signs if there are any; then `[c·R, D/c]` pairs of scale and zero if
    there are any.

    The channels are in c chunks, so that no thread has all tokens of one: rows that are a thread's own would
    be written to shared memory number by number.
    """
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    offset = _as_vector(offsets, RECORDS, CHUNKS)
    chunk = tl.arange(0, CHUNKS * RECORDS)[:, None] // RECORDS
    word = chunk * (CHANNELS * LOW // CHUNKS) + tl.arange(0, CHANNELS * LOW // CHUNKS)[None, :]
    channel = chunk * (CHANNELS // CHUNKS) + tl.arange(0, CHANNELS // CHUNKS)[None, :]
    real_word, real = word < HEAD_SIZE * LOW, channel < HEAD_SIZE
    if BITS == 3:
        word = word // 2 * 3 + word % 2
    loaded = (_load_words(words, offset[:, None] + word, real_word),)
    if BITS == 3:
        loaded = loaded + (_load_words(words, offset[:, None] + (3 * channel + 2), real),)
    if SIGNED:
        loaded = loaded + (_load_words(words, offset[:, None] + (channel + PARTS[1] // 4), real),)
    if not KEYS_ROTATED:
        loaded = loaded + (_load_pair(halves, 2 * offset[:, None] + channel, real, PARTS[3], PARTS[4]),)
    return loaded


@triton.jit
def _load_values(
    words,
    halves,
    offset,
    first,
    WIDTH: tl.constexpr,
    ROTATED: tl.constexpr,
    BITS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Of WIDTH tokens' values, from the first on, the codes `[R, w, D·b/32, 1]`; then `[R, w, D/g, 1]` words
    of every third bit if codes have 3; then `[R, w, D/g]` pairs of scale and zero if there are any."""
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    token = first + tl.arange(0, WIDTH)
    word, group = tl.arange(0, CHANNELS * LOW // 32), tl.arange(0, CHANNELS // GROUP)
    real_word = (word < HEAD_SIZE * LOW // 32)[None, None, :]
    real = (group < HEAD_SIZE // GROUP)[None, None, :]
    inside = PARTS[2] // 4 + token * (HEAD_SIZE * BITS // 32)
    if BITS == 3:
        if GROUP == 16:  # 6 bytes, of which the last two are the third bits
            inside = PARTS[2] // 2 + token * (HEAD_SIZE * BITS // 16)
            at = 2 * offset[:, None, None] + (inside[:, None] + 3 * group[None, :])[None, :, :]
            low = tl.load(halves + at, mask=real, other=0).to(tl.int32) & 0xFFFF
            low |= tl.load(halves + at + 1, mask=real, other=0).to(tl.int32) << 16
            high = tl.load(halves + at + 2, mask=real, other=0).to(tl.int32)
            loaded = (low[:, :, :, None], high[:, :, :, None])
        else:
            at = (inside[:, None] + (word // 2 * 3 + word % 2)[None, :])[None, :, :]
            low = _load_words(words, offset[:, None, None] + at, real_word)
            at = (inside[:, None] + (3 * group + 2)[None, :])[None, :, :]
            loaded = (low, _load_words(words, offset[:, None, None] + at, real))
    else:
        at = (inside[:, None] + word[None, :])[None, :, :]
        loaded = (_load_words(words, offset[:, None, None] + at, real_word),)
    if not ROTATED:
        at = 2 * offset[:, None, None] + (group[None, :] * 32 + token[:, None])[None, :, :]
        loaded = loaded + (_load_pair(halves, at, real, PARTS[5], PARTS[6]),)
    return loaded


@triton.jit
def _load_tile(
    words,
    halves,
    offsets,
    ROTATED: tl.constexpr,
    KEYS_ROTATED: tl.constexpr,
    SIGNED: tl.constexpr,
    CENTRED: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    RECORDS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """What `_load_keys` loads; of every plane of tokens what `_load_values` loads; for rotated formats of
    every plane of tokens `[R, w]` pairs of key norm and value norm, and of the norm of the key's residual;
    for centred ones the mean `[D]` of each record's keys."""
    WIDTH: tl.constexpr = 8 if KEY_BITS == 3 else 4 * KEY_BITS
    offset = _as_vector(offsets, RECORDS, 1)
    keys = _load_keys(
        words, halves, offsets, KEYS_ROTATED, KEY_BITS, SIGNED, HEAD_SIZE, CHANNELS, PARTS, RECORDS, CHUNKS
    )
    values = ()
    norms = ()
    for plane in tl.static_range(TOKENS // WIDTH):
        first = plane * WIDTH
        values = values + (
            _load_values(
                words,
                halves,
                offset,
                first,
                WIDTH,
                ROTATED,
                VALUE_BITS,
                HEAD_SIZE,
                CHANNELS,
                GROUP,
                PARTS,
            ),
        )
        if ROTATED:
            at = 2 * offset[:, None] + (first + tl.arange(0, WIDTH))[None, :]
            real = (offset >= 0)[:, None]
            norms = norms + (_load_pair(halves, at, real, PARTS[3], PARTS[5]),)
            if SIGNED:
                norms = norms + (_load_pair(halves, at, real, PARTS[4], PARTS[4]),)
    means = ()
    if CENTRED:
        channel = tl.arange(0, CHANNELS)
        for one in tl.static_range(RECORDS):
            at = halves + 2 * offsets[one] + PARTS[6] // 2 + channel
            means = means + (tl.load(at, mask=channel < HEAD_SIZE, other=0),)
    return keys, values, norms, means


@triton.jit
def _places(plane, BITS: tl.constexpr):
    """Where a word has the four codes of a plane, by bits, `[1, 1, 4]`."""
    return (8 * tl.arange(0, 4) + BITS * plane)[None, None, :]


@triton.jit
def _one_bit(words, plane, LOW: tl.constexpr, UNIT: tl.constexpr):
    """A bit each, `[n, m, w/4, 4]` int32, of the numbers that lie in a plane of codes of LOW bits.

    Args:
        words: `[n, m, 1, 1]`, a bit of UNIT numbers in each: of 32, or of 16 in the lower half.
        plane: of the codes; it has w = UNIT·LOW/8 numbers.
    """
    of_word, of_byte = tl.arange(0, UNIT * LOW // 32)[:, None], tl.arange(0, 4)[None, :]
    number = plane * (UNIT * LOW // 8) + 4 * of_word + of_byte
    place = 8 * (number % (UNIT // 8)) + number // (UNIT // 8)
    return (words >> place[None, None, :, :]) & 1


@triton.jit
def _codes(loaded, plane, BITS: tl.constexpr, N: tl.constexpr, M: tl.constexpr, UNIT: tl.constexpr):
    """A plane's codes `[n, m, w]` int32 of words `[n, m·w/4, 1]` and, if they have 3 bits, of words
    `[n, m, 1]` of the third; of UNIT numbers w are in the plane."""
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    WIDTH: tl.constexpr = UNIT * LOW // 8
    words = tl.reshape(loaded[0], [N, M * WIDTH // 4, 1])
    codes = tl.reshape((words >> _places(plane, LOW)) & ((1 << LOW) - 1), [N, M, WIDTH])
    if BITS == 3:
        third = _one_bit(tl.reshape(loaded[1], [N, M, 1, 1]), plane, LOW, UNIT)
        codes += tl.reshape(third, [N, M, WIDTH]) << 2
    return codes


@triton.jit
def _scaled(words, pairs, plane, BITS: tl.constexpr, N: tl.constexpr, M: tl.constexpr, UNIT: tl.constexpr):
    """code·scale + zero, `[n, m, w]` float32, of words `[n, m·w/4, 1]` and pairs `[n, m]`.

    A code becomes the highest bits of a number from 1 to 2: that takes fewer instructions than a conversion.
    """
    WIDTH: tl.constexpr = UNIT * BITS // 8
    place = _places(plane, BITS)
    left, right = tl.maximum(23 - BITS - place, 0), tl.maximum(place - (23 - BITS), 0)
    words = tl.reshape(words, [N, M * WIDTH // 4, 1])
    mantissa = ((words << left) >> right) & (((1 << BITS) - 1) << (23 - BITS))
    above_one = tl.reshape((mantissa | 0x3F800000).to(tl.float32, bitcast=True), [N, M, WIDTH])
    # Spread before they are parted, so that scale and zero are moved to the codes' threads at once.
    pairs = tl.broadcast_to(tl.reshape(pairs, [N, M])[:, :, None], [N, M, WIDTH])
    step = _first(pairs) * (1 << BITS)
    return above_one * step + (_second(pairs) - step)


@triton.jit
def _by_channel(numbers, RECORDS: tl.constexpr, CHANNELS: tl.constexpr, CHUNKS: tl.constexpr):
    """Keys' numbers `[c·R, D/c, w]` as `[D, R·w]`."""
    WIDTH: tl.constexpr = numbers.shape[2]
    numbers = tl.reshape(numbers, [CHUNKS, RECORDS, CHANNELS // CHUNKS, WIDTH])
    return tl.reshape(tl.permute(numbers, [0, 2, 1, 3]), [CHANNELS, RECORDS * WIDTH])


@triton.jit
def _products(
    q,
    projected,
    loaded,
    norms,
    codebook,
    plane,
    KEYS_ROTATED: tl.constexpr,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    CHANNELS: tl.constexpr,
    RECORDS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Queries times the keys of a plane's tokens, `[ROWS, R·w]` float32."""
    N: tl.constexpr = CHUNKS * RECORDS
    M: tl.constexpr = CHANNELS // CHUNKS
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    if KEYS_ROTATED:
        k = tl.load(codebook + _codes(loaded, plane, BITS, N, M, 32))
        products = dot(q, _by_channel(k, RECORDS, CHANNELS, CHUNKS))
        if SIGNED:
            signs = _one_bit(tl.reshape(loaded[len(loaded) - 1], [N, M, 1, 1]), plane, LOW, 32)
            signs = (2 * tl.reshape(signs, [N, M, 4 * LOW]) - 1).to(tl.float32).to(q.dtype)
            norm = tl.reshape(_first(norms[2 * plane + 1]), [1, RECORDS * 4 * LOW])
            products += dot(projected, _by_channel(signs, RECORDS, CHANNELS, CHUNKS)) * norm
            products *= tl.reshape(_first(norms[2 * plane]), [1, RECORDS * 4 * LOW])
        else:
            products *= tl.reshape(_first(norms[plane]), [1, RECORDS * 4 * LOW])
    else:
        k = _scaled(loaded[0], loaded[1], plane, BITS, N, M, 32)
        products = dot(q, _by_channel(k, RECORDS, CHANNELS, CHUNKS).to(q.dtype))
    return products


@triton.jit
def _values(
    loaded,
    codebook,
    plane,
    dtype: tl.constexpr,
    ROTATED: tl.constexpr,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The channels of a plane of some tokens' values, `[n, ·]` of the dtype; without norms."""
    if ROTATED:
        v = tl.load(codebook + _codes(loaded, plane, BITS, COUNT, GROUPS, GROUP))
    else:
        v = _scaled(loaded[0], loaded[1], plane, BITS, COUNT, GROUPS, GROUP)
    return tl.reshape(v, [COUNT, GROUPS * v.shape[2]]).to(dtype)


@triton.jit(
    do_not_specialize=[
        "layer",
        "format_id",
        "num_rows",
        "num_blocks",
        "min_share",
        "destination_row",
        "start_row",
        "part_row",
        "table_row",
    ]
)
def _records_kernel(
    query,
    turned,  # the queries that meet encoded keys
    projected,  # and those that meet signs
    turn,  # [D, D]
    words,  # the pages from the first one's first place on, as int32
    halves,  # as int16
    floats,  # as float32
    keys,
    values,
    key_codebook,
    codebook,
    bias,
    share_out,  # [T, Hq, splits, 1, D] or [places, rows, 1, D]; if ROTATED and SPLIT 2: encoded, raw
    share_lse,  # [T, Hq, splits] or [places, rows]
    work,
    arrived,
    out,
    lse_out,
    sinks,
    destination,
    start,
    boundary,
    formats,
    encoded,  # tokens of this part of the format
    first,  # place of each run's first one
    row_slot,
    block_table,
    seq_lens,
    query_start_loc,
    layer,
    format_id,
    num_rows,
    num_blocks,
    min_share,
    inner,
    outer,
    query_token,
    query_head,
    turned_token,
    turned_head,
    layer_stride,
    block_stride,
    head_stride,
    token_stride,
    bias_layer,
    bias_block,
    bias_head,
    bias_token,
    out_token,
    out_head,
    out_split,
    out_part,
    lse_token,
    lse_head,
    lse_split,
    work_field,
    work_layer,
    final_token,
    final_head,
    destination_row,
    start_row,
    part_row,
    table_row,
    SOFT_CAP: tl.constexpr,
    RAW_BIAS: tl.constexpr,
    BIAS_AT: tl.constexpr,
    ONE_TILE: tl.constexpr,
    HEADS: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    RAW: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    RECORD_BYTES: tl.constexpr,
    ROTATED: tl.constexpr,
    KEYS_ROTATED: tl.constexpr,
    SIGNED: tl.constexpr,
    SHARES: tl.constexpr,
    SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    TAIL: tl.constexpr,
    MIXED: tl.constexpr,
    CENTRED: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    RECORDS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    WIDTH: tl.constexpr = 8 if KEY_BITS == 3 else 4 * KEY_BITS  # tokens of a plane of keys
    TOKEN_PLANES: tl.constexpr = TOKENS // WIDTH
    CHANNEL_PLANES: tl.constexpr = 4 if VALUE_BITS == 3 else 8 // VALUE_BITS
    CHANNELS_OF_GROUP: tl.constexpr = VALUE_GROUP // CHANNEL_PLANES  # that are in a plane
    GROUPS: tl.constexpr = CHANNELS // VALUE_GROUP
    TILE: tl.constexpr = RECORDS * TOKENS
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
        if (first_query >= num_queries) | (not has_format(slot, formats, format_id)):
            return

    state = slot.to(tl.int64)
    first_page = tl.load(start + state * start_row + layer * HEADS + head)
    run = state * part_row + layer * HEADS + head
    num_encoded = tl.load(encoded + run)
    first_place = 0  # of the only part, as the compiler then knows: registers are few
    if MIXED:
        first_place = tl.load(first + run)
    raw_from = tl.load(boundary + state)
    run_blocks = destination + state * destination_row
    tail_blocks = block_table + row.to(tl.int64) * table_row + raw_from // BLOCK_SIZE

    # The row's first query is that many tokens behind the head's first.
    own = num_encoded - raw_from + tl.load(seq_lens + row) - num_queries
    if SHARES:
        begin, end = tl.load(share_at + work_field), tl.load(share_at + 2 * work_field)
    else:
        split = tl.program_id(2)
        visible = own + tl.minimum(first_query + QUERIES, num_queries) if TAIL else num_encoded
        share = tl.maximum(tl.cdiv(visible, tl.num_programs(2)), min_share)
        share = tl.cdiv(share, TILE) * TILE
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
    turned_at = (token * turned_token + query_of * turned_head)[:, None] + channel[None, :]
    q = tl.load(turned + turned_at, mask=real_channels, other=0.0)
    q_of_signs = q
    if SIGNED:
        q_of_signs = tl.load(projected + turned_at, mask=real_channels, other=0.0)
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = ()
    for _ in tl.static_range(CHANNEL_PLANES):
        result = result + (tl.zeros([ROWS, GROUPS * CHANNELS_OF_GROUP], tl.float32),)

    # The next tile is loaded while this one is worked on, and the one behind it is looked up.
    first_record = first_place + begin // TOKENS
    end_record = first_place + tl.minimum(end, num_encoded) // TOKENS
    offsets = _record_offsets(
        first_record,
        end_record,
        run_blocks,
        first_page,
        num_blocks,
        HEADS,
        PAGES_PER_BLOCK,
        PAGE_BYTES,
        RECORD_BYTES,
        RECORDS,
    )
    loaded = _load_tile(
        words,
        halves,
        offsets,
        ROTATED,
        KEYS_ROTATED,
        SIGNED,
        CENTRED,
        KEY_BITS,
        VALUE_BITS,
        HEAD_SIZE,
        CHANNELS,
        VALUE_GROUP,
        PARTS,
        RECORDS,
        CHUNKS,
    )
    offsets_ahead = _record_offsets(
        first_record + RECORDS,
        end_record,
        run_blocks,
        first_page,
        num_blocks,
        HEADS,
        PAGES_PER_BLOCK,
        PAGE_BYTES,
        RECORD_BYTES,
        RECORDS,
    )
    for record in tl.range(first_record, end_record, RECORDS, num_stages=1):
        loaded_ahead = _load_tile(
            words,
            halves,
            offsets_ahead,
            ROTATED,
            KEYS_ROTATED,
            SIGNED,
            CENTRED,
            KEY_BITS,
            VALUE_BITS,
            HEAD_SIZE,
            CHANNELS,
            VALUE_GROUP,
            PARTS,
            RECORDS,
            CHUNKS,
        )
        of_record = tl.arange(0, RECORDS * WIDTH) // WIDTH
        held = record + of_record < end_record
        if CENTRED:
            common = tl.zeros([ROWS, RECORDS * WIDTH], tl.float32)
            for one in tl.static_range(RECORDS):
                of_mean = tl.sum(q.to(tl.float32) * _first(loaded[3][one])[None, :], 1)
                common = tl.where((of_record == one)[None, :], of_mean[:, None], common)
        logits = ()
        for plane in tl.static_range(TOKEN_PLANES):
            some = _products(
                q,
                q_of_signs,
                loaded[0],
                loaded[2],
                key_codebook,
                plane,
                KEYS_ROTATED,
                KEY_BITS,
                SIGNED,
                CHANNELS,
                RECORDS,
                CHUNKS,
            )
            if CENTRED:
                some += common
            some *= inner
            if SOFT_CAP:
                some = tanh(some) * outer
            if BIAS_AT >= 0:
                place = tl.arange(0, WIDTH) + (plane * WIDTH + BIAS_AT // 4)
                at = _as_vector(offsets, RECORDS, 1)[:, None] + place[None, :]
                some += tl.reshape(tl.load(floats + at), [1, RECORDS * WIDTH]) * BITS_OF_E
            logits = logits + (tl.where(held[None, :], some, -float("inf")),)
        highest = logits[0]
        for plane in tl.static_range(1, TOKEN_PLANES):
            highest = tl.maximum(highest, logits[plane])
        new_peak = tl.maximum(peak, tl.max(highest, 1))
        level = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weights = ()
        for plane in tl.static_range(TOKEN_PLANES):
            weights = weights + (tl.exp2(logits[plane] - level[:, None]),)
        sums = weights[0]
        for plane in tl.static_range(1, TOKEN_PLANES):
            sums += weights[plane]
        shrink = tl.exp2(peak - level)
        total = total * shrink + tl.sum(sums, 1)
        added = ()
        for plane in tl.static_range(CHANNEL_PLANES):
            part = result[plane] * shrink[:, None]
            for tokens in tl.static_range(TOKEN_PLANES):
                w = weights[tokens]
                if ROTATED:
                    norm = _second(loaded[2][tokens * (1 + SIGNED)])
                    w *= tl.reshape(norm, [1, RECORDS * WIDTH])
                v = _values(
                    loaded[1][tokens],
                    codebook,
                    plane,
                    q.dtype,
                    ROTATED,
                    VALUE_BITS,
                    RECORDS * WIDTH,
                    GROUPS,
                    VALUE_GROUP,
                )
                part += dot(w.to(q.dtype), v)
            added = added + (part,)
        result = added
        peak = new_peak

        loaded, offsets = loaded_ahead, offsets_ahead
        offsets_ahead = _record_offsets(
            record + 2 * RECORDS,
            end_record,
            run_blocks,
            first_page,
            num_blocks,
            HEADS,
            PAGES_PER_BLOCK,
            PAGE_BYTES,
            RECORD_BYTES,
            RECORDS,
        )

    encoded_result = result
    faded = tl.full([ROWS], 1.0, tl.float32)
    if ROTATED:
        result = ()
        for _ in tl.static_range(CHANNEL_PLANES):
            result = result + (tl.zeros([ROWS, GROUPS * CHANNELS_OF_GROUP], tl.float32),)
        raw_at = (token * query_token + query_of * query_head)[:, None] + channel[None, :]
        q = tl.load(query + raw_at, mask=real_channels, other=0.0)
    column = tl.arange(0, GROUPS * CHANNELS_OF_GROUP)
    first_channel = column // CHANNELS_OF_GROUP * VALUE_GROUP + column % CHANNELS_OF_GROUP
    head_offset = layer.to(tl.int64) * layer_stride + head * head_stride
    for tile in tl.range(tl.maximum(begin, num_encoded), end, RAW, num_stages=3):
        key = tile + tl.arange(0, RAW)
        held = key < end
        raw = key - num_encoded
        block = tl.load(tail_blocks + raw // BLOCK_SIZE, mask=held, other=0).to(tl.int64)
        offset = head_offset + block * block_stride + raw % BLOCK_SIZE * token_stride
        k = tl.load(
            keys + offset[None, :] + channel[:, None], mask=held[None, :] & in_head[:, None], other=0.0
        )
        some = dot(q, k) * inner
        if SOFT_CAP:
            some = tanh(some) * outer
        if RAW_BIAS:
            at = layer.to(tl.int64) * bias_layer + block * bias_block + head * bias_head
            at += raw % BLOCK_SIZE * bias_token
            some += tl.load(bias + at, mask=held, other=0.0)[None, :] * BITS_OF_E
        seen = held[None, :] & (key[None, :] <= (own + number)[:, None])
        some = tl.where(seen, some, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(some, 1))
        # A query may see no token of this tile, nor of any before: -inf less -inf must not become NaN.
        level = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        w = tl.exp2(some - level[:, None])
        shrink = tl.exp2(peak - level)
        total = total * shrink + tl.sum(w, 1)
        added = ()
        for plane in tl.static_range(CHANNEL_PLANES):
            channels = first_channel + plane * CHANNELS_OF_GROUP
            v = tl.load(
                values + offset[:, None] + channels[None, :],
                mask=held[:, None] & (channels < HEAD_SIZE)[None, :],
                other=0.0,
            )
            added = added + (result[plane] * shrink[:, None] + dot(w.to(v.dtype), v),)
        result = added
        faded *= shrink
        peak = new_peak

    some_seen = total > 0.0
    divisor = tl.where(some_seen, total, 1.0)
    lse = tl.where(some_seen, (peak + tl.log2(divisor)) * 0.6931471805599453, -float("inf"))
    for_encoded, of_encoded = (faded / divisor)[:, None], ()
    of_raw = ()
    for plane in tl.static_range(CHANNEL_PLANES):
        of_encoded = of_encoded + (encoded_result[plane] * for_encoded,)
        of_raw = of_raw + (result[plane] / divisor[:, None],)
    if SHARES:
        count = tl.load(share_at + 3 * work_field)
        out_at = out + token * final_token + query_of * final_head
        lse_at = lse_out + token * (HEADS * GROUP) + query_of
        if count == 1:
            left = tl.full([ROWS], 1.0, tl.float32)
            if SINKS:
                sink = tl.load(sinks + query_of, mask=real, other=0.0).to(tl.float32)
                lse, left = with_sink(lse, sink)
            tl.store(lse_at, lse, mask=real)
            _write(
                out_at,
                of_encoded,
                of_raw,
                turn,
                left,
                real,
                first_channel,
                q.dtype,
                ROTATED,
                HEAD_SIZE,
                CHANNEL_PLANES,
                CHANNELS_OF_GROUP,
            )
        else:
            mine, place = tl.load(share_at + 4 * work_field), tl.load(share_at + 5 * work_field).to(tl.int64)
            part_lse = share_lse + place * lse_head + pair * lse_split
            part_out = share_out + place * out_head + pair * out_split
            tl.store(part_lse + mine * lse_head, lse, mask=real)
            for plane in tl.static_range(CHANNEL_PLANES):
                channels = first_channel + plane * CHANNELS_OF_GROUP
                at = part_out[:, None] + mine * out_head + channels[None, :]
                mask = real[:, None] & (channels < HEAD_SIZE)[None, :]
                tl.store(at, of_encoded[plane] if ROTATED else of_raw[plane], mask=mask)
                if ROTATED:
                    tl.store(at + out_part, of_raw[plane], mask=mask)
            if arrives_last(arrived, item, count):
                lse_all = merged_lse(part_lse, lse_head, count, real)
                encoded_all = ()
                raw_all = ()
                for plane in tl.static_range(CHANNEL_PLANES):
                    channels = first_channel + plane * CHANNELS_OF_GROUP
                    at = part_out[:, None] + channels[None, :]
                    mask = real[:, None] & (channels < HEAD_SIZE)[None, :]
                    some = merged(lse_all, part_lse, at, lse_head, out_head, count, real, mask)
                    encoded_all = encoded_all + (some,)
                    if ROTATED:
                        some = merged(lse_all, part_lse, at + out_part, lse_head, out_head, count, real, mask)
                    raw_all = raw_all + (some,)
                left = tl.full([ROWS], 1.0, tl.float32)
                if SINKS:
                    sink = tl.load(sinks + query_of, mask=real, other=0.0).to(tl.float32)
                    lse_all, left = with_sink(lse_all, sink)
                tl.store(lse_at, lse_all, mask=real)
                _write(
                    out_at,
                    encoded_all,
                    raw_all,
                    turn,
                    left,
                    real,
                    first_channel,
                    q.dtype,
                    ROTATED,
                    HEAD_SIZE,
                    CHANNEL_PLANES,
                    CHANNELS_OF_GROUP,
                )
    else:
        tl.store(lse_at, lse, mask=real)
        out_at = share_out + token * out_token + query_of * out_head + split * out_split
        if ROTATED and SPLIT:
            for plane in tl.static_range(CHANNEL_PLANES):
                channels = first_channel + plane * CHANNELS_OF_GROUP
                at = out_at[:, None] + channels[None, :]
                mask = real[:, None] & (channels < HEAD_SIZE)[None, :]
                tl.store(at, of_encoded[plane], mask=mask)
                tl.store(at + out_part, of_raw[plane], mask=mask)
        else:
            left = tl.full([ROWS], 1.0, tl.float32)
            _write(
                out_at,
                of_encoded,
                of_raw,
                turn,
                left,
                real,
                first_channel,
                q.dtype,
                ROTATED,
                HEAD_SIZE,
                CHANNEL_PLANES,
                CHANNELS_OF_GROUP,
            )


@triton.jit
def _write(
    out_at,
    of_encoded,
    of_raw,
    turn,
    left,
    real,
    first_channel,
    dtype: tl.constexpr,
    ROTATED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNEL_PLANES: tl.constexpr,
    CHANNELS_OF_GROUP: tl.constexpr,
):
    """Store a result that is in planes of channels, rotated back if it is rotated, times `left`."""
    for plane in tl.static_range(CHANNEL_PLANES):
        channels = first_channel + plane * CHANNELS_OF_GROUP
        part = of_raw[plane]
        if ROTATED:
            for other in tl.static_range(CHANNEL_PLANES):
                turned_channels = first_channel + other * CHANNELS_OF_GROUP
                back = tl.load(
                    turn + channels[None, :] * HEAD_SIZE + turned_channels[:, None],
                    mask=(channels < HEAD_SIZE)[None, :] & (turned_channels < HEAD_SIZE)[:, None],
                    other=0.0,
                )
                part += dot(of_encoded[other].to(dtype), back)
        mask = real[:, None] & (channels < HEAD_SIZE)[None, :]
        part = (part * left[:, None]).to(out_at.dtype.element_ty)
        tl.store(out_at[:, None] + channels[None, :], part, mask=mask)


@triton.jit(do_not_specialize=["format_id", "num_rows", "query_heads"])
def _merge_rotated_kernel(
    share_out,  # [T, Hq, SPLITS, 2, D] float32
    share_lse,  # [T, Hq, SPLITS] float32; -inf where a share is empty, and its share_out was never written
    back,  # [D, D] float32
    out,
    lse,  # [T, Hq] float32
    sinks,  # [Hq]
    formats,
    row_slot,
    query_start_loc,
    format_id,
    num_rows,
    query_heads,
    out_token,
    out_head,
    SINKS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
    ALL: tl.constexpr,
    AT_ONCE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = find_row(token, query_start_loc, num_rows, 1, 0)
    idle = token >= tl.load(query_start_loc + num_rows)
    if idle | (not has_format(tl.load(row_slot + row), formats, format_id)):
        return
    head = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    real = head < query_heads
    pair = token * query_heads + head
    every = tl.arange(0, ALL)
    share = tl.load(
        share_lse + (pair * SPLITS)[:, None] + every[None, :],
        mask=real[:, None] & (every < SPLITS)[None, :],
        other=-float("inf"),
    )
    peak = tl.max(share, 1)
    if SINKS:
        sink = tl.load(sinks + head, mask=real, other=-float("inf")).to(tl.float32)
        peak = tl.maximum(peak, sink)
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    total = tl.sum(tl.exp(share - peak[:, None]), 1)
    if SINKS:
        total += tl.exp(sink - peak)
    divisor = tl.where(total > 0.0, total, 1.0)
    tl.store(lse + pair, tl.where(total > 0.0, peak + tl.log(divisor), -float("inf")), mask=real)

    channel = tl.arange(0, CHANNELS)
    in_head = channel < HEAD_SIZE
    turned = tl.zeros([AT_ONCE, CHANNELS], tl.float32)
    for split in range(SPLITS):
        own = tl.load(share_lse + pair * SPLITS + split, mask=real, other=-float("inf"))
        part = tl.load(
            share_out + ((pair * SPLITS + split) * (2 * HEAD_SIZE))[:, None] + channel[None, :],
            mask=(own > -float("inf"))[:, None] & in_head[None, :],
            other=0.0,
        )
        turned += part * (tl.exp(own - peak) / divisor)[:, None]
    for first in range(0, CHANNELS, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        square = in_head[:, None] & (column < HEAD_SIZE)[None, :]
        turn = tl.load(back + channel[:, None] * HEAD_SIZE + column[None, :], mask=square, other=0.0)
        result = dot(turned, turn)
        for split in range(SPLITS):
            own = tl.load(share_lse + pair * SPLITS + split, mask=real, other=-float("inf"))
            at = ((pair * SPLITS + split) * (2 * HEAD_SIZE) + HEAD_SIZE)[:, None] + column[None, :]
            mask = (own > -float("inf"))[:, None] & (column < HEAD_SIZE)[None, :]
            part = tl.load(share_out + at, mask=mask, other=0.0)
            result += part * (tl.exp(own - peak) / divisor)[:, None]
        out_at = out + token * out_token + head * out_head
        tl.store(
            out_at[:, None] + column[None, :],
            result.to(out.dtype.element_ty),
            mask=real[:, None] & (column < HEAD_SIZE)[None, :],
        )
