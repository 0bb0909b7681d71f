"""From a file, a name or a dictionary to a checked recipe; nothing else is loaded on the way."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from burnish.config.assembly import Assembly
from burnish.config.bundled import bundled_recipes
from burnish.config.cells import build_grid, take_grid
from burnish.config.environment import read_dotenv, read_environment
from burnish.config.grid import Cell, Grid
from burnish.config.overrides import Override, parse_overrides
from burnish.config.problems import Problem, RecipeError
from burnish.config.recipe import Recipe
from burnish.config.run_name import build_run_name
from burnish.config.secrets import find_secrets
from burnish.config.spelling import describe_suggestions, suggest
from burnish.config.tree import Layer, Node, Place, build_node, parse_text
from burnish.errors import ConfigError

MAX_BYTES = 5_000_000


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe and where it comes from.

    Args:
        recipe: The recipe, complete and checked.
        origin: File, or name of the bundled recipe, as messages name it.
        text: The recipe as it was written (what a run keeps as recipe.yaml).
        sources: Place of every value that is not a default: "stages.dpo.beta" → "recipe.yaml:12".
        notes: Remarks for the person who started it: aliases that were read, settings without effect.
        processes: Processes that the batch arithmetic was checked for.
        grid: The cells of a recipe with a grid; `recipe` is then the first cell's, with the grid's keys.
        tables: What became of the lines of each `distributed.config`.
    """

    recipe: Recipe
    origin: str
    text: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    processes: int = 1
    grid: Grid | None = None
    tables: tuple[str, ...] = ()

    def for_cell(self, cell: Cell) -> LoadedRecipe:
        """One cell as a recipe of its own."""
        head = f"# Cell {cell.name} of {self.origin}, resolved: a complete recipe.\n"
        text = head + _dump(cell.recipe.resolved(), ())
        return replace(
            self, recipe=cell.recipe, text=text, sources=cell.sources, notes=(), grid=None, tables=cell.tables
        )

    def source_of(self, path: str) -> str:
        """Where a value comes from ("default" if nothing sets it)."""
        while path:
            if path in self.sources:
                return self.sources[path]
            path = path.rpartition(".")[0]
        return "default"

    def run_name(self, model: str | None = None) -> str:
        """Name of the run's folder: the template with its fields filled in."""
        return build_run_name(self.recipe, model)


def load_recipe(
    source: str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    checkpoint: Mapping[str, Any] | None = None,
    processes: int | None = None,
    check_machine: bool = True,
    check_device: bool = True,
    need_model: bool = True,
    default_kind: str | None = None,
) -> LoadedRecipe:
    """Reads and checks a recipe.

    Values are taken in this order, the later the stronger: defaults, `.env`, environment, checkpoint, file, grid, overrides.

    Args:
        source: A YAML or JSON file, the name of a bundled recipe, or a mapping.
        overrides: `key=value` words.
        env: Environment to read settings from; None: the process's own and `.env` of the current folder.
        checkpoint: Settings of a checkpoint: a resolved recipe, or the settings of one stage.
        processes: Processes that share the batch; None: WORLD_SIZE, else 1.
        check_machine: Check that local files exist and that needed extras are installed.
        check_device: Check that the devices which settings need are here; a login node may have none.
        need_model: Refuse training stages that have no model to start from.
        default_kind: Kind of the one stage of a file that has neither `stages` nor `kind`.

    Raises:
        ConfigError: Something is wrong with it; RecipeError lists everything that is.
    """
    problems: list[Problem] = []
    notes: list[str] = []
    root, origin, text, name = _read_source(source, overrides)
    environment = dict(os.environ) if env is None else dict(env)
    values, env_notes = read_environment(environment, read_dotenv(Path(".env")) if env is None else {})
    notes.extend(env_notes)
    words = parse_overrides(overrides, problems)
    if problems:
        raise RecipeError(problems, origin="command line")
    if default_kind is not None and not {"stages", "kind", "method"} & root.value.keys():
        root.value["kind"] = Node(default_kind, root.place, raw=default_kind)
    root, tree, words = take_grid(root, words, values, problems)
    processes = processes or _world_size(environment)

    def assemble(own: list[Problem], remarks: list[str], assigned: Sequence[Override] = ()) -> Assembly:
        assembly = Assembly(root, origin=origin, default_name=name, problems=own, notes=remarks)
        assembly.add_environment(values)
        if checkpoint:
            assembly.add_checkpoint(build_node(checkpoint, Place(Layer.CHECKPOINT, "checkpoint")))
        assembly.add_overrides(assigned)
        dropped = {"model", "models"} if any(a.parts == ("model",) for a in assigned) else set()
        assembly.add_overrides([word for word in words if word.parts[0] not in dropped])
        return assembly

    def build(assembly: Assembly) -> Recipe | None:
        return assembly.build(
            processes=processes, check_machine=check_machine, check_device=check_device, need_model=need_model
        )

    if tree is not None and not problems:
        tables: tuple[str, ...] = ()
        recipe, grid, sources = build_grid(tree, assemble, build, words, problems, notes, origin)
    else:
        assembly = assemble(problems, notes)
        recipe, grid, sources = build(assembly), None, assembly.sources
        tables = assembly.describe_files()
    if problems or recipe is None:
        raise RecipeError(problems, origin=origin)
    return LoadedRecipe(recipe, origin, text, sources, tuple(dict.fromkeys(notes)), processes, grid, tables)


def _world_size(environment: Mapping[str, str]) -> int:
    text = environment.get("WORLD_SIZE", "1")
    return max(1, int(text)) if text.isdigit() else 1


def _dump(plain: Any, overrides: Sequence[str]) -> str:
    """A recipe that no file holds, as text; what the command line adds to it stands below as comments."""
    import yaml

    try:
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    except yaml.YAMLError:  # values that no recipe holds: an error will say which
        return ""
    return text + "".join(f"# {' '.join(word.split())}\n" for word in overrides)


def _read_source(source: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> tuple[Node, str, str, str]:
    """Tree, origin, text and default name."""
    if isinstance(source, Mapping):
        root = build_node(source, Place(Layer.FILE, "recipe"))
        return root, "recipe", _dump(root.plain(), overrides), "recipe"
    text, origin, name = _read_text(source)
    secrets = find_secrets(text, origin)
    if secrets:
        raise RecipeError(secrets, origin=origin)
    root = parse_text(text, origin)
    if root is None or root.value in (None, ""):
        raise ConfigError(
            "the recipe is empty", where=origin, remedy="start from `burnish config example sft` or a bundled recipe"
        )
    if not isinstance(root.value, dict):
        shape = "a list" if isinstance(root.value, list) else "plain text"
        raise ConfigError(
            f"the recipe is {shape}, not a mapping", where=origin, remedy="begin with keys such as model: and stages:"
        )
    return root, origin, text, name


def _read_text(source: str | Path) -> tuple[str, str, str]:
    path = Path(source).expanduser()
    bundled = bundled_recipes()
    if not path.is_file() and str(source) in bundled:
        return bundled[str(source)].read_text(encoding="utf-8"), f"{source}.yaml (bundled)", str(source)
    if not path.is_file():
        raise _missing(str(source), path, list(bundled))
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError("the file is too large for a recipe", where=str(path), remedy="give a recipe, not data")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the file is not UTF-8 text (byte {error.start})", where=str(path), remedy="save the recipe as UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"the file cannot be read: {error.strerror}", where=str(path), remedy="check its permissions"
        ) from None
    return text, str(source), path.stem


def _missing(source: str, path: Path, bundled: list[str]) -> ConfigError:
    if path.is_dir():
        return ConfigError("is a folder, not a recipe", where=source, remedy="name the file in it")
    folder = path.parent if path.parent.is_dir() else Path()
    files = [str(folder / item.name) for item in folder.iterdir() if item.suffix in (".yaml", ".yml", ".json")]
    near = [*suggest(source, bundled), *suggest(source, files)]
    hint = describe_suggestions(near[:3])
    known = f"bundled recipes: {', '.join(bundled)}"
    return ConfigError(
        f"there is no recipe {source!r}: neither a file nor a bundled one",
        where=source,
        found=source,
        remedy=f"{hint} ({known})" if hint else known,
    )
