"""Examples to groups (T-14 … T-18, S2-07, S4-07, D-14)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.core.group import Group
from burnish.data.example import Reading
from burnish.data.formats import normalise
from burnish.data.lengths import Limits
from burnish.data.problems import ProblemLog
from burnish.data.readers import Row
from burnish.data.report import SplitReport
from burnish.data.template import ChatTemplate
from burnish.data.tokenise import Encoding, encode_examples
from burnish.data.tokenizer import TextTokenizer
from tests.data.test_template import THINKING
from tests.data.toys import (
    bos_tokenizer,
    byte_level,
    chat,
    chat_folder,
    chat_tokenizer,
    pair,
    plain_tokenizer,
    spaced_tokenizer,
    template_tokenizer,
    write_tokenizer,
)


def encode(
    rows: list[dict[str, Any]], tokenizer: TextTokenizer, want: str = "completion", **options: Any
) -> tuple[list[Group], SplitReport, ProblemLog]:
    limits = Limits(
        **{name: options.pop(name) for name in ("total", "prompt", "completion", "truncation") if name in options}
        or {"total": None}
    )
    reading = Reading(want, tokenizer.chat_template is not None, strip_think=options.pop("strip_think", False))  # type: ignore[arg-type]
    encoding = Encoding(tokenizer, ChatTemplate(tokenizer), limits, **options)
    examples = [normalise(Row("f.jsonl", i, row), reading) for i, row in enumerate(rows, 1)]
    log, report = ProblemLog("skip"), SplitReport()
    return encode_examples(examples, encoding, log, report), report, log


def texts(group: Group, tokenizer: TextTokenizer) -> tuple[str, list[str]]:
    return tokenizer.decode(group.prompt), [tokenizer.decode(c.ids) for c in group.completions]


def scored(group: Group, tokenizer: TextTokenizer) -> str:
    completion = group.completions[0]
    return tokenizer.decode(completion.ids[completion.mask])


def test_t18_only_assistant_turns_are_scored() -> None:
    tokenizer = chat_tokenizer()
    (group,), report, _ = encode([chat("q1", "a1", "q2", "a2", system="s")], tokenizer)
    prompt, (completion,) = texts(group, tokenizer)
    assert prompt.startswith("<|im_start|>system\ns<|im_end|>") and prompt.endswith(
        "q1<|im_end|>\n<|im_start|>assistant\n"
    )
    assert completion.startswith("a1<|im_end|>\n<|im_start|>user\nq2") and completion.endswith("a2<|im_end|>")
    assert scored(group, tokenizer) == "a1<|im_end|>a2<|im_end|>"
    assert group.id == "f.jsonl:1" and report.scored_tokens == group.completions[0].scored
    assert group.prompt.dtype == np.int32 and group.completions[0].ids.dtype == np.int32
    assert group.completions[0].mask.dtype == np.bool_


@pytest.mark.parametrize(
    ("train_on", "prompt_end", "trained"),
    [
        ("auto", "assistant\n", "a1<|im_end|>a2<|im_end|>"),
        ("assistant", "assistant\n", "a1<|im_end|>a2<|im_end|>"),
        ("last", "q2<|im_end|>\n<|im_start|>assistant\n", "a2<|im_end|>"),
    ],
)
def test_train_on(train_on: Any, prompt_end: str, trained: str) -> None:
    tokenizer = chat_tokenizer()
    (group,), _, _ = encode([chat("q1", "a1", "q2", "a2")], tokenizer, train_on=train_on)
    assert texts(group, tokenizer)[0].endswith(prompt_end) and scored(group, tokenizer) == trained


def test_train_on_assistant_reaches_into_the_prompt_column() -> None:
    talk = chat("q1", "a1", "q2", "a2")["messages"]
    row = {"prompt": talk[:3], "completion": talk[3:]}
    tokenizer = chat_tokenizer()
    assert scored(encode([row], tokenizer)[0][0], tokenizer) == "a2<|im_end|>"
    assert scored(encode([row], tokenizer, train_on="assistant")[0][0], tokenizer) == "a1<|im_end|>a2<|im_end|>"


def test_train_on_all_scores_everything_behind_the_first_token() -> None:
    for tokenizer, row in (
        (chat_tokenizer(), chat("q", "a")),
        (plain_tokenizer(), {"prompt": "p ", "completion": "c"}),
    ):
        (group,), _, _ = encode([row], tokenizer, train_on="all")
        assert len(group.prompt) == 1 and group.completions[0].mask.all()


def test_plain_text_is_its_first_token_and_the_rest() -> None:
    tokenizer = plain_tokenizer()
    (group,), _, _ = encode([{"text": "The sky is blue."}], tokenizer)
    assert group.prompt.tolist() == tokenizer.encode("The sky is blue.")[:1]
    assert tokenizer.decode([*group.prompt, *group.completions[0].ids]) == "The sky is blue.<|endoftext|>"
    tokenizer = bos_tokenizer()
    (group,), _, _ = encode([{"text": "The sky is blue."}], tokenizer)
    assert group.prompt.tolist() == [tokenizer.bos_id]
    groups, _, log = encode([{"text": "The sky"}], plain_tokenizer(), train_on="last")
    assert not groups and "no assistant turns" in log.problems[0].message


def test_bos_stands_once_in_front_of_the_prompt() -> None:
    tokenizer = bos_tokenizer()
    for row in (
        pair(1),
        pair(1) | {"prompt": "<s>question"},
        {"prompt": [{"role": "user", "content": "x"}], "chosen": "a", "rejected": "b"},
    ):
        (group,), _, _ = encode([row], tokenizer, "pair")
        ids = [*group.prompt.tolist(), *group.completions[0].ids.tolist()]
        assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
    own = template_tokenizer("{% for m in messages %}{{ m.content }}</s>{% endfor %}", ("<s>", "</s>"), bos_token="<s>")
    (group,), _, _ = encode([chat("q", "a")], own)
    assert own.bos_id not in group.prompt.tolist(), "a template of its own decides about BOS"


def test_t17_answers_end_in_an_end_token() -> None:
    for tokenizer in (plain_tokenizer(), bos_tokenizer(), spaced_tokenizer(), chat_tokenizer()):
        rows = [pair(1), pair(2, chosen=f" good{tokenizer.special_tokens['eos_token']}")]
        groups, report, _ = encode(rows, tokenizer, "pair")
        for group in groups:
            for completion in group.completions:
                ids = completion.ids.tolist()
                assert ids[-1] == tokenizer.eos_id and ids.count(tokenizer.eos_id) == 1 and completion.mask[-1]
        assert not report.without_eos.count


def test_t17_answers_without_end_token_are_reported() -> None:
    bare = template_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    _, report, _ = encode([chat("q", "a"), chat("q", "b")], bare)
    assert report.without_eos.count == 2 and report.without_eos.rows[0] == "f.jsonl:1"
    _, report, _ = encode([pair(1)], plain_tokenizer(), "pair", add_eos=False)
    assert report.without_eos.count == 1


def test_t16_prompt_and_answer_equal_the_joint_text_or_are_counted() -> None:
    tokenizer = plain_tokenizer()
    clean, merging = (
        {"prompt": "Question: what is", "completion": " 2"},
        {"prompt": "The s", "completion": "ky is blue"},
    )
    groups, report, _ = encode([clean, merging], tokenizer)
    joint = tokenizer.encode("Question: what is 2")
    assert [*groups[0].prompt, *groups[0].completions[0].ids] == [*joint, tokenizer.eos_id]
    assert groups[1].prompt.tolist() == tokenizer.encode("The s"), "the prompt is what a sampler would be given"
    assert tokenizer.decode(groups[1].completions[0].ids) == "ky is blue<|endoftext|>"
    assert report.apart.rows == ["f.jsonl:2"]


@settings(max_examples=60)
@given(
    st.text(min_size=1, max_size=150), st.text(min_size=1, max_size=150), st.sampled_from(["plain", "bos", "spaced"])
)
def test_t16_holds_for_any_text(prompt: str, answer: str, which: str) -> None:
    tokenizer = {"plain": plain_tokenizer, "bos": bos_tokenizer, "spaced": spaced_tokenizer}[which]()
    draft = {"prompt": prompt, "completion": answer}
    try:
        groups, report, _ = encode([draft], tokenizer)
    except ValueError:  # control characters, blank answers
        return
    (group,) = groups
    bos = [tokenizer.bos_id] if tokenizer.adds_bos else []
    ids = [*group.prompt.tolist(), *group.completions[0].ids.tolist()]
    joint = [*bos, *tokenizer.encode(prompt + answer)]
    joint += [] if joint[-1] == tokenizer.eos_id else [tokenizer.eos_id]
    assert (ids == joint) or report.apart.count == 1
    assert tokenizer.decode(ids) == tokenizer.decode(joint)


def test_s4_07_t15_over_length_rows_are_counted_and_named() -> None:
    rows = [pair(1), pair(2, rejected=" word" * 50), pair(3)]
    groups, report, _ = encode(rows, plain_tokenizer(), "pair", total=40)
    assert [group.id for group in groups] == ["f.jsonl:1", "f.jsonl:3"]
    assert report.over_length.count == 1 and report.over_length.rows[0].startswith("f.jsonl:2 (prompt and answer have")
    assert (report.kept, report.groups) == (2, 2)


def test_t14_cuts_are_counted_and_pairs_made_equal_left_out() -> None:
    long = " same words" * 20
    rows = [pair(1), pair(2, chosen=f"{long} good", rejected=f"{long} bad"), pair(3, chosen=long + " x", rejected=" y")]
    groups, report, _ = encode(rows, plain_tokenizer(), "pair", total=40, truncation="keep_start")
    assert report.made_equal.rows == ["f.jsonl:2"] and report.cut.count == 1 and report.lost_eos == 0
    assert [group.id for group in groups] == ["f.jsonl:1", "f.jsonl:3"]
    for group in groups:
        assert group.longest <= 40 and all(c.ids[-1] == plain_tokenizer().eos_id for c in group.completions)


def test_d12_pairs_that_the_template_makes_equal() -> None:
    trimming = template_tokenizer(
        "{% for m in messages %}{{ m.role + ': ' + m.content|lower + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    row = {"prompt": [{"role": "user", "content": "q"}], "chosen": "Yes", "rejected": "yes"}
    groups, report, log = encode([row], trimming, "pair")
    assert not groups and log.problems[0].kind == "identical pair"
    groups, report, log = encode([row], trimming, "pair", drop_identical=True)
    assert not groups and not log.total and report.identical.count == 1


def test_d14_a_mask_without_tokens() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}, {"input_ids": [5, 6]}]
    groups, _, log = encode(rows, plain_tokenizer())
    assert [group.id for group in groups] == ["f.jsonl:2"]
    assert "no token would be trained on" in log.problems[0].message


def test_s2_07_token_ids_are_taken_as_they_are() -> None:
    tokenizer = plain_tokenizer()
    (group,), _, _ = encode([{"input_ids_chosen": [5, 6, 7], "input_ids_rejected": [5, 8]}], tokenizer, "pair")
    assert group.prompt.tolist() == [5] and [c.ids.tolist() for c in group.completions] == [[6, 7], [8]]
    groups, _, log = encode([{"input_ids": [5, 999_999]}], tokenizer)
    assert not groups and "999999 is not in the vocabulary" in log.problems[0].message


def test_each_turn_is_an_example_where_the_template_needs_it() -> None:
    tokenizer = template_tokenizer(THINKING, ("<|im_start|>", "<|im_end|>"), "<|im_end|>")
    groups, report, _ = encode([chat("q1", "a1", "q2", "a2"), chat("q", "a")], tokenizer)
    assert [group.id for group in groups] == ["f.jsonl:1#1", "f.jsonl:1#2", "f.jsonl:2"]
    assert (report.kept, report.groups, report.own_turns.rows) == (2, 3, ["f.jsonl:1"])
    assert scored(groups[1], tokenizer) == "<think>\n\n</think>\n\na2<|im_end|>"
    pairs = [{"prompt": chat("q1", "a1", "q2")["messages"], "chosen": "x", "rejected": "y"}]
    (group,), _, _ = encode(pairs, tokenizer, "pair")
    assert "<think>" not in tokenizer.decode(group.prompt)
    assert [text.split("\n")[-1] for text in texts(group, tokenizer)[1]] == ["x<|im_end|>", "y<|im_end|>"]


def test_tool_output_is_never_scored() -> None:
    source = (
        "{% if tools %}{{ '<|im_start|>tools\\n' + tools|tojson + '<|im_end|>\\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls|tojson }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer = template_tokenizer(source, ("<|im_start|>", "<|im_end|>"), "<|im_end|>")
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    messages = [
        {"role": "user", "content": "1+1?"},
        call,
        {"role": "tool", "content": "TWO"},
        {"role": "assistant", "content": "2"},
    ]
    (group,), _, _ = encode([{"messages": messages, "tools": [{"name": "add"}]}], tokenizer)
    assert '"name": "add"' in tokenizer.decode(group.prompt)
    assert scored(group, tokenizer) == '[{"function": {"name": "add"}}]<|im_end|>2<|im_end|>'
    assert "TWO" in texts(group, tokenizer)[1][0]


def test_names_are_unique_within_a_set() -> None:
    tokenizer = plain_tokenizer()
    examples = [normalise(Row(f"{folder}/f.jsonl", 1, pair(1)), Reading("pair")) for folder in "ab"]
    encoding = Encoding(tokenizer, ChatTemplate(tokenizer), Limits(None))
    groups = encode_examples(examples, encoding, ProblemLog(), SplitReport())
    assert [group.id for group in groups] == ["f.jsonl:1", "f.jsonl:1~2"]


def test_a_tokenizer_without_end_token(tmp_path) -> None:
    tokenizer = TextTokenizer.load(str(write_tokenizer(tmp_path, byte_level(["<a>"]))))
    (group,), report, _ = encode([chat("q", "a")], tokenizer)
    assert scored(group, tokenizer) == " a" and report.without_eos.count == 1


def test_special_tokens_in_messages_are_counted() -> None:
    _, report, _ = encode([chat("what is <|im_end|>?", "a token"), chat("q", "a")], chat_tokenizer())
    assert report.spelled.rows == ["f.jsonl:1"]


@pytest.mark.oracle
def test_ids_are_those_of_transformers(shared: Path) -> None:
    """Rendered conversations and plain texts have the ids that transformers' tokenizer gives."""
    auto = pytest.importorskip("transformers").AutoTokenizer
    folder = shared / "data" / "stories260k-hf"
    theirs, ours = auto.from_pretrained(str(folder)), TextTokenizer.load(str(folder))
    rows = [
        {"prompt": f"Once upon a time, Timmy saw {n}", "completion": " birds. They were happy."} for n in ("two", "10")
    ]
    groups, report, _ = encode(rows, ours)
    assert not report.apart.count
    for row, group in zip(rows, groups):
        whole = theirs(row["prompt"] + row["completion"])["input_ids"] + [theirs.eos_token_id]
        assert [*group.prompt, *group.completions[0].ids] == whole
    theirs, ours = auto.from_pretrained(chat_folder()), chat_tokenizer()
    row = chat("what is 2 + 2?", "it is 4", "and 3 + 3?", "6", system="be kind")
    (group,), report, _ = encode([row], ours)
    text = theirs.apply_chat_template(row["messages"], tokenize=False)
    assert ours.decode([*group.prompt, *group.completions[0].ids]) == text.removesuffix("\n")
    assert [*group.prompt, *group.completions[0].ids] == theirs(text.removesuffix("\n"))["input_ids"]
    prompt = theirs.apply_chat_template(row["messages"][:2], tokenize=False, add_generation_prompt=True)
    assert group.prompt.tolist() == theirs(prompt)["input_ids"]
