"""Kept tokens and logits after compaction, against plain eager Hugging Face attention.

Nothing here calls the code under test: attention is written out below, scores and
allocations follow the papers' formulas in loops, and what a head dropped is a mask.
"""

import copy
import functools
import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import BLOCK_SIZE, SINKS, STATEFUL, WINDOW, Compaction, sampling, tokens
from safetensors.torch import load_file
from scipy.optimize import lsq_linear, nnls
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from vllm import RequestOutput

from vllm_kvcompress import KVCompressionConfig
from vllm_kvcompress.formats import Latent
from vllm_kvcompress.worker.compactor import Compactor

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
# With one of which vLLM has those that do not in two groups.
OF_GROUPS = ["snapkv", "kv_compress", "pyramidkv", "h2o, adaptive", "criticalkv, global", "kvzip"]
OF_CAPPED = ["kv_compress", "tova", "h2o, adaptive", "kvzip"]  # whose layers cap their logits
CHUNKED = "chunked_attention"  # layers that attend within chunks of the context
OF_CHUNKED = ["snapkv", "kv_compress", "h2o, adaptive", "criticalkv, global", "kvzip"]
# With random models some of whose layers keep a state, in blocks of three pages.
OF_STATEFUL = [
    ("lfm2", "snapkv"),
    ("lfm2", "kv_compress"),
    ("lfm2", "kvzip"),
    ("granite", "snapkv"),
    ("granite", "adakv"),
    ("granite", "h2o, adaptive"),
    ("granite", "expected_attention"),
    ("granite", "criticalkv, global"),
    ("granite", "kvzip"),
]


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
        cap: logits are cap · tanh(logits / cap); None for none.
        bias: per layer `[H, tokens]`, added to the logits of a KV head's tokens: -inf where it dropped one;
            None for full attention.
        seen: tokens after this pass.
    """

    queries: dict[int, Tensor]
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    sinks: dict[int, Tensor] = field(default_factory=dict)
    scale: float = 1.0
    cap: float | None = None
    bias: Tensor | None = None
    seen: int = 0


ATTENTION = Attention({}, {}, {})


def full_layers(config) -> list[int]:
    """Numbers of the layers that attend to all tokens and have a cache: others slide a window, keep a state,
    or read the cache of the last one."""
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    types = types[: config.num_hidden_layers - getattr(config, "num_kv_shared_layers", 0)]
    return [number for number, kind in enumerate(types) if kind in ("full_attention", "attention")]


def capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def eager_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling,
    sliding_window=None,
    s_aux=None,
    softcap=None,
    **_,
):
    """Causal attention `[1, Hq, q, D]` over `[1, H, k, D]`, with each KV head's biases.

    Args:
        sliding_window: tokens that a query sees, itself included; None for all.
        s_aux: `[Hq]`, one more logit of each head, to which no value belongs.
        softcap: see `Attention`; biases and sinks are not capped.
    """
    group, num_queries, num_keys = module.num_key_value_groups, query.shape[2], key.shape[2]
    mask = torch.zeros(query.shape[1], num_queries, num_keys)
    mask.masked_fill_(torch.ones(num_queries, num_keys).triu(num_keys - num_queries + 1).bool(), -torch.inf)
    if sliding_window is not None:
        gone = torch.ones(num_queries, num_keys).tril(num_keys - num_queries - sliding_window)
        mask.masked_fill_(gone.bool(), -torch.inf)
    elif (getattr(module.config, "layer_types", None) or {module.layer_idx: ""})[module.layer_idx] == CHUNKED:
        # Of keys in a cache transformers may have dropped the first ones.
        seen = num_keys if num_keys == num_queries else ATTENTION.seen
        chunk = torch.arange(seen) // module.config.attention_chunk_size
        mask.masked_fill_(chunk[-num_queries:, None] != chunk[-num_keys:], -torch.inf)
    else:
        full = full_layers(module.config)
        layer = full.index(module.layer_idx) if module.layer_idx in full else len(full) - 1
        if module.layer_idx in full:
            ATTENTION.queries[layer], ATTENTION.keys[layer] = query[0], key[0]
            ATTENTION.values[layer], ATTENTION.scale, ATTENTION.cap = value[0], scaling, softcap
            if s_aux is not None:
                ATTENTION.sinks[layer] = s_aux.detach()
        if ATTENTION.bias is not None:
            bias = ATTENTION.bias[layer].repeat_interleave(group, 0)
            mask[:, :, : bias.shape[1]] += bias[:, None]
    logits = capped(query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling, softcap) + mask
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
    cap: float | None
    cache: DynamicCache
    first_logits: Tensor

    def logits(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Of queries `[..., D]` and a head's keys `[k, D]`, before any mask, bias or sink."""
        return capped(queries @ keys.T * self.scale, self.cap)


@dataclass(frozen=True)
class Model:
    """A checkpoint, read by transformers."""

    path: Path
    reference: PreTrainedModel
    prompts: dict[int, Prompt] = field(default_factory=dict)  # by number of tokens

    @torch.inference_mode()
    def prompt(self, ids: list[int]) -> Prompt:
        if len(ids) not in self.prompts:
            ATTENTION.bias = None
            for of_another_model in (ATTENTION.queries, ATTENTION.keys, ATTENTION.values, ATTENTION.sinks):
                of_another_model.clear()
            ATTENTION.seen = len(ids)
            out = self.reference(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
            self.prompts[len(ids)] = Prompt(
                ids,
                dict(ATTENTION.queries),
                dict(ATTENTION.keys),
                dict(ATTENTION.values),
                dict(ATTENTION.sinks),
                ATTENTION.scale,
                ATTENTION.cap,
                out.past_key_values,
                out.logits[0, -1],
            )
        return self.prompts[len(ids)]


@pytest.fixture(scope="module")
def models(random_model, smollm2, hybrids, stateful) -> dict[str, Model]:
    AttentionInterface.register("oracle", eager_attention)
    options = dict(dtype=torch.float32, attn_implementation="oracle")
    return {
        name: Model(path, AutoModelForCausalLM.from_pretrained(path, **options).eval())
        for name, path in {"random": random_model, "smollm2": smollm2, **hybrids, **stateful}.items()
        if name != "qwen3-next"  # which vLLM computes in bfloat16 alone
    }


@torch.inference_mode()
def continue_with(reference, prompt: Prompt, answer: list[int], bias: Tensor) -> Tensor:
    """Log-probabilities `[len(answer), V]` when every answer token sees the prompt with these biases."""
    cache, logits = copy.deepcopy(prompt.cache), [prompt.first_logits[None]]
    ATTENTION.bias = bias
    try:
        # States go on by one token.
        at_once = 1 if reference.config.model_type in ("lfm2", "granitemoehybrid") else len(answer)
        for begin in range(0, len(answer) - 1, at_once):
            some = torch.tensor([answer[begin : min(begin + at_once, len(answer) - 1)]])
            ATTENTION.seen = len(prompt.ids) + begin + some.shape[1]
            logits.append(reference(some, past_key_values=cache, use_cache=True).logits[0])
    finally:
        ATTENTION.bias = None
    return torch.cat(logits).log_softmax(-1)


def continue_on_kept(reference, prompt: Prompt, answer: list[int], hidden: Tensor) -> Tensor:
    """The same when it sees only what the heads kept."""
    nothing = torch.zeros(hidden.shape)
    return continue_with(reference, prompt, answer, nothing.masked_fill(hidden, -torch.inf))


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
            logits = prompt.logits(window, keys[query_head // group].double())
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
            logits = prompt.logits(query, keys[query_head * heads // len(last)].double())
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
            logits = prompt.logits(query.double(), keys[head].double())
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
            hidden = torch.nn.functional.gelu(hidden)
            out = hidden @ network["down"][of_head] + network["down_bias"][of_head]
            layers[-1].append(out.exp()[:boundary])
        layers[-1] = torch.stack(layers[-1])
    return torch.stack(layers)


@dataclass(frozen=True)
class Part:
    """A part of a context, and the attention that is paid to it while it is repeated.

    Attributes:
        begin: its first token.
        end: behind its last one.
        attention: by layer and query head, float64 `[repetition, tokens of the part]`.
        queries: per layer `[Hq, repetition, D]`, after RoPE.
    """

    begin: int
    end: int
    attention: dict[tuple[int, int], Tensor]
    queries: dict[int, Tensor]


@torch.inference_mode()
def repeated_parts(reference, tokenizer, prompt: Prompt) -> Iterator[Part]:
    """The context and its repetition, part by part, in one pass each."""
    num_prompt, heads = len(prompt.ids), prompt.keys[0].shape[0]
    for begin in range(0, num_prompt, CHUNK):
        end = min(begin + CHUNK, num_prompt)
        ask = "\n\nRepeat the previous context exactly."
        if begin:
            ask = "\n\nRepeat the part of the previous context exactly, starting with"
        asked = tokenizer.encode(ask, add_special_tokens=False) + prompt.ids[max(begin - 8, 0) : begin]
        repetition = asked + prompt.ids[begin:end]
        reference(torch.tensor([prompt.ids + repetition]))
        paid, noted = {}, {}
        for layer in range(len(prompt.keys)):
            queries = ATTENTION.queries[layer][:, num_prompt:].double()
            keys = ATTENTION.keys[layer].double()
            sinks = list(range(4)) if begin else []
            seen = keys[:, [*sinks, *range(begin, end), *range(num_prompt, num_prompt + len(repetition))]]
            own = len(repetition)
            for query_head, query in enumerate(queries):
                head = query_head * heads // len(queries)
                logits = prompt.logits(query, seen[head])
                logits[:, -own:] += torch.full((own, own), -torch.inf).triu(1)
                seen_part = slice(len(sinks), len(sinks) + end - begin)
                paid[layer, query_head] = attention(prompt, layer, query_head, logits)[:, seen_part]
            noted[layer] = queries
        yield Part(begin, end, paid, noted)


def repeat_scores(reference, tokenizer, prompt: Prompt, boundary: int) -> Tensor:
    """KVzip `[L, H, T]`: the most that is paid to a token while its part is repeated."""
    num_prompt, heads = len(prompt.ids), prompt.keys[0].shape[0]
    most = torch.zeros(len(prompt.keys), heads, num_prompt, dtype=torch.float64)
    for part in repeated_parts(reference, tokenizer, prompt):
        for (layer, query_head), attention in part.attention.items():
            own = most[layer, query_head * heads // len(part.queries[layer]), part.begin : part.end]
            own.copy_(torch.maximum(own, attention.amax(0)))
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
        blocks: that are kept, counted in pages of a head.
        most: that the budget allows, likewise.
        parts: pages that a head has of one of the scheduler's blocks.
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
    parts: int


@pytest.fixture(
    params=[
        *(("random", name) for name in CASES),
        *(("smollm2", name) for name in REAL),
        *((hybrid, name) for hybrid in HYBRIDS for name in OF_HYBRIDS),
        *(("mostly-full", name) for name in OF_GROUPS),
        *(("gemma2", name) for name in OF_CAPPED),
        *(("gemma4", name) for name in ("snapkv", "kv_compress", "h2o, adaptive", "criticalkv, global")),
        *(("llama4", name) for name in OF_CHUNKED),
        *OF_STATEFUL,
    ],
    ids="-".join,
    scope="module",
)
def case(request, engines, models, long_ids, tokenizer):
    """One case, run: its model, prompt, compaction and output, and what is expected of it."""
    model = models[request.param[0]]
    method, allocation, budget, num_tokens, options = CASES[request.param[1]]
    prompt = model.prompt(long_ids(num_tokens, seed=7))
    engine = engines(model.path, "snapkv:budget=0.25", **STATEFUL.get(request.param[0], {}))
    engine.forget_prefixes()
    name = engine.add(prompt.ids, sampling(NUM_TOKENS, options, logprobs=5))
    engine.finish()
    size = engine.manager.block_size
    boundary, parts = (num_tokens - WINDOW) // size * size, 1
    if request.param[0] in STATEFUL:
        assert size == 3 * BLOCK_SIZE
        parts = 3
    most = blocks = math.ceil(Fraction(str(budget)) * (boundary // size)) * parts
    scores = scores_of(method, prompt, boundary, model.reference, tokenizer)
    compaction = engine.compaction_of(name)
    threshold = KVCompressionConfig.parse(options).threshold
    if method == "foresight":
        kept = most * BLOCK_SIZE if threshold is None else min(most * BLOCK_SIZE, boundary // 4)
        scores = scores.clone()
        assert (recent := (kept - 128) // 8) > 0
        scores[:, :, -recent:] = 1e300
        scores[:, :, :SINKS] = torch.inf
    if threshold is not None:
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
        parts,
    )


def test_page_counts_are_those_of_the_allocation(case):
    scores, allocation, blocks, compaction = case.scores, case.allocation, case.blocks, case.compaction
    layers, heads, num_tokens = scores.shape
    groups = 1 + len(compaction.job.other_sources)
    assert len(compaction.job.destination) * case.parts == case.most * groups
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
            gone, came = (score[others].sort().values for others in (missing, surplus))
            # The same token scores the same wherever it is, in a first layer and by `foresight`.
            exchanged += int((~torch.isclose(gone, came, rtol=1e-12, atol=0)).sum())
            total += len(kept)
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
        *((hybrid, form) for hybrid in (*HYBRIDS, "mostly-full") for form in (ENCODED[3], ENCODED[6])),
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


# ---------------------------------------------------------------------- Attention Matching, solved in float64

REFERENCES = 256  # queries of each KV head, of both its query heads, beside the kept tokens' own
REPEATED = f"attention_matching+k8v4:budget=0.1,waits=true,chunk={CHUNK},references={REFERENCES}"
MATCHED = {  # model and options, in the bytes of a tenth
    "repeated": ("random", REPEATED),
    "the prompt's own": ("random", REPEATED.replace(f"chunk={CHUNK}", "queries=prompt")),
    "pursued": ("random", REPEATED + ",keys=omp"),
    "sinks": ("gpt-oss", REPEATED),
    "windows": ("gemma3", REPEATED),
    "soft cap": ("gemma2", REPEATED),
}
CODED = 1e-3  # relative: the engine takes any query that pays as much as the best one but for this


@torch.inference_mode()
def own_attention(prompt: Prompt) -> Part:
    """What a prompt's own queries pay to it, as one part."""
    paid, num_prompt = {}, len(prompt.ids)
    future = torch.ones(num_prompt, num_prompt, dtype=torch.bool).triu(1)
    for layer, keys in prompt.keys.items():
        for query_head, query in enumerate(prompt.queries[layer]):
            head = query_head * len(keys) // len(prompt.queries[layer])
            logits = prompt.logits(query.double(), keys[head].double())
            masked = logits.masked_fill(future, -torch.inf)
            paid[layer, query_head] = attention(prompt, layer, query_head, masked)
    queries = {layer: own.double() for layer, own in prompt.queries.items()}
    return Part(0, num_prompt, paid, queries)


def squared_scores(parts: list[Part], prompt: Prompt, boundary: int) -> Tensor:
    """`[L, H, T]`: the sum of A² over all queries and their group, each token's own part alone."""
    heads = prompt.keys[0].shape[0]
    total = torch.zeros(len(prompt.keys), heads, len(prompt.ids), dtype=torch.float64)
    for part in parts:
        for (layer, query_head), attention in part.attention.items():
            head = query_head * heads // len(part.queries[layer])
            total[layer, head, part.begin : part.end] += (attention**2).sum(0)
    total[..., :SINKS] = torch.inf
    return total[..., :boundary]


def matched_in_page(size: int) -> int:
    """Tokens of a float32 page in records of 32: keys of 8 bits, values of 4, and what belongs to them."""
    record = 32 * size * 8 // 8 + 32 * size * 4 // 8  # codes
    record += (
        2 * 2 * size + 2 * 32
    )  # of each key channel scale and zero, of each value a norm, in half precision
    record += 4 * 32  # biases
    return 2 * BLOCK_SIZE * size * 4 // record * 32


def kept_of_pages(scores: Tensor, num_pages: int, in_page: int) -> tuple[list[list[int]], float, float]:
    """Tokens that each head keeps where pages of so many tokens compete; the dearest page that went and the
    cheapest that stayed."""
    layers, heads, num_tokens = scores.shape
    largest = -(-num_tokens // in_page)
    counts = [[largest] * heads for _ in range(layers)]

    def cost(layer, head):  # the best of the tokens that go with a head's next page
        stay = (counts[layer][head] - 1) * in_page
        return float(scores[layer, head].sort(descending=True).values[stay])

    cells = [(layer, head) for layer in range(layers) for head in range(heads)]
    dearest = 0.0
    for _ in range(layers * heads * largest - num_pages):
        able = [cell for cell in cells if counts[cell[0]][cell[1]] > 1]
        layer, head = min(able, key=lambda cell: cost(*cell))
        dearest = max(dearest, cost(layer, head))
        counts[layer][head] -= 1
    cheapest = min(cost(*cell) for cell in cells if counts[cell[0]][cell[1]] > 1)
    return [[min(num_tokens, pages * in_page) for pages in own] for own in counts], dearest, cheapest


@dataclass(frozen=True)
class Solved:
    """What one head is to have.

    Attributes:
        bias: `[t]`, of what it keeps, ascending.
        values: `[t, D]`.
        softmax: `[n, T]` of the reference queries over all tokens below the boundary.
        plain: how far the kept tokens alone are off in mass, root mean square.
    """

    bias: Tensor
    values: Tensor
    softmax: Tensor
    plain: float


def sampled(num_positions: int, group: int) -> range:
    """The positions whose queries are fitted to: as many as there are references, half of them at least."""
    stride = 1
    while -(-num_positions // stride) > REFERENCES // group:
        stride *= 2
    return range(0, num_positions, stride)


@torch.inference_mode()
def solve(
    parts: list[Part], prompt: Prompt, boundary: int, layer: int, head: int, kept: list[int], by, causal: bool
) -> Solved:
    """Least squares of one head.

    Args:
        by: `[T, D]`, of each token the query that the engine says paid it most.
        causal: whether a query sees nothing behind its own position.
    """
    keys, values = (of[layer][head, :boundary].double() for of in (prompt.keys, prompt.values))
    group = len(parts[0].queries[layer]) // len(prompt.keys[layer])
    members = range(head * group, head * group + group)
    at = sampled(sum(part.queries[layer].shape[1] for part in parts), group)
    queries = [torch.cat([part.queries[layer][member] for part in parts])[at] for member in members]
    limits = [position + 1 for _ in members for position in at]
    asking = [member for member in members for _ in at]
    for token in kept:
        (part,) = (part for part in parts if part.begin <= token < part.end)
        paid = torch.cat([part.attention[layer, member][:, token - part.begin] for member in members])
        asked = part.queries[layer][members.start : members.stop].flatten(0, 1)
        chosen = int((asked - by[token].double()).norm(dim=1).argmin())
        assert float((asked[chosen] - by[token].double()).norm()) < 1e-3 * float(asked[chosen].norm())
        assert float(paid[chosen]) >= float(paid.max()) * (1 - CODED), (layer, head, token)
        queries.append(asked[chosen][None])
        limits.append(chosen % (len(asked) // group) + 1)
        asking.append(members[chosen // (len(asked) // group)])
    logits = prompt.logits(torch.cat(queries), keys)
    if causal:
        logits.masked_fill_(torch.arange(boundary) >= torch.tensor(limits)[:, None], -torch.inf)
    of_sinks = prompt.sinks.get(layer, torch.full((max(asking) + 1,), -torch.inf))[asking, None].double()
    softmax = torch.cat([logits, of_sinks], 1).softmax(-1)[:, :-1]

    # A query's mass is 1, less its sink's: w of the kept tokens' shares, towards the one factor that suits
    # all best.
    shares, whole = softmax[:, kept].numpy(), softmax.sum(1).numpy()
    even = shares.sum(1)
    factor = np.clip(even @ whole / (even @ even), math.exp(-3), math.exp(3))
    damping = 1e-3 * (shares**2).sum(0).mean()
    matrix = np.concatenate([shares, math.sqrt(damping) * np.eye(len(kept))])
    target = np.concatenate([whole, np.full(len(kept), math.sqrt(damping) * factor)])
    factors = bounded_least_squares(matrix, target, math.exp(-3), math.exp(3))

    bias = torch.from_numpy(np.log(factors))
    weights = torch.cat([logits[:, kept] + bias, of_sinks], 1).softmax(-1)[:, :-1]
    weights = torch.nan_to_num(weights, 0.0).numpy()
    own, outputs = values[kept].numpy(), (softmax @ values).numpy()
    damping = 1e-2 * (weights**2).sum(0).mean()
    system = weights.T @ weights + damping * np.eye(len(kept))
    solved = own + np.linalg.solve(system, weights.T @ (outputs - weights @ own))
    return Solved(bias, torch.from_numpy(solved), softmax, float(np.sqrt(((even - whole) ** 2).mean())))


def bounded_least_squares(matrix, target, lower: float, upper: float):
    """SciPy's, of the triangle that is left of the matrix, which has many more rows."""
    rotation, triangle = np.linalg.qr(matrix)
    result = lsq_linear(triangle, rotation.T @ target, (lower, upper), tol=1e-12, lsmr_tol="auto")
    assert result.success, result.message
    return result.x


@dataclass(frozen=True)
class MatchedCase:
    """What the engine did with one request, and what was to be expected.

    Attributes:
        causal: whether the prompt's own queries are the references.
        pursued: whether tokens are chosen by orthogonal matching pursuit.
        by: per layer `[H, T, D]`, the query that paid a token most, as the engine noted it.
        bias: per layer and head, as its pages have them.
        values: likewise, as they are read.
        scores: `[L, H, T]`.
    """

    reference: PreTrainedModel
    prompt: Prompt
    parts: list[Part]
    scores: Tensor
    causal: bool
    pursued: bool
    compaction: Compaction
    output: RequestOutput
    by: list[Tensor]
    bias: list[list[Tensor]]
    values: list[list[Tensor]]

    @functools.cached_property
    def solved(self) -> list[list[Solved]]:
        return [
            [
                solve(self.parts, self.prompt, 608, layer, head, kept, self.by[layer][head], self.causal)
                for head, kept in enumerate(of_heads)
            ]
            for layer, of_heads in enumerate(self.kept)
        ]

    @functools.cached_property
    def kept(self) -> list[list[list[int]]]:
        return self.compaction.positions()


@dataclass(frozen=True)
class Written:
    """What one head has in its records.

    Attributes:
        content: `[records, bytes]`.
        keys, values: `[t, D]`, as they are read.
        biases: `[t]`.
    """

    content: Tensor
    keys: Tensor
    values: Tensor
    biases: Tensor


def written_of(engine, compaction: Compaction) -> list[Written]:
    """Of every head, layer after layer."""
    table, cache = (
        engine.worker.compression.tables[compaction.job.request_id],
        engine.worker.compactor.cache,
    )
    heads, _ = table.aligned_records(slice(None))
    result = []
    for own in heads:
        content = cache.read_records(own[own >= 0], table.format).clone()
        keys, values = (each.flatten(0, 1) for each in table.format.decode(content, cache.head_size))
        biases = table.format.biases(content, cache.head_size).flatten()
        result.append(Written(content, keys, values, biases))
    return result


@pytest.fixture(params=MATCHED, scope="module")
def matched(request, engines, models, long_ids, tokenizer) -> MatchedCase:
    name, options = MATCHED[request.param]
    model, engine = models[name], engines(models[name].path, "snapkv:budget=0.25")
    prompt, by = model.prompt(long_ids(640, seed=7)), []
    causal = "queries=prompt" in options
    parts = [own_attention(prompt)] if causal else list(repeated_parts(model.reference, tokenizer, prompt))
    worker = engine.worker

    def note(solve, observed):
        Compactor.solve(worker.compactor, solve, observed)
        by[:] = [state.by.clone() for state in observed.states]

    engine.forget_prefixes()
    worker.compactor.solve = note
    name = engine.add(prompt.ids, sampling(NUM_TOKENS, options, logprobs=5))
    compaction = engine.step_until_compacted(name)
    del worker.compactor.solve
    read = [(head.biases, head.values) for head in written_of(engine, compaction)]
    engine.finish()
    heads = len(prompt.keys[0])
    bias, values = (
        [[each[which] for each in read[begin : begin + heads]] for begin in range(0, len(read), heads)]
        for which in (0, 1)
    )
    output, scores = engine.outputs.pop(name), squared_scores(parts, prompt, 608)
    pursued = "keys=omp" in options
    reference = model.reference
    return MatchedCase(
        reference, prompt, parts, scores, causal, pursued, compaction, output, by, bias, values
    )


def test_what_is_matched_are_the_tokens_that_are_attended_to_most(matched):
    scores, compaction = matched.scores, matched.compaction
    assert (compaction.job.num_tokens, compaction.job.boundary, compaction.num_computed) == (640, 608, 640)
    assert len(compaction.job.destination) == 2, "of 19"
    kept, in_page = matched.kept, matched_in_page(32)
    num_heads = scores.shape[0] * scores.shape[1]
    expected, dearest, cheapest = kept_of_pages(scores, 2 * num_heads, in_page)
    assert dearest * (1 + NEAR_TIE) < cheapest, "no two pages cost the same"
    assert [[len(of_head) for of_head in of_layer] for of_layer in kept] == expected
    assert len({num for own in expected for num in own}) >= min(3, num_heads // 2), (
        "heads differ in how much they keep"
    )
    exchanged = total = 0
    for layer, of_heads in enumerate(kept):
        for head, own in enumerate(of_heads):
            assert own == sorted(set(own)) and own[:SINKS] == list(range(SINKS))
            if matched.pursued:
                continue
            score = scores[layer, head]
            best = set(score.sort(descending=True, stable=True).indices[: len(own)].tolist())
            missing, surplus = sorted(best - set(own)), sorted(set(own) - best)
            if missing:
                assert float(score[missing].max()) <= float(score[surplus].min()) * (1 + NEAR_TIE)
            exchanged, total = exchanged + len(missing), total + len(own)
    assert exchanged <= total / 1000


@pytest.mark.parametrize("matched", ["pursued"], indirect=True)
def test_pursued_tokens_add_up_to_more_of_the_mass_than_those_that_are_attended_to_most(matched):
    better = []
    for layer, of_heads in enumerate(matched.kept):
        for head, kept in enumerate(of_heads):
            score, softmax = matched.scores[layer, head], matched.solved[layer][head].softmax
            best = score.sort(descending=True, stable=True).indices[: len(kept)].tolist()
            sampled = softmax[: len(softmax) - len(kept)].numpy()  # not the tokens' own queries
            left = [nnls(sampled[:, own], sampled.sum(1))[1] for own in (kept, best)]
            better.append(left[0] / left[1])
    print("of what the best leave, the pursued leave", better)
    assert sum(better) / len(better) < 0.9


def test_biases_match_the_mass_of_attention_as_least_squares_in_float64_do(matched):
    told, apart = 0, []
    for layer, of_heads in enumerate(matched.solved):
        for head, solved in enumerate(of_heads):
            kept, bias = matched.kept[layer][head], matched.bias[layer][head].double()
            assert float(bias.abs().max()) <= 3 + 1e-5
            whole = solved.softmax.sum(1)
            errors = [
                float(((solved.softmax[:, kept] @ own.exp() - whole) ** 2).mean().sqrt())
                for own in (bias, solved.bias)
            ]
            assert errors[0] == pytest.approx(errors[1], rel=2e-2, abs=1e-4), (layer, head)
            told += solved.plain > 1.5 * errors[1]
            apart.append(float((bias - solved.bias).abs().mean()))
    assert told >= len(apart) / 3, "there is something to match"
    print("biases are off by", apart)
    assert max(apart) < 1e-2


def test_values_match_the_outputs_of_attention_as_least_squares_in_float64_do(matched):
    written = KVCompressionConfig.parse("kivi+k8v4").record_format
    other = total = moved = 0
    for layer, of_heads in enumerate(matched.solved):
        for head, solved in enumerate(of_heads):
            kept, read = matched.kept[layer][head], matched.values[layer][head]
            keys = matched.prompt.keys[layer][head, kept].view(-1, 32, 32)
            expected = written.decode(written.encode(keys, solved.values.float().view(-1, 32, 32)), 32)[1]
            expected = expected.flatten(0, 1)
            size = float(expected.abs().mean())
            other += int(((read - expected).abs() > 1e-2 * size).sum())
            moved += int(((matched.prompt.values[layer][head, kept] - solved.values).abs() > size / 4).sum())
            total += read.numel()
    print(f"of {total} numbers {other} are written otherwise and {moved} are not the token's own")
    assert other <= total / 50 and moved > total / 20  # biases of what hardly weighs are solved for roughly


def test_logits_over_what_is_matched_are_those_of_attention_with_solved_biases_and_values(matched):
    reference, written = matched.reference, KVCompressionConfig.parse("kivi+k8v4").record_format
    answer, shape = tokens(matched.output), matched.scores.shape
    bias, plain = torch.full(shape, -torch.inf), torch.full(shape, -torch.inf)
    cache, own = copy.deepcopy(matched.prompt.cache), copy.deepcopy(matched.prompt.cache)
    number = full_layers(reference.config)
    for layer, of_heads in enumerate(matched.kept):
        for head, kept in enumerate(of_heads):
            solved = matched.solved[layer][head]
            bias[layer, head, kept], plain[layer, head, kept] = solved.bias.float(), 0.0
            keys, values = (of[layer][head, kept] for of in (matched.prompt.keys, matched.prompt.values))
            for values, to in ((solved.values.float(), cache), (values, own)):  # noqa: B020, PLW2901
                records = written.encode(keys.view(-1, 32, 32), values.view(-1, 32, 32))
                read = [each.flatten(0, 1) for each in written.decode(records, 32)]
                of_layer = to.layers[number[layer]]
                of_layer.keys[0, head, kept], of_layer.values[0, head, kept] = read
    expected, without_biases, without_values, without_both = (
        continue_with(reference, replace(matched.prompt, cache=values), answer, biases)
        for values, biases in ((cache, bias), (cache, plain), (own, bias), (own, plain))
    )

    def off(other: Tensor) -> float:
        return max(
            abs(logprob.logprob - float(other[index, token]))
            for index, top in enumerate(matched.output.outputs[0].logprobs)
            for token, logprob in top.items()
        )

    print("off by", off(expected), off(without_biases), off(without_values), off(without_both))
    assert len(matched.output.outputs[0].logprobs) == NUM_TOKENS
    # Solved in float32, and what lies between two codes may be written either way.
    assert off(expected) < 5e-2
    for other in (without_biases, without_values, without_both):
        assert off(other) > 0.5


AGAIN = 72  # tokens of output
RECALLED = 64  # sampled positions of the repetition that are kept


@dataclass(frozen=True)
class AgainCase:
    """A prompt that was matched, and compacted again with its output, and what is known of both by then.

    Attributes:
        compactions: the two.
        written: after each, layer and head after each other.
        answer: tokens.
        keys, values: per layer `[H, tokens, D]` at the second one: what was written of the prompt, all below
            the first boundary that a head dropped, and the raw tail.
        bias: `[L, H, tokens]`, -inf for what a head dropped.
        queries: per layer `[Hq, tokens of output, D]`.
        recalled: per layer `[Hq, m, D]`, of the repetition.
        cache: of transformers, likewise.
        logits: by token of the output until then.
    """

    prompt: Prompt
    compactions: list[Compaction]
    written: list[list[Written]]
    output: RequestOutput
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    bias: Tensor
    queries: dict[int, Tensor]
    recalled: dict[int, Tensor]
    cache: DynamicCache
    logits: Tensor

    def heads(self) -> Iterator[tuple[int, int, list[int], list[int]]]:
        """Layer, head, and the positions that it kept, first and again."""
        kept = zip(*(compaction.positions() for compaction in self.compactions), strict=True)
        for layer, of_heads in enumerate(kept):
            for head, (first, again) in enumerate(zip(*of_heads, strict=True)):
                yield layer, head, first, again

    def scores(
        self, layer: int, head: int, columns: list[int], biased: bool = True, recalls: bool = True
    ) -> Tensor:
        """What the last queries pay to a head's tokens, squared, pooled and summed, and recalled ones, not
        pooled, `[columns]`."""
        end = self.keys[layer].shape[1]
        window = range(end - WINDOW, end)
        seen = [*columns, *range(columns[-1] + 1, end)]
        group = len(self.queries[layer]) // len(self.keys[layer])
        total = torch.zeros(len(columns), dtype=torch.float64)
        for query_head in range(head * group, head * group + group):
            queries = self.queries[layer][query_head, -WINDOW:].double()
            logits = self.prompt.logits(queries, self.keys[layer][head, seen].double())
            if biased:
                logits += self.bias[layer, head, seen].double()
            for row, position in enumerate(window):
                logits[row, [place for place, own in enumerate(seen) if own > position]] = -torch.inf
            paid = (logits.softmax(-1) ** 2).sum(0)[: len(seen) - WINDOW]
            around = torch.nn.functional.pad(paid, (3, 3), value=-1.0).unfold(0, 7, 1)
            total += around.amax(-1)[: len(columns)]
            if recalls:
                keys = self.keys[layer][head, columns].double()
                logits = self.prompt.logits(self.recalled[layer][query_head], keys)
                if biased:
                    logits += self.bias[layer, head, columns].double()
                total += (logits.softmax(-1) ** 2).sum(0)
        total[:SINKS] = torch.inf
        return total


@pytest.fixture(scope="module")
@torch.inference_mode()
def again(engines, models, long_ids, tokenizer) -> AgainCase:
    model, engine = models["random"], engines(models["random"].path, "snapkv:budget=0.25")
    prompt = model.prompt(long_ids(640, seed=7))
    parts, recalled = list(repeated_parts(model.reference, tokenizer, prompt)), {}
    for layer in prompt.keys:
        asked = torch.cat([part.queries[layer] for part in parts], 1)
        at = sampled(asked.shape[1], len(asked) // len(prompt.keys[layer]))
        recalled[layer] = asked[:, at][:, :: -(-len(at) // RECALLED)]
    options = REPEATED.replace("0.1", "0.09") + f",recompact_every={AGAIN}"
    engine.forget_prefixes()
    name = engine.add(prompt.ids, sampling(AGAIN + NUM_TOKENS, options, logprobs=5))
    compactions = [engine.step_until_compacted(name)]
    written = [written_of(engine, compactions[0])]
    while len(own := [c for c in engine.compactions if c.request == name]) == 1:
        engine.step()
    compactions.append(own[1])
    written.append(written_of(engine, own[1]))
    engine.finish()
    output = engine.outputs.pop(name)

    cache, heads = copy.deepcopy(prompt.cache), len(prompt.keys[0])
    bias = torch.full((len(prompt.keys), heads, 640 + AGAIN), -torch.inf)
    bias[..., 608:] = 0.0
    for index, own in enumerate(written[0]):
        layer, head = divmod(index, heads)
        kept = compactions[0].positions()[layer][head]
        bias[layer, head, kept] = own.biases
        cache.layers[layer].keys[0, head, kept], cache.layers[layer].values[0, head, kept] = (
            own.keys,
            own.values,
        )
    ATTENTION.bias = bias[..., :640]
    try:
        out = model.reference(torch.tensor([tokens(output)[:AGAIN]]), past_key_values=cache, use_cache=True)
    finally:
        ATTENTION.bias = None
    logits = torch.cat([prompt.first_logits[None], out.logits[0]])
    now = (dict(each) for each in (ATTENTION.keys, ATTENTION.values))
    queries = dict(ATTENTION.queries)
    return AgainCase(prompt, compactions, written, output, *now, bias, queries, recalled, cache, logits)


def test_a_matched_prompt_is_compacted_again_by_what_is_paid_to_it_with_its_biases(again):
    jobs = [compaction.job for compaction in again.compactions]
    assert [(job.num_tokens, job.boundary, job.solved) for job in jobs] == [
        (640, 608, True),
        (640 + AGAIN, 672, False),
    ]
    assert len(jobs[0].destination) == len(jobs[1].destination) == 2, "of 19, and of 21"
    in_page, unbiased, unrecalled, pages = matched_in_page(32), 0, 0, 0
    dearest, cheapest = 0.0, math.inf
    for layer, head, first, kept in again.heads():
        columns = [*first, *range(608, 672)]
        best: list[list[int]] = []
        for biased, recalls in ((True, True), (False, True), (True, False)):
            scores = again.scores(layer, head, columns, biased, recalls)
            records = [(float(own.mean()), index) for index, own in enumerate(scores[: len(first)].split(32))]
            order = scores[len(first) :].sort(descending=True, stable=True)
            raw = [float(own.mean()) for own in order.values.split(32)]
            units = sorted(
                [*records, *((mean, len(records) + i) for i, mean in enumerate(raw))], key=lambda u: -u[0]
            )
            chosen = sorted(number for _, number in units[: len(kept) // 32])
            stay = [first[32 * n : 32 * n + 32] for n in chosen if n < len(records)]
            new = order.indices[: 32 * sum(n >= len(records) for n in chosen)] + 608
            best.append(sorted([*(token for own in stay for token in own), *new.tolist()]))
            if biased and recalls:  # what pages hold
                alike = [mean for mean, n in records for _ in range(32)] + scores[len(first) :].tolist()
                ranked, count = sorted(alike, reverse=True), -(-len(kept) // in_page)
                pages += count
                if len(kept) < len(columns):
                    dearest = max(dearest, ranked[count * in_page])
                if count > 1:
                    cheapest = min(cheapest, ranked[(count - 1) * in_page])
        assert sorted(kept) == best[0], (layer, head)
        unbiased += best[1] != best[0]
        unrecalled += best[2] != best[0]
    assert pages == 2 * 12 and dearest <= cheapest * (1 + NEAR_TIE)
    assert unbiased >= 3 and unrecalled >= 3, "others would be kept without biases, and by the window alone"


def test_what_was_matched_stays_byte_for_byte_and_what_is_new_has_no_bias(again):
    stayed = gone = new = 0
    for index, (_, _, first, kept) in enumerate(again.heads()):
        before, after = (of_time[index] for of_time in again.written)
        old = [own for own in kept if own < 608]
        stay = {tuple(first[begin : begin + 32]): begin // 32 for begin in range(0, len(first), 32)}
        for number, begin in enumerate(range(0, len(kept), 32)):
            record = stay.get(tuple(kept[begin : begin + 32]))
            if record is not None:
                assert torch.equal(after.content[number], before.content[record])
                stayed += 1
            else:
                assert min(kept[begin : begin + 32]) >= 608 and not after.biases[begin : begin + 32].any()
                new += 1
        gone += len(stay) - len(old) // 32
    assert stayed and gone and new, (stayed, gone, new)


@torch.inference_mode()
def test_logits_after_that_are_those_of_attention_over_what_stayed_and_what_is_new(again, models):
    written = KVCompressionConfig.parse("kivi+k8v4").record_format
    bias, unbiased = again.bias.clone(), again.bias.clone()
    cache = copy.deepcopy(again.cache)
    for layer, head, first, kept in again.heads():
        gone = sorted({*first, *range(608, 672)} - {*kept})
        new = [own for own in kept if own >= 608]
        bias[layer, head, gone] = -torch.inf
        keys, values = (of[layer][head, new].view(-1, 32, 32) for of in (again.keys, again.values))
        read = [each.flatten(0, 1) for each in written.decode(written.encode(keys, values), 32)]
        of_layer = cache.layers[layer]
        of_layer.keys[0, head, new], of_layer.values[0, head, new] = read
    answer, logits = tokens(again.output), []
    for own, of in ((bias, cache), (unbiased, again.cache)):
        ATTENTION.bias = own
        try:
            out = models["random"].reference(
                torch.tensor([answer[AGAIN:-1]]), past_key_values=copy.deepcopy(of), use_cache=True
            )
        finally:
            ATTENTION.bias = None
        logits.append(torch.cat([again.logits, out.logits[0]]).log_softmax(-1))

    def off(other: Tensor) -> float:
        return max(
            abs(logprob.logprob - float(other[index, token]))
            for index, top in enumerate(again.output.outputs[0].logprobs)
            for token, logprob in top.items()
        )

    print("off by", off(logits[0]), "where nothing is dropped", off(logits[1]))
    assert off(logits[0]) < 2e-2 and off(logits[1]) > 0.2


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
