"""A policy of one's own: keep the tokens whose values are longest.

Name this file in an environment variable, and its policy is a method like any other:

    export KV_COMPRESSION_POLICIES=examples/custom_policy.py
    vllm serve MODEL --kv-compression value_norm:budget=0.25,power=2
    vllm-kvcompress eval --methods value_norm,value_norm:allocation=global,snapkv
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vllm_kvcompress.policies import LayerObservation, Policy, register_policy


@register_policy
@dataclass(frozen=True)
class ValueNorm(Policy):
    """Scores a token by the length of its value, `[H, T]` float32: s_i = ‖v_i‖₂ ** power.

    Attributes:
        power: how much longer values stand out where heads compete.
    """

    name: ClassVar[str] = "value_norm"
    paper: ClassVar[str] = "an example, of no paper"
    cost: ClassVar[str] = "one norm per value"
    reads_keys: ClassVar[bool] = False
    stacks_layers: ClassVar[bool] = True  # each head by itself
    power: float = 1.0

    def score(self, observation: LayerObservation) -> Tensor:
        return observation.values[:, : observation.num_scored].float().norm(dim=-1) ** self.power
