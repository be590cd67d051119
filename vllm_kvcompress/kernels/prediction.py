"""A model of what the decode kernel takes on GPUs that are not there: to be checked, never to be quoted.

A layer's programs run as many at a time as the device has room for, the next one when one is done. All that
run read at the same rate: their share of the copy bandwidth, or what a program's loads in flight allow. Each
begins with what it must look up. Instructions are not counted: of raw tokens they are too few to matter.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_kvcompress.kernels.shares import ENOUGH, MIN_SHARE, WAVES

IN_FLIGHT = 32 * 1024  # bytes of a program: a tile of keys and one of values
LATENCY = 1e-6  # seconds of a load
LOOK_UP = 2.5e-6  # seconds of a program's first loads, each of which hangs on the one before
LAUNCH = 1.5e-6  # seconds between kernels of a graph
ALIGN = 128  # keys


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: as it is called.
        bandwidth: bytes a second of a copy, those read and those written.
        processors: streaming multiprocessors.
        of_processor: programs that one of them runs at a time.
    """

    name: str
    bandwidth: float
    processors: int
    of_processor: int


DEVICES = (
    Device("A100 80 GB", 1.75e12, 108, 2),
    Device("H100 SXM", 3.05e12, 132, 3),
    Device("H200", 4.35e12, 132, 3),
)


def cut_evenly(lengths: Sequence[int], at_once: int) -> list[int]:
    """Keys of each share, as `Shares.cut` has them."""
    total, active = sum(lengths), sum(length > 0 for length in lengths)
    waves = min(max(total // (at_once * ENOUGH), 1), WAVES)
    room = max(waves * at_once - active, waves * at_once // 2, 1)
    most = _up(max(-(-total // room), MIN_SHARE))
    shares: list[int] = []
    for length in filter(None, lengths):
        share = _up(-(-length // -(-length // most)))
        shares += [min(share, length - begin) for begin in range(0, length, share)]
    return shares


def predicted_seconds(lengths: Sequence[int], token_bytes: int, device: Device) -> float:
    """What a layer takes whose heads hold so many tokens of so many bytes."""
    at_once = device.processors * device.of_processor
    shares = cut_evenly(lengths, at_once)
    look_up = LOOK_UP * device.bandwidth / at_once
    waiting = [share * token_bytes + look_up for share in reversed(shares)]
    running: list[float] = []  # what all programs have read each when one is done
    read = seconds = 0.0
    while waiting or running:
        while waiting and len(running) < at_once:
            heapq.heappush(running, read + waiting.pop())
        rate = min(device.bandwidth / len(running), IN_FLIGHT / LATENCY)
        done = heapq.heappop(running)
        seconds += (done - read) / rate
        read = done
    return seconds + LAUNCH


def _up(keys: int) -> int:
    return -(-keys // ALIGN) * ALIGN
