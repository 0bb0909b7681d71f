"""Rows that hold token ids already."""

from __future__ import annotations

from typing import Any

from burnish.data.example import Example, Reading
from burnish.data.lengths import Tokens, count_shared
from burnish.data.problems import RowError
from burnish.data.readers import Row
from burnish.data.strict_json import describe

IGNORED = -100


def read_tokenised(row: Row, reading: Reading) -> Example:
    """A row of token ids: `input_ids` (+ `labels`), or `input_ids_chosen` and `input_ids_rejected`.

    The prompt of a pair is what both sequences begin with; that of a single one is what its labels ignore at the front.

    Raises:
        RowError: Not lists of token ids, or of unequal lengths.
    """
    if "input_ids_chosen" in row.data:
        names = ("input_ids_chosen", "input_ids_rejected") if reading.rows == "pair" else ("input_ids_chosen",)
        sequences = [_ids(row.data, name, name.replace("input_ids", "attention_mask")) for name in names]
        shared = _shared_prefix(*sequences) if len(sequences) == 2 else 1
        prompt = sequences[0][:shared]
        answers = [Tokens(s[shared:], [True] * (len(s) - shared)) for s in sequences]
    else:
        ids = _ids(row.data, "input_ids", "attention_mask")
        mask = _mask(row.data, ids)
        shared = next((i for i, scored in enumerate(mask) if scored and i > 0), 1)
        prompt, answers = ids[:shared], [Tokens(ids[shared:], mask[shared:])]
    key = " ".join(map(str, prompt)) if len(prompt) > 1 else " ".join(map(str, [*prompt, *answers[0].ids]))
    return Example(row.file, row.line, "ids", prompt, list(answers), key, key)


def _ids(data: dict[str, Any], name: str, mask_name: str) -> list[int]:
    value = data[name]
    if not isinstance(value, list) or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
        raise RowError(f"expected a list of token ids, found {describe(value)}", kind="type", field=name)
    mask = data.get(mask_name)
    if isinstance(mask, list):
        if len(mask) != len(value):
            raise RowError(f"{len(mask)} entries for {len(value)} token ids", kind="length", field=mask_name)
        value = [i for i, keep in zip(value, mask) if keep]
    if len(value) < 2:
        raise RowError(f"expected at least 2 token ids, found {len(value)}", kind="empty answer", field=name)
    return value


def _mask(data: dict[str, Any], ids: list[int]) -> list[bool]:
    for name in ("labels", "completion_mask", "assistant_masks"):
        value = data.get(name)
        if value is None:
            continue
        attention = data.get("attention_mask")
        if isinstance(value, list) and isinstance(attention, list) and len(value) == len(attention):
            value = [v for v, keep in zip(value, attention) if keep]
        if not isinstance(value, list) or len(value) != len(ids):
            raise RowError(f"expected a list of {len(ids)}, found {describe(value)}", kind="length", field=name)
        if name != "labels":
            return [bool(v) for v in value]
        wrong = next((i for i, (v, t) in enumerate(zip(value, ids)) if v not in (IGNORED, t)), None)
        if wrong is not None:
            raise RowError(
                f"label {value[wrong]} at position {wrong} is neither {IGNORED} nor the token id {ids[wrong]}",
                kind="labels",
                field=name,
                remedy="labels are the input ids themselves, not shifted, or -100",
            )
        return [v != IGNORED for v in value]
    return [True] * len(ids)


def _shared_prefix(a: list[int], b: list[int]) -> int:
    """Tokens that both begin with; at least 1, and each keeps at least one token of its own."""
    return max(1, min(count_shared(a, b), len(a) - 1, len(b) - 1))
