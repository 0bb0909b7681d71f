"""The embedding that is also the head: one gradient, the same as by the modules."""

from __future__ import annotations

import copy

import pytest
import torch

from burnish.models.policy import Policy
from burnish.models.tied import find_tied_embedding
from tests.models import packing

LOGPROBS = frozenset({"logprobs"})


def _gradients(policy: Policy, batches) -> dict[str, torch.Tensor]:
    for batch in batches:
        out = policy(batch, LOGPROBS).logprobs
        assert out is not None
        packing.weigh(out).backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padding", [None, 5])
def test_its_gradient_is_that_of_the_modules(padding, monkeypatch):
    """Two passes, so that the second adds to the first; a padding token's row gets nothing from the embedding."""
    model = packing.build_model("llama", tie_word_embeddings=True)
    model.get_input_embeddings().padding_idx = padding
    tied, plain = (Policy(copy.deepcopy(model), head="lm", attention="sdpa") for _ in range(2))
    batches = [packing.draw_batch(seed) for seed in (0, 1)]
    if padding is not None:
        batches[0].input_ids[3] = padding
    assert find_tied_embedding(tied.inner) is not None
    mine = _gradients(tied, batches)
    monkeypatch.setattr("burnish.models.policy.find_tied_embedding", lambda inner: None)
    theirs = _gradients(plain, batches)
    assert mine.keys() == theirs.keys()
    for name, g in theirs.items():
        torch.testing.assert_close(mine[name], g, rtol=1e-5, atol=1e-6 * float(g.abs().max()), msg=name)


def test_only_where_it_is_the_head_and_trains():
    untied = Policy(packing.build_model("llama", tie_word_embeddings=False), head="lm", attention="sdpa")
    assert find_tied_embedding(untied.inner) is None
    tied = Policy(packing.build_model("llama", tie_word_embeddings=True), head="lm", attention="sdpa")
    with torch.no_grad():
        assert find_tied_embedding(tied.inner) is None
    handle = tied.inner.get_input_embeddings().register_forward_hook(lambda *args: None)
    assert find_tied_embedding(tied.inner) is None
    handle.remove()
    tied.inner.get_input_embeddings().weight.requires_grad_(False)
    assert find_tied_embedding(tied.inner) is None
