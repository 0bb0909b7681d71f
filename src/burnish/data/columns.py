"""Column mappings: a recipe's own, and those of well-known sets by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from burnish.data.formats import missing_columns
from burnish.data.problems import RowDropped, RowError
from burnish.data.strict_json import describe
from burnish.errors import DataError

Rule = Literal["one", "zero", "negative", "larger", "model_a"]


@dataclass(frozen=True, slots=True)
class Pick:
    """Which of two answers is the better one.

    Attributes:
        first: Column of the first answer.
        second: Column of the second answer.
        by: The column that decides, or the two columns of scores.
        rule: `one`: 1 = the first is better, 0 = the second; `zero`: the reverse; `negative`: below 0 = the first;
            `larger`: the one with the larger score; `model_a`: the words model_a and model_b. All else is a tie.
    """

    first: str
    second: str
    by: tuple[str, ...]
    rule: Rule


@dataclass(frozen=True, slots=True)
class ColumnMapping:
    """How a file's columns become burnish's.

    Attributes:
        columns: burnish's name to the file's; a dot reaches into an object (question.full_text).
        pick: How chosen and rejected follow from two answers and a label.
        chat: Texts are a user's and an assistant's message, not bare texts.
        lead: The words that an answer opens with in the file; they move to the end of the prompt, on their own line.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    pick: Pick | None = None
    chat: bool = False
    lead: str = ""


def find_mapping(setting: Mapping[str, str] | str | None) -> ColumnMapping | None:
    """The mapping that the setting `columns` means.

    Raises:
        DataError: There is no bundled mapping of that name.
    """
    if setting is None:
        return None
    if not isinstance(setting, str):
        return ColumnMapping(dict(setting)) if setting else None
    found = BUNDLED.get(setting.rpartition("/")[2].lower())
    if found is None:
        near = difflib.get_close_matches(setting.lower(), BUNDLED, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise DataError(
            f"there is no bundled column mapping {setting!r}",
            where="data.columns",
            remedy=f"{hint}known are {', '.join(BUNDLED)}; or write {{prompt: <column>, …}}",
        )
    return found


def apply_mapping(data: Mapping[str, Any], mapping: ColumnMapping | None) -> dict[str, Any]:
    """The row under burnish's column names.

    Raises:
        RowError: A column of the mapping is not there.
        RowDropped: Neither answer is the better one.
    """
    if mapping is None:
        return dict(data)
    needed = [*mapping.columns.values()]
    if mapping.pick:
        needed += [mapping.pick.first, mapping.pick.second, *mapping.pick.by]
    missing = [name for name in needed if name.partition(".")[0] not in data]
    if missing:
        raise missing_columns(missing, data)
    taken = {name.partition(".")[0] for name in needed}
    row = {name: value for name, value in data.items() if name not in taken and name not in mapping.columns}
    row |= {ours: _reach(data, theirs) for ours, theirs in mapping.columns.items()}
    if mapping.pick:
        row["chosen"], row["rejected"] = _pick(data, mapping.pick)
    return _move_lead(row, mapping.lead) if mapping.lead else row


def _reach(data: Mapping[str, Any], path: str) -> Any:
    value: Any = data
    for part in path.split(".") if path not in data else [path]:
        if not isinstance(value, Mapping) or part not in value:
            raise RowError(f"expected an object with {part!r}, found {describe(value)}", kind="type", field=path)
        value = value[part]
    return value


def _pick(data: Mapping[str, Any], pick: Pick) -> tuple[Any, Any]:
    values = [data[name] for name in pick.by]
    if pick.rule == "model_a":
        better = {"model_a": 0, "model_b": 1}.get(str(values[0]))
    else:
        numbers = [_number(value, name) for value, name in zip(values, pick.by)]
        if pick.rule == "larger":
            better = None if numbers[0] == numbers[1] else int(numbers[1] > numbers[0])
        elif pick.rule == "negative":
            better = None if numbers[0] == 0 else int(numbers[0] > 0)
        else:
            better = {1: 0, 0: 1}.get(int(numbers[0])) if pick.rule == "one" else {0: 0, 1: 1}.get(int(numbers[0]))
    if better is None:
        raise RowDropped("neither answer is the better one (a tie)", kind="tie", field=pick.by[0])
    pair = (data[pick.first], data[pick.second])
    return pair if better == 0 else (pair[1], pair[0])


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise RowError(f"expected a number, found {describe(value)}", kind="type", field=name) from None


def _move_lead(row: dict[str, Any], lead: str) -> dict[str, Any]:
    """Put `lead` at the end of the prompt and take it off the answers, which then begin with a space."""
    if not isinstance(row.get("prompt"), str):
        return row
    moved = {**row, "prompt": f"{row['prompt'].rstrip().removesuffix(lead).rstrip()}\n{lead}"}
    for name in ("chosen", "rejected", "completion"):
        if isinstance(row.get(name), str):
            moved[name] = " " + row[name].strip().removeprefix(lead).lstrip()
    return moved


_PAIR = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
BUNDLED: dict[str, ColumnMapping] = {
    # Anthropic/hh-rlhf
    "hh-rlhf": ColumnMapping({"chosen": "chosen", "rejected": "rejected"}),
    # CarperAI/openai_summarize_comparisons
    "openai_summarize_comparisons": ColumnMapping(_PAIR, lead="TL;DR:"),
    # CarperAI/openai_summarize_tldr
    "openai_summarize_tldr": ColumnMapping({"prompt": "prompt", "completion": "label"}, lead="TL;DR:"),
    # HuggingFaceH4/ultrafeedback_binarized
    "ultrafeedback_binarized": ColumnMapping(_PAIR),
    # Intel/orca_dpo_pairs
    "orca_dpo_pairs": ColumnMapping(
        {"system": "system", "prompt": "question", "chosen": "chosen", "rejected": "rejected"}, chat=True
    ),
    # jondurbin/truthy-dpo-v0.1
    "truthy-dpo": ColumnMapping(
        {"system": "system", "prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}, chat=True
    ),
    # stanfordnlp/SHP; labels 1 = A is preferred
    "shp": ColumnMapping({"prompt": "history"}, Pick("human_ref_A", "human_ref_B", ("labels",), "one"), chat=True),
    # nvidia/HelpSteer2, preference; strength below 0 = response_1 is better, 0 = a tie, left out
    "helpsteer2": ColumnMapping(
        {"prompt": "prompt"}, Pick("response_1", "response_2", ("preference_strength",), "negative"), chat=True
    ),
    # nvidia/HelpSteer3, preference
    "helpsteer3": ColumnMapping(
        {"prompt": "context"}, Pick("response1", "response2", ("overall_preference",), "negative")
    ),
    # openai/webgpt_comparisons
    "webgpt_comparisons": ColumnMapping(
        {"prompt": "question.full_text"}, Pick("answer_0", "answer_1", ("score_0", "score_1"), "larger"), chat=True
    ),
    # PKU-Alignment/PKU-SafeRLHF
    "pku-saferlhf": ColumnMapping(
        {"prompt": "prompt"}, Pick("response_0", "response_1", ("better_response_id",), "zero"), chat=True
    ),
    # lmsys/chatbot_arena_conversations; ties are left out
    "chatbot_arena_conversations": ColumnMapping({}, Pick("conversation_a", "conversation_b", ("winner",), "model_a")),
    # databricks/databricks-dolly-15k
    "databricks-dolly-15k": ColumnMapping({"instruction": "instruction", "input": "context", "output": "response"}),
}
