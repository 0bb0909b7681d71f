"""Results load without burnish, bit for bit, and hold what inference needs. R-33, S2-10, T-24, T-27."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from burnish.config.stages import DpoSettings, RewardSettings, SftSettings
from burnish.config.train import LoraSettings
from burnish.core.batch import build_packed_batch
from burnish.errors import ConfigError
from burnish.models.export import compute_rounding_loss, export_model
from burnish.models.load import BuiltModel, build_model
from burnish.models.policy import Policy
from burnish.models.reference import build_reference
from tests.models.small import build_groups, build_tokenizer, save_small, shake

TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
KINDS = {
    "full": {},
    "top": {"top_k": 1},
    "lora": {"lora": LoraSettings(r=2)},
    "dora": {"lora": LoraSettings(r=2, use_dora=True)},
}

# What a user writes; burnish cannot be imported there, nor any network reached.
SCRIPT = """
import json, socket, sys
import torch
sys.modules["burnish"] = None
socket.socket.connect = socket.getaddrinfo = lambda *a, **k: (_ for _ in ()).throw(RuntimeError("network"))
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
root = sys.argv[1]
data = torch.load(root + "/inputs.pt", weights_only=True)
found = {}
for name, head in json.loads(sys.argv[2]):
    folder = f"{root}/{name}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    info = torch.load(folder + "/training_info.pt", weights_only=True)
    assert info["training_config"]["learning_rate"] == 1e-5 and info["dataset_name"] == "pocket/chat", info
    adapter = "lora" in name or "dora" in name
    with torch.no_grad():
        if head == "lm":
            loaders = [AutoModelForCausalLM] + [AutoPeftModelForCausalLM] * adapter
            models = [c.from_pretrained(folder).eval() for c in loaders]
            found[name] = [m(data["ids"]).logits for m in models]
            assert tokenizer.apply_chat_template([{"role": "u", "content": "x"}], tokenize=False) == "u: x</s>"
            assert GenerationConfig.from_pretrained(folder).eos_token_id == [2, 7]
            models[0].generate(data["ids"], max_new_tokens=2, pad_token_id=0)
        else:
            extra = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id} if adapter else {}
            loaders = [AutoModelForSequenceClassification] + [AutoPeftModelForSequenceClassification] * adapter
            models = [c.from_pretrained(folder, **extra).eval() for c in loaders]
            found[name] = [m(data["ids"][:1]).logits for m in models]
torch.save(found, root + "/found.pt")
"""


def export(built: BuiltModel, folder: Path, base: Path, head: str, **more: object) -> Path:
    folder.mkdir()
    extra = {"training_config": {"learning_rate": 1e-5, "data": Path("x")}, "dataset_name": "pocket/chat"}
    export_model(built, folder, tokenizer_source=base, head=head, extra=extra, **more)  # pyright: ignore
    return folder


def test_r33_results_load_in_a_process_without_burnish(tmp_path: Path) -> None:
    """R-33, S2-10, T-24: full, top_k, LoRA, DoRA, language and reward models, two architectures: bit-equal outputs."""
    tokenizer = build_tokenizer(template=TEMPLATE)
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.save({"ids": ids}, tmp_path / "inputs.pt")
    wanted, jobs = {}, []
    for arch in ("qwen3", "gpt2"):
        base = save_small(tmp_path / arch, arch, tokenizer=tokenizer, tie_word_embeddings=True)
        for head, settings in (("lm", SftSettings), ("score", RewardSettings)):
            for kind, changes in KINDS.items():
                if arch == "gpt2" and kind == "dora":
                    continue
                built = build_model(settings(**changes), str(base), head=head, seed=0)  # pyright: ignore
                shake(built.trainable.values())
                name = f"{arch}-{head}-{kind}"
                with torch.no_grad():
                    wanted[name] = built.model.eval()(ids if head == "lm" else ids[:1]).logits
                Policy(built.model, head=head)  # pyright: ignore[reportArgumentType]
                export(built, tmp_path / name, base, head, stop_ids=[2, 7])
                jobs.append((name, head))
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path), json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found.keys() == wanted.keys() and len(jobs) == 14
    for name, tensors in found.items():
        for tensor in tensors:
            assert torch.equal(tensor, wanted[name]), (name, float((tensor - wanted[name]).abs().max()))


def test_only_what_inference_needs(tmp_path: Path) -> None:
    """T-27: also when the stage had a reference beside its policy."""
    base = save_small(tmp_path / "base", tokenizer=build_tokenizer(template=TEMPLATE))
    texts = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "training_info.pt"}
    for kind, files in (
        ({}, {"config.json", "model.safetensors", "generation_config.json"}),
        ({"lora": LoraSettings(r=2)}, {"adapter_config.json", "adapter_model.safetensors", "generation_config.json"}),
    ):
        built = build_model(DpoSettings(**kind), str(base), head="lm", seed=0)
        policy = Policy(built.model, head="lm")
        references = [build_reference(policy, "copy")]
        if kind:
            references.append(build_reference(policy, "adapter", fresh_adapter=built.fresh_adapter))
        for reference in references:
            reference.logprobs(build_packed_batch(build_groups(2)))
        folder = export(built, tmp_path / f"final{len(kind)}", base, "lm")
        assert {p.name for p in folder.iterdir()} == texts | files
        assert all(p.stat().st_mode & 0o044 == 0o044 for p in folder.iterdir())
        if not kind:
            assert "attn_implementation" not in (folder / "config.json").read_text()
            assert "burnish" not in (folder / "config.json").read_text()


def test_types_of_the_saved_weights(tmp_path: Path) -> None:
    base = save_small(tmp_path / "base", dtype=torch.bfloat16)
    built = build_model(SftSettings(), str(base), head="lm", seed=0)
    shake(built.trainable.values(), 1e-4)
    for dtype, kind in (("source", torch.bfloat16), ("masters", torch.float32), (torch.float16, torch.float16)):
        folder = export(built, tmp_path / str(kind)[6:], base, "lm", dtype=dtype)
        tensors = load_file(folder / "model.safetensors")
        assert {t.dtype for t in tensors.values()} == {kind}
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(kind)[6:]
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(tensors[name], built.trainable[name].to(kind))


def test_rounding_that_undoes_training_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A change below half a step of bf16 is lost in bf16; the share that is lost is computed and said aloud."""
    base = save_small(tmp_path / "base", dtype=torch.bfloat16)
    built = build_model(SftSettings(), str(base), head="lm", seed=0)
    assert compute_rounding_loss(built, torch.bfloat16) == 0.0
    with torch.no_grad():
        for parameter in built.trainable.values():
            parameter.mul_(1 + 2**-10)
    assert compute_rounding_loss(built, torch.bfloat16) == pytest.approx(1.0)
    assert compute_rounding_loss(built, torch.float32) == 0.0
    export(built, tmp_path / "a", base, "lm")
    assert "rounds away 100 % of what this stage changed; save_dtype: fp32" in caplog.text
    caplog.clear()
    with torch.no_grad():
        for parameter in built.trainable.values():
            parameter.mul_(1.5)
    export(built, tmp_path / "b", base, "lm")
    export(built, tmp_path / "c", base, "lm", dtype="masters")
    assert not caplog.text


def test_shards_begin_aligned(tmp_path: Path) -> None:
    base = save_small(tmp_path / "base")
    built = build_model(SftSettings(), str(base), head="lm", seed=0)
    folder = export(built, tmp_path / "final", base, "lm", max_shard_size="50KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and (folder / "model.safetensors.index.json").is_file()
    for shard in shards:
        with shard.open("rb") as f:
            assert (8 + int.from_bytes(f.read(8), "little")) % 64 == 0
    again = build_model(SftSettings(), str(folder), head="lm", seed=0)
    assert all(torch.equal(p, again.trainable[n]) for n, p in built.trainable.items())


def test_odd_generation_settings_are_copied(tmp_path: Path) -> None:
    """Settings that transformers refuses to save (temperature without sampling) belong to the model; they stay."""
    base = save_small(tmp_path / "base")
    text = json.dumps({"temperature": 0.6, "do_sample": False, "eos_token_id": 2})
    (base / "generation_config.json").write_text(text)
    built = build_model(SftSettings(), str(base), head="lm", seed=0)
    folder = export(built, tmp_path / "final", base, "lm")
    assert (folder / "generation_config.json").read_text() == text


def test_chat_template_of_the_stage(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = save_small(tmp_path / "base", tokenizer=build_tokenizer(template=TEMPLATE))
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    built = build_model(SftSettings(), str(base), head="lm", seed=0)
    folder = export(built, tmp_path / "final", base, "lm", chat_template="{{ messages[0]['content'] }}!")
    saved = AutoTokenizer.from_pretrained(folder)
    assert saved.apply_chat_template([{"role": "u", "content": "x"}], tokenize=False) == "x!"
    assert TEMPLATE not in "".join(p.read_text() for p in folder.glob("*token*"))


def test_training_info_is_plain(tmp_path: Path) -> None:
    """S2-10: keys of old; plain values only."""
    base = save_small(tmp_path / "base")
    built = build_model(SftSettings(), str(base), head="lm", seed=0)
    folder = export(built, tmp_path / "final", base, "lm")
    info = torch.load(folder / "training_info.pt", weights_only=True)
    assert info["base_model_path"] == str(base) and info["model_type"] == "lm" and info["train_samples"] is None
    assert info["training_config"] == {"learning_rate": 1e-5, "data": "x"}
    (tmp_path / "bad").mkdir()
    with pytest.raises(ConfigError, match=r"training_info: a.b is a Tensor"):
        export_model(built, tmp_path / "bad", tokenizer_source=None, head="lm", extra={"a": {"b": torch.ones(1)}})


def test_mixture_of_experts(tmp_path: Path) -> None:
    """Fused expert weights are written in the layout that the hub has."""
    base = save_small(tmp_path / "base", "qwen3_moe")
    built = build_model(SftSettings(), str(base), head="lm", seed=0)
    folder = export(built, tmp_path / "final", base, "lm")
    assert load_file(folder / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    again = build_model(SftSettings(), str(folder), head="lm", seed=0)
    assert all(torch.equal(p, again.trainable[n]) for n, p in built.trainable.items())
