"""RULER (NVIDIA; arXiv 2404.06654): files that its generator wrote, with the benchmark's own metrics.

The generator fits each text to a tokenizer and a length, so there is nothing to download: run its
`scripts/data/prepare.py` with the model's tokenizer and the template `base`.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.evaluation.quality.datafiles import DataMissing, records
from vllm_kvcompress.evaluation.quality.samples import Metric, Sample

FIELDS = ("index", "input", "outputs", "length")


def string_match_all(prediction: str, answers: tuple[str, ...]) -> float:
    """Fraction of the answers that the prediction contains; upper and lower case are alike."""
    text = _printable(prediction).lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: tuple[str, ...]) -> float:
    """1 if the prediction contains one of the answers; upper and lower case are alike."""
    text = _printable(prediction).lower()
    return float(any(answer.lower() in text for answer in answers))


def _printable(text: str) -> str:
    return re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip()


@dataclass(frozen=True)
class Category:
    """What tasks of one kind share.

    Attributes:
        max_tokens: length of the answer at most.
        metric: scores the answer.
        question: pattern of what begins the question in the official template. Where it is found more than
            once, as with a worked example, the last counts.
    """

    max_tokens: int
    metric: Metric
    question: str


CATEGORIES = {
    "niah": Category(128, string_match_all, r"What (is|are all) the special magic "),
    "vt": Category(30, string_match_all, r"Question: Find all variables that are assigned the value "),
    "cwe": Category(120, string_match_all, r"Question: What are the \d+ most common words in "),
    "fwe": Category(50, string_match_all, r"Question: Do not provide any explanation\. Please ignore the "),
    "qa": Category(
        32,
        string_match_part,
        r"Answer the question based on the given documents\. Only give me the answer and do not output any "
        r"other words\.\s+Question: ",
    ),
}

TASKS = (
    "niah_single_1", "niah_single_2", "niah_single_3",
    "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery",
    "vt", "cwe", "fwe", "qa_1", "qa_2",
)  # fmt: skip


def load(
    folder: Path,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    lengths: Sequence[int] | None = None,
) -> list[Sample]:
    """Samples from the generator's files.

    Where the folder has folders named by a length, such as `4096`, each of these must have every task's file;
    otherwise it is looked for in the folder itself. It is `<task>/validation.jsonl`, `<task>/test.jsonl` or
    `<task>.jsonl`, in a folder `data` or not.

    Args:
        folder: of one length, or of several.
        tasks: names; all 13 when not given.
        limit: samples of each task and length at most, the first ones.
        lengths: take these of the folders named by a length; all when not given.

    Raises:
        DataMissing: a task's file is not there.
        KVCompressionError: an unknown task, or a line that is not a sample of it.
    """
    samples: list[Sample] = []
    for task in TASKS if tasks is None else tasks:
        if task not in TASKS:
            raise KVCompressionError(f"RULER has no task {task!r}; it has {', '.join(TASKS)}")
        for length, path in _files(Path(folder), task, lengths):
            for record in itertools.islice(records(path, FIELDS), limit):
                samples.append(_sample(task, length, path, record))
    return samples


def _files(folder: Path, task: str, lengths: Sequence[int] | None) -> list[tuple[int | None, Path]]:
    """Files of a task, each with the length that its folder is named by, if it is."""
    numbered = {int(path.name): path for path in folder.glob("*/") if path.name.isdecimal()}
    places: dict[int | None, Path] = dict(sorted(numbered.items()))
    if lengths is not None:
        places = {length: numbered.get(length, folder / str(length)) for length in lengths}
    elif not places:
        places = {int(folder.name) if folder.name.isdecimal() else None: folder}
    found: list[tuple[int | None, Path]] = []
    for length, place in places.items():
        names = (f"{task}/validation.jsonl", f"{task}/test.jsonl", f"{task}.jsonl")
        paths = [parent / name for parent in (place / "data", place) for name in names]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise DataMissing(
                f"{place / names[0]} is not there: make it with the generator of NVIDIA/RULER, "
                f"scripts/data/prepare.py --task {task}"
            )
        found.append((length, path))
    return found


def _sample(task: str, length: int | None, path: Path, record: dict[str, Any]) -> Sample:
    category = CATEGORIES[task.partition("_")[0]]
    text, answers = record["input"], tuple(record["outputs"])
    starts = [match.start() for match in re.finditer(rf"\s*{category.question}", text)]
    if not starts or not answers:
        lacks = "outputs are empty" if starts else "input lacks the question of the official template"
        raise KVCompressionError(f"{path}, index {record['index']}: the {lacks}")
    document, question = text[: starts[-1]], text[starts[-1] :]
    prefix = record.get("answer_prefix", "")
    if not question.endswith(prefix):  # older files have no such field: it is in their input
        question += prefix
    depth = None
    if task.startswith("niah") and len(answers) == 1 and document.count(answers[0]) == 1:
        depth = document.index(answers[0]) / len(document)
    return Sample(
        task=task,
        id="/".join(map(str, filter(None, [task, length, str(record["index"])]))),
        document=document,
        question=question,
        answers=answers,
        metric=category.metric,
        max_tokens=category.max_tokens,
        length=length or record["length"],
        depth=depth,
    )
