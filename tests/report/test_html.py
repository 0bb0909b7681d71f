"""The page: complete in itself, escaped, tolerant of damage, without secrets (R-29), the same from the same files."""

import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from burnish.artifacts.run_folder import load_run
from burnish.errors import UsageError
from burnish.report.html import render_report
from tests.report.runs import (
    make_all,
    make_hostile,
    make_quickstart,
    make_several_models,
    make_troubled,
    rows_of,
    write_rows,
)
from tests.waiting import bounded

VOID = {"meta", "br"}
TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "header",
    "main",
    "footer",
    "section",
    "nav",
    "p",
    "h1",
    "h2",
    "h3",
    "h4",
    "a",
    "dl",
    "div",
    "dt",
    "dd",
    "span",
    "b",
    "ul",
    "li",
    "table",
    "tr",
    "th",
    "td",
    "figure",
    "figcaption",
    "i",
    "svg",
    "line",
    "text",
    "path",
    "circle",
    "details",
    "summary",
    "pre",
    "code",
    "article",
    "br",
}


class Checker(HTMLParser):
    """Notes tags, attributes and text, and that every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data):
        if self.stack and self.stack[-1] != "style":
            self.text.append(data)


def check(page: Path) -> Checker:
    checker = Checker()
    text = page.read_text(encoding="utf-8")
    checker.feed(text)
    checker.close()
    assert not checker.stack
    assert checker.tags <= TAGS, checker.tags - TAGS
    for tag, name, value in checker.attributes:
        assert not name.startswith("on") and name not in ("src", "srcset", "xlink:href", "style", "action"), (tag, name)
        assert name != "href" or value.startswith("#")
        assert "url(" not in value
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style
    return checker


def test_the_page_says_what_happened(tmp_path):
    page = render_report(make_quickstart(tmp_path))
    assert page == tmp_path / "quickstart/report.html"
    words = " ".join(" ".join(check(page).text).split())
    for expected in (
        "sft → reward → dpo → evaluate on pocket. Finished in 5 min 12 s.",
        "sft against base: better on pocket/maths (accuracy +29.5 points)",
        "worse on held-out text (loss +0.0890)",
        "no significant change on pocket/maths (accuracy −0.8 points)",
        "36.4 to 46.1",
        "win rate against sft",
        "dpo against sft: better on preferences (accuracy +22.8 points), win rate (win rate against sft +20.0 points)",
        "3 items have no final number in their reference",
        "the scores go with the answers' lengths (Spearman 0.310, p < 0.001)",
        "Mean log loss of the pairs: 0.310 nats (guessing: 0.693).",
        "p < 0.001, McNemar's exact test",
        "300 steps on pocket/chat in 1 min 14 s",
        "98,304 parameters trained (6.94 % of 1,415,616)",
        "5,991 of 6,000 rows",
        "over the length limit, left out",
        "It is known for its <b>bells</b> & bridges.",
        "✓ right",
        "learning_rate",
        "burnish run quickstart seed=7",
    ):
        assert expected in words, expected
    for title in ("Loss", "Accuracy", "Margin", "Learning rate", "Gradient norm", "held out"):
        assert title in words


def test_everything_is_escaped(tmp_path):
    page = render_report(make_hostile(tmp_path))
    checker = check(page)
    assert not {"script", "img"} & checker.tags
    assert "".join(checker.text).count("alert(1)") > 15
    assert "Content-Security-Policy" in page.read_text()


@pytest.mark.parametrize("make", [make_several_models, make_troubled])
def test_other_runs(tmp_path, make):
    page = render_report(make(tmp_path))
    words = " ".join(" ".join(check(page).text).split())
    if make is make_several_models:
        assert "on pocket and org/pocket-small" in words and "the task has no rows" in words
        assert words.index("pocket / sft") < words.index("org/pocket-small / sft")
        assert "Values of different models are not tested against each other" in words
    else:
        for expected in (
            "dpo (interrupted) on pocket. Interrupted after",
            "stopped by a signal after step 200",
            "the last line of metrics.jsonl is torn",
            "1 step was skipped for a non-finite loss or gradient (step 60)",
            "lowest at step 80",
            "continued from step 50",
            "1 value beyond the scale",
            "No evaluation has been made in this run",
        ):
            assert expected in words, expected


def test_the_same_files_give_the_same_page(tmp_path):
    run = make_quickstart(tmp_path)
    first = render_report(run).read_bytes()
    assert render_report(run).read_bytes() == first


def test_any_file_may_be_missing_or_damaged(tmp_path):
    """Each file of a run in turn removed, emptied, cut short or filled with rubbish: the page is made all the same."""
    rng = random.Random(0)
    run = make_quickstart(tmp_path, steps=20)
    files = [p for p in run.rglob("*") if p.is_file() and p.name not in ("run.json", ".lock")]
    assert len(files) > 10
    rubbish = [b"", b"\xff\x00\xfe", b"[1, 2, {}]", b'{"table": 3, "a": [', b"null", b"[" * 50_000]
    for path in files:
        raw = path.read_bytes()
        path.unlink()
        check(render_report(run))
        for bad in [*rng.sample(rubbish, 3), raw[: rng.randrange(len(raw))]]:
            path.write_bytes(bad)
            check(render_report(run))
        path.write_bytes(raw)


@pytest.mark.parametrize("seed", range(4))
def test_odd_values_in_the_records_do_no_harm(tmp_path, seed):
    """Every value of every record replaced by others of the wrong type."""
    run = make_quickstart(tmp_path, steps=20)
    rng = random.Random(seed)
    odd = [
        None,
        True,
        -1,
        1e300,
        float("nan"),
        float("inf"),
        -float("inf"),
        10**400,
        "x",
        [],
        {},
        [[1]],
        {"a": {"b": None}},
    ]

    def spoil(obj):
        if rng.random() < 0.08:
            return rng.choice(odd)
        if isinstance(obj, dict):
            return {k: spoil(v) for k, v in obj.items()}
        if isinstance(obj, list):
            return [spoil(v) for v in obj]
        return obj

    records = {p: json.loads(p.read_text()) for p in sorted([*run.rglob("stage.json"), run / "environment.json"])}
    for _ in range(10):
        for path, record in records.items():
            spoiled = spoil(record)
            path.write_text(json.dumps({**spoiled, "format": 1} if isinstance(spoiled, dict) else record))
        check(render_report(run))


def test_no_run_here(tmp_path):
    with pytest.raises(UsageError):
        render_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_that_has_just_begun(tmp_path):
    run = make_quickstart(tmp_path)
    for stage in [p for p in run.iterdir() if p.is_dir()]:
        for file in stage.iterdir():
            file.unlink()
        stage.rmdir()
    words = " ".join(check(render_report(run)).text)
    assert "No stage was begun" in words


def test_r29_secrets_do_not_reach_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary-canary-1234")
    run = make_quickstart(tmp_path)
    sample = {"task": "t", "prompt": "canary-canary-1234", "answers": {"sft": "hf_canary0123456789"}, "marks": {}}
    write_rows(run / "04-evaluate/samples.jsonl", [sample])
    record = json.loads((run / "01-sft/stage.json").read_text())
    (run / "01-sft/stage.json").write_text(json.dumps({**record, "error": "https://u:pass-canary@host"}))
    page = render_report(run).read_text()
    assert "canary0123" not in page and "canary-1234" not in page and "pass-canary" not in page


def test_a_long_run_stays_small(tmp_path):
    run = make_quickstart(tmp_path)
    write_rows(run / "01-sft/metrics.jsonl", rows_of("sft", 20_000, random.Random(0), every=200))
    with bounded():
        page = render_report(run)
    assert page.stat().st_size < 600_000
    check(page)


def test_neither_torch_nor_matplotlib_nor_network(tmp_path):
    make_quickstart(tmp_path)
    code = f"""
import socket, sys
socket.socket.connect = socket.getaddrinfo = None
from pathlib import Path
from burnish.report.html import render_report
from burnish.report.terminal import render_table
render_report(Path({str(tmp_path / "quickstart")!r}))
assert not {{"torch", "matplotlib", "numpy", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_changes_nothing_else(tmp_path):
    for run in make_all(tmp_path):
        before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        render_report(run)
        after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "report.html"}
        assert before == after
        assert load_run(run)


def test_numbers_on_the_page_are_those_of_the_record(tmp_path):
    """The accuracy shown for a subject is the record's, rounded to a tenth of a percent."""
    run = make_quickstart(tmp_path)
    text = render_report(run).read_text()
    for row in json.loads((run / "04-evaluate/stage.json").read_text())["figures"]["table"]:
        if row["metric"] == "accuracy":
            assert re.search(rf"{100 * row['value']:.1f}\u202f%", text)
