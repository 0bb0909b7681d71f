"""Merging: merged = base + adapter to 1e-4, in every form an adapter has; a wrong merge is not written. S2-13."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from burnish.config.stages import RewardSettings, SftSettings
from burnish.config.train import LoraSettings
from burnish.errors import ConfigError
from burnish.models import merge
from burnish.models.export import export_model
from burnish.models.load import build_model, quiet
from burnish.models.merge import LIMIT, choose_rows, measure_kl, merge_folder, save_merged
from burnish.models.quantise import Quantization, read_quantization
from tests.models.small import build_groups, save_small, shake

GROUPS = build_groups(30)
ROWS = choose_rows(GROUPS)


def make_adapter(
    folder: Path,
    name: str = "llama",
    *,
    head: str = "lm",
    quantize: str = "none",
    changes: Any = None,
    spread: float = 0.1,
    **lora: Any,
) -> Path:
    """A trained adapter in folder/final over folder/base."""
    base = save_small(folder / "base", name, **(changes or {}))
    settings = (SftSettings if head == "lm" else RewardSettings)(quantize=quantize, lora=LoraSettings(**lora))  # pyright: ignore
    built = build_model(settings, str(base), head=head, seed=0)  # pyright: ignore
    shake(built.trainable.values(), spread)
    (folder / "final").mkdir()
    export_model(built, folder / "final", tokenizer_source=None, head=head, extra={})  # pyright: ignore
    return folder / "final"


def make_foreign(folder: Path, *, tied: bool, **config: Any) -> Path:
    """An adapter as another program would write it, with plain PEFT."""
    base = save_small(folder / "base", tie_word_embeddings=tied)
    with quiet():
        wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, **config))
        shake([p for p in wrapped.parameters() if p.requires_grad], 0.1)
        wrapped.save_pretrained(folder / "final")
    return folder / "final"


def write(merged: merge.Merged, folder: Path, dtype: Any = torch.float32) -> Path:
    folder.mkdir()
    save_merged(merged, folder, tokenizer_source=None, dtype=dtype, extra={})
    return folder


def logits(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model.eval()(input_ids=torch.tensor([row])).logits[0] for row in ROWS]


def expect_equal(folder: Path, adapter: Path, limit: float = LIMIT) -> None:
    """What plain transformers loads gives the logits of base + adapter by plain PEFT."""
    with quiet():
        ours = AutoModelForCausalLM.from_pretrained(folder)
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(adapter.parent / "base"), str(adapter))
    gaps = [float((a - b).abs().max()) for a, b in zip(logits(ours), logits(theirs), strict=True)]
    assert max(gaps) <= limit, max(gaps)


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("llama", {"r": 4}),
        ("qwen3", {"r": 4, "use_rslora": True, "alpha": 7.0}),
        ("llama", {"r": 4, "use_dora": True}),
        ("gpt2", {"r": 4}),
        ("qwen2", {"r": 4, "bias": "all"}),
        ("gemma2", {"r": 4, "target_modules": "all-linear"}),
    ],
)
def test_s2_13_merged_gives_the_adapter_s_logits(name: str, lora: dict[str, Any], tmp_path: Path) -> None:
    """S2-13: in each form, as plain transformers loads the result; the source folders stay as they were."""
    adapter = make_adapter(tmp_path, name, **lora)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    merged = merge_folder(adapter, ROWS)
    assert merged.difference <= LIMIT and merged.positions == sum(map(len, ROWS)) > 200
    folder = write(merged, tmp_path / "merged")
    expect_equal(folder, adapter)
    assert not (folder / "adapter_config.json").exists()
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        ours = AutoModelForCausalLM.from_pretrained(folder)
    assert max(float((a - b).abs().max()) for a, b in zip(logits(ours), logits(base), strict=True)) > 0.1
    assert all(p.read_bytes() == content for p, content in before.items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=["saved-head", "saved-embedding", "lora-head", "lora-embedding"],
)
def test_head_and_embedding_of_an_adapter(tied: bool, config: dict[str, Any], tmp_path: Path) -> None:
    """Saved modules and adapters on head or embedding: where the two are tied, merging must part them, and say so in
    the written configuration; else loading would tie them again."""
    adapter = make_foreign(tmp_path, tied=tied, **config)
    folder = write(merge_folder(adapter, ROWS), tmp_path / "merged")
    expect_equal(folder, adapter)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_tied_head_that_is_not_touched_stays_tied(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, r=4, changes={"tie_word_embeddings": True})
    folder = write(merge_folder(adapter, ROWS), tmp_path / "merged")
    expect_equal(folder, adapter)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_a_reward_model_is_merged_with_its_head(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    from tests.models.small import build_tokenizer

    build_tokenizer().save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path, head="score", r=4)
    folder = write(merge_folder(adapter, ROWS), tmp_path / "merged")
    config = {"num_labels": 1, "pad_token_id": 2}
    with quiet():
        ours = AutoModelForSequenceClassification.from_pretrained(folder, **config)
        bare = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **config)
        theirs = PeftModel.from_pretrained(bare, str(adapter))
    first, second = logits(ours), logits(theirs)
    assert max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True)) <= LIMIT
    assert float(torch.stack(first).std()) > 0


def test_a_wrong_merge_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_adapter(tmp_path, r=4)
    whole = merge.merge_attached

    def spoil(wrapped: Any) -> Any:
        merged = whole(wrapped)
        merged.model.layers[0].self_attn.q_proj.weight.data[0, 0] += 0.01
        return merged

    monkeypatch.setattr(merge, "merge_attached", spoil)
    with pytest.raises(ConfigError, match=r"differ by .* in a logit \(at most 0.0001\)"):
        merge_folder(adapter, ROWS)


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "NaNs detected"), (1e30, "differ by inf in a logit")])
def test_a_merge_that_is_not_finite_is_not_written(value: float, message: str, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, r=4)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for tensor in tensors.values():
        tensor[0, 0] = value if value != value else tensor[0, 0] * value**0.5
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=message):
        merge_folder(adapter, ROWS)


def test_rounding_alone_is_told_from_a_wrong_merge(tmp_path: Path) -> None:
    """fp32 alone is off by more than the limit; in fp64 the written weights are right."""
    adapter = make_adapter(tmp_path, r=4, spread=0.3, changes={"spread": 8.0})
    merged = merge_folder(adapter, ROWS)
    assert merged.dtype == torch.float64 and merged.difference > 0
    assert all(p.dtype == torch.float32 for p in merged.model.parameters())


@pytest.mark.parametrize("head", ["lm", "score"])
def test_the_kl_of_a_quantised_base_is_exact(head: str, tmp_path: Path) -> None:
    """Against the divergence written out, from plain forwards of both models in fp64."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'burnish[quant]'")
    from burnish.models.load import load_model

    adapter = make_adapter(tmp_path, head=head, r=4, quantize="nf4")
    merged = merge_folder(adapter, ROWS)
    groups = GROUPS[:5]
    found = measure_kl(merged, adapter, Quantization("nf4", True), groups)
    assert read_quantization(adapter) == Quantization("nf4", True)
    trained, _ = load_model(
        str(adapter),
        head=head,
        dtype=torch.float32,
        quantization=Quantization("nf4", True),
        attach=True,  # pyright: ignore
    )
    values = []
    for group in groups:
        for c in group.completions:
            ids = torch.tensor([[*group.prompt.tolist(), *c.ids.tolist()]])
            with torch.no_grad():
                p, q = (m.eval()(input_ids=ids).logits[0].double() for m in (merged.model, trained))
            if head == "score":
                values.append((p - q).abs().reshape(1))
                continue
            places = len(group.prompt) - 1 + torch.tensor(c.mask).nonzero()[:, 0]
            a, b = p[places].log_softmax(-1), q[places].log_softmax(-1)
            values.append((a.exp() * (a - b)).sum(-1))
    wanted = torch.cat(values)
    assert found["kl" if head == "lm" else "score_gap"] == pytest.approx(float(wanted.mean()), rel=1e-3, abs=1e-6)
    assert found["rows"] == 5
    if head == "lm":
        assert found["kl_max"] == pytest.approx(float(wanted.max()), rel=1e-3) and found["tokens"] == len(wanted)
        assert found["kl"] > 1e-3
