"""What a token policy sees of a layer, and what it must answer."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerObservation:
    """One layer of one request, once its prompt of P tokens is computed.

    Attributes:
        keys: `[H, P, D]` in the model's dtype, after RoPE.
        values: `[H, P, D]`.
        queries: `[w, H, G, D]` after RoPE, of the prompt's last w tokens; w is the policy's `window`.
        scale: the layer's own softmax scale.
        num_scored: T, the boundary: scores are wanted for tokens 0..T-1, with T <= P - w.
        logits_soft_cap: logits are `cap·tanh(logits / cap)`; 0 for none.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    scale: float
    num_scored: int
    logits_soft_cap: float = 0.0


class Policy(ABC):
    """Says how much each token of each head matters.

    Subclasses are dataclasses whose fields are the method's hyper-parameters with the paper's defaults.

    Attributes:
        name: what users write.
        paper: title and arXiv id.
        cost: one line on what scoring a prompt takes.
        reads_keys: False if keys, values and queries may be empty (`[H, P, 0]`).
        window: w, the number of last prompt queries it needs; 0 for none.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    cost: ClassVar[str]
    reads_keys: ClassVar[bool] = True

    @property
    def window(self) -> int:
        """w; a policy that looks at queries has a field of this name."""
        return 0

    @abstractmethod
    def score(self, observation: LayerObservation) -> Tensor:
        """Score every token below the boundary.

        Returns:
            `[H, T]` float32, higher = keep.
        """


def window_attention(observation: LayerObservation) -> Tensor:
    """Causal attention of the observation window over the whole prompt, the window included.

        A = softmax(cap·tanh(scale·q·kᵀ / cap)), or softmax(scale·q·kᵀ) without a cap

    One matrix product per KV head serves its whole group: nothing is repeated per query head.
    Logits and softmax are float32 whatever the model's dtype: in bf16 most scores of a long prompt tie.

    Returns:
        `[H, G, w, P]` float32.
    """
    window, heads, group, size = observation.queries.shape
    num_tokens = observation.keys.shape[1]
    queries = observation.queries.permute(1, 2, 0, 3).reshape(heads, group * window, size).float()
    logits = (queries @ observation.keys.float().transpose(1, 2)).mul_(observation.scale)
    if cap := observation.logits_soft_cap:
        logits.div_(cap).tanh_().mul_(cap)
    logits = logits.view(heads, group, window, num_tokens)
    future = torch.ones(window, window, dtype=torch.bool, device=logits.device).triu(1)
    logits[..., num_tokens - window :].masked_fill_(future, -torch.inf)
    return logits.softmax(-1)
