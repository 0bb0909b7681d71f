"""Put measured results into docs/benchmarks.md.

    python benchmarks/train_step.py --method all --setting all --peer trl --json | tee benchmarks/results/NAME.jsonl
    python benchmarks/curve.py | tee benchmarks/results/curve.json
    python benchmarks/loss_cost.py --json > benchmarks/results/loss_cost.json
    python benchmarks/results_table.py

Every `*.jsonl` of `benchmarks/results` becomes a table; a line of it is what the script printed for one method and setting.
`curve.json` becomes the figure and the table of the cost curve, `loss_cost.json` the tables of what each loss costs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from curve import build_section as build_curve_section
from curve import draw_curve
from loss_cost import build_section as build_cost_section

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = ROOT / "docs" / "images" / "cost-curve.svg"
BEGIN, END = "<!-- {0}: begin (written by benchmarks/results_table.py) -->", "<!-- {0}: end -->"
NAMES = {"dpo": "DPO", "reward": "reward model", "sft": "SFT", "kto": "KTO", "orpo": "ORPO"}
SETTINGS = {"full": "full", "lora": "LoRA", "top_k": "last layers", "padded": "full, `attention: padded`"}
COLUMNS = (
    "| method | setting | burnish | TRL, defaults | TRL, tuned | defaults ÷ burnish: time | processor time | memory "
    "| tuned ÷ burnish: time | largest difference of a loss | share of peak |"
)
MISSING = "–"


def _cell(row: dict[str, Any], side: str, key: str) -> str:
    seconds, gb = row[f"{key}_s"], row[f"{key}_gb"]
    mark = " †" if side in row.get("disturbed", ()) else ""
    return MISSING if seconds is None or gb is None else f"{seconds:.1f} s, {gb:.2f} GB{mark}"


def _ratio(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}×"


def build_table(rows: list[dict[str, Any]]) -> str:
    """The table of one file of results."""
    first = rows[0]
    timed = first["rows"] - first["warmup_rows"]
    head = (
        f"{first['cpu']}, {first['threads']} threads; torch {first['torch']}, transformers {first['transformers']}, "
        f"TRL {first['trl']}; burnish {first['commit']}. {timed} timed rows, {first['batch_size']} a step, "
        f"{first['precision']}; prompts of {first['mean_prompt_tokens']:.0f} and answers of "
        f"{first['mean_answer_tokens']:.0f} tokens on average; a product of two 2,048² matrices reaches "
        f"{first['matmul_peak_tflops']:.2f} TFLOP/s."
    )
    lines = [head, "", COLUMNS, "|---" * (COLUMNS.count("|") - 1) + "|"]
    for row in rows:
        difference, share = row["loss_max_abs_diff"], row["matmul_peak_share"]
        cells = [
            NAMES[row["method"]],
            SETTINGS[row["setting"]],
            _cell(row, "burnish", "burnish"),
            _cell(row, "defaults", "peer"),
            _cell(row, "tuned", "peer_tuned"),
            _ratio(row["time_ratio"]),
            _ratio(row["cpu_time_ratio"]),
            _ratio(row["memory_ratio"]),
            _ratio(row["time_ratio_tuned"]),
            MISSING if difference is None else f"{difference:.1e}",
            MISSING if share is None else f"{100 * share:.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if any(row.get("disturbed") for row in rows):
        lines += ["", "† Another program used the machine meanwhile; for these compare processor times."]
    return "\n".join(lines)


def build_section(folder: Path = RESULTS) -> str:
    """What stands between the marks of the page; empty without results."""
    tables = []
    for file in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        tables.append(build_table(rows))
    return "## Results\n\n" + "\n\n".join(tables) + "\n" if tables else ""


def replace_section(page: str, name: str, section: str) -> str:
    """The page with `section` between the marks of this name.

    Raises:
        ValueError: The page lacks the marks.
    """
    begin, end = BEGIN.format(name), END.format(name)
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"{PAGE.name} has no marks for {name!r}")
    return f"{before}{begin}\n{section}{end}{after}"


def read_measured(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """What `curve.py` or `loss_cost.py` measured, if it was kept."""
    file = folder / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def update_page(page: str, folder: Path = RESULTS) -> str:
    """The page with the measured figures between its marks; a block without results stays as it is."""
    section, curve, cost = build_section(folder), read_measured("curve", folder), read_measured("loss_cost", folder)
    if section:
        page = replace_section(page, "results", section)
    if cost:
        page = replace_section(page, "cost", build_cost_section(cost))
    return replace_section(page, "curve", build_curve_section(curve)) if curve else page


def main() -> int:
    curve = read_measured("curve")
    if curve:
        draw_curve(curve, FIGURE)
    PAGE.write_text(update_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
