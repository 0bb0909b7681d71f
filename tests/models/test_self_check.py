"""The load-time self-check: its verdicts, its cache, and that it leaves model and generators alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from burnish.core import attention
from burnish.core.kernels import calls
from burnish.core.kernels.build import load_kernels
from burnish.models import self_check
from burnish.models.self_check import Verdict, check_architecture
from tests.models import packing


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "_known", {})


def _meta(kind: str, **fields):
    """A model of full default size, without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))


_PACKS = [
    ("llama", {}),
    ("qwen3", {}),
    ("qwen3_moe", {"num_hidden_layers": 2}),
    ("mistral", {}),
    ("gemma2", {}),
    ("gpt_oss", {"num_hidden_layers": 2}),
    ("deepseek_v3", {"num_hidden_layers": 4}),
    ("cohere2", {}),
    ("olmo3", {}),
    ("phi3", {"sliding_window": 2047}),
    ("stablelm", {}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 20}),
    (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 48,
                "long_factor": [2.0] * 48,
                "original_max_position_embeddings": 4096,
            },
            "max_position_embeddings": 131072,
        },
    ),
]
_REFUSES = [
    ("bloom", {}, "registry"),
    ("falcon", {}, "registry"),
    ("gptj", {}, "registry"),
    ("gpt_neo", {}, "registry"),
    ("doge", {"num_hidden_layers": 2}, "mask"),
    ("llama4_text", {"num_hidden_layers": 4, "num_local_experts": 2}, "differ"),
    ("lfm2", {"layer_types": (["conv"] * 2 + ["full_attention"]) * 5 + ["conv"]}, "differ"),
    ("mamba", {}, "registry"),
]


@pytest.mark.parametrize(("kind", "fields"), _PACKS)
def test_packable_architectures_at_full_size(kind: str, fields: dict) -> None:
    if kind == "lfm2":
        fields["num_hidden_layers"] = len(fields["layer_types"])
    verdict = check_architecture(_meta(kind, **fields))
    assert (verdict.packs, verdict.reason, verdict.head_agrees) == (True, "", True)
    assert verdict.fuses == (kind in ("llama", "qwen2", "qwen3", "mistral"))


@pytest.mark.parametrize(("kind", "fields", "reason"), _REFUSES)
def test_others_are_refused_with_a_reason(kind: str, fields: dict, reason: str) -> None:
    if kind == "lfm2":
        fields = fields | {"num_hidden_layers": len(fields["layer_types"])}
    verdict = check_architecture(_meta(kind, **fields))
    assert not verdict.packs and reason in verdict.reason and verdict.head_agrees


def test_a_head_outside_the_table_is_noticed() -> None:
    assert check_architecture(_meta("modernbert-decoder")) == Verdict(True, "", False)


@pytest.mark.parametrize("ignored", ["sliding_window", "softcap", "s_aux"])
def test_attention_that_ignores_an_argument_is_caught(ignored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: each thing that packed attention honours, ignored, is seen on the small copy."""
    real = attention.packed_attention

    def careless(*args, **kwargs):
        kwargs[ignored] = None
        return real(*args, **kwargs)

    attention.AttentionInterface.register(attention.SDPA_NAME, careless)
    try:
        for family in {"sliding_window": ["mistral_window", "gemma3"], "softcap": ["gemma2"], "s_aux": ["gpt_oss"]}[
            ignored
        ]:
            verdict = check_architecture(packing.build_model(family))
            assert not verdict.packs and "differ" in verdict.reason
        if ignored == "sliding_window":  # a window of thousands is cut on the small copy, so that it shows
            assert not check_architecture(_meta("mistral")).packs
    finally:
        attention.register_packed_attention()


def test_a_fused_block_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish.core import block

    monkeypatch.setattr(block, "normalise", lambda x, weight, eps, low: (x * weight, torch.ones_like(x[..., :1])))
    verdict = check_architecture(packing.build_model("qwen3"))
    assert verdict.packs and not verdict.fuses


def test_a_layout_that_leaks_between_completions_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish.core.segments import Segment

    real = self_check.build_attention_plan

    def leaky(layout):
        plan = real(layout)
        plan.segments = tuple(
            Segment(s.start, s.stop, s.prompt, s.start if s.prompt_stop else 0) for s in plan.segments
        )
        return plan

    monkeypatch.setattr(self_check, "build_attention_plan", leaky)
    assert not check_architecture(packing.build_model("qwen3")).packs


def test_weights_and_generators_are_left_alone() -> None:
    model = packing.build_model("gemma2")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    torch.manual_seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_default_dtype()
    check_architecture(model)
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    assert torch.get_default_dtype() == states[2]
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert model.config._attn_implementation in ("sdpa", "eager") and model.training


def test_the_verdict_is_kept_in_memory_and_on_disk(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    monkeypatch.setattr(self_check, "_run", lambda inner, head: runs.append(head) or Verdict(True))
    model = packing.build_model("qwen3")
    assert check_architecture(model, cache_dir=tmp_path).packs and check_architecture(model, cache_dir=tmp_path).packs
    assert runs == ["lm"]
    (file,) = tmp_path.glob("self-check-*.json")
    assert json.loads(file.read_text())["packs"] is True
    monkeypatch.setattr(self_check, "_known", {})
    assert check_architecture(model, cache_dir=tmp_path).packs and runs == ["lm"]
    file.write_text("{")  # cut off
    monkeypatch.setattr(self_check, "_known", {})
    assert check_architecture(model, cache_dir=tmp_path).packs and runs == ["lm", "lm"]
    check_architecture(packing.build_model("qwen3", head="score"), "score")
    check_architecture(packing.build_model("qwen3", rope_theta=5.0))
    assert runs == ["lm", "lm", "score", "lm"]


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss"])
def test_it_is_a_small_computation(family: str) -> None:
    """Less than a step of a real model takes by far: a tenth of a second, and a count that no machine changes."""
    model = packing.build_model(family)
    with FlopCounterMode(display=False) as counter:
        check_architecture(model)
    assert 0 < counter.get_total_flops() < 5e7


@pytest.mark.parametrize("name", ["attend", "rotate"])
def test_a_kernel_that_computes_wrongly_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if load_kernels().library is None:
        pytest.skip(load_kernels().note)
    real, seen = getattr(calls, name), []

    def wrong(*args, **named):
        seen.append(1)
        found = real(*args, **named)
        return (found[0] * 1.01, found[1]) if name == "attend" else found * 1.01

    monkeypatch.setattr(calls, name, wrong)
    verdict = check_architecture(packing.build_model("qwen3"))
    assert seen and not verdict.fuses
