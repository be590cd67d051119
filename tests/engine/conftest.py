"""One engine with compression and one without, shared by the tests of this folder: a start takes 20 s."""

import os

import pytest

for _name, _value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(_name, _value)


@pytest.fixture(scope="package", autouse=True)
def nothing_compiled():
    """vLLM compiles a piece of its sampler for every new batch shape, 10 s each."""
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="package")
def shared_engine(smollm2):
    """SnapKV at budget 0.25 unless a request asks for something else."""
    from harness import Engine, start

    from vllm_kvcompress import KVCompressionConfig

    return Engine(start(smollm2, **KVCompressionConfig(method="snapkv", budget=0.25).engine_kwargs()))


@pytest.fixture(scope="package")
def stock(smollm2, shared_engine):
    """vLLM as it is without configuration, made after an engine with compression in the same process."""
    from harness import Engine, start

    return Engine(start(smollm2))


@pytest.fixture
def engine(shared_engine):
    """The shared engine with an empty prefix cache; afterwards nothing may be left in it."""
    shared_engine.forget_prefixes()
    shared_engine.sent.clear()
    shared_engine.compactions.clear()
    shared_engine.outputs.clear()
    free = shared_engine.free
    yield shared_engine
    shared_engine.check_nothing_left()
    assert shared_engine.free == free
