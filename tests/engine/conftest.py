"""Engines shared by the tests of a process, by configuration."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def nothing_compiled():
    """vLLM compiles a piece of its sampler for every new batch shape, 10 s each."""
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="session", autouse=True)
def models_looked_at_here():
    """vLLM has a new process look at every model class that it meets, 7 s each, lest CUDA be initialised."""
    from vllm.model_executor.models import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda look: look())
        yield


@pytest.fixture(scope="session", autouse=True)
def started_soon():
    """At each start vLLM copies the tokenizer, for other threads, of which there are none here, and looks
    through all modules to put the same kernels for CPUs in their places again: four fifths of a start."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.renderers import hf

    once = functools.cache(CpuPlatform.register_triton_kernel_overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "register_triton_kernel_overrides", staticmethod(once))
        patch.setattr(hf, "maybe_make_thread_pool", lambda tokenizer, copies: tokenizer)
        yield


@pytest.fixture(scope="module", autouse=True)
def short_vectors_lose_little():
    """A random model's keys and values have no direction that matters more, and no head would shorten any."""
    from vllm_kvcompress.formats import MixedDim
    from vllm_kvcompress.policies.mixed_dim import MixedDimKV

    losses = MixedDimKV.losses

    def smaller(self, observation, bases):
        lost = losses(self, observation, bases)
        for rank in range(len(bases)):
            lost[rank] = lost[-1] * 0.2 * (rank + 1)
        return lost

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            MixedDim,
            "errors",
            lambda self, keys, *_: keys.new_tensor([[0.0], [0.2], [0.4]]).expand(-1, len(keys)),
        )
        patch.setattr(MixedDimKV, "losses", smaller)
        yield


@pytest.fixture(scope="session")
def engines(nothing_compiled, models_looked_at_here, started_soon) -> Callable:
    """`engines(model, compression=None, **options)`: the process's engine of that configuration.

    Stock without a compression, in its string form.
    """
    from harness import Engine, start

    started: dict[str, Engine] = {}

    def get(model: Path, compression: str | None = None, **options) -> Engine:
        from vllm.distributed import parallel_state

        if parallel_state._EP is None:  # an engine before had no experts, for which ranks are grouped too
            parallel_state._EP = parallel_state._TP
        key = repr((model, compression, sorted(options.items())))
        if key not in started:
            ours = {} if compression is None else {"additional_config": {"kv_compression": compression}}
            started[key] = Engine(start(model, **options, **ours))
        return started[key]

    return get


@pytest.fixture(scope="session")
def shared_engine(engines, random_model):
    """SnapKV at budget 0.25 unless a request asks for something else."""
    return engines(random_model, "snapkv:budget=0.25")


@pytest.fixture(scope="session")
def stock(engines, random_model, shared_engine):
    """vLLM as it is without configuration, made after an engine with compression in the same process."""
    return engines(random_model)


@pytest.fixture
def attachments(sharing):
    """The requests that attach to a prefix of `sharing`, a module's engine, and to how many blocks."""
    attached, plain = [], sharing.scheduler._attaching.attach

    def noted(request, hit):
        attached.append((request.request_id.rpartition("-")[0], len(hit.blocks[0])))
        return plain(request, hit)

    sharing.scheduler._attaching.attach = noted
    yield attached
    sharing.scheduler._attaching.attach = plain


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
