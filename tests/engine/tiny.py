"""Tiny models, groups and methods for the engine's tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from burnish.config.dynamic_beta import DynamicBetaSettings
from burnish.config.stages import DistillSettings, DpoSettings, KtoSettings, RewardSettings, SftSettings
from burnish.core.batch import Outputs, Table
from burnish.core.group import Completion, Group
from burnish.losses.terms import LossResult, Metric, Term
from burnish.methods.base import BaseMethod

VOCAB = 61
MIXES: dict[str, dict[str, Any]] = {
    "rpo": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "bco + sft": {"loss_type": ["bco_pair", "sft"]},
    "wpo": {"use_weighting": True},
    "wpo, bco": {"loss_type": "bco_pair", "use_weighting": True},
    "madpo": {"reward_model": "./rm", "madpo_tau": 2.0},
    "madpo, wpo, bco + sft": {
        "reward_model": "./rm",
        "madpo_c_max": 3.0,
        "use_weighting": True,
        "loss_type": ["bco_pair", "sft"],
    },
    "madpo, risk": {
        "reward_model": "./rm",
        "dynamic_beta": DynamicBetaSettings(type="risk", warmup=0, alpha=0.3),
    },
    "madpo, filter": {
        "reward_model": "./rm",
        "dynamic_beta": DynamicBetaSettings(type="beta_dpo", alpha=0.05),
    },
    "ld": {"ld_alpha": 0.3},
    "f-divergence": {"f_divergence_type": "js_divergence"},
}


def build_groups(n: int, *, seed: int = 0, k: int = 2, reference: bool = False, spread: int = 12) -> list[Group]:
    """n groups of k completions with lengths from 1 to `spread`."""
    rng = np.random.default_rng(seed)
    groups = []
    for i in range(n):
        completions = []
        for _ in range(k):
            length = int(rng.integers(1, spread + 1))
            ids = rng.integers(3, VOCAB, length).astype(np.int32)
            mask = np.ones(length, bool)
            if length > 3:
                mask[1] = False
            columns = {"ref_logprobs": rng.normal(-3, 1, length)} if reference else {}
            completions.append(Completion(ids, mask, token_columns=columns))
        prompt = rng.integers(3, VOCAB, int(rng.integers(1, spread + 1))).astype(np.int32)
        groups.append(
            Group(
                f"row:{i}",
                prompt,
                tuple(completions),
                columns={"margin": 0.0, "reward_margin": 4.0 * np.sin(2.0 * i)}
                if k == 2
                else {"label": float(i % 3 > 0)},
            )
        )
    return groups


def build_policy(
    head: str = "lm", *, dtype: torch.dtype = torch.float64, seed: int = 0, layers: int = 2, **config: Any
):
    """A random GPT-2 policy: unlike the RMS norms of newer models, its norms really compute in fp64."""
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    from burnish.models.policy import Policy

    cfg = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=layers,
        n_head=4,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        num_labels=1,
        initializer_range=0.15,
        **config,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        cls = GPT2LMHeadModel if head == "lm" else GPT2ForSequenceClassification
        model = cls(cfg).to(dtype)
    return Policy(model, head=head, attention="sdpa")


def trainable(policy) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in policy.named_parameters() if p.requires_grad}


class SortedGap(BaseMethod):
    """A coupled toy loss: sorts the chosen and the rejected sums over the whole step before it compares them."""

    name = "sorted_gap"
    coupled = True

    def __init__(self) -> None:
        self.state = GapState()

    def counts(self, groups) -> dict[str, float]:
        return {"gap": float(len(groups))}

    def compute_loss(self, outputs: Outputs, table: Table, state, *, evaluating: bool = False) -> LossResult:
        assert outputs.logprobs is not None
        sums = table.sum_tokens(outputs.logprobs)
        chosen, rejected = sums[table.completion_slot == 0], sums[table.completion_slot == 1]
        gap = chosen.sort().values - rejected.sort().values
        loss = -torch.nn.functional.logsigmoid(0.1 * gap)
        n = float(chosen.shape[0])
        return LossResult((Term("gap", loss.sum(), n, "pair"),), (Metric("gap", gap.detach().sum(), n),))


class GapState:
    """How many pairs were seen, and a sum that tells their order."""

    def initial(self) -> dict[str, Any]:
        return {"seen": 0, "trace": 0.0}

    def advance(self, outputs: Outputs, table: Table, state) -> dict[str, Any]:
        assert outputs.logprobs is not None
        weights = torch.arange(1, len(table.group_ids) + 1, dtype=torch.float64)
        chosen = table.slot(table.sum_tokens(outputs.logprobs), 0).double()
        return {"seen": state["seen"] + len(table.group_ids), "trace": state["trace"] + float((weights * chosen).sum())}


CONTROLLED: dict[str, dict[str, Any]] = {
    "risk": {"type": "risk", "warmup": 0, "estimator": "robbins_monro", "alpha": 0.3},
    "risk ema": {"type": "risk", "warmup": 1, "estimator": "ema", "alpha": 0.3},
    "risk window": {"type": "risk", "warmup": 1, "estimator": "window", "window": 6, "alpha": 0.3},
    "risk pairs": {"type": "risk", "warmup": 1, "alpha": 0.3, "window": 6, "unit": {"pairs": 2}},
    "beta_dpo": {"type": "beta_dpo", "alpha": 0.05},
    "beta_dpo instance": {"type": "beta_dpo", "alpha": 0.05, "level": "instance", "unit": {"pairs": 3}},
    "cosine": {"type": "cosine", "beta_end": 0.5, "steps": 6},
}


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """The numbers of a state by their paths; what is no number is part of the path."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        return {path: tree} if isinstance(tree, (int, float)) else {f"{path}={tree}": 0}
    return {k: v for key, value in items for k, v in flatten(value, f"{path}/{key}").items()}


def build_method(name: str):
    """(method, policy head, completions of a group, needs reference columns)

    A name is a kind ("sft"), a kind and its loss type ("dpo aot", "distill jsd"), a loss type of dpo, or of the tables above.
    """
    from burnish.methods.distill import Distill
    from burnish.methods.dpo import Dpo
    from burnish.methods.kto import Kto
    from burnish.methods.reward import Reward
    from burnish.methods.sft import Sft

    if name == "sft":
        return Sft(SftSettings()), "lm", 1, False
    if name == "reward":
        return Reward(RewardSettings(center_rewards_coefficient=0.01)), "score", 2, False
    if name == "coupled":
        return SortedGap(), "lm", 2, False
    if name in CONTROLLED:
        controlled = DynamicBetaSettings.model_validate(CONTROLLED[name])
        return Dpo(DpoSettings(dynamic_beta=controlled)), "lm", 2, True
    if name in MIXES:
        return Dpo(DpoSettings(**MIXES[name])), "lm", 2, True
    kind, _, loss_type = name.partition(" ")
    if kind == "distill":
        return Distill(DistillSettings(loss_type=loss_type, alpha=0.7, temperature=1.5)), "lm", 1, False  # type: ignore[arg-type]
    if kind == "kto":
        return Kto(KtoSettings(beta=0.3, loss_type=loss_type or "kto")), "lm", 1, False  # type: ignore[arg-type]
    if " " in name:
        from tests.losses.drawn import Case
        from tests.losses.drawn import build_method as build_case

        method = build_case(Case(*name.split()))
        return method, "lm", 2, "logprobs" in method.reference
    return Dpo(DpoSettings(loss_type=name)), "lm", 2, True
