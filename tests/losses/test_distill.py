"""Divergences of distillation: by hand, in numpy, at their limits. Whole models: engine/test_live_reference.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from burnish.losses.distill import build_divergence

TARGETS = torch.zeros(4, dtype=torch.int64)
CASES = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.85)]


def draw(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(student, teacher) logits."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(0, 2, (4, 13))).requires_grad_(), torch.from_numpy(rng.normal(0, 2, (4, 13)))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def test_by_hand() -> None:
    """Teacher ½ ½, student ¼ ¾: forward ½ ln 2 + ½ ln ⅔, reverse ¼ ln ½ + ¾ ln 3/2."""
    teacher, student = (torch.tensor([x], dtype=torch.float64).log() for x in ([0.5, 0.5], [0.25, 0.75]))
    forward = build_divergence("forward_kl").fn(student, TARGETS, teacher).item()
    assert forward == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-12)
    reverse = build_divergence("reverse_kl").fn(student, TARGETS, teacher).item()
    assert reverse == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("name", "beta"), CASES)
def test_equals_its_closed_form(name: str, beta: float, temperature: float) -> None:
    student, teacher = draw()
    p, q = softmax(teacher.numpy() / temperature), softmax(student.detach().numpy() / temperature)
    m = beta * p + (1 - beta) * q
    kl = lambda a, b: (a * np.log(a / b)).sum(-1)  # noqa: E731
    want = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m)}[name]
    found = build_divergence(name, jsd_beta=beta, temperature=temperature).fn(student, TARGETS, teacher)
    np.testing.assert_allclose(found.detach().numpy(), want * temperature**2, rtol=1e-10)


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_gradcheck_and_no_gradient_to_the_teacher(name: str, beta: float) -> None:
    student, teacher = draw(1)
    fn = build_divergence(name, jsd_beta=beta, temperature=1.7).fn
    assert torch.autograd.gradcheck(lambda x: fn(x, TARGETS, teacher), student)
    teacher.requires_grad_()
    fn(student, TARGETS, teacher).sum().backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_the_gradient_pulls_towards_the_teacher(name: str, beta: float) -> None:
    """Of two words, the one that the teacher likes better than the student does rises, and the other falls."""
    student = torch.linspace(-3, 3, 4, dtype=torch.float64)[:, None] * torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.4, -0.4]], dtype=torch.float64).expand(4, 2)
    leaf = student.clone().requires_grad_()
    build_divergence(name, jsd_beta=beta, temperature=1.3).fn(leaf, TARGETS, teacher).sum().backward()
    assert leaf.grad is not None
    behind = teacher > student
    assert bool(((leaf.grad < 0) == behind).all()) and bool((leaf.grad != 0).all())


def test_exchanging_teacher_and_student_exchanges_the_divergences() -> None:
    """KL(p ‖ q) for KL(q ‖ p), and a share β of the teacher for one of 1 − β."""
    student, teacher = draw(7)
    student = student.detach()
    for name, beta, mirrored, other in (
        ("forward_kl", 0.5, "reverse_kl", 0.5),
        ("reverse_kl", 0.5, "forward_kl", 0.5),
        ("jsd", 0.2, "jsd", 0.8),
    ):
        there = build_divergence(name, jsd_beta=beta).fn(student, TARGETS, teacher)
        back = build_divergence(mirrored, jsd_beta=other).fn(teacher, TARGETS, student)
        torch.testing.assert_close(there, back, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_any_split_of_the_tokens_adds_up(name: str, beta: float) -> None:
    """Each token alone gives its own number, and no token gives none."""
    student, teacher = draw(8)
    fn = build_divergence(name, jsd_beta=beta).fn
    whole = fn(student, TARGETS, teacher)
    parts = [fn(student[s], TARGETS[s], teacher[s]) for s in (slice(0, 1), slice(1, 1), slice(1, 4))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-13, atol=0)
    assert parts[1].shape == (0,)


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_equal_models_are_at_the_minimum(name: str, beta: float) -> None:
    student, _ = draw(2)
    found = build_divergence(name, jsd_beta=beta).fn(student, TARGETS, student.detach())
    found.sum().backward()
    assert found.abs().max() < 1e-14 and student.grad is not None and student.grad.abs().max() < 1e-14


def test_jensen_shannon_is_symmetric_at_one_half_and_bounded() -> None:
    student, teacher = draw(3)
    fn = build_divergence("jsd").fn
    torch.testing.assert_close(
        fn(student, TARGETS, teacher), fn(teacher, TARGETS, student.detach()), rtol=1e-12, atol=0
    )
    assert fn(50 * student, TARGETS, -50 * student.detach()).max() <= math.log(2) + 1e-12


def test_jensen_shannon_tends_to_the_two_divergences() -> None:
    student, teacher = draw(4)
    small = 1e-6
    forward = build_divergence("jsd", jsd_beta=small).fn(student, TARGETS, teacher) / small
    torch.testing.assert_close(forward, build_divergence("forward_kl").fn(student, TARGETS, teacher), rtol=1e-4, atol=0)
    reverse = build_divergence("jsd", jsd_beta=1 - small).fn(student, TARGETS, teacher) / small
    torch.testing.assert_close(reverse, build_divergence("reverse_kl").fn(student, TARGETS, teacher), rtol=1e-4, atol=0)


def test_the_temperature_keeps_the_size_of_the_gradient() -> None:
    """Hinton et al. 2015: without T², the gradient falls with 1/T²; for high T it tends to that of squared logits."""
    sizes = []
    for temperature in (20.0, 40.0):
        student, teacher = draw(5)
        build_divergence("forward_kl", temperature=temperature).fn(student, TARGETS, teacher).sum().backward()
        assert student.grad is not None
        sizes.append(student.grad.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_far_models_stay_finite() -> None:
    student = torch.tensor([[300.0, -300.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-300.0, 300.0, 0.0]])
    for name, beta in CASES:
        found = build_divergence(name, jsd_beta=beta).fn(student, TARGETS, teacher)
        (gradient,) = torch.autograd.grad(found.sum(), student)
        assert bool(torch.isfinite(found).all()) and bool(torch.isfinite(gradient).all())
