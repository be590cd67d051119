"""Runs the tests of `interpreted/`, which need Triton's interpreter, in a process of their own.

Triton reads `TRITON_INTERPRET` when it is first imported, and the rest of the suite must not run interpreted.
"""

from pathlib import Path

import pytest

pytest.importorskip("triton")

from interpreter import outcomes  # noqa: E402

FOLDER = Path(__file__).parent / "interpreted"
NAMES = sorted(path.stem for path in FOLDER.glob("test_*.py"))
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def passed(request):
    # One thread: the tensors are tiny, and the interpreter is the work.
    return outcomes(request, FOLDER, OMP_NUM_THREADS="1")


@pytest.mark.parametrize("name", NAMES)
def test_under_the_interpreter(passed, name):
    passed(name)
