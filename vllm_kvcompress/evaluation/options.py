"""Values of the commands' options, each checked before anything is loaded, with one line on what is wrong."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

Number = TypeVar("Number", int, float)


def at_least(least: int) -> Callable[[str], int]:
    """A type of `argparse`: a whole number from `least` on."""

    def read(given: str) -> int:
        number = _number(given, int)
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {given}")
        return number

    return read


def above_zero(given: str) -> float:
    """A number above 0."""
    number = _number(given, float)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {given}")
    return number


def counts(least: int) -> Callable[[str], list[int]]:
    """Comma-separated whole numbers from `least` on; as a list without repetitions, in the order given."""

    def read(given: str) -> list[int]:
        return list(dict.fromkeys(at_least(least)(part) for part in given.split(",")))

    return read


def fractions(given: str) -> list[float]:
    """Comma-separated numbers above 0, at most 1; as a list without repetitions, in the order given."""
    numbers = list(dict.fromkeys(_number(part, float) for part in given.split(",")))
    if not all(0 < number <= 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"must be fractions, above 0 and at most 1, got {given}")
    return numbers


def rates(given: str) -> list[float]:
    """Comma-separated numbers above 0, ascending, without repetitions."""
    numbers = sorted({_number(part, float) for part in given.split(",")})
    if not all(0 < number < math.inf for number in numbers):
        raise argparse.ArgumentTypeError(f"must be numbers above 0, got {given}")
    return numbers


def among(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Comma-separated names of these; as a list without repetitions, in the order given."""

    def read(given: str) -> list[str]:
        names = list(dict.fromkeys(given.split(",")))
        if not set(names) <= set(known):
            raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {given!r}")
        return names

    return read


def text_file(given: str) -> Path:
    """A file of text that can be read."""
    try:
        if not Path(given).read_text(encoding="utf-8").strip():
            raise argparse.ArgumentTypeError(f"{given} is empty")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {given}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"{given} is not text in UTF-8") from None
    return Path(given)


def data_folder(given: str) -> Path:
    """A folder that is there."""
    if not Path(given).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {given}")
    return Path(given)


def result_folder(given: str) -> Path:
    """A folder that can be written to, made now if it is not there."""
    try:
        Path(given).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot make the folder {given}: {error.strerror}") from None
    return Path(given)


def _number(given: str, kind: type[Number]) -> Number:
    try:
        return kind(given)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {given!r}") from None
