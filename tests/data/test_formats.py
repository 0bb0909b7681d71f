"""Row shapes: recognition, meaning, and what is refused (T-13, S2-07, D-02, D-03, D-11)."""

from typing import Any

import pytest

from burnish.data.example import Example, Reading, identical
from burnish.data.formats import check_format, normalise
from burnish.data.problems import RowError
from burnish.data.readers import CsvText, Row
from burnish.errors import ConfigError

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
B = {"role": "assistant", "content": "b"}
S = {"role": "system", "content": "s"}


def read(data: dict[str, Any], want: str = "completion", **options: Any) -> Example:
    return normalise(Row("f.jsonl", 3, data), Reading(want, **options))  # type: ignore[arg-type]


def refused(data: dict[str, Any], want: str = "completion", **options: Any) -> RowError:
    with pytest.raises(RowError) as caught:
        read(data, want, **options)
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    ("data", "prompt", "completion"),
    [
        ({"messages": [S, U, A]}, [S, U], [A]),
        ({"messages": [U, A, U, B]}, [U], [A, U, B]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [U], [A]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            [S, U],
            [A],
        ),
        ({"conversations": [U, A]}, [U], [A]),
        ({"instruction": "q", "input": "", "output": "a"}, [U], [A]),
        ({"instruction": "q", "output": "a"}, [U], [A]),
        ({"instruction": "x", "input": "y", "output": "a"}, [{"role": "user", "content": "x\n\ny"}], [A]),
        ({"question": "q", "answer": "a"}, [U], [A]),
        ({"prompt": [U], "completion": [A]}, [U], [A]),
        ({"prompt": [U], "completion": "a"}, [U], [A]),
        ({"prompt": [U], "chosen": [A], "rejected": [B]}, [U], [A]),
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "p", "c"),
        ({"text": "words", "prompt": None}, "", "words"),
    ],
)
def test_completions_of_every_shape(data: dict[str, Any], prompt: Any, completion: Any) -> None:
    example = read(data)
    assert (example.prompt, example.completions, example.place) == (prompt, [completion], "f.jsonl:3")


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        ({"prompt": [U], "chosen": [A], "rejected": [B]}, [U]),
        ({"prompt": "q", "chosen": [U, A], "rejected": [U, B]}, [U]),
        ({"prompt": "q", "chosen": [A], "rejected": [B]}, [U]),
        ({"prompt": [S, U], "chosen": "a", "rejected": "b"}, [S, U]),
        ({"chosen": [S, U, A], "rejected": [S, U, B]}, [S, U]),
        ({"chosen": [U, A, U, A], "rejected": [U, A, U, B]}, [U, A, U]),
        ({"prompt_messages": [U], "chosen": [A], "rejected": [B], "metadata": {"judge": "rm"}}, [U]),
    ],
)
def test_pairs_of_messages(data: dict[str, Any], prompt: Any) -> None:
    example = read(data, "pair")
    assert example.form == "chat" and example.prompt == prompt and example.completions == [[A], [B]]


def test_pairs_of_text() -> None:
    example = read({"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2}, "pair")
    assert (example.form, example.prompt, example.completions) == ("plain", "p", ["a", "b"])
    assert example.columns == {"margin": 2.0}
    example = read({"prompt": "p", "chosen": "a", "rejected": "b", "system": "s"}, "pair", format="instruct")
    assert example.prompt == [S, {"role": "user", "content": "p"}] and example.completions == [[A], [B]]


def test_t13_an_implicit_prompt_needs_a_separator() -> None:
    error = refused({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "pair")
    assert error.field == "prompt" and "nothing shows where the answer begins" in error.message
    assert "data.columns: {prompt:" in error.remedy
    example = read(
        {"chosen": "Q: x\n\nAssistant: The sky is blue.", "rejected": "Q: x\n\nAssistant: The sky is red."}, "pair"
    )
    assert example.prompt == "Q: x\n\nAssistant:" and example.completions == [" The sky is blue.", " The sky is red."]
    assert "does not begin with the prompt" in refused({"chosen": "x\n\nAssistant: a", "rejected": "b"}, "pair").message


def test_t13_message_lists_share_whole_messages_only() -> None:
    same = read({"chosen": [U, A], "rejected": [U, A]}, "pair")
    assert same.prompt == [U] and same.completions == [[A], [A]] and identical(same)
    assert refused({"chosen": [U, A], "rejected": [{"role": "user", "content": "other"}, B]}, "pair").field == "prompt"


def test_identical_is_seen_in_every_form() -> None:
    assert identical(read({"prompt": "p", "chosen": "a ", "rejected": " a"}, "pair"))
    assert not identical(read({"prompt": "p", "chosen": "a", "rejected": "b"}, "pair"))
    assert identical(read({"input_ids_chosen": [1, 2], "input_ids_rejected": [1, 2]}, "pair"))
    head = "\n\nHuman: q\n\nAssistant:"
    for chat in (True, False):
        assert identical(read({"chosen": head + " a", "rejected": head + " a "}, "pair", chat=chat))


def test_judged_rollouts_become_hh_text_without_a_template() -> None:
    row = {"prompt_messages": [U, A, U], "chosen": [{"role": "assistant", "content": "x"}], "rejected": [B]}
    example = read(row, "pair", chat=False)
    assert example.prompt == "\n\nHuman: q\n\nAssistant: a\n\nHuman: q\n\nAssistant:"
    assert [segments[0].text for segments in example.completions] == [" x", " b"]


def test_hh_prompts_in_a_column_of_their_own() -> None:
    row = {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a", "rejected": " b", "response": " a"}
    example = read(row, "pair")
    assert example.prompt == [U] and example.completions == [[A], [B]]


@pytest.mark.parametrize(
    ("data", "want", "field", "words"),
    [
        ({"messages": "hi"}, "completion", "messages", "expected a list of messages, found the text 'hi'"),
        ({"messages": [U, {"role": "assistant", "content": 5}]}, "completion", "messages[1].content", "the number 5"),
        ({"messages": [U, {"role": "assistant"}]}, "completion", "messages[1].content", "found null"),
        ({"messages": [U, "x"]}, "completion", "messages[1]", "expected an object"),
        ({"messages": []}, "completion", "messages", "empty"),
        ({"prompt": "p", "completion": "c", "label": "yes"}, "completion", "label", "expected true or false"),
        ({"prompt": 3, "completion": "c"}, "completion", "prompt", "the number 3"),
        ({"prompt": "p", "chosen": "a", "rejected": ["b"]}, "pair", "rejected[0]", "expected an object"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "big"}, "pair", "margin", "expected a number"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": True}, "pair", "margin", "truth value"),
        ({"messages": [U, A], "tools": "{"}, "completion", "tools", "as JSON"),
        ({"messages": [U, A], "tools": [1]}, "completion", "tools", "tool descriptions"),
        (
            {"conversations": [{"from": "alien", "value": "x"}]},
            "completion",
            "conversations[0].from",
            "unknown speaker",
        ),
        (
            {"messages": [U, {"role": "assistant", "content": [{"type": "image"}]}]},
            "completion",
            "messages[1].content[0]",
            "text parts",
        ),
    ],
)
def test_d02_types_are_named_with_their_path(data: dict[str, Any], want: str, field: str, words: str) -> None:
    error = refused(data, want)
    assert error.field == field and words in error.message


@pytest.mark.parametrize(
    ("messages", "turn", "words"),
    [
        ([U, U, A], 1, "user cannot come after user"),
        ([A, U, A], 0, "assistant cannot come first"),
        ([U, A, S, U, A], 2, "system cannot come after assistant"),
        ([U, A, U], 2, "the last message is the user's"),
        ([S, A], 1, "assistant cannot come after system"),
        ([U, {"role": "robot", "content": "x"}], 1, "unknown role"),
        ([U, A, A], 2, "assistant cannot come after assistant"),
    ],
)
def test_d11_roles_out_of_order(messages: list[dict[str, str]], turn: int, words: str) -> None:
    error = refused({"messages": messages})
    assert error.field == f"messages[{turn}].role" and words in error.message
    assert "accepted" in error.message or "known are" in error.message


def test_d11_prompts_and_answers_of_pairs() -> None:
    assert refused({"prompt": [U, A], "chosen": [A], "rejected": [B]}, "pair").field == "chosen[0].role"
    assert refused({"prompt": [U], "chosen": [A, U], "rejected": [B]}, "pair").field == "chosen[1].role"


def test_tool_calls_are_a_conversation() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    tool = {"role": "tool", "content": "4"}
    example = read({"messages": [U, call, tool, A], "tools": '[{"type": "function", "function": {"name": "f"}}]'})
    assert example.completions[0][0]["content"] == "" and example.completions[0][1] == tool
    assert example.tools == [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("data", "want", "words", "remedy"),
    [
        ({"prompt": "p", "chosen": "a", "rejcted": "b"}, "pair", "did you mean 'rejcted'?", "{rejected: rejcted}"),
        ({"prompt": "p", "completion": "a"}, "pair", "no known row shape", "chosen: <your column>"),
        ({"promt": "p", "completion": "a"}, "completion", "did you mean 'promt'?", "{prompt: promt}"),
        ({"mesages": [U, A]}, "completion", "did you mean 'mesages'?", "{messages: mesages}"),
        ({"foo": 1}, "completion", "columns found: foo; accepted: ", "{prompt: <your column>"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "pair", "missing column 'rejected'", "<your column>"),
    ],
)
def test_d03_missing_columns(data: dict[str, Any], want: str, words: str, remedy: str) -> None:
    error = refused(data, want)
    assert words in error.message and remedy in error.remedy and error.kind == "missing column"
    assert all(name in error.message for name, value in data.items() if value is not None)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_d14_empty_answers(text: str) -> None:
    empty = {"role": "assistant", "content": text}
    for data, want in (
        ({"prompt": "p", "completion": text}, "completion"),
        ({"messages": [U, empty]}, "completion"),
        ({"messages": [U, empty, U, A]}, "completion"),
        ({"prompt": "p", "chosen": "a", "rejected": text}, "pair"),
        ({"prompt": [U], "chosen": [A], "rejected": [empty]}, "pair"),
        ({"text": text}, "completion"),
    ):
        assert refused(data, want).kind == "empty answer"
    assert refused({"prompt": "p", "completion": "<think>only"}, strip_think=True).kind == "empty answer"
    assert refused({"prompt": "", "completion": "x"}).field == "prompt"


@pytest.mark.parametrize("char", ["\x00", "\x1b", "\x7f", "\x85", "\ud800"])
def test_d07_control_characters(char: str) -> None:
    error = refused({"text": f"ab{char}c"})
    assert f"\\u{ord(char):04x} at character 3" in error.message
    assert "strip_control" in error.remedy and error.kind == "control character"
    assert read({"text": f"ab{char}c\t\n\r"}, strip_control=True).completions == ["abc\t\n\r"]


def test_think_blocks_are_stripped_on_request() -> None:
    said = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}
    data = {"messages": [U, said, U, said]}
    assert [m["content"] for m in read(data, strip_think=True).completions[0]] == ["yes", "q", "yes"]
    assert "hm" in read(data).completions[0][0]["content"]
    reasoned = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    assert read({"messages": [U, reasoned]}, strip_think=True).completions == [
        [{"role": "assistant", "content": "yes"}]
    ]
    assert read({"messages": [U, reasoned]}).completions == [[reasoned]]
    assert read({"prompt": "p", "completion": "<think>x</think>a"}, strip_think=True).completions == ["a"]


def test_gsm8k_answers() -> None:
    example = read({"question": "q", "answer": "2+2=4\n#### 1,004"})
    assert example.extra == {"answer": "1,004", "reference": "2+2=4\n#### 1,004"}


def test_csv_holds_json_and_words_for_truth() -> None:
    data = {"messages": CsvText('[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]')}
    assert read(data).completions == [[A]]
    data = {"prompt": CsvText("p"), "completion": CsvText("c"), "label": CsvText("False")}
    assert read(data).extra == {"label": False}
    assert type(read(data).prompt) is str


def test_s2_07_token_ids() -> None:
    example = read({"input_ids_chosen": [5, 6, 7, 8], "input_ids_rejected": [5, 6, 9]}, "pair")
    assert example.prompt == [5, 6] and [c.ids for c in example.completions] == [[7, 8], [9]]
    padded = {
        "input_ids_chosen": [5, 6, 0],
        "attention_mask_chosen": [1, 1, 0],
        "input_ids_rejected": [5, 7, 8],
        "attention_mask_rejected": [1, 1, 1],
    }
    assert [c.ids for c in read(padded, "pair").completions] == [[6], [7, 8]]
    example = read({"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]})
    assert example.prompt == [5, 6] and example.completions[0].mask == [True, True]
    example = read({"input_ids": [5, 6, 7]})
    assert example.prompt == [5] and example.completions[0].ids == [6, 7]
    assert read({"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}).prompt == [5, 6]
    assert "neither -100 nor" in refused({"input_ids": [5, 6, 7], "labels": [-100, 7, 8]}).message
    assert refused({"input_ids": [5, "x"]}).kind == "type"
    assert refused({"input_ids": [5, 6], "labels": [6]}).kind == "length"
    assert refused({"input_ids": [5]}).kind == "empty answer"


def test_openings_and_prompts_are_keys() -> None:
    first = read({"messages": [S, U, A, {"role": "user", "content": "more"}, B]})
    second = read({"prompt": [S, U], "chosen": [A], "rejected": [B]}, "pair")
    third = read({"chosen": "\n\nHuman:  q \n\nAssistant: x", "rejected": "\n\nHuman:  q \n\nAssistant: y"}, "pair")
    assert first.opening == second.opening != third.opening
    raw = read({"chosen": "\n\nHuman: q\n\nAssistant: x\n\nHuman: z\n\nAssistant: w", "rejected": ""}, chat=False)
    assert raw.opening == third.opening == "q"


def test_formats_are_checked_against_the_stage() -> None:
    check_format("auto", "pair")
    check_format("preference", "completion")
    with pytest.raises(ConfigError, match="did you mean messages"):
        check_format("mesages", "completion")
    with pytest.raises(ConfigError, match="give no pair"):
        check_format("messages", "pair")
    assert read({"text": "t", "messages": [U, A]}, format="text").form == "text"
    assert refused({"messages": [U, A]}, format="text").kind == "missing column"
