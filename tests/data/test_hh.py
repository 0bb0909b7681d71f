"""The strict HH parser (S0-17, S4-09)."""

import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.data import hh
from burnish.data.prepare import prepare_data
from burnish.data.problems import RowDropped
from tests.data.toys import chat_tokenizer, dpo, plain_tokenizer, sft, write_lines

HEAD = "\n\nHuman: hi\n\nAssistant:"
said = st.text(alphabet="ab :\n.Humant", min_size=1).map(lambda t: re.sub(r"\n\n(Human|Assistant):", "..", t))
turns = st.lists(said.map(lambda t: " " + t.strip("\n") + "."), min_size=2, max_size=7)


@given(turns)
def test_s0_17_dialogues_round_trip(texts: list[str]) -> None:
    texts = texts[: len(texts) // 2 * 2]
    built = [hh.Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    assert hh.parse_dialogue(hh.join_turns(built)) == built
    contents = [m["content"] for m in hh.to_messages(built)]
    assert contents == [text.strip() for text in texts]


@given(turns, said, said)
def test_s0_17_pairs_split_at_the_last_assistant_tag(texts: list[str], a: str, b: str) -> None:
    texts = texts[: (len(texts) - 1) // 2 * 2 + 1]
    prompt = hh.join_turns([hh.Turn(("user", "assistant")[i % 2], t) for i, t in enumerate(texts)]) + hh.ASSISTANT
    chosen, rejected = f" x{a}", f" y{b}"
    assert hh.parse_pair(prompt + chosen, prompt + rejected) == hh.HHPair(prompt, chosen, rejected)


@pytest.mark.parametrize(
    ("chosen", "rejected", "kind"),
    [
        (HEAD + " a", "\n\nHuman: ho\n\nAssistant: b", "hh: not prefixed"),
        (HEAD + " ", HEAD + " b", "hh: empty"),
        (HEAD + " a", HEAD + "\n", "hh: empty"),
        ("\n\nAssistant: a", "\n\nAssistant: b", "hh: empty"),
        ("\n\nHuman: a", "\n\nHuman: b", "hh: no answer"),
        ("no tags at all", "none", "hh: no answer"),
    ],
)
def test_s0_17_the_rules_drop(chosen: str, rejected: str, kind: str) -> None:
    with pytest.raises(RowDropped) as caught:
        hh.parse_pair(chosen, rejected)
    assert caught.value.kind == kind


def test_s0_17_newlines() -> None:
    pair = hh.parse_pair(HEAD + "\n\na", HEAD.replace("\n", "\r\n") + "\r\nb")
    assert (pair.chosen, pair.rejected) == ("\na", "b"), "exactly one leading newline goes; CRLF becomes LF"


def test_s4_09_words_inside_a_message_begin_no_turn() -> None:
    text = "\n\nHuman: He said: Assistant: no.\nHuman: nor this\n\nAssistant: The Human: tag is not here"
    parsed = hh.parse_dialogue(text)
    assert [turn.role for turn in parsed] == ["user", "assistant"]
    assert parsed[0].text == " He said: Assistant: no.\nHuman: nor this"


def test_s0_17_trailing_human_turns_go_and_equal_neighbours_merge() -> None:
    parsed = hh.parse_dialogue("\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nHuman: d")
    assert hh.to_messages(parsed) == [{"role": "user", "content": "a\n\nb"}, {"role": "assistant", "content": "c"}]
    with pytest.raises(RowDropped):
        hh.parse_dialogue("\n\nHuman: a")


def test_s0_17_counts_of_the_real_rows(shared: Path) -> None:
    """Of 1,600 rows 3 are not prefixed and 2 have an empty answer; each is named."""
    file = shared / "data" / "hh-harmless.jsonl.gz"
    found: dict[str, list[int]] = {}
    strict = loose = 0
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            row = json.loads(line)
            strict += len(re.findall(r"\n\n(?:Human|Assistant):", row["chosen"]))
            loose += len(re.findall(r"(?:Human|Assistant):", row["chosen"]))
            try:
                hh.parse_pair(row["chosen"], row["rejected"])
            except RowDropped as dropped:
                found.setdefault(dropped.kind, []).append(number)
    assert found == {"hh: not prefixed": [221, 827, 939], "hh: empty": [335, 1013]}
    assert loose > strict, "a loose parser would see turns that are none"


@pytest.mark.parametrize("tokenizer", [chat_tokenizer, plain_tokenizer])
def test_s0_17_prepared_real_rows(shared: Path, tokenizer) -> None:
    prepared = prepare_data(dpo(str(shared / "data" / "hh-harmless.jsonl.gz")), tokenizer())
    counts = prepared.report.splits["train"]
    assert (counts.rows_read, counts.kept, counts.malformed.count) == (1600, 1595, 5)
    assert [row.split(" ")[0] for row in counts.malformed.rows] == [
        f"hh-harmless.jsonl.gz:{n}" for n in (221, 335, 827, 939, 1013)
    ]


def test_s0_17_sft_takes_the_chosen_dialogue(shared: Path) -> None:
    prepared = prepare_data(sft(str(shared / "data" / "hh-harmless.jsonl.gz")), chat_tokenizer())
    counts = prepared.report.splits["train"]
    assert (counts.rows_read, counts.kept, counts.malformed.count) == (1600, 1598, 2)
    assert not counts.without_eos.count and not counts.apart.count


def test_raw_text_is_kept_for_a_tokenizer_without_a_template(tmp_path: Path) -> None:
    row = {
        "chosen": HEAD + " hello\n\nHuman: more\n\nAssistant: good",
        "rejected": HEAD + " hello\n\nHuman: more\n\nAssistant: bad",
    }
    file, tokenizer = write_lines(tmp_path / "a.jsonl", [row]), plain_tokenizer()
    (group,) = prepare_data(dpo(file), tokenizer).train
    assert tokenizer.decode(group.prompt) == HEAD + " hello\n\nHuman: more\n\nAssistant:"
    assert [tokenizer.decode(c.ids) for c in group.completions] == [" good<|endoftext|>", " bad<|endoftext|>"]
    (whole,) = prepare_data(sft(file), tokenizer).train
    ids, mask = whole.completions[0].ids, whole.completions[0].mask
    assert tokenizer.decode(whole.prompt) + tokenizer.decode(ids) == row["chosen"] + "<|endoftext|>"
    assert tokenizer.decode(ids[mask]) == " hello good<|endoftext|>"
    (last,) = prepare_data(sft(file, train_on="last"), tokenizer).train
    assert tokenizer.decode(last.completions[0].ids) == " good<|endoftext|>"


def test_an_answer_with_further_turns_is_cut_or_joined(tmp_path: Path) -> None:
    rows = [
        {"chosen": HEAD + " yes", "rejected": HEAD + " no\n\nAssistant: really no"},
        {"chosen": HEAD + " yes", "rejected": HEAD + " no\n\nHuman: why?"},
    ]
    tokenizer = chat_tokenizer()
    groups = prepare_data(dpo(write_lines(tmp_path / "a.jsonl", rows)), tokenizer).train
    rejected = [tokenizer.decode(group.completions[1].ids) for group in groups]
    assert rejected == ["no\n\nreally no<|im_end|>", "no<|im_end|>"]
