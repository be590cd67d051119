"""Compacted prefixes in files: the bytes of their pages, and what is needed to read them."""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.requests.beside import Beside
from vllm_kvcompress.requests.cache import PagedCache
from vllm_kvcompress.requests.tables import Records, RequestTable

VERSION = 1
MARK = "kvcompress_prefix"  # of the description in a file's header
COPIED_BYTES = 64 * 2**20  # at a time, from a device
PROBED = 16  # numbers of each weight that tell models apart
Place = tuple[str, Tensor, Tensor]  # a name, rows `[X, ...]`, and which of these, int64


def path_of(path: str, rank: int, num_ranks: int) -> str:
    """Where one of several workers has its part."""
    return path if num_ranks == 1 else f"{path}.{rank}-of-{num_ranks}"


def fingerprint(model: torch.nn.Module, cache: PagedCache, beside: Sequence[Beside] = ()) -> str:
    """Of the numbers with which a prefix's blocks are worth something: a model's weights, how blocks lie."""
    told = hashlib.sha256()
    grid = cache.grid
    shape = grid.num_layers, grid.num_heads, grid.block_size, cache.head_size, cache.content.shape[1]
    told.update(json.dumps([type(cache).__name__, *shape, *grid.groups, *grid.slots]).encode())
    for order in cache.packed_orders:
        told.update(order.cpu().numpy().tobytes())
    for group in beside:
        told.update(group.layout.encode())
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
            some `positions`, `records` and `first` (see `RequestTable`, `Records`); and what each cache of
            `Beside` has in the blocks that its layers see behind the end, by its name.
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

    def num_blocks(self, cache: PagedCache) -> int:
        """Compacted blocks of which there are pages: with a threshold, fewer than the scheduler counts in its
        own, larger ones."""
        return len(self.tensors["compacted"]) // cache.grid.pages_per_block

    def put(self, places: Iterable[Place]) -> None:
        """Write what it has into its places."""
        for name, rows, index in places:
            rows[index] = self.tensors[name].to(rows.device)


_OF_TABLE = {"counts", "positions", "records", "first"}


def places(
    cache: PagedCache,
    destination: Tensor,
    tails: Tensor,
    beside: Sequence[Beside],
    seen: Sequence[Sequence[int]],
) -> list[Place]:
    """Where a prefix is, or is to be.

    Args:
        cache: of the layers that are compacted.
        destination: `[n]` int64, its compacted blocks.
        tails: `[G, m]` int64, its raw blocks in each group that is compacted.
        beside: the other groups.
        seen: of each of these, block ids of what its layers see behind the end.
    """
    grid = cache.grid
    return [
        ("compacted", cache.content, grid.linear_pages(destination)),
        ("tail", cache.content, grid.positional_pages(tails).flatten()),
        *(place for group, blocks in zip(beside, seen, strict=True) for place in group.places(blocks)),
    ]


def copied(table: RequestTable, places: Iterable[Place], tokens: Tensor) -> dict[str, Tensor]:
    """A prefix in the host's memory, of as many bytes as its blocks; a device needs `COPIED_BYTES` for it.

    Args:
        table: what it is.
        places: where it is.
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
    for name, rows, index in places:
        at_once = max(1, COPIED_BYTES // rows[0].nbytes)
        found = torch.empty((len(index), *rows.shape[1:]), dtype=rows.dtype)
        for begin in range(0, len(index), at_once):
            part = index[begin : begin + at_once]
            found[begin : begin + len(part)] = rows[part].cpu()
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


def check(
    saved: Saved,
    cache: PagedCache,
    num_parts: int,
    beside: Sequence[Beside],
    num_seen: Sequence[int],
    fingerprint: str,
    path: str,
) -> None:
    """Refuse what would not be read as it was written.

    Args:
        saved: what was read.
        cache: that it is to be in.
        num_parts: of its blocks, in one of the destination as the scheduler counts.
        beside: the other groups.
        num_seen: of each of these, blocks that its layers see behind so many tokens.
        fingerprint: what it should be.
        path: the file.

    Raises:
        ValueError: it is of another model or cache, or damaged; one line.
    """
    if saved.about.get("fingerprint") != fingerprint:
        raise ValueError(
            f"{path} is of another model, or of one that was started with other weights, ranks, "
            "--block-size, cache groups or KV cache dtype"
        )
    try:
        fits = _fits(saved, cache, num_parts, beside, num_seen)
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"{path} is damaged: its tensors are not what they should be")


def _fits(
    saved: Saved, cache: PagedCache, num_parts: int, beside: Sequence[Beside], num_seen: Sequence[int]
) -> bool:
    """Whether tensors are what `Saved` says; arguments as of `check`."""
    grid, about, tensors, integer = cache.grid, saved.about, saved.tensors, torch.int64
    num_tail = (len(tensors["tokens"]) - int(about["boundary"])) // grid.block_size
    num_pages = saved.num_blocks(cache) * grid.pages_per_block
    heads, page_bytes = (grid.num_layers, grid.num_heads), cache.content.shape[1]
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "compacted": (torch.uint8, (num_pages, page_bytes)),
        "tail": (torch.uint8, (num_tail * grid.num_layers * grid.num_heads, page_bytes)),
        "counts": (integer, heads),
    }
    if (format := KVCompressionConfig.parse(about["config"]).record_format) is not None:
        expected |= dict.fromkeys(("records", "first"), (integer, (len(format.parts), *heads)))
    for group, number in zip(beside, num_seen, strict=True):
        for name, rows, index in group.places(range(number)):
            expected[name] = rows.dtype, (len(index), *rows.shape[1:])
    counts = tensors["counts"]
    return (
        num_tail >= 0
        and saved.num_blocks(cache) <= int(about["kept_blocks"]) * num_parts
        and all((tensors[name].dtype, tuple(tensors[name].shape)) == own for name, own in expected.items())
        and 0 <= int(counts.min())
        and int(counts.sum()) <= num_pages
    )


def check_same(saved: Saved, about: Mapping[str, Any], tokens: Sequence[int], path: str) -> None:
    """Refuse the part of a worker that is not of the prefix which the first worker's part is of.

    Raises:
        ValueError: it is of another one, as where not all of them could be written; one line.
    """
    if {**saved.about, "fingerprint": None} != {**about, "fingerprint": None} or (
        saved.tensors["tokens"].tolist() != list(tokens)
    ):
        raise ValueError(f"{path} is of another prefix than the first worker's file; save it again")
