"""The `vllm-kvcompress inspect` command: the fraction of one prompt that each KV head of each layer keeps."""

import argparse
import json
from pathlib import Path

from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.evaluation import options
from vllm_kvcompress.evaluation.host import checkpoint, context_limit
from vllm_kvcompress.evaluation.quality import retrieval
from vllm_kvcompress.evaluation.quality.samples import opening
from vllm_kvcompress.evaluation.variants import EVERY_PROMPT, behind, max_model_len, served_by
from vllm_kvcompress.plan import Plan

OUTPUT = 2  # tokens: a prompt is compacted before the second is computed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `inspect`."""
    parser.add_argument("model", nargs="?", help="checkpoint folder; SmolLM2-135M-Instruct when not given")
    parser.add_argument("--compression", default="adakv:budget=0.25", help="as for --kv-compression")
    positive = options.at_least(1)
    parser.add_argument(
        "--prompt", type=options.text_file, help="text file; a document with hidden facts when not given"
    )
    parser.add_argument("--tokens", type=positive, default=1500, help="length at which the prompt is cut")
    parser.add_argument("--block-size", type=positive, default=32, help="tokens per KV block")
    parser.add_argument("--output", type=options.result_folder, help="folder of the picture and its data")


def run(arguments: argparse.Namespace) -> None:
    """Compact one prompt and show it."""
    config = EVERY_PROMPT.for_request(arguments.compression)
    arguments.model = checkpoint(arguments.model)
    from transformers import AutoTokenizer

    from vllm_kvcompress.evaluation import pictures

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    prompt = opening(tokenizer, _text(tokenizer, arguments))[: arguments.tokens]
    limit = context_limit(arguments.model)
    more = max(OUTPUT, behind([arguments.compression]))
    if (longest := len(prompt) + more) > limit:
        raise KVCompressionError(
            f"a prompt of {len(prompt)} tokens and {more} more exceed the model's context of {limit}; "
            "lower --tokens"
        )
    if config.record_format is None and Plan.of(config, len(prompt), arguments.block_size) is None:
        raise KVCompressionError(f"{arguments.compression} leaves a prompt of {len(prompt)} tokens as it is")
    from vllm_kvcompress.evaluation.engine import Engine

    engine = Engine(
        arguments.model,
        max_model_len(longest, limit, [arguments.compression]),
        arguments.block_size,
        config=served_by([arguments.compression]),
    )
    kept = engine.compactions(prompt, arguments.compression).tolist()
    title = f"{Path(arguments.model).name}, {arguments.compression}, {len(prompt)} tokens"
    print(title)
    numbers = [layer.index for layer in engine.compactor.layers]
    if numbers != list(range(len(numbers))):
        print(f"layers {', '.join(map(str, numbers))}; others slide a window")
    print(pictures.text_heatmap(kept))
    folder = arguments.output or Path("kvcompress-inspect")
    folder.mkdir(parents=True, exist_ok=True)
    data = {"compression": arguments.compression, "prompt_tokens": len(prompt)}
    (folder / "kept.json").write_text(json.dumps({**data, "layers": numbers, "kept": kept}))
    pictures.kept_by_head(kept, folder / "kept.png", title)
    print(f"picture and data are in {folder}")


def _text(tokenizer, arguments: argparse.Namespace) -> str:
    if arguments.prompt:
        return arguments.prompt.read_text(encoding="utf-8")
    (document,) = retrieval.documents(tokenizer, [arguments.tokens], 1, retrieval.default_prose())
    return document.text
