"""Vector instructions for kernels that Numba compiles on a CPU.

Numba vectorises loops over arrays only where it can show that nothing overlaps, and holds no vector in a
register from one loop to the next. So what kernels spend their time on is written here in LLVM's terms, on
plain addresses (int64): each function below becomes a few instructions, whatever the processor's vectors are.
"""

import functools
import math
from collections.abc import Callable

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic


def _answer_for_functions_alone() -> None:
    """Have llvmlite's library say that it has no `__dict__`; it would hand out a C function of that name.

    vLLM asks everything that any loaded module holds for it whenever an engine starts, and would fail.
    """
    library = type(llvm.ffi.lib)
    look_up = library.__getattr__

    @functools.wraps(look_up)
    def of_functions(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return look_up(self, name)

    if not hasattr(look_up, "__wrapped__"):
        library.__getattr__ = of_functions


_answer_for_functions_alone()

LANES = 16
FAST = ("nnan", "nsz", "arcp", "contract", "reassoc")  # infinities mean something here
F32, HALF, I8, I16, I32, I64 = ir.FloatType(), ir.HalfType(), *map(ir.IntType, (8, 16, 32, 64))
VECTOR, INTEGERS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
# One instruction looks sixteen numbers up where there is one that does; LLVM does not find it by itself.
HAS_LOOKUP = bool(llvm.get_host_cpu_features().get("avx512f"))
# Another multiplies 64 bytes, and adds four products at a time.
HAS_BYTE_PRODUCTS = bool(llvm.get_host_cpu_features().get("avx512vnni"))


def _at(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, offset: int = 0) -> ir.Value:
    if offset:
        address = builder.add(address, I64(offset))
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, offset: int = 0) -> ir.Value:
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    return builder.load(_at(builder, address, kind, offset), align=element.get_abi_size(_LAYOUT))


def _store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, offset: int = 0) -> None:
    builder.store(value, _at(builder, address, value.type, offset), align=4)


_LAYOUT = llvm.create_target_data("")


def _splat(builder: ir.IRBuilder, value: ir.Value, lanes: int = LANES) -> ir.Value:
    kind = ir.VectorType(value.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(
        one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    )


def _constant(value: float) -> ir.Constant:
    return ir.Constant(VECTOR, [value] * LANES)


def _integers(value: int) -> ir.Constant:
    return ir.Constant(INTEGERS, [value] * LANES)


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, arguments, fastmath=FAST if name.endswith("f32") else ())


def _loop(builder: ir.IRBuilder, count: ir.Value, initial: list[ir.Value], body: Callable) -> list[ir.Value]:
    """`body(i, *values) -> values` for i below count; the values stay in registers."""
    before, head = builder.block, builder.append_basic_block("loop")
    inside, after = builder.append_basic_block("body"), builder.append_basic_block("after")
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(I64)
    index.add_incoming(I64(0), before)
    values = [builder.phi(value.type) for value in initial]
    for phi, value in zip(values, initial, strict=True):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", index, count), inside, after)
    builder.position_at_end(inside)
    new = body(index, *values)
    index.add_incoming(builder.add(index, I64(1)), builder.block)
    for phi, value in zip(values, new, strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return values


def _on_addresses(num_arguments: int, emit: Callable, result: types.Type = types.void) -> Callable:
    """A function of int64 that Numba puts in place; `emit(builder, *arguments)` writes it."""

    def code(context, builder, signature, arguments):
        value = emit(builder, *arguments)
        return context.get_dummy_value() if value is None else value

    names = ", ".join(f"a{i}" for i in range(num_arguments))
    space: dict = {"result": result, "code": code, "i64": types.int64}
    signature = f"result({', '.join(['i64'] * num_arguments)})"
    exec(f"def function(typing, {names}):\n    return {signature}, code\n", space)
    return intrinsic(space["function"])


def _fetch_line(builder: ir.IRBuilder, address: ir.Value) -> None:
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    name = "llvm.prefetch.p0"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    # To read, into the core's own cache, data.
    builder.call(function, [builder.inttoptr(address, pointer), I32(0), I32(3), I32(1)])


def _emit_fetch(builder, address, lines):
    def step(i):
        _fetch_line(builder, builder.add(address, builder.mul(i, I64(LINE))))
        return []

    _loop(builder, lines, [], step)


LINE = 64  # bytes that memory hands over at once
# `(address, lines)`: have so many lines brought near while something else is computed.
fetch = _on_addresses(2, _emit_fetch)

# ---------------------------------------------------------------------- single numbers

get_f32 = _on_addresses(1, lambda b, at: _load(b, at, F32), types.float32)
get_bfloat16 = _on_addresses(
    1,
    lambda b, at: b.bitcast(b.shl(b.zext(_load(b, at, I16), I32), I32(16)), F32),
    types.float32,
)
get_float16 = _on_addresses(1, lambda b, at: b.fpext(_load(b, at, HALF), F32), types.float32)
get_i32 = _on_addresses(1, lambda b, at: b.sext(_load(b, at, I32), I64), types.int64)
get_i64 = _on_addresses(1, lambda b, at: _load(b, at, I64), types.int64)
# The next number of a counter that threads share.
take = _on_addresses(1, lambda b, at: b.atomic_rmw("add", _at(b, at, I64), I64(1), "monotonic"), types.int64)


@intrinsic
def set_f32(typing, address, value):
    """Store a float32."""

    def code(context, builder, signature, arguments):
        _store(builder, arguments[1], arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), code


# ---------------------------------------------------------------------- what is stored, as float32


def _reader(kind: str, count: int) -> Callable:
    """`(source, target)`: `count` (32 or 16) numbers as float32."""

    def whole(builder, source, target):
        for first in range(0, count, LANES):
            if kind == "bfloat16":
                raw = _load(builder, source, ir.VectorType(I16, LANES), 2 * first)
                bits = builder.shl(builder.zext(raw, INTEGERS), _integers(16))
                vector = builder.bitcast(bits, VECTOR)
            elif kind == "float16":
                vector = builder.fpext(_load(builder, source, ir.VectorType(HALF, LANES), 2 * first), VECTOR)
            else:
                vector = _load(builder, source, VECTOR, 4 * first)
            _store(builder, vector, target, 4 * first)

    return _on_addresses(2, whole)


def _plane_vectors(builder: ir.IRBuilder, source: ir.Value, bits: int, count: int) -> list[ir.Value]:
    """`count` codes of 1, 2, 4 or 8 bits, packed in planes, as vectors of 16."""
    width = count * bits // 8
    kind = ir.VectorType(I32, width)
    raw = builder.zext(_load(builder, source, ir.VectorType(I8, width)), kind)
    mask = ir.Constant(kind, [(1 << bits) - 1] * width)
    shifts = (ir.Constant(kind, [bits * plane] * width) for plane in range(8 // bits))
    parts = [builder.and_(builder.lshr(raw, shift), mask) for shift in shifts]
    while parts[0].type.count < LANES:
        size = parts[0].type.count
        index = ir.Constant(ir.VectorType(I32, 2 * size), list(range(2 * size)))
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [builder.shuffle_vector(low, high, index) for low, high in pairs]
    if parts[0].type.count > LANES:
        index = [ir.Constant(INTEGERS, list(range(first, first + LANES))) for first in (0, LANES)]
        parts = [builder.shuffle_vector(part, part, half) for part in parts for half in index]
    return parts


def _decoded(builder: ir.IRBuilder, source: ir.Value, bits: int, count: int, book: Callable | None) -> list:
    """`count` codes as vectors of 16 float32: themselves, or what a book says of them."""
    if bits == 3:
        low = _plane_vectors(builder, source, 2, count)
        high = _plane_vectors(builder, builder.add(source, I64(count // 4)), 1, count)
        codes = [builder.or_(a, builder.shl(b, _integers(2))) for a, b in zip(low, high, strict=True)]
    else:
        codes = _plane_vectors(builder, source, bits, count)
    return [builder.sitofp(code, VECTOR) if book is None else book(code) for code in codes]


def _book(builder: ir.IRBuilder, address: ir.Value) -> Callable:
    """Looks vectors of codes up in 16 float32."""
    numbers = _load(builder, address, VECTOR)

    def at_once(code):
        return _call(builder, "llvm.x86.avx512.permvar.sf.512", VECTOR, numbers, code)

    def one_by_one(code):
        value = ir.Constant(VECTOR, ir.Undefined)
        for lane in range(LANES):
            number = builder.extract_element(numbers, builder.extract_element(code, I32(lane)))
            value = builder.insert_element(value, number, I32(lane))
        return value

    return at_once if HAS_LOOKUP else one_by_one


def _code_reader(bits: int, count: int, table: bool) -> Callable:
    """`(source, target)` or, to look the codes up in a table of float32, `(source, target, table)`."""

    def emit(builder, source, target, *address):
        book = _book(builder, *address) if address else None
        for number, vector in enumerate(_decoded(builder, source, bits, count, book)):
            _store(builder, vector, target, 4 * LANES * number)

    return _on_addresses(3 if table else 2, emit)


def _code_product(rows: int, bits: int, table: bool) -> Callable:
    """`(a, a_row, codes, code_row, k, c, c_row[, table])`: C += A·B, B `[k, 32]` of what codes say.

    The codes of a row of B, 32 together, become numbers in registers.
    """

    def emit(builder, a, a_row, codes, code_row, k, c, c_row, *address):
        book = _book(builder, *address) if address else None

        def right(i):
            return _decoded(builder, builder.add(codes, builder.mul(i, code_row)), bits, 2 * LANES, book)

        _emit_product(builder, rows, 2 * LANES, a, a_row, right, k, c, c_row)

    return _on_addresses(8 if table else 7, emit)


read_bfloat16, read_float16, read_float32 = (
    _reader(kind, 2 * LANES) for kind in ("bfloat16", "float16", "float32")
)
read_bfloat16_16, read_float16_16, read_float32_16 = (
    _reader(kind, LANES) for kind in ("bfloat16", "float16", "float32")
)
read_8, read_4, read_2 = (_code_reader(bits, 2 * LANES, table=False) for bits in (8, 4, 2))
read_8_16, read_4_16, read_2_16 = (_code_reader(bits, LANES, table=False) for bits in (8, 4, 2))
look_up_4, look_up_3, look_up_2, look_up_1 = (
    _code_reader(bits, 2 * LANES, table=True) for bits in (4, 3, 2, 1)
)
look_up_4_16, look_up_3_16, look_up_2_16 = (_code_reader(bits, LANES, table=True) for bits in (4, 3, 2))


# ---------------------------------------------------------------------- arithmetic on rows


def _emit_product(builder, rows: int, width: int, a, a_row, right: Callable, k, c, c_row) -> None:
    """C += A·B; `right(i)` makes row i of B, vectors of 16."""
    each = width // LANES
    a_at = [builder.add(a, builder.mul(I64(row), a_row)) for row in range(rows)]
    c_at = [builder.add(c, builder.mul(I64(row), c_row)) for row in range(rows)]
    sums = [_load(builder, at, VECTOR, 4 * LANES * j) for at in c_at for j in range(each)]

    def step(i, *sums):
        vectors, new = right(i), []
        for row in range(rows):
            factor = _load(builder, builder.add(a_at[row], builder.shl(i, I64(2))), F32)
            left = _splat(builder, factor)
            for j in range(each):
                product = builder.fmul(left, vectors[j], flags=FAST)
                new.append(builder.fadd(sums[row * each + j], product, flags=FAST))
        return new

    sums = _loop(builder, k, sums, step)
    for number, total in enumerate(sums):
        _store(builder, total, c_at[number // each], 4 * LANES * (number % each))


def _product(rows: int, width: int) -> Callable:
    """`(a, a_row, b, b_row, k, c, c_row)`: C += A·B, of `rows` rows and `width` columns; rows in bytes."""

    def emit(builder, a, a_row, b, b_row, k, c, c_row):
        def right(i):
            at = builder.add(b, builder.mul(i, b_row))
            return [_load(builder, at, VECTOR, 4 * LANES * j) for j in range(width // LANES)]

        _emit_product(builder, rows, width, a, a_row, right, k, c, c_row)

    return _on_addresses(7, emit)


product_1_32, product_2_32, product_3_32, product_4_32 = (_product(rows, 32) for rows in (1, 2, 3, 4))
product_1_16 = _product(1, 16)


# Of codes that stand for themselves, and of those that are looked up: by bits, then by rows.
codes_1_8, codes_2_8, codes_3_8, codes_4_8 = (_code_product(rows, 8, table=False) for rows in (1, 2, 3, 4))
codes_1_4, codes_2_4, codes_3_4, codes_4_4 = (_code_product(rows, 4, table=False) for rows in (1, 2, 3, 4))
codes_1_2, codes_2_2, codes_3_2, codes_4_2 = (_code_product(rows, 2, table=False) for rows in (1, 2, 3, 4))
looked_1_4, looked_2_4, looked_3_4, looked_4_4 = (_code_product(rows, 4, table=True) for rows in (1, 2, 3, 4))
looked_1_3, looked_2_3, looked_3_3, looked_4_3 = (_code_product(rows, 3, table=True) for rows in (1, 2, 3, 4))
looked_1_2, looked_2_2, looked_3_2, looked_4_2 = (_code_product(rows, 2, table=True) for rows in (1, 2, 3, 4))
looked_1_1, looked_2_1, looked_3_1, looked_4_1 = (_code_product(rows, 1, table=True) for rows in (1, 2, 3, 4))


# ---------------------------------------------------------------------- products of bytes

# A number up to REACH, rounded, has three digits in base 256 that are signed bytes: of the number and ZERO
# together each digit is 128 more, and none has a sign.
DIGITS, REACH, ZERO = 3, 8.35e6, 0x808080


def _emit_digits(builder, a, b, target, vectors):
    zero = ir.Constant(ir.VectorType(I8, 4 * LANES), list(ZERO.to_bytes(4, "little")) * LANES)
    order = [16 * four + 4 * each + digit for four in range(4) for digit in range(4) for each in range(4)]

    def step(i):
        offset = builder.mul(i, I64(4 * LANES))
        left, right = (_load(builder, builder.add(at, offset), VECTOR) for at in (a, b))
        product = builder.fmul(left, right, flags=("contract",))
        moved = builder.fadd(product, _constant(ZERO), flags=("contract",))
        name = "llvm.x86.avx512.mask.cvtps2dq.512"
        whole = _call(builder, name, INTEGERS, moved, _integers(0), ir.IntType(16)(-1), I32(4))
        digits = builder.xor(builder.bitcast(whole, zero.type), zero)
        digits = builder.shuffle_vector(digits, digits, ir.Constant(ir.VectorType(I32, 4 * LANES), order))
        _store(builder, digits, builder.add(target, offset))
        return []

    _loop(builder, vectors, [], step)


# `(a, b, target, vectors)`: digits of the products of so many vectors of 16, which must be within REACH. Four
# numbers have four bytes of the lowest digit, four of the next, four of the highest, and four without sense.
digits = _on_addresses(4, _emit_digits)


def _four_rows(builder: ir.IRBuilder, source: ir.Value, row: ir.Value, bits: int) -> list[ir.Value]:
    """Codes of four rows, 32 together, as two vectors of 16 columns: four bytes of each, one of a row."""
    width = 4 * bits
    at = [builder.add(source, builder.mul(I64(number), row)) for number in range(4)]
    parts = [_load(builder, each, ir.VectorType(I8, width)) for each in at]
    while len(parts) > 1:
        size = 2 * parts[0].type.count
        index = ir.Constant(ir.VectorType(I32, size), list(range(size)))
        parts = [builder.shuffle_vector(*pair, index) for pair in zip(parts[::2], parts[1::2], strict=True)]
    vectors = []
    for half in range(2):
        columns = range(LANES * half, LANES * (half + 1))
        order = [each * width + column % width for column in columns for each in range(4)]
        code = builder.shuffle_vector(parts[0], parts[0], ir.Constant(ir.VectorType(I32, 4 * LANES), order))
        code = builder.bitcast(code, INTEGERS)
        shift = ir.Constant(INTEGERS, [bits * (column // width) for column in columns])
        vectors.append(builder.and_(builder.lshr(code, shift), _integers(((1 << bits) - 1) * 0x01010101)))
    return vectors


def _digit_product(rows: int, bits: int) -> Callable:
    """`(a, a_row, codes, code_row, k, c, c_row, factor, ahead)`: C += A·B·factor, the factor at an address.

    A has `digits`, B `[k, 32]` codes that stand for themselves; k is a multiple of 4. Meanwhile as many bytes
    as B has, from `ahead` on, are fetched a line at a time: of many at once a core would wait for the first.
    """

    def emit(builder, a, a_row, codes, code_row, k, c, c_row, factor, ahead):
        a_at = [builder.add(a, builder.mul(I64(row), a_row)) for row in range(rows)]
        c_at = [builder.add(c, builder.mul(I64(row), c_row)) for row in range(rows)]

        def step(i, *sums):
            fetched = builder.add(ahead, builder.mul(i, I64(16 * bits)))
            for line in range(0, 16 * bits, LINE):
                _fetch_line(builder, builder.add(fetched, I64(line)))
            first = builder.add(codes, builder.mul(builder.shl(i, I64(2)), code_row))
            vectors, new = _four_rows(builder, first, code_row, bits), []
            for number in range(rows * DIGITS):
                at = builder.add(a_at[number // DIGITS], builder.shl(i, I64(4)))
                four = _splat(builder, _load(builder, at, I32, 4 * (number % DIGITS)))
                for codes_, total in zip(vectors, sums[2 * number : 2 * number + 2], strict=True):
                    new.append(_call(builder, "llvm.x86.avx512.vpdpbusd.512", INTEGERS, total, codes_, four))
            return new

        sums = _loop(builder, builder.ashr(k, I64(2)), [_integers(0)] * (2 * rows * DIGITS), step)
        times, base = _splat(builder, _load(builder, factor, F32)), _constant(256.0)
        for row, at in enumerate(c_at):
            of_row = [
                builder.sitofp(each, VECTOR) for each in sums[2 * DIGITS * row : 2 * DIGITS * (row + 1)]
            ]
            for half in range(2):
                low, middle, high = of_row[half::2]
                total = builder.fadd(builder.fmul(high, base, flags=FAST), middle, flags=FAST)
                total = builder.fadd(builder.fmul(total, base, flags=FAST), low, flags=FAST)
                old = _load(builder, at, VECTOR, 4 * LANES * half)
                new = builder.fadd(old, builder.fmul(total, times, flags=FAST), flags=FAST)
                _store(builder, new, at, 4 * LANES * half)

    return _on_addresses(9, emit)


# Of numbers that have digits: by bits of a code, then by rows.
digits_1_8, digits_2_8, digits_3_8, digits_4_8 = (_digit_product(rows, 8) for rows in (1, 2, 3, 4))
digits_1_4, digits_2_4, digits_3_4, digits_4_4 = (_digit_product(rows, 4) for rows in (1, 2, 3, 4))
digits_1_2, digits_2_2, digits_3_2, digits_4_2 = (_digit_product(rows, 2) for rows in (1, 2, 3, 4))


# ---------------------------------------------------------------------- rows alone


def _emit_dot(builder, a, b, vectors):
    def step(i, total):
        offset = builder.mul(i, I64(4 * LANES))
        left = _load(builder, builder.add(a, offset), VECTOR)
        right = _load(builder, builder.add(b, offset), VECTOR)
        return [builder.fadd(total, builder.fmul(left, right, flags=FAST), flags=FAST)]

    (total,) = _loop(builder, vectors, [_constant(0.0)], step)
    return _reduced(builder, "fadd", total)


def _reduced(builder: ir.IRBuilder, operation: str, vector: ir.Value) -> ir.Value:
    """The sum or the largest of a vector's numbers."""
    size = LANES
    while size > 1:
        size //= 2
        index = ir.Constant(INTEGERS, [(lane + size) % LANES for lane in range(LANES)])
        other = builder.shuffle_vector(vector, vector, index)
        vector = (
            builder.fadd(vector, other, flags=FAST)
            if operation == "fadd"
            else _larger(builder, vector, other)
        )
    return builder.extract_element(vector, I32(0))


def _larger(builder: ir.IRBuilder, one: ir.Value, other: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


# `(a, b, vectors)`: the dot product of so many vectors of 16.
dot = _on_addresses(3, _emit_dot, types.float32)


def _emit_largest(builder, address, vectors):
    def step(i, most):
        vector = _load(builder, builder.add(address, builder.mul(i, I64(4 * LANES))), VECTOR)
        return [_larger(builder, _call(builder, "llvm.fabs.v16f32", VECTOR, vector), most)]

    (most,) = _loop(builder, vectors, [_constant(0.0)], step)
    return _reduced(builder, "max", most)


# `(address, vectors)`: how far so many vectors of 16 are from 0 at most.
largest = _on_addresses(2, _emit_largest, types.float32)


def _emit_multiply(builder, a, b, target, vectors):
    def step(i):
        offset = builder.mul(i, I64(4 * LANES))
        left, right = (_load(builder, builder.add(at, offset), VECTOR) for at in (a, b))
        _store(builder, builder.fmul(left, right), builder.add(target, offset))
        return []

    _loop(builder, vectors, [], step)


# `(a, b, target, vectors)`: element by element.
multiply = _on_addresses(4, _emit_multiply)


copy = _on_addresses(2, lambda b, source, target: _store(b, _load(b, source, VECTOR), target))


@intrinsic
def add_scaled(typing, target, source, vectors, factor):
    """target += source·factor, so many vectors of 16."""

    def code(context, builder, signature, arguments):
        target, source, vectors, factor = arguments
        splat = _splat(builder, factor)

        def step(i):
            offset = builder.mul(i, I64(4 * LANES))
            to = builder.add(target, offset)
            added = builder.fmul(_load(builder, builder.add(source, offset), VECTOR), splat)
            _store(builder, builder.fadd(_load(builder, to, VECTOR), added), to)
            return []

        _loop(builder, vectors, [], step)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32), code


def _with_number(emit: Callable) -> Callable:
    """`(address, vectors, number)`, the number a float32."""

    @intrinsic
    def function(typing, address, vectors, number):
        def code(context, builder, signature, arguments):
            address, vectors, number = arguments
            splat = _splat(builder, number)

            def step(i):
                at = builder.add(address, builder.mul(i, I64(4 * LANES)))
                _store(builder, emit(builder, at, splat), at)
                return []

            _loop(builder, vectors, [], step)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32), code

    return function


fill = _with_number(lambda builder, at, number: number)
scale = _with_number(lambda builder, at, number: builder.fmul(_load(builder, at, VECTOR), number))
add = _with_number(lambda builder, at, number: builder.fadd(_load(builder, at, VECTOR), number))


# ---------------------------------------------------------------------- softmax

# 2**x for 0 <= x < 1 to one in 10**8, in Horner's order: fitted so that the largest relative error is least.
_EXP2 = (0.0002170225, 0.00124396896, 0.00967884064, 0.0554833412, 0.24022983, 0.693147004, 1.0)


def _exp2(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """2**x; 0 below -126, where float32 has no more whole numbers."""
    whole = _call(builder, "llvm.floor.v16f32", VECTOR, x)
    rest = builder.fsub(x, whole)
    result = _constant(_EXP2[0])
    for coefficient in _EXP2[1:]:
        product = builder.fmul(result, rest, flags=("contract",))
        result = builder.fadd(product, _constant(coefficient), flags=("contract",))
    gone = builder.fcmp_unordered("<", x, _constant(-126.0))  # NaN from -inf too
    exponent = builder.fptosi(builder.select(gone, _constant(0.0), whole), INTEGERS)
    power = builder.bitcast(builder.shl(builder.add(exponent, _integers(127)), _integers(23)), VECTOR)
    return builder.select(gone, _constant(0.0), builder.fmul(result, power))


def _emit_soften(builder, logits, state):
    """See `soften`."""
    halves = [_load(builder, logits, VECTOR, 4 * LANES * half) for half in range(2)]
    old, total = _load(builder, state, F32), _load(builder, state, F32, 4)
    most, before = _larger(builder, *halves), builder.block
    above = builder.fcmp_ordered(">", most, _splat(builder, old))
    some = _call(builder, "llvm.vector.reduce.or.v16i1", ir.IntType(1), above)
    with builder.if_then(some, likely=False):  # seldom, once some are seen
        highest = _reduced(builder, "max", most)
        fallen = _exp2(builder, _splat(builder, builder.fsub(old, highest)))
        fallen, inside = builder.extract_element(fallen, I32(0)), builder.block
    peak, shrink = builder.phi(F32), builder.phi(F32)
    for value, otherwise, new in (peak, old, highest), (shrink, F32(1.0), fallen):
        value.add_incoming(otherwise, before)
        value.add_incoming(new, inside)
    level = builder.select(builder.fcmp_ordered("==", peak, F32(-math.inf)), F32(0.0), peak)
    weights = [_exp2(builder, builder.fsub(half, _splat(builder, level))) for half in halves]
    added = _reduced(builder, "fadd", builder.fadd(*weights))
    for half, weight in enumerate(weights):
        _store(builder, weight, logits, 4 * LANES * half)
    _store(builder, peak, state)
    _store(builder, builder.fadd(builder.fmul(total, shrink), added), state, 4)
    _store(builder, shrink, state, 8)


# `(logits, state)`: 32 logits in base 2 become weights; the state is (peak, total, shrink), of which shrink
# is what all that was summed before must be multiplied with.
soften = _on_addresses(2, _emit_soften)


@intrinsic
def exp2(typing, number):
    """2**x of a float32."""

    def code(context, builder, signature, arguments):
        return builder.extract_element(_exp2(builder, _splat(builder, arguments[0])), I32(0))

    return types.float32(types.float32), code


@intrinsic
def cap(typing, logits, outer):
    """32 logits x become tanh(x)·outer, in place."""

    def code(context, builder, signature, arguments):
        logits, outer = arguments
        outer = _splat(builder, outer)
        for half in range(2):
            x = builder.fmul(_load(builder, logits, VECTOR, 4 * LANES * half), _constant(2 / math.log(2)))
            # Beyond that the tanh is 1 in float32.
            high = builder.fcmp_ordered(">", x, _constant(60.0))
            power = _exp2(builder, builder.select(high, _constant(60.0), x))
            fraction = builder.fdiv(_constant(2.0), builder.fadd(power, _constant(1.0)))
            result = builder.fmul(builder.fsub(_constant(1.0), fraction), outer)
            _store(builder, result, logits, 4 * LANES * half)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), code
