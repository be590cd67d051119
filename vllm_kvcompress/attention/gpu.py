"""GPU attention over compacted requests: vLLM's own backend for all other rows, our kernel for these.

Both kernels are launched over the whole batch, and each leaves the other's rows to the other. So a row that
is not compacted gets exactly what stock vLLM computes, whatever its neighbours are, and one captured graph
serves batches with and without compacted rows: which is which is read on the device, from arrays that stay
in place.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_kvcompress.attention.blocks import CompactableBlocks
from vllm_kvcompress.attention.chunks import ChunkRows
from vllm_kvcompress.attention.unsupported import OwnLayer, refuse_layer
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.formats import EVERY_FORMAT, Format, number_of
from vllm_kvcompress.kernels.attention import (
    MAX_SPLITS,
    MIN_SHARE,
    MOST_MERGED,
    attend,
    choose_splits,
)
from vllm_kvcompress.kernels.batch import Rows, Runs, Scales
from vllm_kvcompress.kernels.flash3 import Chunk, Chunks, attend_chunks
from vllm_kvcompress.kernels.moments import add_moments
from vllm_kvcompress.kernels.records import attend_records, uses_shares
from vllm_kvcompress.kernels.ring import write_rings
from vllm_kvcompress.kernels.shares import Shares
from vllm_kvcompress.kernels.sums import ATTENTION, NOT, PAUSED, SQUARES, add_attention
from vllm_kvcompress.kernels.tiles import MAX_TILE
from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.requests.float8 import ON_GPU
from vllm_kvcompress.requests.observer import LayerAttention, Span
from vllm_kvcompress.requests.state import CompressionState

RAW = number_of(None)
ADDED = {None: NOT, "attention": ATTENTION, "squares": SQUARES, "nothing": PAUSED}  # see `Observer.adds`


class RowNumbers(NamedTuple):
    """What our kernels read of a row; by default of one that is none of their affair.

    Attributes:
        slot: in `RunArrays`; -1 for rows without compaction.
        ring: address of the request's query ring; 0 for none.
        capacity: queries that the ring holds.
        added: what is added up of the row, see `kernels.sums`.
        moments: address of the moments of the request's queries; 0 for none.
        skip: first positions, whose queries these leave out.
    """

    slot: int = -1
    ring: int = 0
    capacity: int = 0
    added: int = NOT
    moments: int = 0
    skip: int = 0


class RowArrays:
    """What our kernels read of each row of a batch, in arrays that stay in place for captured graphs.

    Attributes:
        slot: `[R]` int64, and so on: see `RowNumbers`.
        stock_seq_lens: `[R]` int32, tokens that vLLM's kernel attends over: of compacted rows only as many
            as the row has queries, because our kernel overwrites their output, and of chunks one.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._content = torch.zeros(len(RowNumbers()), max_rows, dtype=torch.int64, device=device)
        self._shown: list[RowNumbers] | None = None
        self.stock_seq_lens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.slot, self.ring, self.capacity, self.added, self.moments, self.skip = self._content
        self.show([])

    def show(self, rows: list[RowNumbers]) -> None:
        """Show these rows; nothing is sent if they are what was shown last."""
        if rows != self._shown:
            self._shown = rows
            missing = [RowNumbers()] * (self._content.shape[1] - len(rows))
            columns = list(zip(*rows, *missing, strict=True))
            host = torch.tensor(columns, dtype=torch.int64, pin_memory=PIN_MEMORY)
            self._content.copy_(host, non_blocking=True)

    def update_seq_lens(self, metadata: CommonAttentionMetadata, chunks: Chunks | None = None) -> None:
        """Have `stock_seq_lens` be a batch's, some of whose rows FlashAttention 3 attends to for us."""
        num_rows = metadata.num_reqs
        stock = self.stock_seq_lens[:num_rows]
        compacted = self.slot[:num_rows] >= 0
        torch.where(compacted, metadata.naive_query_lens(), metadata.seq_lens, out=stock)
        if chunks is not None:  # one: its scheduler divides by what there is to read in the whole batch
            stock.index_fill_(0, chunks.rows, 1)


class ShareLists:
    """The shares of a batch's compacted rows, in arrays that stay in place for captured graphs."""

    def __init__(
        self, grid: PageGrid, max_rows: int, max_keys: int, at_once: int, device: torch.device
    ) -> None:
        """Make room for rows of so many tokens, on a device that runs `at_once` programs at a time."""
        self._size = max_rows, grid.num_layers, grid.num_heads, at_once, device, max_keys
        self._block_size = grid.block_size
        self._shares: dict[Format | None, Shares] = {}
        self._cut: set[Format | None] = set()  # of which there are any

    def of(self, format: Format | None) -> Shares:
        """Those of rows of a format, or of raw pages."""
        if format not in self._shares:
            self._shares[format] = Shares.empty(*self._size)
        return self._shares[format]

    def update(self, runs: Runs, rows: Rows, held: set[Format | None]) -> None:
        """List the shares of a batch whose compacted rows are of these formats, and of no other any more."""
        if rows.max_query_len > MOST_MERGED:  # kernels have other programs for rows that long
            return
        held = {format for format in held if format is None or uses_shares(format)}
        for format in held | self._cut:
            self.of(format).cut(runs, rows, self._block_size, number_of(format))
        self._cut = held


@dataclass(frozen=True)
class CompressedBatch:
    """What the layers do to a batch beside vLLM's own attention.

    Attributes:
        runs: where compacted requests have their pages.
        rows: the batch, every row of it.
        arrays: whose `ring`, `capacity`, `added`, `moments` and `skip` belong to the rows.
        chunks: rows compacted to raw pages that FlashAttention 3 attends to for us; None if there are none.
        attended: the batch, those rows without a state slot.
        attends: whether another row is compacted to raw pages.
        formats: those that rows may be compacted to.
        largest_ring: queries of the largest ring that a row may have; 0 if none has one.
        spans: what policies note that watch every query, in place of a kernel.
        sums: where a kernel adds up what rows' queries pay, see `kernels.sums`; None if no row has it so.
        moments_of: the layers' constants, where a kernel keeps moments of rows' queries, see
            `kernels.moments`; None if no row has it so.
        shares: of the rows that are compacted, by what `Runs.format` says of them.
        max_keys: a bound on the keys of a head.
        processors: streaming multiprocessors of the device.
    """

    runs: Runs
    rows: Rows
    arrays: RowArrays
    chunks: Chunks | None
    attended: Rows
    attends: bool
    formats: tuple[Format, ...]
    largest_ring: int
    spans: list[Span]
    sums: Tensor | None
    moments_of: Sequence[LayerAttention] | None
    shares: Mapping[int, Shares]
    max_keys: int
    processors: int

    @property
    def serves(self) -> bool:
        """Whether a row is compacted."""
        return self.attends or bool(self.formats) or self.chunks is not None

    def apply(
        self, layer: "CompressedAttentionImpl", scales: Scales | None, query: Tensor, output: Tensor
    ) -> None:
        """Note a layer's queries, and replace the output of compacted rows."""
        index, rows = layer.layer_index, self.rows
        if self.largest_ring and layer.is_observed:
            ring, capacity = self.arrays.ring, self.arrays.capacity
            bounds = rows.max_query_len, self.largest_ring
            own = rows.seq_lens, rows.query_start_loc, *bounds, output.dtype, scales
            write_rings(ring, capacity, index, query, *own)
        if self.spans and layer.is_observed:
            seen = query if scales is None else scales.read_queries(query, output.dtype)
            for span in self.spans:
                span.record(index, seen)
        if self.moments_of is not None and layer.is_observed:
            keep_moments(self.arrays, self.moments_of[index], index, query, rows, output.dtype, scales)
        adds_up = self.sums is not None and layer.is_observed
        if not (self.serves or adds_up):
            return
        num_rows, heads = len(rows.seq_lens), layer.keys.shape[2]
        batch = self.runs, rows, index
        constants = layer.scale, layer.logits_soft_cap
        num_splits = choose_splits(max(num_rows, len(query) // 16), heads, self.max_keys, self.processors)
        if adds_up:
            own = output.dtype, scales, layer.sinks
            cut = num_splits, choose_splits(num_rows, heads, self.max_keys, self.processors), MIN_SHARE
            add_attention(self.sums, self.arrays.added, query, layer.keys, *batch, *constants, *cut, *own)
        cache = layer.keys, layer.values
        if self.chunks is not None:
            of_chunks = self.runs, rows, self.chunks, index, layer.scale, self.max_keys
            attend_chunks(query, *cache, *of_chunks, output, layer.logits_soft_cap)
        if self.attends:
            attend(
                query,
                *cache,
                self.runs,
                self.attended,
                index,
                *constants,
                num_splits,
                out=output,
                compacted_only=True,
                scales=scales,
                sinks=layer.sinks,
                shares=self.shares[RAW],
            )
        for format in self.formats:
            read = format, number_of(format)
            attend_records(
                query,
                layer.content,
                *cache,
                *batch,
                *read,
                *constants,
                num_splits=num_splits,
                out=output,
                sinks=layer.sinks,
                shares=self.shares.get(number_of(format)),
            )


def keep_moments(
    arrays: RowArrays,
    layer: LayerAttention,
    index: int,
    query: Tensor,
    rows: Rows,
    dtype: torch.dtype,
    scales: Scales | None,
) -> None:
    """Add a layer's queries to the moments of the rows' requests."""
    rotary = layer.rotary
    assert rotary is not None
    how = rotary.cos_sin, rotary.is_neox, rotary.first, dtype, scales
    add_moments(arrays.moments, arrays.skip, index, query, rows, *how)


class CompressedMetadataBuilder(AttentionMetadataBuilder):
    """Put before a stock builder: hands it the batch with compacted rows cut short, and adds our part."""

    state: "CompressionState | None" = None  # all set by the worker once the cache exists
    arrays: RowArrays  # both of a batch, whatever the cache group: the builders of all share them
    share_lists: ShareLists
    chunk_rows: ChunkRows | None = None  # likewise, if FlashAttention 3 serves any
    fills: bool = True  # them in each step, as the first of these builders does
    processors: int = 1
    format: Format | None = None  # the engine's own, for which captured graphs have a place
    # It would give a group the first one's batch, and with it that one's blocks of raw tokens.
    supports_update_block_table = False
    _capturing = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        stock = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        # In a full graph nothing but kernels could note queries. The worker keeps steps out of those of
        # decoding alone, but not of those of any step; piecewise graphs leave attention out.
        config = KVCompressionConfig.parse(vllm_config.additional_config["kv_compression"])
        in_graphs = config.kept_in_graphs(vllm_config.speculative_config is not None)
        if config.watches_every_query and in_graphs is None:
            return min(stock, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)
        return stock

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        self._capturing = True
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)
        finally:
            self._capturing = False

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **kwargs,
    ) -> Any:
        if self.state is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)
        common = common_attn_metadata
        batch = self._batch(self.state, common)
        if self.fills:
            self.arrays.update_seq_lens(common, batch.chunks)
        seq_lens = self.arrays.stock_seq_lens[: common.num_reqs]
        stock = super().build(
            # Compacted rows have no prefix in place.
            0 if batch.serves else common_prefix_len,
            common.replace(seq_lens=seq_lens),
            fast_build,
            **kwargs,
        )
        noted = batch.largest_ring or batch.spans or batch.sums is not None or batch.moments_of is not None
        if batch.serves or noted:
            stock.kv_compression = batch
        return stock

    def warm_up(self, modules: Iterable[torch.nn.Module]) -> None:
        """Compile our kernels for rows of every length, by rows that leave at once."""
        module = next(m for m in modules if isinstance(getattr(m, "impl", None), CompressedAttentionImpl))
        layer, scales = module.impl, module.impl.scales(module)
        assert self.state is not None and self.state.runs is not None
        dtype = self.state.observer.dtype
        runs, arrays, device = self.state.runs.arrays, self.arrays, layer.keys.device
        arrays.show([])
        block_table = torch.zeros(2, 1, dtype=torch.int32, device=device)
        for query_len in (2**power for power in range(MAX_TILE.bit_length() + 1)):
            bounds = torch.tensor([0, query_len, 2 * query_len], dtype=torch.int32, device=device)
            rows = Rows(arrays.slot, block_table, bounds.diff(), bounds, query_len)
            self.share_lists.update(runs, rows, {None, self.format})
            out = torch.zeros(2 * query_len, layer.num_heads, layer.head_size, dtype=dtype, device=device)
            query = out if module.query_quant is None else out.to(layer.keys.dtype)
            constants = 0, layer.scale, layer.logits_soft_cap
            for num_splits in (1, 2, 4, 8, 16, 32, MAX_SPLITS):
                cache = layer.keys, layer.values
                own = *constants, num_splits
                alike = dict(scales=scales, sinks=layer.sinks, shares=self.share_lists.of(None))
                attend(query, *cache, runs, rows, *own, out=out, compacted_only=True, **alike)
                if self.format is not None:
                    layer_and_format = 0, self.format, number_of(self.format)
                    own = *layer_and_format, *constants[1:], num_splits
                    alike = dict(sinks=layer.sinks, shares=self.share_lists.of(self.format))
                    attend_records(query, layer.content, *cache, runs, rows, *own, **alike)
                if self.state.observer.sums is not None:
                    add_attention(
                        self.state.observer.sums.by_page,
                        arrays.added,
                        query,
                        layer.keys,
                        runs,
                        rows,
                        *constants,
                        num_splits,
                        dtype=dtype,
                        scales=scales,
                        sinks=layer.sinks,
                    )
            own = rows.seq_lens, bounds, query_len, 1, dtype, scales
            write_rings(arrays.ring, arrays.capacity, 0, query, *own)
        if self.chunk_rows is not None:  # of one chunk, over the null block
            chunk = Chunk(row=0, first=0, queries=query_len, slot=0, blocks=1)
            chunks = Chunks.of([chunk], runs, 2, self.chunk_rows.shape)
            own = chunks, 0, layer.scale, query_len, out, layer.logits_soft_cap
            rows = replace(rows, block_table=block_table.expand(-1, query_len).contiguous())
            attend_chunks(query, layer.keys, layer.values, runs, rows, *own)
        if self.state.observer.keeps_moments:
            bounds = torch.zeros(len(arrays.slot) + 1, dtype=torch.int32, device=device)
            # Of as many rows as there may be few programs serve each, and these are compiled otherwise.
            most = Rows(arrays.slot, block_table, bounds[:-1], bounds, 1)
            for index, of_layer in enumerate(self.state.observer.layers):  # whose rotations may differ
                keep_moments(arrays, of_layer, index, query, rows, dtype, scales)
                keep_moments(arrays, of_layer, index, query, most, dtype, scales)

    def _lengths(self, common: CommonAttentionMetadata) -> Tensor:
        """Tokens of each row, `[R]`, on the host; waited for where drafts leave open how many they are."""
        known = common.seq_lens_cpu_upper_bound
        drafts = self.vllm_config.speculative_config is not None
        return common.seq_lens.cpu() if known is None or drafts else known

    def _batch(self, state: CompressionState, common: CommonAttentionMetadata) -> CompressedBatch:
        """Our part of a batch; in a graph being captured every kernel has its place, whatever comes later."""
        assert state.runs is not None
        shown, spans = [], []
        compacted: list[Format | None] = []  # formats of the compacted rows, None for raw pages
        request_ids: Sequence[str | None] = ()
        if state.active:
            slots = state.runs.slots
            request_ids = state.rows.request_ids(common)
            for request_id in request_ids:
                ring = None if request_id is None else state.observer.ring(request_id)
                place = (0, 0) if ring is None else (ring.data_ptr(), ring.shape[1])
                adds = None if request_id is None else state.observer.adds(request_id)
                kept = None if request_id is None else state.observer.moments(request_id)
                moments = (0, 0) if kept is None else (kept.content.data_ptr(), kept.skip)
                shown.append(RowNumbers(slots.get(request_id, -1), *place, ADDED[adds], *moments))
                if (table := state.tables.get(request_id)) is not None:
                    compacted.append(table.format)
            if state.observer.notes(request_ids):
                lengths = self._lengths(common)
                spans = state.observer.spans(
                    request_ids, common.query_start_loc_cpu, lengths, common.block_table_tensor
                )
        self.arrays.show(shown)
        held, chunks = set(compacted), None
        if self.chunk_rows is not None:
            if self.fills:
                self.chunk_rows.show(state, request_ids, common)
            chunks = self.chunk_rows.chunks
        captured = {self.format} if self._capturing else set()
        largest_ring = max((row.capacity for row in shown), default=0)
        adds_up = self._capturing or any(row.added != NOT for row in shown)
        sums = state.observer.sums if adds_up else None
        keeps = state.observer.keeps_moments and self._capturing or any(row.moments for row in shown)
        rows = Rows(
            slot=self.arrays.slot,
            block_table=common.block_table_tensor,
            seq_lens=common.seq_lens,
            query_start_loc=common.query_start_loc,
            max_query_len=common.max_query_len,
        )
        if self.fills:
            self.share_lists.update(state.runs.arrays, rows, held)
        attended = rows
        if chunks is not None:
            attended = replace(rows, slot=rows.slot.index_fill(0, chunks.rows, -1))
        raw = compacted.count(None) - (0 if chunks is None else len(chunks.rows))
        attends = self._capturing or raw > 0
        formats = tuple(format for format in EVERY_FORMAT if format in held | captured)
        listed = [*[None] * attends, *filter(uses_shares, formats)]
        return CompressedBatch(
            runs=state.runs.arrays,
            rows=rows,
            arrays=self.arrays,
            chunks=chunks,
            attended=attended,
            attends=attends,
            formats=formats,
            largest_ring=common.max_query_len if self._capturing else largest_ring,
            spans=spans,
            sums=None if sums is None else sums.by_page,
            moments_of=state.observer.layers if keeps else None,
            shares={number_of(format): self.share_lists.of(format) for format in listed},
            max_keys=common.max_seq_len,
            processors=self.processors,
        )


class CompressedAttentionImpl(OwnLayer, AttentionImpl):
    """Put before a stock implementation: replaces its output for compacted rows."""

    PLACE = "layer_index", "content", "keys", "values"
    # All set by the worker once the cache exists.
    content: Tensor  # `[S·B·H, page_bytes]` uint8, the whole cache
    keys: Tensor  # `[S, B, H, N, D]`, a view of the whole cache
    values: Tensor  # `[S, B, H, N, D]`, likewise

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        refuse_layer(self, reads=ON_GPU)
        self.sliding_window = (-1, -1)  # no request outgrows it

    def fused_output_quant_supported(self, quant_key) -> bool:
        return False  # what our kernel writes is not quantized

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )
        batch: CompressedBatch | None = getattr(attn_metadata, "kv_compression", None)
        if batch is not None:
            batch.apply(self, self.scales(layer), query, output)
        return output

    def scales(self, layer: AttentionLayer) -> Scales | None:
        """Those of a layer whose cache is float8."""
        quantized = self.keys.element_size() == 1
        return Scales(layer._q_scale, layer._k_scale, layer._v_scale) if quantized else None


class CompressedBackend(CompactableBlocks):
    """Put before a stock backend whose cache holds keys and values in token order.

    Attributes:
        stock: that backend.
    """

    stock: ClassVar[type[AttentionBackend]]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # a page is one run of bytes


class _TritonBuilder(CompressedMetadataBuilder, TritonAttentionBackend.get_builder_cls()):
    pass


class _TritonImpl(CompressedAttentionImpl, TritonAttentionBackend.get_impl_cls()):
    stock = TritonAttentionBackend.get_impl_cls()


class CompressedTritonAttentionBackend(CompressedBackend, TritonAttentionBackend):
    """vLLM's Triton backend whose blocks may be compacted."""

    stock = TritonAttentionBackend

    @staticmethod
    def get_impl_cls() -> type[_TritonImpl]:
        return _TritonImpl

    @staticmethod
    def get_builder_cls() -> type[_TritonBuilder]:
        return _TritonBuilder


class UnreadableBackend(AttentionBackend):
    """Stands in for backends whose cache our kernels cannot read, so that vLLM passes over them."""

    @classmethod
    def validate_configuration(cls, *args, **kwargs) -> list[str]:
        return [
            "kv-compression works with FLASH_ATTN and TRITON_ATTN; choose one or remove --attention-backend"
        ]
