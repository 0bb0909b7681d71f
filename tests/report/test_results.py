"""Numbers, tables, remarks and drawings."""

import math
import random

import pytest

from burnish.clock import show_seconds
from burnish.report.charts import draw_stage
from burnish.report.numbers import (
    is_proportion,
    show_count,
    show_difference,
    show_interval,
    show_number,
    show_p,
    show_value,
)
from burnish.report.read import StageFiles
from burnish.report.results import count_after_holm, read_blocks, write_remarks
from burnish.report.settings_section import changed_settings
from burnish.report.svg import Series, draw_interval, draw_lines, find_limits, nice_ticks, smooth, thin, tick_labels
from burnish.report.terminal import render_table
from tests.report.runs import evaluation, proportion, settings_of


def test_numbers():
    assert [show_number(v) for v in (0, 1, 0.914, 2.4309, 14.03, 138.26, 1234.5, 2.5e6, 0.0421, 1e-5, -0.5, -0.0)] == [
        "0",
        "1.000",
        "0.914",
        "2.431",
        "14.03",
        "138.3",
        "1,234",
        "2.5e6",
        "0.0421",
        "1e−5",
        "−0.500",
        "0",
    ]
    assert show_number(0.089, sign=True) == "+0.0890" and show_number(math.nan) == "nan"
    assert show_value("accuracy", 0.4125) == "41.2\u202f%" and show_value("loss", None) == "–"
    assert show_value("win_rate", math.inf) == "inf"
    assert (
        show_difference("accuracy", -0.0075) == "−0.8 points" and show_difference("accuracy", -0.0001) == "0.0 points"
    )
    assert show_difference("loss", -1.517) == "−1.517"
    assert show_interval("accuracy", 0.36, 0.46) == "36.0 to 46.0\u202f%"
    assert show_interval("loss", -0.1, 0.2, difference=True) == "−0.100 to +0.200"
    assert show_interval("loss", None, 0.2) == ""
    assert [show_p(p) for p in (0.0004, 0.0021, 0.0456, 0.63, None, math.nan)] == [
        "p < 0.001",
        "p = 0.002",
        "p = 0.046",
        "p = 0.63",
        "",
        "",
    ]
    assert [show_seconds(s) for s in (0.42, 8.21, 59.4, 252, 120, 7500, 7200, 100_000)] == [
        "0.4 s",
        "8.2 s",
        "59 s",
        "4 min 12 s",
        "2 min",
        "2 h 5 min",
        "2 h",
        "1 d 4 h",
    ]
    assert show_count(1_479_936) == "1,479,936" and show_count(7.6e9) == "7.6 B"


@pytest.mark.parametrize("name", ["accuracy", "rewards/accuracies", "win_rate", "pass@8", "mean_token_accuracy"])
def test_proportions(name):
    assert is_proportion(name)


@pytest.mark.parametrize("name", ["loss", "learning_rate", "grad_norm", "kl", "perplexity"])
def test_not_proportions(name):
    assert not is_proportion(name)


def change(p, difference=0.1, better=True):
    return {
        "table": [proportion("a", "t", "accuracy", 0.5), proportion("b", "t", "accuracy", 0.5 + difference)],
        "comparisons": [
            {
                "task": "t",
                "metric": "accuracy",
                "a": "a",
                "b": "b",
                "difference": difference,
                "low": 0,
                "high": 0.2,
                "p_value": p,
                "test": "x",
            }
        ],
    }


def test_remarks_are_honest():
    assert write_remarks(read_blocks(change(0.2))) == [
        "b against a: no significant change on t (accuracy +10.0 points)."
    ]
    assert write_remarks(read_blocks(change(0.01))) == ["b against a: better on t (accuracy +10.0 points)."]
    assert write_remarks(read_blocks(change(0.01, -0.1))) == ["b against a: worse on t (accuracy −10.0 points)."]
    assert write_remarks(read_blocks(change(None))) == ["b against a: not tested on t (accuracy +10.0 points)."]
    assert write_remarks(read_blocks(change(0.05))) == [
        "b against a: no significant change on t (accuracy +10.0 points)."
    ]
    assert write_remarks(read_blocks({})) == [] and read_blocks({"table": "x", "comparisons": [1]}) == []


def test_many_comparisons_are_corrected():
    figures = evaluation()
    figures["comparisons"] = [dict(figures["comparisons"][0], p_value=p) for p in (0.001, 0.02, 0.03, 0.04, 0.2)]
    blocks = read_blocks(figures)
    assert count_after_holm(blocks[0].changes) == 1  # 0.001 < 0.05/5, but 0.02 > 0.05/4
    assert write_remarks(blocks)[-1].endswith("Taken together (Holm's correction), 1 of 4 clear ones stay so.")


def test_terminal_table():
    text = render_table(evaluation())
    lines = text.splitlines()
    assert lines[0].split() == ["task", "metric", "model", "value", "95", "%", "interval", "n"]
    words = [" ".join(line.split()) for line in lines]
    assert any(
        line.startswith("▲ pocket/maths accuracy base → sft +29.5 points +24.1 to +34.4 < 0.001") for line in words
    )
    assert any(line.startswith("▼ held-out text loss sft → dpo +0.0890") for line in words)
    assert any(line.startswith("= pocket/maths accuracy sft → dpo −0.8 points") for line in words)
    assert "no significant change on pocket/maths" in text and "Holm" in text
    assert all(line == line.rstrip() for line in lines) and "\x1b" not in text
    assert render_table({}) == "" and render_table({"table": []}) == ""
    alone = render_table({"table": [proportion("base", "t", "accuracy", 0.5)]})
    assert "difference" not in alone and "50.0" in alone


def test_ticks():
    assert nice_ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert nice_ticks(1, 300, 4, integers=True) == [100, 200, 300]
    assert nice_ticks(1, 3, 5, integers=True) == [1, 2, 3]
    assert nice_ticks(2, 2, 5) == [2]
    assert tick_labels([0, 5e-5, 1e-4, 1.5e-4], "learning_rate") == ["0", "5e−5", "1e−4", "1.5e−4"]
    assert tick_labels([-0.5, 0.0, 0.5], "loss") == ["−0.5", "0.0", "0.5"]
    assert tick_labels([0.4, 0.6], "accuracy") == ["40 %", "60 %"]
    for seed in range(300):  # always inside, round and increasing
        rng = random.Random(seed)
        low = rng.uniform(-1, 1) * 10 ** rng.randint(-8, 8)
        high = low + rng.random() * 10 ** rng.randint(-8, 8)
        ticks = nice_ticks(low, high, 5)
        span = high - low
        assert ticks == sorted(ticks) and len(ticks) <= 11
        assert span == 0 or all(low - 1e-6 * span <= t <= high + 1e-6 * span for t in ticks)
        if len(ticks) > 1:
            assert len(set(tick_labels(ticks, "loss"))) == len(ticks) or span < 1e-6 * abs(low)


def test_smoothing_keeps_trends_and_ignores_single_spikes():
    line = [(float(i), 2.0 * i) for i in range(200)]
    smoothed, window = smooth(line)
    assert window == 7 and smoothed[100] == (100.0, 200.0) and smoothed[0] == line[0]
    spike = [(float(i), 1000.0 if i == 50 else 1.0 + 0.01 * (i % 3)) for i in range(200)]
    assert max(y for _, y in smooth(spike)[0]) < 1.1
    assert smooth(line[:5]) == ([], 0)
    holes = [(float(i), math.nan if i % 2 else 1.0) for i in range(100)]
    assert all(y == 1.0 for _, y in smooth(holes)[0])
    assert find_limits([1.0] * 50 + [9.0]) == (1.0, 9.0)  # constant but for one: nothing to protect


def test_thinning_keeps_the_extremes():
    rng = random.Random(3)
    points = [(float(i), rng.random()) for i in range(50_000)]
    points[31_234] = (31_234.0, 50.0)
    few = thin(points)
    assert len(few) <= 420 and points[31_234] in few and few[0] == points[0] and few[-1] == points[-1]
    assert few == sorted(few) and min(y for _, y in points) == min(y for _, y in few)


def test_drawings():
    assert draw_lines([Series("x", [(1.0, math.nan)])], metric="loss", label="x") is None
    single = draw_lines([Series("x", [(1.0, 2.0)], dots=True)], metric="loss", label="a < b")
    assert single is not None and "NaN" not in single.svg and "a &lt; b" in single.svg
    broken = draw_lines([Series("x", [(1.0, 1.0), (2.0, math.inf), (3.0, 2.0)])], metric="loss", label="x")
    assert broken is not None and broken.svg.count("M") == 2 and "inf" not in broken.svg and "nan" not in broken.svg
    assert draw_interval(None, None, None, (0, 1), None, "x") == ""
    assert "50.00%" in draw_interval(0.4, 0.5, 0.6, (0, 1), 0.5, "x")


def test_every_logged_metric_is_drawn_once(tmp_path):
    rows = [
        {"step": i, "kind": "train", "loss": 1.0, "extra": 2.0, "learning_rate": 1e-5, "text": "t"} for i in range(20)
    ]
    rows += [{"step": 19, "kind": "eval", "eval_loss": 1.0, "eval_extra": 2.0, "other": 1.0}]
    main, others, window = draw_stage(StageFiles(tmp_path, None, {}, metrics=rows))
    assert len(main) == 2 and len(others) == 2 and window == 3
    assert "held out" in main[0] and "held out" in others[0]


def test_settings_that_differ_from_the_defaults(tmp_path):
    stage = StageFiles(tmp_path, None, {"kind": "dpo", "settings": settings_of("dpo", beta=0.5, seed=7)})
    assert changed_settings(stage) == [("seed", 7, 42), ("beta", 0.5, 0.1)]
    own = StageFiles(tmp_path, None, {"kind": "something else", "settings": {"a": 1}})
    assert [row[:2] for row in changed_settings(own)] == [("a", 1)]
