"""LoRA: targets per architecture, every setting honoured, merging and joining exact. S1-06, S1-07, T-24, S4-21."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from burnish.config.stages import DpoSettings, RewardSettings, SftSettings
from burnish.config.train import LoraSettings
from burnish.errors import ConfigError
from burnish.models.adapters import base_of, is_peft, merge_copy
from burnish.models.export import export_model
from burnish.models.load import BuiltModel, build_model, load_model, quiet
from tests.models.small import save_small, shake

TARGETS = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mistral": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "qwen2": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "qwen3": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gemma": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gemma2": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "phi": {"q_proj", "k_proj", "v_proj", "dense"},
    "phi3": {"qkv_proj", "o_proj"},
    "gpt2": {"c_attn"},
    "gpt_neox": {"query_key_value"},
    "bloom": {"query_key_value"},
    "falcon": {"query_key_value"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj"},
    "helium": {"q_proj", "k_proj", "v_proj", "o_proj"},  # not in the table: found by structure
}
IDS = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0))


def build(folder: Path, *, head: str = "lm", seed: int = 0, **lora: object) -> BuiltModel:
    settings = (SftSettings if head == "lm" else RewardSettings)(lora=LoraSettings(**lora))  # pyright: ignore
    return build_model(settings, str(folder), head=head, seed=seed)  # pyright: ignore


def adapted(built: BuiltModel) -> set[str]:
    return {n.split(".lora_A.")[0].rpartition(".")[2] for n in built.trainable if ".lora_A." in n}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_default_targets(name: str, tmp_path: Path) -> None:
    """S1-06: the attention projections of the architecture; three layers each; the output is that of the base at first,
    and another after a change of the adapter (so Conv1D's layout is right)."""
    folder = save_small(tmp_path, name)
    built = build(folder, r=4)
    assert adapted(built) == TARGETS[name]
    assert len(built.trainable) == 2 * 3 * len(TARGETS[name])
    plain = load_model(str(folder), head="lm", dtype=torch.float32)[0]
    assert torch.equal(logits(built.model), logits(plain))
    shake(built.trainable.values(), 0.3)
    assert not torch.allclose(logits(built.model), logits(plain), atol=1e-3)
    assert torch.allclose(logits(merge_copy(built.model)), logits(built.model), atol=2e-4)
    config = built.model.peft_config["default"]  # pyright: ignore
    assert config.fan_in_fan_out == (name == "gpt2")


def test_settings_are_honoured(tmp_path: Path) -> None:
    """S1-07: r, alpha, dropout, bias, rsLoRA, DoRA; each changes what it should."""
    folder = save_small(tmp_path, "gpt2")

    def layer(built: BuiltModel) -> object:
        return base_of(built.model).transformer.h[0].attn.c_attn

    plain = layer(build(folder, r=8, alpha=20.0))
    assert plain.scaling["default"] == 20 / 8 and plain.lora_A["default"].weight.shape == (8, 32)  # pyright: ignore
    assert layer(build(folder, r=8, alpha=20.0, use_rslora=True)).scaling["default"] == 20 / math.sqrt(8)  # pyright: ignore
    dropped = layer(build(folder, r=8, dropout=0.25)).lora_dropout["default"]  # pyright: ignore
    assert isinstance(dropped, torch.nn.Dropout) and dropped.p == 0.25
    dora = build(folder, r=4, use_dora=True)
    magnitudes = [n for n in dora.trainable if "lora_magnitude_vector" in n]
    assert len(magnitudes) == 3 and set(magnitudes) <= dora.no_decay
    none, only, every = (build(folder, r=4, bias=b) for b in ("none", "lora_only", "all"))
    assert not any(n.endswith(".bias") for n in none.trainable)
    assert sum(n.endswith(".bias") for n in only.trainable) == 3
    assert sum(n.endswith(".bias") for n in every.trainable) > 10
    everything = build(folder, r=4, target_modules="all-linear")
    assert adapted(everything) == {"c_attn", "c_proj", "c_fc"}
    assert adapted(build(folder, r=4, target_modules=["c_fc"])) == {"c_fc"}


def test_share_of_a_real_shape() -> None:
    """S1-07: the reported share, on a model of ordinary proportions, is below 1 %; no weights are needed for it."""
    from burnish.models.adapters import build_lora
    from burnish.models.freeze import compute_share
    from tests.models.small import build_config

    config = build_config(
        "llama",
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=32000,
    )
    with torch.device("meta"):
        model = build_lora(AutoModelForCausalLM.from_config(config), LoraSettings(r=8), head="lm", seed=0)
    share = compute_share(model)
    assert share.trainable == 22 * 8 * ((2048 + 2048) * 2 + (2048 + 256) * 2)
    assert str(share) == f"trainable: 2,252,800 of {share.total:,} parameters (0.2 %)"


def test_wrong_targets(tmp_path: Path) -> None:
    folder = save_small(tmp_path)
    with pytest.raises(ConfigError, match=r"no linear layer .* is called 'q_prj'") as e:
        build(folder, target_modules=["q_prj"])
    assert "did you mean 'q_proj'" in e.value.remedy
    with pytest.raises(ConfigError, match=r"an adapter on the head \(lm_head\)"):
        build(folder, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ConfigError, match=r"an adapter on the head \(score\)"):
        build(folder, head="score", target_modules=["score"])
    assert adapted(build(folder, target_modules=["layers.0.self_attn.q_proj"])) == {"q_proj"}


def test_reward_head_trains_with_the_adapter(tmp_path: Path) -> None:
    """T-24: the score head is trainable, in fp32, and among the saved tensors."""
    folder = save_small(tmp_path / "base", dtype=torch.bfloat16)
    built = build_model(
        RewardSettings(lora=LoraSettings(r=2)), str(folder), head="score", seed=0, compute_dtype=torch.bfloat16
    )
    (head,) = built.head_parameters
    assert built.trainable[head].dtype == torch.float32 and built.trainable[head].std() < 0.05
    (tmp_path / "final").mkdir()
    export_model(built, tmp_path / "final", tokenizer_source=None, head="score", extra={})
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.score.weight"], built.trainable[head])


def test_saved_adapter_is_the_same_bytes_for_the_same_weights(tmp_path: Path) -> None:
    folder = save_small(tmp_path / "base")
    found = []
    for run in ("a", "b"):
        built = build(folder, r=4)
        shake(built.trainable.values())
        (tmp_path / run).mkdir()
        export_model(built, tmp_path / run, tokenizer_source=None, head="lm", extra={})
        found.append({p.name: p.read_bytes() for p in (tmp_path / run).iterdir()})
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_two_stages_give_one_adapter_of_the_base(name: str, tmp_path: Path) -> None:
    """S4-21: SFT and DPO with adapters of different settings; the result is one adapter of the original base."""
    base = save_small(tmp_path / "base", name)
    target = ["c_fc"] if name == "gpt2" else ["gate_proj"]
    stages = [
        SftSettings(lora=LoraSettings(r=3, alpha=7.0)),
        DpoSettings(lora=LoraSettings(r=2, alpha=5.0, use_rslora=True, target_modules=target)),
        DpoSettings(lora=LoraSettings(r=2)),
    ]
    source = base
    for i, settings in enumerate(stages):
        built = build_model(settings, str(source), head="lm", seed=i)
        shake(built.trainable.values(), 0.1, seed=i)
        source = tmp_path / f"stage-{i}"
        source.mkdir()
        export_model(built, source, tokenizer_source=None, head="lm", extra={})
    config = json.loads((source / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["r"] == config["lora_alpha"] == 7
    with quiet():
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(source))
    assert torch.allclose(logits(loaded), logits(built.model), atol=1e-5)
    assert not torch.allclose(
        logits(loaded), logits(load_model(str(base), head="lm", dtype=torch.float32)[0]), atol=0.1
    )


def test_the_base_of_an_adapter_may_lie_in_the_hub_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that starts from an adapter over a hub model reads the base's configuration where the hub keeps it."""
    import huggingface_hub.file_download

    from burnish.models.folder import read_context

    snapshot = tmp_path / "cache" / "models--some--model" / "snapshots" / "abc"
    save_small(snapshot)
    (tmp_path / "cache" / "models--some--model" / "refs").mkdir()
    (tmp_path / "cache" / "models--some--model" / "refs" / "main").write_text("abc")
    built = build(snapshot, r=2)
    built.loaded.name = "some/model"
    (tmp_path / "final").mkdir()
    export_model(built, tmp_path / "final", tokenizer_source=None, head="lm", extra={})
    with pytest.raises(ConfigError, match="some/model, is not on this machine"):
        read_context(tmp_path / "final")
    monkeypatch.setattr(huggingface_hub.file_download, "HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert read_context(tmp_path / "final") == 96


def test_what_cannot_be_joined_is_written_whole(tmp_path: Path) -> None:
    """S4-21: DoRA over an earlier adapter is no single LoRA; the result is the whole model, merged."""
    base = save_small(tmp_path / "base")
    first = build(base, r=2)
    shake(first.trainable.values(), 0.1)
    (tmp_path / "a").mkdir()
    export_model(first, tmp_path / "a", tokenizer_source=None, head="lm", extra={})
    second = build(tmp_path / "a", r=2, use_dora=True)
    shake(second.trainable.values(), 0.1)
    wanted = logits(second.model)
    (tmp_path / "b").mkdir()
    export_model(second, tmp_path / "b", tokenizer_source=None, head="lm", extra={}, dtype="masters")
    assert is_peft(second.model) and torch.equal(logits(second.model), wanted)
    assert not (tmp_path / "b" / "adapter_config.json").exists()
    with quiet():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.allclose(logits(loaded), wanted, atol=1e-4)
