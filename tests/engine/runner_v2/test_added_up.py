"""A kernel adds up what every query pays, inside captured graphs too, and what is kept is what V1 keeps."""

import pytest
from alike import assert_same, replay_captures, served, warm_up

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


@pytest.fixture(scope="module")
def engine(tiny, start_engine):
    return start_engine(tiny, "v2", "gpu", asynchronous=True, **OPTIONS)  # as GPUs do


def test_the_warm_up_leaves_nothing_behind(engine, monkeypatch):
    monkeypatch.setattr(gpu, "MAX_TILE", 2)  # longer rows are slow to interpret
    warm_up(engine)


def assert_same_in_graphs(engine, reference, requests, monkeypatch):
    """Kernels keep what the reference keeps, also those of a graph that was captured before, and nothing is
    left to PyTorch."""

    def unwanted(self, *args):
        raise AssertionError("PyTorch watches")

    monkeypatch.setattr(Observer, "spans", unwanted)
    assert_same(reference, served(engine, requests), requests)

    replayed = replay_captures(engine, monkeypatch)
    assert_same(reference, served(engine, requests), requests)
    assert 4 in replayed


@pytest.mark.timeout(1500)  # three times through, most of it interpreted
def test_the_same_is_kept_as_where_pytorch_watches_and_as_in_a_replayed_graph(
    engine, tiny, start_engine, monkeypatch
):
    reference = served(start_engine(tiny, "v1", "cpu", **OPTIONS), REQUESTS)
    again = {place: [each.job.num_tokens for each in events] for place, events in reference[1].items()}
    assert sum(len(points) > 1 for points in again.values()) == 2, again
    assert_same_in_graphs(engine, reference, REQUESTS, monkeypatch)
