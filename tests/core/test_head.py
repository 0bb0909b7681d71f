"""The head without logits against plain `log_softmax` (S4-30), its gradients, its functionals and its memory."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.core import head
from burnish.core import rows as whole_rows
from burnish.core.head import ENTROPY, Functional, HeadInput, LogitTransform, compute_token_logprobs
from burnish.core.kernels import calls
from burnish.core.kernels.build import load_kernels
from burnish.core.logits import LOG_SQUARE_SUM, LOGPROBS, compute_entropy
from burnish.errors import UsageError
from burnish.losses.tdpo import build_tdpo

S, H, V = 23, 16, 1301
TRANSFORMS = [LogitTransform(), LogitTransform(0.5), LogitTransform(2.0, 3.0)]


def _draw(dtype: torch.dtype = torch.float64, *, bias: bool = False, frozen: bool = False, seed: int = 0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    hidden, weight = normal(S, H).requires_grad_(), normal(V, H).requires_grad_(not frozen)
    return (
        hidden,
        weight,
        (normal(V).requires_grad_(not frozen) if bias else None),
        torch.randint(0, V, (S,), generator=g),
    )


def _plain(hidden, weight, bias, targets, transform, temperature):
    logits = hidden @ weight.t() + (0 if bias is None else bias)
    logp = torch.log_softmax(transform(logits) / temperature, -1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def _weigh(values: Tensor) -> Tensor:
    return (values * torch.linspace(-1, 2, values.numel(), dtype=values.dtype)).sum()


@contextmanager
def _tiles(monkeypatch: pytest.MonkeyPatch, area: int, rows: int) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(head, "_TILE", area)
        patch.setattr(head, "_ROWS", rows)
        yield


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("bias", "entropy", "frozen", "temperature"), itertools.product([0, 1], [0, 1], [0, 1], [1.0, 0.7])
)
def test_s4_30_equals_log_softmax_in_float64(transform, bias, entropy, frozen, temperature, monkeypatch) -> None:
    hidden, weight, b, targets = _draw(bias=bool(bias), frozen=bool(frozen))
    inputs = [x for x in (hidden, weight, b) if x is not None and x.requires_grad]
    logprobs, ent = _plain(hidden, weight, b, targets, transform, temperature)
    expected = [logprobs, ent, *torch.autograd.grad(_weigh(logprobs) + entropy * _weigh(ent), inputs)]
    for area, rows in ((1 << 21, 4096), (1 << 10, 7)):
        with _tiles(monkeypatch, area, rows):
            out = compute_token_logprobs(
                hidden,
                weight,
                targets,
                bias=b,
                transform=transform,
                want_entropy=bool(entropy),
                temperature=temperature,
            )
            total = _weigh(out["logprobs"]) + (_weigh(out["entropy"]) if entropy else 0)
            found = [out["logprobs"], out.get("entropy", ent), *torch.autograd.grad(total, inputs)]
        for a, e in zip(found, expected, strict=True):
            assert (a - e).norm() <= 1e-11 * e.norm()


def test_s4_30_float32_within_1e_5() -> None:
    hidden, weight, _, targets = _draw(torch.float32)
    expected, _ = _plain(hidden, weight, None, targets, LogitTransform(), 1.0)
    found = compute_token_logprobs(hidden, weight, targets)["logprobs"]
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transform", TRANSFORMS[:2])
def test_kernels_give_what_operations_give(transform, dtype, frozen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs and gradients by kernel, over several tiles, also where the head is frozen and the gradient comes at once."""
    if load_kernels().library is None:
        pytest.skip(load_kernels().note)
    read, seen = calls.read_tile, []
    monkeypatch.setattr(calls, "read_tile", lambda *args: seen.append(1) or read(*args))
    found = []
    for context in (contextlib.nullcontext, calls.without_kernels):
        hidden, weight, _, targets = _draw(dtype, frozen=frozen)
        with _tiles(monkeypatch, 512 * 10, 10), context():
            out = compute_token_logprobs(hidden, weight, targets, transform=transform, temperature=0.7)["logprobs"]
            _weigh(out).backward()
        found.append([t.double() for t in (out.detach(), hidden.grad, weight.grad) if t is not None])
    assert len(seen) == 9, "three stripes of three tiles, by kernel once"
    limit = 1e-5 if dtype == torch.float32 else 0.01
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= limit * b.norm()


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, _, targets = _draw(torch.float32)
    found = compute_token_logprobs(300 * hidden, weight, targets)["logprobs"]
    expected, _ = _plain((300 * hidden).double(), weight.double(), None, targets, LogitTransform(), 1.0)
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("functional", [False, True])
def test_s4_30_no_logits_of_all_positions_exist(functional: bool) -> None:
    positions, vocabulary = 6000, 4000  # more products than are kept for backward
    hidden = torch.randn(positions, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    targets = torch.randint(0, vocabulary, (positions,))
    with _Largest() as largest:
        out = compute_token_logprobs(hidden, weight, targets, functionals=[ENTROPY] if functional else [])
        sum(x.sum() for x in out.values()).backward()
    assert largest.numel <= max(2 * head._TILE, 256 * vocabulary)
    assert largest.numel < positions * vocabulary / 4


def test_bf16_autocast_multiplies_in_bf16_and_sums_in_fp32() -> None:
    hidden, weight, _, targets = _draw(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = compute_token_logprobs(hidden, weight, targets)["logprobs"]
    low = (hidden.bfloat16() @ weight.bfloat16().t()).float()
    expected = torch.log_softmax(low, -1).gather(1, targets[:, None])[:, 0]
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 2e-5
    _weigh(found).backward()
    exact = _draw(torch.float64)
    _weigh(_plain(*exact, LogitTransform(), 1.0)[0]).backward()
    for a, e in ((hidden.grad, exact[0].grad), (weight.grad, exact[1].grad)):
        assert a is not None and e is not None and a.dtype == torch.float32
        assert (a - e).norm() <= 0.02 * e.norm()


@pytest.mark.parametrize("rows", [7, 4096])
def test_bf16_weights_get_their_gradient_summed_in_fp32(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = _draw(torch.float64)
    _weigh(_plain(*exact, LogitTransform(), 1.0)[0]).backward()
    hidden, weight, _, targets = _draw(torch.bfloat16)
    with _tiles(monkeypatch, 1 << 10, rows):
        _weigh(compute_token_logprobs(hidden, weight, targets)["logprobs"]).backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16 and exact[1].grad is not None
    assert (weight.grad - exact[1].grad).norm() <= 0.02 * exact[1].grad.norm()


def test_gradients_that_nobody_needs_are_not_computed() -> None:
    hidden, weight, bias, targets = _draw(bias=True)
    for train_hidden in (True, False):
        h, w = hidden.detach().requires_grad_(train_hidden), weight.detach().requires_grad_(not train_hidden)
        _weigh(compute_token_logprobs(h, w, targets, bias=bias)["logprobs"]).backward()
        assert (h.grad is not None) == train_hidden and (w.grad is not None) != train_hidden


def test_no_positions_give_empty_results_and_zero_gradients() -> None:
    hidden, weight, _, targets = _draw()
    for functionals in ([], [ENTROPY]):
        out = compute_token_logprobs(hidden[:0], weight, targets[:0], functionals=functionals)
        assert out["logprobs"].shape == (0,)
        (gradient,) = torch.autograd.grad(out["logprobs"].sum(), weight)
        assert gradient.shape == weight.shape and not gradient.any()


def test_entropy_functional_equals_the_tiled_one_and_the_closed_form() -> None:
    hidden, weight, bias, targets = _draw(bias=True)
    again = Functional("again", compute_entropy)
    tiled = compute_token_logprobs(hidden, weight, targets, bias=bias, want_entropy=True, temperature=1.3)
    blocks = compute_token_logprobs(hidden, weight, targets, bias=bias, functionals=[again], temperature=1.3, block=5)
    _, expected = _plain(hidden, weight, bias, targets, LogitTransform(), 1.3)
    found = torch.autograd.grad(_weigh(tiled["entropy"]), [hidden, weight])
    other = torch.autograd.grad(_weigh(blocks["again"]), [hidden, weight])
    assert (tiled["entropy"] - expected).abs().max() < 1e-12 and (blocks["again"] - expected).abs().max() < 1e-12
    assert (tiled["logprobs"] - blocks["logprobs"]).abs().max() < 1e-12
    assert all((a - b).norm() <= 1e-11 * b.norm() for a, b in zip(found, other, strict=True))
    uniform = compute_token_logprobs(0 * hidden, weight, targets, want_entropy=True)["entropy"]
    assert (uniform - torch.tensor(float(V)).double().log()).abs().max() < 1e-12


def _kl(logits: Tensor, targets: Tensor, against: Tensor | None) -> Tensor:
    assert against is not None
    p, q = torch.log_softmax(logits, -1), torch.log_softmax(against, -1)
    return (p.exp() * (p - q)).sum(-1)


def test_a_functional_sees_a_second_model_without_gradient() -> None:
    hidden, weight, _, targets = _draw()
    wide = torch.randn(S, 40, dtype=torch.float64, requires_grad=True)  # another hidden size
    other = torch.randn(V, 40, dtype=torch.float64, requires_grad=True)
    kl = Functional("kl", _kl, needs_against=True)
    out = compute_token_logprobs(hidden, weight, targets, functionals=[kl], against=HeadInput(wide, other), block=6)
    expected = _kl(hidden @ weight.t(), targets, (wide @ other.t()).detach())
    assert (out["kl"] - expected).abs().max() < 1e-11
    found = torch.autograd.grad(_weigh(out["kl"]), [hidden, weight, wide, other], allow_unused=True)
    wanted = torch.autograd.grad(_weigh(expected), [hidden, weight])
    assert found[2] is None and found[3] is None
    assert all((a - b).norm() <= 1e-11 * b.norm() for a, b in zip(found[:2], wanted, strict=True))


def test_another_vocabulary_or_a_missing_second_model_is_an_error() -> None:
    hidden, weight, _, targets = _draw()
    kl = Functional("kl", _kl, needs_against=True)
    with pytest.raises(UsageError, match="vocabularies differ: 1301 and 1300"):
        compute_token_logprobs(hidden, weight, targets, functionals=[kl], against=HeadInput(hidden, weight[:-1]))
    module = torch.nn.Linear(H, V - 2, dtype=torch.float64)
    with pytest.raises(UsageError, match="vocabularies differ: 1301 and 1299"):
        compute_token_logprobs(hidden, weight, targets, functionals=[kl], against=HeadInput(hidden, module=module))
    with pytest.raises(UsageError, match="no second model"):
        compute_token_logprobs(hidden, weight, targets, functionals=[kl])


def test_a_head_that_must_be_called() -> None:
    hidden, _weight, _, targets = _draw()
    module = torch.nn.Linear(H, V, dtype=torch.float64)
    transform = LogitTransform(0.5, 2.0)
    out = compute_token_logprobs(hidden, None, targets, module=module, transform=transform, want_entropy=True, block=4)
    logprobs, entropy = _plain(hidden, module.weight, module.bias, targets, transform, 1.0)
    assert (out["logprobs"] - logprobs).abs().max() < 1e-12 and (out["entropy"] - entropy).abs().max() < 1e-12
    found = torch.autograd.grad(_weigh(out["logprobs"]), [hidden, module.weight])
    expected = torch.autograd.grad(_weigh(logprobs), [hidden, module.weight])
    assert all((a - b).norm() <= 1e-11 * b.norm() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_kept_products_change_no_bit(dtype, transform, monkeypatch) -> None:
    """Products kept for backward, or multiplied again where they are too many: the same numbers."""

    def run(keep: int) -> list[Tensor]:
        hidden, weight, bias, targets = _draw(dtype, bias=True)
        with _tiles(monkeypatch, 700, 9), monkeypatch.context() as patch:
            patch.setattr(head, "_KEEP", keep)
            found = compute_token_logprobs(
                hidden, weight, targets, bias=bias, transform=transform, want_entropy=True, temperature=0.7
            )
            (_weigh(found["logprobs"]) + found["entropy"].sum()).backward()
        return [*found.values(), hidden.grad, weight.grad, bias.grad]

    kept, again = run(1 << 30), run(0)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_products_are_kept_only_for_a_backward_pass(monkeypatch) -> None:
    """And never more than the limit, whatever the number of positions."""
    made: list[int] = []
    reserve = head._reserve
    monkeypatch.setattr(head, "_reserve", lambda *args: made.append(reserve(*args) is not None) or reserve(*args))
    hidden, weight, _, targets = _draw(torch.float32)
    compute_token_logprobs(hidden, weight, targets)
    with torch.no_grad():
        compute_token_logprobs(hidden, weight, targets)
    compute_token_logprobs(hidden, weight.detach(), targets)
    monkeypatch.setattr(head, "_KEEP", S * V * 4 - 1)
    compute_token_logprobs(hidden, weight, targets)
    assert made == [True, False, False, False]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_in_closed_form_equal_autograd(transform, temperature, monkeypatch) -> None:
    """With and without `pull`, in parts of a few rows, with a bias: the same gradients; unread functionals are not pulled."""
    monkeypatch.setattr(whole_rows, "_AREA", 3 * V)
    hidden, weight, bias, targets = _draw(bias=True)
    other = HeadInput(torch.randn(S, 9).double(), torch.randn(V, 9).double())
    (kl,) = build_tdpo(None)
    found = []
    for functional in (kl, replace(kl, pull=None)):
        asked = Functional("unread", _refuse_grad), functional
        monkeypatch.setattr(head, "LOGPROBS", LOGPROBS if functional.pull else replace(LOGPROBS, pull=None))
        out = compute_token_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            transform=transform,
            temperature=temperature,
            functionals=asked,
            against=other,
            block=7,
        )
        loss = _weigh(out["logprobs"]) + _weigh(out[kl.name]).square()
        found.append((loss, *torch.autograd.grad(loss, [hidden, weight, bias])))
    assert all((a - b).norm() <= 1e-11 * b.norm() for a, b in zip(*found, strict=True))


def _refuse_grad(logits: Tensor, targets: Tensor, against: Tensor | None) -> Tensor:
    assert not logits.requires_grad, "its gradient is not wanted"
    return logits.sum(-1)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_log_square_sums_by_tiles_equal_whole_rows_and_the_closed_form(transform, monkeypatch) -> None:
    hidden, weight, bias, targets = _draw(bias=True)
    given = {"bias": bias, "transform": transform, "temperature": 0.7}
    with _tiles(monkeypatch, 700, 9):
        tiled = compute_token_logprobs(
            hidden, weight, targets, functionals=[LOG_SQUARE_SUM], want_entropy=True, **given
        )
        found = torch.autograd.grad(_weigh(tiled["logprobs"]), [hidden, weight, bias])
    rows = compute_token_logprobs(hidden, weight, targets, functionals=[replace(LOG_SQUARE_SUM, name="again")], **given)
    p = torch.softmax(transform(hidden @ weight.t() + bias) / 0.7, -1)
    expected = p.square().sum(-1).log()
    assert not tiled["log_square_sum"].requires_grad
    assert (tiled["log_square_sum"] - expected).abs().max() < 1e-11 and (rows["again"] - expected).abs().max() < 1e-11
    other = torch.autograd.grad(_weigh(rows["logprobs"]), [hidden, weight, bias])
    assert all((a - b).norm() <= 1e-11 * b.norm() for a, b in zip(found, other, strict=True))
