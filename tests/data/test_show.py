"""`burnish data show`: what the model sees, what is scored."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from burnish.data import show
from burnish.data.problems import DataProblems
from burnish.data.show import run_show
from burnish.errors import UsageError
from tests.data.toys import chat, chat_folder, chat_tokenizer, dpo, pair, reward, sft, write_lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(settings: Any, out: io.StringIO | None = None, **options: Any) -> str:
    out = out or io.StringIO()
    assert run_show(settings, tokenizer=chat_folder(), out=out, as_json=options.pop("as_json", False), **options) == 0
    return out.getvalue()


def test_plain_output_marks_what_is_scored(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "a.jsonl", [chat("q1", "a1", "q2", "[bold]a2[/bold]"), chat("q", "a"), chat("x", "y")]
    )
    text = shown(sft(file), limit=2)
    assert "a.jsonl:1" in text and "a.jsonl:2" in text and "a.jsonl:3" not in text
    assert "«a1<|im_end|>»" in text and "«[bold]a2[/bold]<|im_end|>»" in text
    assert "prompt, " in text and "scored" in text and "\x1b" not in text
    text = shown(reward(write_lines(tmp_path / "b.jsonl", [pair(1, margin=2)])))
    assert "chosen, " in text and "rejected, " in text and "margin=2" in text


def test_colours_only_on_a_terminal_and_without_no_color(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_lines(tmp_path / "a.jsonl", [chat("q", "a")])
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = shown(sft(file), Terminal())
    assert "\x1b[32m" in coloured and "«" not in coloured and "the prompt ends here" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    plain = shown(sft(file), Terminal())
    assert "\x1b[32m" not in plain and "«a<|im_end|>»" in plain


def test_json_has_every_token(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [pair(1)])
    found = json.loads(shown(dpo(file), as_json=True))
    assert found["id"] == "a.jsonl:1" and [c["name"] for c in found["completions"]] == ["chosen", "rejected"]
    ids = [token["id"] for token in found["completions"][0]["tokens"]]
    assert chat_tokenizer().decode(ids) == found["completions"][0]["text"]
    assert all(token["scored"] for token in found["completions"][0]["tokens"])
    assert not any(token["scored"] for token in found["prompt"]["tokens"])


def test_only_the_first_rows_are_read(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [chat("q", "a"), "broken"])
    assert "a.jsonl:1" in shown(sft(file), limit=1)
    with pytest.raises(DataProblems):
        shown(sft(file), limit=2)


def test_without_a_model_the_bundled_one_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish.data.bundled import resolve_model

    file = write_lines(tmp_path / "a.jsonl", [chat("q", "a")])
    if resolve_model("pocket") is not None:
        out = io.StringIO()
        run_show(sft(file), tokenizer=None, out=out, as_json=False)
        assert "these are the tokens of pocket" in out.getvalue()
    monkeypatch.setattr("burnish.data.bundled.resolve_model", lambda name: None)
    with pytest.raises(UsageError, match="no model is named"):
        show.tokenizer_or_bundled(sft(file), None)
