"""What the page draws and says of margins and β, also from damaged records."""

from __future__ import annotations

import math
import random
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from burnish.report.margin_charts import DRAWN, draw_margins, write_margin_remarks
from burnish.report.read import StageFiles
from burnish.report.stage_section import render_stage
from burnish.report.svg import Band, Series, draw_lines
from tests.report.runs import margins_of

TITLES = ("Distribution of margins", "β", "Share of margins above τ", "Log-ratio to the reference", "Length of answers")


def build_stage(margins: list[dict[str, Any]], **settings: Any) -> StageFiles:
    metrics = [{"step": s, "kind": "train", "loss": 0.6, **dict.fromkeys(DRAWN, 0.2)} for s in range(1, 21)]
    record = {"kind": "dpo", "name": "dpo", "state": "done", "settings": settings}
    return StageFiles(Path("01-dpo"), None, record, metrics=metrics, margins=margins)


def test_every_chart_is_there_and_none_twice():
    stage = build_stage(margins_of(120, random.Random(0)), dynamic_beta={"type": "risk", "delta": 0.1})
    drawn, window = draw_margins(stage)
    assert window > 1
    assert [t for t in TITLES if any(f">{t}</span>" in d for d in drawn)] == list(TITLES)
    for figure in drawn:
        ET.fromstring(figure)
    page = render_stage(stage)
    assert all(f">{name}<" not in page for name in DRAWN), "no further curve of what is drawn already"
    assert "<b>10.0\u202f%</b>" in page


def test_a_constant_beta_has_margins_and_no_beta():
    drawn, _ = draw_margins(build_stage(margins_of(40, random.Random(0), risk=False)))
    assert [t for t in TITLES if any(f">{t}</span>" in d for d in drawn)] == [TITLES[0], *TITLES[3:]]
    assert draw_margins(build_stage([])) == ([], 0)


@pytest.mark.parametrize("value", [None, "x", math.nan, math.inf, [], {}, True, 10**400, [1], [None, "x"]])
def test_damaged_records_are_drawn_as_far_as_they_go(value):
    rows = margins_of(30, random.Random(0))
    for at, name in enumerate(sorted(rows[0])):
        rows[at % 30][name] = value
    stage = build_stage(rows, dynamic_beta=value)
    render_stage(stage)
    render_stage(build_stage([dict.fromkeys(rows[0], value)] * 3))


def test_what_the_page_says_of_margins():
    rows = margins_of(100, random.Random(0))
    assert write_margin_remarks(build_stage(rows[:1])) == ([], []), "the first step's margins are 0 as they should be"
    for row in rows[40:60]:
        row["zero_frac"] = 0.7
    for row in rows[70:73]:
        row["held"] = 2
    for row in rows[90:]:
        row["beta_used"] = 2.0
    warned, noted = write_margin_remarks(build_stage(rows, dynamic_beta={"type": "risk"}))
    assert (
        len(warned) == 1 and "In 20 of 100 steps" in warned[0] and "70.0\u202f%" in warned[0] and "step 41" in warned[0]
    )
    assert len(noted) == 3
    assert "held in 3 steps" in noted[0] and "step 71" in noted[0]
    assert "less likely than under the reference" in noted[1] and "likelihood displacement" in noted[1]
    assert "at a limit in 10.0\u202f% of the steps" in noted[2]
    assert '<div class="warn">' in render_stage(build_stage(rows))


def test_a_band_lies_between_its_edges_and_a_pale_one_does_not_stretch_the_scale():
    line = [Series("x", [(s, 1.0) for s in range(5)])]
    calm = draw_lines(line, metric="m", label="", bands=[Band([(s, 0.0, 2.0) for s in range(5)])])
    wild = draw_lines(
        line,
        metric="m",
        label="",
        bands=[Band([(s, -99.0, 99.0) for s in range(5)], pale=True), Band([(s, 0.0, 2.0) for s in range(5)])],
    )
    assert calm and wild
    assert 'class="band s1"' in calm.svg and 'class="band pale s1"' in wild.svg
    ticks = [[t.text for t in ET.fromstring(c.svg).iter("text")] for c in (calm, wild)]
    assert ticks[0] == ticks[1] and "99" not in "".join(map(str, ticks[0]))
    assert not draw_lines([Series("x", [])], metric="m", label="", bands=[Band([])])
