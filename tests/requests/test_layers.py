"""What layers are probed with."""

from types import SimpleNamespace

import torch

from vllm_kvcompress.policies.rotary import Rotary
from vllm_kvcompress.requests.layers import _recorded, _rotary


def test_queries_are_recorded_as_they_are_before_a_backend_has_them_quantized():
    quantizer = object()
    layer = SimpleNamespace(layer_name="one", query_quant=quantizer, impl=SimpleNamespace())
    with _recorded([layer]) as queries:
        assert layer.query_quant is None
        layer.impl.forward(layer, torch.ones(2, 3), None, None, None, None, torch.ones(2, 3))
    assert torch.equal(queries["one"], torch.ones(2, 3))
    assert layer.query_quant is quantizer and not hasattr(layer.impl, "forward")


def test_small_queries_that_are_quantized_would_not_tell_how_they_turn():
    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 7, 60])
    angles = torch.arange(64)[:, None] * 10000.0 ** -(torch.arange(16) / 16)
    rotary, back = (Rotary(torch.cat([angles.cos(), sign * angles.sin()], 1), True) for sign in (1, -1))
    turned = back.at(positions).undo(torch.randn(3, 2, 32).expand(4, -1, -1, -1), 0)
    assert _rotary([rotary], positions, turned) is not None
    small = turned / 100
    assert _rotary([rotary], positions, small) is not None
    assert _rotary([rotary], positions, small.to(torch.float8_e4m3fn).float()) is None
