"""Compacted prefixes that an engine of the harness keeps."""

from copy import copy

from harness import Engine, sampling

from vllm_kvcompress import save_prefix


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
    engine.run(range(2, 9), sampling(1, "off"))  # the worker hears of it
    assert not engine.worker.compression.prefixes


def from_token(output, begin: int):
    """An output without its first tokens."""
    output = copy(output)
    sample = copy(output.outputs[0])
    sample.token_ids, sample.logprobs = list(sample.token_ids)[begin:], sample.logprobs[begin:]
    output.outputs = [sample]
    return output
