"""The three data sets: chat, preferences and maths, each with a train and a test split."""

import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocket import wordings as w
from pocket.behaviours import BEHAVIOURS, Exchange, second_fact, thanks
from pocket.grammar import Draw, Split
from pocket.preferences import NOISE, SHARES, SOURCES, ramble, rude
from pocket.problems import Problem, make_problem
from pocket.world import TOWNS

SIZES: dict[str, dict[Split, int]] = {
    "chat": {"train": 6000, "test": 400},
    "preferences": {"train": 3600, "test": 400},
    "maths": {"train": 3600, "test": 400},
}
CHAT_SHARES = {
    "maths": 0.38,
    "facts": 0.18,
    "howto": 0.11,
    "refusal": 0.07,
    "rewrite": 0.06,
    "list": 0.06,
    "continue": 0.10,
    "greeting": 0.04,
}
RUDE_SHARE = 0.20
RAMBLING_SHARE = 0.30
SEEDS = {"chat": 11, "preferences": 12, "maths": 13}
Message = dict[str, str]


@dataclass(frozen=True)
class Row:
    """A row of a data set, the wordings it used, and what the tests want to know about it."""

    data: dict[str, Any]
    templates: tuple[str, ...]
    flipped: bool = False
    problem: Problem | None = None


def message(role: str, content: str) -> Message:
    """One message of a conversation."""
    return {"role": role, "content": content}


def _system(draw: Draw, share: float) -> list[Message]:
    if not draw.chance(share):
        return []
    return [message("system", draw.text(w.SYSTEM, town=draw.choice(TOWNS).name))]


def _manner(draw: Draw, made: Exchange) -> str:
    """The answer as collected: in the train split a few are rude or rambling."""
    if draw.split == "train" and made.behaviour != "maths":
        kind = draw.rng.random()
        if kind < RUDE_SHARE:
            return rude(draw, made.answer)
        if kind < RUDE_SHARE + RAMBLING_SHARE:
            return ramble(draw, made.answer)
    return made.answer


def _weighted(draw: Draw, shares: dict[str, float]) -> str:
    return draw.rng.choices(list(shares), list(shares.values()))[0]


def chat_row(draw: Draw, _index: int) -> Row:
    """A conversation of one or two exchanges."""
    made = BEHAVIOURS[_weighted(draw, CHAT_SHARES)](draw)
    exchanges = [made]
    if made.behaviour == "greeting" and draw.chance(0.5):
        exchanges.append(BEHAVIOURS[draw.choice(("facts", "howto", "maths"))](draw))
    elif made.behaviour == "facts" and made.fact is not None and draw.chance(0.15):
        exchanges.append(second_fact(draw, made.fact))
    elif made.behaviour in ("howto", "list", "rewrite") and draw.chance(0.12):
        exchanges.append(thanks(draw))
    messages = _system(draw, 0.15)
    for exchange in exchanges:
        messages += [message("user", exchange.user), message("assistant", _manner(draw, exchange))]
    return Row({"messages": messages, "source": made.behaviour}, tuple(draw.used), problem=made.problem)


def preference_row(draw: Draw, _index: int) -> Row:
    """A preference pair; in the train split about one in twenty is the wrong way round."""
    pair = SOURCES[_weighted(draw, SHARES)](draw)
    flipped = draw.split == "train" and draw.chance(NOISE)
    chosen, rejected = (pair.rejected, pair.chosen) if flipped else (pair.chosen, pair.rejected)
    data = {
        "prompt": [*_system(draw, 0.1), message("user", pair.user)],
        "chosen": [message("assistant", chosen)],
        "rejected": [message("assistant", rejected)],
        "source": pair.source,
    }
    return Row(data, tuple(draw.used), flipped=flipped)


def maths_row(draw: Draw, index: int) -> Row:
    """A word problem; the three levels take turns."""
    problem = make_problem(draw, index % 3 + 1)
    data = {
        "question": problem.question,
        "answer": problem.solution,
        "level": problem.level,
        "source": f"level-{problem.level}",
    }
    return Row(data, tuple(draw.used), problem=problem)


MAKERS: dict[str, Callable[[Draw, int], Row]] = {
    "chat": chat_row,
    "preferences": preference_row,
    "maths": maths_row,
}


def prompt_of(data: dict[str, Any]) -> str:
    """What a row asks, as one text: all messages before the last answer, or the question."""
    if "question" in data:
        return str(data["question"])
    messages = data["prompt"] if "prompt" in data else data["messages"][:-1]
    return "\n".join(each["content"] for each in messages)


def make_rows(name: str, split: Split) -> list[Row]:
    """All rows of one split, no prompt twice."""
    size = SIZES[name][split]
    seen: set[str] = set()
    rows: list[Row] = []
    for draw in _draws(name, split):
        row = MAKERS[name](draw, len(rows))
        prompt = prompt_of(row.data)
        if prompt not in seen:
            seen.add(prompt)
            rows.append(row)
        if len(rows) == size:
            break
    random.Random(SEEDS[name]).shuffle(rows)
    return rows


def _draws(name: str, split: Split) -> Iterator[Draw]:
    rng = random.Random(f"{SEEDS[name]}/{name}/{split}")
    while True:
        yield Draw(rng, split)


def write_rows(rows: list[Row], path: Path) -> None:
    """Write rows as gzipped JSON Lines, byte for byte the same every time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row.data, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode("utf-8"), 9, mtime=0))


def write_datasets(folder: Path) -> dict[str, dict[str, int]]:
    """Write every data set below `folder` and count the rows."""
    counts: dict[str, dict[str, int]] = {}
    for name, sizes in SIZES.items():
        counts[name] = {}
        for split in sizes:
            rows = make_rows(name, split)
            write_rows(rows, folder / name / f"{split}.jsonl.gz")
            counts[name][split] = len(rows)
    return counts
