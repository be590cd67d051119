"""What a step of Runner V2 launches and computes for compression, whatever the layers and the requests."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from harness import sampling
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from vllm_kvcompress.attention.gpu import CompressedBatch, CompressedMetadataBuilder, RowArrays
from vllm_kvcompress.worker.worker import CompressionWorker

OPTIONS = dict(
    skip_tokenizer_init=True,
    max_model_len=128,
    max_num_batched_tokens=384,
    max_num_seqs=4,
    num_gpu_blocks_override=40,
    additional_config={"kv_compression": "snapkv:budget=0.3,window=8"},
)
JOBS = [
    *("_window_kernel", "_log_sum_kernel", "_window_kernel", "_pool_kernel", "_rank_kernel"),
    *("_whole_pages_kernel", "_select_kernel", "_copy_kernel"),
]
NO_LAUNCH = {"empty", "empty_like", "detach_"}


class Counted(TorchDispatchMode):
    """Triton's launches by name, and PyTorch's operations, of what is done for compression in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: str | None = None
        self.steps: list[dict] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if self.inside and not function.is_view and name not in NO_LAUNCH:
            self.steps[-1][self.inside][1].append(name)
        return function(*args, **(kwargs or {}))

    @contextmanager
    def within(self, part: str | None) -> Iterator[None]:
        before, self.inside = self.inside, part
        try:
            yield
        finally:
            self.inside = before


@pytest.fixture
def counted(monkeypatch):
    found = Counted()

    def note(owner, name, part):
        inner = getattr(owner, name)

        def noting(self, *args, **kwargs):
            with found.within(part), found:
                return inner(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, noting)

    def begin(self, *args, **kwargs):
        found.steps.append({part: ([], []) for part in ("jobs", "batch", "layer")})
        return execute(self, *args, **kwargs)

    def launch(self, *args, **kwargs):
        if found.inside:
            found.steps[-1][found.inside][0].append(self.fn.__name__)
        with found.within(None):  # what interpreting takes is no part of it
            return run(self, *args, **kwargs)

    execute, run = CompressionWorker._execute, GridExecutor.__call__
    monkeypatch.setattr(CompressionWorker, "_execute", begin)
    monkeypatch.setattr(GridExecutor, "__call__", launch)
    note(CompressionWorker, "_run_jobs", "jobs")
    note(CompressedMetadataBuilder, "_batch", "batch")
    note(RowArrays, "update_seq_lens", "batch")
    note(CompressedBatch, "apply", "layer")
    return found


def deeper(path, layers):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(hidden_size=128, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(vocab_size=320, num_hidden_layers=layers, max_position_embeddings=2048, **shape)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_launches_grow_with_neither_and_operations_with_requests_alone(tmp_path, start_engine, counted):
    found = {}
    for layers in (1, 3):
        engine = start_engine(deeper(tmp_path / f"{layers}", layers), "v2", "gpu", **OPTIONS)
        for requests in (1, 3):
            engine.forget_prefixes(), counted.steps.clear()
            prompts = [torch.randint(3, 300, (80,)).tolist() for _ in range(requests)]
            engine.run_all([(ids, sampling(3, detokenize=False)) for ids in prompts])
            (step,) = (step for step in counted.steps if step["jobs"][0])
            decoded = counted.steps[-1] if counted.steps[-1]["layer"][0] else counted.steps[-2]
            assert step["jobs"][0] == JOBS
            assert decoded["batch"][0] == ["_cut_kernel"]
            assert decoded["layer"][0] == ["_attend_kernel"] * layers
            found[layers, requests] = {
                "jobs": len(step["jobs"][1]),
                "batch": decoded["batch"][1],
                "layer": decoded["layer"][1],
            }
    assert found[1, 1] == found[3, 1] and found[1, 3] == found[3, 3]
    one, three = found[3, 1], found[3, 3]
    assert one["jobs"] <= 36 and three["jobs"] <= one["jobs"] + 2 * 27
    assert one["batch"] == three["batch"] == ["ge", "sub", "where"] and one["layer"] == three["layer"] == []
