"""Which tokens matter: one file per method."""

from vllm_kvcompress.policies.base import LayerObservation, Policy
from vllm_kvcompress.policies.kv_compress import KVCompress
from vllm_kvcompress.policies.snapkv import SnapKV
from vllm_kvcompress.policies.streaming_llm import StreamingLLM

__all__ = ["POLICIES", "LayerObservation", "Policy", "register_policy"]

POLICIES: dict[str, type[Policy]] = {}


def register_policy(cls: type[Policy]) -> type[Policy]:
    """Make a policy known by its `name`; a class decorator for user code."""
    POLICIES[cls.name] = cls
    return cls


for _policy in (StreamingLLM, SnapKV, KVCompress):
    register_policy(_policy)
