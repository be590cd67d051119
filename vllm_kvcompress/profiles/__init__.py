"""Head profiles: how much of a cache budget each KV head of one model needs, as `calibrate` measured it.

A profile is a small JSON file. Profiles that come with the package are named after their model.
"""

import functools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

VERSION = 1
FOLDER = Path(__file__).parent
MOST_BYTES = 64 << 20  # a request may name any file: never read a huge one


@dataclass(frozen=True, eq=False)
class HeadProfile:
    """Shares of a budget.

    Attributes:
        model: name of the model that was measured.
        budgets: mean kept fractions, ascending.
        shares: `[budgets, L, H]` float64: what each head gets, relative to the mean.
    """

    model: str
    budgets: tuple[float, ...]
    shares: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """L and H."""
        return self.shares.shape[1], self.shares.shape[2]

    def to(self, device: torch.device) -> "HeadProfile":
        """The same with its shares on a device."""
        return replace(self, shares=self.shares.to(device))

    def at(self, budgets: Tensor) -> Tensor:
        """Shares at mean kept fractions `[J]`: linear in their logarithm, constant beyond the ends.

        Returns:
            `[J, L, H]` float64 on the device of both.
        """
        shares = self.shares[:1].expand(len(budgets), -1, -1)
        steps = zip(self.budgets, self.budgets[1:], self.shares.diff(dim=0), strict=False)
        for lower, upper, step in steps:  # few, and their numbers need not be sent
            passed = (budgets.double() / lower).log() / math.log(upper / lower)
            shares = shares + passed.clamp(0, 1)[:, None, None] * step
        return shares


def load(given: str) -> HeadProfile:
    """Read a profile, once for each state of its file.

    Args:
        given: a file, or the name of a profile that comes with the package.

    Raises:
        ValueError: there is no such profile, or it is not one that this version reads; one line.
    """
    path = _find(given)
    try:
        state = path.stat()
        return _read(str(path), state.st_mtime_ns, state.st_size)
    except OSError as error:
        raise ValueError(f"cannot read the head profile {given}: {error.strerror}") from None


def included() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def _find(given: str) -> Path:
    path = Path(given).expanduser()
    if path.is_file():
        return path
    if given in included():
        return FOLDER / f"{given}.json"
    names = ", ".join(included()) or "none"
    raise ValueError(
        f"there is no head profile {given}: give a file that `vllm-kvcompress calibrate` wrote, "
        f"or the name of one that comes with the package ({names})"
    )


@functools.lru_cache(maxsize=64)
def _read(path: str, mtime_ns: int, size: int) -> HeadProfile:
    try:
        content = json.loads(Path(path).read_text()) if size <= MOST_BYTES else {}
        version = content["version"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is not a head profile; `vllm-kvcompress calibrate` writes one") from None
    if version != VERSION:
        raise ValueError(
            f"the head profile {path} has version {version!r}, and this package reads version {VERSION}; "
            "calibrate the model again"
        )
    try:
        return _parsed(content)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError):
        raise ValueError(
            f"the head profile {path} is damaged: its budgets or shares are not what they should be"
        ) from None


def _parsed(content: dict[str, Any]) -> HeadProfile:
    order = np.argsort(content["budgets"])
    budgets = tuple(float(content["budgets"][index]) for index in order)
    shares = torch.tensor(content["shares"], dtype=torch.float64)[torch.from_numpy(order)]
    shape = (len(budgets), content["num_layers"], content["num_kv_heads"])
    usable = shares.isfinite().all() and (shares >= 0).all() and (shares.flatten(1).sum(1) > 0).all()
    distinct = len(set(budgets)) == len(budgets) > 0 and 0 < budgets[0] and budgets[-1] <= 1
    if shares.shape != shape or not usable or not distinct:
        raise ValueError
    return HeadProfile(str(content["model"]), budgets, shares)


def write(
    path: Path,
    model: str,
    policy: str,
    budgets: Sequence[float],
    shares: Tensor,
    fractions: Sequence[float],
    sensitivity: Tensor,
    settings: dict[str, Any],
) -> None:
    """Write a profile that `load` reads.

    Args:
        path: JSON file to write.
        model: the model's name.
        policy: whose scores chose the tokens that the heads kept.
        budgets: mean kept fractions.
        shares: `[budgets, L, H]`, relative to the mean.
        fractions: kept fractions at which the sensitivity was measured.
        sensitivity: `[L, H, fractions]`, nats per token.
        settings: what is needed to measure it again.
    """
    _, layers, heads = shares.shape
    content = {
        "version": VERSION,
        "model": model,
        "num_layers": layers,
        "num_kv_heads": heads,
        "policy": policy,
        "settings": settings,
        "budgets": list(budgets),
        "shares": [[[round(x, 3) for x in row] for row in table] for table in shares.tolist()],
        "fractions": list(fractions),
        "sensitivity": [
            [[float(f"{x:.3g}") for x in row] for row in table] for table in sensitivity.tolist()
        ],
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    # In one step, so that an engine that reads the file meanwhile finds the old profile or the new one.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text("{\n" + lines + "\n}\n")
    unfinished.replace(path)
