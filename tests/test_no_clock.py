"""No test depends on how fast the machine is: a guard over the tests' own sources and the programs in their strings."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
# Where a clock may be read, and why.
ALLOWED = {
    "waiting.py": "the one place that sleeps and bounds",
    "test_no_clock.py": "examples",
    "reliability/test_files_disk.py": "R-36: replaces time.time by one that leaps",
    "track/test_progress.py": "R-36: replaces time.time by one that leaps",
    "track/test_log.py": "R-36: the words it looks for in the package",
}
CLOCK = re.compile(
    r"\b(sleep|monotonic|monotonic_ns|perf_counter|perf_counter_ns|process_time|time\.time|time_ns|mono)\b(?=\(|,|$)"
    r"|threading\.Timer|\bimport time\b"
)
SHORT = 600.0  # seconds: a bound below it may be reached on a slow machine


def find_clocks(source: str) -> list[str]:
    """What reads a clock, sleeps or bounds a wait too tightly: imports, calls, arguments, and code in strings."""
    tree = ast.parse(source)
    documents = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name == "time" for alias in node.names):
            found.append("import time")
        elif isinstance(node, ast.ImportFrom) and node.module in ("time", "burnish.clock"):
            found += [alias.name for alias in node.names if node.module == "time" or alias.name == "mono"]
        elif isinstance(node, ast.Call) and CLOCK.search(f"{ast.unparse(node.func)}("):
            found.append(ast.unparse(node.func))
        elif isinstance(node, ast.keyword) and node.arg in ("timeout", "kill_after", "signal_after", "delay"):
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, int | float):
                found += [f"{node.arg}={node.value.value}"] if node.value.value < SHORT else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            found += [match[0] for match in CLOCK.finditer(node.value) if len(node.value) > 20]
    return found


def test_nothing_sleeps_or_is_judged_by_its_time():
    found = {p.relative_to(TESTS).as_posix(): find_clocks(p.read_text(encoding="utf-8")) for p in TESTS.rglob("*.py")}
    assert len(found) > 150
    wrong = {path: clocks for path, clocks in found.items() if clocks and path not in ALLOWED}
    assert not wrong, "wait for an event (tests/waiting.py) instead"
    assert not [path for path in ALLOWED if not found[path]], "needs no leave any more"


@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "from time import sleep",
        "from burnish.clock import mono",
        "import t\nt.sleep(1)",
        "x = t.perf_counter()",
        "server.run(c, kill_after=3.0)",
        "child.communicate(timeout=10)",
        "threading.Timer(3, f)",
        "CODE = 'import sys, os\\ntime.sleep(60)\\n'",
    ],
)
def test_each_way_to_depend_on_time_is_found(source: str):
    assert find_clocks(source)


def test_what_is_no_clock():
    for source in (
        "from burnish.clock import wall, show_seconds",
        "'''time.sleep(3) in a document'''",
        "wait(timeout=BOUND)",
    ):
        assert find_clocks(source) == []
