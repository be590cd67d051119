"""How long a device takes for what a worker has it do, without waiting for it."""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch(ABC):
    """Times pieces of work, each of several equal parts."""

    @staticmethod
    def of(device: torch.device) -> "Stopwatch":
        """The one of a device."""
        return DeviceStopwatch() if device.type == "cuda" else HostStopwatch()

    @abstractmethod
    def parts(self, number: int) -> Any:
        """A context in which so many parts are done."""

    @abstractmethod
    def read(self) -> float | None:
        """Seconds of one part, of the last ones that are done and were not read; None if there are none."""

    @abstractmethod
    def total(self) -> float:
        """Seconds of all pieces of one part that are done and were not read."""


class HostStopwatch(Stopwatch):
    """Of work that is done when its call returns."""

    def __init__(self) -> None:
        self._seconds: float | None = None

    @contextmanager
    def parts(self, number: int) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._seconds = (time.perf_counter() - begin) / number

    def read(self) -> float | None:
        seconds, self._seconds = self._seconds, None
        return seconds

    def total(self) -> float:
        return self.read() or 0.0  # of one piece a step


class DeviceStopwatch(Stopwatch):
    """Of work that a GPU does after its call has returned: read once it is done, in a later step."""

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event, int]] = deque()

    @contextmanager
    def parts(self, number: int) -> Iterator[None]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._pending.append((begin, end, number))

    def read(self) -> float | None:
        done = self._done()
        return done[-1] if done else None

    def total(self) -> float:
        return sum(self._done())

    def _done(self) -> list[float]:
        seconds = []
        while self._pending and self._pending[0][1].query():
            begin, end, number = self._pending.popleft()
            seconds.append(begin.elapsed_time(end) / 1000 / number)
        return seconds
