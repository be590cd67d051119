"""Solves are spread over steps, by the time that their shares take and others' steps do."""

from types import SimpleNamespace

import pytest
from simulation import Simulation, prompt_of

from vllm_kvcompress.paging import repetition, solving
from vllm_kvcompress.paging.job import CompressionReport

MODES = [pytest.param({}, id="sync"), pytest.param(dict(asynchronous=True), id="async")]
OPTIONS = "attention_matching:budget=0.25,waits={}"
SHARES = 4  # two layers of two heads


class Clock:
    """Steps that take as long as a test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def words(monkeypatch):
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [1] * 10)
    monkeypatch.setattr(repetition, "cached_tokenizer_from_config", lambda config: tokenizer)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(solving, "time", clock)
    return clock


def shares(output) -> list[tuple[str, int]]:
    return [(solve.job.request_id, len(solve.shares)) for solve in output.kv_compression.solves]


def simulate(**mode) -> Simulation:
    return Simulation("attention_matching", max_num_batched_tokens=256, num_blocks=400, **mode)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_beside_a_decoding_client_solves_have_a_tenth_of_the_time(clock, mode, waits):
    sim = simulate(**mode)
    sim.worker.share_seconds = 0.05
    client = sim.add(prompt_of(60), "off", 300)
    sim.step()
    names = [sim.add(prompt_of(500, seed), OPTIONS.format(waits), 250) for seed in (31, 32)]
    sent: list[tuple[float, str, int]] = []
    while not all(sim.jobs_of(name) for name in names):
        clock.now += 0.1
        output = sim.step()
        assert client in output.num_scheduled_tokens
        sent += [(clock.now, *each) for each in shares(output)]
    assert all(count == 1 for _, _, count in sent) and len(sent) == 2 * SHARES
    # The first one only tells how long they take; each of the others has ten times that before it.
    times = [time for time, _, _ in sent[1:]]
    assert all(later - earlier >= 0.5 - 1e-9 for earlier, later in zip(times, times[1:], strict=False))
    assert times[-1] - times[0] < 1.0 * len(times), "and not much more"
    assert sim.worker.late == (set() if waits else set(names))
    assert [name for _, name, _ in sent] == [names[0]] * SHARES + [names[1]] * SHARES
    sim.finish()
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("beside", ["waits for its turn", "computes its prompt"])
def test_whoever_is_served_and_not_solved_for_counts_as_a_client(clock, mode, beside):
    sim = Simulation(
        "attention_matching", max_num_batched_tokens=256, num_blocks=900, max_model_len=10_000, **mode
    )
    sim.worker.share_seconds = 0.05
    first = sim.add(prompt_of(500, 31), OPTIONS.format(False), 300)
    if beside == "waits for its turn":
        sim.add(prompt_of(400, 32), OPTIONS.format(False), 900)
    times: list[float] = []
    while not sim.jobs_of(first):
        if beside == "computes its prompt" and len(times) == 1 and len(sim.scheduler.requests) == 1:
            sim.add(prompt_of(8000), "off", 1)
        clock.now += 0.1
        for name, count in shares(sim.step()):
            assert (name, count) == (first, 1)
            times.append(clock.now)
    assert len(times) == SHARES
    assert all(later - earlier >= 0.5 - 1e-9 for earlier, later in zip(times[1:], times[2:], strict=False))
    for request in list(sim.scheduler.requests):
        sim.abort(request)
    sim.finish()
    sim.check_nothing_left()


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_of_longer_contexts_a_head_has_more_shares_and_a_step_no_more_of_them_than_its_time_bears(
    clock, mode, waits
):
    sim = Simulation("attention_matching", max_num_batched_tokens=4096, num_blocks=1200, **mode)
    sim.worker.share_seconds = 0.02
    client = sim.add(prompt_of(60), "off", 3000)
    sim.step()
    name = sim.add(prompt_of(3000, 31), OPTIONS.format(waits), 2000)
    given, begun = [], None
    while not sim.jobs_of(name):
        clock.now += 0.3 if len(given) < SHARES else 0.6
        output = sim.step()
        assert client in output.num_scheduled_tokens
        for _, count in shares(output):
            begun = begun or clock.now
            assert count * 0.02 <= 0.1 * 0.6 + 1e-9
            given.append(count)
    assert sum(given) == 3 * SHARES and max(given) > 1
    assert clock.now - begun < 1.5 * 3 * SHARES * 0.2, "it has its tenth"
    sim.abort(client)
    sim.finish()
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
def test_a_request_decodes_on_its_raw_cache_until_it_is_solved(clock, mode):
    sim = simulate(**mode)
    sim.worker.share_seconds = 0.1
    name = sim.add(prompt_of(500, 31), OPTIONS.format(False), 60)
    while not sim.answers[name]:
        sim.step()
    steps = 0
    while not sim.jobs_of(name):
        clock.now += 0.05  # so a share every two steps
        before = len(sim.answers[name])
        output = sim.step()
        steps += 1
        assert name in output.num_scheduled_tokens or mode and len(sim.answers[name]) >= before
        assert len(shares(output)) <= 1
    assert name in sim.worker.late and 2 * SHARES <= steps
    (job,) = sim.jobs_of(name)
    assert job.num_tokens == 500 and job.boundary <= 500, "it keeps what it would have kept at its point"
    sim.finish()
    assert len(sim.answers[name]) == 60
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
def test_a_request_that_waits_has_computed_nothing_behind_its_point_before_it_is_compacted(clock, mode):
    sim = simulate(**mode)
    sim.worker.share_seconds = 0.1
    name = sim.add(prompt_of(500, 31), OPTIONS.format(True), 20)
    while not sim.jobs_of(name):
        clock.now += 0.05
        sim.step()
        if not sim.jobs_of(name):
            assert len(sim.answers[name]) <= 1
    assert name not in sim.worker.late
    sim.finish()
    sim.check_nothing_left()


def test_when_nobody_decodes_a_step_has_as_many_shares_as_a_quarter_of_a_second(clock):
    sim = simulate()
    sim.worker.share_seconds = 0.1
    name = sim.add(prompt_of(500, 31), OPTIONS.format(True), 4)
    given = []
    while not sim.jobs_of(name):
        clock.now += 0.01
        given += [count for _, count in shares(sim.step())]
    assert given == [1, 2, 1]
    sim.finish()
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ends", ["aborted", "preempted"])
def test_who_ends_or_is_preempted_in_the_middle_is_solved_for_anew_or_never(clock, mode, ends):
    sim = simulate(**mode)
    sim.worker.share_seconds = 0.1
    name = sim.add(prompt_of(500, 31), OPTIONS.format(False), 60)
    while len(sim.worker.solved.get(name, ())) < 2:
        clock.now += 0.05
        sim.step()
    if ends == "aborted":
        sim.abort(name)
    else:
        request = sim.scheduler.requests[name]
        sim.scheduler.running.remove(request)
        sim.scheduler._preempt_request(request, 0.0)
        while not sim.jobs_of(name):
            clock.now += 0.05
            sim.step()
    sim.finish()
    assert len(sim.jobs_of(name)) == (ends == "preempted")
    sim.check_nothing_left()


def test_what_is_solved_stays_until_there_is_room(clock):
    sim = simulate()
    name = sim.add(prompt_of(500, 31), OPTIONS.format(False), 100)
    pool = sim.scheduler.kv_cache_manager.block_pool
    while not sim.worker.solved.get(name):
        sim.step()
    manager = sim.scheduler.compacting_manager
    compact, refused = manager.compact, []
    manager.compact = lambda *args: refused.append(args) if len(refused) < 5 else compact(*args)
    while not sim.jobs_of(name):
        clock.now += 0.2
        sim.step()
    assert len(refused) == 5 and pool.get_num_free_blocks() > 0
    sim.finish()
    sim.check_nothing_left()


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_one_context_is_repeated_and_solved_for_at_a_time(clock, mode, waits):
    sim = simulate(**mode)
    sim.worker.share_seconds = 0.05
    names = [sim.add(prompt_of(300 + 50 * seed, seed), OPTIONS.format(waits), 150) for seed in range(3)]
    busy: list[str] = []
    while not all(sim.jobs_of(name) for name in names):
        clock.now += 0.1
        output = sim.step()
        repeated = {sim.scheduler._repetitions.of(r.request_id) for r in sim.scheduler.running} - {None}
        owners = {each.owner_id for each in repeated} | {name for name, _ in shares(output)}
        owners -= {job.request_id for job in output.kv_compression.jobs}  # of whom nothing is kept any more
        assert len(owners) <= 1
        busy += [name for name in owners if busy[-1:] != [name]]
    assert sorted(busy) == sorted(names), "each has one turn"
    assert sim.worker.late == (set() if waits else set(names))
    sim.finish()
    assert sim.scheduler._solving.turn is None
    sim.check_nothing_left()


@pytest.mark.parametrize("waits", [False, True])
def test_nobody_waits_for_one_whose_repetition_has_no_room(clock, waits):
    # The larger prompt has 188 blocks, and its repetition would take the 61 that it leaves, or more.
    sim = Simulation("attention_matching", max_num_batched_tokens=4096, num_blocks=250)
    names = [sim.add(prompt_of(length, length), OPTIONS.format(waits), 40) for length in (3000, 300)]
    while not all(sim.answers[name] for name in names):
        sim.step()
    for _ in range(39):
        clock.now += 0.1
        output = sim.step()
        assert names[0] in output.num_scheduled_tokens and names[1] in output.num_scheduled_tokens
    assert all(len(sim.answers[name]) == 40 for name in names) and not sim.jobs_of(names[0])
    sim.finish()
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", [*MODES, pytest.param(dict(num_drafts=3), id="drafts")])
def test_a_self_study_is_four_answers_of_their_own_length(clock, mode):
    sim = simulate(**mode)
    name = sim.add(prompt_of(300, 5), OPTIONS.format(False) + ",queries=self-study,answer_tokens=9", 150)
    answers: dict[str, int] = {}
    while not sim.jobs_of(name):
        clock.now += 0.1
        sim.step()
        for request in sim.scheduler.running:
            if sim.scheduler._repetitions.of(request.request_id) is not None:
                answers[request.request_id] = max(
                    request.num_output_tokens, answers.get(request.request_id, 0)
                )
                assert request.num_prompt_tokens == 310 and request.max_tokens == 9
    assert len(answers) == len(repetition.STUDIES) == 4 and min(answers.values()) >= 5
    assert name in sim.worker.late
    sim.finish()
    sim.check_nothing_left()


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_who_is_preempted_in_the_step_of_a_share_is_not_solved_for_in_it(clock, mode, waits):
    # vLLM preempts after the share is given out, and the worker forgets its record first.
    sim = simulate(**mode)
    sim.worker.share_seconds = 0.1
    client = sim.add(prompt_of(60), "off", 200)
    sim.step()
    name = sim.add(prompt_of(500, 31), OPTIONS.format(waits), 60)
    plan, preempted = sim.scheduler._end_abandoned, []

    def then_preempt():
        plan()
        request = sim.scheduler.requests.get(name)
        if sim.scheduler._solving._solves and len(preempted) < 2:
            sim.scheduler.running.remove(request)
            sim.scheduler._preempt_request(request, 0.0)
            preempted.append(request)

    sim.scheduler._end_abandoned = then_preempt
    while not sim.jobs_of(name):
        clock.now += 1.1
        sim.step()
    assert len(preempted) == 2
    sim.finish()
    assert len(sim.answers[name]) == 60 and len(sim.answers[client]) == 200
    sim.check_nothing_left()


@pytest.mark.parametrize(("beside", "part"), [(False, 1 / 2), (True, 1 / 11)])
def test_the_time_of_shares_is_none_of_the_steps_beside_which_they_have_theirs(clock, beside, part):
    sim = simulate()
    sim.worker.share_seconds = 0.1
    if beside:
        sim.add(prompt_of(60), "off", 2000)
    name = sim.add(prompt_of(500, 31), OPTIONS.format(False), 1000)
    times: list[float] = []
    while not sim.jobs_of(name):
        clock.now += 0.01
        if shares(sim.step()):  # which takes ten times as long as the step without it
            times.append(clock.now)
            clock.now += 0.1
    assert len(times) == SHARES
    solving = 0.1 * (len(times) - 2) / (times[-1] - times[1])  # the first one tells how long they take
    assert part * 0.8 < solving <= part + 1e-9
    for request in list(sim.scheduler.requests):
        sim.abort(request)
    sim.finish()
    sim.check_nothing_left()


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("mode", [*MODES, pytest.param(dict(num_drafts=3), id="drafts")])
def test_what_is_matched_is_compacted_again_as_it_grows_and_solved_for_anew_once_it_was_preempted(
    clock, mode, waits
):
    sim = simulate(**mode)
    name = sim.add(prompt_of(500, 31), OPTIONS.format(waits) + ",recompact_every=64", 700)
    for preempted in (False, True):
        if preempted:
            sim.preempt(name)
        before = len(sim.jobs_of(name))
        while len(jobs := sim.jobs_of(name)[before:]) < 3:
            clock.now += 0.05
            sim.step()
        assert [job.solved for job in jobs] == [True, False, False]
        assert jobs[0].num_tokens == 500 and all((job.num_tokens - 500) % 64 == 0 for job in jobs)
        assert jobs[1].previous == jobs[0].destination and sim.scheduler._solving.turn is None
    sim.finish()
    sim.check_nothing_left()


def test_who_is_compacted_again_waits_for_nobody_who_is_solved_for(clock):
    sim = simulate()
    grows = sim.add(prompt_of(500, 31), OPTIONS.format(True) + ",recompact_every=16", 300)
    sim.step_until_compacted(grows)
    solved = sim.add(prompt_of(400, 32), OPTIONS.format(True), 300)
    while sim.scheduler._solving.turn != solved:
        sim.step()
    compact, beside = sim.manager.compact, []
    sim.worker.share_seconds = 100.0
    for step in range(40):
        clock.now += 0.01
        sim.manager.compact = compact if step >= 20 else lambda *args: None
        output = sim.step()
        assert grows in output.num_scheduled_tokens, "without room it goes on raw"
        beside += [job for job in output.kv_compression.jobs if sim.scheduler._solving.turn == solved]
    assert grows in sim.worker.late and beside and not sim.jobs_of(solved)
    assert {job.request_id for job in beside} == {grows}
    sim.worker.share_seconds = 0.0
    while not sim.jobs_of(solved):
        clock.now += 1.0
        sim.step()
    sim.finish()
    sim.check_nothing_left()


def test_a_prompt_that_is_left_alone_is_compacted_with_its_output_and_not_solved_for(clock):
    sim = simulate()
    options = OPTIONS.format(False) + ",recompact_every=64,min_freed_tokens=200"
    name = sim.add(prompt_of(150, 31), options, 400)
    while not sim.jobs_of(name):
        sim.step()
        assert len(sim.scheduler.requests) == 1 and sim.scheduler._solving.turn is None, "nor repeated"
    (job,) = sim.jobs_of(name)
    assert not job.solved and job.num_tokens > 200
    sim.finish()
    sim.check_nothing_left()


def repeats(sim: Simulation) -> bool:
    return any(sim.scheduler._repetitions.of(name) is not None for name in sim.scheduler.requests)


@pytest.mark.parametrize("mode", MODES)
def test_whose_output_is_too_short_to_be_solved_for_is_not_repeated_either(clock, mode):
    # 304 tokens are repeated in five steps of 64, and four have a share; the last token is not computed.
    least, compacted = 5 + SHARES + 1, []
    for max_tokens in range(least - 3, least + 4):
        sim = simulate(**mode)
        sim.worker.share_seconds = 0.0
        name = sim.add(prompt_of(304, 5), OPTIONS.format(False), max_tokens)
        repeated = False
        while name in sim.scheduler.requests:
            clock.now += 0.1
            sim.step()
            repeated |= repeats(sim)
        assert repeated == (max_tokens >= least)
        compacted += [max_tokens] * len(sim.jobs_of(name))
        sim.check_nothing_left()
    steps_late = 2 if mode else 0  # asynchronous scheduling hears later of what a first share took, too
    assert compacted == list(range(least + steps_late, least + 4))


@pytest.mark.parametrize("study", [False, True])
def test_who_waits_is_solved_for_however_short_its_output_is(clock, study):
    sim = simulate()
    options = OPTIONS.format(True) + ",queries=self-study,answer_tokens=5" * study
    name = sim.add(prompt_of(300, 5), options, 2)
    sim.finish()
    assert [job.solved for job in sim.jobs_of(name)] == [True]
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
def test_whose_output_is_too_short_to_be_solved_for_may_be_compacted_with_it(clock, mode):
    sim = simulate(**mode)
    options = OPTIONS.format(False) + ",recompact_every=16"
    name = sim.add(prompt_of(2000, 5), options, 34)  # a repetition takes 32 steps
    while name in sim.scheduler.requests:
        sim.step()
        assert not repeats(sim) and not sim.worker.solved
    assert [(job.num_tokens, job.solved) for job in sim.jobs_of(name)] == [(2016, False)]
    assert name not in sim.worker.late
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
def test_who_would_have_ended_by_then_gives_its_turn_to_the_next(clock, mode):
    sim = simulate(**mode)
    sim.worker.share_seconds = 1.0
    first = sim.add(prompt_of(500, 31), OPTIONS.format(False), 80)
    second = sim.add(prompt_of(400, 32), OPTIONS.format(False), 400)
    turns: list[str] = []
    beside = 0  # steps that it goes on
    while first in sim.scheduler.requests:
        clock.now += 0.01
        sim.step()
        turns += [turn for turn in [sim.scheduler._solving.turn] if turn and turns[-1:] != [turn]]
        if turns[-1:] == [second]:
            beside += first in sim.scheduler.requests
            assert first not in sim.worker.solved
    assert turns == [first, second] and beside
    assert not sim.jobs_of(first)
    while not sim.jobs_of(second):
        clock.now += 1.0
        sim.step()
    sim.finish()
    assert len(sim.answers[first]) == 80
    sim.check_nothing_left()


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_one_that_is_solved_and_has_no_room_does_not_keep_others_from_their_turn(clock, mode, waits):
    sim = simulate(**mode)
    names = [sim.add(prompt_of(300 + 50 * seed, seed), OPTIONS.format(waits), 900) for seed in range(4)]
    compact, refused = sim.manager.compact, {names[0]}
    sim.manager.compact = lambda name, *args: None if name in refused else compact(name, *args)

    def step_until(condition) -> None:
        while not condition():
            clock.now += 0.2
            sim.step()

    step_until(lambda: sim.jobs_of(names[1]))
    assert not sim.jobs_of(names[0])
    assert sim.scheduler._solving.without_room == names[0]
    refused.add(names[2])
    step_until(lambda: sum(len(solve.shares) for solve in sim.worker.solved.get(names[2], ())) == SHARES)
    for _ in range(20):
        clock.now += 0.2
        sim.step()
    # What is solved takes memory: of two at most.
    assert sim.scheduler._solving.turn == names[2] and names[3] not in sim.worker.solved
    refused.clear()
    step_until(lambda: sim.jobs_of(names[3]))
    assert all(len(sim.jobs_of(name)) == 1 for name in names)
    assert sim.scheduler._solving.turn is None and sim.scheduler._solving.without_room is None
    sim.finish()
    sim.check_nothing_left()


def test_until_it_is_known_how_long_a_share_takes_there_is_one(clock):
    sim = simulate()
    execute, sent = sim.worker.execute, []

    def as_on_a_gpu(output):  # the report comes some steps later
        result = execute(output)
        if getattr(result, "kv_compression", None) is not None:
            sent.append(sim.steps)
            del result.kv_compression
        if sent and sim.steps >= sent[0] + 5:
            result.kv_compression = CompressionReport({}, 0.05)
        return result

    sim.worker.execute = as_on_a_gpu
    name = sim.add(prompt_of(500, 31), OPTIONS.format(False), 60)
    while not sim.jobs_of(name):
        clock.now += 0.1
        sim.step()
    assert sent[1] - sent[0] >= 5 and len(sent) == SHARES
    sim.finish()
    sim.check_nothing_left()


def test_a_first_share_that_was_not_sent_is_not_waited_for(clock):
    sim = simulate()
    name, taken = sim.add(prompt_of(500, 31), OPTIONS.format(True), 60), []
    plan = sim.scheduler._end_abandoned

    def then_preempt():
        plan()
        if sim.scheduler._solving._solves and not taken:
            taken.append(name)
            sim.preempt(name)

    sim.scheduler._end_abandoned = then_preempt
    sim.finish()
    assert taken and len(sim.jobs_of(name)) == 1
    sim.check_nothing_left()
