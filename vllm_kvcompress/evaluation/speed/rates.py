"""Requests that come at rates from light to overload: stock, compacted always, compacted under pressure."""

import argparse
import json
import random
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.evaluation.host import require
from vllm_kvcompress.evaluation.pictures import EXTRA
from vllm_kvcompress.evaluation.report import share
from vllm_kvcompress.evaluation.speed.served import SERVED, pool_blocks, running

PROSE = Path(__file__).parents[1] / "data" / "persuasion.txt"
SHARES = (1, 2, 4)  # prompts are so many times shorter than the longest
SHOWN = (*SERVED, "p99_ttft_ms", "at_once", "preemptions", "compacted")
TELLS = "\n\nThe pass key is {key}. Remember it: the pass key is {key}.\n\n"
ASKS = "\n\nWhat is the pass key? The pass key is"
ASKED = 16  # tokens of it, at most


def measure_rates(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same requests, at the same moments, on three servers, one after the other.

    Each prompt is prose with a pass key in it, so that the answers tell what compression costs. The question
    for it is the prompt's end ("inside"), or what the output has to begin with ("after"): who is compacted at
    the end of its prompt has not seen it then.
    """
    from tqdm import tqdm
    from transformers import AutoTokenizer

    config = KVCompressionConfig.parse(arguments.compression)
    variants = {
        "stock": None,
        "prompt": replace(config, when="prompt", ladder=None),
        "pressure": replace(config, when="pressure"),
    }
    rows, blocks = [], pool_blocks(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    with tempfile.TemporaryDirectory() as work, running(variants, arguments, blocks) as servers:
        requests = Path(work) / "requests.jsonl"
        with tqdm(total=len(arguments.modes) * len(arguments.rates) * len(servers), desc="rates") as bar:
            for mode in arguments.modes:
                keys = _write(arguments, tokenizer, mode, requests)
                given = _given(arguments, tokenizer, mode, requests)
                for rate in arguments.rates:
                    for name, server in servers.items():
                        values = server.load(len(keys), [*given, "--request-rate", str(rate), "--seed", "0"])
                        texts = values["generated_texts"]
                        right = sum(key in text for key, text in zip(keys, texts, strict=True))
                        shown = {key: values[key] for key in SHOWN}
                        row = {"mode": mode, "rate": rate, "variant": name, "right": right, "n": len(keys)}
                        rows.append(row | shown)
                        bar.update()
    return {"pool_blocks": blocks - 1, "rows": rows}


def _write(arguments: argparse.Namespace, tokenizer: Any, mode: str, path: Path) -> list[str]:
    """Write the requests as vLLM's client reads them; the pass keys."""
    require("pandas", EXTRA)  # with which vLLM's client reads them
    prose = tokenizer(PROSE.read_text(), add_special_tokens=False)["input_ids"]
    random_, keys, lines = random.Random(0), [], []
    for number in range(arguments.requests):
        key = str(random_.randrange(10_000, 100_000))
        says = TELLS.format(key=key)
        length = arguments.prompt // SHARES[number % len(SHARES)] - _length(tokenizer, says + ASKS) - 4
        begin, place = random_.randrange(len(prose) - length), random_.randrange(length // 8, length)
        before, behind = prose[begin : begin + place], prose[begin + place : begin + length]
        keys.append(key)
        prompt = tokenizer.decode(before) + says + tokenizer.decode(behind)
        lines.append(json.dumps({"prompt": prompt + ASKS if mode == "inside" else prompt}))
    path.write_text("\n".join(lines))
    return keys


def _given(arguments: argparse.Namespace, tokenizer: Any, mode: str, requests: Path) -> list[str]:
    """What vLLM's client is told of the requests."""
    tokens, given = arguments.output_tokens, ["--dataset-name", "custom", "--dataset-path", str(requests)]
    given += ["--skip-chat-template", "--disable-shuffle", "--save-detailed"]
    if mode == "after":
        tokens += _length(tokenizer, ASKS)
        said = {"regex": re.escape(ASKS) + r"[\s\S]*"}
        # No end before the last token: a grammar has nothing to say behind one.
        given += ["--extra-body", json.dumps({"structured_outputs": said, "min_tokens": tokens})]
    return [*given, "--custom-output-len", str(tokens)]


def _length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def rates_table(result: dict[str, Any]) -> list[str]:
    """One row for each rate and server, in Markdown."""
    lines = [
        f"A pool of {result['pool_blocks']} blocks; requests compacted never, always, under pressure:",
        "",
        "| question | requests/s | | answered/s | output tokens/s | TTFT median, p99 "
        "| inter-token median, p99 | at once | preemptions | compacted | pass keys [95 %] |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        right = share([1.0] * row["right"] + [0.0] * (row["n"] - row["right"]))
        assert right is not None
        lines.append(
            f"| {row['mode']} | {row['rate']} | {row['variant']} | {row['request_throughput']:.2f} | "
            f"{row['output_throughput']:.1f} | {row['median_ttft_ms'] / 1000:.1f}, "
            f"{row['p99_ttft_ms'] / 1000:.1f} s | {row['median_itl_ms']:.0f}, {row['p99_itl_ms']:.0f} ms | "
            f"{row['at_once']:.0f} | {row['preemptions']:.0f} | {row['compacted']:.0f} of {row['n']} | "
            f"{row['right']} of {row['n']} [{100 * right['low']:.0f}, {100 * right['high']:.0f}] |"
        )
    return [*lines, ""]
