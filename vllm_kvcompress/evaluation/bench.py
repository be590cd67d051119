"""The `vllm-kvcompress bench` command: memory and speed, stock vLLM against compressed, alternating.

Two parts. Engines stepped by hand, one process each, give decode step times against context length and the
time spent in compaction. Servers with pools of one size, loaded by vLLM's own benchmark client, give what
users see: how many requests run at once, throughput, time to first token, inter-token latency, preemptions;
once under memory pressure and once with short prompts in a roomy pool, where compression does not pay.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.evaluation.host import checkpoint, engine_dtype

START_SECONDS = 300
FITTING = 4  # requests that the pool holds without compression
PAYS = 1.05  # a throughput ratio below it is not worth a lossy cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench`."""
    parser.add_argument("model", nargs="?", help="checkpoint folder; SmolLM2-135M-Instruct when not given")
    parser.add_argument("--compression", default="snapkv:budget=0.25", help="as for --kv-compression")
    parser.add_argument("--contexts", default="1024,2048,4096", help="context lengths of the decode steps")
    parser.add_argument("--batch", type=int, default=4, help="requests that decode together")
    parser.add_argument("--rounds", type=int, default=5, help="alternations per context length")
    parser.add_argument("--steps", type=int, default=6, help="decode steps of a round")
    parser.add_argument("--prompt", type=int, default=1500, help="prompt tokens under memory pressure")
    parser.add_argument("--short", type=int, default=128, help="prompt tokens where the pool is never full")
    parser.add_argument("--output-tokens", type=int, default=48, help="answer tokens of the served requests")
    parser.add_argument("--requests", type=int, default=12, help="requests sent at once")
    parser.add_argument("--server-rounds", type=int, default=2, help="alternations of the served load")
    parser.add_argument("--parts", default="steps,serve", help="of steps, serve")
    parser.add_argument("--block-size", type=int, default=32, help="tokens per KV block")
    parser.add_argument("--output", type=Path, help="folder of the results")


def run(arguments: argparse.Namespace) -> None:
    """Measure, write results and pictures, print the tables."""
    KVCompressionConfig.parse(arguments.compression)
    parts = {"steps": measure_steps, "serve": measure_serving}
    chosen = [part for part in arguments.parts.split(",") if part]
    if not chosen or set(chosen) - set(parts):
        raise KVCompressionError(f"--parts takes {', '.join(parts)}, got {arguments.parts!r}")
    arguments.model = checkpoint(arguments.model)
    begin = time.perf_counter()
    result = {"settings": {k: v for k, v in vars(arguments).items() if k not in ("run", "output")}}
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


# ---------------------------------------------------------------- decode steps


class SteppedEngine:
    """An in-process engine; runs in a process of its own."""

    def __init__(self, variant: str, arguments: argparse.Namespace) -> None:
        import torch
        from vllm import LLM

        torch.compiler.set_stance("force_eager")  # or vLLM compiles a sampler for every new batch size
        self.variant = variant
        longest = max(_contexts(arguments))
        config = KVCompressionConfig.parse(arguments.compression)
        self.llm = LLM(
            arguments.model,
            dtype=engine_dtype(),
            enforce_eager=True,
            max_model_len=longest + 1024,
            block_size=arguments.block_size,
            num_gpu_blocks_override=2 * arguments.batch * (longest + 1024) // arguments.block_size,
            max_num_seqs=max(16, arguments.batch),
            seed=0,
            disable_log_stats=True,
            **({} if variant == "stock" else config.engine_kwargs()),
        )
        self.engine = self.llm.llm_engine
        core = self.engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.compactions: list[float] = []
        if variant != "stock":
            self._time_compactions(core.model_executor.driver_worker.worker.compactor)

    def _time_compactions(self, compactor) -> None:
        run = compactor.run

        def timed(*arguments):
            begin = time.perf_counter()
            result = run(*arguments)
            self.compactions.append(time.perf_counter() - begin)
            return result

        compactor.run = timed

    def prefill(self, context: int, batch: int) -> dict[str, Any]:
        """Bring `batch` requests to decoding; each prompt goes on where that of a shorter context ended."""
        from vllm import SamplingParams

        self.compactions.clear()
        # With the engine configured, but the request left as it is.
        extra = {"kv_compression": "off"} if self.variant == "idle" else None
        params = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True, extra_args=extra)
        self.names = [f"{context}-{index}" for index in range(batch)]
        for index, name in enumerate(self.names):
            prompt = [(index * 7919 + position * 104729) % 40000 + 100 for position in range(context)]
            self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        begin = time.perf_counter()
        while len(self.scheduler.running) < batch or any(
            request.num_output_tokens < 3 for request in self.scheduler.running
        ):
            self.engine.step()
        return {"seconds": time.perf_counter() - begin, "compactions": list(self.compactions)}

    def steps(self, count: int) -> float:
        """Median seconds of a decode step."""
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            self.engine.step()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def end(self) -> None:
        """Abort the requests."""
        self.engine.abort_request(self.names)
        while self.engine.has_unfinished_requests():
            self.engine.step()


def _serve_engine(connection, variant: str, arguments: argparse.Namespace) -> None:
    engine = SteppedEngine(variant, arguments)
    connection.send("ready")
    while (call := connection.recv()) is not None:
        name, *given = call
        connection.send(getattr(engine, name)(*given))


@contextlib.contextmanager
def _engines(variants: Sequence[str], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    for variant in variants:
        connections[variant], theirs = context.Pipe()
        process = context.Process(target=_serve_engine, args=(theirs, variant, arguments), daemon=True)
        process.start()
        processes.append(process)
        theirs.close()
        _receive(connections[variant], variant)
    try:
        yield connections
    finally:
        for connection in connections.values():
            with contextlib.suppress(OSError):
                connection.send(None)
        for process in processes:
            process.join(30)
            process.kill()


def _receive(connection, variant: str) -> Any:
    try:
        return connection.recv()
    except EOFError:
        raise KVCompressionError(f"the {variant} engine ended; its error is above") from None


def measure_steps(arguments: argparse.Namespace) -> dict[str, Any]:
    """Decode step time of stock, idle and compressed at each context length, alternating."""
    from tqdm import tqdm

    variants = ("stock", "idle", "compressed")
    contexts = _contexts(arguments)
    rows = []
    with (
        _engines(variants, arguments) as engines,
        tqdm(total=len(contexts) * (len(variants) + arguments.rounds), desc="decode steps") as bar,
    ):

        def ask(variant: str, *call: Any) -> Any:
            engines[variant].send(call)
            return _receive(engines[variant], variant)

        computed = 0  # tokens of each prompt that are in the prefix cache already
        for context in contexts:
            prefill = {}
            for variant in variants:
                prefill[variant] = ask(variant, "prefill", context, arguments.batch)
                bar.update()
            times: dict[str, list[float]] = {variant: [] for variant in variants}
            for _ in range(arguments.rounds):
                for variant in variants:
                    time.sleep(0.3)  # let the other's OpenMP threads stop spinning
                    times[variant].append(ask(variant, "steps", arguments.steps))
                bar.update()
            for variant in variants:
                ask(variant, "end")
            seconds = prefill["stock"]["seconds"] * context / (context - computed) / arguments.batch
            compaction = statistics.median(prefill["compressed"]["compactions"])
            rows.append(
                {
                    "context": context,
                    "step_seconds": {variant: statistics.median(t) for variant, t in times.items()},
                    "over_stock": {v: _ratios(t, times["stock"]) for v, t in times.items() if v != "stock"},
                    "prefill_seconds": seconds,
                    "compaction_seconds": compaction,
                }
            )
            computed = context // arguments.block_size * arguments.block_size
    return {"batch": arguments.batch, "rows": rows}


def _ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Lowest, median and highest ratio of paired measurements."""
    ratios = sorted(a / b for a, b in zip(values, base, strict=True))
    return [ratios[0], statistics.median(ratios), ratios[-1]]


def _contexts(arguments: argparse.Namespace) -> list[int]:
    try:
        return sorted(int(part) for part in arguments.contexts.split(","))
    except ValueError:
        raise KVCompressionError(f"--contexts {arguments.contexts!r} is not a list of numbers") from None


# ---------------------------------------------------------------- served load

# From the client's report: a name, and whether more is better.
SERVED = {
    "request_throughput": "requests/s",
    "output_throughput": "output tokens/s",
    "median_ttft_ms": "median time to first token",
    "median_itl_ms": "median inter-token latency",
    "p99_itl_ms": "99th percentile inter-token latency",
}


class Server:
    """A `vllm serve` with a pool of a given size."""

    def __init__(self, variant: str, arguments: argparse.Namespace, blocks: int, folder: Path) -> None:
        self.blocks = blocks
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", arguments.model]
        command += ["--port", str(self.port), "--dtype", engine_dtype(), "--enforce-eager", "--seed", "0"]
        command += ["--block-size", str(arguments.block_size), "--num-gpu-blocks-override", str(blocks)]
        longest = max(arguments.prompt, arguments.short) + arguments.output_tokens
        command += ["--max-model-len", str(min(longest + 512, (blocks - 1) * arguments.block_size))]
        command += ["--max-num-seqs", "64", "--no-enable-prefix-caching"]
        if variant != "stock":
            config = KVCompressionConfig.parse(arguments.compression).engine_kwargs()["additional_config"]
            command += ["--additional-config", json.dumps(config)]
        self.log = folder / f"{variant}.log"
        environment = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "OMP_WAIT_POLICY": "PASSIVE",  # the front end shares the engine's cores
            "TORCHDYNAMO_DISABLE": "1",  # or vLLM compiles a sampler for every new batch size
        }
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                last = self.log.read_text().strip().splitlines()[-15:]
                raise KVCompressionError("\n".join([*last, f"the {variant} server did not start"]))
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                self._get("/health")
                return
            time.sleep(0.5)

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return answer.read().decode()

    def metrics(self) -> dict[str, float]:
        """Prometheus values by name, summed over labels."""
        values: dict[str, float] = {}
        for line in self._get("/metrics").splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = name.partition("{")[0]
                values[name] = values.get(name, 0.0) + float(value)
        return values

    def load(self, arguments: argparse.Namespace, prompt: int, seed: int, folder: Path) -> dict[str, Any]:
        """Send all requests at once with vLLM's benchmark client; its report and what the server showed."""
        before = self.metrics()["vllm:num_preemptions_total"]
        peak = {"running": 0.0, "usage": 0.0}
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.25):
                with contextlib.suppress(OSError):
                    now = self.metrics()
                    peak["running"] = max(peak["running"], now["vllm:num_requests_running"])
                    peak["usage"] = max(peak["usage"], now["vllm:kv_cache_usage_perc"])

        watcher = threading.Thread(target=watch)
        watcher.start()
        report = folder / "client.json"
        command = [sys.executable, "-c", _CLIENT, "--backend", "openai", "--port", str(self.port)]
        command += ["--model", arguments.model, "--dataset-name", "random", "--ignore-eos"]
        command += ["--random-input-len", str(prompt), "--random-output-len", str(arguments.output_tokens)]
        command += ["--num-prompts", str(arguments.requests), "--seed", str(seed), "--disable-tqdm"]
        command += ["--temperature", "0", "--percentile-metrics", "ttft,itl", "--save-result"]
        command += ["--result-dir", str(folder), "--result-filename", report.name]
        try:
            ran = subprocess.run(command, capture_output=True, text=True)
        finally:
            done.set()
            watcher.join()
        if ran.returncode or not report.exists():
            raise KVCompressionError(f"{ran.stderr[-2000:]}\nvLLM's benchmark client failed")
        values = json.loads(report.read_text())
        report.unlink()
        if values["completed"] != arguments.requests:
            raise KVCompressionError(f"{values['completed']} of {arguments.requests} requests were answered")
        return {
            **{name: values[name] for name in SERVED},
            "at_once": peak["running"],
            "peak_blocks": round(peak["usage"] * (self.blocks - 1)),
            "preemptions": self.metrics()["vllm:num_preemptions_total"] - before,
        }

    def stop(self) -> None:
        """End the server and all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


_CLIENT = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def measure_serving(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same load on a stock and a compressed server, alternating."""
    from tqdm import tqdm

    per_request = -(-(arguments.prompt + arguments.output_tokens) // arguments.block_size)
    blocks = FITTING * per_request + 1  # one is vLLM's null block
    regimes = {"pressure": arguments.prompt, "short": arguments.short}
    runs: dict[str, dict[str, list]] = {name: {"stock": [], "compressed": []} for name in regimes}
    with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as stack:
        folder = Path(work)
        servers = {}
        for variant in ("stock", "compressed"):
            servers[variant] = Server(variant, arguments, blocks, folder)
            stack.callback(servers[variant].stop)
        with tqdm(total=len(regimes) * arguments.server_rounds * 2, desc="served load") as bar:
            for name, prompt in regimes.items():
                for number in range(arguments.server_rounds):
                    for variant, server in servers.items():
                        runs[name][variant].append(server.load(arguments, prompt, number, folder))
                        bar.update()
    return {
        "pool_blocks": blocks - 1,
        "fitting": FITTING,
        "regimes": {
            name: {"prompt": regimes[name], "runs": both, "over_stock": _served_ratios(both)}
            for name, both in runs.items()
        },
    }


def _served_ratios(runs: dict[str, list]) -> dict[str, list[float]]:
    return {
        name: _ratios([r[name] for r in runs["compressed"]], [r[name] for r in runs["stock"]])
        for name in SERVED
    }


# ---------------------------------------------------------------- tables


def table(result: dict[str, Any]) -> str:
    """Ratios first, then what they are made of, in Markdown."""
    settings = result["settings"]
    lines = [f"Model {Path(settings['model']).name}, {settings['compression']} against stock vLLM.", ""]
    if "serve" in result:
        lines += _serving_table(result["serve"], settings)
    if "steps" in result:
        lines += _steps_table(result["steps"])
    return "\n".join(lines) + "\n"


def _serving_table(serve: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    lines = []
    for name, regime in serve["regimes"].items():
        title = "Under memory pressure" if name == "pressure" else "Where the pool is never full"
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
            low, middle, high = _ratios([r[key] for r in ours], [r[key] for r in stock])
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
    where = "under memory pressure" if regime == "pressure" else "with short prompts in a roomy pool"
    if throughput >= PAYS:
        return f"Compression pays {where}: {throughput:.2f} times the output tokens per second."
    return f"Compression does not pay {where}: {throughput:.2f} times the output tokens per second."


def _steps_table(steps: dict[str, Any]) -> list[str]:
    lines = [
        f"Decode steps of {steps['batch']} requests: median time over stock's [lowest, highest round].",
        "",
        "| context | idle plugin | compressed | stock step | prefill | compaction | over prefill |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in steps["rows"]:
        ratios = " | ".join(
            f"{m:.2f} [{low:.2f}, {high:.2f}]"
            for low, m, high in (row["over_stock"][v] for v in ("idle", "compressed"))
        )
        lines.append(
            f"| {row['context']} | {ratios} | {1000 * row['step_seconds']['stock']:.0f} ms | "
            f"{row['prefill_seconds']:.1f} s | {1000 * row['compaction_seconds']:.0f} ms | "
            f"{100 * row['compaction_seconds'] / row['prefill_seconds']:.1f} % |"
        )
    slower = [row["context"] for row in steps["rows"] if row["over_stock"]["compressed"][1] > 1]
    if slower:
        lines += ["", f"Compression does not pay in decode time at contexts up to {max(slower)} tokens."]
    return lines


def _draw(result: dict[str, Any], folder: Path) -> None:
    from vllm_kvcompress.evaluation import pictures

    settings = result["settings"]
    title = f"{Path(settings['model']).name}, {settings['compression']}"
    if "steps" in result:
        rows = result["steps"]["rows"]
        over = {v: [row["over_stock"][v] for row in rows] for v in ("idle", "compressed")}
        pictures.decode_time(
            [row["context"] for row in rows],
            {v: [r[1] for r in ratios] for v, ratios in over.items()},
            {v: [(r[0], r[2]) for r in ratios] for v, ratios in over.items()},
            folder / "decode_time.png",
            title,
        )
