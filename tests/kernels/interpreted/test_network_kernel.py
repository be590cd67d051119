"""The network kernel equals what `Foresight` computes in plain PyTorch, in float64."""

import pytest
import torch
import torch.nn.functional as F
from paged import make_cache

from vllm_kvcompress.kernels.networks import network_scores
from vllm_kvcompress.policies.rotary import Rotary

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
TOLERANCE = {HALF: 4e-3, BRAIN: 3e-2, FLOAT: 2e-5}


def table(positions: int, rotated: int, scaled: float = 1.0) -> torch.Tensor:
    angles = torch.arange(positions)[:, None] * 10000.0 ** (-2 * torch.arange(rotated // 2) / rotated)
    return scaled * torch.cat([angles.cos(), angles.sin()], 1)


@pytest.mark.parametrize(
    ("block_size", "head_size", "dtype", "width", "neox", "rotated", "first", "interleaved"),
    [
        (16, 64, BRAIN, 64, True, 64, 0, True),
        (32, 80, FLOAT, 5, False, 80, 0, False),
        (16, 96, HALF, 130, True, 48, 0, True),
        (48, 128, BRAIN, 64, True, 64, 64, False),
        (16, 256, FLOAT, 20, False, 32, 16, True),
    ],
)
@pytest.mark.parametrize("again", [False, True])
def test_scores_equal_the_network(
    block_size, head_size, dtype, width, neox, rotated, first, interleaved, again
):
    torch.manual_seed(width)
    rows, num_pages, missing = 3, 3, (0, 2, 1) if again else (0, 0, 0)
    keys, values = (
        each.flatten(0, 2) for each in make_cache(1, 16, 1, block_size, head_size, dtype, interleaved)
    )
    pages = torch.randperm(16)[: rows * num_pages].view(rows, num_pages)
    for row, absent in enumerate(missing):
        pages[row, :absent] = -1
    num_scored = num_pages * block_size - 5
    up = (torch.randn(rows, 2 * head_size, width) / head_size**0.5).to(dtype)
    down = torch.randn(rows, width).to(dtype) / width**0.5
    network = up, torch.randn(rows, width), down, torch.randn(rows)
    cos_sin = table(400, rotated, 1.3)
    positions = torch.arange(num_scored).expand(rows, -1)
    if again:
        positions = torch.rand(rows, 400).argsort(1)[:, :num_scored].sort(1).values.contiguous()
    shown = positions if again else None
    found = network_scores(keys, values, pages, num_scored, network, cos_sin, neox, first, shown)

    assert found.shape == (rows, num_scored) and found.dtype == FLOAT
    rotary = Rotary(cos_sin, neox, first)
    for row, absent in enumerate(missing):
        skip = absent * block_size
        k, v = (each[pages[row, absent:]].flatten(0, 1)[: num_scored - skip] for each in (keys, values))
        before = rotary.undo_at(k, positions[row, skip:]).to(dtype).double()
        hidden = torch.cat([before, v.double()], 1) @ up[row].double() + network[1][row].double()
        wanted = F.gelu(hidden) @ down[row].double() + network[3][row].double()
        error = TOLERANCE[dtype] * wanted.abs().max()
        torch.testing.assert_close(found[row, skip:].double(), wanted, atol=float(error), rtol=0)
        assert not found[row, :skip].any()


def test_float8_is_read_by_its_scales():
    torch.manual_seed(3)
    keys, values = (each.flatten(0, 2) for each in make_cache(1, 4, 1, 16, 64, FLOAT))
    quantized = torch.cat([keys, values], 2).clamp(-400, 400).to(torch.float8_e4m3fn)
    pages, scales = torch.tensor([[2, 0], [1, 3]]), (torch.tensor([0.5, 2.0]), torch.tensor([0.25, 4.0]))
    network = torch.randn(2, 128, 16) / 8, torch.randn(2, 16), torch.randn(2, 16), torch.randn(2)
    cos_sin = table(40, 64)
    own = quantized.split(64, 2)
    found = network_scores(*own, pages, 32, network, cos_sin, True, scales=scales)
    for row in range(2):
        plain = (each.float() * scale[row] for each, scale in zip(own, scales, strict=True))
        each = [part.contiguous() for part in plain]
        one = [tensor[row : row + 1] for tensor in network]
        wanted = network_scores(*each, pages[row : row + 1], 32, tuple(one), cos_sin, True)
        torch.testing.assert_close(found[row : row + 1], wanted, rtol=1e-5, atol=1e-5)
