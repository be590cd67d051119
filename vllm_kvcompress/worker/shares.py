"""What of each block is which layers'."""

from vllm_kvcompress.allocation import Allocation, Uniform
from vllm_kvcompress.paging.layout import PageGrid


class Shares:
    """Splits blocks among a model's layers and its draft model's, so that the model keeps what it would
    without, but for how many slots of its groups no layer has."""

    def __init__(self, grid: PageGrid, num_drafting: int = 0) -> None:
        """The last `num_drafting` of the layers are a draft model's."""
        self._grid, self._num_drafting = grid, num_drafting

    def split(self, allocation: Allocation) -> list[tuple[slice, Allocation]]:
        """Layers that share a part of each block, and how."""
        num_layers = self._grid.num_layers
        edge = num_layers - self._num_drafting
        model = slice(0, edge), allocation
        return [model] if edge == num_layers else [model, (slice(edge, num_layers), Uniform())]

    def pages_of(self, num_blocks: int, layers: slice) -> int:
        """What of the pages of so many blocks is these layers'."""
        return self.share_of(num_blocks * self._grid.pages_per_block, layers)

    def share_of(self, num_pages: int, layers: slice) -> int:
        """What of so many pages is these layers'; no page is left over."""
        before, end = (num_pages * edge // self._grid.num_layers for edge in (layers.start, layers.stop))
        return end - before
