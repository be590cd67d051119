"""What room a compaction's blocks have, and whose it is."""

from vllm_kvcompress.allocation import Allocation, Uniform
from vllm_kvcompress.formats import RECORD
from vllm_kvcompress.requests.cache import PagedCache
from vllm_kvcompress.worker.work import Task, Work


class Room:
    """Blocks have room for all layers of a model, and of its draft model; each has a share of them, so that
    the model keeps what it would without the other, but for how many slots of its groups no layer has."""

    def __init__(self, cache: PagedCache, num_drafting: int) -> None:
        """The last `num_drafting` of the layers are a draft model's."""
        self._cache, self._grid, self._num_drafting = cache, cache.grid, num_drafting

    def num_pages(self, work: Work) -> int:
        """Pages of a Job's destination that can be filled."""
        num_pages = len(work.job.destination) * self._grid.pages_per_block
        if self.fills:
            return num_pages
        held = len(work.job.source) * self._grid.num_layers * self._grid.num_heads
        return min(num_pages, held + (0 if work.table is None else work.table.num_pages))

    @property
    def fills(self) -> bool:
        """Whether raw pages fill all blocks: groups of layers may have slots that no layer of theirs has."""
        return self._grid.num_layers == self._grid.num_groups * self._grid.num_slots

    def tokens_of_head(self, task: Task) -> int:
        """What a head keeps of a request, on average."""
        job = task.work.job
        if (format := job.config.record_format) is None:
            tokens = self.num_pages(task.work) * self._grid.block_size
        else:
            per_page = self._cache.records_per_page(format.parts[format.typical])
            tokens = task.work.num_blocks * self._grid.pages_per_block * per_page * RECORD
        kept = tokens // (self._grid.num_layers * self._grid.num_heads)
        # How much a threshold leaves is not known yet: say a quarter, if there is room.
        return kept if job.config.threshold is None else min(kept, job.boundary // 4)

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
