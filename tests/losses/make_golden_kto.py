"""Writes golden_trl_kto.json: what the installed TRL's KTOTrainer computes on the golden prompts (see make_golden.py).

    python -m tests.losses.make_golden_kto

Rows are (prompt, completion, label); partners are handed to TRL, so that both sides compare the same mismatched pairs.
"""

from __future__ import annotations

import datetime
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.conftest import find_shared
from tests.losses.make_golden import load_oracle
from tests.losses.tiny import CHOSEN, CONFIG, PROMPTS, REJECTED, build_model, sum_weights

GOLDEN_KTO = Path(__file__).with_name("golden_trl_kto.json")
LABELS = [True, False, True, True, False]
COMPLETIONS = [c if y else r for c, r, y in zip(CHOSEN, REJECTED, LABELS, strict=True)]
KTO_CASES: dict[str, dict[str, Any]] = {
    "kto": {"loss_type": "kto", "beta": 0.1},
    "kto beta 0.6, weighted": {"loss_type": "kto", "beta": 0.6, "desirable_weight": 1.33, "undesirable_weight": 0.7},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", "beta": 0.2, "undesirable_weight": 1.5},
    "kto, good rows only": {"loss_type": "kto", "beta": 0.1, "labels": [True] * 5},
    "kto, bad rows only": {"loss_type": "kto", "beta": 0.1, "labels": [False] * 5},
}
# (policy seed, reference seed): swapped, so that one of the two has a baseline above 0.
SEEDS = {"there": (0, 1), "back": (1, 0)}


def ask_oracle_kto(oracle: Any) -> dict[str, Any]:
    """All golden values."""
    models = {seed: build_model("lm", seed) for seed in (0, 1)}
    partners = [*COMPLETIONS[1:], COMPLETIONS[0]]
    values: dict[str, Any] = {"weights": {str(seed): sum_weights(model) for seed, model in models.items()}}
    for way, (policy, reference) in SEEDS.items():
        values[way] = {}
        for name, case in KTO_CASES.items():
            options = dict(case)
            labels = options.pop("labels", LABELS)
            values[way][name] = oracle.kto(
                models[policy],
                models[reference],
                PROMPTS,
                COMPLETIONS,
                labels,
                kl_completions=partners,
                grad=True,
                **options,
            )
    return values


def main() -> int:
    shared = find_shared()
    if shared is None:
        print("there is no shared folder: set BURNISH_SHARED", file=sys.stderr)
        return 2
    found = {
        "provenance": {
            "made_by": "tests/losses/make_golden_kto.py",
            "date": datetime.date.today().isoformat(),
            "versions": {name: version(name) for name in ("trl", "transformers", "torch", "numpy")},
            "precision": "fp32, CPU, one thread, evaluation mode",
        },
        "inputs": {"config": CONFIG, "prompts": PROMPTS, "completions": COMPLETIONS, "labels": LABELS},
        "cases": KTO_CASES,
        "values": ask_oracle_kto(load_oracle(shared)),
    }
    GOLDEN_KTO.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{GOLDEN_KTO}: {GOLDEN_KTO.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
