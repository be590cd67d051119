"""Prompts that go on over compacted pages answer on what stands in for FlashAttention 3 as by our kernel."""

import flash3
import pytest
import torch
from alike import captured, prompt, warm_up
from harness import first_difference, sampling

from vllm_kvcompress.attention import chunks, gpu
from vllm_kvcompress.kernels.attention import attend

STREAMING = "budget=0.3,window=8,when=streaming,recompact_every=96"
REQUESTS = [  # method, seed and tokens of the prompt
    (f"streaming_llm:{STREAMING}", 0, 280),
    (f"kv_compress:{STREAMING}", 1, 231),
    (f"snapkv+kivi4:{STREAMING}", 2, 180),  # whose pages FlashAttention 3 cannot read
    ("adakv:budget=0.3,window=8", 3, 90),  # decodes meanwhile
    ("off", 4, 100),
]
TOLERANCE = 4e-3  # of float16, rounded once more before it is merged


@pytest.fixture(scope="module")
def engine(tiny, start_engine):
    flash3.register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KV_COMPRESSION_FLASH3", "1")
        patch.setattr(chunks, "is_missing", lambda device: None)
        impl = gpu.CompressedTritonAttentionBackend.get_impl_cls()
        patch.setattr(impl, "vllm_flash_attn_version", 3, raising=False)
        yield start_engine(
            tiny,
            "v2",
            "gpu",
            asynchronous=True,  # as GPUs do
            dtype="float16",
            skip_tokenizer_init=True,
            max_model_len=512,
            max_num_batched_tokens=400,
            max_num_seqs=8,
            num_gpu_blocks_override=120,
            additional_config={"kv_compression": "snapkv:budget=0.4,window=8"},
        )


@pytest.fixture
def compared(monkeypatch):
    """Queries of each call's chunks; each is compared with our own kernel over the same cache."""
    found = []

    def both(query, keys, values, runs, rows, own, layer, scale, max_keys, out, soft_cap):
        before = out.clone()
        attend_chunks(query, keys, values, runs, rows, own, layer, scale, max_keys, out, soft_cap)
        wanted, _ = attend(query, keys, values, runs, rows, layer, scale, soft_cap)
        torch.testing.assert_close(out[own.tokens], wanted[own.tokens], atol=TOLERANCE, rtol=TOLERANCE)
        others = torch.ones(len(out), dtype=torch.bool).index_fill(0, own.tokens, False)
        assert torch.equal(out[others], before[others])
        found.append([length for length in own.query_lens.tolist() if length])

    attend_chunks = gpu.attend_chunks
    monkeypatch.setattr(gpu, "attend_chunks", both)
    return found


def answers(engine, *which):
    engine.forget_prefixes(), engine.compactions.clear()
    chosen = (REQUESTS[index] for index in which)
    requests = [(prompt(*of), sampling(4, method, detokenize=False)) for method, *of in chosen]
    outputs = engine.run_all(requests)
    engine.check_accounts(), engine.check_nothing_left()
    return outputs, list(engine.compactions)


def by_our_kernel(engine, monkeypatch):
    for builder in engine.worker.builders:
        monkeypatch.setattr(builder, "chunk_rows", None)


def assert_alike(one, other):
    assert first_difference(one, other, gap=2e-2) is None
    for left, right in zip(one.outputs[0].logprobs, other.outputs[0].logprobs, strict=True):
        for token in left.keys() & right.keys():
            assert left[token].logprob == pytest.approx(right[token].logprob, abs=3e-2)


def test_streamed_prompts_answer_the_same(engine, compared, monkeypatch):
    outputs, compactions = answers(engine, *range(len(REQUESTS)))
    assert len(compared) >= 2 * 2 and max(map(len, compared)) == 2, "both layers, of one row and of two"
    calls = len(compared)
    by_our_kernel(engine, monkeypatch)
    others, other_compactions = answers(engine, *range(len(REQUESTS)))
    assert len(compared) == calls
    assert len(compactions) == len(other_compactions) >= 6
    for index in (0, 2, 3, 4):  # what `kv_compress` keeps hangs on how its chunks' results were rounded
        assert_alike(outputs[index], others[index])


def test_a_conversation_goes_on_the_same(engine, compared, monkeypatch):
    document, method = prompt(9, 200), "streaming_llm:budget=0.3,window=8"

    def talk():
        engine.forget_prefixes()
        engine.run(document, sampling(2, f"{method},prefix=document", detokenize=False))
        (prefix,) = engine.scheduler._prefixes
        said = document + prompt(10, 70)
        output = engine.run(said, sampling(6, method, detokenize=False))
        assert prefix.hits == 1
        engine.scheduler._prefixes.drop(prefix)
        engine.forget_prefixes(), engine.check_nothing_left()
        return output

    one = talk()
    assert [sum(lengths) for lengths in compared] == [70 + 200 % 16] * 2, "what was not in whole blocks, too"
    by_our_kernel(engine, monkeypatch)
    assert_alike(one, talk())


def test_stock_attention_reads_one_key_of_a_chunk_and_our_kernel_nothing(engine, monkeypatch):
    builder = type(engine.worker.builders[0])
    build, seen, attended = builder.build, [], []

    def looked_at(self, *args, **kwargs):
        metadata = build(self, *args, **kwargs)
        batch = getattr(metadata, "kv_compression", None)
        if batch is not None and batch.chunks is not None:
            rows = batch.chunks.rows
            seen.extend(metadata.seq_lens[rows].tolist())
            attended.extend(batch.attended.slot[rows].tolist())
            assert (batch.rows.slot[rows] >= 0).all() and batch.arrays.slot is batch.rows.slot
            others = int((batch.attended.slot >= 0).sum())
            assert batch.attends == (others > 0) and bool(batch.formats) <= (others > 0)
        return metadata

    monkeypatch.setattr(builder, "build", looked_at)
    answers(engine, 0, 3)
    assert seen and set(seen) == {1} and set(attended) == {-1}


def test_no_chunk_where_its_tiles_do_not_fill_the_device(engine, compared, monkeypatch):
    for builder in engine.worker.builders:
        monkeypatch.setattr(builder.chunk_rows, "_processors", 1000)
    answers(engine, 1)
    assert not compared


def test_none_is_chosen_while_a_graph_is_captured(engine, monkeypatch):
    chunk_rows = engine.worker.builders[0].chunk_rows
    monkeypatch.setattr(chunk_rows, "chunks", object())  # of the batch before
    metadata = captured(engine.worker.model_runner, 2)
    (batch,) = {id(each.kv_compression): each.kv_compression for each in metadata.values()}.values()
    assert batch.chunks is chunk_rows.chunks is None
    assert batch.attends and batch.attended is batch.rows


def test_the_warm_up_leaves_nothing_behind(engine, compared, monkeypatch):
    monkeypatch.setattr(gpu, "MAX_TILE", 2)  # longer rows are slow to interpret
    warm_up(engine)
    assert compared == [[4]]
