"""The length rules: leave out, or cut without losing the end-of-sequence token; everything is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from burnish.config.data import Truncation


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits in tokens; None = no limit.

    Attributes:
        total: Prompt and completion together.
        prompt: The prompt.
        completion: Each completion.
        truncation: What happens to a row over a limit.
    """

    total: int | None
    prompt: int | None = None
    completion: int | None = None
    truncation: Truncation = "skip"


@dataclass(slots=True)
class Tokens:
    """A completion's ids and which of them are scored."""

    ids: list[int]
    mask: list[bool]


@dataclass(slots=True)
class Draft:
    """A tokenised example before the length rules.

    Attributes:
        prompt: Ids of the prompt, at least one.
        completions: The completions.
        sequence: Prompt and completion are one sequence (text, conversation): `keep_end` keeps its last tokens.
        has_bos: The first prompt token is BOS, which a cut keeps.
    """

    prompt: list[int]
    completions: list[Tokens]
    sequence: bool = False
    has_bos: bool = False


@dataclass(slots=True)
class Fit:
    """The outcome of the length rules.

    Attributes:
        draft: The row as it is used, or None = left out.
        reason: Why it is left out or was cut, with the numbers.
        cut: Something was cut off.
        lost_eos: Completions that ended in an end token and do not any more.
        notes: Further words for the report.
    """

    draft: Draft | None
    reason: str = ""
    cut: bool = False
    lost_eos: int = 0
    notes: list[str] = field(default_factory=list)


def count_shared(a: Sequence[object], b: Sequence[object]) -> int:
    """How many items two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def excess_of(draft: Draft, limits: Limits) -> str:
    """What is too long, with the numbers, or "" if everything fits."""
    prompt, longest = len(draft.prompt), max(len(c.ids) for c in draft.completions)
    if limits.prompt is not None and prompt > limits.prompt:
        return f"the prompt has {prompt} tokens, max_prompt_length is {limits.prompt}"
    if limits.total is not None and prompt >= limits.total:
        return f"the prompt alone has {prompt} tokens, max_length is {limits.total}"
    if limits.completion is not None and longest > limits.completion:
        return f"the answer has {longest} tokens, max_completion_length is {limits.completion}"
    if limits.total is not None and prompt + longest > limits.total:
        return f"prompt and answer have {prompt + longest} tokens, max_length is {limits.total}"
    return ""


def fit_lengths(draft: Draft, limits: Limits, end_ids: frozenset[int]) -> Fit:
    """Apply the rules to one row.

    Prompts lose their beginning (the question stands at the end; BOS stays), answers lose their end (their last token
    becomes the end token again). `keep_start` spares the prompt and cuts the answer when only the total is too long;
    `keep_end` spares the answer and cuts the prompt. Text and conversations keep their first or last tokens.
    """
    reason = excess_of(draft, limits)
    if not reason:
        return Fit(draft)
    if limits.truncation == "skip":
        return Fit(None, reason)
    total = limits.total
    if draft.sequence and total is not None and limits.truncation == "keep_end":
        made = _last_tokens(draft, total)
    else:
        made = _cut_apart(draft, limits, end_ids)
    if made is None or not all(any(c.mask) for c in made.completions):
        return Fit(None, f"{reason}; nothing of the answer would be left")
    lost = sum(
        before.ids[-1] in end_ids and after.ids[-1] not in end_ids
        for before, after in zip(draft.completions, made.completions)
    )
    return Fit(made, reason, cut=True, lost_eos=lost)


def _cut_apart(draft: Draft, limits: Limits, end_ids: frozenset[int]) -> Draft | None:
    completions = draft.completions
    if limits.completion is not None:
        completions = [_cut_end(c, limits.completion, end_ids) for c in completions]
    room = len(draft.prompt) if limits.prompt is None else limits.prompt
    if limits.total is not None and limits.truncation == "keep_end":
        longest = max(len(c.ids) for c in completions)
        room = min(room, max(1, limits.total - longest))
    prompt = _cut_start(draft.prompt, room, draft.has_bos)
    if limits.total is not None:
        left = limits.total - len(prompt)
        if left < 1:
            return None
        completions = [_cut_end(c, left, end_ids) for c in completions]
    return replace(draft, prompt=prompt, completions=completions)


def _cut_start(prompt: list[int], room: int, has_bos: bool) -> list[int]:
    if len(prompt) <= room:
        return prompt
    return [prompt[0], *prompt[len(prompt) - room + 1 :]] if has_bos and room > 1 else prompt[-room:]


def _cut_end(tokens: Tokens, room: int, end_ids: frozenset[int]) -> Tokens:
    """At most `room` tokens; what follows the last scored one goes too, and an end token stays the last."""
    if len(tokens.ids) <= room:
        return tokens
    ids, mask = tokens.ids[:room], tokens.mask[:room]
    while mask and not mask[-1]:
        ids.pop()
        mask.pop()
    if ids and tokens.ids[-1] in end_ids and ids[-1] not in end_ids:
        ids[-1] = tokens.ids[-1]
    return Tokens(ids, mask)


def _last_tokens(draft: Draft, total: int) -> Draft:
    """The last `total` tokens of prompt + completion as a new prompt (unscored, at least one) and completion."""
    (completion,) = draft.completions
    ids = draft.prompt + completion.ids
    mask = [False] * len(draft.prompt) + completion.mask
    keep_bos = draft.has_bos and total > 2
    head = [ids[0]] if keep_bos else []
    ids, mask = head + ids[-(total - len(head)) :], [False] * len(head) + mask[-(total - len(head)) :]
    first = next((i for i, scored in enumerate(mask) if scored and i > 0), len(mask))
    return replace(draft, prompt=ids[:first], completions=[Tokens(ids[first:], mask[first:])])
