"""Which rows of a batch FlashAttention 3 attends to, where that is asked for."""

import os
from collections.abc import Sequence

import torch
from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.attention.backend import AttentionImpl, CommonAttentionMetadata

from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.kernels.flash3 import MIN_QUERIES, Chunk, Chunks, fill, is_missing
from vllm_kvcompress.log import logger
from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.requests.float8 import ON_GPU
from vllm_kvcompress.requests.state import CompressionState

VARIABLE = "KV_COMPRESSION_FLASH3"


def flash3_serves(impls: Sequence[AttentionImpl], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether chunks of a model go to FlashAttention 3: if it is asked for, and can do all that they need.

    Args:
        impls: of the compacted layers.
        dtype: of the model.
        device: of the cache.

    Raises:
        KVCompressionError: the variable says neither yes nor no.
    """
    asked = os.environ.get(VARIABLE, "0")
    if asked not in ("0", "1"):
        raise KVCompressionError(f"{VARIABLE} must be 0 or 1, got {asked!r}")
    if asked == "0":
        return False
    problems = (
        is_missing(device),
        any(getattr(impl, "vllm_flash_attn_version", None) != 3 for impl in impls)
        and "vLLM attends by another version of it, or another backend",
        any(impl.sinks is not None for impl in impls) and "a layer has attention sinks",
        any(impl.kv_cache_dtype in ON_GPU for impl in impls) and "the cache is float8",
        dtype not in (torch.float16, torch.bfloat16) and f"the model is in {dtype}",
    )
    found = next(filter(None, problems), None)
    if found is not None:
        logger.warning("kv-compression: %s=1 is of no use: %s", VARIABLE, found)
    return found is None


class ChunkRows:
    """The chunks of a batch, for the builders of all cache groups.

    Attributes:
        shape: slots of the cache, blocks of each, KV heads, and tokens of a page.
        chunks: of the batch that was shown last; None if our own kernel serves it all.
    """

    def __init__(self, grid: PageGrid, group: int, processors: int) -> None:
        self.shape = grid.num_slots, grid.num_blocks, grid.num_heads, grid.block_size
        self.chunks: Chunks | None = None
        self._group, self._processors = group, processors

    def show(
        self,
        state: CompressionState,
        request_ids: Sequence[str | None],
        common: CommonAttentionMetadata,
    ) -> None:
        """Find the chunks of a batch, by what the host knows of it."""
        found = []
        if common.max_query_len >= MIN_QUERIES and state.runs is not None:
            bounds = common.query_start_loc_cpu.tolist()
            for row, request_id in enumerate(request_ids):
                table = None if request_id is None else state.tables.get(request_id)
                length = bounds[row + 1] - bounds[row]
                if request_id is None or table is None or table.format is not None or length < MIN_QUERIES:
                    continue
                slot, blocks = state.runs.slots[request_id], len(table.destination)
                found.append(Chunk(row, bounds[row], length, slot, blocks))
        lengths = [chunk.queries for chunk in found]
        if not found or not fill(lengths, self._group, self.shape[2], self._processors):
            self.chunks = None
            return
        assert state.runs is not None
        self.chunks = Chunks.of(found, state.runs.arrays, common.num_reqs, self.shape, PIN_MEMORY)
