"""Subjects from disk: the bundled model through the real loader and the real data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.config.stages import DpoSettings, EvaluateSettings, SftSettings
from burnish.data.bundled import resolve_model
from burnish.data.prepare import prepare_data
from burnish.data.prompts import load_prompts
from burnish.data.tokenizer import TextTokenizer
from burnish.errors import ConfigError
from burnish.evals.evaluate import evaluate_subjects
from burnish.evals.subjects import EvaluationData, Prompt, Subject, build_loader, loaded


@pytest.fixture(scope="module")
def pocket() -> Path:
    found = resolve_model("pocket")
    if found is None:
        pytest.skip("needs the bundled model")
    return found


def test_a_subject_is_loaded_ready_to_measure(pocket: Path) -> None:
    load = build_loader(EvaluateSettings(precision="fp32"), torch.device("cpu"))
    with loaded(load, pocket, "lm") as model:
        assert not model.policy.training and not any(p.requires_grad for p in model.policy.parameters())
        assert model.context == 512 and model.tokenizer.eos_id in model.end_ids
        assert model.tokenizer.bos_id in model.end_ids, "a token that begins a new text ends an answer"
    assert model.policy is None, "its memory is given back"


def test_t28_the_precision_is_what_the_settings_say(pocket: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="burnish"):
        model = build_loader(EvaluateSettings(precision="bf16"), torch.device("cpu"))(pocket, "lm")
    assert next(model.policy.parameters()).dtype == torch.bfloat16
    assert "bf16" in caplog.text


def test_a_language_model_is_no_judge(pocket: Path) -> None:
    load = build_loader(EvaluateSettings(), torch.device("cpu"))
    with pytest.raises(ConfigError, match="without a trained score head"):
        load(pocket, "score")


def test_bundled_model_and_data(pocket: Path, tmp_path: Path) -> None:
    """The same figures as the pipeline makes, on a few items."""

    def prompts(name: str, tokenizer: TextTokenizer) -> list[Prompt]:
        return [Prompt(r.id, r.prompt_ids, r.text, r.answer) for r in load_prompts(name, tokenizer)]

    def held_out(settings: Any) -> Any:
        return lambda tokenizer: prepare_data(settings, tokenizer).held_out

    data = EvaluationData(
        held_out(SftSettings(data="pocket/chat")), held_out(DpoSettings(data="pocket/preferences")), prompts
    )
    settings = EvaluateSettings(
        tasks=["loss", "preferences", "pocket/maths"], max_items=8, max_new_tokens=16, samples=2
    )
    subjects = [Subject("base", pocket), Subject("again", pocket, compare_to="base", reference_folder=pocket)]
    found = evaluate_subjects(subjects, settings, data=data, out_dir=tmp_path)
    values = {(r["subject"], r["task"], r["metric"]): r["value"] for r in found["table"]}
    assert all(r["n"] == 8 for r in found["table"])
    assert values["base", "loss", "loss"] == values["again", "loss", "loss"] < 7.6, "below ln of the vocabulary"
    assert values["again", "preferences", "accuracy"] == 0.5
    assert "notes" not in found
