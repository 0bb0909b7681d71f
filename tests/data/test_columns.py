"""Column mappings: a recipe's own and the bundled ones, on hand-made rows (S1-05)."""

from typing import Any

import pytest

from burnish.data.columns import BUNDLED, ColumnMapping, apply_mapping, find_mapping
from burnish.data.example import Reading
from burnish.data.formats import normalise
from burnish.data.problems import RowDropped, RowError
from burnish.data.readers import Row
from burnish.errors import DataError

QA = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}]
QB = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}]
POST = "SUBREDDIT: r/a\nTITLE: t\nPOST: long story\n"

ROWS: dict[str, tuple[dict[str, Any], Any, list[Any]]] = {
    "hh-rlhf": (
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        QA[:1],
        [QA[1:], QB[1:]],
    ),
    "openai_summarize_comparisons": (
        {"prompt": POST, "chosen": "TL;DR: good", "rejected": "TL;DR:  bad\n"},
        POST + "TL;DR:",
        [" good", " bad"],
    ),
    "openai_summarize_tldr": ({"prompt": POST + "TL;DR:", "label": " good"}, POST + "TL;DR:", [" good"]),
    "ultrafeedback_binarized": (
        {"prompt": "q", "prompt_id": "x", "chosen": QA, "rejected": QB, "messages": QA, "score_chosen": 9.0},
        QA[:1],
        [QA[1:], QB[1:]],
    ),
    "orca_dpo_pairs": (
        {"system": "s", "question": "q", "chosen": "good", "rejected": "bad"},
        [{"role": "system", "content": "s"}, QA[0]],
        [QA[1:], QB[1:]],
    ),
    "truthy-dpo": (
        {"id": "1", "system": "", "prompt": "q", "chosen": "good", "rejected": "bad"},
        QA[:1],
        [QA[1:], QB[1:]],
    ),
    "shp": (
        {"history": "q", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1, "score_A": 9},
        QA[:1],
        [QA[1:], QB[1:]],
    ),
    "helpsteer2": (
        {"prompt": "q", "response_1": "bad", "response_2": "good", "preference_strength": 2},
        QA[:1],
        [QA[1:], QB[1:]],
    ),
    "helpsteer3": (
        {"context": QA[:1], "response1": "good", "response2": "bad", "overall_preference": -3, "domain": "general"},
        QA[:1],
        [QA[1:], QB[1:]],
    ),
    "webgpt_comparisons": (
        {"question": {"full_text": "q"}, "answer_0": "bad", "answer_1": "good", "score_0": -0.5, "score_1": 0.5},
        QA[:1],
        [QA[1:], QB[1:]],
    ),
    "pku-saferlhf": (
        {"prompt": "q", "response_0": "good", "response_1": "bad", "better_response_id": 0, "safer_response_id": 1},
        QA[:1],
        [QA[1:], QB[1:]],
    ),
    "chatbot_arena_conversations": (
        {"conversation_a": QB, "conversation_b": QA, "winner": "model_b"},
        QA[:1],
        [QA[1:], QB[1:]],
    ),
    "databricks-dolly-15k": (
        {"instruction": "q", "context": "", "response": "good", "category": "x"},
        QA[:1],
        [QA[1:]],
    ),
}


@pytest.mark.parametrize("name", list(BUNDLED))
def test_s1_05_bundled_mappings(name: str) -> None:
    data, prompt, completions = ROWS[name]
    mapping = find_mapping(name)
    assert mapping is not None
    reading = Reading("pair" if len(completions) == 2 else "completion", format="instruct" if mapping.chat else "auto")
    example = normalise(Row("f", 1, apply_mapping(data, mapping)), reading)
    assert example.prompt == prompt and example.completions == completions


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("helpsteer2", {"preference_strength": 0}),
        ("helpsteer3", {"overall_preference": 0}),
        ("webgpt_comparisons", {"score_0": 0.0, "score_1": 0.0}),
        ("chatbot_arena_conversations", {"winner": "tie (bothbad)"}),
        ("pku-saferlhf", {"better_response_id": 7}),
    ],
)
def test_ties_are_left_out(name: str, change: dict[str, Any]) -> None:
    with pytest.raises(RowDropped):
        apply_mapping(ROWS[name][0] | change, BUNDLED[name])


def test_the_label_decides_both_ways() -> None:
    row = ROWS["shp"][0]
    assert apply_mapping(row | {"labels": 0}, BUNDLED["shp"])["chosen"] == "bad"
    row = ROWS["pku-saferlhf"][0]
    assert apply_mapping(row | {"better_response_id": 1}, BUNDLED["pku-saferlhf"])["chosen"] == "bad"


def test_s1_05_own_mapping() -> None:
    mapping = find_mapping({"prompt": "question", "chosen": "better", "rejected": "worse"})
    row = apply_mapping({"question": "q", "better": "a", "worse": "b", "chosen": "old", "other": 1}, mapping)
    assert row == {"prompt": "q", "chosen": "a", "rejected": "b", "other": 1}
    swapped = find_mapping({"chosen": "rejected", "rejected": "chosen"})
    assert apply_mapping({"chosen": "a", "rejected": "b"}, swapped) == {"chosen": "b", "rejected": "a"}


def test_s1_05_a_missing_column_lists_those_present() -> None:
    with pytest.raises(RowError) as caught:
        apply_mapping({"question": "q", "beter": "a"}, find_mapping({"prompt": "question", "chosen": "better"}))
    assert "missing column 'better'" in caught.value.message
    assert "did you mean 'beter'?" in caught.value.message
    assert "columns found: question, beter" in caught.value.message


def test_names_of_mappings() -> None:
    assert find_mapping(None) is None and find_mapping({}) is None
    assert find_mapping("Anthropic/HH-RLHF") == BUNDLED["hh-rlhf"]
    with pytest.raises(DataError, match="did you mean orca_dpo_pairs"):
        find_mapping("orca_dpo_pair")
    with pytest.raises(RowError, match="expected a number"):
        apply_mapping(ROWS["shp"][0] | {"labels": "A"}, BUNDLED["shp"])
    with pytest.raises(RowError, match="expected an object"):
        apply_mapping({"question": "flat"}, ColumnMapping({"prompt": "question.full_text"}))
