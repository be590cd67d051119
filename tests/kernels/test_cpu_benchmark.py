"""What the CPU kernel's benchmark times: one call and several that attend to the same tokens."""

import pytest
import torch

from vllm_kvcompress.formats import RECORD
from vllm_kvcompress.kernels.cpu_benchmark import TAIL, Times, make_layer, measure, mix


def output_and_mass(layer, reader):
    """The output and Σ exp(logit) of each query: a sink of 1 lets Σ/(Σ + 1) of the output through."""
    attention, rows = reader
    query = layer.query
    plain, with_sink = torch.empty(2, *query.shape)
    for out, sinks in ((plain, None), (with_sink, torch.zeros(query.shape[1]))):
        attention.attend(query, rows, query.shape[2] ** -0.5, 0.0, out, sinks)
    share = (plain * with_sink).sum(-1).double() / plain.double().square().sum(-1)
    return plain.double(), (share / (1 - share))[..., None]


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("names", ["kivi8+kivi4", "auto", "mixed_dim"])
def test_several_calls_read_what_the_one_call_reads(names, head_size):
    torch.manual_seed(0)
    format = mix(names)
    layer = make_layer(format, head_size, heads=2, group=3, rows=2, tokens=400)
    outputs, masses = zip(*(output_and_mass(layer, reader) for reader in layer.apart), strict=True)
    merged = sum(out * mass for out, mass in zip(outputs, masses, strict=True)) / sum(masses)
    torch.testing.assert_close(layer.attend(layer.together).double(), merged, atol=1e-3, rtol=1e-3)
    nothing = layer.attend(layer.nothing)
    assert len(nothing) == 1 and not nothing.any()

    rows = layer.together[1]
    assert rows.tail.tolist() == [TAIL, TAIL]
    assert (rows.records.sum(0) == len(format.parts) * (400 // len(format.parts) // RECORD)).all()


def test_ratios_are_of_rounds():
    times = Times([2.0, 3.0], [4.0, 4.0], [0.5, 0.5], calls=3)
    assert times.ratios() == [0.5, 0.75]
    assert times.strict_ratios() == [2 / 3, 1.0]


def test_every_round_is_measured():
    torch.manual_seed(0)
    layers = [make_layer(mix("k8v4+k4v3"), 64, heads=1, group=2, rows=1, tokens=128)]
    times = measure(layers, rounds=3)
    assert times.calls == 3
    assert [len(each) for each in (times.together, times.apart, times.nothing)] == [3, 3, 3]
    assert min(times.together + times.apart + times.nothing) > 0
