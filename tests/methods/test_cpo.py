"""Contrastive preference optimisation: its two terms, and that it asks for no reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from burnish.config.stages import CpoSettings
from burnish.core.batch import Outputs, build_packed_batch
from burnish.engine.method import build_initial_state
from burnish.errors import ConfigError
from burnish.losses.terms import LossResult
from burnish.methods.cpo import Cpo
from tests.losses.tiny import CHOSEN, REJECTED, build_pairs


def run(method: Cpo, seed: int = 0) -> tuple[LossResult, list[np.ndarray]]:
    """The result on random log-probs, and these per completion, chosen and rejected in turn."""
    batch = build_packed_batch(build_pairs())
    logprobs = np.random.default_rng(seed).normal(-2, 1, len(batch.target_ids)).clip(max=-0.01)
    edges = np.cumsum([len(c) for pair in zip(CHOSEN, REJECTED, strict=True) for c in pair])[:-1]
    outputs = Outputs(logprobs=torch.from_numpy(logprobs))
    return method.compute_loss(outputs, batch.table, build_initial_state(method)), np.split(logprobs, edges)


def test_terms_and_rewards_by_hand() -> None:
    """−log σ(β(c − r)) a pair, and α times the mean −log π over all chosen tokens; no reference anywhere."""
    method = Cpo(CpoSettings(beta=0.2, cpo_alpha=0.7))
    assert "logprobs" not in method.reference
    result, parts = run(method)
    chosen, rejected = ([float(p.sum()) for p in parts[k::2]] for k in (0, 1))
    pair, nll = result.terms
    assert (pair.name, pair.unit, pair.count, pair.weight) == ("cpo/sigmoid", "pair", 5.0, 1.0)
    want = sum(math.log1p(math.exp(-0.2 * (c - r))) for c, r in zip(chosen, rejected, strict=True))
    assert pair.sum.item() == pytest.approx(want, rel=1e-12)
    tokens = float(sum(map(len, CHOSEN)))
    assert (nll.name, nll.unit, nll.count, nll.weight) == ("cpo/nll", "token", tokens, 0.7)
    assert nll.sum.item() == pytest.approx(-sum(chosen), rel=1e-12)
    found = {m.name: m.sum.item() / m.count for m in result.metrics}
    assert found["rewards/chosen"] == pytest.approx(0.2 * np.mean(chosen))
    assert found["logps/rejected"] == pytest.approx(np.mean(rejected))
    assert not [name for name in found if name.endswith("/nll")], "the NLL compares nothing"


def test_without_alpha_there_is_one_term() -> None:
    result, _ = run(Cpo(CpoSettings(cpo_alpha=0.0)))
    assert [t.name for t in result.terms] == ["cpo"]


def test_a_mix_keeps_its_nll_apart() -> None:
    method = Cpo(CpoSettings(loss_type=["sigmoid", "ipo"], loss_weights=[1.0, 0.1]))
    result, _ = run(method)
    assert [(t.name, t.weight) for t in result.terms] == [("cpo/sigmoid", 1.0), ("cpo/ipo", 0.1), ("cpo/nll", 1.0)]
    assert set(method.counts(build_pairs())) == {t.name for t in result.terms}


def test_t01_smoothing_beside_a_loss_that_ignores_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="label_smoothing"):
        Cpo(CpoSettings(loss_type="hinge", label_smoothing=0.1))
