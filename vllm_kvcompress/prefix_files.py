"""Compacted prefixes that outlive their engine: saved to files, and loaded again."""

import hashlib
from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.requests import saved

logger = init_logger("vllm.kv_compression")  # under the name whose messages vLLM shows
ENDING = ".safetensors"


def save(core: EngineCore, name: str, salt: str | None = None, path: str | None = None) -> str | None:
    """Write a prefix to a file, of several workers to one each.

    Args:
        core: in which it is.
        name: its name.
        salt: its salt.
        path: the file; None for one in the engine's own folder (`prefix_folder`).

    Returns:
        What is in the way, in one line; None if nothing is.
    """
    scheduler = core.scheduler
    try:
        prefix, names = scheduler.prefix_to_save(name, salt)
    except KVCompressionError as error:
        return str(error)
    path = path or str(_in_folder(core, name, salt))
    tail, about = [block.block_id for block in prefix.tail], scheduler.describe_prefix(prefix)
    args = path, names, tail, prefix.tokens, about
    return next(filter(None, core.collective_rpc("kv_compression_save", args=args)), None)


def load(core: EngineCore, path: str) -> str | None:
    """Load what `save` wrote, under its name.

    Returns:
        What is in the way, in one line; None if nothing is.
    """
    scheduler, parallel = core.scheduler, core.vllm_config.parallel_config
    if core.request_block_hasher is None:
        return "compacted prefixes need prefix caching; start the server without --no-enable-prefix-caching"
    first = saved.path_of(path, 0, parallel.world_size)
    try:
        found = saved.read(first, ("tokens",))
        about, tokens = dict(found.about), found.tensors["tokens"].tolist()
        config = KVCompressionConfig.parse(about["config"])
        own = isinstance(about["name"], str) and config.prefix == about["name"]
        if not own or len(tokens) % about["block_size"] or not 0 < about["boundary"] <= len(tokens):
            return f"{first} is damaged: its description is not what it should be"
    except ValueError as error:  # also of options that this version has not
        return str(error)
    except (KeyError, TypeError):
        return f"{first} is damaged: its description is not what it should be"
    if about["block_size"] != scheduler.compacting_manager.block_size:
        return f"{first} is of blocks of {about['block_size']} tokens; use --block-size {about['block_size']}"
    prefix_id = scheduler.new_prefix_id()
    problem = next(filter(None, core.collective_rpc("kv_compression_read", args=(path, prefix_id))), None)
    if problem is None:
        request = Request(
            prefix_id,
            tokens,
            SamplingParams(max_tokens=1),
            None,
            cache_salt=about["salt"],
            block_hasher=core.request_block_hasher,
        )
        try:
            scheduler.load_prefix(about, request, prefix_id)
        except KVCompressionError as error:
            problem = str(error)
    if problem is not None:
        core.collective_rpc("kv_compression_unread", args=(prefix_id,))
    return problem


def load_folder(core: EngineCore) -> None:
    """Load what an engine before has left in `prefix_folder`; what cannot be loaded the log says."""
    if not core.scheduler.compression.prefix_folder:
        return
    ending = saved.path_of(ENDING, 0, core.vllm_config.parallel_config.world_size)
    for file in sorted(_folder(core).glob(f"*{ending}")):
        path = str(file).removesuffix(ending) + ENDING
        if (problem := load(core, path)) is not None:
            logger.warning("kv-compression: a prefix was not loaded: %s", problem)
        else:
            logger.info("kv-compression: loaded the prefix in %s", path)


def remove(core: EngineCore, name: str, salt: str | None) -> None:
    """Remove what the engine's own folder has of a prefix, if anything."""
    if core.scheduler.compression.prefix_folder:
        world_size = core.vllm_config.parallel_config.world_size
        for rank in range(world_size):
            path = saved.path_of(str(_in_folder(core, name, salt)), rank, world_size)
            Path(path).unlink(missing_ok=True)


def save_prefix(llm: Any, name: str, path: str | Path, *, cache_salt: str | None = None) -> None:
    """Write a compacted prefix of an `LLM` to a file, of several workers to one each beside it.

    Args:
        llm: vLLM's `LLM`, which compresses.
        name: the prefix's name.
        path: the file. It holds what the prompt was, and its salt, in plain numbers.
        cache_salt: its salt.

    Raises:
        KVCompressionError: there is no such prefix, or the file cannot be written; one line.
    """
    _refuse(_call(llm, "kv_compression_save_prefix", name, cache_salt, str(path)))


def load_prefix(llm: Any, path: str | Path) -> None:
    """Load what `save_prefix` wrote, under its name and salt.

    Args:
        llm: vLLM's `LLM`, with the same model, ranks, block size and KV cache dtype.
        path: the file.

    Raises:
        KVCompressionError: it is no such file, or of another model; there is no room, or the name is taken;
            one line.
    """
    _refuse(_call(llm, "kv_compression_load_prefix", str(path)))


def _folder(core: EngineCore) -> Path:
    parallel = core.vllm_config.parallel_config
    folder = Path(core.scheduler.compression.prefix_folder).expanduser()
    return folder / str(parallel.data_parallel_index) if parallel.data_parallel_size > 1 else folder


def _in_folder(core: EngineCore, name: str, salt: str | None) -> Path:
    folder = _folder(core)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / (hashlib.sha256(repr((name, salt)).encode()).hexdigest()[:32] + ENDING)


def _call(llm: Any, method: str, *args: Any) -> Any:
    client = llm.llm_engine.engine_core
    core = getattr(client, "engine_core", None)  # of an engine in this process
    return getattr(core, method)(*args) if core is not None else client.call_utility(method, *args)


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise KVCompressionError(problem)
