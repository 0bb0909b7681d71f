"""A second process tokenises while torch is imported: what it leaves, when there is none, and what its end means."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from burnish.config.load import load_recipe
from burnish.pipeline.prefetch import Prefetch, start_prefetch
from tests.waiting import BOUND

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

_BEGIN = """
import os, signal, sys
from burnish.config.load import load_recipe
from burnish.pipeline import prefetch
prefetch._count_cores = lambda: 2
recipe = load_recipe({recipe!r}).recipe
def start():
    return prefetch.start_prefetch(recipe)
"""


def _recipe(inputs: Path, **changed) -> dict:
    model, chat, pairs = (str(inputs / name) for name in ("model", "chat.jsonl", "pairs.jsonl"))
    stages = [
        {"kind": "sft", "data": chat},
        {"kind": "dpo", "init_from": "sft", "data": pairs},
        {"kind": "evaluate", "tasks": ["loss"]},
    ]
    return {"model": model, "stages": stages, **changed}


def _run(code: str, cwd: Path, **environment: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=BOUND,
        cwd=cwd,
        env={**os.environ, "BURNISH_CACHE": str(cwd / "cache"), **environment},
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_data_are_in_the_cache_when_the_stage_asks(inputs: Path, tmp_path: Path) -> None:
    code = _BEGIN.format(recipe=_recipe(inputs)) + (
        "first = start(); first.wait('sft'); first.wait('dpo'); print(sorted(first.made)); first.close()\n"
        "from burnish.data.prepare import prepare_data\n"
        "from burnish.data.tokenizer import TextTokenizer\n"
        "from burnish.models.folder import read_context\n"
        "from pathlib import Path\n"
        f"folder = Path({str(inputs / 'model')!r})\n"
        "tokenizer, context = TextTokenizer.load(str(folder)), read_context(folder)\n"
        "print([prepare_data(s, tokenizer, context=context).report.from_cache for s in recipe.stages[:2]])\n"
        "again = start(); again.wait('sft'); again.wait('dpo'); print(sorted(again.made)); again.close()\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert _run(code, tmp_path).splitlines() == ["['dpo', 'sft']", "[True, True]", "[]"]


def test_a_child_that_dies_or_fails_holds_nobody_up(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{\n")
    recipe = _recipe(inputs)
    recipe["stages"][0]["data"] = str(tmp_path / "bad.jsonl")
    code = _BEGIN.format(recipe=recipe) + (
        "first = start(); first.wait('sft'); first.wait('dpo'); print(sorted(first.made)); first.close()\n"
        "prefetch.prepare_data = lambda *a, **k: signal.pause()\n"
        "second = start(); os.kill(second._child, 9); second.wait('sft'); second.close()\n"
        "third = start(); third.close(); third.wait('sft')\n"
    )
    assert _run(code, tmp_path).splitlines() == ["['dpo']"]


@pytest.mark.parametrize("why", ["torch", "threads", "ranks", "cache", "cores", "no folder"])
def test_when_there_is_none(why: str, inputs: Path, tmp_path: Path) -> None:
    recipe = _recipe(inputs, **({"model": "nobody/nothing"} if why == "no folder" else {}))
    first = {
        "torch": "sys.modules['torch'] = sys\n",
        "threads": "import threading; threading.Thread(target=signal.pause, daemon=True).start()\n",
        "cores": "prefetch._count_cores = lambda: 1\n",
    }.get(why, "")
    environment = {"ranks": {"WORLD_SIZE": "2"}, "cache": {"BURNISH_CACHE": "off"}}.get(why, {})
    code = _BEGIN.format(recipe=recipe) + first + "print(start()._child)\n"
    assert _run(code, tmp_path, **environment).strip() == "-1"


def test_an_inert_one_waits_for_nothing() -> None:
    nothing = Prefetch()
    nothing.wait("sft")
    nothing.close()
    assert nothing.made == set()
    recipe = load_recipe({"model": "pocket", "stages": [{"kind": "sft", "data": "pocket/chat"}]}).recipe
    import torch  # noqa: F401  # with torch in the process nothing is forked

    assert start_prefetch(recipe)._child == -1


def test_the_first_run_does_not_call_its_data_cached(inputs: Path, tmp_path: Path) -> None:
    """Through the command: the data come from the child, and the log says so only of data that were there before."""
    words = ["-m", "burnish", "sft", f"model={inputs / 'model'}", f"data={inputs / 'chat.jsonl'}", "max_steps=1"]
    logs = []
    for name in ("a", "b"):
        found = subprocess.run(
            [sys.executable, *words, f"run_name={name}"],
            capture_output=True,
            text=True,
            timeout=BOUND,
            cwd=tmp_path,
            env={**os.environ, "BURNISH_CACHE": str(tmp_path / "cache")},
        )
        assert found.returncode == 0, found.stderr
        logs.append(found.stdout + found.stderr)
    assert "rows read" in logs[0] and "taken from the cache" not in logs[0]
    assert "taken from the cache" in logs[1]


def test_closing_ends_a_child_that_still_works(inputs: Path, tmp_path: Path) -> None:
    code = _BEGIN.format(recipe=_recipe(inputs)) + (
        "prefetch.prepare_data = lambda *a, **k: signal.pause()\nfound = start(); print(found._child); found.close()\n"
    )
    child = int(_run(code, tmp_path))
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
