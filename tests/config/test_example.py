"""Schema, examples and the page of settings are made from the classes, and agree with them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from burnish.config.base import Settings
from burnish.config.data import DataSource
from burnish.config.example import render_example
from burnish.config.keys import all_setting_names, kind_names, section_class, settings_class
from burnish.config.recipe import Recipe
from burnish.config.registry import ALIASES, KINDS, SECTIONS
from burnish.config.resolved import render_resolved
from burnish.config.schema import build_schema
from burnish.config.settings_page import render_settings_page
from tests.config.recipes import PAIRS, load, write

ROOT = Path(__file__).resolve().parents[2]
SECTION_CLASSES = [section_class(name) for name in SECTIONS]
SECTION_SETTINGS = {name for cls in SECTION_CLASSES for name in cls.model_fields}
CLASSES: list[type[Settings]] = [Recipe, DataSource, *SECTION_CLASSES, *(settings_class(kind) for kind in KINDS)]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_setting_is_described(cls: type[Settings]):
    for name, field in cls.model_fields.items():
        description = field.description or ""
        assert len(description) > 5 and description.endswith("."), f"{cls.__name__}.{name}: {description!r}"


@pytest.mark.parametrize("kind", kind_names())
def test_examples_are_recipes_and_complete(kind: str, tmp_path: Path):
    text = render_example(kind)
    recipe = load(write(tmp_path, text)).recipe
    stage = recipe.stages[0]
    needed = {
        name: getattr(stage, name)
        for name in ("data", "teacher", "reward_model")
        if getattr(stage, name, None) is not None
    }
    plain = load({"model": "pocket", "stages": [{"kind": kind, **needed}]})
    assert stage == plain.recipe.stages[0], "the example means the defaults"
    written = set(re.findall(r"^ *(?:# |- )? *([a-z_0-9]+):", text, re.MULTILINE))
    fixed = ALIASES[kind].fixed.keys() if kind in ALIASES else set()
    assert settings_class(recipe.stages[0].kind).model_fields.keys() - fixed <= written
    sections = [section_class(name) for name in SECTIONS if name in settings_class(recipe.stages[0].kind).model_fields]
    assert {name for cls in sections for name in cls.model_fields} <= written


@pytest.mark.parametrize("kind", kind_names())
def test_examples_hold_when_their_lines_are_uncommented(kind: str, tmp_path: Path):
    lines = []
    for line in render_example(kind).splitlines():
        match = re.match(r"^( +)# ( *[a-z_0-9]+: .*)$", line)
        lines.append(match.group(1) + match.group(2) if match else line)
    text = re.sub(rf"^    # ({'|'.join(SECTIONS)}):$", r"    \1:", "\n".join(lines), flags=re.MULTILINE)
    load(write(tmp_path, text))


def test_the_schema_knows_every_setting():
    schema = build_schema()
    json.dumps(schema)
    assert set(schema["properties"]) >= {"stages", "model", "models", "run_name", "beta", "lora", "learning_rate"}
    assert not {"kind", "init_from", "of", "judge"} & set(schema["properties"])
    for name in kind_names():
        properties = schema["$defs"][f"stage-{name}"]["properties"]
        kind = ALIASES[name].kind if name in ALIASES else name
        fixed = set(ALIASES[name].fixed) if name in ALIASES else set()
        assert set(properties) == settings_class(kind).model_fields.keys() - fixed
    references = set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(schema)))
    assert references <= schema["$defs"].keys()


def test_bundled_recipes_satisfy_the_schema():
    jsonschema = pytest.importorskip("jsonschema")
    from burnish.config.bundled import bundled_recipes

    validator = jsonschema.Draft202012Validator(build_schema())
    for recipe in bundled_recipes().values():
        text = re.sub(r"(\d)e-(\d)", r"\1.0e-\2", recipe.read_text(encoding="utf-8"))
        assert [error.message for error in validator.iter_errors(yaml.safe_load(text))] == []


def test_the_page_of_settings_is_up_to_date():
    page = ROOT / "docs" / "settings.md"
    assert page.read_text(encoding="utf-8") == render_settings_page(), (
        "run `burnish config reference --output docs/settings.md`"
    )


def test_the_page_names_every_setting():
    page = render_settings_page()
    for name in {*all_setting_names(), *Recipe.model_fields, *SECTION_SETTINGS, *DataSource.model_fields}:
        assert f"| `{name}` |" in page
    for row in page.splitlines():
        if row.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", row)) in (3, 5), row


def test_the_resolved_recipe_names_its_sources(tmp_path: Path):
    path = write(tmp_path, "model: pocket\nlr: 1e-4\nstages:\n  - {kind: ipo, data: d, lora: {r: 4}}\n")
    loaded = load(path, "ipo.beta=0.2", env={"BURNISH__SEED": "5"})
    text = render_resolved(loaded)
    rows = {m[1]: (m[2], m[3]) for m in re.finditer(r"^ *([a-z_]+): (.*?) +# (.*)$", text, re.MULTILINE)}
    assert rows["learning_rate"] == ("0.0001", f"{path}:2")
    assert rows["beta"] == ("0.2", "command line")
    assert rows["r"] == ("4", f"{path}:4")
    assert rows["seed"] == ("5", "environment (BURNISH__SEED)")
    assert rows["loss_type"] == ("ipo", f"{path}:4 (kind: ipo)")
    assert "weight_decay" not in text
    assert "weight_decay: 0" in render_resolved(loaded, everything=True)
    for everything in (False, True):
        again = load(write(tmp_path, render_resolved(loaded, everything=everything), "again.yaml")).recipe
        assert again == loaded.recipe


def test_the_resolved_recipe_of_lists_and_text(tmp_path: Path):
    data = [{"source": "a: b", "columns": {"prompt": "é"}}, "x"]
    loaded = load({**PAIRS, "stages": [{"kind": "sft", "data": data, "chat_template": "{% for m in messages %}\n# x"}]})
    assert load(write(tmp_path, render_resolved(loaded))).recipe.stages == loaded.recipe.stages
