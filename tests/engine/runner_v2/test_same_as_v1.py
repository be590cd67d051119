"""Runner V2 and the GPU backend keep the same tokens and answer the same as Runner V1 on the CPU's kernel."""

import pytest
import torch
from alike import prompt
from harness import first_difference, sampling

from vllm_kvcompress import load_prefix, save_prefix
from vllm_kvcompress.attention import gpu

OPTIONS = dict(
    skip_tokenizer_init=True,
    max_model_len=512,
    max_num_batched_tokens=160,
    max_num_seqs=12,
    num_gpu_blocks_override=80,
    additional_config={"kv_compression": "snapkv:budget=0.4,window=8"},
)
REQUESTS = [  # method, prompt tokens
    (None, 80),
    ("kv_compress:budget=0.4,window=8", 90),
    ("adakv:budget=0.3,window=8", 112),
    ("expected_attention:budget=0.4,window=8", 100),
    ("snapkv:budget=0.3,window=8,recompact_every=3", 101),  # of 104 tokens one block more is compacted
    ("h2o:budget=0.3,window=8,recompact_every=3", 101),
    ("kv_compress:budget=0.3,window=8,when=streaming,recompact_every=64", 150),
    ("kivi:window=8,recompact_every=3", 133),  # of 136 tokens one block more is encoded
    ("turboquant+turbo3_prod:window=8", 100),
    ("kivi+k4v3:window=8", 100),
    ("snapkv+auto:budget=0.2,window=8", 330),
    ("snapkv+kivi8:budget=0.3,window=8", 330),  # of 320 tokens 3 pages of 96 stay
    ("snapkv+mixed_dim:budget=0.2,window=8", 270),
    ("off", 120),
    # Of 288 tokens 96 stay of each head on average, with biases.
    ("attention_matching+kivi8:budget=0.1,queries=prompt,references=32,waits=true", 330),
]


def requests():
    """Prompts that are computed in chunks of at most 160 tokens."""
    return [
        (prompt(index, length), sampling(8, method, detokenize=False))
        for index, (method, length) in enumerate(REQUESTS)
    ]


@pytest.fixture(scope="module")
def engines(tiny, start_engine):
    """By runner and backend."""
    return {
        ("v1", "cpu"): start_engine(tiny, "v1", "cpu", **OPTIONS),
        ("v2", "cpu"): start_engine(tiny, "v2", "cpu", **OPTIONS),
        ("v2", "gpu"): start_engine(tiny, "v2", "gpu", asynchronous=True, **OPTIONS),  # as GPUs do
    }


@pytest.fixture(scope="module")
def results(engines):
    """Outputs in the order of the requests, and compactions by request, of every engine."""
    found = {}
    for name, engine in engines.items():
        outputs = engine.run_all(requests())
        by_request: dict[str, list] = {}
        for compaction in engine.compactions:
            by_request.setdefault(compaction.request, []).append(compaction)
        assert engine.sent == [compaction.job for compaction in engine.compactions]
        engine.check_accounts(), engine.check_nothing_left()
        found[name] = outputs, by_request
    return found


@pytest.mark.parametrize("other", [("v2", "cpu"), ("v2", "gpu")], ids="-".join)
def test_same_kept_tokens_and_same_answers(results, other):
    outputs, compactions = results["v1", "cpu"]
    other_outputs, other_compactions = results[other]
    assert compactions.keys() == other_compactions.keys() and len(compactions) == len(REQUESTS) - 1
    for name, events in compactions.items():
        assert len(events) == len(other_compactions[name])
        for one, two in zip(events, other_compactions[name], strict=True):
            assert one.job.num_tokens == two.job.num_tokens
            assert torch.equal(one.counts, two.counts) and torch.equal(one.kept, two.kept), one.job
    assert sum(len(events) > 1 for events in compactions.values()) == 3, "compacted again as they grew"
    for (method, _), one, two in zip(REQUESTS, outputs, other_outputs, strict=True):
        assert first_difference(one, two) is None, method


@pytest.mark.parametrize(
    ("method", "length", "points"),
    [
        ("snapkv:budget=0.25,window=8", 140, [(140, 128, 2), (142, 128, 1)]),
        ("kv_compress+k4v3:budget=0.1,window=8", 330, [(330, 320, 3), (332, 320, 2)]),
    ],
)
def test_the_same_under_pressure_at_the_same_points(engines, method, length, points):
    """At the second one nothing raw is compacted: what was kept before is cut."""
    ended = []
    for engine in engines.values():
        engine.compactions.clear()
        name = engine.add(prompt(99, length), sampling(8, f"{method},when=pressure", detokenize=False))
        with engine.replaying(name, points):
            engine.finish()
        ended.append((engine.outputs.pop(name), list(engine.compactions)))
        engine.check_accounts(), engine.check_nothing_left()
    (reference, before), *others = ended
    assert [len(each.job.source) > 0 for each in before] == [True, False]
    for output, after in others:
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one.counts, other.counts) and torch.equal(one.kept, other.kept)
        assert first_difference(reference, output) is None


@pytest.mark.parametrize(
    ("method", "length"),
    [
        ("snapkv:budget=0.25,window=8", 140),
        ("kv_compress+k4v3:budget=0.1,window=8", 330),
        ("foresight:budget=0.9,window=8,threshold=30", 140),
    ],
)
def test_who_goes_on_from_a_compacted_prefix_answers_the_same(engines, method, length, tmp_path):
    """Two at a time, and once more when it was saved and loaded again."""
    document, ended = prompt(98, length), []
    users = [(document + prompt(seed, 20 + seed), sampling(6, method, detokenize=False)) for seed in (3, 4)]
    for engine in engines.values():
        engine.run(document, sampling(2, f"{method},prefix=document", detokenize=False))
        (prefix,) = engine.scheduler._prefixes
        outputs = engine.run_all(users)
        assert prefix.hits == 2
        if "threshold" in method and engine.worker.compression.runs is not None:  # a GPU's are of the budget
            table = engine.worker.compression.prefixes[prefix.id]
            assert len(table.destination) > prefix.plan.kept_blocks == len(prefix.compacted)
        save_prefix(engine.llm, "document", tmp_path / "document")
        engine.scheduler._prefixes.drop(prefix)
        engine.forget_prefixes()
        load_prefix(engine.llm, tmp_path / "document")
        again = engine.run_all(users)
        assert next(iter(engine.scheduler._prefixes)).hits == 2
        ended.append(outputs)
        for one, other in zip(outputs, again, strict=True):
            assert first_difference(one, other) is None
        engine.check_accounts()
        engine.forget_prefixes()
        engine.check_nothing_left()
        assert not engine.worker.compression.prefixes
    for others in ended[1:]:
        for one, other in zip(ended[0], others, strict=True):
            assert first_difference(one, other) is None


def test_our_kernel_computes_what_compacted_rows_attend_to(engines, monkeypatch):
    """Fails if compaction did not fire, or if vLLM's kernel served compacted rows."""
    engine = engines["v2", "gpu"]
    request = prompt(99, 180), sampling(4, "snapkv:budget=0.3,window=8", detokenize=False)
    engine.compactions.clear()
    calls, seen, attend = [], [], gpu.attend

    def counted(query, *args, **kwargs):
        calls.append(len(query))
        return attend(query, *args, **kwargs)

    builder = type(engine.worker.model_runner.attn_groups[0][0].get_metadata_builder(0))
    build = builder.build

    def looked_at(self, *args, **kwargs):
        metadata = build(self, *args, **kwargs)
        seen.append(metadata.seq_lens.tolist())
        return metadata

    monkeypatch.setattr(gpu, "attend", counted)
    monkeypatch.setattr(builder, "build", looked_at)
    ours = engine.run_fresh(*request)
    assert len(engine.compactions) == 1
    decoded = 3  # the first token comes out of the prompt
    assert calls == [1] * 2 * decoded  # in both layers
    assert seen == [[160], [180]] + [[1]] * decoded  # what vLLM's kernel attends over

    monkeypatch.setattr(gpu, "attend", lambda *args, **kwargs: None)
    without = engine.run_fresh(*request)
    assert first_difference(ours, ours) is None
    with pytest.raises(AssertionError):
        first_difference(ours, without)


def test_nothing_compacted_is_bit_identical_to_stock(engines, tiny, start_engine):
    stock = start_engine(tiny, "v2", "stock gpu", **{**OPTIONS, "additional_config": {}})
    assert not hasattr(stock.worker, "compactor")
    batch = [(prompt(40 + i, 30 + 25 * i), sampling(3, detokenize=False)) for i in range(3)]
    off = [(tokens, sampling(3, "off", detokenize=False)) for tokens, _ in batch]
    for plain, ours in zip(stock.run_all(batch), engines["v2", "gpu"].run_all(off), strict=True):
        assert ours.outputs[0].token_ids == plain.outputs[0].token_ids
        assert logprobs(ours) == logprobs(plain)


def logprobs(output):
    return [{token: seen.logprob for token, seen in step.items()} for step in output.outputs[0].logprobs]
