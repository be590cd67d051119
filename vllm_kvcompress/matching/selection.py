"""Which tokens' keys are kept."""

import torch
from torch import Tensor

from vllm_kvcompress.matching.nnls import nnls
from vllm_kvcompress.matching.problem import Problem
from vllm_kvcompress.matching.reference import Reference, attention_weights


def select_highest(problem: Problem, reference: Reference, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that the queries attend to most.

    Args:
        problem: X heads.
        reference: its attention.
        counts: `[X]` int64, how many of each head; read by the host, once.

    Returns:
        columns `[X, t]` int64, the highest score first, t the largest count, and whether each is one of the
        head's, `[X, t]`. A head never has more than it has tokens.
    """
    scores = reference.scores
    held = problem.holds_token()
    if held is not None:
        scores = scores.masked_fill(~held, -1.0)
    best, columns = scores.topk(min(int(counts.max()), scores.shape[1]))
    return columns, (best >= 0) & _within(counts, columns)


def select_omp(
    problem: Problem,
    reference: Reference,
    counts: Tensor,
    step: int = 4,
    refit_every: int = 2,
    chunk_bytes: int | None = None,
    leading: int = 0,
    most: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit: the tokens whose attention, weighted, best adds up to the mass.

    With A the softmax `[n, T]` of the queries, and b what it sums to (1, less the sinks' part): as long as
    tokens are wanted, those j with the largest rᵀA_j are added to S, r = b - A_S w, w = NNLS(A_S, b).

    A head's tokens are the first of what it would have had with a larger count, so heads of different counts
    are chosen from together. Holds A whole, `[X, n, T]`.

    Args:
        problem: X heads.
        reference: its attention.
        counts: `[X]` int64, how many of each head; read by the host, once, unless it knows the largest.
        step: tokens added at a time.
        refit_every: steps between two fits of all weights; in the steps between, only the newest tokens'
            weights are fitted, to what the others leave.
        chunk_bytes: as in `attend`.
        leading: so many first columns are chosen before all others.
        most: the largest count, where the host knows it.

    Returns:
        columns `[X, t]` int64 in the order of choice, t the largest count, and whether each is one of the
        head's, `[X, t]`. A head never has more than it has tokens.

    Source: arXiv 2602.16284, "OMP keys"; step 4 and refit 2 are its fast form.
    """
    weights, target = attention_weights(problem, reference, chunk_bytes), reference.share
    heads, queries, tokens = weights.shape
    most = min(int(counts.max()) if most is None else most, tokens)
    held = problem.holds_token()
    taken = weights.new_zeros(heads, tokens).bool() if held is None else ~held
    columns = torch.zeros(heads, most, dtype=torch.int64, device=weights.device)
    present = torch.zeros_like(columns, dtype=torch.bool)
    chosen = weights.new_zeros(heads, queries, most)
    gram = weights.new_zeros(heads, most, most)
    w = weights.new_zeros(heads, most)
    residual = target
    for index, first in enumerate(range(0, most, step)):
        end = min(first + step, most)
        match = torch.bmm(residual[:, None], weights)[:, 0]
        match[:, :leading] = torch.inf
        match.masked_fill_(taken, -torch.inf)
        best, new = match.topk(end - first)
        is_new = best > -torch.inf
        columns[:, first:end], present[:, first:end] = new, is_new
        taken.scatter_(1, new, True)
        added = weights.gather(2, new[:, None].expand(-1, queries, -1)) * is_new[:, None]
        chosen[:, :, first:end] = added
        if end == most:
            break
        block = torch.bmm(chosen[:, :, :end].mT, added)
        gram[:, :end, first:end], gram[:, first:end, :end] = block, block.mT
        if index % refit_every:
            w[:, first:end] = nnls(added, residual, gram=block[:, first:], interior=0, newton=4)
        else:
            among = chosen[:, :, :end]
            w[:, :end] = nnls(among, target, start=w[:, :end], gram=gram[:, :end, :end], interior=0, newton=3)
        residual = target - torch.bmm(w[:, None, :end], chosen[:, :, :end].mT)[:, 0]
    return columns, present & _within(counts, columns)


def _within(counts: Tensor, columns: Tensor) -> Tensor:
    return torch.arange(columns.shape[1], device=columns.device) < counts.to(columns.device)[:, None]
