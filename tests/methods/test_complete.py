"""Every registered kind and loss type is complete: settings, code, docs page, recipe, tests."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from burnish.config.base import Settings
from burnish.config.registry import ALIASES, KINDS, LOSS_TYPES, load_object
from burnish.config.train import TrainSettings

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = ROOT / "src" / "burnish" / "recipes"
SECTIONS = ("## Formula", "## When to use it", "## Settings", "## Logged metrics", "## Differences", "## Reading order")


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_settings_whose_fields_are_all_described(kind: str) -> None:
    settings = load_object(KINDS[kind].settings)
    assert issubclass(settings, Settings) and issubclass(settings, TrainSettings) is KINDS[kind].trains
    assert settings.model_fields["kind"].default == kind
    nameless = [n for n, f in settings.model_fields.items() if not f.description]
    assert not nameless, f"settings without a description: {nameless}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_code(kind: str) -> None:
    runner = load_object(KINDS[kind].runner)
    assert callable(runner) and inspect.getdoc(runner)
    if KINDS[kind].trains:
        method: Any = runner(load_object(KINDS[kind].settings)())
        assert method.name == kind and set(method.want) == set(KINDS[kind].models)
        assert callable(method.counts) and callable(method.compute_loss) and isinstance(method.coupled, bool)
        assert method.reference <= {"logprobs", "logits"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_a_docs_page_a_recipe_and_tests(kind: str) -> None:
    page = ROOT / "docs" / ("methods/" + kind + ".md" if KINDS[kind].trains else "evaluation.md")
    text = page.read_text("utf-8")
    if KINDS[kind].trains:
        missing = [s for s in SECTIONS if s not in text]
        assert not missing, f"{page.name} lacks {missing}"
    recipe = yaml.safe_load((RECIPES / f"{kind}.yaml").read_text("utf-8"))
    assert kind in [stage["kind"] for stage in recipe["stages"]]
    tests = ROOT / "tests" / (f"methods/test_{kind}.py" if KINDS[kind].trains else f"evals/test_{kind}.py")
    assert "def test_" in tests.read_text("utf-8")


@pytest.mark.parametrize("kind", [k for k, v in KINDS.items() if v.trains])
def test_the_docs_page_names_every_metric_that_is_logged(kind: str) -> None:
    """And every setting that the kind has beside those of all training stages."""
    text = (ROOT / "docs" / "methods" / f"{kind}.md").read_text("utf-8")
    source = inspect.getsource(inspect.getmodule(load_object(KINDS[kind].runner)))  # pyright: ignore[reportArgumentType]
    metrics = [line.split('"')[1] for line in source.splitlines() if line.strip().startswith('"') and '":' in line]
    own = set(load_object(KINDS[kind].settings).model_fields) - set(TrainSettings.model_fields)
    missing = [n for n in [*metrics, *own] if f"`{n}`" not in text]
    assert not missing, f"docs/methods/{kind}.md does not mention {missing}"


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_means_a_kind_and_settings_that_exist(alias: str) -> None:
    found = ALIASES[alias]
    settings = load_object(KINDS[found.kind].settings)(**found.fixed)
    load_object(KINDS[found.kind].runner)(settings)
    assert f"kind: {alias}" in (ROOT / "docs" / "methods" / f"{found.kind}.md").read_text("utf-8")


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, types in LOSS_TYPES.items() for n in types])
def test_a_loss_type_has_a_source_a_closed_form_and_a_docs_row(kind: str, name: str) -> None:
    from tests.losses.test_closed_forms import CLOSED_FORMS

    function = load_object(LOSS_TYPES[kind][name].function)
    assert "Source:" in (inspect.getdoc(function) or ""), "the docstring names the paper"
    assert f"| `{name}` |" in (ROOT / "docs" / "methods" / f"{kind}.md").read_text("utf-8")
    assert f"{kind} {name}" in CLOSED_FORMS
