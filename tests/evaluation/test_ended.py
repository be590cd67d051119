"""A command that is ended leaves nothing behind: real signals to a `bench` whose servers are stand-ins."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_kvcompress.evaluation.host import engine_environment

# A server with a child, as vLLM's has its engine; neither ever gets ready. The child does not mind SIGTERM,
# nor does the server on demand.
STAND_IN = """
import os, signal, subprocess, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN if os.environ["STUBBORN"] == "1" else signal.SIG_DFL)
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(300)"],
    stdout=subprocess.PIPE)
child.stdout.readline()
name = Path(os.environ["PIDS"]) / str(os.getpid())
name.with_suffix(".new").write_text(f"{os.getpid()} {child.pid}")
name.with_suffix(".new").rename(name)
time.sleep(300)
"""
COMMAND = """
import sys
from vllm_kvcompress import cli
from vllm_kvcompress.evaluation.speed import served
served.SERVER, served.STOP_SECONDS = [sys.executable, sys.argv.pop(1)], 1
sys.exit(cli.main(sys.argv[1:]))
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("signals", "stubborn"),
    [
        ([signal.SIGTERM], False),
        ([signal.SIGINT], False),
        ([signal.SIGHUP], True),
        ([signal.SIGINT, signal.SIGINT, signal.SIGTERM], True),
    ],
    ids=["terminated", "interrupted", "hung up, stubborn", "signalled again and again, stubborn"],
)
def test_an_ended_bench_leaves_no_server(smollm2, tmp_path, signals, stubborn):
    pids = tmp_path / "pids"
    pids.mkdir()
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    environment = engine_environment() | {"PIDS": str(pids), "STUBBORN": str(int(stubborn))}
    command = [sys.executable, "-c", COMMAND, str(tmp_path / "stand_in.py"), "bench", str(smollm2)]
    command += ["--parts", "serve", "--prompt", "256", "--output", str(tmp_path / "results")]
    bench = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    started: list[int] = []
    try:
        deadline = time.monotonic() + 120
        while len(files := [path for path in pids.iterdir() if not path.suffix]) < 2:
            assert bench.poll() is None and time.monotonic() < deadline, "the stand-ins were not started"
            time.sleep(0.05)
        started = [int(pid) for path in files for pid in path.read_text().split()]
        assert len(started) == 4 and all(map(alive, started))
        for number in signals:
            bench.send_signal(number)
            time.sleep(0.2)
        errors = bench.communicate(timeout=60)[1]
        left = [pid for pid in started if alive(pid)]
    finally:
        bench.kill()
        for pid in filter(alive, started):
            os.kill(pid, signal.SIGKILL)
    assert not left
    assert bench.returncode in {128 + number for number in signals}
    assert "Traceback" not in errors
    if signals == [signal.SIGINT]:
        assert errors.splitlines()[-1] == "error: interrupted"
