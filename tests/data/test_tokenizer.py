"""Tokenizers from folders, without transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from burnish.data.tokenizer import TextTokenizer
from burnish.errors import DataError, ServiceError
from tests.data.toys import (
    CHATML,
    bos_tokenizer,
    byte_level,
    chat_tokenizer,
    plain_tokenizer,
    spaced_tokenizer,
    write_tokenizer,
)


def test_attributes_come_from_all_files(tmp_path: Path) -> None:
    folder = write_tokenizer(
        tmp_path, byte_level(["<a>", "<b>", "<c>"]), eos_token={"content": "<a>"}, model_max_length=10**30
    )
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<c>"}))
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 99, "eos_token_id": 0}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    found = TextTokenizer.load(str(folder))
    assert (found.eos_id, found.eos_ids, found.bos_id) == (0, {0, 1}, 2)
    assert (
        found.model_max_length == 99
        and found.chat_template == CHATML
        and found.chat_templates == {"tool_use": "{{ tools }}"}
    )
    assert found.special_tokens == {"bos_token": "<c>", "eos_token": "<a>"} and not found.adds_bos
    assert found.vocab_size == len(found.backend.get_vocab())
    assert found.decode(found.encode("The sky <a>!")) == "The sky <a>!"
    assert found.decode(found.encode("x<a>"), skip_special_tokens=True) == "x"
    assert TextTokenizer.load(str(folder / "tokenizer.json")).fingerprint == found.fingerprint


def test_templates_may_be_a_list(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    found = TextTokenizer.load(str(write_tokenizer(tmp_path, byte_level(["<a>"]), chat_template=named)))
    assert (found.chat_template, found.chat_templates) == ("d", {"tool_use": "t"})
    assert found.eos_id is None and found.eos_ids == frozenset()


def test_the_fingerprint_follows_what_matters(tmp_path: Path) -> None:
    made = byte_level(["<a>", "<b>"])
    prints = {
        TextTokenizer.load(str(write_tokenizer(tmp_path / str(i), made, **config))).fingerprint
        for i, config in enumerate(
            [
                {"eos_token": "<a>"},
                {"eos_token": "<b>"},
                {"eos_token": "<a>", "chat_template": "x"},
                {"eos_token": "<a>", "padding_side": "left"},
            ]
        )
    }
    assert len(prints) == 3, "the side of padding changes nothing"


def test_padding_and_truncation_of_the_file_are_switched_off(tmp_path: Path) -> None:
    made = byte_level(["<a>"])
    made.enable_padding(length=50)
    made.enable_truncation(3)
    found = TextTokenizer.load(str(write_tokenizer(tmp_path, made)))
    assert len(found.encode("hello")) == len(byte_level(["<a>"]).encode("hello").ids)
    assert len(found.encode_many(["hello world and more"])[0]) > 3


@pytest.mark.parametrize("make", [chat_tokenizer, plain_tokenizer, bos_tokenizer, spaced_tokenizer])
def test_continuations_join_to_the_whole(make) -> None:
    tokenizer = make()
    for head, tail in (("User: hello", " there"), ("a\n", "b"), ("The sky", " is blue"), ("x.", "\n\nHuman: how")):
        first, second = tokenizer.encode_many([head, tail], continues=[False, True])
        assert tokenizer.decode(first + second).strip() == (head + tail).strip()
        assert first + second == tokenizer.encode(head + tail)


def test_a_space_before_every_text_is_not_put_into_continuations() -> None:
    tokenizer = spaced_tokenizer()
    alone, goes_on = tokenizer.encode_many(["hello", "hello"], continues=[False, True])
    assert tokenizer.decode(alone) == " hello" and tokenizer.decode(goes_on) == "hello"


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer\.json") as caught:
        TextTokenizer.load(str(tmp_path))
    assert "save_pretrained" in caught.value.remedy
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        TextTokenizer.load(str(tmp_path))
    write_tokenizer(tmp_path, byte_level(["<a>"]))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        TextTokenizer.load(str(tmp_path))
    with pytest.raises(DataError, match="no folder"):
        TextTokenizer.load("./not/here/at/all")


def test_the_hub_is_not_asked_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((ServiceError, DataError)) as caught:
        TextTokenizer.load("nobody-at-all/no-such-model")
    assert caught.value.remedy


def test_real_tokenizer(shared: Path) -> None:
    found = TextTokenizer.load(str(shared / "data" / "stories260k-hf"))
    assert (found.bos_id, found.eos_id, found.eos_ids) == (1, 2, {1, 2})
    assert found.adds_bos and found.model_max_length == 512 and found.vocab_size == 512
    text = "Once upon a time, there was a little dog."
    assert found.decode(found.encode(text)).strip() == text


def test_loading_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, byte_level(["<a>"]), chat_template=CHATML)
    code = (
        "import sys; from burnish.data.tokenizer import TextTokenizer; TextTokenizer.load(sys.argv[1]).encode('a')\n"
        "import burnish.data.prepare, burnish.data.check, burnish.data.show, burnish.data.stats, burnish.data.prompts\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'huggingface_hub', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
