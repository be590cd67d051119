"""The main job on a small real model: the same long prompts through vLLM twice, stock and compressed.

    python examples/quickstart.py [--method snapkv] [--budget 0.25] [--option NAME=VALUE]

Each engine runs in its own process with the same block pool, sized so that stock holds four of the requests.
Each prompt is a piece of a novel that states a pass key twice; the question at its end is answered by
completing it. First four requests run side by side, then all of them are submitted at once.

A pass key is five or six digits long, a token each, and the question attends to the words before it. Scores
are pooled over `kernel_size` tokens, which must therefore reach past the key: with the published 7, SnapKV
keeps its first digits and drops the others (see it with `--option kernel_size=7`). So the default here is 15.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

NOVEL = Path(__file__).with_name("pride_and_prejudice.txt")  # the first chapters; public domain
PLACES = [
    "lighthouse", "bakery", "museum", "harbour", "library", "castle", "garden", "theatre",
    "station", "chapel", "market", "school", "bridge", "tower", "hospital", "windmill",
]  # fmt: skip
DEFAULT_OPTIONS = {method: ["kernel_size=15"] for method in ("snapkv", "adakv", "kv_compress")}
BLOCK_SIZE = 32  # tokens
PROMPT_TOKENS = 1500
ANSWER_TOKENS = 64
FITTING_STOCK = 4
BLOCKS_PER_REQUEST = -(-(PROMPT_TOKENS + ANSWER_TOKENS) // BLOCK_SIZE)
POOL_BLOCKS = FITTING_STOCK * BLOCKS_PER_REQUEST + 1  # one is vLLM's null block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="snapkv", help="as listed by `vllm-kvcompress methods`")
    parser.add_argument("--budget", type=float, default=0.25, help="fraction of the KV bytes that may stay")
    parser.add_argument("--option", action="append", metavar="NAME=VALUE", help="of the method")
    parser.add_argument("--requests", type=int, default=12, help="requests to submit at once")
    parser.add_argument("--model", type=Path, help="checkpoint to use instead of SmolLM2-135M-Instruct")
    parser.add_argument("--engine", choices=("stock", "compressed"), help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not FITTING_STOCK <= args.requests <= len(PLACES):
        parser.error(f"--requests must lie between {FITTING_STOCK} and {len(PLACES)}")
    if args.option is None:
        args.option = DEFAULT_OPTIONS.get(args.method, [])
    if args.engine:
        args.report.write_text(json.dumps(run_engine(args)))
        return

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the engine's process ends too
    from vllm_kvcompress.models import ModelUnavailable, smollm2

    try:
        args.model = args.model or smollm2()
    except ModelUnavailable as error:
        sys.exit(f"error: {error}")
    stock = in_own_process("stock", args)
    compressed = in_own_process("compressed", args)
    print(comparison(stock, compressed, compression(args)))


def compression(args: argparse.Namespace) -> str:
    """What `--kv-compression` of `vllm serve` would be given."""
    return f"{args.method}:" + ",".join([f"budget={args.budget:g}", *args.option])


# The two engines


def in_own_process(engine: str, args: argparse.Namespace) -> dict:
    """Run one engine in a fresh process, so that neither sees the other's memory, and return its report."""
    from vllm_kvcompress.evaluation.host import engine_environment

    say(f"{engine}: starting vLLM")
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "report.json", Path(folder) / "log"
        command = [sys.executable, __file__, "--engine", engine, "--report", str(report)]
        command += ["--method", args.method, "--budget", str(args.budget)]
        command += [f"--option={option}" for option in args.option]
        command += ["--requests", str(args.requests), "--model", str(args.model)]
        with log.open("w") as stdout:
            environment = engine_environment() | {"PYTHONWARNINGS": "ignore"}
            done = subprocess.run(command, env=environment, stdout=stdout)
        if done.returncode:
            sys.exit(f"{log.read_text()[-4000:]}\nerror: {engine} engine ended with {done.returncode}")
        return json.loads(report.read_text())


def run_engine(args: argparse.Namespace) -> dict:
    import torch
    from vllm import LLM

    from vllm_kvcompress.evaluation.host import engine_dtype

    # vLLM compiles a piece of its sampler for each new batch size; here that would outlast the answers.
    torch.compiler.set_stance("force_eager")
    options = {}
    if args.engine == "compressed":
        from vllm_kvcompress import KVCompressionConfig

        options = KVCompressionConfig.parse(compression(args)).engine_kwargs()
    llm = LLM(
        str(args.model),
        dtype=engine_dtype(),
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=POOL_BLOCKS,
        max_model_len=POOL_BLOCKS * BLOCK_SIZE // 2,
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        enforce_eager=True,
        disable_log_stats=True,
        **options,
    )
    tokenizer = llm.get_tokenizer()
    prompts = [long_prompt(tokenizer, number) for number in range(args.requests)]
    say(f"{args.engine}: {FITTING_STOCK} requests of {PROMPT_TOKENS} tokens side by side")
    few = serve(llm, prompts[:FITTING_STOCK])
    say(f"{args.engine}: {len(prompts)} requests at once into a pool of {POOL_BLOCKS} blocks")
    many = serve(llm, prompts)
    return {
        "keys": [pass_key(number) for number in range(args.requests)],
        "prompt_tokens": PROMPT_TOKENS,
        "block_bytes": block_bytes(llm),
        "few": vars(few),
        "many": vars(many),
    }


@dataclass
class Run:
    """What one batch of requests showed."""

    answers: list[str] = field(default_factory=list)
    blocks_held: list[int] = field(default_factory=list)  # per request, the last time it was seen running
    peak_decoding: int = 0  # most requests that decoded at the same time
    preemptions: int = 0
    decode_tokens_per_second: float = 0.0  # in steps without prefill, with `peak_decoding` requests
    seconds: float = 0.0


def serve(llm, prompts: list[list[int]]) -> Run:
    """Submit all prompts, step the engine to the end and look into its scheduler after each step."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)

    run, answers, held, lengths = Run(), {}, {}, {}
    preempted: dict[str, int] = {}
    steps: dict[int, list[tuple[int, float]]] = {}  # decoding requests -> (new tokens, seconds) of each step
    begin = time.perf_counter()
    while engine.has_unfinished_requests():
        before = decoding_only(scheduler)
        start = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - start
        tokens = 0
        for output in outputs:
            length = len(output.outputs[0].token_ids)
            tokens += length - lengths.get(output.request_id, 0)
            lengths[output.request_id] = length
            if output.finished:
                answers[int(output.request_id)] = output.outputs[0].text
        decoding = [r for r in scheduler.running if r.num_computed_tokens >= r.num_prompt_tokens]
        for request in scheduler.running:
            preempted[request.request_id] = request.num_preemptions
        for request in decoding:
            held[request.request_id] = blocks_held(scheduler, request.request_id)
        run.peak_decoding = max(run.peak_decoding, len(decoding))
        if before and before == decoding_only(scheduler) == tokens:
            steps.setdefault(tokens, []).append((tokens, seconds))
    run.seconds = time.perf_counter() - begin
    run.answers = [answers[number] for number in range(len(prompts))]
    run.blocks_held = list(held.values())
    run.preemptions = sum(preempted.values())
    # The first steps at full batch still build what later ones reuse.
    timed = steps.get(run.peak_decoding, [])[2:]
    if timed:
        run.decode_tokens_per_second = sum(n for n, _ in timed) / sum(s for _, s in timed)
    return run


def decoding_only(scheduler) -> int:
    """How many requests run, or 0 if one of them still computes its prompt."""
    if any(request.num_computed_tokens < request.num_prompt_tokens for request in scheduler.running):
        return 0
    return len(scheduler.running)


def blocks_held(scheduler, request_id: str) -> int:
    """Blocks of vLLM's pool that a request occupies."""
    (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    if hasattr(manager, "held_blocks"):  # the plugin's manager: raw blocks and compacted ones
        return manager.held_blocks(request_id)
    return sum(not block.is_null for block in manager.req_to_blocks[request_id])


def block_bytes(llm) -> int:
    """Bytes of one block over all layers."""
    (group,) = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    return group.kv_cache_spec.page_size_bytes * len(group.layer_names)


# The prompts


def pass_key(number: int) -> str:
    return str(48213 + 7919 * number)


def long_prompt(tokenizer, number: int) -> list[int]:
    """`PROMPT_TOKENS` token ids: a piece of the novel with one fact stated twice, then the question."""
    place, key = PLACES[number], pass_key(number)
    fact = f"\nThe pass key of the {place} is {key}. Remember it.\n"
    question = f"\nThe pass key of the {place} is"

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    paragraphs = NOVEL.read_text().splitlines()
    start = number * len(paragraphs) // len(PLACES)
    prose = encode("\n".join(paragraphs[start:] + paragraphs[:start]))
    room = PROMPT_TOKENS - 2 * len(encode(fact)) - len(encode(question))
    early, late = int(room * 0.25), int(room * 0.6)
    return (
        prose[:early] + encode(fact) + prose[early:late] + encode(fact) + prose[late:room] + encode(question)
    )


# The table


def comparison(stock: dict, compressed: dict, title: str) -> str:
    def right(report: dict) -> str:
        pairs = list(zip(report["keys"], report["many"]["answers"], strict=True))
        return f"{sum(key == first_number(answer) for key, answer in pairs)} of {len(pairs)}"

    def held(report: dict) -> str:
        blocks = sorted(report["few"]["blocks_held"])
        return str(blocks[0]) if blocks[0] == blocks[-1] else f"{blocks[0]} to {blocks[-1]}"

    def megabytes(report: dict) -> str:
        blocks = report["few"]["blocks_held"]
        return f"{sum(blocks) / len(blocks) * report['block_bytes'] / 1e6:.1f} MB"

    def fit(report: dict) -> str:
        preemptions = report["many"]["preemptions"]
        return str(report["many"]["peak_decoding"]) + (f" ({preemptions} preemptions)" if preemptions else "")

    few, many = f"{FITTING_STOCK} at once", f"{len(stock['keys'])} submitted"
    rows = [("", "stock", title)]
    for number, key in enumerate(stock["keys"][:FITTING_STOCK]):
        question = f"answer: pass key of the {PLACES[number]} ({key})"
        rows.append((question, *(short(r["few"]["answers"][number]) for r in (stock, compressed))))
    rows += [
        (f"right answers, {many}", right(stock), right(compressed)),
        (f"blocks held per request of {stock['prompt_tokens']} tokens", held(stock), held(compressed)),
        ("KV bytes held per request", megabytes(stock), megabytes(compressed)),
        (f"requests that fit a pool of {POOL_BLOCKS} blocks", fit(stock), fit(compressed)),
        (f"decode tokens/s, {few}", *(rate(r["few"]) for r in (stock, compressed))),
        ("decode tokens/s, pool full", *(rate(r["many"]) for r in (stock, compressed))),
        (f"seconds for all, {many}", *(f"{r['many']['seconds']:.1f}" for r in (stock, compressed))),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n" + "\n".join(lines)


def first_number(text: str) -> str:
    found = re.search(r"\d+", text)
    return found[0] if found else ""


def short(text: str, width: int = 24) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def rate(run: dict) -> str:
    return f"{run['decode_tokens_per_second']:.0f}"


def say(step: str) -> None:
    print(f"[quickstart] {step}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
