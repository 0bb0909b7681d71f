"""Tokenising a recipe's data in a second process while this one imports torch and loads models.

The child is forked before torch is imported, prepares the data of each training stage in turn and leaves them in the cache,
where `prepare_data` finds them. Whatever goes wrong in it is of no consequence: the stage then does the work itself, and says
what is wrong. Nothing is prefetched where there is no cache, no second core, or where a thread could be lost in the fork.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from burnish.config.recipe import Recipe
from burnish.config.train import TrainSettings
from burnish.data.bundled import resolve_model
from burnish.data.prepare import prepare_data
from burnish.data.tokenizer import TextTokenizer
from burnish.disk import cache_root
from burnish.models.folder import read_context

log = logging.getLogger("burnish")

_PAUSE_S = 5.0


class Prefetch:
    """A child that tokenises, or none; `wait` before a stage reads its data, `close` at the end.

    Attributes:
        made: Stages whose data were not in the cache before.
    """

    def __init__(self, child: int = -1, pipe: int = -1, stages: Sequence[str] = ()) -> None:
        self.made: set[str] = set()
        self._child, self._pipe, self._stages = child, pipe, set(stages)
        self._done: set[str] = set()
        self._rest = b""

    def wait(self, stage: str) -> None:
        """Until the child is through with the stage's data, or gone."""
        said = False
        while self._pipe >= 0 and stage in self._stages and stage not in self._done:
            if not select.select([self._pipe], [], [], _PAUSE_S)[0]:
                if not said:
                    log.info("%s: tokenising goes on in another process", stage)
                said = True
                continue
            found = os.read(self._pipe, 4096)
            if not found:
                self.close()
            *lines, self._rest = (self._rest + found).split(b"\n")
            for line in lines:
                name, _, how = line.decode().partition("\t")
                self._done.add(name)
                self.made |= {name} if how == "made" else set()
        if self._stages <= self._done:
            self.close()

    def close(self) -> None:
        """End the child, if it still runs."""
        if self._pipe < 0:
            return
        os.close(self._pipe)
        self._pipe = -1
        with suppress(OSError):  # no child any more: somebody else has waited for it
            if os.waitpid(self._child, os.WNOHANG)[0] == 0:
                os.kill(self._child, signal.SIGKILL)
                os.waitpid(self._child, 0)


def start_prefetch(recipe: Recipe) -> Prefetch:
    """Begin to tokenise for the recipe's stages, where that helps."""
    jobs: list[tuple[TrainSettings, Path]] = []
    with suppress(Exception):  # the stage itself says what is wrong with its model
        jobs = _find_jobs(recipe)
    alone = "torch" not in sys.modules and threading.active_count() == 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not jobs or not alone or cache_root() is None or _count_cores() < 2 or not hasattr(os, "fork"):
        return Prefetch()
    try:
        reading, writing = os.pipe()
        child = os.fork()
    except OSError:
        return Prefetch()
    if child == 0:
        _run_child(jobs, writing)
    os.close(writing)
    return Prefetch(child, reading, [str(settings.name) for settings, _ in jobs])


def _find_jobs(recipe: Recipe) -> list[tuple[TrainSettings, Path]]:
    """Training stages whose first model lies here, with its folder: a stage that starts from another shares its tokenizer."""
    folders: dict[str, Path] = {}
    jobs = []
    for stage in recipe.stages:
        if not isinstance(stage, TrainSettings):
            continue
        folder = folders.get(stage.init_from or "")
        if stage.init_from is None and stage.model:
            folder = resolve_model(stage.model) or Path(stage.model).expanduser()
        if folder is not None and (folder / "tokenizer.json").is_file():
            folders[str(stage.name)] = folder
            jobs.append((stage, folder))
    return jobs


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_child(jobs: Sequence[tuple[TrainSettings, Path]], pipe: int) -> None:
    """Never returns."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.nice(5)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        for settings, folder in jobs:
            how = "failed"
            with suppress(Exception):
                found = prepare_data(settings, TextTokenizer.load(str(folder)), context=read_context(folder))
                how = "found" if found.report.from_cache else "made"
            os.write(pipe, f"{settings.name}\t{how}\n".encode())
    finally:
        os._exit(0)
