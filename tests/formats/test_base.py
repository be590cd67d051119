"""Codes lie in planes of bytes, and what every format promises of its records."""

import pytest
import torch

from vllm_kvcompress.formats import FORMATS, RECORD, get_format
from vllm_kvcompress.formats.base import pack, unpack

SINGLE = [name for name, format in FORMATS.items() if format.parts == (format,)]
BITS = [1, 2, 3, 4, 8]
SIZES = [48, 64, 80, 128]


def code_at(data: bytes, bits: int, index: int) -> int:
    """The code of number `index` in bytes that stand for 32 numbers or 16, read bit by bit."""
    if bits == 3:
        low = len(data) // 3 * 2
        return code_at(data[:low], 2, index) + 4 * code_at(data[low:], 1, index)
    width = len(data)
    return data[index % width] // 2 ** (bits * (index // width)) % 2**bits


def codes_of(data: bytes, bits: int, count: int, group: int) -> list[int]:
    """`count` codes, packed in groups one behind the other."""
    size = group * bits // 8
    parts = [data[begin : begin + size] for begin in range(0, count * bits // 8, size)]
    return [code_at(part, bits, index) for part in parts for index in range(group)]


def draw(*shape: int, seed: int = 0, channels: float = 1.0) -> torch.Tensor:
    """Normal numbers `[..., D]`, whose channels differ in size by powers of e with this deviation."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(shape, generator=generator)
        * (channels * torch.randn(shape[-1], generator=generator)).exp()
    )


# ------------------------------------------------------------------- planes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [32, 16])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_every_code_comes_back_from_the_bits_it_was_written_to(bits, count, dtype):
    codes = torch.randint(
        1 << bits, (5, 3, count), generator=torch.Generator().manual_seed(bits), dtype=dtype
    )
    given = codes.clone()
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (5, 3, count * bits // 8)
    assert torch.equal(codes, given)
    back = unpack(packed, bits)
    assert back.dtype == torch.uint8 and torch.equal(back, codes.to(torch.uint8))
    for row, expected in zip(packed.flatten(0, 1), codes.flatten(0, 1).tolist(), strict=True):
        assert [code_at(bytes(row.tolist()), bits, i) for i in range(count)] == expected


@pytest.mark.parametrize(
    ("bits", "count", "index", "code", "expected"),
    [
        (1, 16, 9, 1, {1: 0x10}),
        (1, 32, 31, 1, {3: 0x80}),
        (2, 16, 6, 3, {2: 0x0C}),
        (2, 32, 31, 2, {7: 0x80}),
        (3, 16, 6, 0b101, {2: 0x04, 4: 0x08}),
        (3, 32, 9, 0b110, {1: 0x08, 9: 0x04}),
        (4, 16, 9, 0xB, {1: 0xB0}),
        (4, 32, 3, 0xB, {3: 0x0B}),
        (8, 32, 17, 0xFE, {17: 0xFE}),
    ],
)
def test_a_single_code_is_where_the_layout_says(bits, count, index, code, expected):
    codes = torch.zeros(count, dtype=torch.int64)
    codes[index] = code
    packed = pack(codes, bits).tolist()
    assert {place: byte for place, byte in enumerate(packed) if byte} == expected


# ----------------------------------------------------------- of every format


def test_formats_are_found_by_name():
    kinds = [
        "kivi8",
        "kivi4",
        "kivi2",
        "turbo4",
        "turbo3",
        "turbo2",
        "turbo4_prod",
        "turbo3_prod",
        "turbo2_prod",
        "turbo4_centred",
        "turbo3_centred",
        "turbo2_centred",
        "k8v4",
        "k4v4",
        "k4v3",
        "k4v2",
        "auto",
        "mixed_dim",
    ]
    assert list(FORMATS) == kinds
    for name, format in FORMATS.items():
        assert get_format(name) is format and format.name == name and "arXiv" in format.paper
        if format.basis is None:
            assert all(str(part.bits) in part.name and FORMATS[part.name] == part for part in format.parts)
    with pytest.raises(ValueError, match="unknown format 'kivi5'; use one of kivi8, .*turbo2_prod"):
        get_format("kivi5")


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("head_size", SIZES)
def test_pages_hold_whole_records(name, head_size):
    format = FORMATS[name]
    size = format.record_bytes(head_size)
    assert size % 2 == 0  # float16 numbers stay aligned
    assert size < 2 * 2 * RECORD * head_size  # than bfloat16
    assert format.tokens_per_page(size - 1, head_size) == 0
    assert format.tokens_per_page(size, head_size) == 32
    assert format.tokens_per_page(3 * size - 1, head_size) == 64
    assert format.tokens_per_page(3 * size, head_size) == 96


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("head_size", SIZES)
def test_many_records_are_written_as_each_alone(name, head_size):
    format = FORMATS[name]
    keys, values = draw(2, 3, 32, head_size), draw(2, 3, 32, head_size, seed=1)
    given = keys.clone(), values.clone()
    records = format.encode(keys, values)
    assert records.dtype == torch.uint8 and records.shape == (2, 3, format.record_bytes(head_size))
    assert torch.equal(keys, given[0]) and torch.equal(values, given[1])
    decoded = format.decode(records, head_size)
    for i in range(2):
        for j in range(3):
            alone = format.encode(keys[i, j], values[i, j])
            assert torch.equal(alone, records[i, j])
            for one, all_ in zip(format.decode(alone, head_size), decoded, strict=True):
                assert one.dtype == torch.float32 and one.shape == (32, head_size)
                torch.testing.assert_close(one, all_[i, j], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SINGLE)
def test_records_are_read_from_amid_a_page_and_written_from_any_strides(name):
    format = FORMATS[name]
    keys, values = draw(2, 32, 64), draw(2, 32, 64, seed=1)
    records = format.encode(keys, values)
    strided = keys.transpose(0, 1).contiguous().transpose(0, 1), values.mT.contiguous().mT
    assert torch.equal(format.encode(*strided), records)
    size = records.shape[-1]
    page = torch.full((2, 3 * size + 6), 255, dtype=torch.uint8)
    page[:, size + 2 : 2 * size + 2] = records
    for one, other in zip(
        format.decode(page[:, size + 2 : 2 * size + 2], 64), format.decode(records, 64), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_written_as_the_same_numbers_in_float32(name, dtype):
    keys, values = draw(32, 64).to(dtype), draw(32, 64, seed=1).to(dtype)
    format = FORMATS[name]
    assert torch.equal(format.encode(keys, values), format.encode(keys.float(), values.float()))


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("odd", [torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 65520.0, 1e-40])
def test_whatever_is_written_is_read_as_finite(name, odd):
    format = FORMATS[name]
    for shape in [(1, 32, 64), (4, 32, 64)]:
        keys, values = draw(*shape), draw(*shape, seed=1)
        for each in keys, values:
            each[0, 5, 7] = odd
            each[0, :, 9] = odd
            each[0, 11] = odd
        for decoded in format.decode(format.encode(keys, values), 64):
            assert decoded.isfinite().all()
    everywhere = torch.full((32, 64), odd)
    for decoded in format.decode(format.encode(everywhere, everywhere), 64):
        assert decoded.isfinite().all()


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("head_size", [64, 80])
def test_keys_and_values_are_not_mixed_up(name, head_size):
    """Each is read back as itself, token by token, up to the format's error."""
    format = FORMATS[name]
    keys, values = draw(7, 32, head_size, channels=0.0), draw(7, 32, head_size, seed=1, channels=0.0)
    worst = {8: 1e-4, 4: 0.02, 3: 0.07, 2: 0.22}  # of the energy
    bits = format.bits, getattr(format, "value_bits", format.bits)
    decoded = format.decode(format.encode(keys, values), head_size)
    for read, written, own in zip(decoded, (keys, values), bits, strict=True):
        error = (read - written).square().sum() / written.square().sum()
        assert 0 < error < worst[own]
