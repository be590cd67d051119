"""Chunks on FlashAttention 3, by what stands in for it, against plain PyTorch."""

import flash3
import pytest
import torch
from paged import TOLERANCE, Batch, Row, make_cache, pairwise

from vllm_kvcompress.kernels import benchmark
from vllm_kvcompress.kernels.flash3 import Chunk, Chunks, attend_chunks, chunk_bytes, fill

LAYERS, HEADS, SCALE = 2, 3, 0.2
ROWS = {
    "one": [Row(70, 70 + 21, 3, 9)],
    "the whole raw tail": [Row(64, 64, 2, 4)],
    "among others": [
        Row(1, 40),  # raw
        Row(1, 17, 4, 6),  # decodes over compacted pages
        Row(65, 65 + 13, 1, 3),
        Row(80, 96),  # a raw prompt's
        Row(90, 90 + 32, 5, 7),
    ],
    "short ones": [Row(1, 30, 2, 5), Row(2, 2, 3, 4), Row(17, 40, 1, 1)],
}


def serve(batch, layer, least, soft_cap=0.0):
    """Have all compacted rows with so many queries served; which tokens these are, and the result."""
    rows, num_slots = batch.rows, len(batch.keys)
    bounds, slots = rows.query_start_loc.tolist(), rows.slot.tolist()
    blocks = {index: row.blocks for index, row in enumerate(batch._rows)}
    chosen = [
        Chunk(row, bounds[row], bounds[row + 1] - bounds[row], slot, blocks[row])
        for row, slot in enumerate(slots)
        if slot >= 0 and bounds[row + 1] - bounds[row] >= least
    ]
    cache = num_slots, *batch.keys.shape[1:4]
    chunks = Chunks.of(chosen, batch.runs, len(slots), cache)
    out = torch.full_like(batch.query, torch.nan)
    caches = batch.keys, batch.values, batch.runs, rows, chunks
    attend_chunks(batch.query, *caches, layer, SCALE, int(rows.seq_lens.max()), out, soft_cap)
    return chunks, out


@pytest.fixture(autouse=True)
def operator():
    flash3.register()
    flash3.calls.clear()


@pytest.mark.parametrize(
    "case",
    pairwise(
        {
            "rows": list(ROWS),
            "group": [1, 4, 7],
            "head_size": [32, 80],
            "block_size": [16, 32],
            "dtype": [torch.float16, torch.bfloat16],
            "interleaved": [True, False],
            "soft_cap": [0.0, 3.0],
            "layer": [0, 1],
        }
    ),
    ids=str,
)
def test_equals_plain_pytorch(case):
    torch.manual_seed(0)
    rows, dtype = ROWS[case["rows"]], case["dtype"]
    shape = LAYERS, 60, HEADS, case["block_size"], case["head_size"]
    batch = Batch(rows, *make_cache(*shape, dtype, case["interleaved"]), case["group"])
    chunks, out = serve(batch, case["layer"], 1 if case["rows"] == "short ones" else 64, case["soft_cap"])
    wanted, _ = batch.expected(case["layer"], SCALE, case["soft_cap"])
    atol = TOLERANCE[dtype]
    torch.testing.assert_close(out[chunks.tokens].float(), wanted[chunks.tokens], atol=atol, rtol=atol)
    others = torch.ones(len(out), dtype=torch.bool).index_fill(0, chunks.tokens, False)
    assert out[others].isnan().all(), "other rows' results are others' affair"


def test_heads_without_a_run_and_heads_with_all_of_it():
    torch.manual_seed(1)
    batch = Batch([Row(64, 70, 3, 5), Row(64, 64, 2, 2)], *make_cache(2, 40, 3, 16, 32, torch.float16), 2)
    for slot, cuts in zip(
        batch.rows.slot[:2].tolist(), ([0, 0, 18, 18, 18, 18], [5, 5, 5, 7, 7, 12]), strict=True
    ):
        batch.runs.start[slot, 1:] = torch.tensor(cuts)
    for layer in (0, 1):
        _, out = serve(batch, layer, 64)
        wanted, _ = batch.expected(layer, SCALE, 0.0)
        torch.testing.assert_close(out[:128].float(), wanted, atol=2e-3, rtol=2e-3)


def test_layers_of_several_groups_share_the_slots_of_a_cache():
    torch.manual_seed(2)
    cache = make_cache(2, 60, 2, 16, 32, torch.float16)
    batch = Batch([Row(64, 64, 2, 5), Row(70, 80, 3, 3)], *cache, 2, slots=(0, 1, 1, 0))
    for layer in range(4):
        chunks, out = serve(batch, layer, 64)
        wanted, _ = batch.expected(layer, SCALE, 0.0)
        torch.testing.assert_close(out[chunks.tokens].float(), wanted[chunks.tokens], atol=2e-3, rtol=2e-3)


def test_a_layer_is_two_calls_however_many_chunks_there_are():
    torch.manual_seed(3)
    batch = Batch(ROWS["among others"], *make_cache(2, 60, HEADS, 16, 32, torch.float16), 4)
    chunks, _ = serve(batch, 0, 64)
    of_tails, of_runs = flash3.calls
    assert of_tails == {"batch": 6, "kv_heads": HEADS, "queries": 65 + 90, "causal": True}
    assert of_runs == {"batch": 2 * HEADS, "kv_heads": 1, "queries": HEADS * (65 + 90), "causal": False}
    pages = chunks.pages.expand(2 * HEADS, -1)
    assert pages.stride(0) == 0 and len(chunks.pages) == 6 * 2 * HEADS, "one list for all heads and layers"


@pytest.mark.parametrize(
    ("place", "other"),
    [
        (0, lambda query: query.float()),
        (0, lambda query: query.transpose(1, 2)),
        (1, lambda keys: keys[..., 1:].transpose(2, 3).contiguous().transpose(2, 3)),
        (7, lambda starts: starts.long()),
        (10, lambda lens: lens[:-1]),
        (11, lambda ends: torch.stack([ends, ends], 1)[:, 0]),
        (14, lambda pages: pages.long()),
        (14, lambda pages: pages[:-1]),
        (14, lambda pages: pages.T.contiguous().T),
        (16, lambda starts: starts.long()),
        (13, lambda most: most - 1),
    ],
)
def test_what_the_operator_refuses_is_refused(monkeypatch, place, other):
    """A tail's call, with one argument otherwise."""
    torch.manual_seed(5)
    batch = Batch([Row(64, 64, 2, 5), Row(70, 80, 3, 3)], *make_cache(2, 60, 2, 16, 32, torch.float16), 2)
    given, forward = [], torch.ops._vllm_fa3_C.fwd
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops._vllm_fa3_C, "fwd", lambda *args: given.append(args) or forward(*args))
        serve(batch, 0, 64)
    flash3.forward(*given[0])
    with pytest.raises(AssertionError):
        flash3.forward(*(other(each) if index == place else each for index, each in enumerate(given[0])))


def test_what_a_layer_takes_beside_its_output_is_bounded(monkeypatch):
    torch.manual_seed(4)
    batch = Batch([Row(64, 64, 2, 5), Row(70, 80, 3, 3)], *make_cache(2, 60, 2, 16, 32, torch.float16), 2)
    found, index_select, forward = [], torch.Tensor.index_select, torch.ops._vllm_fa3_C.fwd

    def noted(self, *args):
        made = index_select(self, *args)
        found.append(made.nbytes)
        return made

    def called(*args):
        out, lse, *more = forward(*args)
        found.append(lse.nbytes + (0 if args[6] is not None else out.nbytes))
        return out, lse, *more

    monkeypatch.setattr(torch.Tensor, "index_select", noted)
    monkeypatch.setattr(torch.ops._vllm_fa3_C, "fwd", called)
    serve(batch, 0, 64)
    assert len(found) == 3 and sum(found) <= chunk_bytes(len(batch.query), 4, 32, 2)


def test_chunks_pay_where_their_tiles_fill_the_device():
    assert fill([528], 4, 8, 132) and not fill([512], 4, 8, 132)
    assert fill([64] * 9, 4, 8, 132) and not fill([64] * 8, 4, 8, 132)
    assert not fill([4096], 4, 1, 132), "a rank with one head cuts long runs instead"


@pytest.fixture
def benchmarked(monkeypatch):
    """The benchmark, as if on Hopper; what is timed is run once, and takes as long as it is told to."""
    monkeypatch.setattr(benchmark, "is_missing", lambda device: None)
    monkeypatch.setattr(benchmark, "CHUNKS", (20,)), monkeypatch.setattr(benchmark, "KEPT", (32, 64))
    make, taken = benchmark.ChunkLayer.make, {"ours": 2e-3, "flash3": 1e-3}

    def timed(calls):
        (call,) = calls
        call()
        return taken[getattr(call, "func", call).__name__]

    monkeypatch.setattr(benchmark, "seconds", timed)
    monkeypatch.setattr(
        benchmark.ChunkLayer, "make", lambda *args: make(*(arg if arg != "cuda" else "cpu" for arg in args))
    )
    return taken


def test_the_benchmark_compares_both_with_plain_pytorch(benchmarked, monkeypatch):
    errors = {}
    benchmark._check_chunks("cpu", torch.bfloat16, "bfloat16", 2e-2, errors)
    assert errors.keys() == {"chunks.bfloat16", "chunks.flash3.bfloat16"}
    assert max(errors.values()) < 2e-2 and len(flash3.calls) == 2
    monkeypatch.setattr(benchmark.ChunkLayer, "flash3", lambda self, chunks: self.query)
    with pytest.raises(AssertionError):
        benchmark._check_chunks("cpu", torch.bfloat16, "bfloat16", 2e-2, errors)


def test_the_benchmark_says_whether_to_ask_for_it(benchmarked, monkeypatch, capsys):
    cells = benchmark._measure_chunks()
    assert len(cells) == 2 and all(cell["flash3_seconds"] == 1e-3 for cell in cells)
    assert "right, and faster in 2 of 2: set KV_COMPRESSION_FLASH3=1" in capsys.readouterr().out
    benchmarked["flash3"] = 3e-3
    benchmark._measure_chunks()
    assert "faster in 0 of 2: leave KV_COMPRESSION_FLASH3 alone" in capsys.readouterr().out
    monkeypatch.setattr(benchmark, "is_missing", lambda device: "it needs another GPU")
    assert not any("flash3_seconds" in cell for cell in benchmark._measure_chunks())
    assert "not there: leave KV_COMPRESSION_FLASH3 alone" in capsys.readouterr().out
