"""Work that is done a unit at a time, so that others go on in between."""

from collections.abc import Generator
from typing import TypeAlias, TypeVar

Result = TypeVar("Result")
# Before each unit is done, says where it ends: what part of all the work is done by then, ascending to 1.
Units: TypeAlias = Generator[float, None, Result]


def finish(units: Units[Result]) -> Result:
    """What the work comes to, all of it done."""
    while True:
        try:
            next(units)
        except StopIteration as done:
            return done.value


def within(units: Units[Result], begin: float, end: float) -> Units[Result]:
    """The same as a part of other work, of which it is done from `begin` to `end`."""
    while True:
        try:
            at = next(units)
        except StopIteration as done:
            return done.value
        yield begin + (end - begin) * at
