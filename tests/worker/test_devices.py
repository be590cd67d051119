"""Every tensor that a compaction makes is made on a device that is named: on a GPU, the cache's."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.paging.job import Job
from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.policies.rotary import Rotary
from vllm_kvcompress.requests.cache import PackedCache
from vllm_kvcompress.requests.cpu_pages import Packing
from vllm_kvcompress.requests.observer import LayerAttention, Observer
from vllm_kvcompress.worker.compactor import Compactor
from vllm_kvcompress.worker.work import Work

LAYERS, HEADS, GROUP, SIZE, BLOCK_SIZE = 2, 2, 2, 8, 16
FACTORIES = {
    getattr(torch, name)
    for name in ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros")
}
METHODS = [
    "streaming_llm",
    "snapkv",
    "kv_compress",
    "kv_compress_full",
    "h2o",
    "expected_attention",
    "criticalkv",
    "tova",
    "knorm",
    "keydiff",
    "adakv",
    "pyramidkv",
]


class DevicesNamed(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func not in FACTORIES or kwargs.get("device") is not None, f"{func} names no device"
        return func(*args, **kwargs)


def test_the_mode_notices():
    with DevicesNamed(), pytest.raises(AssertionError, match="arange"):
        torch.arange(3)


@pytest.mark.parametrize("method", METHODS)
def test_two_compactions(method):
    torch.manual_seed(0)
    grid = PageGrid(LAYERS, 30, HEADS, BLOCK_SIZE)
    plain = Packing(torch.arange(BLOCK_SIZE * SIZE), BLOCK_SIZE, SIZE)
    pages = torch.randn(LAYERS * 30 * HEADS, 2, BLOCK_SIZE * SIZE)
    angles = torch.rand(600, SIZE // 2)
    attention = LayerAttention(
        scale=0.3,
        logits_soft_cap=0.0,
        rotary=Rotary(torch.cat([angles.cos(), angles.sin()], 1), is_neox=True),
        output_projection=lambda: torch.ones(HEADS, GROUP, SIZE, 4, device="cpu"),
    )
    cache = PackedCache(grid, pages, plain, plain)
    observer = Observer(cache, [attention] * LAYERS, HEADS * GROUP, SIZE, torch.float32, {})
    config = KVCompressionConfig.parse(f"{method}:budget=0.5,window=8,recompact_every=16")
    compactor = Compactor(cache, [attention] * LAYERS)
    query = torch.randn(160, HEADS * GROUP, SIZE)
    block_table = torch.arange(1, 11)[None]

    def compute(begin: int, end: int) -> None:
        bounds, seq_lens = torch.tensor([0, end - begin], device="cpu"), torch.tensor([end], device="cpu")
        for span in observer.spans(["r"], bounds, seq_lens, block_table):
            for layer in range(LAYERS):
                span.record(layer, query[begin:end])

    common = dict(request_id="r", config=config)
    first = dict(num_tokens=128, boundary=112, previous_boundary=0, previous=(), source=tuple(range(1, 8)))
    second = dict(num_tokens=160, boundary=144, previous_boundary=112, previous=(20, 21, 22, 23))
    with DevicesNamed():
        observer.watch("r", config.build_policy())
        compute(0, 128)
        job = Job(**common, **first, tail=(8,), destination=(20, 21, 22, 23))
        (observer.tables["r"],) = compactor.run([Work(job, None, observer.of("r"))])
        compute(128, 160)
        job = Job(**common, **second, source=(8, 9), tail=(10,), destination=(20, 21, 22, 23, 24))
        (table,) = compactor.run([Work(job, observer.tables["r"], observer.of("r"))])
    assert int(table.counts.sum()) == 5 * LAYERS * HEADS
