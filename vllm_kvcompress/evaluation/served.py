"""Load on real servers with pools of the same size, through vLLM's own benchmark client."""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.evaluation.host import engine_dtype
from vllm_kvcompress.evaluation.stepped import ratios

START_SECONDS = 300
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
            name: {"prompt": regimes[name], "runs": both, "over_stock": served_ratios(both)}
            for name, both in runs.items()
        },
    }


def served_ratios(runs: dict[str, list]) -> dict[str, list[float]]:
    return {
        name: ratios([r[name] for r in runs["compressed"]], [r[name] for r in runs["stock"]])
        for name in SERVED
    }
