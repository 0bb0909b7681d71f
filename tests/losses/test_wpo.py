"""WPO's weights: against a softmax written out, and without a (tokens, vocabulary) tensor in the loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from burnish.config.stages import DpoSettings
from burnish.core.batch import Outputs, build_packed_batch
from burnish.core.logits import LOG_SQUARE_SUM
from burnish.losses.wpo import compute_pair_weights
from burnish.methods.dpo import Dpo
from burnish.models.policy import Policy
from tests.losses.tiny import build_model, build_pairs
from tests.methods.test_dpo import attach

LOGPROBS = frozenset({"logprobs"})


def test_the_functional_is_log_sum_of_squares() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(0, 3, (7, 11))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    logits = torch.from_numpy(z).requires_grad_()
    found = LOG_SQUARE_SUM.fn(logits, torch.zeros(7, dtype=torch.int64), None)
    np.testing.assert_allclose(found.numpy(), np.log((p**2).sum(1)), rtol=1e-12)
    assert not found.requires_grad


def test_weights_are_products_of_mean_alignments() -> None:
    batch = build_packed_batch(build_pairs())
    rng = np.random.default_rng(1)
    logprobs, squares = (torch.from_numpy(rng.normal(-2, 1, len(batch.target_ids))) for _ in range(2))
    found = compute_pair_weights(logprobs.requires_grad_(), squares, batch.table)
    start, want = 0, []
    for group in build_pairs():
        product = 1.0
        for c in group.completions:
            piece = slice(start, start + len(c.ids))
            product *= float(np.exp((logprobs.detach() - squares)[piece].mean()))
            start += len(c.ids)
        want.append(product)
    assert found.tolist() == pytest.approx(want, rel=1e-12) and not found.requires_grad


@pytest.mark.parametrize("attention", ["sdpa", "padded"])
def test_a_policy_gives_the_functional_at_the_scored_positions(attention: str) -> None:
    policy = Policy(build_model("lm", 0, torch.float64), head="lm", attention=attention).eval()
    groups = build_pairs()
    batch = build_packed_batch(groups)
    out = policy(batch, LOGPROBS, functionals=(LOG_SQUARE_SUM,))
    want = []
    for group in groups:
        for c in group.completions:
            ids = torch.tensor([[*group.prompt.tolist(), *c.ids.tolist()]])
            with policy.unpacked() as model, torch.no_grad():
                logits = model(ids).logits[0, len(group.prompt) - 1 : -1].double()
            want += [float(torch.log((torch.softmax(row, 0) ** 2).sum())) for row in logits]
    assert out.functionals["log_square_sum"].tolist() == pytest.approx(want, rel=1e-5)


def test_weighted_loss_and_gradient_are_each_pair_s_own_times_its_weight() -> None:
    groups = attach(build_pairs(), np.full(60, -3.0))
    table = build_packed_batch(groups).table
    rng = np.random.default_rng(3)
    logprobs = torch.from_numpy(rng.normal(-3, 1, len(table.token_completion))).requires_grad_()
    squares = torch.from_numpy(rng.normal(-2, 1, len(table.token_completion)))
    outputs = Outputs(logprobs=logprobs, functionals={"log_square_sum": squares})
    result = Dpo(DpoSettings(use_weighting=True)).compute_loss(outputs, table, {})
    weights = compute_pair_weights(logprobs, squares, table)
    plain = Dpo(DpoSettings())
    (loss,) = plain.mix
    want = (loss.compute(plain.compute_pairs(outputs, table)).loss * weights).sum()
    assert result.terms[0].sum.item() == pytest.approx(want.item(), rel=1e-13)
    one, two = (torch.autograd.grad(x, [logprobs], retain_graph=True)[0] for x in (result.terms[0].sum, want))
    torch.testing.assert_close(one, two, rtol=1e-13, atol=0)
    (logged,) = [m for m in result.metrics if m.name == "wpo_weights"]
    assert logged.sum.item() == pytest.approx(weights.sum().item())


def test_no_more_than_a_block_of_the_vocabulary_s_rows_is_held() -> None:
    """The weights need whole distributions, but a block of positions at a time, in forward and in backward."""
    seen: list[int] = []

    def watch(logits: torch.Tensor, targets: torch.Tensor, against: torch.Tensor | None) -> torch.Tensor:
        seen.append(logits.shape[0])
        return LOG_SQUARE_SUM.fn(logits, targets, against)

    batch = build_packed_batch([group for _ in range(8) for group in build_pairs()])
    policy = Policy(build_model("lm", 0), head="lm")
    out = policy(batch, LOGPROBS, functionals=(replace(LOG_SQUARE_SUM, fn=watch),))
    assert out.logprobs is not None
    out.logprobs.sum().backward()
    assert len(batch.target_ids) > 256 >= max(seen) and sum(seen) >= len(batch.target_ids)
