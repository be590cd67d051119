"""What a step's queries attend to, per column: as defined in float64, and how much work it takes."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_kvcompress.policies import POLICIES, LayerObservation, watching
from vllm_kvcompress.policies.base import QUERY_BLOCK, exact_products
from vllm_kvcompress.policies.watching import BLOCK_BYTES

REDUCED = {
    "h2o": lambda attention: attention.sum((0, 1)),
    "kv_compress_full": lambda attention: attention.square().sum((0, 1)),
    "kvzip": lambda attention: attention.amax((0, 1)),
}
SCALE, HEADS, GROUP = 0.09, 3, 2  # no power of two: folded into neither factor


def draw(num_queries: int, width: int, size: int, dtype: torch.dtype, **changes) -> LayerObservation:
    generator = torch.Generator().manual_seed(num_queries + width)
    keys = torch.randn(HEADS, width, size, generator=generator).to(dtype)
    queries = (torch.randn(num_queries, HEADS, GROUP, size, generator=generator) * 3).to(dtype)
    return LayerObservation(keys, keys[..., :0], queries, SCALE, 0, width, **changes)


def definition(name: str, observation: LayerObservation, head: int) -> Tensor:
    """`[W]` float64 by the definition, of one head and over its own columns."""
    first = 0 if observation.padding is None else int(observation.padding[head])
    keys, queries = observation.keys[head, first:].double(), observation.queries[:, head].double()
    logits = torch.einsum("ngd,wd->gnw", queries, keys) * observation.scale
    if cap := observation.logits_soft_cap:
        logits = cap * (logits / cap).tanh()
    position = torch.arange(len(keys))
    own = position[-len(queries) :]
    attention = logits.masked_fill(position > own[:, None], -torch.inf).softmax(-1)
    return torch.cat([torch.zeros(first, dtype=torch.float64), REDUCED[name](attention)])


@pytest.mark.parametrize("name", REDUCED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("soft_cap", [0.0, 4.0])
@pytest.mark.parametrize("padding", [None, [0, 70, 31]], ids=["even", "padded"])
@pytest.mark.parametrize(
    "num_queries", [1, QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 3 * QUERY_BLOCK + 5]
)
def test_columns_are_reduced_as_defined(name, dtype, soft_cap, padding, num_queries):
    padding = None if padding is None else torch.tensor(padding)
    observation = draw(num_queries, num_queries + 90, 64, dtype, logits_soft_cap=soft_cap, padding=padding)
    if padding is not None:
        for head, empty in enumerate(padding.tolist()):
            observation.keys[head, :empty] = torch.nan  # whatever the absent page holds
    result = POLICIES[name]().observe(observation)
    assert result.dtype == torch.float32
    for head in range(HEADS):
        wanted = definition(name, observation, head)
        torch.testing.assert_close(result[head].double(), wanted, atol=1e-5, rtol=2e-5)


@pytest.mark.parametrize("name", REDUCED)
def test_heads_are_taken_one_by_one_where_logits_are_large(name):
    observation = draw(QUERY_BLOCK + 3, BLOCK_BYTES // 4 // QUERY_BLOCK, 16, torch.float32)
    result = POLICIES[name]().observe(observation)
    for head in range(HEADS):
        wanted = definition(name, observation, head)
        torch.testing.assert_close(result[head].double(), wanted, atol=1e-5, rtol=2e-5)


@pytest.mark.parametrize("at_once", [(5, 2), (1, 1)])
@pytest.mark.parametrize("name", REDUCED)
def test_fewer_queries_at_once_change_nothing(name, at_once, monkeypatch):
    monkeypatch.setattr(watching, "_block", lambda *shape: at_once)
    observation = draw(23, 90, 16, torch.float32, padding=torch.tensor([0, 40, 31]))
    result = POLICIES[name]().observe(observation)
    for head in range(HEADS):
        wanted = definition(name, observation, head)
        torch.testing.assert_close(result[head].double(), wanted, atol=1e-5, rtol=2e-5)


@pytest.mark.parametrize(("width", "at_once"), [(700, QUERY_BLOCK), (131_072, 32), (10_000_000, 1)], ids=str)
def test_the_memory_of_other_devices_has_a_bound_however_long_a_context_is(width, at_once):
    heads, group, num_queries = 8, 4, 300
    seen = LayerObservation(
        keys=torch.empty(heads, width, 64, device="meta"),
        values=torch.empty(heads, width, 0, device="meta"),
        queries=torch.empty(num_queries, heads, group, 64, device="meta"),
        scale=1.0,
        num_scored=width,
    )
    parts = list(watching.attention_parts(seen))
    most = max(part.attention.numel() * 4 for part in parts)
    assert most <= max(watching.DEVICE_BLOCK_BYTES, 4 * group * width)
    assert max(part.queries.stop - part.queries.start for part in parts) == at_once
    done = [len(range(heads)[part.heads]) * len(range(num_queries)[part.queries]) for part in parts]
    assert sum(done) == heads * num_queries


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_the_precision_of_other_products_is_left_as_it_was(before):
    matmul = torch.backends.mkldnn.matmul
    original = matmul.fp32_precision
    try:
        matmul.fp32_precision = before
        observation = draw(4, 9, 64, torch.bfloat16)
        POLICIES["h2o"]().observe(observation)
        assert matmul.fp32_precision == before
        with pytest.raises(KeyError), exact_products(observation.keys):
            raise KeyError
        assert matmul.fp32_precision == before
    finally:
        matmul.fp32_precision = original


# ---------------------------------------------------------------------- work


class Operations(TorchDispatchMode):
    """Counts what torch dispatches, views apart, and the logits that softmax is taken of."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.logits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += not func.is_view
        if func.overloadpacket in (torch.ops.aten.softmax, torch.ops.aten._softmax):
            self.logits += result.numel()
        return result


def observed(name: str, observation: LayerObservation) -> Operations:
    with Operations() as operations:
        POLICIES[name]().observe(observation)
    return operations


@pytest.mark.parametrize("name", REDUCED)
def test_a_query_takes_few_operations_however_long_its_context(name):
    counts = [observed(name, draw(1, width, 16, torch.float32)).count for width in (40, 4000)]
    assert counts[0] == counts[1] <= 15


@pytest.mark.parametrize("name", REDUCED)
def test_every_further_block_of_queries_takes_few_operations(name):
    one, five = (observed(name, draw(n, n, 16, torch.float32)).count for n in (QUERY_BLOCK, 5 * QUERY_BLOCK))
    assert five - one <= 4 * 8 * HEADS


@pytest.mark.parametrize("name", REDUCED)
def test_a_block_has_logits_of_no_column_behind_its_last_query(name):
    blocks = 6
    num_tokens = blocks * QUERY_BLOCK
    logits = observed(name, draw(num_tokens, num_tokens, 16, torch.float32)).logits
    assert logits == HEADS * GROUP * QUERY_BLOCK**2 * blocks * (blocks + 1) // 2
