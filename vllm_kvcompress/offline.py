"""Compacted prefixes of an `LLM`, in the program that has it."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm import LLM
from vllm.exceptions import VLLMClientError
from vllm.lora.request import LoRARequest
from vllm.utils import random_uuid
from vllm.v1.engine.core_client import InprocClient

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.paging.statistics import CARRIER
from vllm_kvcompress.prefix_requests import SAVE, SAVED, leaving, left_by, pauses


def compact_prefix(
    llm: LLM,
    prompt: str | Sequence[int] | dict[str, Any],
    name: str,
    *,
    cache_salt: str | None = None,
    lora_request: LoRARequest | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Compact a prompt for later requests that begin with the same tokens.

    They attach to it if they have the same options, adapter and salt. It stays until `delete_prefix`.

    Args:
        llm: an engine with compression.
        prompt: text, token ids, or what else `llm.generate` takes.
        name: of 1 to 128 printable characters; no other prefix of this salt has it.
        cache_salt: as vLLM has it: nobody finds the prefix without it.
        lora_request: the adapter with which the prompt is computed.
        options: of `kv_compression`, in place of the engine's, e.g. `method="kvzip", budget=0.25`.

    Returns:
        Its description, see `PrefixState`.

    Raises:
        KVCompressionError: nothing was kept; the reason, in one line.
    """
    if isinstance(prompt, str):
        given: dict[str, Any] = {"prompt": prompt}
    else:
        given = dict(prompt) if isinstance(prompt, dict) else {"prompt_token_ids": list(prompt)}
    if cache_salt is not None:
        given["cache_salt"] = cache_salt
    params = leaving(KVCompressionConfig.with_prefix(options, name))
    try:
        (output,) = llm.generate(given, params, lora_request=lora_request, use_tqdm=False)
    except (VLLMClientError, ValueError) as error:
        raise KVCompressionError(str(error.args[0]).splitlines()[0]) from None
    told = left_by(output)
    if not told.pop("kept"):
        raise KVCompressionError(f"the prefix {name!r} was not kept: {told['reason']}")
    _save(llm, name, cache_salt)
    return told


def list_prefixes(llm: LLM, cache_salt: str | None = None) -> list[dict[str, Any]]:
    """Descriptions of the compacted prefixes under a salt, those that have a name first; see `PrefixState`.

    Raises:
        KVCompressionError: the engine runs without compression.
    """
    return _ask(llm, "kv_compression_prefixes", cache_salt)


def delete_prefix(llm: LLM, name: str, cache_salt: str | None = None) -> bool:
    """Keep a compacted prefix no longer; False if there is none of this name under this salt.

    Raises:
        KVCompressionError: the engine runs without compression.
    """
    return _ask(llm, "kv_compression_delete_prefix", name, cache_salt)


def save_prefix(llm: LLM, name: str, path: str | Path, *, cache_salt: str | None = None) -> None:
    """Write a compacted prefix to a file, of several workers to one each beside it.

    Args:
        llm: the engine that has it.
        name: its name.
        path: the file. It holds what the prompt was, and its salt, in plain numbers.
        cache_salt: its salt.

    Raises:
        KVCompressionError: there is no such prefix, or the file cannot be written; one line.
    """
    _save(llm, name, cache_salt, str(path))


def load_prefix(llm: LLM, path: str | Path) -> None:
    """Load what `save_prefix` wrote, under its name and salt.

    Args:
        llm: an engine with the same model, ranks, block size and KV cache dtype.
        path: the file.

    Raises:
        KVCompressionError: it is no such file, or of another model; there is no room, or the name is taken;
            one line.
    """
    _refuse(_ask(llm, "kv_compression_load_prefix", str(path)))


def _save(llm: LLM, *args: str | None) -> None:
    """Have a prefix saved, and wait for that."""
    ticket = random_uuid()
    _ask(llm, SAVE, ticket, *args)
    for pause in pauses():
        ended, problem = _ask(llm, SAVED, ticket)
        if ended:
            return _refuse(problem)
        time.sleep(pause)


def _ask(llm: LLM, method: str, *args: str | None) -> Any:
    engine = llm.llm_engine
    requested = (engine.vllm_config.additional_config or {}).get(CARRIER, "off")
    if not KVCompressionConfig.parse(requested).enabled:
        raise KVCompressionError("this engine runs without kv_compression; start it with a method")
    client = engine.engine_core
    if isinstance(client, InprocClient):
        return getattr(client.engine_core, method)(*args)
    return client.call_utility(method, *args)


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise KVCompressionError(problem)
