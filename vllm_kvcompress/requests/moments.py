"""What kernels keep of all queries of a request, in place of a policy's own states."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.kernels.batch import MOMENT_ROWS, moment_shape
from vllm_kvcompress.policies.expected_attention import QueryStatistics


@dataclass(frozen=True)
class QueryMoments:
    """Moments of one request's queries before RoPE.

    Attributes:
        content: `[L, *moment_shape(Hq, D)]` float32, contiguous: a kernel has its address.
        skip: first positions, whose queries are left out.
    """

    content: Tensor
    skip: int

    @classmethod
    def empty(
        cls, num_layers: int, query_heads: int, head_size: int, skip: int, device: torch.device
    ) -> "QueryMoments":
        """Those of no query."""
        return cls(torch.zeros(num_layers, *moment_shape(query_heads, head_size), device=device), skip)

    def read(self, layers: slice, heads: int) -> QueryStatistics:
        """Those of some layers of so many KV heads each, as of one layer with all of these."""
        own = self.content[layers]
        size, shape = own.shape[-1], (len(own) * heads, own.shape[1] // heads)
        scatter = own[..., :MOMENT_ROWS, :].flatten(2, 3)[:, :, :size]
        mean = own[:, :, 0, MOMENT_ROWS]
        seen = own[0, 0, 0, MOMENT_ROWS + 1, 0]  # as of all: every layer sees every token
        return QueryStatistics(seen, mean.reshape(*shape, size), scatter.reshape(*shape, size, size))
