"""Kept tokens and logits after compaction, against plain eager Hugging Face attention.

Nothing here calls the code under test: attention is written out below, scores and
allocations follow the papers' formulas in loops, and what a head dropped is a mask.
"""

import copy
import heapq
import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from harness import BLOCK_SIZE, SINKS, WINDOW, Compaction, sampling, tokens
from safetensors.torch import load_file
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from vllm import RequestOutput

from vllm_kvcompress import KVCompressionConfig
from vllm_kvcompress.formats import Latent

# Two float32 implementations of one model agree to about this much in a score.
NEAR_TIE = 1e-4

CHUNK = 300  # tokens that KVzip repeats at a time
NUM_TOKENS = 48  # of the answer: its tail enters a new block, whatever the prompt

# method, allocation that it should get, budget, prompt length, the request's options
CASES = {
    "snapkv": ("snapkv", "uniform", 0.25, 1201, "snapkv:budget=0.25"),
    "snapkv, global": ("snapkv", "global", 0.25, 1201, {"allocation": "global"}),
    "adakv": ("snapkv", "adaptive", 0.25, 1201, "adakv:budget=0.25"),
    "kv_compress": ("kv_compress", "global", 0.125, 1201, {"method": "kv_compress", "budget": 0.125}),
    "kv_compress, block edge": ("kv_compress", "global", 0.3, 640, "kv_compress:budget=0.3"),
    "kv_compress, uniform": ("kv_compress", "uniform", 0.5, 640, "kv_compress:budget=0.5,allocation=uniform"),
    "kv_compress, adaptive": (
        "kv_compress",
        "adaptive",
        0.5,
        640,
        "kv_compress:budget=0.5,allocation=adaptive",
    ),
    "streaming_llm": ("streaming_llm", "uniform", 0.5, 640, "streaming_llm:budget=0.5"),
    "pyramidkv": ("snapkv", "pyramid", 0.5, 640, "pyramidkv:budget=0.5"),
    # TOVA and those that look at keys alone would keep less of the tail raw than the window's tokens.
    "tova": ("tova", "uniform", 0.5, 640, "tova:budget=0.5,window=32"),
    "tova, global": ("tova", "global", 0.5, 640, "tova:budget=0.5,window=32,allocation=global"),
    "knorm": ("knorm", "uniform", 0.25, 640, "knorm:budget=0.25"),
    "keydiff": ("keydiff", "adaptive", 0.25, 640, "keydiff:budget=0.25,allocation=adaptive"),
    "h2o": ("h2o", "uniform", 0.25, 640, "h2o:budget=0.25"),
    "h2o, adaptive": ("h2o", "adaptive", 0.5, 640, "h2o:budget=0.5,allocation=adaptive,recent=0.25"),
    "kv_compress_full": ("kv_compress_full", "global", 0.25, 640, "kv_compress_full:budget=0.25"),
    "expected_attention": ("expected_attention", "uniform", 0.25, 640, "expected_attention:budget=0.25"),
    "criticalkv": ("criticalkv", "uniform", 0.25, 640, "criticalkv:budget=0.25"),
    "criticalkv, global": ("criticalkv", "global", 0.25, 640, "criticalkv:budget=0.25,allocation=global"),
    "foresight": ("foresight", "global", 0.25, 640, "foresight:budget=0.25"),
    "foresight, threshold": ("foresight", "global", 0.9, 640, "foresight:budget=0.9,threshold=1e4"),
    # In three parts, the last of which is short.
    "kvzip": ("kvzip", "global", 0.25, 640, f"kvzip:budget=0.25,chunk={CHUNK}"),
}

REAL = ["kv_compress", "criticalkv, global"]  # with SmolLM2 too, where all are run with random weights
# With random models some of whose layers slide a window.
OF_HYBRIDS = [
    "snapkv",
    "adakv",
    "kv_compress",
    "kv_compress, block edge",
    "streaming_llm",
    "pyramidkv",
    "tova",
    "keydiff",
    "h2o, adaptive",
    "expected_attention",
    "criticalkv, global",
    "foresight",
    "kvzip",
]
HYBRIDS = ["gemma3", "gpt-oss"]


# ---------------------------------------------------------------------- the model, with per-head masks


@dataclass
class Attention:
    """What the attention function below reads and leaves behind.

    Attributes:
        queries: per layer that attends to all tokens, in order, `[Hq, tokens, D]` of the last pass, after
            RoPE.
        keys: per layer `[H, tokens, D]`, likewise, with those of earlier passes.
        values: per layer `[H, tokens, D]`, likewise.
        sinks: per layer `[Hq]`, the logits of its sinks, if it has any.
        scale: of the softmax.
        hidden: per layer `[H, tokens]`, True where a KV head dropped a token; None for full attention.
    """

    queries: dict[int, Tensor]
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    sinks: dict[int, Tensor] = field(default_factory=dict)
    scale: float = 1.0
    hidden: Tensor | None = None


ATTENTION = Attention({}, {}, {})


def full_layers(config) -> list[int]:
    """Numbers of the layers that attend to all tokens and have a cache: others slide a window, or read the
    cache of the last one."""
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    types = types[: config.num_hidden_layers - getattr(config, "num_kv_shared_layers", 0)]
    return [number for number, kind in enumerate(types) if kind == "full_attention"]


def eager_attention(module, query, key, value, attention_mask, scaling, sliding_window=None, s_aux=None, **_):
    """Causal attention `[1, Hq, q, D]` over `[1, H, k, D]` that leaves out what each KV head dropped.

    Args:
        sliding_window: tokens that a query sees, itself included; None for all.
        s_aux: `[Hq]`, one more logit of each head, to which no value belongs.
    """
    group, num_queries, num_keys = module.num_key_value_groups, query.shape[2], key.shape[2]
    mask = torch.zeros(query.shape[1], num_queries, num_keys)
    mask.masked_fill_(torch.ones(num_queries, num_keys).triu(num_keys - num_queries + 1).bool(), -torch.inf)
    if sliding_window is not None:
        gone = torch.ones(num_queries, num_keys).tril(num_keys - num_queries - sliding_window)
        mask.masked_fill_(gone.bool(), -torch.inf)
    else:
        full = full_layers(module.config)
        layer = full.index(module.layer_idx) if module.layer_idx in full else len(full) - 1
        if module.layer_idx in full:
            ATTENTION.queries[layer], ATTENTION.keys[layer] = query[0], key[0]
            ATTENTION.values[layer], ATTENTION.scale = value[0], scaling
            if s_aux is not None:
                ATTENTION.sinks[layer] = s_aux.detach()
        if ATTENTION.hidden is not None:
            hidden = ATTENTION.hidden[layer].repeat_interleave(group, 0)
            mask[:, :, : hidden.shape[1]].masked_fill_(hidden[:, None], -torch.inf)
    logits = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling + mask
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.view(1, -1, 1, 1).expand(1, -1, num_queries, 1)], -1)
    weights = logits.softmax(-1)[..., :num_keys]
    output = weights @ value.repeat_interleave(group, 1)
    return output.transpose(1, 2), None


def attention(prompt: "Prompt", layer: int, query_head: int, logits: Tensor) -> Tensor:
    """The softmax of a query head's logits `[q, k]`, its sink's among them."""
    sinks = prompt.sinks.get(layer)
    if sinks is None:
        return logits.softmax(-1)
    sink = sinks[query_head].double().expand(*logits.shape[:-1], 1)
    return torch.cat([logits, sink], -1).softmax(-1)[..., :-1]


def by_token(out: Tensor) -> Tensor:
    """What leaves a projection, or a norm behind it, `[tokens, H·D]`."""
    return out[0] if out.ndim == 3 else out[0].transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class Prompt:
    """A prompt run once, uncompressed: its queries and keys as in `Attention`, and its cache."""

    ids: list[int]
    queries: dict[int, Tensor]
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    sinks: dict[int, Tensor]
    scale: float
    cache: DynamicCache
    first_logits: Tensor


@dataclass(frozen=True)
class Model:
    """A checkpoint, read by transformers."""

    path: Path
    reference: PreTrainedModel
    prompts: dict[int, Prompt] = field(default_factory=dict)  # by number of tokens

    @torch.inference_mode()
    def prompt(self, ids: list[int]) -> Prompt:
        if len(ids) not in self.prompts:
            ATTENTION.hidden = None
            for of_another_model in (ATTENTION.queries, ATTENTION.keys, ATTENTION.values, ATTENTION.sinks):
                of_another_model.clear()
            out = self.reference(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
            self.prompts[len(ids)] = Prompt(
                ids,
                dict(ATTENTION.queries),
                dict(ATTENTION.keys),
                dict(ATTENTION.values),
                dict(ATTENTION.sinks),
                ATTENTION.scale,
                out.past_key_values,
                out.logits[0, -1],
            )
        return self.prompts[len(ids)]


@pytest.fixture(scope="module")
def models(random_model, smollm2, hybrids) -> dict[str, Model]:
    AttentionInterface.register("oracle", eager_attention)
    options = dict(dtype=torch.float32, attn_implementation="oracle")
    return {
        name: Model(path, AutoModelForCausalLM.from_pretrained(path, **options).eval())
        for name, path in {"random": random_model, "smollm2": smollm2, **hybrids}.items()
    }


@torch.inference_mode()
def continue_on_kept(reference, prompt: Prompt, answer: list[int], hidden: Tensor) -> Tensor:
    """Log-probabilities `[len(answer), V]` when every answer token sees only what the heads kept."""
    ATTENTION.hidden = hidden
    try:
        out = reference(
            torch.tensor([answer[:-1]]), past_key_values=copy.deepcopy(prompt.cache), use_cache=True
        )
    finally:
        ATTENTION.hidden = None
    return torch.cat([prompt.first_logits[None], out.logits[0]]).log_softmax(-1)


# ---------------------------------------------------------------------- scores, in loops


def attention_scores(prompt: Prompt, boundary: int, squared: bool) -> Tensor:
    """`[L, H, T]`: attention of the last w prompt queries, pooled per query head, then summed over the group.

    SnapKV takes the mean over the group, which orders the tokens in the same way.
    """
    num_prompt = len(prompt.ids)
    layers = []
    for layer, keys in prompt.keys.items():
        queries = prompt.queries[layer]
        heads = keys.shape[0]
        group = queries.shape[0] // heads
        total = torch.zeros(heads, boundary, dtype=torch.float64)
        for query_head in range(heads * group):
            window = queries[query_head, num_prompt - WINDOW :].double()
            logits = window @ keys[query_head // group].double().T * prompt.scale
            for i in range(WINDOW):
                logits[i, num_prompt - WINDOW + i + 1 :] = -torch.inf
            weights = attention(prompt, layer, query_head, logits)[:, : num_prompt - WINDOW]
            paid = (weights**2 if squared else weights).sum(0)
            # The best of each token and its three neighbours on either side; none lie beyond the edges.
            around = torch.nn.functional.pad(paid, (3, 3), value=-1.0).unfold(0, 7, 1)
            total[query_head // group] += around.amax(-1)[:boundary]
        layers.append(total)
    return torch.stack(layers)


def last_query_scores(prompt: Prompt, boundary: int) -> Tensor:
    """TOVA `[L, H, T]`: what the last token attends to, the same for all heads of a layer."""
    layers = []
    for layer, keys in prompt.keys.items():
        heads = keys.shape[0]
        last = prompt.queries[layer][:, len(prompt.ids) - 1].double()
        paid = []
        for query_head, query in enumerate(last):
            logits = keys[query_head * heads // len(last)].double() @ query * prompt.scale
            paid.append(attention(prompt, layer, query_head, logits))
        layers.append((sum(paid) / len(paid))[:boundary].expand(heads, -1))
    return torch.stack(layers).clone()


def key_scores(method: str, prompt: Prompt, boundary: int) -> Tensor:
    """Knorm and KeyDiff `[L, H, T]`, from the prompt's keys alone."""
    layers = []
    for keys in prompt.keys.values():
        keys = keys[:, : len(prompt.ids)].double()
        length = keys.square().sum(-1, keepdim=True).sqrt()
        if method == "knorm":
            layers.append(-length[:, :boundary, 0])
        else:
            mean = (keys / length).mean(1, keepdim=True)
            cosine = (keys * mean).sum(-1) / length[..., 0] / mean.square().sum(-1).sqrt()
            layers.append(-cosine[:, :boundary])
    return torch.stack(layers)


def all_queries_scores(prompt: Prompt, boundary: int, squared: bool) -> Tensor:
    """H2O and the full KV-Compress `[L, H, T]`: attention of every query, summed over queries and group."""
    num_prompt = len(prompt.ids)
    future = torch.ones(num_prompt, num_prompt, dtype=torch.bool).triu(1)
    layers = []
    for layer, keys in prompt.keys.items():
        queries, heads = prompt.queries[layer], keys.shape[0]
        total = torch.zeros(heads, num_prompt, dtype=torch.float64)
        for query_head, query in enumerate(queries):
            head = query_head * heads // len(queries)
            logits = query.double() @ keys[head].double().T * prompt.scale
            weights = attention(prompt, layer, query_head, logits.masked_fill(future, -torch.inf))
            total[head] += (weights**2 if squared else weights).sum(0)
        layers.append(total[:, :boundary])
    return torch.stack(layers)


@torch.inference_mode()
def expected_scores(reference, prompt: Prompt, boundary: int) -> Tensor:
    """Expected Attention `[L, H, T]`, from the queries that leave the projection before RoPE."""
    before, hooks = {}, []
    for index, number in enumerate(full_layers(reference.config)):
        layer = reference.model.layers[number]
        hook = lambda module, given, out, index=index: before.__setitem__(index, by_token(out))  # noqa: E731
        own = getattr(layer.self_attn, "q_norm", layer.self_attn.q_proj)
        hooks.append(own.register_forward_hook(hook))
    reference(torch.tensor([prompt.ids]))
    for hook in hooks:
        hook.remove()
    num_prompt, (heads, _, size) = len(prompt.ids), prompt.keys[0].shape
    positions = torch.arange(num_prompt, num_prompt + 512)[None]
    rotary = reference.model.rotary_emb
    of_type = ["full_attention"] if hasattr(rotary, "full_attention_inv_freq") else []
    cos, sin = (t[0].double() for t in rotary(torch.zeros(1, 1, size), positions, *of_type))
    cos, sin = (torch.cat([t] * (size // t.shape[1]), 1) for t in (cos, sin))  # some have every angle once
    half = size // 2
    turn = torch.zeros(size, size, dtype=torch.float64)
    turn[:half, half:], turn[half:, :half] = -torch.eye(half), torch.eye(half)
    rotation = torch.diag(cos.mean(0)) + sin.mean(0)[:, None] * turn
    layers = []
    for layer, keys in prompt.keys.items():
        queries = before[layer].double().view(num_prompt, -1, size)[4:]
        keys, total = keys[:, :num_prompt].double(), 0
        group = queries.shape[1] // heads
        for member in range(group):
            own = queries[:, member::group].transpose(0, 1)  # one query head of every KV head's group
            mean = own.mean(1)
            covariance = torch.stack([torch.cov(q.T, correction=0) for q in own])
            mean, covariance = mean @ rotation.T, rotation @ covariance @ rotation.T
            logits = (keys @ mean[..., None])[..., 0] * prompt.scale
            logits += torch.einsum("hwi,hij,hwj->hw", keys, covariance, keys) * prompt.scale**2 / 2
            weights = [
                attention(prompt, layer, head * group + member, of_head[4:])
                for head, of_head in enumerate(logits)
            ]
            total = total + torch.stack(weights) / group
        scores = total * prompt.values[layer][:, 4:num_prompt].double().norm(dim=-1)
        layers.append(torch.nn.functional.pad(scores, (4, 0), value=torch.inf)[:, :boundary])
    return torch.stack(layers)


@torch.inference_mode()
def predicted_scores(reference, prompt: Prompt, boundary: int) -> Tensor:
    """Foresight `[L, H, T]`: the networks beside the model, from keys as they leave the projection."""
    before, hooks = {}, []
    for index, number in enumerate(full_layers(reference.config)):
        layer = reference.model.layers[number]
        hook = lambda module, given, out, index=index: before.__setitem__(index, by_token(out))  # noqa: E731
        own = getattr(layer.self_attn, "k_norm", layer.self_attn.k_proj)
        hooks.append(own.register_forward_hook(hook))
    reference(torch.tensor([prompt.ids]))
    for hook in hooks:
        hook.remove()
    network = load_file(Path(reference.name_or_path) / "kv-compression" / "scorer.safetensors")
    network = {name: tensor.double() for name, tensor in network.items()}
    layers = []
    for layer, values in prompt.values.items():
        layers.append([])
        for head in range(len(values)):
            size = values.shape[2]
            own = torch.cat([before[layer][:, head * size : (head + 1) * size], values[head]], 1).double()
            of_head = full_layers(reference.config)[layer], head
            hidden = own @ network["up"][of_head] + network["up_bias"][of_head]
            hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
            out = hidden @ network["down"][of_head] + network["down_bias"][of_head]
            layers[-1].append(out.exp()[:boundary])
        layers[-1] = torch.stack(layers[-1])
    return torch.stack(layers)


@torch.inference_mode()
def repeat_scores(reference, tokenizer, prompt: Prompt, boundary: int) -> Tensor:
    """KVzip `[L, H, T]`: the context and its repetition, part by part, in one pass each."""
    num_prompt, heads = len(prompt.ids), prompt.keys[0].shape[0]
    most = torch.zeros(len(prompt.keys), heads, num_prompt, dtype=torch.float64)
    for begin in range(0, num_prompt, CHUNK):
        end = min(begin + CHUNK, num_prompt)
        ask = "\n\nRepeat the previous context exactly."
        if begin:
            ask = "\n\nRepeat the part of the previous context exactly, starting with"
        asked = tokenizer.encode(ask, add_special_tokens=False) + prompt.ids[max(begin - 8, 0) : begin]
        repetition = asked + prompt.ids[begin:end]
        reference(torch.tensor([prompt.ids + repetition]))
        for layer in range(len(prompt.keys)):
            queries = ATTENTION.queries[layer][:, num_prompt:].double()
            keys = ATTENTION.keys[layer].double()
            sinks = list(range(4)) if begin else []
            seen = keys[:, [*sinks, *range(begin, end), *range(num_prompt, num_prompt + len(repetition))]]
            own = len(repetition)
            for query_head, query in enumerate(queries):
                head = query_head * heads // len(queries)
                logits = query @ seen[head].T * prompt.scale
                logits[:, -own:] += torch.full((own, own), -torch.inf).triu(1)
                part = attention(prompt, layer, query_head, logits)[
                    :, len(sinks) : len(sinks) + end - begin
                ].amax(0)
                most[layer, head, begin:end] = torch.maximum(most[layer, head, begin:end], part)
    return most[..., :boundary]


def selecting_scores(method: str, options, reference, prompt: Prompt, scores: Tensor, counts) -> Tensor:
    """The scores by which tokens are chosen once every head's pages are known; `[L, H, T]`."""
    if method not in ("h2o", "criticalkv"):
        return scores
    chosen = scores.clone()
    for layer in range(len(scores)):
        for head in range(scores.shape[1]):
            kept = int(counts[layer][head]) * BLOCK_SIZE
            if method == "h2o":
                recent = kept // 4 if "recent=0.25" in options else kept // 2
                chosen[layer, head, scores.shape[2] - recent :] = torch.inf
                continue
            number = full_layers(reference.config)[layer]
            weight = reference.model.layers[number].self_attn.o_proj.weight.detach()
            size = prompt.values[layer].shape[2]
            group = weight.shape[1] // size // scores.shape[1]
            length = 0
            for member in range(group):
                begin = (head * group + member) * size
                through = prompt.values[layer][head] @ weight[:, begin : begin + size].T
                length = length + through.abs().sum(-1) / group
            # SnapKV's mean over the group, where the oracle above has the sum.
            weighted = (scores[layer, head] / group + 1e-4) * length[: scores.shape[2]]
            first = scores[layer, head].sort(descending=True, stable=True).indices[: kept // 2]
            weighted[first] = torch.inf
            chosen[layer, head] = weighted
    chosen[:, :, :SINKS] = torch.inf
    return chosen


def scores_of(method: str, prompt: Prompt, boundary: int, reference, tokenizer, known={}) -> Tensor:  # noqa: B006, E501 (a memo)
    key = method, len(prompt.ids), id(reference)
    if key not in known:
        if method == "streaming_llm":
            heads = prompt.keys[0].shape[0]
            known[key] = (
                torch.arange(boundary, dtype=torch.float64).expand(len(prompt.keys), heads, -1).clone()
            )
        elif method == "tova":
            known[key] = last_query_scores(prompt, boundary)
        elif method in ("h2o", "kv_compress_full"):
            known[key] = all_queries_scores(prompt, boundary, squared=method != "h2o")
        elif method == "expected_attention":
            known[key] = expected_scores(reference, prompt, boundary)
        elif method == "kvzip":
            known[key] = repeat_scores(reference, tokenizer, prompt, boundary)
        elif method == "foresight":
            known[key] = predicted_scores(reference, prompt, boundary)
        elif method in ("knorm", "keydiff"):
            known[key] = key_scores(method, prompt, boundary)
        else:
            known[key] = attention_scores(prompt, boundary, squared=method == "kv_compress")
        known[key] = known[key].clone()  # out of inference mode
        known[key][:, :, :SINKS] = torch.inf
    return known[key]


# ---------------------------------------------------------------------- allocations, in loops


def blocks_of(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


def uniform_counts(scores: Tensor, blocks: int) -> list[list[int]]:
    layers, heads, _ = scores.shape
    return [[blocks] * heads for _ in range(layers)]


def adaptive_counts(scores: Tensor, blocks: int, alpha: float = 0.2) -> list[list[int]]:
    """Ada-KV, with token budgets turned into whole pages by largest remainder."""
    layers, heads, num_tokens = scores.shape
    counts = []
    for layer in range(layers):
        pooled = [(-float(scores[layer, h, i]), h, i) for h in range(heads) for i in range(num_tokens)]
        taken = [h for _, h, _ in heapq.nsmallest(heads * blocks * BLOCK_SIZE, pooled)]
        wanted = [((1 - alpha) * taken.count(h) / BLOCK_SIZE + alpha * blocks) for h in range(heads)]
        pages = [max(1, math.floor(w)) for w in wanted]
        while sum(pages) < heads * blocks:
            neediest = max(range(heads), key=lambda h: wanted[h] - pages[h])
            pages[neediest] += 1
        assert sum(pages) == heads * blocks
        counts.append(pages)
    return counts


def page_costs(scores: Tensor, layer: int, head: int) -> list[float]:
    """Cost of freeing the head's first page, second page, ...: the best token that must go for it."""
    return sorted(scores[layer, head].tolist())[BLOCK_SIZE - 1 :: BLOCK_SIZE]


def global_counts(scores: Tensor, blocks: int) -> list[list[int]]:
    """KV-Compress: free the page that costs least, again and again; a head's last page stays."""
    layers, heads, num_tokens = scores.shape
    largest = num_tokens // BLOCK_SIZE
    counts = [[largest] * heads for _ in range(layers)]
    costs = {(layer, h): page_costs(scores, layer, h) for layer in range(layers) for h in range(heads)}
    cheapest = [(cost[0], key) for key, cost in costs.items() if largest > 1]
    heapq.heapify(cheapest)
    for _ in range(layers * heads * (largest - blocks)):
        _, (layer, h) = heapq.heappop(cheapest)
        counts[layer][h] -= 1
        if counts[layer][h] > 1:
            heapq.heappush(cheapest, (costs[layer, h][largest - counts[layer][h]], (layer, h)))
    return counts


def pyramid_counts(scores: Tensor, blocks: int, beta: int = 20) -> list[list[int]]:
    """PyramidKV: layers on a line from 2b - b/β tokens down to b/β, in whole pages by largest remainder."""
    layers, heads, num_tokens = scores.shape
    mean = blocks * BLOCK_SIZE
    lowest = mean // beta
    highest = 2 * mean - lowest
    if highest >= num_tokens:
        highest, lowest = num_tokens, 2 * mean - num_tokens
    wanted = [(highest - i * (highest - lowest) / (layers - 1)) / BLOCK_SIZE for i in range(layers)]
    cells = [(layer, h) for layer in range(layers) for h in range(heads)]
    pages = {cell: max(1, math.floor(wanted[cell[0]])) for cell in cells}
    while sum(pages.values()) < layers * heads * blocks:
        pages[max(cells, key=lambda cell: wanted[cell[0]] - pages[cell])] += 1
    while sum(pages.values()) > layers * heads * blocks:
        above = [cell for cell in reversed(cells) if pages[cell] > 1]
        pages[max(above, key=lambda cell: pages[cell] - wanted[cell[0]])] -= 1
    return [[pages[layer, h] for h in range(heads)] for layer in range(layers)]


COUNTS = {
    "uniform": uniform_counts,
    "adaptive": adaptive_counts,
    "pyramid": pyramid_counts,
    "global": global_counts,
}


def blocks_above(scores: Tensor, threshold: float) -> int:
    """Blocks for the pages that hold whatever scores above the threshold, and one of each head."""
    heads = [head.tolist() for layer in scores for head in layer]
    pages = [max(1, math.ceil(sum(score > threshold for score in head) / BLOCK_SIZE)) for head in heads]
    return math.ceil(sum(pages) / len(heads))


# ---------------------------------------------------------------------- the tests


@dataclass(frozen=True)
class Case:
    """What the engine did with one request, and what was to be expected.

    Attributes:
        scores: `[L, H, T]` by which pages are shared out.
        chosen: `[L, H, T]` by which a head's tokens are chosen.
        blocks: that are kept.
        most: that the budget allows.
    """

    reference: PreTrainedModel
    prompt: Prompt
    scores: Tensor
    chosen: Tensor
    allocation: str
    blocks: int
    most: int
    compaction: Compaction
    output: RequestOutput


@pytest.fixture(
    params=[
        *(("random", name) for name in CASES),
        *(("smollm2", name) for name in REAL),
        *((hybrid, name) for hybrid in HYBRIDS for name in OF_HYBRIDS),
        *(("gemma4", name) for name in ("snapkv", "kv_compress", "h2o, adaptive", "criticalkv, global")),
    ],
    ids="-".join,
    scope="module",
)
def case(request, engines, models, long_ids, tokenizer):
    """One case, run: its model, prompt, compaction and output, and what is expected of it."""
    model = models[request.param[0]]
    method, allocation, budget, num_tokens, options = CASES[request.param[1]]
    prompt = model.prompt(long_ids(num_tokens, seed=7))
    engine = engines(model.path, "snapkv:budget=0.25")
    engine.forget_prefixes()
    name = engine.add(prompt.ids, sampling(NUM_TOKENS, options, logprobs=5))
    engine.finish()
    boundary = (num_tokens - WINDOW) // BLOCK_SIZE * BLOCK_SIZE
    most = blocks = math.ceil(Fraction(str(budget)) * (boundary // BLOCK_SIZE))
    scores = scores_of(method, prompt, boundary, model.reference, tokenizer)
    compaction = engine.compaction_of(name)
    if (threshold := KVCompressionConfig.parse(options).threshold) is not None:
        blocks = blocks_above(scores, threshold)
        assert 2 < blocks < most - 2, "as few, or as many, would be kept without one"
    chosen = selecting_scores(method, options, model.reference, prompt, scores, compaction.counts)
    return Case(
        model.reference,
        prompt,
        scores,
        chosen,
        allocation,
        blocks,
        most,
        compaction,
        engine.outputs.pop(name),
    )


def test_page_counts_are_those_of_the_allocation(case):
    scores, allocation, blocks, compaction = case.scores, case.allocation, case.blocks, case.compaction
    layers, heads, num_tokens = scores.shape
    assert len(compaction.job.destination) == case.most
    assert compaction.job.boundary == num_tokens
    assert compaction.counts.shape == (layers, heads)
    assert int(compaction.counts.sum()) == blocks * layers * heads
    got, expected = compaction.counts.tolist(), COUNTS[allocation](scores, blocks)
    if allocation == "global" and got != expected:
        # Only pages that cost the same may change places: no page that went cost more than one that stayed.
        dearest_gone, cheapest_kept = 0.0, math.inf
        for layer in range(layers):
            for head in range(heads):
                costs = page_costs(scores, layer, head)
                gone = len(costs) - got[layer][head]
                dearest_gone = max([dearest_gone, *costs[:gone]])
                if got[layer][head] > 1:
                    cheapest_kept = min(cheapest_kept, costs[gone])
        assert dearest_gone <= cheapest_kept * (1 + NEAR_TIE)
    else:
        assert got == expected


def test_kept_tokens_are_the_best_of_each_head(case):
    scores, compaction = case.chosen, case.compaction
    exchanged = total = 0
    for layer, of_heads in enumerate(compaction.positions()):
        for head, kept in enumerate(of_heads):
            assert kept == sorted(set(kept)), "positions ascend, each once"
            assert kept[:SINKS] == list(range(SINKS))
            score = scores[layer, head]
            best = set(score.sort(descending=True, stable=True).indices[: len(kept)].tolist())
            missing, surplus = sorted(best - set(kept)), sorted(set(kept) - best)
            if missing:
                best_missing, worst_kept = float(score[missing].max()), float(score[surplus].min())
                assert best_missing <= worst_kept + NEAR_TIE * abs(worst_kept), (layer, head)
            exchanged, total = exchanged + len(missing), total + len(kept)
    assert exchanged <= total / 1000, "near ties must be rare, or the comparison shows nothing"


def test_logits_after_compaction_are_those_of_attention_over_the_kept_tokens(case):
    hidden = torch.ones(case.scores.shape, dtype=torch.bool)
    for layer, of_heads in enumerate(case.compaction.positions()):
        for head, kept in enumerate(of_heads):
            hidden[layer, head, kept] = False
    answer, num_prompt = tokens(case.output), len(case.prompt.ids)
    # The last token is sampled and not computed.
    assert blocks_of(num_prompt + len(answer) - 1) > blocks_of(num_prompt), "the tail enters a new block"
    expected = continue_on_kept(case.reference, case.prompt, answer, hidden)
    assert len(case.output.outputs[0].logprobs) == len(answer)
    for index, top in enumerate(case.output.outputs[0].logprobs):
        assert float(expected[index, answer[index]]) >= float(expected[index].max()) - NEAR_TIE, index
        for token, logprob in top.items():
            assert logprob.logprob == pytest.approx(float(expected[index, token]), abs=1e-2), index


def test_the_oracle_tells_compacted_from_full_attention(case):
    # Otherwise the test above would also pass for a plugin that drops nothing.
    nothing = torch.zeros(case.scores.shape, dtype=torch.bool)
    full = continue_on_kept(case.reference, case.prompt, tokens(case.output), nothing)
    off = max(
        abs(logprob.logprob - float(full[index, token]))
        for index, top in enumerate(case.output.outputs[0].logprobs)
        for token, logprob in top.items()
    )
    assert off > 3e-2


ENCODED = [
    "kivi",
    "kivi+kivi2",
    "turboquant+turbo3",
    "kv_compress+kivi4:budget=0.125",
    "snapkv+turbo2_prod",
    "kivi+k4v3",
    "kv_compress+auto:budget=0.125",
    "kv_compress+mixed_dim:budget=0.125",
    "mixed_dim_kv:budget=0.125",
]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        *(("random", form) for form in ENCODED),
        ("smollm2", ENCODED[3]),
        ("gemma3", ENCODED[0]),
        *((hybrid, form) for hybrid in HYBRIDS for form in (ENCODED[3], ENCODED[6])),
    ],
)
def test_logits_over_encoded_tokens_are_those_of_attention_over_what_was_written(
    engines, models, long_ids, model, options
):
    model = models[model]
    prompt = model.prompt(long_ids(640, seed=7))
    engine = engines(model.path, "snapkv:budget=0.25")
    engine.forget_prefixes()
    name = engine.add(prompt.ids, sampling(NUM_TOKENS, options, logprobs=5))
    compaction = engine.step_until_compacted(name)
    of_parts = engine.worker.compression.tables[compaction.job.request_id].records.counts.clone()
    engine.finish()
    output, config = engine.outputs.pop(name), KVCompressionConfig.parse(options)
    assert torch.equal(of_parts.sum(0), compaction.counts)
    boundary, records = compaction.job.boundary, iter(compaction.kept.tolist())
    assert boundary == 608 and compaction.kept.shape[1] == 32
    if config.keeps_all:
        assert bool((compaction.counts == boundary // 32).all())
    if config.record_format.basis is not None:
        assert int(of_parts[0].sum()) > 0 and int(of_parts[1:].sum()) > 0
    hidden = torch.ones(*compaction.counts.shape, boundary, dtype=torch.bool)
    cache = copy.deepcopy(prompt.cache)
    for layer, of_heads in enumerate(compaction.counts.tolist()):
        for head, num_records in enumerate(of_heads):
            parts = torch.arange(len(of_parts)).repeat_interleave(of_parts[:, layer, head])
            assert len(parts) == num_records
            for part in parts.tolist():
                kept, written = next(records), config.record_format.parts[part]
                assert kept == sorted(set(kept))
                hidden[layer, head, kept] = False
                plain = prompt.keys[layer][head, kept], prompt.values[layer][head, kept]
                size, basis = plain[0].shape[1], []
                if isinstance(written, Latent):
                    whole = (each[layer][head, :boundary] for each in (prompt.keys, prompt.values))
                    basis = [config.record_format.basis.encode(*whole)]
                read = written.decode(written.encode(*plain, *basis), size, *basis)
                of_layer = cache.layers[full_layers(model.reference.config)[layer]]
                of_layer.keys[0, head, kept], of_layer.values[0, head, kept] = read
    answer = tokens(output)
    expected = continue_on_kept(model.reference, replace(prompt, cache=cache), answer, hidden)
    exact = continue_on_kept(model.reference, prompt, answer, hidden)
    assert float((expected - exact).abs().max()) > 1e-2, "what is written is not what was there"
    for index, top in enumerate(output.outputs[0].logprobs):
        for token, logprob in top.items():
            # Two float32 models may write a number that lies between two codes either way.
            assert logprob.logprob == pytest.approx(float(expected[index, token]), abs=2e-2), index


def test_a_policy_in_user_code_runs_in_the_engine(shared_engine, long_ids):
    # What `KV_COMPRESSION_POLICIES` does in every process of an engine.
    from vllm_kvcompress.policies.user import _load_file

    example = Path(__file__).parents[2] / "examples" / "custom_policy.py"
    _load_file(example)
    shared_engine.forget_prefixes()
    name = shared_engine.add(long_ids(640, seed=7), sampling(4, "value_norm:budget=0.5"))
    shared_engine.finish()
    compaction = shared_engine.compaction_of(name)
    shared_engine.outputs.pop(name)
    assert type(compaction.job.config.build_policy()).__name__ == "ValueNorm"
    assert len(compaction.job.destination) == 10  # of 19
