"""Distillation (S3-23): terms, weights and metrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from burnish.config.stages import DistillSettings
from burnish.core.batch import Outputs, build_packed_batch
from burnish.core.group import Completion, Group
from burnish.methods.distill import Distill


def build_rows() -> list[Group]:
    """Two rows of 3 and 1 scored tokens."""
    rows = []
    for i, mask in enumerate(([True, False, True, True], [False, True])):
        ids = np.arange(5, 5 + len(mask), dtype=np.int32)
        rows.append(Group(f"row:{i}", np.asarray([3], np.int32), (Completion(ids, np.asarray(mask)),)))
    return rows


def compute(settings: DistillSettings):
    outputs = Outputs(logprobs=torch.tensor([-1.0, -2.0, -3.0, -4.0]))
    outputs.functionals["divergence"] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    method = Distill(settings)
    return method, method.compute_loss(outputs, build_packed_batch(build_rows()).table, {})


def test_the_divergence_alone() -> None:
    method, result = compute(DistillSettings())
    (term,) = result.terms
    assert (term.name, term.unit, term.count, term.weight) == ("distill", "token", 4.0, 1.0)
    assert term.sum.item() == pytest.approx(1.0)
    assert method.counts(build_rows()) == {"distill": 4.0}
    assert {m.name: m.sum.item() / float(m.count) for m in result.metrics} == {"cross_entropy": 2.5}


def test_the_mix_with_cross_entropy() -> None:
    """α · divergence + (1 − α) · cross-entropy, each a term with its own line in the log."""
    method, result = compute(DistillSettings(alpha=0.75))
    assert [(t.name, t.weight, t.sum.item()) for t in result.terms] == [
        ("distill", 0.75, pytest.approx(1.0)),
        ("ce", 0.25, pytest.approx(10.0)),
    ]
    assert method.counts(build_rows()) == {"distill": 4.0, "ce": 4.0}


def test_what_it_needs() -> None:
    method = Distill(DistillSettings(loss_type="jsd"))
    assert "logits" in method.reference and "logprobs" not in method.reference and not method.coupled
    assert [f.name for f in method.functionals] == ["divergence"]
    with pytest.raises(ValueError, match="divergence"):
        method.compute_loss(Outputs(logprobs=torch.zeros(4)), build_packed_batch(build_rows()).table, {})
