"""Full attention in several cache groups on the GPU backend, with both runners: as on Runner V1 and a CPU."""

import pytest
import torch
from alike import assert_same, replay_captures, served, warm_up
from test_counted import counted  # noqa: F401 (a fixture)

OPTIONS = dict(
    skip_tokenizer_init=True,
    max_model_len=512,
    max_num_batched_tokens=288,
    max_num_seqs=8,
    num_gpu_blocks_override=120,
)
ENGINES = {  # runner, backend: the engine's own method
    # Which it adds up inside a kernel; where it is a request's alone, PyTorch watches.
    ("v1", "gpu"): "h2o:budget=0.3,window=8",
    ("v2", "gpu"): "snapkv:budget=0.4,window=8",
}
REQUESTS = [  # method, prompt tokens: in chunks of at most 288 tokens of all
    ("kv_compress:budget=0.3,window=8", 90),
    ("adakv:budget=0.3,window=8", 76),
    ("h2o:budget=0.3,window=8,recompact_every=3", 101),  # of 104 tokens one block more is compacted
    ("kivi:window=8", 75),
    ("off", 70),
]
# Graphs have no place for what PyTorch watches, nor for another format than the engine's.
IN_GRAPHS = [REQUESTS[0], ("snapkv:budget=0.3,window=8,recompact_every=3", 101), ("off", 90)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two layers that slide a window over 64 tokens, and of full attention two of one group and one of
    another."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    attends, slides = "full_attention", "sliding_attention"
    config = Gemma3TextConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        sliding_window=64,
        layer_types=[attends, slides, attends, slides, attends],
        query_pre_attn_scalar=32,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    path = tmp_path_factory.mktemp("groups")
    Gemma3ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engines(model, start_engine):
    """By runner and backend; Runner V2 as GPUs have it."""
    methods = {("v1", "cpu"): ENGINES["v2", "gpu"], **ENGINES}
    return {
        (runner, backend): start_engine(
            model,
            runner,
            backend,
            asynchronous=runner == "v2",
            additional_config={"kv_compression": method},
            **OPTIONS,
        )
        for (runner, backend), method in methods.items()
    }


@pytest.fixture(scope="module")
def reference(engines):
    return served(engines["v1", "cpu"], REQUESTS)


def assert_alike(one, other, requests) -> None:
    """The same tokens, by the same odds."""
    assert_same(one, other, requests)
    for (method, _), ours, theirs in zip(requests, one[0], other[0], strict=True):
        for left, right in zip(ours.outputs[0].logprobs, theirs.outputs[0].logprobs, strict=True):
            shared = left.keys() & right.keys()
            assert all(abs(left[token].logprob - right[token].logprob) < 1e-3 for token in shared), method


@pytest.mark.parametrize("name", ENGINES, ids="-".join)
def test_same_kept_tokens_and_same_answers(engines, reference, name):
    engine = engines[name]
    grid = engine.worker.compactor.grid
    assert grid.groups == (0, 1, 0) and grid.slots == (0, 0, 1) and len(engine.managers) == 3
    assert (engine.worker.compression.observer.sums is not None) == (name == ("v1", "gpu"))
    assert sum(len(events) for events in reference[1].values()) == len(REQUESTS)  # one a second time
    assert any(each.counts.sum(1).unique().numel() > 1 for events in reference[1].values() for each in events)
    assert_alike(reference, served(engine, REQUESTS), REQUESTS)


def test_decoding_with_the_metadata_of_the_capture_changes_nothing(engines, monkeypatch):
    engine = engines["v2", "gpu"]
    replayed = replay_captures(engine, monkeypatch)
    wanted = served(engines["v1", "cpu"], IN_GRAPHS)
    assert_alike(wanted, served(engine, IN_GRAPHS), IN_GRAPHS)
    assert 4 in replayed


def test_arrays_are_filled_once_a_step_whatever_the_groups(engines, counted):  # noqa: F811
    engine = engines["v2", "gpu"]
    served(engine, [("snapkv:budget=0.3,window=8", 100)])
    decoded = next(step for step in reversed(counted.steps) if step["layer"][0])
    assert decoded["layer"][0] == ["_attend_kernel"] * 3
    assert decoded["batch"][0] == ["_cut_kernel"] and decoded["batch"][1] == ["ge", "sub", "where"]


def test_the_warm_up_compacts_blocks_of_every_group_and_leaves_nothing_behind(engines, monkeypatch):
    engine = engines["v2", "gpu"]
    # Attention is warmed up as with one group.
    monkeypatch.setattr(type(engine.worker.builders[0]), "warm_up", lambda self, modules: None)
    for job in warm_up(engine):
        (one, other), tokens = map(set, job.raw), job.num_tokens
        assert len(one) == len(other) == -(-tokens // engine.manager.block_size) and not one & other
