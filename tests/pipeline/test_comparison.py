"""The table of a grid from files made by hand: means, intervals over seeds, paired tests, verdicts, baselines."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from burnish.artifacts.grid_folder import save_grid
from burnish.artifacts.run_folder import RunFolder, save_stage
from burnish.pipeline.comparison import build_summary, write_summary
from burnish.report.terminal import render_summary

N = 200


def make_items(right: int) -> list[float]:
    return [1.0] * right + [0.0] * (N - right)


def add_evaluation(folder: Path, subjects: dict[str, list[float]]) -> None:
    folder.mkdir(parents=True)
    table = [
        {
            "subject": s,
            "task": "pocket/maths",
            "metric": "accuracy",
            "value": float(np.mean(v)),
            "low": 0.1,
            "high": 0.9,
            "n": N,
            "higher_is_better": True,
        }
        for s, v in subjects.items()
    ]
    save_stage(folder, {"state": "done", "kind": "evaluate", "name": "evaluate", "figures": {"table": table}})
    rows = [
        {"task": "pocket/maths", "subject": s, "id": f"i{n}", "mark": bool(x), "end": "eos"}
        for s, v in subjects.items()
        for n, x in enumerate(v)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_grid(
    root: Path, right: dict[str, list[int]], baseline: dict[str, str], models: tuple[str, ...] = ("m",)
) -> Path:
    """Method → right answers of each seed; sft has 100 everywhere."""
    seeds = [f"seed={s + 1}" for s in range(len(next(iter(right.values()))))]
    cells, path = [], root / "g"
    with RunFolder.open(root, "g", recipe_text="", resolved={"name": "g"}) as run:
        for model, method, at in itertools.product(models, right, range(len(seeds))):
            name = f"{model}_{method}_{seeds[at]}"
            place = f"cells/{name}/03-evaluate"
            cells.append(
                {
                    "name": name,
                    "values": {"model": model, "prefer": method, "seed": seeds[at]},
                    "base": model,
                    "stages": {
                        "sft": f"shared/01-sft--{model}",
                        "prefer": f"cells/{name}/02-prefer",
                        "evaluate": place,
                    },
                }
            )
            with RunFolder.open(path / "cells", name, recipe_text="", resolved={"name": "g"}) as cell:
                add_evaluation(path / place, {"sft": make_items(100), "prefer": make_items(right[method][at])})
                cell.finish("done", seconds=2.0, exit_code=0)
        axes: list[dict[str, Any]] = [
            {"label": "model", "stage": None, "seed": False, "choices": [{"name": m, "value": m} for m in models]},
            {"label": "prefer", "stage": "prefer", "seed": False, "choices": [{"name": m, "value": {}} for m in right]},
            {"label": "seed", "stage": None, "seed": True, "choices": [{"name": s, "value": s} for s in seeds]},
        ]
        save_grid(run.path, {"axes": axes, "baseline": baseline, "cells": cells})
        run.finish("done", seconds=9.0, exit_code=0)
    return path


def figure(row: dict[str, Any]) -> dict[str, Any]:
    return row["figures"][0]


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    return make_grid(
        tmp_path, {"dpo": [100, 110, 120], "ipo": [130, 141, 149], "hinge": [95, 112, 180]}, {"prefer": "dpo"}
    )


def test_means_and_intervals_over_seeds(grid):
    """Student's interval of the mean of three seeds, written out."""
    rows = build_summary(grid)["rows"]
    assert [(r["name"], r["subject"], r["values"]) for r in rows] == [
        ("sft", "sft", {}),
        *[(name, "prefer", {"prefer": name}) for name in ("dpo", "ipo", "hinge")],
    ]
    values = np.array([130, 141, 149]) / N
    half = stats.t.ppf(0.975, 2) * values.std(ddof=1) / np.sqrt(3)
    found = figure(rows[2])
    assert (found["value"], found["low"], found["high"]) == pytest.approx(
        (values.mean(), values.mean() - half, values.mean() + half)
    )
    assert (found["over"], found["runs"], found["n"]) == ("seeds", 3, N)
    assert list(found["values"]) == ["seed=1", "seed=2", "seed=3"]
    assert (figure(rows[0])["runs"], figure(rows[0])["over"], figure(rows[0])["low"]) == (1, "items", 0.1)


def test_differences_are_paired_by_seed_and_item(grid):
    rows = build_summary(grid)["rows"]
    change = figure(rows[2])["change"]
    gaps = np.array([30, 31, 29]) / N
    half = stats.t.ppf(0.975, 2) * gaps.std(ddof=1) / np.sqrt(3)
    assert (change["seeds"]["low"], change["seeds"]["high"]) == pytest.approx((gaps.mean() - half, gaps.mean() + half))
    assert change["difference"] == pytest.approx(gaps.mean())
    items = np.mean([np.array(make_items(b)) - make_items(a) for a, b in ((100, 130), (110, 141), (120, 149))], axis=0)
    half = stats.t.ppf(0.975, N - 1) * items.std(ddof=1) / np.sqrt(N)
    assert (change["low"], change["high"]) == pytest.approx((items.mean() - half, items.mean() + half))
    assert (change["test"], change["n"]) == ("sign-flip", N)
    assert "change" not in figure(rows[1]), "the baseline is not compared with itself"


def test_a_verdict_needs_items_and_seeds(grid):
    """hinge is far above on average with p < 0.05 over the items, and its seeds go both ways: noise."""
    rows = build_summary(grid)["rows"]
    assert figure(rows[2])["change"]["verdict"] == "better"
    hinge = figure(rows[3])["change"]
    assert hinge["p_value"] < 0.05 and hinge["seeds"]["low"] < 0 < hinge["seeds"]["high"]
    assert hinge["verdict"] == "within noise"


def test_holm_corrects_over_the_rows_of_a_metric(grid):
    """Three comparisons (sft, ipo, hinge): ordered p times 3, 2, 1, never falling."""
    changes = [figure(r)["change"] for r in build_summary(grid)["rows"] if "change" in figure(r)]
    order = sorted(changes, key=lambda c: c["p_value"])
    largest = 0.0
    for rank, change in enumerate(order):
        largest = max(largest, min(1.0, change["p_value"] * (3 - rank)))
        assert change["p_holm"] == pytest.approx(largest)


def test_one_seed_is_told_and_tested_by_mcnemar(tmp_path):
    summary = build_summary(make_grid(tmp_path, {"dpo": [100], "ipo": [130]}, {"prefer": "dpo"}))
    change = figure(summary["rows"][2])["change"]
    assert change["test"] == "mcnemar" and "seeds" not in change and change["verdict"] == "better"
    assert change["p_value"] == pytest.approx(stats.binomtest(0, 30).pvalue)
    assert any("One run each" in note for note in summary["notes"])


def test_an_earlier_stage_as_the_baseline(tmp_path):
    path = make_grid(tmp_path, {"dpo": [100, 110], "ipo": [130, 140]}, {"": "sft"})
    rows = build_summary(path)["rows"]
    assert [r["compared_with"] for r in rows] == [None, 0, 0] and rows[0]["baseline"]
    assert figure(rows[2])["change"]["seeds"]["n"] == 2, "one sft, two seeds"


def test_each_model_has_its_own_baseline(tmp_path):
    path = make_grid(tmp_path, {"dpo": [100, 110], "ipo": [130, 140]}, {"prefer": "dpo"}, models=("m", "n"))
    rows = build_summary(path)["rows"]
    assert [(r["model"], r["name"], r["compared_with"]) for r in rows] == [
        ("m", "sft", 1),
        ("m", "dpo", None),
        ("m", "ipo", 1),
        ("n", "sft", 4),
        ("n", "dpo", None),
        ("n", "ipo", 4),
    ]


def test_a_model_as_the_baseline(tmp_path):
    rows = build_summary(make_grid(tmp_path, {"dpo": [100, 110]}, {"model": "m"}, models=("m", "n")))["rows"]
    assert [(r["model"], r["subject"], r["compared_with"]) for r in rows] == [
        ("m", "sft", None),
        ("m", "prefer", None),
        ("n", "sft", 0),
        ("n", "prefer", 1),
    ]


def test_unfinished_cells_are_counted_and_left_out(grid):
    place = grid / "cells/m_ipo_seed=1"
    record = json.loads((place / "run.json").read_text())
    (place / "run.json").write_text(json.dumps(record | {"state": "failed"}))
    stage = json.loads((place / "03-evaluate/stage.json").read_text())
    (place / "03-evaluate/stage.json").write_text(json.dumps(stage | {"state": "failed"}))
    summary = build_summary(grid)
    assert figure(summary["rows"][2])["runs"] == 2
    change = figure(summary["rows"][2])["change"]
    assert change["seeds"]["n"] == 2
    assert change["difference"] == pytest.approx((31 + 29) / 2 / N), "paired with the same seeds of the baseline"
    assert "1 of 9 cells are not finished" in summary["notes"][0]


def test_seeds_with_other_items_are_told(grid):
    place = grid / "cells/m_ipo_seed=3/03-evaluate/items.jsonl"
    place.write_text(place.read_text().replace('"i0"', '"other"'))
    assert any("Seeds hold out different items" in note for note in build_summary(grid)["notes"])


def test_the_table_for_a_terminal(grid):
    text = render_summary(write_summary(grid))
    lines = text.splitlines()
    assert lines[0].split() == [
        "task",
        "method",
        "mean",
        "95",
        "%",
        "interval",
        "runs",
        "difference",
        "over",
        "seeds",
        "p",
    ]
    ipo = next(line for line in lines if " ipo " in line)
    assert "70.0 %" in ipo.replace("\u202f", " ") and "▲" in ipo and "+15.0 points" in ipo
    assert "dpo *" in text and "* the baseline" in text
    assert render_summary({}) == ""
