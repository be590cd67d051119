"""Repetitions and studies are noted, in no full graph, and all else decodes in full graphs."""

from collections import Counter

import pytest
from alike import assert_same, replay_captures, served, warm_up

from vllm_kvcompress import KVCompressionConfig
from vllm_kvcompress.attention import gpu
from vllm_kvcompress.requests.observer import DecodingSpan, RepeatedSpan

OPTIONS = dict(
    max_model_len=512,
    max_num_batched_tokens=64,
    max_num_seqs=8,
    num_gpu_blocks_override=120,
    additional_config={"kv_compression": "attention_matching+kivi8:budget=0.1,references=32,waits=true"},
)
REQUESTS = [  # method, prompt tokens
    ("off", 40),
    ("kvzip:budget=0.3,chunk=70", 101),
    ("attention_matching+kivi8:budget=0.1,references=32,waits=true,chunk=90", 150),
    ("attention_matching+kivi8:budget=0.1,references=32,waits=true,queries=self-study,answer_tokens=3", 150),
    ("h2o:budget=0.3,window=8,recompact_every=3", 85),  # two of a kind decode as one, of unlike lengths
    ("h2o:budget=0.3,window=8,recompact_every=3", 117),
    ("snapkv:budget=0.3,window=8,recompact_every=3", 117),
]


@pytest.fixture
def noted(monkeypatch) -> Counter:
    """Tokens of each repetition that spans have noted, by its owner and its number."""
    found, record = Counter(), RepeatedSpan.record

    def counting(self, layer, query):
        if layer == 0:
            owner, _, number = self.part.request_id.partition(":")
            found[owner.partition("-")[0], number] += self.tokens.stop - self.tokens.start
        record(self, layer, query)

    monkeypatch.setattr(RepeatedSpan, "record", counting)
    return found


@pytest.mark.timeout(1500)
def test_the_same_is_kept_where_all_else_decodes_in_replayed_graphs(
    tiny_that_reads, start_engine, noted, monkeypatch
):
    reference = served(start_engine(tiny_that_reads, "v1", "cpu", **OPTIONS), REQUESTS)
    assert len(reference[1]) == len(REQUESTS) - 1
    wanted = dict(noted)
    noted.clear()

    engine = start_engine(tiny_that_reads, "v2", "gpu", asynchronous=True, **OPTIONS)
    observer, alone = engine.worker.compression.observer, []
    notes = observer.notes

    def asked(request_ids):
        found = notes(request_ids)
        if found and isinstance(request_ids, dict) and set(request_ids.values()) == {1}:
            alone.append(list(request_ids))
        return found

    monkeypatch.setattr(observer, "notes", asked)
    together, record = [], DecodingSpan.record
    monkeypatch.setattr(
        DecodingSpan, "record", lambda span, *args: together.append(len(span.rows)) or record(span, *args)
    )
    replayed = replay_captures(engine, monkeypatch)
    assert_same(reference, served(engine, REQUESTS), REQUESTS)
    assert noted == wanted and len(wanted) == 2 + 2 + 4, "parts of two contexts, and four studies"
    assert 2 in together
    studied = [step for step in alone if any(":repeat-" in name for name in step)]
    assert studied and replayed, "there were steps of one token each, with and without something to note"


@pytest.mark.parametrize("method", ["kvzip:budget=0.3", "kvzip+kivi8:budget=0.1"])
def test_compactions_are_compiled_before_anything_is_served(
    method, tiny_that_reads, start_engine, monkeypatch
):
    monkeypatch.setattr(gpu, "MAX_TILE", 2)  # longer rows are slow to interpret
    options = OPTIONS | {"additional_config": {"kv_compression": method}}
    for job in warm_up(start_engine(tiny_that_reads, "v2", "gpu", **options)):
        assert job.config.record_format == KVCompressionConfig.parse(method).record_format
