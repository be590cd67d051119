"""How the programs of a launch share a batch out among them."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from vllm_kvcompress.kernels.batch import Rows

TILE_BYTES = 16 * 1024  # of the keys, and again of the values, that a program reads at once
MIN_DOT = 16  # rows and columns of tl.dot
MAX_TILE = 64  # queries times group of a program
MOST_KEYS = 128  # at once
MOST_RAW = 64  # of a raw tail behind records


@dataclass(frozen=True)
class Tiles:
    """Some queries of one row each, with the whole group of one KV head.

    Attributes:
        channels: of a head, or the next power of two.
        keys: that a program reads at once.
        rows: of the score matrix: (query, member of the group) pairs.
        queries: of a tile.
        one: whether no row has more.
        count: tiles that are always enough, however the tokens are spread over the rows.
    """

    channels: int
    keys: int
    rows: int
    queries: int
    one: bool
    count: int

    @classmethod
    def of(
        cls,
        query: Tensor,
        heads: int,
        rows: Rows,
        dtype: torch.dtype,
        most_keys: int = MOST_KEYS,
        most_rows: int = MAX_TILE,
    ) -> "Tiles":
        """Those of a batch.

        Args:
            query: `[T, Hq, D]`.
            heads: KV heads.
            rows: the batch.
            dtype: that keys are multiplied in.
            most_keys: for which there are registers.
            most_rows: likewise.
        """
        num_tokens, query_heads, head_size = query.shape
        group, keys = query_heads // heads, keys_at_once(head_size, dtype, most_keys)
        wanted = triton.next_power_of_2(group * rows.max_query_len)
        of_tile = max(MIN_DOT, triton.next_power_of_2(group), min(wanted, keys, most_rows))
        queries, num_rows = of_tile // group, rows.seq_lens.shape[0]
        one = rows.max_query_len <= queries
        count = num_rows if one else num_tokens // queries + num_rows
        return cls(triton.next_power_of_2(head_size), keys, of_tile, queries, one, count)

    def constants(self, query: Tensor, keys: Tensor) -> dict[str, int]:
        """What kernels are told of themselves, and of queries `[T, Hq, D]` and pages `[S, B, H, N, D]`."""
        num_slots, _, heads, block_size, head_size = keys.shape
        return dict(
            ONE_TILE=self.one,
            HEADS=heads,
            PAGES_PER_BLOCK=num_slots * heads,
            GROUP=query.shape[1] // heads,
            BLOCK_SIZE=block_size,
            HEAD_SIZE=head_size,
            CHANNELS=self.channels,
            ROWS=self.rows,
            QUERIES=self.queries,
        )


def keys_at_once(head_size: int, dtype: torch.dtype, most: int) -> int:
    """Keys of so many channels that a program reads at once."""
    return max(MIN_DOT, min(most, TILE_BYTES // (triton.next_power_of_2(head_size) * dtype.itemsize)))


def empty_shares(query: Tensor, num_splits: int, *sums: int) -> tuple[Tensor, Tensor]:
    """Room for what equal shares of a head's keys leave to be merged, float32.

    Args:
        query: `[T, Hq, D]`.
        num_splits: shares.
        sums: dimensions of the results of each, before its channels.

    Returns:
        `[T, Hq, splits, *sums, D]` and, for log-sum-exps, `[T, Hq, splits]`.
    """
    *shape, head_size = *query.shape[:2], num_splits, query.shape[2]
    out = torch.empty(*shape, *sums, head_size, dtype=torch.float32, device=query.device)
    return out, torch.empty(shape, dtype=torch.float32, device=query.device)
