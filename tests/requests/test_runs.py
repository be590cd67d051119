"""Slots of compacted requests: each has one of its own, which is there again once the request is gone."""

import random

import torch

from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.requests.runs import RunArrays
from vllm_kvcompress.requests.tables import RequestTable

GRID = PageGrid(num_layers=2, num_blocks=50, num_heads=3, block_size=4)


def table(draw: random.Random, num_blocks: int) -> RequestTable:
    counts = torch.ones(2, 3, dtype=torch.int64)
    for _ in range(6 * (num_blocks - 1)):
        counts[draw.randrange(2), draw.randrange(3)] += 1
    destination = torch.tensor(draw.sample(range(1, 50), num_blocks))
    return RequestTable(GRID, destination, counts, 4 * draw.randrange(10, 20), None)


def test_every_slot_is_used_again_and_shows_its_request_alone():
    draw, runs, held = random.Random(0), RunArrays(GRID, 3, 5, torch.device("cpu")), {}
    for number in range(200):
        if len(held) == 3 or (held and draw.random() < 0.4):
            name = draw.choice(sorted(held))
            runs.drop(name)
            del held[name]
        else:
            name = draw.choice([*held, f"r{number}"])  # a new one, or one that is compacted again
            held[name] = table(draw, draw.randrange(1, 6))
            runs.put(name, held[name])
        runs.drop("nobody")
        assert set(runs.slots) == set(held) and len(set(runs.slots.values())) == len(held)
        for name, own in held.items():
            slot = runs.slots[name]
            assert 0 <= slot < 3
            assert runs.arrays.destination[slot, : len(own.destination)].tolist() == own.destination.tolist()
            assert runs.arrays.start[slot].tolist() == [0, *own.counts.flatten().cumsum(0).tolist()]
            assert int(runs.arrays.boundary[slot]) == own.boundary
