"""Several formats within one head: more bits for what matters more."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcompress.formats.base import Format, RecordFormat, arrange
from vllm_kvcompress.formats.hybrid import K4V2, K4V3, K4V4, K8V4

HALVINGS = 40  # of the interval that a price of bytes is sought in


@dataclass(frozen=True)
class Mixed(Format):
    """Each token in one of several formats, or dropped, by its rank in its head and by what a byte buys.

    With r the rank of a thirty-two of tokens among those of its head, 1 being the best, and with b_f bytes
    and an error e_f of a format, 1 standing for what it costs to drop them:

        choice(r) = argmax_f  r^-decay · (1 - e_f) - λ·b_f,  or dropped where none is above 0

    λ is the lowest price at which a head's choices fit its pages. That is the Lagrangian of the least
    Σ r^-decay · e under a budget of bytes; ranks rather than scores, because those of most methods mean
    nothing by themselves.

    Attributes:
        errors: e of each part, the best first.
        decay: how fast importance falls with the rank.
    """

    errors: ClassVar[tuple[float, ...]]
    decay: ClassVar[float]

    def choose(
        self, scores: Tensor, known: Tensor, pages: Tensor, sizes: Sequence[int], page_bytes: int
    ) -> Tensor:
        """Which part holds each of a head's thirty-twos.

        Args:
            scores: `[X, U]` float32, of each; +inf for protected ones.
            known: `[X, U]` int64, the part that it is written in already; -1 if it is raw, -2 if there is
                none.
            pages: `[X]` int64, what each head may fill.
            sizes: bytes of a part's records.
            page_bytes: bytes of a page.

        Returns:
            `[X, U]` int64, -1 for dropped.
        """
        device = scores.device
        present = scores.masked_fill(known == -2, -torch.inf)
        rank = present.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        weight = (rank + 1).double() ** -self.decay
        gain = weight[..., None] * (1 - torch.tensor(self.errors, dtype=torch.float64, device=device))
        part = torch.arange(len(sizes), device=device)
        allowed = (known[..., None] == -1) | (known[..., None] == part)
        gain = gain.masked_fill(~allowed, -torch.inf)
        cost = torch.tensor(sizes, dtype=torch.float64, device=device)

        def at(price: Tensor) -> Tensor:
            best, chosen = (gain - price[:, None, None] * cost).max(2)
            return torch.where(best > 0, chosen, -1)

        def fits(chosen: Tensor) -> Tensor:
            return arrange((chosen == part[:, None, None]).sum(2), sizes, page_bytes)[1] <= pages

        # At the high price nothing is worth its bytes; the low one is less than any step of quality is worth.
        high = torch.full(pages.shape, 2 / min(sizes), dtype=torch.float64, device=device)
        low = high * 1e-12
        for _ in range(HALVINGS):
            middle = (low * high).sqrt()
            enough = fits(at(middle))
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        return at(high)


@dataclass(frozen=True)
class Auto(Mixed):
    """Each token in k8v4, k4v4, k4v3 or k4v2, or dropped, by its rank in its head and what a byte buys.

    A value's error is that of its codebook; a key of 4 bits is taken to add 0.02.
    """

    name: ClassVar[str] = "auto"
    paper: ClassVar[str] = (
        "mixed precision by rank: KIVI's keys (arXiv 2402.02750), TurboQuant's values (arXiv 2504.19874)"
    )
    typical: ClassVar[int] = 2
    errors: ClassVar[tuple[float, ...]] = (0.01, 0.03, 0.054, 0.135)
    decay: ClassVar[float] = 1.0

    @property
    def parts(self) -> tuple[RecordFormat, ...]:
        return K8V4(), K4V4(), K4V3(), K4V2()
