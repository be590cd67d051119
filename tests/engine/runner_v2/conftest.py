"""Model Runner V2 and Triton kernels on the CPU, interpreted; started by `../test_runner_v2.py`.

vLLM believes in Triton once a driver for "cpu" says that it is active; the interpreter then runs every
kernel, vLLM's and ours. The GPU worker is reached by putting it in the place of the CPU's.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.backends
    from interpreter import hasten

    hasten()
    triton.backends.backends["cpu"] = SimpleNamespace(
        driver=SimpleNamespace(is_active=lambda: True), compiler=None
    )
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # vLLM asks, to choose a tile size
else:
    collect_ignore_glob = ["*.py"]
sys.path.insert(0, str(Path(__file__).parents[1]))  # the harness

CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
STOCK_BACKEND = "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A random Llama: 2 layers, 2 KV heads, groups of 2, head size 32."""
    from drawn import draw_scorer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,  # as it is by default, attention would be all but uniform
    )
    path = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(path)
    draw_scorer(path, config, 2, 2, 32)
    return path


@pytest.fixture(scope="session")
def tiny_that_reads(tiny, tmp_path_factory) -> Path:
    """The same with a tokenizer, of a token for each byte."""
    from shutil import copytree

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: 3 + i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path = copytree(tiny, tmp_path_factory.mktemp("tiny") / "reads")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def start_engine():
    """`start_engine(model, runner, backend, asynchronous=False, **options)`.

    The runner is "v1" or "v2", the backend "cpu", "gpu" (ours) or "stock gpu". vLLM switches asynchronous
    scheduling off on CPUs, but it runs there.
    """
    from harness import Engine, start
    from vllm import envs
    from vllm.distributed import parallel_state
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_kvcompress import plugin
    from vllm_kvcompress.worker.worker import backend_overrides

    def make(model: Path, runner: str, backend: str, asynchronous: bool = False, **options) -> Engine:
        envs.disable_envs_cache()
        if parallel_state._EP is None:  # an engine before had no experts, for which ranks are grouped too
            parallel_state._EP = parallel_state._TP
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_USE_V2_MODEL_RUNNER", {"v1": "0", "v2": "1"}[runner])
            if backend == "gpu":
                patch.setitem(plugin._WORKERS, CPU_WORKER, "interpreted_worker.InterpretedWorker")
            if asynchronous:
                _schedule_asynchronously(patch)
            stock = {AttentionBackendEnum.CPU_ATTN: STOCK_BACKEND} if backend == "stock gpu" else {}
            with backend_overrides(stock):
                engine = Engine(start(model, **options))
        assert engine.worker.use_v2_model_runner == (runner == "v2")
        assert (type(engine.scheduler).__name__ == "AsyncCompressionScheduler") == asynchronous
        if backend != "cpu":  # vLLM's kernel in one part, not in 16: each costs the interpreter as much
            for group in (group for groups in engine.worker.model_runner.attn_groups for group in groups):
                group.get_metadata_builder(0).seq_threshold_3D = 0
        return engine

    return make


def _schedule_asynchronously(patch: pytest.MonkeyPatch) -> None:
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config.__func__

    def update_but_stay_asynchronous(cls, vllm_config):
        update(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    patch.setattr(CpuPlatform, "check_and_update_config", classmethod(update_but_stay_asynchronous))
