"""What all queries of a step attend to, reduced to one number per token."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vllm_kvcompress.policies.base import (
    QUERY_BLOCK,
    LayerObservation,
    Policy,
    exact_products,
    softmax_beside,
)

BLOCK_BYTES = 2 << 20  # of logits held at once on a CPU, or one head's: they should stay in its caches
DEVICE_BLOCK_BYTES = 64 << 20  # likewise elsewhere, or one query's; no more than 3 copies are made of them

Reduction = Literal["sum", "sum of squares", "max"]


def column_attention(observation: LayerObservation, reduction: Reduction) -> Tensor:
    """What the newest queries pay to each of the W columns: the reduction of A over them and their group.

        A = softmax(cap·tanh(scale·q·kᵀ / cap)), or softmax(scale·q·kᵀ) without a cap, causal

    Returns:
        `[H, W]` float32; 0 where a head holds nothing.
    """
    result = torch.zeros(observation.keys.shape[:2], device=observation.keys.device)
    for part in attention_parts(observation):
        own, attention = result[part.heads, part.columns], part.attention
        if reduction == "max":
            torch.maximum(own, attention.amax(1), out=own)
        else:
            own += (attention.square_() if reduction == "sum of squares" else attention).sum(1)
    return result


@dataclass(frozen=True)
class AttentionPart:
    """What some queries of some heads pay to the columns that the last of them sees.

    Attributes:
        heads: which, h of them.
        queries: which of the observation's, q of them.
        columns: which, c of them; to all others they pay nothing.
        attention: `[h, G·q, c]` float32, query head after query head; memory that the next part takes again.
    """

    heads: slice
    queries: slice
    columns: slice
    attention: Tensor


def attention_parts(observation: LayerObservation) -> Iterator[AttentionPart]:
    """Causal attention of the newest queries, part by part.

    A is computed a second time beside the attention kernel, which does not return it: some queries of some
    heads at a time, over the columns that the last of them sees. Logits and softmax are float32 whatever the
    model's dtype: in bf16 most scores of a long prompt tie.
    """
    keys, group, scale = observation.keys, observation.queries.shape[2], observation.scale
    num_queries, (heads, width) = len(observation.queries), keys.shape[:2]
    plain = torch.contiguous_format  # as in memory: read many times, unless a step has a query or two
    often = num_queries * group > 16
    transposed = keys.transpose(1, 2).to(
        torch.float32, memory_format=plain if often else torch.preserve_format
    )
    size, at_once = _block(keys.device.type, heads, group, num_queries, width)
    future = torch.full((size, size), -torch.inf, device=keys.device).triu_(1)
    per_head = group * size * width
    memory = torch.empty(at_once * per_head, device=keys.device)  # new memory costs page faults
    padding = absent = None
    if observation.padding is not None:
        absent = ~observation.holds()[:, None]
        if keys.device.type == "cpu":
            padding = observation.padding.tolist()
    cap = observation.logits_soft_cap
    with exact_products(keys, observation.queries):
        for begin in range(0, num_queries, size):
            end = min(begin + size, num_queries)
            queries = (
                observation.queries[begin:end].permute(1, 2, 0, 3).to(torch.float32, memory_format=plain)
            )
            seen = width - num_queries + end
            for some, first in _heads(heads, len(memory) // (group * (end - begin) * seen), padding):
                block = queries[some].flatten(1, 2)
                shape = *block.shape[:2], seen - first
                logits = memory[: math.prod(shape)].view(shape)
                alpha = scale / cap if cap else scale
                torch.baddbmm(logits, block, transposed[some, :, first:seen], beta=0, alpha=alpha, out=logits)
                if cap:
                    logits.tanh_().mul_(cap)
                newest = logits.unflatten(1, (group, -1))[..., begin - end :]
                newest += future[: end - begin, : end - begin]
                if absent is not None and (padding is None or len(logits) > 1):  # else `first` says it
                    logits.masked_fill_(absent[some, :, first:seen], -torch.inf)
                sinks = None if observation.sinks is None else observation.sinks[some]
                attention = softmax_beside(sinks, logits.unflatten(1, (group, -1))).flatten(1, 2)
                yield AttentionPart(some, slice(begin, end), slice(first, seen), attention)


def _block(device: str, heads: int, group: int, num_queries: int, width: int) -> tuple[int, int]:
    """How many queries of how many heads to take at once."""
    size, room = min(QUERY_BLOCK, num_queries), (BLOCK_BYTES if device == "cpu" else DEVICE_BLOCK_BYTES) // 4
    if device != "cpu":
        size = max(1, min(size, room // (group * width)))
    return size, max(1, min(heads, room // (group * size * width)))


def _heads(heads: int, at_once: int, padding: list[int] | None) -> Iterator[tuple[slice, int]]:
    """Which heads to take together, and the first column that any of them holds."""
    for head in range(0, heads, at_once):
        some = slice(head, head + at_once)
        yield some, 0 if padding is None else min(padding[some])


class AttentionSum(Policy):
    """Scores by what all queries so far have paid to each token: a running `[H, W]` float32 sum per layer.

    Once a request is compacted, A is over what the heads kept, and the sums of dropped tokens are gone.

    Attributes:
        squared: whether A² is summed.
    """

    accumulates: ClassVar[bool] = True
    reads_keys: ClassVar[bool] = False  # but for `observe`
    reads_values: ClassVar[bool] = False
    stacks_layers: ClassVar[bool] = True
    squared: ClassVar[bool]

    @property
    def sums(self) -> Literal["attention", "squares"] | None:  # type: ignore[override]
        own = type(self)
        if own.observe is not AttentionSum.observe or own.carry is not AttentionSum.carry:
            return None  # somebody's own state
        return "squares" if self.squared else "attention"

    def observe(self, observation: LayerObservation) -> Tensor:
        sums = column_attention(observation, "sum of squares" if self.squared else "sum")
        if (before := observation.state) is not None:  # the step's own columns are new
            sums[:, : before.shape[1]] += before
        return sums

    def carry(self, state: Tensor, kept: Tensor) -> Tensor:
        return state.gather(1, kept.clamp(min=0)).masked_fill_(kept < 0, 0.0)

    def score(self, observation: LayerObservation) -> Tensor:
        return observation.state[:, : observation.num_scored]
