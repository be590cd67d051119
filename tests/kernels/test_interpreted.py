"""Runs the tests of `interpreted/`, which need Triton's interpreter, in a process of their own.

Triton reads `TRITON_INTERPRET` when it is first imported, and the rest of the suite must not run interpreted.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "interpreted"
NAMES = sorted(path.stem for path in FOLDER.glob("test_*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_under_the_interpreter(name):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / f"{name}.py")]
    # One thread: the tensors are tiny, and the interpreter is the work.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and " skipped" not in run.stdout, run.stdout
