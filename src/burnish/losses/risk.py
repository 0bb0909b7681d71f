"""The quantile controller: β rises while more than a share δ of the margins lies above their running quantile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from burnish.losses.controllers import Advance, State, Unit, are_equal

_SPREAD_RATE = 0.1  # of the running mean and variance behind robbins_monro's scale


class Risk:
    """β_{t+1} = clip(β_t · exp(α tanh(γ u_t)), β_min, β_max), u_t = (p̂_t − δ) / √(δ(1−δ)/n), p̂_t = mean 1[M_i ≥ τ_t].

    u_t is the z-score of the share p̂_t of a unit's n margins that reach τ_t, an estimate of their (1−δ)-quantile. A unit
    uses β_t, from before it. For the first `warmup` units β stays β_0 and their margins are pooled; then
    τ_0 = quantile(pool, 1−δ), linearly interpolated (0 without a pool). Estimators, q(·) being such a quantile:

    - `ema`: τ_t = (1−λ) τ_{t−1} + λ q(M_t), before it is compared with M_t. Biased: q of a small unit lies low, and the
      unit is in τ_t, so that p̂ is above δ on stationary margins and β drifts upwards.
    - `window`: τ_t = q(the `window` margins before this unit).
    - `robbins_monro`: compared with τ_t first; then τ_{t+1} = τ_t + η s_t (p̂_t − δ), s_t the running standard deviation
      of the margins, which makes the step η free of their scale.

    Source: the "risk" test of the dynamic-DPO project that named it (`ema` is its rule; no paper is cited there);
    Robbins & Monro 1951 for the tracker. A unit whose margins are all equal moves nothing.

    Args:
        beta: β_0.
        delta: δ. warmup: units. gamma: γ. alpha: α. beta_min, beta_max: limits of β.
        estimator: ema, window or robbins_monro.
        ema_rate: λ. window: margins. step_size: η.
    """

    per_pair = False

    def __init__(
        self,
        beta: float,
        *,
        estimator: Literal["ema", "window", "robbins_monro"],
        delta: float,
        warmup: int,
        gamma: float,
        alpha: float,
        beta_min: float,
        beta_max: float,
        ema_rate: float,
        window: int,
        step_size: float,
        seed: int = 0,
    ) -> None:
        self.beta, self.estimator, self.delta, self.warmup = beta, estimator, delta, warmup
        self.gamma, self.alpha, self.beta_min, self.beta_max = gamma, alpha, beta_min, beta_max
        self.ema_rate, self.window, self.step_size = ema_rate, window, step_size

    def initial_state(self) -> State:
        """beta, units seen, tau (null until it is known), pool of margins, their running mean and variance."""
        tau = 0.0 if self.warmup == 0 and self.estimator != "window" else None
        return {"beta": self.beta, "units": 0, "tau": tau, "pool": [], "mean": None, "variance": None}

    def find_current(self, margins: np.ndarray | None, state: Mapping[str, Any]) -> float:
        return state["beta"]

    def describe(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return {k: state[k] for k in ("beta", "tau", "units")} | {"warmup": state["units"] <= self.warmup}

    def advance(self, unit: Unit, state: Mapping[str, Any]) -> Advance:
        """See the class; the first unit after the warm-up still uses β_0, and is the first that moves it."""
        beta, margins = float(state["beta"]), unit.margins
        after: State = {**state, "units": state["units"] + 1}
        if margins.shape[0] == 0:
            return Advance(beta, dict(state))
        if state["units"] < self.warmup or state["tau"] is None:
            return Advance(beta, self._pool(margins, after))
        if are_equal(margins):
            return Advance(beta, after, held=True)
        tau = self._find_tau(margins, state)
        n = margins.shape[0]
        p_hat = float(np.count_nonzero(margins >= tau)) / n
        u = (p_hat - self.delta) / math.sqrt(self.delta * (1 - self.delta) / n)
        s = math.tanh(self.gamma * u)
        after["beta"] = min(max(beta * math.exp(self.alpha * s), self.beta_min), self.beta_max)
        after["tau"] = tau
        self._follow(margins, p_hat, state, after)
        figures = {"p_hat": p_hat, "tau": tau, "fail": float(p_hat > self.delta), "u_k": u, "s_k": s}
        return Advance(beta, after, figures={f"risk/{name}": value for name, value in figures.items()})

    def _find_quantile(self, margins: Any) -> float:
        return float(np.quantile(np.asarray(margins, np.float64), 1 - self.delta))

    def _pool(self, margins: np.ndarray, after: State) -> State:
        """A unit of the warm-up; after the last one τ_0 is known, and of the pool only what the estimator needs stays."""
        pool = [*after["pool"], *margins.tolist()]
        if after["units"] < self.warmup:
            return {**after, "pool": pool}
        after = {**after, "tau": self._find_quantile(pool)}
        if self.estimator == "robbins_monro":
            after |= {"mean": float(np.mean(pool)), "variance": float(np.var(pool))}
        return {**after, "pool": pool[-self.window :] if self.estimator == "window" else []}

    def _find_tau(self, margins: np.ndarray, state: Mapping[str, Any]) -> float:
        """The τ with which this unit's margins are compared."""
        if self.estimator == "ema":
            return (1 - self.ema_rate) * state["tau"] + self.ema_rate * self._find_quantile(margins)
        return self._find_quantile(state["pool"]) if self.estimator == "window" else float(state["tau"])

    def _follow(self, margins: np.ndarray, p_hat: float, state: Mapping[str, Any], after: State) -> None:
        """Let the estimator see the unit, for the units to come."""
        if self.estimator == "window":
            after["pool"] = [*state["pool"], *margins.tolist()][-self.window :]
        if self.estimator != "robbins_monro":
            return
        if state["mean"] is None:
            after["mean"], after["variance"] = float(margins.mean()), float(margins.var())
        else:
            around = float(np.mean((margins - state["mean"]) ** 2))
            after["mean"] = state["mean"] + _SPREAD_RATE * (float(margins.mean()) - state["mean"])
            after["variance"] = state["variance"] + _SPREAD_RATE * (around - state["variance"])
        scale = math.sqrt(after["variance"] if state["variance"] is None else state["variance"])
        after["tau"] = float(state["tau"]) + self.step_size * scale * (p_hat - self.delta)
