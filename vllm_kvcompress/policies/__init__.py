"""Which tokens matter: one file per method."""

import dataclasses

from vllm_kvcompress.policies.attention_matching import AttentionMatching
from vllm_kvcompress.policies.base import LayerObservation, Policy, window_attention
from vllm_kvcompress.policies.criticalkv import CriticalKV
from vllm_kvcompress.policies.expected_attention import ExpectedAttention
from vllm_kvcompress.policies.foresight import Foresight
from vllm_kvcompress.policies.h2o import H2O
from vllm_kvcompress.policies.keydiff import KeyDiff
from vllm_kvcompress.policies.knorm import Knorm
from vllm_kvcompress.policies.kv_compress import KVCompress, KVCompressFull
from vllm_kvcompress.policies.kvzip import KVzip
from vllm_kvcompress.policies.mixed_dim import MixedDimKV
from vllm_kvcompress.policies.snapkv import SnapKV
from vllm_kvcompress.policies.streaming_llm import StreamingLLM
from vllm_kvcompress.policies.tova import TOVA
from vllm_kvcompress.policies.user import load_user_policies

__all__ = ["POLICIES", "LayerObservation", "Policy", "get_policy", "register_policy", "window_attention"]

POLICIES: dict[str, type[Policy]] = {}


def register_policy(cls: type[Policy]) -> type[Policy]:
    """Make a policy known by its `name`; a class decorator for user code.

    The name is then a method too, with the `uniform` allocation. Defining the same class again, as notebooks
    do, replaces it.

    Raises:
        ValueError: it is not a dataclass with a name, or another policy has that name.
    """
    if not dataclasses.is_dataclass(cls) or not isinstance(getattr(cls, "name", None), str):
        raise ValueError(f"policy {cls.__qualname__} must be a dataclass with a class variable `name`")
    known = POLICIES.get(cls.name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"policy name {cls.name!r} is taken by {known.__module__}.{known.__qualname__}; choose another"
        )
    POLICIES[cls.name] = cls
    return cls


def get_policy(name: str) -> type[Policy]:
    """The policy of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; use one of {', '.join(POLICIES)}")
    return POLICIES[name]


for _policy in (
    StreamingLLM,
    H2O,
    SnapKV,
    KVCompress,
    KVCompressFull,
    ExpectedAttention,
    TOVA,
    Knorm,
    KeyDiff,
    CriticalKV,
    KVzip,
    AttentionMatching,
    Foresight,
    MixedDimKV,
):
    register_policy(_policy)

load_user_policies()
