"""β-DPO: β from the margins of the batch itself, and a filter that leaves out unlikely pairs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from burnish.config.dynamic_beta import BETA_FLOOR
from burnish.losses.controllers import Advance, State, Unit, are_equal


class BetaDpo:
    """β = [1 + α(M − M_0)] β_0, at least 1e-3, M_0 and σ running moments of M; a share ρ of the pairs is trained on.

    In this order for each unit of n pairs:

    1. M_0 ← m M_0 + (1−m) mean(M), σ ← m σ + (1−m) std(M) (unbiased).
    2. k = max(1, int(ρ n)) pairs are drawn without replacement, with weights exp(−½ ((M − M_0)/σ)²).
    3. batch level: one β, with M the mean over the drawn pairs; instance level: β_i with the pair's own M_i.

    M is Δ (`log_ratio`: the official code) or β_0 Δ (`implicit_reward`: the paper, section 4), so that the same α acts
    1/β_0 times as strongly in the code.

    Source: Wu et al. 2024 (arXiv 2407.08639) and its official code. Differs from the code: the moments begin at the first
    unit's (`moments: zero` begins as the code does); evaluation does not move them; the draw is the same on all ranks. It is
    the top k of log weight + Gumbel noise (Efraimidis & Spirakis 2006: the same distribution as drawing one by one), with
    noise from a hash of (seed, unit, pair): weights are never exponentiated, so pairs far out cannot exhaust the draw, and
    without any spread (policy = reference) all weights are equal. A unit whose margins are all equal keeps all its pairs and
    moves nothing.

    Args:
        beta: β_0 ≥ 1e-3. level: batch or instance. margin: log_ratio or implicit_reward.
        alpha: α. momentum: m. keep: ρ. moments: first or zero.
        seed: Of the draw.
    """

    def __init__(
        self,
        beta: float,
        *,
        level: Literal["batch", "instance"],
        margin: Literal["log_ratio", "implicit_reward"],
        alpha: float,
        momentum: float,
        keep: float,
        moments: Literal["first", "zero"],
        seed: int = 0,
    ) -> None:
        self.beta, self.level, self.alpha, self.momentum, self.keep = beta, level, alpha, momentum, keep
        self.scale = beta if margin == "implicit_reward" else 1.0
        self.moments, self.seed = moments, seed
        self.per_pair = level == "instance" and alpha > 0

    def initial_state(self) -> State:
        """beta of the last unit, units seen, running mean and std of M (null before the first unit)."""
        start = 0.0 if self.moments == "zero" else None
        return {"beta": self.beta, "units": 0, "mean": start, "std": start}

    def find_current(self, margins: np.ndarray | None, state: Mapping[str, Any]) -> float | np.ndarray:
        """Batch level: the last unit's β. Instance level: β_i with M_0 as it stands."""
        if not self.per_pair or margins is None or state["mean"] is None:
            return state["beta"]
        return self._find_beta(self.scale * margins, state["mean"])

    def describe(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return {"beta": state["beta"], "M_0": state["mean"], "sigma": state["std"], "units": state["units"]}

    def advance(self, unit: Unit, state: Mapping[str, Any]) -> Advance:
        """See the class."""
        after: State = {**state, "units": state["units"] + 1}
        n = unit.margins.shape[0]
        if n == 0:
            return Advance(state["beta"], dict(state))
        if are_equal(unit.margins):
            current = self.find_current(unit.margins, state)
            return Advance(current, after, kept=np.arange(n) if self.keep < 1 else None, held=True)
        margins = self.scale * unit.margins
        mean = after["mean"] = self._average(state["mean"], float(margins.mean()))
        std = after["std"] = self._average(state["std"], float(margins.std(ddof=1))) if n > 1 else state["std"]
        kept = self._draw(margins, mean, std, unit.ids, state["units"]) if self.keep < 1 else None
        chosen = margins if kept is None else margins[kept]
        batch = float(self._find_beta(np.asarray(chosen.mean()), mean))
        beta = batch if self.level == "batch" else self._find_beta(margins, mean)
        after["beta"] = batch
        figures = {"beta_dpo/mean": mean, "beta_dpo/kept_share": chosen.shape[0] / n}
        if std is not None:
            figures["beta_dpo/std"] = std
        return Advance(beta, after, kept, figures)

    def _average(self, past: float | None, new: float) -> float:
        return new if past is None else self.momentum * past + (1 - self.momentum) * new

    def _find_beta(self, margins: np.ndarray, mean: float) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # infinite margins: the engine refuses the step and names the rows
            return np.maximum((1 + self.alpha * (margins - mean)) * self.beta, BETA_FLOOR)

    def _draw(self, margins: np.ndarray, mean: float, std: float | None, ids: tuple[str, ...], unit: int) -> np.ndarray:
        """(k,) rising rows; ties go to the earlier pair."""
        k = max(1, int(self.keep * margins.shape[0] + 1e-9))
        with np.errstate(invalid="ignore"):  # infinite margins, as above
            weights = np.zeros_like(margins) if not std else -0.5 * ((margins - mean) / std) ** 2
        noise = np.asarray([draw_gumbel(self.seed, unit, name) for name in ids])
        return np.sort(np.argsort(-(weights + noise), kind="stable")[:k])


def draw_gumbel(seed: int, unit: int, name: str) -> float:
    """Gumbel noise that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"{seed}:beta_dpo:{unit}:{name}".encode(), digest_size=8).digest()
    uniform = ((int.from_bytes(digest, "little") >> 11) + 0.5) / 2.0**53
    return -math.log(-math.log(uniform))
