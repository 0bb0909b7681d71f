"""Loading: what is refused and how, types, randomness, adapters that do not stack. R-27, S1-17, S4-03, S4-21, T-25."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from burnish.config.stages import DpoSettings, RewardSettings, SftSettings
from burnish.config.train import LoraSettings
from burnish.errors import ConfigError, ServiceError
from burnish.models.adapters import base_of, is_peft
from burnish.models.export import export_model
from burnish.models.folder import inspect_model_folder, read_base_config
from burnish.models.load import (
    build_model,
    fetch_model_folder,
    load_causal_lm,
    load_model,
    load_reward_model,
    resolve_model_path,
)
from tests.models.small import build_tokenizer, edit_json, save_small, shake

LM = {"head": "lm", "dtype": torch.float32}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("llama") / "base", tokenizer=build_tokenizer())


def copy_model(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_names(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model_path("pocket").endswith("assets/models/pocket")
    assert resolve_model_path(str(llama)) == str(llama)
    monkeypatch.chdir(llama.parent)
    assert resolve_model_path("base") == resolve_model_path("./base") == str(llama)
    assert resolve_model_path("some-org/some-model") == "some-org/some-model"
    with pytest.raises(ConfigError, match="no model") as e:
        resolve_model_path("./bose")
    assert "did you mean base" in e.value.remedy
    with pytest.raises(ConfigError, match="revision"):
        resolve_model_path("base", revision="main")


def test_hub_model_offline() -> None:
    """Offline and not in the cache: one clear error, no traceback of a library."""
    with pytest.raises(ServiceError, match=r"some-org/some-model") as e:
        fetch_model_folder("some-org/some-model")
    assert "run once with a connection" in e.value.remedy and e.value.exit_code == 6


def test_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"no config.json here.*notes.txt"):
        load_model(str(tmp_path), **LM)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, r"model_type 'lama'"),
        ({"architectures": ["BertForMaskedLM"]}, "neither a causal language model"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "brings its own code"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"num_hidden_layers": 4}, "9 weights are missing"),
        ({"intermediate_size": 64}, "have another shape"),
    ],
)
def test_wrong_configurations(llama: Path, tmp_path: Path, change: dict, message: str) -> None:
    folder = copy_model(llama, tmp_path / "m")
    edit_json(folder / "config.json", **change)
    with pytest.raises(ConfigError, match=message) as e:
        load_model(str(folder), **LM)
    assert e.value.remedy


class Canary:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_r27_pickled_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    """R-27: no unpickler is reached, for a model and for an adapter."""
    folder = copy_model(llama, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    canary = tmp_path / "canary"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(ConfigError, match=r"pickled \(pytorch_model.bin\)") as e:
        load_model(str(folder), **LM)
    assert "safe_serialization" in e.value.remedy
    adapter = tmp_path / "a"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(llama), "peft_type": "LORA"})
    )
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(ConfigError, match=r"pickled \(adapter_model.bin\)"):
        load_model(str(adapter), **LM)
    assert not canary.exists()


def _lie(raw: bytes, how: str) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    first = next(n for n in header if n != "__metadata__")
    if how == "length":
        return (2**60).to_bytes(8, "little") + raw[8:]
    if how == "cut":
        return raw[:-10]
    if how == "text":
        return raw[:8] + b"\xff" * length + data
    if how == "offsets":
        header[first]["data_offsets"] = [0, len(data) + 4096]
    if how == "shape":
        header[first]["shape"] = [2**40, 2**40]
    if how == "negative":
        header[first]["data_offsets"] = [-8, 8]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("how", ["length", "cut", "text", "offsets", "shape", "negative"])
def test_r27_lying_headers(llama: Path, tmp_path: Path, how: str) -> None:
    """R-27: the bounds of a safetensors header are checked before any tensor is used."""
    folder = copy_model(llama, tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(_lie(file.read_bytes(), how))
    with pytest.raises(ConfigError, match=r"model.safetensors is damaged"):
        load_model(str(folder), **LM)


def test_r27_index_cannot_leave_the_folder(llama: Path, tmp_path: Path) -> None:
    """R-27."""
    folder = copy_model(llama, tmp_path / "m")
    for name in ("../base/model.safetensors", str(llama / "model.safetensors"), "weights.bin"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ConfigError, match="no safetensors file of this folder"):
            inspect_model_folder(folder)


def test_language_and_reward_models_are_told_apart(llama: Path, tmp_path: Path) -> None:
    built = build_model(RewardSettings(), str(llama), head="score", seed=0)
    (tmp_path / "rm").mkdir()
    export_model(built, tmp_path / "rm", tokenizer_source=llama, head="score", extra={})
    with pytest.raises(ConfigError, match="this is a reward model; a language model is needed"):
        load_causal_lm(str(tmp_path / "rm"), dtype=torch.float32)
    with pytest.raises(ConfigError, match="without a trained score head"):
        load_reward_model(str(llama), dtype=torch.float32, need_trained_head=True)
    model = load_reward_model(str(tmp_path / "rm"), dtype=torch.float32, seed=9, need_trained_head=True)
    assert torch.equal(model.score.weight, built.model.score.weight)  # pyright: ignore
    edit_json(tmp_path / "rm" / "config.json", id2label={"0": "a", "1": "b", "2": "c"})
    with pytest.raises(ConfigError, match="has 3 outputs"):
        load_reward_model(str(tmp_path / "rm"), dtype=torch.float32)


def test_global_randomness_is_untouched(llama: Path) -> None:
    """A fresh head and a fresh adapter come from the stage's seed; nobody else's stream moves."""
    settings = RewardSettings(lora=LoraSettings(r=2))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    first = build_model(settings, str(llama), head="score", seed=5)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    torch.manual_seed(123)
    again = build_model(settings, str(llama), head="score", seed=5)
    other = build_model(settings, str(llama), head="score", seed=6)
    for name, parameter in first.trainable.items():
        assert torch.equal(parameter, again.trainable[name])
        assert torch.equal(parameter, other.trainable[name]) == name.endswith("lora_B.default.weight")


def test_types(tmp_path: Path) -> None:
    """Trainable weights have fp32 masters; the rest is in the compute type where that loses nothing that is saved."""
    fp32, bf16 = save_small(tmp_path / "a"), save_small(tmp_path / "b", dtype=torch.bfloat16)
    lora, top, full = {"lora": LoraSettings(r=2)}, {"top_k": 1}, {}
    table = [
        (fp32, lora, torch.bfloat16, torch.bfloat16),
        (fp32, top, torch.bfloat16, torch.float32),
        (bf16, top, torch.bfloat16, torch.bfloat16),
        (bf16, lora, torch.float16, torch.float32),
        (bf16, lora, None, torch.float32),
        (bf16, full, torch.bfloat16, torch.float32),
    ]
    for folder, kind, compute, frozen in table:
        built = build_model(SftSettings(**kind), str(folder), head="lm", seed=0, compute_dtype=compute)
        assert all(p.dtype == torch.float32 for p in built.trainable.values())
        assert {p.dtype for p in built.model.parameters() if not p.requires_grad} <= {frozen}, (kind, compute)
        rotary = [b for n, b in built.model.named_buffers() if "inv_freq" in n]
        assert rotary and all(b.dtype == torch.float32 for b in rotary)
    double = build_model(SftSettings(), str(fp32), head="lm", seed=0, dtype_masters=torch.float64)
    assert all(p.dtype == torch.float64 for p in double.model.parameters())


def test_weights_are_not_the_file(llama: Path, tmp_path: Path) -> None:
    """Loaded weights live in memory of their own: overwriting the file does not reach the model."""
    folder = copy_model(llama, tmp_path / "m")
    model = load_model(str(folder), **LM)[0]
    before = copy.deepcopy(model.state_dict())
    file = folder / "model.safetensors"
    with file.open("rb+") as f:
        f.seek(4096)
        f.write(b"\x01" * (file.stat().st_size - 4096))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_dropout_is_off_and_comes_back_in_the_result(tmp_path: Path) -> None:
    """T-25: functional dropout too; the exported configuration still has the model's own rates."""
    folder = save_small(tmp_path / "base", "gpt2", attn_pdrop=0.5, resid_pdrop=0.3)
    ids = torch.randint(3, 200, (2, 12))
    built = build_model(DpoSettings(), str(folder), head="lm", seed=0)
    built.model.train()
    assert torch.equal(built.model(ids).logits, built.model(ids).logits)
    assert any(n.startswith("dropout off") and "attn_pdrop 0.5 → 0" in n for n in built.notes)
    (tmp_path / "final").mkdir()
    export_model(built, tmp_path / "final", tokenizer_source=None, head="lm", extra={})
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert (config["attn_pdrop"], config["resid_pdrop"], config["embd_pdrop"]) == (0.5, 0.3, 0.1)
    live = build_model(SftSettings(), str(folder), head="lm", seed=0).model.train()
    assert not torch.equal(live(ids).logits, live(ids).logits)


@pytest.mark.parametrize("kind", [{}, {"lora": LoraSettings(r=2)}, {"top_k": 1}])
def test_gradient_checkpointing_changes_no_bit(llama: Path, kind: dict) -> None:
    """S1-17: same loss, same gradients."""
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for on in (False, True):
        built = build_model(SftSettings(gradient_checkpointing=on, **kind), str(llama), head="lm", seed=0)
        shake(built.trainable.values())
        assert base_of(built.model).is_gradient_checkpointing == on
        loss = built.model.train()(ids, labels=ids).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in built.trainable.items()}))
    (loss, gradients), (again, recomputed) = found
    assert torch.equal(loss, again) and all(torch.equal(g, recomputed[n]) for n, g in gradients.items())


def test_adapters_do_not_stack(llama: Path, tmp_path: Path) -> None:
    """S4-21: a later LoRA stage starts from base + earlier adapter with one fresh adapter; a resumed stage builds the
    same model again and loads its trainable state."""
    settings = SftSettings(lora=LoraSettings(r=2))
    first = build_model(settings, str(llama), head="lm", seed=0)
    shake(first.trainable.values())
    (tmp_path / "sft").mkdir()
    export_model(first, tmp_path / "sft", tokenizer_source=llama, head="lm", extra={})
    ids = torch.randint(3, 200, (2, 12))
    with torch.no_grad():
        wanted = first.model.eval()(ids).logits

    second = build_model(DpoSettings(lora=LoraSettings(r=2)), str(tmp_path / "sft"), head="lm", seed=1)
    assert second.loaded.merged and any("added to the weights" in n for n in second.notes)
    assert list(second.model.peft_config) == ["default"] and second.fresh_adapter  # pyright: ignore
    assert set(second.trainable) == set(first.trainable)
    assert sum("lora_A" in n for n, _ in second.model.named_parameters()) == len(second.trainable) // 2
    with torch.no_grad():
        assert torch.allclose(second.model.eval()(ids).logits, wanted, atol=1e-5)

    shake(second.trainable.values())
    state = {n: p.detach().clone() for n, p in second.trainable.items()}
    resumed = build_model(DpoSettings(lora=LoraSettings(r=2)), str(tmp_path / "sft"), head="lm", seed=1)
    assert resumed.trainable.keys() == state.keys()
    with torch.no_grad():
        for name, parameter in resumed.trainable.items():
            parameter.copy_(state[name])
        assert torch.equal(resumed.model.eval()(ids).logits, second.model.eval()(ids).logits)

    full = build_model(DpoSettings(), str(tmp_path / "sft"), head="lm", seed=1)
    assert not is_peft(full.model) and full.share == 1.0
    with torch.no_grad():
        assert torch.allclose(full.model.eval()(ids).logits, wanted, atol=1e-5)


def test_adapter_of_another_model(llama: Path, tmp_path: Path) -> None:
    built = build_model(SftSettings(lora=LoraSettings(r=2)), str(llama), head="lm", seed=0)
    folder = tmp_path / "a"
    folder.mkdir()
    export_model(built, folder, tokenizer_source=None, head="lm", extra={})
    other = save_small(tmp_path / "deeper", num_hidden_layers=4)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(other))
    with pytest.raises(ConfigError, match="does not fit") as e:
        load_model(str(folder), **LM)
    assert "base_model_name_or_path" in e.value.remedy
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(folder))
    with pytest.raises(ConfigError, match="is an adapter itself"):
        load_model(str(folder), **LM)
    edit_json(folder / "adapter_config.json", base_model_name_or_path="/nowhere/at/all")
    with pytest.raises(ConfigError, match="no model '/nowhere/at/all'"):
        load_model(str(folder), **LM)


def test_base_of_an_adapter_is_found_again(llama: Path, tmp_path: Path) -> None:
    """Beside the adapter, or bundled in a package that has moved."""
    pocket = resolve_model_path("pocket-small")
    built = build_model(SftSettings(lora=LoraSettings(r=2)), pocket, head="lm", seed=0)
    folder = tmp_path / "a"
    folder.mkdir()
    export_model(built, folder, tokenizer_source=pocket, head="lm", extra={})
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == pocket
    edit_json(
        folder / "adapter_config.json",
        base_model_name_or_path="/old/venv/site-packages/burnish/assets/models/pocket-small",
    )
    assert str(load_model(str(folder), **LM)[1].base) == pocket
    assert read_base_config(folder)["hidden_size"] == 112 and read_base_config(llama)["hidden_size"] == 32
    copy_model(Path(pocket), tmp_path / "base")
    edit_json(folder / "adapter_config.json", base_model_name_or_path="../base")
    assert load_model(str(folder), **LM)[1].base == tmp_path / "base"


def test_code_of_a_tokenizer_does_not_run(llama: Path, tmp_path: Path) -> None:
    """R-27: a tokenizer that asks for code of its own; reward models read the tokenizer."""
    folder = copy_model(llama, tmp_path / "m")
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Tokenizer: ...\n")
    edit_json(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Tokenizer", None]},
        tokenizer_class="Tokenizer",
    )
    with contextlib.suppress(ConfigError):
        load_model(str(folder), head="score", dtype=torch.float32)
    assert not canary.exists()


def test_reward_model_resumes_its_head(llama: Path) -> None:
    """S4-03: the head is part of the trainable state; building again and loading that state does not reset it."""
    for settings in (RewardSettings(), RewardSettings(lora=LoraSettings(r=2)), RewardSettings(top_k=1)):
        built = build_model(settings, str(llama), head="score", seed=0)
        shake(built.trainable.values())
        (name,) = built.head_parameters
        assert name in built.trainable
        again = build_model(settings, str(llama), head="score", seed=0)
        assert not torch.equal(again.trainable[name], built.trainable[name])
        with torch.no_grad():
            for n, p in again.trainable.items():
                p.copy_(built.trainable[n])
        ids = torch.randint(3, 200, (1, 9))
        with torch.no_grad():
            assert torch.equal(again.model.eval()(ids).logits, built.model.eval()(ids).logits)
