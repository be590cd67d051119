"""What scores by the attention of a prompt's last queries have in common."""

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from vllm_kvcompress.policies.base import LayerObservation, Policy, window_attention

MOST_POOLED = 255  # tokens


class WindowPolicy(Policy):
    """Attention of the last `window` queries, or its square, pooled along tokens and reduced over the group.

        s_i = reduction over the group of pool( Σ over the window's queries of A or A² )_i

    A is `[H, G, w, W]`, softmaxed over the window too; pooling runs over the tokens before the window,
    [0, W - w), and the first T of them are the scores `[H, T]`. Average pooling counts its zero padding.

    On a GPU a kernel computes the same from these attributes, without A in memory.

    Attributes:
        squared: whether A² is summed.
        reduction: of the group.
        kernel_size: odd width of the pooling, in tokens.
        pooling: of the tokens.
    """

    squared: ClassVar[bool]
    reduction: ClassVar[Literal["mean", "sum"]]
    reads_values: ClassVar[bool] = False
    stacks_layers: ClassVar[bool] = True
    window: int
    kernel_size: int
    pooling: Literal["max", "avg"]

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1 token, got {self.window}")
        if not 1 <= self.kernel_size <= MOST_POOLED or self.kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size must be an odd number of tokens, 1 to {MOST_POOLED}, got {self.kernel_size}"
            )
        if self.pooling not in ("max", "avg"):
            raise ValueError(f"pooling must be 'max' or 'avg', got {self.pooling!r}")

    def score(self, observation: LayerObservation) -> Tensor:
        attention = window_attention(observation)[..., : -self.window]
        summed = (attention.square() if self.squared else attention).sum(2)  # [H, G, W-w]
        pool = F.max_pool1d if self.pooling == "max" else F.avg_pool1d
        pooled = pool(summed, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        reduced = pooled.mean(1) if self.reduction == "mean" else pooled.sum(1)
        return reduced[:, : observation.num_scored]
