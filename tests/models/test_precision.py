"""What `precision: auto` chooses."""

from __future__ import annotations

import pytest
import torch

from burnish.models import precision
from burnish.models.precision import resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "hidden, training, name",
    [
        (64, True, "fp32"),
        (96, True, "bf16"),
        (160, True, "bf16"),
        (160, False, "fp32"),
        (256, False, "bf16"),
    ],
)
def test_small_models_train_in_bf16_and_answer_in_fp32(
    hidden: int, training: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_fast_bf16", lambda device: True)
    assert resolve_precision("auto", CPU, hidden, training=training).name == name
    assert resolve_precision("fp32", CPU, hidden, training=training).name == "fp32"
    monkeypatch.setattr(precision, "has_fast_bf16", lambda device: False)
    assert resolve_precision("auto", CPU, hidden, training=training).name == "fp32"
