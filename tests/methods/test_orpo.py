"""ORPO: the NLL of the answer plus λ times the odds-ratio loss."""

from __future__ import annotations

import math

import numpy as np
import pytest

from burnish.config.stages import OrpoSettings
from burnish.methods.orpo import Orpo
from tests.losses.tiny import CHOSEN
from tests.methods.test_cpo import run


def test_terms_by_hand() -> None:
    """odds = p/(1 − p) with p = e^(mean log-prob); −λ log σ(log of their ratio) is λ log(1 + odds_r/odds_c)."""
    method = Orpo(OrpoSettings(beta=0.25))
    assert "logprobs" not in method.reference
    result, parts = run(method)
    odds = [math.exp(p.mean()) / (1 - math.exp(p.mean())) for p in parts]
    ratios = [r / c for c, r in zip(odds[0::2], odds[1::2], strict=True)]
    pair, nll = result.terms
    assert (pair.name, pair.unit, pair.weight) == ("orpo/orpo", "pair", 1.0)
    assert pair.sum.item() == pytest.approx(0.25 * sum(math.log1p(x) for x in ratios), rel=1e-12)
    assert (nll.name, nll.unit, nll.weight, nll.count) == ("orpo/nll", "token", 1.0, float(sum(map(len, CHOSEN))))
    assert nll.sum.item() == pytest.approx(-sum(float(p.sum()) for p in parts[0::2]), rel=1e-12)
    found = {m.name: m.sum.item() / m.count for m in result.metrics}
    assert found["rewards/margins"] == pytest.approx(-np.mean(np.log(ratios)), rel=1e-12)


def test_s1_04_orpo_is_orpo() -> None:
    """λ weighs the odds ratio alone; the fine-tuning term stays."""
    small, _ = run(Orpo(OrpoSettings(beta=0.1)))
    large, _ = run(Orpo(OrpoSettings(beta=1.0)))
    assert large.terms[0].sum.item() == pytest.approx(10 * small.terms[0].sum.item())
    assert large.terms[1].sum.item() == small.terms[1].sum.item()
