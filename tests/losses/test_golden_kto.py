"""Acceptance: KTO's values and gradients equal TRL's to 1e-5 in fp32, without TRL at hand (see make_golden_kto.py)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from burnish.config.stages import KtoSettings
from burnish.core.group import Group
from burnish.engine.method import arrange_groups
from burnish.methods.kto import Kto
from tests.losses.make_golden import load_oracle
from tests.losses.make_golden_kto import COMPLETIONS, GOLDEN_KTO, KTO_CASES, LABELS, SEEDS, ask_oracle_kto
from tests.losses.test_golden import NEAR, assert_close, build_policy, check_gradients, figures, run, with_reference
from tests.losses.tiny import CONFIG, PROMPTS, build_completion, build_model, sum_weights


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    found = json.loads(GOLDEN_KTO.read_text(encoding="utf-8"))
    assert found["cases"] == KTO_CASES
    assert found["inputs"] == {"config": CONFIG, "prompts": PROMPTS, "completions": COMPLETIONS, "labels": LABELS}
    return found["values"]


def build_rows(labels: list[bool]) -> list[Group]:
    return [
        Group(f"golden:{i}", np.asarray(p, np.int32), (build_completion(c),), columns={"label": float(y)})
        for i, (p, c, y) in enumerate(zip(PROMPTS, COMPLETIONS, labels, strict=True))
    ]


@pytest.mark.parametrize("attention", ["sdpa", "padded"])
@pytest.mark.parametrize("way", SEEDS)
@pytest.mark.parametrize("case", KTO_CASES)
def test_kto_equals_trl(golden: dict[str, Any], attention: str, way: str, case: str) -> None:
    want, options = golden[way][case], dict(KTO_CASES[case])
    labels = options.pop("labels", LABELS)
    policy, reference = (build_policy("lm", seed, attention) for seed in SEEDS[way])
    method = Kto(KtoSettings(**options))
    groups = with_reference(arrange_groups(method, build_rows(labels)), reference)
    loss, result = run(method, policy, groups)
    assert loss == pytest.approx(want["loss"], **NEAR)
    check_gradients(policy, want)
    found = figures(result)
    for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl"):
        if name in found and name in want["metrics"]:
            assert found[name] == pytest.approx(want["metrics"][name], **NEAR), name
    if method.has_baseline:
        assert found["kl"] == pytest.approx(2.0072453 if way == "there" else 0.0, **NEAR)


def test_models_are_rebuilt(golden: dict[str, Any]) -> None:
    for seed in (0, 1):
        assert sum_weights(build_model("lm", seed)) == pytest.approx(golden["weights"][str(seed)], rel=1e-12)


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
    assert_close(json.loads(json.dumps(ask_oracle_kto(oracle))), golden)
