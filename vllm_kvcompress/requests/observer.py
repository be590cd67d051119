"""Keeps what policies need of queries, whatever chunks they are computed in."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vllm_kvcompress.paging.job import Job, Repetition
from vllm_kvcompress.plan import SPARE_QUERIES
from vllm_kvcompress.policies.base import LayerObservation, Policy, RepeatedPart
from vllm_kvcompress.policies.rotary import Rotary
from vllm_kvcompress.requests.cache import PagedCache
from vllm_kvcompress.requests.moments import QueryMoments
from vllm_kvcompress.requests.sums import PageSums
from vllm_kvcompress.requests.tables import RequestTable

KEY_BYTES = 64 << 20  # of float32 keys of a layer that are read at once of several rows


@dataclass(frozen=True)
class LayerAttention:
    """A layer's own constants: policies must not guess them.

    Attributes:
        scale: softmax scale.
        logits_soft_cap: 0 for none.
        sinks: `[H, G]` float32, one more logit of each query head; None for none.
        rotary: its position embedding, by no angle where it has none; None if it is of another kind.
        output_projection: makes `[H, G, D, hidden]`, the projection behind it; None if there is none.
        index: its number in the whole model, counted from 0.
        first_head: which of its KV heads this rank's first one is.
    """

    scale: float
    logits_soft_cap: float
    sinks: Tensor | None = None
    rotary: Rotary | None = None
    output_projection: Callable[[], Tensor] | None = None
    index: int = 0
    first_head: int = 0


@dataclass
class Observed:
    """What is kept of one request's queries.

    Attributes:
        policy: whose needs these are.
        ring: `[L, w + SPARE_QUERIES, Hq, D]`, the query of position p in slot p mod its length; None without
            a window.
        states: per layer, what the policy's `observe` returned last.
        drafts: per layer, the first position of the last step's drafts, and their queries `[n, Hq, D]`; the
            next step tells how many of them were accepted.
        paused: whether the request's queries go by unnoted: it is past its compaction point.
        repeated: per layer, the request that repeats the context, and the position below which its queries
            are noted: it may be preempted and begin again.
        sums: where a kernel keeps what the policy's states would be.
        moments: likewise, of policies that ask for moments.
    """

    policy: Policy
    ring: Tensor | None
    states: list[Any]
    drafts: dict[int, tuple[int, Tensor]] = field(default_factory=dict)
    paused: bool = False
    repeated: dict[int, tuple[str, int]] = field(default_factory=dict)
    sums: PageSums | None = None
    moments: QueryMoments | None = None

    @property
    def noted_by_kernels(self) -> bool:
        """Whether kernels note what the policy would observe."""
        return self.sums is not None or self.moments is not None

    def window(self, layers: slice, num_tokens: int) -> Tensor:
        """Some layers' queries `[w, l, Hq, D]` of the last w of `num_tokens` tokens."""
        assert self.ring is not None
        last = self._slots(num_tokens - self.policy.window, num_tokens)
        return self.ring[layers].transpose(0, 1)[last]

    def record(self, layer: int, first: int, queries: Tensor) -> None:
        """Put queries `[n, Hq, D]` of positions from `first` on into the ring."""
        if self.ring is None:
            return
        if len(queries) == 1:
            self.ring[layer, first % self.ring.shape[1]] = queries[0]
            return
        newest = queries[-self.ring.shape[1] :]
        end = first + len(queries)
        self.ring[layer, self._slots(end - len(newest), end)] = newest

    def accumulate(
        self, layer: int, first: int, queries: Tensor, num_drafts: int, context: "RowContext"
    ) -> None:
        """Have the policy observe queries `[n, Hq, D]` of positions from `first` on.

        The last `num_drafts` of them wait, as they may be rejected; of those that waited, the ones below
        `first` were accepted.
        """
        end = first + len(queries) - num_drafts
        certain = queries[: end - first]
        if layer in self.drafts:
            waited_from, waited = self.drafts.pop(layer)
            certain = torch.cat([waited[: first - waited_from], certain])
        if num_drafts:
            self.drafts[layer] = end, queries[end - first :].clone()
        if len(certain):
            seen = context.observe(layer, certain, end, self.policy.observes_keys)
            self.states[layer] = self.policy.observe(replace(seen, state=self.states[layer]))

    def _slots(self, begin: int, end: int) -> Tensor:
        assert self.ring is not None
        return torch.arange(begin, end, device=self.ring.device) % self.ring.shape[1]


class Queries(Protocol):
    """A layer's queries of a batch, `[tokens, Hq, D]`: a tensor, or what makes some of them."""

    def __getitem__(self, tokens: slice | Tensor) -> Tensor:
        """Those of some tokens, `[n, Hq, D]`."""


class Span(Protocol):
    """Tokens of one step whose queries are observed."""

    def record(self, layer: int, query: Queries) -> None:
        """Note a layer's queries, once its keys are in the cache."""


@dataclass(frozen=True)
class QuerySpan:
    """One row of a batch.

    Attributes:
        observed: its request's record.
        tokens: the row's tokens in the batch.
        first: position of the first one.
        context: what is needed to read the request's keys.
        ring: whether to write the ring, too.
        num_drafts: how many of the tokens, the last ones, are drafts.
    """

    observed: Observed
    tokens: slice
    first: int
    context: "RowContext"
    ring: bool
    num_drafts: int

    def record(self, layer: int, query: Queries) -> None:
        accumulates, ring = self.observed.policy.accumulates, self.observed.ring
        begin, end = self.tokens.start, self.tokens.stop
        if not accumulates:  # older ones would be overwritten at once
            begin = end if ring is None else max(begin, end - ring.shape[1])
        own, first = query[begin:end], self.first + begin - self.tokens.start
        if self.ring:
            self.observed.record(layer, first, own)
        if accumulates:
            self.observed.accumulate(layer, first, own, self.num_drafts, self.context)

    @property
    def decodes(self) -> bool:
        """Whether it is one token whose policy may observe others' with it, as those of more heads."""
        one = self.tokens.stop - self.tokens.start == 1 and not self.num_drafts and not self.observed.drafts
        policy = self.observed.policy
        sums = policy.accumulates and policy.stacks_layers and type(policy).stack is Policy.stack
        return one and sums and not (self.ring and policy.window)


class DecodingSpan:
    """Rows of one token each, whose policies are the same: observed as one row with all their heads."""

    def __init__(self, rows: Sequence[QuerySpan]) -> None:
        self.rows = rows
        self.context = rows[0].context
        grid = self.context.cache.grid
        every = slice(0, grid.num_layers)
        pages = [row.context.cache.context(every, row.context.table, row.context.blocks) for row in rows]
        self._most = max(own.shape[1] for own in pages)
        aligned = [torch.nn.functional.pad(own, (self._most - own.shape[1], 0), value=-1) for own in pages]
        split = [own.view(grid.num_layers, grid.num_heads, -1) for own in aligned]
        self._pages = torch.stack(split, 1).flatten(1, 2)  # [L, R·H, most]
        # A row's last page is filled to its own token, so its columns are moved up to the others' last one.
        self._slack = [-(row.first + 1) % grid.block_size for row in rows]
        on_device = self.context.cache.on_device
        slack = on_device(self._slack).repeat_interleave(grid.num_heads)
        self._empty = (self._pages < 0).sum(2) * grid.block_size + slack  # [L, R·H]
        self._tokens = on_device([row.tokens.start for row in rows])

    def record(self, layer: int, query: Queries) -> None:
        context, heads = self.context, self.context.cache.grid.num_heads
        block_size = context.cache.grid.block_size
        widths = [row.context.num_pages(slice(layer, layer + 1)) for row in self.rows]
        width = max(widths) * block_size
        pages = self._pages[layer, :, self._most - max(widths) :]
        held = context.cache.read_keys(pages, slice(layer, layer + 1))
        keys = torch.empty_like(held, dtype=torch.float32)
        before = torch.zeros(len(held), width - 1, device=held.device)
        for index, (row, slack) in enumerate(zip(self.rows, self._slack, strict=True)):
            own = slice(index * heads, (index + 1) * heads)
            keys[own, slack:] = held[own, : width - slack]
            if (state := row.observed.states[layer]) is not None:
                before[own, width - 1 - state.shape[1] :] = state
        attention, own = context.layers[layer], query[self._tokens]
        seen = LayerObservation(
            keys=keys,
            values=keys[..., :0],
            queries=own.view(1, len(held), -1, own.shape[2]),
            scale=attention.scale,
            num_scored=width,
            logits_soft_cap=attention.logits_soft_cap,
            sinks=None if attention.sinks is None else attention.sinks.repeat(len(self.rows), 1),
            padding=self._empty[layer] - (self._most * block_size - width),
            state=before,
            layers=(attention.index,),
        )
        after = self.rows[0].observed.policy.observe(seen).split(heads)
        for row, own, pages, slack in zip(self.rows, after, widths, self._slack, strict=True):
            row.observed.states[layer] = own[:, width - pages * block_size + slack :]


@dataclass(frozen=True)
class RepeatedSpan:
    """One row of a batch that repeats a part of the context of `observed`'s request, or writes about it.

    As the authors of KVzip do, the attention is over the attention sinks, the part and the repetition alone.
    Of drafts, the last `num_drafts` tokens, no query is noted.
    """

    observed: Observed
    tokens: slice
    first: int
    context: "RowContext"
    part: Repetition
    num_drafts: int = 0

    def record(self, layer: int, query: Queries) -> None:
        name, noted = self.observed.repeated.get(layer, ("", 0))
        # The context's last, incomplete block is computed again.
        begin = max(self.part.num_context, noted if name == self.part.request_id else 0)
        since = self.tokens.start + max(begin - self.first, 0)
        if since >= self.tokens.stop - self.num_drafts:
            return
        own = query[since : self.tokens.stop - self.num_drafts]
        end = max(begin, self.first) + len(own)
        self.observed.repeated[layer] = self.part.request_id, end
        policy, states = self.observed.policy, self.observed.states
        sinks, length = min(policy.sinks, self.part.begin), self.part.end - self.part.begin
        ranges = range(sinks), range(self.part.begin, self.part.end), range(self.part.num_context, end)
        seen = self.context.observe_ranges(layer, own, end, ranges)
        columns = slice(self.part.begin, self.part.end)
        repeated = RepeatedPart(columns, slice(sinks, sinks + length), self.part.num_context)
        states[layer] = policy.repeat(replace(seen, state=states[layer]), repeated)


@dataclass(frozen=True)
class RowContext:
    """Reads the keys of one row of a batch.

    Attributes:
        cache: every page.
        layers: the layers' constants.
        table: what the request is compacted to, if it is.
        blocks: `[n]` int64, its raw blocks; or `[G, n]`, those of each group of layers.
    """

    cache: PagedCache
    layers: Sequence[LayerAttention]
    table: RequestTable | None
    blocks: Tensor

    def num_pages(self, layers: slice) -> int:
        """Pages of the longest of some layers' columns."""
        return self.blocks.shape[-1] + (0 if self.table is None else self.table.longest(layers))

    def observe(
        self, layer: int, queries: Tensor, num_tokens: int, read_keys: bool = True
    ) -> LayerObservation:
        """A layer as its newest queries `[n, Hq, D]` see it."""
        own = slice(layer, layer + 1)
        pages = self.cache.context(own, self.table, self.blocks)
        block_size, heads = self.cache.grid.block_size, self.cache.grid.num_heads
        boundary = 0 if self.table is None else self.table.boundary
        raw = num_tokens - boundary
        width = (pages.shape[1] - self.blocks.shape[-1]) * block_size + raw
        keys = torch.empty(heads, width, 0, device=queries.device)
        if read_keys:
            keys = self.cache.read_keys(pages, own)[:, :width]
        padding = (pages < 0).sum(1) * block_size
        # Whether there is any is asked where asking does not wait for a device.
        padded = self.table is not None and (padding.is_cuda or bool(padding.any()))
        attention = self.layers[layer]
        return LayerObservation(
            keys=keys,
            values=keys[..., :0],
            queries=queries.unflatten(1, (heads, -1)),
            scale=attention.scale,
            num_scored=width,
            num_tokens=num_tokens,
            logits_soft_cap=attention.logits_soft_cap,
            sinks=attention.sinks,
            padding=padding if padded else None,
            rotary=attention.rotary,
            layers=(attention.index,),
            first_head=attention.first_head,
            kept_positions=None
            if self.table is None
            else functools.partial(self.table.column_positions, own, num_tokens),
        )

    def observe_ranges(
        self, layer: int, queries: Tensor, num_tokens: int, ranges: Sequence[range]
    ) -> LayerObservation:
        """As `observe`, but the context is these ascending ranges of positions alone.

        Args:
            layer: of a request that is not compacted.
            queries: `[n, Hq, D]`, of the last range's end.
            num_tokens: positions computed.
            ranges: of positions.
        """
        assert self.table is None
        size, device = self.cache.grid.block_size, queries.device
        read: list[int] = []  # blocks
        columns = []
        for each in filter(len, ranges):
            column = len(read) * size + each.start % size
            columns.append(torch.arange(column, column + len(each), device=device))
            read += range(each.start // size, -(-each.stop // size))
        own = replace(self, blocks=self.blocks[self.cache.on_device(read)])
        seen = own.observe(layer, queries, len(read) * size)
        positions = torch.cat([torch.arange(each.start, each.stop, device=device) for each in ranges])
        return replace(
            seen,
            keys=seen.keys[:, torch.cat(columns)],
            num_scored=len(positions),
            num_tokens=num_tokens,
            kept_positions=lambda: positions.expand(len(seen.keys), -1),
        )


@dataclass
class Observer:
    """Records of the requests that will be compacted, or compacted again.

    Records are by position, so chunked prefill, short last chunks and the replay after a preemption all leave
    the same content.

    Attributes:
        cache: every page.
        layers: the layers' constants.
        num_query_heads: Hq on this rank.
        head_size: D.
        dtype: of the queries.
        tables: request id to the pages of each compacted request.
        kernel_writes_rings: whether the attention backend has a kernel write the rings, in place of spans.
        num_drafts: request id to the number of drafts among this step's tokens.
        sums: where the attention backend has a kernel add up what policies say with `sums`; None where
            spans do.
        keeps_moments: whether it has a kernel keep the moments of queries that policies say with `moments`.
    """

    cache: PagedCache
    layers: Sequence[LayerAttention]
    num_query_heads: int
    head_size: int
    dtype: torch.dtype
    tables: dict[str, RequestTable]
    kernel_writes_rings: bool = False
    num_drafts: dict[str, int] = field(default_factory=dict)
    sums: PageSums | None = None
    keeps_moments: bool = False
    _observed: dict[str, Observed] = field(default_factory=dict)
    _repetitions: dict[str, Repetition] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._observed)

    def watch(self, request_id: str, policy: Policy) -> None:
        """Start to keep what a policy needs of a request."""
        shape = len(self.layers), policy.window + SPARE_QUERIES, self.num_query_heads, self.head_size
        ring = torch.zeros(shape, dtype=self.dtype, device=self.cache.device) if policy.window else None
        sums, moments = None if policy.sums is None else self.sums, None
        if self.keeps_moments and policy.moments is not None:
            shape = len(self.layers), self.num_query_heads, self.head_size
            moments = QueryMoments.empty(*shape, policy.moments, self.cache.device)
        states = [None] * len(self.layers)
        self._observed[request_id] = Observed(policy, ring, states, sums=sums, moments=moments)

    def watch_repetition(self, repetition: Repetition) -> None:
        """Start to keep what a repeating request tells of its owner's context."""
        self._repetitions[repetition.request_id] = repetition

    def of(self, request_id: str) -> Observed | None:
        """A request's record, if it has one."""
        return self._observed.get(request_id)

    def settle(self, job: Job) -> None:
        """Have the policy observe the drafts before a compaction that were accepted."""
        observed = self._observed.get(job.request_id)
        if observed is None or not observed.drafts:
            return
        blocks = torch.tensor(job.raw, dtype=torch.int64, device=self.cache.device)
        context = RowContext(self.cache, self.layers, self.tables.get(job.request_id), blocks)
        for layer, (_, waiting) in list(observed.drafts.items()):
            observed.accumulate(layer, job.num_tokens, waiting[:0], 0, context)

    def ring(self, request_id: str) -> Tensor | None:
        """A request's query ring `[L, C, Hq, D]`, if it has one."""
        observed = self._observed.get(request_id)
        return None if observed is None or observed.paused else observed.ring

    def moments(self, request_id: str) -> QueryMoments | None:
        """Where a kernel is to keep the moments of a request's queries; None for none."""
        observed = self._observed.get(request_id)
        return None if observed is None or observed.paused else observed.moments

    def adds(self, request_id: str) -> Literal["attention", "squares", "nothing"] | None:
        """What a kernel adds up of a request: nothing while it is paused, but new tokens begin at 0; None if
        there is no kernel's affair in it."""
        observed = self._observed.get(request_id)
        if observed is None or observed.sums is None:
            return None
        return "nothing" if observed.paused else observed.policy.sums

    def pause(self, request_id: str) -> None:
        """Keep a request's record, if it has one, as it is until its compaction."""
        if (observed := self._observed.get(request_id)) is not None:
            observed.paused = True

    def resume(self, request_id: str) -> None:
        """Keep what a request's next compaction needs from now on."""
        self._observed[request_id].paused = False

    def drop_states(self, request_id: str) -> None:
        """Drop what a policy noted of a request's context, which nobody will make use of."""
        self._observed[request_id].states = [None] * len(self.layers)

    def recall(self, request_id: str) -> None:
        """Drop what a policy noted of a request's context, which is as large, once it is made use of, but for
        what it recalls of it."""
        observed = self._observed[request_id]
        observed.states = [observed.policy.recall(state) for state in observed.states]

    def forget(self, request_id: str) -> None:
        """Drop a request's record, if it has one."""
        self._observed.pop(request_id, None)
        self._repetitions.pop(request_id, None)

    def notes(self, request_ids: Iterable[str | None]) -> bool:
        """Whether spans would note anything of a step with these requests."""
        return any(self._noted_by_spans(name) is not None for name in request_ids)

    def _noted_by_spans(self, request_id: str | None) -> tuple[Observed, Repetition | None] | None:
        """Whose record a span would write of a request's tokens, and of what part they are a repetition."""
        if request_id is None:
            return None
        repetition = self._repetitions.get(request_id)
        observed = self._observed.get(repetition.owner_id if repetition else request_id)
        if observed is None or repetition is None and (observed.paused or self._is_kernels(observed)):
            return None
        return observed, repetition

    def _is_kernels(self, observed: Observed) -> bool:
        """Whether kernels note all that is kept of a request's own queries."""
        return self.kernel_writes_rings and (observed.noted_by_kernels or not observed.policy.accumulates)

    def spans(
        self,
        request_ids: Sequence[str | None],
        query_start_loc: Tensor,
        seq_lens: Tensor,
        block_table: Tensor,
    ) -> list[Span]:
        """Which of this step's tokens to note.

        Args:
            request_ids: one per row; None for rows of no request.
            query_start_loc: `[R + 1]`, on the CPU.
            seq_lens: `[R]`, tokens of each row including this step's.
            block_table: `[R, W]`, vLLM's blocks by position.
        """
        spans: list[Span] = []
        decoding: list[list[QuerySpan]] = []
        for row, request_id in enumerate(request_ids):
            if (noted := self._noted_by_spans(request_id)) is None:
                continue
            observed, repetition = noted
            begin, end = query_start_loc[row : row + 2].tolist()
            seq_len = int(seq_lens[row])
            table = self.tables.get(request_id)
            boundary = 0 if table is None else table.boundary
            block_size = self.cache.grid.block_size
            blocks = block_table[row, boundary // block_size : -(-seq_len // block_size)].long()
            context = RowContext(self.cache, self.layers, table, blocks)
            row_span = (observed, slice(begin, end), seq_len - (end - begin), context)
            num_drafts = self.num_drafts.get(request_id, 0)
            if repetition:
                spans.append(RepeatedSpan(*row_span, repetition, num_drafts))
            else:
                span = QuerySpan(*row_span, not self.kernel_writes_rings, num_drafts)
                if not span.decodes:
                    spans.append(span)
                    continue
                alike = [others for others in decoding if others[0].observed.policy == observed.policy]
                alike[0].append(span) if alike else decoding.append([span])
        for alike in decoding:
            for together in _together(alike):
                spans.append(DecodingSpan(together) if len(together) > 1 else together[0])
        return spans


def _together(rows: list[QuerySpan]) -> Iterator[list[QuerySpan]]:
    """Rows of like length whose keys, padded to the longest one's, take no more memory than they may."""
    cache = rows[0].context.cache
    of_page = cache.grid.block_size * cache.grid.num_heads * 4 * cache.head_size
    some: list[QuerySpan] = []
    lengths = [row.context.num_pages(slice(0, cache.grid.num_layers)) for row in rows]
    for length, row in sorted(zip(lengths, rows, strict=True), key=itemgetter(0)):  # the longest so far
        of_each = length * of_page
        if some and (len(some) + 1) * of_each > KEY_BYTES:
            yield some
            some = []
        some.append(row)
    yield some
