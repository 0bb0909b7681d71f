"""The tasks: from the numbers of single items to figures with intervals and paired comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from burnish.config.stages import EvaluateSettings
from burnish.evals.answers import FinalNumber, parse_final_number
from burnish.evals.figures import Figures, align, to_plain
from burnish.evals.generate import Answer
from burnish.evals.intervals import (
    Comparison,
    compare_marks,
    compute_mean,
    compute_ratio,
    compute_sign_flip,
    compute_sign_test,
    compute_wilson,
)
from burnish.evals.measure import Measured, Numbers
from burnish.evals.reward_report import compute_reward_report
from burnish.evals.subjects import Prompt, Subject


@dataclass(frozen=True)
class Answered:
    """The answers of one subject to some prompts."""

    prompts: Sequence[Prompt]
    answers: Sequence[Answer]
    texts: Sequence[str]

    @property
    def ids(self) -> list[str]:
        """Names of the prompts."""
        return [p.id for p in self.prompts]


def report_loss(
    figures: Figures, settings: EvaluateSettings, subjects: Sequence[Subject], found: Mapping[str, Measured]
) -> None:
    """Held-out loss: nats a token over all scored tokens, as in training."""
    for subject in subjects:
        m = found[subject.name]
        nll, tokens = -m.values[:, 0], m.tokens[:, 0]
        figures.add(
            subject.name, "loss", "loss", compute_ratio(nll, tokens, settings.confidence), higher_is_better=False
        )
        for i, name in enumerate(m.ids):
            _item(figures, "loss", subject, name, source=m.sources[i], nll=nll[i], tokens=tokens[i])
    for subject, other in _pairs_of(subjects):
        a, b = found[subject.name], found[other.name]
        left, right = align(a.ids, b.ids)
        if not left or not np.array_equal(a.tokens[left], b.tokens[right]):
            figures.note(
                f"loss: {subject.name} and {other.name} have different tokenizers; nats a token do not compare"
            )
            continue
        difference = b.values[right, 0] - a.values[left, 0]
        compared = compute_sign_flip(difference, a.tokens[left, 0], confidence=settings.confidence, seed=settings.seed)
        figures.compare("loss", "loss", other.name, subject.name, compared)


def report_policy_preferences(
    figures: Figures,
    settings: EvaluateSettings,
    subjects: Sequence[Subject],
    found: Mapping[str, Measured],
    references: Mapping[str, Measured],
) -> None:
    """Preference accuracy of policies on held-out pairs.

    ranking_accuracy: share of pairs whose chosen answer has the higher Σ log π. It needs no reference, so all policies
    compare. accuracy and margin: the same less the reference's sums (differences of the implicit reward, in nats), each
    policy against the model that its stage started from. vs_<root>/accuracy: the implicit reward against the one model
    that nothing was trained for, so that policies of different stages compare.
    """
    ranks: dict[str, Numbers] = {}
    root = next((s for s in subjects if s.compare_to is None and s.reference_folder is None), None)
    against: dict[str, Numbers] = {}
    for subject in subjects:
        m = found[subject.name]
        marks = ranks[subject.name] = _mark(m.values[:, 0] - m.values[:, 1])
        _add_share(figures, settings, subject, "preferences", "ranking_accuracy", marks)
        reference = references.get(subject.name)
        margin = None
        if reference is not None:
            margin = (m.values[:, 0] - reference.values[:, 0]) - (m.values[:, 1] - reference.values[:, 1])
            _add_share(figures, settings, subject, "preferences", "accuracy", _mark(margin))
            figures.add(subject.name, "preferences", "margin", compute_mean(margin, settings.confidence))
        if root is not None and subject is not root and found[root.name].ids == m.ids:
            gap = (m.values - found[root.name].values)[:, :2]
            against[subject.name] = _mark(gap[:, 0] - gap[:, 1])
            _add_share(figures, settings, subject, "preferences", f"vs_{root.name}/accuracy", against[subject.name])
        for i, name in enumerate(m.ids):
            row = {"source": m.sources[i], "chosen": m.values[i, 0], "rejected": m.values[i, 1]}
            row |= {"margin": margin[i]} if margin is not None else {}
            _item(figures, "preferences", subject, name, **row)
    ids = {name: m.ids for name, m in found.items()}
    for pair in _pairs_of(subjects):
        _compare_marks(figures, settings, "preferences", "ranking_accuracy", pair, ids, ranks)
        if root is not None:
            _compare_marks(figures, settings, "preferences", f"vs_{root.name}/accuracy", pair, ids, against)


def report_reward_preferences(
    figures: Figures, settings: EvaluateSettings, subjects: Sequence[Subject], found: Mapping[str, Measured]
) -> None:
    """Accuracy and margin of reward models on held-out pairs, with a full report for each."""
    marks: dict[str, Numbers] = {}
    for subject in subjects:
        m = found[subject.name]
        difference = m.values[:, 0] - m.values[:, 1]
        marks[subject.name] = _mark(difference)
        _add_share(figures, settings, subject, "preferences", "accuracy", marks[subject.name])
        figures.add(subject.name, "preferences", "margin", compute_mean(difference, settings.confidence))
        figures.reports[subject.name] = compute_reward_report(
            m.values[:, 0],
            m.values[:, 1],
            chosen_tokens=m.tokens[:, 0],
            rejected_tokens=m.tokens[:, 1],
            sources=m.sources,
            confidence=settings.confidence,
        )
        for i, name in enumerate(m.ids):
            row = {"source": m.sources[i], "chosen": m.values[i, 0], "rejected": m.values[i, 1]}
            _item(figures, "preferences", subject, name, **row)
    ids = {name: m.ids for name, m in found.items()}
    for pair in _pairs_of(subjects):
        _compare_marks(figures, settings, "preferences", "accuracy", pair, ids, marks)


def report_checkable(
    figures: Figures,
    settings: EvaluateSettings,
    task: str,
    subjects: Sequence[Subject],
    found: Mapping[str, Answered],
) -> None:
    """Answers with a final number, compared exactly; items whose gold has none are left out and counted."""
    marks: dict[str, Numbers] = {}
    kept: dict[str, Answered] = {}
    for subject in subjects:
        run, gold = _drop_broken(figures, task, found[subject.name])
        if not run.answers:
            figures.note(f"{task}: no item has a final number in its reference, so nothing was measured")
            return
        read = [parse_final_number(text) for text in run.texts]
        right = np.array([float(r.value == g.value) for r, g in zip(read, gold, strict=True)])
        kept[subject.name], marks[subject.name] = run, right
        answered = np.array([float(r.value is not None) for r in read])
        ended = np.array([float(a.end == "eos") for a in run.answers])
        for metric, values in (("accuracy", right), ("answered_share", answered), ("ended_share", ended)):
            _add_share(figures, settings, subject, task, metric, values)
        for i, prompt in enumerate(run.prompts):
            row = {"source": prompt.source, "mark": bool(right[i]), "tokens": len(run.answers[i].ids)}
            row |= {"end": run.answers[i].end, "reason": read[i].reason, "answer": run.texts[i]}
            _item(figures, task, subject, prompt.id, **row)
    ids = {name: run.ids for name, run in kept.items()}
    for pair in _pairs_of(subjects):
        _compare_marks(figures, settings, task, "accuracy", pair, ids, marks)
    add_samples(figures, settings, task, subjects, kept, marks)


def report_win_rate(
    figures: Figures,
    settings: EvaluateSettings,
    subjects: Sequence[Subject],
    found: Mapping[str, Answered],
    scores: Mapping[str, Numbers],
) -> None:
    """Answers of each subject against those of its comparison, by the judge's score; a tie counts one half.

    scores: subject → (n,) the judge's score of each answer.
    """
    for subject in subjects:
        figures.add(subject.name, "win_rate", "judge_score", compute_mean(scores[subject.name], settings.confidence))
        for i, prompt in enumerate(found[subject.name].prompts):
            answer = found[subject.name].answers[i]
            row = {"source": prompt.source, "score": scores[subject.name][i], "tokens": len(answer.ids)}
            _item(figures, "win_rate", subject, prompt.id, **row, end=answer.end, answer=found[subject.name].texts[i])
    for subject, other in _pairs_of(subjects):
        left, right = align(found[subject.name].ids, found[other.name].ids)
        if not left:
            continue
        difference = scores[subject.name][left] - scores[other.name][right]
        wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
        against = f"vs_{other.name}/win_rate"
        rate = compute_wilson(wins + (len(left) - wins - losses) / 2, len(left), settings.confidence)
        figures.add(subject.name, "win_rate", against, rate)
        p_value = compute_sign_test(wins, losses)
        tested = Comparison(rate.value - 0.5, rate.low - 0.5, rate.high - 0.5, p_value, "sign", len(left))
        figures.compare("win_rate", against, other.name, subject.name, tested)
        gap = compute_sign_flip(difference, confidence=settings.confidence, seed=settings.seed)
        figures.compare("win_rate", "judge_score", other.name, subject.name, gap)
    add_samples(figures, settings, "win_rate", subjects, found, {})


def add_samples(
    figures: Figures,
    settings: EvaluateSettings,
    task: str,
    subjects: Sequence[Subject],
    found: Mapping[str, Answered],
    marks: Mapping[str, Numbers],
) -> None:
    """A seeded choice of items with the answers of all subjects side by side; chosen before anything was answered."""
    names = [s.name for s in subjects if s.name in found]
    if not names:
        return
    first = found[names[0]]
    where = {name: {p: i for i, p in enumerate(found[name].ids)} for name in names}
    common = [p for p in first.prompts if all(p.id in where[name] for name in names)]
    order = np.random.default_rng([settings.seed, len(common), 1]).permutation(len(common))[: settings.samples]
    for prompt in (common[i] for i in sorted(order)):
        rows = {name: where[name][prompt.id] for name in names}
        figures.samples.append(
            {
                "task": task,
                "id": prompt.id,
                "prompt": prompt.text,
                "reference": prompt.reference,
                "answers": {name: found[name].texts[i] for name, i in rows.items()},
                "marks": {name: bool(marks[name][i]) for name, i in rows.items() if name in marks},
            }
        )


def _drop_broken(figures: Figures, task: str, found: Answered) -> tuple[Answered, list[FinalNumber]]:
    """The answers to items whose gold can be read, with the golds."""
    gold = [parse_final_number(p.reference) for p in found.prompts]
    good = [i for i, g in enumerate(gold) if g.value is not None]
    if len(good) < len(gold):
        bad = [p.id for p, g in zip(found.prompts, gold, strict=True) if g.value is None]
        figures.note(
            f"{task}: {len(bad)} items have no final number in their reference, left out: {', '.join(bad[:5])}"
        )
    prompts, answers, texts = found.prompts, found.answers, found.texts
    kept = Answered([prompts[i] for i in good], [answers[i] for i in good], [texts[i] for i in good])
    return kept, [gold[i] for i in good]


def _mark(difference: Numbers) -> Numbers:
    """1 where positive, ½ where exactly 0, else 0."""
    return (np.sign(difference) + 1) / 2


def _add_share(
    figures: Figures, settings: EvaluateSettings, subject: Subject, task: str, metric: str, marks: NDArray[np.float64]
) -> None:
    interval = compute_wilson(float(marks.sum()), len(marks), settings.confidence)
    figures.add(subject.name, task, metric, interval)


def _compare_marks(
    figures: Figures,
    settings: EvaluateSettings,
    task: str,
    metric: str,
    pair: tuple[Subject, Subject],
    ids: Mapping[str, Sequence[str]],
    marks: Mapping[str, Numbers],
) -> None:
    """Compare a subject's marks with another's on the items that both have; nothing where one has no marks."""
    mine, theirs = (s.name for s in pair)
    if mine not in marks or theirs not in marks:
        return
    left, right = align(ids[mine], ids[theirs])
    if left:
        compared = compare_marks(
            marks[mine][left], marks[theirs][right], confidence=settings.confidence, seed=settings.seed
        )
        figures.compare(task, metric, theirs, mine, compared)


def _item(figures: Figures, task: str, subject: Subject, item: str, **values: object) -> None:
    figures.items.append(to_plain({"task": task, "subject": subject.name, "id": item, **values}))


def _pairs_of(subjects: Sequence[Subject]) -> list[tuple[Subject, Subject]]:
    """(subject, the one it is compared with), where both are measured."""
    by_name = {s.name: s for s in subjects}
    return [(s, by_name[s.compare_to]) for s in subjects if s.compare_to is not None and s.compare_to in by_name]
