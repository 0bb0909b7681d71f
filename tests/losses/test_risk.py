"""The quantile controller against its formulas written out again, without numpy, and against stationary noise."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from burnish.losses.controllers import run_units
from tests.losses.test_controllers import build, unit

ESTIMATORS = ("ema", "window", "robbins_monro")
DELTA, RATE, GAMMA, ALPHA, LOW, HIGH, WARMUP, WINDOW, ETA = 0.15, 0.2, 1.5, 0.05, 0.05, 0.4, 12, 40, 0.7


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def simulate(estimator: str, units: list[list[float]]) -> list[dict[str, float | None]]:
    """The controller step by step in plain Python: what each unit used and found."""
    beta, tau, pool, seen = 0.1, 0.0, [], []
    mean = spread = 0.0
    out: list[dict[str, float | None]] = []
    for t, margins in enumerate(units):
        n = len(margins)
        if t < WARMUP:
            pool += margins
            out.append({"beta": beta, "tau": None, "p_hat": None, "u_k": None, "s_k": None})
            if t == WARMUP - 1:
                tau = quantile(pool, 1 - DELTA)
                seen = pool[-WINDOW:]
                mean = sum(pool) / len(pool)
                spread = sum((m - mean) ** 2 for m in pool) / len(pool)
            continue
        if estimator == "ema":
            tau = (1 - RATE) * tau + RATE * quantile(margins, 1 - DELTA)
        if estimator == "window":
            tau = quantile(seen, 1 - DELTA)
        p_hat = sum(m >= tau for m in margins) / n
        u = (p_hat - DELTA) / math.sqrt(DELTA * (1 - DELTA) / n)
        s = math.tanh(GAMMA * u)
        out.append({"beta": beta, "tau": tau, "p_hat": p_hat, "u_k": u, "s_k": s})
        beta = min(max(beta * math.exp(ALPHA * s), LOW), HIGH)
        seen = (seen + margins)[-WINDOW:]
        if estimator == "robbins_monro":
            tau += ETA * math.sqrt(spread) * (p_hat - DELTA)
            around = sum((m - mean) ** 2 for m in margins) / n
            mean += 0.1 * (sum(margins) / n - mean)
            spread += 0.1 * (around - spread)
    return [*out, {"beta": beta}]


def draw_units(count: int, seed: int = 3) -> list[list[float]]:
    """Units of 1 to 9 margins whose level and spread wander."""
    rng = random.Random(seed)
    return [
        [rng.gauss(0.01 * t * math.sin(t / 20), 1 + 0.01 * t) for _ in range(rng.randint(1, 9))] for t in range(count)
    ]


def build_risk(estimator: str, **changes):
    own = {"ema": {"ema_rate": RATE}, "window": {"window": WINDOW}, "robbins_monro": {"step_size": ETA}}[estimator]
    settings = {
        "type": "risk",
        "estimator": estimator,
        "delta": DELTA,
        "warmup": WARMUP,
        "gamma": GAMMA,
        "alpha": ALPHA,
        "beta_min": LOW,
        "beta_max": HIGH,
        **own,
    }
    return build(**{**settings, **changes})


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_s0_05_every_number_of_300_units_is_the_formula(estimator: str) -> None:
    """S0-05, S0-07: τ, p̂, u, s and β to 1e-9; the order (ema moves first, then compares); a unit uses β from before it."""
    units = draw_units(300)
    expected = simulate(estimator, units)
    controller = build_risk(estimator)
    state = controller.initial_state()
    for margins, wanted in zip(units, expected, strict=False):
        found = controller.advance(unit(*margins), state)
        assert found.beta == pytest.approx(wanted["beta"], abs=1e-9)
        if wanted["tau"] is None:
            assert found.figures == {}
        else:
            for name in ("tau", "p_hat", "u_k", "s_k"):
                assert found.figures[f"risk/{name}"] == pytest.approx(wanted[name], abs=1e-9), name
            assert found.figures["risk/fail"] == float(wanted["p_hat"] > DELTA)
        state = found.state
    assert state["beta"] == pytest.approx(expected[-1]["beta"], abs=1e-9)
    betas = [row["beta"] for row in expected]
    assert min(betas) >= LOW and max(betas) <= HIGH and len(set(betas)) > 100


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_s0_04_warm_up_keeps_beta_and_ends_with_the_quantile_of_the_pool(estimator: str) -> None:
    """S0-04: β_0 for exactly `warmup` units; τ_0 = numpy.quantile(pool, 1 − δ)."""
    controller, units = build_risk(estimator), draw_units(WARMUP + 2)
    state = controller.initial_state()
    for number, margins in enumerate(units[:WARMUP], 1):
        found = controller.advance(unit(*margins), state)
        state = found.state
        assert (found.beta, state["beta"], found.figures) == (0.1, 0.1, {})
        assert (state["tau"] is None) == (number < WARMUP)
    pool = [m for margins in units[:WARMUP] for m in margins]
    assert state["tau"] == np.quantile(pool, 1 - DELTA)
    found = controller.advance(unit(*units[WARMUP]), state)
    assert found.beta == 0.1 and found.state["beta"] != 0.1, "the first unit after it uses β_0 and moves β"


def test_s0_04_without_warm_up() -> None:
    """τ_0 = 0 of an empty pool; `window` needs one unit before it can compare."""
    ema = build_risk("ema", warmup=0).advance(unit(1.0, 2.0), build_risk("ema", warmup=0).initial_state())
    assert ema.figures["risk/tau"] == pytest.approx(RATE * quantile([1.0, 2.0], 1 - DELTA))
    controller = build_risk("window", warmup=0)
    first = controller.advance(unit(1.0, 2.0), controller.initial_state())
    assert first.figures == {} and first.beta == 0.1
    assert controller.advance(unit(0.0, 5.0), first.state).figures["risk/tau"] == quantile([1.0, 2.0], 1 - DELTA)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_s0_06_beta_stays_within_its_limits(estimator: str) -> None:
    """S0-06: limits hold under the strongest push, up and down; α = 0 never leaves β_0, every bit."""
    for margins, limit in ((unit(50.0, 51.0, 52.0), HIGH), (unit(-50.0, -51.0, -52.0), LOW)):
        controller = build_risk(estimator, alpha=1.0)
        state = controller.advance(unit(*range(20)), controller.initial_state()).state
        state |= {"units": WARMUP, "tau": 0.0, "mean": 0.0, "variance": 0.0}
        if estimator == "window":
            state["pool"] = [0.0] * WINDOW
        found = controller.advance(margins, state)
        assert found.state["beta"] == pytest.approx(limit) or LOW < found.state["beta"] < HIGH
        for _ in range(30):
            found = controller.advance(margins, {**found.state, "tau": 0.0, "pool": state["pool"]})
            assert LOW <= found.state["beta"] <= HIGH
        if estimator != "ema" or limit == LOW:
            assert found.state["beta"] == limit
    still = build_risk(estimator, alpha=0.0)
    state = still.initial_state()
    for margins in draw_units(40):
        state = still.advance(unit(*margins), state).state
        assert state["beta"] == 0.1


def test_s0_13_equal_margins_hold_the_controller() -> None:
    """S0-13: p̂ would be 1 because of ≥, and β would run to its limit; nothing but the count of units moves."""
    for estimator in ESTIMATORS:
        controller = build_risk(estimator)
        state = controller.initial_state()
        for margins in draw_units(WARMUP + 5):
            state = controller.advance(unit(*margins), state).state
        for margins in (unit(0.0, 0.0, 0.0), unit(2.5, 2.5), unit(4e-6, -4e-6), unit(0.0)):
            found = controller.advance(margins, state)
            assert found.held and found.figures == {} and found.beta == state["beta"]
            assert found.state == {**state, "units": state["units"] + 1}
        found = run_units(controller, None, np.zeros(8), ["x"] * 8, state)
        assert found.held == 1 and found.beta.tolist() == [state["beta"]] * 8


def calibrate(estimator: str, n: int, units: int, seed: int = 0, **changes) -> tuple[float, float]:
    """Mean p̂ and mean s on stationary N(0, 1) margins after a warm-up of 120 units, with the original's defaults."""
    settings = {"estimator": estimator, "delta": 0.1, "warmup": 120, "alpha": 0.0, **changes}
    controller, rng = build(type="risk", **settings), np.random.default_rng(seed)
    state, p_hat, push = controller.initial_state(), [], []
    for _ in range(units):
        found = controller.advance(unit(*rng.standard_normal(n)), state)
        state = found.state
        if found.figures:
            p_hat.append(found.figures["risk/p_hat"])
            push.append(found.figures["risk/s_k"])
    return float(np.mean(p_hat)), float(np.mean(push))


@pytest.mark.parametrize("estimator", ["window", "robbins_monro"])
def test_s0_12_calibrated_on_noise(estimator: str) -> None:
    """S0-12: 20,000 units of n = 16 stationary margins: mean p̂ within δ ± 0.01, and no push upwards."""
    p_hat, push = calibrate(estimator, 16, 20_120)
    assert p_hat == pytest.approx(0.1, abs=0.01)
    assert -0.1 < push < 0.0


@pytest.mark.parametrize(("n", "biased"), [(4, 0.208), (8, 0.151), (16, 0.127), (32, 0.114), (64, 0.107), (256, 0.102)])
def test_s0_12_ema_keeps_the_bias_of_the_original(n: int, biased: float) -> None:
    """S0-12: the original's rule, faithfully: p̂ is too high on pure noise, the more so the smaller the unit."""
    p_hat, push = calibrate("ema", n, 120 + max(600, 40_000 // n), seed=n)
    assert p_hat == pytest.approx(biased, abs=0.005)
    if n == 16:
        assert push == pytest.approx(0.19, abs=0.05)


def test_s0_05_a_margin_equal_to_the_threshold_is_above_it() -> None:
    """p̂ counts M ≥ τ."""
    controller = build_risk("robbins_monro", warmup=0)
    found = controller.advance(unit(0.0, -1.0, 1.0, -2.0), controller.initial_state())
    assert found.figures["risk/tau"] == 0.0 and found.figures["risk/p_hat"] == 0.5
