"""Closed forms of KTO and of its variant without a baseline: by hand, in numpy, and their laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from burnish.losses.kto import compute_apo_zero_unpaired_loss, compute_kl_baseline, compute_kto_loss

WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.75}


def draw(n: int = 9, seed: int = 0, scale: float = 6.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(ratios, labels) in fp64; both labels occur."""
    rng = np.random.default_rng(seed)
    label = torch.from_numpy((np.arange(n) % 3 != 0).astype(np.float64))
    return torch.from_numpy(rng.normal(0, scale, n)).requires_grad_(), label


def test_kto_by_hand() -> None:
    """r = 3, z = 1, β = ½: βx = 1; desirable 1 − σ(1) = 0.268941, undesirable 1 − σ(−1) = 0.731059."""
    ratio, label = torch.tensor([3.0, 3.0], dtype=torch.float64), torch.tensor([1.0, 0.0])
    loss = compute_kto_loss(ratio, label, torch.tensor(1.0), beta=0.5, desirable_weight=1.0, undesirable_weight=2.0)
    assert loss.tolist() == pytest.approx([0.2689414213699951, 2 * 0.7310585786300049], rel=1e-14)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.3])
def test_kto_equals_its_closed_form(beta: float) -> None:
    """Ethayarajh et al., eq. 8: λ_y − v with v = λ σ(±β(r − z)), written with exp alone."""
    ratio, label = draw()
    z = 0.8
    loss = compute_kto_loss(ratio, label, torch.tensor(z, dtype=torch.float64), beta=beta, **WEIGHTS)
    for got, r, y in zip(loss.tolist(), ratio.tolist(), label.tolist(), strict=True):
        x = beta * (r - z) if y else beta * (z - r)
        value = 1 / (1 + np.exp(-x))
        weight = 1.5 if y else 0.75
        assert got == pytest.approx(weight - weight * value, rel=1e-10)


def test_apo_zero_unpaired_equals_its_closed_form() -> None:
    ratio, label = draw()
    loss = compute_apo_zero_unpaired_loss(ratio, label, beta=0.3, **WEIGHTS)
    r, good = ratio.detach().numpy(), label.numpy() > 0
    up = np.exp(0.3 * r) / (1 + np.exp(0.3 * r))
    want = np.where(good, 1.5 * (1 - up), 0.75 * up)
    np.testing.assert_allclose(loss.detach().numpy(), want, rtol=1e-10)


def test_the_baseline_is_a_mean_cut_at_zero_without_gradient() -> None:
    partners = torch.tensor([1.0, -4.0, 6.0], dtype=torch.float64, requires_grad=True)
    found = compute_kl_baseline(partners)
    assert found.item() == 1.0 and not found.requires_grad
    assert compute_kl_baseline(partners - 2).item() == 0.0
    assert compute_kl_baseline(partners[:0]).item() == 0.0
    assert compute_kl_baseline(torch.tensor([1.0, float("nan")])).isnan(), "T-11: a NaN is not skipped"


def test_gradcheck() -> None:
    ratio, label = draw(6, seed=3, scale=2.0)
    baseline = torch.tensor(0.4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda r: compute_kto_loss(r, label, baseline, beta=0.7, **WEIGHTS), ratio)
    assert torch.autograd.gradcheck(lambda r: compute_apo_zero_unpaired_loss(r, label, beta=0.7, **WEIGHTS), ratio)


def test_good_rows_are_lifted_and_bad_rows_lowered() -> None:
    for loss in (
        lambda r, y: compute_kto_loss(r, y, torch.tensor(0.3), beta=0.1, **WEIGHTS),
        lambda r, y: compute_apo_zero_unpaired_loss(r, y, beta=0.1, **WEIGHTS),
    ):
        ratio, label = draw()
        loss(ratio, label).sum().backward()
        assert ratio.grad is not None
        assert bool(((ratio.grad < 0) == (label > 0.5)).all()) and bool((ratio.grad != 0).all())


def test_swapping_a_label_mirrors_the_loss_around_its_middle() -> None:
    ratio, label = draw()
    baseline = torch.tensor(0.3, dtype=torch.float64)
    plain = {"beta": 0.2, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    for loss in (
        lambda y: compute_kto_loss(ratio, y, baseline, **plain),
        lambda y: compute_apo_zero_unpaired_loss(ratio, y, **plain),
    ):
        torch.testing.assert_close(loss(label) + loss(1 - label), torch.ones_like(ratio), rtol=0, atol=1e-14)


def test_any_split_adds_up_once_the_baseline_is_known() -> None:
    """Rows are coupled by the baseline alone; no rows are a sum of 0 with a graph."""
    ratio, label = draw()
    for loss in (
        lambda s: compute_kto_loss(ratio[s], label[s], torch.tensor(0.3), beta=0.2, **WEIGHTS),
        lambda s: compute_apo_zero_unpaired_loss(ratio[s], label[s], beta=0.2, **WEIGHTS),
    ):
        parts = torch.stack([loss(slice(a, b)).sum() for a, b in ((0, 2), (2, 2), (2, 9))]).sum()
        whole = loss(slice(None)).sum()
        assert parts.item() == pytest.approx(whole.item(), rel=1e-13)
        (one,), (other,) = (torch.autograd.grad(x, ratio) for x in (whole, parts))
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0)
        nothing = loss(slice(0, 0)).sum()
        nothing.backward()
        assert nothing.item() == 0.0


def test_far_rows_stay_finite_and_types_are_kept() -> None:
    big = torch.tensor([4000.0, -4000.0], requires_grad=True)
    label = torch.tensor([1.0, 1.0])
    loss = compute_kto_loss(big, label, torch.tensor(0.0), beta=1.0, **WEIGHTS)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 1.5] and loss.dtype == torch.float32
    assert big.grad is not None and bool(torch.isfinite(big.grad).all())
    assert compute_kl_baseline(big.bfloat16()).dtype == torch.float32
