"""MixedDimKV's records, bases and ranks: against NumPy, and against every choice that there is."""

import itertools

import numpy as np
import pytest
import torch
from formats.test_base import draw
from formats.test_mixed import walked

from vllm_kvcompress.formats import FORMATS, RECORD
from vllm_kvcompress.formats.mixed_dim import Basis, Latent, MixedDim, Vectors

FORMAT = FORMATS["mixed_dim"]
SIZES = [16, 48, 64, 80, 128, 256]


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers far from 0, along directions of their own, of which some matter more."""
    turn = torch.linalg.qr(draw(shape[-1], shape[-1], seed=seed + 9))[0]
    return draw(*shape, seed=seed, channels=1.0) @ turn + 3 * draw(shape[-1], seed=seed + 5)


def directions(data: torch.Tensor, rank: int) -> np.ndarray:
    """The projection on the first right singular vectors of `[n, D]`."""
    rows = np.linalg.svd(data.double().numpy(), full_matrices=False)[2][:rank]
    return rows.T @ rows


# ------------------------------------------------------------------ records


@pytest.mark.parametrize("head_size", SIZES)
def test_records_take_the_bytes_of_their_coordinates(head_size):
    assert Vectors().record_bytes(head_size) == 2 * 32 * head_size * 2
    assert Latent(4).record_bytes(head_size) == 2 * 32 * (head_size // 4) * 2
    assert Latent(8).record_bytes(head_size) == 2 * 32 * (head_size // 8) * 2
    assert Basis().record_bytes(head_size) == 2 * head_size * (head_size // 4) * 2
    assert [part.record_bytes(head_size) for part in FORMAT.parts] == [
        Vectors().record_bytes(head_size),
        Latent(4).record_bytes(head_size),
        Latent(8).record_bytes(head_size),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_full_vectors_are_exact(dtype):
    keys, values = (tokens(3, 32, 64, seed=seed).to(dtype) for seed in (0, 1))
    read = Vectors().decode(Vectors().encode(keys, values), 64)
    assert torch.equal(read[0], keys.float()) and torch.equal(read[1], values.float())


@pytest.mark.parametrize("head_size", SIZES)
@pytest.mark.parametrize("part", [Latent(4), Latent(8)])
def test_a_latent_is_the_projection_on_the_longest_directions(head_size, part):
    keys, values = tokens(400, head_size), tokens(400, head_size, seed=1)
    basis = Basis().encode(keys, values)
    assert basis.shape == (Basis().record_bytes(head_size),)
    ours = keys[:64].view(2, 32, -1), values[:64].view(2, 32, -1)
    record = part.encode(*ours, basis)
    assert record.shape == (2, part.record_bytes(head_size))
    for read, plain, all_ in zip(part.decode(record, head_size, basis), ours, (keys, values), strict=True):
        expected = plain.double().numpy() @ directions(all_, part.rank(head_size))
        error = np.abs(read.numpy() - expected).max() / np.abs(expected).max()
        assert error < 3e-3
        assert np.abs(plain.numpy() - expected).max() > 1e-2, "something is left out"


def test_each_record_may_have_a_basis_of_its_own():
    keys, values = tokens(2, 300, 64), tokens(2, 300, 64, seed=1)
    bases = Basis().encode(keys, values)
    some = keys[:, :32], values[:, :32]
    both = Latent(4).encode(*some, bases)
    assert torch.equal(bases[1], Basis().encode(keys[1], values[1]))
    for head in range(2):
        own = Latent(4).encode(some[0][head], some[1][head], bases[head])
        torch.testing.assert_close(own.view(torch.float16), both[head].view(torch.float16), atol=0, rtol=2e-3)
    assert not torch.equal(bases[0], bases[1])


@pytest.mark.parametrize("odd", [torch.inf, torch.nan, -3e38, 65520.0])
def test_whatever_is_written_is_read_as_finite(odd):
    keys, values = tokens(64, 64), tokens(64, 64, seed=1)
    for each in keys, values:
        each[5, 7], each[9] = odd, odd
    basis = Basis().encode(keys, values)
    assert basis.view(torch.float16).isfinite().all()
    for part in FORMAT.parts:
        own = [basis] * isinstance(part, Latent)
        for read in part.decode(part.encode(keys[:32], values[:32], *own), 64, *own):
            assert read.isfinite().all()


def test_what_ranks_leave_out_is_measured_beside_the_mean_of_keys():
    keys, values = tokens(500, 64), tokens(500, 64, seed=1)
    basis = Basis().encode(keys, values)[None]
    moments = [(own.double().T @ own.double())[None] for own in (keys, values)]
    errors = FORMAT.errors(*moments, keys.double().mean(0)[None], 500, basis)
    assert errors.shape == (3, 1) and errors[0] == 0
    for part, found in zip(FORMAT.parts[1:], errors[1:, 0].tolist(), strict=True):
        left = 0.0
        for data, centre in ((keys.double().numpy(), keys.double().numpy().mean(0)), (values.numpy(), 0)):
            kept = data @ directions(torch.from_numpy(np.asarray(data)), part.rank(64))
            left += ((data - kept) ** 2).sum() / ((data - centre) ** 2).sum()
        assert found == pytest.approx(min(left, 1), rel=2e-2)
    assert 0 < errors[1] < errors[2] <= 1


@pytest.mark.parametrize(
    ("counts", "bases"), [([3, 0, 0], False), ([0, 1, 0], True), ([2, 0, 5], True), ([0, 0, 0], False)]
)
def test_a_run_begins_with_its_basis_if_a_record_needs_it(counts, bases):
    page_bytes = 4 * 32 * 64 * 2
    first, pages = FORMAT.arrange(torch.tensor(counts)[:, None], 64, page_bytes)
    sizes = [Basis().record_bytes(64)] * bases + [part.record_bytes(64) for part in FORMAT.parts]
    places, needed = walked([1] * bases + counts, sizes, page_bytes)
    assert int(pages) == needed
    if bases:
        assert places[0][0] == (0, page_bytes % sizes[0])
    for part, own, size in zip(range(3), places[bases:], sizes[bases:], strict=True):
        per_page = page_bytes // size
        for number, (page, begin) in enumerate(own):
            place = int(first[part, 0]) + number
            assert (place // per_page, page_bytes - (per_page - place % per_page) * size) == (page, begin)


def test_pages_must_hold_the_basis_and_more_tokens_than_raw():
    raw = 2 * 64 * 2  # bytes of a token
    assert FORMAT.holds_more(32 * raw, 64, 32) and not FORMAT.holds_more(16 * raw, 64, 16)
    wide = 2 * 256 * 2
    assert FORMAT.holds_more(64 * wide, 256, 64) and not FORMAT.holds_more(32 * wide, 256, 32)


# -------------------------------------------------------------------- ranks


def in_groups(groups: int, heads: int, seed: int, protected: int = 0) -> torch.Tensor:
    """Losses `[4, X, T]` of thirty-twos whose tokens lose the same."""
    generator = torch.Generator().manual_seed(seed)
    dropped = torch.rand(heads, groups, generator=generator).double() ** 3 * 10
    shorter = torch.rand(2, heads, groups, generator=generator).double().sort(0).values
    losses = torch.stack([0 * dropped, *(shorter * dropped), dropped])
    losses[1:, :, :protected] = torch.inf
    return losses.repeat_interleave(RECORD, 2)


def spent(choice, known=()) -> int:
    sizes = [part.record_bytes(64) for part in FORMAT.parts]
    own = [*choice, *known]
    basis = Basis().record_bytes(64) if any(part > 0 for part in own) else 0
    return basis + sum(sizes[part] for part in own if part >= 0)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("protected", [0, 1])
def test_no_other_choice_of_as_many_bytes_loses_less(seed, protected):
    page_bytes = 2 * 32 * 64 * 2 * 2
    losses = in_groups(5, 1, seed, protected)
    seen, best = set(), False
    for pages in (1, 2, 3):
        none = torch.zeros(1, 0)
        _, part, _ = FORMAT.choose(losses, none.double(), none.long(), torch.tensor([pages]), 64, page_bytes)
        chosen = part[0].view(5, RECORD)
        assert (chosen == chosen[:, :1]).all()
        chosen = chosen[:, 0].tolist()
        assert chosen[:protected] == [0] * protected
        seen |= set(chosen)
        bytes_ = spent(chosen)
        assert bytes_ <= pages * page_bytes
        of_group = losses[:, 0, ::RECORD]

        def lost(choice):
            return sum(float(of_group[part, group]) for group, part in enumerate(choice))  # noqa: B023

        others = [other for other in itertools.product((0, 1, 2, -1), repeat=5) if spent(other) <= bytes_]
        alike = [other for other in others if (max(other) > 0) == (max(chosen) > 0)]
        assert lost(chosen) == pytest.approx(min(map(lost, alike)))
        best |= lost(chosen) == pytest.approx(min(map(lost, others)))
        whole = torch.stack([losses[0], *[losses[3]] * 3])
        _, plain, _ = FORMAT.choose(whole, none.double(), none.long(), torch.tensor([pages]), 64, page_bytes)
        assert lost(chosen) <= lost(plain[0, ::RECORD].tolist()) + 1e-9, "with a basis or without, the better"
    assert 0 in seen and len(seen) > 1 and best


def test_a_head_goes_without_a_basis_that_is_not_worth_its_bytes():
    losses = in_groups(6, 2, 3)
    losses[1:3, 0] = losses[3, 0]  # in the first head nothing is left in fewer coordinates
    none = torch.zeros(2, 0)
    _, part, _ = FORMAT.choose(losses, none.double(), none.long(), torch.tensor([2, 2]), 64, 4 * 32 * 64 * 2)
    assert set(part[0].tolist()) == {0, -1} and set(part[1].tolist()) & {1, 2}


def test_records_stay_as_they_are_or_go_and_protected_ones_stay():
    losses = in_groups(4, 1, 1)
    of_records = torch.tensor([[torch.inf, 1e-9, 50.0, 1e9]], dtype=torch.float64)
    known = torch.tensor([[0, 1, 2, -1]])
    keep, part, _ = FORMAT.choose(losses, of_records, known, torch.tensor([3]), 64, 2 * 32 * 64 * 2 * 2)
    assert keep.tolist() == [[True, False, True, False]]
    assert spent(part[0, ::RECORD].tolist(), [0, 2]) <= 3 * 2 * 32 * 64 * 2 * 2


def test_heads_share_bytes_by_what_they_would_lose():
    losses, none = in_groups(40, 6, 5), torch.zeros(6, 0)
    losses[:, :3] *= 100
    page_bytes, pages = 4 * 32 * 64 * 2, 60
    _, together, own = FORMAT.choose(losses, none.double(), none.long(), pages, 64, page_bytes)
    assert own.sum() <= pages and own.min() >= 1
    assert pages - own.sum() < 6 and own[:3].sum() > own[3:].sum()
    even = torch.full((6,), pages // 6)
    _, apart, _ = FORMAT.choose(losses, none.double(), none.long(), even, 64, page_bytes)

    def lost(part):
        return float(losses.gather(0, (part % 4)[None]).sum())  # -1 is the last one

    assert lost(together) < lost(apart)
    for part, room in zip(together[:, ::RECORD].tolist(), own.tolist(), strict=True):
        assert spent(part) <= room * page_bytes


@pytest.mark.parametrize("seed", range(4))
def test_tokens_of_a_rank_come_in_thirty_twos_and_fill_their_pages(seed):
    generator = torch.Generator().manual_seed(seed)
    dropped = torch.rand(3, 640, generator=generator).double() ** 6
    losses = torch.stack([0 * dropped, 0.1 * dropped, 0.4 * dropped, dropped])
    losses[1:, :, :4] = torch.inf
    page_bytes, room = 4 * 32 * 64 * 2, torch.tensor([2, 7, 90])
    none = torch.zeros(3, 0)
    _, part, pages = FORMAT.choose(losses, none.double(), none.long(), room, 64, page_bytes)
    assert torch.equal(pages, room)
    for own, most, lost in zip(part, room.tolist(), losses[-1], strict=True):
        counts = [int((own == each).sum()) for each in (0, 1, 2)]
        assert all(count % RECORD == 0 for count in counts) and (own[:4] == 0).all()
        counts = [count // RECORD for count in counts]
        basis = [1] if any(counts[1:]) else []
        sizes = [Basis().record_bytes(64)] * len(basis) + [each.record_bytes(64) for each in FORMAT.parts]
        assert walked(basis + counts, sizes, page_bytes)[1] <= most
        if most < 90:
            filled = sum(n * size for n, size in zip(basis + counts, sizes, strict=True))
            assert filled > most * page_bytes - max(sizes)
        else:
            assert (own == 0).all()
        by_loss = lost[4:].argsort(descending=True)
        ranks = [3 if each < 0 else each for each in own[4:][by_loss].tolist()]
        assert ranks == sorted(ranks), "who loses more has more coordinates"


def test_few_protected_tokens_have_a_record_though_full_vectors_are_not_worth_it():
    losses = torch.full((4, 1, 320), 1.0, dtype=torch.float64) * torch.rand(320).double()
    losses *= torch.tensor([0, 1e-4, 2e-4, 1]).double()[:, None, None]
    losses[1:, :, 7:9] = torch.inf
    none = torch.zeros(1, 0)
    _, part, _ = FORMAT.choose(losses, none.double(), none.long(), torch.tensor([1]), 64, 3 * 8192)
    assert (part[0, 7:9] == 0).all() and int((part == 0).sum()) == RECORD
    assert int((part > 0).sum()) > 6 * RECORD


def test_scores_alone_rank_by_importance_and_error():
    scores = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))
    errors = torch.tensor([[0.0, 0.0], [0.2, 0.5], [0.6, 1.0]]).double()
    losses = MixedDim().losses_by_rank(scores, errors)
    for head in range(2):
        order = sorted(range(96), key=lambda token: -float(scores[head, token]))
        for place, token in enumerate(order):
            importance = 1 / (place // 32 + 1)
            wanted = [importance * float(error) for error in (*errors[:, head], 1)]
            assert losses[:, head, token].tolist() == pytest.approx(wanted)
