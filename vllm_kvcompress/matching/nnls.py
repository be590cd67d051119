"""Least squares between bounds, for many heads at once."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Times the rank and the precision: what rounding may take from the eigenvalues of a matrix of unit diagonal.
JITTER = 4.0
# How much of the way to the nearest bound an interior step goes.
BOLDNESS = 0.995
# Fractions of a Newton step that are tried; the best of them is taken.
FRACTIONS = (1.0, 0.6, 0.3, 0.1, 0.02)


def nnls(
    matrix: Tensor,
    target: Tensor,
    *,
    ridge: float = 0.0,
    toward: Tensor | None = None,
    lower: float = 0.0,
    upper: float = math.inf,
    start: Tensor | None = None,
    gram: Tensor | None = None,
    interior: int = 12,
    newton: int = 2,
) -> Tensor:
    """The w within bounds that minimises ‖A w - b‖² + ρ ‖w - toward‖², ρ = ridge · mean ‖A_j‖².

    Steps of a primal-dual interior point method, and then of projected Newton, which puts what is near its
    bound onto it. Each step costs one Cholesky factorisation of t x t. Their numbers are fixed, so nothing
    waits for the device; their defaults bring ‖A w - b‖ within 1e-6 ‖b‖ of the
    least even where AᵀA is singular.
    The gradient is taken from A, not from AᵀA, whose rounding would otherwise limit w.

    Args:
        matrix: A, `[X, n, t]`, float32 or float64. Columns of zeros get what they are drawn toward.
        target: b, `[X, n]`.
        ridge: weight of the second term; columns of zeros do not count in its mean.
        toward: `[X, t]`, 0 where not given.
        lower: least w, finite.
        upper: largest w.
        start: `[X, t]`, where to begin; for projected Newton alone, interior points forget it.
        gram: AᵀA, `[X, t, t]`, where it is known.
        interior: steps of the interior point method.
        newton: steps of projected Newton.

    Returns:
        `[X, t]` in the dtype of A.

    Source: Mehrotra, "On the Implementation of a Primal-Dual Interior Point Method", 1992; Bertsekas,
    "Projected Newton Methods for Optimization Problems with Simple Constraints", 1982.
    """
    toward = matrix.new_zeros(matrix.shape[0], matrix.shape[2]) if toward is None else toward
    problem = _Quadratic.of(matrix, target, ridge, toward, gram)
    unit = problem.unit
    low, high = lower / unit, upper / unit
    u = ((toward if start is None else start) / unit).clamp(low, high)
    if interior:
        u = _interior(problem, u, low, high if math.isfinite(upper) else None, interior)
    u = _projected_newton(problem, u, low, high, newton)
    return torch.where(problem.empty, toward, u * unit).clamp(lower, upper)


@dataclass(frozen=True)
class _Quadratic:
    """The objective in u = w / unit, in which its Hessian has a unit diagonal."""

    matrix: Tensor  # [X, n, t]
    target: Tensor  # [X, n]
    damping: Tensor  # [X, 1]
    toward: Tensor  # [X, t]
    unit: Tensor  # [X, t]
    empty: Tensor  # [X, t]
    hessian: Tensor  # [X, t, t]
    jitter: float

    @classmethod
    def of(
        cls, matrix: Tensor, target: Tensor, ridge: float, toward: Tensor, gram: Tensor | None
    ) -> "_Quadratic":
        gram = torch.bmm(matrix.mT, matrix) if gram is None else gram
        damping = ridge * mean_square(gram)[:, None]
        diagonal = gram.diagonal(dim1=1, dim2=2)
        empty = diagonal <= 0
        unit = torch.where(empty, 1.0, (diagonal + damping).rsqrt())
        hessian = gram * unit[:, None]
        hessian.mul_(unit[:, :, None]).diagonal(dim1=1, dim2=2).fill_(1.0)
        jitter = JITTER * matrix.shape[2] * torch.finfo(matrix.dtype).eps
        return cls(matrix, target, damping, toward, unit, empty, hessian, jitter)

    def gradient(self, u: Tensor) -> Tensor:
        w = u * self.unit
        residual = (
            torch.bmm(w[:, None], self.matrix.mT)[:, 0] - self.target
        )  # rows times matrices: faster on CPU
        slope = torch.bmm(residual[:, None], self.matrix)[:, 0]
        return (slope + self.damping * (w - self.toward)) * self.unit


def _interior(problem: _Quadratic, u: Tensor, low: Tensor, high: Tensor | None, steps: int) -> Tensor:
    """Mehrotra's predictor and corrector: `[X, t]`, on a bound where its multiplier exceeds the slack."""
    tiny = torch.finfo(u.dtype).eps ** 1.5
    columns = u.shape[1]
    if high is None:
        bounds, sign = low[None], u.new_ones(1, 1, 1)
        away = problem.target.norm(dim=-1, keepdim=True) / math.sqrt(columns)
        u = torch.maximum(u, low + away.clamp_min(tiny))
    else:
        bounds, one = torch.stack([low, high]), u.new_ones(1, 1, 1)
        sign = torch.cat([one, -one])
        margin = (high - low) / 100
        u = torch.minimum(torch.maximum(u, low + margin), high - margin)
    slack = sign * (u - bounds)  # [1 or 2, X, t]
    gradient = problem.gradient(u)
    mean = (gradient.abs() * slack[0]).mean(-1, keepdim=True).clamp_min(tiny)
    price = torch.maximum(mean / slack, sign * gradient)
    for _ in range(steps):
        gradient = problem.gradient(u)
        system = problem.hessian.clone()
        system.diagonal(dim1=1, dim2=2).add_((price / slack).sum(0).add_(problem.jitter))
        factor = torch.linalg.cholesky_ex(system).L
        gap = (slack * price).sum((0, 2))[:, None]

        state = (gradient, slack, price, sign, factor)
        _, dslack, dprice, far = _direction(0.0, *state)
        left = ((slack + far * dslack) * (price + far * dprice)).sum((0, 2))[:, None]
        centre = (left / gap).clamp(0.0, 1.0) ** 3 * gap / slack[:, 0].numel()
        du, _, dprice, far = _direction(centre - dslack * dprice, *state)
        far = torch.where(du.isfinite().all(-1, keepdim=True), BOLDNESS * far, 0.0)
        u = u + far * du.nan_to_num()
        price = (price + far * dprice.nan_to_num()).clamp_min(tiny)
        slack = (sign * (u - bounds)).clamp_min(tiny)
    u = torch.where(price[0] > slack[0], low, u)
    return u if high is None else torch.where(price[1] > slack[1], high, u)


def _direction(
    product: Tensor | float, gradient: Tensor, slack: Tensor, price: Tensor, sign: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Toward slack · price = product: the steps of u, slack and price, and how far both stay positive."""
    aim = product / slack
    right = (sign * aim).sum(0) - gradient
    du = torch.cholesky_solve(right[..., None], factor)[..., 0]
    dslack = sign * du
    dprice = aim - price - price / slack * dslack
    nearest = torch.maximum(-dslack / slack, -dprice / price).amax((0, 2))[:, None]
    return du, dslack, dprice, nearest.clamp_min(1.0).reciprocal()


def _projected_newton(problem: _Quadratic, u: Tensor, low: Tensor, high: Tensor, steps: int) -> Tensor:
    """What is on a bound that the gradient pushes against stays there. All else takes a Newton step,
    projected onto the bounds and shortened to the best of a few lengths, or a step down the gradient."""
    hessian = problem.hessian
    safe = hessian.abs().sum(-1).amax(-1)[:, None].reciprocal()
    for _ in range(steps):
        gradient = problem.gradient(u)
        stays = ((u <= low) & (gradient > 0)) | ((u >= high) & (gradient < 0))
        slope = gradient.masked_fill(stays, 0.0)
        system = hessian.masked_fill(stays[:, None] | stays[:, :, None], 0.0)
        system.diagonal(dim1=1, dim2=2).add_(stays + problem.jitter)
        full = torch.cholesky_solve(slope[..., None], torch.linalg.cholesky_ex(system).L)
        tried = [full * fraction for fraction in FRACTIONS]
        ends = u[..., None] - torch.cat([*tried, (safe * slope)[..., None]], -1)
        moves = torch.minimum(torch.maximum(ends, low[..., None]), high[..., None]) - u[..., None]
        change = (moves * (gradient[..., None] + 0.5 * torch.bmm(hessian, moves))).sum(1)
        least, best = change.nan_to_num(nan=math.inf).min(-1)
        move = moves.gather(2, best[:, None, None].expand(-1, moves.shape[1], 1))[..., 0]
        u = torch.where(least[:, None] < 0, u + move, u)
    return u


def mean_square(gram: Tensor) -> Tensor:
    """The mean of the diagonals of `[X, t, t]`, without their zeros: `[X]`."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    return diagonal.sum(-1) / (diagonal > 0).sum(-1).clamp_min(1)
