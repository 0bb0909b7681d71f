"""What the kinds declare without torch is what their methods do: figures, readings of a reference, coupling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from burnish.config.needs import find_needs, is_among, list_metrics
from burnish.config.registry import KINDS, find_method_spec
from burnish.config.stages import DpoSettings, RewardSettings
from burnish.core.batch import build_packed_batch
from burnish.core.group import Group
from burnish.engine.method import arrange_groups, build_initial_state
from burnish.engine.observe import Observed
from burnish.methods.dpo import Dpo
from burnish.methods.reward import Reward
from tests.losses.drawn import REGISTRY
from tests.methods.test_laws import METHODS, attach, build_groups, draw_outputs

TRAINED = [kind for kind, spec in KINDS.items() if spec.trains]
FURTHER = {
    "centred": Reward(RewardSettings(center_rewards_coefficient=0.1)),
    "weighted": Dpo(DpoSettings(use_weighting=True, reward_model="./scorer")),
    "mixed": Dpo(DpoSettings(loss_type=["sigmoid", "tdpo1", "ipo"])),
}
MOVING: list[dict[str, Any]] = [
    {"type": "risk", "warmup": 0},
    {"type": "beta_dpo"},
    {"type": "linear", "beta_end": 0.2, "steps": 3},
]


def build_step(method: Any) -> tuple[Any, Any]:
    """(outputs, table) of some groups of the kind's shape, without gradients."""
    pairs = find_method_spec(method.settings.kind).rows == "pair"
    groups: list[Group] = attach(arrange_groups(method, build_groups(2 if pairs else 1, seed=3)), -3.5)
    for group in groups:
        group.columns["reward_margin"] = 1.0
    batch = build_packed_batch(groups)
    outputs = draw_outputs(method, batch, 5)
    return outputs, batch.table


def find_written(method: Any) -> set[str]:
    """Names of the figures of a loss, and of its terms where these are logged."""
    outputs, table = build_step(method)
    result = method.compute_loss(outputs, table, build_initial_state(method))
    terms = {f"loss/{term.name}" for term in result.terms} if len(result.terms) > 1 else set()
    return {"loss", *terms, *(metric.name for metric in result.metrics)}


@pytest.mark.parametrize("kind", TRAINED)
def test_a_kind_declares_exactly_the_figures_that_its_losses_write(kind: str) -> None:
    methods = [m for n, m in {**{n: METHODS[n] for n in REGISTRY}, **FURTHER}.items() if m.settings.kind == kind]
    assert methods
    written: set[str] = set()
    declared: set[str] = set()
    for method in methods:
        found, known = find_written(method), list_metrics(method.settings)
        assert known is not None and all(is_among(name, known) for name in found), (kind, found, known)
        written |= found
        declared |= set(known)
    assert declared <= written, "it declares figures that nothing writes"
    name, greater = find_method_spec(kind).best_metric
    assert is_among(name.removeprefix("eval_"), sorted(declared)) and isinstance(greater, bool)


@pytest.mark.parametrize("section", [None, *MOVING], ids=lambda s: s["type"] if s else "constant")
def test_figures_of_training_steps_are_declared(section: dict[str, Any] | None) -> None:
    method = Dpo(DpoSettings.model_validate({"dynamic_beta": section}))
    outputs, table = build_step(method)
    state = build_initial_state(method)
    for step in range(1, 4):
        state = method.state.advance(outputs, table, state) if method.state is not None else state
        values = {n: v.detach().numpy().astype(np.float64) for n, v in method.observer.observe(outputs, table).items()}
        figures = method.observer.describe(Observed(step, tuple(table.group_ids), values, {"loss": 1.0}), state).figures
        declared = find_method_spec("dpo").step_metrics
        assert figures and all(is_among(name, declared) for name in figures), figures


@pytest.mark.parametrize("name", REGISTRY)
def test_needs_are_what_the_method_reads(name: str) -> None:
    """An independent look: a functional that is compared with the reference needs its logits; so says the entry's `live`."""
    method = METHODS[name]
    needs = find_needs(method.settings)
    assert (needs.reference, needs.coupled) == (method.reference, method.coupled)
    assert ("logits" in needs.reference) == any(f.needs_against for f in method.functionals)
    if "logprobs" in needs.reference:
        outputs, table = build_step(method)
        table.token_columns.clear()
        with pytest.raises(ValueError, match="ref_logprobs"):
            method.compute_loss(outputs, table, build_initial_state(method))


@pytest.mark.parametrize(
    ("section", "coupled"),
    [
        ({"type": "risk"}, False),
        ({"type": "risk", "unit": {"pairs": 4}}, True),
        ({"type": "risk", "unit": {"pairs": 4}, "alpha": 0.0}, False),
        ({"type": "beta_dpo"}, True),
        ({"type": "beta_dpo", "alpha": 0.0, "keep": 1.0, "unit": {"pairs": 4}}, False),
        ({"type": "beta_dpo", "alpha": 0.0}, True),
        ({"type": "cosine", "beta_end": 0.2, "steps": 3}, False),
    ],
)
def test_a_moving_beta_couples_where_it_looks_at_its_own_step(section: dict[str, Any], coupled: bool) -> None:
    """And where it is not said to couple, a pair's loss indeed depends on no other pair."""
    method = Dpo(DpoSettings.model_validate({"dynamic_beta": section}))
    assert find_needs(method.settings).coupled is coupled is method.coupled
    outputs, table = build_step(method)
    state = build_initial_state(method)
    pairs = method.compute_pairs(outputs, table)
    apart = [method.control.find(pairs.margin[i : i + 1], table.group_ids[i : i + 1], state) for i in range(3)]
    together = method.control.find(pairs.margin, table.group_ids, state)
    if not coupled:
        assert together.kept is None
        betas = torch.as_tensor(0.0 if together.beta is None else together.beta).expand(3)
        for i, each in enumerate(apart):
            assert torch.equal(torch.as_tensor(0.0 if each.beta is None else each.beta), betas[i])
