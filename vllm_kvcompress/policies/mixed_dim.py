"""MixedDimKV: what the output of attention loses with a token, or with some of its coordinates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcompress.policies.base import QUERY_BLOCK, LayerObservation, Policy, attention_blocks

COLUMNS = 4096  # tokens at once
LEAST = 0.01  # of attention that goes elsewhere: below it what o and v differ in is rounding


@dataclass(frozen=True)
class MixedDimKV(Policy):
    """How far the outputs of the last `window` queries move without a token, or with a shorter one.

        dropped:    Σ_q a/(1-a)·‖o_q - v_i‖
        truncated:  Σ_q a·(|q·(k_i - k̂_i)|·scale·‖v_i - o_q‖ + ‖v_i - v̂_i‖)

    a is q's attention to token i and o_q its output; the sums are over the window and the group. Where a is
    above 0.99 o_q is v_i but for rounding, and dropping it counts as a·‖v_i‖. Scores are the losses of
    dropped tokens, so the policy goes with any format; `mixed_dim` asks for the others.

    Source: "MixedDimKV", arXiv 2603.20616, whose code was not at hand: the formulas are ours.

    Attributes:
        window: w, queries observed.
    """

    name: ClassVar[str] = "mixed_dim_kv"
    paper: ClassVar[str] = "MixedDimKV (arXiv 2603.20616)"
    cost: ClassVar[str] = "attention of the last w queries over the prompt, once, and distances of values"
    reads_values: ClassVar[bool] = True
    stacks_layers: ClassVar[bool] = True
    gives_losses: ClassVar[bool] = True
    window: int = 32

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1 token, got {self.window}")

    def score(self, observation: LayerObservation) -> Tensor:
        return self.losses(observation, ())[-1].float()

    def losses(self, observation: LayerObservation, bases: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        values, scored = observation.values.float(), observation.num_scored
        if observation.padding is not None:  # no attention to it, but times what may be no number
            values = values.masked_fill(~observation.holds()[..., None], 0.0)
        lost = torch.zeros(len(bases) + 1, len(values), scored, device=values.device)
        for index, attention in enumerate(attention_blocks(observation)):
            first = index * QUERY_BLOCK
            queries = observation.queries[first : first + attention.shape[2]]
            queries = queries.permute(1, 2, 0, 3).flatten(1, 2).float()  # [H, G·q, D]
            paid = attention.flatten(1, 2)  # [H, G·q, W]
            outputs = paid @ values
            for begin in range(0, scored, COLUMNS):
                some = slice(begin, min(begin + COLUMNS, scored))
                context = queries, outputs, paid[..., some], observation.keys[:, some].float()
                self._add(lost[..., some], *context, values[:, some], observation.scale, bases)
        return lost

    @staticmethod
    def _add(
        lost: Tensor,
        queries: Tensor,
        outputs: Tensor,
        paid: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        bases: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        """Add to the losses `[ranks + 1, H, t]` what queries `[H, n, D]` say of t tokens."""
        away = torch.cdist(outputs, values)  # [H, n, t]
        for own, (of_keys, of_values) in zip(lost, bases, strict=False):
            left_out = keys - keys @ of_keys @ of_keys.mT
            error = (queries @ left_out.mT).abs_().mul_(scale).mul_(away)
            error += (values - values @ of_values @ of_values.mT).norm(dim=-1)[:, None]
            own += (paid * error).sum(1)
        rest = 1 - paid
        without = torch.where(rest > LEAST, away / rest.clamp(min=LEAST), values.norm(dim=-1)[:, None])
        lost[-1] += (paid * without).sum(1)
