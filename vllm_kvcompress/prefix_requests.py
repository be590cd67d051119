"""Requests that are there only for the compacted prefix that they leave."""

from collections.abc import Iterator
from typing import Any

from vllm import SamplingParams
from vllm.outputs import RequestOutput

from vllm_kvcompress.paging.statistics import CARRIER

# Methods of `EngineCore` that are asked next: to begin a save, and for what has become of it.
SAVE, SAVED = "kv_compression_save_prefix", "kv_compression_prefix_saved"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.5  # between two questions for that


def leaving(option: dict[str, Any]) -> SamplingParams:
    """Of a request that is there only for what its prompt is compacted to: that needs a second token."""
    return SamplingParams(
        max_tokens=2, min_tokens=2, ignore_eos=True, temperature=0.0, extra_args={CARRIER: option}
    )


def left_by(output: RequestOutput) -> dict[str, Any]:
    """What an engine tells of the prefix that a request was to leave."""
    return dict((output.kv_transfer_params or {})[CARRIER]["prefix"])


def pauses() -> Iterator[float]:
    """Seconds to wait before each time that a save is asked for."""
    pause = FIRST_PAUSE_S
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE_S)
