"""The `vllm-kvcompress check` command: what of a model is compacted, and what a pool then holds.

Nothing is computed, and no weights are read.
"""

import argparse
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from vllm_kvcompress.config import METHODS
from vllm_kvcompress.evaluation import options
from vllm_kvcompress.evaluation.findings import Finding
from vllm_kvcompress.evaluation.host import checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `check`."""
    positive = options.at_least(1)
    parser.add_argument("model", nargs="?", help="checkpoint folder; SmolLM2-135M-Instruct when not given")
    parser.add_argument("--kv-compression", default="auto:budget=0.25", help="as for vllm serve")
    parser.add_argument("--memory", type=options.above_zero, default=4.0, help="GiB of the pool")
    parser.add_argument("--prompt-tokens", type=positive, default=1536, help="of each request")
    parser.add_argument("--output-tokens", type=positive, default=256, help="of each request")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--vllm", default="", help="further options of vllm serve, --vllm='--block-size 64'")


def run(arguments: argparse.Namespace) -> None:
    """Look at a model and say what was found."""
    arguments.model = checkpoint(arguments.model)
    given = [
        "--model",
        arguments.model,
        "--kv-compression",
        arguments.kv_compression,
        *shlex.split(arguments.vllm),
    ]
    from vllm_kvcompress.evaluation.weightless import EngineWithoutWeights

    engine = EngineWithoutWeights(given, round(arguments.memory * 2**30))
    found = engine.look(arguments.prompt_tokens, arguments.output_tokens)
    if arguments.json:
        print(json.dumps({"compression": arguments.kv_compression} | asdict(found), indent=2))
        return
    print("\n".join(text(found, arguments.kv_compression)))


def text(found: "Finding", compression: str) -> Iterator[str]:
    """Lines for people."""
    yield f"{found.model} ({found.architecture}), {compression}"
    for group in found.groups:
        reason = f": {group.reason}" if group.reason else ""
        yield f"  {group.becomes:<10} layers {_ranges(group.layers)}: {group.what}{reason}"
    served = [name for name in METHODS if name not in found.refused and name not in found.untold]
    yield f"  served     {', '.join(served)}"
    for name, what in found.untold.items():
        yield f"  at start   {name} asks the loaded model for {what}"
    for name, reason in found.refused.items():
        yield f"  refused    {name}: {reason}"
    gib = found.memory_bytes / 2**30
    yield f"a pool of {gib:g} GiB, {found.blocks:,} blocks"
    yield f"requests of {found.prompt_tokens:,} + {found.output_tokens:,} tokens{'raw':>14}{'compressed':>12}"
    for name, label in (
        ("blocks", "blocks of one at its end"),
        ("requests", "at once"),
        ("tokens", "tokens of these"),
    ):
        raw, ours = getattr(found.raw, name), getattr(found.compressed, name)
        yield f"  {label:<34}{raw:>14,}{ours:>12,}"


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3, 5` of 0, 1, 2, 3, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if part[1:] else str(part[0]) for part in parts)
