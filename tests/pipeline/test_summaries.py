"""Plans read equal data once, however many stages and cells name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from burnish.cli.main import main
from burnish.config.stages import DpoSettings, SftSettings
from burnish.data import prepare
from burnish.data.tokenizer import TextTokenizer
from burnish.pipeline.summaries import DataSummaries
from tests.pipeline.test_grid import write_grid


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kinds of stages whose rows were parsed ("rows") or taken from the cache on disk ("cache"), in order."""
    found: list[str] = []
    whole, entry = prepare.load_all, prepare.load_entry

    def load_all(settings: Any, *rest: Any) -> Any:
        found.append(f"rows of {settings.kind}")
        return whole(settings, *rest)

    def load_entry(*args: Any) -> Any:
        hit = entry(*args)
        found.extend(["cache"] if hit is not None else [])
        return hit

    monkeypatch.setattr(prepare, "load_all", load_all)
    monkeypatch.setattr(prepare, "load_entry", load_entry)
    return found


def test_a_plan_of_a_grid_reads_each_content_once(
    inputs: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """4 cells of 3 kinds and 2 seeds, 8 training stages: the texts, the pairs; also without a cache on disk."""
    recipe = write_grid(
        tmp_path, inputs, grid={"prefer": {"dpo": {"kind": "dpo"}, "simpo": {"kind": "simpo"}}, "prefer.seed": [1, 2]}
    )
    monkeypatch.setenv("BURNISH_CACHE", "off")
    assert main(["run", str(recipe), "--dry-run", "--json"]) == 0
    text = capsys.readouterr().out
    plan = json.loads(text[text.index("{") :])
    assert len(plan["cells"]) == 4
    assert reads == ["rows of sft", "rows of dpo"]
    trained = [row for row in plan["stages"].values() if row["kind"] != "evaluate"]
    assert sorted((row["kind"], row["train"], row["held_out"]) for row in trained) == [
        *[("dpo", 24, 6)] * 2,
        ("sft", 24, 0),
        *[("simpo", 24, 6)] * 2,
    ]


def test_a_plan_takes_from_the_cache_once(
    inputs: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    recipe = write_grid(tmp_path, inputs)
    for _ in range(2):
        assert main(["run", str(recipe), "--dry-run"]) == 0
    assert reads == ["rows of sft", "rows of dpo", "cache", "cache"]


def test_other_content_is_another_summary(inputs: Path, tmp_path: Path, reads: list[str]) -> None:
    """A file that is edited while the process lives is read again: the key holds its bytes."""
    tokenizer, summaries = TextTokenizer.load(str(inputs / "model")), DataSummaries()
    file = tmp_path / "pairs.jsonl"
    file.write_bytes((inputs / "pairs.jsonl").read_bytes())
    first = summaries.find(DpoSettings(data=str(file)), tokenizer)
    assert summaries.find(DpoSettings(data=str(file), seed=9, beta=0.7), tokenizer) is first
    assert summaries.find(SftSettings(data=str(file)), tokenizer).fingerprint != first.fingerprint
    file.write_text("".join(file.open().readlines()[:-1]))
    second = summaries.find(DpoSettings(data=str(file)), tokenizer)
    assert (first.train, second.train) == (24, 23) and first.fingerprint != second.fingerprint
    assert [read for read in reads if read != "cache"] == ["rows of dpo", "rows of sft", "rows of dpo"]
    assert first.report.splits["train"].kept == 24
