"""Tables and figures of docs/studies/ from the summaries of the grids that were run.

    python scripts/studies/results.py --take RUNS    # keep RUNS/<grid>/summary.json as docs/studies/<grid>.json
    python scripts/studies/results.py                # write the tables into the pages, and the figure
    python scripts/studies/results.py --choose       # the forms of methods.yaml that methods-search leads to

A table stands in a page between `<!-- table: GRID TASK METRIC -->` and `<!-- end -->`; with `values` behind METRIC it has no
differences. tests/test_docs.py checks that pages and summaries agree.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ROOT / "docs" / "studies"
TABLE = re.compile(r"(<!-- table: (\S+) (\S+) (\S+)( values)? -->\n).*?(<!-- end -->)", re.DOTALL)
SEARCH = re.compile(r"(<!-- search -->\n).*?(<!-- end -->)", re.DOTALL)
LAST = 20  # steps
SHARES = ("accuracy", "ranking_accuracy")
INCOMPARABLE = ("sft", "preferences", "accuracy")  # measured against the base, not against sft
MINUS = "\N{MINUS SIGN}"


def load(grid: str) -> dict[str, Any]:
    """The kept summary of a grid."""
    return json.loads((STUDIES / f"{grid}.json").read_text(encoding="utf-8"))


def take(runs: Path) -> None:
    """Keep the summaries of the grids below a folder, without the seconds that runs took, with the last β of each cell."""
    for grid in ("noise", "methods-search", "methods", "hh"):
        file = runs / grid / "summary.json"
        if not file.exists():
            continue
        summary = json.loads(file.read_text(encoding="utf-8"))
        kept = {k: summary[k] for k in ("axes", "baseline", "seeds", "confidence", "metrics", "rows", "notes")}
        beta = {c["name"]: found for c in summary["cells"] if (found := last_beta(runs / grid / "cells" / c["name"]))}
        text = json.dumps(round_all(kept | {"last_beta": beta}), ensure_ascii=False, indent=1)
        (STUDIES / f"{grid}.json").write_text(text + "\n", encoding="utf-8")


def last_beta(cell: Path) -> float | None:
    """Mean β of the last steps of a cell's `prefer`, where one moved."""
    found = []
    for file in cell.glob("*-prefer/metrics.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row.get("kind") == "train" and (beta := row.get("dpo/beta", row.get("beta"))) is not None:
                found.append(beta)
    return sum(found[-LAST:]) / len(found[-LAST:]) if found else None


def round_all(value: Any) -> Any:
    """Plain data with six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: round_all(v) for k, v in value.items()}
    return [round_all(v) for v in value] if isinstance(value, list) else value


# Tables


def find_figure(row: dict[str, Any], task: str, metric: str) -> dict[str, Any] | None:
    return next((f for f in row["figures"] if (f["task"], f["metric"]) == (task, metric)), None)


def show(value: float, share: bool, signed: bool = False) -> str:
    text = f"{100 * value:+.1f}" if share else f"{value:+.3f}"
    return (text if signed else text.lstrip("+")).replace("-", MINUS)


def render_table(summary: dict[str, Any], task: str, metric: str, *, changes: bool = True) -> str:
    """Value with its interval, difference to the baseline with its interval, p and verdict, a row each."""
    share, models = metric in SHARES, any(row["model"] for row in summary["rows"])
    unit = " (%)" if share else ""
    head = ["model"] * models + ["", f"{metric.replace('_', ' ')}{unit}"]
    head += ["difference", "p (Holm)", "verdict"] * changes
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in summary["rows"]:
        figure = find_figure(row, task, metric)
        if figure is None or (changes and (row["subject"], task, metric) == INCOMPARABLE):
            continue
        cells = [row["model"] or ""] * models + [row["name"]]
        limits = [show(figure[k], share) for k in ("low", "high") if figure[k] is not None]
        cells.append(show(figure["value"], share) + (f" [{', '.join(limits)}]" if limits else ""))
        change = figure.get("change")
        if not changes:
            pass
        elif change is None:
            cells += ["baseline" if row["baseline"] else "", "", ""]
        else:
            spread = change.get("seeds") or change
            between = ", ".join(show(spread[k], share, True) for k in ("low", "high"))
            cells.append(f"{show(change['difference'], share, True)} [{between}]")
            cells += ["< 0.001" if change["p_holm"] < 0.001 else f"{change['p_holm']:.3f}", change["verdict"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# The choice of settings


def read_search(summary: dict[str, Any]) -> dict[str, dict[tuple[str, str], dict[str, float]]]:
    """Method → (beta, learning rate) → model → accuracy."""
    found: dict[str, dict[tuple[str, str], dict[str, float]]] = {}
    for row in summary["rows"]:
        figure = find_figure(row, "preferences", "accuracy")
        assert figure is not None
        method, _, beta = row["values"]["prefer"].partition(",beta=")
        rate = row["values"]["prefer.learning_rate"].partition("=")[2]
        found.setdefault(method, {}).setdefault((beta, rate), {})[row["model"]] = figure["value"]
    return found


def choose(settings: dict[tuple[str, str], dict[str, float]]) -> tuple[str, str]:
    """The setting with the highest accuracy, averaged over the models; of equal ones the lower learning rate, the first beta."""

    def mean(at: tuple[str, str]) -> float:
        return sum(settings[at].values()) / len(settings[at])

    return max(settings, key=lambda at: (round(mean(at), 9), -float(at[1])))


def render_search(summary: dict[str, Any]) -> str:
    """A row for each method and beta: accuracies at each learning rate, of both models; the chosen one bold."""
    found = read_search(summary)
    rates = list(dict.fromkeys(rate for settings in found.values() for _, rate in settings))
    lines = [
        "| method | beta | " + " | ".join(f"lr {rate}" for rate in rates) + " |",
        "|---|---|" + "---|" * len(rates),
    ]
    for method, settings in found.items():
        best = choose(settings)
        for beta in dict.fromkeys(beta for beta, _ in settings):
            cells = []
            for rate in rates:
                text = " / ".join(show(v, True) for v in settings[beta, rate].values())
                cells.append(f"**{text}**" if (beta, rate) == best else text)
            lines.append(f"| {method} | {beta} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# Pages


def update_page(text: str) -> str:
    """A page with its tables as the kept summaries give them."""
    text = TABLE.sub(lambda m: f"{m[1]}\n{render_table(load(m[2]), m[3], m[4], changes=not m[5])}\n{m[6]}", text)
    return SEARCH.sub(lambda m: f"{m[1]}\n{render_search(load('methods-search'))}\n{m[2]}", text)


def draw_noise() -> None:
    """docs/studies/noise.svg: accuracy and the last β over the share of flipped labels."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "burnish"
    import matplotlib.pyplot as plt

    summary = load("noise")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    methods = next(a["choices"] for a in summary["axes"] if a["label"] == "prefer")
    for at, method in enumerate(methods):
        rows = [row for row in summary["rows"] if row["values"]["prefer"] == method]
        shares = [float(row["values"]["prefer.flip_share"].strip("flped=%i")) for row in rows]
        places = [share + 0.5 * (at - (len(methods) - 1) / 2) for share in shares]
        found = [f for row in rows if (f := find_figure(row, "preferences", "accuracy")) is not None]
        gaps = [[100 * (f["value"] - f["low"]) for f in found], [100 * (f["high"] - f["value"]) for f in found]]
        left.errorbar(
            places, [100 * f["value"] for f in found], yerr=gaps, fmt="o-", capsize=3, ms=4, lw=1, label=method
        )
        last = summary["last_beta"]
        betas = [[last.get(cell, 0.1) for cell in row["cells"]] for row in rows]
        right.plot(places, [sum(b) / len(b) for b in betas], "o-", ms=4, lw=1, label=method)
    for axes, title in ((left, "held-out pairs put right, %"), (right, f"beta, mean of the last {LAST} steps")):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("labels flipped, %")
        axes.set_xticks([0, 10, 30])
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(STUDIES / "noise.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", type=Path, metavar="RUNS", help="folder that holds the grids' folders")
    parser.add_argument("--choose", action="store_true", help="print the forms that the search leads to")
    arguments = parser.parse_args()
    if arguments.take:
        take(arguments.take)
    if arguments.choose:
        for method, settings in read_search(load("methods-search")).items():
            beta, rate = choose(settings)
            rows = ", batch_size: 32" if method == "kto" else ""
            print(f"    {method}: {{kind: {method}, beta: {beta}, learning_rate: {rate}{rows}}}")
        return
    for page in STUDIES.glob("*.md"):
        page.write_text(update_page(page.read_text(encoding="utf-8")), encoding="utf-8")
    if (STUDIES / "noise.json").exists():
        draw_noise()


if __name__ == "__main__":
    main()
