"""How near the attention kernel comes to the device's memory bandwidth; needs nothing but torch and triton.

    python vllm_kvcompress/kernels/benchmark.py [--json FILE] [--quick]

First compares the kernels with the plain PyTorch reference on this device. Then decodes one token per row of
a layer, for every batch size, context and budget, and prints two ratios: bytes of K and V that had to be read
per second, over the bandwidth of a large device-to-device copy (reads plus writes per second). The first is
this kernel's, over compacted pages whose heads differ in length; the second that of PyTorch's
scaled_dot_product_attention over the very same bytes, seen as contiguous heads of equal length, for it can do
no other. Every call is a replayed CUDA graph, and the L2 cache is flushed before each.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

if not __package__:  # run as a file: the package itself need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from vllm_kvcompress.kernels.attention import attend, choose_splits
from vllm_kvcompress.kernels.batch import Rows, Runs
from vllm_kvcompress.kernels.pages import gather_pages, scatter_pages
from vllm_kvcompress.kernels.reference import attend_paged, causal_logits
from vllm_kvcompress.kernels.ring import write_rings
from vllm_kvcompress.kernels.scores import pool_columns, window_columns
from vllm_kvcompress.kernels.selection import global_counts, select_columns, whole_pages

HEADS, GROUP, HEAD_SIZE, BLOCK_SIZE = 8, 4, 128, 16  # a layer of Llama 3 8B, vLLM's block size
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072)
BUDGETS = (1.0, 0.25, 0.0625)
TAIL = 2 * BLOCK_SIZE  # raw tokens behind the boundary
FLUSH_BYTES = 256 * 2**20


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

    def attend(self, num_splits: int) -> tuple[Tensor, Tensor]:
        keys, values = self.cache[None].split(HEAD_SIZE, -1)
        scale = HEAD_SIZE**-0.5
        return attend(self.query, keys, values, self.runs, self.rows, 0, scale, num_splits=num_splits)


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
    start = torch.zeros(batch, HEADS + 1, dtype=torch.int32)
    # Exponential shares: the longest of eight heads is about 2.7 times the mean.
    shares = torch.distributions.Exponential(1.0).sample((batch, HEADS)).cumsum(1)
    start[:, 1:] = (shares / shares[:, -1:] * blocks * HEADS).to(torch.int32)
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


def seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a call that is captured once and replayed with a cold L2 cache."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # compiles, and lets libraries choose
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
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
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


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
            for num_splits in (1, 4):
                found = layer.attend(num_splits)
                for row in range(2):
                    wanted = _expected_row(layer, row)
                    for part, ours, theirs in zip(("out", "lse"), found, wanted, strict=True):
                        _note(errors, f"attend.{part}.{name}", ours[row : row + 1], theirs, tolerance)
        _check_compaction(layer, name, errors)
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
    if step_bytes(batch, context, budget) > 0.9 * (free - 2 * FLUSH_BYTES):
        return None
    layer = make_layer(batch, context, budget, "cuda", torch.bfloat16)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    num_splits = choose_splits(batch, HEADS, int(context * min(1.0, 3 * budget)), processors)
    ours, sdpa = seconds(lambda: layer.attend(num_splits)), seconds(dense_call(layer))
    return {
        "batch": batch,
        "context": context,
        "budget": budget,
        "bytes": layer.num_bytes,
        "splits": num_splits,
        "seconds": ours,
        "sdpa_seconds": sdpa,
        "of_copy": layer.num_bytes / ours / copy,
        "sdpa_of_copy": layer.num_bytes / sdpa / copy,
    }


def _heading(step: int) -> str:
    return "batch".rjust(6) + "".join(f"{context // 1024}k".rjust(14) for context in CONTEXTS[::step])


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    parser.add_argument("--quick", action="store_true", help="every other batch size and context")
    arguments = parser.parse_args()
    step = 2 if arguments.quick else 1
    if not torch.cuda.is_available():
        print("torch sees no GPU: nothing is measured. MB that a decode step must read of one layer:")
        for budget in BUDGETS:
            print(f"\nbudget {budget}\n" + _heading(step))
            for batch in BATCHES[::step]:
                megabytes = [step_bytes(batch, context, budget) / 1e6 for context in CONTEXTS[::step]]
                print(f"{batch}".rjust(6) + "".join(f"{each:.1f}".rjust(14) for each in megabytes))
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
    if arguments.json:
        report = {"device": device, "copy_bytes_per_second": copy, "errors": errors, "cells": cells}
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
