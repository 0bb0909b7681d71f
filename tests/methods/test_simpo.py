"""SimPO: its paper's loss, without the NLL that TRL leaves on."""

from __future__ import annotations

import math

import numpy as np
import pytest

from burnish.config.stages import SimpoSettings
from burnish.methods.simpo import Simpo
from tests.methods.test_cpo import run


def test_loss_and_margin_by_hand() -> None:
    """−log σ(β(mean log π(y_c) − mean log π(y_r)) − γ), the margin before γ."""
    result, parts = run(Simpo(SimpoSettings(beta=2.0, simpo_gamma=0.6)))
    margins = [2.0 * float(c.mean() - r.mean()) for c, r in zip(parts[0::2], parts[1::2], strict=True)]
    (term,) = result.terms
    assert (term.name, term.unit, term.count) == ("simpo", "pair", 5.0)
    assert term.sum.item() == pytest.approx(sum(math.log1p(math.exp(0.6 - m)) for m in margins), rel=1e-12)
    found = {m.name: m.sum.item() / m.count for m in result.metrics}
    assert found["rewards/margins"] == pytest.approx(np.mean(margins), rel=1e-12)


def test_t03_simpo_has_no_nll_unless_it_is_asked_for() -> None:
    """TRL's SimPO is a loss type of CPO and keeps cpo_alpha 1: 7.18 instead of 0.90 on its batch."""
    assert SimpoSettings().cpo_alpha == 0.0
    plain, _ = run(Simpo(SimpoSettings()))
    assert [t.name for t in plain.terms] == ["simpo"]
    both, _ = run(Simpo(SimpoSettings(cpo_alpha=0.5)))
    assert [(t.name, t.weight) for t in both.terms] == [("simpo/simpo", 1.0), ("simpo/nll", 0.5)]
    assert both.terms[0].sum.item() == plain.terms[0].sum.item()
