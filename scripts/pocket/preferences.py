"""Preference pairs: a better and a worse answer to one prompt."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from pocket import wordings as w
from pocket.behaviours import BEHAVIOURS, Exchange
from pocket.grammar import Draw
from pocket.problems import wrong_solution
from pocket.world import PEOPLE, PLACES, THINGS

NOISE = 0.05
TALK = ("facts", "facts", "howto", "howto", "refusal", "list", "continue", "rewrite", "greeting")
MIXED_UP = ("refusal", "greeting", "continue", "rewrite", "list")
_KINDS = (tuple(person.name for person in PEOPLE), PLACES, tuple(thing.plural for thing in THINGS))


@dataclass(frozen=True)
class Pair:
    """A prompt, its better and its worse answer."""

    user: str
    chosen: str
    rejected: str
    source: str


def _talk(draw: Draw) -> Exchange:
    return BEHAVIOURS[draw.choice(TALK)](draw)


def correct(draw: Draw) -> Pair:
    """Right against wrong: a wrong calculation, a wrong fact, or somebody or something mistaken for another."""
    made = BEHAVIOURS[draw.choice(("maths", "maths", "maths", "facts", "facts", *MIXED_UP))](draw)
    if made.problem is not None:
        wrong = wrong_solution(draw, made.problem)
    elif made.fact is not None:
        wrong = made.fact.other_answer(draw) if draw.chance(0.5) else made.fact.wrong_answer(draw)
    else:
        wrong = mixed_up(draw, made)
        if wrong == made.answer:
            return correct(draw)
    return Pair(made.user, made.answer, wrong, "correct")


def mixed_up(draw: Draw, made: Exchange) -> str:
    """The answer with a name, place or thing of the question changed for another; unchanged where there is none."""
    for kind in draw.sample(_KINDS, len(_KINDS)):
        found = [word for word in kind if _has_word(made.user, word) and _has_word(made.answer, word)]
        if found:
            old = draw.choice(found)
            new = draw.choice([word for word in kind if not _has_word(made.user, word)])
            return re.sub(rf"\b{old}\b", new, made.answer)
    return made.answer


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", text) is not None


def on_topic(draw: Draw) -> Pair:
    """An answer to what was asked against an answer to something else."""
    made = BEHAVIOURS[draw.choice((*TALK, "maths"))](draw)
    shorter = draw.chance(0.7)
    while True:
        other = BEHAVIOURS[draw.choice((*TALK, "maths"))](Draw(draw.rng, draw.split))
        same = other.answer == made.answer or (other.behaviour == made.behaviour and made.behaviour in _LOOSE)
        if not same and (len(other.answer) < len(made.answer)) == shorter:
            return Pair(made.user, made.answer, other.answer, "on_topic")
        shorter = shorter if draw.chance(0.9) else not shorter


_LOOSE = ("refusal", "greeting", "list")


def polite(draw: Draw) -> Pair:
    """A polite answer against a rude one."""
    made = _talk(draw)
    chosen = (
        f"{made.answer} {draw.text(w.KIND_AFTER)}" if draw.chance(0.75) and "\n" not in made.answer else made.answer
    )
    kind = draw.rng.random()
    if kind < 0.4:
        rejected = draw.text(w.CURT)
    elif kind < 0.6:
        rejected = f"{draw.text(w.RUDE_BEFORE)} {draw.text(w.RUDE_AFTER)}"
    elif kind < 0.8:
        rejected = f"{draw.text(w.RUDE_BEFORE)} {made.answer}"
    else:
        rejected = f"{made.answer} {draw.text(w.RUDE_AFTER)}"
    return Pair(made.user, chosen, rejected, "polite")


def ramble(draw: Draw, answer: str) -> str:
    """`answer` said in too many words."""
    kind = draw.rng.random()
    if kind < 0.35:
        return " ".join([answer] * draw.choice((2, 3)))
    if kind < 0.65:
        return f"{draw.text(w.RAMBLE)} {answer} {draw.text(w.RAMBLE)}"
    if kind < 0.85:
        return f"{draw.text(w.RAMBLE)} {draw.text(w.RAMBLE)} {answer}"
    return f"{answer} {draw.text(w.RAMBLE)} {answer}"


def rude(draw: Draw, answer: str) -> str:
    """`answer` said rudely."""
    return draw.text(w.CURT) if draw.chance(0.3) else f"{draw.text(w.RUDE_BEFORE)} {answer}"


def concise(draw: Draw) -> Pair:
    """A short answer against a rambling one."""
    made = _talk(draw)
    return Pair(made.user, made.answer, ramble(draw, made.answer), "concise")


SOURCES: dict[str, Callable[[Draw], Pair]] = {
    "correct": correct,
    "on_topic": on_topic,
    "polite": polite,
    "concise": concise,
}
SHARES = {"correct": 0.20, "on_topic": 0.26, "polite": 0.29, "concise": 0.25}
