"""Knorm: keys of small norm attract attention."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vllm_kvcompress.policies.base import LayerObservation, Policy


@dataclass(frozen=True)
class Knorm(Policy):
    """Keeps the tokens whose keys have the smallest norm.

        s_i = -‖k_i‖₂

    Source: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv
    2406.11430. The norm is float32 whatever the model's dtype. Deviation: the authors leave the first two
    layers of some models whole; here every layer is compressed.
    """

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "A Simple and Effective L2 Norm-Based Strategy (arXiv 2406.11430)"
    cost: ClassVar[str] = "one norm per key"
    reads_values: ClassVar[bool] = False
    stacks_layers: ClassVar[bool] = True
    needs_own_keys: ClassVar[bool] = True  # latents leave a norm: all are about as long

    def score(self, observation: LayerObservation) -> Tensor:
        return -observation.keys[:, : observation.num_scored].float().norm(dim=-1)
