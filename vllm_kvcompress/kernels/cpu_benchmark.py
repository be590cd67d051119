"""What it costs on a CPU that a head's tokens are in several formats.

    python -m vllm_kvcompress.kernels.cpu_benchmark [--rows 8] [--tokens 4096] [--layers 4] [--rounds 31]

Decodes one token per row of a layer, on one thread: in one call over all kinds of records and the raw tail,
and in one call for each kind and one for the tail, which read the same bytes; in turn, layer after layer.
Printed are medians of CPU time, which other processes of the machine hardly touch, and the ratio of the one
call to all others together, with the middle half of the rounds. Several calls are dearer by what each costs
if there is nothing to read: in the last column that is taken off them, but for one.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.formats import FORMATS, RECORD, Format, Latent, RecordFormat
from vllm_kvcompress.kernels.cpu_records import RecordAttention, RecordRows

SHAPES = ((64, 2, 7), (128, 8, 4))  # D, KV heads and queries of each: Qwen2.5 0.5B, Llama 3 8B
MIXES = (
    "k8v4+k4v3", "k4v4+k4v2", "kivi8+kivi4", "kivi4+turbo3_centred", "kivi8+k4v4+turbo2_centred",
    "auto", "mixed_dim",
)  # fmt: skip
BLOCK_SIZE = 128
TAIL = 150  # raw tokens of a row, an incomplete block among them


@dataclass(frozen=True)
class Several(Format):
    """Tokens in each of some formats.

    Attributes:
        kinds: of a head's records, in this order.
        of: whose bases the records need, if they need any.
    """

    kinds: tuple[RecordFormat, ...]
    of: Format | None = None

    @property
    def parts(self) -> tuple[RecordFormat, ...]:
        return self.kinds

    @property
    def basis(self) -> RecordFormat | None:
        return self.of.basis if self.of else None

    def needs_basis(self, counts: Tensor) -> Tensor:
        return self.of.needs_basis(counts) if self.of else super().needs_basis(counts)


def mix(names: str) -> Several:
    """Formats joined by `+`, or one that is several already."""
    formats = [FORMATS[name] for name in names.split("+")]
    based = [format for format in formats if format.basis is not None]
    return Several(tuple(part for format in formats for part in format.parts), *based)


Reader = tuple[RecordAttention, RecordRows]


@dataclass(frozen=True)
class Layer:
    """A layer whose heads hold equally many tokens in each format, and a raw tail.

    Attributes:
        query: `[R, Hq, D]` bfloat16, one token of each row.
        together: reads all of it.
        apart: those that read each format's records, in the same pages, and the last one the tail.
        nothing: reads nothing, for the first row alone.
    """

    query: Tensor
    together: Reader
    apart: list[Reader]
    nothing: Reader

    def attend(self, reader: Reader) -> Tensor:
        """The output `[R, Hq, D]` of attention over what one of these reads, for its rows."""
        attention, rows = reader
        query = self.query[: len(rows.tail)]
        out = torch.empty(query.shape)
        attention.attend(query, rows, query.shape[2] ** -0.5, 0.0, out)
        return out

    def seconds(self, readers: Sequence[Reader]) -> float:
        """CPU time of one call of each."""
        begin = time.process_time()
        for reader in readers:
            self.attend(reader)
        return time.process_time() - begin


def make_layer(format: Several, head_size: int, heads: int, group: int, rows: int, tokens: int) -> Layer:
    """Random tokens in random pages; of each head about `tokens` are encoded, in whole records."""
    counts = torch.full((len(format.parts), rows, heads), tokens // len(format.parts) // RECORD)
    page_bytes = 4 * BLOCK_SIZE * head_size
    first, in_run = format.arrange(counts, head_size, page_bytes)
    width = int(in_run.max()) + -(-TAIL // BLOCK_SIZE)
    pages = torch.randperm(rows * heads * width).view(rows, heads, width)
    cache = torch.randn(pages.numel(), page_bytes // 2).bfloat16().view(torch.uint8)  # as the tails stay
    basis = []
    if format.basis is not None:
        basis = [format.basis.encode(*torch.randn(2, rows, heads, 1000, head_size))[:, :, None]]
        _place(cache, pages, torch.zeros(rows, heads, dtype=torch.int64), basis[0])
    for part, count, begin in zip(format.parts, counts, first, strict=True):
        numbers = torch.randn(2, rows, heads, int(count[0, 0]), RECORD, head_size)
        _place(cache, pages, begin, part.encode(*numbers, *(basis if isinstance(part, Latent) else [])))

    token, channel = torch.arange(BLOCK_SIZE)[:, None], torch.arange(head_size)
    places = token + channel * BLOCK_SIZE, token * head_size + channel  # as vLLM has them without AMX
    start = torch.arange(rows + 1, dtype=torch.int32)
    pages, in_run, counts, first = (each.to(torch.int32) for each in (pages, in_run, counts, first))

    def reader(part: Format, some: slice, encoded: bool, raw: bool, num_rows: int = rows) -> Reader:
        records, at = (each[some, :num_rows].contiguous() for each in (counts * encoded, first))
        tail = torch.full((num_rows,), TAIL * raw, dtype=torch.int32)
        longest = records.flatten(1).amax(1).tolist()
        first_rows = start[: num_rows + 1], pages[:num_rows], in_run[:num_rows]
        of_rows = RecordRows(*first_rows, records, at, tail, 1, longest, TAIL * raw)
        return RecordAttention(part, cache, places, torch.bfloat16), of_rows

    each = [(part, slice(number, number + 1)) for number, part in enumerate(format.parts)]
    return Layer(
        query=torch.randn(rows, heads * group, head_size).bfloat16(),
        together=reader(format, slice(None), True, True),
        apart=[*(reader(*part, True, False) for part in each), reader(*each[-1], False, True)],
        nothing=reader(FORMATS["kivi4"], slice(1), False, False, 1),  # whose values are not turned back
    )


def _place(cache: Tensor, pages: Tensor, first: Tensor, records: Tensor) -> None:
    """Write records `[R, H, n, bytes]` to runs, from the places `[R, H]` on."""
    size = records.shape[-1]
    per_page = cache.shape[1] // size
    place = first[..., None] + torch.arange(records.shape[2])
    page = pages.gather(2, place // per_page)
    cache[:, cache.shape[1] % size :].unflatten(1, (per_page, size))[page, place % per_page] = records


@dataclass(frozen=True)
class Times:
    """CPU seconds of a layer in each round: of one call, of several, and of one that reads nothing."""

    together: list[float]
    apart: list[float]
    nothing: list[float]
    calls: int

    def ratios(self) -> list[float]:
        """Of each round, the one call over the several."""
        return [one / several for one, several in zip(self.together, self.apart, strict=True)]

    def strict_ratios(self) -> list[float]:
        """Likewise, where all of the several but one cost only what they read."""
        free = (self.calls - 1) * statistics.median(self.nothing)
        return [one / (several - free) for one, several in zip(self.together, self.apart, strict=True)]


def measure(layers: Sequence[Layer], rounds: int) -> Times:
    """Alternate over all layers, after a round that compiles."""
    times: dict[str, list[float]] = {"together": [], "apart": [], "nothing": []}
    for number in range(rounds + 1):
        spent = dict.fromkeys(times, 0.0)
        for layer in layers:
            readers = {"together": [layer.together], "apart": layer.apart, "nothing": [layer.nothing]}
            for name in times if number % 2 else reversed(times):
                spent[name] += layer.seconds(readers[name])
        for name, seconds in spent.items():
            times[name] += [seconds / len(layers)] if number else []
    return Times(**times, calls=len(layers[0].apart))


def _quartiles(numbers: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(numbers, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 8), ("tokens", 4096), ("layers", 4), ("rounds", 31)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--mixes", default=",".join(MIXES), help="comma-separated, of formats joined by +")
    given = parser.parse_args()
    torch.set_num_threads(1)
    held = f"{given.tokens} tokens of each head in formats and {TAIL} raw"
    print(f"A layer, {given.rows} rows, {held}, one thread")
    print("| D | formats | one call | several | one over several | their own cost taken off |")
    print("| --- | --- | --- | --- | --- | --- |")
    for shape in SHAPES:
        for names in given.mixes.split(","):
            torch.manual_seed(0)
            layers = [make_layer(mix(names), *shape, given.rows, given.tokens) for _ in range(given.layers)]
            times = measure(layers, given.rounds)
            cells = [f"{1e3 * statistics.median(each):.2f} ms" for each in (times.together, times.apart)]
            cells += [_quartiles(each) for each in (times.ratios(), times.strict_ratios())]
            print(f"| {shape[0]} | `{names}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
