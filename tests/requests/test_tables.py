"""What a request's table shows of its pages is what its runs and its raw tail are, page by page."""

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.requests.tables import SPARE_COLUMNS, BatchTables, RequestTable, extend

BLOCK_SIZE = 4


def page(grid: PageGrid, layer: int, block: int, head: int) -> int:
    return (layer * grid.num_blocks + block) * grid.num_heads + head


def runs(grid: PageGrid, destination: list[int], counts: list[list[int]]) -> list[list[list[int]]]:
    """Physical pages of each layer's heads: the destination's pages dealt out in order."""
    layers, heads = range(grid.num_layers), range(grid.num_heads)
    every = [page(grid, layer, block, head) for block in destination for layer in layers for head in heads]
    out = []
    for row in counts:
        out.append([])
        for count in row:
            out[-1].append(every[:count])
            every = every[count:]
    assert not every
    return out


def make(counts: list[list[int]], boundary: int = 64, first_block: int = 7, positions=None) -> RequestTable:
    grid = PageGrid(len(counts), 200, len(counts[0]), BLOCK_SIZE)
    num_blocks = sum(map(sum, counts)) // grid.pages_per_block
    destination = torch.arange(first_block, first_block + 3 * num_blocks, 3).flip(0)
    return RequestTable(grid, destination, torch.tensor(counts), boundary, positions)


@st.composite
def page_counts(draw):
    layers, heads, blocks = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    counts = [[1] * heads for _ in range(layers)]
    for _ in range((blocks - 1) * layers * heads):
        counts[draw(st.integers(0, layers - 1))][draw(st.integers(0, heads - 1))] += 1
    return counts


@given(counts=page_counts(), steps=st.lists(st.integers(1, 7), max_size=6))
def test_each_heads_pages_are_its_run_and_then_its_share_of_every_raw_block(counts, steps):
    table = make(counts)
    owned, tail, next_block = runs(table.grid, table.destination.tolist(), counts), [], 100
    for size in steps:
        new = list(range(next_block + size, next_block, -1))
        next_block += size
        table.append_tail(torch.tensor(new))
        tail += new
        assert table.num_tail == [len(tail)]
    for layer, row in enumerate(counts):
        for head, count in enumerate(row):
            wanted = owned[layer][head] + [page(table.grid, layer, block, head) for block in tail]
            shown = table.pages[layer, head].tolist()
            assert shown[: len(wanted)] == wanted and not any(shown[len(wanted) :])
            assert int(table.run_tokens[layer, head]) == count * BLOCK_SIZE
    assert table.pages.dtype == table.run_tokens.dtype == torch.int32


def test_a_table_is_widened_only_when_its_spare_columns_are_used_up():
    table = make([[1, 3], [2, 2]])
    width = table.pages.shape[-1]
    assert width == 3 + SPARE_COLUMNS
    for block in range(SPARE_COLUMNS):
        table.append_tail(torch.tensor([100 + block]))
    assert table.pages.shape[-1] == width
    table.append_tail(torch.tensor([150]))
    assert table.pages.shape[-1] == width + 1 + SPARE_COLUMNS
    assert table.pages[0, 1, width].item() == page(table.grid, 0, 150, 1)


@given(counts=page_counts())
def test_right_aligned_runs_end_in_the_last_column(counts):
    layers, heads = len(counts), len(counts[0])
    positions = torch.arange(sum(map(sum, counts)) * BLOCK_SIZE, dtype=torch.int32).view(-1, BLOCK_SIZE) * 3
    table = make(counts, boundary=48, positions=positions)
    owned = runs(table.grid, table.destination.tolist(), counts)
    ends = torch.tensor(counts).flatten().cumsum(0).tolist()
    for first in range(layers):
        for last in range(first + 1, layers + 1):
            width = max(max(row) for row in counts[first:last])
            pages = table.right_aligned(slice(first, last))
            columns = table.column_positions(slice(first, last), 48 + 5)
            assert pages.dtype == columns.dtype == torch.int64
            assert columns.shape == ((last - first) * heads, width * BLOCK_SIZE + 5)
            for row in range((last - first) * heads):
                layer, head = first + row // heads, row % heads
                count, end = counts[layer][head], ends[layer * heads + head]
                assert pages[row].tolist() == [-1] * (width - count) + owned[layer][head]
                own = positions[end - count : end].flatten().tolist()
                nothing = [0] * (width - count) * BLOCK_SIZE
                assert columns[row].tolist() == nothing + own + list(range(48, 53))


@pytest.mark.parametrize(
    ("beyond", "blocks"),
    [(0, 0), (1, 1), (BLOCK_SIZE - 1, 1), (BLOCK_SIZE, 1), (BLOCK_SIZE + 1, 2), (40, 10)],
)
def test_a_tail_that_fills_its_blocks_exactly_spans_no_more(beyond, blocks):
    assert make([[2, 2]], boundary=16).num_tail_blocks(16 + beyond) == blocks


# ---------------------------------------------------------------------- a batch


def shown(batch: BatchTables, layer: int, row: int, heads: int) -> list[list[int]]:
    return batch.pages[layer, row * heads : (row + 1) * heads].tolist()


def check(batch: BatchTables, tables: list[RequestTable]) -> None:
    layers, heads = tables[0].counts.shape
    width = batch.pages.shape[-1]
    assert width == max(table.pages.shape[-1] for table in tables)
    assert batch.pages.shape == (layers, len(tables) * heads, width)
    for row, table in enumerate(tables):
        for layer in range(layers):
            own = table.pages[layer].tolist()
            assert shown(batch, layer, row, heads) == [pages + [0] * (width - len(pages)) for pages in own]
            lengths = batch.run_tokens[layer, row * heads : (row + 1) * heads].tolist()
            assert lengths == [int(c) * BLOCK_SIZE - table.boundary for c in table.counts[layer]]


def test_a_batch_shows_its_rows_as_they_are_whatever_changed_since():
    a, b = make([[1, 3], [2, 2]], 64, 7), make([[9, 1], [4, 2]], 32, 30)
    batch = BatchTables()
    steps = [[a], [a, b], [b, a], [b]]
    for tables in steps:
        batch.update(tables)
        check(batch, tables)
    for block in range(2 * SPARE_COLUMNS + 3):  # in place, and widened
        a.append_tail(torch.tensor([100 + block]))
        if block % 3 == 0:
            b.append_tail(torch.tensor([150 + block]))
        batch.update([a, b])
        check(batch, [a, b])
    again = make([[3, 1], [1, 3]], 96, 60)  # the request compacted again, or another one in its place
    batch.update([again, b])
    check(batch, [again, b])


def test_the_tables_that_a_batch_shows_live_as_long_as_it_shows_them():
    # Python gives a new object the place of one that is gone, and by its place a table is known.
    batch, table = BatchTables(), make([[1, 1]], 16, 16)
    shown = weakref.ref(table)
    batch.update([table])
    del table
    gc.collect()
    assert shown() is not None
    batch.update([make([[1, 1]], 20, 20)])
    gc.collect()
    assert shown() is None


def test_a_batch_is_not_rebuilt_while_nothing_changes():
    tables = [make([[1, 3], [2, 2]])]
    batch = BatchTables()
    batch.update(tables)
    pages = batch.pages
    batch.update(list(tables))
    assert batch.pages is pages


def test_physical_lengths_are_what_was_kept_and_the_raw_tail():
    a, b = make([[1, 3], [2, 2]], 64), make([[2, 2], [1, 3]], 32)
    batch = BatchTables()
    batch.update([a, b])
    lengths = batch.seq_lens(torch.tensor([70, 45]))
    assert lengths.dtype == torch.int32
    assert lengths.tolist() == [[4 + 6, 12 + 6, 8 + 13, 8 + 13], [8 + 6, 8 + 6, 4 + 13, 12 + 13]]


def test_each_group_of_layers_shows_its_own_raw_blocks_as_it_hears_of_them():
    groups, slots = (0, 1, 0), (0, 0, 1)
    grid = PageGrid(3, 50, 2, BLOCK_SIZE, num_groups=2, groups=groups, slots=slots)
    counts = torch.tensor([[1, 2], [3, 1], [1, 2]])
    table = RequestTable(grid, torch.tensor([7, 4, 9]), counts, 8, None)
    every = grid.linear_pages(table.destination).tolist()
    tails, batch = {0: [20, 21, 22], 1: [30, 31, 32]}, BatchTables()
    seq_lens = torch.tensor([8 + 3 * BLOCK_SIZE])
    for group in (0, 1):
        extend({0: table}, seq_lens, torch.tensor([[0, 0, *tails[group]]]), group)
        batch.update([table])
        begin = 0
        for layer, row in enumerate(counts.tolist()):
            for head, count in enumerate(row):
                run, begin = every[begin : begin + count], begin + count
                known = groups[layer] <= group
                tail = tails[groups[layer]] if known else [0] * 3
                wanted = run + [page(grid, slots[layer], block, head) if known else 0 for block in tail]
                for pages in (table.pages[layer, head], batch.pages[layer, head]):
                    assert pages[: count + 3].tolist() == wanted and not pages[count + 3 :].any()
    assert table.num_tail == [3, 3] and table.num_blocks == 3
    extend({0: table}, seq_lens, torch.tensor([[0, 0, *tails[0]]]), 0)
    assert table.num_tail == [3, 3]
