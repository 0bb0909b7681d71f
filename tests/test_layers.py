"""Imports point down only: the layers of docs/architecture.md, over every import, also inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import burnish

SOURCE = Path(burnish.__file__).parent
# From the top down; packages of one line do not import each other.
LAYERS = (
    ("cli",),
    ("pipeline",),
    ("methods", "evals"),
    ("engine",),
    ("models",),
    ("losses", "data"),
    ("core",),
    ("config", "artifacts", "track", "report"),
    ("errors", "faults", "clock", "disk"),
)
SIDEWAYS = {
    ("artifacts", "config"),
    ("track", "config"),
    ("report", "artifacts"),
    ("report", "track"),
    ("report", "config"),
}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FREE = {"__init__", "__main__"}
# Circles inside a package that still exist; the list may only become shorter.
CIRCLES = (
    {"burnish.pipeline.reference", "burnish.pipeline.reward_margins", "burnish.pipeline.train_stage"},
    {"burnish.pipeline.evaluate_stage", "burnish.pipeline.grid", "burnish.pipeline.run"},
)
BUNDLED = {"assets", "recipes"}


def find_imports(source: str, package: str) -> list[str]:
    """Absolute names of burnish's modules that a source imports anywhere, strings of the registry's form included."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            found += [f"{base}.{alias.name}" if base == "burnish" else base for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            found += [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return [name for name in found if name.split(".")[0] == "burnish"]


def find_violations(files: Iterable[tuple[str, str]]) -> list[str]:
    """Arrows that point up or sideways, of files given as (path below the package, source)."""
    violations = []
    for path, source in files:
        parts = Path(path).with_suffix("").parts
        owner = parts[0]
        if owner in FREE:
            continue
        package = ".".join(["burnish", *parts[:-1]])
        for name in find_imports(source, package):
            target = name.split(".")[1] if "." in name else ""
            if not target or target == owner or target.startswith("__"):
                continue
            if target not in LEVEL:
                violations.append(f"{path}: {target} is in no layer")
            elif LEVEL[target] < LEVEL[owner]:
                violations.append(f"{path} imports {name}: up")
            elif LEVEL[target] == LEVEL[owner] and LEVEL[owner] < LEVEL["errors"] and (owner, target) not in SIDEWAYS:
                violations.append(f"{path} imports {name}: sideways")
    return violations


def read_package() -> list[tuple[str, str]]:
    """Every module of the package."""
    return [(str(path.relative_to(SOURCE)), path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))]


def find_circles(files: Iterable[tuple[str, str]]) -> list[set[str]]:
    """Modules that import each other, over every import: inside functions and under TYPE_CHECKING too."""
    sources = {".".join(["burnish", *Path(path).with_suffix("").parts]): text for path, text in files}
    arrows = {name: set() for name in sources}
    for name, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                arrows[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                arrows[name] |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        arrows[name] &= sources.keys() - {name}

    def reach(start: str) -> set[str]:
        seen, ahead = set(), [start]
        while ahead:
            new = arrows[ahead.pop()] - seen
            seen |= new
            ahead += new
        return seen

    reached = {name: reach(name) for name in sources}
    circles = {frozenset(b for b in sources if b in reached[a] and a in reached[b]) for a in sources}
    return [set(circle) for circle in circles if circle]


def test_imports_have_no_circles():
    assert [circle for circle in find_circles(read_package()) if circle not in CIRCLES] == []


def test_a_circle_is_caught():
    one, two = ("data/a.py", "from burnish.data import b"), ("data/b.py", "def f():\n    import burnish.data.c")
    back = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from burnish.data.a import x"
    assert find_circles([one, two, ("data/c.py", back)]) == [{f"burnish.data.{name}" for name in "abc"}]
    assert find_circles([one, two, ("data/c.py", "import burnish.data.d")]) == []


def test_imports_point_down():
    assert find_violations(read_package()) == []


def test_every_package_has_its_layer():
    found = {Path(path).with_suffix("").parts[0] for path, _ in read_package()} - FREE - BUNDLED
    assert found == set(LEVEL), "a package without a layer, or a layer without a package"
    assert len(read_package()) > 40


def test_the_layers_are_those_of_the_architecture_page():
    page = (SOURCE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = page.split("## Layers", 1)[1].split("##", 1)[0]
    positions = [block.find("\n    " + "  ".join(names) + " ") for names in LAYERS]
    assert -1 not in positions and positions == sorted(positions), "the page shows other layers"


def test_no_drawer_for_odds_and_ends():
    names = {Path(path).stem for path, _ in read_package()} | {Path(path).parts[0] for path, _ in read_package()}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


def test_light_packages_hold_nothing():
    body = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8")).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [getattr(node, "module", None) for node in imports] == ["__future__", "typing"]
    assert not (SOURCE / "methods" / "__init__.py").read_text(encoding="utf-8").split('"""')[-1].strip()


def test_an_arrow_that_points_up_is_caught():
    for source in (
        "import burnish.engine.step",
        "from burnish.engine import step",
        "from burnish import engine",
        "def f():\n    from burnish.engine.step import run",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from burnish.engine import step",
        "from ..engine import step",
        "from importlib import import_module\nimport_module('burnish.engine.step')",
    ):
        assert find_violations([("losses/dpo.py", source)]), source
        assert not find_violations([("pipeline/run.py", source.replace("..engine", "burnish.engine"))]), source


def test_an_arrow_that_points_sideways_is_caught():
    assert find_violations([("data/x.py", "from burnish.losses.dpo import y")])
    assert find_violations([("config/x.py", "from burnish.artifacts.folder import y")])
    assert not find_violations([("artifacts/x.py", "from burnish.config.load import y")])
    assert not find_violations([("data/x.py", "from burnish.data.readers import y\nfrom .lines import z")])
    assert find_violations([("data/x.py", "from burnish.nowhere import y")]) == ["data/x.py: nowhere is in no layer"]
