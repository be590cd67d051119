"""How many pages each head keeps, and which tokens fill them, without waiting for the device.

The functions decide as their namesakes in `allocation` do, ties included, for all heads of all Jobs at once.
Nothing is sorted. A score becomes an unsigned integer of the same order, and a threshold is found eight bits
at a time: a histogram of the digit, over the scores that begin like the threshold, says which digit is next.

Below a threshold τ the number of pages that a head can free is

    clamp(⌊count(scores <= τ) / N⌋ - absent, 0, largest - smallest)

since its i-th cheapest page costs what the last of its i·N lowest scores does. That is monotone in τ, and so
is its sum over the heads that compete, which is all that the search for their common threshold needs.

Of what follows a selection, with columns `[M, N]` and rows `[M]` of `select_columns`, nothing needs a kernel
of its own, and nothing waits:

- positions, if the row's first column that holds a token is number `padding[row]` `[X]` and holds position 0:
  `columns - padding[rows, None]`; else, from the positions `[X, T]` of the columns:
  `positions[rows[:, None], columns]`;
- where runs start, `[J, X / J + 1]` int32 and 0 in the first column:
  `torch.cumsum(counts.view(J, -1), 1, dtype=torch.int32, out=start[:, 1:])`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

AT_ONCE = 4096  # scores of a row that a program reads at once
DIGITS = 4  # of a key
BINS = tl.constexpr(256)  # values of a digit


def global_counts(
    scores: Tensor, num_pages: Tensor, page_size: int, smallest: Tensor, largest: Tensor
) -> Tensor:
    """Pages of each head where all heads of a Job compete: `allocation.Global`.

    Args:
        scores: `[J, L, H, T]` float32, contiguous; higher = keep, +inf where protected. Of a head with less
            than others, the first T - largest·N are -inf and stand for nothing. NaN counts as -inf.
        num_pages: `[J]` int64, pages of each Job, Σ smallest to Σ largest.
        page_size: N; T is a multiple.
        smallest: `[J, L, H]` int64.
        largest: `[J, L, H]` int64, at most T / N.

    Returns:
        `[J, L, H]` int64.
    """
    jobs, layers, heads, num_columns = scores.shape
    search = _Search(scores.view(jobs, layers * heads, num_columns), page_size)
    assert num_columns % page_size == 0 and smallest.is_contiguous() and largest.is_contiguous()
    _begin_global_kernel[(jobs,)](
        num_pages, largest, search.goal, search.freed, HEADS=search.heads, ALL=search.all_heads
    )
    search.run(smallest, largest)
    counts = torch.empty_like(largest)
    _end_global_kernel[(jobs,)](
        *search.buffers,
        smallest,
        largest,
        counts,
        **search.sizes,
        ALL=search.all_heads,
        num_warps=_warps(search.heads),
    )
    return counts


def adaptive_counts(
    scores: Tensor, num_pages: Tensor, page_size: int, smallest: Tensor, largest: Tensor, alpha: float
) -> Tensor:
    """Pages of each head where the heads of a layer compete: `allocation.Adaptive`.

    Arguments and result as of `global_counts`, and:

    Args:
        alpha: share of the budget that stays uniform.
    """
    jobs, layers, heads, num_columns = scores.shape
    search = _Search(scores.view(jobs * layers, heads, num_columns), 1)
    assert num_columns % page_size == 0 and smallest.is_contiguous() and largest.is_contiguous()
    shares = torch.empty(jobs * layers, dtype=torch.int64, device=scores.device)
    _begin_adaptive_kernel[(jobs * layers,)](
        num_pages,
        smallest,
        largest,
        shares,
        search.goal,
        search.freed,
        num_columns,
        LAYERS=layers,
        HEADS=heads,
        BLOCK_SIZE=page_size,
        ALL_LAYERS=triton.next_power_of_2(layers),
        ALL_HEADS=search.all_heads,
        num_warps=_warps(layers * heads),
        enable_fp_fusion=False,
    )
    search.run(None, None)
    counts = torch.empty_like(largest)
    _end_adaptive_kernel[(jobs * layers,)](
        *search.buffers,
        shares,
        smallest,
        largest,
        counts,
        1 - alpha,
        alpha,
        **search.sizes,
        PAGE_SIZE=page_size,
        ALL=search.all_heads,
        num_warps=_warps(heads),
        enable_fp_fusion=False,
    )
    return counts


def whole_pages(wanted: Tensor | None, num_pages: Tensor, smallest: Tensor, largest: Tensor) -> Tensor:
    """Round wanted pages to whole ones, row by row: `allocation.whole_pages`.

    Equal to it wherever float64 adds pages to a wanted number without rounding, as it does for float32 ones
    that are 0 or at least a 64th of a page; where it must round, heads whose claims differ by less than its
    precision may be served in another order.

    Args:
        wanted: `[B, n]` float32 or float64; None to share evenly, as `allocation.Uniform` does.
        num_pages: `[B]` int64, the sum of each row, Σ smallest to Σ largest.
        smallest: `[B, n]` int64.
        largest: `[B, n]` int64.

    Returns:
        `[B, n]` int64.
    """
    rows, heads = smallest.shape
    assert smallest.is_contiguous() and largest.is_contiguous() and (wanted is None or wanted.is_contiguous())
    counts = torch.empty_like(smallest)
    _whole_pages_kernel[(rows,)](
        wanted,
        num_pages,
        smallest,
        largest,
        counts,
        HEADS=heads,
        ALL=triton.next_power_of_2(heads),
        EVEN=wanted is None,
        num_warps=_warps(heads),
        enable_fp_fusion=False,
    )
    return counts


def select_columns(
    scores: Tensor, counts: Tensor, page_size: int, total_pages: int, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """The columns that fill each row's pages, the highest-scored ones in order: `allocation.select`.

    Args:
        scores: `[X, T]` float32, contiguous; the earlier column wins a tie, NaN counts as -inf.
        counts: `[X]` int64, pages of each row, at most T / N.
        page_size: N.
        total_pages: M, which the counts sum to.
        exact: whether they do; else they may sum to less.

    Returns:
        Columns `[M, N]` int64, run after run and ascending in each, and the row `[M]` int64 of every page;
        behind the last one the last column of the first row, which holds a token whatever the padding.
    """
    num_rows, num_columns = scores.shape
    assert scores.is_contiguous() and counts.is_contiguous()
    columns = torch.empty(total_pages, page_size, dtype=torch.int64, device=scores.device)
    rows = torch.empty(total_pages, dtype=torch.int64, device=scores.device)
    if not exact:
        columns.fill_(num_columns - 1), rows.zero_()
    _select_kernel[(num_rows,)](
        scores,
        counts,
        counts.cumsum(0),
        columns,
        rows,
        num_columns,
        PAGE_SIZE=page_size,
        AT_ONCE=AT_ONCE,
        num_warps=8,
    )
    return columns, rows


def _warps(heads: int) -> int:
    """Of a program that holds one number of each head in several registers."""
    return max(1, min(8, triton.next_power_of_2(heads) // 256))


class _Search:
    """A search for the threshold of each group of rows that compete.

    Attributes:
        heads: rows of a group.
        all_heads: the next power of 2.
        goal: `[G]` int32, how many units each group must free.
        freed: `[DIGITS, G, BINS]` int32, how many it can free up to each value of the digit; 0 to begin with.
        upto: `[DIGITS, X, BINS + 1]` int32, how many of a row's keys are below each value of the digit.
    """

    def __init__(self, scores: Tensor, unit: int) -> None:
        """Prepare; a kernel must yet set `goal` and clear `freed`.

        Args:
            scores: `[G, heads, T]` float32.
            unit: tokens that are freed together.
        """
        groups, self.heads, self.num_columns = scores.shape
        assert scores.is_contiguous() and self.heads * self.num_columns // unit < 2**31
        self.scores, self.unit = scores, unit
        self.all_heads = triton.next_power_of_2(self.heads)
        self.goal = torch.empty(groups, dtype=torch.int32, device=scores.device)
        self.freed = self.goal.new_empty(DIGITS, groups, BINS.value)
        self.upto = self.goal.new_empty(DIGITS, groups * self.heads, BINS.value + 1)

    @property
    def buffers(self) -> tuple[Tensor, Tensor, Tensor, int]:
        return self.goal, self.freed, self.upto, self.num_columns

    @property
    def sizes(self) -> dict[str, int]:
        return {"HEADS": self.heads, "UNIT": self.unit}

    def run(self, smallest: Tensor | None, largest: Tensor | None) -> None:
        """Fill `freed` and `upto`. Bounds are `[X]` int64, in units; None for 0 to T."""
        for digit in range(DIGITS):
            _digit_kernel[(self.upto.shape[1],)](
                self.scores,
                *self.buffers,
                smallest,
                largest,
                **self.sizes,
                DIGIT=digit,
                BOUNDED=smallest is not None,
                AT_ONCE=AT_ONCE,
                num_warps=8,
            )


@triton.jit
def _ordered(scores, column, num_columns):
    """Scores as uint32 in the same order: NaN is -inf, and both zeros are one."""
    score = tl.load(scores + column, mask=column < num_columns, other=0.0)
    score = tl.where(score == score, score, -float("inf"))
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _digit_counts(scores, num_columns, prefix, SHIFT: tl.constexpr, AT_ONCE: tl.constexpr):
    """How many of a row's keys that begin like the prefix have each value of the next digit, `[BINS]`."""
    HIGHER: tl.constexpr = (0xFFFFFFFF << (SHIFT + 8)) & 0xFFFFFFFF
    counts = tl.zeros([BINS], tl.int32)
    for begin in range(0, num_columns, AT_ONCE):
        column = begin + tl.arange(0, AT_ONCE)
        key = _ordered(scores, column, num_columns)
        alike = (column < num_columns) & ((key & HIGHER) == prefix)
        counts += tl.histogram(((key >> SHIFT) & 0xFF).to(tl.int32), BINS, mask=alike)
    return counts


@triton.jit
def _freeable(count, smallest, largest, num_columns, UNIT: tl.constexpr):
    """Units that a row can free of its `count` lowest scores."""
    units = count // UNIT - (num_columns // UNIT - largest)
    return tl.minimum(tl.maximum(units, 0), largest - smallest)


@triton.jit
def _enough(freed, goal):
    """The first value of a digit up to which the goal is reached."""
    return tl.sum((tl.load(freed + tl.arange(0, BINS)) < goal).to(tl.int32))


@triton.jit
def _clear(freed):
    """Set the `freed` of this program's group to 0."""
    for digit in tl.static_range(4):
        at = digit * tl.num_programs(0) + tl.program_id(0)
        tl.store(freed + at * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))


@triton.jit
def _begin_global_kernel(num_pages, largest, goal, freed, HEADS: tl.constexpr, ALL: tl.constexpr):
    group = tl.program_id(0)
    _clear(freed)
    head = tl.arange(0, ALL)
    most = tl.sum(tl.load(largest + group * HEADS + head, mask=head < HEADS, other=0))
    tl.store(goal + group, (most - tl.load(num_pages + group)).to(tl.int32))


@triton.jit
def _digit_kernel(
    scores,
    goal,
    freed,
    upto,
    num_columns,
    smallest,
    largest,
    HEADS: tl.constexpr,
    UNIT: tl.constexpr,
    DIGIT: tl.constexpr,
    BOUNDED: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    row = tl.program_id(0)
    group, groups, rows = row // HEADS, tl.num_programs(0) // HEADS, tl.num_programs(0)
    prefix, below = tl.full([], 0, tl.uint32), tl.full([], 0, tl.int32)
    for earlier in tl.static_range(DIGIT):
        value = _enough(freed + (earlier * groups + group) * BINS, tl.load(goal + group))
        prefix |= value.to(tl.uint32) << (24 - 8 * earlier)
        below = tl.load(upto + (earlier * rows + row).to(tl.int64) * (BINS + 1) + value)
    counts = _digit_counts(
        scores + row.to(tl.int64) * num_columns, num_columns, prefix, 24 - 8 * DIGIT, AT_ONCE
    )
    counts = below + tl.cumsum(counts)
    value = tl.arange(0, BINS)
    own = upto + (DIGIT * rows + row).to(tl.int64) * (BINS + 1)
    tl.store(own, below)
    tl.store(own + 1 + value, counts)
    if BOUNDED:
        least, most = tl.load(smallest + row).to(tl.int32), tl.load(largest + row).to(tl.int32)
    else:
        least, most = 0, num_columns
    units = _freeable(counts, least, most, num_columns, UNIT)
    tl.atomic_add(freed + (DIGIT * groups + group) * BINS + value, units, sem="relaxed")


@triton.jit
def _freed_units(
    goal, freed, upto, num_columns, least, most, HEADS: tl.constexpr, UNIT: tl.constexpr, ALL: tl.constexpr
):
    """Units that each row of a group frees: all below the threshold, and of those at it the later rows'."""
    group, groups = tl.program_id(0), tl.num_programs(0)
    target = tl.load(goal + group)
    value = _enough(freed + (3 * groups + group) * BINS, target)
    head = tl.arange(0, ALL)
    at = upto + ((3 * groups + group) * HEADS + head).to(tl.int64) * (BINS + 1) + value
    below = _freeable(tl.load(at, mask=head < HEADS, other=0), least, most, num_columns, UNIT)
    tied = _freeable(tl.load(at + 1, mask=head < HEADS, other=0), least, most, num_columns, UNIT) - below
    wanting = target - tl.sum(below) - (tl.sum(tied) - tl.cumsum(tied))
    return below + tl.minimum(tl.maximum(wanting, 0), tied)


@triton.jit
def _end_global_kernel(
    goal,
    freed,
    upto,
    num_columns,
    smallest,
    largest,
    counts,
    HEADS: tl.constexpr,
    UNIT: tl.constexpr,
    ALL: tl.constexpr,
):
    head = tl.arange(0, ALL)
    at = tl.program_id(0) * HEADS + head
    least = tl.load(smallest + at, mask=head < HEADS, other=0).to(tl.int32)
    most = tl.load(largest + at, mask=head < HEADS, other=0).to(tl.int32)
    gone = _freed_units(goal, freed, upto, num_columns, least, most, HEADS, UNIT, ALL)
    tl.store(counts + at, (most - gone).to(tl.int64), mask=head < HEADS)


@triton.jit
def _begin_adaptive_kernel(
    num_pages,
    smallest,
    largest,
    shares,
    goal,
    freed,
    num_columns,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ALL_LAYERS: tl.constexpr,
    ALL_HEADS: tl.constexpr,
):
    _clear(freed)
    job, own = tl.program_id(0) // LAYERS, tl.program_id(0) % LAYERS
    layer, head = tl.arange(0, ALL_LAYERS), tl.arange(0, ALL_HEADS)
    real = (layer < LAYERS)[:, None] & (head < HEADS)[None, :]
    at = ((job * LAYERS + layer) * HEADS)[:, None] + head[None, :]
    least = tl.sum(tl.load(smallest + at, mask=real, other=0), 1)
    most = tl.sum(tl.load(largest + at, mask=real, other=0), 1)
    total = tl.load(num_pages + job)
    even = (total.to(tl.float64) / LAYERS).to(tl.float32).to(tl.float64)
    pages = _whole(tl.where(layer < LAYERS, even, 0.0), total, least, most)
    share = tl.sum(tl.where(layer == own, pages, 0))
    tl.store(shares + tl.program_id(0), share)
    tl.store(goal + tl.program_id(0), (num_columns * HEADS - share * BLOCK_SIZE).to(tl.int32))


@triton.jit
def _end_adaptive_kernel(
    goal,
    freed,
    upto,
    num_columns,
    shares,
    smallest,
    largest,
    counts,
    competing,
    uniform,
    HEADS: tl.constexpr,
    UNIT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ALL: tl.constexpr,
):
    head = tl.arange(0, ALL)
    most = tl.where(head < HEADS, num_columns, 0)
    chosen = most - _freed_units(goal, freed, upto, num_columns, 0, most, HEADS, UNIT, ALL)
    share = tl.load(shares + tl.program_id(0))
    # Rounded as often as in PyTorch: products and sums are not fused, quotients are exact.
    kept = (share * PAGE_SIZE).to(tl.float32)
    tokens = chosen.to(tl.float32) * competing + tl.div_rn(kept * uniform, HEADS * 1.0)
    wanted = tl.where(head < HEADS, tl.div_rn(tokens, PAGE_SIZE * 1.0), 0.0)
    at = tl.program_id(0) * HEADS + head
    low = tl.load(smallest + at, mask=head < HEADS, other=0)
    high = tl.load(largest + at, mask=head < HEADS, other=0)
    tl.store(counts + at, _whole(wanted.to(tl.float64), share, low, high), mask=head < HEADS)


@triton.jit
def _whole_pages_kernel(
    wanted,
    num_pages,
    smallest,
    largest,
    counts,
    HEADS: tl.constexpr,
    ALL: tl.constexpr,
    EVEN: tl.constexpr,
):
    head = tl.arange(0, ALL)
    at = tl.program_id(0) * HEADS + head
    total = tl.load(num_pages + tl.program_id(0))
    if EVEN:
        even = tl.div_rn(total.to(tl.float32), HEADS * 1.0)
        want = tl.where(head < HEADS, even, 0.0).to(tl.float64)
    else:
        want = tl.load(wanted + at, mask=head < HEADS, other=0.0).to(tl.float64)
    low = tl.load(smallest + at, mask=head < HEADS, other=0)
    high = tl.load(largest + at, mask=head < HEADS, other=0)
    tl.store(counts + at, _whole(want, total, low, high), mask=head < HEADS)


@triton.jit
def _whole(wanted, total, low, high):
    """`whole_pages` of one block, int64 of float64; places where `low` and `high` are 0 stand for nothing.

    A step is a page that a head gains (or loses). Steps are taken by ascending excess, which is how far the
    head is above (below) what it wanted, and which grows by 1 with each of its steps. So all steps below some
    whole excess are taken, which is found by bisection, and then at most one more of each head.
    """
    count = tl.minimum(tl.maximum(wanted.to(tl.int64), low), high)
    missing = total - tl.sum(count)
    gains = missing > 0
    steps = tl.abs(missing)
    excess = tl.where(gains, count.to(tl.float64) - wanted, wanted - count.to(tl.float64))
    room = tl.where(gains, high - count, count - low)
    floor = tl.floor(excess).to(tl.int64)

    level = tl.min(tl.where(room > 0, floor, 1 << 40))
    last = tl.max(tl.where(room > 0, floor + room, -(1 << 40)))
    while level < last:
        middle = level + (last - level + 1) // 2
        enough = tl.sum(tl.minimum(tl.maximum(middle - floor, 0), room)) <= steps
        level = tl.where(enough, middle, level)
        last = tl.where(enough, last, middle - 1)
    taken = tl.minimum(tl.maximum(level - floor, 0), room)
    steps -= tl.sum(taken)

    bits = (excess + taken.to(tl.float64)).to(tl.int64, bitcast=True)
    order = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)  # of integers as of the floats
    may = (taken < room) & (floor <= level)
    bound = tl.min(tl.where(may, order, 0x7FFFFFFFFFFFFFFF))
    last = tl.max(tl.where(may, order, -0x7FFFFFFFFFFFFFFF))
    while bound < last:
        middle = bound + (last - bound) // 2
        enough = tl.sum((may & (order <= middle)).to(tl.int64)) >= steps
        bound = tl.where(enough, bound, middle + 1)
        last = tl.where(enough, middle, last)
    before = may & (order < bound)
    tied = (may & (order == bound)).to(tl.int64)
    steps -= tl.sum(before.to(tl.int64))
    rank = tl.cumsum(tied)  # the first head gains, the last one loses
    rank = tl.where(gains, rank, tl.sum(tied) - rank + 1)
    taken += (before | ((tied > 0) & (rank <= steps))).to(tl.int64)
    return tl.where(gains, count + taken, count - taken)


@triton.jit
def _select_kernel(
    scores,
    counts,
    ends,
    columns,
    rows,
    num_columns,
    PAGE_SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scores += row * num_columns
    count = tl.load(counts + row)
    first = tl.load(ends + row) - count
    kept = (count * PAGE_SIZE).to(tl.int32)

    # The threshold is the lowest key that is not below all but the kept ones.
    target = num_columns - kept + 1
    prefix, below, equal = tl.full([], 0, tl.uint32), tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    value = tl.arange(0, BINS)
    for digit in tl.static_range(4):
        found = _digit_counts(scores, num_columns, prefix, 24 - 8 * digit, AT_ONCE)
        digit_value = tl.sum((below + tl.cumsum(found) < target).to(tl.int32))
        below += tl.sum(tl.where(value < digit_value, found, 0))
        equal = tl.sum(tl.where(value == digit_value, found, 0))
        prefix |= digit_value.to(tl.uint32) << (24 - 8 * digit)
    missing = kept - (num_columns - below - equal)  # of those at the threshold

    higher, tied = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    out = columns + first * PAGE_SIZE
    for begin in range(0, num_columns, AT_ONCE):
        column = begin + tl.arange(0, AT_ONCE)
        key = _ordered(scores, column, num_columns)
        is_higher = ((column < num_columns) & (key > prefix)).to(tl.int32)
        is_tied = ((column < num_columns) & (key == prefix)).to(tl.int32)
        num_higher, num_tied = higher + tl.cumsum(is_higher), tied + tl.cumsum(is_tied)
        chosen = (is_higher > 0) | ((is_tied > 0) & (num_tied <= missing))
        place = num_higher + tl.minimum(num_tied, missing) - 1
        tl.store(out + place, column.to(tl.int64), mask=chosen)
        higher += tl.sum(is_higher)
        tied += tl.sum(is_tied)

    for begin in range(0, count, BINS):
        page = begin + value
        tl.store(rows + first + page, tl.zeros([BINS], tl.int64) + row, mask=page < count)
