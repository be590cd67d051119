"""Compacted prefixes in files: the bytes of their pages, and what is needed to read them."""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.requests.cache import PagedCache
from vllm_kvcompress.requests.tables import Records, RequestTable

VERSION = 1
MARK = "kvcompress_prefix"  # of the description in a file's header
COPIED_BYTES = 64 * 2**20  # at a time, from a device
PROBED = 16  # numbers of each weight that tell models apart


def path_of(path: str, rank: int, num_ranks: int) -> str:
    """Where one of several workers has its part."""
    return path if num_ranks == 1 else f"{path}.{rank}-of-{num_ranks}"


def fingerprint(model: torch.nn.Module, cache: PagedCache) -> str:
    """Of the numbers that a prefix's pages are worth something with: a model's weights and how pages lie."""
    told = hashlib.sha256()
    grid = cache.grid
    shape = grid.num_layers, grid.num_heads, grid.block_size, cache.head_size, cache.content.shape[1]
    told.update(json.dumps([type(cache).__name__, *shape]).encode())
    for order in cache.packed_orders:
        told.update(order.cpu().numpy().tobytes())
    for name, weight in model.named_parameters():
        some = weight.detach().flatten()
        some = some[:: max(1, len(some) // PROBED)].float().cpu()
        told.update(name.encode() + some.numpy().tobytes())
    return told.hexdigest()[:32]


@dataclass(frozen=True)
class Saved:
    """A prefix, as one worker has it.

    Attributes:
        about: what the scheduler knows of it, and `fingerprint`.
        tensors: `tokens` `[T]` int64, those that it stands for; `compacted` and `tail` `[pages, page_bytes]`
            uint8, in the order of `PageGrid.linear_pages` and `positional_pages`; `counts` `[L, H]` int64; of
            some `positions`, `records` and `first` (see `RequestTable`, `Records`).
    """

    about: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def table(self, cache: PagedCache, destination: Tensor) -> RequestTable:
        """What it is in these blocks `[n]` int64, on the cache's device."""
        tensors = {name: each.to(cache.device) for name, each in self.tensors.items() if name in _OF_TABLE}
        records = None
        if (format := KVCompressionConfig.parse(self.about["config"]).record_format) is not None:
            per_page = tuple(cache.records_per_page(part) for part in format.parts)
            records = Records(format, tensors["records"], tensors["first"], per_page)
        counts, positions = tensors["counts"], tensors.get("positions")
        return RequestTable(cache.grid, destination, counts, self.about["boundary"], positions, records)

    def put(self, cache: PagedCache, destination: Tensor, tail: Tensor) -> None:
        """Write its pages into blocks, `[n]` and `[m]` int64."""
        for pages, name in _places(cache, destination, tail):
            cache.content[pages] = self.tensors[name].to(cache.device)


_OF_TABLE = {"counts", "positions", "records", "first"}


def _places(cache: PagedCache, destination: Tensor, tail: Tensor) -> list[tuple[Tensor, str]]:
    grid = cache.grid
    return [
        (grid.linear_pages(destination), "compacted"),
        (grid.positional_pages(tail).flatten(), "tail"),
    ]


def copied(cache: PagedCache, table: RequestTable, tail: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """A prefix in the host's memory, of as many bytes as its pages; a device needs `COPIED_BYTES` for it.

    Args:
        cache: where its pages are.
        table: what it is.
        tail: `[m]` int64, its raw blocks.
        tokens: `[T]` int64, of which it is.

    Returns:
        The tensors of `Saved`.
    """
    tensors = {"tokens": tokens, "counts": table.counts}
    if table.positions is not None:
        tensors["positions"] = table.positions
    if table.records is not None:
        tensors |= {"records": table.records.counts, "first": table.records.first}
    tensors = {name: each.cpu().clone().contiguous() for name, each in tensors.items()}
    num_bytes = cache.content.shape[1]
    for pages, name in _places(cache, table.destination, tail):
        found = torch.empty((len(pages), num_bytes), dtype=cache.content.dtype)
        for begin in range(0, len(pages), max(1, COPIED_BYTES // num_bytes)):
            part = pages[begin : begin + max(1, COPIED_BYTES // num_bytes)]
            found[begin : begin + len(part)] = cache.content[part].cpu()
        tensors[name] = found
    return tensors


def write(path: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Path:
    """Write what `read` reads beside a file, for its owner's eyes alone: it may tell what the prompt was.

    Args:
        path: the file, whose name the caller gives it once it is to appear.
        tensors: what was `copied`.
        about: plain values, see `Saved`.

    Returns:
        What was written, which is on the disk.

    Raises:
        OSError, SafetensorError: it cannot be written; nothing of it is left.
    """
    place = Path(path)
    unfinished = place.with_name(f"{unfinished_name(place.name)}{os.getpid()}")
    os.close(os.open(unfinished, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600))
    try:
        save_file(dict(tensors), unfinished, {MARK: json.dumps({"version": VERSION, **about})})
        unfinished.chmod(0o600)
        _sync(unfinished)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return unfinished


def unfinished_name(name: str) -> str:
    """How the names begin of files that were to become one of this name."""
    return f".{name}.unfinished-"


def publish(unfinished: Path, path: str) -> None:
    """Have what was written appear under its name, at once and for good.

    Raises:
        OSError: it cannot.
    """
    unfinished.replace(path)
    _sync(Path(path).parent)


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def read(path: str, only: Collection[str] | None = None) -> Saved:
    """Read what `write` wrote.

    Args:
        path: the file.
        only: names of the tensors that are wanted; None for all.

    Raises:
        ValueError: there is no such file, or it is not one that this version reads; one line.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[MARK])
            if about["version"] != VERSION:
                raise ValueError(
                    f"{path} has version {about['version']!r}, and this package reads version {VERSION}"
                )
            names = [name for name in file.keys() if only is None or name in only]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except (SafetensorError, json.JSONDecodeError, TypeError, KeyError):
        raise ValueError(f"{path} is not a compacted prefix, or it is damaged") from None
    return Saved(about, tensors)


def check(saved: Saved, cache: PagedCache, fingerprint: str, path: str) -> None:
    """Refuse what would not be read as it was written.

    Raises:
        ValueError: it is of another model or cache, or damaged; one line.
    """
    if saved.about.get("fingerprint") != fingerprint:
        raise ValueError(
            f"{path} is of another model, or of one that was started with other weights, ranks, "
            "--block-size or KV cache dtype"
        )
    grid, about = cache.grid, saved.about
    try:
        num_kept, num_source = int(about["kept_blocks"]), int(about["boundary"]) // grid.block_size
        num_tail = len(saved.tensors["tokens"]) // grid.block_size - num_source
        heads, page_bytes = (grid.num_layers, grid.num_heads), cache.content.shape[1]
        shapes: dict[str, tuple[int, ...]] = {
            "compacted": (num_kept * grid.pages_per_block, page_bytes),
            "tail": (num_tail * grid.pages_per_block, page_bytes),
            "counts": heads,
        }
        if (format := KVCompressionConfig.parse(about["config"]).record_format) is not None:
            shapes |= dict.fromkeys(("records", "first"), (len(format.parts), *heads))
        fits = all(tuple(saved.tensors[name].shape) == shape for name, shape in shapes.items())
        fits &= 0 <= int(saved.tensors["counts"].min()) and num_tail >= 0
        fits &= int(saved.tensors["counts"].sum()) <= shapes["compacted"][0]
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"{path} is damaged: its tensors are not what they should be")
