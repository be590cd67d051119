"""Runs the tests of `runner_v2/`, which need Triton's interpreter, in a process of their own."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

from interpreter import outcomes  # noqa: E402

FOLDER = Path(__file__).parent / "runner_v2"
NAMES = sorted(path.stem for path in FOLDER.glob("test_*.py"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def passed(request):
    return outcomes(request, FOLDER)


@pytest.mark.parametrize("name", NAMES)
def test_under_the_interpreter(passed, name):
    passed(name)
