"""`burnish data check`: 15 kinds of malformed files for each stage, before torch is loaded (R-06, D-01 … D-15)."""

import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish.config.stages import DpoSettings, RewardSettings, SftSettings
from burnish.data.check import run_check
from tests.data.toys import chat, chat_folder, dpo, pair, sft, write_lines

STAGES = {"sft": SftSettings, "reward": RewardSettings, "dpo": DpoSettings}


def row(kind: str, n: int, **more: Any) -> dict[str, Any]:
    """A good row for a stage."""
    return chat(f"question {n}", f"answer {n}") | more if kind == "sft" else pair(n, **more)


def lines(kind: str, *bad: Any, good: int = 3) -> list[Any]:
    return [row(kind, n) for n in range(good)] + list(bad)


def with_answer(kind: str, n: int, text: str) -> dict[str, Any]:
    return chat(f"question {n}", text) if kind == "sft" else pair(n, chosen=text)


def d01(folder: Path, kind: str) -> tuple[str, dict[str, Any]]:
    rows: list[Any] = [row(kind, n) for n in range(20)]
    rows[6] = json.dumps(rows[6])[:-3]
    return write_lines(folder / "a.jsonl", rows), {}


def d02(folder: Path, kind: str) -> tuple[str, dict[str, Any]]:
    bad = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": 5}]}
    return write_lines(folder / "a.jsonl", lines(kind, bad if kind == "sft" else pair(9, rejected=5))), {}


def d03(folder: Path, kind: str) -> tuple[str, dict[str, Any]]:
    bad = {"mesages": []} if kind == "sft" else {"prompt": "p", "chosen": "a", "rejcted": "b"}
    return write_lines(folder / "a.jsonl", [bad] * 9), {}


def d04(folder: Path, kind: str) -> tuple[str, dict[str, Any]]:
    path = folder / "a.json"
    write_lines(path, lines(kind))
    return str(path), {}


def d05(folder: Path, kind: str) -> tuple[str, dict[str, Any]]:
    path = folder / "a.jsonl"
    text = "\n".join(json.dumps(r) for r in lines(kind))
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    return str(path), {}


def d06(folder: Path, kind: str) -> tuple[str, dict[str, Any]]:
    path = folder / "a.jsonl"
    path.write_bytes("\r\n".join(json.dumps(r) for r in lines(kind)).encode())
    return str(path), {}


def d07(folder: Path, kind: str) -> tuple[str, dict[str, Any]]:
    return write_lines(folder / "a.jsonl", lines(kind, with_answer(kind, 9, "a\x00b"))), {}


def d08(folder: Path, kind: str) -> tuple[str, dict[str, Any]]:
    path = folder / "a.jsonl"
    path.write_bytes(gzip.compress(json.dumps(row(kind, 1)).encode()))
    return str(path), {}


def d09(folder: Path, kind: str) -> tuple[str, dict[str, Any]]:
    return write_lines(folder / "a.jsonl", lines(kind, '{"text": "' + "x" * 34_000_000 + '"}')), {}


def d10(folder: Path, kind: str) -> tuple[str, dict[str, Any]]:
    train = write_lines(folder / "a.jsonl", lines(kind))
    return train, {"eval_data": write_lines(folder / "b.jsonl", [row(kind, 7), row(kind, 1)])}


def d11(folder: Path, kind: str) -> tuple[str, dict[str, Any]]:
    user, said = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    bad = {"messages": [user, user, said]} if kind == "sft" else {"prompt": [said], "chosen": [said], "rejected": "b"}
    return write_lines(folder / "a.jsonl", lines(kind, bad)), {}


def d12(folder: Path, kind: str) -> tuple[str, dict[str, Any]]:
    same = [pair(n, rejected=f" good answer {n}") for n in range(10, 20)]
    return write_lines(folder / "a.jsonl", lines("dpo", *same)), {}


def d13(folder: Path, kind: str) -> tuple[str, dict[str, Any]]:
    bad = chat("words " * 200, "a") if kind == "sft" else pair(9, prompt="words " * 200)
    return write_lines(folder / "a.jsonl", [bad]), {"max_length": 60}


def d14(folder: Path, kind: str) -> tuple[str, dict[str, Any]]:
    return write_lines(folder / "a.jsonl", lines(kind, with_answer(kind, 9, " \n "))), {}


def d15(folder: Path, kind: str) -> tuple[str, dict[str, Any]]:
    bad = ['{"a": 1, "a": 2}', '{"a": NaN}', '{"a": 1e999}', '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"]
    return write_lines(folder / "a.jsonl", lines(kind, *bad)), {}


CASES: list[tuple[Callable[[Path, str], tuple[str, dict[str, Any]]], list[str]]] = [
    (d01, ["a.jsonl:7: not valid JSON", "column", "fix or set on_error: skip (then counted and reported)"]),
    (d02, ["a.jsonl:4: ", "expected a text, found the number 5"]),
    (
        d03,
        [
            "a.jsonl:1: ",
            "did you mean",
            "set data.columns: {",
            "columns found: ",
            "the same at lines 2, 3, 4, 5, and 4 more rows",
        ],
    ),
    (d04, ["holds JSON Lines, but .json means one array of objects", "rename it to end in .jsonl"]),
    (d05, []),
    (d06, []),
    (d07, ["a.jsonl:4: ", "\\u0000 at character 2", "strip_control"]),
    (d08, ["byte 0 begins gzip data", "rename it to end in .gz"]),
    (d09, ["a.jsonl:4: this line is longer than 32 MB", "split the file"]),
    (d10, ["b.jsonl:2: prompt: this evaluation row has the prompt of the training row a.jsonl:2"]),
    (d11, ["a.jsonl:4: ", ".role: ", "cannot come", "accepted: an optional system message"]),
    (
        d12,
        [
            "a.jsonl:4: ",
            "chosen and rejected are equal",
            "the same at lines 5, 6, 7, 8, and 5 more rows",
            "drop_identical: true",
        ],
    ),
    (d13, ["a.jsonl:1 (the prompt alone has", "max_length is 60", "raise max_length"]),
    (d14, ["a.jsonl:4: ", "the answer is empty", "on_error: skip"]),
    (d15, ["'a' stands twice", "NaN is not a JSON number", "1e999 is too large", "brackets nest too deeply"]),
]


def check(settings: Any, as_json: bool = False, limit: int = 20, tokenizer: str | None = "toy") -> tuple[int, str]:
    out = io.StringIO()
    chosen = chat_folder() if tokenizer == "toy" else tokenizer
    return run_check(settings, tokenizer=chosen, out=out, as_json=as_json, limit=limit), out.getvalue()


@pytest.mark.parametrize("kind", list(STAGES))
@pytest.mark.parametrize(("case", "words"), CASES, ids=[case.__name__ for case, _ in CASES])
def test_r06_malformed_files(case: Any, words: list[str], kind: str, tmp_path: Path) -> None:
    if case is d12 and kind == "sft":
        pytest.skip("a single completion has no pair to be equal to")
    file, settings = case(tmp_path, kind)
    status, text = check(STAGES[kind](data=file, **settings))
    assert status == (2 if words else 0), text
    for word in words:
        assert word in text
    assert "→" in text or not words


def test_r06_before_torch_is_loaded(tmp_path: Path) -> None:
    """All files in one fresh process: exit 2 for each, and neither torch nor transformers was imported."""
    jobs = []
    for case, words in CASES:
        (tmp_path / case.__name__).mkdir()
        file, settings = case(tmp_path / case.__name__, "dpo")
        jobs.append([file, settings, 2 if words else 0])
    code = (
        "import io, json, sys\n"
        "from burnish.config.stages import DpoSettings; from burnish.data.check import run_check\n"
        "for file, settings, expected in json.loads(sys.argv[1]):\n"
        "    status = run_check(DpoSettings(data=file, **settings), tokenizer=sys.argv[2], out=io.StringIO(), as_json=False)\n"
        "    assert status == expected, file\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(jobs), chat_folder()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_every_problem_in_one_pass_and_counts_beyond_the_limit(tmp_path: Path) -> None:
    rows: list[Any] = [pair(1)] + ['{"prompt":' + " " * n + "x" for n in range(1, 31)]
    status, text = check(dpo(write_lines(tmp_path / "a.jsonl", rows)))
    assert status == 2 and text.count("not valid JSON") >= 20
    assert "10 further problems" in text and "30 problems: a stage would refuse these data" in text
    status, text = check(dpo(write_lines(tmp_path / "a.jsonl", rows), on_error="skip"))
    assert status == 0 and "30 malformed rows would be skipped" in text


def test_json_output(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [pair(1), "{", pair(2, rejected=5)])
    status, text = check(dpo(file), as_json=True)
    found = json.loads(text)
    assert status == 2 and found["ok"] is False and found["total"] == 2
    assert [p["where"].rpartition("/")[2] for p in found["problems"]] == ["a.jsonl:2", "a.jsonl:3"]
    assert all(p["remedy"] for p in found["problems"]) and found["report"]["splits"]["train"]["kept"] == 1
    status, text = check(sft(write_lines(tmp_path / "b.jsonl", [chat("q", "a")])), as_json=True)
    assert status == 0 and json.loads(text)["ok"] is True


def test_without_a_tokenizer_the_form_is_checked(tmp_path: Path) -> None:
    good = write_lines(tmp_path / "a.jsonl", [pair(1), pair(2)])
    status, text = check(dpo(good), tokenizer=None)
    assert status == 0 and "lengths were not checked" in text and "2 kept" in text
    bad = write_lines(tmp_path / "b.jsonl", [pair(1, rejected="")])
    assert check(dpo(bad), tokenizer=None)[0] == 2


def test_missing_files_settings_and_models_are_problems_too(tmp_path: Path) -> None:
    status, text = check(dpo(str(tmp_path / "none.jsonl")))
    assert status == 2 and "there is no such file" in text and "→" in text
    file = write_lines(tmp_path / "a.jsonl", [pair(1)])
    assert check(dpo(file, columns="nothing"))[0] == 2
    status, text = check(dpo(file), tokenizer=str(tmp_path / "no model here"))
    assert status == 2 and "→" in text
    assert check(dpo(None))[0] == 2


def test_real_rows(shared: Path) -> None:
    status, text = check(dpo(str(shared / "data" / "hh-harmless.jsonl.gz")))
    assert (
        status == 0
        and "1,600 rows read, 1,595 kept" in text
        and "5 malformed, left out: hh-harmless.jsonl.gz:221" in text
    )
