"""vLLM's CPU attention backend over compacted requests: on vLLM's own kernel, or ours for other formats."""

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_kvcompress.attention.blocks import CompactableBlocks
from vllm_kvcompress.attention.unsupported import OwnLayer, refuse_layer
from vllm_kvcompress.formats import Format
from vllm_kvcompress.kernels.cpu_records import RecordAttention, RecordRows
from vllm_kvcompress.requests.cache import PackedCache
from vllm_kvcompress.requests.float8 import FLOAT8
from vllm_kvcompress.requests.observer import Span
from vllm_kvcompress.requests.state import CompressionState
from vllm_kvcompress.requests.tables import BatchTables, RequestTable, extend, tables_of


@dataclass
class CompactedRows:
    """The compacted rows of a batch, R requests seen as R·H sequences of G query heads and one KV head.

    The kernel takes the same sinks for all sequences. So where there are any, the sequences of each KV head
    are rows of their own, with H = 1 below.

    Attributes:
        query_start_loc: `[R·H + 1]` int32.
        seq_lens: `[L, R·H]` int32, tokens that each head attends over.
        pages: `[L, R·H, W]` int32.
        scheduler_metadata: the kernel's work split, one per layer.
        gather: `[tokens·H]` int64, where the rows' queries are in the batch's `[tokens·H, G, D]`; None when
            they are all of it, in order.
        query_heads: whose sinks they are; None for none.
    """

    query_start_loc: Tensor
    seq_lens: Tensor
    pages: Tensor
    scheduler_metadata: list[Tensor]
    gather: Tensor | None
    query_heads: slice | None = None


@dataclass
class EncodedRows:
    """The rows of a batch that hold records of one format.

    Attributes:
        attention: reads them.
        layers: of each layer.
        tokens: `[tokens]` int64, where their queries are in the batch; None for all of it, in order.
    """

    attention: RecordAttention
    layers: list[RecordRows]
    tokens: Tensor | None


@dataclass
class CompressedCPUAttentionMetadata(CPUAttentionMetadata):
    """vLLM's metadata of the rows that are not compacted, and beside it what the others need.

    `rest_tokens` are the batch's tokens in rows without compaction; it is set when there are others.
    """

    rest_tokens: Tensor | None = None
    compacted: list[CompactedRows] = field(default_factory=list)
    encoded: list[EncodedRows] = field(default_factory=list)
    observed: list[Span] = field(default_factory=list)


class CompressedCPUAttentionBackend(CompactableBlocks, CPUAttentionBackend):
    """CPU attention whose blocks may be compacted."""

    stock = CPUAttentionBackend

    @staticmethod
    def get_impl_cls() -> type["CompressedCPUAttentionImpl"]:
        return CompressedCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type["CompressedCPUAttentionMetadataBuilder"]:
        return CompressedCPUAttentionMetadataBuilder


class CompressedCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Splits a batch into rows that vLLM serves as ever and rows whose heads are sequences."""

    state: CompressionState | None = None  # set by the worker once the cache exists
    has_sinks = False  # likewise: whether any layer has them
    group = 0  # likewise: of the layers that are compacted, see `PageGrid`

    @functools.cached_property
    def _readers(self) -> dict[Format, tuple[RecordAttention, BatchTables]]:
        return {}

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        state = self.state
        if state is None or not state.active:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        common = common_attn_metadata
        request_ids = state.rows.request_ids(common)
        observed = state.observer.spans(
            request_ids, common.query_start_loc_cpu, common.seq_lens, common.block_table_tensor
        )
        tables = tables_of(request_ids, state.tables)
        if not tables:
            stock = super().build(common_prefix_len, common, fast_build)
            return CompressedCPUAttentionMetadata(**vars(stock), observed=observed) if observed else stock

        others = [row for row in range(len(request_ids)) if row not in tables]
        rest_tokens = _tokens_of(others, common.query_start_loc_cpu)
        if others:
            rest = super().build(common_prefix_len, _only_rows(common, others, rest_tokens), fast_build)
        else:
            rest = _no_rows(common)
        extend(tables, common.seq_lens, common.block_table_tensor, self.group)
        by_format: dict[Format | None, dict[int, RequestTable]] = {}
        for row, table in tables.items():
            by_format.setdefault(table.format, {})[row] = table
        mixed = bool(others) or len(by_format) > 1
        raw = by_format.pop(None, None)
        metadata = CompressedCPUAttentionMetadata(
            **vars(rest),
            rest_tokens=rest_tokens,
            compacted=[] if raw is None else self._build_compacted(raw, common, mixed),
            encoded=[self._build_encoded(format, own, common, mixed) for format, own in by_format.items()],
            observed=observed,
        )
        metadata.num_actual_tokens = common.num_actual_tokens
        return metadata

    def _build_encoded(
        self, format: Format, tables: dict[int, RequestTable], common: CommonAttentionMetadata, mixed: bool
    ) -> EncodedRows:
        attention, batch = self._reader(format)
        batch.update(list(tables.values()))
        rows = torch.tensor(list(tables))
        query_lens = common.query_start_loc_cpu.diff()[rows]
        start = torch.zeros(len(rows) + 1, dtype=torch.int32)
        torch.cumsum(query_lens, 0, out=start[1:])
        boundaries = torch.tensor([table.boundary for table in tables.values()])
        tail = (common.seq_lens[rows] - boundaries).to(torch.int32)
        bounds = int(query_lens.max()), batch.most_records, int(tail.max())
        pages = batch.pages.unflatten(1, (len(rows), -1))
        of_layers = zip(pages, batch.counts, batch.records, batch.first, strict=True)
        layers = [RecordRows(start, *of_layer, tail, *bounds) for of_layer in of_layers]
        tokens = _tokens_of(list(tables), common.query_start_loc_cpu) if mixed else None
        return EncodedRows(attention, layers, tokens)

    def _reader(self, format: Format) -> tuple[RecordAttention, BatchTables]:
        """What attends over records of a format, and the tables of its rows."""
        if format not in self._readers:
            assert self.state is not None
            cache = self.state.observer.cache
            assert isinstance(cache, PackedCache)
            places = cache.key_packing.places, cache.value_packing.places
            attention = RecordAttention(format, cache.content, places, cache.pages.dtype)
            self._readers[format] = attention, BatchTables()
        return self._readers[format]

    def _build_compacted(
        self, tables: dict[int, RequestTable], common: CommonAttentionMetadata, mixed: bool
    ) -> list[CompactedRows]:
        assert self.state is not None
        rows, heads = list(tables), self.num_kv_heads
        row_index = torch.tensor(rows)
        seq_lens = common.seq_lens[row_index]
        batch: BatchTables = self.state.batch
        batch.update(list(tables.values()))

        query_lens = common.query_start_loc_cpu.diff()[row_index]
        physical, bounds = batch.seq_lens(seq_lens), common.query_start_loc_cpu
        if not self.has_sinks:
            in_order = not mixed and common.max_query_len == 1
            gather = None if in_order else _head_major(rows, bounds, heads)
            return [self._rows(query_lens.repeat_interleave(heads), physical, batch.pages, gather)]
        tokens, group, found = _tokens_of(rows, bounds) * heads, self.num_heads // heads, []
        for head in range(heads):
            own = slice(head, None, heads)
            pages = batch.pages[:, own].contiguous()
            compacted = self._rows(query_lens, physical[:, own].contiguous(), pages, tokens + head)
            compacted.query_heads = slice(head * group, (head + 1) * group)
            found.append(compacted)
        return found

    def _rows(
        self, query_lens: Tensor, physical: Tensor, pages: Tensor, gather: Tensor | None
    ) -> CompactedRows:
        """Sequences with so many queries `[n]` over so many tokens `[L, n]`, in pages `[L, n, W]`."""
        query_start_loc = torch.zeros(len(query_lens) + 1, dtype=torch.int32)
        torch.cumsum(query_lens, 0, out=query_start_loc[1:])
        uniform = bool((physical == physical[0]).all())
        split = [
            self._work_split(layer, query_start_loc) for layer in (physical[:1] if uniform else physical)
        ]
        return CompactedRows(
            query_start_loc=query_start_loc,
            seq_lens=physical,
            pages=pages,
            scheduler_metadata=split * len(physical) if uniform else split,
            gather=gather,
        )

    def _work_split(self, seq_lens: Tensor, query_start_loc: Tensor) -> Tensor:
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=seq_lens.shape[0],
            num_heads=self.num_heads // self.num_kv_heads,
            num_kv_heads=1,
            head_dim=self.head_dim,
            seq_lens=seq_lens,
            dtype=self.dtype,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )


class CompressedCPUAttentionImpl(OwnLayer, CPUAttentionBackendImpl):
    """Runs vLLM's kernel once for rows without compaction and once for the heads of compacted rows."""

    stock = CPUAttentionBackendImpl
    PLACE = "layer_index", "pages"
    pages: Tensor  # `[S·B·H, 1, 2N, D]`, every page; set by the worker once the cache exists

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        refuse_layer(self, reads=FLOAT8)
        self.sliding_window = -1  # no request outgrows it

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        own = attn_metadata if isinstance(attn_metadata, CompressedCPUAttentionMetadata) else None
        for span in own.observed if own is not None and self.is_observed else ():
            span.record(self.layer_index, query)
        scales = output_scale, output_block_scale
        if own is None or own.rest_tokens is None:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        rest = own.rest_tokens
        if len(rest):
            # The kernel packs its rows' tokens densely, so they are brought together and put back.
            rest_output = output.new_empty(len(rest), *output.shape[1:])
            output[rest] = super().forward(
                layer, query[rest], key, value, kv_cache, attn_metadata, rest_output, *scales
            )
        for compacted in own.compacted:
            self._attend_compacted(layer, query, output, compacted, own.num_actual_tokens)
        for encoded in own.encoded:
            self._attend_encoded(query, output, encoded, own.num_actual_tokens)
        return output

    def _attend_encoded(self, query: Tensor, output: Tensor, rows: EncodedRows, num_tokens: int) -> None:
        own = rows.layers[self.layer_index]
        tokens = slice(0, num_tokens) if rows.tokens is None else rows.tokens
        target = output[tokens].view(-1, self.num_heads, self.head_size)
        heads = query[tokens].view(-1, self.num_heads, self.head_size)
        rows.attention.attend(heads, own, self.scale, self.logits_soft_cap, target, self.sinks)
        if rows.tokens is not None:
            output[tokens] = target.view(-1, *output.shape[1:])

    def _attend_compacted(
        self,
        layer: AttentionLayer,
        query: Tensor,
        output: Tensor,
        rows: CompactedRows,
        num_tokens: int,
    ) -> None:
        shape = (num_tokens * self.num_kv_heads, self.num_queries_per_kv, self.head_size)
        head_query = query[:num_tokens].reshape(shape)
        head_output = output[:num_tokens].view(shape)
        key_pages, value_pages = self.pages.chunk(2, dim=2)
        target = head_output if rows.gather is None else torch.empty_like(head_output[: len(rows.gather)])
        ops.cpu_attention_with_kv_cache(
            query=head_query if rows.gather is None else head_query[rows.gather],
            key_cache=key_pages,
            value_cache=value_pages,
            output=target,
            query_start_loc=rows.query_start_loc,
            seq_lens=rows.seq_lens[self.layer_index],
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=rows.pages[self.layer_index],
            softcap=self.logits_soft_cap,
            scheduler_metadata=rows.scheduler_metadata[self.layer_index],
            s_aux=None if self.sinks is None else self.sinks[rows.query_heads],
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        if rows.gather is not None:
            head_output[rows.gather] = target


def _tokens_of(rows: list[int], query_start_loc: Tensor) -> Tensor:
    """Indices of the tokens of the given rows, `[tokens]` int64."""
    bounds = query_start_loc.tolist()
    return torch.cat(
        [torch.arange(bounds[row], bounds[row + 1]) for row in rows] or [torch.empty(0, dtype=torch.int64)]
    )


def _head_major(rows: list[int], query_start_loc: Tensor, heads: int) -> Tensor:
    """Order `(row, head, token)` of the rows' queries as indices into `(token, head)`, `[tokens·H]` int64."""
    bounds = query_start_loc.tolist()
    head = torch.arange(heads)[:, None]
    return torch.cat(
        [(torch.arange(bounds[row], bounds[row + 1]) * heads + head).reshape(-1) for row in rows]
    )


def _no_rows(common: CommonAttentionMetadata) -> CPUAttentionMetadata:
    """vLLM's metadata where no row is left for vLLM's own path: it is never handed to the kernel."""
    return CPUAttentionMetadata(
        num_actual_tokens=common.num_actual_tokens,
        max_query_len=common.max_query_len,
        query_start_loc=common.query_start_loc,
        max_seq_len=common.max_seq_len,
        seq_lens=common.seq_lens,
        block_table=common.block_table_tensor,
        slot_mapping=common.slot_mapping,
        scheduler_metadata=None,
    )


def _only_rows(common: CommonAttentionMetadata, rows: list[int], tokens: Tensor) -> CommonAttentionMetadata:
    """The batch reduced to some of its rows, as vLLM's builder expects one."""
    index = torch.tensor(rows, dtype=torch.int64)
    query_lens = common.query_start_loc_cpu.diff()[index]
    query_start_loc = torch.zeros(len(rows) + 1, dtype=torch.int32)
    torch.cumsum(query_lens, 0, out=query_start_loc[1:])
    return common.replace(
        query_start_loc=query_start_loc,
        query_start_loc_cpu=query_start_loc,
        seq_lens=common.seq_lens[index],
        num_reqs=len(rows),
        num_actual_tokens=len(tokens),
        max_query_len=int(query_lens.max()) if rows else 0,
        block_table_tensor=common.block_table_tensor[index],
        slot_mapping=common.slot_mapping[tokens],
    )
