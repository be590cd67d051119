"""KeyDiff: keys unlike the others are worth keeping."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from vllm_kvcompress.policies.base import LayerObservation, Policy


@dataclass(frozen=True)
class KeyDiff(Policy):
    """Keeps the tokens whose keys point away from the mean direction.

        s_i = -cos(k_i, k̄),  k̄ = mean over all tokens held of k_j / ‖k_j‖

    Source: Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
    Resource-Constrained Environments", arXiv 2504.15364. The anchor k̄ is taken over all tokens
    held, the raw tail included; cosines are float32 whatever the model's dtype. Deviation: the paper evicts
    block by block during prefill; here once, when the prompt is computed.
    """

    name: ClassVar[str] = "keydiff"
    paper: ClassVar[str] = "KeyDiff: Key Similarity-Based KV Cache Eviction (arXiv 2504.15364)"
    cost: ClassVar[str] = "one cosine per key"
    reads_values: ClassVar[bool] = False
    stacks_layers: ClassVar[bool] = True

    def score(self, observation: LayerObservation) -> Tensor:
        directions = F.normalize(observation.keys.float(), dim=-1)
        if observation.padding is not None:
            directions = directions * observation.holds()[..., None]
        anchor = F.normalize(directions.sum(1, keepdim=True), dim=-1)
        return -(directions[:, : observation.num_scored] * anchor).sum(-1)
