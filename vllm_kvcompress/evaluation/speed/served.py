"""Load on real servers with pools of the same size, through vLLM's own benchmark client."""

import argparse
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.evaluation.host import context_limit, engine_dtype
from vllm_kvcompress.evaluation.speed.stepped import ratios

SERVER = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
START_SECONDS, STOP_SECONDS = 300, 20
BEHIND = 512  # tokens of a server's context behind the longest request, where the model has them
FITTING = 4  # requests that the pool holds without compression

# What is shown of the client's report.
SERVED = {
    "request_throughput": "requests/s",
    "output_throughput": "output tokens/s",
    "median_ttft_ms": "median time to first token",
    "median_itl_ms": "median inter-token latency",
    "p99_itl_ms": "99th percentile inter-token latency",
}


class Server:
    """A `vllm serve` with a pool of a given size; starting when made, in use once `wait` has returned."""

    def __init__(
        self,
        variant: str,
        config: KVCompressionConfig | None,
        arguments: argparse.Namespace,
        blocks: int,
        folder: Path,
        prefix_caching: bool = False,
    ) -> None:
        self.variant, self.model, self.blocks = variant, arguments.model, blocks
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [*SERVER, "--model", arguments.model]
        command += ["--port", str(self.port), "--dtype", engine_dtype(), "--enforce-eager", "--seed", "0"]
        command += ["--block-size", str(arguments.block_size), "--num-gpu-blocks-override", str(blocks)]
        longest = max(arguments.prompt, arguments.short) + arguments.output_tokens
        longest = min(longest + BEHIND, context_limit(arguments.model), (blocks - 1) * arguments.block_size)
        command += ["--max-model-len", str(longest)]
        command += ["--max-num-seqs", "64", "--enable-prompt-tokens-details"]
        command += [] if prefix_caching else ["--no-enable-prefix-caching"]
        if config is not None:
            command += ["--additional-config", json.dumps(config.engine_kwargs()["additional_config"])]
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

    def wait(self) -> None:
        """Until the server has answered a first request.

        Raises:
            KVCompressionError: it did not start.
        """
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                reasons = first_errors(self.log.read_text()) or ["no reason given"]
                raise KVCompressionError(f"the {self.variant} server did not start: {'; '.join(reasons)}")
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                self._ask("/health", timeout=10)
                break
            time.sleep(0.5)
        self._ask(
            "/v1/completions", {"model": self.model, "prompt": [100] * 64, "max_tokens": 4}, timeout=100
        )

    def _ask(self, path: str, body: dict | None = None, *, timeout: float) -> str:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body).encode() if body else None,
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.read().decode()

    def metrics(self) -> dict[str, float]:
        """Prometheus values by name, summed over labels."""
        values: dict[str, float] = {}
        for line in self._ask("/metrics", timeout=10).splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = name.partition("{")[0]
                values[name] = values.get(name, 0.0) + float(value)
        return values

    def load(self, num_requests: int, given: list[str]) -> dict[str, Any]:
        """Send requests with vLLM's benchmark client, as its options say; its report and what the server
        showed."""
        before = self.metrics()
        given = ["--backend", "openai", "--port", str(self.port), "--model", self.model, *given]
        given += ["--ignore-eos", "--temperature", "0", "--percentile-metrics", "ttft,itl"]
        given += ["--num-prompts", str(num_requests), "--ready-check-timeout-sec", "0", "--disable-tqdm"]
        with self.watched() as peak:
            values = _benchmark_client(given)
        if values["completed"] != num_requests:
            raise KVCompressionError(f"{values['completed']} of {num_requests} requests were answered")
        after = self.metrics()
        counted = {
            shown: after.get(name, 0.0) - before.get(name, 0.0)
            for shown, name in {
                "preemptions": "vllm:num_preemptions_total",
                "compacted": "vllm:kv_compression_compacted_requests_total",
            }.items()
        }
        return {
            **values,
            **counted,
            "at_once": peak["running"],
            "peak_blocks": round(peak["usage"] * (self.blocks - 1)),
        }

    @contextlib.contextmanager
    def watched(self) -> Iterator[dict[str, float]]:
        """Meanwhile: the most requests that run, the largest part of the pool in use, and preemptions."""
        peak, name = {"running": 0.0, "usage": 0.0}, "vllm:num_preemptions_total"
        before = self.metrics()[name]
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.25):
                with contextlib.suppress(OSError):
                    now = self.metrics()
                    peak["running"] = max(peak["running"], now["vllm:num_requests_running"])
                    peak["usage"] = max(peak["usage"], now["vllm:kv_cache_usage_perc"])

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield peak
        finally:
            done.set()
            watcher.join()
            peak["preemptions"] = self.metrics()[name] - before

    def stop(self) -> None:
        """End the server and all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def running(
    variants: dict[str, KVCompressionConfig | None],
    arguments: argparse.Namespace,
    blocks: int,
    prefix_caching: bool = False,
) -> Iterator[dict[str, Server]]:
    """Servers with pools of one size, by name, ready to answer; ended whatever happens."""
    with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as stack:
        servers: dict[str, Server] = {}
        stack.callback(_stop_all, servers)
        for name, config in variants.items():
            servers[name] = Server(name, config, arguments, blocks, Path(work), prefix_caching)
        for server in servers.values():
            server.wait()
        yield servers


def pool_blocks(arguments: argparse.Namespace) -> int:
    """Blocks in which `FITTING` of the longest requests fit uncompressed, and vLLM's null block."""
    return FITTING * -(-(arguments.prompt + arguments.output_tokens) // arguments.block_size) + 1


def _stop_all(servers: dict[str, Server]) -> None:
    # Whoever is impatient and signals again waits: a server left behind would hold its memory for good.
    waiting = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        for server in servers.values():
            server.stop()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, waiting)


def first_errors(log: str) -> list[str]:
    """The exceptions named in a server's log, each once, in order: the cause before its effects."""
    named = re.findall(r"\b(\w+(?:Error|Exception)(?:: .+)?)$", log, re.MULTILINE)
    return list(dict.fromkeys(named))[:3]


def _benchmark_client(given: list[str]) -> dict[str, Any]:
    """Run `vllm bench serve` here, without its printing."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    with contextlib.redirect_stdout(io.StringIO()):
        return main(parser.parse_args(given))


def measure_serving(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same load on a stock and a compressed server, alternating."""
    from tqdm import tqdm

    blocks = pool_blocks(arguments)
    variants = {"stock": None, "compressed": KVCompressionConfig.parse(arguments.compression)}
    regimes = {"pressure": arguments.prompt, "short": arguments.short}
    runs: dict[str, dict[str, list]] = {name: {"stock": [], "compressed": []} for name in regimes}
    shown = (*SERVED, "at_once", "peak_blocks", "preemptions")
    with running(variants, arguments, blocks) as servers:
        with tqdm(total=len(regimes) * arguments.server_rounds * 2, desc="served load") as bar:
            for name, prompt in regimes.items():
                for number in range(arguments.server_rounds):
                    given = ["--dataset-name", "random", "--seed", str(number)]
                    given += ["--random-input-len", str(prompt)]
                    given += ["--random-output-len", str(arguments.output_tokens)]
                    for variant, server in servers.items():
                        values = server.load(arguments.requests, given)
                        runs[name][variant].append({key: values[key] for key in shown})
                        bar.update()
    return {
        "pool_blocks": blocks - 1,
        "fitting": FITTING,
        "regimes": {
            name: {"prompt": regimes[name], "runs": both, "over_stock": served_ratios(both)}
            for name, both in runs.items()
        },
    }


def served_ratios(runs: dict[str, list]) -> dict[str, list[float]]:
    return {
        name: ratios([r[name] for r in runs["compressed"]], [r[name] for r in runs["stock"]])
        for name in SERVED
    }
