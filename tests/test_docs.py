"""The documentation names only what exists: tests, pages, anchors, commands."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|home|Users|tmp)/\w")


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def find_links(text: str) -> Iterator[str]:
    yield from (match[1] for match in LINK.finditer(FENCE.sub("", text)))


def find_anchors(text: str) -> set[str]:
    toc = pytest.importorskip("markdown.extensions.toc")
    headings = re.findall(r"^#+\s+(.+?)\s*#*$", FENCE.sub("", text), re.MULTILINE)
    plain = (re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {toc.slugify(heading, "-") for heading in plain}


def find_defined_tests(path: Path) -> set[str]:
    """The names of a test file's tests, as pytest writes them behind the file's name."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            own = (n.name for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
            found |= {f"{node.name}::{name}" for name in own}
    return found


def test_every_test_named_in_the_coverage_page_exists():
    named = re.findall(r"`((?:\w+/)*test_\w+\.py)(?:::([\w:]+))?`", (DOCS / "coverage.md").read_text(encoding="utf-8"))
    missing = []
    for file, test in named:
        path = ROOT / "tests" / file
        if not path.exists() or (test and test not in find_defined_tests(path)):
            missing.append(f"{file}::{test}")
    assert not missing, f"run scripts/coverage_table.py; gone: {missing}"


def test_coverage_page_has_every_line():
    lines = [row.split("\t")[0] for row in (ROOT / "scripts" / "coverage_lines.tsv").read_text("utf-8").splitlines()]
    page = (DOCS / "coverage.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([SRT]\d?-\d\d) \|", page, re.MULTILINE)
    assert rows == lines
    sizes = Counter(line.split("-")[0] for line in lines)
    assert sizes == {"S0": 30, "S1": 18, "S2": 17, "S3": 23, "S4": 30, "R": 40, "T": 37}


def load_script(path: Path):
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ids_are_found_in_names_texts_and_ranges():
    module = load_script(ROOT / "scripts" / "coverage_table.py")
    find_ids, find_name_ids = module.find_ids, module.find_name_ids
    assert find_ids("S0-17 and R-03; GPT-20, XT-01, S0-178 are none") == {"S0-17", "R-03"}
    assert find_ids("T-04…T-06") == {"T-04", "T-05", "T-06"}
    assert find_name_ids("test_s0_17_counts_of_r_06") == {"S0-17", "R-06"}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_internal_links_resolve(page: Path):
    for link in find_links(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page_name(page)} links to {link}"
        assert target.is_relative_to(ROOT), f"{page_name(page)} links outside the repository: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in find_anchors(target.read_text(encoding="utf-8")), f"{page_name(page)}: no anchor {link}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_pages_hold_no_path_of_a_machine(page: Path):
    found = MACHINE_PATH.search(page.read_text(encoding="utf-8"))
    assert found is None, f"{page_name(page)}: {found and found[0]}"


def test_the_figures_of_the_benchmark_page_are_the_measured_ones(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = load_script(ROOT / "benchmarks" / "results_table.py")
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert table.update_page(page) == page, "run benchmarks/results_table.py"


STUDIES = sorted((DOCS / "studies").glob("*.yaml"))


@pytest.mark.parametrize("recipe", STUDIES, ids=lambda p: p.stem)
def test_recipes_of_the_studies_are_valid(recipe: Path):
    from burnish.config.load import load_recipe

    given = ["model=pocket", "data.source=rows.jsonl", "eval_data.source=rows.jsonl"] if recipe.stem == "hh" else []
    loaded = load_recipe(recipe, overrides=given, env={}, check_machine=False)
    assert loaded.grid is not None and loaded.recipe.name == recipe.stem


@pytest.mark.parametrize("page", sorted((DOCS / "studies").glob("*.md")), ids=page_name)
def test_the_tables_of_the_studies_are_the_measured_ones(page: Path):
    results = load_script(ROOT / "scripts" / "studies" / "results.py")
    text = page.read_text(encoding="utf-8")
    assert results.update_page(text) == text, "run scripts/studies/results.py"


def find_nav_pages(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, list):
        for entry in nav:
            yield from find_nav_pages(entry)
    elif isinstance(nav, dict):
        for entry in nav.values():
            yield from find_nav_pages(entry)


def test_the_navigation_lists_exactly_the_pages():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = sorted(find_nav_pages(nav))
    assert listed == sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))


def test_the_readme_links_stay_inside_the_package_page():
    """The README is the package's page elsewhere too, so images must be files of the repository that exist."""
    for link in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / link).is_file(), link


USER_PAGES = [p for p in PAGES if p.name not in ("CHANGELOG.md", "coverage.md") and "decisions" not in p.parts]


@pytest.mark.parametrize("page", USER_PAGES, ids=page_name)
def test_commands_of_the_pages_exist(page: Path):
    from burnish.cli.main import ORDER, cli

    for first, second in re.findall(
        r"(?:^ {4}|`|&& )burnish ([a-z]+)(?: ([a-z]+)\b)?", page.read_text("utf-8"), re.MULTILINE
    ):
        assert first in ORDER, f"{page_name(page)}: burnish {first}"
        command = cli.get_command(click.Context(cli), first)
        if isinstance(command, click.Group) and second:
            assert second in command.commands, f"{page_name(page)}: burnish {first} {second}"


@pytest.mark.parametrize("page", USER_PAGES, ids=page_name)
def test_recipes_of_the_pages_are_valid(page: Path, tmp_path: Path):
    from burnish.config.load import load_recipe

    for number, block in enumerate(
        re.findall(r"^```yaml\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    ):
        if "stages:" in block and re.search(r"^name:", block, re.MULTILINE):
            file = tmp_path / f"{number}.yaml"
            file.write_text(block, encoding="utf-8")
            load_recipe(file, env={}, check_machine=False)
