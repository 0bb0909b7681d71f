"""TDPO and Ra-DPO: by hand on a vocabulary of three, the quantile, gradients. Whole models: engine/test_live_reference.py."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from burnish.losses.pairs import Pairs
from burnish.losses.tdpo import (
    SEQUENTIAL_KL,
    _find_neighbours,
    build_radpo,
    build_risk,
    build_tdpo,
    compute_quantile,
    compute_radpo1_loss,
    compute_radpo2_loss,
    compute_sequential_kl,
    compute_tdpo1_loss,
    compute_tdpo2_loss,
    name_risk,
)

# Reference ½ ¼ ¼, policy ¼ ¼ ½: d = ln 2, 0, −ln 2.
REFERENCE = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
POLICY = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()
TARGETS = torch.tensor([0])


def build_pairs(name: str, n: int = 5, seed: int = 0, grad: bool = True) -> Pairs:
    """Random pairs with divergences of a functional, as fp64 leaves."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: torch.from_numpy(rng.uniform(low, high, n)).requires_grad_(grad)  # noqa: E731
    ones = torch.ones(n, dtype=torch.float64)
    sums = {name: (draw(0, 3), draw(0, 3))}
    return Pairs(-ones, -ones, draw(-4, 4), draw(-4, 4), ones, ones, torch.zeros_like(ones), sums)


def test_the_sequential_kl_by_hand() -> None:
    """½ ln 2 + 0 − ¼ ln 2 = ¼ ln 2; shifting logits by a constant changes nothing."""
    found = compute_sequential_kl(POLICY + 3.0, TARGETS, REFERENCE - 7.0)
    assert found.item() == pytest.approx(math.log(2) / 4, rel=1e-14)
    assert compute_sequential_kl(POLICY, TARGETS, POLICY).item() == 0.0


def test_the_risk_by_hand() -> None:
    """Quantiles of (−ln 2, 0, ln 2): at c = ½ the median 0, so only ½ ln 2 is left; at c = 1 all but the smallest."""
    for confidence, want in ((0.5, 0.5), (1.0, 0.5), (0.49, 0.5), (0.51, 0.5)):
        found = build_risk(confidence).fn(POLICY, TARGETS, REFERENCE)
        assert found.item() == pytest.approx(want * math.log(2), rel=1e-12), confidence


def test_s0_25_at_confidence_one_the_risk_is_the_sequential_kl_without_the_smallest_entry() -> None:
    rng = np.random.default_rng(1)
    policy, reference = (torch.from_numpy(rng.normal(0, 2, (7, 50))) for _ in range(2))
    p = torch.softmax(reference, -1)
    gap = torch.log_softmax(reference, -1) - torch.log_softmax(policy, -1)
    smallest = (p * gap).gather(1, gap.argmin(-1, keepdim=True))[:, 0]
    targets = torch.zeros(7, dtype=torch.int64)
    whole = compute_sequential_kl(policy, targets, reference)
    torch.testing.assert_close(build_risk(1.0).fn(policy, targets, reference), whole - smallest, rtol=1e-10, atol=1e-12)


def test_s0_25_equal_models_have_no_risk() -> None:
    for confidence in (0.1, 0.95, 1.0):
        assert build_risk(confidence).fn(POLICY, TARGETS, POLICY).item() == 0.0


@pytest.mark.parametrize("q", [0.0, 0.05, 0.1, 0.37, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("size", [1, 2, 50, 1001])
def test_the_quantile_is_that_of_numpy(q: float, size: int) -> None:
    values = np.random.default_rng(size).normal(size=(3, size))
    np.testing.assert_allclose(
        compute_quantile(torch.from_numpy(values), q), np.quantile(values, q, axis=-1), rtol=1e-7
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low", [0, 3, 10])
def test_neighbours_in_order_by_both_ways_of_selection(dtype: torch.dtype, low: int) -> None:
    values = torch.randn(4, 11, generator=torch.Generator().manual_seed(1)).to(dtype)
    ordered = values.sort(-1).values
    floor, above = _find_neighbours(values, low)
    assert torch.equal(floor, ordered[:, low]) and torch.equal(above, ordered[:, min(low + 1, 10)])


def test_the_quantile_takes_blocks_that_torch_refuses() -> None:
    """`torch.quantile` stops at 2^24 elements: 256 positions of a vocabulary of 65,537 or more."""
    assert compute_quantile(torch.zeros(1, 2**24 + 1), 0.05).item() == 0.0


def test_tdpo1_equals_its_closed_form() -> None:
    pairs = build_pairs(SEQUENTIAL_KL)
    found = compute_tdpo1_loss(pairs, beta=0.3)
    a, z, c, r = (x.detach().numpy() for x in (pairs.chosen_ratio, pairs.rejected_ratio, *pairs.sums[SEQUENTIAL_KL]))
    want = np.log1p(np.exp(-0.3 * ((a - z) - (r - c))))
    np.testing.assert_allclose(found.loss.detach().numpy(), want, rtol=1e-10)
    np.testing.assert_allclose(found.margin.detach().numpy(), 0.3 * ((a - z) - (r - c)), rtol=1e-10, atol=1e-12)
    assert set(found.figures) == {"divergence/chosen", "divergence/rejected"}


def test_tdpo2_stops_the_gradient_of_the_chosen_divergence() -> None:
    pairs = build_pairs(SEQUENTIAL_KL)
    found = compute_tdpo2_loss(pairs, beta=0.3, tdpo_alpha=0.5)
    a, z, (c, r) = pairs.chosen_ratio, pairs.rejected_ratio, pairs.sums[SEQUENTIAL_KL]
    want = torch.log(1 + torch.exp(-0.3 * ((a - z) - 0.5 * (r - c))))
    torch.testing.assert_close(found.loss, want, rtol=1e-10, atol=0)
    found.loss.sum().backward()
    assert c.grad is None and r.grad is not None and bool((r.grad > 0).all())
    plain = compute_tdpo2_loss(pairs, beta=0.3, tdpo_alpha=0.0).loss
    torch.testing.assert_close(plain, torch.log(1 + torch.exp(-0.3 * (a - z))), rtol=1e-10, atol=0)


def test_radpo_reads_the_risk_of_its_confidence() -> None:
    pairs = build_pairs(name_risk(0.9))
    twin = build_pairs(SEQUENTIAL_KL)
    first, second = compute_radpo1_loss(pairs, beta=0.3, radpo_confidence=0.9), compute_tdpo1_loss(twin, beta=0.3)
    assert torch.equal(first.loss, second.loss)
    first = compute_radpo2_loss(pairs, beta=0.3, radpo_confidence=0.9, tdpo_alpha=0.7)
    assert torch.equal(first.loss, compute_tdpo2_loss(twin, beta=0.3, tdpo_alpha=0.7).loss)
    with pytest.raises(KeyError):
        compute_radpo1_loss(pairs, beta=0.3, radpo_confidence=0.8)


def test_each_setting_has_a_functional_of_its_own() -> None:
    assert [f.name for f in build_tdpo(SimpleNamespace())] == ["sequential_kl"]
    (functional,) = build_radpo(SimpleNamespace(radpo_confidence=0.98))
    assert (functional.name, functional.needs_against) == ("risk_0.98", True)


def test_gradcheck() -> None:
    rng = np.random.default_rng(5)
    reference = torch.from_numpy(rng.normal(0, 1, (3, 9)))
    targets = torch.zeros(3, dtype=torch.int64)
    policy = torch.from_numpy(rng.normal(0, 1, (3, 9))).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: compute_sequential_kl(x, targets, reference), policy)
    assert torch.autograd.gradcheck(lambda x: build_risk(0.73).fn(x, targets, reference), policy)


def test_impossible_tokens_stay_finite() -> None:
    """The authors take log(softmax); where a probability underflows, that is 0 · ∞."""
    reference = torch.tensor([[0.0, -500.0, 0.0]], requires_grad=True)
    policy = torch.tensor([[0.0, 0.0, -500.0]], requires_grad=True)
    for fn in (compute_sequential_kl, build_risk(0.9).fn):
        found = fn(policy, TARGETS, reference)
        (gradient,) = torch.autograd.grad(found.sum(), policy)
        assert bool(torch.isfinite(found).all()) and bool(torch.isfinite(gradient).all())
        assert not reference.grad
