"""vLLM's CPU backend of multi-head latent attention (MLA) over compacted requests.

A layer has one head, so its run is what a block table can say. The caches of all layers are one array, and
seen as one pool of `L·B` pages they serve every layer: stock's own decode kernel, and stock's own gathering
of the context that a prompt's next tokens attend to, are given this pool and tables of a layer's pages in it.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadata, MLACommonMetadataBuilder
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_kvcompress.attention.unsupported import OwnLayer
from vllm_kvcompress.paging.spec import CompactableLatentSpec
from vllm_kvcompress.requests.latents import AbsorbedQueries
from vllm_kvcompress.requests.observer import Span
from vllm_kvcompress.requests.state import CompressionState
from vllm_kvcompress.requests.tables import RequestTable, extend, tables_of

MOST_ELEMENTS = 2**31 - 1  # that the decode kernel counts to


@dataclass
class CompressedMLAMetadata(MLACommonMetadata):
    """vLLM's metadata, of the batch or of its first layer, and beside it what the others need.

    Attributes:
        layers: of each layer, for the pool of all pages; none where no row is compacted.
        decoding: observed tokens among those that vLLM decodes, the batch's first ones.
        computing: those among the others, counted from the first of these.
    """

    layers: list[MLACommonMetadata] = field(default_factory=list)
    decoding: list[Span] = field(default_factory=list)
    computing: list[Span] = field(default_factory=list)


class CompressedCPUMLABackend(CPUMLABackend):
    """CPU attention over latents whose blocks may be compacted."""

    stock = CPUMLABackend

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return CompactableLatentSpec.of(super().customize_spec(spec))

    @staticmethod
    def get_impl_cls() -> type["CompressedCPUMLAImpl"]:
        return CompressedCPUMLAImpl

    @staticmethod
    def get_builder_cls() -> type["CompressedMLAMetadataBuilder"]:
        return CompressedMLAMetadataBuilder


class CompressedMLAMetadataBuilder(MLACommonMetadataBuilder):
    """Builds vLLM's own metadata once for each layer, as what a layer holds is in pages of its own."""

    state: CompressionState | None = None  # set by the worker once the cache exists

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> MLACommonMetadata:
        state, common = self.state, common_attn_metadata
        if state is None or not state.active:
            return super().build(common_prefix_len, common, fast_build)
        request_ids = state.rows.request_ids(common)
        if tables := tables_of(request_ids, state.tables):
            of_layers = self._of_layers(state, tables, common)
            layers = [MLACommonMetadataBuilder.build(self, 0, own, fast_build) for own in of_layers]
            first = layers[0]
        else:
            layers, first = [], super().build(common_prefix_len, common, fast_build)
        decodes = first.num_decodes
        rows = common.seq_lens, common.block_table_tensor
        observe, bounds = state.observer.spans, common.query_start_loc_cpu
        decoding = observe([*request_ids[:decodes], *[None] * first.num_prefills], bounds, *rows)
        others = [*[None] * decodes, *request_ids[decodes:]]
        computing = observe(others, bounds - first.num_decode_tokens, *rows)
        if not (layers or decoding or computing):
            return first
        return CompressedMLAMetadata(**vars(first), layers=layers, decoding=decoding, computing=computing)

    def _of_layers(
        self, state: CompressionState, tables: dict[int, RequestTable], common: CommonAttentionMetadata
    ) -> list[CommonAttentionMetadata]:
        """The batch as each layer has it: pages of the pool, and as many tokens as it kept and are raw."""
        extend(tables, common.seq_lens, common.block_table_tensor)
        batch, grid, rows = state.batch, state.observer.cache.grid, list(tables)
        batch.update(list(tables.values()))
        blocks = common.block_table_tensor[:, : -(-int(common.seq_lens.max()) // grid.block_size)]
        first_page = torch.arange(grid.num_layers, dtype=torch.int32)[:, None, None] * grid.num_blocks
        pages = blocks + first_page
        if (missing := batch.pages.shape[2] - pages.shape[2]) > 0:
            pages = torch.nn.functional.pad(pages, (0, missing))
        pages[:, rows, : batch.pages.shape[2]] = batch.pages
        seq_lens = common.seq_lens.to(torch.int32).repeat(grid.num_layers, 1)
        seq_lens[:, rows] = batch.seq_lens(common.seq_lens[rows])
        return [
            common.replace(
                block_table_tensor=own_pages,
                seq_lens=own_lens,
                seq_lens_cpu_upper_bound=own_lens,
                max_seq_len=int(own_lens.max()),
            )
            for own_pages, own_lens in zip(pages, seq_lens, strict=True)
        ]


class CompressedCPUMLAImpl(OwnLayer, CPUMLAImpl):
    """Hands vLLM's own computation a layer's pages among those of all layers."""

    stock = CPUMLAImpl
    PLACE = "layer_index", "pages"
    pages: Tensor  # `[L·B, N, C]`, every page of every layer; set by the worker once the cache exists
    layer: MLAAttention  # likewise, whose implementation this is

    def forward_mqa(
        self,
        q: Tensor | tuple[Tensor, Tensor],
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: MLACommonMetadata,
        layer: AttentionLayer,
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(attn_metadata, CompressedMLAMetadata):
            q = torch.cat(q, -1) if isinstance(q, tuple) else q
            for span in attn_metadata.decoding:
                span.record(self.layer_index, q)
            if attn_metadata.layers:
                attn_metadata = attn_metadata.layers[self.layer_index]
                kv_c_and_k_pe_cache, attn_metadata = self._within_reach(attn_metadata)
        return super().forward_mqa(q, kv_c_and_k_pe_cache, attn_metadata, layer)

    def forward_mha(
        self,
        q: Tensor,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: MLACommonMetadata,
        k_scale: Tensor,
        output: Tensor,
        output_scale: Tensor | None = None,
    ) -> None:
        if isinstance(attn_metadata, CompressedMLAMetadata):
            for span in attn_metadata.computing:
                span.record(self.layer_index, AbsorbedQueries(self.layer, q))
            if attn_metadata.layers:
                attn_metadata = attn_metadata.layers[self.layer_index]
                kv_c_and_k_pe_cache = self.pages
        super().forward_mha(
            q, kv_c_normed, k_pe, kv_c_and_k_pe_cache, attn_metadata, k_scale, output, output_scale
        )

    def _within_reach(self, metadata: MLACommonMetadata) -> tuple[Tensor, MLACommonMetadata]:
        """Pages that the decode kernel can read, and the metadata for them.

        It multiplies a page's number with a page's elements in 32 bits. So where the caches of all layers
        have more elements together, the pages that this step reads are brought together first.
        """
        if self.pages.numel() <= MOST_ELEMENTS:
            return self.pages, metadata
        assert metadata.decode is not None
        read, table = metadata.decode.block_table.unique(return_inverse=True)
        decode = replace(metadata.decode, block_table=table.to(torch.int32))
        return self.pages[read.long()], replace(metadata, decode=decode)
