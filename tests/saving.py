"""What becomes of files that are written beside the steps."""

import time
from collections.abc import Callable


def outcome(ask: Callable[[], tuple[bool, str | None]]) -> str | None:
    """What was in the way of one, once it has ended."""
    deadline = time.monotonic() + 60
    while not (ended := ask())[0]:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return ended[1]
