"""Tests that the README names are there."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NAMED = sorted({*re.findall(r"`(?:tests/)?([\w/]*test_\w+\.py)`", (TESTS.parent / "README.md").read_text())})


@pytest.mark.parametrize("name", NAMED)
def test_a_named_test_is_there(name):
    assert (TESTS / name).is_file() or (TESTS / "engine" / name).is_file()


def test_every_mark_of_the_matrix_has_its_tests():
    lines = (TESTS.parent / "README.md").read_text().splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("| | full attention | windows"))
    last = next(index for index, line in enumerate(lines[first:], first) if not line.startswith("|"))
    key = " ".join(lines[last : last + 8])
    marks = {mark for line in lines[first:last] for mark in re.findall("[¹²³⁴⁵⁶⁷⁸⁹⁰]+", line)}
    assert len(marks) > 10
    for mark in marks:
        assert re.search(rf"(?<![¹²³⁴⁵⁶⁷⁸⁹⁰]){mark} `[\w/]*test_\w+\.py`", key), mark
    cells = [cell for line in lines[first + 2 : last] for cell in line.strip("|").split("|")[1:]]
    assert all(re.search("[¹²³⁴⁵⁶⁷⁸⁹⁰]", cell) for cell in cells if "✔" in cell)
