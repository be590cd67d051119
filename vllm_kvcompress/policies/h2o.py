"""H2O: what all queries so far have attended to."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcompress.policies.base import LayerObservation
from vllm_kvcompress.policies.watching import AttentionSum


@dataclass(frozen=True)
class H2O(AttentionSum):
    """Attention summed over all queries, of the prompt and of the output, and a share for the recent tokens.

        s_i = Σ over the group Σ over all queries of A_i

    Each head keeps the highest sums outside its most recent tokens, and those.

    Source: Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
    Models", arXiv 2306.14048. Deviations: a KV head has one sum, over its group; the paper
    drops a token at each step, here the prompt is compacted once it is computed, and the output with
    `recompact_every`; the raw tail comes on top of the recent share. (The press of this kind in kvpress
    divides each sum by the number of queries that could see the token, and has no recent share.)

    Attributes:
        recent: share of each head's kept tokens that goes to the most recent ones below the boundary.
    """

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "H2O: Heavy-Hitter Oracle (arXiv 2306.14048)"
    cost: ClassVar[str] = "the attention weights of every query, computed a second time"
    squared: ClassVar[bool] = False
    recent: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.recent <= 1:
            raise ValueError(f"recent must be between 0 and 1, got {self.recent}")

    def refine(self, scores: Tensor, kept: Tensor, observation: LayerObservation) -> Tensor:
        others = kept - scores.isposinf().sum(1)  # but for the attention sinks
        recent = torch.minimum((self.recent * kept).long(), others)[:, None]
        newest = torch.arange(scores.shape[1], device=scores.device) >= scores.shape[1] - recent
        return scores.masked_fill(newest, torch.inf)
