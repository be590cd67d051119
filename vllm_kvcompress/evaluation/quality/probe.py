"""A Hugging Face model whose KV heads can be made to leave out tokens of a prompt, each head its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.policies import LayerObservation, Policy

ATTENTION = "kvcompress_probe"  # its name among the attention functions of transformers
OTHER_ATTENTION = {"s_aux": "sinks", "position_bias": "a position bias"}


@dataclass(frozen=True)
class LayerContext:
    """What one layer computed of a prompt of C tokens.

    Attributes:
        keys: `[H, C, D]` float32, after RoPE.
        values: `[H, C, D]`.
        queries: `[Hq, C, D]`, after RoPE.
        scale: the layer's own softmax scale.
        soft_cap: logits are `cap·tanh(logits / cap)`; 0 for none.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    scale: float
    soft_cap: float


class Probe:
    """A model and the one prompt that it holds.

    Where some layers slide a window that the model's longest text outgrows and others do not, the others are
    measured.

    Attributes:
        context: of each layer of the model, of the prompt held.
        num_layers: L, that are measured.
        num_kv_heads: H, of these.
    """

    def __init__(self, model: Any) -> None:
        """Take over a causal language model of transformers, in float32 on the CPU.

        Raises:
            KVCompressionError: it does not compute its attention through transformers' attention interface,
                or the layers that are measured differ in their KV heads.
        """
        self._model = model
        self.context: dict[int, LayerContext] = {}
        self._windows: dict[int, int | None] = {}  # of the layers
        self._kept: Tensor | None = None
        try:
            self.read([0, 1])
        except KVCompressionError:
            raise
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise KVCompressionError(f"cannot measure the heads of {_name(model)}: {reason}") from None
        config = model.config.get_text_config()
        measured = self._measured
        shapes = {self.context[layer].keys.shape for layer in measured}
        unlike = "chunked_attention" in (getattr(config, "layer_types", None) or ())
        unlike |= bool(getattr(config, "num_kv_shared_layers", 0))
        if sorted(self.context) != list(range(config.num_hidden_layers)) or len(shapes) != 1 or unlike:
            raise KVCompressionError(
                f"cannot measure the heads of {_name(model)}: calibration needs softmax attention in each "
                "layer, to all tokens or within a window, through transformers' attention interface, over "
                "keys of its own, with as many KV heads in each layer that attends to all"
            )
        self.num_layers = len(measured)
        self.num_kv_heads = self.context[measured[0]].keys.shape[0]

    @property
    def _measured(self) -> list[int]:
        """The layers whose heads are measured: those that slide no window, if there are such."""
        full = [layer for layer, window in self._windows.items() if window is None]
        return full or list(self._windows)

    @classmethod
    def load(cls, folder: str | Path) -> "Probe":
        """Load a checkpoint.

        Raises:
            KVCompressionError: transformers cannot load it, or as for the class.
        """
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise KVCompressionError(f"cannot load a causal language model from {folder}: {reason}") from None
        return cls(model.eval())

    @torch.no_grad()
    def read(self, tokens: Sequence[int]) -> None:
        """Compute a prompt with the full cache, and hold it from now on."""
        self.context, self._kept = {}, None
        self._forward(torch.tensor([tokens]), logits_to_keep=1)

    @torch.no_grad()
    def continue_with(self, tokens: Sequence[int], kept: Tensor) -> Tensor:
        """What the model expects when a text goes on behind the prompt.

        Args:
            tokens: K tokens of the text, all of them given to the model.
            kept: `[B, L, H, C]` bool, the prompt's tokens that each measured head attends to, for each of B
                variants.

        Returns:
            `[B, K, V]` log-probabilities of what comes after each token.
        """
        self._kept = kept
        begin = kept.shape[-1]
        assert begin == self.context[self._measured[0]].keys.shape[1]
        positions = torch.arange(begin, begin + len(tokens))[None]
        logits = self._forward(torch.tensor([tokens]).expand(len(kept), -1), position_ids=positions)
        return logits.float().log_softmax(-1)

    def _forward(self, tokens: Tensor, **options: Any) -> Tensor:
        from transformers import AttentionInterface

        # Again each time: the name belongs to whichever probe computes now.
        AttentionInterface.register(ATTENTION, self._attend)
        self._model.set_attn_implementation(ATTENTION)
        return self._model(tokens, use_cache=False, **options).logits

    @torch.no_grad()
    def scores(self, policy: Policy, num_scored: int) -> Tensor:
        """A policy's scores of the prompt's first tokens.

        Args:
            policy: that looks at keys, values and the last queries alone.
            num_scored: T, at most C less the policy's window.

        Returns:
            `[L, H, T]` float32, higher = keep.
        """
        rows = []
        for layer in self._measured:
            context = self.context[layer]
            length = context.keys.shape[1]
            queries = context.queries[:, length - policy.window :].transpose(0, 1)
            observation = LayerObservation(
                keys=context.keys,
                values=context.values,
                queries=queries.unflatten(1, (self.num_kv_heads, queries.shape[1] // self.num_kv_heads)),
                scale=context.scale,
                num_scored=num_scored,
                num_tokens=length,
                logits_soft_cap=context.soft_cap,
            )
            rows.append(policy.score(observation))
        return torch.stack(rows)

    def _attend(self, module, query, key, value, attention_mask, scaling=None, softcap=None, **others):
        """Causal attention, as transformers calls it; over what is kept of the prompt too, where one is held.

        Args:
            module: the attention layer.
            query: `[B, Hq, q, D]` after RoPE.
            key: `[B, H, q, D]` after RoPE.
            value: `[B, H, q, D]`.
            attention_mask: none is needed.
            scaling: the layer's softmax scale.
            softcap: of the logits.
            **others: of no effect here, or refused.

        Returns:
            `[B, q, Hq, D]`, and None for the weights.
        """
        batch, heads, new, size = key.shape
        scale, cap = size**-0.5 if scaling is None else scaling, softcap or 0.0
        kept = self._kept
        before = 0 if kept is None else kept.shape[-1]
        config, window = self._model.config.get_text_config(), others.get("sliding_window")
        slides = window is not None and window < config.max_position_embeddings
        self._windows[module.layer_idx] = window if slides else None
        every = len(self._windows) == config.num_hidden_layers
        refused = [words for name, words in OTHER_ATTENTION.items() if others.get(name) is not None]
        if every and window is not None and window < before + new and module.layer_idx in self._measured:
            refused.append("a sliding window in every layer")
        if refused:
            raise KVCompressionError(
                f"cannot measure the heads of {_name(self._model)}: its attention has {refused[0]}"
            )
        grouped = query.reshape(batch, heads, -1, new, size)  # [B, H, G, q, D]

        def logits_of(keys: Tensor) -> Tensor:
            logits = (grouped @ keys.transpose(-1, -2)).mul_(scale)
            return logits.div_(cap).tanh_().mul_(cap) if cap else logits

        # How far each token is behind each that asks.
        behind = torch.arange(before, before + new)[:, None] - torch.arange(before + new)
        hidden = (behind < 0) | (behind >= (window or len(behind) + before))
        logits = logits_of(key[:, :, None]).masked_fill_(hidden[:, before:], -torch.inf)
        if kept is None:
            self.context[module.layer_idx] = LayerContext(key[0], value[0], query[0], scale, cap)
            output = logits.softmax(-1) @ value[:, :, None]
        else:
            context = self.context[module.layer_idx]
            absent = hidden[:, :before]
            if module.layer_idx in self._measured:
                absent = ~kept[:, self._measured.index(module.layer_idx), :, None, None]
            past = logits_of(context.keys[:, None]).masked_fill_(absent, -torch.inf)
            weights = torch.cat([past, logits], -1).softmax(-1)
            of_past, now = weights.split([before, new], -1)
            output = of_past @ context.values[:, None] + now @ value[:, :, None]
        return output.flatten(1, 2).transpose(1, 2).contiguous(), None


def _name(model: Any) -> str:
    return str(getattr(model, "name_or_path", "") or type(model).__name__)
