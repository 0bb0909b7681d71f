"""Random pairs and every registered loss type, for tests that run over the whole registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args

import numpy as np
import pytest
import torch

from burnish.config.registry import KINDS, LOSS_TYPES, load_object
from burnish.losses.mix import LossType
from burnish.losses.pairs import PairLoss, Pairs

LEAVES = ("chosen", "rejected", "chosen_ratio", "rejected_ratio")
STILL = {"rewards": 10, "mean": 0.2, "factor": 1.0}
DIVERGENCES = ("sequential_kl", "risk_0.95")
PERTURBED = ("logprobs_+0.01", "logprobs_-0.01")  # equal here: no pair's log-ratio is monotonous, so no β moves
TENSORS = tuple(f.name for f in fields(Pairs) if f.name != "sums")


@dataclass(frozen=True)
class Case:
    """A loss type of a kind with some settings."""

    kind: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.kind, self.name, *(f"{k}={v}" for k, v in self.settings.items())])

    @property
    def entry(self) -> Any:
        return LOSS_TYPES[self.kind][self.name]

    def reads(self, name: str) -> bool:
        return name in self.entry.settings

    def build(self, **settings: Any) -> LossType:
        """The loss type with β = 0.3 (where it reads one) and these settings."""
        method = build_method(self, **({"beta": 0.3} | settings))
        return next(t for t in method.mix if t.name == self.name)

    def compute(self, pairs: Pairs, **changed: Any) -> PairLoss:
        """Its loss of some pairs; BCO's shift and epsilon's β stand still, so that it is a function of the pairs."""
        return self.build().compute(pairs, STILL if self.entry.state else None, evaluating=True, **changed)


def build_method(case: Case, **settings: Any) -> Any:
    """The method of a case; settings that its loss does not read are left out."""
    cls = load_object(KINDS[case.kind].settings)
    chosen = {"loss_type": case.name} if "loss_type" in cls.model_fields else {}
    read = {k: v for k, v in settings.items() if case.reads(k)}
    return load_object(KINDS[case.kind].runner)(cls(**(chosen | read | case.settings)))


def find_loss_types(kind: str) -> list[str]:
    """The loss types of a kind; one without a name where there is nothing to choose, none where nothing is trained."""
    if not KINDS[kind].trains:
        return []
    field = load_object(KINDS[kind].settings).model_fields.get("loss_type")
    choice = [] if field is None else [name for name in get_args(field.annotation) if isinstance(name, str)]
    return choice or list(LOSS_TYPES.get(kind, {})) or [""]


REGISTERED = [Case(kind, name) for kind, types in LOSS_TYPES.items() for name in types]
# Every loss that can be trained, by kind and loss type: of the registry, and of kinds that are no losses on pairs.
REGISTRY = [" ".join(filter(None, [kind, name])) for kind in KINDS for name in find_loss_types(kind)]
VARIANTS = [
    Case("dpo", "sigmoid", {"label_smoothing": 0.2}),
    Case("dpo", "sigmoid_norm", {"label_smoothing": 0.2}),
    Case("dpo", "sigmoid", {"f_divergence_type": "forward_kl"}),
    Case("dpo", "ipo", {"f_divergence_type": "js_divergence"}),
    Case("dpo", "exo_pair", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7}),
    Case("dpo", "aot", {"label_smoothing": 0.2}),
    Case("cpo", "sigmoid", {"label_smoothing": 0.2}),
    Case("simpo", "simpo", {"label_smoothing": 0.2}),
]
CASES = [*REGISTERED, *VARIANTS]


def over(cases: list[Case]) -> Any:
    """A parametrised test over cases."""
    return pytest.mark.parametrize("case", cases, ids=str)


def draw_pairs(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Pairs:
    """n pairs with leaves; sums of log-probs are negative, ratios are not."""
    rng = np.random.default_rng(seed)
    sums = [torch.from_numpy(-0.5 - np.abs(rng.normal(0, 8, n))).to(dtype).requires_grad_() for _ in range(2)]
    ratios = [torch.from_numpy(rng.normal(0, 4, n)).to(dtype).requires_grad_() for _ in range(2)]
    lengths = [torch.from_numpy(rng.integers(1, 30, n)).to(dtype) for _ in range(2)]
    gap = torch.from_numpy(rng.normal(0, 5, n)).to(dtype)
    return Pairs(*sums, *ratios, *lengths, gap, draw_sums(n, rng, dtype))


def draw_sums(n: int, rng: np.random.Generator, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Sums of every functional that a registered loss reads."""
    found = {}
    for name in DIVERGENCES:
        found[name] = tuple(torch.from_numpy(np.abs(rng.normal(0, 1, n))).to(dtype) for _ in range(2))
    same = tuple(torch.from_numpy(rng.normal(-9, 2, n)).to(dtype) for _ in range(2))
    return found | dict.fromkeys(PERTURBED, same)


def build_sums(like: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The same for a policy that equals its reference: 0."""
    zero = torch.zeros_like(like.detach())
    return dict.fromkeys((*DIVERGENCES, *PERTURBED), (zero, zero))


def build_start(chosen: torch.Tensor, rejected: torch.Tensor, lengths: tuple[float, float] = (7, 3)) -> Pairs:
    """Pairs of a policy that equals its reference, whose gradient still reaches the sums."""
    ones = torch.ones_like(chosen.detach())
    gap = (chosen - rejected).detach()
    ratios = (chosen - chosen.detach(), rejected - rejected.detach())
    return Pairs(chosen, rejected, *ratios, lengths[0] * ones, lengths[1] * ones, gap, build_sums(gap))


def take(pairs: Pairs, rows: Any) -> Pairs:
    return change(lambda x: x[rows], pairs)


def change(function: Callable[..., torch.Tensor], *pairs: Pairs) -> Pairs:
    """Pairs whose every tensor is the function of those of some pairs."""
    sums = {name: tuple(function(*(p.sums[name][side] for p in pairs)) for side in (0, 1)) for name in pairs[0].sums}
    return Pairs(*(function(*(getattr(p, name) for p in pairs)) for name in TENSORS), sums)  # type: ignore[arg-type]


def swap(pairs: Pairs) -> Pairs:
    """Chosen and rejected exchanged."""
    p = pairs
    return Pairs(
        p.rejected,
        p.chosen,
        p.rejected_ratio,
        p.chosen_ratio,
        p.rejected_tokens,
        p.chosen_tokens,
        -p.reference_gap,
        {name: (rejected, chosen) for name, (chosen, rejected) in p.sums.items()},
    )


def detach(pairs: Pairs) -> Pairs:
    return change(lambda x: x.detach(), pairs)


def as_numpy(pairs: Pairs) -> Mapping[str, np.ndarray]:
    """Fields as fp64 arrays; of a functional, the rejected answer's sum less the chosen one's."""
    found = {name: getattr(pairs, name).detach().double().numpy() for name in TENSORS}
    return found | {name: (r - c).detach().double().numpy() for name, (c, r) in pairs.sums.items()}
