"""Foresight: what a token will be read for, predicted from its cached key and value."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_kvcompress import scorers
from vllm_kvcompress.policies.base import LayerObservation, Policy
from vllm_kvcompress.policies.window import MOST_POOLED

AT_ONCE = 2**20  # numbers of keys from which scores are worked out within a CPU's caches
# Tokens of a head that are kept by their scores before the most recent ones have a share; most of these.
BY_SCORE, MOST_RECENT = 128, 512


@dataclass(frozen=True)
class Foresight(Policy):
    """KVzip's score of a token, predicted by a small network of each KV head from what the cache holds of it.

        log s_i = w₂ᵀ·gelu(W₁·[R_i⁻¹k_i; v_i] + b₁) + b₂

    R_i⁻¹ undoes the rotation of position i, so that a score depends on what the token is and not on where.
    Nothing else is looked at: no query, no second pass, no hook. So it works after a prefix hit, at any
    chunking, on generated tokens and at every recompaction. Scores compare across heads and layers.

    Source: this project. The target is that of Kim et al., "KVzip", arXiv 2505.23416; learning it is NVIDIA's
    idea, Jegou and Jeblick, "KVzap: Fast, Adaptive, and Faithful KV Cache Pruning", arXiv 2601.07891, whose
    networks read hidden states instead. Meant for the `global` allocation.

    Attributes:
        scorer: a file of `vllm-kvcompress calibrate MODEL --scorer`, or the name of a packaged one. An engine
            finds that of its model.
        pooling: odd number of tokens over which scores are max-pooled.
        recent: share of what heads keep on average, beyond 128 tokens, that goes to the most recent ones, of
            each head as many and 512 at most. What comes next looks at what came last; a repetition of the
            context does not, and so neither do the scores.
    """

    name: ClassVar[str] = "foresight"
    paper: ClassVar[str] = (
        "learned here; target of KVzip (arXiv 2505.23416), idea of KVzap (arXiv 2601.07891)"
    )
    cost: ClassVar[str] = "two small matrix products per token; a scorer of the model, trained once"
    stacks_layers: ClassVar[bool] = True
    absolute: ClassVar[bool] = True
    needs_rotary: ClassVar[bool] = True
    needs_known_shape: ClassVar[bool] = True
    scorer: str = ""
    pooling: int = 1
    recent: float = 0.125

    def __post_init__(self) -> None:
        if not 1 <= self.pooling <= MOST_POOLED or self.pooling % 2 == 0:
            raise ValueError(
                f"pooling must be an odd number of tokens, 1 to {MOST_POOLED}, got {self.pooling}"
            )
        if not 0 <= self.recent <= 1:
            raise ValueError(f"recent must be between 0 and 1, got {self.recent}")
        if self.scorer:
            _ = self.network  # a file that cannot be read is refused here

    @property
    def network(self) -> scorers.Scorer:
        """The scorer's content."""
        return _load(self.scorer)

    def num_recent(self, kept: int) -> int:
        return min(int(self.recent * max(0, kept - BY_SCORE)), MOST_RECENT)

    def score(self, observation: LayerObservation) -> Tensor:
        assert observation.rotary is not None
        keys, values, number = observation.keys, observation.values, observation.num_scored
        positions = None if observation.kept_positions is None else observation.positions()
        on_cpu = keys.device.type == "cpu"
        dtype = torch.float32 if on_cpu and not _tiles_bfloat16() else values.dtype
        own = self.network_on(keys.device, dtype)
        step = max(1, AT_ONCE // keys[:, 0].numel() if on_cpu else number)
        parts = []
        for columns in (slice(begin, min(begin + step, number)) for begin in range(0, max(1, number), step)):
            some = keys[:, columns]
            if positions is None:
                some = observation.rotary.undo(some.transpose(0, 1), columns.start).transpose(0, 1)
            else:
                some = observation.rotary.undo_at(some, positions[:, columns])
            some, of = some.to(dtype), values[:, columns].to(dtype)
            parts.append(own.log_scores(observation.layers, observation.first_head, some, of))
        return self.pooled(torch.cat(parts, 1), observation.padding)

    def network_on(self, device: torch.device, dtype: torch.dtype) -> scorers.Scorer:
        """The scorer with its tensors on a device, in the dtype to compute in."""
        return _on(self.scorer, device, dtype)

    def pooled(self, log_scores: Tensor, padding: Tensor | None) -> Tensor:
        """Scores `[H, W]` of their logarithms; `padding [H]` leading columns hold nothing."""
        if self.pooling > 1:
            if padding is not None:
                column = torch.arange(log_scores.shape[1], device=log_scores.device)
                log_scores = log_scores.masked_fill(column < padding[:, None], -torch.inf)
            log_scores = F.max_pool1d(log_scores[:, None], self.pooling, 1, self.pooling // 2)[:, 0]
        return log_scores.exp()


@functools.cache
def _tiles_bfloat16() -> bool:
    """Whether this CPU has AMX: without, products of few channels take as long in bfloat16 as in float32."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


@functools.cache
def _load(given: str) -> scorers.Scorer:
    # Once for as long as the process lives: a file must not have to stay, nor may it change, under requests.
    return scorers.load(given)


@functools.cache
def _on(given: str, device: torch.device, dtype: torch.dtype) -> scorers.Scorer:
    return _load(given).to(device, dtype)
