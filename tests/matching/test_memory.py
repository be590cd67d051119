"""Memory: what is stated is enough, and not far above what is taken."""

from dataclasses import replace

import pytest
import torch
from allocated import measured
from plain_attention import draw

from vllm_kvcompress.matching import (
    Own,
    attend,
    finish,
    fit,
    fit_by_parts,
    memory,
    peak_bytes,
    reference,
    select_by_parts,
    select_highest,
    select_omp,
)
from vllm_kvcompress.matching import parts as parts_module


@pytest.mark.parametrize("omp", [False, True])
@pytest.mark.parametrize("features", ["plain", "all"])
@pytest.mark.parametrize(
    ("heads", "tokens", "queries", "columns", "size"),
    [(2, 1500, 256, 32, 32), (4, 400, 100, 160, 16), (2, 300, 700, 50, 64)],
)
def test_stated_memory_suffices(tmp_path, heads, tokens, queries, columns, size, features, omp):
    problem = draw(heads, tokens, queries, size, features)
    names = ("keys", "values", "queries")
    problem = replace(problem, **{name: getattr(problem, name).bfloat16() for name in names})
    wanted = torch.full((heads,), columns)

    def solve():
        reference = attend(problem, chunk_bytes=2**20)
        if omp:
            return fit(problem, reference, *select_omp(problem, reference, wanted, chunk_bytes=2**20))
        return fit(problem, reference, *select_highest(problem, reference, wanted))

    stated = peak_bytes(heads, tokens, queries, columns, size, omp=omp, chunk_bytes=2**20)
    taken = measured(tmp_path / "trace.json", solve)
    assert taken <= stated <= 2 * taken


@pytest.mark.parametrize("omp", [False, True])
def test_as_many_parts_as_memory_is_meant_for_are_solved_for_together(tmp_path, monkeypatch, omp):
    """Of which a chunk of the logits of all tokens, before the parts, is none."""
    heads, tokens, queries, columns, size, room, chunk = 2, 2000, 400, 120, 32, 2**23, 2**18
    monkeypatch.setattr(memory, "SOLVE_BYTES", room)
    monkeypatch.setattr(reference, "CHUNK_BYTES", chunk)
    problem = draw(heads, tokens, queries, size, "plain")
    kept = torch.arange(0, tokens, tokens // columns)[:columns].expand(heads, -1).contiguous()
    own, present = Own(problem.queries[:, :columns]), torch.ones_like(kept, dtype=torch.bool)
    counted = []

    def at_once(*shape, **options):
        counted.append(memory.parts_at_once(*shape, **options))
        return counted[-1]

    def solve():
        if omp:
            return finish(select_by_parts(problem, own, kept, present, 100))
        return finish(fit_by_parts(problem, own, kept, present, 100))

    monkeypatch.setattr(parts_module, "parts_at_once", at_once)
    taken = measured(tmp_path / "trace.json", solve)
    assert 1 < counted[0] < 20
    assert room / 3 <= taken <= room
