"""Training a scorer: what it learns from, that it learns, and the command as a user runs it."""

import dataclasses
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_commands import command, is_picture

from vllm_kvcompress import scorers
from vllm_kvcompress.evaluation.quality import retrieval, texts
from vllm_kvcompress.evaluation.quality.scorer import Lesson, fit, train
from vllm_kvcompress.scorers import Scorer

HEADS, SIZE = 2, 6
EPOCHS = 400  # of few tokens


def test_documents_are_of_every_kind_in_turn_and_the_same_each_time():
    made = texts.documents(14, 3000, seed=4)
    assert made == texts.documents(14, 3000, seed=4) != texts.documents(14, 3000, seed=5)
    assert len(made) == 14 and min(map(len, made)) >= 3000
    prose, dialogue, manual, code, table, records, foreign = made[:7]
    assert "Bennet" in prose and dialogue.count("User: ") > 5
    assert "import" in code or "def " in code
    assert table.startswith("id,") and '"tags"' in records and len(manual.split()) > 200
    assert not any(line in retrieval.default_prose() for line in prose.splitlines() if len(line) > 60)
    odd = re.compile(r"\b[0-9a-f]{8} [0-9a-f]{8}\b|\b[A-Z]{3}-\d{4}, |\b\w+_\d+ = \d+; ")
    assert not any(odd.search(text) for text in made[:3]) and sum(bool(odd.search(t)) for t in made[7:10]) > 1
    assert len(re.findall(r"[^ -~\n]|\b(?:der|und|de|la)\b", foreign)) > 60


def test_own_text_is_all_there_is():
    own = "\n".join(f"Line {number} of my own." for number in range(50))
    for text in texts.documents(3, 500, seed=0, own_text=own)[:1]:
        assert set(text.split("\n\n")) <= {*own.splitlines(), ""}


def lesson(path, generator: torch.Generator, noise: float, num_tokens: int = 700) -> Lesson:
    """Scores that are a smooth function of keys and values, of another one in every head."""
    tensors = {}
    for layer in range(2):
        drawn = torch.randn(HEADS, num_tokens, 2 * SIZE, generator=generator)
        inputs = drawn * torch.tensor([3.0, 0.2])[:, None, None]
        first, second = drawn[..., layer].tanh(), drawn[..., SIZE + 1]
        scores = -4 + first + (second if layer else -second.tanh())
        tensors[f"inputs.{layer}"] = inputs
        tensors[f"scores.{layer}"] = scores + noise * torch.randn(scores.shape, generator=generator)
    save_file(tensors, path)
    return Lesson(path, 2)


def test_what_can_be_told_is_learned_and_the_standardisation_is_in_the_weights(tmp_path):
    draw = torch.Generator().manual_seed(0)
    lessons = [lesson(tmp_path / f"{index}", draw, noise=0.1) for index in range(5)]
    scorer, unexplained, found = train(lessons, held_out=2, width=16, epochs=EPOCHS, seed=0)
    assert scorer.shape == (2, HEADS, SIZE) and unexplained.shape == (2, HEADS)
    assert unexplained.max() < 0.1 and found > 0.8
    again, *_ = train(lessons, held_out=2, width=16, epochs=EPOCHS, seed=0)
    assert all(torch.equal(getattr(scorer, name), getattr(again, name)) for name in scorers.TENSORS)
    # What is not there cannot be told: shares are of scores that were not learned from.
    for each in lessons:
        tensors = load_file(each.path)
        tensors |= {name: torch.randn_like(tensors[name]) for name in ("scores.0", "scores.1")}
        save_file(tensors, each.path)
    _, unexplained, found = train(lessons, held_out=2, width=16, epochs=EPOCHS, seed=0)
    assert unexplained.min() > 0.9 and found < 0.3


def test_one_layers_weights_answer_for_inputs_as_they_are():
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(HEADS, 600, 2 * SIZE, generator=draw) * 7 + 30
    scores = inputs[..., 2] * 0.5 - 9
    own = Scorer("", "", *(tensor[None] for tensor in fit(inputs, scores, 8, EPOCHS, 0)))
    answer = own.log_scores((0,), 0, inputs[..., :SIZE], inputs[..., SIZE:])
    assert (answer - scores).square().mean() < 0.02 * scores.var()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    from vllm_kvcompress.models import smollm2

    smollm2()  # from the cache folder of everybody
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vllm-kvcompress" / "scorers"


def test_the_command_trains_writes_and_is_found(random_model, tmp_path, cache):
    folder = tmp_path / "out"
    arguments = ["calibrate", str(random_model), "--scorer", "--scorer-documents", "4", "--tokens", "96"]
    arguments += ["--width", "8", "--epochs", "3", "--output", str(folder)]
    printed = command(*arguments).stdout
    assert re.search(r"3 documents of 96 tokens learned from, 1 held out", printed)
    assert re.search(r"found: \d+\.\d%", printed)
    path = folder / "random-llama.safetensors"
    scorer = scorers.load(str(path))
    assert scorer.shape == (4, 3, 32) and scorer.record["teacher"].startswith("kvzip")
    assert len(scorer.record["unexplained"]) == 4
    assert is_picture(folder / "scorer.png")
    assert scorers.find("elsewhere/random-llama") == str(cache / path.name)
    assert not list((folder / "lessons").iterdir())
    from transformers import AutoConfig

    assert scorer.serves(AutoConfig.from_pretrained(random_model))
    # The same again, from one lesson that was there already.
    first = path.read_bytes()
    command(*arguments)
    assert (
        dataclasses.asdict(scorers.load(str(path)))["record"] == scorer.record and path.read_bytes() == first
    )


def test_documents_too_long_for_the_context_are_one_line(random_model, tmp_path):
    arguments = ["calibrate", str(random_model), "--scorer", "--tokens", "5000", "--output", str(tmp_path)]
    done = command(*arguments, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: documents of 5000 tokens are repeated")
