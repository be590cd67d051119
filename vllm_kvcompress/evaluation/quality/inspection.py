"""The `vllm-kvcompress inspect` command: the fraction of one prompt that each KV head of each layer keeps."""

import argparse
import json
from pathlib import Path

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.evaluation.host import checkpoint
from vllm_kvcompress.evaluation.quality import retrieval
from vllm_kvcompress.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `inspect`."""
    parser.add_argument("model", nargs="?", help="checkpoint folder; SmolLM2-135M-Instruct when not given")
    parser.add_argument("--compression", default="adakv:budget=0.25", help="as for --kv-compression")
    parser.add_argument("--prompt", type=Path, help="text file; a document with hidden facts when not given")
    parser.add_argument("--tokens", type=int, default=1500, help="length at which the prompt is cut")
    parser.add_argument("--block-size", type=int, default=32, help="tokens per KV block")
    parser.add_argument("--output", type=Path, help="folder of the picture and its data")


def run(arguments: argparse.Namespace) -> None:
    """Compact one prompt and show it."""
    config = KVCompressionConfig.parse(arguments.compression)
    arguments.model = checkpoint(arguments.model)
    from vllm_kvcompress.evaluation import pictures
    from vllm_kvcompress.evaluation.engine import Engine

    engine = Engine(arguments.model, arguments.tokens + 512, arguments.block_size)
    prompt = engine.tokenizer.encode(_text(engine.tokenizer, arguments))[: arguments.tokens]
    plan = Plan.of(config, len(prompt), arguments.block_size)
    if plan is None:
        raise KVCompressionError(f"{arguments.compression} leaves a prompt of {len(prompt)} tokens as it is")
    kept = (engine.compactions(prompt, arguments.compression) / plan.boundary).tolist()
    title = f"{Path(arguments.model).name}, {arguments.compression}, {len(prompt)} tokens"
    print(title)
    print(pictures.text_heatmap(kept))
    folder = arguments.output or Path("kvcompress-inspect")
    folder.mkdir(parents=True, exist_ok=True)
    data = {"compression": arguments.compression, "prompt_tokens": len(prompt), "boundary": plan.boundary}
    (folder / "kept.json").write_text(json.dumps({**data, "kept": kept}))
    pictures.kept_by_head(kept, folder / "kept.png", title)
    print(f"picture and data are in {folder}")


def _text(tokenizer, arguments: argparse.Namespace) -> str:
    if arguments.prompt:
        return arguments.prompt.read_text()
    (document,) = retrieval.documents(tokenizer, [arguments.tokens], 1, retrieval.default_prose())
    return document.text
