"""Requests that are there only for the compacted prefix that they leave."""

from typing import Any

from vllm import SamplingParams
from vllm.outputs import RequestOutput

from vllm_kvcompress.paging.statistics import CARRIER

SAVE = "kv_compression_save_prefix"  # the method of `EngineCore` that is asked next


def leaving(option: dict[str, Any]) -> SamplingParams:
    """Of a request that is there only for what its prompt is compacted to: that needs a second token."""
    return SamplingParams(
        max_tokens=2, min_tokens=2, ignore_eos=True, temperature=0.0, extra_args={CARRIER: option}
    )


def left_by(output: RequestOutput) -> dict[str, Any]:
    """What an engine tells of the prefix that a request was to leave."""
    return dict((output.kv_transfer_params or {})[CARRIER]["prefix"])
