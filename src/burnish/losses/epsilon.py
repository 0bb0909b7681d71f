"""ε-DPO: β moves with each pair, by what a slightly larger or smaller β would have done to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from burnish.core.logits import Functional
from burnish.losses.pairs import PairLoss, Pairs


def build_perturbed(epsilon: float) -> Functional:
    """log-prob of the token under logits + ε (logits − logits_ref); no gradient.

    With ε > 0 this stands for a policy trained with β/(1 + ε), with −ε for one trained with β/(1 − ε). Written as a
    difference, so that it is the policy itself, in every bit, where policy and reference agree.
    """

    def compute_perturbed(logits: Tensor, targets: Tensor, against: Tensor | None) -> Tensor:
        assert against is not None
        with torch.no_grad():
            moved = torch.lerp(logits, against.to(logits.dtype), -epsilon)
            return moved.gather(1, targets[:, None])[:, 0] - torch.logsumexp(moved, dim=-1)

    return Functional(_name(epsilon), compute_perturbed, needs_against=True)


def _name(epsilon: float) -> str:
    return f"logprobs_{epsilon:+g}"


def build_epsilon(settings: Any) -> tuple[Functional, ...]:
    """What the loss reads, for the setting `epsilon`."""
    return () if settings.epsilon == 0 else (build_perturbed(settings.epsilon), build_perturbed(-settings.epsilon))


def compute_steps(pairs: Pairs, epsilon: float) -> Tensor:
    """(G,) +1 where the pair's log-ratio g = log π(y_c) − log π(y_r) rises with ε (g⁺ > g > g⁻), −1 where it falls, else 0;
    NaN where one of the three is not finite.

    Source: ε-DPO (arXiv 2502.13177), the monotonicity of the logits in β.

    Args:
        pairs: `sums` of the functionals of `build_epsilon`.
        epsilon: 0: no pair moves.
    """
    here = (pairs.chosen - pairs.rejected).detach()
    if epsilon == 0:
        return torch.zeros_like(here)
    up, down = (chosen - rejected for chosen, rejected in (pairs.sums[_name(e)] for e in (epsilon, -epsilon)))
    rises, falls = (up > here) & (here > down), (up < here) & (here < down)
    return rises.to(here.dtype) - falls.to(here.dtype) + 0.0 * (up - down)  # a comparison with NaN is just false


def compute_epsilon_loss(pairs: Pairs, *, beta: float, epsilon: float, state: Mapping[str, Any]) -> PairLoss:
    """−log σ(β_i (a − z)) with β_i = β_t / (1 + ε·step_i): DPO with a β of each pair.

    Source: ε-DPO (arXiv 2502.13177); ε = 0.01, β = 0.01 there. ε = 0 is DPO. Differs from the authors' code: no label
    smoothing, whose two terms cancel there.

    Args:
        pairs: (G,) tensors; `sums` of the functionals of `build_epsilon`.
        beta: β of the first step.
        epsilon: ε in [0, 1).
        state: Of `RunningBeta`.
    """
    steps = compute_steps(pairs, epsilon)
    own = beta * float(state["factor"]) / (1 + epsilon * steps)
    chosen, rejected = own * pairs.chosen_ratio, own * pairs.rejected_ratio
    return PairLoss(-logsigmoid(chosen - rejected), chosen, rejected, {"beta": own, "epsilon_steps": steps})


class RunningBeta:
    """β_t as a factor of the setting `beta`: after each optimizer step β ← β / (1 + ε · mean step)."""

    @staticmethod
    def initial() -> dict[str, Any]:
        """Before the first step."""
        return {"factor": 1.0}

    @staticmethod
    def advance(pairs: Pairs, *, beta: float, epsilon: float, state: Mapping[str, Any]) -> dict[str, Any]:
        """After a step with these pairs, those of the whole optimizer step over all processes."""
        steps = compute_steps(pairs, epsilon).double()
        mean = float(steps.mean()) if len(steps) else 0.0
        return {"factor": float(state["factor"]) / (1 + epsilon * mean)}
