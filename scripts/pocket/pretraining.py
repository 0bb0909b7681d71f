"""Pretraining of the base models on the packed plain text."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from pocket.tokenizing import END_OF_TEXT, MAX_LENGTH, PAD, TURN_END

ROW_LENGTH = 256


@dataclass(frozen=True)
class Recipe:
    """The shape of a base model and how it is trained."""

    name: str
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    steps: int
    batch: int = 8
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.05
    seed: int = 31

    def config(self, tokenizer: Tokenizer) -> Qwen3Config:
        """The configuration of the model."""
        return Qwen3Config(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            head_dim=32,
            max_position_embeddings=MAX_LENGTH,
            initializer_range=0.04,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            bos_token_id=tokenizer.token_to_id(END_OF_TEXT),
            eos_token_id=tokenizer.token_to_id(TURN_END),
            pad_token_id=tokenizer.token_to_id(PAD),
        )


RECIPES = (
    Recipe("pocket", hidden=160, layers=4, heads=6, key_value_heads=2, intermediate=448, steps=2200),
    Recipe("pocket-small", hidden=112, layers=3, heads=4, key_value_heads=2, intermediate=320, steps=2200),
)


def pack(documents: list[str], tokenizer: Tokenizer) -> torch.Tensor:
    """The documents as one stream, cut into rows; every document ends in the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    stream = [end]
    for encoding in tokenizer.encode_batch(documents):
        stream += [*encoding.ids, end]
    rows = len(stream) // ROW_LENGTH
    return torch.tensor(stream[: rows * ROW_LENGTH]).view(rows, ROW_LENGTH)


def batches(rows: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Batches of rows, shuffled anew every epoch."""
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - recipe.batch + 1, recipe.batch):
            yield rows[order[start : start + recipe.batch]]


def rate(recipe: Recipe, step: int) -> float:
    """The learning rate at `step`: a linear warm-up, then a cosine down to nothing."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, the rest without."""
    parameters = list(model.parameters())
    return [
        {"params": [each for each in parameters if each.ndim > 1], "weight_decay": weight_decay},
        {"params": [each for each in parameters if each.ndim < 2], "weight_decay": 0.0},
    ]


def loss_of(model: Qwen3ForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """The mean loss of the next token."""
    logits = model(input_ids=batch).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def set_unseen_embeddings(model: Qwen3ForCausalLM, rows: torch.Tensor, seed: int) -> int:
    """Put the tokens that were never seen (the chat tokens) near the middle of the seen ones; say how many they are."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    seen = torch.zeros(len(weight), dtype=torch.bool)
    seen[rows.unique()] = True
    middle, spread = weight[seen].mean(0), weight[seen].std(0)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    weight[~seen] = middle + 0.3 * spread * noise[~seen]
    return int((~seen).sum())


def pretrain(recipe: Recipe, tokenizer: Tokenizer, rows: torch.Tensor, folder: Path) -> dict[str, Any]:
    """Train one base model, write it to `folder` and say how it went."""
    torch.manual_seed(recipe.seed)
    held_out, rows = rows[:64], rows[64:]
    model = Qwen3ForCausalLM(recipe.config(tokenizer))
    groups = parameter_groups(model, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    source = batches(rows, recipe)
    began, recent = time.perf_counter(), []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(recipe, step)
        loss = loss_of(model, next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent = [*recent[-49:], float(loss.detach())]
        if (step + 1) % 100 == 0:
            print(f"{recipe.name} {step + 1}/{recipe.steps} loss {sum(recent) / len(recent):.4f}", flush=True)
    seconds = time.perf_counter() - began
    model.eval()
    with torch.no_grad():
        held_out_loss = float(loss_of(model, held_out))
    unseen = set_unseen_embeddings(model, rows, recipe.seed)
    save_model(model, tokenizer, folder)
    return {
        **asdict(recipe),
        "parameters": sum(each.numel() for each in model.parameters()),
        "tokens_trained": recipe.steps * recipe.batch * ROW_LENGTH,
        "seconds": round(seconds, 1),
        "train_loss": round(sum(recent) / len(recent), 4),
        "held_out_loss": round(held_out_loss, 4),
        "tokens_never_seen": unseen,
    }


def save_model(model: Qwen3ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the weights in bfloat16 and the two configurations."""
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text,
        eos_token_id=[tokenizer.token_to_id(TURN_END), end_of_text],
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    model.bfloat16().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
