"""burnish from Python."""

from __future__ import annotations

import pytest

import burnish
from burnish.errors import ConfigError


def test_train_gives_a_stage_and_its_result(tmp_path, inputs):
    stage = burnish.train(
        "sft",
        model=str(inputs / "model"),
        data=str(inputs / "chat.jsonl"),
        max_steps=2,
        batch_size=2,
        output_dir=tmp_path,
        run_name="one",
    )
    assert stage.state == "done"
    assert stage.final is not None
    assert (stage.final / "model.safetensors").exists()
    assert stage.figures["steps"] == 2
    assert burnish.load_record(tmp_path / "one").stages["sft"] == stage


def test_wrong_settings_raise_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match="learning_rate"):
        burnish.train("sft", model="pocket", data="pocket/chat", learning_rte=1e-3, output_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="nothing"):
        burnish.nothing  # noqa: B018
