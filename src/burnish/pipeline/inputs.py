"""What a stage's result depends on beside its settings, as named fingerprints; without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from burnish import __version__
from burnish.artifacts.environment import find_version
from burnish.artifacts.folder import load_manifest
from burnish.config.losses import find_source, get_loss_names
from burnish.config.registry import find_method_spec, find_spec
from burnish.config.stages import DpoSettings, EvaluateSettings, SftSettings
from burnish.config.train import TrainSettings
from burnish.data.prompts import load_prompts
from burnish.data.template import load_template
from burnish.data.tokenizer import TextTokenizer
from burnish.errors import ConfigError
from burnish.models.folder import is_reward_model, read_context
from burnish.pipeline.summaries import DataSummaries

PLAIN_TASKS = ("loss", "preferences", "win_rate")


@dataclass
class StageResult:
    """A finished stage, as later stages see it.

    Attributes:
        folder: Its `final/`.
        rerun: It was made or continued by this command.
        inputs: Fingerprints of what it was made from.
    """

    name: str
    kind: str
    folder: Path
    settings: Any
    rerun: bool
    inputs: Mapping[str, str] = field(default_factory=dict)


def find_code() -> dict[str, str]:
    """Versions of the code that decides numbers. Not part of a stage's key: a finished stage stays finished."""
    found = {name: find_version(name) for name in ("torch", "transformers", "peft")}
    return {"burnish": __version__} | {name: number for name, number in found.items() if number is not None}


def fingerprint_result(final: Path) -> str:
    """Fingerprint of a sealed `final/`: the hashes of its manifest."""
    manifest = load_manifest(final)
    rows = "\n".join(f"{name} {entry.sha256}" for name, entry in sorted(manifest.files.items()))
    return hashlib.sha256(rows.encode()).hexdigest()


def fingerprint_inputs(
    settings: TrainSettings,
    folder: Path,
    tokenizer: TextTokenizer,
    data: str,
    fingerprint: Callable[[Path], str],
    reference: Path | None = None,
    reward_model: Path | None = None,
    starts: Mapping[str, Path] | None = None,
) -> dict[str, str]:
    """Fingerprints of a training stage's inputs: model, tokenizer, chat template, data, other models, own loss functions.

    Args:
        folder: The model's folder.
        data: Fingerprint of the prepared data.
        fingerprint: Fingerprint of a model folder.
        reference: Folder of another reference model than the policy itself.
        reward_model: Folder of the reward model that weighs the pairs.
        starts: Model → folder that it starts from, where that is not the stage's own.
    """
    template = load_template(settings.chat_template, tokenizer, settings.chat_template_kwargs)
    found = {
        "model": fingerprint(folder),
        "tokenizer": _hash([tokenizer.backend.to_str(), tokenizer.special_tokens, sorted(tokenizer.eos_ids)]),
        "chat_template": template.fingerprint,
        "data": data,
    }
    if reference is not None:
        found["reference"] = fingerprint(reference)
    if reward_model is not None:
        found["reward_model"] = fingerprint(reward_model)
    found |= {f"model {name}": fingerprint(place) for name, place in (starts or {}).items()}
    for name in [settings.kind, *get_loss_names(getattr(settings, "loss_type", []))]:
        module, colon, _ = name.partition(":")
        source = find_source(module) if colon else None
        if source is not None:
            found[name] = hashlib.sha256(source.read_bytes()).hexdigest()
    return found


def check_reward_model(folder: Path, tokenizer: TextTokenizer, longest: tuple[int, str]) -> None:
    """The reward model reads the very token ids that the policy reads.

    Args:
        folder: The reward model's.
        tokenizer: The policy's.
        longest: Tokens of the stage's longest pair, and its name.

    Raises:
        ConfigError: It has no trained score head, calls a token by another id, or takes fewer tokens than a pair has.
    """
    if not is_reward_model(folder):
        raise ConfigError(
            "this is a language model without a trained score head; a reward model is needed here",
            where="reward_model",
            found=str(folder),
            remedy="name an earlier stage of kind reward, or the folder of a reward model",
        )
    theirs = TextTokenizer.load(str(folder)).backend.get_vocab(with_added_tokens=True)
    for token, i in sorted(tokenizer.backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]):
        if theirs.get(token) != i:
            raise ConfigError(
                f"the reward model has another tokenizer: token {token!r} is {i} here and {theirs.get(token)} there",
                where="reward_model",
                found=str(folder),
                remedy="use a reward model that was trained from the same base model, e.g. by a stage of kind reward",
            )
    context = read_context(folder)
    tokens, name = longest
    if context is not None and tokens > context:
        raise ConfigError(
            f"the reward model takes {context} tokens at most, but {name} has {tokens}",
            where="reward_model",
            found=str(folder),
            remedy=f"set max_length: {context}",
        )


def choose_held_out(
    settings: EvaluateSettings, results: Mapping[str, StageResult]
) -> tuple[TrainSettings | None, TrainSettings | None]:
    """(stage whose held-out texts are measured, stage whose held-out pairs are).

    Where `data` is set: two that read it; without a test split of its own all of it is held out.
    """
    if settings.data is not None:
        shared = {"max_length": settings.max_length, "chat_template": settings.chat_template, "seed": settings.seed}
        return SftSettings(data=settings.data, **shared), DpoSettings(data=settings.data, **shared)
    trained: list[TrainSettings] = [r.settings for r in results.values() if find_spec(r.kind).trains]
    text_stage = next((s for s in trained if find_method_spec(s.kind).rows == "completion"), None)
    return text_stage, next((s for s in reversed(trained) if find_method_spec(s.kind).rows == "pair"), None)


def fingerprint_evaluation(
    settings: EvaluateSettings,
    results: Mapping[str, StageResult],
    base: Path | None,
    fingerprint: Callable[[Path], str],
    summaries: DataSummaries | None = None,
) -> dict[str, str]:
    """Fingerprints of an evaluation's inputs: the results before it, the base, and the items that it measures on.

    Args:
        summaries: Of data that are known already.
    """
    summaries = summaries or DataSummaries()
    trained = {n: r for n, r in results.items() if find_spec(r.kind).trains}
    found = {n: fingerprint_result(r.folder) for n, r in trained.items()}
    if base is not None:
        found["base model"] = fingerprint(base)
    if settings.data is None:
        found |= {f"data of {n}": r.inputs["data"] for n, r in trained.items() if "data" in r.inputs}
    reader = base or next((r.folder for r in trained.values()), None)
    if reader is None:
        return found
    tokenizer, context = TextTokenizer.load(str(reader)), read_context(reader)
    if settings.data is not None:
        wanted = {"loss": 0, "preferences": 1, "win_rate": 1}
        stages = choose_held_out(settings, results)
        for place in sorted({wanted[t] for t in settings.tasks if t in wanted}):
            stage = stages[place]
            assert stage is not None
            found[f"data of {stage.kind}"] = summaries.find(stage, tokenizer, context=context).fingerprint
    for task in (t for t in settings.tasks if t not in PLAIN_TASKS):
        rows = load_prompts(task, tokenizer, chat_template=settings.chat_template)
        found[task] = _hash([[r.id, r.prompt_ids, r.answer, r.reference] for r in rows])
    return found


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()
