"""Where compacted requests have their pages, in arrays that stay in place for captured graphs."""

import torch

from vllm_kvcompress.formats import FORMATS, RECORD, number_of
from vllm_kvcompress.kernels.batch import Runs
from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.requests.tables import RequestTable


class RunArrays:
    """The runs of every compacted request.

    Attributes:
        arrays: what the kernel reads, one slot per request.
        slots: request id to its slot.
    """

    def __init__(self, grid: PageGrid, max_requests: int, max_blocks: int, device: torch.device) -> None:
        """Make room.

        Args:
            grid: the cache's geometry.
            max_requests: that can be compacted at a time.
            max_blocks: that one of them can be compacted to.
            device: of the cache.
        """
        heads = grid.num_layers * grid.num_heads
        parts = max_requests, max(len(format.parts) for format in FORMATS.values()), heads
        self.arrays = Runs(
            destination=torch.zeros(max_requests, max_blocks, dtype=torch.int32, device=device),
            start=torch.zeros(max_requests, heads + 1, dtype=torch.int32, device=device),
            boundary=torch.zeros(max_requests, dtype=torch.int32, device=device),
            format=torch.zeros(max_requests, dtype=torch.int32, device=device),
            encoded=torch.zeros(parts, dtype=torch.int32, device=device),
            first=torch.zeros(parts, dtype=torch.int32, device=device),
            slots=grid.slots,
        )
        self.slots: dict[str, int] = {}
        self._free = list(range(max_requests))

    def put(self, request_id: str, table: RequestTable) -> None:
        """Write a request's table, on the device and in stream order."""
        slot = self.slots.get(request_id)
        if slot is None:
            slot = self.slots[request_id] = self._free.pop()
        self.arrays.destination[slot, : len(table.destination)] = table.destination
        self.arrays.start[slot, 1:] = table.counts.flatten().cumsum(0)
        self.arrays.boundary[slot] = table.boundary
        self.arrays.format[slot] = number_of(table.format)
        if (records := table.records) is not None:
            parts = slice(len(records.counts))
            self.arrays.encoded[slot, parts] = RECORD * records.counts.flatten(1)
            self.arrays.first[slot, parts] = records.first.flatten(1)

    def drop(self, request_id: str) -> None:
        """Forget a request, if it is known; its slot may be given to another."""
        slot = self.slots.pop(request_id, None)
        if slot is not None:
            self._free.append(slot)
