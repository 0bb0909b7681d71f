"""The example of docs/methods/own-kind.md is complete: its files are a kind whose recipe loads and whose loss is right."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from burnish.config.needs import list_metrics
from burnish.config.registry import find_method_spec, load_user_object
from burnish.core.batch import Outputs, build_packed_batch
from burnish.core.group import Completion, Group
from tests.config.recipes import load, problems_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods" / "own-kind.md"


def find_blocks() -> list[str]:
    """The indented blocks of the page's example: two modules and a recipe."""
    example = PAGE.read_text(encoding="utf-8").partition("## A complete example")[2].partition("\n## ")[0]
    found = re.findall(r"(?:^    .*\n|^\n(?=\n*    ))+", example, flags=re.MULTILINE)
    return [textwrap.dedent(block).strip() + "\n" for block in found]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    settings, method, text = find_blocks()
    (tmp_path / "damped.py").write_text(settings, encoding="utf-8")
    (tmp_path / "damped_method.py").write_text(method, encoding="utf-8")
    (tmp_path / "damped.yaml").write_text(text, encoding="utf-8")
    return tmp_path / "damped.yaml"


def test_the_example_is_a_kind(recipe: Path) -> None:
    stage = load(recipe).recipe.stages[0]
    spec = find_method_spec(stage.kind)  # pyright: ignore[reportAttributeAccessIssue]
    method = load_user_object(spec.runner)(stage)
    ids = np.arange(3, dtype=np.int32)
    groups = [Group("row:0", ids, (Completion(ids, np.ones(3, bool)),))]
    logprobs = torch.tensor([-0.5, -2.0, -1.0], requires_grad=True)
    result = method.compute_loss(Outputs(logprobs=logprobs), build_packed_batch(groups).table, {})
    result.terms[0].sum.backward()
    weights = torch.exp(0.3 * logprobs.detach())
    torch.testing.assert_close(logprobs.grad, -weights)
    torch.testing.assert_close(result.metrics[0].sum, weights.sum())
    assert method.counts(groups) == {term.name: term.count for term in result.terms} == {"damped": 3.0}
    assert list_metrics(stage) == ["loss", *(metric.name for metric in result.metrics)]  # pyright: ignore


def test_a_metric_that_it_does_not_write_is_refused(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("eval_weight", "eval_weights"))
    found = problems_of(recipe)
    assert "did you mean eval_weight?" in found and "damped.yaml:8" in found
