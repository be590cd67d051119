"""RULER: the generator's files, old and new, split where the official templates put the question."""

import json
from pathlib import Path

import pytest

from vllm_kvcompress.evaluation.quality.datafiles import DataMissing
from vllm_kvcompress.evaluation.quality.ruler import TASKS, load, string_match_all, string_match_part

# scripts/data/synthetic/constants.py: template and answer prefix, as filled in by the task's generator
NIAH = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the number afterwards.\nThe grass is green.\n"
    "One of the special magic numbers for big-dog is: 1234567.\nThe sky is blue. Here we go.",
    "\nWhat is the special magic number for big-dog mentioned in the provided text?",
    " The special magic number for big-dog mentioned in the provided text is",
)
MULTIQUERY = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz "
    "you about the numbers afterwards.\nOne of the special magic numbers for a is: 11. One for b is: 22.",
    "\nWhat are all the special magic numbers for a, and b mentioned in the provided text?",
    " The special magic numbers for a, and b mentioned in the provided text are",
)
TRACK = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
FIND = "\nQuestion: Find all variables that are assigned the value {} in the text above."
CHAIN = (
    " Answer: According to the chain(s) of variable assignment in the text above, 2 variables are assigned "
    "the value {}, they are: "
)
VT = (
    f"{TRACK}VAR ABC = 55555\nVAR DEF = VAR ABC{FIND.format(55555)}{CHAIN.format(55555)} ABC DEF\n\n"
    f"{TRACK}VAR XAAAA = 12321\nVAR XBBBB = VAR XAAAA",
    f" {FIND.format(12321)}",  # a chain ends in a space
    CHAIN.format(12321),
)
LIST = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
    "ones that appear most often.\n1. a 2. b"
)
COMMON = "\nQuestion: What are the 10 most common words in the above list?"
TOP = " Answer: The top 10 words that appear most often in the list are:"
CWE = (f"{LIST}{COMMON}{TOP} 1. a 2. b\n{LIST} 3. c", COMMON, TOP)
FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. abc ... def",
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
    "frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)
ONLY = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other "
    "words."
)
QA = (
    f"{ONLY}\n\nThe following are given documents.\n\nDocument 1:\nQuestion: is this one? No.",
    f"\n\n{ONLY}\n\nQuestion: Who?",
    " Answer:",
)
PARTS = {"niah_single_1": NIAH, "niah_multiquery": MULTIQUERY, "vt": VT, "cwe": CWE, "fwe": FWE, "qa_1": QA}


def write(path: Path, *records: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def old(parts: tuple[str, str, str], outputs=("x",), index=0) -> dict:
    """A line as the first versions wrote it: the answer's beginning is part of the input."""
    return {"index": index, "input": "".join(parts), "outputs": list(outputs), "length": 4000}


def new(parts: tuple[str, str, str], outputs=("x",), index=0) -> dict:
    """A line as later versions write it."""
    document, question, prefix = parts
    return {
        **old((document, question, ""), outputs, index),
        "length_w_model_temp": 4000,
        "answer_prefix": prefix,
    }


@pytest.mark.parametrize("task", PARTS)
@pytest.mark.parametrize("form", [old, new])
def test_the_question_is_the_last_part_of_the_template(tmp_path, task, form):
    document, question, prefix = PARTS[task]
    write(tmp_path / task / "validation.jsonl", form(PARTS[task]))
    (sample,) = load(tmp_path, [task])
    assert sample.document == document
    assert sample.question == question + prefix
    assert (sample.id, sample.length) == (f"{task}/0", 4000)


@pytest.mark.parametrize("task", PARTS)
def test_texts_without_new_lines_and_chat_templates_are_split_too(tmp_path, task):
    document, question, prefix = (" ".join(part.split()) for part in PARTS[task])
    write(
        tmp_path / task / "validation.jsonl",
        old((f"[INST] {document}", f" {question} [/INST]", f" {prefix}")),
    )
    (sample,) = load(tmp_path, [task])
    assert sample.document == f"[INST] {document}"
    assert sample.question == f" {question} [/INST] {prefix}"


def test_answer_lengths_and_metrics_of_all_tasks(tmp_path):
    for task in TASKS:
        parts = PARTS.get(task, QA if task.startswith("qa") else NIAH)
        write(tmp_path / task / "validation.jsonl", new(parts, ["One", "two"]))
    samples = {sample.task: sample for sample in load(tmp_path)}
    assert tuple(samples) == TASKS and len(TASKS) == 13
    lengths = {task: sample.max_tokens for task, sample in samples.items()}
    assert lengths == {task: 128 for task in TASKS if task.startswith("niah")} | {
        "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32
    }  # fmt: skip
    for task, sample in samples.items():
        assert sample.metric("it is one.", sample.answers) == (1.0 if task.startswith("qa") else 0.5)


def test_metrics():
    assert string_match_all("A b\x07C", ("a", "B", "c", "d")) == 0.75
    assert string_match_all("new\x00york", ("new york",)) == 0  # control characters become new lines
    assert string_match_all("", ("a",)) == 0
    assert string_match_part("the ANSWER", ("nothing", "answer")) == 1
    assert string_match_part("neither", ("nothing", "answer")) == 0


def test_depth_of_a_single_needle(tmp_path):
    write(tmp_path / "niah_single_1" / "validation.jsonl", new(NIAH, ["1234567"]))
    write(tmp_path / "niah_multiquery" / "validation.jsonl", new(MULTIQUERY, ["11", "22"]))
    single, several = load(tmp_path, ["niah_single_1", "niah_multiquery"])
    assert single.depth == NIAH[0].index("1234567") / len(NIAH[0])
    assert several.depth is None


def test_folders_named_by_length_as_run_sh_makes_them(tmp_path):
    for length in (8192, 4096):
        lines = [old(FWE, index=index) for index in range(3)]
        write(tmp_path / str(length) / "data" / "fwe" / "validation.jsonl", *lines)
    assert [(s.id, s.length) for s in load(tmp_path, ["fwe"], limit=1)] == [
        ("fwe/4096/0", 4096),
        ("fwe/8192/0", 8192),
    ]
    assert [s.id for s in load(tmp_path, ["fwe"], lengths=[8192], limit=2)] == ["fwe/8192/0", "fwe/8192/1"]
    assert [s.length for s in load(tmp_path / "4096", ["fwe"])] == [4096] * 3
    with pytest.raises(DataMissing, match=r"/16384/fwe/validation\.jsonl is not there"):
        load(tmp_path, ["fwe"], lengths=[4096, 16384])


@pytest.mark.parametrize(
    "name", ["4096/fwe.jsonl", "fwe.jsonl", "data/fwe/validation.jsonl", "fwe/test.jsonl"]
)
def test_other_layouts(tmp_path, name):
    write(tmp_path / name, old(FWE))
    assert len(load(tmp_path, ["fwe"])) == 1


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataMissing) as error:
        load(tmp_path / "absent", ["vt"])
    assert str(error.value) == (
        f"{tmp_path}/absent/vt/validation.jsonl is not there: make it with the generator of NVIDIA/RULER, "
        "scripts/data/prepare.py --task vt"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            old(("A text", " and a question", "")),
            "index 0: the input lacks the question of the official template",
        ),
        (old(FWE, []), "index 0: the outputs are empty"),
        ({"index": 0, "question": "a"}, "line 1: no field input, outputs, length"),
    ],
)
def test_a_line_of_something_else_is_refused(tmp_path, line, message):
    path = tmp_path / "fwe" / "validation.jsonl"
    write(path, line)
    with pytest.raises(ValueError) as error:
        load(tmp_path, ["fwe"])
    assert str(error.value) == f"{path}, {message}"


def test_an_unknown_task_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^RULER has no task 'niah'; it has niah_single_1, "):
        load(tmp_path, ["niah"])
