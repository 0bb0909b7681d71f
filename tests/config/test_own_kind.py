"""A kind of a user's own in recipes: its settings are checked like all others, and what is wrong with it has a line."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from burnish.cli.main import main
from burnish.config.example import render_example
from burnish.config.needs import find_needs
from tests.config.recipes import load, problems_of, write

NUMBERS = itertools.count()
MODULE = """
from burnish.config.base import setting
from burnish.config.spec import MethodSpec, ModelSpec
from burnish.config.train import TrainSettings

class DampedSettings(TrainSettings):
    \"\"\"Damped fine-tuning.\"\"\"
    damping: float = setting(0.5, "How much is damped.", ge=0, le=1)
    critic: str | None = setting(None, "Where the critic starts.")
    critic_rate: float | None = setting(None, "The critic's peak learning rate.", gt=0)

class Plain: pass

SPEC = MethodSpec(
    name="damped", settings=f"{__name__}:DampedSettings", runner=f"{__name__}:Nothing", summary="damped fine-tuning",
    rows="completion", models={"policy": ModelSpec(), "critic": ModelSpec(head="score", start="critic",
    learning_rate="critic_rate")}, model_settings={"critic": "score"}, metrics=("damped_share",), coupling="step",
)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a module of its own name into the current folder; returns the name."""
    monkeypatch.chdir(tmp_path)

    def build(*changes: tuple[str, str]) -> str:
        name = f"damped_{next(NUMBERS)}"
        text = MODULE
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        return name

    return build


def write_recipe(folder: Path, kind: str, *lines: str) -> Path:
    rest = "".join(f"    {line}\n" for line in lines)
    return write(folder, f"model: pocket\ndata: pocket/chat\nstages:\n  - kind: {kind}\n{rest}")


def test_a_stage_has_its_settings_and_the_kind_s_name(tmp_path: Path, module: Any) -> None:
    kind = f"{module()}:SPEC"
    loaded = load(write_recipe(tmp_path, kind, "damping: 0.25", "lr: 1e-4"))
    stage: Any = loaded.recipe.stages[0]
    assert (stage.kind, stage.name, stage.damping, stage.learning_rate) == (kind, "damped", 0.25, 1e-4)
    assert loaded.source_of("stages.damped.damping").endswith("recipe.yaml:5")
    assert find_needs(stage).coupled and not find_needs(stage).reference
    assert load(write_recipe(tmp_path, kind), "damped.damping=0.75").recipe.stages[0].damping == 0.75  # pyright: ignore


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("dampin: 0.25", "damping"),
        ("damping: 2", "damping"),
        ("damping: much", "damping"),
        ("critic: later", "which comes later"),
        ("critic: text", "which is no reward stage"),
        ("train_on: all", "train_on"),
        ("metric_for_best_model: eval_damped_shar", "did you mean eval_damped_share?"),
        ("head_learning_rate: 1e-3\n    bet: 0.1", "bet"),
    ],
)
def test_wrong_settings_have_a_line(tmp_path: Path, module: Any, line: str, message: str) -> None:
    own = f"  - kind: {module()}:SPEC\n    {line}\n"
    text = f"model: pocket\ndata: pocket/chat\nstages:\n  - {{kind: sft, name: text}}\n{own}  - {{kind: reward, name: later}}\n"
    found = problems_of(write(tmp_path, text))
    assert message in found and ("recipe.yaml:6" in found or "recipe.yaml:7" in found), found


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("no_such_module:SPEC", (), "cannot be loaded: No module named"),
        ("{}:NOTHING", (), "cannot be loaded"),
        ("{}:Plain", (), "is a type, not a MethodSpec"),
        ("{}:SPEC", (('name="damped"', 'name="dpo"'),), "has the name of a built-in kind: dpo"),
        ("{}:SPEC", (('name="damped"', 'name="ipo"'),), "has the name of a built-in kind: ipo"),
        ("{}:SPEC", ((":DampedSettings", ":Damped"),), "settings of kind"),
        ("{}:SPEC", ((":DampedSettings", ":Plain"),), "are no TrainSettings"),
        ("{}:SPEC", (('start="critic"', 'start="critik"'),), "settings that it does not have: critik"),
        ("{}:SPEC", (("import setting", "import nothing_like_it"),), "cannot be loaded"),
        ("{}:SPEC", (("class Plain: pass", "class Plain pass"),), "cannot be loaded"),
        ("{}:SPEC", (("class Plain: pass", "1 / 0"),), "cannot be loaded"),
        ("{}:SPEC", (('rows="completion"', 'row="completion"'),), "cannot be loaded"),
        ("{}:SPEC", (('rows="completion"', 'rows="pairs"'),), "rows"),
    ],
)
def test_a_kind_that_cannot_be_is_one_problem_with_its_line(
    tmp_path: Path, module: Any, kind: str, changes: tuple[tuple[str, str], ...], message: str
) -> None:
    found = problems_of(write_recipe(tmp_path, kind.format(module(*changes))))
    assert message in found and "recipe.yaml:4" in found and "→" in found, found
    assert "problems" not in found.splitlines()[0], "one problem"


def test_its_example_is_a_recipe_and_complete(tmp_path: Path, module: Any) -> None:
    kind = f"{module()}:SPEC"
    text = render_example(kind)
    assert f"kind: {kind}" in text and "# damping: 0.5" in text and "# critic_rate: null" in text
    stage = load(write(tmp_path, text)).recipe.stages[0]
    assert stage == load({"model": "pocket", "data": "pocket/chat", "stages": [{"kind": kind}]}).recipe.stages[0]


def test_commands_know_it(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    kind = f"{module()}:SPEC"
    assert main(["config", "example", kind]) == 0 and "# damping: 0.5" in capsys.readouterr().out
    assert main(["data", "check", "pocket/chat", "--for", kind, "--limit", "1"]) == 0
    assert main(["config", "example", "no_such_module:SPEC"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert main(["data", "check", "pocket/chat", "--for", "damped"]) == 2
