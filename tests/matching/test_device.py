"""What a solve asks of a device: everything for all heads at once, and nothing that the host waits for."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vllm_kvcompress.formats import MATCHED
from vllm_kvcompress.matching import Own, Problem, finish, fit_by_parts, select_by_parts
from vllm_kvcompress.policies.attention_matching import KEPT, PART, PURSUED

# A layer of a Llama of 8 B parameters, and what is asked of it by default.
HEADS, SIZE, QUERIES = 8, 128, 2048
KEEPS = 384  # of 2,048 tokens, in a sixteenth of the bytes: a page of 32 has 96 in k4v3


class Operations(TorchDispatchMode):
    """Counts what is computed, and what factorisations take."""

    count, flops = 0, 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        name = function._schema.name
        if name == "aten::linalg_cholesky_ex":
            heads, columns, _ = args[0].shape
            self.flops += heads * columns**3 / 3
        elif name == "aten::cholesky_solve":
            heads, columns, right = args[0].shape
            self.flops += 2 * heads * columns**2 * right
        return function(*args, **(kwargs or {}))


@pytest.fixture
def device(monkeypatch):
    """One that has no numbers: to read one fails, as `.item()`, `.tolist()` and `if tensor` do. Whether
    the host's numbers are sent, for which it waits where they are in no pinned memory, is seen as well."""

    def sent(*_, **__):
        raise AssertionError("the host sends numbers of its own")

    monkeypatch.setattr(torch, "tensor", sent)
    monkeypatch.setattr(torch.Tensor, "new_tensor", sent)
    return torch.device("meta")


def solve(
    device, *, heads=HEADS, tokens=2048, columns=KEEPS, queries=QUERIES, omp=False
) -> tuple[int, float]:
    """Operations, and floating point operations of products and factorisations."""
    keys = torch.empty(heads, tokens, SIZE, dtype=torch.bfloat16, device=device)
    asked = torch.empty(heads, queries, SIZE, dtype=torch.bfloat16, device=device)
    problem = Problem(keys, keys, asked, SIZE**-0.5)
    chosen = torch.empty(heads, columns, dtype=torch.int64, device=device)
    present = torch.empty_like(chosen, dtype=torch.bool)
    own = Own(torch.empty(heads, columns, SIZE, dtype=torch.bfloat16, device=device))
    with Operations() as operations, FlopCounterMode(display=False) as products:
        if omp:
            finish(select_by_parts(problem, own, chosen, present, PURSUED))
        finish(fit_by_parts(problem, own, chosen, present, PART, KEPT))
    return operations.count, products.get_total_flops() + operations.flops


def test_nothing_waits_for_the_device(device):
    """What each part keeps is read, once, of heads of more than PART tokens or that keep more than KEPT."""
    solve(device)
    solve(device, tokens=PURSUED, columns=32, omp=True)
    for longer in ({"tokens": PART + 1}, {"columns": KEPT + 1}):
        with pytest.raises(NotImplementedError):
            solve(device, **longer)


def test_operations_grow_neither_with_heads_nor_with_columns(device):
    few, _ = solve(device, heads=1, tokens=256, columns=16, queries=64)
    many, _ = solve(device, heads=8, tokens=256, columns=128, queries=64)
    assert few == many <= 900


def test_what_a_layer_takes(device):
    """As docs/gpu.md has it."""
    count, flops = solve(device)
    assert 900 < count < 1000
    assert flops == pytest.approx(39.8e9, rel=0.01)
    assert MATCHED["k4v3"].tokens_per_page(2 * 2 * 32 * SIZE, SIZE) == 3 * 32 and KEEPS == 3 * 2048 // 16
