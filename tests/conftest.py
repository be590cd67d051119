"""What every test shares: vLLM's environment, the small real model, and long prompts of real prose."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("shared_machine", deadline=None)  # the first example also pays for imports
settings.load_profile("shared_machine")

# Read by vLLM and its libraries when they are first imported, so set before any test module imports them.
# What the caller has set stays.
for _name, _value in {
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine and worker in the test's process, open to white-box tests
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_name, _value)

NOVEL = Path(__file__).parents[1] / "examples" / "pride_and_prejudice.txt"

LongText = Callable[..., str]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a bfloat16 Hugging Face checkpoint; made on the first use, some 40 s."""
    from vllm_kvcompress.models import smollm2

    return smollm2()


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def long_ids(tokenizer) -> Callable[..., list[int]]:
    """`long_ids(num_tokens, seed=0)`: exactly that many token ids of real prose.

    The paragraphs of the novel's first chapters in an order that depends on the seed alone, so that two seeds
    share no prefix and one seed's shorter text is a prefix of its longer one. Past about 15,000 tokens the
    paragraphs come again, in another order.
    """
    paragraphs = NOVEL.read_text(encoding="utf-8").splitlines()
    encoded = [tokenizer.encode(text + "\n", add_special_tokens=False) for text in paragraphs]

    def make(num_tokens: int, seed: int = 0) -> list[int]:
        order, ids = random.Random(seed), []
        while len(ids) < num_tokens:
            for paragraph in order.sample(encoded, len(encoded)):
                ids += paragraph
        return ids[:num_tokens]

    return make


@pytest.fixture(scope="session")
def long_texts(tokenizer, long_ids) -> LongText:
    """`long_texts(num_tokens, seed=0)`: the same as a string of that many tokens."""

    def make(num_tokens: int, seed: int = 0) -> str:
        # A cut inside a word or before a line break may be tokenized differently when read back: then cut a
        # little earlier or later and fill up with one-token words.
        for cut in range(num_tokens, num_tokens - 16, -1):
            text = tokenizer.decode(long_ids(cut, seed)) + " the" * (num_tokens - cut)
            if len(tokenizer.encode(text, add_special_tokens=False)) == num_tokens:
                return text
        raise AssertionError(f"no cut of seed {seed} gives exactly {num_tokens} tokens")

    return make
