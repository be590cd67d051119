"""StreamingLLM: attention sinks and the most recent tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcompress.policies.base import LayerObservation, Policy


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Keep the first tokens and the most recent ones: a token's score is its position.

        s_i = i, the same for every head: `[H, T]`

    The sinks are the configuration's `sink_tokens`, which no method ever drops.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, §3.2.
    Deviation: the paper re-indexes positions inside the cache; here tokens keep their logical positions.
    """

    name: ClassVar[str] = "streaming_llm"
    paper: ClassVar[str] = "Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453)"
    cost: ClassVar[str] = "none: reads neither queries nor keys"
    reads_keys: ClassVar[bool] = False
    reads_values: ClassVar[bool] = False
    stacks_layers: ClassVar[bool] = True

    def score(self, observation: LayerObservation) -> Tensor:
        heads = observation.keys.shape[0]
        position = torch.arange(observation.num_scored, dtype=torch.float32, device=observation.keys.device)
        return position.expand(heads, -1)
