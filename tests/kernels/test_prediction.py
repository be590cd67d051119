"""The model of the decode kernel is never faster than the device, and knows what balance is worth."""

import pytest

pytest.importorskip("triton")

from vllm_kvcompress.kernels.prediction import DEVICES, LAUNCH, LOOK_UP, cut_evenly, predicted_seconds  # noqa: E402

TOKEN = 512  # bytes


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("lengths", [[100] * 8, [32768] * 8, [2**20, *[64] * 7], [8192] * 1024])
def test_nothing_is_read_faster_than_a_copy_reads_it(device, lengths):
    least = sum(lengths) * TOKEN / device.bandwidth
    taken = predicted_seconds(lengths, TOKEN, device)
    assert taken > least + LAUNCH
    if sum(lengths) > 2**21:
        assert taken < 1.1 * least + LAUNCH + LOOK_UP


def test_heads_of_very_different_lengths_take_as_long_as_even_ones():
    even = predicted_seconds([8192] * 64, TOKEN, DEVICES[1])
    uneven = predicted_seconds([64 * 8192 - 63 * 128, *[128] * 63], TOKEN, DEVICES[1])
    assert uneven < 1.15 * even


def test_every_token_is_in_a_share():
    lengths = [5, 0, 300, 129, 70000]
    assert sum(cut_evenly(lengths, 10)) == sum(lengths)
