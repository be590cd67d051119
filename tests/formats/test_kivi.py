"""KIVI equals a naive encoder, group by group, and no number is further off than half a step."""

import numpy as np
import pytest
import torch
from test_base import codes_of, draw

from vllm_kvcompress.formats import FORMATS

NAMES = {"kivi8": 8, "kivi4": 4, "kivi2": 2}
GROUPS = {48: 16, 64: 32, 80: 16, 128: 32}  # of a value, by head size

_ALL = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
ASCENDING = np.unique(_ALL[np.isfinite(_ALL)].astype(np.float64))  # every number that float16 has


def quantize(numbers: np.ndarray, bits: int) -> tuple[list[int], float, float]:
    """Codes, scale and zero of one group of float32 numbers."""
    levels = 2**bits - 1
    low, high = min(numbers), max(numbers)
    zero = ASCENDING[np.searchsorted(ASCENDING, low, "right") - 1]  # the next below
    scale = ASCENDING[np.searchsorted(ASCENDING, np.float32(high - np.float32(zero)) / np.float32(levels))]
    codes = []
    for number in numbers:
        steps = np.float32(number - np.float32(zero)) / np.float32(scale) if scale else np.float32(0)
        codes.append(int(min(max(np.round(steps), 0), levels)))
    return codes, float(scale), float(zero)


def split(record: torch.Tensor, bits: int, head_size: int) -> dict[str, np.ndarray]:
    """The parts of one record: codes `[D, 32]` and `[32, D]`, scales and zeros as they lie."""
    data, group = bytes(record.tolist()), GROUPS[head_size]
    size, numbers = 32 * head_size * bits // 8, 32 * head_size // group
    begin = 2 * size
    parts = {
        "key_codes": np.array(codes_of(data[:size], bits, 32 * head_size, 32)).reshape(head_size, 32),
        "value_codes": np.array(codes_of(data[size:begin], bits, 32 * head_size, group)).reshape(
            32, head_size
        ),
    }
    for name, shape in {
        "key_scale": (head_size,),
        "key_zero": (head_size,),
        "value_scale": (numbers // 32, 32),
        "value_zero": (numbers // 32, 32),
    }.items():
        count = int(np.prod(shape))
        parts[name] = np.frombuffer(data, "<f2", count, begin).reshape(shape).astype(np.float64)
        begin += 2 * count
    assert begin == len(data)
    return parts


@pytest.mark.parametrize(("name", "bits"), NAMES.items())
@pytest.mark.parametrize("head_size", GROUPS)
def test_a_record_is_what_a_naive_encoder_writes(name, bits, head_size):
    keys = draw(32, head_size) + 3 * draw(head_size, seed=2)  # channels with an offset
    values = draw(32, head_size, seed=1) * 10
    record = FORMATS[name].encode(keys, values)
    parts, group = split(record, bits, head_size), GROUPS[head_size]
    read_keys, read_values = (each.double().numpy() for each in FORMATS[name].decode(record, head_size))

    for channel in range(head_size):
        codes, scale, zero = quantize(keys[:, channel].numpy(), bits)
        assert parts["key_codes"][channel].tolist() == codes
        assert (parts["key_scale"][channel], parts["key_zero"][channel]) == (scale, zero)
        np.testing.assert_allclose(
            read_keys[:, channel], zero + scale * np.array(codes), rtol=1e-6, atol=1e-6
        )
    for token in range(32):
        for index in range(head_size // group):
            channels = slice(index * group, (index + 1) * group)
            codes, scale, zero = quantize(values[token, channels].numpy(), bits)
            assert parts["value_codes"][token, channels].tolist() == codes
            assert (parts["value_scale"][index, token], parts["value_zero"][index, token]) == (scale, zero)
            expected = zero + scale * np.array(codes)
            np.testing.assert_allclose(read_values[token, channels], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "bits"), NAMES.items())
@pytest.mark.parametrize("head_size", GROUPS)
@pytest.mark.parametrize(
    ("size", "offset"), [(1, 0), (1e-4, 0), (1e3, 0), (0.5, 1000), (1e-3, -7), (3e4, 3e4)]
)
def test_no_number_is_further_off_than_half_a_step(name, bits, head_size, size, offset):
    """Both ends of a group included: what zero and scale are rounded to cuts nothing off."""
    keys = draw(32, head_size, channels=0.0).clamp(-1, 1) * size + offset
    values = draw(32, head_size, seed=1, channels=0.0).clamp(-1, 1) * size + offset
    record = FORMATS[name].encode(keys, values)
    parts, group = split(record, bits, head_size), GROUPS[head_size]
    key_step = torch.from_numpy(parts["key_scale"])
    value_step = torch.from_numpy(parts["value_scale"]).T.repeat_interleave(group, 1)
    for read, written, step in zip(
        FORMATS[name].decode(record, head_size), (keys, values), (key_step, value_step), strict=True
    ):
        error = (read.double() - written.double()).abs()
        assert (error <= step / 2 + 2e-6 * (abs(offset) + size)).all()
    # A step is no coarser than the range needs, but for the rounding of zero and scale.
    spread = (keys.amax(0) - keys.amin(0)).double()
    zero_off = 2.0**-10 * keys.abs().amax(0).double() + 2.0**-24
    assert (key_step <= (spread + zero_off) / (2**bits - 1) * (1 + 2.0**-9) + 2.0**-24).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_size", GROUPS)
def test_groups_of_equal_numbers_are_exact(name, head_size):
    group = GROUPS[head_size]
    of_channel, of_group = draw(head_size).half().float(), draw(32, head_size // group).half().float()
    of_channel[3], of_group[5] = 0, 0
    keys = of_channel.expand(32, head_size)
    values = of_group.repeat_interleave(group, 1)
    record = FORMATS[name].encode(keys, values)
    read = FORMATS[name].decode(record, head_size)
    assert torch.equal(read[0], keys) and torch.equal(read[1], values)
    parts = split(record, NAMES[name], head_size)
    for part in "key_codes", "value_codes", "key_scale", "value_scale":
        assert not parts[part].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("odd", [1e4, torch.inf, -torch.inf, torch.nan])
def test_an_outlier_spoils_its_own_group_alone(name, odd):
    keys, values = draw(32, 64, channels=0.0), draw(32, 64, seed=1, channels=0.0)
    clean = FORMATS[name].decode(FORMATS[name].encode(keys, values), 64)
    keys[5, 7], values[5, 40] = odd, odd
    read = FORMATS[name].decode(FORMATS[name].encode(keys, values), 64)
    expected = 0.0 if odd != odd else min(max(odd, -65504.0), 65504.0)
    step = (abs(expected) + 10) / (2 ** NAMES[name] - 1)
    same = torch.ones(32, 64, dtype=torch.bool)
    same[:, 7] = False
    assert torch.equal(read[0][same], clean[0][same])
    assert abs(float(read[0][5, 7]) - expected) <= step / 2
    same[:, 7], same[5, 32:] = True, False
    assert torch.equal(read[1][same], clean[1][same])
    assert abs(float(read[1][5, 40]) - expected) <= step / 2


@pytest.mark.parametrize(
    ("name", "head_size", "expected"),
    [
        ("kivi8", 64, 2 * 2048 + 4 * 64 + 4 * 2 * 32),
        ("kivi4", 64, 2 * 1024 + 4 * 64 + 4 * 2 * 32),
        ("kivi2", 64, 1536),
        ("kivi2", 128, 3072),  # 3 bits a number
        ("kivi4", 128, 5120),  # 5 bits
        ("kivi4", 80, 2 * 1280 + 4 * 80 + 4 * 5 * 32),
        ("kivi2", 48, 2 * 384 + 4 * 48 + 4 * 3 * 32),
    ],
)
def test_bytes_are_those_of_codes_scales_and_zeros(name, head_size, expected):
    assert FORMATS[name].record_bytes(head_size) == expected
    assert (
        FORMATS[name].tokens_per_page(2 * 16 * 128 * 16, 128) == 65536 // FORMATS[name].record_bytes(128) * 32
    )
    assert FORMATS[name].rotation(head_size) is None


def test_more_bits_are_nearer():
    keys, values = draw(20, 32, 64), draw(20, 32, 64, seed=1)
    errors = []
    for name in NAMES:
        read = FORMATS[name].decode(FORMATS[name].encode(keys, values), 64)
        errors.append([float((a - b).square().mean()) for a, b in zip(read, (keys, values), strict=True)])
    for fine, coarse in zip(errors, errors[1:], strict=False):
        assert coarse[0] > 10 * fine[0] and coarse[1] > 10 * fine[1]
