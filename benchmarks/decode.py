"""Decode step time, compaction time and concurrency, stock vLLM against compressed, alternated in one run.

Each engine lives in a process of its own, with every core. They are asked in turn to make a few decode
steps, so that noise of the machine reaches all of them alike; the medians' ratios are printed.

    python benchmarks/decode.py steps --context 4096 --batch 8 --budget 0.25
    python benchmarks/decode.py fit --prompt 2000 --blocks 300 --budget 0.25
"""

import argparse
import json
import multiprocessing as mp
import os
import statistics
import time

from vllm_kvcompress import KVCompressionConfig
from vllm_kvcompress.models import smollm2

MAX_MODEL_LEN = 8192


def settings(variant: str, args: argparse.Namespace) -> dict:
    """Engine arguments of a variant: stock, idle (configured, but every request opts out) or compressed."""
    if variant == "stock":
        return {}
    return KVCompressionConfig.parse(f"{args.method}:budget={args.budget}").engine_kwargs()


class Engine:
    """An in-process vLLM engine that is stepped by hand."""

    def __init__(self, variant: str, args: argparse.Namespace) -> None:
        import torch
        from vllm import LLM

        # vLLM compiles a piece of its sampler for each new batch size; that is not what is measured here.
        torch.compiler.set_stance("force_eager")
        self.variant, self.args = variant, args
        self.llm = LLM(
            str(args.model or smollm2()),
            enforce_eager=True,
            max_model_len=MAX_MODEL_LEN,
            block_size=args.block_size,
            num_gpu_blocks_override=args.blocks,
            max_num_seqs=64,
            seed=0,
            disable_log_stats=True,
            **settings(variant, args),
        )
        self.engine = self.llm.llm_engine
        core = self.engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.worker = core.model_executor.driver_worker.worker
        self.compaction_seconds: list[float] = []
        if variant != "stock":
            run = self.worker.compactor.run

            def timed(*arguments):
                begin = time.perf_counter()
                result = run(*arguments)
                self.compaction_seconds.append(time.perf_counter() - begin)
                return result

            self.worker.compactor.run = timed

    def add(self, count: int, num_tokens: int, max_tokens: int) -> None:
        from vllm import SamplingParams

        extra = {"kv_compression": "off"} if self.variant == "idle" else None
        for index in range(count):
            prompt = [(index * 7919 + position * 104729) % 40000 + 100 for position in range(num_tokens)]
            params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
            self.engine.add_request(f"{index}", {"prompt_token_ids": prompt}, params)

    def prefill(self) -> float:
        """Run until every request decodes; seconds it took."""
        begin = time.perf_counter()
        self.add(self.args.batch, self.args.context, 3000)
        while len(self.scheduler.running) < self.args.batch or any(
            request.is_prefill_chunk for request in self.scheduler.running
        ):
            self.engine.step()
        self.engine.step()
        self.engine.step()
        return time.perf_counter() - begin

    def steps(self, count: int) -> float:
        """Median seconds of a decode step."""
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            self.engine.step()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def fit(self, prompt: int, requests: int, output: int) -> dict:
        """Serve `requests` prompts in this pool and report how many ran at once."""
        free = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks
        initial = free()
        self.add(requests, prompt, output)
        begin, peak, preemptions, seen = time.perf_counter(), 0, 0, {}
        while self.engine.has_unfinished_requests():
            self.engine.step()
            peak = max(peak, len(self.scheduler.running))
            seen.update({r.request_id: r for r in self.scheduler.running})
        preemptions = sum(request.num_preemptions for request in seen.values())
        return {
            "pool_blocks": initial,
            "peak_running": peak,
            "preemptions": preemptions,
            "seconds": round(time.perf_counter() - begin, 2),
            "all_blocks_returned": free() == initial,
        }


def serve(connection, variant: str, args: argparse.Namespace) -> None:
    engine = Engine(variant, args)
    connection.send("ready")
    while (call := connection.recv()) is not None:
        name, arguments = call
        result = getattr(engine, name)(*arguments)
        connection.send((result, engine.compaction_seconds))


def start(variant: str, args: argparse.Namespace):
    ours, theirs = mp.Pipe()
    mp.Process(target=serve, args=(theirs, variant, args), daemon=True).start()
    assert ours.recv() == "ready"
    return ours


def ask(connection, name: str, *arguments):
    connection.send((name, arguments))
    return connection.recv()


def steps(args: argparse.Namespace) -> None:
    engines = {variant: start(variant, args) for variant in ("stock", "idle", "compressed")}
    prefill = {variant: ask(engine, "prefill")[0] for variant, engine in engines.items()}
    rounds: dict[str, list[float]] = {variant: [] for variant in engines}
    compaction: list[float] = []
    for _ in range(args.rounds):
        for variant, engine in engines.items():
            time.sleep(0.3)  # let the others' OpenMP threads stop spinning
            seconds, compaction_seconds = ask(engine, "steps", args.steps)
            rounds[variant].append(seconds)
            compaction = compaction_seconds or compaction
    for engine in engines.values():
        engine.send(None)
    stock = rounds["stock"]
    report = {
        "context": args.context,
        "batch": args.batch,
        "method": args.method,
        "budget": args.budget,
        "block_size": args.block_size,
        "step_ms": {v: round(1000 * statistics.median(t), 2) for v, t in rounds.items()},
        "step_over_stock": {
            v: round(statistics.median(a / b for a, b in zip(t, stock, strict=True)), 3)
            for v, t in rounds.items()
        },
        "spread_of_ratio": {
            v: [round(min(r), 3), round(max(r), 3)]
            for v, t in rounds.items()
            if (r := [a / b for a, b in zip(t, stock, strict=True)])
        },
        "prefill_s": {v: round(t, 2) for v, t in prefill.items()},
        "compaction_ms_per_prompt": round(1000 * statistics.median(compaction), 1),
        "compaction_over_prefill": round(statistics.median(compaction) / (prefill["stock"] / args.batch), 4),
    }
    print(json.dumps(report, indent=2))


def fit(args: argparse.Namespace) -> None:
    report = {}
    for variant in ("stock", "compressed"):
        connection = start(variant, args)
        report[variant] = ask(connection, "fit", args.prompt, args.requests, args.output)[0]
        connection.send(None)
    print(json.dumps(report, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["steps", "fit"])
    parser.add_argument("--model", default=None, help="checkpoint folder; default SmolLM2-135M")
    parser.add_argument("--method", default="snapkv")
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=1200)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--output", type=int, default=32)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{os.cpu_count() - 1}")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    mp.set_start_method("spawn")
    {"steps": steps, "fit": fit}[args.command](args)


if __name__ == "__main__":
    main()
