"""A kernel adds up what every query pays, inside captured graphs too, and what is kept is what V1 keeps."""

import pytest
import torch
from harness import first_difference, sampling
from test_captured import assert_warm_up_leaves_nothing, captured

from vllm_kvcompress.attention import gpu
from vllm_kvcompress.requests.observer import Observer

OPTIONS = dict(
    skip_tokenizer_init=True,
    max_model_len=256,
    max_num_batched_tokens=160,
    max_num_seqs=8,
    num_gpu_blocks_override=80,
    additional_config={"kv_compression": "h2o:budget=0.3,window=8"},
)
REQUESTS = [  # method, prompt tokens
    ("h2o:budget=0.3,window=8,recompact_every=3", 101),  # of 104 tokens one block more is compacted
    ("h2o:budget=0.2,window=8,when=streaming,recompact_every=64", 150),
    ("criticalkv:base=kv_compress_full,budget=0.3,window=8", 82),
    ("snapkv:budget=0.3,window=8", 75),
]


def drawn(requests):
    prompts = (
        torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        for seed, (_, length) in enumerate(requests)
    )
    methods = (method for method, _ in requests)
    return [(ids, sampling(5, how, detokenize=False)) for ids, how in zip(prompts, methods, strict=True)]


@pytest.fixture(scope="module")
def engine(tiny, start_engine):
    return start_engine(tiny, "v2", "gpu", asynchronous=True, **OPTIONS)  # as GPUs do


def test_the_warm_up_leaves_nothing_behind(engine, monkeypatch):
    monkeypatch.setattr(gpu, "MAX_TILE", 2)  # longer rows are slow to interpret
    assert_warm_up_leaves_nothing(engine)


def served(engine, requests):
    """Outputs in the order of the requests, and compactions by a request's place in it."""
    engine.forget_prefixes(), engine.compactions.clear()
    first = engine._count + 1
    outputs = engine.run_all(drawn(requests))
    found: dict[int, list] = {}
    for compaction in engine.compactions:
        found.setdefault(int(compaction.request.removeprefix("r")) - first, []).append(compaction)
    engine.check_accounts(), engine.check_nothing_left()
    return outputs, found


def assert_same(one, other, requests):
    (outputs, compactions), (others, other_compactions) = one, other
    assert compactions.keys() == other_compactions.keys()
    for name, events in compactions.items():
        for ours, theirs in zip(events, other_compactions[name], strict=True):
            assert torch.equal(ours.counts, theirs.counts) and torch.equal(ours.kept, theirs.kept), name
    for (method, _), ours, theirs in zip(requests, outputs, others, strict=True):
        assert first_difference(ours, theirs) is None, method


def assert_same_in_graphs(engine, reference, requests, monkeypatch):
    """Kernels keep what the reference keeps, also those of a graph that was captured before, and nothing is
    left to PyTorch."""

    def unwanted(self, *args):
        raise AssertionError("PyTorch watches")

    monkeypatch.setattr(Observer, "spans", unwanted)
    assert_same(reference, served(engine, requests), requests)

    runner = engine.worker.model_runner
    graphs = {num_rows: captured(runner, num_rows) for num_rows in (1, 2, 4)}
    prepare, replayed = runner.model_state.prepare_attn, []

    def replay(batch, *args, **kwargs):
        fresh = prepare(batch, *args, **kwargs)  # fills the arrays, as before a replay
        if batch.num_reqs != batch.num_tokens:
            return fresh
        replayed.append(batch.num_reqs)
        return graphs[batch.num_reqs + (batch.num_reqs == 3)]  # once with a row of padding

    monkeypatch.setattr(runner.model_state, "prepare_attn", replay)
    assert_same(reference, served(engine, requests), requests)
    assert len(requests) in replayed


@pytest.mark.timeout(1500)  # three times through, most of it interpreted
def test_the_same_is_kept_as_where_pytorch_watches_and_as_in_a_replayed_graph(
    engine, tiny, start_engine, monkeypatch
):
    reference = served(start_engine(tiny, "v1", "cpu", **OPTIONS), REQUESTS)
    again = {place: [each.job.num_tokens for each in events] for place, events in reference[1].items()}
    assert sum(len(points) > 1 for points in again.values()) == 2, again
    assert_same_in_graphs(engine, reference, REQUESTS, monkeypatch)
