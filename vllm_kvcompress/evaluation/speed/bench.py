"""The `vllm-kvcompress bench` command: memory and speed, stock vLLM against compressed, alternating.

Engines stepped by hand, one process each, give decode step times against context length and the
time spent in compaction. Servers with pools of one size, loaded by vLLM's own benchmark client, give what
users see: how many requests run at once, throughput, time to first token, inter-token latency, preemptions;
once under memory pressure and once with short prompts in a roomy pool, where compression does not pay. If
asked for, also at rates from light to overload, with prompts that are compacted always or under pressure,
and with prompts that begin alike: users of one document, and conversations.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.evaluation import options
from vllm_kvcompress.evaluation.host import checkpoint, context_limit
from vllm_kvcompress.evaluation.pictures import MODES
from vllm_kvcompress.evaluation.speed.held import check_pool, longest_request, measure_blocks
from vllm_kvcompress.evaluation.speed.prefixes import (
    longest_talk,
    measure_document,
    measure_talks,
    prefixes_table,
)
from vllm_kvcompress.evaluation.speed.rates import ASKED, measure_rates, rates_table
from vllm_kvcompress.evaluation.speed.served import SERVED, measure_serving
from vllm_kvcompress.evaluation.speed.stepped import longest_steps, measure_steps, ratios
from vllm_kvcompress.evaluation.variants import behind
from vllm_kvcompress.plan import Plan

REGIMES = {"pressure": "under memory pressure", "short": "with short prompts in a roomy pool"}
PAYS = 1.05  # a throughput ratio below it is not worth a lossy cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench`."""
    parser.add_argument("model", nargs="?", help="checkpoint folder; SmolLM2-135M-Instruct when not given")
    parser.add_argument("--compression", default="snapkv:budget=0.25", help="as for --kv-compression")
    positive = options.at_least(1)

    def number(name: str, default: int, shown: str, kind=positive) -> None:
        parser.add_argument(name, type=kind, default=default, help=shown)

    parser.add_argument(
        "--contexts",
        type=options.counts(1),
        default="1024,2048,4096",
        help="context lengths of the decode steps",
    )
    number("--batch", 4, "requests that decode together")
    number("--rounds", 5, "alternations per context length")
    number("--steps", 6, "decode steps of a round")
    number("--prompt", 1500, "prompt tokens under memory pressure")
    number("--short", 128, "prompt tokens where the pool is never full")
    number("--output-tokens", 48, "answer tokens of the served requests", options.at_least(2))
    number("--requests", 12, "requests sent at once")
    number("--server-rounds", 2, "alternations of the served load")
    parser.add_argument(
        "--parts", default="steps,serve", help="of steps, serve, rates, document, talks, blocks"
    )
    parser.add_argument(
        "--rates", type=options.rates, default="0.1,0.2,0.4", help="requests a second of the part `rates`"
    )
    parser.add_argument(
        "--modes",
        type=options.among(tuple(MODES)),
        default=",".join(MODES),
        help="where questions of the part `rates` are: inside the prompt, or begun by the output after it",
    )
    number("--keys", 8, "pass keys in the document of the part `document`")
    number("--room", 1536, "tokens that its pool holds beside a raw document", options.at_least(256))
    number("--talks", 40, "conversations of the part `talks`")
    number("--turns", 20, "turns of each")
    number("--begun", 512, "tokens of prose that each begins with")
    number("--said", 32, "tokens of prose in each turn")
    number("--long-output", 4000, "output tokens of the part `blocks`")
    number("--long-prompt", 6000, "prompt tokens of the part `blocks`")
    number("--block-size", 32, "tokens per KV block")
    parser.add_argument("--output", type=options.result_folder, help="folder of the results")


def run(arguments: argparse.Namespace) -> None:
    """Measure, write results and pictures, print the tables."""
    config = KVCompressionConfig.parse(arguments.compression)
    parts = {
        "steps": measure_steps,
        "serve": measure_serving,
        "rates": measure_rates,
        "document": measure_document,
        "talks": measure_talks,
        "blocks": measure_blocks,
    }
    chosen = [part for part in arguments.parts.split(",") if part]
    if not chosen or set(chosen) - set(parts):
        raise KVCompressionError(f"--parts takes {', '.join(parts)}, got {arguments.parts!r}")
    arguments.model = checkpoint(arguments.model)
    _check_lengths(arguments, config, chosen)
    begin = time.perf_counter()
    result = {"settings": {k: v for k, v in vars(arguments).items() if k != "output"}}
    for part in chosen:
        result[part] = parts[part](arguments)
    result["seconds"] = round(time.perf_counter() - begin)
    folder = arguments.output or Path("kvcompress-bench") / Path(arguments.model).name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(result, indent=1, default=str))
    text = table(result)
    (folder / "bench.md").write_text(text)
    print(text)
    _draw(result, folder)
    print(f"{result['seconds']} s; results, tables and pictures are in {folder}")


def _check_lengths(arguments: argparse.Namespace, config: KVCompressionConfig, parts: list[str]) -> None:
    """Refuse lengths that some part could not be measured at, before the first is measured."""
    room = max(arguments.output_tokens, behind([arguments.compression]))
    longest = {
        "steps": longest_steps(arguments),
        "serve": max(arguments.prompt, arguments.short) + room,
        "rates": arguments.prompt + room + ASKED,
        "document": arguments.prompt + room,
        "talks": longest_talk(arguments),
        "blocks": longest_request(arguments),
    }
    limit = context_limit(arguments.model)
    for part in parts:
        if longest[part] > limit:
            raise KVCompressionError(
                f"the part {part} needs a context of {longest[part]} tokens and the model has {limit}; "
                "lower --contexts, --prompt, --turns, --long-prompt or --long-output"
            )
    shortest = min(arguments.contexts)
    if "steps" in parts and Plan.of(config, shortest, arguments.block_size) is None:
        raise KVCompressionError(
            f"{arguments.compression} leaves a prompt of {shortest} tokens as it is; raise --contexts"
        )
    if "serve" in parts and arguments.short > arguments.prompt:
        raise KVCompressionError(
            f"--short {arguments.short} exceeds --prompt {arguments.prompt}, which the pool is made for"
        )
    if "blocks" in parts:
        check_pool(arguments)


def table(result: dict[str, Any]) -> str:
    """Ratios first, then what they are made of, in Markdown."""
    settings = result["settings"]
    lines = [f"Model {Path(settings['model']).name}, {settings['compression']} against stock vLLM.", ""]
    if "serve" in result:
        lines += _serving_table(result["serve"], settings)
    if "steps" in result:
        lines += _steps_table(result["steps"])
    for part, shown in {"document": "Users of one document", "talks": "Conversations"}.items():
        if part in result:
            lines += prefixes_table(result[part], shown)
    if "rates" in result:
        lines += rates_table(result["rates"])
    if "blocks" in result:
        lines += _blocks_lines(result["blocks"])
    return "\n".join(lines) + "\n"


def _serving_table(serve: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    lines = []
    for name, regime in serve["regimes"].items():
        title = REGIMES[name].capitalize()
        lines += [
            f"{title}: {settings['requests']} requests of {regime['prompt']} + {settings['output_tokens']} "
            f"tokens at once, a pool of {serve['pool_blocks']} blocks.",
            "",
            "| | compressed over stock | stock | compressed |",
            "| --- | --- | --- | --- |",
        ]
        stock, ours = (regime["runs"][variant] for variant in ("stock", "compressed"))
        for key, label in {"at_once": "requests that ran at once", **SERVED}.items():
            pair = [statistics.median(run[key] for run in runs) for runs in (stock, ours)]
            low, middle, high = ratios([r[key] for r in ours], [r[key] for r in stock])
            unit = " ms" if key.endswith("_ms") else ""
            shown = " | ".join(f"{value:.4g}{unit}" for value in pair)
            lines.append(f"| {label} | {middle:.2f} [{low:.2f}, {high:.2f}] | {shown} |")
        for key, label in {"peak_blocks": "peak blocks in use", "preemptions": "preemptions"}.items():
            shown = " | ".join(str(max(int(run[key]) for run in runs)) for runs in (stock, ours))
            lines.append(f"| {label} | | {shown} |")
        throughput = regime["over_stock"]["output_throughput"][1]
        lines += ["", verdict(throughput, name), ""]
    return lines


def verdict(throughput: float, regime: str) -> str:
    """One line that says whether compression pays, from the ratio of output tokens per second."""
    if throughput >= PAYS:
        return f"Compression pays {REGIMES[regime]}: {throughput:.2f} times the output tokens per second."
    return f"Compression does not pay {REGIMES[regime]}: {throughput:.2f} times the output tokens per second."


def _steps_table(steps: dict[str, Any]) -> list[str]:
    lines = [
        f"Decode steps of {steps['batch']} requests: median over stock's [lowest, highest round]. Metadata "
        "is the attention metadata's part of a step: stock, idle, compressed. *Own* is the share of a step "
        "that a profile finds in the package's own functions: idle, compressed.",
        "",
        "| context | idle plugin | compressed | own | stock step | metadata | prefill "
        "| compaction | of prefill |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in steps["rows"]:
        shown = " | ".join(
            f"{m:.2f} [{low:.2f}, {high:.2f}]"
            for low, m, high in (row["over_stock"][v] for v in ("idle", "compressed"))
        )
        metadata = ", ".join(f"{1e6 * seconds:.0f}" for seconds in row["metadata_seconds"].values())
        own = ", ".join(f"{100 * row['own_share'][v]:.1f}" for v in ("idle", "compressed"))
        lines.append(
            f"| {row['context']} | {shown} | {own} % | {1000 * row['step_seconds']['stock']:.0f} ms | "
            f"{metadata} µs | {row['prefill_seconds']:.1f} s | {1000 * row['compaction_seconds']:.0f} ms | "
            f"{100 * row['compaction_seconds'] / row['prefill_seconds']:.1f} % |"
        )
    compacted = [row for row in steps["rows"] if row["compaction_seconds"]]
    slower = [row["context"] for row in compacted if row["over_stock"]["compressed"][1] > 1]
    if slower:
        lines += ["", f"Compression does not pay in decode time at contexts up to {max(slower)} tokens."]
    return lines


def _blocks_lines(blocks: dict[str, Any]) -> list[str]:
    options = ", ".join(f"{name}={value}" for name, value in blocks["options"].items())
    lines = [f"A pool of {blocks['pool_blocks']} blocks of {blocks['block_size']} tokens, {options}:", ""]
    for name in ("output", "prompt"):
        held, prompt = blocks[name]["held"], blocks[name]["prompt"]
        tokens = held[-1][0]
        whole = -(-tokens // blocks["block_size"])
        lines.append(
            f"- {prompt} + {tokens - prompt} tokens held at most {max(b for _, b in held)} blocks, "
            f"where stock vLLM would hold {whole}"
        )
    return [*lines, "", f"Stock vLLM on this pool: {blocks['stock_says'] or 'starts'}"]


def _draw(result: dict[str, Any], folder: Path) -> None:
    from vllm_kvcompress.evaluation import pictures

    settings = result["settings"]
    title = f"{Path(settings['model']).name}, {settings['compression']}"
    if "steps" in result:
        rows = result["steps"]["rows"]
        over = {v: [row["over_stock"][v] for row in rows] for v in ("idle", "compressed")}
        pictures.decode_time(
            [row["context"] for row in rows],
            {v: [r[1] for r in given] for v, given in over.items()},
            {v: [(r[0], r[2]) for r in given] for v, given in over.items()},
            folder / "decode_time.png",
            title,
        )
    if "blocks" in result:
        every, kept = (result["blocks"]["options"][name] for name in ("recompact_every", "max_tokens_kept"))
        how = f"{title.partition(':')[0]}, compacted every {every} tokens to {kept}"
        pictures.blocks_over_time(result["blocks"], folder / "blocks_over_time.png", how)
    if "rates" in result:
        pictures.rates(result["rates"], folder / "rates.png", title)
    if "serve" in result:
        rows = []
        for name, regime in result["serve"]["regimes"].items():
            stock, ours = (regime["runs"][variant] for variant in ("stock", "compressed"))
            at_once = ratios([r["at_once"] for r in ours], [r["at_once"] for r in stock])
            throughput = regime["over_stock"]["output_throughput"]
            rows.append(
                {
                    "label": f"{REGIMES[name]}, {regime['prompt']} tokens",
                    "requests_ratio": at_once[1],
                    "throughput_ratio": throughput[1],
                    "spread": {
                        "requests_ratio": (at_once[0], at_once[2]),
                        "throughput_ratio": (throughput[0], throughput[2]),
                    },
                }
            )
        pictures.concurrency(rows, folder / "concurrency.png", title)
