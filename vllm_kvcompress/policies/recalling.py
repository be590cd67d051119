"""What scores a context that is compacted again: its output's last queries, and some that were kept."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vllm_kvcompress.policies.base import LayerObservation, attention_blocks
from vllm_kvcompress.policies.kv_compress import KVCompress


@dataclass(frozen=True)
class Recalling(KVCompress):
    """Squared attention that each token is paid by the last `window` queries and by recalled ones.

        s_i = Σ over the group of maxpool( Σ over the window's queries of A² )_i + Σ over the group and the
              recalled queries of A²_i

    The output's last queries say what it is about now, and not what it will need later. The recalled ones,
    with which the model repeated the context, are softmaxed over the scored columns and are not pooled.

    Its state is theirs, `[m, H, G, D]` in the model's dtype; without one the window alone scores. A GPU's
    kernel, which scores windows alone, is for raw pages, of which no context is that was matched.
    """

    name: ClassVar[str] = "recalling"
    cost: ClassVar[str] = "attention of the last w queries and of the recalled ones, once"

    def stack(self, states: list[Any]) -> Tensor | None:
        return None if states[0] is None else torch.cat(states, 1)

    def score(self, observation: LayerObservation) -> Tensor:
        scores = super().score(observation)
        if observation.state is None:
            return scores
        scored, bias = observation.num_scored, observation.bias
        seen = replace(
            observation, keys=observation.keys[:, :scored], bias=None if bias is None else bias[:, :scored]
        )
        for queries in observation.state.split(self.window):  # no more at a time than the window's
            for attention in attention_blocks(replace(seen, queries=queries), causal=False):
                scores += attention.square_().sum((1, 2))
        return scores
