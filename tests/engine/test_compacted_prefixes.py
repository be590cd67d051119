"""Compacted prefixes in the engine: who attaches to one answers as whoever was compacted there."""

from dataclasses import replace

import pytest
import torch
from harness import first_difference, same_kept, sampling, tokens
from pinned import from_token, pin, save_and_drop
from saving import outcome

from vllm_kvcompress import load_prefix, prefix_files, save_prefix
from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.requests.saved import read, unfinished_name

DOCUMENT = 640  # tokens; blocks of 32
METHODS = [
    "knorm:budget=0.25",
    "snapkv:budget=0.25",
    "kv_compress:budget=0.125",
    "keydiff:budget=0.25,allocation=adaptive",
    "h2o:budget=0.25",
    "expected_attention:budget=0.25",
    "foresight:threshold=0.02,budget=0.5",
    "criticalkv:budget=0.25",
    "kivi",
    "snapkv+k4v3:budget=0.125",
    "snapkv+auto:budget=0.125",
    "snapkv+mixed_dim:budget=0.25",
    "kvzip:budget=0.25,chunk=600",
    "attention_matching:budget=0.1,chunk=600,references=256",
]


@pytest.fixture
def sharing(engine):
    """The shared engine; afterwards no prefix is left, and all of its blocks are given back."""
    yield engine
    for prefix in list(engine.scheduler._prefixes):
        engine.scheduler._prefixes.drop(prefix)
    engine.check_nothing_left()
    assert not engine.worker.compression.prefixes


@pytest.mark.parametrize("method", METHODS)
def test_who_attaches_goes_on_as_the_one_that_was_compacted_there(sharing, attachments, long_ids, method):
    document = long_ids(DOCUMENT, seed=3)
    # Goes on past its compaction with what is its answer: the next user's suffix.
    prefix, alone = pin(sharing, document, method, max_tokens=80)
    said = tokens(alone)
    free = sharing.free
    names = [sharing.add(document + said[:n], sampling(80 - n, method)) for n in (40, 45)]
    sharing.step()
    assert attachments == [(name, DOCUMENT // 32) for name in names]
    assert free - sharing.free <= 2 * 2
    sharing.check_accounts()
    sharing.finish()
    for n, name in zip((40, 45), names, strict=True):
        answer, rest = sharing.outputs.pop(name), alone
        difference = first_difference(answer, from_token(rest, n), gap=2e-3)
        assert difference is None or difference > 3
    assert prefix.hits == 2 and sharing.free == free
    assert {c.request for c in sharing.compactions} == {sharing.compactions[0].request}


@pytest.mark.parametrize(
    "method", ["snapkv:budget=0.25", "snapkv+k4v3:budget=0.125", "kivi", "snapkv+mixed_dim:budget=0.25"]
)
def test_who_is_compacted_again_writes_no_page_that_others_read(sharing, long_ids, method):
    """One goes on until it is compacted with its output, where its pages are cleared or written anew."""
    document = long_ids(DOCUMENT, seed=4)
    pin(sharing, document, method)
    suffix, short = long_ids(60, seed=10), sampling(90, method)
    expected = sharing.run(document + suffix, short)
    num = len(sharing.compactions)
    long = sharing.add(document + long_ids(700, seed=11), sampling(200, method))
    while len(sharing.compactions) == num:
        sharing.step()
    names = [sharing.add(document + suffix, short)]
    sharing.finish()
    sharing.outputs.pop(long)
    assert first_difference(sharing.outputs.pop(names[0]), expected) is None
    # What is free by now may be written by anybody.
    sharing.run(long_ids(2000, seed=20), sampling(2, "off"))
    assert first_difference(sharing.run(document + suffix, short), expected) is None


@pytest.mark.parametrize(
    "method",
    [
        "knorm:budget=0.25",
        "snapkv:budget=0.25",
        "keydiff:budget=0.25,allocation=adaptive",
        "foresight:budget=0.25",
        "snapkv+k4v3:budget=0.125",
        "snapkv+mixed_dim:budget=0.25",
    ],
)
def test_who_is_compacted_again_keeps_what_one_keeps_that_was_compacted_twice(
    sharing, attachments, long_ids, method
):
    prompt = long_ids(DOCUMENT + 420, seed=14)
    alone = sharing.run(prompt, sampling(20, f"{method},when=streaming,recompact_every={DOCUMENT}"))
    twice = sharing.compactions[:]
    assert [c.job.num_tokens for c in twice] == [DOCUMENT, len(prompt)]
    sharing.forget_prefixes()
    sharing.compactions.clear()
    pin(sharing, prompt[:DOCUMENT], method)
    answer = sharing.run(prompt, sampling(20, method))
    assert len(attachments) == 1
    for one, other in zip(twice, sharing.compactions, strict=True):
        assert (one.job.num_tokens, one.job.boundary) == (other.job.num_tokens, other.job.boundary)
        assert same_kept(one, other)
    assert first_difference(answer, alone) is None


def test_a_prefix_that_is_deleted_while_it_is_read_stays_whole_for_its_readers(sharing, long_ids):
    document, suffix = long_ids(DOCUMENT, seed=5), long_ids(40, seed=12)
    for method in ("knorm:budget=0.25", "kivi"):
        prefix, _ = pin(sharing, document, method)
        expected = sharing.run(document + suffix, sampling(40, method))
        name = sharing.add(document + suffix, sampling(40, method))
        for _ in range(4):
            sharing.step()
        sharing.scheduler._prefixes.drop(prefix)
        other = sharing.add(long_ids(3000, seed=21), sampling(20, "off"))
        sharing.finish()
        assert first_difference(sharing.outputs.pop(name), expected) is None
        sharing.outputs.pop(other)


def test_nobody_attaches_whose_prompt_is_another_or_who_asks_for_prompt_logprobs(
    sharing, attachments, long_ids
):
    document = long_ids(DOCUMENT, seed=6)
    pin(sharing, document, "knorm:budget=0.25")
    other = list(document)
    other[100] += 1
    sharing.run(other, sampling(4, "knorm:budget=0.25"))
    sharing.run(document + [5], sampling(4, "knorm:budget=0.25", prompt_logprobs=1))
    sharing.run(document + [5], sampling(4, "knorm:budget=0.5"))
    sharing.run(document + [5], sampling(4, "off"))
    assert not attachments


# ---------------------------------------------------------------------- saved


@pytest.mark.parametrize(
    "method",
    [
        "knorm:budget=0.25",
        "snapkv+k4v3:budget=0.125",
        "attention_matching:budget=0.1,chunk=600,references=256",
    ],
)
def test_a_saved_prefix_is_loaded_and_answers_the_same(sharing, attachments, long_ids, method, tmp_path):
    document, suffix = long_ids(DOCUMENT, seed=7), long_ids(40, seed=13)
    pin(sharing, document, method)
    expected = sharing.run(document + suffix, sampling(40, method))
    again = sharing.run(document + suffix + tokens(expected), sampling(30, method))
    save_and_drop(sharing, tmp_path / "document")
    # All of the pool is written by others meanwhile.
    sharing.run(long_ids(3500, seed=22), sampling(2, "off"))
    sharing.forget_prefixes()
    free = sharing.free
    load_prefix(sharing.llm, tmp_path / "document")
    (prefix,) = sharing.scheduler._prefixes
    assert sharing.free == free - len(prefix.blocks)
    # Attached to in the very step in which it is loaded.
    num = len(attachments)
    assert first_difference(sharing.run(document + suffix, sampling(40, method)), expected) is None
    assert len(attachments) == num + 1
    answer = sharing.run(document + suffix + tokens(expected), sampling(30, method))
    assert first_difference(answer, again) is None
    sharing.check_accounts()
    save_prefix(sharing.llm, "document", tmp_path / "again")
    one, other = (read(str(tmp_path / name)) for name in ("document", "again"))
    assert one.about == other.about
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_what_cannot_be_saved_or_loaded_is_said_in_one_line(sharing, long_ids, tmp_path):
    prefix, _ = pin(sharing, long_ids(DOCUMENT, seed=8), "knorm:budget=0.25")
    path = tmp_path / "document"

    def problem(call, *args) -> str:
        with pytest.raises(KVCompressionError) as error:
            call(sharing.llm, *args)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no prefix 'another'" in problem(save_prefix, "another", path)
    assert "cannot write" in problem(save_prefix, "document", tmp_path / "missing" / "document")
    save_prefix(sharing.llm, "document", path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert "name is taken" in problem(load_prefix, path)
    assert not sharing.worker.compression.read
    sharing.scheduler._prefixes.drop(prefix)
    assert "No such file" in problem(load_prefix, tmp_path / "missing")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in problem(load_prefix, path)
    for old, new in ((b'boundary\\": 608', b'boundary\\": 640'), (b'kept\\": 0.25', b'kept\\": [{}]')):
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        assert "damaged" in problem(load_prefix, path)
    weight = next(sharing.worker.model_runner.get_model().parameters())
    path.write_bytes(whole)
    before = weight.flatten()[0].item()
    weight.flatten()[0] += 1
    try:
        assert "another model" in problem(load_prefix, path)
    finally:
        weight.flatten()[0] = before
    blocks = sharing.pool.get_new_blocks(sharing.free - 5)
    try:
        assert "takes 6 blocks, and 5 are free" in problem(load_prefix, path)
    finally:
        sharing.pool.free_blocks(blocks)
    assert not sharing.worker.compression.read
    load_prefix(sharing.llm, path)


def saved_as(core, name, salt=None) -> str | None:
    """What is in the way of a prefix in the engine's folder."""
    core.kv_compression_save_prefix("ticket", name, salt)
    return became(core, "ticket")


def became(core, ticket: str) -> str | None:
    return outcome(lambda: core.kv_compression_prefix_saved(ticket))


def test_an_engine_steps_on_while_a_prefix_is_written(sharing, long_ids, tmp_path, blocked):
    """What is written is what it was when it was copied, also if it is dropped and its blocks are taken."""
    document, suffix, method = long_ids(DOCUMENT, seed=15), long_ids(40, seed=16), "knorm:budget=0.25"
    core = sharing.llm.llm_engine.engine_core.engine_core
    prefix, _ = pin(sharing, document, method)
    expected = sharing.run(document + suffix, sampling(20, method))
    for name in ("one", "two"):
        core.kv_compression_save_prefix(name, "document", None, str(tmp_path / name))
    sharing.scheduler._prefixes.drop(prefix)
    sharing.run(long_ids(3500, seed=22), sampling(2, "off"))
    sharing.forget_prefixes()
    for name in ("one", "two"):
        assert core.kv_compression_prefix_saved(name) == (False, None)
    assert not list(tmp_path.iterdir())
    blocked.set()
    assert became(core, "one") is None
    # Of one that waited for its turn nothing was copied.
    assert became(core, "two") == "there is no prefix 'document'"
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    load_prefix(sharing.llm, tmp_path / "one")
    assert first_difference(sharing.run(document + suffix, sampling(20, method)), expected) is None


def test_a_prefix_that_is_deleted_while_it_is_written_leaves_nothing_in_its_folder(
    sharing, long_ids, tmp_path, monkeypatch, blocked, caplog
):
    core, method = sharing.llm.llm_engine.engine_core.engine_core, "knorm:budget=0.25"
    ours = replace(sharing.scheduler.compression, prefix_folder=str(tmp_path))
    monkeypatch.setattr(sharing.scheduler, "compression", ours)
    pin(sharing, long_ids(DOCUMENT, seed=17), method)
    pin(sharing, long_ids(DOCUMENT, seed=18), method, "another")
    for ticket, name in (("one", "document"), ("two", "another"), ("three", "another")):
        core.kv_compression_save_prefix(ticket, name)
    assert core.kv_compression_delete_prefix("document", None)
    assert core.kv_compression_delete_prefix("another", None)
    assert core.kv_compression_prefix_saved("two") == (True, "it was deleted meanwhile")
    again, _ = pin(sharing, long_ids(DOCUMENT, seed=19), method)
    core.kv_compression_save_prefix("four", "document")
    blocked.set()
    assert became(core, "one") == "it was deleted meanwhile"
    assert became(core, "four") is None
    (path,) = tmp_path.iterdir()
    assert read(str(path)).tensors["tokens"].tolist() == list(again.tokens)
    assert [record.message for record in caplog.records if "not saved" in record.message] == [
        "kv-compression: the prefix 'document' was not saved: it was deleted meanwhile"
    ]
    path.unlink()
    path.mkdir()  # where nothing can be written
    (path / "something").touch()
    assert "cannot write" in saved_as(core, "document")
    assert "was not saved: cannot write" in caplog.records[-1].message
    (path / "something").unlink(), path.rmdir()


def test_an_engine_begins_with_what_one_before_has_left_in_its_folder(
    sharing, long_ids, tmp_path, monkeypatch, caplog
):
    core, method = sharing.llm.llm_engine.engine_core.engine_core, "knorm:budget=0.25"
    ours = replace(sharing.scheduler.compression, prefix_folder=str(tmp_path / "kept"))
    monkeypatch.setattr(sharing.scheduler, "compression", ours)
    for name, salt in (("one", None), ("one", "salt"), ("../another", None)):
        sharing.llm.llm_engine.add_request(
            f"{name}{salt}",
            {"prompt_token_ids": long_ids(DOCUMENT, seed=9), **({"cache_salt": salt} if salt else {})},
            sampling(2, f"{method},prefix={name}"),
        )
        sharing.finish()
        assert saved_as(core, name, salt) is None
    assert len(list((tmp_path / "kept").iterdir())) == 3
    (tmp_path / "kept" / f"{unfinished_name('killed.safetensors')}12").write_bytes(b"half of it")
    for prefix in list(sharing.scheduler._prefixes):
        sharing.scheduler._prefixes.drop(prefix)
    with monkeypatch.context() as second:
        second.setattr(core.vllm_config.parallel_config, "data_parallel_index", 1)
        prefix_files.load_folder(core)
    assert not sharing.scheduler._prefixes
    prefix_files.remove(core, "../another", None)
    (tmp_path / "kept" / "damaged.safetensors").write_bytes(b"nothing")
    prefix_files.load_folder(core)
    found = {(prefix.name, prefix.salt) for prefix in sharing.scheduler._prefixes}
    assert found == {("one", None), ("one", "salt")}
    hashes = {prefix.hashes for prefix in sharing.scheduler._prefixes}
    assert len(hashes) == 2, "the salt is in what a prefix is found by"
    assert len(list((tmp_path / "kept").iterdir())) == 3, "what was not finished is gone"
    assert [record.message for record in caplog.records if "not loaded" in record.message] == [
        f"kv-compression: a prefix was not loaded: {tmp_path}/kept/damaged.safetensors is not a compacted "
        "prefix, or it is damaged"
    ]
