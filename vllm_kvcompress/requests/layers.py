"""What policies may want to know of the model around an attention layer."""

import functools

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.utils import extract_layer_index

from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.policies.rotary import Rotary
from vllm_kvcompress.requests.observer import LayerAttention


def layer_attention(model: torch.nn.Module, layer: Attention) -> LayerAttention:
    """A layer's constants, with its position embedding and output projection where the model has them."""
    parent = model.get_submodule(layer.layer_name.rpartition(".")[0])
    embedding = getattr(parent, "rotary_emb", None)
    table = getattr(embedding, "cos_sin_cache", None)
    rotary = Rotary(table, embedding.is_neox_style) if isinstance(table, Tensor) and table.ndim == 2 else None
    return LayerAttention(
        scale=layer.impl.scale,
        logits_soft_cap=layer.impl.logits_soft_cap,
        rotary=rotary,
        output_projection=functools.partial(_output_projection, parent, layer),
        index=extract_layer_index(layer.layer_name),
    )


def _output_projection(parent: torch.nn.Module, layer: Attention) -> Tensor:
    """The projection `[H, G, D, hidden]` behind a layer, this rank's heads, in float32.

    Asked of the layer itself, because weights may be quantized or repacked for the CPU.
    """
    projections = [child for child in parent.children() if isinstance(child, RowParallelLinear)]
    if len(projections) != 1:
        raise KVCompressionError("kv-compression: no single output projection follows this model's attention")
    (projection,) = projections
    size, heads = layer.impl.head_size, layer.impl.num_kv_heads
    dtype, device = projection.params_dtype, layer.kv_cache.device
    identity = torch.eye(layer.impl.num_heads * size, dtype=dtype, device=device)
    columns = projection.quant_method.apply(projection, identity)
    return columns.float().unflatten(0, (heads, -1, size))
