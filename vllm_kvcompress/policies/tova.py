"""TOVA: what the last token attends to, all heads of a layer together."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vllm_kvcompress.policies.base import LayerObservation, Policy, window_attention


@dataclass(frozen=True)
class TOVA(Policy):
    """Attention that the prompt's last query pays to each token, averaged over all heads of the layer.

        s_i = mean over all query heads of A_i,  A the attention of the last query

    Every head of a layer has the same scores, so with the `uniform` allocation a layer keeps one set of
    tokens.

    Source: Oren et al., "Transformers are Multi-State RNNs", arXiv 2401.06104. Deviation: the paper drops a
    token at each step, of prefill too; here the prompt is compacted once, by the attention of its last token.
    Where heads hold different numbers of tokens (a later compaction after an allocation that is not uniform),
    the mean is over columns, not tokens.
    """

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "Transformers are Multi-State RNNs (arXiv 2401.06104)"
    cost: ClassVar[str] = "attention of the last query over the prompt, once"
    reads_values: ClassVar[bool] = False
    stacks_layers: ClassVar[bool] = True

    @property
    def window(self) -> int:
        return 1

    def score(self, observation: LayerObservation) -> Tensor:
        attention = window_attention(observation)[:, :, -1, : observation.num_scored]  # [H, G, T]
        layers = attention.unflatten(0, (len(observation.layers), -1))
        return layers.mean((1, 2), keepdim=True).squeeze(2).expand(-1, layers.shape[1], -1).flatten(0, 1)
