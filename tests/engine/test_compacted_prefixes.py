"""Compacted prefixes in the engine: who attaches to one answers as whoever was compacted there."""

import pytest
from harness import first_difference, sampling, tokens

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


def pin(engine, prompt, compression, name="document", max_tokens=2, **options):
    separator = "," if ":" in compression else ":"
    output = engine.run(prompt, sampling(max_tokens, f"{compression}{separator}prefix={name}", **options))
    prefix = engine.scheduler._prefixes.named(name, None)
    assert prefix is not None
    return prefix, output


def attached(engine) -> list[str]:
    """Watches which requests attach."""
    names, use = [], engine.scheduler._attach

    def noting(request, hit):
        names.append((request.request_id.rpartition("-")[0], len(hit.blocks[0])))
        return use(request, hit)

    engine.scheduler._attach = noting
    return names


@pytest.fixture
def attachments(sharing):
    plain = sharing.scheduler._attach
    yield attached(sharing)
    sharing.scheduler._attach = plain


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
        difference = first_difference(answer, _from(rest, n), gap=2e-3)
        assert difference is None or difference > 3
    assert prefix.hits == 2 and sharing.free == free
    assert {c.request for c in sharing.compactions} == {sharing.compactions[0].request}


def _from(output, begin):
    """An output without its first tokens."""
    from copy import copy

    output = copy(output)
    sample = copy(output.outputs[0])
    sample.token_ids, sample.logprobs = list(sample.token_ids)[begin:], sample.logprobs[begin:]
    output.outputs = [sample]
    return output


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
