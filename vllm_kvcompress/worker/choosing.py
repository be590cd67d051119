"""What stays of a request that is compacted to records, and in which part of its format."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.allocation import Global, Profile
from vllm_kvcompress.formats import RECORD, Format, Latent, Mixed, MixedDim
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.requests.cache import PagedCache
from vllm_kvcompress.worker.candidates import Candidates
from vllm_kvcompress.worker.room import Room
from vllm_kvcompress.worker.scoring import Scoring
from vllm_kvcompress.worker.work import Task


@dataclass(frozen=True)
class Choice:
    """What stays of what one request holds.

    Attributes:
        old: `[X, E]` bool, records.
        raw: `[X, n]` int64, the part of the format that each raw token is written in, -1 for none; None for
            all of them in the only one.
        num_pages: `[X]` int64, of each head; None for what that needs.
    """

    old: Tensor
    raw: Tensor | None = None
    num_pages: Tensor | None = None


class Choosing:
    """Chooses what stays, by a policy's scores or by what it says that tokens lose."""

    def __init__(self, cache: PagedCache, room: Room, scoring: Scoring) -> None:
        self._cache, self._grid, self._room, self._scoring = cache, cache.grid, room, scoring

    def choose(self, task: Task, held: Candidates, format: Format, num_raw: int) -> Choice:
        """What stays in so many blocks, and the pages of each head.

        A record stays or goes as a whole: each of its tokens counts as their mean. Raw tokens come in
        thirty-twos, the best first.
        """
        job = task.work.job
        old, parts = held.old, format.parts
        if job.config.keeps_all and len(parts) == 1:
            return Choice(old >= 0)
        scores, width = self._scoring.scores([task], held), old.shape[1]
        pages = self._pages_by_scores(task, held, scores, format, num_raw)
        if not isinstance(format, Mixed):
            present = (old >= 0).sum(1) + num_raw // RECORD
            num_units = torch.minimum(pages * self._cache.records_per_page(parts[0]), present)
            keep_old, keep_raw = _best_units(scores, width, num_units)
            return Choice(keep_old, keep_raw.long() - 1, pages)
        units, order = _units(scores, width)
        written = old if held.parts is None else held.parts
        known = torch.cat([written.masked_fill(old < 0, -2), torch.full_like(units[:, width:], -1).long()], 1)
        sizes = [part.record_bytes(self._cache.head_size) for part in parts]
        chosen = format.choose(units, known, pages, sizes, self._cache.content.shape[1])
        of_raw = chosen[:, width:].repeat_interleave(RECORD, 1)
        return Choice(chosen[:, :width] >= 0, torch.empty_like(order).scatter_(1, order, of_raw), pages)

    def _pages_by_scores(
        self,
        task: Task,
        held: Candidates,
        scores: Tensor,
        format: Format,
        num_raw: int,
    ) -> Tensor:
        """The pages `[X]` of each head as the allocation splits them; a policy may refine the scores then."""
        job, parts = task.work.job, format.parts
        old, width = held.old, held.old.shape[1]
        shape = self._grid.num_layers, self._grid.num_heads
        present = ((old >= 0).sum(1) + num_raw // RECORD).view(shape)
        alike = _of_records(scores, width).repeat_interleave(RECORD, 1)
        whole = torch.cat([alike, scores[:, width * RECORD :]], 1).view(*shape, -1)
        pages, tokens = [], []
        for layers, allocation in self._room.split(job.config.build_allocation()):
            most = self._room.pages_of(task.work.num_blocks, layers)
            per_page = self._cache.records_per_page(parts[format.typical])
            capacity = (present[layers] + per_page - 1) // per_page
            if (total := int(capacity.sum())) < most and len(parts) > 1:  # there is room for the best part
                per_page = self._cache.records_per_page(parts[0])
                capacity = (present[layers] + per_page - 1) // per_page
                total = int(capacity.sum())
            in_page = per_page * RECORD
            missing = -whole.shape[2] % in_page  # pages need not be full
            # Pages that are not full have room for what would else need new ones.
            padded = torch.nn.functional.pad(whole[layers], (missing, 0), value=-torch.inf)
            counts = allocation.allocate(padded, min(most, total), in_page, capacity)
            pages.append(counts), tokens.append(counts * in_page)
        if type(task.policy).refine is not Policy.refine:
            self._scoring.refine([task], held, scores, torch.cat(tokens)[None])
        return torch.cat(pages).flatten()

    def choose_ranks(
        self, task: Task, held: Candidates, errors: Tensor, format: MixedDim, num_raw: int
    ) -> Choice:
        """What stays and in how many coordinates, by what each token would lose, and the pages of each head.

        Of `bases.with_bases` are what is held, and the errors.

        With a policy that says losses of its own the heads share the bytes by them, if the allocation is
        `global`; if it is `profile`, by losses times a head's share. Any other allocation splits pages by
        the scores, as for every format.
        """
        job, old, size = task.work.job, held.old, self._cache.head_size
        known = old if held.parts is None else held.parts.masked_fill(old < 0, -1)
        scores, width = self._scoring.scores([task], held), old.shape[1]
        allocation = job.config.build_allocation()
        protected = scores.isposinf()
        together = task.policy.gives_losses and isinstance(allocation, Global | Profile)
        num_blocks, split = task.work.num_blocks, None
        if not together:
            split = self._pages_by_scores(task, held, scores, format, num_raw)
        if task.policy.gives_losses:
            losses = self._losses(task, held, format)
            for layers, own in self._room.split(allocation):
                if isinstance(own, Profile):
                    own.check_model(layers.stop - layers.start, self._grid.num_heads)
                    weight = own.importance(job.config.budget or 1.0, losses.device).flatten()
                    losses[:, : len(weight)] *= weight[:, None]
        else:
            alike = _of_records(scores, width).repeat_interleave(RECORD, 1)
            losses = format.losses_by_rank(torch.cat([alike, scores[:, width * RECORD :]], 1), errors)
        limit = torch.finfo(torch.float32).max
        losses = losses.nan_to_num(0.0, limit, 0.0).clamp(min=0)
        of_records = losses[-1][:, : width * RECORD].unflatten(1, (width, RECORD)).sum(2)
        if not task.policy.gives_losses:  # what a record still has of its tokens
            of_records = of_records * (1 - errors.T.gather(1, known.clamp(min=0)))
        kept = protected[:, : width * RECORD].unflatten(1, (width, RECORD)).any(2)
        of_records = of_records.masked_fill(kept, torch.inf)
        of_raw = losses[:, :, width * RECORD :]
        of_raw[1:].masked_fill_(protected[:, width * RECORD :], torch.inf)
        page_bytes, chosen = self._cache.content.shape[1], []
        for layers, _ in self._room.split(allocation):
            rows = self._grid.rows(layers)
            pages = self._room.pages_of(num_blocks, layers) if split is None else split[rows]
            own = of_raw[:, rows], of_records[rows], known[rows]
            chosen.append(format.choose(*own, pages, size, page_bytes))
        return Choice(*(torch.cat(each) for each in zip(*chosen, strict=True)))

    def _losses(self, task: Task, held: Candidates, format: MixedDim) -> Tensor:
        """What the policy says of all heads' columns, `[P + 1, X, T]` float64."""
        assert held.bases is not None
        shape = len(format.parts) + 1, len(held.pages), held.num_scored
        losses = torch.zeros(shape, dtype=torch.float64, device=self._cache.device)
        for part in self._scoring.slices(task, task.policy):
            rows = self._grid.rows(part.layers)
            bases = [
                own.bases(held.bases[rows], self._cache.head_size)
                for own in format.parts
                if isinstance(own, Latent)
            ]
            seen = self._scoring.observe(task.policy, task, part)
            losses[1:, rows, held.num_scored - part.num_scored :] = task.policy.losses(seen, bases).double()
        return losses


def _of_records(scores: Tensor, width: int) -> Tensor:
    """Scores `[X, width]` of records, whose tokens `[X, 32·width]` come first: their means."""
    return _means(scores[:, : width * RECORD].unflatten(1, (width, RECORD)))


def _means(scores: Tensor) -> Tensor:
    """The means of 32 scores each, which may be the lowest numbers that there are."""
    return (scores / RECORD).sum(-1)


def _units(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The units of each head: its records, and its raw tokens by thirty-twos, the best first.

    Args:
        scores: `[X, 32·width + T]`, of the tokens in records and of the raw ones; T a multiple of 32.
        width: records.

    Returns:
        `[X, width + T/32]`, the means of their scores; `[X, T]` int64, the raw tokens, the best first.
    """
    raw = scores[:, width * RECORD :]
    order = raw.argsort(dim=1, descending=True, stable=True)
    of_raw = _means(raw.gather(1, order).unflatten(1, (-1, RECORD)))
    return torch.cat([_of_records(scores, width), of_raw], 1), order


def _best_units(scores: Tensor, width: int, num_units: Tensor) -> tuple[Tensor, Tensor]:
    """The best units of each head.

    Args:
        scores: as of `_units`.
        width: likewise.
        num_units: `[X]` int64, how many units each head keeps.

    Returns:
        `[X, width]` bool, the records; `[X, T]` bool, the raw tokens.
    """
    units, order = _units(scores, width)
    ranked = units.argsort(dim=1, descending=True, stable=True)
    best = torch.arange(units.shape[1], device=units.device) < num_units[:, None]
    keep = torch.zeros_like(best).scatter_(1, ranked, best)
    num_new = keep[:, width:].sum(1, keepdim=True) * RECORD
    first = torch.arange(order.shape[1], device=order.device) < num_new
    return keep[:, :width], torch.zeros_like(first).scatter_(1, order, first)
