"""What a kind is stands in its declaration alone: no other code compares kinds by name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from burnish.config.registry import ALIASES, KINDS

SOURCE = Path(__file__).resolve().parents[1] / "src" / "burnish"
WORDS = {*KINDS, *ALIASES}


def mentions_kind(node: ast.AST) -> bool:
    """Whether an expression reads a kind: `kind`, `stage.kind`, `record["kind"]`, `record.get("kind")`."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and "kind" in part.id.lower():
            return True
        if isinstance(part, ast.Attribute) and "kind" in part.attr.lower():
            return True
        if isinstance(part, ast.Constant) and part.value == "kind":
            return True
    return False


def names_kind(node: ast.AST) -> bool:
    """Whether an expression holds the name of a kind, or the table of all."""
    return any(
        (isinstance(part, ast.Constant) and part.value in WORDS) or (isinstance(part, ast.Name) and part.id == "KINDS")
        for part in ast.walk(node)
    )


def find_comparisons(tree: ast.AST) -> list[int]:
    """Lines that compare a kind with names of kinds: ==, in, a match, a table looked up by the kind."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(mentions_kind(a) and names_kind(b) for a in sides for b in sides if a is not b):
                lines.append(node.lineno)
        elif isinstance(node, ast.Match):
            lines += [node.lineno] * mentions_kind(node.subject)
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            lines += [node.lineno] * mentions_kind(node.slice)
    return lines


@pytest.mark.parametrize(
    "text",
    [
        'settings.kind == "reward"',
        'kind in ("dpo", "kto")',
        '"evaluate" != stage.kind',
        'record.get("kind") == "sft"',
        'str(record["kind"]) == "sft"',
        "kind not in KINDS",
        'find(stage.kind).name == "ipo"',
        '{"dpo": 1}[stage.kind]',
        "match stage.kind:\n  case _: pass",
    ],
)
def test_the_search_finds_comparisons(text: str) -> None:
    assert find_comparisons(ast.parse(text)) == [1]


@pytest.mark.parametrize("text", ['folder.kind == "adapter"', 'rows == "pair"', "kind == other", "KINDS[kind].summary"])
def test_the_search_leaves_others_alone(text: str) -> None:
    assert find_comparisons(ast.parse(text)) == []


def test_nothing_outside_config_compares_kinds() -> None:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(SOURCE)
        if place.parts[0] != "config":
            found += [f"{place}:{line}" for line in find_comparisons(ast.parse(path.read_text(encoding="utf-8")))]
    assert found == [], "ask burnish.config.registry.find_spec(kind) what the kind is"


@pytest.mark.parametrize("name", ["drafts.py", "keys.py", "checks.py", "cross_checks.py"])
def test_even_config_compares_no_single_kind(name: str) -> None:
    """It may ask whether a word is the name of any kind, but says nothing of one of them."""
    tree = ast.parse((SOURCE / "config" / name).read_text(encoding="utf-8"))
    compared = [
        part.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and any(mentions_kind(side) for side in (node.left, *node.comparators))
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and part.value in WORDS
    ]
    assert compared == []
