"""Compacted prefixes that outlive their engine: an engine core saves them to files, and loads them again."""

import hashlib
from pathlib import Path

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
        path: the file; None for one in the engine's own folder (`prefix_folder`), if it has one.

    Returns:
        What is in the way, in one line; None if nothing is.
    """
    scheduler = core.scheduler
    if path is None and not (scheduler.compression.prefix_folder and scheduler.has_prefix(name, salt)):
        return None
    try:
        prefix, names = scheduler.leaving.to_save(name, salt)
    except KVCompressionError as error:
        return str(error)
    path = path or str(_in_folder(core, name, salt))
    tail, about = [block.block_id for block in prefix.tail], scheduler.leaving.describe(prefix)
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
        own = config.prefix == about["name"] and isinstance(about["salt"], str | None)
        own = own and isinstance(about["kept"], float | None) and isinstance(about["kept_blocks"], int)
        if (
            config.prefix is None
            or not own
            or len(tokens) % about["block_size"]
            or not 0 < about["boundary"] <= len(tokens)
        ):
            return f"{first} is damaged: its description is not what it should be"
    except ValueError as error:  # also of options that this version has not
        return str(error)
    except (KeyError, TypeError):
        return f"{first} is damaged: its description is not what it should be"
    if about["block_size"] != scheduler.compacting_manager.block_size:
        return f"{first} is of blocks of {about['block_size']} tokens; use --block-size {about['block_size']}"
    prefix_id = scheduler.leaving.new_id()
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
            scheduler.leaving.load(about, request, prefix_id)
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
    world_size = core.vllm_config.parallel_config.world_size
    for rank in range(world_size):
        path = saved.path_of(str(_in_folder(core, name, salt)), rank, world_size)
        Path(path).unlink(missing_ok=True)


def _folder(core: EngineCore) -> Path:
    """Of several data-parallel engines each has one of its own, the first the one that was given."""
    folder = Path(core.scheduler.compression.prefix_folder).expanduser()
    index = core.vllm_config.parallel_config.data_parallel_index
    return folder / str(index) if index else folder


def _in_folder(core: EngineCore, name: str, salt: str | None) -> Path:
    folder = _folder(core)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / (hashlib.sha256(repr((name, salt)).encode()).hexdigest()[:32] + ENDING)
