"""The kernel over encoded pages equals the plain PyTorch reference, output and log-sum-exp."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import Batch, Row, pairwise
from torch import Tensor

from vllm_kvcompress.formats import FORMATS, MATCHED, RECORD, Format, Latent, Matched
from vllm_kvcompress.kernels.attention import attend
from vllm_kvcompress.kernels.records import attend_records
from vllm_kvcompress.kernels.reference import attend_records_paged
from vllm_kvcompress.kernels.shares import Shares

# Keys, values and rotated queries are rounded to the dtype after they are decoded or turned.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
RAW = "raw"


NAMED = {**FORMATS, **{format.name: format for format in MATCHED.values()}}
IN_EVERY_CASE = [*FORMATS, "matched kivi4", "matched k4v3"]
IDS = {RAW: 0, **{name: 1 + place for place, name in enumerate(NAMED)}}


class RecordBatch(Batch):
    """A batch whose compacted rows are of several formats.

    Attributes:
        formats: of the rows, by name; `RAW` for raw pages and None for rows without compaction.
        pages: `[S·B·H, page_bytes]` uint8, the whole cache.
        bias: `[S, B, H, N]` float32, of raw tokens.
    """

    def __init__(
        self,
        rows: list[Row],
        formats: list[str | None],
        group: int,
        cache: Tensor,
        slots: tuple[int, ...] = (),
    ) -> None:
        self.head_size = cache.shape[-1] // 2
        super().__init__(rows, *cache.split(self.head_size, -1), group, slots)
        self.formats = formats
        self.pages = cache.flatten(0, 2).flatten(1).view(torch.uint8)
        num_slots, width = self.runs.start.shape
        self.runs = replace(
            self.runs,
            format=torch.zeros(num_slots, dtype=torch.int32),
            encoded=torch.full((num_slots, 4, width - 1), 99, dtype=torch.int32),
            first=torch.full((num_slots, 4, width - 1), 99, dtype=torch.int32),
        )
        for index, name in enumerate(formats):
            if name in NAMED:
                self._encode(index, NAMED[name], IDS[name])

    def _encode(self, index: int, format: Format, format_id: int) -> None:
        """Fill a row's runs with records: as many of each head as there is room for, or somewhat fewer."""
        num_slots, _, heads, _, _ = self.keys.shape
        page_bytes, parts = self.pages.shape[1], format.parts
        sizes = [part.record_bytes(self.head_size) for part in parts]
        slot = int(self.rows.slot[index])
        self.runs.format[slot] = format_id
        by_place = self.pages.unflatten(0, (num_slots, -1, heads))
        destination, start = self.runs.destination[slot].long(), self.runs.start[slot].long()
        for head, own in enumerate(start.diff().tolist()):
            of_run = torch.full((own, page_bytes), 255, dtype=torch.uint8)  # NaN to whoever reads it
            page, used = 0, 0  # written out: where the next record goes, by bytes
            bases = []
            if format.basis is not None and own:
                drawn = torch.randn(2, 100, self.head_size) + torch.randn(2, 1, self.head_size)
                bases = [format.basis.encode(*drawn)]
                used = page_bytes % len(bases[0]) + len(bases[0])
                of_run[0, page_bytes % len(bases[0]) : used] = bases[0]
            for number, (part, size) in enumerate(zip(parts, sizes, strict=True)):
                per_page = page_bytes // size
                places = [at for at in range(own * per_page) if self._is_free(at, per_page, size, page, used)]
                most = len(places) if number == len(parts) - 1 else len(places) // 2
                count = max(0, most - int(torch.randint(0, 2 * per_page + 1, ())))
                self.runs.encoded[slot, number, head] = RECORD * count
                self.runs.first[slot, number, head] = places[0] if places else 0
                tokens = torch.randn(2, count, RECORD, self.head_size) + torch.randn(2, 1, 1, self.head_size)
                biases = [torch.randn(count, RECORD)] * isinstance(part, Matched)
                of_part = bases * isinstance(part, Latent)
                content = part.encode(*tokens, *biases, *of_part) if count else ()
                for at, record in zip(places, content, strict=False):
                    page, begin = at // per_page, page_bytes - (per_page - at % per_page) * size
                    of_run[page, begin : begin + size] = record
                    used = begin + size
            for number, content in enumerate(of_run):
                linear = int(start[head]) + number
                place = linear % (num_slots * heads)
                target = by_place[place // heads, destination[linear // (num_slots * heads)], place % heads]
                target[:] = content

    def _is_free(self, at: int, per_page: int, size: int, page: int, used: int) -> bool:
        """Whether a place is behind what is used of a page."""
        begin = self.pages.shape[1] - (per_page - at % per_page) * size
        return at // per_page > page or (at // per_page == page and begin >= used)

    def rows_of(self, name: str) -> list[tuple[int, slice]]:
        """Rows of a format, and their tokens."""
        bounds = self.rows.query_start_loc.tolist()
        return [(row, slice(*bounds[row : row + 2])) for row, own in enumerate(self.formats) if own == name]

    def cut(self, name, at_once, align=64, min_share=64):
        """Shares of the rows of a format."""
        _, _, heads, block_size, _ = self.keys.shape
        shares = Shares.empty(len(self.rows.seq_lens), self.runs.num_layers(heads), heads, at_once, "cpu")
        shares.cut(self.runs, self.rows, block_size, IDS[name], True, align, min_share)
        return shares

    def launch(
        self,
        name,
        layer,
        scale,
        logits_soft_cap,
        num_splits,
        min_share,
        out,
        bias=None,
        sinks=None,
        shares=None,
    ):
        """Serve the rows of a format into `out`; the log-sum-exp."""
        arguments = layer, scale, logits_soft_cap, num_splits, min_share, out
        if name == RAW:
            caches = self.keys, self.values
            return attend(self.query, *caches, self.runs, self.rows, *arguments, compacted_only=True)[1]
        caches = self.pages, self.keys, self.values
        format = layer, NAMED[name], IDS[name], *arguments[1:]
        caches = *caches, self.runs, self.rows
        last = dict(bias=bias, sinks=sinks, shares=shares)
        found, lse = attend_records(self.query, *caches, *format, **last)
        assert found is out
        return lse

    def expected_of(self, name, layer, scale, logits_soft_cap, bias=None, sinks=None):
        """Output and log-sum-exp of each row of a format, by the reference, and the row's tokens."""
        own_slot, counted = self.as_own(layer)
        for row, tokens in self.rows_of(name):
            slot = self.rows.slot[row]
            yield (
                tokens,
                *attend_records_paged(
                    self.query[tokens],
                    self.pages,
                    self.keys,
                    self.values,
                    NAMED[name],
                    self.runs.destination[slot].long(),
                    self.runs.start[slot].long()[counted],
                    self.runs.encoded[slot].long()[:, counted] // RECORD,
                    self.runs.first[slot].long()[:, counted],
                    self.tails[row],
                    self._rows[row].tail,
                    own_slot,
                    scale,
                    logits_soft_cap,
                    bias,
                    sinks,
                ),
            )


def assert_equals_reference(
    batch,
    name,
    layer=1,
    scale=0.2,
    logits_soft_cap=0.0,
    num_splits=1,
    min_share=64,
    bias=None,
    sinks=None,
    shares=None,
):
    dtype = batch.query.dtype
    out = torch.randn_like(batch.query)
    before = out.clone()
    own = num_splits, min_share, out, bias, sinks, shares
    lse = batch.launch(name, layer, scale, logits_soft_cap, *own)
    tolerance = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    for tokens, wanted, wanted_lse in batch.expected_of(name, layer, scale, logits_soft_cap, bias, sinks):
        torch.testing.assert_close(out[tokens].float(), wanted, **tolerance)
        torch.testing.assert_close(lse[tokens], wanted_lse, **tolerance)
        out[tokens] = before[tokens]
    assert torch.equal(out, before)  # other rows, and padding tokens


# One row of raw pages, one of other records and one without compaction among those that are looked at.
ROWS = {
    "decode": [
        (Row(1, 9, blocks=3, boundary=5), True),
        (Row(1, 40), None),
        (Row(1, 20, blocks=1, boundary=2), RAW),
        (Row(1, 1, blocks=2, boundary=4), True),
        (Row(1, 3, blocks=1, boundary=2), False),
    ],
    "extend": [
        (Row(3, 21, blocks=1, boundary=3), RAW),
        (Row(5, 5, blocks=2, boundary=4), True),
        (Row(1, 30, blocks=2, boundary=4), True),
        (Row(2, 4, blocks=1, boundary=4), False),
        (Row(4, 11), None),
    ],
    "chunk": [
        (Row(2, 2, blocks=1, boundary=1), False),
        (Row(19, 33, blocks=3, boundary=5), True),
        (Row(1, 3), None),
    ],
}


def make_batch(kind, name, group, block_size=16, head_size=64, dtype=torch.float32, slots=()):
    rows, formats = zip(*ROWS[kind], strict=True)
    of = {True: name, False: "kivi2" if name == "kivi4" else "kivi4"}
    while any(
        NAMED[each].largest_bytes(head_size) > 2 * block_size * head_size * dtype.itemsize
        for each in of.values()
    ):
        block_size *= 2  # until a page holds a record
    heads = 1 if kind == "chunk" else 2  # many queries are slow to interpret
    cache = torch.randn(2, 40, heads, block_size, 2 * head_size).to(dtype)
    return RecordBatch(list(rows), [of.get(format, format) for format in formats], group, cache, slots)


GRID = {
    "name": IN_EVERY_CASE,
    "dtype": list(TOLERANCE),
    "head_size": [64, 80, 128],
    "group": [1, 3, 8],
    "block_size": [16, 32],
    "rows": list(ROWS),
    "num_splits": [1, 3, "shares of 1", "shares of 9"],
    "logits_soft_cap": [0.0, 2.0],
    "scale": [0.125, 0.31],
}


@pytest.mark.parametrize("case", pairwise(GRID), ids=lambda case: "-".join(map(str, case.values())))
def test_equals_the_reference_for_every_pair_of_options(case):
    torch.manual_seed(0)
    geometry = (case[name] for name in ("group", "block_size", "head_size", "dtype"))
    batch = make_batch(case["rows"], case["name"], *geometry)
    numbers, num_splits = (case["scale"], case["logits_soft_cap"]), case["num_splits"]
    if isinstance(num_splits, int):
        assert_equals_reference(batch, case["name"], 1, *numbers, num_splits)
        return
    shares = batch.cut(case["name"], int(num_splits.split()[-1]))
    assert_equals_reference(batch, case["name"], 1, *numbers, shares=shares)
    assert not shares.arrived.any(), "ready for the next layer"


@pytest.mark.parametrize(
    ("name", "has_sinks"), [("kivi2", False), ("kivi8", True), ("turbo4_prod", True), ("k4v3", False)]
)
def test_long_heads_are_put_together_of_many_shares(name, has_sinks):
    torch.manual_seed(6)
    sinks = torch.tensor([-3.0, 0.0, 1.0, 4.0, 200.0, -torch.inf]) if has_sinks else None
    rows = [Row(1, 300, blocks=5, boundary=6), Row(2, 2, blocks=1, boundary=3), Row(1, 5)]
    formats = [name, name, None]
    batch = RecordBatch(rows, formats, 3, torch.randn(2, 60, 2, 32, 128))
    shares = batch.cut(name, at_once=16)
    assert shares.work[3, 1].max() > 3
    assert_equals_reference(batch, name, logits_soft_cap=2.0, sinks=sinks, shares=shares)


@settings(max_examples=8)
@given(
    name=st.sampled_from(["kivi8", "kivi4", "kivi2", "turbo2"]),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    rows=st.lists(
        st.tuples(st.sampled_from([0, 1, 3]), st.integers(0, 40), st.integers(1, 3), st.integers(0, 3)),
        min_size=1,
        max_size=2,
    ),
    num_splits=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference_whatever_the_geometry(name, sizes, rows, num_splits, seed):
    torch.manual_seed(seed)
    rows = [Row(length, max(1, length + more), blocks, blocks + gap) for length, more, blocks, gap in rows]
    layers, heads = sizes
    cache = torch.randn(layers, 30, heads, 16, 64)
    batch = RecordBatch(rows, [name] * len(rows), 2, cache)
    assert_equals_reference(batch, name, seed % layers, num_splits=num_splits, min_share=32)


@pytest.mark.parametrize("name", [format.name for format in MATCHED.values()])
def test_records_of_every_format_may_have_biases(name):
    torch.manual_seed(3)
    batch = make_batch("extend", name, group=3)
    assert_equals_reference(batch, name, num_splits=2)


@pytest.mark.parametrize("name", ["matched kivi4", "kivi8", "turbo4"])
def test_raw_tokens_may_have_a_bias(name):
    torch.manual_seed(1)
    batch = make_batch("extend", name, group=3)
    bias = torch.randn(batch.keys.shape[:-1])
    assert_equals_reference(batch, name, logits_soft_cap=2.0, num_splits=2, bias=bias)


@pytest.mark.parametrize("name", ["kivi4", "turbo4", "k4v3"])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_sinks_are_in_the_softmax_of_every_query(name, num_splits):
    torch.manual_seed(2)
    batch = make_batch("extend", name, group=3)
    sinks = torch.tensor([-3.0, 0.0, 1.0, 4.0, 200.0, -torch.inf])
    out = torch.zeros_like(batch.query)
    lse = batch.launch(name, 1, 0.2, 2.0, num_splits, 64, out, sinks=sinks)
    served = 0
    plain_and_sunk = zip(
        batch.expected_of(name, 1, 0.2, 2.0), batch.expected_of(name, 1, 0.2, 2.0, sinks=sinks), strict=True
    )
    for (tokens, plain, plain_lse), (_, wanted, wanted_lse) in plain_and_sunk:
        # What is left to the tokens is Z / (Z + exp(sink)).
        torch.testing.assert_close(
            wanted, plain * torch.sigmoid(plain_lse - sinks)[..., None], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(out[tokens], wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[tokens], wanted_lse, atol=2e-5, rtol=2e-5)
        served += len(wanted)
    assert served > 5


@pytest.mark.parametrize("name", ["kivi4", "turbo4", "mixed_dim"])
def test_layers_of_several_groups_read_raw_tokens_in_the_slot_that_they_share(name):
    torch.manual_seed(9)
    batch = make_batch("extend", name, group=2, slots=(0, 0, 1))
    bias = torch.randn(batch.keys.shape[:-1])
    for layer in range(3):
        assert_equals_reference(batch, name, layer, bias=bias)
    batch = make_batch("decode", name, group=2, slots=(0, 0, 1))
    if name != "mixed_dim":  # of which there are no shares
        assert_equals_reference(batch, name, 1, shares=batch.cut(name, 5))


def test_a_loose_bound_on_the_query_length_changes_nothing():
    """A captured graph knows no more than a bound."""
    torch.manual_seed(5)
    batch = make_batch("decode", "kivi4", group=3)
    batch.rows = replace(batch.rows, max_query_len=40)
    assert_equals_reference(batch, "kivi4")


@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_batch_is_served_by_one_launch_for_each_format(num_splits):
    """Each kernel writes its rows, whatever the order, and none but its own."""
    torch.manual_seed(7)
    names = ["kivi4", RAW, "turbo4", None, "kivi2", "turbo4"]
    rows = [
        Row(1 + index % 2, 9, 0 if name is None else 2, 0 if name is None else 4)
        for index, name in enumerate(names)
    ]
    batch = RecordBatch(rows, names, 2, torch.randn(2, 40, 1, 16, 128))
    arguments = 1, 0.2, 0.0, num_splits, 64
    alone = {}
    for name in (RAW, "kivi4", "kivi2", "turbo4"):
        alone[name] = torch.full_like(batch.query, torch.nan)
        batch.launch(name, *arguments, alone[name])
        served = torch.zeros(len(batch.query), dtype=torch.bool)
        for _, tokens in batch.rows_of(name):
            served[tokens] = True
        assert torch.equal(~alone[name].isnan().any(-1).any(-1), served)
        assert torch.equal(~alone[name].isnan().all(-1).all(-1), served)
    together = torch.full_like(batch.query, torch.nan)
    for name in reversed(alone):
        batch.launch(name, *arguments, together)
    for name, own in alone.items():
        for _, tokens in batch.rows_of(name):
            assert torch.equal(together[tokens], own[tokens])


def test_heads_may_have_no_records_at_all():
    torch.manual_seed(3)
    batch = make_batch("decode", "kivi4", group=2)
    batch.runs.encoded[:] = 0
    assert_equals_reference(batch, "kivi4", num_splits=2)


def test_records_beyond_the_reach_of_32_bit_offsets_are_read(tmp_path):
    """Offsets are counted in 4 bytes: the file is of 12 GiB, of which next to nothing is ever written."""
    blocks, page = 3 * 2**19, 16 * 2 * 64
    file = str(tmp_path / "cache")
    cache = torch.from_file(file, shared=True, size=blocks * page, dtype=torch.float32)
    cache = cache.view(1, blocks, 1, 16, 128)
    torch.manual_seed(2)
    rows = [Row(1, 20, blocks=4, boundary=5), Row(1, 3, blocks=3, boundary=5)]
    batch = RecordBatch(rows, ["kivi4"] * 2, 2, cache)
    slot = batch.rows.slot[0]
    assert batch.runs.encoded[slot, 0] > 0 and batch.runs.destination[slot, 0] * page > 2**31
    for tail in batch.tails:
        cache[:, tail] = torch.randn(1, len(tail), 1, 16, 128)
    assert_equals_reference(batch, "kivi4", 0)
