"""Requests that decode in one batch leave the records that each would leave alone."""

import dataclasses

import pytest
import torch
from compaction import Request
from test_compactor import configure

from vllm_kvcompress.requests import observer
from vllm_kvcompress.requests.observer import DecodingSpan
from vllm_kvcompress.worker.work import Work

NAMES = "abc"


def requests(config, others=(None, None, None)) -> list[Request]:
    """Three of different length, of which one is compacted to runs of different length."""
    made = []
    for seed, tokens in enumerate((21, 78, 22)):
        request = Request(30 + seed)
        if made:
            request.move_in_with(made[0])
        request.observer.watch("r", others[seed] or config.build_policy())
        request.compute(tokens)
        made.append(request)
    compact(made[1], config, 9)
    return made


def compact(request: Request, config, num_blocks: int) -> None:
    job = request.job(config, num_blocks, 3)
    (table,) = request.compactor.run([Work(job, request.observer.tables.get("r"), request.observer.of("r"))])
    request.observer.tables["r"] = table
    request.boundary, request.destination = job.boundary, list(job.destination)
    for index in range(job.previous_boundary // 4, job.boundary // 4):
        request.raw.pop(index)


def decode(together: list[Request], drafts: dict[str, int] | None = None) -> list:
    """A step in which each request computes a token, or several if it has drafts; its spans."""
    drafts = drafts or {}
    observer = dataclasses.replace(
        together[0].observer,
        tables={
            n: r.observer.tables["r"]
            for n, r in zip(NAMES, together, strict=True)
            if "r" in r.observer.tables
        },
        num_drafts=drafts,
        _observed={n: r.observer.of("r") for n, r in zip(NAMES, together, strict=True)},
    )
    lengths = [1 + drafts.get(name, 0) for name in NAMES]
    for request, length in zip(together, lengths, strict=True):
        request.write(length)
    block_table = torch.stack([request.block_table(30) for request in together])
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    seq_lens = torch.tensor([request.num_tokens for request in together])
    spans = observer.spans(list(NAMES), bounds, seq_lens, block_table)
    for layer in range(3):
        own = [
            r.queries[layer, r.num_tokens - n : r.num_tokens] for r, n in zip(together, lengths, strict=True)
        ]
        for span in spans:
            span.record(layer, torch.cat(own))
    return spans


def alike(one: list[Request], other: list[Request]) -> None:
    for a, b in zip(one, other, strict=True):
        for ours, theirs in zip(a.observer.of("r").states, b.observer.of("r").states, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["h2o", "kv_compress_full"])
def test_rows_of_one_token_are_observed_together(method):
    config = configure(method, "global")
    alone, together = requests(config), requests(config)
    lengths = together[1].observer.tables["r"].counts.amax(1).tolist()
    assert len(set(lengths)) > 1 and min(lengths) > 7, "layers have other widths, which this request decides"
    for number in range(11):
        for request in alone:
            request.compute(1)
        (span,) = decode(together)
        assert isinstance(span, DecodingSpan) and len(span.rows) == 3
        alike(alone, together)
        if number == 6:  # what is compacted in between goes on
            for some in (alone, together):
                compact(some[0], config, 5)
                compact(some[1], config, 8)


@pytest.mark.parametrize(("less", "sizes"), [(0, [2, 1]), (1, [1, 1, 1])])
def test_so_many_are_observed_together_as_there_is_memory_for_keys(less, sizes, monkeypatch):
    config = configure("h2o", "global")
    alone, together = requests(config), requests(config)
    for request in alone:
        request.compute(1)
    cache = together[0].compactor.cache
    of_short = 6 * 4 * cache.grid.num_heads * cache.head_size * 4  # 22 or 23 tokens in pages of 4, in float32
    monkeypatch.setattr(observer, "KEY_BYTES", 2 * of_short - less)
    spans = decode(together)
    assert [len(getattr(span, "rows", [span])) for span in spans] == sizes
    alike(alone, together)


def test_each_layer_has_its_own_constants_and_other_policies_and_drafts_go_alone():
    config = configure("h2o", "global")
    squared = configure("kv_compress_full", "global").build_policy()
    alone, together = (requests(config, (None, squared, None)) for _ in range(2))
    for some in (alone, together):
        for request in some:
            request.layers[:] = [
                dataclasses.replace(layer, scale=0.1 + index, logits_soft_cap=3.0 * index)
                for index, layer in enumerate(request.layers)
            ]
    for request in alone:
        request.compute(1)
    spans = decode(together)
    assert [len(getattr(span, "rows", [span])) for span in spans] == [2, 1]
    alike(alone, together)
    for request, drafts in zip(alone, (2, 0, 0), strict=True):
        request.compute(1 + drafts, num_drafts=drafts)
    spans = decode(together, {"a": 2})
    assert not any(isinstance(span, DecodingSpan) for span in spans)
    alike(alone, together)
    for some in (alone, together):
        some[0].num_tokens -= 2  # rejected
    for request in alone:
        request.compute(1)
    assert not any(isinstance(span, DecodingSpan) for span in decode(together)), "some drafts wait"
    alike(alone, together)
