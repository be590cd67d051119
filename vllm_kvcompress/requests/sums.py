"""What policies have kernels add up of every query, beside the pages that hold the tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.requests.cache import Kept

BYTES = 4  # of a token of a head


@dataclass(frozen=True)
class PageSums:
    """What has been paid to each token by the queries of the request that it is of.

    Attributes:
        by_page: `[S·B·H, N]` float32, of the token in each place of each page; arbitrary of others.
    """

    by_page: Tensor

    @classmethod
    def empty(cls, grid: PageGrid, device: torch.device) -> "PageSums":
        """Room for those of a whole cache."""
        pages = grid.num_blocks * grid.pages_per_block
        return cls(torch.zeros(pages, grid.block_size, device=device))

    def read(self, pages: Tensor) -> Tensor:
        """Those of pages `[X, n]`, `[X, n·N]`; of absent ones (-1) arbitrary."""
        return self.by_page[pages.clamp(min=0)].flatten(1)

    def move(self, kept: Kept, target: Tensor) -> None:
        """Have the kept tokens' where they are written to, `[M]` int64 pages, which may be read ones."""
        row, block_size = kept.row[:, None], self.by_page.shape[1]
        self.by_page[target] = self.by_page[
            kept.pages[row, kept.columns // block_size], kept.columns % block_size
        ]
