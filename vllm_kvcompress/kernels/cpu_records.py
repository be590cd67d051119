"""Attention over records and the raw tail on a CPU, in one pass.

Every thread takes the next piece of work: some queries of one row, one KV head with its whole group, and one
share of the head's tokens. Of 32 tokens at a time the codes are made float32 in the core's own cache, once
for all queries of the piece; scales stay outside of the products. Shares are merged at the end.
"""

import ctypes
import enum
import functools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numba import cfunc, njit, types
from torch import Tensor

from vllm_kvcompress.formats import RECORD, Format, RecordFormat
from vllm_kvcompress.formats.hybrid import Hybrid
from vllm_kvcompress.formats.kivi import Kivi, value_group
from vllm_kvcompress.formats.mixed_dim import Basis, Latent, Vectors
from vllm_kvcompress.formats.turboquant import TurboCentred, TurboProd, TurboQuant
from vllm_kvcompress.kernels import cpu_vectors as v

LOG2_E = 1.4426950408889634
HAS_BYTE_PRODUCTS = v.HAS_BYTE_PRODUCTS  # a global of this module, so that Numba leaves out what it forbids
SMALLEST = np.float32(2.0**-24)  # float16 but 0
ROWS = 64  # queries times group of a piece, about
MIN_SHARE = 512  # tokens: less would cost more to merge than it saves
PIECES_PER_THREAD = 4
FEW_ROWS = 8  # for so many, codes are made numbers in registers, again for every four
PAIRS = 16  # merged by a thread at a time
KIVI, TURBO, KIVI_DIGITS, HALVES = 0, 1, 2, 3  # the third where bytes can be multiplied
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class A(enum.IntEnum):
    """Where the kernel's arguments are, all int64 or addresses."""

    NEXT = 0  # piece; counted up by the threads
    THREAD = 1  # counted up likewise
    PIECES = 2
    ROWS = 3
    HEADS = 4
    GROUP = 5
    SIZE = 6  # channels
    BLOCKS = 7  # of queries
    QUERIES = 8  # of a block
    SPLITS = 9  # of this part of a format
    SHARE = 10  # tokens
    QUERY = 11  # float32 [T, Hq, D]
    START = 12  # int32 [R + 1]
    PAGES = 13  # int32 [R, H, W]
    WIDTH = 14
    COUNTS = 15  # int32 [R, H], pages of the run
    RECORDS = 16  # int32 [R, H], records in it
    TAIL = 17  # int32 [R], tokens behind it
    CACHE = 18
    PAGE_BYTES = 19
    PER_PAGE = 20  # records
    RECORD_BYTES = 21
    KEY_KIND = 22
    KEY_BITS = 23
    VALUE_BITS = 24
    VALUE_GROUP = 25  # channels of a value that are packed together
    SIGNS = 26  # whether keys have a bit of their residual
    KEY_BOOK = 27  # float32 [16]
    VALUE_BOOK = 28  # float32 [16]
    SIGN_BOOK = 29  # float32 [16]
    ROTATION = 30  # float32 [D, D]; 0 for none
    BACK = 31  # its transpose
    PROJECTION = 32  # float32 [D, D], of what is rotated
    BIAS_AT = 33  # in a record; -1 for none
    BLOCK_SIZE = 34
    DTYPE = 35
    KEY_PLACE = 36  # int32 [N, D]
    KEY_STRIDE = 37  # from a channel to the next where tokens follow each other; else 0
    VALUE_PLACE = 38
    VALUE_STRIDE = 39  # from a token to the next where channels follow each other; else 0
    SCRATCH = 40
    SCRATCH_BYTES = 41  # of a thread
    PART_OUT = 42  # float32 [T·Hq, ALL_SPLITS, D]
    PART_STATE = 43  # float32 [T·Hq, ALL_SPLITS, 2], peak and total
    OUT = 44  # float32 [T, Hq, D]
    INNER = 45  # float32: factors of the queries and behind the cap, cap or not
    PAIRS = 46  # T·Hq
    MEANS_AT = 47  # of rotated keys, in a record; -1 for none
    THREADS = 48  # for which there is memory
    FIRST = 49  # int32 [R, H], the place of a run's first record
    RECORDS_AT = 50  # bytes of a page before its first place
    ALL_SPLITS = 51  # of all parts
    BEFORE = 52  # splits of the parts before
    VALUE_KIND = 53
    VALUES_AT = 54  # their codes, in a record
    KEY_NUMBERS_AT = 55  # scales and zeros, or norms
    VALUE_NUMBERS_AT = 56
    SINKS = 57  # float32 [T·Hq], one more logit in base 2; 0 for none
    RANK = 58  # coordinates of a key and of a value that are written as numbers
    BASIS = 59  # vectors of the bases; 0 where coordinates are channels
    BASIS_AT = 60  # in the run's first page


# As plain numbers, which Numba takes for constants.
(NEXT, THREAD, PIECES, NUM_ROWS, HEADS, GROUP, SIZE, BLOCKS, QUERIES, SPLITS, SHARE) = map(int, list(A)[:11])
(QUERY, START, PAGES, WIDTH, COUNTS, RECORDS, TAIL, CACHE, PAGE_BYTES, PER_PAGE) = map(int, list(A)[11:21])
(RECORD_BYTES, KEY_KIND, KEY_BITS, VALUE_BITS, VALUE_GROUP, SIGNS, KEY_BOOK, VALUE_BOOK) = map(
    int, list(A)[21:29]
)
(SIGN_BOOK, ROTATION, BACK, PROJECTION, BIAS_AT, BLOCK_SIZE, DTYPE, KEY_PLACE) = map(int, list(A)[29:37])
(KEY_STRIDE, VALUE_PLACE, VALUE_STRIDE, SCRATCH, SCRATCH_BYTES, PART_OUT) = map(int, list(A)[37:43])
(PART_STATE, OUT, INNER, NUM_PAIRS, MEANS_AT, MOST_THREADS) = map(int, list(A)[43:49])
(FIRST, RECORDS_AT, ALL_SPLITS, BEFORE, VALUE_KIND, VALUES_AT) = map(int, list(A)[49:55])
(KEY_NUMBERS_AT, VALUE_NUMBERS_AT, SINKS, RANK, BASIS, BASIS_AT) = map(int, list(A)[55:])


class Buffers(NamedTuple):
    """Addresses of a thread's own memory, all float32; M is the most rows that a piece has.

    Attributes:
        query: `[M, D]`, the piece's queries, times the logits' factor.
        turned: `[M, D]`, rotated, or the coordinates in the head's basis.
        projected: `[M, D]`, for the signs of residuals.
        scaled: `[M, D]`, times the scales of a record's keys, or digits of that.
        out: `[M, D]`, the sum so far.
        rotated: `[M, D]`, that of encoded values, before it is rotated back.
        keys: `[D, 32]`, of 32 tokens.
        values: `[32, D]`.
        logits: `[M, 32]`, then weights.
        weights: `[M, 32]`, times the scales of a record's values, or digits of that.
        state: `[M, 4]`, see `cpu_vectors.soften`; the very last of the first row's is the largest |query|.
        numbers: `[4·D + 96]`, scales, zeros, norms, factors: of keys, then of values.
    """

    query: int
    turned: int
    projected: int
    scaled: int
    out: int
    rotated: int
    keys: int
    values: int
    logits: int
    weights: int
    state: int
    numbers: int


def _floats(most: int, size: int) -> int:
    """Of a thread's memory."""
    return 6 * most * size + 2 * RECORD * size + 2 * RECORD * most + 4 * most + 4 * size + 96


_compiled = functools.partial(njit, nogil=True, error_model="numpy")


@_compiled
def _get(args, which):
    return v.get_i64(args + 8 * which)


@_compiled
def _multiply_add(a, a_row, b, b_row, k, c, c_row, rows, width):
    """C += A·B of float32 rows; strides in bytes, the width a multiple of 16."""
    for first in range(0, rows, 4):
        left, to = a + first * a_row, c + first * c_row
        some = min(rows - first, 4)
        column = 0
        while column + 32 <= width:
            right, target = b + 4 * column, to + 4 * column
            if some == 4:
                v.product_4_32(left, a_row, right, b_row, k, target, c_row)
            elif some == 3:
                v.product_3_32(left, a_row, right, b_row, k, target, c_row)
            elif some == 2:
                v.product_2_32(left, a_row, right, b_row, k, target, c_row)
            else:
                v.product_1_32(left, a_row, right, b_row, k, target, c_row)
            column += 32
        if column < width:
            right, target = b + 4 * column, to + 4 * column
            for row in range(some):
                v.product_1_16(left + row * a_row, a_row, right, b_row, k, target + row * c_row, c_row)


@_compiled
def _read_halves(source, target, count):
    """float16 numbers, a multiple of 16."""
    done = 0
    while done + 32 <= count:
        v.read_float16(source + 2 * done, target + 4 * done)
        done += 32
    if done < count:
        v.read_float16_16(source + 2 * done, target + 4 * done)


@_compiled
def _read_codes(source, bits, rows, per_row, group, target):
    """Codes of `rows` rows of `per_row` numbers, packed `group` (32 or 16) together, as float32."""
    step = group * bits // 8
    for number in range(rows * per_row // group):
        at, to = source + number * step, target + number * group * 4
        if group == 32:
            if bits == 4:
                v.read_4(at, to)
            elif bits == 2:
                v.read_2(at, to)
            else:
                v.read_8(at, to)
        elif bits == 4:
            v.read_4_16(at, to)
        elif bits == 2:
            v.read_2_16(at, to)
        else:
            v.read_8_16(at, to)


@_compiled
def _look_codes_up(source, bits, rows, per_row, group, book, target):
    """As `_read_codes`, but what a book of 16 float32 says of each code."""
    step = group * bits // 8
    for number in range(rows * per_row // group):
        at, to = source + number * step, target + number * group * 4
        if group == 32:
            if bits == 4:
                v.look_up_4(at, to, book)
            elif bits == 3:
                v.look_up_3(at, to, book)
            elif bits == 2:
                v.look_up_2(at, to, book)
            else:
                v.look_up_1(at, to, book)
        elif bits == 4:
            v.look_up_4_16(at, to, book)
        elif bits == 3:
            v.look_up_3_16(at, to, book)
        else:
            v.look_up_2_16(at, to, book)


@_compiled
def _multiply_codes(a, a_row, codes, code_row, bits, k, c, c_row, rows):
    """C += A·B of float32 rows, B `[k, 32]` codes that stand for themselves."""
    for first in range(0, rows, 4):
        left, to, some = a + first * a_row, c + first * c_row, min(rows - first, 4)
        if bits == 4:
            if some == 4:
                v.codes_4_4(left, a_row, codes, code_row, k, to, c_row)
            elif some == 3:
                v.codes_3_4(left, a_row, codes, code_row, k, to, c_row)
            elif some == 2:
                v.codes_2_4(left, a_row, codes, code_row, k, to, c_row)
            else:
                v.codes_1_4(left, a_row, codes, code_row, k, to, c_row)
        elif bits == 2:
            if some == 4:
                v.codes_4_2(left, a_row, codes, code_row, k, to, c_row)
            elif some == 3:
                v.codes_3_2(left, a_row, codes, code_row, k, to, c_row)
            elif some == 2:
                v.codes_2_2(left, a_row, codes, code_row, k, to, c_row)
            else:
                v.codes_1_2(left, a_row, codes, code_row, k, to, c_row)
        elif some == 4:
            v.codes_4_8(left, a_row, codes, code_row, k, to, c_row)
        elif some == 3:
            v.codes_3_8(left, a_row, codes, code_row, k, to, c_row)
        elif some == 2:
            v.codes_2_8(left, a_row, codes, code_row, k, to, c_row)
        else:
            v.codes_1_8(left, a_row, codes, code_row, k, to, c_row)


@_compiled
def _multiply_digits(a, a_row, codes, code_row, bits, k, c, c_row, factor, ahead, rows):
    """C += A·B·factor, A digits, B `[k, 32]` codes that stand for themselves; the factor at an address."""
    for first in range(0, rows, 4):
        left, to, some = a + first * a_row, c + first * c_row, min(rows - first, 4)
        if bits == 4:
            if some == 4:
                v.digits_4_4(left, a_row, codes, code_row, k, to, c_row, factor, ahead)
            elif some == 3:
                v.digits_3_4(left, a_row, codes, code_row, k, to, c_row, factor, ahead)
            elif some == 2:
                v.digits_2_4(left, a_row, codes, code_row, k, to, c_row, factor, ahead)
            else:
                v.digits_1_4(left, a_row, codes, code_row, k, to, c_row, factor, ahead)
        elif bits == 2:
            if some == 4:
                v.digits_4_2(left, a_row, codes, code_row, k, to, c_row, factor, ahead)
            elif some == 3:
                v.digits_3_2(left, a_row, codes, code_row, k, to, c_row, factor, ahead)
            elif some == 2:
                v.digits_2_2(left, a_row, codes, code_row, k, to, c_row, factor, ahead)
            else:
                v.digits_1_2(left, a_row, codes, code_row, k, to, c_row, factor, ahead)
        elif some == 4:
            v.digits_4_8(left, a_row, codes, code_row, k, to, c_row, factor, ahead)
        elif some == 3:
            v.digits_3_8(left, a_row, codes, code_row, k, to, c_row, factor, ahead)
        elif some == 2:
            v.digits_2_8(left, a_row, codes, code_row, k, to, c_row, factor, ahead)
        else:
            v.digits_1_8(left, a_row, codes, code_row, k, to, c_row, factor, ahead)


@_compiled
def _multiply_looked_up(a, a_row, codes, code_row, bits, book, k, c, c_row, rows):
    """C += A·B of float32 rows, B `[k, 32]` what a book says of codes."""
    for first in range(0, rows, 4):
        left, to, some = a + first * a_row, c + first * c_row, min(rows - first, 4)
        if bits == 4:
            if some == 4:
                v.looked_4_4(left, a_row, codes, code_row, k, to, c_row, book)
            elif some == 3:
                v.looked_3_4(left, a_row, codes, code_row, k, to, c_row, book)
            elif some == 2:
                v.looked_2_4(left, a_row, codes, code_row, k, to, c_row, book)
            else:
                v.looked_1_4(left, a_row, codes, code_row, k, to, c_row, book)
        elif bits == 3:
            if some == 4:
                v.looked_4_3(left, a_row, codes, code_row, k, to, c_row, book)
            elif some == 3:
                v.looked_3_3(left, a_row, codes, code_row, k, to, c_row, book)
            elif some == 2:
                v.looked_2_3(left, a_row, codes, code_row, k, to, c_row, book)
            else:
                v.looked_1_3(left, a_row, codes, code_row, k, to, c_row, book)
        elif bits == 2:
            if some == 4:
                v.looked_4_2(left, a_row, codes, code_row, k, to, c_row, book)
            elif some == 3:
                v.looked_3_2(left, a_row, codes, code_row, k, to, c_row, book)
            elif some == 2:
                v.looked_2_2(left, a_row, codes, code_row, k, to, c_row, book)
            else:
                v.looked_1_2(left, a_row, codes, code_row, k, to, c_row, book)
        elif some == 4:
            v.looked_4_1(left, a_row, codes, code_row, k, to, c_row, book)
        elif some == 3:
            v.looked_3_1(left, a_row, codes, code_row, k, to, c_row, book)
        elif some == 2:
            v.looked_2_1(left, a_row, codes, code_row, k, to, c_row, book)
        else:
            v.looked_1_1(left, a_row, codes, code_row, k, to, c_row, book)


@_compiled
def _read_raw(args, page, first, valid, keys, values):
    """32 tokens of a raw page from `first` on as float32: keys `[D, 32]`, values `[32, D]`."""
    size, dtype, num_tokens = _get(args, SIZE), _get(args, DTYPE), _get(args, BLOCK_SIZE)
    item = 4 if dtype == 2 else 2
    stride, second = _get(args, KEY_STRIDE), page + num_tokens * size * item
    if stride > 0:
        for channel in range(size):
            at, to = page + (channel * stride + first) * item, keys + 128 * channel
            if dtype == 0:
                v.read_bfloat16(at, to)
            elif dtype == 1:
                v.read_float16(at, to)
            else:
                v.read_float32(at, to)
    else:
        place = _get(args, KEY_PLACE) + 4 * first * size
        for channel in range(size):
            for token in range(32):
                where = page + item * v.get_i32(place + 4 * (token * size + channel))
                v.set_f32(keys + 128 * channel + 4 * token, _number(where, dtype))
    stride = _get(args, VALUE_STRIDE)
    for token in range(valid):
        if stride > 0:
            at, to, done = second + (first + token) * stride * item, values + 4 * token * size, 0
            while done + 32 <= size:
                if dtype == 0:
                    v.read_bfloat16(at + 2 * done, to + 4 * done)
                elif dtype == 1:
                    v.read_float16(at + 2 * done, to + 4 * done)
                else:
                    v.read_float32(at + 4 * done, to + 4 * done)
                done += 32
            if done < size:
                if dtype == 0:
                    v.read_bfloat16_16(at + 2 * done, to + 4 * done)
                elif dtype == 1:
                    v.read_float16_16(at + 2 * done, to + 4 * done)
                else:
                    v.read_float32_16(at + 4 * done, to + 4 * done)
        else:
            place = _get(args, VALUE_PLACE) + 4 * (first + token) * size
            for channel in range(size):
                where = second + item * v.get_i32(place + 4 * channel)
                v.set_f32(values + 4 * (token * size + channel), _number(where, dtype))


@_compiled
def _number(where, dtype):
    if dtype == 0:
        return v.get_bfloat16(where)
    if dtype == 1:
        return v.get_float16(where)
    return v.get_f32(where)


@_compiled
def _cap(args, own, rows, bias):
    """Products of 32 tokens become logits in base 2."""
    factors = _get(args, INNER)
    outer, capped = v.get_f32(factors + 4), v.get_f32(factors + 8)
    for row in range(rows):
        logits = own.logits + 128 * row
        if capped > 0:
            v.cap(logits, outer)
        if bias != 0:
            v.add_scaled(logits, bias, 2, np.float32(LOG2_E))


@_compiled
def _soften(args, own, rows):
    """Logits become weights, and what was summed up so far shrinks with them."""
    size, turbo = _get(args, SIZE), _get(args, VALUE_KIND) == TURBO or _get(args, BASIS) > 0
    for row in range(rows):
        v.soften(own.logits + 128 * row, own.state + 16 * row)
        shrink = v.get_f32(own.state + 16 * row + 8)
        if shrink != 1:
            v.scale(own.out + 4 * size * row, size // 16, shrink)
            if turbo:
                v.scale(own.rotated + 4 * size * row, size // 16, shrink)


@_compiled
def _bias(args, record):
    at = _get(args, BIAS_AT)
    return record + at if at >= 0 else 0


@_compiled
def _fetch_half(args, record, half):
    """Have one half of a record brought near: a core waits for some lines at once, but not for all of one."""
    lines = _get(args, RECORD_BYTES) // 128 + 1
    v.fetch(record + 64 * lines * half, lines)


@_compiled
def _make_whole(scales, count, most, factor):
    """Scales become such that they times numbers up to `most` are within reach; what undoes it is stored."""
    most *= max(v.largest(scales, count // 16), SMALLEST)
    v.scale(scales, count // 16, np.float32(v.REACH) / most)
    v.set_f32(factor, most / np.float32(v.REACH))


@_compiled
def _multiply_kivi_keys(args, record, own, rows):
    """Logits of a record whose keys have a scale and a zero for each channel."""
    size, bits = _get(args, SIZE), _get(args, KEY_BITS)
    row_bytes, numbers = 4 * size, record + _get(args, KEY_NUMBERS_AT)
    scale, zero = own.numbers, own.numbers + row_bytes
    _read_halves(numbers, scale, size)
    _read_halves(numbers + 2 * size, zero, size)
    for row in range(rows):
        query = own.query + row_bytes * row
        v.multiply(query, scale, own.scaled + row_bytes * row, size // 16)
        v.fill(own.logits + 128 * row, 2, v.dot(query, zero, size // 16))
    if rows <= FEW_ROWS:
        _multiply_codes(own.scaled, row_bytes, record, 4 * bits, bits, size, own.logits, 128, rows)
    else:
        _read_codes(record, bits, size, 32, 32, own.keys)
        _multiply_add(own.scaled, row_bytes, own.keys, 128, size, own.logits, 128, rows, 32)


@_compiled
def _multiply_kivi_keys_by_digits(args, record, own, rows, following):
    """As `_multiply_kivi_keys`, by products of bytes: what codes are multiplied with becomes digits, to 24
    bits."""
    size, bits, at = _get(args, SIZE), _get(args, KEY_BITS), _get(args, KEY_NUMBERS_AT)
    row_bytes = 4 * size
    scales, zeros, factor = own.numbers, own.numbers + row_bytes, own.numbers + 2 * row_bytes
    v.fetch(following + at, (_get(args, RECORD_BYTES) - at) // 64 + 1)
    _read_halves(record + at, scales, 2 * size)
    _make_whole(scales, size, v.get_f32(own.state + 12), factor)
    for row in range(rows):
        query = own.query + row_bytes * row
        v.digits(query, scales, own.scaled + row_bytes * row, size // 16)
        v.fill(own.logits + 128 * row, 2, v.dot(query, zeros, size // 16))
    _multiply_digits(
        own.scaled, row_bytes, record, 4 * bits, bits, size, own.logits, 128, factor, following, rows
    )


@_compiled
def _add_kivi_values_by_digits(args, record, own, rows, following):
    """As `_add_kivi_values`, by products of bytes."""
    size, bits, at = _get(args, SIZE), _get(args, VALUE_BITS), _get(args, VALUES_AT)
    row_bytes = 4 * size
    scales, zeros, factor = own.numbers, own.numbers + row_bytes, own.numbers + 2 * row_bytes
    _read_halves(record + _get(args, VALUE_NUMBERS_AT), scales, 2 * size)
    _make_whole(scales, size, np.float32(1.0), factor)
    for number in range(size // 32):
        out, part = own.out + 128 * number, 128 * number
        for row in range(rows):
            paid = own.logits + 128 * row
            v.digits(paid, scales + part, own.weights + 128 * row, 2)
            v.add(out + row_bytes * row, 2, v.dot(paid, zeros + part, 2))
        codes, ahead = record + at + 4 * bits * number, following + at + 128 * bits * number
        _multiply_digits(
            own.weights, 128, codes, size * bits // 8, bits, 32, out, row_bytes, factor, ahead, rows
        )


@_compiled
def _add_kivi_values(args, record, own, rows):
    """Values that have a scale and a zero for each token and group of channels."""
    size, bits, group = _get(args, SIZE), _get(args, VALUE_BITS), _get(args, VALUE_GROUP)
    row_bytes, num_groups = 4 * size, size // group
    codes, numbers = record + _get(args, VALUES_AT), record + _get(args, VALUE_NUMBERS_AT)
    scale, zero = own.numbers, own.numbers + 128
    few = rows <= FEW_ROWS and group == 32
    if not few:
        _read_codes(codes, bits, 32, size, group, own.values)
    for number in range(num_groups):
        _read_halves(numbers + 64 * number, scale, 32)
        _read_halves(numbers + 64 * (num_groups + number), zero, 32)
        part = 4 * group * number
        for row in range(rows):
            paid = own.logits + 128 * row
            v.multiply(paid, scale, own.weights + 128 * row, 2)
            v.add(own.out + row_bytes * row + part, group // 16, v.dot(paid, zero, 2))
        values, out = own.values + part, own.out + part
        if few:
            at = codes + 4 * bits * number
            _multiply_codes(own.weights, 128, at, size * bits // 8, bits, 32, out, row_bytes, rows)
        else:
            _multiply_add(own.weights, 128, values, row_bytes, 32, out, row_bytes, rows, group)


@_compiled
def _multiply_turbo_keys(args, record, own, rows):
    """Logits of a record whose keys are directions, rotated, and norms."""
    size, bits, book = _get(args, SIZE), _get(args, KEY_BITS), _get(args, KEY_BOOK)
    row_bytes, numbers = 4 * size, record + _get(args, KEY_NUMBERS_AT)
    norms, residuals, means = own.numbers, own.numbers + 128, own.numbers + 256
    for row in range(rows):
        v.fill(own.logits + 128 * row, 2, np.float32(0.0))
    if rows <= FEW_ROWS:
        step, logits = 4 * bits, own.logits
        _multiply_looked_up(own.turned, row_bytes, record, step, bits, book, size, logits, 128, rows)
    else:
        _look_codes_up(record, bits, size, 32, 32, book, own.keys)
        _multiply_add(own.turned, row_bytes, own.keys, 128, size, own.logits, 128, rows, 32)
    _read_halves(numbers, norms, 32)
    if _get(args, SIGNS):
        _read_halves(numbers + 64, residuals, 32)
        _look_codes_up(record + 4 * size * bits, 1, size, 32, 32, _get(args, SIGN_BOOK), own.keys)
        for row in range(rows):
            v.fill(own.weights + 128 * row, 2, np.float32(0.0))
        _multiply_add(own.projected, row_bytes, own.keys, 128, size, own.weights, 128, rows, 32)
        for row in range(rows):
            weights = own.weights + 128 * row
            v.multiply(weights, residuals, weights, 2)
            v.add_scaled(own.logits + 128 * row, weights, 2, np.float32(1.0))
    for row in range(rows):
        v.multiply(own.logits + 128 * row, norms, own.logits + 128 * row, 2)
    if _get(args, MEANS_AT) >= 0:
        _read_halves(record + _get(args, MEANS_AT), means, size)
        for row in range(rows):
            v.add(own.logits + 128 * row, 2, v.dot(own.turned + row_bytes * row, means, size // 16))


@_compiled
def _add_turbo_values(args, record, own, rows):
    """Values that are directions, rotated, and norms; the sum stays rotated."""
    size, bits, book = _get(args, SIZE), _get(args, VALUE_BITS), _get(args, VALUE_BOOK)
    row_bytes, group, codes = 4 * size, _get(args, VALUE_GROUP), record + _get(args, VALUES_AT)
    _read_halves(record + _get(args, VALUE_NUMBERS_AT), own.numbers, 32)
    for row in range(rows):
        v.multiply(own.logits + 128 * row, own.numbers, own.weights + 128 * row, 2)
    if rows <= FEW_ROWS and group == 32:
        for number in range(size // 32):
            at, to = codes + 4 * bits * number, own.rotated + 128 * number
            step = size * bits // 8
            _multiply_looked_up(own.weights, 128, at, step, bits, book, 32, to, row_bytes, rows)
    else:
        _look_codes_up(codes, bits, 32, size, group, book, own.values)
        _multiply_add(own.weights, 128, own.values, row_bytes, 32, own.rotated, row_bytes, rows, size)


@_compiled
def _multiply_halves(args, record, own, rows):
    """Logits of a record whose keys are numbers, in a basis or not."""
    size, rank = _get(args, SIZE), _get(args, RANK)
    query = own.turned if _get(args, BASIS) else own.query
    _read_halves(record + _get(args, KEY_NUMBERS_AT), own.keys, 32 * rank)
    for row in range(rows):
        v.fill(own.logits + 128 * row, 2, np.float32(0.0))
    _multiply_add(query, 4 * size, own.keys, 128, rank, own.logits, 128, rows, 32)


@_compiled
def _add_halves(args, record, own, rows):
    """Values that are numbers; in a basis the sum stays there, and what is behind it means nothing."""
    row_bytes, rank = 4 * _get(args, SIZE), _get(args, RANK)
    out = own.rotated if _get(args, BASIS) else own.out
    width = (rank + 15) // 16 * 16
    for token in range(32):  # the last ones read on into the keys
        _read_halves(record + 2 * rank * token, own.values + 4 * width * token, width)
    _multiply_add(own.logits, 128, own.values, 4 * width, 32, out, row_bytes, rows, width)


@_compiled
def _into_basis(args, basis, own, rows):
    """The queries' coordinates in the basis of keys, `[D, BASIS]` float16; behind them they mean nothing."""
    size, rank = _get(args, SIZE), _get(args, RANK)
    row_bytes, width = 4 * size, (rank + 15) // 16 * 16
    for first in range(0, size, 16):
        for channel in range(16):
            source = basis + 2 * (first + channel) * _get(args, BASIS)
            _read_halves(source, own.keys + 4 * width * channel, width)
        _multiply_add(
            own.query + 4 * first, row_bytes, own.keys, 4 * width, 16, own.turned, row_bytes, rows, width
        )


@_compiled
def _out_of_basis(args, basis, own, rows):
    """Add the sum of values, which is in their basis `[BASIS, D]` float16, to the output."""
    size, rank = _get(args, SIZE), _get(args, RANK)
    row_bytes, of_values = 4 * size, basis + 2 * size * _get(args, BASIS)
    for first in range(0, rank, 32):
        some = min(32, rank - first)
        _read_halves(of_values + 2 * first * size, own.values, some * size)
        _multiply_add(
            own.rotated + 4 * first, row_bytes, own.values, row_bytes, some, own.out, row_bytes, rows, size
        )


@_compiled
def _attend_record(args, record, own, rows, following):
    """Add what a record says to the rows' output, and have the one that follows it brought near."""
    kind = _get(args, KEY_KIND)
    if HAS_BYTE_PRODUCTS and kind == KIVI_DIGITS:
        _multiply_kivi_keys_by_digits(args, record, own, rows, following)
    else:
        _fetch_half(args, following, 0)
        if kind == TURBO:
            _multiply_turbo_keys(args, record, own, rows)
        elif kind == HALVES:
            _multiply_halves(args, record, own, rows)
        else:
            _multiply_kivi_keys(args, record, own, rows)
    _cap(args, own, rows, _bias(args, record))
    _soften(args, own, rows)
    kind = _get(args, VALUE_KIND)
    if HAS_BYTE_PRODUCTS and kind == KIVI_DIGITS:
        _add_kivi_values_by_digits(args, record, own, rows, following)
    else:
        _fetch_half(args, following, 1)
        if kind == TURBO:
            _add_turbo_values(args, record, own, rows)
        elif kind == HALVES:
            _add_halves(args, record, own, rows)
        else:
            _add_kivi_values(args, record, own, rows)


@_compiled
def _attend_raw(args, page, token, own, rows, first_query, num_queries, tail):
    """Add what 32 tokens of the raw tail, from `token` on, say to the rows' output."""
    size, group, block_size = _get(args, SIZE), _get(args, GROUP), _get(args, BLOCK_SIZE)
    row_bytes, valid = 4 * size, min(32, tail - token)
    _read_raw(args, page, token % block_size, valid, own.keys, own.values)
    for row in range(rows):
        v.fill(own.logits + 128 * row, 2, np.float32(0.0))
    _multiply_add(own.query, row_bytes, own.keys, 128, size, own.logits, 128, rows, 32)
    _cap(args, own, rows, 0)
    for row in range(rows):
        # The last query sees the whole tail, each earlier one a token less.
        seen = tail - (num_queries - 1 - first_query - row // group) - token
        for unseen in range(max(min(seen, valid), 0), 32):
            v.set_f32(own.logits + 128 * row + 4 * unseen, np.float32(-np.inf))
    _soften(args, own, rows)
    _multiply_add(own.logits, 128, own.values, row_bytes, valid, own.out, row_bytes, rows, size)


@_compiled
def _record(args, pages, number):
    """Where a record of a run is."""
    per_page = _get(args, PER_PAGE)
    page = v.get_i32(pages + 4 * (number // per_page))
    at = _get(args, CACHE) + page * _get(args, PAGE_BYTES) + _get(args, RECORDS_AT)
    return at + number % per_page * _get(args, RECORD_BYTES)


@_compiled
def _buffers(args, scratch):
    size, most = _get(args, SIZE), _get(args, QUERIES) * _get(args, GROUP)
    rows, tile = 4 * most * size, 128 * size
    keys = scratch + 6 * rows
    logits = keys + 2 * tile
    state = logits + 256 * most
    return Buffers(
        scratch,
        scratch + rows,
        scratch + 2 * rows,
        scratch + 3 * rows,
        scratch + 4 * rows,
        scratch + 5 * rows,
        keys,
        keys + tile,
        logits,
        logits + 128 * most,
        state,
        state + 16 * most,
    )


@_compiled
def _begin(args, own, rows, pair, encoded):
    """Bring a piece's queries together, from its first pair of query and head on; nothing is summed yet."""
    size, group, heads = _get(args, SIZE), _get(args, GROUP), _get(args, HEADS)
    row_bytes = 4 * size
    for row in range(rows):
        source = pair + row // group * heads * group + row % group
        for channel in range(0, row_bytes, 64):
            v.copy(_get(args, QUERY) + source * row_bytes + channel, own.query + row * row_bytes + channel)
        v.scale(own.query + row * row_bytes, size // 16, v.get_f32(_get(args, INNER)))
        v.set_f32(own.state + 16 * row, np.float32(-np.inf))
        v.set_f32(own.state + 16 * row + 4, np.float32(0.0))
        for sum_ in (own.out, own.rotated, own.turned, own.projected):
            v.fill(sum_ + row * row_bytes, size // 16, np.float32(0.0))
    v.set_f32(own.state + 12, max(v.largest(own.query, rows * size // 16), SMALLEST))
    if encoded and _get(args, KEY_KIND) == TURBO:
        matrix = _get(args, ROTATION)
        _multiply_add(own.query, row_bytes, matrix, row_bytes, size, own.turned, row_bytes, rows, size)
        if _get(args, SIGNS):
            matrix = _get(args, PROJECTION)
            _multiply_add(
                own.turned, row_bytes, matrix, row_bytes, size, own.projected, row_bytes, rows, size
            )


@_compiled
def _attend_piece(args, scratch, row, block, head, split):
    size, group, heads = _get(args, SIZE), _get(args, GROUP), _get(args, HEADS)
    queries, share = _get(args, QUERIES), _get(args, SHARE)
    start = v.get_i32(_get(args, START) + 4 * row)
    num_queries = v.get_i32(_get(args, START) + 4 * row + 4) - start
    first_query = block * queries
    if first_query >= num_queries:
        return
    rows = min(queries, num_queries - first_query) * group
    in_run = 32 * v.get_i32(_get(args, RECORDS) + 4 * (row * heads + head))
    tail = v.get_i32(_get(args, TAIL) + 4 * row)
    begin = split * share
    end = min(begin + share, in_run + tail)
    last = min(end, in_run) // 32
    own = _buffers(args, scratch)
    pair = ((start + first_query) * heads + head) * group
    _begin(args, own, rows, pair, begin // 32 < last)

    pages = _get(args, PAGES) + 4 * (row * heads + head) * _get(args, WIDTH)
    place = v.get_i32(_get(args, FIRST) + 4 * (row * heads + head))
    record = _record(args, pages, place + begin // 32) if begin // 32 < last else 0
    in_basis = _get(args, BASIS) > 0 and begin // 32 < last
    basis = 0
    if in_basis:
        basis = _get(args, CACHE) + v.get_i32(pages) * _get(args, PAGE_BYTES) + _get(args, BASIS_AT)
        _into_basis(args, basis, own, rows)
    for number in range(begin // 32, last):
        following = _record(args, pages, place + min(number + 1, last - 1))
        _attend_record(args, record, own, rows, following)
        record = following

    first_page = v.get_i32(_get(args, COUNTS) + 4 * (row * heads + head))
    for token in range(max(begin - in_run, 0), end - in_run, 32):
        page = v.get_i32(pages + 4 * (first_page + token // _get(args, BLOCK_SIZE)))
        at = _get(args, CACHE) + page * _get(args, PAGE_BYTES)
        _attend_raw(args, at, token, own, rows, first_query, num_queries, tail)

    row_bytes = 4 * size
    if _get(args, VALUE_KIND) == TURBO:
        _multiply_add(
            own.rotated, row_bytes, _get(args, BACK), row_bytes, size, own.out, row_bytes, rows, size
        )
    if in_basis:
        _out_of_basis(args, basis, own, rows)
    for number in range(rows):
        part = pair + number // group * heads * group + number % group
        part = part * _get(args, ALL_SPLITS) + _get(args, BEFORE) + split
        to = _get(args, PART_OUT) + part * row_bytes
        for channel in range(0, row_bytes, 64):
            v.copy(own.out + number * row_bytes + channel, to + channel)
        to = _get(args, PART_STATE) + 8 * part
        v.set_f32(to, v.get_f32(own.state + 16 * number))
        v.set_f32(to + 4, v.get_f32(own.state + 16 * number + 4))


@_compiled
def _attend_thread(args):
    thread = v.take(args + 8 * THREAD)
    if thread >= _get(args, MOST_THREADS):  # the others do its work
        return
    scratch = _get(args, SCRATCH) + thread * _get(args, SCRATCH_BYTES)
    heads, blocks, num_rows = _get(args, HEADS), _get(args, BLOCKS), _get(args, NUM_ROWS)
    while True:
        piece = v.take(args + 8 * NEXT)
        if piece >= _get(args, PIECES):
            return
        head, piece = piece % heads, piece // heads
        row, piece = piece % num_rows, piece // num_rows
        _attend_piece(args, scratch, row, piece % blocks, head, piece // blocks)


@_compiled
def _merge_thread(args):
    size, splits, pairs = _get(args, SIZE), _get(args, ALL_SPLITS), _get(args, NUM_PAIRS)
    sinks = _get(args, SINKS)
    while True:
        first = v.take(args + 8 * NEXT) * PAIRS
        if first >= pairs:
            return
        for pair in range(first, min(first + PAIRS, pairs)):
            states = _get(args, PART_STATE) + 8 * pair * splits
            peak = np.float32(-np.inf)
            for split in range(splits):
                peak = max(peak, v.get_f32(states + 8 * split))
            sink = v.get_f32(sinks + 4 * pair) if sinks != 0 else np.float32(-np.inf)
            peak = max(peak, sink)
            level = np.float32(0.0) if peak == np.float32(-np.inf) else peak
            total = v.exp2(sink - level)
            for split in range(splits):
                weight = v.exp2(v.get_f32(states + 8 * split) - level)
                total += weight * v.get_f32(states + 8 * split + 4)
            out = _get(args, OUT) + 4 * size * pair
            v.fill(out, size // 16, np.float32(0.0))
            for split in range(splits):
                weight = v.exp2(v.get_f32(states + 8 * split) - level)
                if weight > 0:
                    part = _get(args, PART_OUT) + 4 * size * (pair * splits + split)
                    v.add_scaled(out, part, size // 16, np.float32(weight / total))


@functools.cache
def compiled_steps() -> tuple[int, int]:
    """Addresses of the compiled steps, which live as long as the process.

    To compile takes some seconds, so the code is kept on disk where there is a place for it. What stands for
    these two files is a constant of it: code of other ones is not taken for it.
    """
    files = __file__, v.__file__
    sources = sum(zlib.crc32(Path(file).read_bytes()) for file in files if file)

    def attend(args):
        if sources >= 0:
            _attend_thread(args)

    def merge(args):
        if sources >= 0:
            _merge_thread(args)

    signature = types.void(types.int64)
    try:
        _KEPT[:] = [cfunc(signature, nopython=True, cache=True)(step) for step in (attend, merge)]
    except RuntimeError:  # no folder can be written
        _KEPT[:] = [cfunc(signature, nopython=True)(step) for step in (attend, merge)]
    return _KEPT[0].address, _KEPT[1].address


_KEPT: list = []


def _parallel() -> Callable[[int, int, int], None]:
    """Calls a function of one address on so many of the threads that torch computes with, whichever OpenMP
    library that is; on this one alone where there is none of GNU's interface."""
    try:
        run = ctypes.CDLL(None).GOMP_parallel
    except AttributeError:
        return lambda function, args, threads: ctypes.CFUNCTYPE(None, ctypes.c_int64)(function)(args)
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    run.restype = None
    return lambda function, args, threads: run(function, args, threads, 0)


_run = functools.cache(_parallel)


@dataclass(frozen=True)
class RecordRows:
    """Rows of a batch that hold records, in one layer; all int32 on the CPU and contiguous.

    Attributes:
        start: `[R + 1]`, where each row's queries begin.
        pages: `[R, H, W]`, of a head's run, then of its raw tail.
        counts: `[R, H]`, pages of the run.
        records: `[P, R, H]`, records in it of each part of the format.
        first: `[P, R, H]`, the place of each part's first one.
        tail: `[R]`, tokens of the raw tail, the queries' own included.
        max_query_len: queries of the longest row.
        max_records: of each part, records of the head that has most, or a bound on it.
        max_tail: tokens of the longest tail, or a bound on it.
    """

    start: Tensor
    pages: Tensor
    counts: Tensor
    records: Tensor
    first: Tensor
    tail: Tensor
    max_query_len: int
    max_records: Sequence[int]
    max_tail: int


class RecordAttention:
    """Attention over the records of one format in a paged cache."""

    def __init__(
        self,
        format: Format,
        cache: Tensor,
        places: tuple[Tensor, Tensor],
        dtype: torch.dtype,
    ) -> None:
        """Bind to a cache.

        Args:
            format: of the records.
            cache: `[P, page_bytes]` uint8, every page of every layer, contiguous.
            places: `[N, D]` int64 of keys and of values: where a raw page has each element, counted from its
                keys' or values' first.
            dtype: of raw pages.
        """
        assert cache.is_contiguous() and cache.dtype == torch.uint8
        self.block_size, self.head_size = places[0].shape
        self._keep: list[Tensor] = [cache]
        keys, values = (self._held(place.to(torch.int32)) for place in places)
        raw = np.zeros(len(A), dtype=np.int64)
        raw[A.SIZE], raw[A.CACHE], raw[A.PAGE_BYTES] = self.head_size, cache.data_ptr(), cache.shape[1]
        raw[A.BLOCK_SIZE], raw[A.DTYPE] = self.block_size, DTYPES[dtype]
        raw[A.KEY_PLACE], raw[A.VALUE_PLACE] = keys.data_ptr(), values.data_ptr()
        token, channel = torch.arange(self.block_size)[:, None], torch.arange(self.head_size)
        key_stride, value_stride = int(keys[0, 1]), int(values[1, 0])
        if torch.equal(keys, (token + channel * key_stride).to(torch.int32)):
            raw[A.KEY_STRIDE] = key_stride
        if torch.equal(values, (token * value_stride + channel).to(torch.int32)):
            raw[A.VALUE_STRIDE] = value_stride
        self._args = [self._describe(raw.copy(), part) for part in format.parts]
        self._scratch = torch.empty(0)

    def _held(self, tensor: Tensor) -> Tensor:
        """The tensor, contiguous and alive for as long as this is."""
        self._keep.append(tensor.contiguous())
        return self._keep[-1]

    def _describe(self, args: np.ndarray, format: RecordFormat) -> np.ndarray:
        """Arguments of one part of the format."""
        size, page_bytes, record_bytes = (
            self.head_size,
            args[A.PAGE_BYTES],
            format.record_bytes(self.head_size),
        )
        args[A.RECORD_BYTES], args[A.PER_PAGE] = record_bytes, page_bytes // record_bytes
        args[A.RECORDS_AT] = page_bytes % record_bytes
        args[A.VALUE_GROUP], args[A.BIAS_AT], args[A.MEANS_AT] = value_group(size), format.bias_at(size), -1
        format = format.plain
        if isinstance(format, Vectors):
            args[A.KEY_KIND] = args[A.VALUE_KIND] = HALVES
            args[A.RANK] = rank = format.rank(size)
            args[A.KEY_NUMBERS_AT] = 2 * RECORD * rank
            if isinstance(format, Latent):
                basis = Basis()
                args[A.BASIS] = basis.rank(size)
                args[A.BASIS_AT] = page_bytes % basis.record_bytes(size)
            return args
        args[A.KEY_BITS] = args[A.VALUE_BITS] = format.bits
        kivi = KIVI_DIGITS if HAS_BYTE_PRODUCTS and value_group(size) == 32 else KIVI
        args[A.KEY_KIND] = args[A.VALUE_KIND] = kivi if isinstance(format, Kivi) else TURBO
        key_numbers = 4 * size
        if isinstance(format, Hybrid):
            args[A.KEY_KIND], args[A.VALUE_BITS] = kivi, format.value_bits
            self._describe_rotation(args, format)
        if isinstance(format, TurboQuant):
            self._describe_rotation(args, format)
            self._describe_keys(args, format)
            key_numbers = 2 * RECORD * (1 + int(args[A.SIGNS]))
        plane = RECORD * size // 8
        args[A.VALUES_AT] = plane * (args[A.KEY_BITS] + args[A.SIGNS])
        args[A.KEY_NUMBERS_AT] = args[A.VALUES_AT] + plane * args[A.VALUE_BITS]
        args[A.VALUE_NUMBERS_AT] = args[A.KEY_NUMBERS_AT] + key_numbers
        return args

    def _describe_rotation(self, args: np.ndarray, format: TurboQuant | Hybrid) -> None:
        """Arguments of rotated values."""
        rotation = self._held(format.rotation(self.head_size))
        args[A.ROTATION], args[A.BACK] = rotation.data_ptr(), self._held(rotation.T).data_ptr()
        args[A.VALUE_BOOK] = self._book(format.codebook(self.head_size))

    def _describe_keys(self, args: np.ndarray, format: TurboQuant) -> None:
        """Arguments of rotated keys."""
        size = self.head_size
        args[A.KEY_BOOK] = self._book(format.key_codebook(size))
        args[A.KEY_BITS] = format.key_bits
        if isinstance(format, TurboCentred):
            args[A.MEANS_AT] = format.record_bytes(size) - 2 * size
        if isinstance(format, TurboProd):
            factor = math.sqrt(math.pi / 2) / size
            args[A.SIGNS], args[A.SIGN_BOOK] = 1, self._book(torch.tensor([-1.0, 1.0]))
            args[A.PROJECTION] = self._held(format.projection(size).T * factor).data_ptr()

    def _book(self, levels: Tensor) -> int:
        """The address of 16 levels, of which the last ones may stand for nothing."""
        return self._held(torch.nn.functional.pad(levels, (0, 16 - len(levels)))).data_ptr()

    def attend(
        self,
        query: Tensor,
        rows: RecordRows,
        scale: float,
        logits_soft_cap: float,
        out: Tensor,
        sinks: Tensor | None = None,
    ) -> None:
        """Attention of each row's newest tokens over what every head holds.

            O = softmax(cap·tanh(scale·q·kᵀ / cap))·v, or softmax(scale·q·kᵀ)·v without a cap

        Args:
            query: `[T, Hq, D]`, the rows' queries one row after the other.
            rows: whose they are.
            scale: softmax scale.
            logits_soft_cap: 0 for none.
            out: `[T, Hq, D]`, written.
            sinks: `[Hq]`, one more logit of each query head, to which no value belongs; behind the cap.
        """
        num_tokens, query_heads, size = query.shape
        num_rows, heads, width = rows.pages.shape
        group, threads = query_heads // heads, torch.get_num_threads()
        queries = max(1, ROWS // group)
        blocks = -(-rows.max_query_len // queries)
        pieces = num_rows * heads * blocks
        # The last part reads the tail, too.
        tails = [torch.zeros_like(rows.tail)] * (len(self._args) - 1) + [rows.tail]
        longest = [RECORD * most for most in rows.max_records]
        longest[-1] += rows.max_tail
        shares = [_shares(pieces, most, threads) for most in longest]
        splits = sum(number for _, number in shares)
        floats = _floats(queries * group, size)
        if self._scratch.numel() < threads * floats:
            self._scratch = torch.empty(threads * floats)
        query = query.float().contiguous()  # it may be a part of a wider array
        result = torch.empty(num_tokens, query_heads, size)
        parts = torch.empty(num_tokens * query_heads * splits, size + 2)
        capped = logits_soft_cap > 0
        inner = scale / logits_soft_cap if capped else scale * LOG2_E
        factors = np.array([inner, logits_soft_cap * LOG2_E, capped], dtype=np.float32)
        in_base_2 = torch.empty(0)
        if sinks is not None:
            in_base_2 = (sinks.float() * LOG2_E).repeat(num_tokens)
        attend, merge = compiled_steps()
        before = 0
        of_parts = zip(self._args, shares, tails, rows.records, rows.first, strict=True)
        for args, (share, number), tail, records, first in of_parts:
            args[A.THREADS] = threads
            args[A.PIECES] = pieces * number
            args[A.ROWS], args[A.HEADS], args[A.GROUP] = num_rows, heads, group
            args[A.BLOCKS], args[A.QUERIES], args[A.SPLITS], args[A.SHARE] = blocks, queries, number, share
            args[A.ALL_SPLITS], args[A.BEFORE] = splits, before
            args[A.QUERY], args[A.START], args[A.PAGES] = (
                tensor.data_ptr() for tensor in (query, rows.start, rows.pages)
            )
            args[A.WIDTH], args[A.COUNTS] = width, rows.counts.data_ptr()
            args[A.RECORDS], args[A.FIRST], args[A.TAIL] = (
                tensor.data_ptr() for tensor in (records, first, tail)
            )
            args[A.SCRATCH], args[A.SCRATCH_BYTES] = self._scratch.data_ptr(), 4 * floats
            args[A.PART_OUT] = parts.data_ptr()
            args[A.PART_STATE] = parts.data_ptr() + 4 * num_tokens * query_heads * splits * size
            args[A.OUT], args[A.INNER] = result.data_ptr(), factors.ctypes.data
            args[A.PAIRS] = num_tokens * query_heads
            args[A.SINKS] = 0 if sinks is None else in_base_2.data_ptr()
            self._run(attend, args)
            before += number
        self._run(merge, args)
        out.copy_(result)

    @staticmethod
    def _run(step: int, args: np.ndarray) -> None:
        args[A.NEXT] = args[A.THREAD] = 0
        _run()(step, args.ctypes.data, int(args[A.THREADS]))


def _shares(pieces: int, max_tokens: int, threads: int) -> tuple[int, int]:
    """Tokens of a share and the number of shares, so that few rows still keep every thread busy."""
    wanted = -(-PIECES_PER_THREAD * threads // pieces)
    share = max(-(-max_tokens // wanted), MIN_SHARE)
    share = -(-share // RECORD) * RECORD
    return share, max(1, -(-max_tokens // share))
