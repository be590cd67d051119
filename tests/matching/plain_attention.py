"""Attention, and what is fitted to it, in float64 and loops, from the formulas."""

import math
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import lsq_linear

from vllm_kvcompress.matching import Problem

LARGEST = math.exp(3)
FEATURES = ["plain", "soft cap", "sinks", "limits", "padding", "bias", "all"]


def draw(heads=3, tokens=40, queries=24, size=8, features="plain", seed=0, sharpness=1.5) -> Problem:
    """A problem whose heads differ, with features of attention."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=random)

    basis = normal(heads, 3, size)
    problem = Problem(
        normal(heads, tokens, 3) @ basis + 0.3 * normal(heads, tokens, size),
        normal(heads, tokens, size),
        sharpness * (normal(heads, queries, 3) @ basis + 0.3 * normal(heads, queries, size)),
        size**-0.5,
    )
    options = {
        "soft cap": {"logits_soft_cap": 2.0},
        "sinks": {"sinks": 1.0 + normal(heads, queries)},
        "limits": {"limits": integers(0, tokens + 1, heads, queries)},
        "padding": {"padding": integers(0, tokens // 2, heads)},
        "bias": {"bias": normal(heads, tokens)},
        "plain": {},
    }
    chosen = options if features == "all" else {features: options[features]}
    return replace(problem, **{name: value for option in chosen.values() for name, value in option.items()})


def logit(problem: Problem, head: int, query: int, column: int, dot: float) -> float:
    """-inf for what the query does not see."""
    if problem.padding is not None and column < problem.padding[head]:
        return -math.inf
    if problem.limits is not None and column >= problem.limits[head, query]:
        return -math.inf
    value = problem.scale * dot
    if cap := problem.logits_soft_cap:
        value = cap * math.tanh(value / cap)
    return value if problem.bias is None else value + problem.bias[head, column].item()


def numerators(problem: Problem, head: int, columns: list[int], bias: list[float] | None = None):
    """exp(logit + bias) `[n, t]`, and the sinks' `[n]`."""
    bias = [0.0] * len(columns) if bias is None else bias
    queries, keys = problem.queries[head].tolist(), problem.keys[head].tolist()
    terms = np.zeros((len(queries), len(columns)))
    for i, query in enumerate(queries):
        for place, j in enumerate(columns):
            dot = sum(a * b for a, b in zip(query, keys[j], strict=True))
            terms[i, place] = math.exp(logit(problem, head, i, j, dot) + bias[place])
    sinks = [0.0] * len(queries) if problem.sinks is None else problem.sinks[head].double().exp().tolist()
    return terms, np.array(sinks)


def ratio(terms, total):
    """0 where nothing is seen."""
    return np.divide(terms, total, out=np.zeros_like(terms), where=total > 0)


def attention(problem: Problem, head: int):
    """Softmax `[n, T]`, mass `[n]` and output `[n, D]` over all columns."""
    terms, sinks = numerators(problem, head, list(range(problem.keys.shape[1])))
    softmax = ratio(terms, (terms.sum(1) + sinks)[:, None])
    return softmax, terms.sum(1), softmax @ problem.values[head].double().numpy()


def compacted(problem: Problem, head: int, columns: list[int], added, values):
    """Mass `[n]` and output `[n, D]` over some columns with biases `added` to the logit, and values."""
    terms, sinks = numerators(problem, head, columns, list(added))
    return terms.sum(1), ratio(terms, (terms.sum(1) + sinks)[:, None]) @ np.asarray(values, dtype=float)


def fitted(problem: Problem, head: int, columns: list[int], bias_ridge, value_ridge, largest=LARGEST):
    """Factors w `[t]` and values `[t, D]`, of the objectives that `fit` states, by dense least squares."""
    softmax, _, outputs = attention(problem, head)
    kept, share = softmax[:, columns], softmax.sum(1)
    even = kept.sum(1)
    likely = np.clip(even @ share / (even @ even), 1 / largest, largest)

    def augmented(matrix, target, ridge, toward):
        norms = (matrix**2).sum(0)
        root = math.sqrt(ridge * norms[norms > 0].mean())
        rows = root * np.eye(matrix.shape[1])
        return np.vstack([matrix, rows]), np.concatenate([target, root * toward])

    matrix, target = augmented(kept, share, bias_ridge, np.full(len(columns), likely))
    w = lsq_linear(matrix, target, (1 / largest, largest), method="bvls", tol=1e-14).x
    terms, sinks = numerators(problem, head, columns, np.log(w))
    weights = ratio(terms, (terms.sum(1) + sinks)[:, None])
    own = problem.values[head].double().numpy()[columns]
    matrix, target = augmented(weights, outputs, value_ridge, own)
    return w, np.linalg.lstsq(matrix, target, rcond=None)[0]
