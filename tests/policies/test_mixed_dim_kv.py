"""What MixedDimKV says that outputs lose, against loops in float64."""

import dataclasses
import math

import pytest
import torch

from vllm_kvcompress.policies import mixed_dim
from vllm_kvcompress.policies.base import LayerObservation
from vllm_kvcompress.policies.mixed_dim import MixedDimKV

HEADS, GROUP, SIZE, SCORED = 2, 3, 8, 70


def observation(window: int, soft_cap: float = 0.0, scored: int = SCORED) -> LayerObservation:
    draw = torch.Generator().manual_seed(window)
    keys, values = (torch.randn(HEADS, scored + window, SIZE, generator=draw) for _ in "kv")
    queries = torch.randn(window, HEADS, GROUP, SIZE, generator=draw)
    return LayerObservation(keys, values, queries, 0.4, scored, scored + window, soft_cap)


def orthonormal(rank: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(HEADS, SIZE, SIZE, generator=draw))[0][..., :rank]


def loop(seen: LayerObservation, bases, head: int, token: int) -> list[float]:
    """Losses of one token, in each rank and dropped."""
    window, lost = len(seen.queries), [0.0] * (len(bases) + 1)
    keys, values = seen.keys[head].double(), seen.values[head].double()
    for index in range(window):
        end = seen.keys.shape[1] - window + index + 1
        for query in seen.queries[index, head].double():
            logits = keys[:end] @ query * seen.scale
            if cap := seen.logits_soft_cap:
                logits = cap * torch.tanh(logits / cap)
            weights = logits.softmax(0)
            a, away = float(weights[token]), float((weights @ values[:end] - values[token]).norm())
            lost[-1] += a / (1 - a) * away
            for rank, (of_keys, of_values) in enumerate(bases):
                key, value = (
                    own - basis @ (basis.T @ own)
                    for own, basis in (
                        (keys[token], of_keys[head].double()),
                        (values[token], of_values[head].double()),
                    )
                )
                lost[rank] += a * (abs(float(query @ key)) * seen.scale * away + float(value.norm()))
    return lost


@pytest.mark.parametrize("window", [1, 6, 130])  # the last is more than one block of queries
@pytest.mark.parametrize("soft_cap", [0.0, 1.5])
def test_losses_are_the_formulas(window, soft_cap, monkeypatch):
    monkeypatch.setattr(mixed_dim, "COLUMNS", 32)
    seen = observation(window, soft_cap)
    bases = [(orthonormal(rank, rank), orthonormal(rank, 9 + rank)) for rank in (4, 2)]
    found = MixedDimKV(window=window).losses(seen, bases)
    assert found.shape == (3, HEADS, SCORED) and found.dtype == torch.float32
    for head, token in ((0, 0), (0, 33), (1, SCORED - 1)):
        assert found[:, head, token].tolist() == pytest.approx(loop(seen, bases, head, token), rel=1e-3)
    assert torch.equal(MixedDimKV(window=window).score(seen), MixedDimKV(window=window).losses(seen, [])[-1])


def test_a_whole_basis_loses_nothing():
    seen = observation(4)
    whole = orthonormal(SIZE, 1), orthonormal(SIZE, 2)
    found = MixedDimKV(window=4).losses(seen, [whole])
    assert float(found[0].max()) < 1e-4 < float(found[1].min())


def test_a_token_with_all_the_attention_has_a_loss_that_is_a_number():
    seen = observation(4)
    seen.queries[:] = seen.queries[:1, :, :1]
    seen.keys[:, 5] = seen.queries[0, :, 0] * 1e4
    scores = MixedDimKV(window=4).score(seen)
    wanted = 4 * GROUP * seen.values[:, 5].norm(dim=-1)
    torch.testing.assert_close(scores[:, 5], wanted)
    assert torch.equal(scores.argmax(1), torch.tensor([5, 5])) and scores.isfinite().all()


def test_what_fills_padding_reaches_no_token():
    seen = observation(4)
    padding = torch.tensor([3, 0])
    clean = MixedDimKV(window=4).losses(dataclasses.replace(seen, padding=padding), [])
    for each in seen.keys, seen.values:
        each[0, :3] = math.nan
    broken = MixedDimKV(window=4).losses(dataclasses.replace(seen, padding=padding), [])
    torch.testing.assert_close(broken[:, 0, 3:], clean[:, 0, 3:])
    torch.testing.assert_close(broken[:, 1], clean[:, 1])


def test_a_window_has_a_token():
    with pytest.raises(ValueError, match="window must be at least 1 token, got 0"):
        MixedDimKV(window=0)
