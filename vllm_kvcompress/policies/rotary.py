"""Rotary position embedding, undone and averaged."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """A layer's rotary position embedding.

    Attributes:
        cos_sin: `[positions, R]`, cosines of the R/2 angles, then their sines; R <= D elements are rotated.
        is_neox: whether element i is paired with i + R/2; otherwise 2i with 2i + 1.
        first: the first element that is rotated.
    """

    cos_sin: Tensor
    is_neox: bool
    first: int = 0

    @classmethod
    def identity(cls, positions: int, device: torch.device | str = "cpu") -> "Rotary":
        """The rotation by no angle, of layers without position embedding."""
        return cls(torch.tensor([1.0, 0.0], device=device).expand(positions, 2), True)

    def same_as(self, other: "Rotary | None") -> bool:
        """Whether it is the same, its table the same in memory."""
        if other is None or other.cos_sin is not self.cos_sin:
            return False
        return (other.is_neox, other.first) == (self.is_neox, self.first)

    def at(self, positions: Tensor) -> "Rotary":
        """The same for these positions alone, `[n]`, counted from 0."""
        return replace(self, cos_sin=self.cos_sin[positions])

    def pairs(self) -> tuple[Tensor, Tensor]:
        """The elements that are rotated with each other, `[R/2]` int64 each."""
        rotated = self.cos_sin.shape[-1]
        channel = torch.arange(self.first, self.first + rotated, device=self.cos_sin.device)
        left, right = channel.view(2, -1) if self.is_neox else channel.view(-1, 2).T
        return left, right

    def undo(self, rotated: Tensor, first_position: int) -> Tensor:
        """Vectors before the embedding.

        Args:
            rotated: `[n, ..., D]` of tokens at consecutive positions.
            first_position: of the first one.

        Returns:
            `[n, ..., D]` float32.
        """
        table = self.cos_sin[first_position : first_position + rotated.shape[0]].float()
        return self._undo(rotated, table.view(len(table), *[1] * (rotated.ndim - 2), -1))

    def undo_at(self, rotated: Tensor, positions: Tensor) -> Tensor:
        """Vectors before the embedding.

        Args:
            rotated: `[..., D]`.
            positions: `[...]` int64, of each.

        Returns:
            `[..., D]` float32.
        """
        return self._undo(rotated, self.cos_sin[positions].float())

    def _undo(self, rotated: Tensor, table: Tensor) -> Tensor:
        """By cosines and sines `[..., R]` of each vector."""
        cos, sin = table.chunk(2, -1)
        length = cos.square() + sin.square()  # not 1 where the embedding also scales (YaRN)
        cos, sin = cos / length, sin / length
        out = rotated.to(torch.float32, copy=True)
        pair = out.narrow(-1, self.first, self.cos_sin.shape[-1])  # views: nothing is indexed
        a, b = pair.chunk(2, -1) if self.is_neox else (pair[..., 0::2], pair[..., 1::2])
        left = (a * cos).addcmul_(b, sin)
        b.mul_(cos).addcmul_(a, sin, value=-1)
        a.copy_(left)
        return out

    def mean_matrix(self, first_position: int, count: int, size: int) -> Tensor:
        """The mean of the embedding's matrices over positions, `[D, D]` float32; past the table its end.

        Args:
            first_position: of the range.
            count: positions in it.
            size: D.
        """
        device = self.cos_sin.device
        positions = torch.arange(first_position, first_position + count, device=device)
        positions.clamp_(max=len(self.cos_sin) - 1)
        cos, sin = self.cos_sin[positions].float().mean(0).chunk(2)
        left, right = self.pairs()
        matrix = torch.eye(size, device=device)
        matrix[left, left] = matrix[right, right] = cos
        matrix[left, right], matrix[right, left] = -sin, sin
        return matrix
