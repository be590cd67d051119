"""Attention over a compacted head in plain PyTorch: the specification that every kernel is tested against."""

import torch
from torch import Tensor

from vllm_kvcompress.formats import RECORD, Format, Latent


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    logits_soft_cap: float = 0.0,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of one KV head's group over the tokens that the head kept.

    The last query sees every key, and each earlier one sees one key less: all kept tokens below the boundary
    precede every query.

    Args:
        query: `[q, G, D]`, the newest q tokens.
        keys: `[n, D]`, kept tokens then raw tail, in position order; the last q belong to the queries.
        values: `[n, D]`.
        scale: softmax scale of the layer.
        logits_soft_cap: cap of `cap·tanh(logits / cap)`; 0 for none.
        bias: `[n]` float32, added to every query's logits behind the cap.
        sinks: `[G]` float32, one more logit of each query head, to which no value belongs.

    Returns:
        `[q, G, D]` float32.
    """
    logits = with_sinks(causal_logits(query, keys, scale, logits_soft_cap, bias), sinks)
    return torch.einsum("gqn,nd->qgd", logits.softmax(-1)[..., : len(keys)], values.float())


def with_sinks(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Logits `[G, q, n]` and behind them each query head's sink, if there are any `[G]`."""
    if sinks is None:
        return logits
    return torch.cat([logits, sinks.float()[:, None, None].expand(*logits.shape[:2], 1)], -1)


def causal_logits(
    query: Tensor,
    keys: Tensor,
    scale: float,
    logits_soft_cap: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """What `attend` takes the softmax of, `[G, q, n]` float32; -inf where a query precedes a key."""
    num_queries, num_keys = query.shape[0], keys.shape[0]
    logits = torch.einsum("qgd,nd->gqn", query.float(), keys.float()) * scale
    if logits_soft_cap:
        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
    if bias is not None:
        logits = logits + bias
    newest = torch.arange(num_queries, device=keys.device)[:, None] + num_keys - num_queries
    return logits.masked_fill(torch.arange(num_keys, device=keys.device) > newest, -torch.inf)


def attend_paged(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    destination: Tensor,
    start: Tensor,
    tail: Tensor,
    tail_len: int,
    layer: int,
    scale: float,
    logits_soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one row over its runs and its raw tail; a row without compaction has no destination.

    Args:
        query: `[q, Hq, D]`, the row's newest q tokens.
        keys: `[L, B, H, N, D]`.
        values: `[L, B, H, N, D]`.
        destination: `[n]` int64 on the CPU, its compacted blocks.
        start: `[L·H + 1]` int64 on the CPU, where each (layer, head)'s run begins; all 0 without compaction.
        tail: `[m]` int64 on the CPU, its raw blocks from the boundary on.
        tail_len: tokens that they hold.
        layer: which of the L layers.
        scale: softmax scale of the layer.
        logits_soft_cap: 0 for none.
        sinks: `[Hq]` float32, one more logit of each query head.

    Returns:
        `[q, Hq, D]` float32 and the log-sum-exp of its logits `[q, Hq]` float32.
    """
    num_layers, _, heads, block_size, _ = keys.shape
    outputs, lses = [], []
    for head, group in enumerate(query.unflatten(1, (heads, -1)).unbind(1)):
        run = torch.arange(*start[layer * heads + head :][:2].tolist())
        slot = run % (num_layers * heads)  # a block holds one page of each layer and head, of whichever owner
        pages = slot // heads, destination[run // (num_layers * heads)], slot % heads
        held = len(run) * block_size + tail_len
        own_keys, own_values = (
            torch.cat([cache[pages], cache[layer, tail, head]]).flatten(0, 1)[:held]
            for cache in (keys, values)
        )
        own_sinks = None if sinks is None else sinks.unflatten(0, (heads, -1))[head]
        outputs.append(attend(group, own_keys, own_values, scale, logits_soft_cap, sinks=own_sinks))
        logits = causal_logits(group, own_keys, scale, logits_soft_cap)
        lses.append(with_sinks(logits, own_sinks).logsumexp(-1).T)
    return torch.cat(outputs, 1), torch.cat(lses, 1)


def attend_records_paged(
    query: Tensor,
    pages: Tensor,
    keys: Tensor,
    values: Tensor,
    format: Format,
    destination: Tensor,
    start: Tensor,
    counts: Tensor,
    first: Tensor,
    tail: Tensor,
    tail_len: int,
    layer: int,
    scale: float,
    logits_soft_cap: float = 0.0,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one row over the records of its runs and its raw tail.

    Args:
        query: `[q, Hq, D]`, the row's newest q tokens.
        pages: `[L·B·H, page_bytes]` uint8.
        keys: `[L, B, H, N, D]`, in which the tail lies.
        values: `[L, B, H, N, D]`.
        format: of the records.
        destination: `[n]` int64 on the CPU, its compacted blocks.
        start: `[L·H + 1]` int64 on the CPU, where each (layer, head)'s run begins.
        counts: `[P, L·H]` int64 on the CPU, records of each of the format's parts in each run.
        first: `[P, L·H]` int64 on the CPU, the place of a part's first one (see `formats.arrange`).
        tail: `[m]` int64 on the CPU, its raw blocks from the boundary on.
        tail_len: tokens that they hold.
        layer: which of the L layers.
        scale: softmax scale of the layer.
        logits_soft_cap: 0 for none.
        bias: `[L, B, H, N]` float32, of raw tokens.
        sinks: `[Hq]` float32, one more logit of each query head.

    Returns:
        `[q, Hq, D]` float32 and the log-sum-exp of its logits `[q, Hq]` float32.
    """
    num_layers, _, heads, _, head_size = keys.shape
    by_place = pages.unflatten(0, (num_layers, -1, heads))
    outputs, lses = [], []
    for head, group in enumerate(query.unflatten(1, (heads, -1)).unbind(1)):
        run = torch.arange(*start[layer * heads + head :][:2].tolist())
        slot = run % (num_layers * heads)  # a block holds one page of each layer and head, of whichever owner
        own = by_place[slot // heads, destination[run // (num_layers * heads)], slot % heads]
        decoded: list[tuple[Tensor, ...]] = [(*torch.zeros(2, 0, RECORD, head_size), torch.zeros(0, RECORD))]
        bases = torch.empty(0)  # of the head, if its records need it
        if format.basis is not None and len(own):
            size = format.basis.record_bytes(head_size)
            bases = own[:1, own.shape[1] % size :][:, :size]
        for number, part in enumerate(format.parts):
            size = part.record_bytes(head_size)
            places = own[:, own.shape[1] % size :].reshape(-1, size)
            begin, count = int(first[number, layer * heads + head]), int(counts[number, layer * heads + head])
            records = places[begin : begin + count]
            shift = torch.zeros(len(records), RECORD)
            if (bias_at := part.bias_at(head_size)) >= 0:
                shift = records[:, bias_at:][:, : 4 * RECORD].contiguous().view(torch.float32)
            if not count:
                continue
            if isinstance(part, Latent):
                decoded.append((*part.decode(records, head_size, bases), shift))
            else:
                decoded.append((*part.decode(records, head_size), shift))
        own_keys, own_values, of_records = (
            torch.cat(parts).flatten(0, 1) for parts in zip(*decoded, strict=True)
        )
        own_keys, own_values = (
            torch.cat([old, cache[layer, tail, head].flatten(0, 1)[:tail_len].float()])
            for old, cache in ((own_keys, keys), (own_values, values))
        )
        shift = torch.cat([of_records.flatten(), torch.zeros(tail_len)])
        if bias is not None:
            shift[len(of_records) :] = bias[layer, tail, head].flatten()[:tail_len]
        own_sinks = None if sinks is None else sinks.unflatten(0, (heads, -1))[head]
        outputs.append(attend(group, own_keys, own_values, scale, logits_soft_cap, shift, own_sinks))
        logits = causal_logits(group, own_keys, scale, logits_soft_cap, shift)
        lses.append(with_sinks(logits, own_sinks).logsumexp(-1).T)
    return torch.cat(outputs, 1), torch.cat(lses, 1)
