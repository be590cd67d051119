"""How near the attention kernel comes to the device's memory bandwidth; needs no vLLM.

    python vllm_kvcompress/kernels/benchmark.py [--json FILE] [--quick]

First compares the kernels with the plain PyTorch reference on this device. Then decodes one token per row of
32 layers, for every batch size, context and budget, and prints two ratios: bytes of K and V that had to be
read per second, over the bandwidth of a large device-to-device copy (reads plus writes per second). The first
is this kernel's, over compacted pages whose heads differ in length, and with it the listing of their shares,
once; the second that of PyTorch's scaled_dot_product_attention over the very same bytes, seen as contiguous
heads of equal length, for it can do no other. Every step is a replayed CUDA graph; the layers are so many
copies that none is in the L2 cache when it is read again, which is flushed before each step. At last it times
chunks of queries over compacted pages, by our kernel and, on Hopper and where vLLM is installed, by its
FlashAttention 3, which is checked like the others, and says whether that is to be asked for. Without a GPU it
prints what a model says of some.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from torch import Tensor

if not __package__:  # run as a file: the package itself need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from vllm_kvcompress.formats import FORMATS, RECORD, Format, number_of
from vllm_kvcompress.kernels.attention import attend, programs_at_once
from vllm_kvcompress.kernels.batch import MOMENT_ROWS, Rows, Runs, moment_shape
from vllm_kvcompress.kernels.flash3 import Chunk, Chunks, attend_chunks, is_missing
from vllm_kvcompress.kernels.moments import add_moments
from vllm_kvcompress.kernels.networks import network_scores
from vllm_kvcompress.kernels.pages import gather_pages, scatter_pages
from vllm_kvcompress.kernels.prediction import DEVICES, predicted_seconds
from vllm_kvcompress.kernels.records import attend_records, prepare, uses_shares
from vllm_kvcompress.kernels.reference import attend_paged, attend_records_paged, causal_logits
from vllm_kvcompress.kernels.ring import write_rings
from vllm_kvcompress.kernels.scores import pool_columns, window_columns
from vllm_kvcompress.kernels.selection import global_counts, select_columns, whole_pages
from vllm_kvcompress.kernels.shares import Shares
from vllm_kvcompress.kernels.sums import ATTENTION, SQUARES, add_attention

HEADS, GROUP, HEAD_SIZE, BLOCK_SIZE = 8, 4, 128, 16  # a layer of Llama 3 8B, vLLM's block size
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072)
BUDGETS = (1.0, 0.25, 0.0625)
TAIL = 2 * BLOCK_SIZE  # raw tokens behind the boundary
FLUSH_BYTES = 256 * 2**20
LAYERS = 32  # of a step
CHUNKS = (1024, 2048, 8192)  # queries
KEPT = (2048, 8192, 32768)  # tokens of a head on average, before a chunk


@dataclass(frozen=True)
class Layer:
    """One layer's cache, every row compacted at the budget.

    Attributes:
        cache: `[B, H, N, 2D]`.
        runs: one slot per row.
        rows: one query each.
        query: `[R, Hq, D]`.
        num_bytes: of the keys and values that the step must read.
    """

    cache: Tensor
    runs: Runs
    rows: Rows
    query: Tensor
    num_bytes: int

    def attend(self, num_splits: int = 1, shares: Shares | None = None) -> tuple[Tensor, Tensor]:
        keys, values = self.cache[None].split(HEAD_SIZE, -1)
        batch = self.runs, self.rows, 0, HEAD_SIZE**-0.5
        return attend(self.query, keys, values, *batch, num_splits=num_splits, shares=shares)

    def cut(self, shares: Shares) -> None:
        shares.cut(self.runs, self.rows, BLOCK_SIZE, compacted_only=False)

    def copies(self) -> list["Layer"]:
        """So many layers like this one, this one first, that reading all of them flushes the L2 cache."""
        number = min(LAYERS, 1 + FLUSH_BYTES // self.num_bytes)
        return [self, *(replace(self, cache=self.cache.clone()) for _ in range(1, number))]


def compacted_blocks(context: int, budget: float) -> int:
    """Blocks of what is below the boundary."""
    raw = (context - TAIL) // BLOCK_SIZE
    return raw if budget == 1 else max(1, int(raw * budget))


def step_bytes(batch: int, context: int, budget: float) -> int:
    """Bytes of 16-bit keys and values that a decode step must read of one layer."""
    tokens = compacted_blocks(context, budget) * BLOCK_SIZE + TAIL
    return batch * tokens * HEADS * 2 * HEAD_SIZE * 2


def make_layer(batch: int, context: int, budget: float, device: str, dtype: torch.dtype) -> Layer:
    """Blocks in random order; a budget below 1 is shared out unevenly, as a global allocation does it."""
    boundary = context - TAIL
    raw, tail, blocks = boundary // BLOCK_SIZE, TAIL // BLOCK_SIZE, compacted_blocks(context, budget)
    num_blocks = batch * (blocks + tail) + 1
    cache = torch.randn(num_blocks, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE, dtype=dtype, device=device)
    ids = (torch.randperm(num_blocks - 1) + 1).to(torch.int32).view(batch, blocks + tail)
    start = _run_ends(batch, context, budget).to(torch.int32)
    block_table = torch.zeros(batch, raw + tail, dtype=torch.int32)
    slot = torch.arange(batch, dtype=torch.int32)
    if budget == 1:  # not compacted: every block by position
        block_table[:], slot[:] = ids, -1
    else:
        block_table[:, raw:] = ids[:, blocks:]
    return Layer(
        cache=cache,
        runs=Runs(
            destination=ids[:, :blocks].contiguous().to(device),
            start=start.to(device),
            boundary=torch.full((batch,), boundary, dtype=torch.int32, device=device),
        ),
        rows=Rows(
            slot=slot.to(device),
            block_table=block_table.to(device),
            seq_lens=torch.full((batch,), context, dtype=torch.int32, device=device),
            query_start_loc=torch.arange(batch + 1, dtype=torch.int32, device=device),
            max_query_len=1,
        ),
        query=torch.randn(batch, HEADS * GROUP, HEAD_SIZE, dtype=dtype, device=device),
        num_bytes=step_bytes(batch, context, budget) * cache.element_size() // 2,
    )


def dense_call(layer: Layer) -> Callable[[], Tensor]:
    """SDPA over the same memory as `[R, H, n, D]` keys and values; a group is a sequence of G queries."""
    batch = len(layer.query)
    held = layer.cache[1:].reshape(2, batch, HEADS, -1, HEAD_SIZE)
    query = layer.query.view(batch, HEADS, GROUP, HEAD_SIZE)
    return lambda: torch.nn.functional.scaled_dot_product_attention(query, held[0], held[1])


def seconds(calls: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Median time of calls that are captured once, together, and replayed with a cold L2 cache."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()  # compiles, and lets libraries choose
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats + 3):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def copy_bandwidth() -> float:
    """Bytes read plus bytes written per second by a device-to-device copy of 2 GiB."""
    source = torch.zeros(2**31, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds([lambda: target.copy_(source)])


def check(device: str) -> dict[str, float]:
    """Largest error of each kernel against plain PyTorch, on small shapes.

    Raises:
        AssertionError: an error beyond what the dtype explains.
    """
    errors = {}
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float16, 4e-3), (torch.float32, 1e-4)):
        name = str(dtype).removeprefix("torch.")
        torch.manual_seed(0)
        for budget in (1.0, 0.25):
            layer = make_layer(2, 1024, budget, device, dtype)
            shares = Shares.empty(2, 1, HEADS, 24, device)
            layer.cut(shares)
            for how in ({"num_splits": 1}, {"num_splits": 4}, {"shares": shares}, {"shares": shares}):
                found = layer.attend(**how)
                for row in range(2):
                    wanted = _expected_row(layer, row)
                    for part, ours, theirs in zip(("out", "lse"), found, wanted, strict=True):
                        _note(errors, f"attend.{part}.{name}", ours[row : row + 1], theirs, tolerance)
        for format in FORMATS.values():
            if uses_shares(format) and dtype != torch.float32:
                _check_records(device, format, dtype, 2 * tolerance, errors)
        _check_compaction(layer, name, errors)
        _check_sums(make_layer(2, 256, 1.0, device, dtype), name, errors)
        _check_moments(device, dtype, name, errors)
        _check_networks(layer, name, errors)
        _check_chunks(device, dtype, name, tolerance, errors)
    _check_selection(device, errors)
    return errors


def _expected_row(layer: Layer, row: int) -> tuple[Tensor, Tensor]:
    keys, values = layer.cache[None].split(HEAD_SIZE, -1)
    seq_len, slot = int(layer.rows.seq_lens[row]), int(layer.rows.slot[row])
    boundary = int(layer.runs.boundary[slot]) if slot >= 0 else 0
    destination = layer.runs.destination[slot].cpu().long() if slot >= 0 else torch.empty(0).long()
    start = layer.runs.start[slot].cpu().long() if slot >= 0 else torch.zeros(HEADS + 1).long()
    tail = layer.rows.block_table[row, boundary // BLOCK_SIZE :].cpu().long()
    query = layer.query[row : row + 1]
    return attend_paged(query, keys, values, destination, start, tail, seq_len - boundary, 0, HEAD_SIZE**-0.5)


@dataclass(frozen=True)
class ChunkLayer:
    """One layer's cache and rows of many queries over compacted pages and a raw tail.

    Attributes:
        cache: `[B, H, N, 2D]`.
        runs: one slot per row.
        rows: all of equally many queries.
        query: `[T, Hq, D]`.
    """

    cache: Tensor
    runs: Runs
    rows: Rows
    query: Tensor

    @classmethod
    def make(cls, batch: int, queries: int, kept: int, device: str, dtype: torch.dtype) -> "ChunkLayer":
        """Blocks in random order, heads of very unequal length, each query's own key in the tail."""
        blocks, raw, tail = kept // BLOCK_SIZE, 4 * kept // BLOCK_SIZE, -(-(TAIL + queries) // BLOCK_SIZE)
        ids = (torch.randperm(batch * (blocks + tail)) + 1).to(torch.int32).view(batch, -1)
        cache = torch.randn(ids.numel() + 1, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE, dtype=dtype, device=device)
        start, tails = _run_ends(batch, 4 * kept + TAIL, 0.25), ids[:, blocks:]
        numbers = (
            ids[:, :blocks].contiguous(),
            start,
            torch.full((batch,), 4 * kept),
            torch.arange(batch),
            torch.nn.functional.pad(tails, (raw, 0)),
            torch.full((batch,), 4 * kept + TAIL + queries),
            queries * torch.arange(batch + 1),
        )
        on_device = [each.to(device, torch.int32) for each in numbers]
        query = torch.randn(batch * queries, HEADS * GROUP, HEAD_SIZE, dtype=dtype, device=device)
        return cls(cache, Runs(*on_device[:3]), Rows(*on_device[3:], queries), query)

    def chunks(self) -> Chunks:
        """Every row."""
        length, blocks = self.rows.max_query_len, self.runs.destination.shape[1]
        count = len(self.rows.seq_lens)
        chunks = [Chunk(row, row * length, length, row, blocks) for row in range(count)]
        return Chunks.of(chunks, self.runs, count, (1, *self.cache.shape[:3]))

    def ours(self) -> Tensor:
        """The result of our kernel."""
        keys, values = self.cache[None].split(HEAD_SIZE, -1)
        return attend(self.query, keys, values, self.runs, self.rows, 0, HEAD_SIZE**-0.5)[0]

    def flash3(self, chunks: Chunks) -> Tensor:
        """The result of FlashAttention 3."""
        cache, out = self.cache[None].split(HEAD_SIZE, -1), torch.empty_like(self.query)
        most = self.rows.block_table.shape[1] * BLOCK_SIZE
        attend_chunks(self.query, *cache, self.runs, self.rows, chunks, 0, HEAD_SIZE**-0.5, most, out)
        return out


def _check_chunks(
    device: str, dtype: torch.dtype, name: str, tolerance: float, errors: dict[str, float]
) -> None:
    """Rows of many queries, by our kernel and by FlashAttention 3 where it is there."""
    layer = ChunkLayer.make(2, 70, 320, device, dtype)
    wanted, cache = [], layer.cache[None].split(HEAD_SIZE, -1)
    for row in range(2):
        tail = layer.rows.block_table[row, 4 * 320 // BLOCK_SIZE :].cpu().long()
        runs = (part[row].cpu().long() for part in (layer.runs.destination, layer.runs.start))
        own = *runs, tail, TAIL + 70, 0, HEAD_SIZE**-0.5
        wanted.append(attend_paged(layer.query[70 * row :][:70], *cache, *own)[0])
    _note(errors, f"chunks.{name}", layer.ours(), torch.cat(wanted), tolerance)
    if dtype != torch.float32 and has_flash3(device):
        found = layer.flash3(layer.chunks())
        _note(errors, f"chunks.flash3.{name}", found, torch.cat(wanted), tolerance)


def has_flash3(device: str) -> bool:
    """Whether FlashAttention 3 can be called, after having it loaded from vLLM where that is installed."""
    found = None if is_missing(torch.device(device)) is None else importlib.util.find_spec("vllm")
    for folder in () if found is None else found.submodule_search_locations or ():
        for library in Path(folder).glob("vllm_flash_attn/_vllm_fa3_C*.so"):
            torch.ops.load_library(str(library))
    return is_missing(torch.device(device)) is None


def measure_chunk(queries: int, kept: int) -> dict[str, float]:
    """Seconds of a layer's attention of one chunk; of FlashAttention 3, too, where it is there."""
    layer = ChunkLayer.make(1, queries, kept, "cuda", torch.bfloat16)
    operations = 4 * queries * (kept + TAIL + queries / 2) * HEADS * GROUP * HEAD_SIZE
    cell = {"queries": queries, "kept": kept, "operations": operations, "seconds": seconds([layer.ours])}
    if has_flash3("cuda"):
        cell["flash3_seconds"] = seconds([functools.partial(layer.flash3, layer.chunks())])
    return cell


def _measure_chunks() -> list[dict[str, float]]:
    """Print and return what chunks take, and say whether FlashAttention 3 is to be asked for."""
    print(
        "\nchunks: queries, tokens kept of a head; ms a layer and TFLOPS by our kernel, by FlashAttention 3"
    )
    cells = []
    for queries in CHUNKS:
        for kept in KEPT:
            cells.append(cell := measure_chunk(queries, kept))
            taken = [cell[name] for name in ("seconds", "flash3_seconds") if name in cell]
            speeds = [f"{1e3 * own:9.3f} {cell['operations'] / own / 1e12:5.0f}" for own in taken]
            print(f"{queries:6} {kept:7} " + " ".join(speeds), flush=True)
    if not has_flash3("cuda"):
        print("FlashAttention 3 is not there: leave KV_COMPRESSION_FLASH3 alone")
        return cells
    faster = sum(cell["flash3_seconds"] < cell["seconds"] for cell in cells)
    advice = "set KV_COMPRESSION_FLASH3=1" if faster == len(cells) else "leave KV_COMPRESSION_FLASH3 alone"
    print(f"FlashAttention 3 is right, and faster in {faster} of {len(cells)}: {advice}")
    return cells


def _check_records(
    device: str, format: Format, dtype: torch.dtype, tolerance: float, errors: dict[str, float]
) -> None:
    """Attention over a format's records and a raw tail, of one row."""
    heads, block_size, blocks, tail = 2, 64, 6, 70
    cache = torch.randn(1, blocks + 3, heads, block_size, 2 * HEAD_SIZE).to(dtype)
    pages = cache.flatten(0, 2).flatten(1).view(torch.uint8)
    size = format.record_bytes(HEAD_SIZE)
    per_page = pages.shape[1] // size
    target = pages[heads : heads * (1 + blocks), pages.shape[1] % size :]  # blocks from the second on
    tokens = torch.randn(2, heads * blocks * per_page, RECORD, HEAD_SIZE)
    target.copy_(format.encode(*tokens).reshape(heads * blocks, -1))
    num_pages, kept = torch.tensor([5, 2 * blocks - 5]), torch.tensor([4 * per_page + 1, 6 * per_page])
    start = torch.cat([torch.zeros(1, dtype=torch.int64), num_pages.cumsum(0)])
    destination, tails = torch.arange(1, 1 + blocks), torch.arange(1 + blocks, 3 + blocks)
    query = torch.randn(1, heads * GROUP, HEAD_SIZE).to(dtype)
    first = torch.zeros(1, heads, dtype=torch.int64)
    parts = cache.split(HEAD_SIZE, -1)
    of_row = destination, start, kept[None], first, tails, tail, 0, HEAD_SIZE**-0.5
    wanted = attend_records_paged(query, pages, *parts, format, *of_row)

    cache = cache.to(device)
    pages = cache.flatten(0, 2).flatten(1).view(torch.uint8)

    def int32(numbers: list | Tensor) -> Tensor:
        return torch.as_tensor(numbers, dtype=torch.int32, device=device)

    number = number_of(format)
    runs = Runs(
        destination=int32(destination[None]),
        start=int32(start[None]),
        boundary=int32([1024]),
        format=int32([number]),
        encoded=int32(RECORD * kept[None, None]),
        first=int32(first[None]),
    )
    table = torch.cat([torch.zeros(1024 // block_size, dtype=torch.int64), tails])
    rows = Rows(int32([0]), int32(table[None]), int32([1024 + tail]), int32([0, 1]), 1)
    shares = Shares.empty(1, 1, heads, 8, device)
    shares.cut(runs, rows, block_size, number)
    prepare(format, HEAD_SIZE, torch.device(device), dtype)
    where = 0, format, number, HEAD_SIZE**-0.5
    caches = query.to(device), pages, *cache.split(HEAD_SIZE, -1), runs, rows
    for how in ({"num_splits": 1}, {"num_splits": 4}, {"shares": shares}, {"shares": shares}):
        found = attend_records(*caches, *where, **how)
        for part, ours, theirs in zip(("out", "lse"), found, wanted, strict=True):
            _note(errors, f"records.{format.name}.{part}", ours.cpu(), theirs, tolerance)


def _check_compaction(layer: Layer, name: str, errors: dict[str, float]) -> None:
    """Scores, gather and scatter, ring."""
    device, window, kept = layer.cache.device, 32, 12
    keys, values = (part.flatten(0, 1) for part in layer.cache.split(HEAD_SIZE, -1))
    pages = torch.randperm(len(keys))[: HEADS * 20].view(HEADS, 20).to(device)
    queries = torch.randn(window, HEADS * GROUP, HEAD_SIZE, device=device).to(keys.dtype)
    num_columns = 20 * BLOCK_SIZE - 3
    columns = window_columns(queries, keys, pages, num_columns, num_columns - window, 0.1)
    for head, own in enumerate(queries.unflatten(1, (HEADS, GROUP)).unbind(1)):
        attention = causal_logits(own, keys[pages[head]].flatten(0, 1)[:num_columns], 0.1).softmax(-1)
        _note(errors, f"window.{name}", columns[head], attention.sum(1)[:, :-window], 1e-4)
    pooled = torch.nn.functional.max_pool1d(columns, 7, stride=1, padding=3).mean(1)
    found = pool_columns(columns, columns.shape[2], 7, "max", "mean")
    _note(errors, f"pool.{name}", found, pooled, 1e-6)

    head = torch.randint(0, HEADS, (kept,), device=device)
    tokens = torch.stack([torch.randperm(num_columns, device=device)[:BLOCK_SIZE] for _ in range(kept)])
    page = pages[head[:, None], tokens // BLOCK_SIZE]
    wanted = keys[page, tokens % BLOCK_SIZE], values[page, tokens % BLOCK_SIZE]
    target = pages.flatten()[torch.randperm(pages.numel(), device=device)[:kept]]
    scatter_pages(*gather_pages(keys, values, pages, head, tokens), keys, values, target)
    _note(errors, f"pages.{name}", torch.stack([keys[target], values[target]]), torch.stack(wanted), 0)

    ring = torch.zeros(2, 40, HEADS * GROUP, HEAD_SIZE, dtype=keys.dtype, device=device)
    address, capacity = torch.tensor([[ring.data_ptr(), 0], [40, 0]], device=device)
    seq_lens, bounds = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in ([50, 9], [0, window, window])
    )
    write_rings(address, capacity, 1, queries, seq_lens, bounds, window, 40)
    places = torch.arange(50 - window, 50, device=device) % 40
    _note(errors, f"ring.{name}", ring[1, places], queries, 0)


def _check_sums(layer: Layer, name: str, errors: dict[str, float]) -> None:
    """What the queries of rows that are not compacted pay to each token."""
    keys = layer.cache[None, ..., :HEAD_SIZE]
    sums = torch.zeros(keys[..., 0].numel() // BLOCK_SIZE, BLOCK_SIZE, device=keys.device)
    added = torch.tensor([ATTENTION, SQUARES], device=keys.device)
    add_attention(sums, added, layer.query, keys, layer.runs, layer.rows, 0, 0.1, 0.0, 2, 2, min_share=64)
    for row, power in enumerate((1, 2)):
        blocks = layer.rows.block_table[row].long()
        for head, query in enumerate(layer.query[row : row + 1].unflatten(1, (HEADS, GROUP)).unbind(1)):
            attention = causal_logits(query, keys[0, blocks, head].flatten(0, 1), 0.1).softmax(-1)
            found = sums.view(keys.shape[1:4])[blocks, head].flatten()
            _note(errors, f"sums.{name}", found, attention.pow(power).sum((0, 1)), 1e-4)


def _check_moments(device: str, dtype: torch.dtype, name: str, errors: dict[str, float]) -> None:
    """Mean and covariance of a chunk's queries before RoPE, in two steps."""
    length, skip = 150, 4
    cos_sin = _rotation(length).to(dtype)
    query = (3 + torch.randn(length, GROUP, HEAD_SIZE)).to(dtype)
    moments = torch.zeros(1, *moment_shape(GROUP, HEAD_SIZE), device=device)
    places = torch.tensor([[moments.data_ptr()], [skip]], device=device)
    for begin, end in ((0, 149), (149, length)):
        lengths = torch.tensor([0, end - begin, end], dtype=torch.int32, device=device)
        rows = Rows(lengths[:1], lengths[None], lengths[2:], lengths[:2], end - begin)
        add_moments(*places, 0, query[begin:end].to(device), rows, cos_sin.to(device), True)
    undone = _undone(query, cos_sin[:, None])
    mean, found = undone[skip:].mean(0), moments[0].cpu()
    covariance = torch.stack([own.T.cov(correction=0) for own in undone[skip:].unbind(1)])
    scatter = found[:, :, :MOMENT_ROWS].flatten(1, 2)[:, :HEAD_SIZE]
    _note(errors, f"moments.mean.{name}", found[:, 0, MOMENT_ROWS], mean, 1e-4)
    _note(errors, f"moments.covariance.{name}", scatter / (length - skip), covariance, 1e-4)


def _check_networks(layer: Layer, name: str, errors: dict[str, float]) -> None:
    """What small networks make of the keys and values of some pages."""
    keys, values = (part.flatten(0, 1) for part in layer.cache.split(HEAD_SIZE, -1))
    dtype, device, width = keys.dtype, keys.device, 40
    pages = torch.randperm(len(keys), device=device)[: 4 * HEADS].view(HEADS, 4)
    cos_sin = _rotation(4 * BLOCK_SIZE).to(device, dtype)
    up = torch.randn(HEADS, 2 * HEAD_SIZE, width, device=device, dtype=dtype) / HEAD_SIZE
    bias, down = torch.randn(2, HEADS, width, device=device, dtype=dtype) / width
    network = up, bias, down, torch.randn(HEADS, device=device)
    found = network_scores(keys, values, pages, 4 * BLOCK_SIZE, network, cos_sin, True)
    before = _undone(keys[pages].flatten(1, 2), cos_sin).to(dtype).double()
    hidden = torch.cat([before, values[pages].flatten(1, 2).double()], -1) @ up.double()
    hidden = torch.nn.functional.gelu(hidden + bias[:, None].double())
    _note(
        errors,
        f"networks.{name}",
        found,
        (hidden @ down[..., None].double())[..., 0] + network[3][:, None],
        1e-3,
    )


def _rotation(length: int) -> Tensor:
    """Cosines of the angles of so many positions, then their sines, `[n, D]`."""
    half = HEAD_SIZE // 2
    angle = torch.arange(length)[:, None] * 100.0 ** (-torch.arange(half) / half)
    return torch.cat([angle.cos(), angle.sin()], 1)


def _undone(rotated: Tensor, cos_sin: Tensor) -> Tensor:
    """Vectors before their rotation, float64."""
    cos, sin = cos_sin.double().chunk(2, -1)
    cos, sin = (each / (cos**2 + sin**2) for each in (cos, sin))
    left, right = rotated.double().chunk(2, -1)
    return torch.cat([left * cos + right * sin, right * cos - left * sin], -1)


def _check_selection(device: str, errors: dict[str, float]) -> None:
    """Pages per head and kept tokens of scores with many ties, by sorting."""
    shape = 3, HEADS, 640 * BLOCK_SIZE
    scores = torch.randint(-20, 20, shape, device=device).float()
    smallest = torch.ones(1, *shape[:2], dtype=torch.int64, device=device)
    num_pages = torch.tensor([1000], device=device)
    found = global_counts(scores[None], num_pages, BLOCK_SIZE, smallest, 640 * smallest)
    cost = scores.flatten(0, 1).sort().values[:, BLOCK_SIZE - 1 : -1 : BLOCK_SIZE]  # but for the last page's
    dearest = cost.flatten().sort(stable=True, descending=True).indices[: 1000 - len(cost)]
    counts = 1 + torch.bincount(dearest // cost.shape[1], minlength=len(cost))
    _note(errors, "pages.global", found.flatten(), counts, 0)
    even = whole_pages(None, num_pages, smallest.flatten(1), 640 * smallest.flatten(1))
    _note(errors, "pages.even", even[0], 41 + (torch.arange(len(cost), device=device) < 16).long(), 0)
    columns, _ = select_columns(scores.flatten(0, 1), counts, BLOCK_SIZE, 1000)
    order = scores.flatten(0, 1).sort(stable=True, descending=True).indices
    kept = [
        own[: BLOCK_SIZE * count].sort().values for own, count in zip(order, counts.tolist(), strict=True)
    ]
    _note(errors, "columns", columns.flatten(), torch.cat(kept), 0)


def _note(errors: dict[str, float], name: str, found: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.float(), wanted.float(), atol=tolerance, rtol=tolerance)
    error = float((found.float() - wanted.float()).abs().max())
    errors[name] = max(errors.get(name, 0.0), error)


def measure(batch: int, context: int, budget: float, copy: float) -> dict[str, float] | None:
    """One cell of the table; None if the device has too little memory for it."""
    free, _ = torch.cuda.mem_get_info()
    if step_bytes(batch, context, budget) > 0.9 * (free - 4 * FLUSH_BYTES):
        return None
    layer = make_layer(batch, context, budget, "cuda", torch.bfloat16)
    properties = torch.cuda.get_device_properties(0)
    of_one = programs_at_once(properties.shared_memory_per_multiprocessor)
    at_once = properties.multi_processor_count * of_one
    shares = Shares.empty(batch, 1, HEADS, at_once, "cuda", context)
    layers = layer.copies()
    step = [layers[number % len(layers)] for number in range(LAYERS)]
    cut = functools.partial(layer.cut, shares)
    ours = seconds([cut, *(functools.partial(each.attend, shares=shares) for each in step)]) / LAYERS
    sdpa = seconds([dense_call(each) for each in step]) / LAYERS
    return {
        "batch": batch,
        "context": context,
        "budget": budget,
        "bytes": layer.num_bytes,
        "shares": int((shares.work[0] >= 0).sum()),
        "seconds": ours,
        "sdpa_seconds": sdpa,
        "of_copy": layer.num_bytes / ours / copy,
        "sdpa_of_copy": layer.num_bytes / sdpa / copy,
    }


def _heading(step: int) -> str:
    return "batch".rjust(6) + "".join(f"{context // 1024}k".rjust(14) for context in CONTEXTS[::step])


def predict(step: int) -> None:
    """Print what the model says of GPUs that are not there, for the cells that would be measured."""
    for device in DEVICES:
        for budget in BUDGETS:
            print(f"\n{device.name}, budget {budget}: predicted\n" + _heading(step))
            for batch in BATCHES[::step]:
                line = f"{batch}".rjust(6)
                for context in CONTEXTS[::step]:
                    torch.manual_seed(0)
                    lengths = _head_lengths(batch, context, budget).flatten().tolist()
                    taken = predicted_seconds(lengths, 4 * HEAD_SIZE, device)
                    fraction = 4 * HEAD_SIZE * sum(lengths) / taken / device.bandwidth
                    line += f"{fraction:.2f}".rjust(14)
                print(line, flush=True)


def _head_lengths(batch: int, context: int, budget: float) -> Tensor:
    """Tokens `[batch, H]` of each head, as `make_layer` shares them out."""
    return _run_ends(batch, context, budget).diff(dim=1) * BLOCK_SIZE + TAIL


def _run_ends(batch: int, context: int, budget: float) -> Tensor:
    """Where runs start, `[batch, H + 1]`; without a budget all heads keep the same."""
    blocks = compacted_blocks(context, budget)
    if budget == 1:
        return torch.arange(HEADS + 1).repeat(batch, 1) * blocks
    # Exponential shares: the longest of eight heads is about 2.7 times the mean.
    shares = torch.distributions.Exponential(1.0).sample((batch, HEADS)).cumsum(1)
    ends = (shares / shares[:, -1:] * blocks * HEADS).to(torch.int32)
    return torch.nn.functional.pad(ends, (1, 0))


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    parser.add_argument("--quick", action="store_true", help="every other batch size and context")
    arguments = parser.parse_args()
    step = 2 if arguments.quick else 1
    if not torch.cuda.is_available():
        print("torch sees no GPU: nothing is measured. What a model says of the bandwidth over the copy's:")
        predict(step)
        return
    errors = check("cuda")
    print("largest errors against plain PyTorch:", json.dumps(errors))
    copy = copy_bandwidth()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}: copy {copy / 1e9:.0f} GB/s")

    cells = []
    for budget in BUDGETS:
        print(f"\nbudget {budget}: bandwidth over the copy's, this kernel / SDPA; bfloat16, per context")
        print(_heading(step))
        for batch in BATCHES[::step]:
            line = f"{batch}".rjust(6)
            for context in CONTEXTS[::step]:
                cell = measure(batch, context, budget, copy)
                torch.cuda.empty_cache()
                cells += [cell] if cell else []
                text = f"{cell['of_copy']:.2f} / {cell['sdpa_of_copy']:.2f}" if cell else "-"
                line += text.rjust(14)
            print(line, flush=True)
    chunks = _measure_chunks()
    if arguments.json:
        report = {"device": device, "copy_bytes_per_second": copy, "errors": errors, "cells": cells}
        report["chunks"] = chunks
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
