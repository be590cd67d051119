"""Compacted prefixes that outlive their engine: an engine core saves them to files, and loads them again."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from vllm.sampling_params import SamplingParams
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.log import logger
from vllm_kvcompress.requests import saved

ENDING = ".safetensors"
MOST_ENDED = 64  # saves whose outcome is remembered


@dataclass
class _Save:
    """One that was asked for; see `Saves.begin`."""

    ticket: str
    name: str
    salt: str | None
    path: str
    in_folder: bool


class Saves:
    """The saves of an engine core.

    One prefix at a time is copied to the host's memory and written from there, by each worker its part,
    beside the steps. The others wait for that, and hold nothing. They go on whenever somebody asks of one.
    """

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._waiting: list[_Save] = []
        self._writing: _Save | None = None
        self._ended: dict[str, str | None] = {}  # what was in the way, by ticket

    def begin(self, ticket: str, name: str, salt: str | None = None, path: str | None = None) -> None:
        """Write a prefix to a file, of several workers to one each.

        Args:
            ticket: under which is asked what has become of it.
            name: its name.
            salt: its salt.
            path: the file; None for one in the engine's own folder (`prefix_folder`), if it has one.
        """
        scheduler = self._core.scheduler
        if path is None and not (scheduler.compression.prefix_folder and scheduler.has_prefix(name, salt)):
            return self._end(ticket, None)
        own = path or str(_in_folder(self._core, name, salt))
        save = _Save(ticket, name, salt, own, path is None)
        try:
            if save.in_folder:
                Path(own).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return self._note(save, f"cannot write {own}: {error.strerror or error}")
        self._waiting.append(save)
        self._go_on()

    def outcome(self, ticket: str) -> tuple[bool, str | None]:
        """Whether a save has ended, and what was in its way, in one line."""
        self._go_on()
        ongoing = [*self._waiting, *([self._writing] if self._writing else ())]
        if any(each.ticket == ticket for each in ongoing):
            return False, None
        return True, self._ended.get(ticket, "nobody knows of it any more")

    def forget(self, name: str, salt: str | None) -> None:
        """Write nothing into the folder of a prefix that is deleted."""
        if self._writing is not None and self._is_of(self._writing, name, salt):
            self._core.collective_rpc("kv_compression_unsave", args=(self._writing.path,))
        for each in [each for each in self._waiting if self._is_of(each, name, salt)]:
            self._waiting.remove(each)
            self._end(each.ticket, "it was deleted meanwhile")

    @staticmethod
    def _is_of(save: _Save, name: str, salt: str | None) -> bool:
        return save.in_folder and (save.name, save.salt) == (name, salt)

    def _go_on(self) -> None:
        """Note that the one which is written has ended, if it has, and begin the next."""
        if self._writing is not None:
            outcomes = self._core.collective_rpc("kv_compression_saved")
            if not all(ended for ended, _ in outcomes):
                return
            save, self._writing = self._writing, None
            self._note(save, next((problem for _, problem in outcomes if problem is not None), None))
        while self._waiting and self._writing is None:
            save = self._waiting.pop(0)
            leaving = self._core.scheduler.leaving
            try:
                prefix, names = leaving.to_save(save.name, save.salt)
            except KVCompressionError as error:
                self._note(save, str(error))
                continue
            tails, seen = (
                [[block.block_id for block in row] for row in rows] for rows in (prefix.tails, prefix.beside)
            )
            args = save.path, names, tails, seen, prefix.tokens, leaving.describe(prefix)
            self._core.collective_rpc("kv_compression_save", args=args)
            self._writing = save

    def _note(self, save: _Save, problem: str | None) -> None:
        if problem is not None and save.in_folder:
            logger.warning("kv-compression: the prefix %r was not saved: %s", save.name, problem)
        self._end(save.ticket, problem)

    def _end(self, ticket: str, problem: str | None) -> None:
        self._ended[ticket] = problem
        while len(self._ended) > MOST_ENDED:  # whose clients have gone away
            del self._ended[next(iter(self._ended))]


def saves_of(core: EngineCore) -> Saves:
    """The saves of an engine core, which are made when they are first asked for."""
    if not hasattr(core, "kv_compression_saves"):
        core.kv_compression_saves = Saves(core)
    return core.kv_compression_saves


def load(core: EngineCore, path: str) -> str | None:
    """Load what was saved, under its name.

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
            or about["boundary"] % about["block_size"]
            or not 0 < about["boundary"] <= len(tokens)
        ):
            return f"{first} is damaged: its description is not what it should be"
    except ValueError as error:  # also of options that this version has not
        return str(error)
    except (KeyError, TypeError):
        return f"{first} is damaged: its description is not what it should be"
    if about["block_size"] != scheduler.compacting_manager.block_size:
        return f"{first} is of blocks of {about['block_size']} tokens; use --block-size {about['block_size']}"
    leaving = scheduler.leaving
    prefix_id = leaving.new_id()
    args = path, prefix_id, about, tokens, leaving.seen_blocks(len(tokens))
    problem = next(filter(None, core.collective_rpc("kv_compression_read", args=args)), None)
    if problem is None and len(tokens) % leaving.alignment:
        problem = f"{first} is damaged: it does not end with a block of every cache group"
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
            leaving.load(about, request, prefix_id)
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
    for file in _folder(core).glob(f"{saved.unfinished_name('*')}*"):  # of an engine that was killed
        file.unlink(missing_ok=True)
    for file in sorted(_folder(core).glob(f"[!.]*{ending}")):
        path = str(file).removesuffix(ending) + ENDING
        if (problem := load(core, path)) is not None:
            logger.warning("kv-compression: a prefix was not loaded: %s", problem)
        else:
            logger.info("kv-compression: loaded the prefix in %s", path)


def remove(core: EngineCore, name: str, salt: str | None) -> None:
    """Remove what the engine's own folder has of a prefix, if anything."""
    saves_of(core).forget(name, salt)
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
    return _folder(core) / (hashlib.sha256(repr((name, salt)).encode()).hexdigest()[:32] + ENDING)
