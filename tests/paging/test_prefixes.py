"""Compacted prefixes that later requests attach to, without a model: see `simulation`."""

import random

import pytest
from simulation import BLOCK, Simulation, prompt_of
from test_scheduler import MODES

KEEPS = "knorm:budget=0.25,prefix_share=0.5"
PINS = "knorm:budget=0.25"


def pin(sim: Simulation, prompt, name="document", compression=PINS, **fields):
    """Have a prompt's compaction kept under a name; the prefix."""
    sim.add(prompt, f"{compression},prefix={name}", 2, name=f"makes-{name}-{random.random()}", **fields)
    sim.finish()
    return sim.scheduler._prefixes.named(name, fields.get("cache_salt"))


def forget_raw(sim: Simulation) -> None:
    """As if the raw blocks had been taken by others since."""
    sim.pool.evict_blocks({block.block_id for block in sim.pool.blocks if block.ref_cnt == 0})


@pytest.mark.parametrize("mode", MODES)
def test_users_of_a_pinned_prefix_share_its_blocks_and_compute_their_own_suffix(mode):
    sim = Simulation(PINS, max_model_len=1280, **mode)
    document = prompt_of(40 * BLOCK + 5)
    prefix = pin(sim, document)
    assert prefix is not None and len(prefix.hashes) == 40
    assert prefix.plan.source_blocks == 38 and len(prefix.compacted) == 10 and len(prefix.tails[0]) == 2
    forget_raw(sim)
    free = sim.free
    names = [sim.add(document + prompt_of(50, seed), max_tokens=30) for seed in (1, 2, 3)]
    sim.step()
    assert [sim.worker.attached[name] for name in names] == [40 * BLOCK] * 3
    own = -(-(len(document) + 50 + sim.scheduler.num_spec_tokens * 2 + 2) // BLOCK) - 40
    assert free - sim.free <= 3 * own
    assert prefix.users == prefix.hits == 3
    sim.finish()
    assert sim.free == free and prefix.users == 0 and not sim.jobs[1:]
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_on_a_prefix_is_that_of_whoever_was_compacted_there_and_went_on(mode):
    """The keys of a token are a hash of all compactions before it: so is the answer."""
    document, suffix = prompt_of(40 * BLOCK), prompt_of(50, 1)
    sim = Simulation(KEEPS, **mode)
    name = sim.add(document, max_tokens=40)
    sim.finish()
    prefix = next(iter(sim.scheduler._prefixes))
    said = sim.answers[name]
    forget_raw(sim)
    later = sim.add(document + said[:30] + suffix, max_tokens=20)
    sim.finish()
    begin = sim.worker.attached[later]
    assert begin == (len(document) + 30) // BLOCK * BLOCK and prefix.hits == 1
    row = sim.worker.rows[later]
    key = row.keys[begin - 1]
    for position in range(begin, len(row.keys)):
        key = hash((key, row.tokens[position], row.history))
        assert row.keys[position] == key
    sim.check_nothing_left()


@pytest.mark.parametrize(
    ("change", "attached"),
    [
        (dict(), 40),
        (dict(compression="knorm:budget=0.125"), None),
        (dict(compression="keydiff:budget=0.25"), None),
        (dict(compression="knorm:budget=0.25,sink_tokens=8"), None),
        (dict(compression="knorm:budget=0.25,min_freed_tokens=8"), 40),
        (dict(compression="off"), None),
        (dict(cache_salt="another"), None),
        (dict(cache_salt=None), None),
        (dict(first_token=1), None),
        (dict(last_token=1), 39),
        (dict(boundary_token=1), None),
    ],
)
def test_only_the_same_tokens_options_and_salt_attach(change, attached):
    sim, document = Simulation(PINS, max_model_len=1280), prompt_of(40 * BLOCK)
    prefix = pin(sim, document, cache_salt="mine")
    forget_raw(sim)
    prompt = document + prompt_of(20, 1)
    for place, position in {"first": 0, "last": len(document) - 1, "boundary": 38 * BLOCK - 1}.items():
        if f"{place}_token" in change:
            prompt[position] = change[f"{place}_token"]
    salt = change.get("cache_salt", "mine")
    name = sim.add(prompt, change.get("compression"), 4, cache_salt=salt)
    sim.finish()
    found = sim.worker.attached.get(name)
    assert found == (None if attached is None else attached * BLOCK)
    assert prefix.hits == (attached is not None)
    sim.check_nothing_left()


def test_adapters_have_prefixes_of_their_own():
    from vllm.lora.request import LoRARequest

    sim, document = Simulation(PINS, max_model_len=1280), prompt_of(40 * BLOCK)
    one, other = (LoRARequest(name, number, "/nowhere") for number, name in enumerate(("one", "other"), 1))
    prefix = pin(sim, document, lora_request=one)
    assert prefix.adapter == "one"
    forget_raw(sim)
    names = [sim.add(document + [7, 7], None, 2, lora_request=lora) for lora in (one, other, None)]
    sim.finish()
    assert [name in sim.worker.attached for name in names] == [True, False, False]
    sim.check_nothing_left()


def test_a_raw_hit_that_is_as_long_wins():
    sim, document = Simulation(KEEPS, num_blocks=400), prompt_of(40 * BLOCK)
    sim.run(document, max_tokens=2)
    assert len(sim.scheduler._prefixes) == 1
    name = sim.add(document + prompt_of(20, 1), max_tokens=2)
    sim.finish()
    assert name not in sim.worker.attached
    sim.check_nothing_left()


def test_who_pins_has_no_raw_copy_of_it_left_in_the_prefix_cache():
    sim, document = Simulation(PINS, max_model_len=1280), prompt_of(40 * BLOCK)
    pin(sim, document)
    name = sim.add(document + prompt_of(20, 1), max_tokens=2)
    sim.finish()
    assert sim.worker.attached[name] == 40 * BLOCK
    sim.check_nothing_left()


def test_a_conversation_goes_on_from_what_its_last_turn_was_compacted_to_and_is_compacted_again():
    sim = Simulation(KEEPS, num_blocks=200)
    prompt, boundaries = prompt_of(20 * BLOCK), []
    for turn in range(12):
        name = sim.add(prompt, max_tokens=20)
        sim.finish()
        forget_raw(sim)
        assert (name in sim.worker.attached) == (turn > 0)
        if turn:  # all but what may be of the last block
            assert len(prompt) - sim.worker.attached[name] < 60 + 2 * BLOCK
        boundaries.append(sim.worker.rows[name].boundary)
        prompt = prompt + sim.answers[name] + prompt_of(30, turn + 1)
        prefixes = list(sim.scheduler._prefixes)
        assert len({block.block_id for each in prefixes for block in each.blocks}) <= 0.5 * 199
    assert boundaries == sorted(boundaries) and len(set(boundaries)) > 2
    # Its pages are a quarter, and the tail is compacted once that frees something: it stays bounded.
    assert len(prefixes[-1].blocks) < 0.55 * len(prefixes[-1].hashes)
    sim.check_nothing_left()


def test_prefixes_without_a_name_go_before_anybody_suffers():
    sim = Simulation(KEEPS, num_blocks=101, max_model_len=1600)
    for seed in range(8):
        sim.run(prompt_of(40 * BLOCK, seed), max_tokens=2)
    assert sim.free < 60
    name = sim.add(prompt_of(95 * BLOCK, 100), "off", 40)
    sim.finish()
    assert not sim.preempted and len(sim.answers[name]) == 40
    sim.check_nothing_left()


def test_prefixes_do_not_go_for_who_could_not_be_admitted_without_them_either():
    sim = Simulation(KEEPS, num_blocks=101, max_model_len=1600)
    sim.run(prompt_of(40 * BLOCK, 1), max_tokens=2)
    sim.add(prompt_of(60 * BLOCK, 2), "off", 60)
    for _ in range(20):
        sim.step()
    waits = sim.add(prompt_of(50 * BLOCK, 3), "off", 2)
    while "r1" in sim.scheduler.requests:
        sim.step()
        assert len(sim.scheduler._prefixes) == 1
    sim.finish()
    assert len(sim.answers[waits]) == 2
    sim.check_nothing_left()


def test_the_share_is_kept_and_those_used_longest_ago_go_first():
    sim, made = Simulation(KEEPS, num_blocks=101, max_model_len=1280), []
    prefixes = sim.scheduler._prefixes
    for seed in (0, 1, 2, 3, 0, 4, 5):
        sim.run(prompt_of(40 * BLOCK + 3, seed), max_tokens=2)
        made.append(list(prefixes)[-1])
        held = {block.block_id for each in prefixes for block in each.blocks}
        assert len(held) <= 50
        forget_raw(sim)
    assert made[4] is made[0]  # nothing was added to it
    assert list(prefixes) == [made[3], made[0], made[5], made[6]]
    sim.check_nothing_left()


def test_what_was_gone_on_from_goes_before_what_was_not():
    sim, prompt = Simulation(KEEPS, num_blocks=101, max_model_len=1280), prompt_of(30 * BLOCK)
    prefixes = sim.scheduler._prefixes
    sim.run(prompt_of(20 * BLOCK, 1), max_tokens=2)
    first = prompt + sim.run(prompt, max_tokens=20)
    forget_raw(sim)
    sim.run(first + prompt_of(20, 2), max_tokens=2)
    other, before, after = sorted(prefixes, key=lambda prefix: int(prefix.id.partition("-")[2]))
    assert list(prefixes) == [before, other, after]
    sim.check_nothing_left()


def test_a_name_is_kept_whatever_comes_and_pins_leave_room_for_the_longest_request():
    sim = Simulation(PINS, num_blocks=101, max_model_len=60 * BLOCK)
    kept = [pin(sim, prompt_of(40 * BLOCK, seed), f"d{seed}") for seed in range(5)]
    # 12 blocks each: three are 36, and a fourth would leave fewer than 60 of 100.
    assert [each is not None for each in kept] == [True, True, True, False, False]
    sim.run(prompt_of(59 * BLOCK, 9), "off", 10)
    assert len(sim.scheduler._prefixes) == 3
    assert pin(sim, prompt_of(40 * BLOCK, 7), "d0") is kept[0]  # the name is taken
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
def test_a_prefix_may_be_deleted_while_it_is_used(mode):
    sim, document = Simulation(PINS, max_model_len=1280, **mode), prompt_of(40 * BLOCK)
    prefix = pin(sim, document)
    before = sim.free + len(prefix.blocks)
    names = [sim.add(document + prompt_of(20, seed), max_tokens=20) for seed in (1, 2)]
    for _ in range(4):
        sim.step()
    sim.scheduler._prefixes.drop(prefix)
    assert sim.free < before
    late = sim.add(document + prompt_of(20, 3), max_tokens=20)
    sim.finish()
    assert all(name in sim.worker.attached for name in names) and late not in sim.worker.attached
    assert sim.free == before
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
def test_who_is_attached_may_be_preempted_and_comes_back(mode):
    sim, document = Simulation(PINS, max_model_len=1280, **mode), prompt_of(40 * BLOCK)
    alone = Simulation(PINS, max_model_len=1280, **mode)
    for each in (sim, alone):
        pin(each, document)
    name = sim.add(document + prompt_of(20, 1), max_tokens=20)
    for _ in range(6):
        sim.step()
    sim.preempt(name)
    sim.finish()
    assert sim.answers[name] == alone.run(document + prompt_of(20, 1), max_tokens=20)
    sim.check_nothing_left()


def test_who_is_compacted_in_a_full_pool_writes_none_of_the_pages_it_shares():
    sim, document = Simulation(PINS, max_model_len=2000, num_blocks=200), prompt_of(40 * BLOCK)
    prefix = pin(sim, document)
    forget_raw(sim)
    sim.add(prompt_of(112 * BLOCK, 1), "off", 200)
    user = sim.add(document + prompt_of(57 * BLOCK, 2), max_tokens=20)
    job = sim.step_until_compacted(user)
    shared = {block.block_id for block in prefix.compacted}
    assert set(job.previous) == shared and not shared & set(job.destination)
    assert set(job.source) & set(job.destination), "it was not full"
    sim.finish()
    sim.check_nothing_left()


@pytest.mark.parametrize("compression", ["snapkv:budget=0.25", "kvzip:budget=0.25", "h2o:budget=0.25"])
def test_a_policy_that_looks_at_queries_sees_its_window_or_does_not_compact_again(compression, monkeypatch):
    from types import SimpleNamespace

    from vllm_kvcompress.paging import repetition

    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [1] * 10)
    monkeypatch.setattr(repetition, "cached_tokenizer_from_config", lambda config: tokenizer)
    sim, document = Simulation(compression, num_blocks=400, max_model_len=2000), prompt_of(40 * BLOCK)
    prefix = pin(sim, document, compression=compression)
    assert prefix is not None
    forget_raw(sim)
    num_jobs = len(sim.jobs)
    names = [sim.add(document + prompt_of(n, n), max_tokens=20) for n in (3, 20, 50, 900)]
    sim.finish()
    again = {"snapkv": [names[3]], "kvzip": [], "h2o": []}[compression.partition(":")[0]]
    assert [job.request_id for job in sim.jobs[num_jobs:]] == again
    window = 32 if again else 1
    for name, n in zip(names, (3, 20, 50, 900), strict=True):
        assert sim.worker.attached[name] == min(40, (40 * BLOCK + n - window) // BLOCK) * BLOCK
    sim.check_nothing_left()


# ---------------------------------------------------------------------- beside windows


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window", [2, BLOCK, BLOCK + 1, 53, 200, 2000])
@pytest.mark.parametrize("length", [40 * BLOCK, 40 * BLOCK + 1, 41 * BLOCK - 1])
def test_a_prefix_has_what_windows_see_behind_its_end(mode, window, length):
    """Also if the last chunk of its prompt began, and its request ended, behind that."""
    document = prompt_of(length)
    for in_a_step in (256, length - 1 if length > 40 * BLOCK + 1 else 256):
        options = dict(max_model_len=1280, max_num_batched_tokens=in_a_step, num_blocks=400)
        sim = Simulation(PINS, window=window, **options, **mode)
        prefix = pin(sim, document)
        assert prefix is not None and len(prefix.hashes) == 40
        (seen,) = prefix.beside
        assert len(seen) == 40 - max(40 * BLOCK - window + 1, 0) // BLOCK
        assert not any(block.is_null for block in seen)
        forget_raw(sim)
        free = sim.free
        names = [sim.add(document + prompt_of(50, seed), max_tokens=30) for seed in (1, 2, 3)]
        sim.step()
        assert [sim.worker.attached[name] for name in names] == [40 * BLOCK] * 3
        own = -(-(length + 50 + sim.scheduler.num_spec_tokens * 2 + 2) // BLOCK) - 40
        assert free - sim.free <= 2 * 3 * own
        sim.finish()
        assert sim.free == free and prefix.hits == 3 and prefix.users == 0
        sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk", [2 * BLOCK, 11 * BLOCK, 40 * BLOCK, 64 * BLOCK])
@pytest.mark.parametrize("length", [40 * BLOCK, 41 * BLOCK - 1])
def test_a_prefix_has_what_the_chunk_has_that_it_ends_in(mode, chunk, length):
    sim = Simulation(PINS, max_model_len=1280, num_blocks=400, chunk=chunk, **mode)
    document = prompt_of(length)
    prefix = pin(sim, document)
    (seen,) = prefix.beside
    assert len(seen) == (40 * BLOCK) % chunk // BLOCK and not any(block.is_null for block in seen)
    forget_raw(sim)
    free = sim.free
    names = [sim.add(document + prompt_of(50, seed), max_tokens=30) for seed in (1, 2, 3)]
    sim.add(document[:-BLOCK] + prompt_of(50, 4), max_tokens=30)  # not to a part of it
    sim.finish()
    assert [sim.worker.attached[name] for name in names] == [40 * BLOCK] * 3 and prefix.hits == 3
    assert sim.free == free and prefix.users == 0
    sim.check_nothing_left()


def test_beside_windows_a_prefix_is_taken_over_to_its_end_or_not_at_all():
    sim, document = Simulation(PINS, window=53, max_model_len=1280), prompt_of(40 * BLOCK)
    prefix = pin(sim, document)
    forget_raw(sim)
    for prompt in (document + [7], document[:-1] + [1] + prompt_of(20, 1), document):
        name = sim.add(prompt, max_tokens=4)
        sim.finish()
        assert (name in sim.worker.attached) == (prompt[: len(document)] == document != prompt)
    assert prefix.hits == 1
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window", [20, 53, 300])
def test_beside_windows_a_conversation_goes_on_from_its_last_turn(mode, window):
    sim, prompt = Simulation(KEEPS, num_blocks=400, window=window, **mode), prompt_of(20 * BLOCK)
    for turn in range(9):
        name = sim.add(prompt, max_tokens=20)
        sim.finish()
        forget_raw(sim)
        assert (name in sim.worker.attached) == (turn > 0)
        if turn:  # all but what may be of the last block
            assert len(prompt) - sim.worker.attached[name] < 30 + 2 * BLOCK
        prompt = prompt + sim.answers[name] + prompt_of(30, turn + 1)
    sim.check_nothing_left()


@pytest.mark.parametrize("mode", MODES)
def test_beside_windows_a_prefix_may_be_deleted_and_its_readers_preempted(mode):
    document = prompt_of(40 * BLOCK + 3)
    answers = []
    for disturbed in (False, True):
        sim = Simulation(PINS, max_model_len=1280, num_blocks=300, window=100, **mode)
        prefix = pin(sim, document)
        forget_raw(sim)
        names = [sim.add(document + prompt_of(20, seed), max_tokens=40) for seed in (1, 2, 3)]
        for _ in range(6):
            sim.step()
        if disturbed:
            sim.preempt(names[0])
            while names[0] not in {request.request_id for request in sim.scheduler.running}:
                sim.step()
            sim.scheduler._prefixes.drop(prefix)
            sim.add(prompt_of(70 * BLOCK, 9), "off", 30)  # writes what is free
        sim.finish()
        answers.append([sim.answers[name] for name in names])
        sim.check_nothing_left()
    assert answers[0] == answers[1]


# ---------------------------------------------------------------------- in several groups


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window", [0, 53])
def test_a_prefix_has_the_raw_blocks_of_every_group_that_is_compacted(mode, window):
    sim = Simulation(PINS, max_model_len=1280, num_blocks=600, num_compacted=3, window=window, **mode)
    document = prompt_of(40 * BLOCK + 5)
    prefix = pin(sim, document)
    assert prefix.plan.source_blocks == 38 and len(prefix.compacted) == 3 * 10
    assert [len(tail) for tail in prefix.tails] == [2, 2, 2]
    assert sim.free == sim.free_at_start - len(prefix.blocks)
    free = sim.free
    # Without windows one may go on from a part of it.
    names = [sim.add(document + prompt_of(50, seed), max_tokens=30) for seed in (1, 2)]
    names += [sim.add(document[: 39 * BLOCK] + prompt_of(50, 3), max_tokens=30)]
    sim.finish()
    expected = [40 * BLOCK, 40 * BLOCK, None if window else 39 * BLOCK]
    assert [sim.worker.attached.get(name) for name in names] == expected
    assert sim.free == free and prefix.users == 0
    sim.check_nothing_left()


def test_who_pins_in_several_groups_has_no_raw_copy_left_in_any():
    sim = Simulation(PINS, max_model_len=1280, num_blocks=400, num_compacted=2)
    prefix = pin(sim, prompt_of(40 * BLOCK))
    for group in range(2):
        hashes = prefix.hashes[: prefix.plan.source_blocks]
        assert not any(sim.pool.get_cached_block(each, [group]) for each in hashes)
    sim.check_nothing_left()


@pytest.mark.parametrize("groups", [dict(num_compacted=1), dict(num_compacted=2, window=53)], ids=str)
def test_who_pins_what_was_raw_before_has_no_raw_copy_of_it_left(groups):
    """Nor of what it computed again itself, as windows are cached at the ends of prompts alone, or of what
    another did that watches every query."""
    sim, document = Simulation(PINS, max_model_len=1280, num_blocks=500, **groups), prompt_of(40 * BLOCK + 3)
    sim.run(document + prompt_of(40, 1), "off")
    sim.run(document + prompt_of(40, 4), "h2o:budget=0.5")
    pin(sim, document)
    name = sim.add(document + prompt_of(20, 2), max_tokens=2)
    sim.finish()
    assert sim.worker.attached[name] == 40 * BLOCK
    sim.check_nothing_left()


@pytest.mark.parametrize("num_compacted", [1, 2])
def test_pins_leave_room_for_the_longest_request_in_every_group(num_compacted):
    """Which has 60 blocks in each group that is compacted, and 19 at most of the window's."""
    num_blocks = 1 + 60 * num_compacted + 19 + 20 * num_compacted
    sim = Simulation(
        PINS, num_blocks=num_blocks, max_model_len=60 * BLOCK, num_compacted=num_compacted, window=20
    )
    kept = [pin(sim, prompt_of(40 * BLOCK, seed), f"d{seed}") is not None for seed in range(3)]
    assert kept == [True, False, False]
    sim.run(prompt_of(59 * BLOCK, 9), "off", 10)
    assert not sim.preempted and len(sim.scheduler._prefixes) == 1
    sim.check_nothing_left()


# ---------------------------------------------------------------------- saved


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "groups",
    [
        dict(num_compacted=1),
        dict(num_compacted=1, window=20),
        dict(num_compacted=1, window=300),
        dict(num_compacted=1, chunk=11 * BLOCK),
        dict(num_compacted=2),
        dict(num_compacted=3, window=20),
    ],
    ids=str,
)
def test_a_prefix_that_is_loaded_is_read_as_the_one_that_was_saved(mode, groups):
    """Also in the step in which it is loaded, and where it goes in that step."""
    document, answers = prompt_of(40 * BLOCK + 3), []
    num_blocks = 300 * groups["num_compacted"]
    sim = Simulation(PINS, max_model_len=1280, num_blocks=num_blocks, **groups, **mode)
    pinned = pin(sim, document)
    answers.append(sim.run(document + prompt_of(20, 1), max_tokens=30))
    file = sim.saved("document")
    assert sim.load(*file) is False, "its name is taken"
    sim.scheduler._prefixes.drop(pinned)
    sim.run(prompt_of(70 * BLOCK, 9), "off", 30)  # writes what is free
    forget_raw(sim)
    free = sim.free
    taken = sim.pool.get_new_blocks(free - len(pinned.blocks) + 1)
    assert sim.load(*file) is False, "there is no room"
    sim.pool.free_blocks(taken)
    assert sim.load(*file)
    (prefix,) = sim.scheduler._prefixes
    assert [len(group) for group in prefix.beside] == [len(group) for group in pinned.beside]
    assert prefix.hashes == pinned.hashes and sim.free == free - len(prefix.blocks)
    name = sim.add(document + prompt_of(20, 1), max_tokens=30)
    sim.step()
    assert sim.worker.attached[name] == 40 * BLOCK and sim.worker.loaded == 1
    sim.finish()
    assert sim.answers[name] == answers[0]
    sim.scheduler._prefixes.drop(prefix)
    assert sim.load(*file)
    sim.scheduler._prefixes.drop(next(iter(sim.scheduler._prefixes)))  # before a step
    sim.run(prompt_of(70 * BLOCK, 10), "off", 3)
    assert sim.free == free
    sim.check_nothing_left()


@pytest.mark.parametrize(
    ("num_compacted", "window", "chunk"), [(1, 0, 0), (1, 20, 0), (1, 0, 96), (2, 0, 0), (2, 90, 0)]
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("when", ["prompt", "pressure", "streaming"])
def test_in_any_crowd_nothing_leaks_and_no_shared_page_is_written(
    seed, mode, when, num_compacted, window, chunk
):
    """Conversations that go on, branch and are deleted, documents that are pinned, in a small pool; some are
    saved, and loaded again."""
    draw = random.Random(seed)
    every = ",recompact_every=160" if when == "streaming" else ""
    engine = f"knorm:budget=0.25,prefix_share=0.4,when={when}{every},min_freed_tokens=16"
    num_blocks = draw.choice([90, 150, 260]) * num_compacted
    if window or chunk:  # of at most 256 tokens in each of two steps, and the window
        num_blocks = num_blocks + 64
    groups = dict(num_compacted=num_compacted, window=window, chunk=chunk)
    sim = Simulation(engine, num_blocks=num_blocks, max_model_len=1280, **groups, **mode)
    talks = [prompt_of(draw.randrange(100, 500), number) for number in range(6)]
    live: dict[str, int] = {}
    files: dict[str, tuple] = {}
    for number in range(60):
        talk = draw.randrange(len(talks))
        if len(talks[talk]) > 1000:
            talks[talk] = talks[talk][: draw.randrange(80, 400)]
        salt = draw.choice([None, None, "salt"])
        compression = draw.choice([None, None, None, "off", "keydiff:budget=0.5", "snapkv:budget=0.25"])
        if draw.random() < 0.15:
            compression = f"knorm:budget=0.25,prefix=p{number % 3}"
        name = sim.add(
            talks[talk] + prompt_of(draw.randrange(1, 60), number),
            compression,
            draw.randrange(1, 50),
            cache_salt=salt,
            priority=0,
        )
        live[name] = talk
        for _ in range(draw.randrange(0, 12)):
            sim.step()
        ended = [name for name in live if name not in sim.scheduler.requests]
        for name in ended:
            row, talk = sim.worker.rows.get(name), live.pop(name)
            if row is not None and draw.random() < 0.5 and len(row.tokens) < 1000:
                talks[talk] = list(row.tokens)
        if live and draw.random() < 0.1:
            name = draw.choice(sorted(live))
            sim.abort(name)
            del live[name]
        if draw.random() < 0.2:
            forget_raw(sim)
        prefixes = list(sim.scheduler._prefixes)
        if prefixes and draw.random() < 0.1:
            sim.scheduler._prefixes.drop(draw.choice(prefixes))
        for prefix in list(sim.scheduler._prefixes):
            if prefix.name is not None and prefix.salt is None and draw.random() < 0.3:
                files[prefix.name] = sim.saved(prefix.name) or files[prefix.name]
                sim.scheduler._prefixes.drop(prefix)
        if files and draw.random() < 0.5:
            sim.load(*files[draw.choice(sorted(files))])
        running = [request.request_id for request in sim.scheduler.running]
        if running and draw.random() < 0.1:
            sim.preempt(draw.choice(running))
    sim.finish()
    assert sim.worker.loaded or when != "prompt" or not files
    assert sim.worker.attached or when != "prompt" or window or chunk  # where it is rare
    sim.check_nothing_left()


def test_a_thousand_conversations_with_deletions_while_they_are_used():
    """Each has up to four turns, interleaved; documents are pinned and deleted under their readers."""
    draw = random.Random(0)
    sim = Simulation(
        KEEPS, num_blocks=400, max_model_len=1280, max_num_batched_tokens=1024, asynchronous=True
    )
    documents = [prompt_of(draw.randrange(200, 400), 10_000 + number) for number in range(12)]
    waiting = [(number, 0, documents[number % 12] + prompt_of(9, number)) for number in range(1000)]
    live: dict[str, tuple[int, int]] = {}
    turns, most, ended = 0, 0, []
    while waiting or live:
        while waiting and len(live) < 24:
            number, turn, prompt = waiting.pop(draw.randrange(min(len(waiting), 40)))
            name = sim.add(prompt, max_tokens=draw.randrange(2, 9), name=f"{number}-{turn}")
            live[name], turns = (number, turn), turns + 1
        sim.steps = 0
        sim.step()
        for name in ended:  # of whom the worker has heard by now
            del sim.worker.rows[name]
        ended = [name for name in live if name not in sim.scheduler.requests]
        for name in ended:
            (number, turn), row = live.pop(name), sim.worker.rows[name]
            if turn < 3 and draw.random() < 0.25:
                waiting.append((number, turn + 1, row.tokens + prompt_of(20, turns)))
        prefixes = list(sim.scheduler._prefixes)
        most = max(most, len(prefixes))
        used = [prefix for prefix in prefixes if prefix.users]
        if used and draw.random() < 0.2:
            sim.scheduler._prefixes.drop(draw.choice(used))
        if draw.random() < 0.05:
            forget_raw(sim)
        if draw.random() < 0.02:
            name = f"d{draw.randrange(4)}"
            if (pinned := sim.scheduler._prefixes.named(name, None)) is not None:
                sim.scheduler._prefixes.drop(pinned)
            else:
                pinning = sim.add(
                    draw.choice(documents), f"{PINS},prefix={name}", 2, name=f"pin-{turns}-{name}"
                )
                live[pinning] = 0, 3
    assert turns > 1200 and len(sim.worker.attached) > 200 and most > 10
    sim.check_nothing_left()
