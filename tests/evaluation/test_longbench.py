"""LongBench: prompts, lengths and metrics are the official ones; its files are read as its data.zip has them.

Expected scores are worked out by hand from the definitions in LongBench's metrics.py and eval.py.
"""

import json
import sys
from pathlib import Path

import pytest

from vllm_kvcompress.evaluation.quality import longbench
from vllm_kvcompress.evaluation.quality.datafiles import DataMissing
from vllm_kvcompress.evaluation.quality.longbench import (
    TASKS,
    classification_score,
    code_sim_score,
    count_score,
    load,
    qa_f1_score,
    retrieval_score,
    retrieval_zh_score,
    truncate_middle,
)

# config/dataset2maxlen.json
MAX_TOKENS = {
    "narrativeqa": 128, "qasper": 128, "multifieldqa_en": 64, "multifieldqa_zh": 64, "hotpotqa": 32,
    "2wikimqa": 32, "musique": 32, "dureader": 128, "gov_report": 512, "qmsum": 512, "multi_news": 512,
    "vcsum": 512, "trec": 64, "triviaqa": 32, "samsum": 128, "lsht": 64, "passage_count": 32,
    "passage_retrieval_en": 32, "passage_retrieval_zh": 32, "lcc": 64, "repobench-p": 64,
}  # fmt: skip


def write(folder: Path, task: str, *records: dict) -> None:
    """A file as in data.zip."""
    common = {"dataset": task, "language": "en", "all_classes": None, "length": 1000, "input": ""}
    lines = [{**common, "_id": f"id{number}", **record} for number, record in enumerate(records)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")


def record(**fields) -> dict:
    return {"context": "A text with {braces}.", "answers": ["yes"], **fields}


def test_every_task_has_its_length_and_one_context():
    assert {name: task.max_tokens for name, task in TASKS.items()} == MAX_TOKENS
    assert all(task.prompt.count("{context}") == 1 for task in TASKS.values())
    without_input = {name for name, task in TASKS.items() if "{input}" not in task.prompt}
    assert without_input == {"gov_report", "multi_news", "vcsum", "passage_count", "lcc"}
    assert {name for name, task in TASKS.items() if task.first_line} == {"trec", "triviaqa", "samsum", "lsht"}


def test_the_prompt_is_split_after_the_context(tmp_path):
    write(tmp_path, "multifieldqa_en", record(input="Which {one}?", answers=["yes", "no"], length=123))
    (sample,) = load(tmp_path, ["multifieldqa_en"])
    assert sample.document == "Read the following text and answer briefly.\n\nA text with {braces}."
    assert sample.question == (
        "\n\nNow, answer the following question based on the above text, only give me the answer and do not "
        "output any other words.\n\nQuestion: Which {one}?\nAnswer:"
    )
    assert (sample.task, sample.id, sample.length, sample.max_tokens, sample.depth, sample.stop) == (
        "multifieldqa_en", "multifieldqa_en/id0", 123, 64, None, ()
    )  # fmt: skip
    assert sample.answers == ("yes", "no")
    assert sample.metric("No.", sample.answers) == 1  # the best over the answers


def test_chinese_files_are_read_as_utf8(tmp_path):
    write(
        tmp_path,
        "lsht",
        record(context="新闻", input="类别：", answers=["体育"], all_classes=["体育", "军事"]),
    )
    (sample,) = load(tmp_path, ["lsht"])
    assert sample.document == "请判断给定新闻的类别，下面是一些例子。\n\n新闻"
    assert sample.question == "\n类别："
    assert sample.metric("体育\n军事", sample.answers) == 1


def test_limit_max_length_and_longbench_e(tmp_path):
    write(tmp_path, "qasper_e", *[record(length=length) for length in (900, 9000, 800, 700)])
    ids = [sample.id for sample in load(tmp_path, ["qasper_e"], limit=2, max_length=1000)]
    assert ids == ["qasper_e/id0", "qasper_e/id2"]


def test_the_folder_may_be_above_data(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", "lcc", record(context="x = 1\n", answers=["y = x"]))
    (sample,) = load(tmp_path, ["lcc"])
    assert sample.question == "Next line of code:\n"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataMissing) as error:
        load(tmp_path, ["qasper"])
    assert str(error.value) == (
        f"{tmp_path}/qasper.jsonl is not there: unpack data.zip of the Hugging Face data set THUDM/LongBench "
        f"into {tmp_path}"
    )
    assert isinstance(error.value, ValueError)


def test_an_unknown_task_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^LongBench has no task 'nq'; it has narrativeqa, qasper, "):
        load(tmp_path, ["nq"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\n", ", line 1: not a JSON object"),
        ("[]\n", ", line 1: not a JSON object"),
        ('{"input": "", "context": "", "answers": [], "length": 1}\n', ", line 1: no field all_classes, _id"),
        ("", " is empty"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, line, message):
    path = tmp_path / "qasper.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError) as error:
        load(tmp_path, ["qasper"])
    assert str(error.value) == f"{path}{message}"


@pytest.mark.parametrize(("task", "package"), [("gov_report", "rouge"), ("dureader", "jieba")])
def test_a_missing_package_is_named_before_anything_is_read(tmp_path, monkeypatch, task, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as error:
        load(tmp_path, [task])
    assert str(error.value) == f"{package} is not installed: pip install 'vllm-kvcompress[eval]'"


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("The Blue Whale, a mammal.", "blue whale", 0.8),  # 2 of 3 words, 2 of 2
        ("blue blue", "blue", 2 / 3),  # a word counts as often as both have it
        ("U.S.", "us", 1.0),  # punctuation is dropped, not replaced
        ("", "blue", 0.0),
        ("the", "a", 0.0),  # nothing but articles
    ],
)
def test_qa_f1(prediction, answer, score):
    assert qa_f1_score(prediction, answer) == pytest.approx(score)


@pytest.mark.parametrize(
    ("metric", "prediction", "answer", "score"),
    [
        (count_score, "There are 7 or 8, so 7", "7", 2 / 3),
        (count_score, "17", "7", 0.0),
        (count_score, "many", "7", 0.0),
        (retrieval_score, "Paragraph 12, not Paragraph 3", "Paragraph 12", 0.5),
        (retrieval_score, "12", "Paragraph 12", 1.0),
        (retrieval_zh_score, "段落12", "段落12", 1.0),
        (retrieval_zh_score, "段落1和段落2", "段落2", 0.5),
    ],
)
def test_counts_and_retrieval(metric, prediction, answer, score):
    assert metric(prediction, answer) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "answer", "classes", "score"),
    [
        ("Date", "Date", ["City", "Date"], 1.0),
        ("City or Date", "Date", ["City", "Date"], 0.5),
        ("City", "Date", ["City", "Date"], 0.0),
        ("nothing", "Date", ["City", "Date"], 0.0),
        ("Other number", "Other number", ["number", "Other number"], 1.0),  # part of the right one's name
        ("abc", "abc", ["a", "ab", "abc"], 0.5),  # the original skips `ab`, for it strikes out `a` before it
    ],
)
def test_classification(prediction, answer, classes, score):
    assert classification_score(prediction, answer, classes) == score


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("\n\nreturn x + 1\nreturn x", "return x", 0.8),  # 2 * 8 / (12 + 8)
        ("```python\n# first\n// or\nreturn x\n```", "return x", 1.0),
        ("# only a comment", "return x", 0.0),
        ("abcd", "abd", 0.86),  # 6 / 7 in hundredths
    ],
)
def test_code_similarity(prediction, answer, score):
    assert code_sim_score(prediction, answer) == score


def test_code_similarity_is_fuzzywuzzys():
    fuzz = pytest.importorskip("fuzzywuzzy.fuzz")
    for line, answer in [("int a = b;", "int b = a;"), ("x" * 300 + "y", "y" + "x" * 250), ("", "x")]:
        assert code_sim_score(line, answer) == fuzz.ratio(line, answer) / 100


def test_only_the_first_line_counts_in_few_shot_tasks(tmp_path):
    write(tmp_path, "trec", record(answers=["Date"], all_classes=["City", "Date"]))
    write(tmp_path, "triviaqa", record(answers=["Paris"]))
    write(tmp_path, "hotpotqa", record(answers=["Paris"]))
    trec, trivia, hotpot = load(tmp_path, ["trec", "triviaqa", "hotpotqa"])
    assert trec.metric("\n\nDate\nType: City", trec.answers) == 1
    assert trivia.metric("Paris\nPassage:", trivia.answers) == 1
    assert hotpot.metric("Paris\nPassage:", hotpot.answers) == pytest.approx(2 / 3)


def test_rouge():
    pytest.importorskip("rouge")
    score = longbench.rouge_score
    assert score("the cat sat", "the cat sat on the mat") == pytest.approx(
        0.75
    )  # 3 of 3, 3 of 5 different words
    assert score("sat cat the", "the cat sat") == pytest.approx(1 / 3)
    assert score("", "the cat sat") == 0  # as the official code, which swallows the package's error
    assert score(" ".join(map(str, range(2000))), "1 2 3") == 0  # too long for the package's recursion


def test_chinese_metrics():
    pytest.importorskip("rouge")
    pytest.importorskip("jieba")
    assert longbench.qa_f1_zh_score("北京大学。", "北京大学") == 1
    assert longbench.qa_f1_zh_score("我爱北京", "北京") == pytest.approx(
        0.5
    )  # one of three words, one of one
    assert longbench.rouge_zh_score("我爱北京", "我爱上海") == pytest.approx(2 / 3)


def test_truncation_keeps_both_ends():
    assert truncate_middle([1, 2, 3], 3) == [1, 2, 3]
    assert truncate_middle(list(range(10)), 4) == [0, 1, 8, 9]
    assert truncate_middle(list(range(10)), 5) == [0, 1, 8, 9]  # int(5 / 2) of either end, as in pred.py
    assert truncate_middle([1, 2, 3], 1) == []
