"""Documents of several kinds, to learn from: prose, dialogue, a manual, code, tables, JSON, other languages.

None of them is of the text or the templates that `eval` asks questions about.
"""

import inspect
import itertools
import json
import random
import re
import string
from collections.abc import Callable, Iterator
from importlib import import_module, resources

MODULES = (
    "argparse", "calendar", "csv", "dataclasses", "difflib", "fractions", "heapq", "http.cookies",
    "json.decoder", "logging.handlers", "pathlib", "sched", "shelve", "statistics", "textwrap", "zipfile",
)  # fmt: skip
CHARACTERS = 12  # per token that is wanted, more than any text needs
LANGUAGES = ("de", "es", "fr", "ru", "zh")


def documents(number: int, characters: int, seed: int, own_text: str | None = None) -> list[str]:
    """Documents whose kinds take turns; into every other one odd items are put that no text foretells.

    Args:
        number: of documents.
        characters: that each has at least.
        seed: of what is drawn.
        own_text: what all documents are from instead, a paragraph a line.
    """
    draw = random.Random(seed)
    kinds = list(KINDS.values()) if own_text is None else [lambda draw: _paragraphs(own_text, draw)]
    sources = [kind(random.Random(f"{seed} {index}")) for index, kind in enumerate(kinds)]
    made = []
    for index in range(number):
        pieces, length = [], 0
        source = sources[index % len(sources)]
        odd = index // len(sources) % 2 == 1
        while length < characters:
            piece = next(source)
            if odd and draw.random() < 0.2:
                piece += f" {_odd(draw)}\n"
            pieces.append(piece)
            length += len(piece)
        made.append("".join(pieces))
    return made


def _prose(draw: random.Random) -> Iterator[str]:
    return _paragraphs(_novel(), draw)


def _paragraphs(text: str, draw: random.Random) -> Iterator[str]:
    """Paragraph after paragraph, from some place on."""
    lines = [line for line in text.splitlines() if line.strip()]
    begin = draw.randrange(len(lines))
    while True:
        yield from (f"{line}\n\n" for line in lines[begin:])
        begin = 0


def _dialogue(draw: random.Random) -> Iterator[str]:
    """What is said in a novel, as turns of a chat."""
    said = re.findall(r"[“\"]([^”\"]{20,400})[”\"]", _novel())
    while True:
        begin = draw.randrange(len(said))
        for turn, text in enumerate(said[begin : begin + 40]):
            yield f"{'User' if turn % 2 == 0 else 'Assistant'}: {text}\n"


def _manual(draw: random.Random) -> Iterator[str]:
    """Python's reference, as `help` shows it."""
    topics = import_module("pydoc_data.topics").topics
    names = sorted(topics)
    while True:
        yield from (f"{part}\n\n" for part in topics[draw.choice(names)].split("\n\n")[:12])


def _code(draw: random.Random) -> Iterator[str]:
    """Python's own library."""
    while True:
        source = inspect.getsource(import_module(draw.choice(MODULES)))
        lines = source.splitlines(keepends=True)
        begin = draw.randrange(max(1, len(lines) - 80))
        yield "".join(lines[begin : begin + 80])


def _table(draw: random.Random) -> Iterator[str]:
    while True:
        columns = [_word(draw) for _ in range(draw.randrange(3, 7))]
        yield ",".join(["id", *columns]) + "\n"
        for _ in range(draw.randrange(10, 30)):
            row = [
                draw.choice((_word(draw), str(draw.randrange(10**5)), f"{draw.random():.3f}"))
                for _ in columns
            ]
            yield ",".join([str(draw.randrange(10**4)), *row]) + "\n"


def _json(draw: random.Random) -> Iterator[str]:
    while True:
        record = {
            "id": f"{draw.randrange(2**32):08x}",
            "name": f"{_word(draw).title()} {_word(draw).title()}",
            _word(draw): draw.randrange(1000),
            "tags": [_word(draw) for _ in range(draw.randrange(1, 4))],
            "at": {
                "day": f"20{draw.randrange(10, 40)}-{draw.randrange(1, 13):02d}",
                "value": draw.random() > 0.5,
            },
        }
        yield json.dumps(record, indent=draw.choice((None, 2))) + "\n"


def _languages(draw: random.Random) -> Iterator[str]:
    """The Universal Declaration of Human Rights, after some articles in another language."""
    while True:
        paragraphs = _paragraphs(_packaged(f"declaration.{draw.choice(LANGUAGES)}.txt"), draw)
        yield from itertools.islice(paragraphs, draw.randrange(20, 60))


KINDS: dict[str, Callable[[random.Random], Iterator[str]]] = {
    "prose": _prose,
    "dialogue": _dialogue,
    "manual": _manual,
    "code": _code,
    "table": _table,
    "json": _json,
    "languages": _languages,
}


def _novel() -> str:
    """The opening of Jane Austen's Pride and Prejudice, a paragraph a line; public domain."""
    return _packaged("pride_and_prejudice.txt")


def _packaged(name: str) -> str:
    return resources.files("vllm_kvcompress.evaluation").joinpath("data", name).read_text(encoding="utf-8")


def _word(draw: random.Random) -> str:
    return "".join(draw.choices(string.ascii_lowercase, k=draw.randrange(4, 9)))


def _odd(draw: random.Random) -> str:
    kind = draw.randrange(3)
    if kind == 0:
        return " ".join(f"{draw.randrange(2**32):08x}" for _ in range(5))
    if kind == 1:
        return "; ".join(f"{_word(draw)}_{draw.randrange(99)} = {draw.randrange(10**6)}" for _ in range(4))
    letters = string.ascii_uppercase
    return ", ".join(f"{''.join(draw.choices(letters, k=3))}-{draw.randrange(1000, 9999)}" for _ in range(5))
