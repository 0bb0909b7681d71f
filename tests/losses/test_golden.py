"""Acceptance: values and gradients equal TRL's to 1e-5 in fp32, without TRL at hand (see make_golden.py)."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from burnish.config.stages import CpoSettings, DpoSettings, OrpoSettings, RewardSettings, SftSettings, SimpoSettings
from burnish.core.batch import build_packed_batch
from burnish.core.group import Group
from burnish.engine.method import build_initial_state
from burnish.losses.terms import LossResult
from burnish.methods.cpo import Cpo
from burnish.methods.dpo import Dpo
from burnish.methods.orpo import Orpo
from burnish.methods.reward import Reward
from burnish.methods.sft import Sft
from burnish.methods.simpo import Simpo
from burnish.models.policy import Policy
from tests.losses.make_golden import (
    CPO_CASES,
    DPO_CASES,
    GOLDEN,
    ORPO_CASES,
    ORPO_PROMPTS,
    REWARD_CASES,
    ask_oracle,
    load_oracle,
)
from tests.losses.tiny import CHOSEN, CONFIG, PROMPTS, REJECTED, build_model, build_pairs, build_texts, sum_weights

NEAR: dict[str, Any] = {"rel": 1e-5, "abs": 1e-5}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    found = json.loads(GOLDEN.read_text(encoding="utf-8"))
    cases = {"dpo": DPO_CASES, "cpo": CPO_CASES, "orpo": ORPO_CASES, "reward": REWARD_CASES}
    assert found["inputs"]["config"] == CONFIG and found["cases"] == cases
    assert [found["inputs"][k] for k in ("prompts", "chosen", "rejected")] == [PROMPTS, CHOSEN, REJECTED]
    return found["values"]


@pytest.fixture(scope="module", params=["sdpa", "padded"])
def attention(request: pytest.FixtureRequest) -> str:
    return request.param


def build_policy(kind: str, seed: int, attention: str) -> Policy:
    return Policy(build_model(kind, seed), head="lm" if kind == "lm" else "score", attention=attention).eval()


def run(method: Any, policy: Policy, groups: list[Group]) -> tuple[float, LossResult]:
    """The whole step in one micro-batch: the loss as the engine forms it, gradients on the policy."""
    batch = build_packed_batch(groups)
    outputs = policy(batch, method.want["policy"], functionals=method.functionals)
    result = method.compute_loss(outputs, batch.table, build_initial_state(method), evaluating=True)
    counts = method.counts(groups)
    assert {t.name: t.count for t in result.terms} == counts
    loss = torch.stack([t.weight * t.sum / counts[t.name] for t in result.terms]).sum()
    policy.zero_grad(set_to_none=True)
    loss.backward()
    return float(loss.detach()), result


def norms(policy: Policy) -> dict[str, float]:
    return {n.removeprefix("model."): float(p.grad.norm()) for n, p in policy.named_parameters() if p.grad is not None}


def figures(result: LossResult) -> dict[str, float]:
    return {m.name: float(m.sum) / m.count for m in result.metrics}


def with_reference(groups: list[Group], reference: Policy) -> list[Group]:
    """The groups with the reference's log-probs as a token column, as the engine would attach them."""
    batch = build_packed_batch(groups)
    with torch.no_grad():
        logprobs = reference(batch, frozenset({"logprobs"})).logprobs
    assert logprobs is not None
    flat, start, out = logprobs.numpy(), 0, []
    for group in groups:
        completions = []
        for c in group.completions:
            column = np.asarray(flat[start : start + len(c.ids)], np.float32)
            completions.append(replace(c, token_columns={"ref_logprobs": column}))
            start += len(c.ids)
        out.append(replace(group, completions=tuple(completions)))
    return out


def check_gradients(policy: Policy, want: dict[str, Any]) -> None:
    assert norms(policy) == pytest.approx(want["grad_norms"], rel=1e-5, abs=1e-6)
    total = np.sqrt(sum(n**2 for n in norms(policy).values()))
    assert total == pytest.approx(want["grad_norm"], rel=1e-5)


def test_models_are_rebuilt(golden: dict[str, Any]) -> None:
    for name, kind, seed in (("policy", "lm", 0), ("reference", "lm", 1), ("scorer", "score", 2)):
        assert sum_weights(build_model(kind, seed)) == pytest.approx(golden["weights"][name], rel=1e-12)


def test_logprobs_equal_trl(golden: dict[str, Any], attention: str) -> None:
    policy = build_policy("lm", 0, attention)
    logprobs = policy(build_packed_batch(build_texts()), frozenset({"logprobs"})).logprobs
    assert logprobs is not None
    assert logprobs.tolist() == pytest.approx([x for row in golden["logps"] for x in row], **NEAR)


def test_sft_equals_trl(golden: dict[str, Any], attention: str) -> None:
    policy = build_policy("lm", 0, attention)
    loss, _ = run(Sft(SftSettings()), policy, build_texts())
    assert loss == pytest.approx(golden["sft"]["loss"], **NEAR)
    check_gradients(policy, golden["sft"])


@pytest.mark.parametrize("case", DPO_CASES)
def test_dpo_equals_trl(golden: dict[str, Any], attention: str, case: str) -> None:
    want = golden["dpo"][case]
    policy, reference = build_policy("lm", 0, attention), build_policy("lm", 1, attention)
    loss, result = run(Dpo(DpoSettings(**DPO_CASES[case])), policy, with_reference(build_pairs(), reference))
    assert loss == pytest.approx(want["loss"], **NEAR)
    check_gradients(policy, want)
    found = figures(result)
    for name in ("logps/chosen", "logps/rejected"):
        if "ld_alpha" in case:  # TRL logs its weighted sums; ours are those of whole answers
            continue
        assert found[name] == pytest.approx(want["metrics"][name], **NEAR)
    if DPO_CASES[case]["loss_type"] in ("sigmoid", "hinge") and "_" not in case and " 1" not in case:
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
            assert found[name] == pytest.approx(want["metrics"][name], **NEAR)


@pytest.mark.parametrize("case", CPO_CASES)
def test_cpo_and_simpo_equal_trl(golden: dict[str, Any], attention: str, case: str) -> None:
    """T-03: in TRL SimPO is a loss of CPO that keeps its NLL; here a kind of its own, and each term is logged apart."""
    want, options = golden["cpo"][case], dict(CPO_CASES[case])
    policy = build_policy("lm", 0, attention)
    if options["loss_type"] == "simpo":
        del options["loss_type"]
        method: Any = Simpo(SimpoSettings(**options))
    else:
        method = Cpo(CpoSettings(**options))
    loss, result = run(method, policy, build_pairs())
    assert loss == pytest.approx(want["loss"], **NEAR)
    check_gradients(policy, want)
    if options["cpo_alpha"]:
        (nll,) = [t for t in result.terms if t.name == f"{method.name}/nll"]
        assert nll.sum.item() / nll.count == pytest.approx(want["metrics"]["nll_loss"], **NEAR)
        assert nll.count == sum(map(len, CHOSEN)) and nll.weight == options["cpo_alpha"]
    else:
        assert [t.name for t in result.terms] == [method.name]


@pytest.mark.parametrize("case", ORPO_CASES)
def test_orpo_equals_trl(golden: dict[str, Any], attention: str, case: str) -> None:
    """On prompts of one token, where TRL's NLL, which runs over the prompt too, is that of the answer."""
    want, beta = golden["orpo"][case], ORPO_CASES[case]["beta"]
    policy = build_policy("lm", 0, attention)
    groups = [replace(g, prompt=np.asarray(p, np.int32)) for g, p in zip(build_pairs(), ORPO_PROMPTS, strict=True)]
    loss, result = run(Orpo(OrpoSettings(beta=beta)), policy, groups)
    assert loss == pytest.approx(want["loss"], **NEAR)
    check_gradients(policy, want)
    terms = {t.name: float(t.sum.detach()) / t.count for t in result.terms}
    assert terms["orpo/nll"] == pytest.approx(want["metrics"]["nll_loss"], **NEAR)
    assert terms["orpo/orpo"] == pytest.approx(-beta * want["metrics"]["log_odds_ratio"], **NEAR)
    assert figures(result)["rewards/margins"] == pytest.approx(want["metrics"]["log_odds_chosen"], **NEAR)


def test_t34_the_logged_margin_is_the_one_that_the_loss_uses(golden: dict[str, Any]) -> None:
    """TRL logs β·Δ whatever the loss; IPO compares per-token means with 1/(2β), so those are what we log."""
    want = golden["dpo"]["ipo"]
    groups = with_reference(build_pairs(), build_policy("lm", 1, "sdpa"))
    _, result = run(Dpo(DpoSettings(loss_type="ipo", beta=0.1)), build_policy("lm", 0, "sdpa"), groups)
    ratios = {k: np.subtract(want[f"{k}_logps"], want[f"ref_{k}_logps"]) for k in ("chosen", "rejected")}
    lengths = {"chosen": [len(c) for c in CHOSEN], "rejected": [len(r) for r in REJECTED]}
    means = {k: ratios[k] / lengths[k] for k in ratios}
    found = figures(result)
    assert found["rewards/chosen"] == pytest.approx(means["chosen"].mean(), **NEAR)
    assert found["rewards/margins"] == pytest.approx((means["chosen"] - means["rejected"]).mean(), **NEAR)
    assert abs(found["rewards/margins"] - want["metrics"]["rewards/margins"]) > 0.01


@pytest.mark.parametrize("case", REWARD_CASES)
def test_reward_equals_trl(golden: dict[str, Any], attention: str, case: str) -> None:
    want, options = golden["reward"][case], dict(REWARD_CASES[case])
    policy = build_policy("score", 2, attention)
    groups = build_pairs(options.pop("margin", None))
    loss, result = run(Reward(RewardSettings(**options)), policy, groups)
    assert loss == pytest.approx(want["loss"], **NEAR)
    check_gradients(policy, want)
    found = figures(result)
    assert found["accuracy"] == pytest.approx(want["accuracy"])
    assert found["scores/chosen"] == pytest.approx(np.mean(want["chosen_rewards"]), **NEAR)
    assert found["scores/rejected"] == pytest.approx(np.mean(want["rejected_rewards"]), **NEAR)
    assert found["margin"] == pytest.approx(want["metrics"]["margin"], **NEAR)


@pytest.mark.oracle
def test_golden_values_are_still_what_trl_computes(shared: Any, golden: dict[str, Any]) -> None:
    pytest.importorskip("trl")
    if not (shared / "tools" / "trl_oracle.py").is_file():
        pytest.skip("needs tools/trl_oracle.py in the shared folder")
    oracle = load_oracle(shared)
    try:
        oracle.require_trl()
    except oracle.OracleUnavailable as reason:
        pytest.skip(str(reason))
    assert_close(json.loads(json.dumps(ask_oracle(oracle))), golden)


def assert_close(found: Any, want: Any, path: str = "") -> None:
    """Nested lists and dictionaries of numbers are equal to 1e-5."""
    if isinstance(want, dict):
        assert sorted(found) == sorted(want), path
        for key in want:
            assert_close(found[key], want[key], f"{path}/{key}")
    elif isinstance(want, list):
        assert len(found) == len(want), path
        for i, (a, b) in enumerate(zip(found, want, strict=True)):
            assert_close(a, b, f"{path}/{i}")
    else:
        assert found == pytest.approx(want, **NEAR), path
