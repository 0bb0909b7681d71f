"""β-DPO's moments, filter and β against formulas written out again; what the official code stumbles over."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from burnish.config.dynamic_beta import DynamicBetaSettings
from burnish.losses.beta_dpo import draw_gumbel
from burnish.losses.controllers import Unit
from tests.losses.test_controllers import build, unit


def draw(count: int, n: int = 10, seed: int = 0) -> list[Unit]:
    rng = np.random.default_rng(seed)
    return [Unit(rng.normal(3, 5, n), tuple(f"row:{t * n + i}" for i in range(n))) for t in range(count)]


def test_s0_23_moments_and_batch_beta_are_the_formula() -> None:
    """S0-23: M_0 and σ move before they are used; E[M] in β is over the pairs that were drawn; β ≥ 1e-3."""
    controller = build(type="beta_dpo", keep=0.7, alpha=0.6, momentum=0.8)
    state, mean, std = controller.initial_state(), None, None
    floored = 0
    for each in draw(200):
        found = controller.advance(each, state)
        margins = each.margins.tolist()
        new_mean, new_std = statistics.fmean(margins), statistics.stdev(margins)
        mean = new_mean if mean is None else 0.8 * mean + 0.2 * new_mean
        std = new_std if std is None else 0.8 * std + 0.2 * new_std
        assert found.kept is not None and len(found.kept) == 7 and sorted(set(found.kept)) == list(found.kept)
        kept = statistics.fmean(margins[i] for i in found.kept)
        beta = (1 + 0.6 * (kept - mean)) * 0.1
        floored += beta < 1e-3
        assert found.beta == pytest.approx(max(1e-3, beta), rel=1e-9)
        assert (found.state["mean"], found.state["std"]) == pytest.approx((mean, std), rel=1e-9)
        state = found.state
    assert 0 < floored < 100


def test_s0_23_instance_level_and_both_readings_of_m() -> None:
    """S0-23: β_i = [1 + α(M_i − M_0)] β_0 with M = Δ (the code) or β_0 Δ (the paper), which acts 1/β_0 times weaker."""
    (each,) = draw(1)
    margins = each.margins
    for margin, scale in (("log_ratio", 1.0), ("implicit_reward", 0.1)):
        controller = build(type="beta_dpo", level="instance", margin=margin, keep=1.0, alpha=0.5)
        found = controller.advance(each, controller.initial_state())
        expected = [max(1e-3, (1 + 0.5 * scale * (m - margins.mean())) * 0.1) for m in margins]
        assert np.asarray(found.beta).tolist() == pytest.approx(expected, rel=1e-12)
        assert found.kept is None
        frozen = controller.find_current(np.asarray([2.0, 4.0]), found.state)
        wanted = [max(1e-3, (1 + 0.5 * scale * (m - margins.mean())) * 0.1) for m in (2.0, 4.0)]
        assert np.asarray(frozen).tolist() == pytest.approx(wanted, rel=1e-12)


def test_s0_23_how_wide_beta_is_under_the_two_readings() -> None:
    """The figures of the reference: M ~ N(3, 25), n = 64, α 0.6: β .100 ± .032 as coded, ± .0033 as printed (ρ = 1 here)."""
    for margin, scale in (("log_ratio", 1.0), ("implicit_reward", 0.1)):
        controller = build(type="beta_dpo", margin=margin, keep=1.0)
        state, betas = controller.initial_state(), []
        for each in draw(2000, n=64, seed=1):
            found = controller.advance(each, state)
            state = found.state
            betas.append(found.beta)
        # β − β_0 = 0.06 (m − M_0), m the mean of 64 (sd 5/8), and M_0 holds a tenth of it and 0.9 of its own past
        assert np.mean(betas) == pytest.approx(0.1, abs=0.003)
        exact = scale * 0.06 * 0.9 * 0.625 * math.sqrt(1 + 0.01 / (1 - 0.81))
        assert np.std(betas) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("moments", ["first", "zero"])
def test_s0_23_where_the_moments_begin(moments: str) -> None:
    controller = build(type="beta_dpo", moments=moments, keep=1.0)
    found = controller.advance(unit(2.0, 4.0), controller.initial_state())
    share = 1.0 if moments == "first" else 0.1
    assert found.state["mean"] == pytest.approx(3.0 * share)
    assert found.state["std"] == pytest.approx(math.sqrt(2) * share)


@pytest.mark.parametrize(("keep", "n", "k"), [(0.8, 5, 4), (0.8, 1, 1), (0.1, 4, 1), (0.29, 100, 29), (0.7, 10, 7)])
def test_s0_23_how_many_are_kept(keep: float, n: int, k: int) -> None:
    """k = max(1, int(ρ n)), without the rounding of 0.29 · 100 = 28.999…"""
    controller = build(type="beta_dpo", keep=keep)
    state = controller.initial_state() | {"mean": 0.0, "std": 1.0}
    found = controller.advance(draw(1, n)[0], state)
    assert found.kept is not None and len(found.kept) == k


def test_s0_23_the_draw_follows_its_weights() -> None:
    """Drawing one by one with weights w: P(i first) = w_i / Σ w; two of three drawn by the formula of that scheme."""
    controller = build(type="beta_dpo", keep=0.67)
    margins = np.asarray([0.0, 1.0, 2.0])
    state = {**controller.initial_state(), "mean": 0.0, "std": 1.0}
    momentum_free = build(type="beta_dpo", keep=0.67, momentum=0.999999999)
    w = np.exp(-0.5 * margins**2)
    w = w / w.sum()
    expected = {}
    for out in range(3):
        i, j = (r for r in range(3) if r != out)
        expected[out] = w[i] * w[j] / (1 - w[i]) + w[j] * w[i] / (1 - w[j])
    left_out = np.zeros(3)
    for t in range(4000):
        found = momentum_free.advance(Unit(margins, ("a", "b", "c")), {**state, "units": t})
        assert found.kept is not None
        (missing,) = set(range(3)) - set(found.kept.tolist())
        left_out[missing] += 1
    for out in range(3):
        p = expected[out]
        assert left_out[out] / 4000 == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 4000) + 1e-9)


def test_s0_23_the_draw_depends_on_seed_unit_and_pair_alone() -> None:
    """S0-23: the same selection on all ranks: neither a generator nor an order of calls is in it."""
    (each,) = draw(1)
    first, second = (build(type="beta_dpo", seed=7, keep=0.5) for _ in range(2))
    second.advance(draw(1, seed=4)[0], second.initial_state())
    kept = [c.advance(each, c.initial_state()).kept for c in (first, second)]
    assert kept[0] is not None and kept[1] is not None and kept[0].tolist() == kept[1].tolist()
    rows = np.random.default_rng(0).permutation(10)
    mixed = Unit(each.margins[rows], tuple(each.ids[i] for i in rows))
    again = first.advance(mixed, first.initial_state()).kept
    assert again is not None and {mixed.ids[i] for i in again} == {each.ids[i] for i in kept[0]}
    other = build(type="beta_dpo", seed=8, keep=0.5)
    assert any(
        not np.array_equal(
            np.asarray(first.advance(each, {**first.initial_state(), "units": t}).kept),
            np.asarray(other.advance(each, {**other.initial_state(), "units": t}).kept),
        )
        for t in range(5)
    )
    noise = [draw_gumbel(0, t, "row:1") for t in range(20_000)]
    assert np.mean(noise) == pytest.approx(0.5772, abs=0.04) and np.var(noise) == pytest.approx(
        math.pi**2 / 6, rel=0.05
    )


def test_s0_23_zero_spread_does_not_raise() -> None:
    """S0-23: the first step of an adapter has M = 0 everywhere; the original divides 0 by 0. Held: nothing is left out."""
    for level in ("batch", "instance"):
        controller = build(type="beta_dpo", level=level)
        found = controller.advance(unit(0.0, 0.0, 0.0, 0.0, 0.0), controller.initial_state())
        assert found.held and found.beta == 0.1 and found.kept is not None and len(found.kept) == 5
        assert found.state == {**controller.initial_state(), "units": 1}
        after = controller.advance(unit(1.0, 2.0, 3.0), found.state)
        assert after.state["mean"] == 2.0 and math.isfinite(np.mean(after.beta))


def test_s0_23_pairs_far_out_cannot_exhaust_the_draw() -> None:
    """S0-23: weights of exp(−½·1000²) are 0 in any float; they are drawn last, not an error."""
    controller = build(type="beta_dpo", keep=0.8, momentum=0.999)
    state = {**controller.initial_state(), "mean": 0.0, "std": 1.0}
    found = controller.advance(unit(0.1, -0.2, 1000.0, 2000.0, -3000.0, 0.3), state)
    assert found.kept is not None and len(found.kept) == 4 and {0, 1, 5} <= set(found.kept.tolist())


def test_s0_23_nothing_to_do_is_plain_dpo() -> None:
    """S0-23: ρ = 1, α = 0: β_0 to the last bit, all pairs, and the loss is no longer coupled."""
    controller = build(type="beta_dpo", keep=1.0, alpha=0.0)
    assert not DynamicBetaSettings(type="beta_dpo", keep=1.0, alpha=0.0).coupled
    found = controller.advance(draw(1)[0], controller.initial_state())
    assert found.beta == 0.1 and found.kept is None
    assert all(
        DynamicBetaSettings(type="beta_dpo", **part).coupled for part in ({"keep": 0.9, "alpha": 0.0}, {"keep": 1.0})
    )
