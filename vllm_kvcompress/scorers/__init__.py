"""Learned scorers: what a token of one model is worth, read off its cached key and value.

A scorer is a small safetensors file that `vllm-kvcompress calibrate MODEL --scorer` writes. Scorers that come
with the package are named after their model.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

VERSION = 1
FOLDER = Path(__file__).parent
BESIDE = "kv-compression/scorer.safetensors"  # in a checkpoint's folder, whose own files are its weights
MOST_BYTES = 1 << 30
TENSORS = ("up", "up_bias", "down", "down_bias")
# What of a model's configuration decides what its keys and values mean.
_FINGERPRINT = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
_ROTARY = ("rope_type", "rope_theta", "factor")  # other entries are filled in when a model is built


@dataclass(frozen=True, eq=False)
class Scorer:
    """A network of one hidden layer for every KV head: log score = gelu(x·up + up_bias)·down + down_bias.

    x is a token's key, its rotation undone, and its value: `[2D]`.

    Attributes:
        model: name of the model that it is for.
        fingerprint: of the model's configuration, see `fingerprint`.
        up: `[L, H, 2D, M]`.
        up_bias: `[L, H, M]`.
        down: `[L, H, M]`.
        down_bias: `[L, H]`.
        record: how it was trained.
    """

    model: str
    fingerprint: str
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """L, H and D."""
        layers, heads, size, _ = self.up.shape
        return layers, heads, size // 2

    def serves(self, config: Any) -> bool:
        """Whether it is for the model with this Hugging Face configuration (of its text part)."""
        return self.fingerprint == fingerprint(config)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Scorer":
        """The same with its tensors on a device, what is multiplied in a dtype."""
        tensors = {name: getattr(self, name).to(device) for name in TENSORS}
        return replace(self, **{name: t.to(dtype) if t.ndim > 2 else t for name, t in tensors.items()})

    def of(self, layers: Sequence[int], first_head: int, num_heads: int) -> tuple[Tensor, ...]:
        """The networks of some layers' heads, as of `log_scores`.

        Returns:
            `up [l·H', 2D, M]`, `up_bias [l·H', M]`, `down [l·H', M]` and `down_bias [l·H']`, contiguous.
        """
        own = slice(first_head, first_head + num_heads)
        consecutive = slice(layers[0], layers[0] + len(layers))  # makes a view
        some = consecutive if [*layers] == [*range(consecutive.start, consecutive.stop)] else [*layers]
        return tuple(getattr(self, name)[some, own].flatten(0, 1) for name in TENSORS)

    def log_scores(self, layers: Sequence[int], first_head: int, keys: Tensor, values: Tensor) -> Tensor:
        """What tokens are worth.

        Args:
            layers: the layers' numbers in the model.
            first_head: number of the first of the heads that are shown, among a layer's.
            keys: `[l·H', W, D]` without rotation, in the dtype to compute in, layer after layer.
            values: `[l·H', W, D]`, likewise.

        Returns:
            `[l·H', W]` float32.
        """
        up, up_bias, down, down_bias = self.of(layers, first_head, len(keys) // len(layers))
        size, dtype = keys.shape[2], keys.dtype
        hidden = torch.baddbmm(up_bias[:, None].to(dtype), keys, up[:, :size].to(dtype))
        hidden = torch.baddbmm(hidden, values, up[:, size:].to(dtype))
        hidden = torch.nn.functional.gelu(hidden)
        return (hidden @ down[..., None].to(dtype))[..., 0].float() + down_bias[:, None]


def fingerprint(config: Any) -> str:
    """Of a Hugging Face configuration (of the text model): models that differ in it share no scorer."""
    known = {name: _of_all_layers(config, name) for name in _FINGERPRINT}
    rotary = getattr(config, "rope_parameters", None) or {}
    known |= {name: rotary.get(name) for name in _ROTARY}
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _of_all_layers(config: Any, name: str) -> Any:
    """What a configuration says of all layers; None if nothing."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' own, where layers differ in it
        return None


def find(model: str) -> str | None:
    """The scorer of a model, as `load` takes it: beside the checkpoint, in the cache folder, or packaged.

    Args:
        model: checkpoint folder, or the model's name.
    """
    if Path(model).is_dir() and (path := Path(model) / BESIDE).is_file():
        return str(path)
    name = name_of(model)
    for path in (cache_folder() / f"{name}.safetensors", FOLDER / f"{name}.safetensors"):
        if path.is_file():
            return str(path)
    return None


def name_of(model: str) -> str:
    """A model's name, whatever the case and the organisation before it."""
    return Path(model).name.lower()


def cache_folder() -> Path:
    """Where `calibrate --scorer` puts what it has trained."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-kvcompress" / "scorers"


def included() -> list[str]:
    """Names of the scorers that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def load(given: str) -> Scorer:
    """Read a scorer, once for each state of its file.

    Args:
        given: a file, or the name of a scorer that comes with the package.

    Raises:
        ValueError: there is no such scorer, or it is not one that this version reads; one line.
    """
    path = Path(given).expanduser()
    if not path.is_file():
        if given not in included():
            names = ", ".join(included()) or "none"
            raise ValueError(
                f"there is no scorer {given}: give a file that `vllm-kvcompress calibrate --scorer` wrote, "
                f"or the name of one that comes with the package ({names})"
            )
        path = FOLDER / f"{given}.safetensors"
    try:
        state = path.stat()
        return _read(str(path), state.st_mtime_ns, state.st_size)
    except OSError as error:
        raise ValueError(f"cannot read the scorer {given}: {error.strerror}") from None


@functools.lru_cache(maxsize=16)
def _read(path: str, mtime_ns: int, size: int) -> Scorer:
    try:
        if size > MOST_BYTES:
            raise ValueError
        with safe_open(path, "pt") as file:
            content = json.loads((file.metadata() or {})["kvcompress_scorer"])
            version = content["version"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is not a scorer; `vllm-kvcompress calibrate --scorer` writes one") from None
    if version != VERSION:
        raise ValueError(
            f"the scorer {path} has version {version!r}, and this package reads version {VERSION}; "
            "train it again"
        )
    try:
        return _checked(content, tensors)
    except (ValueError, TypeError, KeyError, IndexError):
        raise ValueError(f"the scorer {path} is damaged: its tensors are not what they should be") from None


def _checked(content: dict[str, Any], tensors: dict[str, Tensor]) -> Scorer:
    up, up_bias, down, down_bias = (tensors[name] for name in TENSORS)
    layers, heads, size, width = up.shape
    shapes = [(layers, heads, size, width), (layers, heads, width), (layers, heads, width), (layers, heads)]
    found = [tuple(tensors[name].shape) for name in TENSORS]
    usable = all(tensors[name].is_floating_point() and tensors[name].isfinite().all() for name in TENSORS)
    if found != shapes or size % 2 or not usable:
        raise ValueError
    return Scorer(
        model=str(content["model"]),
        fingerprint=str(content["fingerprint"]),
        up=up,
        up_bias=up_bias.float(),
        down=down,
        down_bias=down_bias.float(),
        record=content["record"],
    )


def write(path: Path, scorer: Scorer) -> None:
    """Write a scorer that `load` reads, its matrices in float16."""
    content = {
        "version": VERSION,
        "model": scorer.model,
        "fingerprint": scorer.fingerprint,
        "record": dict(scorer.record),
    }
    tensors = {"up": scorer.up.half(), "up_bias": scorer.up_bias.float()}
    tensors |= {"down": scorer.down.half(), "down_bias": scorer.down_bias.float()}
    # In one step, so that an engine that reads the file meanwhile finds the old scorer or the new one.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        unfinished,
        {"kvcompress_scorer": json.dumps(content)},
    )
    unfinished.chmod(0o644)  # as one that comes with the package
    unfinished.replace(path)
