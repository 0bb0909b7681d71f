"""The workload of the training-step benchmark: rows, tokenizer and model, written once and read by every worker.

Both sides get the same token ids. The rows are raw HH dialogues (`chosen` and `rejected` texts that share their
prompt); a row is used only if tokenising prompt and answer apart gives the same ids as tokenising them together, so
that a trainer which takes text and one which takes ids see the same numbers.
"""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SETTINGS = ("full", "lora", "top_k", "padded")
TOP_K = 2
LORA_RANK, LORA_ALPHA = 16, 32
EOS, PAD = "<|endoftext|>", "<|pad|>"
TAG = "\n\nAssistant:"


@dataclass(frozen=True, slots=True)
class Pair:
    """One row: texts without the end-of-sequence token, ids of both answers with it."""

    id: str
    prompt: str
    chosen: str
    rejected: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def is_good(self) -> bool:
        """The label of the row where a method takes single answers: every other one is the chosen answer."""
        return int(self.id.rpartition(":")[2]) % 2 == 0

    @property
    def answer(self) -> str:
        """The answer that carries this label."""
        return self.chosen if self.is_good else self.rejected

    @property
    def answer_ids(self) -> list[int]:
        """Its token ids."""
        return self.chosen_ids if self.is_good else self.rejected_ids

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longer answer."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass(frozen=True, slots=True)
class Shape:
    """The model: a random Qwen3 of this size; `tied`: head and input embedding are one matrix."""

    layers: int = 8
    hidden: int = 512
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    intermediate: int = 1536
    vocabulary: int = 32_768
    tied: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """What a worker is to do; everything that both sides share.

    Attributes:
        method: "dpo", "kto", "orpo", "reward" or "sft".
        batch_size: Rows of one optimizer step.
        warmup_steps: Steps at the start that are not timed.
        rows: Which rows: "any" (a seeded sample of the file), or the extremes that the curve looks at: "short_prompts",
            "long_prompts" (share of the prompt in the row), "even", "uneven" (spread of the lengths within a batch).
        micro_batch_tokens: burnish's token budget; None: its default.
        learning_rate: Peak of the linear schedule (no warm-up).
        setting: What trains and how: "full"; "lora" (rank 16, alpha 32, the attention projections); "top_k" (the last two
            blocks, the final norm and the head, which is not tied to the embedding); "padded" (full, burnish's rectangular
            backend).
        precision: "bf16" (autocast over fp32 weights) or "fp32".
        device: "cpu" or "cuda".
    """

    method: str
    batch_size: int = 8
    warmup_steps: int = 2
    rows: str = "any"
    learning_rate: float = 1e-5
    beta: float = 0.1
    setting: str = "full"
    max_grad_norm: float = 1.0
    precision: str = "bf16"
    seed: int = 0
    micro_batch_tokens: int | None = None
    device: str = "cpu"
    shape: Shape = Shape()


def find_data(given: str | None) -> Path:
    """The HH rows: `given`, else BURNISH_SHARED/data, else ../shared/data beside the repository."""
    name = "hh-harmless.jsonl.gz"
    places = [Path(given)] if given else []
    if not given and "BURNISH_SHARED" in os.environ:
        places.append(Path(os.environ["BURNISH_SHARED"]) / "data" / name)
    if not given:
        places.append(Path(__file__).resolve().parents[2] / "shared" / "data" / name)
    for place in places:
        if place.exists():
            return place
    raise SystemExit(
        f"no HH rows at {', '.join(map(str, places))}; give --data FILE (chosen/rejected, .jsonl or .jsonl.gz)"
    )


def _read_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path.name}:{number}", json.loads(line)


def split_dialogue(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    """(prompt, chosen answer, rejected answer), split at the last assistant tag; None if the row does not fit."""
    cut = chosen.rfind(TAG)
    if cut < 0:
        return None
    prompt = chosen[: cut + len(TAG)]
    if not rejected.startswith(prompt):
        return None
    good, bad = chosen[len(prompt) :], rejected[len(prompt) :]
    return (prompt, good, bad) if good.strip() and bad.strip() and good != bad else None


def build_tokenizer(texts: Sequence[str], vocabulary: int):
    """A byte-pair tokenizer trained on `texts`; it may end up with fewer than `vocabulary` entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS, pad_token=PAD, model_max_length=10**6)


def choose_pairs(pairs: list[Pair], plan: Plan, count: int) -> list[Pair]:
    """`count` of the shuffled `pairs`, by `plan.rows`."""
    if plan.rows == "any":
        return pairs[:count]
    if plan.rows in ("short_prompts", "long_prompts"):
        share = {p.id: len(p.prompt_ids) / p.longest for p in pairs}
        ordered = sorted(pairs, key=lambda p: share[p.id], reverse=plan.rows == "long_prompts")
        return ordered[:count]
    ordered = sorted(pairs, key=lambda p: p.longest)
    if plan.rows == "even":
        start = (len(ordered) - count) // 2
        return ordered[start : start + count]
    if plan.rows == "uneven":  # as many tokens as a middle row on average, from the two ends
        return [ordered[i // 2] if i % 2 else ordered[-1 - i // 2] for i in range(count)]
    raise ValueError(f"rows is {plan.rows!r}")


def build_pairs(path: Path, tokenizer, plan: Plan, count: int, max_length: int) -> tuple[list[Pair], dict[str, int]]:
    """`count` pairs chosen over the whole file, and how many rows were left out for which reason."""
    eos = tokenizer.eos_token_id
    left_out = {"not a pair": 0, "tokens merge over the border": 0, "too long": 0}
    pairs = []
    for name, row in _read_rows(path):
        parts = split_dialogue(row["chosen"], row["rejected"])
        if parts is None:
            left_out["not a pair"] += 1
            continue
        prompt, good, bad = parts
        ids = [tokenizer(text)["input_ids"] for text in parts]
        joint = [tokenizer(prompt + text)["input_ids"] for text in (good, bad)]
        if joint != [ids[0] + ids[1], ids[0] + ids[2]]:
            left_out["tokens merge over the border"] += 1
            continue
        pair = Pair(name, prompt, good, bad, ids[0], [*ids[1], eos], [*ids[2], eos])
        if pair.longest > max_length:
            left_out["too long"] += 1
            continue
        pairs.append(pair)
    random.Random(plan.seed).shuffle(pairs)
    if len(pairs) < count:
        raise SystemExit(f"{path} yields {len(pairs)} usable rows, {count} were asked for")
    return choose_pairs(pairs, plan, count), left_out


def build_config(shape: Shape, tokenizer, max_length: int):
    """The configuration of the random Qwen3."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=max(2048, max_length),
        tie_word_embeddings=shape.tied,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def save_workload(folder: Path, plan: Plan, data: Path, rows: int, max_length: int) -> dict[str, object]:
    """Write tokenizer, model, rows and plan below `folder`; what a reader of the figures should know comes back."""
    import torch
    from transformers import Qwen3ForCausalLM, Qwen3ForSequenceClassification

    texts = [row[key] for _, row in _read_rows(data) for key in ("chosen", "rejected")]
    tokenizer = build_tokenizer(texts, plan.shape.vocabulary)
    pairs, left_out = build_pairs(data, tokenizer, plan, rows, max_length)
    config = build_config(plan.shape, tokenizer, max_length)
    torch.manual_seed(plan.seed)
    if plan.method == "reward":
        config.num_labels = 1
        model = Qwen3ForSequenceClassification(config)
    else:
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "rows.json").write_text(json.dumps([asdict(pair) for pair in pairs]), encoding="utf-8")
    (folder / "plan.json").write_text(json.dumps(asdict(plan)), encoding="utf-8")
    return {"rows": rows, "tokenizer_entries": len(tokenizer), "left_out": left_out, **describe(pairs)}


def describe(pairs: Sequence[Pair]) -> dict[str, float]:
    """Token figures of the rows."""
    prompt = sum(len(p.prompt_ids) for p in pairs)
    answers = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    return {
        "mean_prompt_tokens": round(prompt / len(pairs), 1),
        "mean_answer_tokens": round(answers / (2 * len(pairs)), 1),
        "longest_tokens": max(p.longest for p in pairs),
    }


def load_workload(folder: Path) -> tuple[Plan, list[Pair]]:
    """What `save_workload` wrote, without the model."""
    stored = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    plan = Plan(**{**stored, "shape": Shape(**stored["shape"])})
    return plan, [Pair(**row) for row in json.loads((folder / "rows.json").read_text(encoding="utf-8"))]
