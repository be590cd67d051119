"""What policies may want to know of the model around its attention layers, learned by trying it.

Models build and wrap their layers in many ways (quantized linears, adapters, rotary embeddings of the layer,
of the model or of a part of the channels, none at all), so nothing is assumed from names. Once, after all
wrapping, the model computes a few tokens at many positions, and what its layers do to them decides.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models.utils import extract_layer_index

from vllm_kvcompress.log import logger
from vllm_kvcompress.policies.rotary import Rotary
from vllm_kvcompress.requests.observer import LayerAttention

PROBED_TOKENS = 3
PROBED_POSITIONS = 16
LAYER_TYPES = ("full_attention", "sliding_attention")  # whose rotary embeddings may differ
DRAFTS_LACK = dict.fromkeys(  # as `ProbedLayers.lacks` has it
    ("needs_rotary", "needs_output_projection"), "it has a draft model, whose layers are not tried for it"
)
TOLERANCE = 0.05  # of bfloat16 rounding less than a tenth; a wrong pairing of channels is off by more than 1


@dataclass(frozen=True)
class ProbedLayers:
    """What was found of a model's layers.

    Attributes:
        layers: in the order in which they were given.
        lacks: what some layer has not in a form that policies can use: the policy's attribute that asks for
            it, and why not.
    """

    layers: list[LayerAttention]
    lacks: dict[str, str]


def probe_layers(
    model: torch.nn.Module,
    layers: Sequence[Attention],
    all_layers: Sequence[Attention],
    vllm_config: VllmConfig,
    without_adapters: Callable[[int], AbstractContextManager],
) -> ProbedLayers:
    """Learn every layer's constants, position embedding and output projection, once.

    A layer's queries at different positions differ by its rotation alone if the tokens are the same, so the
    right one makes them equal again; it is searched among all rotary embeddings of the model.

    Args:
        model: the whole of it, or this rank's part.
        layers: in the order of the cache's.
        all_layers: these and others that attend.
        vllm_config: whose `max_model_len` bounds the positions.
        without_adapters: prepares the model for a batch of so many tokens that use no adapter.
    """
    lacks: dict[str, str] = {}
    rotaries: list[Rotary | None] = [None] * len(layers)
    try:
        positions, queries = _queries(model, all_layers, vllm_config, without_adapters)
        candidates = _rotary_candidates(model, vllm_config)
        rotaries = [_rotary(candidates, positions, queries[layer.layer_name]) for layer in layers]
        without = [layer.layer_name for layer, rotary in zip(layers, rotaries, strict=True) if rotary is None]
        if without:
            lacks["needs_rotary"] = (
                f"the queries of {without[0]} do not follow a one-dimensional rotary embedding"
            )
    except Exception as error:  # a model may refuse such tokens in any way; then those methods are refused
        logger.debug("kv-compression: the model could not be probed", exc_info=True)
        lacks["needs_rotary"] = f"its position embedding could not be probed ({_one_line(error)})"
    projections = []
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    for layer in layers:
        try:
            projections.append(_projection(parents[id(layer)], layer))
        except Exception as error:
            projections.append(None)
            lacks["needs_output_projection"] = (
                f"the output projection of {layer.layer_name} cannot be used ({_one_line(error)})"
            )
    first_head = _first_head(vllm_config.model_config.get_total_num_kv_heads())
    found = [
        LayerAttention(
            scale=layer.impl.scale,
            logits_soft_cap=layer.impl.logits_soft_cap,
            sinks=_sinks(layer),
            rotary=rotary,
            output_projection=None if projection is None else functools.partial(_columns, projection, layer),
            index=extract_layer_index(layer.layer_name),
            first_head=first_head,
        )
        for layer, rotary, projection in zip(layers, rotaries, projections, strict=True)
    ]
    return ProbedLayers(found, lacks)


def draft_layers(layers: Sequence[Attention], vllm_config: VllmConfig) -> ProbedLayers:
    """A draft model's layers, of which the constants are known alone: it is not tried as the model is.

    Args:
        layers: in the order of the cache's.
        vllm_config: the engine's.
    """
    model = vllm_config.model_config
    first_head, behind = _first_head(model.get_total_num_kv_heads()), model.get_total_num_hidden_layers()
    found = [
        LayerAttention(
            scale=layer.impl.scale,
            logits_soft_cap=layer.impl.logits_soft_cap,
            sinks=_sinks(layer),
            index=behind + number,
            first_head=first_head,
        )
        for number, layer in enumerate(layers)
    ]
    return ProbedLayers(found, dict(DRAFTS_LACK) if found else {})


def _sinks(layer: Attention) -> Tensor | None:
    """A layer's sinks `[H, G]`, this rank's, if it has any."""
    sinks = layer.impl.sinks
    return None if sinks is None else sinks.detach().float().view(layer.impl.num_kv_heads, -1)


def _first_head(total: int) -> int:
    """Which KV head of all is this rank's first: each rank has its share, or several have the same one."""
    group = get_tp_group()
    return group.rank_in_group * total // group.world_size


def _one_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


# ---------------------------------------------------------------------- position embedding


@torch.inference_mode()
def _queries(
    model: torch.nn.Module,
    layers: Sequence[Attention],
    vllm_config: VllmConfig,
    without_adapters: Callable[[int], AbstractContextManager],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Queries `[P, tokens, Hq, D]` of a few tokens at P positions, per layer, without any attention."""
    config = vllm_config.model_config
    if config.uses_mrope:
        raise ValueError("it has more than one dimension")
    device, last = layers[0].kv_cache.device, config.max_model_len - 1
    spread = {round(last ** (step / (PROBED_POSITIONS - 2))) for step in range(PROBED_POSITIONS - 1)}
    positions = torch.tensor(sorted({0, *spread}), device=device)
    vocabulary = config.get_vocab_size()
    tokens = torch.tensor(
        [vocabulary * (i + 1) // (PROBED_TOKENS + 1) for i in range(PROBED_TOKENS)], device=device
    )
    input_ids, at = tokens.repeat(len(positions)), positions.repeat_interleave(len(tokens))
    intermediate = None
    if not get_pp_group().is_first_rank:
        intermediate = model.make_empty_intermediate_tensors(len(input_ids), config.dtype, device)
        for tensor in intermediate.tensors.values():
            row = torch.linspace(-1, 1, tensor.shape[-1], device=device) + torch.rand(
                tensor.shape[-1], device=device, generator=torch.Generator(device).manual_seed(0)
            )
            tensor.copy_(row.to(tensor.dtype).expand_as(tensor))
    states = [
        layer
        for layer in vllm_config.compilation_config.static_forward_context.values()
        if isinstance(layer, MambaBase)
    ]
    with (
        _recorded(layers) as queries,
        _silent(states),
        without_adapters(len(input_ids)),
        set_forward_context(None, vllm_config, num_tokens=len(input_ids), skip_compiled=True),
    ):
        model(input_ids=input_ids, positions=at, intermediate_tensors=intermediate, inputs_embeds=None)
    return positions, {
        name: query[: len(input_ids)].unflatten(0, (len(positions), len(tokens)))
        for name, query in queries.items()
    }


@contextmanager
def _recorded(layers: Sequence[Attention]) -> Iterator[dict[str, Tensor]]:
    """Note the layers' queries meanwhile; their output is 0, so that it does not hang on the position."""
    queries: dict[str, Tensor] = {}

    def forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
        queries[layer.layer_name] = query.to(torch.float32, copy=True)
        return output.zero_()

    quantizers = [layer.query_quant for layer in layers]
    for layer in layers:
        layer.impl.forward = forward
        layer.query_quant = None  # rounded, they may not show how they turn
    try:
        yield queries
    finally:
        for layer, quantizer in zip(layers, quantizers, strict=True):
            del layer.impl.forward
            layer.query_quant = quantizer


@contextmanager
def _silent(layers: Sequence[MambaBase]) -> Iterator[None]:
    """Layers with states put out 0 meanwhile: some would leave their output as it happens to be."""

    def silent(forward: Callable) -> Callable:
        signature = inspect.signature(forward)

        def nothing(*args, **kwargs) -> Tensor:
            given = signature.bind(*args, **kwargs).arguments
            if (output := given.get("output")) is not None:
                output.zero_()
            return torch.zeros_like(given["hidden_states"])

        return nothing

    for layer in layers:
        layer.forward = silent(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _rotary_candidates(model: torch.nn.Module, vllm_config: VllmConfig) -> list[Rotary]:
    """Every rotation that a layer of the model may use, of leading channels, none first."""
    longest = vllm_config.model_config.max_model_len
    found = [Rotary.identity(longest, next(model.parameters()).device)]
    for module in model.modules():
        for table in _rotary_tables(module, longest):
            if not any(table.data_ptr() == other.cos_sin.data_ptr() for other in found):
                neox = getattr(module, "is_neox_style", True)
                found += [Rotary(table, neox), Rotary(table, not neox)]
    return found


def _rotary_tables(module: torch.nn.Module, longest: int) -> Iterator[Tensor]:
    """Cosines and sines `[positions, R]` of a module, if it is a rotary embedding: of each type of layers."""
    table = getattr(module, "cos_sin_cache", None)
    if (both := getattr(module, "long_short_cos_sin_cache", None)) is not None:  # Phi-3's two tables in one
        short = module.original_max_position_embeddings
        table = both[short:] if module.use_long_rope else both[:short]
    tables = [table]
    if table is None:
        tables = [_transformers_table(module, longest, kind) for kind in ("", *LAYER_TYPES)]
    for each in tables:
        if isinstance(each, Tensor) and each.ndim == 2 and len(each) >= longest and each.shape[1] % 2 == 0:
            yield each


def _transformers_table(module: torch.nn.Module, longest: int, layer_type: str) -> Tensor | None:
    """That of a module of transformers for one type of layers, `""` where all layers have the same."""
    inv_freq = getattr(module, f"{layer_type}_inv_freq".strip("_"), None)
    if not isinstance(inv_freq, Tensor):
        return None
    positions = torch.arange(longest, device=inv_freq.device)[None]
    try:
        cos, sin = module(
            torch.empty(0, device=positions.device), positions, *([layer_type] if layer_type else [])
        )
    except Exception:  # something else has frequencies, too
        return None
    half = cos.shape[-1] // 2  # every angle twice, one after the other or all after all
    step = slice(None, half) if torch.equal(cos[..., :half], cos[..., half:]) else slice(None, None, 2)
    return torch.cat([cos[0, :, step], sin[0, :, step]], -1)


def _rotary(candidates: Sequence[Rotary], positions: Tensor, queries: Tensor) -> Rotary | None:
    """The rotation that explains a layer's queries `[P, tokens, Hq, D]`, if one does."""
    size, best, least = queries.shape[-1], None, TOLERANCE
    for candidate in candidates:
        rotated = candidate.cos_sin.shape[1]
        for first in {0, size - rotated} if rotated <= size else ():
            rotary = Rotary(candidate.cos_sin, candidate.is_neox, first)
            error = _deviation(rotary.at(positions), queries)
            if error < least:  # not of queries without length, which tell nothing
                best, least = rotary, error
    return best


def _deviation(rotary: Rotary, queries: Tensor) -> float:
    """How much the same queries `[P, ...]` still differ by position, relative to them: the worst channel."""
    undone = rotary.undo(queries, 0)
    rest = tuple(range(undone.ndim - 1))
    error = (undone - undone.mean(0)).square().mean(rest)
    length = undone.square().mean(rest)
    left, right = rotary.pairs()
    length[left] = length[right] = torch.maximum(length[left], length[right])
    length.clamp_(min=float(length.mean()) / 1000)  # channels of next to no length say nothing
    return float((error / length).max().sqrt())


# ---------------------------------------------------------------------- output projection


def _projection(parent: torch.nn.Module, layer: Attention) -> RowParallelLinear:
    """The projection behind a layer, tried on a few vectors.

    Adapters are looked through: theirs is not counted, as it differs from request to request.

    Raises:
        ValueError: there is none that is linear in what the layer puts out.
    """
    children = [getattr(child, "base_layer", child) for child in parent.children()]
    projections = [child for child in children if isinstance(child, RowParallelLinear)]
    if len(projections) != 1:
        raise ValueError(f"{len(projections)} projections may follow")
    (projection,) = projections
    expected = layer.impl.num_heads * layer.impl.head_size
    given = projection.input_size_per_partition
    if given != expected:  # asked of it all the same, kernels would read what is not there
        raise ValueError(f"it takes {given} channels and the layer puts out {expected}")
    generator = torch.Generator("cpu").manual_seed(0)
    vectors = torch.randn(3, expected, generator=generator)
    vectors[2] = vectors[0] + vectors[1]
    one, other, both = _project(projection, layer, vectors)
    (nothing,) = _project(projection, layer, torch.zeros(1, expected))
    length = both.norm()
    if not bool(length.isfinite()) or bool(nothing.any()) or bool((one + other - both).norm() > length / 10):
        raise ValueError("it is not linear")
    return projection


def _project(projection: RowParallelLinear, layer: Attention, vectors: Tensor) -> Tensor:
    """Asked of the projection itself, because weights may be quantized or repacked; without bias, float32."""
    vectors = vectors.to(device=layer.kv_cache.device, dtype=projection.params_dtype)
    return projection.quant_method.apply(projection, vectors).float()


def _columns(projection: RowParallelLinear, layer: Attention) -> Tensor:
    """The projection `[H, G, D, hidden]` behind a layer, this rank's heads, in float32."""
    identity = torch.eye(layer.impl.num_heads * layer.impl.head_size)
    return _project(projection, layer, identity).unflatten(
        0, (layer.impl.num_kv_heads, -1, layer.impl.head_size)
    )
