"""MixedDimKV: each token of a head in all of its coordinates, in the first few of a basis, or dropped."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcompress.formats.base import RECORD, Format, RecordFormat, as_bytes, sections

HALVINGS = 48  # of the interval that a price of bytes is sought in
WIDEST = 4  # of D coordinates a basis has the first D/4
PAPER = "MixedDimKV (arXiv 2603.20616)"


def half(numbers: Tensor) -> Tensor:
    """As float16: cut off at what it holds, NaN being 0."""
    limit = torch.finfo(torch.float16)
    return numbers.float().nan_to_num(0.0, limit.max, limit.min).clamp(limit.min, limit.max).half()


@dataclass(frozen=True)
class Vectors(RecordFormat):
    """Keys and values as they are, in float16: what bfloat16 holds between 6e-5 and 65504 is exact in it.

    A record is: values `[32, D]`, keys `[D, 32]`.
    """

    name: ClassVar[str] = "vectors"
    paper: ClassVar[str] = PAPER
    bits: ClassVar[int] = 16

    def rank(self, head_size: int) -> int:
        """Coordinates of a key, and of a value."""
        return head_size

    def record_bytes(self, head_size: int) -> int:
        return 4 * RECORD * self.rank(head_size)

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        return torch.cat([as_bytes(half(each)).flatten(-2) for each in (values, keys.mT)], -1)

    def decode(self, records: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
        size, rank = 2 * RECORD * self.rank(head_size), self.rank(head_size)
        values, keys = (part.view(torch.float16).float() for part in sections(records, [size, size]))
        return keys.unflatten(-1, (rank, RECORD)).mT.contiguous(), values.unflatten(-1, (RECORD, rank))


@dataclass(frozen=True)
class Latent(Vectors):
    """Coordinates of keys and values in their head's bases, the first D/n of them, in float16.

        c = x·B,  x̂ = c·Bᵀ

    A record is as of `Vectors`, with D/n in place of D. To be read it needs the head's `Basis`.

    Attributes:
        divisor: n.
    """

    divisor: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"latent{self.divisor}"

    def rank(self, head_size: int) -> int:
        return head_size // self.divisor

    def encode(self, keys: Tensor, values: Tensor, basis: Tensor | None = None) -> Tensor:
        """Write records.

        Args:
            keys: `[..., 32, D]`.
            values: `[..., 32, D]`.
            basis: `[..., basis_bytes]` uint8, of the head of each record.
        """
        of_keys, of_values = self.bases(basis, keys.shape[-1])
        return super().encode(half(keys).float() @ of_keys, half(values).float() @ of_values)

    def decode(self, records: Tensor, head_size: int, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Read records, with the basis of each one's head as in `encode`."""
        of_keys, of_values = self.bases(basis, head_size)
        keys, values = super().decode(records, head_size)
        return keys @ of_keys.mT, values @ of_values.mT

    def bases(self, basis: Tensor | None, head_size: int) -> tuple[Tensor, Tensor]:
        """The bases `[..., D, D/n]` float32 of keys and of values in what `Basis` wrote."""
        assert basis is not None
        return tuple(own[..., : self.rank(head_size)] for own in Basis().decode(basis, head_size))  # type: ignore[return-value]


@dataclass(frozen=True)
class Basis(RecordFormat):
    """The bases of a head: the D/4 directions along which its keys are longest, and its values.

    These are the first eigenvectors of Σ x·xᵀ, which is not centred: where keys have a mean far from 0, as
    those of models with a key bias, it is the first direction or near it. Shorter ranks are prefixes.

    It is of all tokens that it is made from, and is written as: keys' directions `[D, D/4]`, values'
    `[D/4, D]`, float16.
    """

    name: ClassVar[str] = "basis"
    paper: ClassVar[str] = PAPER
    bits: ClassVar[int] = 16

    def rank(self, head_size: int) -> int:
        """Directions of each of the two."""
        return head_size // WIDEST

    def record_bytes(self, head_size: int) -> int:
        return 4 * head_size * self.rank(head_size)

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        """The bases `[..., basis_bytes]` uint8 of keys and values `[..., n, D]`."""
        return self.of_moments(*(own.mT @ own for own in (half(keys).double(), half(values).double())))

    def of_moments(self, keys: Tensor, values: Tensor) -> Tensor:
        """The bases `[..., basis_bytes]` uint8 of what has Σ x·xᵀ `[..., D, D]` float64."""
        widest = keys.shape[-1] // WIDEST
        of_keys, of_values = (
            torch.linalg.eigh(own)[1].flip(-1)[..., :widest].half() for own in (keys, values)
        )
        return torch.cat([as_bytes(part).flatten(-2) for part in (of_keys, of_values.mT)], -1)

    def decode(self, records: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
        """The bases `[..., D, D/4]` float32 of keys and of values."""
        size, widest = 2 * head_size * (head_size // WIDEST), head_size // WIDEST
        keys, values = (part.view(torch.float16).float() for part in sections(records, [size, size]))
        return keys.unflatten(-1, (head_size, widest)), values.unflatten(-1, (widest, head_size)).mT


@dataclass(frozen=True)
class MixedDim(Format):
    """Each token in all of its D coordinates, in the first D/4 or D/8 of its head's own basis, or dropped.

    Which, is what loses least: with l_r what a token loses in rank r and b_r the bytes of one,

        rank = argmin_r  l_r + λ·b_r

    λ is the lowest price at which the choices fit the pages: the Lagrangian of the least Σ l under a budget
    of bytes. A head's bases are bytes, too, and it goes without where they are not worth their price.

    Source: "MixedDimKV", arXiv 2603.20616, whose code was not at hand: ranks and prices are its own, the rest
    is ours. Tokens of a rank come in thirty-twos, those nearest to another rank making up the number.

    Attributes:
        decay: of scores that are no losses: how fast importance falls with the rank among a head's tokens.
    """

    name: ClassVar[str] = "mixed_dim"
    paper: ClassVar[str] = PAPER
    keeps_all: ClassVar[bool] = False  # in fewer coordinates all of them lose too much
    decay: ClassVar[float] = 1.0

    @property
    def parts(self) -> tuple[Vectors, ...]:
        return Vectors(), Latent(4), Latent(8)

    @property
    def basis(self) -> Basis:
        return Basis()

    def needs_basis(self, counts: Tensor) -> Tensor:
        return counts[1:].sum(0) > 0

    def holds_more(self, page_bytes: int, head_size: int, block_size: int) -> bool:
        shortest = self.parts[-1].record_bytes(head_size)  # a page of full vectors may hold no more than raw
        return self.largest_bytes(head_size) <= page_bytes and page_bytes // shortest * RECORD > block_size

    def losses_by_rank(self, scores: Tensor, errors: Tensor) -> Tensor:
        """What tokens lose, by their scores alone: importance, times a head's error in each rank.

        With i a token's place among those of its head, counted in thirty-twos from 1: i^-decay·error.

        Args:
            scores: `[X, T]` float32, higher = keep.
            errors: `[P, X]`, of each part, the one of dropping being 1.

        Returns:
            `[P + 1, X, T]` float64; the last is of dropping.
        """
        place = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        importance = (place // RECORD + 1).double() ** -self.decay
        return torch.stack([importance * own[:, None] for own in (*errors, torch.ones_like(errors[0]))])

    def errors(self, keys: Tensor, values: Tensor, mean: Tensor, count: int, basis: Tensor) -> Tensor:
        """What ranks leave out of how a head's keys differ from their mean, and of its values; 1 at most.

        What all keys share moves no weight of attention, so it is no part of what there is to lose.

        Args:
            keys: `[X, D, D]` float64, Σ k·kᵀ.
            values: `[X, D, D]` float64, likewise.
            mean: `[X, D]` float64, of keys.
            count: n, of both.
            basis: `[X, basis_bytes]` uint8.

        Returns:
            `[P, X]` float64.
        """
        head_size = keys.shape[-1]
        energy = [own.diagonal(dim1=-2, dim2=-1).sum(-1) for own in (keys, values)]
        spread = [energy[0] - count * mean.square().sum(-1), energy[1]]
        errors = [torch.zeros_like(energy[0])]
        for part in self.parts[1:]:
            assert isinstance(part, Latent)
            left = torch.zeros_like(energy[0])
            bases = part.bases(basis, head_size)
            for own, moments, whole, all_ in zip(bases, (keys, values), energy, spread, strict=True):
                kept = (moments @ own.double() * own).sum((-1, -2))
                left += ((whole - kept).clamp(min=0) / all_.clamp(min=1e-30)).clamp(max=1)
            errors.append(left.clamp(max=1))
        return torch.stack(errors)

    def choose(
        self,
        losses: Tensor,
        of_records: Tensor,
        known: Tensor,
        pages: Tensor | int,
        head_size: int,
        page_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Which part each raw token is written in, and which records stay.

        Args:
            losses: `[P + 1, X, T]` float64, of raw tokens in each part, then dropped; +inf in all but the
                first part for what is protected. T is a multiple of 32.
            of_records: `[X, E]` float64, what is lost with a record; +inf for protected ones.
            known: `[X, E]` int64, a record's part; below 0 if there is none.
            pages: `[X]` int64, what each head may fill; or of all heads together.
            head_size: D.
            page_bytes: bytes of a page.

        Returns:
            `[X, E]` bool, records that stay; `[X, T]` int64, parts, -1 for dropped; `[X]` int64, pages.
        """
        budget = _Budget(self, of_records, known, head_size, page_bytes)
        whole = losses.clone()
        whole[1:-1] = losses[-1]  # without a basis
        if not isinstance(pages, Tensor):
            pages = budget.shared(losses, whole, pages)
        (lost, keep, parts), (other, *without) = (budget.choices(each, pages) for each in (losses, whole))
        better = (other <= lost)[:, None]
        return torch.where(better, without[0], keep), torch.where(better, without[1], parts), pages


@dataclass(frozen=True)
class _Prices:
    """What raw tokens may cost.

    A token that is in some part at a price is in that one or a better one at every lower price. So how many
    tokens of a head are in each part is read off their sorted prices.

    Attributes:
        most: `[P, X, T]` float64, the price below which a token is in each part or in a better one.
        ascending: the same, sorted.
    """

    most: Tensor
    ascending: Tensor

    @classmethod
    def of(cls, losses: Tensor, sizes: Sequence[int]) -> "_Prices":
        """Those of losses `[P + 1, X, T]`, as of `MixedDim.choose`, and bytes of the parts' records."""
        size = [each / RECORD for each in (*sizes, 0)]
        most = []
        for part in range(len(sizes)):
            best = torch.full_like(losses[0], -torch.inf)
            for own in range(part + 1):  # one of these must beat all that are behind the part
                beats = [
                    (losses[other] - losses[own]) / (size[own] - size[other])
                    for other in range(part + 1, len(size))
                ]
                beaten = torch.stack(beats).amin(0)
                best = torch.maximum(best, torch.where(beaten.isnan(), -torch.inf, beaten))
            most.append(best)
        prices = torch.stack(most)
        return cls(prices, prices.sort(2).values)

    def counts(self, price: Tensor) -> Tensor:
        """Tokens `[P, X]` that are in each part or in a better one at a price `[X]`, in thirty-twos."""
        at = price[None, :, None].expand(len(self.most), -1, 1).contiguous()
        above = self.ascending.shape[2] - torch.searchsorted(self.ascending, at, right=True)[..., 0]
        protected = self.ascending[0].isposinf().sum(1)
        nearest = (above + RECORD // 2) // RECORD * RECORD
        return torch.maximum(nearest, (protected + RECORD - 1) // RECORD * RECORD)

    def parts(self, price: Tensor) -> Tensor:
        """The part `[X, T]` int64 of each token at a price, -1 for none."""
        counts = self.counts(price)
        chosen = torch.full(self.most.shape[1:], -1, device=price.device)
        candidate = torch.ones_like(chosen, dtype=torch.bool)
        for part in reversed(range(len(counts))):
            own = self.most[part].masked_fill(~candidate, -torch.inf)
            place = own.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            candidate = candidate & (place < counts[part][:, None])
            chosen[candidate] = part
        return chosen


class _Budget:
    """What heads can pay for, of raw tokens and of records that they have."""

    def __init__(
        self, format: MixedDim, of_records: Tensor, known: Tensor, head_size: int, page_bytes: int
    ) -> None:
        self.format, self.known = format, known
        self.head_size, self.page_bytes = head_size, page_bytes
        self.sizes = [part.record_bytes(head_size) for part in format.parts]
        size = torch.tensor(self.sizes, dtype=torch.float64, device=known.device)
        self.worth = of_records
        self.record_prices = (of_records / size[known.clamp(min=0)]).masked_fill(known < 0, -torch.inf)

    def lowest(self, prices: _Prices, pages: Tensor | int) -> tuple[Tensor, Tensor]:
        """The lowest price `[X]` at which choices fit, and one just below at which they may not."""
        known = torch.cat([*prices.most, self.record_prices], 1)
        high = known.masked_fill(known.isposinf(), 0).amax(1).clamp(min=1e-30) * 2
        if not isinstance(pages, Tensor):
            high = high.amax().repeat(len(high))
        low = high * 1e-20
        for _ in range(HALVINGS):
            middle = (low * high).sqrt()
            needed = self.pages(prices, middle)
            enough = needed <= pages if isinstance(pages, Tensor) else needed.sum() <= pages
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        return high, low

    def choices(self, losses: Tensor, pages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is lost, `[X]`, with what fits each head's pages; and the records and parts of it."""
        prices = _Prices.of(losses, self.sizes)
        price, _ = self.lowest(prices, pages)
        keep, parts = self.kept(price), prices.parts(price)
        lost = losses.gather(0, (parts % len(losses))[None])[0].sum(1)  # -1 is the last one
        dropped = ~keep & (self.known >= 0)
        return lost + self.worth.masked_fill(~dropped, 0).sum(1), keep, parts

    def shared(self, losses: Tensor, whole: Tensor, pages: int) -> Tensor:
        """Each head's pages `[X]` of all: what it fills at a price that is common to all heads; then, one
        head after the other while any are left, what it would at one just below.

        Args:
            losses: `[P + 1, X, T]`.
            whole: likewise, without a basis.
            pages: of all heads.
        """
        in_basis = torch.ones(losses.shape[1], dtype=torch.bool, device=losses.device)
        for _ in range(3):  # who has a basis depends on the price, and the price a little on who has
            prices = _Prices.of(torch.where(in_basis[:, None], losses, whole), self.sizes)
            price, below = self.lowest(prices, pages)
            in_basis = self.pays(losses, whole, price)
        fits, more = (self.pages(prices, each) for each in (price, below))
        more = (more - fits).clamp(min=0)
        left = pages - fits.sum() - (more.cumsum(0) - more)
        return fits + torch.minimum(more, left.clamp(min=0))

    def pages(self, prices: _Prices, price: Tensor) -> Tensor:
        """Pages `[X]` that each head fills at a price; one at least."""
        counts = prices.counts(price)
        counts[1:] -= counts[:-1].clone()
        part = torch.arange(len(self.sizes), device=price.device)[:, None, None]
        old = (self.kept(price) & (self.known == part)).sum(2)
        return self.format.arrange(counts // RECORD + old, self.head_size, self.page_bytes)[1].clamp(min=1)

    def kept(self, price: Tensor) -> Tensor:
        """Records `[X, E]` bool that are worth their bytes."""
        return self.record_prices > price[:, None]

    def pays(self, losses: Tensor, whole: Tensor, price: Tensor) -> Tensor:
        """Heads `[X]` bool for which a basis is worth its bytes at a price, or that have records in one.

        Args:
            losses: `[P + 1, X, T]`, with it.
            whole: likewise, without.
            price: `[X]`.
        """
        size = torch.tensor([*self.sizes, 0], dtype=torch.float64, device=price.device) / RECORD
        paid = size[:, None, None] * price[:, None]
        gain = (whole + paid).amin(0).sum(1) - (losses + paid).amin(0).sum(1)
        return (gain > price * self.format.basis.record_bytes(self.head_size)) | (self.known > 0).any(1)
