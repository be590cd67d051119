"""Records whose tokens have a bias: what Attention Matching leaves of a head."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.formats.base import RECORD, RecordFormat, as_bytes

BIAS_BYTES = 4 * RECORD


@dataclass(frozen=True)
class Matched(RecordFormat):
    """Another format's records, and behind each the float32 biases `[32]` that its tokens' logits have.

    A matched token stands for several, so its logit is raised by the logarithm of how many: in half precision
    the mass of attention would be off by more than a percent.

    Source: Zweiger et al., "Fast KV Compaction via Attention Matching", arXiv 2602.16284.

    Attributes:
        written: how keys and values are.
    """

    written: RecordFormat

    @property
    def plain(self) -> RecordFormat:
        return self.written

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"matched {self.plain.name}"

    @property
    def paper(self) -> str:  # type: ignore[override]
        return f"Fast KV Compaction via Attention Matching (arXiv 2602.16284); {self.plain.paper}"

    @property
    def bits(self) -> int:  # type: ignore[override]
        return self.plain.bits

    def record_bytes(self, head_size: int) -> int:
        return self.plain.record_bytes(head_size) + BIAS_BYTES

    def bias_at(self, head_size: int) -> int:
        return self.plain.record_bytes(head_size)

    def rotation(self, head_size: int) -> Tensor | None:
        return self.plain.rotation(head_size)

    def encode(self, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is None:
            bias = torch.zeros(keys.shape[:-1], device=keys.device)
        return torch.cat([self.plain.encode(keys, values), as_bytes(bias.float())], -1)

    def decode(self, records: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
        return self.plain.decode(records[..., : self.plain.record_bytes(head_size)], head_size)

    def biases(self, records: Tensor, head_size: int) -> Tensor:
        """The biases `[..., 32]` float32 of records."""
        return records[..., self.plain.record_bytes(head_size) :].contiguous().view(torch.float32)
