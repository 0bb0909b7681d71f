"""Every registered loss against a closed form written from its paper: numpy, fp64, no code of the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from burnish.losses.anchored import RewardShift
from burnish.losses.pairs import Pairs
from tests.losses.drawn import REGISTERED, Case, as_numpy, detach, draw_pairs, over

Row = Mapping[str, Any]


def softplus(x: Any) -> Any:
    """log(1 + e^x) = −log σ(−x)."""
    return np.logaddexp(0, x)


def logistic(x: Any) -> Any:
    return np.exp(-softplus(-x))


def delta(p: Row) -> Any:
    return p["chosen_ratio"] - p["rejected_ratio"]


def mean_delta(p: Row) -> Any:
    return p["chosen_ratio"] / p["chosen_tokens"] - p["rejected_ratio"] / p["rejected_tokens"]


def mean_gap(p: Row) -> Any:
    return p["chosen"] / p["chosen_tokens"] - p["rejected"] / p["rejected_tokens"]


def smoothed(x: Any, e: float) -> Any:
    return (1 - e) * softplus(-x) + e * softplus(x)


def exo(p: Row, b: float, e: float = 1e-3) -> Any:
    q = logistic(b * delta(p))
    return q * np.log(q / (1 - e)) + (1 - q) * np.log((1 - q) / e)


def discopop(p: Row, b: float, tau: float = 0.05) -> Any:
    x = b * delta(p)
    w = logistic(x / tau)
    return (1 - w) * softplus(-x) + w * np.exp(-x)


def bco(p: Row, b: float, shift: float = 0.2) -> Any:
    return softplus(-(b * p["chosen_ratio"] - shift)) + softplus(b * p["rejected_ratio"] - shift)


def aot(p: Row, b: float) -> Any:
    policy = p["reference_gap"] + delta(p)
    return softplus(-b * (np.sort(policy) - np.sort(p["reference_gap"])))


def orpo(p: Row, b: float) -> Any:
    odds = [np.exp(p[s] / p[f"{s}_tokens"]) for s in ("chosen", "rejected")]
    odds = [x / (1 - x) for x in odds]
    return b * np.log1p(odds[1] / odds[0])


CLOSED_FORMS: dict[str, Callable[[Row, float], Any]] = {
    "dpo sigmoid": lambda p, b: softplus(-b * delta(p)),
    "dpo robust": lambda p, b: (0.9 * softplus(-b * delta(p)) - 0.1 * softplus(b * delta(p))) / 0.8,
    "dpo hinge": lambda p, b: np.maximum(0, 1 - b * delta(p)),
    "dpo ipo": lambda p, b: (mean_delta(p) - 0.5 / b) ** 2,
    "dpo sigmoid_norm": lambda p, b: softplus(-b * mean_delta(p)),
    "dpo exo_pair": exo,
    "dpo discopop": discopop,
    "dpo nca_pair": lambda p, b: (
        softplus(-b * p["chosen_ratio"])
        + 0.5 * softplus(b * p["chosen_ratio"])
        + 0.5 * softplus(b * p["rejected_ratio"])
    ),
    "dpo bco_pair": bco,
    "dpo sppo_hard": lambda p, b: (p["chosen_ratio"] - 0.5 / b) ** 2 + (p["rejected_ratio"] + 0.5 / b) ** 2,
    "dpo apo_zero": lambda p, b: 1 - logistic(b * p["chosen_ratio"]) + logistic(b * p["rejected_ratio"]),
    "dpo apo_down": lambda p, b: logistic(b * p["chosen_ratio"]) + 1 - logistic(b * delta(p)),
    "dpo aot": aot,
    "dpo aot_unpaired": lambda p, b: softplus(-b * (np.sort(p["chosen_ratio"]) - np.sort(p["rejected_ratio"]))),
    "dpo tdpo1": lambda p, b: softplus(-b * (delta(p) - p["sequential_kl"])),
    "dpo tdpo2": lambda p, b: softplus(-b * (delta(p) - 0.5 * p["sequential_kl"])),
    "dpo radpo1": lambda p, b: softplus(-b * (delta(p) - p["risk_0.95"])),
    "dpo radpo2": lambda p, b: softplus(-b * (delta(p) - 0.5 * p["risk_0.95"])),
    "dpo epsilon": lambda p, b: softplus(-b * delta(p)),  # with steps: test_epsilon.py
    "dpo sft": lambda p, b: -p["chosen"],
    "cpo sigmoid": lambda p, b: softplus(-b * (p["chosen"] - p["rejected"])),
    "cpo hinge": lambda p, b: np.maximum(0, 1 - b * (p["chosen"] - p["rejected"])),
    "cpo ipo": lambda p, b: (mean_gap(p) - 0.5 / b) ** 2,
    "simpo simpo": lambda p, b: softplus(1.0 - b * mean_gap(p)),
    "orpo orpo": orpo,
}
NEAR = {"rtol": 1e-10, "atol": 1e-12}


def test_every_registered_loss_has_a_closed_form() -> None:
    assert set(CLOSED_FORMS) == {str(case) for case in REGISTERED}


@over(REGISTERED)
@pytest.mark.parametrize("beta", [0.05, 0.3, 2.0])
def test_numpy_agrees(case: Case, beta: float) -> None:
    pairs = detach(draw_pairs(60, seed=5))
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        want = CLOSED_FORMS[str(case)](as_numpy(pairs), beta)
    inside = np.isfinite(want)  # the form as written overflows where the code does not
    assert inside.mean() > 0.9
    np.testing.assert_allclose(case.compute(pairs, beta=beta).loss.numpy()[inside], want[inside], **NEAR)


@pytest.mark.parametrize("smoothing", [0.05, 0.2, 0.4])
@pytest.mark.parametrize(
    "kind_and_name", ["dpo sigmoid", "dpo sigmoid_norm", "dpo aot", "dpo aot_unpaired", "cpo sigmoid", "simpo simpo"]
)
def test_label_smoothing(kind_and_name: str, smoothing: float) -> None:
    """(1−ε)ℓ(x) + εℓ(−x), where −x is the argument of the logistic function negated."""
    kind, name = kind_and_name.split()
    pairs = detach(draw_pairs(30, seed=6))
    p = as_numpy(pairs)
    x = {
        "dpo sigmoid": 0.3 * delta(p),
        "dpo sigmoid_norm": 0.3 * mean_delta(p),
        "cpo sigmoid": 0.3 * (p["chosen"] - p["rejected"]),
        "dpo aot": 0.3 * (np.sort(p["reference_gap"] + delta(p)) - np.sort(p["reference_gap"])),
        "dpo aot_unpaired": 0.3 * (np.sort(p["chosen_ratio"]) - np.sort(p["rejected_ratio"])),
        "simpo simpo": 0.3 * mean_gap(p) - 1.0,
    }[kind_and_name]
    found = Case(kind, name, {"label_smoothing": smoothing}).compute(pairs).loss.numpy()
    np.testing.assert_allclose(found, smoothed(x, smoothing), **NEAR)


@pytest.mark.parametrize("smoothing", [0.01, 0.3])
def test_smoothing_of_robust_and_exo(smoothing: float) -> None:
    pairs = detach(draw_pairs(30, seed=6))
    p, e = as_numpy(pairs), smoothing
    found = {n: Case("dpo", n, {"label_smoothing": e}).compute(pairs).loss.numpy() for n in ("robust", "exo_pair")}
    x = 0.3 * delta(p)
    np.testing.assert_allclose(found["robust"], ((1 - e) * softplus(-x) - e * softplus(x)) / (1 - 2 * e), **NEAR)
    np.testing.assert_allclose(found["exo_pair"], exo(p, 0.3, e), **NEAR)


def test_robust_is_unbiased_under_flipped_labels() -> None:
    """(1−ε) of the loss as labelled plus ε of the loss with the label flipped is DPO's loss of the clean label."""
    from tests.losses.drawn import swap

    pairs = detach(draw_pairs(20, seed=7))
    robust = Case("dpo", "robust", {"label_smoothing": 0.3})
    mixed = 0.7 * robust.compute(pairs).loss + 0.3 * robust.compute(swap(pairs)).loss
    torch.testing.assert_close(mixed, Case("dpo", "sigmoid").compute(pairs).loss, rtol=1e-12, atol=1e-12)


def test_discopop_is_finite_where_its_product_would_be_zero_times_infinity() -> None:
    x = torch.tensor([-2000.0, 2000.0])
    zero = torch.zeros(2)
    found = Case("dpo", "discopop").compute(Pairs(zero - 1, zero - 1, x, zero, zero + 1, zero + 1, zero))
    assert found.loss.tolist() == pytest.approx([600.0, 0.0])


def test_bco_shifts_by_the_mean_of_all_rewards_so_far() -> None:
    """Three steps by hand: δ is the mean of the rewards of this step and all before, chosen and rejected alike."""
    loss = Case("dpo", "bco_pair").build(beta=0.3)
    state, seen = loss.initial_state(), np.zeros(0)
    for step in range(3):
        pairs = detach(draw_pairs(4 + step, seed=step))
        p = as_numpy(pairs)
        seen = np.concatenate((seen, 0.3 * p["chosen_ratio"], 0.3 * p["rejected_ratio"]))
        np.testing.assert_allclose(loss.compute(pairs, state).loss.numpy(), bco(p, 0.3, seen.mean()), **NEAR)
        frozen = loss.compute(pairs, state, evaluating=True).loss.numpy()
        np.testing.assert_allclose(frozen, bco(p, 0.3, state["mean"]), **NEAR)
        state = loss.next_state(pairs, state)
        assert (state["rewards"], state["mean"]) == (seen.size, pytest.approx(seen.mean(), rel=1e-12))


def test_no_gradient_reaches_bco_s_shift() -> None:
    pairs = draw_pairs(5)
    loss = Case("dpo", "bco_pair").build(beta=0.3)
    loss.compute(pairs, RewardShift.initial()).loss.sum().backward()
    rewards = 0.3 * np.concatenate([as_numpy(pairs)[f] for f in ("chosen_ratio", "rejected_ratio")])
    want = -0.3 * (1 - logistic(rewards[:5] - rewards.mean()))
    assert pairs.chosen_ratio.grad is not None
    np.testing.assert_allclose(pairs.chosen_ratio.grad.numpy(), want, rtol=1e-12)


def test_orpo_of_an_answer_of_probability_one_is_finite() -> None:
    zero = torch.zeros(2, requires_grad=True)
    pairs = Pairs(zero, zero - 3.0, zero, zero, *(torch.ones(2) for _ in range(2)), torch.zeros(2))
    found = Case("orpo", "orpo").compute(pairs)
    found.loss.sum().backward()
    assert bool(torch.isfinite(found.loss).all()) and zero.grad is not None and bool(torch.isfinite(zero.grad).all())
    assert found.loss[0].item() == pytest.approx(0.0, abs=1e-6)


def test_orpo_keeps_its_digits_near_probability_one() -> None:
    """m = −1e−6: 1 − e^m is 1e−6, which fp32's 1 − exp(m) gets wrong in the second digit."""
    m = torch.tensor([-1e-6])
    one = torch.ones(1)
    found = Case("orpo", "orpo").compute(Pairs(m, -one, m, -one, one, one, 0 * one)).chosen_reward.item()
    assert found == pytest.approx(np.log(np.exp(-1e-6) / -np.expm1(-1e-6)), rel=1e-6)
