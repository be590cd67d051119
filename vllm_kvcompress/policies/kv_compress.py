"""KV-Compress: squared attention of the prompt's last queries."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from vllm_kvcompress.policies.base import LayerObservation, Policy, window_attention


@dataclass(frozen=True)
class KVCompress(Policy):
    """Squared attention that the last `window` queries pay to each token (the limited variant).

        s_i = Σ over the group of maxpool( Σ over the window's queries of A² )_i

    A is `[H, G, w, P]`, softmaxed over the window too; pooling runs over the tokens before the window,
    [0, P - w), and the first T of them are the scores `[H, T]`.

    Source: Rehg, "KV-Compress: Paged KV-Cache Compression with Variable Compression Rates per Attention
    Head", arXiv 2410.00161. Meant for the `global` allocation, which is the paper's block eviction.
    Deviation: the prompt is compressed once; the paper goes on compressing while it decodes.

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
        squared = window_attention(observation)[..., : -self.window].square().sum(2)  # [H, G, P-w]
        pooled = F.max_pool1d(squared, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        return pooled.sum(1)[:, : observation.num_scored]
