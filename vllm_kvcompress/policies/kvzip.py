"""KVzip: what the model needs to repeat its context."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vllm_kvcompress.policies.base import LayerObservation, Policy
from vllm_kvcompress.policies.watching import column_attention


@dataclass(frozen=True)
class KVzip(Policy):
    """The most attention that any query pays to a token while the model repeats the context.

        s_i = max over the group and the queries of A_i

    The context is repeated part by part, teacher-forced; A is over the attention sinks, the part and the
    repetition. It asks no question, so it suits contexts that are compressed once and asked often. The model
    reads the context a second time, in requests of its own beside everybody else's, and the request waits
    for that after its first token.

    Source: Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction",
    arXiv 2505.23416, and its authors' code for the instruction and for the keys in A. Meant for the `global`
    allocation. Deviations: the instruction follows the prompt without a chat template around it, and the
    prompt is repeated from its first token on.

    Attributes:
        chunk: context tokens of a part.
        sinks: first tokens of the context that every part's attention includes.
    """

    name: ClassVar[str] = "kvzip"
    paper: ClassVar[str] = "KVzip: Query-Agnostic KV Cache Compression (arXiv 2505.23416)"
    cost: ClassVar[str] = "the prompt computed a second time, and its attention within each part"
    repeats: ClassVar[bool] = True
    reads_keys: ClassVar[bool] = False  # but for `observe`
    reads_values: ClassVar[bool] = False
    stacks_layers: ClassVar[bool] = True
    absolute: ClassVar[bool] = True
    of_ranks: ClassVar[Literal["mean", "max"]] = "max"
    chunk: int = 2048  # type: ignore[misc]
    sinks: int = 4  # type: ignore[misc]

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, got {self.chunk}")
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {self.sinks}")

    def observe(self, observation: LayerObservation) -> Tensor:
        return column_attention(observation, "max")

    def score(self, observation: LayerObservation) -> Tensor:
        return observation.state[:, : observation.num_scored]
