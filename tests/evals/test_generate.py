"""Greedy answers: the same as one forward a token, whatever the batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from burnish.errors import UsageError
from burnish.evals.generate import CACHE_BYTES, MOST_ROWS, Answer, choose_batch_size, generate_greedy
from tests.evals.tiny import build_groups, logits_of
from tests.losses.tiny import build_model

PROMPTS = [g.prompt.tolist() for g in build_groups(9, 1, seed=4)]


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model("lm", 0)


def generate_slowly(model: Any, prompt: list[int], eos: set[int], limit: int) -> Answer:
    """One full forward for each token."""
    ids: list[int] = []
    while len(ids) < limit:
        ids.append(int(logits_of(model, prompt + ids).argmax()))
        if ids[-1] in eos:
            return Answer(tuple(ids), "eos")
    return Answer(tuple(ids), "length")


@pytest.mark.parametrize("batch_size", [1, 2, 4, 32])
def test_every_batch_size_gives_the_answers_of_single_forwards(model: Any, batch_size: int) -> None:
    eos = set(range(0, 96, 7))  # many end tokens, so that rows leave their batch at different times
    want = [generate_slowly(model, p, eos, 12) for p in PROMPTS]
    assert {a.end for a in want} == {"eos", "length"} and len({len(a.ids) for a in want}) > 3
    assert generate_greedy(model, PROMPTS, eos_ids=eos, max_new_tokens=12, batch_size=batch_size) == want


def test_the_library_agrees(model: Any) -> None:
    for prompt in PROMPTS[:3]:
        ids = torch.tensor([prompt])
        want = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10, eos_token_id=1, pad_token_id=0
        )[0, len(prompt) :]
        (found,) = generate_greedy(model, [prompt], eos_ids={1}, max_new_tokens=10)
        assert list(found.ids) == want.tolist()


def test_limits_and_ends(model: Any) -> None:
    (cut,) = generate_greedy(model, [PROMPTS[0]], eos_ids=set(), max_new_tokens=5)
    assert (len(cut.ids), cut.end, cut.body) == (5, "length", cut.ids)
    (ended,) = generate_greedy(model, [PROMPTS[0]], eos_ids={cut.ids[0]}, max_new_tokens=5)
    assert (ended.ids, ended.end, ended.body) == (cut.ids[:1], "eos", ())
    (room,) = generate_greedy(model, [PROMPTS[0]], eos_ids=set(), max_new_tokens=50, context=len(PROMPTS[0]) + 3)
    assert (len(room.ids), room.end) == (3, "length")
    assert generate_greedy(model, [], eos_ids={1}, max_new_tokens=5) == []


def test_what_cannot_be_answered_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        generate_greedy(model, [[3], []], eos_ids={1}, max_new_tokens=5)
    with pytest.raises(ValueError, match="context 4"):
        generate_greedy(model, [[3, 4, 5, 6]], eos_ids={1}, max_new_tokens=5, context=4)

    class NoCache(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 5))

    with pytest.raises(UsageError, match="no key-value cache"):
        generate_greedy(NoCache(), [[1]], eos_ids={1}, max_new_tokens=2)


def test_the_mode_comes_back_and_dropout_is_off(model: Any) -> None:
    model.train()
    before = torch.get_rng_state()
    first = generate_greedy(model, PROMPTS[:2], eos_ids={1}, max_new_tokens=4)
    assert model.training and torch.equal(before, torch.get_rng_state())
    model.eval()
    assert generate_greedy(model, PROMPTS[:2], eos_ids={1}, max_new_tokens=4) == first


def test_the_batch_is_as_large_as_a_small_cache_allows(model: Any) -> None:
    assert choose_batch_size(model, PROMPTS, 12) == MOST_ROWS
    row = 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim * 4
    tokens = CACHE_BYTES["cpu"] // (row * 10)
    assert choose_batch_size(model, [[1]], tokens - 1) == 10
    assert choose_batch_size(model, [[1]], 100 * tokens) == 1
