"""Requests that stay raw until blocks run short: exact while there is room, then as if they were compacted at
the same points alone."""

import random

import pytest
from crowd import Member, compare, finished, serve, tolerate
from harness import SINKS, Engine, first_difference, same_kept, sampling, tokens

METHODS = [
    "keydiff",
    "snapkv",
    "foresight",
    "kv_compress",
    "kivi",
    "kv_compress+k4v3",
    "kv_compress+auto",
    "mixed_dim_kv",
]


def options(method: str, **more) -> dict:
    base = dict(method=method, when="pressure", min_freed_tokens=64)
    return base | ({} if method == "kivi" else dict(budget=0.125)) | more


def points_of(compactions) -> list[tuple[int, int, int]]:
    return [(c.job.num_tokens, c.job.boundary, len(c.job.destination)) for c in compactions]


def replayed(engine: Engine, prompt, params, points):
    """The output of a request alone, and its compactions."""
    engine.forget_prefixes()
    engine.compactions.clear()
    name = engine.add(prompt, params)
    with engine.replaying(name, points):
        engine.finish()
    return engine.outputs.pop(name), list(engine.compactions)


def test_with_room_it_is_stock_to_the_token(engine, stock, long_ids):
    requests = [(long_ids(length, seed=length), sampling(40)) for length in (900, 500, 60)]
    pressed = [(prompt, sampling(40, options("keydiff"))) for prompt, _ in requests]
    for one, other in zip(engine.run_all(pressed), stock.run_all(requests), strict=True):
        assert tokens(one) == tokens(other)
        assert [p[t].logprob for p, t in zip(one.outputs[0].logprobs, tokens(one), strict=True)] == [
            p[t].logprob for p, t in zip(other.outputs[0].logprobs, tokens(other), strict=True)
        ]
    assert not engine.compactions


@pytest.mark.parametrize("method", METHODS)
def test_in_a_full_pool_each_answers_as_it_does_alone_compacted_at_the_same_points(engine, long_ids, method):
    """Prompts of 19 and 16 blocks in a pool of 30; the second's output outgrows what was left."""
    members = {
        f"full{length}": (long_ids(length, seed=length), sampling(most, options(method)))
        for length, most in ((600, 140), (500, 90))
    }
    preemptions = engine.preemptions
    with engine.squeezed(30):
        for name, (prompt, params) in members.items():
            engine.add(prompt, params, name)
        most_running = 0
        while engine.llm.llm_engine.has_unfinished_requests():
            engine.step()
            engine.check_accounts()
            most_running = max(most_running, len(engine.scheduler.running))
    assert most_running == 2 and engine.preemptions == preemptions
    outputs, compactions = {name: engine.outputs.pop(name) for name in members}, list(engine.compactions)
    assert engine.sent == [each.job for each in compactions] and compactions
    for name, (prompt, params) in members.items():
        own = [each for each in compactions if each.request == name]
        alone, again = replayed(engine, prompt, params, points_of(own))
        for one, other in zip(own, again, strict=True):
            assert same_kept(one, other)
        assert first_difference(outputs[name], alone) is None


@pytest.mark.parametrize("method", METHODS)
def test_a_step_down_takes_its_tokens_from_what_was_kept_also_where_the_boundary_stays(
    engine, long_ids, method
):
    """At 600 tokens 17 blocks are compacted to half of them, one token later these to a quarter."""
    points = [(600, 544, 9), (601, 544, 4), (660, 608, 5)]
    if method == "kivi":  # all tokens in fewer bytes, and then only with more of them
        points = [(600, 544, 6), (660, 608, 6)]
    output, compactions = replayed(engine, long_ids(600, seed=8), sampling(80, options(method)), points)
    assert len(tokens(output)) == 80 and len(compactions) == len(points)
    held, boundary = [list(range(600))] * compactions[0].counts.numel(), 0
    for each in compactions:
        fresh = set(range(boundary, each.job.boundary))
        heads = [head for layer in each.positions() for head in layer]
        for before, now in zip(held, heads, strict=True):
            kept = set(now) - {-1}
            assert kept <= set(before) | fresh and set(range(SINKS)) <= kept
        held, boundary = heads, each.job.boundary
    assert len(compactions[0].job.destination) > len(compactions[1].job.destination) or method == "kivi"


CROWD = [
    options("keydiff", min_freed_tokens=32),
    options("snapkv", budget=0.2, min_freed_tokens=32, ladder=[0.7, 0.4]),
    options("kv_compress+k4v3", min_freed_tokens=32),
    "snapkv:budget=0.25",
    "off",
]


def test_in_a_crowd_each_is_what_its_own_log_makes_of_it_alone(engine, long_ids):
    random_ = random.Random(3)
    members = {}
    for index in range(48):
        prompt = long_ids(int(random_.triangular(20, 700, 200)), seed=300 + random_.randrange(40))
        dies = random_.randint(0, 30) if random_.random() < 0.1 else None
        members[f"crowd{index}"] = Member(prompt, random_.randint(8, 60), 1, random_.choice(CROWD), dies)
    engine.preempted.clear()
    run = serve(engine, members, 45, random.Random(4))
    engine.check_nothing_left()
    pressed, differences = {}, []
    for compaction in run.compactions:
        name = compaction.request
        # What a preempted request had answered before was computed on what it kept then.
        if compaction.job.config.when == "pressure" and finished(run, name) and name not in engine.preempted:
            pressed.setdefault(name, []).append(compaction)
    assert len(pressed) >= 8 and any(len(own) > 1 for own in pressed.values())
    assert run.preemptions and run.most_running > 3
    for name, own in sorted(pressed.items(), key=lambda item: -len(item[1]))[:12]:
        member = members[name]
        alone, again = replayed(engine, member.prompt, member.params(), points_of(own))
        assert all(same_kept(one, other) for one, other in zip(own, again, strict=True)), name
        compare(run.outputs[name], alone, differences, name)
    tolerate(differences, 20)
