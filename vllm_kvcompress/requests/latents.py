"""Multi-head latent attention (MLA): one latent per token and layer, which all query heads share.

A layer's only KV head has latents for keys, `C` numbers of which the first are its values too, and
queries that are brought to the same space: `q·k = (q_nope·W_UK ‖ q_pe)·(c ‖ k_pe)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.models.utils import extract_layer_index

from vllm_kvcompress.requests.cache import HostCache
from vllm_kvcompress.requests.observer import LayerAttention


@dataclass(frozen=True)
class LatentCache(HostCache):
    """Pages `[L·B, N, C]` of latents, each with the rotated channels of its key behind it.

    Attributes:
        latent_size: channels of a latent.
    """

    latent_size: int

    @property
    def head_size(self) -> int:
        return self.pages.shape[2]

    def read_keys(self, pages: Tensor, layers: slice | None = None) -> Tensor:
        return self.pages[pages.clamp(min=0)].flatten(1, 2)

    def read_values(self, pages: Tensor, layers: slice | None = None) -> Tensor:
        """`[X, W·N, latent_size]`, the latents alone."""
        return self.read_keys(pages)[..., : self.latent_size]

    def _new_pages(self, pages: Tensor, row: Tensor, columns: Tensor) -> Tensor:
        block_size = self.grid.block_size
        return self.pages[pages[row[:, None], columns // block_size], columns % block_size]


@dataclass(frozen=True)
class AbsorbedQueries:
    """Queries of a batch in the space of latents, made for those tokens alone that are asked for.

    Attributes:
        layer: theirs, whose weights bring them there.
        queries: `[tokens, Hq, P + R]`, as the layer's projection and its rotary embedding leave them.
    """

    layer: MLAAttention
    queries: Tensor

    def __getitem__(self, tokens: slice | Tensor) -> Tensor:
        """`[n, Hq, C]` of the given tokens."""
        plain, rotated = self.queries[tokens].tensor_split([self.layer.qk_nope_head_dim], -1)
        absorbed = torch.bmm(plain.transpose(0, 1), self.layer.W_UK_T)
        return torch.cat([absorbed.transpose(0, 1), rotated], -1)


def latent_layers(layers: Sequence[MLAAttention]) -> list[LayerAttention]:
    """What policies see of layers that attend over latents."""
    return [
        LayerAttention(layer.impl.scale, logits_soft_cap=0.0, index=extract_layer_index(layer.layer_name))
        for layer in layers
    ]
