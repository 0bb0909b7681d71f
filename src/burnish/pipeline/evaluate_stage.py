"""One evaluation stage: which models, on which held-out data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.config.registry import find_method_spec, find_spec
from burnish.config.stages import EvaluateSettings
from burnish.config.train import TrainSettings
from burnish.core.group import Group
from burnish.data.prepare import prepare_data
from burnish.data.prompts import load_prompts
from burnish.data.tokenizer import TextTokenizer
from burnish.errors import ConfigError
from burnish.evals.evaluate import evaluate_subjects
from burnish.evals.subjects import EvaluationData, Prompt, Subject
from burnish.models.folder import read_context
from burnish.models.load import fetch_model_folder, resolve_model_path
from burnish.pipeline.inputs import StageResult, choose_held_out
from burnish.report.terminal import render_table

if TYPE_CHECKING:
    from burnish.pipeline.run import RunState

log = logging.getLogger("burnish")

BASE = "base"


def run_evaluate_stage(settings: EvaluateSettings, state: RunState, stage_dir: Path) -> dict[str, Any]:
    """Measure the recipe's models; returns what goes into stage.json. Rank 0 works, the others wait."""
    figures: dict[str, Any] | None = None
    if state.runtime.is_main:
        subjects = build_subjects(settings, state)
        log.info("evaluating %s", ", ".join(s.name for s in subjects))
        judge = next((s for s in subjects if s.name == settings.judge), None)
        figures = evaluate_subjects(
            subjects,
            settings,
            data=build_data(settings, state),
            out_dir=stage_dir,
            judge=judge,
            device=state.runtime.device,
        )
        for line in render_table(figures).splitlines():
            log.info("%s", line)
    return {"figures": state.runtime.gather(figures)[0]}


def build_subjects(settings: EvaluateSettings, state: RunState) -> list[Subject]:
    """The models that `of` names; by default the base and the result of every training stage."""
    trained = {n: r for n, r in state.results.items() if find_spec(r.kind).trains}
    names = list(settings.of) or [BASE, *trained]
    if settings.judge is not None and settings.judge not in names:
        names.append(settings.judge)
    unknown = [n for n in names if n != BASE and n not in trained]
    if unknown:
        raise ConfigError(
            f"of: no stage {unknown[0]!r} has run before this one",
            where=f"stages.{settings.name}.of",
            remedy=f"choose from {', '.join([BASE, *trained])}",
        )
    base = find_base(settings, state)
    subjects = []
    for name in names:
        if name == BASE:
            if base is not None:
                subjects.append(Subject(BASE, base))
            continue
        subjects.append(_build_subject(name, trained[name], names, base, state))
    return subjects


def _build_subject(name: str, result: StageResult, names: Sequence[str], base: Path | None, state: RunState) -> Subject:
    if find_method_spec(result.kind).result.head == "score":
        return Subject(name, result.folder, head="score")
    start = result.settings.init_from
    before = start if start is not None else BASE
    reference = state.results[start].folder if start is not None else _own_base(result.settings, base)
    return Subject(name, result.folder, compare_to=before if before in names else None, reference_folder=reference)


def _own_base(settings: TrainSettings, base: Path | None) -> Path | None:
    return fetch_model_folder(resolve_model_path(settings.model)) if settings.model else base


def find_base(settings: EvaluateSettings, state: RunState) -> Path | None:
    """The model before all stages: the evaluation's own, the recipe's, or that of the first stage that names one."""
    firsts = [r.settings.model for r in state.results.values() if getattr(r.settings, "init_from", None) is None]
    name = settings.model or state.recipe.model or next((m for m in firsts if m), None)
    return fetch_model_folder(resolve_model_path(name)) if name else None


def build_data(settings: EvaluateSettings, state: RunState) -> EvaluationData:
    """Held-out data of the recipe's own stages, unless `data` names a source."""
    text_stage, pair_stage = choose_held_out(settings, state.results)
    base = find_base(settings, state)
    context = read_context(base) if base is not None else None

    def held_out(stage: TrainSettings | None, tokenizer: TextTokenizer) -> list[Group]:
        if stage is None:
            return []
        found = prepare_data(stage, tokenizer, context=context)
        return found.held_out if found.held_out or settings.data is None else found.train

    def prompts(name: str, tokenizer: TextTokenizer) -> list[Prompt]:
        rows = load_prompts(name, tokenizer, chat_template=settings.chat_template)
        return [Prompt(r.id, r.prompt_ids, r.text, r.answer, r.source) for r in rows]

    return EvaluationData(
        texts=lambda tokenizer: held_out(text_stage, tokenizer),
        pairs=lambda tokenizer: held_out(pair_stage, tokenizer),
        prompts=prompts,
    )
