"""A compaction takes no more operations where there are more layers."""

import dataclasses
from pathlib import Path

import pytest
import torch
from compaction import Request
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_kvcompress import scorers
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.policies.rotary import Rotary
from vllm_kvcompress.requests.cache import PackedCache
from vllm_kvcompress.worker.compactor import Compactor
from vllm_kvcompress.worker.work import Work

METHODS = {
    "snapkv": {"window": 5},
    "kv_compress": {"window": 5},
    "adakv": {"window": 5},
    "knorm": {},
    "keydiff": {},
    "h2o": {},
    "expected_attention": {},
    "foresight": {},
}
MOST = 330
HEADS, SIZE = 2, 6


class Operations(TorchDispatchMode):
    """Notes what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


def operations(method: str, layers: int, folder: Path) -> list[int]:
    """How many the first and the second compaction of a request take."""
    request = Request(3, layers=layers, heads=HEADS, block_size=8, size=SIZE, most=160)
    rotary = Rotary.identity(1000)
    request.layers[:] = (dataclasses.replace(layer, rotary=rotary) for layer in request.layers)
    cache = PackedCache(request.grid, request.cache.pages, *request.packings)
    compactor = Compactor(cache, request.layers)
    form = {"method": method, "recompact_every": 16, "sink_tokens": 2} | METHODS[method]
    if method == "foresight":
        form["scorer"] = str(folder / f"{layers}")
        shapes = (2 * SIZE, 5), (5,), (5,), ()
        tensors = (torch.randn(request.layers[-1].index + 1, HEADS, *shape) for shape in shapes)
        scorers.write(folder / f"{layers}", scorers.Scorer("", "", *tensors))
    config = KVCompressionConfig.parse(form)
    if config.observes:
        request.observer.watch("r", config.build_policy())
    table, numbers = None, []
    for tokens, blocks in ((80, 4), (40, 5)):
        request.compute(tokens)
        job = request.job(config, blocks, 16)
        with Operations() as counted:
            (table,) = compactor.run([Work(job, table, request.observer.of("r"))])
        numbers.append(len(counted.names))
        request.observer.tables["r"] = table
        request.boundary, request.destination = job.boundary, list(job.destination)
        for index in range(job.previous_boundary // 8, job.boundary // 8):
            request.raw.pop(index)
    return numbers


@pytest.mark.parametrize("method", METHODS)
def test_operations_do_not_grow_with_layers(method, tmp_path):
    few, more, many = (operations(method, layers, tmp_path) for layers in (2, 8, 32))
    assert few == more == many
    assert max(few) < MOST
