"""What trains: S2-01, S2-02."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from burnish.config.stages import RewardSettings, SftSettings
from burnish.errors import ConfigError
from burnish.models.export import export_model
from burnish.models.freeze import compute_share, find_blocks, is_tied
from burnish.models.load import build_model, load_model, quiet
from tests.models.small import save_small

TOPS = {
    "llama": r"model\.layers\.[12]\.|model\.norm\.|lm_head\.",
    "gpt2": r"transformer\.h\.[12]\.|transformer\.ln_f\.|transformer\.wte\.",  # tied head
    "gpt_neox": r"gpt_neox\.layers\.[12]\.|gpt_neox\.final_layer_norm\.|lm_head\.|embed_out\.",
    "opt": r"model\.decoder\.layers\.[12]\.|model\.decoder\.final_layer_norm\.|model\.decoder\.embed_tokens\.",
    "bloom": r"transformer\.h\.[12]\.|transformer\.ln_f\.|transformer\.word_embeddings\.",
    "gemma2": r"model\.layers\.[12]\.|model\.norm\.|model\.embed_tokens\.",
    "qwen3_moe": r"model\.layers\.[12]\.|model\.norm\.|lm_head\.",
}


@pytest.mark.parametrize("name", sorted(TOPS))
def test_exactly_the_top_trains(name: str, tmp_path: Path) -> None:
    """S2-01: the last K blocks, the final norm and the head, nothing else."""
    folder = save_small(tmp_path, name)
    built = build_model(SftSettings(top_k=2), str(folder), head="lm", seed=0)
    wanted = {n for n, _ in built.model.named_parameters() if re.match(TOPS[name], n)}
    assert set(built.trainable) == wanted
    assert list(built.trainable) == sorted(built.trainable)
    assert len(find_blocks(built.model)[2]) == 3  # pyright: ignore[reportArgumentType]


def test_zero_is_everything_and_too_many_is_an_error(tmp_path: Path) -> None:
    """S2-01."""
    folder = str(save_small(tmp_path))
    built = build_model(SftSettings(top_k=0), folder, head="lm", seed=0)
    assert built.share == 1.0 and len(built.trainable) == len(list(built.model.parameters()))
    with pytest.raises(ConfigError, match=r"top_k is 4, but the model has 3 layers") as e:
        build_model(SftSettings(top_k=4), folder, head="lm", seed=0)
    assert "1 … 3" in e.value.remedy


def test_reward_model_trains_its_score_head(tmp_path: Path) -> None:
    """S2-01 for a reward model: `score` is the head; the embedding is not tied to it."""
    folder = str(save_small(tmp_path, "qwen3", tie_word_embeddings=True))
    built = build_model(RewardSettings(top_k=1), folder, head="score", seed=0)
    assert "score.weight" in built.trainable and built.head_parameters == {"score.weight"}
    assert "model.embed_tokens.weight" not in built.trainable


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_parameters_keep_their_bits(tied: bool, tmp_path: Path) -> None:
    """S2-02: after training with weight decay, in memory and in the result on disk."""
    folder = save_small(tmp_path / "base", "qwen3", dtype=torch.bfloat16, tie_word_embeddings=tied)
    for compute in (torch.float32, torch.bfloat16):
        built = build_model(SftSettings(top_k=1), str(folder), head="lm", seed=0, compute_dtype=compute)
        before = {n: p.detach().clone() for n, p in built.model.named_parameters()}
        optimizer = torch.optim.AdamW(built.trainable.values(), lr=0.1, weight_decay=0.1)
        for _ in range(3):
            ids = torch.randint(3, 200, (2, 8))
            with torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16):
                loss = built.model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        result = tmp_path / f"final-{compute}".replace("torch.", "")
        result.mkdir()
        export_model(built, result, tokenizer_source=None, head="lm", extra={})
        with quiet():
            saved = dict(AutoModelForCausalLM.from_pretrained(result).named_parameters())
        base = dict(load_model(str(folder), head="lm", dtype=torch.bfloat16)[0].named_parameters())
        for name, parameter in built.model.named_parameters():
            assert torch.equal(parameter, before[name]) == (name not in built.trainable), name
            assert torch.equal(saved[name], base[name]) == (name not in built.trainable), name


def test_tie_is_reported(tmp_path: Path) -> None:
    """S2-02: a tied embedding trains with the head, and the user is told."""
    folder = str(save_small(tmp_path, "qwen3", tie_word_embeddings=True))
    built = build_model(SftSettings(top_k=1), folder, head="lm", seed=0)
    assert "model.embed_tokens.weight" in built.trainable
    assert any("tied to the head and trains too" in n for n in built.notes)


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_untied_embeddings_stay_untied(name: str, tmp_path: Path) -> None:
    """S2-02: untied on request; the embedding stays frozen; saved and loaded as two tensors."""
    folder = save_small(tmp_path / "base", name, tie_word_embeddings=True)
    built = build_model(SftSettings(top_k=1, untie_embeddings=True), str(folder), head="lm", seed=0)
    model = built.model
    assert not is_tied(model)  # pyright: ignore[reportArgumentType]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # pyright: ignore
    assert torch.equal(embedding.weight, head.weight)
    assert not embedding.weight.requires_grad and head.weight.requires_grad
    with torch.no_grad():
        head.weight.mul_(1.5)
    (tmp_path / "final").mkdir()
    export_model(built, tmp_path / "final", tokenizer_source=None, head="lm", extra={})
    ids = torch.randint(3, 200, (2, 8))
    with quiet():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    again = load_model(str(tmp_path / "final"), head="lm", dtype=torch.float32)[0].eval()
    with torch.no_grad():
        wanted = model.eval()(ids).logits
        assert torch.equal(plain(ids).logits, wanted) and torch.equal(again(ids).logits, wanted)
    assert not torch.equal(plain.get_input_embeddings().weight, plain.get_output_embeddings().weight)


def test_share_line(tmp_path: Path) -> None:
    """The line a user reads; a tied parameter counts once."""
    folder = str(save_small(tmp_path, "qwen3", tie_word_embeddings=True))
    built = build_model(SftSettings(top_k=1), folder, head="lm", seed=0)
    total = sum(p.numel() for p in built.model.parameters())
    trained = sum(p.numel() for p in built.trainable.values())
    assert built.notes[-1] == f"trainable: {trained:,} of {total:,} parameters ({100 * trained / total:.1f} %)"
    assert built.share == trained / total == compute_share(built.model).value


def test_no_decay_is_norms_and_biases(tmp_path: Path) -> None:
    built = build_model(SftSettings(), str(save_small(tmp_path, "gpt2")), head="lm", seed=0)
    names = built.no_decay
    assert "transformer.h.0.ln_1.weight" in names and "transformer.h.0.attn.c_attn.bias" in names
    assert "transformer.h.0.attn.c_attn.weight" not in names and "transformer.wte.weight" not in names
