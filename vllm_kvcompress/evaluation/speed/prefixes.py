"""What begins alike: users of one document, and conversations that outlast the pool; stock and compacted."""

import argparse
import json
import random
import statistics
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.evaluation.report import share
from vllm_kvcompress.evaluation.speed.rates import ASKS, PROSE, TELLS
from vllm_kvcompress.evaluation.speed.served import Server, running

PREFIX_SHARE = 0.8  # of the pool
POOL = 0.35  # of all that is said in conversations
OTHER = 12  # tokens of a question
AT_ONCE = 4  # conversations that are spoken in
ANSWER = 8  # tokens
TIMEOUT_S = 600.0


@dataclass
class Answer:
    """What a client saw.

    Attributes:
        text: the answer.
        tokens: of it.
        first: seconds to the first token.
        prompt: tokens of the prompt.
        cached: of them that were not computed.
    """

    text: str
    tokens: list[int]
    first: float
    prompt: int
    cached: int


def measure_document(arguments: argparse.Namespace) -> dict[str, Any]:
    """Users of one document, on two servers with prefix caching and pools of one size."""
    return _measured(arguments, arguments.prompt + arguments.room, _document)


def measure_talks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Conversations, likewise, in pools that hold a part of what is said."""
    length = longest_talk(arguments)
    arguments = argparse.Namespace(**vars(arguments) | {"prompt": length})
    return _measured(arguments, int(arguments.talks * length * POOL), _talks)


def longest_talk(arguments: argparse.Namespace) -> int:
    """Tokens of a conversation, about."""
    return arguments.begun + arguments.turns * (arguments.said + ANSWER + OTHER)


def _measured(arguments: argparse.Namespace, num_tokens: int, load: Callable) -> dict[str, Any]:
    from tqdm import tqdm
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    config = KVCompressionConfig.parse(arguments.compression)
    variants = {"stock": None, "compacted": replace(config, prefix_share=PREFIX_SHARE)}
    blocks, rows = num_tokens // arguments.block_size + 1, {}
    with running(variants, arguments, blocks, prefix_caching=True) as servers:
        for name, server in tqdm(servers.items(), desc=load.__name__.strip("_")):
            rows[name] = load(server, arguments, tokenizer)
    return {"pool_blocks": blocks - 1, "rows": rows}


def _document(server: Server, arguments: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Users who ask a document something, all at once, after it was read once."""
    random_ = random.Random(1)
    keys = [str(random_.randrange(10_000, 100_000)) for _ in range(arguments.keys)]
    facts = [
        f"\n\nPass key {number} is {key}. Remember pass key {number}: {key}.\n\n"
        for number, key in enumerate(keys)
    ]
    prose = tokenizer(PROSE.read_text(), add_special_tokens=False)["input_ids"]
    told = [tokenizer(fact, add_special_tokens=False)["input_ids"] for fact in facts]
    part = (arguments.prompt - 96 - sum(map(len, told))) // (len(told) + 1)
    document: list[int] = []
    for number, fact in enumerate([*told, []]):
        document += prose[number * part : (number + 1) * part] + fact
    if server.variant == "compacted":
        options = {"kv_compression": json.dumps({"prefix": "document"})}
        _ask(server, document, 2, vllm_xargs=options)
    else:
        _ask(server, document, 1)
    asked = [number % len(keys) for number in range(arguments.requests)]
    ends = [f"\n\nWhat is pass key {number}? Pass key {number} is" for number in asked]
    prompts = [document + tokenizer(end, add_special_tokens=False)["input_ids"] for end in ends]
    with ThreadPoolExecutor(len(prompts)) as pool, server.watched() as peak:
        begun = time.perf_counter()
        answers = list(pool.map(lambda prompt: _ask(server, prompt, arguments.output_tokens), prompts))
        seconds = time.perf_counter() - begun
    right = sum(keys[number] in answer.text for number, answer in zip(asked, answers, strict=True))
    return {"seconds": seconds, "right": right, **_shown(answers, peak)}


def _talks(server: Server, arguments: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Conversations, turn by turn, some at once: each turn goes on from all that was said in it."""
    random_ = random.Random(2)
    prose = tokenizer(PROSE.read_text(), add_special_tokens=False)["input_ids"]
    asks = tokenizer(ASKS, add_special_tokens=False)["input_ids"]
    keys = [str(random_.randrange(10_000, 100_000)) for _ in range(arguments.talks)]
    said: list[list[int]] = []
    for key in keys:
        tells = tokenizer(TELLS.format(key=key), add_special_tokens=False)
        begin = random_.randrange(len(prose) - arguments.begun)
        middle, end = begin + arguments.begun // 2, begin + arguments.begun
        said.append(prose[begin:middle] + tells["input_ids"] + prose[middle:end])
    answers: list[Answer] = []
    right, first = 0, []

    def turn(number: int) -> Answer:
        said[number] += asks
        answer = _ask(server, said[number], ANSWER)
        said[number] += answer.tokens
        return answer

    with ThreadPoolExecutor(AT_ONCE) as pool, server.watched() as peak:
        for _ in range(arguments.turns):
            order = list(range(arguments.talks))
            random_.shuffle(order)
            for number, answer in zip(order, pool.map(turn, order), strict=True):
                answers.append(answer)
                right += keys[number] in answer.text
                begin = random_.randrange(len(prose) - arguments.said)
                said[number] += prose[begin : begin + arguments.said]
            first.append(statistics.median(each.first for each in answers[-arguments.talks :]))
    tokens = sum(map(len, said))
    return {"right": right, "tokens": tokens, "by_turn": first, **_shown(answers, peak)}


def _shown(answers: list[Answer], peak: dict[str, float]) -> dict[str, Any]:
    ordered = sorted(answer.first for answer in answers)
    return {
        "n": len(answers),
        "hit": sum(answer.cached for answer in answers) / sum(answer.prompt for answer in answers),
        "median_ttft": statistics.median(ordered),
        "p99_ttft": ordered[-1 - len(ordered) // 100],
        "at_once": peak["running"],
        "preemptions": peak["preemptions"],
    }


def _ask(server: Server, prompt: list[int], max_tokens: int, **fields: Any) -> Answer:
    body = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        **fields,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    begun, first, text, tokens = time.perf_counter(), None, "", []
    usage: dict[str, Any] = {}
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                first = first or time.perf_counter() - begun
                text += choice["text"]
                tokens += choice.get("token_ids") or []
    details = usage.get("prompt_tokens_details") or {}
    assert first is not None
    return Answer(text, tokens, first, usage["prompt_tokens"], details.get("cached_tokens") or 0)


def prefixes_table(result: dict[str, Any], shown: str) -> list[str]:
    """One row for each server, in Markdown; `shown` says of what."""
    lines = [
        f"{shown}, in a pool of {result['pool_blocks']} blocks:",
        "",
        "| | cached tokens | TTFT median, p99 | at once | preemptions | right answers [95 %] |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["rows"].items():
        right = share([1.0] * row["right"] + [0.0] * (row["n"] - row["right"]))
        assert right is not None
        lines.append(
            f"| {name} | {100 * row['hit']:.0f} % | {row['median_ttft']:.2f}, {row['p99_ttft']:.2f} s | "
            f"{row['at_once']:.0f} | {row['preemptions']:.0f} | "
            f"{row['right']} of {row['n']} [{100 * right['low']:.0f}, {100 * right['high']:.0f}] |"
        )
    return [*lines, ""]
