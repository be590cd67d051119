#!/usr/bin/env python
"""Turn the predictions of docs/gpu.md into measurements, on the GPU of this machine.

    python tools/measure_gpu.py --output measured            # everything, in about an hour
    python tools/measure_gpu.py --output measured --parts kernels,smoke
    python tools/measure_gpu.py --output tried --parts smoke,served --tiny      # the script itself, anywhere

Three parts, each in processes of its own, each writing a JSON file to the folder:

- `kernels`: every kernel equals plain PyTorch on this device, then the decode kernel over the grid of
  batches, contexts and budgets against the copy bandwidth of the card.
- `smoke`: a small random Llama, stock and compressed, eager and with CUDA graphs. What is never compacted is
  answered as by stock vLLM, and what is compacted is answered alike with graphs and without.
- `served`: a Llama of 8B parameters with random weights, stock and compressed to each budget, prompts of
  each length, from one request at a time (idle) to more than the pool holds: output tokens a second, seconds
  to the first token and between tokens. Weights do not change what a step costs, so none are needed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    parser.add_argument("--parts", default="kernels,smoke,served", help="of kernels, smoke, served")
    parser.add_argument("--prompts", default="8192,32768", help="prompt tokens of the part `served`")
    parser.add_argument("--at-once", default="1,8,32,128", help="requests at a time of the part `served`")
    parser.add_argument(
        "--tiny", action="store_true", help="a small model and short prompts, to try this out"
    )
    parser.add_argument("--engine", help=argparse.SUPPRESS)  # of a process of its own
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.engine:
        name, part = arguments.engine.rsplit(":", 1)
        _write(
            arguments.output, arguments.engine, _smoke(name) if part == "smoke" else _serve(name, arguments)
        )
        return
    for part in arguments.parts.split(","):
        {"kernels": _kernels, "smoke": _compare_smoke, "served": _compare_served}[part](arguments)


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
    return answers | {"jobs": len(jobs)}


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
        "every prompt was compacted": found["compressed"]["jobs"] == found["compressed+graphs"]["jobs"] == 6,
        "compacted differs from stock": found["compressed"]["own"] != found["stock"]["own"],
    }
    _write(arguments.output, "smoke", same)
    for what, holds in same.items():
        print(f"{'yes' if holds else 'NO '} {what}")


def _answers(engine: Any, requests: int, prompt: int, tokens: int, extra: dict | None) -> list[list[int]]:
    outputs = engine.generate(_prompts(requests, prompt), _sampling(tokens, extra), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


# ---------------------------------------------------------------------- served


def _serve(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Times of one variant, for each prompt length and number of requests at a time."""
    model, prompts, at_once, tokens = LLAMA_8B, _counts(arguments.prompts), _counts(arguments.at_once), 256
    if arguments.tiny:
        model, prompts, at_once, tokens = SMALL, [256], [1, 4], 16
    longest = max(prompts) + tokens + 64
    engine = _start(
        _undrawn(model), VARIANTS[name], longest, load_format="dummy", enforce_eager=arguments.tiny
    )
    cells = []
    for prompt in prompts:
        for together in at_once:
            _answers(engine, 1, prompt, 4, None)  # compiles what this length needs
            cells.append({"prompt": prompt, "at_once": together} | _timed(engine, together, prompt, tokens))
            print(name, json.dumps(cells[-1]), flush=True)
    return cells


def _timed(engine: Any, together: int, prompt: int, tokens: int) -> dict[str, float]:
    """Serve twice as many requests as are in flight at a time, each followed by the next."""
    waiting = _prompts(2 * together, prompt)
    core, sampling = engine.llm_engine, _sampling(tokens, None)
    sent: dict[str, float] = {}
    first: dict[str, float] = {}
    finished: dict[str, float] = {}
    begin = time.perf_counter()
    while waiting or len(finished) < len(sent):
        while waiting and len(sent) - len(finished) < together:
            name = f"{prompt}-{together}-{len(sent)}"
            sent[name] = time.perf_counter()
            core.add_request(name, waiting.pop(), sampling)
        for output in core.step():
            now = time.perf_counter()
            if output.outputs[0].token_ids:
                first.setdefault(output.request_id, now)
            if output.finished:
                finished[output.request_id] = now
    seconds = time.perf_counter() - begin
    between = [(finished[name] - first[name]) / (tokens - 1) for name in sent]
    return {
        "output_tokens_per_second": len(sent) * tokens / seconds,
        "mean_seconds_to_first_token": sum(first[name] - sent[name] for name in sent) / len(sent),
        "mean_seconds_between_tokens": sum(between) / len(between),
    }


def _compare_served(arguments: argparse.Namespace) -> None:
    cells = {name: _in_process(arguments, f"{name}:served") for name in VARIANTS}
    print("\n| prompt | at once | " + " | ".join(f"{name}: tokens/s" for name in VARIANTS) + " |")
    print("| --- " * (2 + len(VARIANTS)) + "|")
    for row in zip(*cells.values(), strict=True):
        rates = " | ".join(f"{cell['output_tokens_per_second']:.0f}" for cell in row)
        print(f"| {row[0]['prompt']} | {row[0]['at_once']} | {rates} |")
    _write(arguments.output, "served", cells)


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
    environment = {"MEASURED_MODELS": str(arguments.output / "models"), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    subprocess.run(command, env={**os.environ, **environment}, check=True)
    return json.loads((arguments.output / f"{_file(engine)}.json").read_text())


def _write(folder: Path, name: str, content: Any) -> None:
    (folder / f"{_file(name)}.json").write_text(json.dumps(content, indent=1))


def _file(name: str) -> str:
    return name.replace("/", "-of-").replace(":", "-")


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
