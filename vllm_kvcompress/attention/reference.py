"""Attention over a compacted head in plain PyTorch: the specification that every kernel is tested against."""

import torch
from torch import Tensor


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, logits_soft_cap: float = 0.0) -> Tensor:
    """Causal attention of one KV head's group over the tokens that the head kept.

    The last query sees every key, and each earlier one sees one key less: all kept tokens below the boundary
    precede every query.

    Args:
        query: `[q, G, D]`, the newest q tokens.
        keys: `[n, D]`, kept tokens then raw tail, in position order; the last q belong to the queries.
        values: `[n, D]`.
        scale: softmax scale of the layer.
        logits_soft_cap: cap of `cap·tanh(logits / cap)`; 0 for none.

    Returns:
        `[q, G, D]` float32.
    """
    num_queries, num_keys = query.shape[0], keys.shape[0]
    logits = torch.einsum("qgd,nd->gqn", query.float(), keys.float()) * scale
    if logits_soft_cap:
        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
    newest = torch.arange(num_queries)[:, None] + num_keys - num_queries
    logits = logits.masked_fill(torch.arange(num_keys) > newest, -torch.inf)
    return torch.einsum("gqn,nd->qgd", logits.softmax(-1), values.float())
