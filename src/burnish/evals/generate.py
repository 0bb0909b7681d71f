"""Greedy answers from a language model: batched, with a key-value cache, the same on every run.

Prompts are sorted by length and padded on the left; a row leaves its batch (and the cache) as soon as it has ended, so
a batch costs what its unfinished rows cost. The model's own forward is used, not burnish's packed one.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from burnish.core.batch import move
from burnish.errors import UsageError
from burnish.faults import fault_point
from burnish.track.whereabouts import enter_phase

EndReason = Literal["eos", "length"]
CACHE_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}  # a key-value cache may take, where the batch size is chosen for it
MOST_ROWS = 256
READ_EVERY = {"cuda": 8}  # tokens a row between two looks at what was drawn, each a wait for the device; elsewhere 1


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer.

    Attributes:
        ids: Token ids as generated, the end-of-sequence token included if there is one.
        end: "eos", or "length": cut off at the limit.
    """

    ids: tuple[int, ...]
    end: EndReason

    @property
    def body(self) -> tuple[int, ...]:
        """The ids without the end-of-sequence token."""
        return self.ids[:-1] if self.end == "eos" else self.ids


def choose_batch_size(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Prompts to compute together, such that keys and values of all their tokens stay small; 1 … MOST_ROWS."""
    config = model.config.get_text_config()
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    size = int(getattr(config, "head_dim", None) or -(-int(getattr(config, "hidden_size", None) or 4096) // heads))
    stored = int(getattr(config, "num_key_value_heads", None) or heads)
    layers = int(getattr(config, "num_hidden_layers", None) or 32)
    tokens = max(map(len, prompts), default=1) + max_new_tokens
    one = 2 * layers * stored * size * tokens * model.dtype.itemsize
    return min(max(CACHE_BYTES.get(model.device.type, CACHE_BYTES["cpu"]) // one, 1), MOST_ROWS)


@torch.no_grad()
def generate_greedy(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    eos_ids: Collection[int],
    max_new_tokens: int,
    batch_size: int = 32,
    context: int | None = None,
) -> list[Answer]:
    """The most probable token at each position, until an end token or the limit; ties go to the smaller id.

    Args:
        model: A transformers causal language model; it is put in evaluation mode for the time and back afterwards.
        prompts: Token ids of each prompt, at least one.
        eos_ids: Tokens that end an answer.
        max_new_tokens: Tokens of an answer at most, the end token included.
        batch_size: Prompts computed together.
        context: Positions the model has; an answer ends at it with "length". None = no limit.

    Returns:
        One answer for each prompt, in the prompts' order.

    Raises:
        ValueError: An empty prompt, or one that leaves no room in the context.
    """
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0 or (context is not None and len(prompt) >= context):
            raise ValueError(f"prompt {row} has {len(prompt)} tokens, the model's context {context}")
    answers: list[Answer | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), row))
    was_training = bool(getattr(model, "training", False))
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            enter_phase("generate", rows=len(rows))
            fault_point("generate.batch")
            found = _generate_batch(model, [prompts[r] for r in rows], frozenset(eos_ids), max_new_tokens, context)
            for row, answer in zip(rows, found, strict=True):
                answers[row] = answer
    finally:
        model.train(was_training)
    return [a for a in answers if a is not None]


def _generate_batch(
    model: Any, prompts: Sequence[Sequence[int]], eos_ids: frozenset[int], limit: int, context: int | None
) -> list[Answer]:
    """Greedy decoding of one batch; `alive` maps rows of the shrinking batch to rows of `prompts`."""
    device = model.device
    ids, mask = (move(x, device) for x in _pad_left(prompts))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    accepted = inspect.signature(model.forward).parameters
    fixed = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in accepted else {})
    room = [limit if context is None else min(limit, context - len(p)) for p in prompts]
    written: list[list[int]] = [[] for _ in prompts]
    answers: dict[int, Answer] = {}
    alive = list(range(len(prompts)))
    cache = None
    while True:
        drawn = []  # stay on the device until they are looked at together
        left = min(room[row] - len(written[row]) for row in alive if row not in answers)
        for _ in range(min(READ_EVERY.get(device.type, 1), left)):
            where = {"position_ids": positions} if "position_ids" in accepted else {}
            out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, **where, **fixed)
            cache = getattr(out, "past_key_values", None)
            if cache is None:
                raise UsageError(
                    f"{type(model).__name__} has no key-value cache, so answers cannot be generated",
                    remedy="evaluate it with the tasks loss and preferences",
                )
            drawn.append(out.logits[:, -1].argmax(-1))
            ids = drawn[-1][:, None]
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        for row, tokens in zip(alive, torch.stack(drawn, dim=1).tolist(), strict=True):
            if row in answers:
                continue
            end = next((place for place, token in enumerate(tokens) if token in eos_ids), None)
            written[row] += tokens if end is None else tokens[: end + 1]
            if end is not None or len(written[row]) >= room[row]:
                answers[row] = Answer(tuple(written[row]), "length" if end is None else "eos")
        going = [place for place, row in enumerate(alive) if row not in answers]
        if not going:
            return [answers[row] for row in range(len(prompts))]
        select = getattr(cache, "batch_select_indices", None)
        if len(going) < len(alive) and select is not None:
            rows = move(torch.tensor(going), device)
            select(rows)
            ids, mask, positions, alive = ids[rows], mask[rows], positions[rows], [alive[p] for p in going]


def _pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(B, T) ids and (B, T) mask, 1 = a real token; the padding's id is never seen."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(list(prompt), dtype=torch.int64)
        mask[row, width - len(prompt) :] = 1
    return ids, mask
