"""A kernel keeps moments of every query, inside captured graphs too, and what is kept is what V1 keeps."""

import pytest
from alike import served, warm_up
from test_added_up import OPTIONS, assert_same_in_graphs

from vllm_kvcompress.attention import gpu

METHOD = "expected_attention:budget=0.3,window=8"
REQUESTS = [  # method, prompt tokens
    (f"{METHOD},recompact_every=3", 101),  # of 104 tokens one block more is compacted
    ("criticalkv:base=expected_attention,budget=0.3,window=8", 82),
    ("snapkv:budget=0.3,window=8", 75),
]


@pytest.mark.timeout(1500)  # three times through, two of them interpreted
def test_the_same_is_kept_as_where_pytorch_watches_and_as_in_a_replayed_graph(
    tiny, start_engine, monkeypatch
):
    options = OPTIONS | dict(additional_config={"kv_compression": METHOD}, max_num_seqs=4)
    reference = served(start_engine(tiny, "v1", "cpu", **options), REQUESTS)
    assert [len(reference[1][place]) for place in range(3)] == [2, 1, 1]
    engine = start_engine(tiny, "v2", "gpu", asynchronous=True, **options)
    monkeypatch.setattr(gpu, "MAX_TILE", 1)  # longer rows are slow to interpret
    warm_up(engine)
    assert_same_in_graphs(engine, reference, REQUESTS, monkeypatch)
