"""What margins are, and how a moving β reaches the losses."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from burnish.config.dynamic_beta import DynamicBetaSettings
from burnish.config.registry import KINDS, LOSS_TYPES, load_object
from burnish.config.stages import DpoSettings
from burnish.core.batch import Outputs, build_packed_batch
from burnish.core.group import Group
from burnish.engine.method import build_initial_state
from burnish.engine.observe import Observed
from burnish.errors import ConfigError
from burnish.losses.mix import reads
from burnish.losses.pairs import PairLoss, Pairs
from burnish.methods.dpo import Dpo
from burnish.models.policy import Policy
from tests.losses.tiny import build_model, build_pairs
from tests.methods.test_dpo import LOGPROBS, attach, figures


def dynamic(**settings: Any) -> DynamicBetaSettings:
    return DynamicBetaSettings.model_validate(settings)


def compute_logprobs(seed: int, groups: list[Group]) -> torch.Tensor:
    with torch.no_grad():
        found = Policy(build_model("lm", seed), head="lm").eval()(build_packed_batch(groups), LOGPROBS).logprobs
    assert found is not None
    return found


def find_margins(groups: list[Group], policy: torch.Tensor, reference: torch.Tensor, **settings: Any) -> np.ndarray:
    table = build_packed_batch(attach(groups, reference.numpy())).table
    return Dpo(DpoSettings(**settings)).observer.observe(Outputs(logprobs=policy), table)["margin"].numpy()


def test_s0_08_margins_are_without_beta_over_completion_tokens() -> None:
    """S0-08: Σ (log π − log π_ref) of the chosen less that of the rejected answer; β is in no margin, a masked token in none."""
    groups = build_pairs()
    policy, reference = compute_logprobs(0, groups), compute_logprobs(1, groups)
    expected, start = [], 0
    for group in groups:
        sums = []
        for c in group.completions:
            n = len(c.ids)
            sums.append(float((policy[start : start + n].double() - reference[start : start + n].double()).sum()))
            start += n
        expected.append(sums[0] - sums[1])
    assert start == len(policy), "no prompt token has a log-prob"
    for beta in (0.1, 5.0):
        assert find_margins(groups, policy, reference, beta=beta) == pytest.approx(expected, rel=1e-5)
    chosen = groups[0].completions[0]
    masked = replace(chosen, mask=np.asarray([True, False, True, True]))
    shorter = [replace(groups[0], completions=(masked, groups[0].completions[1])), *groups[1:]]
    batch = build_packed_batch(shorter)
    assert len(batch.target_ids) == len(policy) - 1


def test_s0_09_the_prompt_is_part_of_the_sequence() -> None:
    """S0-09: another prompt, another margin, also for answers of one token, and whatever the prompt's length."""
    groups = build_pairs()
    short = [
        replace(g, completions=tuple(replace(c, ids=c.ids[:1], mask=c.mask[:1]) for c in g.completions)) for g in groups
    ]
    for rows in (groups, short):
        moved = [replace(g, prompt=np.concatenate([g.prompt[:-1], [77]]).astype(np.int32)) for g in rows]
        first = find_margins(rows, compute_logprobs(0, rows), compute_logprobs(1, rows))
        second = find_margins(moved, compute_logprobs(0, moved), compute_logprobs(1, moved))
        assert np.all(np.abs(first - second) > 1e-3)
        assert np.all(np.abs(first) > 1e-3), "no pair has a margin of 0 once policy and reference differ"


def test_s0_09_margins_are_zero_exactly_while_policy_and_reference_are_one() -> None:
    groups = build_pairs()
    same = compute_logprobs(0, groups)
    assert find_margins(groups, same, same).tolist() == [0.0] * 5
    method = Dpo(DpoSettings())
    record = method.observer.describe(Observed(1, ("a",) * 5, {**_zeros(5)}, {"loss": 0.7}), {})
    assert record.figures["margins/zero_share"] == 1.0 and record.row and record.row["zero_frac"] == 1.0
    assert not record.warnings, "at the first steps this is as it should be"
    assert "zero margins" in method.observer.describe(Observed(11, ("a",) * 5, _zeros(5), {"loss": 0.7}), {}).warnings


def _zeros(n: int) -> dict[str, np.ndarray]:
    names = ("margin", "chosen", "rejected", "chosen_ratio", "rejected_ratio", "chosen_tokens", "rejected_tokens")
    return {name: np.zeros(n) for name in names}


# Losses whose number g belongs to pair g alone, and whose β is not moved by themselves.
SEPARATE = [
    (kind, name)
    for kind, types in LOSS_TYPES.items()
    for name, entry in types.items()
    if not entry.coupled and not entry.functionals and entry.unit == "pair"
]


@pytest.mark.parametrize(("kind", "loss_type"), SEPARATE)
def test_every_loss_takes_one_beta_or_one_for_each_pair(kind: str, loss_type: str) -> None:
    """A tensor of equal β is the number, and each pair has its own: what the loss does with β it does pair by pair."""
    rng = np.random.default_rng(0)
    numbers = [torch.from_numpy(rng.normal(0, 3, 4)) for _ in range(2)]
    logps = [torch.from_numpy(rng.uniform(-9, -1, 4)) for _ in range(2)]
    lengths = [torch.full((4,), 5.0), torch.full((4,), 7.0)]
    pairs = Pairs(*logps, *(logps if kind in ("cpo", "simpo", "orpo") else numbers), *lengths, torch.zeros(4))
    mix = load_object(KINDS[kind].runner)(load_object(KINDS[kind].settings)(**_name(kind, loss_type))).mix
    (found,) = [t for t in mix if t.name == loss_type]
    if "beta" not in found.settings:
        pytest.skip("reads no beta")
    one = found.compute(pairs, beta=0.3).loss
    assert torch.allclose(found.compute(pairs, beta=torch.full((4,), 0.3, dtype=torch.float64)).loss, one, rtol=1e-12)
    betas = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    mixed = found.compute(pairs, beta=betas).loss
    for i, beta in enumerate(betas.tolist()):
        assert mixed[i].item() == pytest.approx(found.compute(pairs, beta=beta).loss[i].item(), rel=1e-12)


def _name(kind: str, loss_type: str) -> dict[str, str]:
    return {"loss_type": loss_type} if "loss_type" in load_object(KINDS[kind].settings).model_fields else {}


@pytest.mark.parametrize("loss_type", ["epsilon", "aot"])
def test_a_moving_beta_is_refused_where_it_does_not_fit(loss_type: str) -> None:
    with pytest.raises(ConfigError, match=loss_type):
        Dpo(DpoSettings(loss_type=loss_type, dynamic_beta=dynamic(type="beta_dpo")))


def test_a_controller_beside_a_loss_with_a_state_of_its_own() -> None:
    """BCO's running shift and the controller move together, each in its part of the state."""
    groups = build_pairs()
    policy, reference = compute_logprobs(0, groups), compute_logprobs(1, groups)
    table = build_packed_batch(attach(groups, reference.numpy())).table
    method = Dpo(DpoSettings(loss_type="bco_pair", dynamic_beta=dynamic(type="linear", beta_end=0.5, steps=1)))
    state = build_initial_state(method)
    after = method.state.advance(Outputs(logprobs=policy), table, state)
    assert after["dynamic_beta"]["beta"] == 0.5 and after["losses"] != state["losses"]
    again = method.state.advance(Outputs(logprobs=policy), table, after)
    plain = Dpo(DpoSettings(loss_type="bco_pair", beta=0.5))
    shifted = plain.state.advance(Outputs(logprobs=policy), table, {"losses": after["losses"]})
    assert again["losses"] == shifted["losses"], "the shift is measured with the β of the step"


def test_the_filter_leaves_pairs_out_of_the_loss_and_its_count() -> None:
    """S0-23: the mean is over the drawn pairs; rewards and log-probs are still those of all."""
    groups = build_pairs()
    policy, reference = compute_logprobs(0, groups), compute_logprobs(1, groups)
    method = Dpo(DpoSettings(dynamic_beta=dynamic(type="beta_dpo", keep=0.6)))
    table = build_packed_batch(attach(groups, reference.numpy())).table
    state = build_initial_state(method)
    outputs = Outputs(logprobs=policy.clone().requires_grad_())
    result = method.compute_loss(outputs, table, state)
    (term,) = result.terms
    assert method.coupled and term.count == 3.0
    after = method.state.advance(outputs, table, state)
    assert after["dynamic_beta"]["step"]["kept"] == 3
    term.sum.backward()
    assert outputs.logprobs is not None and outputs.logprobs.grad is not None
    touched = {int(g) for g in table.completion_group[table.token_completion[outputs.logprobs.grad != 0]]}
    assert len(touched) == 3
    assert all(m.count == 5.0 for m in result.metrics)
    frozen = method.compute_loss(outputs, table, after, evaluating=True)
    assert frozen.terms[0].count == 5.0, "evaluation leaves nothing out"
    beta = after["dynamic_beta"]["beta"]
    assert figures(frozen)["rewards/margins"] == pytest.approx(
        beta * float(method.observer.observe(outputs, table)["margin"].detach().mean()), rel=1e-5
    )


def test_s0_11_beta_changes_between_the_units_of_a_step() -> None:
    """S0-11: with `unit: {pairs: 2}` the loss is Σ −log σ(β_u M) with the β of each unit, made from the units before it."""
    groups = build_pairs()
    policy, reference = compute_logprobs(0, groups), compute_logprobs(1, groups)
    rule = {"type": "risk", "warmup": 0, "estimator": "robbins_monro", "alpha": 0.5, "delta": 0.2, "gamma": 1.0}
    method = Dpo(DpoSettings(beta=0.1, dynamic_beta=dynamic(unit={"pairs": 2}, **rule)))
    table = build_packed_batch(attach(groups, reference.numpy())).table
    outputs, state = Outputs(logprobs=policy), build_initial_state(method)
    margins = method.observer.observe(outputs, table)["margin"].double().tolist()
    beta, tau, spread, expected, betas = 0.1, 0.0, 0.0, 0.0, []
    for part in (margins[:2], margins[2:4]):
        expected += sum(math.log1p(math.exp(-beta * m)) for m in part)
        betas.append(beta)
        p_hat = sum(m >= tau for m in part) / len(part)
        beta *= math.exp(0.5 * math.tanh((p_hat - 0.2) / math.sqrt(0.16 / len(part))))
        if len(betas) == 1:
            spread = statistics.pstdev(part)
        tau += 0.5 * spread * (p_hat - 0.2)
    assert method.coupled and len(set(betas)) == 2
    found = method.compute_loss(outputs, table, state).terms[0].sum.item()
    expected += math.log1p(math.exp(-beta * margins[4]))
    assert found == pytest.approx(expected, rel=1e-6)
    step = method.state.advance(outputs, table, state)["dynamic_beta"]["step"]
    assert (step["units"], step["beta_range"][0] < step["beta_range"][1]) == (3, True)


def test_beta_carries_no_gradient() -> None:
    """β_i depends on M_i; the loss is differentiated as if it did not."""
    groups = build_pairs()
    policy, reference = compute_logprobs(0, groups), compute_logprobs(1, groups)
    table = build_packed_batch(attach(groups, reference.numpy())).table
    method = Dpo(DpoSettings(dynamic_beta=dynamic(type="beta_dpo", keep=1.0, level="instance", alpha=0.05)))
    leaf = policy.clone().requires_grad_()
    method.compute_loss(Outputs(logprobs=leaf), table, build_initial_state(method)).terms[0].sum.backward()
    margins = method.observer.observe(Outputs(logprobs=policy), table)["margin"].double()
    betas = torch.clamp((1 + 0.05 * (margins - margins.mean())) * 0.1, min=1e-3)
    # d/dM of −log σ(βM) with β held: −β σ(−βM); each scored token of the chosen answer carries it, of the rejected one its negative
    wanted = -betas * torch.sigmoid(-betas * margins)
    sign = 1.0 - 2.0 * table.completion_slot[table.token_completion].double()
    expected = sign * wanted[table.completion_group[table.token_completion]]
    assert leaf.grad is not None
    assert torch.allclose(leaf.grad.double(), expected, rtol=1e-5, atol=1e-8)


@reads()
def compute_flat_loss(pairs: Pairs) -> PairLoss:
    return PairLoss(pairs.chosen_ratio**2, pairs.chosen_ratio, pairs.rejected_ratio)


def test_a_moving_beta_beside_losses_without_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="reads no beta"):
        Dpo(DpoSettings(loss_type=f"{__name__}:compute_flat_loss", dynamic_beta=dynamic(type="risk")))
    Dpo(DpoSettings(loss_type=[f"{__name__}:compute_flat_loss", "sigmoid"], dynamic_beta=dynamic(type="risk")))
