"""Between a method and the controller of its β: margins out of tensors, β into them, state in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.config.dynamic_beta import DynamicBetaSettings
from burnish.core.batch import move
from burnish.errors import ConfigError
from burnish.losses.controllers import StepBetas, build_controller, run_units
from burnish.losses.mix import LossType

KEY = "dynamic_beta"  # of the controller's part in the method's state


@dataclass(frozen=True, slots=True)
class Betas:
    """β for some pairs.

    Attributes:
        beta: One number, or (G,); None: the stage's own.
        kept: (k,) int64 rows that are trained on; None = all.
    """

    beta: float | Tensor | None = None
    kept: Tensor | None = None

    @property
    def changed(self) -> dict[str, Any]:
        """For `LossType.compute`: the setting that is not the stage's."""
        return {} if self.beta is None else {"beta": self.beta}

    def take(self, losses: Tensor) -> Tensor:
        """(G,) losses → (k,) of those that count."""
        return losses if self.kept is None else losses.index_select(0, self.kept)


class BetaControl:
    """The β of a method that compares pairs.

    Attributes:
        stateful: β has a state that moves with each step.
        coupled: β of a pair depends on other pairs of its step: the engine takes the two-pass route.
    """

    def __init__(self, settings: DynamicBetaSettings | None, beta: float, seed: int) -> None:
        settings = settings or DynamicBetaSettings()
        self.type, self.beta, self.size = settings.type, beta, settings.unit_pairs
        self.controller = build_controller(settings, beta, seed)
        self.stateful = settings.type != "constant"
        self.coupled = settings.coupled

    def check_losses(self, mix: Sequence[LossType]) -> None:
        """Refuse a moving β beside losses that it does not fit.

        Raises:
            ConfigError: No loss type reads beta, one moves beta itself, or one compares no pairs while β may differ
                between them.
        """
        if self.stateful and any(t.name == "epsilon" for t in mix):
            raise ConfigError(
                f"dynamic_beta is {self.type}, but loss type epsilon moves beta by itself",
                where="dynamic_beta",
                remedy="remove dynamic_beta, or choose another loss_type",
            )
        apart = [t.name for t in mix if not t.entry.aligned]
        if self.coupled and apart:
            raise ConfigError(
                f"dynamic_beta gives pairs a beta of their own, but {', '.join(apart)} compares sorted answers, not pairs",
                where="dynamic_beta",
                remedy="use type: risk with unit: step, or another loss_type",
            )
        if self.stateful and not any("beta" in loss_type.settings for loss_type in mix):
            raise ConfigError(
                f"dynamic_beta is {self.type}, but {', '.join(t.name for t in mix)} reads no beta",
                where="dynamic_beta",
                remedy="remove dynamic_beta, or choose a loss_type with a beta",
            )

    def initial_state(self) -> dict[str, Any]:
        """The controller's part of the method's state; nothing for a constant β."""
        return {KEY: {**self.controller.initial_state(), "step": {}}} if self.stateful else {}

    def find(self, margins: Tensor, ids: Sequence[str], state: Mapping[str, Any], *, evaluating: bool = False) -> Betas:
        """β for some pairs: of the whole step if `coupled`, else of any part of it. Never moves the state.

        Args:
            margins: (G,) M, in data order if `coupled`; carries no gradient into β.
            ids: The pairs' names.
            state: The method's state.
            evaluating: β is the one of the moment, and every pair counts.
        """
        if not self.stateful:
            return Betas()
        if self.coupled and not evaluating:
            found = self._run(read_margins(margins), ids, state)
            kept = None if found.kept is None else move(torch.from_numpy(found.kept), margins.device)
            return Betas(_place(found.beta, margins), kept)
        seen = read_margins(margins) if self.controller.per_pair else None
        beta = self.controller.find_current(seen, state[KEY])
        return Betas(_place(beta, margins) if isinstance(beta, np.ndarray) else float(beta))

    def next_state(self, margins: Tensor, ids: Sequence[str], state: Mapping[str, Any]) -> dict[str, Any]:
        """The controller's part of the state after a step, with what the step's record says of it as "step"."""
        if not self.stateful:
            return {}
        found = self._run(read_margins(margins), ids, state)
        beta = found.beta if self.coupled else np.full(len(ids), state[KEY]["beta"])
        step = {
            "beta_used": float(beta.mean()) if len(ids) else None,
            "beta_range": [float(beta.min()), float(beta.max())] if len(ids) else None,
            "kept": len(ids) if found.kept is None else int(found.kept.shape[0]),
            "units": found.units,
            "held": found.held,
            "figures": found.figures,
        }
        return {KEY: {**found.state, "step": step}}

    def describe(self, state: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
        """(figures for the metrics, fields for the step's record) of the step that led to `state`."""
        if not self.stateful:
            return {}, {"beta_used": self.beta}
        now = dict(state[KEY])
        step = now["step"]
        fields = {k: step[k] for k in ("beta_used", "beta_range", "kept", "units", "held")}
        controller = {"type": self.type, **self.controller.describe(now)}
        return {"dpo/beta": step["beta_used"], **step["figures"]}, {
            **fields,
            **step["figures"],
            "controller": controller,
        }

    def _run(self, margins: np.ndarray, ids: Sequence[str], state: Mapping[str, Any]) -> StepBetas:
        inner = {k: v for k, v in state[KEY].items() if k != "step"}
        return run_units(self.controller, self.size, margins, ids, inner)


def _place(beta: np.ndarray, margins: Tensor) -> Tensor:
    """β on the margins' device and in their type; nothing waits for the copy."""
    return move(torch.from_numpy(beta).to(margins.dtype), margins.device)


def read_margins(margins: Tensor) -> np.ndarray:
    """(G,) on the host, float64; waits for the device."""
    return margins.detach().to("cpu", torch.float64).numpy()
