"""`burnish merge`: an adapter folded into its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from burnish.config.registry import load_object


@click.command()
@click.argument("source", metavar="RUN/STAGE|FOLDER")
@click.option("--output", metavar="DIR", help="Folder of the merged model; default: RUN-STAGE-merged, here.")
@click.option("--force", is_flag=True, help="Replace what an earlier merge wrote there.")
@click.option("--data", metavar="SOURCE", help="Rows to check on; default: the held-out rows of the adapter's stage.")
@click.option(
    "--save-dtype",
    type=click.Choice(["fp32", "source", "bf16"]),
    default="fp32",
    show_default=True,
    help="Type of the written weights; source = as the base is stored.",
)
@click.option("--output-dir", metavar="DIR", default="runs", show_default=True, help="Folder of runs.")
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON.")
@click.option("--verbose", is_flag=True, expose_value=False, help="Show tracebacks.")
def merge(
    source: str, output: str | None, force: bool, data: str | None, save_dtype: str, output_dir: str, as_json: bool
) -> int:
    """Fold an adapter into its full-precision base.

    The merged model is compared with base + adapter on real tokens and written only if no logit differs by more than
    0.0001; plain transformers loads it. For an adapter that was trained over a 4- or 8-bit base, the KL divergence between
    the two is reported: rounding the base is part of what the adapter learnt to live with.
    """
    found = load_object("burnish.pipeline.merge:merge_adapter")(
        source, root=Path(output_dir), output=output, force=force, data=data, save_dtype=save_dtype
    )
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        for line in describe(found):
            print(line)
    return 0


def describe(found: dict[str, Any]) -> list[str]:
    """What a person reads."""
    lines = [
        f"merged = base + adapter: largest difference of a logit {found['difference']:.2g} (limit 1e-4) "
        f"over {found['positions']} positions, {found['rows_of']}"
    ]
    trained = f"the adapter was trained over a base in {found.get('quantization')}; "
    if "kl" in found:
        lines.append(
            f"{trained}KL(merged ‖ that base + adapter) {found['kl']:.4g} nats a token, {found['kl_max']:.3g} at most, "
            f"over {found['tokens']} tokens of {found['rows']} rows"
        )
    elif "score_gap" in found:
        lines.append(
            f"{trained}merged scores differ from its by {found['score_gap']:.4g} on average over {found['rows']} rows"
        )
    elif "quantization" in found:
        lines.append(f"{trained}how far the merged model is from it was not measured: name rows with --data")
    return [*lines, f"written: {found['output']}"]
