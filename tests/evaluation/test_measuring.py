"""The arithmetic of the evaluation: variants, stored results, intervals, the table, hidden facts."""

import contextlib
import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from vllm_kvcompress import profiles
from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.evaluation import report
from vllm_kvcompress.evaluation.host import engine_environment
from vllm_kvcompress.evaluation.pictures import MODES
from vllm_kvcompress.evaluation.quality import retrieval
from vllm_kvcompress.evaluation.speed import bench, prefixes, rates, stepped
from vllm_kvcompress.evaluation.speed.served import first_errors
from vllm_kvcompress.evaluation.store import Store
from vllm_kvcompress.evaluation.variants import EVERY_PROMPT, Variant, served_by, split_methods, variants


def test_methods_are_split_where_a_method_begins():
    given = "adakv,snapkv:allocation=global,window=16,kv_compress"
    assert split_methods(given) == ["adakv", "snapkv:allocation=global,window=16", "kv_compress"]
    given = "snapkv:window=16,allocation=profile:/a/b.json,kv_compress:window=8"
    assert split_methods(given) == ["snapkv:window=16,allocation=profile:/a/b.json", "kv_compress:window=8"]
    given = "snapkv:when=pressure,ladder=0.5,0.25,kv_compress"
    assert split_methods(given) == ["snapkv:when=pressure,ladder=0.5,0.25", "kv_compress"]


def test_variants_start_with_the_full_cache():
    rows = variants(["snapkv:window=16", "adakv", "kvzip:budget=0.9,threshold=0.1"], [0.5, 0.125])
    assert [row.spec for row in rows] == [
        "off",
        "snapkv:window=16,budget=0.5",
        "snapkv:window=16,budget=0.125",
        "adakv:budget=0.5",
        "adakv:budget=0.125",
        "kvzip:budget=0.9,threshold=0.1",
    ]
    assert [row.budget for row in rows] == [None, 0.5, 0.125, 0.5, 0.125, 0.9]


def test_an_engine_serves_the_head_profile_that_rows_name(tmp_path):
    named = f"profile:{tmp_path / 'own.json'}"
    (tmp_path / "own.json").write_bytes(next(profiles.FOLDER.glob("*.json")).read_bytes())
    specs = ["off", "snapkv:budget=0.5", f"snapkv:allocation={named}", f"mixed_dim_kv_h:allocation={named}"]
    config = served_by(specs)
    assert config.allocation == named
    assert [config.for_request(spec).allocation for spec in specs[1:]] == [None, named, named]
    assert config.for_request(specs[1]) == EVERY_PROMPT.for_request(specs[1])


def test_packaged_head_profiles_are_served_by_every_engine():
    assert served_by(["off", "snapkv:allocation=profile:smollm2-135m-instruct"]) == EVERY_PROMPT


def test_several_own_head_profiles_are_refused():
    with pytest.raises(KVCompressionError, match=r"^one engine serves one head profile; choose of /a, /b$"):
        served_by(["snapkv:allocation=profile:/b", "off", "adakv:allocation=profile:/a"])


@pytest.mark.parametrize("method", ["snapkw", "snapkv:windwo=3", "snapkv:budget=5"])
def test_a_wrong_method_is_one_line(method):
    with pytest.raises(KVCompressionError) as error:
        variants([method], [0.25])
    assert "\n" not in str(error.value)


def test_a_store_goes_on_where_a_run_was_ended(tmp_path):
    path = tmp_path / "results.jsonl"
    Store(path, {"seed": 0}).add(("ask", "a"), score=1.0)
    with path.open("a") as file:
        file.write('{"key": ["ask", "b"], "sco')  # the power went
    again = Store(path, {"seed": 0})
    assert ("ask", "a") in again and ("ask", "b") not in again
    again.add(("ask", "b"), score=0.0)
    third = Store(path, {"seed": 0})
    assert third.results["ask", "a"]["score"] == 1.0
    assert third.results["ask", "b"]["score"] == 0.0


def test_a_store_refuses_other_settings(tmp_path):
    Store(tmp_path / "r.jsonl", {"seed": 0})
    with pytest.raises(KVCompressionError, match="other settings"):
        Store(tmp_path / "r.jsonl", {"seed": 1})


def test_wilson_interval():
    # Brown, Cai, DasGupta 2001: p = 0.5, n = 10 gives 0.2366 to 0.7634.
    got = report.share([1.0] * 5 + [0.0] * 5)
    assert (got["low"], got["high"]) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert report.share([1.0] * 4)["high"] == 1.0
    assert report.share([]) is None


def test_mean_interval():
    got = report.mean([1.0, 2.0, 3.0])
    assert got["value"] == 2.0
    assert got["high"] - got["value"] == pytest.approx(1.96 / math.sqrt(3))
    assert math.isnan(report.mean([1.0])["low"])


def results_of(scores: dict[str, dict[str, list[float]]]) -> dict:
    """Results of `scores[variant][task]`, the same inside and after."""
    made = {}
    for variant, tasks in scores.items():
        for task, values in tasks.items():
            for number, score in enumerate(values):
                for mode in ("inside", "after"):
                    made["ask", f"{task}/{number}", mode, variant] = {
                        "task": task,
                        "length": 512,
                        "depth": 0.1 if task == "needle" else None,
                        "score": score,
                        "kept_fraction": 1.0 if variant == "off" else 0.3,
                        "kept_bytes": 3e6,
                        "compaction_seconds": 0.0 if variant == "off" else 0.05,
                        "seconds": 2.0,
                    }
        made["kl", "kl_prose/0", variant] = {
            "task": "kl_prose",
            "length": 512,
            "kl": [0.0, 0.2],
            "surprise": [math.log(4), math.log(9)],
            "agrees": [1, 1, 0, 1],
            "kept_fraction": 1.0 if variant == "off" else 0.3,
            "seconds": 1.0,
        }
        made["step", variant] = {"seconds": 0.1 if variant == "off" else 0.05}
    return made


ROWS = [Variant("off"), Variant("snapkv:budget=0.25", "snapkv", 0.25)]
SETTINGS = {"model": "/models/some", "lengths": [512], "block_size": 32, "seed": 0}


@pytest.fixture
def summary():
    scores = {
        "off": {"needle": [1.0, 1.0], "json": [0.0, 0.0]},
        "snapkv:budget=0.25": {"needle": [1.0, 0.0], "json": [1.0, 1.0]},
    }
    return report.summarise(SETTINGS, ROWS, results_of(scores))


def test_a_task_that_the_full_cache_does_not_solve_is_left_out(summary):
    assert summary["left_out"] == {"inside": ["json"], "after": ["json"]}
    assert summary["rows"][1]["inside"]["value"] == 0.5  # the needle's alone
    assert summary["rows"][1]["inside"]["n"] == 2


def test_without_questions_memory_comes_from_the_continuations():
    results = {key: r for key, r in results_of({"off": {}, "snapkv:budget=0.25": {}}).items()}
    rows = report.summarise(SETTINGS, ROWS, results)["rows"]
    assert [row["kept_fraction"] for row in rows] == [1.0, 0.3]
    assert rows[1]["inside"] is None


def test_the_table_shows_what_was_measured(summary):
    lines = report.table(summary).splitlines()
    (row,) = [line for line in lines if line.startswith("| snapkv")][:1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["snapkv", "0.25", "30 %"]
    assert cells[5] == "50 %"  # of the full cache's
    assert cells[8] == "0.100"  # mean KL on prose
    assert cells[10] == "6.00"  # perplexity: the square root of 4 * 9
    assert cells[12] == "75.0"  # next tokens that are the full cache's
    assert cells[14] == "2.5 %"  # 0.05 s over a prefill of 2 s
    assert cells[15] == "0.50"
    assert any("Left out of *inside*: json" in line for line in lines)


def test_the_summary_is_plain_data(summary):
    assert json.loads(json.dumps(summary))["rows"][1]["label"] == "snapkv"


def test_needle_cells_lie_at_their_depth_and_length(summary):
    needle = summary["needle"]
    assert (needle["depths"], needle["lengths"]) == ([0.1], [512])
    assert needle["cells"]["snapkv:budget=0.25"]["inside"] == [[0.5]]


class Words:
    """A tokenizer whose tokens are words with the white space before them."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[str]:
        words, current = [], ""
        for letter in text:
            if letter.isspace() and current.strip():
                words.append(current)
                current = ""
            current += letter
        return [*words, current] if current else words

    def decode(self, token_ids: list[str]) -> str:
        return "".join(token_ids)


@pytest.fixture(scope="module")
def documents():
    return retrieval.documents(Words(), [600, 1200], 5, retrieval.default_prose())


def test_documents_have_their_length(documents):
    for document in documents:
        # A line break counts as a token of its own where a line is encoded by itself.
        assert abs(len(Words().encode(document.text)) - document.length) <= 0.05 * document.length


def test_every_answer_is_in_its_document_and_only_there(documents):
    for document in documents:
        for sample in document.samples:
            assert sample.document == document.text
            flat = " ".join(document.text.split())
            assert all(answer in flat for answer in sample.answers)
            assert not any(answer in sample.question for answer in sample.answers)
            perfect = " " + ", ".join(sample.answers)
            assert sample.metric(perfect, sample.answers) == 1.0
            assert sample.metric(" nothing of the kind", sample.answers) == 0.0


def test_facts_lie_about_where_they_are_said_to(documents):
    for document in documents:
        for sample in document.samples:
            if sample.depth is not None:
                at = document.text.index(sample.answers[0]) / len(document.text)
                assert abs(at - sample.depth) < 0.3, sample.id  # facts stand between paragraphs


def test_the_grid_covers_all_depths(documents):
    needles = [s for d in documents for s in d.samples if s.task == "needle"]
    assert sorted({s.depth for s in needles}) == sorted(retrieval.DEPTHS)


def test_documents_are_the_same_every_time(documents):
    assert documents == retrieval.documents(Words(), [600, 1200], 5, retrieval.default_prose())


def test_prose_goes_on_where_the_document_ends(documents):
    prose = retrieval.default_prose()
    for document in documents:
        end = document.text.splitlines()[-1]
        assert end[-40:] + document.continuation[:40] in prose


def test_too_little_prose_is_one_line():
    with pytest.raises(ValueError, match="fewer than a document of 600"):
        retrieval.documents(Words(), [600], 1, "A short text.")


def test_four_needles_count_each():
    assert retrieval.share_found(" 11111, 22222 and 9.", ("11111", "22222", "33333", "44444")) == 0.5


@pytest.mark.parametrize(
    ("throughput", "said"), [(1.8, "Compression pays under"), (1.01, "does not pay"), (0.9, "does not pay")]
)
def test_bench_says_where_compression_does_not_pay(throughput, said):
    assert said in bench.verdict(throughput, "pressure")


def test_own_functions_and_the_built_in_ones_they_call_are_told_from_others():
    def others():
        return sum(sorted(range(2**18), key=str))

    def own():
        return [bench.verdict(1.5, regime) for _ in range(10_000)]

    regime = next(iter(bench.REGIMES))
    assert stepped.own_share(others, 3) == 0
    assert stepped.own_share(own, 3) > 0.5
    assert 0.01 < stepped.own_share(lambda: (own(), others()), 3) < 0.5


def test_requests_that_do_not_fit_at_once_are_one_line_and_no_endless_loop():
    left = iter([True, True, False])  # they come one after the other, and are gone
    scheduler = SimpleNamespace(running=[])
    engine = SimpleNamespace(
        add_request=lambda *args: None, step=lambda: None, has_unfinished_requests=lambda: next(left)
    )
    stood_in = SimpleNamespace(
        compactions=[], variant="idle", max_tokens=4, engine=engine, scheduler=scheduler
    )
    with pytest.raises(KVCompressionError, match="2 requests of 64 tokens do not fit .* lower --batch"):
        stepped.SteppedEngine.prefill(stood_in, 64, 2)


def test_where_nothing_is_compacted_nothing_is_said_of_what_it_pays():
    row = {
        "context": 1024,
        "step_seconds": {"stock": 0.1},
        "metadata_seconds": {"stock": 1e-4},
        "over_stock": {"idle": [0.9, 1.0, 1.1], "compressed": [1.0, 1.1, 1.2]},
        "own_share": {"idle": 0.006, "compressed": 0.007},
        "prefill_seconds": 2.0,
    }

    def said(seconds: float) -> str:
        steps = {"batch": 4, "rows": [{**row, "compaction_seconds": seconds}]}
        return "\n".join(bench._steps_table(steps))

    assert "does not pay in decode time at contexts up to 1024" in said(0.1)
    assert "does not pay" not in said(0.0)


def test_ratios_are_of_pairs():
    assert stepped.ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("mode", MODES)
def test_every_request_of_a_rate_has_its_pass_key_and_a_length_of_three(smollm2, tmp_path, mode):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    arguments = SimpleNamespace(prompt=800, requests=6, output_tokens=9)
    path = tmp_path / "requests.jsonl"
    keys = rates._write(arguments, tokenizer, mode, path)
    prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    given = rates._given(arguments, tokenizer, mode, path)
    asked = len(tokenizer(rates.ASKS, add_special_tokens=False)["input_ids"])
    assert len(prompts) == len(set(keys)) == 6 and 0 < asked <= rates.ASKED
    for number, (key, prompt) in enumerate(zip(keys, prompts, strict=True)):
        assert prompt.count(key) == 2 and prompt.endswith("The pass key is") == (mode == "inside")
        wanted = 800 // (1, 2, 4)[number % 3] - (0 if mode == "inside" else asked)
        assert 0.94 * wanted <= len(tokenizer(prompt)["input_ids"]) <= wanted
    if mode == "inside":
        assert given[-2:] == ["--custom-output-len", "9"] and "--extra-body" not in given
    else:
        body = json.loads(given[given.index("--extra-body") + 1])
        assert body["min_tokens"] == int(given[-1]) == 9 + asked
        grammar = re.compile(body["structured_outputs"]["regex"])
        assert grammar.fullmatch(rates.ASKS + " 12345.\n\nSo") and not grammar.fullmatch("The pass key is 1")


class _Spoken:
    """A server that repeats the pass key it is asked for, if the prompt has it, and what it was sent."""

    def __init__(self, tokenizer, variant: str) -> None:
        self.tokenizer, self.variant, self.sent = tokenizer, variant, []

    def ask(self, _, prompt, max_tokens, **fields) -> prefixes.Answer:
        self.sent.append((list(prompt), fields))
        text = self.tokenizer.decode(prompt)
        number = re.search(r"Pass key (\d+) is$", text)
        told = re.search(rf"Pass key {number[1]} is (\d+)" if number else r"pass key is (\d{5})", text)
        said = f" {told[1]}" if told else ""
        ids = self.tokenizer(said, add_special_tokens=False)["input_ids"]
        return prefixes.Answer(said, ids, 0.25, len(prompt), len(prompt) // 2)

    @contextlib.contextmanager
    def watched(self):
        yield {"running": 3.0, "preemptions": 1.0}


@pytest.mark.parametrize("variant", ["stock", "compacted"])
def test_users_of_a_document_ask_for_a_key_of_it_after_it_was_read(smollm2, variant, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    server = _Spoken(tokenizer, variant)
    monkeypatch.setattr(prefixes, "_ask", server.ask)
    arguments = SimpleNamespace(prompt=900, keys=3, requests=7, output_tokens=8)
    row = prefixes._document(server, arguments, tokenizer)
    (document, first), *users = server.sent
    assert first == (
        {"vllm_xargs": {"kv_compression": '{"prefix": "document"}'}} if variant == "compacted" else {}
    )
    assert len(users) == 7 and all(prompt[: len(document)] == document for prompt, _ in users)
    assert 700 < len(document) < 900 - 8
    assert (row["right"], row["n"], row["at_once"], row["preemptions"]) == (7, 7, 3, 1)
    assert row["hit"] == pytest.approx(0.5, abs=0.01) and row["median_ttft"] == 0.25


def test_each_turn_goes_on_from_all_that_was_said(smollm2, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    server = _Spoken(tokenizer, "stock")
    monkeypatch.setattr(prefixes, "_ask", server.ask)
    arguments = SimpleNamespace(talks=3, turns=4, begun=512, said=32)
    row = prefixes._talks(server, arguments, tokenizer)
    prompts = [prompt for prompt, _ in server.sent]
    assert (row["right"], row["n"], len(row["by_turn"])) == (12, 12, 4)
    for prompt in prompts[-3:]:
        before = [other for other in prompts[:-3] if other[:400] == prompt[:400]]
        assert len(before) == 3 and all(prompt[: len(other)] == other for other in before)
        assert len(prompt) <= prefixes.longest_talk(arguments)
    assert row["tokens"] > sum(map(len, prompts[-3:]))


def test_what_begins_alike_is_told_in_a_row_each():
    row = dict(hit=0.724, median_ttft=1.5, p99_ttft=2.25, at_once=4.0, preemptions=2.0, right=3, n=4)
    *_, line, empty = prefixes.prefixes_table({"pool_blocks": 9, "rows": {"stock": row}}, "Talks")
    assert not empty and line == "| stock | 72 % | 1.50, 2.25 s | 4 | 2 | 3 of 4 [30, 95] |"


def test_rates_are_told_in_a_row_each():
    row = dict(
        mode="after", rate=0.5, variant="pressure", request_throughput=0.44, output_throughput=12.3,
        median_ttft_ms=900.0, p99_ttft_ms=2100.0, median_itl_ms=40.0, p99_itl_ms=90.0, at_once=3.0,
        preemptions=0.0, compacted=2.0, right=3, n=4,
    )  # fmt: skip
    *_, line, empty = rates.rates_table({"pool_blocks": 9, "rows": [row]})
    assert not empty and line == (
        "| after | 0.5 | pressure | 0.44 | 12.3 | 0.9, 2.1 s | 40, 90 ms | 3 | 0 | 2 of 4 | 3 of 4 [30, 95] |"
    )


def test_a_server_that_ends_says_why():
    log = (
        "(EngineCore pid=7) ERROR Traceback (most recent call last):\n"
        "(EngineCore pid=7) ERROR ValueError: Available memory on node 0 is too small\n"
        "(APIServer pid=6) ValueError: Available memory on node 0 is too small\n"
        "(EngineCore pid=7) ERROR AssertionError\n"
        "(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert first_errors(log) == [
        "ValueError: Available memory on node 0 is too small",
        "AssertionError",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]


def test_an_engine_gets_one_openmp_library(monkeypatch, tmp_path):
    (tmp_path / "lib").mkdir()
    intel = tmp_path / "lib" / "libiomp5.so"
    intel.touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("LD_PRELOAD", "/torch/lib/libgomp.so.1:/usr/lib/libtcmalloc.so.4")
    assert engine_environment()["LD_PRELOAD"] == f"/usr/lib/libtcmalloc.so.4:{intel}"
    monkeypatch.setenv("LD_PRELOAD", str(intel))
    assert engine_environment()["LD_PRELOAD"] == str(intel)
