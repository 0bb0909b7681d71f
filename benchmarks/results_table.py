"""Put measured results into docs/benchmarks.md.

    python benchmarks/train_step.py --method all --peer trl --json | tee benchmarks/results/NAME.jsonl
    python benchmarks/results_table.py

Every file of `benchmarks/results` becomes a table; a line of it is what the script printed for one method.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: begin (written by benchmarks/results_table.py) -->", "<!-- results: end -->"
NAMES = {"dpo": "DPO", "reward": "reward model", "sft": "SFT"}
COLUMNS = (
    "| | burnish | TRL, defaults | TRL, tuned | faster | less memory | largest difference of a loss | share of peak |"
)


def _cell(seconds: float | None, gb: float | None) -> str:
    return "not measured" if seconds is None or gb is None else f"{seconds:.1f} s, {gb:.2f} GB"


def _times(defaults: float | None, tuned: float | None) -> str:
    found = [f"{value:.1f}×" + note for value, note in ((defaults, ""), (tuned, " (tuned)")) if value is not None]
    return ", ".join(found) or "not measured"


def build_table(rows: list[dict[str, Any]]) -> str:
    """The table of one file of results."""
    first = rows[0]
    timed = first["rows"] - first["batch_size"]
    head = (
        f"{first['cpu']}, {first['threads']} threads; torch {first['torch']}, transformers {first['transformers']}, "
        f"TRL {first['trl']}; burnish {first['commit']}. {timed} rows, {first['batch_size']} a step, {first['precision']}; "
        f"prompts of {first['mean_prompt_tokens']:.0f} and answers of {first['mean_answer_tokens']:.0f} tokens on average; "
        f"a product of two 2,048² matrices reaches {first['matmul_peak_tflops']:.2f} TFLOP/s."
    )
    lines = [head, "", COLUMNS, "|---" * COLUMNS.count(" | ") + "|---|"]
    for row in rows:
        difference = row["loss_max_abs_diff"]
        cells = [
            NAMES[row["method"]],
            _cell(row["burnish_s"], row["burnish_gb"]),
            _cell(row["peer_s"], row["peer_gb"]),
            _cell(row["peer_tuned_s"], row["peer_tuned_gb"]),
            _times(row["time_ratio"], row["time_ratio_tuned"]),
            _times(row["memory_ratio"], row["memory_ratio_tuned"]),
            "not measured" if difference is None else f"{difference:.1e}",
            f"{100 * row['matmul_peak_share']:.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def build_section(folder: Path = RESULTS) -> str:
    """What stands between the marks of the page; empty without results."""
    tables = []
    for file in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        tables.append(build_table(rows))
    return "## Results\n\n" + "\n\n".join(tables) + "\n" if tables else ""


def replace_section(page: str, section: str) -> str:
    """The page with `section` between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{section}{END}{after}"


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(replace_section(page, build_section()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
