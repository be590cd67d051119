"""What tests of observers share."""

import pytest
import torch

from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.policies.rotary import Rotary
from vllm_kvcompress.requests.cache import PackedCache
from vllm_kvcompress.requests.cpu_pages import Packing
from vllm_kvcompress.requests.observer import LayerAttention, Observer


@pytest.fixture
def observer() -> Observer:
    """Of two layers in a cache of ten blocks, whose queries kernels note."""
    plain = Packing(torch.arange(4 * 6), 4, 6)
    cache = PackedCache(PageGrid(2, 10, 2, 4), torch.zeros(40, 2, 24), plain, plain)
    layers = [LayerAttention(0.3, 0.0, rotary=Rotary.identity(99))] * 2
    return Observer(cache, layers, 4, 6, torch.float32, tables={}, kernel_writes_rings=True)
