"""A ring holds the queries of the newest tokens by position, whatever steps they were computed in."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.attention.kernels.ring import write_ring

CAPACITY, LAYERS = 6, 2
chunks = st.lists(st.integers(1, 9), min_size=1, max_size=3)


def queries_at(positions: torch.Tensor, request: int, layer: int) -> torch.Tensor:
    """Queries `[n, 3, 5]` that tell request, layer and position apart."""
    channel = torch.arange(15).view(3, 5)
    return channel + 100.0 * positions[:, None, None] + 10000 * request + 0.5 * layer


@settings(max_examples=10)
@given(st.lists(chunks, min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_chunks_of_any_size_leave_the_last_positions(requests, random):
    slots = random.sample(range(5), len(requests))
    slots[0] = -1  # nobody watches the first one
    ring = torch.full((5, LAYERS, CAPACITY, 3, 5), torch.nan)
    done = [0] * len(requests)
    for step in range(max(map(len, requests))):
        lens = [chunks[step] if step < len(chunks) else 0 for chunks in requests]
        done = [before + length for before, length in zip(done, lens, strict=True)]
        for layer in range(LAYERS):
            parts = [
                queries_at(torch.arange(end - length, end), request, layer)
                for request, (end, length) in enumerate(zip(done, lens, strict=True))
            ]
            write_ring(
                ring,
                layer,
                torch.cat([*parts, torch.full((2, 3, 5), -1.0)]),
                torch.tensor(slots, dtype=torch.int32),
                torch.tensor(done, dtype=torch.int32),
                torch.tensor([0, *lens]).cumsum(0).to(torch.int32),
                max(lens),
            )
    for request, (slot, length) in enumerate(zip(slots, done, strict=True)):
        if slot < 0:
            continue
        positions = torch.arange(max(0, length - CAPACITY), length)
        for layer in range(LAYERS):
            assert torch.equal(ring[slot, layer, positions % CAPACITY], queries_at(positions, request, layer))
    unwatched = [slot for slot in range(5) if slot not in slots]
    assert ring[unwatched].isnan().all()


def test_a_rejected_draft_gives_way_to_the_token_at_its_position():
    ring = torch.zeros(1, 1, CAPACITY, 3, 5)

    def step(begin: int, end: int, request: int) -> None:
        write_ring(
            ring,
            0,
            queries_at(torch.arange(begin, end), request, 0),
            torch.zeros(1, dtype=torch.int32),
            torch.tensor([end], dtype=torch.int32),
            torch.tensor([0, end - begin], dtype=torch.int32),
            end - begin,
        )

    step(0, 4, request=1)
    step(4, 7, request=2)  # a token and two drafts, both rejected
    step(5, 6, request=1)
    assert torch.equal(ring[0, 0, 5], queries_at(torch.tensor([5]), 1, 0)[0])
    assert torch.equal(ring[0, 0, 1:4], queries_at(torch.arange(1, 4), 1, 0))
