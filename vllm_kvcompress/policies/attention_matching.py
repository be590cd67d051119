"""Attention Matching: what is kept of a head answers queries as the whole head did."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vllm_kvcompress.matching import (
    Fit,
    Own,
    Problem,
    Units,
    chunk_bytes_on,
    fit_by_parts,
    parts_of,
    peak_bytes,
    select_by_parts,
    whole_bytes,
    within,
)
from vllm_kvcompress.policies.base import LayerObservation, Policy, RepeatedPart
from vllm_kvcompress.policies.recalling import Recalling
from vllm_kvcompress.policies.watching import attention_parts

PART = 4096  # columns of which some are solved for at once
KEPT = 512  # of them, on average: it takes their cube, and is a unit
PURSUED = 512  # columns among which tokens are pursued at once: it takes their square, and should end soon
PURSUIT = 2 / 3  # of the time of a solve, about
OF_COLUMNS = "squares", "most", "by", "at", "member"  # of `Attended`


@dataclass(frozen=True)
class Attended:
    """What a layer's queries so far have paid to its columns, and some of these queries.

    Attributes:
        squares: `[H, W]` float32, the sum of A² over them and their group.
        most: `[H, W]` float32, the most that one of them paid; lower by up to a thousandth.
        by: `[H, W, D]` in the model's dtype, the query that did.
        at: `[H, W]` int64, its position.
        member: `[H, W]` uint8, which of the group's query heads it is of.
        sample: `[m, H, G, D]` likewise, every `stride`-th position's queries.
        positions: `[m]` int64, of these.
        stride: see `sample`.
        seen: positions so far.
    """

    squares: Tensor
    most: Tensor
    by: Tensor
    at: Tensor
    member: Tensor
    sample: Tensor
    positions: Tensor
    stride: int = 1
    seen: int = 0


@dataclass(frozen=True)
class AttentionMatching(Policy):
    """Keys whose biases and values are solved for, so that attention's outputs and mass are as before.

        s_i = Σ over the group Σ over the queries of A_i²
        w = argmin_{w >= 0} Σ_q (Σ_j w_j·e_qj - Σ_i e_qi)² / (Σ_i e_qi)²,  β = log w
        C = argmin Σ_q ‖softmax(q·Kᵀ·scale + β) C - o_q‖² + ridge·‖C - V‖²

    e_qi = exp(scale·q·k_i) and o_q, the output of attention, are over all tokens, j over those kept. The
    reference queries q are a sample of those with which the model repeats its context, as `kvzip` has it do,
    or writes about it, or of the prompt's own; and for each kept token the one query that paid it most. Mass
    is matched as well as output since what follows is attended to beside what is kept.

    Source: Zweiger et al., "Fast KV Compaction via Attention Matching", arXiv 2602.16284. Deviations: tokens
    are chosen by all queries of the pass, not by the sampled ones (by whom what only one query needs is
    lost), in pages for which all heads compete, and by A over the part that is repeated; a token's query that
    paid it most is among those fitted to; values are drawn towards the tokens' own, or they are good for the
    sampled queries alone.

    Attributes:
        queries: "repeat": of the context's repetition; "self-study": of summaries, questions, answers and
            lists that the model makes of the context; "prompt": the prompt's own, causal.
        keys: "attention": a head keeps the tokens of the largest s; "omp": as many of them by orthogonal
            matching pursuit, whose weighted attention adds up to the mass of all.
        references: sampled queries of each KV head, at most; half of that at least if there are as many.
        bias: whether biases are solved for.
        values: whether values are.
        ridge: see above, times the mean square of what its own values weigh.
        waits: whether a request waits until it is solved, rather than decode on its raw cache meanwhile, so
            that its output does not depend on how long that takes.
        chunk: context tokens that are repeated at a time.
        sinks: first tokens of the context that every part's attention includes.
        answer_tokens: of each of the four answers of a self-study, at most.
        recent: share of what heads keep on average that goes to the most recent tokens, of every head.
        recalled: sampled positions whose queries are kept for when a request is compacted again, at most.
        window: last queries by which it is, too; 0 if it never is.
    """

    name: ClassVar[str] = "attention_matching"
    paper: ClassVar[str] = "Fast KV Compaction via Attention Matching (arXiv 2602.16284)"
    cost: ClassVar[str] = "the prompt computed a second time, its attention, and least squares for each head"
    reads_keys: ClassVar[bool] = False  # but for `observe` and `solve`
    reads_values: ClassVar[bool] = False
    stacks_layers: ClassVar[bool] = True
    matches: ClassVar[bool] = True
    queries: Literal["repeat", "self-study", "prompt"] = "repeat"
    keys: Literal["attention", "omp"] = "attention"
    references: int = 2048
    bias: bool = True
    values: bool = True
    ridge: float = 0.01
    waits: bool = False  # type: ignore[misc]
    chunk: int = 2048  # type: ignore[misc]
    sinks: int = 4  # type: ignore[misc]
    answer_tokens: int = 128
    recent: float = 0.0
    recalled: int = 64  # type: ignore[misc]
    window: int = 0

    def __post_init__(self) -> None:
        for name in ("references", "chunk", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("ridge", "sinks", "recalled"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.recent <= 1:
            raise ValueError(f"recent must be between 0 and 1, got {self.recent}")
        if self.recent and self.keys == "omp":
            raise ValueError("recent is a share of what keys=attention chooses")

    @property
    def repeats(self) -> bool:  # type: ignore[override]
        return self.queries != "prompt"

    @property
    def study_tokens(self) -> int:  # type: ignore[override]
        return self.answer_tokens if self.queries == "self-study" else 0

    @property
    def accumulates(self) -> bool:  # type: ignore[override]
        return self.queries == "prompt"

    @property
    def later(self) -> Policy:
        """What was matched stays as it was written, keys, values and biases, or goes, by what the last
        queries of the output and some of the sample pay to it, and so does the output, which nothing is
        solved for."""
        return Recalling(window=self.window)

    def num_recent(self, kept: int) -> int:
        return int(self.recent * kept)

    def recall(self, state: Attended | None) -> Tensor | None:
        if state is None or not self.window or not self.recalled:
            return None
        return state.sample[:: -(-len(state.sample) // self.recalled)].clone()

    def observe(self, observation: LayerObservation) -> Attended:
        width = observation.keys.shape[1]
        before = observation.state or _nothing(observation, 0)
        grown = _nothing(observation, width)
        for name in OF_COLUMNS:
            getattr(grown, name)[:, : before.squares.shape[1]] = getattr(before, name)
        state = replace(before, **{name: getattr(grown, name) for name in OF_COLUMNS})
        _attend(state, observation, slice(0, width), slice(0, width))
        return self._sampled(state, observation)

    def repeat(self, observation: LayerObservation, part: RepeatedPart) -> Attended:
        state = observation.state or _nothing(observation, part.num_context)
        _attend(state, observation, part.columns, part.seen)
        return self._sampled(state, observation)

    def _sampled(self, state: Attended, observation: LayerObservation) -> Attended:
        """With some of the observation's queries: whatever steps they come in, the same."""
        queries, positions = observation.queries, _positions(observation)
        most = max(1, self.references // queries.shape[2])
        stride, sample, kept = state.stride, state.sample, state.positions
        begin = -state.seen % stride
        sample = torch.cat([sample, queries[begin::stride]])
        kept = torch.cat([kept, positions[begin::stride]])
        while len(sample) > most:
            stride, sample, kept = 2 * stride, sample[::2].clone(), kept[::2].clone()
        seen = state.seen + len(queries)
        return replace(state, sample=sample, positions=kept, stride=stride, seen=seen)

    def stack(self, states: list[Any]) -> Any:
        if len(states) == 1 or states[0] is None:
            return states[0]
        joined = {name: torch.cat([getattr(state, name) for state in states]) for name in OF_COLUMNS}
        return replace(states[0], **joined, sample=torch.cat([state.sample for state in states], 1))

    def score(self, observation: LayerObservation) -> Tensor:
        return observation.state.squares[:, : observation.num_scored]

    def solve(
        self, observation: LayerObservation, heads: slice, columns: Tensor, present: Tensor, leading: int
    ) -> Units[tuple[Tensor, Tensor, Fit]]:
        begin = 0.0
        if self.keys == "omp":
            begin, asked = PURSUIT, self._problem(observation, heads, columns)
            pursuing = select_by_parts(*asked, columns, present, PURSUED, leading)
            columns, present = yield from within(pursuing, 0.0, begin)
        wanted = {"bias": self.bias, "values": self.values, "value_ridge": self.ridge}
        problem, own = self._problem(observation, heads, columns)
        fitting = fit_by_parts(problem, own, columns, present, PART, KEPT, **wanted)
        return columns, present, (yield from within(fitting, begin, 1.0))

    def _problem(self, observation: LayerObservation, heads: slice, columns: Tensor) -> tuple[Problem, Own]:
        """What some heads' columns are to answer: the sample, and of each column the query that paid most."""
        state, scored = observation.state, observation.num_scored
        own = state.by[heads].gather(1, columns[..., None].expand(-1, -1, state.by.shape[2]))
        sample = state.sample[:, heads].permute(1, 2, 0, 3)  # `[h, G, m, D]`
        limits = own_limits = None
        if self.accumulates:  # its queries are causal; those of a repetition come after all columns
            sampled = state.positions.repeat(sample.shape[1]).expand(len(columns), -1)
            limits = (sampled + 1).clamp(max=scored)
            own_limits = (state.at[heads].gather(1, columns) + 1).clamp(max=scored)
        sinks = of_own = None
        if observation.sinks is not None:
            of_heads = observation.sinks[heads]  # `[h, G]`
            sinks = of_heads.repeat_interleave(sample.shape[2], 1)
            of_own = of_heads.gather(1, state.member[heads].gather(1, columns).long())
        problem = Problem(
            keys=observation.keys[:, :scored],
            values=observation.values[:, :scored],
            queries=sample.flatten(1, 2),
            scale=observation.scale,
            logits_soft_cap=observation.logits_soft_cap,
            sinks=sinks,
            limits=limits,
        )
        return problem, Own(own, own_limits, of_own)

    def fit_bytes(self, heads: int, tokens: int, columns: int, size: int, device_type: str) -> int:
        chunk = chunk_bytes_on(device_type)
        whole = whole_bytes(heads, tokens, self.references, columns, size)
        lengths = [(-(-tokens // parts_of(tokens, columns, PART, KEPT)), False)]
        if self.keys == "omp":
            lengths.append((min(tokens, PURSUED), True))
        most = max(self._peak(heads, length, columns, size, omp, chunk) for length, omp in lengths)
        return whole + most

    def most_fit_bytes(self, tokens: int, size: int, device_type: str) -> int:
        # More kept columns take more, until they are one part more.
        kept = range(KEPT, tokens + KEPT, KEPT)
        return max(self.fit_bytes(1, tokens, min(columns, tokens), size, device_type) for columns in kept)

    def _peak(self, heads: int, length: int, columns: int, size: int, omp: bool, chunk: int) -> int:
        columns = min(columns, length)
        queries = self.references + columns
        return peak_bytes(heads, length, queries, columns, size, omp=omp, chunk_bytes=chunk)

    def state_bytes(self, tokens: int, size: int, itemsize: int) -> int:
        return tokens * (size * itemsize + 17) + self.references * size * itemsize


def _nothing(observation: LayerObservation, width: int) -> Attended:
    _, heads, group, size = observation.queries.shape
    device, dtype = observation.queries.device, observation.queries.dtype
    return Attended(
        squares=torch.zeros(heads, width, device=device),
        most=torch.zeros(heads, width, device=device),
        by=torch.zeros(heads, width, size, dtype=dtype, device=device),
        at=torch.zeros(heads, width, dtype=torch.int64, device=device),
        member=torch.zeros(heads, width, dtype=torch.uint8, device=device),
        sample=torch.zeros(0, heads, group, size, dtype=dtype, device=device),
        positions=torch.zeros(0, dtype=torch.int64, device=device),
    )


def _positions(observation: LayerObservation) -> Tensor:
    """Of the observation's queries, `[n]` int64."""
    end, device = observation.num_tokens, observation.queries.device
    return torch.arange(end - len(observation.queries), end, device=device)


def _attend(state: Attended, observation: LayerObservation, columns: slice, seen: slice) -> None:
    """Add what an observation's queries pay to some columns of it, `seen`, which are `columns` of the state.

    Which of some queries paid most is carried in the lowest bits of how much: one pass finds both.
    """
    shift, positions = columns.start - seen.start, _positions(observation)
    for part in attention_parts(observation):
        begin, end = (min(max(at, seen.start), seen.stop) for at in (part.columns.start, part.columns.stop))
        attention = part.attention[..., begin - part.columns.start : end - part.columns.start]
        heads, own = part.heads, slice(begin + shift, end + shift)
        state.squares[heads, own] += attention.square().sum(1)
        rows = attention.shape[1]
        bits = max(1, (rows - 1).bit_length())
        coded = attention.contiguous().view(torch.int32)
        number = torch.arange(rows, dtype=torch.int32, device=coded.device)[:, None]
        coded = coded.bitwise_and_(-1 << bits).bitwise_or_(number).amax(1)  # `[h, c]`
        most = (coded & (-1 << bits)).view(torch.float32)
        which = (coded & ((1 << bits) - 1)).long()
        queries = observation.queries[part.queries, heads].permute(1, 2, 0, 3).flatten(1, 2)
        chosen = queries.gather(1, which[..., None].expand(-1, -1, queries.shape[2]))
        better = most > state.most[heads, own]
        state.most[heads, own] = torch.where(better, most, state.most[heads, own])
        state.by[heads, own] = torch.where(better[..., None], chosen, state.by[heads, own])
        num_queries = part.queries.stop - part.queries.start
        at, member = positions[part.queries][which % num_queries], (which // num_queries).to(torch.uint8)
        state.at[heads, own] = torch.where(better, at, state.at[heads, own])
        state.member[heads, own] = torch.where(better, member, state.member[heads, own])
