"""Requests that wait for memory for their queries start in the order in which they came, and all do."""

import vllm
from harness import WINDOW, Engine, external_id, sampling

from vllm_kvcompress.plan import SPARE_QUERIES

RING = WINDOW + SPARE_QUERIES
NEEDS_NONE = "streaming_llm:budget=0.25"
LOOKS_PAST = not vllm.__version__.startswith("0.32.")  # those that cannot start, at those behind them


def start_order(engine: Engine, requests: dict[str, tuple[list[int], str]]) -> list[str]:
    """Names of requests in the order in which they start."""
    for name, (prompt, option) in requests.items():
        engine.add(prompt, sampling(4, option), name)
    started: dict[str, None] = {}
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        started |= dict.fromkeys(external_id(request.request_id) for request in engine.scheduler.running)
    return list(started)


def test_nobody_who_needs_a_ring_overtakes_one_that_waits_for_one(engine, long_ids, monkeypatch):
    monkeypatch.setattr(engine.scheduler._rings, "budget", 2 * RING)
    options = {
        "first": "snapkv:budget=0.25",
        "large": f"snapkv:budget=0.25,window={WINDOW + RING}",  # does not fit beside the first
        "small": "snapkv:budget=0.25",  # would
        "none": NEEDS_NONE,
        "off": "off",
        "last": "adakv:budget=0.25",
    }
    requests = {
        name: (long_ids(600, seed=70 + index), option) for index, (name, option) in enumerate(options.items())
    }
    order = start_order(engine, requests)
    assert sorted(order) == sorted(options), "all of them start"
    assert [name for name in order if name not in ("none", "off")] == ["first", "large", "small", "last"]
    # Who needs none starts where vLLM looks, whether others wait or not.
    assert (order.index("none") < order.index("large")) == LOOKS_PAST
    assert {compaction.request for compaction in engine.compactions} == options.keys() - {"off"}


def test_a_request_starts_as_soon_as_a_ring_is_free_however_many_come_behind(engine, long_ids, monkeypatch):
    monkeypatch.setattr(engine.scheduler._rings, "budget", RING)
    prompt = long_ids(200, seed=80)
    engine.add(prompt, sampling(2, "snapkv:budget=0.25"), "first")
    engine.add(prompt, sampling(2, "snapkv:budget=0.25"), "waits")
    freed = started = None
    for step in range(12):
        engine.add(prompt, sampling(2, "snapkv:budget=0.25"))
        engine.add(long_ids(100, seed=81 + step), sampling(2, NEEDS_NONE))
        engine.step()
        running = {external_id(request.request_id) for request in engine.scheduler.running}
        if freed is None and engine.compaction_of("first") is not None:
            freed = step
        if started is None and "waits" in running:
            started = step
    assert freed is not None and started == freed
    engine.finish()
