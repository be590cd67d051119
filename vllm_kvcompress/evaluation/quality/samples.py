"""What a task asks: one document, one question about it, the right answers, and how an answer is scored."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm_kvcompress.config import KVCompressionError

Metric = Callable[[str, tuple[str, ...]], float]


@dataclass(frozen=True)
class Sample:
    """One question about one document.

    The prompt is `document + question`, as text without special tokens. Asked *inside*, all of it is
    compressed; asked *after*, the document is compressed before the question is read.

    Attributes:
        task: name of the task.
        id: unique within the task.
        document: the long part of the prompt.
        question: what comes after it, up to where the answer begins.
        answers: right answers; a metric takes the best over them, or all of them, as it says.
        metric: scores the answer's text in [0, 1].
        max_tokens: length of the answer at most.
        length: tokens of the document, as the task's grid names it.
        depth: where the asked-for fact lies, 0 (start) to 1 (end); None where it is not at one place.
        stop: texts that end an answer.
    """

    task: str
    id: str
    document: str
    question: str
    answers: tuple[str, ...]
    metric: Metric = field(repr=False)
    max_tokens: int
    length: int
    depth: float | None = None
    stop: tuple[str, ...] = ()


def opening(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens where more will follow: what the tokenizer puts before a text, and nothing behind it.

    Raises:
        KVCompressionError: the tokenizer reads the text otherwise with its special tokens than without.
    """
    whole = list(tokenizer.encode(text))
    plain = list(tokenizer.encode(text, add_special_tokens=False))
    for begin in range(len(whole) - len(plain) + 1):
        if whole[begin : begin + len(plain)] == plain:
            return whole[: begin + len(plain)]
    raise KVCompressionError(
        "the tokenizer's special tokens are not before or behind a text, so that no question can follow it"
    )


def first_number(prediction: str, answers: tuple[str, ...]) -> float:
    """1 if the first run of digits in the prediction is one of the answers."""
    found = re.search(r"\d+", prediction)
    return float(found is not None and found[0] in answers)


def starts_with(prediction: str, answers: tuple[str, ...]) -> float:
    """1 if the prediction starts with one of the answers, white space aside."""
    text = " ".join(prediction.split())
    return float(any(text.startswith(" ".join(answer.split())) for answer in answers))
