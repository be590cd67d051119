"""Bounded least squares is what SciPy finds."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear
from scipy.optimize import nnls as scipy_nnls

from vllm_kvcompress.matching import nnls

UNIQUE = ["uniform", "normal", "scaled", "singular", "wide", "attention", "exact"]
DEGENERATE = ["duplicates", "zeros"]


def draw(kind: str, heads: int = 4, rows: int = 150, columns: int = 50):
    random = torch.Generator().manual_seed(0)

    def uniform(*shape):
        return torch.rand(*shape, generator=random, dtype=torch.float64)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    rows = columns // 2 if kind == "wide" else rows
    matrix, target = uniform(heads, rows, columns), uniform(heads, rows)
    if kind == "normal":
        matrix, target = normal(heads, rows, columns), normal(heads, rows)
    if kind == "scaled":
        matrix *= torch.logspace(0, -5, columns)
    if kind == "singular":
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        matrix = left * torch.logspace(0, -6, columns) @ right
    if kind == "attention":
        logits = 2 * normal(heads, rows, 6) @ normal(heads, 6, 8 * columns)
        matrix, target = logits.softmax(-1)[..., :columns], torch.ones(heads, rows, dtype=torch.float64)
    if kind == "exact":
        target = matrix @ torch.arange(columns).double()
    if kind == "duplicates":
        matrix[..., columns // 2 :] = matrix[..., : columns // 2]
    if kind == "zeros":
        matrix[..., ::3] = 0.0
    return matrix, target


def residual(matrix, w, target):
    return (torch.einsum("xnt,xt->xn", matrix, w.double()) - target).norm(dim=-1) / target.norm(dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", UNIQUE + DEGENERATE)
def test_non_negative(kind, dtype):
    matrix, target = draw(kind)
    got = nnls(matrix.to(dtype), target.to(dtype))
    expected = torch.tensor(
        np.stack([scipy_nnls(*pair)[0] for pair in zip(matrix.numpy(), target.numpy(), strict=True)])
    )
    assert got.dtype == dtype and (got >= 0).all()
    torch.testing.assert_close(
        residual(matrix, got, target), residual(matrix, expected, target), atol=1e-6, rtol=1e-5
    )
    if kind in UNIQUE:
        torch.testing.assert_close(got.double(), expected, atol=1e-3 * expected.max().item(), rtol=1e-3)


@pytest.mark.parametrize("kind", UNIQUE + DEGENERATE)
def test_between_bounds_and_drawn_toward_something(kind):
    matrix, target = draw(kind)
    toward, lower, upper, ridge = torch.full(matrix.shape[::2], 0.7).double(), 0.05, 1.5, 1e-3
    got = nnls(matrix.float(), target.float(), ridge=ridge, toward=toward.float(), lower=lower, upper=upper)
    for a, b, w in zip(matrix.numpy(), target.numpy(), got.double().numpy(), strict=True):
        squares = (a**2).sum(0)
        root = math.sqrt(ridge * squares[squares > 0].mean())
        rows = np.vstack([a, root * np.eye(len(w))])
        right = np.concatenate([b, np.full(len(w), 0.7 * root)])
        expected = lsq_linear(rows, right, (lower, upper), method="bvls", tol=1e-14).x
        assert lower - 1e-6 <= w.min() and w.max() <= upper
        np.testing.assert_allclose(w, expected, atol=2e-3)


def test_columns_of_zeros_get_what_they_are_drawn_toward():
    matrix, target = draw("zeros")
    toward = torch.full(matrix.shape[::2], 0.25)
    got = nnls(matrix.float(), target.float(), ridge=1e-2, toward=toward)
    assert (got[:, ::3] == 0.25).all()
    without = nnls(matrix.float()[..., 1:3], target.float(), ridge=1e-2, toward=toward[:, 1:3])
    padded = torch.cat([matrix.float()[..., 1:3], torch.zeros(4, 150, 5)], -1)
    again = nnls(padded, target.float(), ridge=1e-2, toward=toward[:, :7])
    torch.testing.assert_close(again[:, :2], without, atol=1e-5, rtol=1e-5)


def test_newton_alone_from_nearby_finds_it():
    matrix, target = draw("attention")
    best = nnls(matrix, target)
    start = (best + 0.05 * torch.rand(best.shape, generator=torch.Generator().manual_seed(1))).clamp_min(0)
    got = nnls(matrix, target, start=start, gram=matrix.mT @ matrix, interior=0, newton=6)
    assert (best == 0).any() and (start != best).any()
    torch.testing.assert_close(got, best, atol=1e-6, rtol=1e-5)


def test_each_head_is_solved_as_if_alone():
    matrix, target = (tensor.float() for tensor in draw("uniform"))
    together = nnls(matrix, target)
    alone = torch.cat([nnls(matrix[x : x + 1], target[x : x + 1]) for x in (2, 0, 3, 1)])
    torch.testing.assert_close(alone, together[[2, 0, 3, 1]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 1), (2, 1, 5)])
def test_nothing_to_fit_is_finite(shape):
    assert nnls(torch.zeros(shape), torch.zeros(shape[:2])).isfinite().all()
    assert nnls(torch.zeros(shape), torch.ones(shape[:2])).isfinite().all()
    assert nnls(torch.ones(shape), torch.zeros(shape[:2])).abs().max() < 1e-5
