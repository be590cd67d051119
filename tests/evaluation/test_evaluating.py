"""What `eval` asks, counts and leaves out, with a stand-in for the engine."""

import argparse
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.evaluation import engine as engine_module
from vllm_kvcompress.evaluation import report
from vllm_kvcompress.evaluation.engine import Divergence, Outcome, Reference
from vllm_kvcompress.evaluation.quality import calibrate, evaluate, retrieval
from vllm_kvcompress.evaluation.quality.samples import Sample, first_number, opening, starts_with
from vllm_kvcompress.evaluation.quality.texts import KINDS
from vllm_kvcompress.evaluation.store import Store
from vllm_kvcompress.evaluation.variants import EVERY_PROMPT, Variant
from vllm_kvcompress.paging.repetition import LEAST

BOS, EOS = 1, 2


class Letters:
    """A tokenizer of letters that begins a text and, on demand, ends it."""

    def __init__(self, begins: bool = True, ends: bool = False) -> None:
        self.before, self.behind = [BOS] * begins, [EOS] * ends

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [ord(letter) for letter in text]
        return [*self.before, *ids, *self.behind] if add_special_tokens else ids

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(token) for token in token_ids if token > EOS)


class FakeEngine:
    """Notes what it is asked; each answer keeps 30 % and forced tokens have logits that grow apart."""

    stock, cache_fraction, token_bytes, block_size = False, 1.0, 100.0, 32

    def __init__(self, tokenizer, **changes) -> None:
        self.tokenizer, self.asked = tokenizer, []
        vars(self).update(changes)

    def run(self, asks):
        self.asked += asks
        for ask in asks:
            for position in range(len(ask.forced) if ask.recorder else 0):
                # The first is sampled before compaction, and is nobody's business.
                wrong = 0.0 if ask.variant == "off" else 100.0 if position == 0 else float(position)
                logits = torch.zeros(300)
                logits[7] = wrong
                ask.recorder(position, logits)
        return [Outcome("42", 1.0 if ask.variant == "off" else 0.3) for ask in asks]

    def step_seconds(self, prompt, variant, batch, steps):
        self.stepped = len(prompt)
        return 0.1


ROWS = [Variant("off"), Variant("snapkv:budget=0.25", "snapkv", 0.25)]


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "results.jsonl", {})


# ---------------------------------------------------------------------- special tokens


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_nothing_stands_between_a_document_and_what_follows_it(store, begins, ends):
    tokenizer = Letters(begins, ends)
    document, question = [BOS] * begins + [ord(c) for c in "document"], [ord(c) for c in "question"]
    sample = Sample("needle", "needle/0", "document", "question", ("42",), first_number, 8, 8)
    engine = FakeEngine(tokenizer)
    for mode in evaluate.MODES:
        evaluate._ask(engine, sample, mode, ROWS, store)
    inside, after = engine.asked[0], engine.asked[2]
    assert (inside.prompt, inside.forced) == (document + question, ())
    assert (after.prompt, after.forced) == (document, question)
    assert opening(tokenizer, "document") == document
    made = retrieval.Document("0", "document" * 9, " goes on", 72, [])
    for task in evaluate.KL_TASKS:
        text = evaluate._continuation(tokenizer, made, task, 4)
        assert EOS not in text["prompt"] + text["tokens"]
        assert text["prompt"][0] == (BOS if begins else ord("d"))


def test_calibration_goes_on_without_an_end_of_sequence():
    given = argparse.Namespace(data=None, documents=1, tokens=4000, seed=0, continuation=8)
    for text in calibrate.calibration_texts(Letters(ends=True), given):
        assert EOS not in text.document + text.continuation


def test_a_tokenizer_whose_special_tokens_are_inside_a_text_is_refused():
    class Inside(Letters):
        def encode(self, text, add_special_tokens=True):
            ids = super().encode(text, False)
            return [*ids[:2], BOS, *ids[2:]] if add_special_tokens else ids

    with pytest.raises(KVCompressionError, match="special tokens"):
        opening(Inside(), "document")


# ---------------------------------------------------------------------- the model's context


def work_of(monkeypatch, limit: int, lengths: list[int], tasks=("needle", "kl_prose"), rows=ROWS, **given):
    monkeypatch.setattr(evaluate, "_tokenizer", lambda model: Letters(ends=True))
    monkeypatch.setattr(evaluate, "context_limit", lambda model: limit)
    arguments = {"text": None, "repetitions": 1, "seed": 0, "kl_tokens": 8, "data": None, "limit": 5} | given
    return evaluate.Work.of(argparse.Namespace(**arguments), "m", tasks, lengths, rows)


def test_documents_beyond_the_context_are_left_out_and_named(monkeypatch):
    work = work_of(monkeypatch, 3000, [2500, 5000])
    assert [sample.id for sample in work.samples] == ["needle/2500/0"]
    assert [text["id"] for text in work.texts] == ["kl_prose/2500/0"]
    assert set(work.too_long) == {"needle/5000/0", "kl_prose/5000/0"}
    assert all(tokens > 3000 for tokens in work.too_long.values())
    assert "needle/5000/0 (" in work.left_out() and "3000 tokens" in work.left_out()
    assert len(work.left_out().splitlines()) == 1
    settings = {"model": "m", "lengths": [2500, 5000], "block_size": 32, "seed": 0}
    settings |= {"too_long": work.too_long, "context": work.limit}
    assert "needle/5000/0 (" in report.table(report.summarise(settings, ROWS, {}))


def test_in_turn_each_question_comes_after_those_before_and_their_answers(monkeypatch):
    work = work_of(monkeypatch, 9000, [2500], tasks=["needle", "passkey", "recall", "turns"])
    needle, passkey, recall, *turns = work.samples
    assert [sample.task for sample in turns] == ["turns"] * 5 and len({sample.id for sample in turns}) == 5
    assert turns[0].question == f"{needle.question} {needle.answers[0]}.{passkey.question}"
    assert turns[0].answers == passkey.answers and turns[0].document == needle.document
    last = turns[-1]
    assert last.question.endswith(recall.question) and last.answers == recall.answers
    for question in (needle.question, passkey.question, turns[2].question):
        assert last.question.count(question) == 1


def test_passages_of_documents_of_every_kind_are_repeated(monkeypatch, store):
    length = 2500
    work = work_of(monkeypatch, 9000, [length], tasks=["kl_kinds"], repetitions=2)
    assert [text["kind"] for text in work.texts] == 2 * list(KINDS)
    for text in work.texts:
        document, cue = text["prompt"][: -evaluate.KL_CUE], text["prompt"][-evaluate.KL_CUE :]
        assert cue + text["tokens"] == document[len(document) // 3 :][: len(cue) + 9]
        assert abs(len(document) - length) < 3  # of a text that was cut
    tables = dict(prose=[0.1, 0.3], json=[0.2, 0.2])
    results = {}
    for row, fraction in zip(ROWS, (1.0, 0.25), strict=True):
        for kind, values in tables.items():
            for index, value in enumerate(values):
                results["kl", f"{kind}/{index}", row.spec] = {
                    "task": "kl_kinds", "kind": kind, "kl": [value * (fraction < 1)], "surprise": [1.0],
                    "kept_fraction": fraction, "length": 400, "seconds": 1.0,
                }  # fmt: skip
    settings = {"model": "m", "lengths": [400], "block_size": 32, "seed": 0}
    summary = report.summarise(settings, ROWS, results)
    assert summary["rows"][1]["kinds"]["prose"]["kl"]["value"] == pytest.approx(0.2)
    (line,) = [
        line for line in report.table(summary).splitlines() if line.startswith("| snapkv") and ";" in line
    ]
    assert "0.200 [0.004, 0.396]; 25 %" in line and "0.200 [0.200, 0.200]; 25 %" in line


def test_a_document_that_just_fits_is_asked(monkeypatch):
    (sample,) = work_of(monkeypatch, 9000, [2500], ["needle"]).samples
    needed = 1 + len(sample.document) + len(sample.question) + sample.max_tokens  # one begins it
    fits = work_of(monkeypatch, needed, [2500], ["needle"])
    assert fits.samples and not fits.too_long and fits.length == needed
    with pytest.raises(KVCompressionError, match="nothing remains: lower --lengths") as error:
        work_of(monkeypatch, needed - 1, [2500], ["needle"])
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "method, room", [("kvzip", LEAST), ("attention_matching", LEAST), ("foresight", 0), ("stock:fp8", 0)]
)
def test_behind_what_is_repeated_room_is_left_in_the_context_for_the_least_repetition(
    monkeypatch, method, room
):
    rows = [*ROWS, Variant(method if method.startswith("stock") else f"{method}:budget=0.25")]
    (sample,) = work_of(monkeypatch, 9000, [2500], ["needle"]).samples
    prompt = 1 + len(sample.document) + len(sample.question)
    needed = prompt + max(sample.max_tokens, room)
    assert work_of(monkeypatch, needed, [2500], ["needle"], rows).length == needed
    with pytest.raises(KVCompressionError, match=f"needle/2500/0 \\({needed} tokens"):
        work_of(monkeypatch, needed - 1, [2500], ["needle"], rows)
    (text,) = work_of(monkeypatch, 9000, [2500], ["kl_prose"]).texts
    needed = len(text["prompt"]) + max(len(text["tokens"]), room)
    assert work_of(monkeypatch, needed, [2500], ["kl_prose"], rows).length == needed
    long = replace(sample, document="d" * 5000)
    cut = evaluate._shortened(long, Letters(), 3000, room)
    assert 2990 < 1 + len(cut.document) + len(cut.question) + max(cut.max_tokens, room) <= 3000


@pytest.mark.parametrize("limit", [2800, 3500, 100_000])
def test_an_engine_has_room_for_repetitions_as_long_as_the_models_context_allows(monkeypatch, store, limit):
    made = []

    def fake(model, length, block_size, config):
        made.append((length, FakeEngine(Letters())))
        return made[-1][1]

    monkeypatch.setattr(engine_module, "Engine", fake)
    rows = [*ROWS, Variant("kvzip:budget=0.25", "kvzip", 0.25)]
    work = work_of(monkeypatch, limit, [2500], rows=rows)
    evaluate._measure(argparse.Namespace(block_size=32, modes=evaluate.MODES), "m", work, rows, store)
    ((length, engine),) = made
    longest = max(len(ask.prompt) for ask in engine.asked)
    assert length == limit or length >= 2 * longest + LEAST
    assert max(longest, engine.stepped) + LEAST <= length <= limit


def test_the_engine_is_made_for_what_is_asked_and_everything_is(monkeypatch, store):
    made = []

    def fake(model, length, block_size, config):
        assert config == EVERY_PROMPT
        made.append((length, FakeEngine(Letters())))
        return made[-1][1]

    monkeypatch.setattr(engine_module, "Engine", fake)
    work = work_of(monkeypatch, 3000, [2500, 5000])
    evaluate._measure(argparse.Namespace(block_size=32, modes=evaluate.MODES), "m", work, ROWS, store)
    ((length, engine),) = made
    assert max(len(a.prompt) + len(a.forced) + a.max_tokens for a in engine.asked) <= length <= 3000
    assert engine.stepped + evaluate.STEP_ROOM <= length
    asked = {key[1:] for key in store.results if key[0] == "ask"}
    assert asked == {("needle/2500/0", mode, row.spec) for mode in evaluate.MODES for row in ROWS}
    assert {key[1:] for key in store.results if key[0] == "kl"} == {
        ("kl_prose/2500/0", row.spec) for row in ROWS
    }


def test_benchmark_documents_are_cut_to_fit_even_where_the_cut_text_has_more_tokens():
    class Growing(Letters):
        """A cut makes more tokens of the text than were left of it."""

        def decode(self, token_ids):
            return super().decode(token_ids) + "~" * 20

    sample = Sample("qasper", "qasper/0", "d" * 500, "q" * 30, ("42",), first_number, 16, 500)
    for tokenizer in (Letters(ends=True), Growing()):
        cut = evaluate._shortened(sample, tokenizer, 200, 0)
        total = len(opening(tokenizer, cut.document)) + 30 + 16
        assert 100 < total <= 200
    whole = evaluate._shortened(sample, Letters(), 600, 0)
    assert whole is sample
    hopeless = replace(sample, question="q" * 300)
    assert evaluate._tokens_of(evaluate._shortened(hopeless, Letters(), 200, 0), Letters(), 0) > 200


@pytest.mark.parametrize("suite", ["longbench", "ruler"])
def test_benchmarks_are_found(suite, tmp_path):
    arguments = argparse.Namespace(data=tmp_path, limit=1)
    with pytest.raises(KVCompressionError, match="is not there"):
        evaluate._benchmark_samples([suite], arguments, Letters(), 4096, 0)


# ---------------------------------------------------------------------- what is counted


def test_divergence_counts_what_compaction_can_change_and_nothing_else(store):
    tokens = [5, 6, 7, 8]
    text = {"id": "kl_prose/0", "task": "kl_prose", "prompt": [1] * 100, "tokens": tokens, "length": 100}
    evaluate._diverge(FakeEngine(Letters()), text, ROWS, [], store, {})
    full, ours = (store.results["kl", "kl_prose/0", row.spec] for row in ROWS)
    # The first token is sampled before the prompt is compacted; the 3 others feel it.
    assert full["kl"] == [0.0, 0.0, 0.0]
    assert len(ours["kl"]) == len(ours["surprise"]) == 3

    def kl(height: float) -> float:
        """KL(uniform over 300 || a softmax whose one logit stands out)."""
        return math.log(299 + math.exp(height)) - height / 300 - math.log(300)

    assert ours["kl"] == pytest.approx([kl(1), kl(2), kl(3)], abs=1e-4)
    total = [math.log(299 + math.exp(height)) for height in (1, 2, 3)]  # token 7 is the second of them
    assert ours["agrees"] == [0, 0, 0]
    assert ours["surprise"] == pytest.approx([total[0], total[1] - 2, total[2]], abs=1e-4)


def test_divergence_is_from_the_full_cache_to_ours():
    reference = Reference()
    full, ours = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 3.0])
    reference(0, full)
    recorder = Divergence(reference, [1])
    recorder(0, ours)
    p, q = full.softmax(-1), ours.softmax(-1)
    assert recorder.kl[0] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert recorder.surprise[0] == pytest.approx(-float(q[1].log()), rel=1e-5)
    assert not recorder.agrees[0]
    recorder(0, full)
    assert recorder.agrees[0]


@pytest.mark.parametrize("count", [1, 8])
def test_one_token_more_is_forced_than_is_measured(count):
    document = retrieval.Document("0", "document" * 9, " goes on and on", 72, [])
    for task in evaluate.KL_TASKS:
        text = evaluate._continuation(Letters(), document, task, count)
        assert len(text["tokens"]) == count + 1
    again = evaluate._continuation(Letters(), document, "kl_repeat", 8)
    whole = again["prompt"] + again["tokens"]
    at, cue = 73 // 3, evaluate.KL_CUE
    assert whole[73:] == whole[at : at + cue + 9]  # the passage again, from its cue on


def test_a_wrong_number_before_the_right_one_is_wrong():
    assert first_number(" 41, no: 42", ("42",)) == 0.0
    assert first_number(" it is 42, not 41", ("42",)) == 1.0
    assert first_number(" 421", ("42",)) == 0.0
    assert first_number("", ("42",)) == 0.0
    assert starts_with(" a wrong start, then the passage", ("the passage",)) == 0.0


def test_kept_bytes_of_a_quantized_cache_are_its_own(store):
    """An fp8 row holds every token in half the bytes: what is kept is half, and so are the bytes, once."""
    sample = Sample("needle", "needle/0", "d" * 99, "", ("42",), first_number, 8, 8)
    row = Variant("stock:fp8", "fp8")

    class Fp8(FakeEngine):
        def run(self, asks):
            return [Outcome("42", self.cache_fraction) for _ in asks]

    evaluate._ask(
        Fp8(Letters(), stock=True, cache_fraction=0.5, token_bytes=50.0), sample, "inside", [row], store
    )
    evaluate._ask(FakeEngine(Letters()), sample, "inside", ROWS, store)
    fp8, full, ours = (store.results["ask", "needle/0", "inside", r.spec] for r in [row, *ROWS])
    assert (full["kept_fraction"], full["kept_bytes"]) == (1.0, 100 * 100.0)
    assert (ours["kept_fraction"], ours["kept_bytes"]) == (0.3, pytest.approx(30 * 100.0))
    assert (fp8["kept_fraction"], fp8["kept_bytes"]) == (0.5, 100 * 50.0)


def test_the_engine_tells_how_small_a_quantized_cache_is():
    spec = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=50, dtype=torch.float8_e4m3fn)
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["0", "1"])
    hf_config = SimpleNamespace(dtype=torch.bfloat16)
    fake = SimpleNamespace(
        stock=True,
        block_size=32,
        scheduler=SimpleNamespace(kv_cache_config=SimpleNamespace(kv_cache_groups=[group])),
        llm=SimpleNamespace(llm_engine=SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config))),
    )
    fake._group = engine_module.Engine._group.fget(fake)
    assert engine_module.Engine.cache_fraction.fget(fake) == 0.5
    assert engine_module.Engine.token_bytes.fget(fake) == 200
    fake.stock = False
    assert engine_module.Engine.cache_fraction.fget(fake) == 1.0


# ---------------------------------------------------------------------- what the table says


def asked(spec: str, mode: str, score: float, number: int = 0, **changes) -> tuple[tuple, dict]:
    result = {
        "task": "needle",
        "length": 512,
        "depth": None,
        "score": score,
        "kept_fraction": 1.0,
        "kept_bytes": 1e6,
        "compaction_seconds": 0.0,
        "seconds": 1.0,
    }
    return ("ask", f"needle/{number}", mode, spec), result | changes


def cells_of(results: dict) -> list[str]:
    settings = {"model": "m", "lengths": [512], "block_size": 32, "seed": 0}
    lines = report.table(report.summarise(settings, ROWS, results)).splitlines()
    (row,) = [line for line in lines if line.startswith("| snapkv")][:1]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_each_way_of_asking_is_divided_by_the_full_caches_own():
    """The full cache answers 4 of 4 inside and 2 of 4 after; half of each is 50 %, whatever the other is."""
    results = dict(
        asked(spec, mode, float(number < right), number)
        for spec, mode, right in [
            ("off", "inside", 4), ("off", "after", 2),
            ("snapkv:budget=0.25", "inside", 1), ("snapkv:budget=0.25", "after", 1),
        ]
        for number in range(4)
    )  # fmt: skip
    cells = cells_of(results)
    assert (cells[5], cells[7]) == ("25 %", "50 %")


def test_prefill_is_the_slowest_answer_at_a_length():
    """A document's first question pays its prefill, and its others find it cached."""
    results = dict(
        asked("off", "inside", 1.0, number, length=length, seconds=seconds)
        for number, (length, seconds) in enumerate(
            [(512, 0.1), (512, 2.0), (512, 0.3), (1024, 5.0), (1024, 0.2)]
        )
    )
    results |= [asked("off", "after", 1.0, 9, seconds=60.0), asked("snapkv:budget=0.25", "inside", 1.0, 0)]
    settings = {"model": "m", "lengths": [512, 1024], "block_size": 32, "seed": 0}
    assert report.summarise(settings, ROWS, results)["prefill_seconds"] == {"512": 2.0, "1024": 5.0}
