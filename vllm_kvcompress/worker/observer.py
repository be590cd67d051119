"""Keeps the queries of each prompt's last tokens, whatever chunks they are computed in."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ObservedSpan:
    """Tokens of one step whose queries belong to a request's observation window.

    Attributes:
        window: `[L, w, Hq, D]`, the request's buffer.
        start: window index of the span's first token.
        tokens: the span's tokens in the batch.
    """

    window: Tensor
    start: int
    tokens: slice

    def record(self, layer_index: int, query: Tensor) -> None:
        """Copy the span out of a layer's queries `[tokens, Hq, D]`."""
        length = self.tokens.stop - self.tokens.start
        self.window[layer_index, self.start : self.start + length] = query[self.tokens]


class Observer:
    """Query windows of the requests whose compaction is still to come.

    A window covers the prompt tokens `[P-w, P)` by position, so chunked prefill, short last chunks and the
    replay after a preemption all leave the same content.
    """

    def __init__(self, num_layers: int, num_query_heads: int, head_size: int, dtype: torch.dtype) -> None:
        self._shape = (num_query_heads, head_size)
        self._num_layers = num_layers
        self._dtype = dtype
        self._windows: dict[str, tuple[int, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._windows)

    def watch(self, request_id: str, num_prompt_tokens: int, window: int) -> None:
        """Start to keep the queries of the prompt's last `window` tokens."""
        first = num_prompt_tokens - window
        assert first >= 0
        if request_id not in self._windows:
            buffer = torch.zeros(self._num_layers, window, *self._shape, dtype=self._dtype)
            self._windows[request_id] = first, buffer

    def take(self, request_id: str) -> Tensor:
        """Hand over and forget a request's `[L, w, Hq, D]` queries."""
        return self._windows.pop(request_id)[1]

    def forget(self, request_id: str) -> None:
        """Drop a request's window, if it has one."""
        self._windows.pop(request_id, None)

    def spans(
        self, request_ids: Sequence[str], query_start_loc: Tensor, seq_lens: Tensor
    ) -> list[ObservedSpan]:
        """Which of this step's tokens to keep.

        Args:
            request_ids: one per row.
            query_start_loc: `[R + 1]`, on the CPU.
            seq_lens: `[R]`, tokens of each row including this step's.
        """
        spans = []
        for row, request_id in enumerate(request_ids):
            if request_id not in self._windows:
                continue
            first, buffer = self._windows[request_id]
            begin, end = query_start_loc[row : row + 2].tolist()
            # Position p is at batch index p + shift.
            shift = end - int(seq_lens[row])
            start = max(first, begin - shift)
            stop = min(first + buffer.shape[1], end - shift)
            if start < stop:
                spans.append(ObservedSpan(buffer, start - first, slice(start + shift, stop + shift)))
        return spans
