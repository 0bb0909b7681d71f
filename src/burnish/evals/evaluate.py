"""One evaluation: every model is loaded once, all that the tasks need of it is measured, then the figures are made."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from burnish.clock import mono
from burnish.config.stages import EvaluateSettings
from burnish.core.group import Completion, Group
from burnish.data.tokenizer import TextTokenizer
from burnish.errors import ConfigError
from burnish.evals.figures import Figures
from burnish.evals.generate import choose_batch_size, generate_greedy
from burnish.evals.measure import Measured, Numbers, choose_items, measure_logprobs, measure_scores
from burnish.evals.subjects import (
    EvaluationData,
    Loaded,
    Loader,
    Prompt,
    Subject,
    build_loader,
    check_subjects,
    loaded,
)
from burnish.evals.tasks import (
    Answered,
    report_checkable,
    report_loss,
    report_policy_preferences,
    report_reward_preferences,
    report_win_rate,
)
from burnish.models.quantise import read_quantization

log = logging.getLogger("burnish")
PLAIN_TASKS = ("loss", "preferences", "win_rate")


@dataclass
class _Run:
    """What has been measured so far; models are keyed by folder, so that one shared by several subjects runs once."""

    settings: EvaluateSettings
    data: EvaluationData
    load: Loader
    figures: Figures = field(default_factory=Figures)
    texts: dict[Path, Measured] = field(default_factory=dict)
    pairs: dict[Path, Measured] = field(default_factory=dict)
    references: dict[tuple[Path, Path], Measured] = field(default_factory=dict)
    stored: dict[tuple[Path, str], Measured] = field(default_factory=dict)
    scores: dict[Path, Measured] = field(default_factory=dict)
    answers: dict[tuple[Path, str], Answered] = field(default_factory=dict)
    tokenizers: dict[Path, TextTokenizer] = field(default_factory=dict)
    cache: dict[tuple[str, str], Any] = field(default_factory=dict)

    @property
    def sets(self) -> list[str]:
        """The checkable sets among the tasks."""
        return [t for t in self.settings.tasks if t not in PLAIN_TASKS]

    def wants(self, task: str) -> bool:
        return task in self.settings.tasks


def evaluate_subjects(
    subjects: Sequence[Subject],
    settings: EvaluateSettings,
    *,
    data: EvaluationData,
    out_dir: Path,
    judge: Subject | None = None,
    device: torch.device | None = None,
    load: Loader | None = None,
) -> dict[str, Any]:
    """Measure models on held-out data.

    Args:
        subjects: The models, with the comparisons to make.
        settings: Tasks, numbers of items, intervals.
        data: Where the items come from.
        out_dir: figures.json, items.jsonl and samples.jsonl are written there.
        judge: The reward model that scores answers for `win_rate`; default: the only reward model among the subjects.
        device: Where to compute; default: the CPU.
        load: (folder, "lm" | "score") → Loaded, instead of loading from disk (tests).

    Returns:
        {"table": […], "comparisons": […]}, see `Figures`; with "reward_reports" and "notes" where there are any.

    Raises:
        ConfigError: A task lacks its data or its judge, or there is nothing to measure.
        UsageError: Subjects with equal names, or compared with a subject that is not there.
        NumericStop: A model gives a non-finite number.
    """
    check_subjects(subjects)
    run = _Run(settings, data, load or build_loader(settings, device or torch.device("cpu")))
    policies = [s for s in subjects if s.head == "lm"]
    rewards = [s for s in subjects if s.head == "score"]
    judge = _find_judge(run, policies, rewards, judge)
    begun = mono()
    for folder in dict.fromkeys(s.folder for s in policies):
        _measure_policy(run, folder)
    if run.wants("preferences"):
        for subject in policies:
            if subject.reference_folder is not None:
                run.references[subject.folder, subject.reference_folder] = _measure_reference(run, subject)
    judged = _measure_rewards(run, policies, rewards, judge)
    _report(run, policies, rewards, judged)
    run.figures.save(out_dir)
    for note in run.figures.notes:
        log.warning("%s", note)
    log.info("evaluated %d models in %.1f s", len(subjects), mono() - begun)
    return run.figures.to_json()


def _find_judge(
    run: _Run, policies: Sequence[Subject], rewards: Sequence[Subject], judge: Subject | None
) -> Subject | None:
    if not run.wants("win_rate"):
        return None
    if not any(s.compare_to for s in policies):
        run.figures.note("win_rate: no policy has another one to be compared with, so nothing was measured")
        return None
    if judge is None and len(rewards) == 1:
        judge = rewards[0]
    if judge is None:
        raise ConfigError(
            "win_rate needs a reward model that scores the answers",
            where="tasks",
            remedy="add a stage of kind reward and name it in `judge`, or remove win_rate from tasks",
        )
    return judge


def _items(run: _Run, what: str, tokenizer: TextTokenizer) -> Any:
    """Held-out texts or pairs, or the prompts of a set, chosen by the seed; the same for equal tokenizers."""
    key = (what, tokenizer.fingerprint)
    if key not in run.cache:
        source = {"texts": run.data.texts, "pairs": run.data.pairs}.get(what)
        if source is not None:
            found: Sequence[Any] = source(tokenizer)
        elif what not in ("texts", "pairs") and run.data.prompts is not None:
            found = run.data.prompts(what, tokenizer)
        else:
            found = ()
        if not found:
            task = {"texts": "loss", "pairs": "preferences"}.get(what, what)
            raise ConfigError(
                f"task {task} has no held-out items",
                where="tasks",
                remedy="set `data`, or give the training stage held-out data (eval_data, validation_split)",
            )
        run.cache[key] = [found[i] for i in choose_items(len(found), run.settings.max_items, run.settings.seed)]
    return run.cache[key]


def _measure_policy(run: _Run, folder: Path) -> None:
    """All that any task needs of one language model."""
    with loaded(run.load, folder, "lm") as model:
        run.tokenizers[folder] = model.tokenizer
        if run.wants("loss"):
            run.texts[folder] = measure_logprobs(model, _items(run, "texts", model.tokenizer))
        if run.wants("preferences"):
            run.pairs[folder] = measure_logprobs(model, _items(run, "pairs", model.tokenizer))
        for name in run.sets:
            run.answers[folder, name] = _answer(run, model, name, _items(run, name, model.tokenizer))
        if run.wants("win_rate"):
            prompts = build_prompts(_items(run, "pairs", model.tokenizer), model.tokenizer)
            run.answers[folder, "win_rate"] = _answer(run, model, "win_rate", prompts)


def _measure_reference(run: _Run, subject: Subject) -> Measured:
    """What a policy's stage started from, its base stored as the stage stored it."""
    folder = subject.reference_folder
    assert folder is not None
    if (stored := read_quantization(subject.folder)) != read_quantization(folder):
        key = (folder, str(stored))
        if key not in run.stored:
            with loaded(run.load, folder, "lm", like=subject.folder) as model:
                run.stored[key] = measure_logprobs(model, _items(run, "pairs", model.tokenizer))
        return run.stored[key]
    if folder not in run.pairs:
        with loaded(run.load, folder, "lm") as model:
            run.pairs[folder] = measure_logprobs(model, _items(run, "pairs", model.tokenizer))
    return run.pairs[folder]


def _measure_rewards(
    run: _Run, policies: Sequence[Subject], rewards: Sequence[Subject], judge: Subject | None
) -> dict[str, Numbers]:
    """Scores of the held-out pairs by every reward model, and of the answers by the judge, which it returns."""
    judged: dict[str, Numbers] = {}
    scoring = [s.folder for s in rewards] if run.wants("preferences") else []
    folders = [*scoring, judge.folder] if judge is not None else scoring
    for folder in dict.fromkeys(folders):
        with loaded(run.load, folder, "score") as model:
            if folder in scoring:
                run.scores[folder] = measure_scores(model, _items(run, "pairs", model.tokenizer))
            if judge is not None and folder == judge.folder:
                judged = _judge_answers(run, model, policies, judge)
    return judged


def build_prompts(pairs: Sequence[Group], tokenizer: TextTokenizer) -> list[Prompt]:
    """The prompts of pairs, each once; the chosen answer is shown as the reference."""
    found: dict[tuple[int, ...], Prompt] = {}
    for group in pairs:
        ids = tuple(group.prompt.tolist())
        chosen = tokenizer.decode(group.completions[0].ids.tolist(), skip_special_tokens=True).strip()
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        found.setdefault(ids, Prompt(group.id, ids, text, chosen, group.tags.get("source", "")))
    return list(found.values())


def _answer(run: _Run, model: Loaded, task: str, prompts: Sequence[Prompt]) -> Answered:
    """Greedy answers. Prompts that fill the context are left out and counted."""
    room = [p for p in prompts if model.context is None or len(p.ids) < model.context]
    if len(room) < len(prompts):
        run.figures.note(f"{task}: {len(prompts) - len(room)} prompts fill the model's context and were left out")
    ids, limit = [p.ids for p in room], run.settings.max_new_tokens
    with model.policy.unpacked() as plain, model.autocast():
        answers = generate_greedy(
            plain,
            ids,
            eos_ids=model.end_ids,
            max_new_tokens=limit,
            context=model.context,
            batch_size=run.settings.batch_size or choose_batch_size(plain, ids, limit),
        )
    texts = [model.tokenizer.decode(a.body, skip_special_tokens=True).strip() for a in answers]
    return Answered(room, answers, texts)


def _judge_answers(run: _Run, model: Loaded, policies: Sequence[Subject], judge: Subject) -> dict[str, Numbers]:
    """Subject → the judge's score of each of its answers: of the generated ids themselves, ended or cut off."""
    out: dict[Path, Numbers] = {}
    for folder in dict.fromkeys(s.folder for s in policies):
        found = run.answers[folder, "win_rate"]
        groups = []
        for prompt, answer in zip(found.prompts, found.answers, strict=True):
            ids = np.asarray(answer.ids, np.int32)
            completion = Completion(ids, np.ones(len(ids), bool))
            groups.append(Group(prompt.id, np.asarray(prompt.ids, np.int32), (completion,)))
        _check_tokens(judge, model.tokenizer, folder, run.tokenizers[folder], groups)
        out[folder] = measure_scores(model, groups).values[:, 0]
    return {s.name: out[s.folder] for s in policies}


def _check_tokens(
    judge: Subject, judging: TextTokenizer, folder: Path, answering: TextTokenizer, groups: Sequence[Group]
) -> None:
    """The judge reads ids, so every id that occurs must mean the same token to both."""
    if judging.fingerprint == answering.fingerprint:
        return
    used = {i for g in groups for part in (g.prompt, g.completions[0].ids) for i in part.tolist()}
    if any(judging.backend.id_to_token(i) != answering.backend.id_to_token(i) for i in used):
        raise ConfigError(
            f"the judge {judge.name} has another tokenizer than {folder}",
            where="judge",
            remedy="use a reward model that was trained from the same base model",
        )


def _report(run: _Run, policies: Sequence[Subject], rewards: Sequence[Subject], judged: dict[str, Numbers]) -> None:
    figures, settings = run.figures, run.settings
    if run.wants("loss") and policies:
        report_loss(figures, settings, policies, {s.name: run.texts[s.folder] for s in policies})
    if run.wants("preferences"):
        references = {
            s.name: run.references[s.folder, s.reference_folder] for s in policies if s.reference_folder is not None
        }
        found = {s.name: run.pairs[s.folder] for s in policies}
        report_policy_preferences(figures, settings, policies, found, references)
        report_reward_preferences(figures, settings, rewards, {s.name: run.scores[s.folder] for s in rewards})
    for name in run.sets:
        report_checkable(figures, settings, name, policies, {s.name: run.answers[s.folder, name] for s in policies})
    if judged:
        answers = {s.name: run.answers[s.folder, "win_rate"] for s in policies}
        report_win_rate(figures, settings, policies, answers, judged)
