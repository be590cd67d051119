"""CriticalKV: a score, and how much of a value gets through the output projection."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vllm_kvcompress.policies.base import LayerObservation, Policy, RepeatedPart
from vllm_kvcompress.policies.snapkv import SnapKV


@dataclass(frozen=True)
class CriticalKV(Policy):
    """Another policy's scores in two stages.

    Of what a head keeps, `first_stage` goes to the base policy's best tokens; the rest to the best by

        (s_i + ε)·mean over the group of ‖W_O v_i‖₁

    with W_O the head's share of the output projection. Allocations see the base scores.

    Source: Feng et al., "Identify Critical KV Cache in LLM Inference from an Output Perturbation
    Perspective", arXiv 2502.03805. Beside kvpress: there SnapKV averages over its window where ours sums, so
    the same ε weighs w times more; and the first stage is a share of all tokens kept, the window included,
    here of those below the boundary. With both aligned the tokens are the same.

    Attributes:
        base: the policy whose scores these are, any by name.
        first_stage: share of a head's tokens that is chosen by the base scores alone.
        epsilon: ε.
    """

    name: ClassVar[str] = "criticalkv"
    paper: ClassVar[str] = "Identify Critical KV Cache in LLM Inference (arXiv 2502.03805)"
    cost: ClassVar[str] = "its base policy's, and the output projection of every value"
    needs_output_projection: ClassVar[bool] = True
    base: Policy = SnapKV()
    first_stage: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 <= self.first_stage <= 1:
            raise ValueError(f"first_stage must be between 0 and 1, got {self.first_stage}")
        if self.epsilon < 0:
            raise ValueError(f"epsilon must not be negative, got {self.epsilon}")
        if isinstance(self.base, CriticalKV):
            raise ValueError("base must be another policy")

    @property
    def window(self) -> int:
        return self.base.window

    @property
    def scored_by(self) -> Policy:
        return self.base.scored_by

    @property
    def reads_keys(self) -> bool:  # type: ignore[override]
        return self.base.reads_keys

    @property
    def observes_keys(self) -> bool:  # type: ignore[override]
        return self.base.observes_keys

    @property
    def accumulates(self) -> bool:  # type: ignore[override]
        return self.base.accumulates

    @property
    def sums(self) -> Literal["attention", "squares"] | None:  # type: ignore[override]
        return self.base.sums

    @property
    def moments(self) -> int | None:  # type: ignore[override]
        return self.base.moments

    @property
    def repeats(self) -> bool:  # type: ignore[override]
        return self.base.repeats

    @property
    def chunk(self) -> int:  # type: ignore[override]
        return self.base.chunk

    @property
    def study_tokens(self) -> int:  # type: ignore[override]
        return self.base.study_tokens

    @property
    def sinks(self) -> int:  # type: ignore[override]
        return self.base.sinks

    @property
    def needs_known_shape(self) -> bool:  # type: ignore[override]
        return self.base.needs_known_shape

    @property
    def needs_rotary(self) -> bool:  # type: ignore[override]
        return self.base.needs_rotary

    def observe(self, observation: LayerObservation) -> Any:
        return self.base.observe(observation)

    def repeat(self, observation: LayerObservation, part: RepeatedPart) -> Any:
        return self.base.repeat(observation, part)

    def carry(self, state: Any, kept: Tensor) -> Any:
        return self.base.carry(state, kept)

    def score(self, observation: LayerObservation) -> Tensor:
        return self.base.score(observation)

    def refine(self, scores: Tensor, kept: Tensor, observation: LayerObservation) -> Tensor:
        scores = self.base.refine(scores, kept, observation)
        first = (self.first_stage * kept).long().clamp(min=1 if self.first_stage else 0)
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        weighted = (scores + self.epsilon) * projected_length(observation)
        weighted.masked_fill_(rank < first[:, None], torch.inf)
        return torch.where(scores.isinf(), scores, weighted)  # what is protected stays so (inf·0 is NaN)


def projected_length(observation: LayerObservation) -> Tensor:
    """Mean over the group of ‖W_O v‖₁ of every column below the boundary, `[H, T]` float32."""
    assert observation.output_projection is not None
    projection = observation.output_projection()  # [H, G, D, hidden]
    values = observation.values[:, : observation.num_scored].float()
    heads, group = projection.shape[:2]
    length = torch.zeros(values.shape[:2], device=values.device)
    for head in range(heads):
        for member in range(group):
            length[head] += (values[head] @ projection[head, member]).abs().sum(-1)
    return length / group
