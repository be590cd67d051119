"""Biases and values with which a few of a head's keys answer queries as all of them do."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.matching.nnls import JITTER, nnls
from vllm_kvcompress.matching.problem import Problem, exp_, finite, logits
from vllm_kvcompress.matching.reference import Reference, column_bias

INTERIOR, NEWTON = 8, 1  # steps of `nnls`


@dataclass(frozen=True)
class Fit:
    """What is put beside the kept keys.

    Attributes:
        bias: `[X, t]` float32, added to a key's logit, what it had before included; 0 where none is present.
        values: `[X, t, D]` float32; 0 where no column is present.
    """

    bias: Tensor
    values: Tensor


def fit(
    problem: Problem,
    reference: Reference,
    columns: Tensor,
    present: Tensor,
    *,
    bias: bool = True,
    values: bool = True,
    bias_ridge: float = 1e-3,
    value_ridge: float = 1e-2,
    largest_factor: float = math.exp(3),
) -> Fit:
    """Biases that match attention mass, then values that match attention outputs.

    With a_ij the softmax of query i over all columns, restricted to the kept ones, and s_i what it sums to
    over all of them (1, less the sink's part):

        w = argmin Σ_i (Σ_j a_ij w_j - s_i)² + ρ Σ_j (w_j - f)²,   1/largest_factor ≤ w_j ≤ largest_factor
        β_j = log w_j + the bias that j had
        C = argmin ‖X C - Y‖² + σ ‖C - V‖²

    X is the softmax over the kept columns with β, and the sink; Y the output over all columns; V the kept
    columns' own values; f the one factor for all columns that fits best; ρ and σ are the ridges times the
    mean ‖·‖² of the columns of a and X. The ridges keep what the sampled queries say nothing about as it is:
    without them C fits these queries better and all others worse.

    A query that sees no kept column has no part in the fit.

    Args:
        problem: X heads.
        reference: its attention.
        columns: `[X, t]` int64, the kept columns.
        present: `[X, t]`, whether a column is one of the head's; the others count for nothing.
        bias: whether biases are fitted; otherwise they are what they were.
        values: whether values are fitted; otherwise they are the columns' own.
        bias_ridge: relative weight of keeping the factors w alike.
        value_ridge: relative weight of keeping the values.
        largest_factor: bound of a factor and of its inverse.

    Source: arXiv 2602.16284, sections on β and C_v. Deviations: a query's error of mass is relative to its
    softmax's sum, not to its largest term, since relative is how it shifts attention to what comes after;
    factors are bounded while they are fitted, not afterwards; both ridges.
    """
    queries = problem.queries.float()
    keys = _rows(problem.keys, columns).float()
    added = column_bias(problem)
    added = torch.zeros_like(keys[..., 0]) if added is None else added.gather(1, columns)
    added = added.masked_fill(~present, -torch.inf)
    seen = None if problem.limits is None else columns[:, None] < problem.limits[..., None]
    kept = logits(problem, queries, keys, added, seen)
    if bias:
        weights = exp_(kept - finite(reference.log_total)[..., None])
        factors = _match_mass(weights, reference.share, bias_ridge, largest_factor).log_()
        del weights
        added = added + factors
        kept.add_(factors[:, None])
    own = _rows(problem.values, columns).float()
    if values:
        total = torch.logsumexp(kept, -1)
        if problem.sinks is not None:
            total = torch.logaddexp(total, problem.sinks)
        exp_(kept.sub_(finite(total)[..., None]))
        own = _match_outputs(kept, reference.outputs, own, value_ridge)
    absent = ~present
    return Fit(added.masked_fill(absent, 0.0), own.masked_fill(absent[..., None], 0.0))


def _match_mass(weights: Tensor, share: Tensor, ridge: float, largest: float) -> Tensor:
    """w, `[X, t]`."""
    even = weights.sum(-1)
    factor = (even * share).sum(-1) / even.square().sum(-1).clamp_min(torch.finfo(even.dtype).tiny)
    toward = factor.clamp(1 / largest, largest)[:, None].expand(-1, weights.shape[2])
    return nnls(
        weights,
        share,
        ridge=ridge,
        toward=toward,
        lower=1 / largest,
        upper=largest,
        interior=INTERIOR,
        newton=NEWTON,
    )


def _match_outputs(weights: Tensor, outputs: Tensor, own: Tensor, ridge: float) -> Tensor:
    """C, `[X, t, D]`: the smallest change of the columns' own values that explains what they leave of Y."""
    rest = torch.baddbmm(outputs, weights, own, alpha=-1)
    squares = weights.square().sum(1)
    scale = squares.sum(-1) / (squares > 0).sum(-1).clamp_min(1)
    queries, columns = weights.shape[1:]
    if queries < columns:  # (XᵀX + σI)⁻¹Xᵀ = Xᵀ(XXᵀ + σI)⁻¹
        return own + torch.bmm(weights.mT, _solve(torch.bmm(weights, weights.mT), rest, ridge, scale))
    right = torch.bmm(weights.mT, rest)
    return own + _solve(torch.bmm(weights.mT, weights), right, ridge, scale)


def _solve(gram: Tensor, right: Tensor, ridge: float, scale: Tensor) -> Tensor:
    """(gram + ridge · scale · I)⁻¹ right; a larger ridge for heads where rounding makes it indefinite."""
    scale = torch.where(scale > 0, scale, 1.0)[:, None]
    safe = JITTER * gram.shape[1] * torch.finfo(gram.dtype).eps
    gram.diagonal(dim1=1, dim2=2).add_(ridge * scale)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if ridge < safe:  # which heads failed is on the device: the second factorisation is done for all
        gram.diagonal(dim1=1, dim2=2).add_(safe * scale)
        factor = torch.where(failed[:, None, None] > 0, torch.linalg.cholesky_ex(gram).L, factor)
    return torch.cholesky_solve(right, factor)


def _rows(tensor: Tensor, columns: Tensor) -> Tensor:
    return tensor.gather(1, columns[..., None].expand(-1, -1, tensor.shape[2]))
