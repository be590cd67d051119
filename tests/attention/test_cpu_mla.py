"""Latents: what the decode kernel can reach, and queries brought to them."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonDecodeMetadata

from vllm_kvcompress.attention import cpu_mla
from vllm_kvcompress.attention.cpu_mla import CompressedCPUMLAImpl, CompressedMLAMetadata
from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.requests.cache import Kept
from vllm_kvcompress.requests.latents import AbsorbedQueries, LatentCache

SIZE, LATENT, BLOCK_SIZE, HEADS, SCALE = 576, 512, 16, 3, 0.07


def implementation(pages: torch.Tensor) -> CompressedCPUMLAImpl:
    """One that computes, without a model around it."""
    made = object.__new__(CompressedCPUMLAImpl)
    made.layer_index, made.pages, made.kv_lora_rank, made.scale = 0, pages, LATENT, SCALE
    return made


def metadata(table: torch.Tensor, seq_lens: torch.Tensor) -> CompressedMLAMetadata:
    decode = MLACommonDecodeMetadata(table.to(torch.int32), seq_lens.to(torch.int32), None)
    rows = len(table)
    whole = dict(
        num_reqs=rows,
        max_query_len=1,
        max_seq_len=int(seq_lens.max()),
        num_actual_tokens=rows,
        query_start_loc=torch.arange(rows + 1),
        slot_mapping=torch.zeros(rows),
        num_decodes=rows,
        num_decode_tokens=rows,
        num_prefills=0,
        decode=decode,
    )
    return CompressedMLAMetadata(**whole, layers=[CompressedMLAMetadata(**whole)])


def dense(queries: torch.Tensor, pages: torch.Tensor, table: torch.Tensor, seq_lens: torch.Tensor):
    """Attention of each row's query heads over the latents that its table names, `[R, Hq, latent]`."""
    rows = []
    for query, blocks, length in zip(queries.double(), table, seq_lens.tolist(), strict=True):
        latents = pages[blocks].reshape(-1, SIZE)[:length].double()
        rows.append((query @ latents.T * SCALE).softmax(-1) @ latents[:, :LATENT])
    return torch.stack(rows)


@pytest.mark.parametrize("reach", ["all", "less than all"])
def test_decodes_are_attention_over_the_pages_of_the_tables(monkeypatch, reach):
    torch.manual_seed(0)
    pages = torch.randn(40, BLOCK_SIZE, SIZE)
    table = torch.randperm(40)[:15].view(3, 5)
    table[1, 2:] = 0  # as behind a row's last page
    seq_lens, queries = torch.tensor([73, 20, 80]), torch.randn(3, HEADS, SIZE)
    if reach != "all":
        monkeypatch.setattr(cpu_mla, "MOST_ELEMENTS", pages.numel() - 1)
    pool = torch.full_like(pages[:1], torch.nan)  # a layer's own cache, which is not read
    out, _ = implementation(pages).forward_mqa(queries, pool, metadata(table, seq_lens), None)
    expected = dense(queries, pages, table, seq_lens)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)


def test_pages_behind_the_first_two_thousand_million_elements_are_read_right():
    # Of such a pool the system gives memory to the pages alone that are written here.
    num_pages = 2**31 // (BLOCK_SIZE * SIZE) + 3
    pages = torch.empty(num_pages, BLOCK_SIZE, SIZE, dtype=torch.bfloat16)
    assert pages.numel() > cpu_mla.MOST_ELEMENTS
    table = torch.tensor([[num_pages - 1, 5, num_pages - 2]])
    for page in table[0].tolist():
        pages[page] = torch.randn(BLOCK_SIZE, SIZE)
    queries, seq_lens = torch.randn(1, HEADS, SIZE).bfloat16(), torch.tensor([44])
    out, _ = implementation(pages).forward_mqa(queries, pages[:1], metadata(table, seq_lens), None)
    torch.testing.assert_close(out.double(), dense(queries, pages, table, seq_lens), atol=3e-2, rtol=3e-2)


def test_absorbed_queries_score_latents_as_each_heads_own_keys_do():
    torch.manual_seed(1)
    plain, rotated, tokens = 24, 64, 6
    up = torch.randn(HEADS, plain, LATENT, dtype=torch.float64)
    layer = SimpleNamespace(qk_nope_head_dim=plain, W_UK_T=up)
    queries = torch.randn(tokens, HEADS, plain + rotated, dtype=torch.float64)
    latents = torch.randn(9, SIZE, dtype=torch.float64)
    for wanted in (slice(1, 4), torch.tensor([5, 0]), slice(3, 3)):
        found = AbsorbedQueries(layer, queries)[wanted] @ latents.T
        for row, token in enumerate(torch.arange(tokens)[wanted].tolist()):
            for head in range(HEADS):
                keys = torch.cat([latents[:, :LATENT] @ up[head].T, latents[:, LATENT:]], 1)
                torch.testing.assert_close(found[row, head], keys @ queries[token, head])
        assert found.shape == (len(torch.arange(tokens)[wanted]), HEADS, 9)


@pytest.mark.parametrize("overlaps", [False, True])
def test_kept_latents_are_moved_to_their_new_pages(overlaps):
    torch.manual_seed(2)
    grid = PageGrid(num_layers=2, num_blocks=8, num_heads=1, block_size=BLOCK_SIZE)
    cache = LatentCache(grid, torch.randn(16, BLOCK_SIZE, SIZE), latent_size=LATENT)
    before = cache.pages.clone()
    pages = torch.tensor([[3, 1, 4], [-1, 9, 12]])
    row, columns = (
        torch.tensor([0, 1, 1]),
        torch.stack([torch.randperm(48).sort().values[:16] for _ in "abc"]),
    )
    columns[1:] = columns[1:].clamp(min=16)  # of a page that there is
    target = torch.tensor([1, 9, 3]) if overlaps else torch.tensor([5, 14, 6])
    keys, values = cache.read_keys(pages), cache.read_values(pages)
    assert torch.equal(keys[0], before[[3, 1, 4]].flatten(0, 1))
    assert torch.equal(values, keys[..., :LATENT]) and cache.head_size == SIZE
    cache.rewrite(Kept(pages, row, columns), target, overlaps)
    for page, own, kept in zip(target.tolist(), row.tolist(), columns, strict=True):
        for place, column in enumerate(kept.tolist()):
            source = pages[own, column // BLOCK_SIZE], column % BLOCK_SIZE
            assert torch.equal(cache.pages[page, place], before[source])
    others = [page for page in range(16) if page not in target]
    assert torch.equal(cache.pages[others], before[others])
