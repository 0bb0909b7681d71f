"""Units, schedules and what they have in common; the risk controller and β-DPO have files of their own."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from burnish.config.dynamic_beta import READ_BY, DynamicBetaSettings
from burnish.config.registry import CONTROLLERS
from burnish.errors import ConfigError
from burnish.losses.controllers import Unit, are_equal, build_controller, run_units

EVERY: dict[str, dict[str, Any]] = {
    "constant": {"type": "constant"},
    "risk, ema": {"type": "risk", "warmup": 2, "estimator": "ema"},
    "risk, window": {"type": "risk", "warmup": 2, "window": 10},
    "risk, robbins_monro": {"type": "risk", "warmup": 0, "estimator": "robbins_monro", "alpha": 0.1},
    "beta_dpo, batch": {"type": "beta_dpo"},
    "beta_dpo, instance": {"type": "beta_dpo", "level": "instance", "margin": "implicit_reward", "moments": "zero"},
    "linear": {"type": "linear", "beta_end": 0.5, "steps": 7},
    "cosine": {"type": "cosine", "beta_end": 0.02, "steps": 7},
}


def build(beta: float = 0.1, seed: int = 0, **settings: Any):
    return build_controller(DynamicBetaSettings.model_validate(settings), beta, seed)


def unit(*margins: float) -> Unit:
    return Unit(np.asarray(margins), tuple(f"row:{i}" for i in range(len(margins))))


def test_every_type_is_a_controller_with_its_settings() -> None:
    assert set(CONTROLLERS) == set(READ_BY) == {c["type"] for c in EVERY.values()}


@pytest.mark.parametrize("name", EVERY)
def test_a_state_is_json_and_goes_on_as_if_it_had_not_been_written(name: str) -> None:
    """S0-15: β, τ, pool, window and moments are all of it: a state read back gives the same numbers, every bit."""
    controller, rng = build(**EVERY[name]), np.random.default_rng(0)
    state = again = controller.initial_state()
    for _ in range(12):
        margins = rng.normal(1, 2, 6)
        before = json.dumps(again)
        found, other = controller.advance(unit(*margins), state), controller.advance(unit(*margins), again)
        assert json.dumps(again) == before, "the state that was given is not touched"
        assert np.array_equal(np.asarray(found.beta), np.asarray(other.beta)) and found.figures == other.figures
        state, again = found.state, json.loads(json.dumps(other.state))
        assert state == again
        json.dumps(controller.describe(state), allow_nan=False)


@pytest.mark.parametrize("name", EVERY)
def test_an_empty_unit_moves_nothing(name: str) -> None:
    controller = build(**EVERY[name])
    if EVERY[name]["type"] in ("risk", "beta_dpo"):
        assert controller.advance(unit(), controller.initial_state()).state == controller.initial_state()
    found = run_units(controller, None, np.zeros(0), (), controller.initial_state())
    assert found.beta.shape == (0,)


@pytest.mark.parametrize("name", EVERY)
def test_a_frozen_beta_is_a_function_of_the_state(name: str) -> None:
    controller, state = build(**EVERY[name]), build(**EVERY[name]).initial_state()
    for _ in range(5):
        state = controller.advance(unit(1.0, 2.0, 4.0), state).state
    before = json.dumps(state)
    margins = np.asarray([0.5, 3.0])
    beta = controller.find_current(margins if controller.per_pair else None, state)
    assert json.dumps(state) == before
    if controller.per_pair:
        assert np.asarray(beta).shape == (2,)
    else:
        assert beta == state["beta"]


def test_linear_and_cosine_by_their_formulas() -> None:
    linear, cosine = build(**EVERY["linear"]), build(**EVERY["cosine"])
    a, b = linear.initial_state(), cosine.initial_state()
    for t in range(12):
        part = min(t / 7, 1)
        first, second = linear.advance(unit(1.0), a), cosine.advance(unit(1.0), b)
        assert first.beta == pytest.approx(0.1 + 0.4 * part, rel=1e-12)
        assert second.beta == pytest.approx(0.02 + 0.08 * (1 + math.cos(math.pi * part)) / 2, rel=1e-12)
        a, b = first.state, second.state
    assert (a["beta"], b["beta"]) == (0.5, 0.02)


def test_s0_11_units_are_consecutive_pairs_and_the_rest_is_the_last_one() -> None:
    """S0-11: the unit is explicit; each unit moves the controller once, and uses the β from before it."""
    settings = {"type": "risk", "warmup": 0, "estimator": "robbins_monro", "alpha": 0.1, "unit": {"pairs": 3}}
    controller, margins = build(**settings), np.asarray([3.0, -1.0, 2.0, 5.0, 1.0, 0.5, 4.0])
    found = run_units(controller, 3, margins, [f"row:{i}" for i in range(7)], controller.initial_state())
    state, expected = controller.initial_state(), []
    for part in (margins[:3], margins[3:6], margins[6:]):
        step = controller.advance(unit(*part), state)
        expected += [step.beta] * len(part)
        state = step.state
    assert found.units == 3 and found.state == state and found.state["units"] == 3
    assert found.beta.tolist() == expected and len(set(expected)) == 3
    whole = run_units(controller, None, margins, [f"row:{i}" for i in range(7)], controller.initial_state())
    assert whole.units == 1 and set(whole.beta.tolist()) == {0.1}


def test_what_counts_as_equal() -> None:
    assert are_equal(np.full(4, 1.25)) and are_equal(np.zeros(1)) and are_equal(np.asarray([9e-6, -9e-6]))
    assert not are_equal(np.ones(1)) and not are_equal(np.asarray([1.0, 1.0001]))


def test_contradictions_are_refused_by_the_controller_too() -> None:
    """Settings made in Python do not pass through a recipe's checks."""
    with pytest.raises(ConfigError, match="keep has no effect with type risk") as caught:
        build(type="risk", keep=0.5)
    assert caught.value.remedy == "set type: beta_dpo, or remove it"
    with pytest.raises(ConfigError, match="steps is missing"):
        build(type="linear", beta_end=0.1)
