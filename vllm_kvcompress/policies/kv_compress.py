"""KV-Compress: squared attention of the prompt's queries, the last ones or all."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from vllm_kvcompress.policies.base import AttentionSum, LayerObservation, Policy, window_attention


@dataclass(frozen=True)
class KVCompress(Policy):
    """Squared attention that each token was paid, by the last `window` queries.

        s_i = Σ over the group of maxpool( Σ over the window's queries of A² )_i

    A is `[H, G, w, W]`, softmaxed over the window too; pooling runs over the tokens before the window,
    [0, W - w), and the first T of them are the scores `[H, T]`.

    Source: Rehg, "KV-Compress: Paged KV-Cache Compression with Variable Compression Rates per Attention
    Head", arXiv 2410.00161. Meant for the `global` allocation, which is the paper's block eviction. The
    paper goes on compressing while it decodes, which is the option `recompact_every` here.

    Attributes:
        window: w, queries observed; the paper uses 8 to 32.
        kernel_size: odd width of the max pooling, in tokens, per query head.
    """

    name: ClassVar[str] = "kv_compress"
    paper: ClassVar[str] = "KV-Compress: Paged KV-Cache Compression with Variable Rates (arXiv 2410.00161)"
    cost: ClassVar[str] = "attention of the last w queries over the prompt, once"
    window: int = 32
    kernel_size: int = 7

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1 token, got {self.window}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be a positive odd number of tokens, got {self.kernel_size}")

    def score(self, observation: LayerObservation) -> Tensor:
        squared = window_attention(observation)[..., : -self.window].square().sum(2)  # [H, G, W-w]
        pooled = F.max_pool1d(squared, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        return pooled.sum(1)[:, : observation.num_scored]


@dataclass(frozen=True)
class KVCompressFull(AttentionSum):
    """Squared attention that each token was paid, by all queries so far.

        s_i = Σ over the group Σ over all queries of A_i²

    The paper's full variant: not pooled.

    Source: as `KVCompress`.
    """

    name: ClassVar[str] = "kv_compress_full"
    paper: ClassVar[str] = KVCompress.paper
    cost: ClassVar[str] = "the attention weights of every query, computed a second time"

    def paid(self, attention: Tensor) -> Tensor:
        return attention.square_()
