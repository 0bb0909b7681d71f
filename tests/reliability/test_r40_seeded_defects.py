"""R-40: the suite itself. Each seeded defect makes the tests fail that are named beside it in `defects.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.defects import DEFECTS, VARIABLE, build_table, find

ROOT = Path(__file__).resolve().parent.parent.parent


def run_with(name: str) -> tuple[int, str]:
    """(exit status, end of the output) of the tests of a defect in a child, with the defect put in."""
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-n0",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.reliability.defects",
    ]
    child = subprocess.run(
        [*words, *DEFECTS[name].tests], cwd=ROOT, env=os.environ | {VARIABLE: name}, capture_output=True, text=True
    )
    return child.returncode, (child.stdout + child.stderr)[-3000:]


def check_caught(name: str) -> None:
    status, text = run_with(name)
    assert status == 1 and "FAILED tests/" in text, f"{name} is not caught (pytest ended with {status}):\n{text}"


def test_r40_every_defect_still_fits_the_code():
    """A defect whose place has gone is noticed at once, not in the nightly run."""
    assert len(DEFECTS) >= 38
    for defect in DEFECTS.values():
        assert callable(defect.make(find(defect.where)[2])) and defect.tests
        for test in defect.tests:
            file, _, function = test.partition("::")
            assert f"def {function.partition('[')[0]}(" in (ROOT / file).read_text(), test


@pytest.mark.defect
@pytest.mark.parametrize("name", DEFECTS)
def test_r40_seeded_defects_are_caught(name):
    """R-40: the tests named beside a defect fail when it is put in (and pass without it, as the suite shows)."""
    check_caught(name)


def test_r40_the_page_lists_them():
    """docs/reliability.md holds the table as `python -m tests.reliability.defects` prints it."""
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert build_table() in page
