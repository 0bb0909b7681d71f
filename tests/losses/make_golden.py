"""Writes golden_trl.json: what the installed TRL computes on fixed token ids with fixed tiny models.

    python -m tests.losses.make_golden [PATH]

TRL is asked through `tools/trl_oracle.py` of the shared folder (BURNISH_SHARED, or ../shared), which holds no formula
of its own. The models are those of `tests/losses/tiny.py`. Run it again when TRL's minor version changes, and say in
the CHANGELOG what moved.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.conftest import find_shared
from tests.losses.tiny import CHOSEN, CONFIG, MARGINS, PROMPTS, REJECTED, build_model, sum_weights

GOLDEN = Path(__file__).with_name("golden_trl.json")
DPO_CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_type": "sigmoid", "beta": 0.1},
    "sigmoid beta 0.7": {"loss_type": "sigmoid", "beta": 0.7},
    "hinge": {"loss_type": "hinge", "beta": 0.1},
    "hinge beta 1.5": {"loss_type": "hinge", "beta": 1.5},
    "ipo": {"loss_type": "ipo", "beta": 0.1},
    "ipo beta 0.5": {"loss_type": "ipo", "beta": 0.5},
    "sigmoid + ipo": {"loss_type": ["sigmoid", "ipo"], "beta": 0.2, "loss_weights": [1.0, 0.5]},
    "robust": {"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.1},
    "exo_pair": {"loss_type": "exo_pair", "beta": 0.1, "label_smoothing": 0.001},
    "exo_pair smoothing 0.2": {"loss_type": "exo_pair", "beta": 0.5, "label_smoothing": 0.2},
    "nca_pair": {"loss_type": "nca_pair", "beta": 0.3},
    "bco_pair": {"loss_type": "bco_pair", "beta": 0.3},
    "sppo_hard": {"loss_type": "sppo_hard", "beta": 0.05},
    "apo_zero": {"loss_type": "apo_zero", "beta": 0.2},
    "apo_down": {"loss_type": "apo_down", "beta": 0.2},
    "aot": {"loss_type": "aot", "beta": 0.1},
    "aot smoothing 0.2": {"loss_type": "aot", "beta": 0.4, "label_smoothing": 0.2},
    "aot_unpaired": {"loss_type": "aot_unpaired", "beta": 0.1},
    "aot_unpaired smoothing 0.1": {"loss_type": "aot_unpaired", "beta": 0.3, "label_smoothing": 0.1},
    "discopop": {"loss_type": "discopop", "beta": 0.05},
    "discopop tau 0.5": {"loss_type": "discopop", "beta": 0.2, "discopop_tau": 0.5},
    "sigmoid_norm": {"loss_type": "sigmoid_norm", "beta": 2.0},
    "rpo": {"loss_type": ["sigmoid", "sft"], "beta": 0.1, "loss_weights": [1.0, 0.5]},
    "forward_kl": {"loss_type": "sigmoid", "beta": 0.1, "f_divergence_type": "forward_kl"},
    "js_divergence": {"loss_type": "sigmoid", "beta": 0.1, "f_divergence_type": "js_divergence"},
    "js_divergence, ipo": {"loss_type": "ipo", "beta": 0.1, "f_divergence_type": "js_divergence"},
    "alpha_divergence": {"loss_type": "sigmoid", "beta": 0.1, "f_divergence_type": "alpha_divergence"},
    "alpha_divergence 1.3, hinge": {
        "loss_type": "hinge",
        "beta": 0.1,
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 1.3,
    },
    "ld_alpha": {"loss_type": "sigmoid", "beta": 0.1, "ld_alpha": 0.4},
    "ld_alpha, aot": {"loss_type": "aot", "beta": 0.1, "ld_alpha": 0.0},
    "use_weighting": {"loss_type": "sigmoid", "beta": 0.1, "use_weighting": True},
    "use_weighting, ipo": {"loss_type": "ipo", "beta": 0.5, "use_weighting": True},
}
CPO_CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0},
    "sigmoid smoothing 0.2": {"loss_type": "sigmoid", "beta": 0.3, "cpo_alpha": 0.0, "label_smoothing": 0.2},
    "hinge": {"loss_type": "hinge", "beta": 0.2, "cpo_alpha": 0.5},
    "ipo": {"loss_type": "ipo", "beta": 0.1, "cpo_alpha": 1.0},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0, "simpo_gamma": 1.0},
    "simpo with NLL, smoothing 0.1": {
        "loss_type": "simpo",
        "beta": 2.5,
        "cpo_alpha": 0.5,
        "simpo_gamma": 0.3,
        "label_smoothing": 0.1,
    },
}
# TRL's ORPO takes the NLL over the prompt too; after prompts of one token there is nothing of it to predict.
ORPO_CASES: dict[str, dict[str, Any]] = {"orpo": {"beta": 0.1}, "orpo beta 2": {"beta": 2.0}}
ORPO_PROMPTS = [prompt[:1] for prompt in PROMPTS]
REWARD_CASES: dict[str, dict[str, Any]] = {
    "bradley_terry": {},
    "margin": {"margin": MARGINS},
    "centering": {"center_rewards_coefficient": 0.01},
    "margin + centering": {"margin": MARGINS, "center_rewards_coefficient": 0.1},
}


def load_oracle(shared: Path) -> Any:
    """The module tools/trl_oracle.py."""
    spec = importlib.util.spec_from_file_location("trl_oracle", shared / "tools" / "trl_oracle.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ask_oracle(oracle: Any) -> dict[str, Any]:
    """All golden values."""
    policy, reference, scorer = build_model("lm", 0), build_model("lm", 1), build_model("score", 2)
    full = [[p + c for p, c in zip(PROMPTS, side, strict=True)] for side in (CHOSEN, REJECTED)]
    return {
        "weights": {"policy": sum_weights(policy), "reference": sum_weights(reference), "scorer": sum_weights(scorer)},
        "sft": oracle.sft(policy, PROMPTS, CHOSEN, grad=True),
        "logps": oracle.logps(policy, PROMPTS, CHOSEN)["selective"],
        "dpo": {
            name: oracle.dpo(policy, reference, PROMPTS, CHOSEN, REJECTED, grad=True, **case)
            for name, case in DPO_CASES.items()
        },
        "cpo": {
            name: oracle.cpo(policy, PROMPTS, CHOSEN, REJECTED, grad=True, **case) for name, case in CPO_CASES.items()
        },
        "orpo": {
            name: oracle.orpo(policy, ORPO_PROMPTS, CHOSEN, REJECTED, grad=True, **case)
            for name, case in ORPO_CASES.items()
        },
        "reward": {name: oracle.reward(scorer, *full, grad=True, **case) for name, case in REWARD_CASES.items()},
    }


def main(path: Path) -> int:
    shared = find_shared()
    if shared is None:
        print("there is no shared folder: set BURNISH_SHARED", file=sys.stderr)
        return 2
    found = {
        "provenance": {
            "made_by": "tests/losses/make_golden.py",
            "date": datetime.date.today().isoformat(),
            "versions": {name: version(name) for name in ("trl", "transformers", "torch", "numpy")},
            "precision": "fp32, CPU, one thread, evaluation mode",
        },
        "inputs": {
            "config": CONFIG,
            "seeds": {"policy": 0, "reference": 1, "scorer": 2},
            "prompts": PROMPTS,
            "chosen": CHOSEN,
            "rejected": REJECTED,
            "margins": MARGINS,
        },
        "cases": {"dpo": DPO_CASES, "cpo": CPO_CASES, "orpo": ORPO_CASES, "reward": REWARD_CASES},
        "values": ask_oracle(load_oracle(shared)),
    }
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN))
