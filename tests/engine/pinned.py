"""Compacted prefixes that an engine of the harness keeps."""

from copy import copy

from harness import Engine, exact, sampling
from torch import Tensor

from vllm_kvcompress import load_prefix, save_prefix


def pin(engine: Engine, prompt, compression: str, name="document", max_tokens=2, **options):
    """Have a prompt's compaction kept under a name: the prefix, and the output of its request."""
    separator = "," if ":" in compression else ":"
    output = engine.run(prompt, sampling(max_tokens, f"{compression}{separator}prefix={name}", **options))
    prefix = engine.scheduler._prefixes.named(name, None)
    assert prefix is not None
    return prefix, output


def save_and_drop(engine: Engine, path, name="document") -> None:
    """Have a file alone of a prefix."""
    save_prefix(engine.llm, name, path)
    engine.scheduler._prefixes.drop(engine.scheduler._prefixes.named(name, None))
    engine.run(range(2, 9), sampling(1, "off", detokenize=False))  # the worker hears of it
    assert not engine.worker.compression.prefixes


def overwrite(engine: Engine) -> None:
    """As if all of the pool had been taken by others."""
    engine.forget_prefixes()
    for layer in engine.worker.compilation_config.static_forward_context.values():
        caches = getattr(layer, "kv_cache", ())
        for cache in [caches] if isinstance(caches, Tensor) else caches:
            cache.fill_(7)


def check_saved(engine: Engine, document: list[int], method: str, path) -> None:
    """Who goes on from a prefix that was saved and loaded answers as before, to the last bit."""
    prompt, params = document + document[:9], sampling(4, method, detokenize=False)
    pin(engine, document, method, detokenize=False)
    expected = engine.run(prompt, params)
    save_and_drop(engine, path)
    overwrite(engine)
    load_prefix(engine.llm, path)
    (prefix,) = engine.scheduler._prefixes
    assert exact(engine.run(prompt, params)) == exact(expected) and prefix.hits == 1
    engine.scheduler._prefixes.drop(prefix)
    engine.check_accounts(), engine.check_nothing_left()


def from_token(output, begin: int):
    """An output without its first tokens."""
    output = copy(output)
    sample = copy(output.outputs[0])
    sample.token_ids, sample.logprobs = list(sample.token_ids)[begin:], sample.logprobs[begin:]
    output.outputs = [sample]
    return output
