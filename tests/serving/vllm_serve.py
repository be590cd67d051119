"""A real `vllm serve` for tests."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

START_S, STOP_S = 300, 60


class Server:
    """A running `vllm serve`."""

    def __init__(self, process: subprocess.Popen, log: Path, port: int, model: str) -> None:
        self.process, self.log, self.model = process, log, model
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, api_key: str | None = None) -> str:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        with urllib.request.urlopen(
            urllib.request.Request(self.url + path, headers=headers), timeout=10
        ) as answer:
            return answer.read().decode()

    def metrics(self, label: str = "") -> dict[str, float]:
        """Prometheus gauges and counters by name, all read at the same moment, summed over their labels, or
        of one label alone, as it is written there."""
        values: dict[str, float] = defaultdict(float)
        for line in self.get("/metrics").splitlines():
            if not line.startswith("#") and label in line:
                name, value = line.rsplit(" ", 1)
                values[name.partition("{")[0]] += float(value)
        return values

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                pytest.fail(f"vllm serve exited with {self.process.returncode}:\n{self.log_tail()}")
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                self.get("/health")
                return
            time.sleep(0.5)
        pytest.fail(f"vllm serve was not ready after {START_S} s:\n{self.log_tail()}")

    def stop(self) -> None:
        """Stop as an operator does; what is left after that is killed, and is a failure."""
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"vllm serve was still running {STOP_S} s after SIGTERM:\n{self.log_tail()}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def log_tail(self, num_lines: int = 80) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-num_lines:])


def command_environment() -> dict[str, str]:
    """Environment in which the `vllm` command runs as a user runs it."""
    environment = dict(os.environ)
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # the other tests' white-box mode
    # The worker shares its cores with the engine, the front end and the test: threads that spin stall them.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return environment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(command: list[str], port: int, model: str, log: Path, **options: Any) -> Iterator[Server]:
    """A command that serves `model` on a local port, ready, and stopped at the end; `options` of `Popen`."""
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
    server = Server(process, log, port, model)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def serve(model: Path, *flags: str, folder: Path) -> Iterator[Server]:
    """`vllm serve MODEL FLAGS` on a free local port, stopped at the end; its log goes to `folder`."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    log = folder / "vllm-serve.log"
    with running(command, port, str(model), log, env=command_environment()) as server:
        yield server
