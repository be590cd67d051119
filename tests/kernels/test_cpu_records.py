"""The CPU kernel over records and the raw tail, against plain PyTorch over what the format itself decodes."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from numba import njit
from torch import Tensor

from vllm_kvcompress.formats import FORMATS, RECORD, Format, Latent
from vllm_kvcompress.formats.base import pack
from vllm_kvcompress.formats.kivi import Kivi4
from vllm_kvcompress.formats.matched import Matched
from vllm_kvcompress.kernels import cpu_records, cpu_vectors
from vllm_kvcompress.kernels.cpu_records import RecordAttention, RecordRows

SINGLE = [name for name, format in FORMATS.items() if format.parts == (format,)]
NUM_PAGES = 1500


@dataclass
class Case:
    """Some rows in a cache, and what their heads hold, decoded.

    Attributes:
        held: keys, values and biases of each row's heads, float32.
    """

    attention: RecordAttention
    rows: RecordRows
    query: Tensor
    group: int
    held: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]

    def out(self, scale: float, soft_cap: float, sinks: Tensor | None = None) -> Tensor:
        out = torch.full_like(self.query, torch.nan, dtype=torch.float32)
        self.attention.attend(self.query, self.rows, scale, soft_cap, out, sinks)
        return out

    def expected(self, scale: float, soft_cap: float, sinks: Tensor | None = None) -> Tensor:
        """One query, one head at a time."""
        out = torch.empty_like(self.query, dtype=torch.float32)
        for row, tail in enumerate(self.rows.tail.tolist()):
            begin, end = self.rows.start[row : row + 2].tolist()
            for head in range(self.rows.pages.shape[1]):
                keys, values, bias = self.held[row, head]
                for token in range(begin, end):
                    seen = len(keys) - (end - 1 - token)
                    assert end - token <= tail
                    members = slice(head * self.group, (head + 1) * self.group)
                    logits = self.query[token, members].float() @ keys[:seen].T * scale
                    if soft_cap:
                        logits = soft_cap * torch.tanh(logits / soft_cap)
                    logits += bias[:seen]
                    if sinks is not None:
                        logits = torch.cat([logits, sinks[members, None]], 1)
                    out[token, members] = logits.softmax(-1)[:, :seen] @ values[:seen]
        return out


def make(
    format: Format,
    *,
    head_size: int = 64,
    group: int = 3,
    heads: int = 2,
    block_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    queries: tuple[int, ...] = (1, 1),
    records: tuple[int, ...] = (5, 9),
    tails: tuple[int, ...] = (40, 7),
    channels_first: bool = True,
) -> Case:
    generator = torch.Generator().manual_seed(7)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    parts = format.parts
    sizes = [part.record_bytes(head_size) for part in parts]
    cache = torch.full((NUM_PAGES, 2 * block_size * head_size * dtype.itemsize), 0xFF, dtype=torch.uint8)
    per_page = [cache.shape[1] // size for size in sizes]
    assert all(per_page)
    free = iter(torch.randperm(NUM_PAGES, generator=generator).tolist())
    if channels_first:  # as vLLM has it where there is no AMX
        token, channel = torch.arange(block_size)[:, None], torch.arange(head_size)
        places = token + channel * block_size, token * head_size + channel
    else:  # as the AMX kernel's are, or any other
        places = tuple(
            torch.randperm(block_size * head_size, generator=generator).view(block_size, head_size)
            for _ in "kv"
        )
    width = len(parts) * (max(-(-r // min(per_page)) for r in records) + 1)
    width += max(-(-tail // block_size) for tail in tails)
    shape = len(queries), heads
    pages = torch.full((*shape, width), -1, dtype=torch.int32)
    counts = torch.zeros(shape, dtype=torch.int32)
    in_run, first = (torch.zeros(len(parts), *shape, dtype=torch.int32) for _ in range(2))
    held = {}
    for row, (num_records, tail) in enumerate(zip(records, tails, strict=True)):
        for head in range(heads):
            decoded, run, used = [], [], cache.shape[1]
            # Of the first part somewhat fewer, and of the others in turn none.
            numbers = [
                max(num_records - head - number, 0) * ((row + head + number) % 3 > 0 or len(parts) == 1)
                for number in range(len(parts))
            ]
            basis = None
            if format.basis is not None and bool(format.needs_basis(torch.tensor(numbers))):
                basis = format.basis.encode(*(normal(200, head_size) * normal(head_size) for _ in "kv"))
                run, used = [next(free)], _begins(0, len(basis), cache.shape[1])[1] + len(basis)
                cache[run[0], used - len(basis) : used] = basis
            for number, (part, size) in enumerate(zip(parts, sizes, strict=True)):
                own = numbers[number]
                plain = [normal(own, RECORD, head_size).to(dtype) * 2 for _ in "kv"]
                biased = isinstance(part, Matched)
                biases = normal(own, RECORD) if biased else torch.zeros(own, RECORD)
                of_part = [basis] * (isinstance(part, Latent) and own > 0)
                content = part.encode(*plain, *[biases] * biased, *of_part) if own else torch.zeros(0, size)
                read = part.decode(content, head_size, *of_part) if own else plain
                decoded.append((*read, biases))
                in_run[number, row, head] = own
                place = next(
                    at for at in range(99999) if _begins(at, size, cache.shape[1]) >= (len(run) - 1, used)
                )
                first[number, row, head] = place
                for index, record in enumerate(content):
                    page, at = _begins(place + index, size, cache.shape[1])
                    if page == len(run):
                        run.append(next(free))
                    cache[run[page], at : at + size] = record
                    used = at + size
            counts[row, head] = len(run)
            keys, values, biases = (torch.cat(each) for each in zip(*decoded, strict=True))
            blocks = [next(free) for _ in range(-(-tail // block_size))]
            raw = [normal(len(blocks) * block_size, head_size).to(dtype) for _ in "kv"]
            for part in raw:
                part[tail:] = torch.nan  # what is not there must not be looked at
            for index, page in enumerate(blocks):
                stored = torch.empty(2, block_size * head_size, dtype=dtype)
                for part, place, to in zip(raw, places, stored, strict=True):
                    to[place.flatten()] = part[index * block_size :][:block_size].flatten()
                cache[page] = stored.view(torch.uint8).flatten()
            pages[row, head, : len(run) + len(blocks)] = torch.tensor(run + blocks, dtype=torch.int32)
            after = [
                torch.cat([a.flatten(0, 1), b[:tail].float()])
                for a, b in zip((keys, values), raw, strict=True)
            ]
            held[row, head] = *after, torch.cat([biases.flatten(), torch.zeros(tail)])
    start = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Case(
        RecordAttention(format, cache, places, dtype),
        RecordRows(
            start,
            pages,
            counts,
            in_run,
            first,
            torch.tensor(tails, dtype=torch.int32),
            max(queries),
            [max(records)] * len(parts),
            max(tails),
        ),
        normal(int(start[-1]), heads * group, head_size).to(dtype),
        group,
        held,
    )


def _begins(place: int, size: int, page_bytes: int) -> tuple[int, int]:
    """The page of a run's place, and the byte of it where the place begins."""
    per_page = page_bytes // size
    return place // per_page, page_bytes - (per_page - place % per_page) * size


def check(case: Case, soft_cap: float = 0.0, sinks: Tensor | None = None) -> None:
    numbers = case.query.shape[2] ** -0.5, soft_cap, sinks
    torch.testing.assert_close(case.out(*numbers), case.expected(*numbers), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "shape",
    [
        dict(),
        dict(dtype=torch.float32, head_size=128, group=1),
        dict(dtype=torch.float16, head_size=80, group=4, heads=3),
        dict(head_size=48, group=7, heads=1, queries=(1, 1, 1), records=(1, 40, 2), tails=(1, 64, 65)),
    ],
    ids=["64", "128", "80", "48"],
)
def test_decode_is_softmax_over_what_was_written(name, shape):
    check(make(FORMATS[name], **{"block_size": 96, **shape}))


@pytest.mark.parametrize("name", FORMATS)
def test_later_queries_see_the_tail_up_to_themselves(name):
    check(make(FORMATS[name], block_size=96, queries=(5, 40), tails=(6, 150)))


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_capped(name):
    check(make(FORMATS[name], block_size=96, queries=(1, 3)), soft_cap=1.5)


@pytest.mark.parametrize("name", FORMATS)
def test_sinks_are_in_the_softmax_of_every_query(name):
    case = make(FORMATS[name], block_size=96, queries=(1, 3))
    sinks = torch.tensor([-3.0, 0.0, 1.0, 4.0, 200.0, -torch.inf])
    check(case, 1.5, sinks)
    check(case)  # they are not kept for the next call


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_raw_tokens_are_found_wherever_the_packing_has_them(dtype):
    check(make(Kivi4(), dtype=dtype, channels_first=False, queries=(2, 1)))


def test_a_head_without_records_has_its_tail():
    check(make(Kivi4(), records=(0, 1)))


@pytest.mark.parametrize("name", ["kivi4", "mixed_dim"])
@pytest.mark.parametrize("queries", [(1, 1), (30, 2)])
def test_shares_of_a_long_head_are_merged(monkeypatch, queries, name):
    monkeypatch.setattr(cpu_records, "MIN_SHARE", 64)
    monkeypatch.setattr(cpu_records, "PIECES_PER_THREAD", 50)
    case = make(FORMATS[name], records=(30, 2), tails=(40, 70), queries=queries)
    assert cpu_records._shares(4, RECORD * 30, 1)[1] > 3
    check(case)


@pytest.mark.parametrize("name", ["kivi4", "mixed_dim"])
def test_many_queries_are_cut_into_blocks(name):
    check(make(FORMATS[name], group=7, queries=(1, 100), tails=(1, 120)))


@pytest.mark.parametrize("head_size", [16, 256])
def test_bases_of_narrow_and_wide_heads(head_size):
    check(make(FORMATS["mixed_dim"], block_size=64, head_size=head_size, queries=(2, 1)))


@pytest.mark.parametrize("soft_cap", [0.0, 1.0])
@pytest.mark.parametrize("name", SINGLE)
def test_a_bias_is_added_to_the_logits(name, soft_cap):
    check(make(Matched(FORMATS[name])), soft_cap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_queries_and_results_may_be_parts_of_wider_arrays(dtype):
    case = make(Kivi4(), dtype=dtype, queries=(3, 2))
    num_tokens, heads, size = case.query.shape
    wide = torch.zeros(num_tokens, 3 * heads, size, dtype=dtype)
    wide[:, :heads] = case.query
    out = torch.zeros(num_tokens, 2 * heads, size)
    case.attention.attend(wide[:, :heads], case.rows, 0.1, 0.0, out[:, heads:])
    torch.testing.assert_close(out[:, heads:], case.expected(0.1, 0.0), atol=1e-5, rtol=1e-5)
    assert not out[:, :heads].any()


def test_numbers_that_no_exponential_holds():
    case = make(Kivi4())
    case.query *= 200
    check(case)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_codes_are_looked_up_on_processors_without_an_instruction_for_it(monkeypatch, bits):
    monkeypatch.setattr(cpu_vectors, "HAS_LOOKUP", False)
    read = cpu_vectors._code_reader(bits, 32, table=True)

    @njit
    def look_up(source, target, book):
        read(source, target, book)

    codes, book = torch.arange(32) * 7 % 2**bits, torch.randn(16)
    packed, found = pack(codes, bits), torch.empty(32)
    look_up(packed.data_ptr(), found.data_ptr(), book.data_ptr())
    assert torch.equal(found, book[codes])


@pytest.mark.parametrize("name", ["kivi8", "kivi4", "kivi2", "k4v3"])
@pytest.mark.parametrize("group", [1, 3, 12])
def test_codes_become_numbers_on_processors_that_multiply_no_bytes(name, group):
    case = make(FORMATS[name], block_size=96, group=group)
    (args,) = case.attention._args
    for kind in (cpu_records.A.KEY_KIND, cpu_records.A.VALUE_KIND):
        if args[kind] == cpu_records.KIVI_DIGITS:
            args[kind] = cpu_records.KIVI
    check(case)


@pytest.mark.skipif(not cpu_vectors.HAS_BYTE_PRODUCTS, reason="needs AVX512-VNNI")
def test_digits_add_up_to_the_number():
    @njit
    def to_digits(a, b, target):
        cpu_vectors.digits(a, b, target, 2)

    numbers, ones = torch.linspace(-cpu_vectors.REACH, cpu_vectors.REACH, 32).round(), torch.ones(32)
    found = torch.empty(8, 4, 4, dtype=torch.int8)
    to_digits(numbers.data_ptr(), ones.data_ptr(), found.data_ptr())
    powers = torch.tensor([1, 256, 65536])[:, None]
    assert torch.equal((found[:, :3].long() * powers).sum(1).flatten(), numbers.long())


def test_powers_of_two_are_within_float32s_rounding():
    @njit
    def powers(logits, state):
        cpu_vectors.soften(logits, state)

    for first in range(-130, 1, 10):
        x = torch.cat([torch.zeros(1), torch.linspace(first, first + 10, 31).clamp(max=0)])
        weights, state = x.clone(), torch.tensor([-torch.inf, 0.0, 0.0, 0.0])
        powers(weights.data_ptr(), state.data_ptr())
        expected = torch.where(x < -126, 0.0, x.double().exp2())
        torch.testing.assert_close(weights.double(), expected, rtol=2e-7, atol=0)
        assert state[:3].tolist() == pytest.approx([0.0, float(weights.sum()), 0.0], rel=1e-6)


def test_threads_for_which_there_is_no_memory_do_nothing(monkeypatch):
    """OpenMP may have more of them than torch was told to use."""
    case = make(Kivi4(), records=(40, 30), tails=(40, 70))
    expected, run, started = case.out(0.1, 0.0), cpu_records._run(), []

    def with_more(step, args, threads):
        started.append(threads)
        run(step, args, threads + 3)

    monkeypatch.setattr(cpu_records, "_run", lambda: with_more)
    monkeypatch.setattr(cpu_records, "PIECES_PER_THREAD", 50)
    memory = torch.full_like(case.attention._scratch, torch.nan).repeat(4)
    case.attention._scratch = memory[: len(case.attention._scratch)]
    torch.testing.assert_close(case.out(0.1, 0.0), expected, atol=1e-5, rtol=1e-5)
    assert started == [torch.get_num_threads()] * 2
    assert bool(memory[len(case.attention._scratch) :].isnan().all())


def test_code_is_compiled_where_no_folder_can_be_written():
    program = (
        "from numba.core import caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "from vllm_kvcompress.kernels import cpu_records\n"
        "assert all(cpu_records.compiled_steps())\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
