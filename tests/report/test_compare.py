"""The page of a grid: what stands on it, what it links to, that nothing breaks out of it or breaks it."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from burnish.artifacts.grid_folder import save_grid
from burnish.artifacts.run_folder import RunFolder
from burnish.report.compare import render_comparison
from burnish.report.html import render_report
from burnish.report.terminal import render_summary
from tests.report.runs import add_training

EVIL = """</script><script>alert(1)</script><img src=x onerror=alert(1)>"'&"""


def make_figure(value: float, *, base: bool = False, verdict: str = "better", **more: Any) -> dict[str, Any]:
    out = {
        "task": "preferences",
        "metric": "accuracy",
        "runs": 2,
        "n": 400,
        "higher_is_better": True,
        "value": value,
        "low": value - 0.02,
        "high": value + 0.02,
        "over": "seeds",
        "values": {"1": value - 0.01, "2": value + 0.01},
    }
    if not base:
        out["change"] = {
            "difference": value - 0.8,
            "low": 0.01,
            "high": 0.03,
            "p_value": 0.01,
            "p_holm": 0.02,
            "n": 400,
            "test": "sign-flip",
            "seeds": {"low": 0.005, "high": 0.035, "n": 2},
            "verdict": verdict,
        }
    return out | more


def make_grid(root: Path, *, name: str = "ipo", state: str = "done") -> Path:
    """Two forms, two seeds, with curves; the second form may have any name."""
    forms = ["dpo", name]
    cells = []
    with RunFolder.open(
        root,
        "g",
        recipe_text=f"name: g  # {EVIL if name == EVIL else ''}\n",
        resolved={"name": "g"},
        command=["burnish", "run", name],
        environment={"threads": 1, "device": "cpu"},
    ) as run:
        for at, form in enumerate(forms):
            for seed in (1, 2):
                cell = f"{'ab'[at]}_seed={seed}"
                cells.append(
                    {
                        "name": cell,
                        "values": {"prefer": form, "seed": f"seed={seed}"},
                        "base": "pocket",
                        "stages": {"prefer": f"cells/{cell}/01-dpo"},
                    }
                )
                with RunFolder.open(run.path / "cells", cell, recipe_text="", resolved={"name": "g"}) as own:
                    add_training(own, 1, "dpo", seed=seed + at, steps=40)
                    own.finish(state, seconds=3.0, exit_code=0 if state == "done" else 1)
                    render_report(own.path)
        axes = [
            {
                "label": "prefer",
                "stage": "prefer",
                "seed": False,
                "choices": [{"name": f, "value": {"kind": f}} for f in forms],
            },
            {
                "label": "seed",
                "stage": None,
                "seed": True,
                "choices": [{"name": f"seed={s}", "value": s} for s in (1, 2)],
            },
        ]
        save_grid(run.path, {"axes": axes, "baseline": {"prefer": "dpo"}, "cells": cells})
        rows = [
            {
                "name": "sft",
                "model": None,
                "subject": "sft",
                "values": {},
                "cells": ["a_seed=1"],
                "baseline": False,
                "compared_with": 1,
                "figures": [make_figure(0.4, verdict="worse")],
            },
            {
                "name": "dpo",
                "model": None,
                "subject": "prefer",
                "values": {"prefer": "dpo"},
                "cells": ["a_seed=1", "a_seed=2"],
                "baseline": True,
                "compared_with": None,
                "figures": [make_figure(0.8, base=True)],
            },
            {
                "name": name,
                "model": None,
                "subject": "prefer",
                "values": {"prefer": name},
                "cells": ["b_seed=1", "b_seed=2"],
                "baseline": False,
                "compared_with": 1,
                "figures": [make_figure(0.82)],
            },
        ]
        states = [
            {
                **{k: c[k] for k in ("name", "values")},
                "state": state,
                "seconds": 3.0,
                "error": EVIL if state == "failed" else None,
            }
            for c in cells
        ]
        metrics = [{"task": "preferences", "metric": "accuracy", "main": True}]
        summary = {"cells": states, "rows": rows, "metrics": metrics, "notes": [f"Note {name}."], "axes": axes}
        (run.path / "summary.json").write_text(json.dumps(summary))
        run.finish(state, seconds=12.0, exit_code=0)
        return run.path


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "br", "line", "circle", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read_page(path: Path) -> tuple[str, list[str]]:
    page = render_comparison(path).read_text()
    tags = _Tags()
    tags.feed(page)
    assert tags.open == [], "every tag is closed in its place"
    return page, tags.seen


def test_the_page_holds_the_table_the_curves_and_the_links(tmp_path):
    path = make_grid(tmp_path)
    page, _ = read_page(path)
    assert render_report(path) == path / "report.html", "burnish report knows grids"
    text = re.sub(r"<[^>]+>", " ", page).replace("\u202f", " ")
    assert "4 cells: 2 forms of prefer × 2 seeds." in text
    for words in ("82.0 %", "+2.0 points", "▲ better", "p = 0.020", "80.0 to 84.0 %", "Note ipo."):
        assert words in text, words
    assert "◂ off the scale" in text, "sft, far from what the grid varies"
    assert page.count('class="single"') == 4, "each seed's value, in the rows that are on the scale"
    assert page.count('<svg viewBox="0 0 340') == 6, "loss, accuracy and margin of two forms"
    for cell in ("a_seed%3D1", "b_seed%3D2"):
        assert f'href="cells/{cell}/report.html"' in page
    assert "src=" not in page and "http" not in page.replace("http-equiv", "")


def test_accuracies_share_a_scale_and_losses_do_not(tmp_path):
    path = make_grid(tmp_path)
    for file in path.glob("cells/b_*/01-dpo/metrics.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        changed = [
            row | {"rewards/accuracies": 0.1, "loss": 40 + row["step"]} for row in rows if row["kind"] == "train"
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in changed))
    page, _ = read_page(path)
    ticks = [re.findall(r'text-anchor="end">([^<]+)</text>', svg) for svg in re.findall(r"<svg viewBox.*?</svg>", page)]
    assert ticks[2] == ticks[3] and ticks[0] != ticks[1]


def test_no_text_breaks_out(tmp_path):
    page, tags = read_page(make_grid(tmp_path, name=EVIL, state="failed"))
    assert "script" not in tags and "img" not in tags
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("seed", range(30))
def test_damaged_files_never_stop_the_page(tmp_path, seed):
    """Values of summary.json replaced at random by others: a page and a table come out."""
    draw = random.Random(seed)
    path = make_grid(tmp_path)
    summary: Any = json.loads((path / "summary.json").read_text())
    if seed == 0:
        summary = []
    elif seed == 1:
        (path / "summary.json").unlink()
    for _ in range(seed and 3):
        row = draw.choice(summary["rows"])
        figures = row.get("figures")
        figure = figures[0] if isinstance(figures, list) and figures else {}
        place = draw.choice([row, figure, figure.get("change"), draw.choice(summary["cells"])])
        if isinstance(place, dict) and place:
            place[draw.choice(list(place))] = draw.choice([None, "x", {}, [], 1e400, -1, True])
    if seed != 1:
        (path / "summary.json").write_text(json.dumps(summary))
    read_page(path)
    render_summary(summary if isinstance(summary, dict) else {})


def test_the_terminal_shows_models_where_there_are_several(tmp_path):
    summary = json.loads((make_grid(tmp_path) / "summary.json").read_text())
    assert "model" not in render_summary(summary).splitlines()[0]
    summary["rows"][1]["model"] = "pocket"
    assert "model" in render_summary(summary).splitlines()[0]
