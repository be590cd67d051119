"""The moments that the kernel keeps are those of all queries before RoPE, whatever steps they came in."""

import pytest
import torch
from paged import pairwise

from vllm_kvcompress.kernels import moments
from vllm_kvcompress.kernels.batch import MOMENT_ROWS, Rows, moment_shape
from vllm_kvcompress.kernels.moments import add_moments

LAYERS, LAYER, POSITIONS = 2, 1, 160
TOLERANCE = dict(atol=2e-3, rtol=2e-5)  # float32: of sums of up to 60 squares
ROTATIONS = {  # rotated elements of the head's, the first of them, neox, scaling
    "neox": (1.0, 0, True, 1.0),
    "interleaved": (1.0, 0, False, 1.3),
    "neox, partial": (0.5, 0, True, 0.8),
    "interleaved, partial": (0.25, 0, False, 1.0),
    "neox, last": (0.5, 0.5, True, 1.0),
    "none": (0.0, 0, True, 1.0),
}
STEPS = {  # of each of two requests, tokens that come at a time
    "chunks": ([37, 1, 1], [1, 1, 40]),
    "decode": ([1, 1, 2], [0, 5, 1]),
}
GRID = {
    "head_size": [64, 80, 128, 16],
    "dtype": [torch.float32, torch.float16, torch.bfloat16],
    "heads": [1, 2],
    "rotation": list(ROTATIONS),
    "skip": [0, 4, 50],
    "steps": list(STEPS),
}


class Requests:
    """Requests whose queries before RoPE are drawn, and what the kernel keeps of them.

    Attributes:
        queries: of each request `[positions, Hq, D]` float64 before RoPE.
        turned: likewise after it, in the dtype.
        moments: of each request.
    """

    def __init__(self, count, head_size, heads, rotation, dtype, far=3.0):
        share, first, self.is_neox, scaling = ROTATIONS[rotation]
        rotated, self.first = int(share * head_size) or 2, int(first * head_size)
        angle = torch.arange(POSITIONS)[:, None] * 100.0 ** (-torch.arange(0, rotated, 2) / rotated)
        self.table = torch.cat([angle.cos(), angle.sin()], 1).mul(scaling).to(dtype)
        if not share:
            self.table = torch.tensor([1.0, 0.0]).expand(POSITIONS, 2)
        shape = POSITIONS, heads, head_size
        drawn = [torch.randn(shape) + far * torch.randn(shape[1:]) for _ in range(count)]
        self.turned = [self._turned(own.double()).to(dtype) for own in drawn]
        # What the dtype has rounded, taken back: the kernel can know no more.
        self.queries = [self._turned(own.double(), back=True) for own in self.turned]
        self.moments = [torch.zeros(LAYERS, *moment_shape(heads, head_size)) for _ in range(count)]

    def _turned(self, vectors, back=False):
        """Every pair of elements turned by its angle, position by position, with 2 x 2 matrices."""
        out, half = vectors.clone(), self.table.shape[1] // 2
        for i in range(half):
            a, b = (i, i + half) if self.is_neox else (2 * i, 2 * i + 1)
            pair = torch.tensor([self.first + a, self.first + b])
            cos, sin = self.table[:, i].double(), self.table[:, half + i].double()
            turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
            turn = turn.inverse() if back else turn
            out[..., pair] = torch.einsum("pij,phj->phi", turn, vectors[..., pair])
        return out

    def step(self, ends, lens, skip, watched=None):
        """Tokens up to `ends`, so many of each request's; two tokens and a row behind them are padding."""
        parts = [own[end - n : end] for own, end, n in zip(self.turned, ends, lens, strict=True)]
        query = torch.cat([*parts, torch.full_like(self.turned[0][:2], 7.0)])
        address = [own.data_ptr() for own in self.moments]
        address = [at * (watched is None or index in watched) for index, at in enumerate(address)]
        padding = [self.moments[0].data_ptr()]  # a row without queries, and never anybody's
        rows = Rows(
            slot=None,
            block_table=None,
            seq_lens=torch.tensor([*ends, 9], dtype=torch.int32),
            query_start_loc=torch.tensor([0, *lens, 0]).cumsum(0).to(torch.int32),
            max_query_len=max(lens),
        )
        skips = torch.full((len(ends) + 1,), skip)
        add_moments(
            torch.tensor(address + padding),
            skips,
            LAYER,
            query,
            rows,
            self.table,
            self.is_neox,
            self.first,
        )

    def assert_kept(self, request, positions):
        """What is kept of a request is mean and covariance of these positions, in two passes."""
        own = self.moments[request]
        heads, size = own.shape[1], own.shape[-1]
        assert not own[1 - LAYER].any(), "another layer's"
        seen = self.queries[request][positions]
        lines = own[LAYER, :, :, :MOMENT_ROWS].flatten(1, 2)
        assert not lines[:, size:].any()
        assert (own[LAYER, :, :, MOMENT_ROWS + 1, 0] == len(seen)).all()
        for head in range(heads):
            mean = seen[:, head].mean(0) if len(seen) else torch.zeros(size)
            centred = seen[:, head] - mean
            for part in own[LAYER, head, :, MOMENT_ROWS]:
                torch.testing.assert_close(part.double(), mean.double(), atol=1e-4, rtol=1e-5)
            scatter = torch.zeros(size, size).double() if not len(seen) else centred.T @ centred
            torch.testing.assert_close(lines[head, :size].double(), scatter, **TOLERANCE)


@pytest.mark.parametrize("case", pairwise(GRID), ids=lambda case: "-".join(map(str, case.values())))
def test_equals_two_passes_in_float64_for_every_pair_of_options(case):
    torch.manual_seed(0)
    steps = list(zip(*STEPS[case["steps"]], strict=True))
    how = (case[name] for name in ("head_size", "heads", "rotation", "dtype"))
    requests = Requests(3, *how)
    done = [0, 40, 0]  # the last one is watched by nobody
    for lens in steps:
        lens = [*lens, 2]
        done = [before + n for before, n in zip(done, lens, strict=True)]
        requests.step(done, lens, case["skip"], watched=(0, 1))
    for request, begin in enumerate((0, 40)):
        requests.assert_kept(request, list(range(max(begin, case["skip"]), done[request])))
    assert not requests.moments[2].any()


def test_a_mean_far_from_the_origin_costs_no_digits():
    """Beside a mean of some hundreds sums of squares would have lost the covariance's."""
    torch.manual_seed(1)
    requests = Requests(1, 16, 1, "none", torch.float32, far=300.0)
    end = 0
    for length in (70, 1, 1, 60):
        end += length
        requests.step([end], [length], 0)
    requests.assert_kept(0, list(range(end)))
    scatter = requests.moments[0][LAYER, 0, 0, :16]
    assert 50 < scatter.diagonal().min() and scatter.diagonal().max() < 400, "of deviations of 1"


@pytest.mark.parametrize(("head_size", "dtype"), [(80, torch.float32), (128, torch.bfloat16)])
@pytest.mark.parametrize("skip", [0, 4, 40, 64])
def test_long_chunks_are_added_up_by_several_programs(monkeypatch, head_size, dtype, skip):
    """Beside short rows, from any place in the batch, with and without what was there before."""
    monkeypatch.setattr(moments, "SEGMENT", 32)
    torch.manual_seed(3)
    requests = Requests(4, head_size, 1, "neox", dtype)
    done = [0, 0, 0, 0]
    for lens in ([70, 1, 33, 3], [64, 32, 65, 2], [1, 97, 20, 1]):
        done = [before + n for before, n in zip(done, lens, strict=True)]
        requests.step(done, lens, skip, watched=(0, 1, 2))
    for request in range(3):
        requests.assert_kept(request, list(range(skip, done[request])))
    assert not requests.moments[3].any()


def test_a_long_chunk_is_added_up_the_same_wherever_it_is_in_a_batch(monkeypatch):
    monkeypatch.setattr(moments, "SEGMENT", 32)
    found = []
    for before in (1, 31, 40, 64):
        torch.manual_seed(4)
        requests = Requests(3, 64, 1, "neox", torch.bfloat16)
        requests.step([before, 100, 20], [before, 100, 20], 4)
        requests.step([before + 1, 103, 110], [1, 3, 90], 4)
        found.append(requests.moments[1:])
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert torch.equal(one, other) and one.isfinite().all()


def test_what_is_kept_is_the_same_to_the_last_bit_beside_other_rows_and_by_fewer_programs(monkeypatch):
    found = []
    for count, programs in ((1, 2048), (3, 2048), (3, 12)):  # of four rows, so three for four parts
        monkeypatch.setattr(moments, "MOST_PROGRAMS", programs)
        torch.manual_seed(2)
        requests = Requests(3, 64, 2, "neox", torch.bfloat16)
        for ends, lens in (([9, 1, 9], [9, 1, 9]), ([10, 2, 10], [1, 1, 1])):
            requests.step(ends, lens, 4, watched=range(count))
        found.append(requests.moments[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert found[0][LAYER, 0, 0, -1, 0] == 6 and found[0].isfinite().all()
