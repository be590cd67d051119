"""Whom to compact where blocks run short, and how far (`when="pressure"`)."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.request import Request

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.plan import Plan


@dataclass(frozen=True)
class Descent:
    """Compacting a request down to a step of its ladder.

    Attributes:
        request: the request.
        point: tokens computed so far.
        step: number of the step.
        plan: what it does.
        freed: blocks that this frees if nobody shares them.
    """

    request: Request
    point: int
    step: int
    plan: Plan
    freed: int


def descents(
    request: Request,
    config: KVCompressionConfig,
    point: int,
    last_step: int,
    held: Plan | None,
    block_size: int,
    page_tokens: int | None,
    shared: bool = False,
) -> list[Descent]:
    """What a request could give, each more than the one before; nothing if the ladder's end frees too little.

    Args:
        request: the request.
        config: its options.
        point: tokens computed so far.
        last_step: the step that it was compacted at last; 0 before.
        held: its last compaction.
        block_size: tokens per block.
        page_tokens: as of `Plan.of`.
        shared: likewise.
    """
    steps = config.ladder_steps
    before = 0 if held is None else held.source_blocks - (0 if shared else held.kept_blocks)
    found: list[Descent] = []
    # The end first: whoever is there already is asked again and again.
    for step in (len(steps) - 1, *range(last_step, len(steps) - 1)):
        plan = Plan.of(config, point, block_size, held, page_tokens, steps[step], shared)
        if plan is None and not found:
            return []
        if plan is not None:
            freed = plan.source_blocks - plan.kept_blocks - before
            found.append(Descent(request, point, step, plan, freed))
    rising: list[Descent] = []
    for descent in (*found[1:], found[0]):
        if not rising or descent.freed > rising[-1].freed:
            rising.append(descent)
    return rising


def least_loss(
    givers: Sequence[tuple[KVCompressionConfig, list[Descent]]], lacking: int, block_size: int
) -> list[Descent]:
    """Who is compacted, and how far, so that `lacking` blocks come free; nobody if there cannot be so many.

    Decoding requests give before those whose prompts are being computed. Then each next step is the one whose
    blocks cost least, as the policies expect; where they cost about the same, within a factor of two, the
    least important requests give before the others, and the younger ones before the older.

    Args:
        givers: options and `descents` of each request.
        lacking: blocks.
        block_size: tokens per block.
    """
    if sum(options[-1].freed for _, options in givers) < lacking:
        return []
    queue: list[tuple[Any, int, int]] = []

    def offer(giver: int, index: int) -> None:
        config, options = givers[giver]
        before = options[index - 1].freed if index else 0
        descent, whole = options[index], -(-options[0].point // block_size)
        now = whole - descent.plan.source_blocks + descent.plan.kept_blocks + descent.freed
        kept = (now - before) / whole, (now - descent.freed) / whole
        lost = config.expected_loss(kept[1]) - config.expected_loss(kept[0])
        loss, request = lost / (descent.freed - before), descent.request
        about = round(math.log2(max(loss, 1e-9)))
        order = request.is_prefill_chunk, about, -request.priority, -request.arrival_time, loss
        heapq.heappush(queue, (order, giver, index))

    for giver in range(len(givers)):
        offer(giver, 0)
    taken: dict[int, Descent] = {}
    freed = 0
    while freed < lacking:
        _, giver, index = heapq.heappop(queue)
        options = givers[giver][1]
        freed += options[index].freed - (options[index - 1].freed if index else 0)
        taken[giver] = options[index]
        if index + 1 < len(options):
            offer(giver, index + 1)
    return list(taken.values())
