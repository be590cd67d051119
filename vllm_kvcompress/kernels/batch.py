"""What the attention kernel reads of compacted requests, of a batch and of a layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

MOMENT_ROWS = 32  # of a covariance that one program has


def moment_shape(query_heads: int, head_size: int) -> tuple[int, int, int, int]:
    """Shape of a layer's moments of queries, float32 (see `kernels.moments`).

    Of each query head the rows of its `[D, D]` scatter, by so many; behind each of these parts a row with the
    mean, and one that begins with the number of queries.
    """
    return query_heads, -(-head_size // MOMENT_ROWS), MOMENT_ROWS + 2, head_size


@dataclass(frozen=True)
class Runs:
    """Where the runs of compacted requests are: arrays that stay in place, indexed by state slot.

    Attributes:
        destination: `[S, n]` int32, each request's compacted blocks in order.
        start: `[S, L·H + 1]` int32; the run of (layer l, head h) goes from linear page start[l·H + h] up to
            the next entry.
        boundary: `[S]` int32, first raw token, a multiple of the block size.
        format: `[S]` int32, how each request's runs are written: 0 for raw tokens, else 1 + the place of the
            format in `formats.FORMATS`; all are raw if it is not given.
        encoded: `[S, P, L·H]` int32, tokens that the run of each (layer, head) holds in records of each part
            of its format, a multiple of 32, P being the most parts of a format; read of requests with a
            format only.
        first: `[S, P, L·H]` int32, the place of a part's first one (see `formats.arrange`).
        slots: of each layer, in which of the cache's slots its raw pages are; its own number if it is not
            given. Layers of several cache groups share a slot, in different blocks.
    """

    destination: Tensor
    start: Tensor
    boundary: Tensor
    format: Tensor = None  # type: ignore[assignment]
    encoded: Tensor = None  # type: ignore[assignment]
    first: Tensor = None  # type: ignore[assignment]
    slots: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.format is None:
            object.__setattr__(self, "format", torch.zeros_like(self.boundary))
        for name in ("encoded", "first"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, torch.zeros_like(self.start[:, None, 1:]))

    def num_layers(self, heads: int) -> int:
        """L, of so many KV heads each."""
        return (self.start.shape[1] - 1) // heads

    def slot_of(self, layer: int) -> int:
        """The cache's slot of a layer's raw pages."""
        return self.slots[layer] if self.slots else layer


@dataclass(frozen=True)
class Rows:
    """The rows of a batch.

    Attributes:
        slot: `[R]` int32 or int64, each row's state slot in `Runs`; -1 if it is not compacted.
        block_table: `[R, W]` int32, vLLM's blocks by position in the layer's cache group; columns below the
            boundary are not read.
        seq_lens: `[R]` int32, tokens of each row by position, this step's included.
        query_start_loc: `[R + 1]` int32; a row without queries is padding.
        max_query_len: queries of the longest row, or a bound on it; it fixes the grid.
    """

    slot: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    max_query_len: int


@dataclass(frozen=True)
class Scales:
    """What a layer's float8 numbers are multiplied with, each one float32 where the cache is.

    Captured graphs read them when they are replayed, as vLLM's kernels do.

    Attributes:
        query: of queries, if they are float8 too.
        key: of keys.
        value: of values.
    """

    query: Tensor
    key: Tensor
    value: Tensor

    def read_queries(self, query: Tensor, dtype: torch.dtype) -> Tensor:
        """Queries in a model's dtype, whether they are float8 or in it already."""
        return query if query.dtype == dtype else (query.float() * self.query).to(dtype)
