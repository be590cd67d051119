#!/usr/bin/env python
"""Turn the predictions of docs/gpu.md into measurements, on the GPU of this machine.

    python tools/measure_gpu.py --output measured            # everything, in about two hours
    python tools/measure_gpu.py --output measured --parts kernels,smoke
    python tools/measure_gpu.py --output tried --parts smoke,served,rates --tiny      # the script itself

Four parts, each in processes of its own, each writing a JSON file to the folder:

- `kernels`: every kernel equals plain PyTorch on this device, then the decode kernel over the grid of
  batches, contexts and budgets against the copy bandwidth of the card.
- `smoke`: a small random Llama, stock and compressed, eager and with CUDA graphs. What is never compacted is
  answered as by stock vLLM, and what is compacted, or watched by PyTorch, is answered alike with graphs and
  without.
- `served`: a Llama of 8B parameters with random weights, stock and compressed to each budget, prompts of
  each length, from one request at a time (idle) to more than the pool holds: output tokens a second, seconds
  to the first token and between tokens. Weights do not change what a step costs, so none are needed.
- `rates`: the same engines and prompts, but requests come when they come (Poisson arrivals, the same moments
  for every variant), from light load to saturation; at last, `inf`, all of them at once. Who waits is served
  in the order of arrival, and seconds to the first token count from arrival.
"""

import argparse
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_kvcompress.evaluation import options

ROOT = Path(__file__).resolve().parents[1]
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = LLAMA_8B | {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
VARIANTS = {"stock": None, "1/4": "kv_compress:budget=0.25", "1/16": "kv_compress:budget=0.0625"}


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--parts",
        type=options.among(PARTS),
        default="kernels,smoke,served,rates",
        help="of kernels, smoke, served, rates",
    )
    parser.add_argument("--prompts", default="8192,32768", help="prompt tokens of `served` and `rates`")
    parser.add_argument("--at-once", default="1,8,32,128", help="requests at a time of the part `served`")
    parser.add_argument(
        "--rates", type=options.rates, default="0.25,0.5,1,2,4,8", help="requests a second of `rates`"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a small model and short prompts, to try this out"
    )
    parser.add_argument("--engine", help=argparse.SUPPRESS)  # of a process of its own
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.engine:
        name, part = arguments.engine.rsplit(":", 1)
        measured = _smoke(name) if part == "smoke" else _serve(name, part, arguments)
        _write(arguments.output, arguments.engine, measured)
        return
    for part in arguments.parts:
        PARTS[part](arguments)


def _kernels(arguments: argparse.Namespace) -> None:
    report = arguments.output / "kernels.json"
    benchmark = ROOT / "vllm_kvcompress" / "kernels" / "benchmark.py"
    subprocess.run([sys.executable, benchmark, "--json", report], check=True)


# ---------------------------------------------------------------------- smoke


def _smoke(name: str) -> dict[str, Any]:
    """Answers of a small model, with compression off and as the engine has it, and Jobs that were run."""
    kind, _, graphs = name.partition("+")
    # Without torch.compile, whose fused kernels round otherwise.
    captured = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
    own = None if kind == "stock" else "kv_compress:budget=0.25"
    engine = _start(_drawn(), own, 2048, **(captured if graphs else {"enforce_eager": True}))
    off = None if kind == "stock" else {"kv_compression": "off"}
    answers = {"off": _answers(engine, 6, 700, 24, off)}
    with _counted_jobs() as jobs:
        answers["own"] = _answers(engine, 6, 700, 24, None)
    if kind == "stock":
        return answers
    # No kernel of this engine watches for it: PyTorch does, in steps that graphs have to leave out, until the
    # prompt is compacted, or to the end.
    with _counted_jobs() as watched:
        for name, method in (("watched", "h2o:budget=0.25"), ("again", "h2o:budget=0.25,recompact_every=8")):
            answers[name] = _answers(engine, 6, 700, 24, {"kv_compression": method})
    return answers | {"jobs": len(jobs), "watched jobs": len(watched)}


@contextmanager
def _counted_jobs() -> Iterator[list]:
    """Every Job that this process runs meanwhile."""
    from unittest.mock import patch

    from vllm_kvcompress.worker.compactor import Compactor

    found, run = [], Compactor.run

    def counted(self, works):
        found.extend(works)
        return run(self, works)

    with patch.object(Compactor, "run", counted):
        yield found


def _drawn() -> Path:
    """A small Llama whose attention is far from uniform, so that answers hang on what is attended to."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(os.environ["MEASURED_MODELS"]) / "llama-drawn"
    if not folder.exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SMALL, initializer_range=0.3)).save_pretrained(folder)
    return folder


def _compare_smoke(arguments: argparse.Namespace) -> None:
    found = {
        name: _in_process(arguments, f"{name}:smoke")
        for name in ("stock", "stock+graphs", "compressed", "compressed+graphs")
    }
    same = {
        "not compacted = stock, eager": found["compressed"]["off"] == found["stock"]["off"],
        "not compacted = stock, graphs": found["compressed+graphs"]["off"] == found["stock+graphs"]["off"],
        "compacted, graphs = eager": found["compressed+graphs"]["own"] == found["compressed"]["own"],
        "watched by PyTorch, graphs = eager": all(
            found["compressed+graphs"][name] == found["compressed"][name] for name in ("watched", "again")
        ),
        "every prompt was compacted": found["compressed"]["jobs"] == found["compressed+graphs"]["jobs"] == 6,
        "watched ones, too": found["compressed"]["watched jobs"]
        == found["compressed+graphs"]["watched jobs"]
        >= 12,
        "compacted differs from stock": found["compressed"]["own"] != found["stock"]["own"],
    }
    _write(arguments.output, "smoke", same)
    for what, holds in same.items():
        print(f"{'yes' if holds else 'NO '} {what}")


def _answers(engine: Any, requests: int, prompt: int, tokens: int, extra: dict | None) -> list[list[int]]:
    outputs = engine.generate(_prompts(requests, prompt), _sampling(tokens, extra), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


# ---------------------------------------------------------------------- served, rates


def _serve(name: str, part: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Times of one variant, for each prompt length and load."""
    model, prompts, tokens = LLAMA_8B, _counts(arguments.prompts), 256
    loads: list[float] = _counts(arguments.at_once) if part == "served" else [*arguments.rates, math.inf]
    if arguments.tiny:
        model, prompts, tokens = SMALL, [256], 16
        loads = [1, 4] if part == "served" else [arguments.rates[-1], math.inf]
    longest = max(prompts) + tokens + 64
    engine = _start(
        _undrawn(model), VARIANTS[name], longest, load_format="dummy", enforce_eager=arguments.tiny
    )
    cells = []
    for prompt in prompts:
        for load in loads:
            _answers(engine, 1, prompt, 4, None)  # compiles what this length needs
            if part == "served":  # twice as many as are in flight at a time, each followed by the next
                cell = {"prompt": prompt, "at_once": load}
                served = serve(engine, _prompts(2 * int(load), prompt), tokens, at_once=int(load))
            else:
                cell = {"prompt": prompt, "rate": f"{load:g}"}
                moments = arrivals(load, 8 if arguments.tiny else _how_many(load))
                served = serve(engine, _prompts(len(moments), prompt), tokens, moments)
            cells.append(cell | served.summary())
            print(name, json.dumps(cells[-1]), flush=True)
    return cells


def _how_many(rate: float) -> int:
    """Requests that come in half a minute, of which a percentile can be told and which end some time."""
    return round(min(max(30 * rate, 24), 192))


def arrivals(rate: float, number: int, seed: int = 0) -> list[float]:
    """Seconds at which requests come, so many in one on average, independently of each other; the first at 0.

    Rates differ in scale alone: the same gaps, longer or shorter.
    """
    draw, moments = random.Random(seed), [0.0]
    while len(moments) < number:
        moments.append(moments[-1] + draw.expovariate(1.0) / rate)
    return moments


@dataclass
class Served:
    """What became of some requests.

    Attributes:
        tokens: of each one's output.
        came: when each came, in seconds.
        seen: when each of its tokens was there.
        seconds: from the first arrival to the last token.
    """

    tokens: int
    came: list[float] = field(default_factory=list)
    seen: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0

    def summary(self) -> dict[str, float]:
        """Rates, and medians and 99th percentiles in seconds."""
        first = [seen[0] - came for came, seen in zip(self.came, self.seen, strict=True)]
        between = [b - a for seen in self.seen for a, b in itertools.pairwise(seen)]
        numbers = {
            "requests_per_second": len(self.came) / self.seconds,
            "output_tokens_per_second": len(self.came) * self.tokens / self.seconds,
            "mean_seconds_to_first_token": statistics.fmean(first),
            "mean_seconds_between_tokens": statistics.fmean(between),
        }
        for name, values in (("to_first_token", first), ("between_tokens", between)):
            for percent in (50, 99):
                numbers[f"p{percent}_seconds_{name}"] = percentile(values, percent)
        return numbers


def percentile(values: list[float], percent: int) -> float:
    """By linear interpolation, as numpy has it."""
    place = (len(values) - 1) * percent / 100
    below, ordered = int(place), sorted(values)
    above = min(below + 1, len(values) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def serve(
    engine: Any,
    prompts: list[dict[str, list[int]]],
    tokens: int,
    moments: list[float] | None = None,
    at_once: int | None = None,
    clock: Any = time,
) -> Served:
    """Serve requests that come at these moments, or each as soon as fewer than `at_once` are in flight.

    Args:
        engine: in this process.
        prompts: of the requests, in their order.
        tokens: of each output.
        moments: seconds from the beginning, ascending.
        at_once: without moments.
        clock: has `perf_counter` and `sleep`.
    """
    core, sampling, served = engine.llm_engine, _sampling(tokens, None), Served(tokens)
    begin, number, live = clock.perf_counter(), len(prompts), 0
    places: dict[str, int] = {}
    while live or len(places) < number:
        while len(places) < number:
            now, place = clock.perf_counter() - begin, len(places)
            if live >= at_once if moments is None else moments[place] > now:
                break
            places[name := f"{begin}-{place}"] = place
            # A request that came while a step was computed has waited since.
            served.came.append(now if moments is None else moments[place])
            served.seen.append([])
            core.add_request(name, prompts[place], sampling)
            live += 1
        if not live:
            clock.sleep(moments[len(places)] - (clock.perf_counter() - begin))
            continue
        for output in core.step():
            own = served.seen[places[output.request_id]]
            new = len(output.outputs[0].token_ids) - len(own)
            own.extend([clock.perf_counter() - begin] * new)
            live -= output.finished
    served.seconds = max(seen[-1] for seen in served.seen) - served.came[0]
    return served


def _compare_served(arguments: argparse.Namespace) -> None:
    _compare(arguments, "served", "at_once", ["output_tokens_per_second"])


def _compare_rates(arguments: argparse.Namespace) -> None:
    times = [
        f"p{percent}_seconds_{what}" for what in ("to_first_token", "between_tokens") for percent in (50, 99)
    ]
    _compare(arguments, "rates", "rate", ["requests_per_second", "output_tokens_per_second", *times])


def _compare(arguments: argparse.Namespace, part: str, load: str, shown: list[str]) -> None:
    cells = {name: _in_process(arguments, f"{name}:{part}") for name in VARIANTS}
    _write(arguments.output, part, cells)
    print("\n".join(["", *table(cells, load, shown)]))


def table(cells: dict[str, list[dict[str, float]]], load: str, shown: list[str]) -> list[str]:
    """A row for each prompt length and load, of every variant the numbers to show, in Markdown."""
    titles = [f"{name}: {what.replace('_', ' ')}" for what in shown for name in cells]
    lines = [f"| prompt | {load.replace('_', ' ')} | " + " | ".join(titles) + " |"]
    lines.append("| --- " * (2 + len(titles)) + "|")
    for row in zip(*cells.values(), strict=True):
        numbers = " | ".join(f"{cell[what]:.3g}" for what in shown for cell in row)
        lines.append(f"| {row[0]['prompt']} | {row[0][load]} | {numbers} |")
    return lines


# ---------------------------------------------------------------------- engines


def _start(model: Path, compression: str | None, longest: int, **options: Any) -> Any:
    """An engine, stock or compressed."""
    from vllm import LLM

    own = {} if compression is None else {"additional_config": {"kv_compression": compression}}
    return LLM(
        str(model),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=longest,
        enable_prefix_caching=False,
        seed=0,
        **own,
        **options,
    )


def _undrawn(model: dict[str, Any]) -> Path:
    """A folder with a configuration alone: weights are whatever vLLM makes up."""
    folder = Path(os.environ["MEASURED_MODELS"]) / f"llama-{model['hidden_size']}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model))
    return folder


def _prompts(number: int, length: int) -> list[dict[str, list[int]]]:
    """Tokens that differ from prompt to prompt, the same in every process."""
    return [
        {"prompt_token_ids": [3 + (7 * at * at + 31 * at + 101 * which) % 500 for at in range(length)]}
        for which in range(number)
    ]


def _sampling(tokens: int, extra: dict | None) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=extra
    )


def _in_process(arguments: argparse.Namespace, engine: str) -> Any:
    """The result of an engine of this name and part, in a process that gives its memory back."""
    command = [sys.executable, __file__, "--output", arguments.output, "--engine", engine]
    command += ["--prompts", arguments.prompts, "--at-once", arguments.at_once, *["--tiny"] * arguments.tiny]
    command += ["--rates", ",".join(map(str, arguments.rates))]
    environment = {"MEASURED_MODELS": str(arguments.output / "models"), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    subprocess.run(command, env={**os.environ, **environment}, check=True)
    return json.loads((arguments.output / f"{_file(engine)}.json").read_text())


def _write(folder: Path, name: str, content: Any) -> None:
    (folder / f"{_file(name)}.json").write_text(json.dumps(content, indent=1))


def _file(name: str) -> str:
    return name.replace("/", "-of-").replace(":", "-")


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


PARTS = {"kernels": _kernels, "smoke": _compare_smoke, "served": _compare_served, "rates": _compare_rates}

if __name__ == "__main__":
    main()
