"""Write docs/coverage.md: every acceptance line, and the tests that name it.

    python scripts/coverage_table.py            # write the page
    python scripts/coverage_table.py --check    # exit 1 if the page is not up to date

A test names a line by its id, anywhere from its decorators (or the comment above it) to its end: `S0-17` in text or
`s0_17` in its name. A class docstring counts for the whole class, a module docstring for the whole file.
`S0-04…S0-08` is a range.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINES = ROOT / "scripts" / "coverage_lines.tsv"
PAGE = ROOT / "docs" / "coverage.md"
SHOWN = 4
ID = re.compile(r"(?<![A-Za-z0-9])(S[0-4]|R|T)-(\d{2})(?!\d)(?:\s*(?:…|–)\s*\1-(\d{2})(?!\d))?")
NAME_ID = re.compile(r"(?<![a-z0-9])(s[0-4](?=_)|r|t)_?(\d{2})(?![0-9])")

HEAD = """# Coverage

burnish unites what five earlier systems promised. Each of their acceptance lines is a row here, with the tests that
hold it; "not yet" means that no test names the line, whether or not something of it exists, and "still open" says what
the named tests leave out. The reliability checks (R) and the traps found in TRL 1.16 (T) follow in the same form.

This page is written by `scripts/coverage_table.py` from the tests themselves.
"""

SECTIONS = [
    ("S0", "Dynamic-β preference optimisation (S0)"),
    ("S1", "Recipes for DPO, IPO, KTO and ORPO with adapters (S1)"),
    ("S2", "From SFT over a reward model to evaluation (S2)"),
    ("S3", "PPO, GRPO, verifiers and environments (S3)"),
    ("S4", "Reward models, GRPO, quantisation and run management (S4)"),
    ("R", "Reliability checks (R)"),
    ("T", "Traps of the peer (T)"),
]


def read_lines() -> dict[str, tuple[str, str]]:
    """id → (what it asks, what of it is still open although a test names it)."""
    rows = (line.split("\t") for line in LINES.read_text(encoding="utf-8").splitlines() if line.strip())
    return {row[0]: (row[1], row[2] if len(row) > 2 else "") for row in rows}


def find_ids(text: str) -> set[str]:
    """All line ids in a text."""
    found = set()
    for match in ID.finditer(text):
        first, last = int(match[2]), int(match[3] or match[2])
        found |= {f"{match[1]}-{n:02d}" for n in range(first, last + 1)}
    return found


def find_name_ids(name: str) -> set[str]:
    """All line ids in the name of a test: `test_s0_17_counts`."""
    return {f"{m[1].upper()}-{m[2]}" for m in NAME_ID.finditer(name)}


def _source_of(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    while start > 0 and lines[start - 1].lstrip().startswith("#"):
        start -= 1
    return "\n".join(lines[start : node.end_lineno])


def find_tests(path: Path, name: str) -> Iterator[tuple[str, set[str]]]:
    """(pytest's name of a test, ids that it names) for each test of a file."""
    text = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    everywhere = find_ids(ast.get_docstring(tree) or "")

    def walk(body: list[ast.stmt], prefix: str, inherited: set[str]) -> Iterator[tuple[str, set[str]]]:
        for node in body:
            if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                own = find_ids(ast.get_docstring(node) or "")
                yield from walk(node.body, f"{prefix}::{node.name}", inherited | own)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
                yield f"{prefix}::{node.name}", inherited | find_name_ids(node.name) | find_ids(_source_of(node, lines))

    own = list(walk(tree.body, name, set()))
    yield from own
    if own and everywhere:
        yield name, everywhere


def collect() -> dict[str, list[str]]:
    """id → names of the tests that hold it."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if path.name == "test_docs.py":  # it names lines to test this script
            continue
        for test, ids in find_tests(path, path.relative_to(ROOT).as_posix()):
            for line in ids:
                found[line].append(test)
    return found


def build_cell(tests: list[str], still_open: str) -> str:
    """What stands in the test column."""
    if not tests:
        return "not yet"
    cell = ", ".join(f"`{t.removeprefix('tests/')}`" for t in tests[:SHOWN])
    more = f" and {len(tests) - SHOWN} more" if len(tests) > SHOWN else ""
    return cell + more + (f"; still open: {still_open}" if still_open else "")


def build_page() -> str:
    """The whole page."""
    lines, tests = read_lines(), collect()
    totals, sections = [], []
    for prefix, title in SECTIONS:
        own = [line for line in lines if line.split("-")[0] == prefix]
        named = [line for line in own if tests.get(line)]
        part = sum(bool(lines[line][1]) for line in named)
        totals.append(f"| {title} | {len(own)} | {len(named) - part} | {part} | {len(own) - len(named)} |")
        rows = [f"\n## {title}\n", "| line | what it asks | test |", "|---|---|---|"]
        for line in own:
            what, still_open = lines[line]
            rows.append(f"| {line} | {what} | {build_cell(tests.get(line, []), still_open)} |")
        sections.append("\n".join(rows) + "\n")
    head = "\n| lines | in all | named by a test | in part | not yet |\n|---|---|---|---|---|\n"
    note = "\n\nTest names are relative to `tests/`.\n"
    return "".join([HEAD, head, "\n".join(totals), note, *sections])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is not up to date")
    page = build_page()
    if parser.parse_args().check:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page)
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
