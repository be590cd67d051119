"""A crowd of mixed requests in a pool that is far too small: nothing leaks, and no one disturbs another."""

import random
from collections import Counter

import pytest
from crowd import Member, Run, compacted, compare, compare_with_alone, finished, in_time, serve, tolerate
from harness import Engine, sampling, tokens

SEED = 20
NUM_REQUESTS = 120
POOL = 40  # blocks; the longest request needs 23 before it is compacted
RUN_ALONE = 25
OPTIONS = [
    None,
    None,
    "snapkv:budget=0.5",
    "snapkv:budget=0.1",
    {"method": "kv_compress", "budget": 0.25},
    {"budget": 0.4, "allocation": "global"},
    "adakv:budget=0.3",
    "foresight:budget=0.5,recompact_every=8",
    "foresight:budget=0.9,threshold=1e4,recompact_every=8",
    "snapkv:budget=0.3,recompact_every=6",
    "h2o:budget=0.4,recompact_every=8",
    "kv_compress:budget=0.25,when=streaming,recompact_every=96",
    "kvzip:budget=0.3,chunk=128",
    "attention_matching:budget=0.1,chunk=128,references=64,waits=true,recompact_every=6",
    "attention_matching+k8v4:budget=0.1,chunk=128,references=64",
    "attention_matching:budget=0.3,chunk=128,references=64,waits=true,keys=omp,recompact_every=6",
    "off",
    "off",
    "off",
]


def crowd(long_ids) -> list[Member]:
    random_ = random.Random(SEED)
    prefixes = [long_ids(length, seed=100 + i) for i, length in enumerate((64, 160, 350))]
    members = []
    for index in range(NUM_REQUESTS):
        length = int(random_.triangular(20, 700, 60))
        kind = random_.random()
        if kind < 0.15:
            prompt = [random_.randrange(3, 40000) for _ in range(length)]
        else:
            prompt = long_ids(length, seed=200 + index)
            if kind < 0.45:
                prompt = (random_.choice(prefixes) + prompt)[: max(length, 40)]
            elif kind < 0.55 and members:
                prompt = random_.choice(members).prompt  # word for word
        members.append(
            Member(
                prompt=prompt,
                max_tokens=random_.randint(8, 24),
                samples=random_.choice([2, 3]) if random_.random() < 0.12 else 1,
                compression=random_.choice(OPTIONS),
                steps_to_live=random_.randint(0, 30) if random_.random() < 0.15 else None,
            )
        )
    return members


@pytest.fixture(scope="module")
def run(shared_engine: Engine, long_ids) -> Run:
    members = {f"crowd{index}": member for index, member in enumerate(crowd(long_ids))}
    return serve(shared_engine, members, POOL, random.Random(SEED + 1))


def test_the_crowd_is_what_it_is_meant_to_be(run):
    assert run.preemptions > 0
    assert len(run.compactions) > 40
    assert run.most_running > 3
    aborted = [name for name in run.members if not finished(run, name)]
    assert 5 <= len(aborted) <= 30
    assert sum(len(output.outputs) > 1 for output in run.outputs.values()) >= 5
    assert max(Counter(c.job.request_id for c in run.compactions).values()) > 1, (
        "compacted again after preemption"
    )
    assert any(output.num_cached_tokens for output in run.outputs.values())
    assert any(c.job.previous for c in run.compactions), "compacted again as it grew"
    # Those who do not wait have ended before they are solved for, and gone on raw to the end.
    assert any(c.job.solved for c in run.compactions), "solved for while it waited"
    several = {c.job.request_id for c in run.compactions if c.job.previous}
    first = Counter(c.job.request_id for c in run.compactions if not c.job.previous)
    assert any(first[name] > 1 for name in several), "preempted between two compactions"
    assert any(set(job.source) & set(job.destination) for job in run.sent), (
        "compacted in place in a full pool"
    )


def test_every_block_comes_back_and_nothing_is_left(run, engine):
    assert run.free_after == run.free_before
    engine.check_nothing_left()


def test_every_job_was_executed_once_in_order(run):
    assert run.sent == [compaction.job for compaction in run.compactions]


def test_every_request_was_compacted_when_due_if_there_was_room(run, shared_engine):
    late = [
        (c.request, c.num_computed, c.job.num_tokens)
        for c in run.compactions
        if c.num_computed != c.job.num_tokens and c.job.request_id not in shared_engine.late
    ]
    assert not late


def test_a_compacted_request_is_the_same_as_when_run_alone(run, engine):
    of_request, differences = in_time(compacted(run), engine), []
    # Those that were compacted several times or into their own blocks first, then the others.
    eventful = sorted(
        of_request,
        key=lambda name: (
            len(of_request[name]) > run.members[name].samples,
            any(set(c.job.source) & set(c.job.destination) for c in of_request[name]),
            run.members[name].samples,
        ),
        reverse=True,
    )
    chosen = eventful[: RUN_ALONE // 2] + random.Random(SEED).sample(
        eventful[RUN_ALONE // 2 :], RUN_ALONE - RUN_ALONE // 2
    )
    compare_with_alone(run, engine, chosen, differences)
    tolerate(differences, len(chosen))


def test_a_request_that_was_not_compacted_is_the_same_as_in_stock(run, stock):
    by_request, differences = compacted(run), []
    names = [name for name in run.members if finished(run, name) and name not in by_request]
    assert sum(run.members[name].compression == "off" for name in names) >= 10
    stock.forget_prefixes()
    requests = [(run.members[name].prompt, sampling(run.members[name].max_tokens)) for name in names]
    for name, plain in zip(names, stock.run_all(requests), strict=True):
        compare(run.outputs[name], plain, differences, name)
    tolerate(differences, len(names))


def test_compaction_shows_in_the_tokens(run, stock):
    # Otherwise equality with the request run alone would not show that pages were read right.
    names = list(compacted(run))[:12]
    requests = [(run.members[name].prompt, sampling(run.members[name].max_tokens)) for name in names]
    plain = stock.run_all(requests)
    assert any(tokens(run.outputs[name]) != tokens(out) for name, out in zip(names, plain, strict=True))
