"""A ring holds the queries of the newest tokens by position, whatever steps they were computed in."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.kernels.ring import write_rings

CAPACITY, LAYERS = (6, 4, 9), 2
chunks = st.lists(st.integers(1, 9), min_size=1, max_size=3)


def queries_at(positions: torch.Tensor, request: int, layer: int) -> torch.Tensor:
    """Queries `[n, 3, 5]` that tell request, layer and position apart."""
    channel = torch.arange(15).view(3, 5)
    return channel + 100.0 * positions[:, None, None] + 10000 * request + 0.5 * layer


def empty_ring(capacity: int) -> torch.Tensor:
    return torch.full((LAYERS, capacity, 3, 5), torch.nan)


@settings(max_examples=10)
@given(st.lists(chunks, min_size=1, max_size=3), st.integers(0, 2))
def test_chunks_of_any_size_leave_the_last_positions(requests, unwatched):
    rings = [empty_ring(capacity) for capacity in CAPACITY[: len(requests)]]
    address = [0 if request == unwatched else ring.data_ptr() for request, ring in enumerate(rings)]
    done = [0] * len(requests)
    for step in range(max(map(len, requests))):
        lens = [chunks[step] if step < len(chunks) else 0 for chunks in requests]
        done = [before + length for before, length in zip(done, lens, strict=True)]
        for layer in range(LAYERS):
            parts = [
                queries_at(torch.arange(end - length, end), request, layer)
                for request, (end, length) in enumerate(zip(done, lens, strict=True))
            ]
            write_rings(
                torch.tensor(address),
                torch.tensor(CAPACITY[: len(requests)]),
                layer,
                torch.cat([*parts, torch.full((2, 3, 5), -1.0)]),
                torch.tensor(done, dtype=torch.int32),
                torch.tensor([0, *lens]).cumsum(0).to(torch.int32),
                max(lens),
                max(CAPACITY),
            )
    for request, (ring, length) in enumerate(zip(rings, done, strict=True)):
        if request == unwatched:
            assert ring.isnan().all()
            continue
        capacity = ring.shape[1]
        positions = torch.arange(max(0, length - capacity), length)
        for layer in range(LAYERS):
            assert torch.equal(ring[layer, positions % capacity], queries_at(positions, request, layer))


def test_a_rejected_draft_gives_way_to_the_token_at_its_position():
    ring = empty_ring(6)

    def step(begin: int, end: int, request: int) -> None:
        write_rings(
            torch.tensor([ring.data_ptr()]),
            torch.tensor([6]),
            0,
            queries_at(torch.arange(begin, end), request, 0),
            torch.tensor([end], dtype=torch.int32),
            torch.tensor([0, end - begin], dtype=torch.int32),
            end - begin,
            6,
        )

    step(0, 4, request=1)
    step(4, 7, request=2)  # a token and two drafts, both rejected
    step(5, 6, request=1)
    assert torch.equal(ring[0, 5], queries_at(torch.tensor([5]), 1, 0)[0])
    assert torch.equal(ring[0, 1:4], queries_at(torch.arange(1, 4), 1, 0))
