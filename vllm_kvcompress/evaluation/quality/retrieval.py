"""Facts hidden in real prose, and questions about them.

One document of each length and repetition carries one fact of every task, so that its prefill is shared by
all questions. Depths cycle over the grid; each fact has its own words, so that none is mistaken for another.
Questions repeat the words before the fact, which base models answer as well as instructed ones.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Protocol

from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.evaluation.quality.samples import Sample, first_number, starts_with

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
PLACES = [
    "lighthouse", "bakery", "museum", "harbour", "library", "castle", "garden", "theatre",
    "station", "chapel", "market", "school", "bridge", "tower", "hospital", "windmill",
]  # fmt: skip
JSON_PAIRS = 12
FOUR = 4
CONTINUATION = 20  # paragraphs
RECALL_CUE, RECALL_ANSWER = 16, 8  # words


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...


def default_prose() -> str:
    """Jane Austen's Persuasion, a paragraph a line; public domain."""
    return resources.files("vllm_kvcompress.evaluation").joinpath("data/persuasion.txt").read_text()


TASKS = {
    "needle": "one sentence, stated once",
    "passkey": "a pass key, stated once",
    "passkey_twice": "a secret code, stated twice",
    "four_needles": "four numbers of one name, stated apart; a part counts for each that is found",
    "json": f"one value out of {JSON_PAIRS} key-value pairs",
    "recall": "a passage of the document, continued word for word",
    "turns": "all of these in turn, each asked after the questions and right answers before it",
}


@dataclass(frozen=True)
class Document:
    """Prose with facts in it.

    Attributes:
        name: length and repetition.
        text: what is compressed.
        continuation: how the prose goes on.
        length: tokens of the text, about.
        samples: one question of every task, and those in turn.
    """

    name: str
    text: str
    continuation: str
    length: int
    samples: list[Sample]


def documents(
    tokenizer: Tokenizer, lengths: Sequence[int], repetitions: int, prose: str, seed: int = 0
) -> list[Document]:
    """A document for every repetition and length, in that order, so that a run cut short is balanced.

    Args:
        tokenizer: the model's; lengths are in its tokens.
        lengths: of the documents.
        repetitions: documents of each length.
        prose: what the facts are hidden in, a paragraph a line; each document starts at another place of it.
        seed: of the facts and their places.

    Raises:
        KVCompressionError: the prose is shorter than a document, or a document than its facts.
    """
    paragraphs = [line for line in prose.splitlines() if line.strip()]
    sizes = [len(tokenizer.encode(line + "\n", add_special_tokens=False)) for line in paragraphs]
    if sum(sizes) < max(lengths):
        raise KVCompressionError(f"the text has {sum(sizes)} tokens, fewer than a document of {max(lengths)}")
    made = []
    for repetition in range(repetitions):
        for length in lengths:
            draw = random.Random(f"{seed}/{length}/{repetition}")
            start = draw.randrange(len(paragraphs))
            made.append(_document(tokenizer, paragraphs, sizes, start, length, repetition, draw))
    return made


def _document(
    tokenizer: Tokenizer,
    paragraphs: Sequence[str],
    sizes: Sequence[int],
    start: int,
    length: int,
    repetition: int,
    draw: random.Random,
) -> Document:
    def depth_of(task: int) -> float:
        return DEPTHS[(repetition + task) % len(DEPTHS)]

    one, once, twice, four = draw.sample(PLACES, 4)
    numbers = [str(draw.randrange(10_000, 100_000)) for _ in range(3 + FOUR)]
    pairs = {f"{draw.randrange(10**4, 10**5)}": f"{draw.randrange(10**4, 10**5)}" for _ in range(JSON_PAIRS)}
    key = draw.choice(list(pairs))
    json_lines = "{" + ", ".join(f'"{name}": "{value}"' for name, value in pairs.items()) + "}"
    spread = [draw.uniform(0.05, 0.95) for _ in range(FOUR)]
    facts = [
        (depth_of(0), f"The special magic number of the {one} is {numbers[0]}."),
        (depth_of(2), f"The pass key of the {once} is {numbers[1]}. Remember it."),
        (draw.uniform(0.05, 0.5), f"The secret code of the {twice} is {numbers[2]}. Memorise it."),
        (draw.uniform(0.5, 0.95), f"The secret code of the {twice} is {numbers[2]}. Memorise it."),
        (depth_of(4), json_lines),
    ]
    facts += [
        (at, f"A lucky number of the {four} is {n}.") for at, n in zip(spread, numbers[3:], strict=True)
    ]

    room = length - sum(len(tokenizer.encode(text + "\n", add_special_tokens=False)) for _, text in facts)
    if room < 1:
        raise KVCompressionError(
            f"a document of {length} tokens has no room for its facts; use more than {length - room}"
        )
    prose, ends, used = [], [0], 0
    while used < room:
        index = (start + len(prose)) % len(paragraphs)
        prose.append(paragraphs[index])
        used += sizes[index]
        ends.append(used)
    last = tokenizer.encode(prose[-1], add_special_tokens=False)
    cut = max(1, len(last) - (used - room))
    following = [paragraphs[(start + len(prose) + i) % len(paragraphs)] for i in range(CONTINUATION)]
    continuation = "\n".join([tokenizer.decode(last[cut:]), *following])
    prose[-1] = tokenizer.decode(last[:cut])
    waiting, lines = sorted(facts), []
    for line, begin in zip(prose[:-1], ends, strict=False):
        while waiting and waiting[0][0] * room <= begin:
            lines.append(waiting.pop(0)[1])
        lines.append(line)
    # The prose's last paragraph ends the document, so that it can go on.
    document = "\n".join([*lines, *(text for _, text in waiting), prose[-1]])

    words = _passage(prose, draw)
    cue, answer = " ".join(words[:RECALL_CUE]), " ".join(words[RECALL_CUE:])
    whole = f"{length}/{repetition}"

    def sample(task: str, question: str, answers: tuple[str, ...], metric, max_tokens: int, depth=None):
        return Sample(
            task, f"{task}/{whole}", document, question, answers, metric, max_tokens, length, depth, ("\n",)
        )

    questions = [
        sample(
            "needle",
            f"\nThe special magic number of the {one} is",
            (numbers[0],),
            first_number,
            8,
            facts[0][0],
        ),
        sample("passkey", f"\nThe pass key of the {once} is", (numbers[1],), first_number, 8, facts[1][0]),
        sample("passkey_twice", f"\nThe secret code of the {twice} is", (numbers[2],), first_number, 8),
        sample(
            "four_needles",
            f"\nThe four lucky numbers of the {four} are",
            tuple(numbers[3:]),
            share_found,
            36,
        ),
        sample("json", f'\n"{key}": "', (pairs[key],), first_number, 8, facts[4][0]),
        sample("recall", f"\n{cue}", (answer,), starts_with, 2 * RECALL_ANSWER + 4),
    ]
    return Document(whole, document, continuation, length, [*questions, *_turns(questions)])


def _turns(questions: Sequence[Sample]) -> list[Sample]:
    """The same, but the first, as a conversation goes on: what was said before is part of the question."""
    made, said = [], ""
    for sample in questions:
        if said:
            name = sample.id.replace(sample.task, f"turns/{sample.task}", 1)
            made.append(replace(sample, task="turns", id=name, question=said + sample.question, depth=None))
        closing = '"' if sample.task == "json" else ""
        space = "" if closing else " "
        said += f"{sample.question}{space}{', '.join(sample.answers)}{closing}."
    return made


def _passage(prose: Sequence[str], draw: random.Random) -> list[str]:
    """Words of a paragraph that lies in the document, away from its ends."""
    wanted = RECALL_CUE + RECALL_ANSWER
    inner = prose[1:-2] or prose
    long = [line.split() for line in inner if len(line.split()) >= wanted] or [max(inner, key=len).split()]
    return draw.choice(long)[:wanted]


def share_found(prediction: str, answers: tuple[str, ...]) -> float:
    """Share of the answers that occur in the prediction."""
    return sum(answer in prediction for answer in answers) / len(answers)
