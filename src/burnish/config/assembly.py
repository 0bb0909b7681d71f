"""Puts the layers of a recipe together: defaults < .env < environment < checkpoint < file < grid < command line.

Within a layer, what is said about a stage is stronger than what is said for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from burnish.config.base import Settings
from burnish.config.checks import check_stage
from burnish.config.cross_checks import check_models, check_stages
from burnish.config.distributed_file import apply_file, describe_tables
from burnish.config.drafts import Draft, identify
from burnish.config.environment import EnvironmentValue
from burnish.config.keys import (
    DEEP_KEYS,
    RECIPE_KEYS,
    STAGE_ONLY,
    all_setting_names,
    canonicalise,
    inherits,
    kind_names,
    kinds_with,
    settings_class,
)
from burnish.config.machine import check_machine as find_machine_problems
from burnish.config.overrides import Override, find_stage, is_setting, nest, unknown_path
from burnish.config.problems import Problem, format_value
from burnish.config.recipe import Recipe
from burnish.config.registry import find_method_spec, list_model_settings
from burnish.config.run_name import build_run_name
from burnish.config.secrets import check_word
from burnish.config.train import TrainSettings
from burnish.config.tree import Layer, Node, Place, build_node, merge_nodes
from burnish.config.values import SettingsReader, build_settings, unknown_key
from burnish.errors import ConfigError

_PATH_KEYS = frozenset({"data", "eval_data", "model", "models", "output_dir", "chat_template"})


class Assembly:
    """Builds a Recipe from what each layer says.

    Args:
        root: The file's tree, a mapping.
        origin: Name of the file in messages.
        default_name: Name of a recipe that gives itself none.
        problems: Problems are appended here.
        notes: Remarks are appended here.
    """

    def __init__(
        self, root: Node, *, origin: str, default_name: str, problems: list[Problem], notes: list[str]
    ) -> None:
        self.origin, self.default_name, self.problems, self.notes = origin, default_name, problems, notes
        self.sources: dict[str, str] = {}
        self.tables: dict[str, list[str]] = {}  # what became of the lines of `distributed.config` → stages
        self.top: dict[Layer, dict[str, Node]] = {Layer.FILE: canonicalise(root.value, "", problems, notes)}
        self.drafts = self._draft_stages(root.place)
        self.identity_problems: list[Problem] = []
        identify(self.drafts, self.identity_problems)

    # What the layers say

    def _draft_stages(self, place: Place) -> list[Draft]:
        top = self.top[Layer.FILE]
        stages = top.pop("stages", None)
        if stages is None and "kind" in top:
            shared = (*(key for key in RECIPE_KEYS if key != "data"), "models")
            own = {key: node for key, node in top.items() if key not in shared}
            self.top[Layer.FILE] = {key: node for key, node in top.items() if key in shared}
            return [Draft(0, {Layer.FILE: own}, place)]
        if stages is None:
            self._problem(
                "stages", "the recipe has no stages", "add stages: with at least one, e.g. - {kind: sft}", place
            )
            return []
        if not isinstance(stages.value, list) or not stages.value:
            found = "empty" if not stages.value else "not a list"
            self._problem(
                "stages", f"is {found}", "write a list with at least one stage, e.g. - {kind: sft}", stages.place
            )
            return []
        drafts = []
        for i, node in enumerate(stages.value):
            if isinstance(node.value, str):
                node = Node({"kind": node}, node.place)
            if not isinstance(node.value, dict):
                self._problem(f"stages.{i}", f"is {format_value(node.plain())}", "write e.g. {kind: sft}", node.place)
                continue
            nodes = canonicalise(node.value, f"stages.{i}", self.problems, self.notes)
            drafts.append(Draft(i, {Layer.FILE: nodes}, node.place))
        return drafts

    def add_environment(self, values: Sequence[EnvironmentValue]) -> None:
        """Settings of `.env` and the environment. Those of stages and kinds that are not here are left alone."""
        for value in values:
            found = check_word(".".join(value.path), value.text, value.node.place.text)
            if found:
                self.problems.extend(found)
                continue
            nodes = canonicalise({value.path[0]: nest(value.path[1:], value.node)}, "", self.problems, [])
            layer = value.node.place.layer
            key = next(iter(nodes))
            if value.stage is None:
                if key in RECIPE_KEYS or key in all_setting_names() - STAGE_ONLY:
                    target = self.top.setdefault(layer, {})
                    target[key] = merge_nodes(target.get(key), nodes[key])
                else:
                    self.problems.append(unknown_key("", value.path[0], value.node, _top_keys()))
                continue
            named = [d for d in self.drafts if d.named and _fold(d.name) == value.stage]
            hits = named or [d for d in self.drafts if value.stage in (_fold(d.name), d.kind, d.label)]
            if not hits and value.stage not in kind_names():
                self.notes.append(f"{value.variable} has no effect: this recipe has no stage or kind {value.stage!r}")
            for draft in hits:
                draft.add(layer, nodes)

    def add_checkpoint(self, node: Node) -> None:
        """Settings of a checkpoint: a resolved recipe, or one stage's settings."""
        nodes = {key: child for key, child in node.value.items() if child.value is not None}
        stages = nodes.pop("stages", None)
        layer = Layer.CHECKPOINT
        for name in ("kind", "name"):
            nodes.pop(name, None)
        self.top[layer] = {k: n for k, n in canonicalise(nodes, "", self.problems, []).items() if n.value != []}
        for child in stages.value if stages is not None else []:
            settings = {key: n for key, n in child.value.items() if n.value is not None and key not in ("kind", "name")}
            name, kind = child.value.get("name"), child.value.get("kind")
            hits = [d for d in self.drafts if name is not None and d.name == name.value]
            hits = hits or [d for d in self.drafts if kind is not None and d.kind == kind.value]
            for draft in hits[:1]:
                draft.add(layer, canonicalise(settings, "", self.problems, []))

    def add_overrides(self, overrides: Sequence[Override]) -> None:
        """The words of the command line, or what a grid sets in one cell (the layer is that of each word's place)."""
        names = [d.name for d in self.drafts]
        kinds = [d.kind or "" for d in self.drafts]
        written = [d.label for d in self.drafts]
        changed = False
        for override in overrides:
            head, rest = override.parts[0], override.parts[1:]
            if head == "stages":
                index = self._stage_of(override, names, kinds, written)
                if index is not None:
                    changed |= self._override_stage(self.drafts[index], override, rest[1:])
            elif is_setting(head):
                changed |= self._override_top(override)
            elif rest and isinstance(index := find_stage(head, names, kinds, written), int):
                changed |= self._override_stage(self.drafts[index], override, rest)
            elif rest and head in (*kinds, *written):
                message = str(find_stage(head, names, kinds, written))
                self._problem(override.text, f"{head!r} names no single stage", message, override.node.place)
            else:
                self.problems.append(unknown_path(override, names))
        if changed:
            self.identity_problems.clear()
            identify(self.drafts, self.identity_problems)

    def _stage_of(self, override: Override, names: list[str], kinds: list[str], written: list[str]) -> int | None:
        rest = override.parts[1:]
        if len(rest) < 2:
            self._problem(
                "stages",
                f"{override.text!r} names no setting of a stage",
                "write e.g. stages.0.seed=3",
                override.node.place,
            )
            return None
        index = find_stage(rest[0], names, kinds, written)
        if isinstance(index, str):
            self._problem(
                ".".join(override.parts),
                f"there is no stage {rest[0]!r} (in {override.text!r})",
                index,
                override.node.place,
            )
            return None
        return index

    def _override_stage(self, draft: Draft, override: Override, path: Sequence[str]) -> bool:
        nodes = canonicalise({path[0]: nest(path[1:], override.node)}, draft.path, self.problems, self.notes)
        draft.add(override.node.place.layer, nodes)
        return bool({"kind", "name"} & nodes.keys())

    def _override_top(self, override: Override) -> bool:
        """Returns whether the kind of a stage may be another now."""
        nodes = canonicalise(
            {override.parts[0]: nest(override.parts[1:], override.node)}, "", self.problems, self.notes
        )
        layer = override.node.place.layer
        target = self.top.setdefault(layer, {})
        for key, node in nodes.items():
            if key in STAGE_ONLY and key != "name":
                if len(self.drafts) == 1:
                    self.drafts[0].add(layer, {key: node})
                else:
                    names = ", ".join(d.name for d in self.drafts)
                    self._problem(key, "belongs to a stage", f"write STAGE.{key}=…; the stages are {names}", node.place)
            else:
                target[key] = merge_nodes(target.get(key), node)
        return "kind" in nodes

    # From layers to settings

    def build(
        self, *, processes: int, check_machine: bool, need_model: bool, check_device: bool = True
    ) -> Recipe | None:
        """The recipe, or None if it cannot be made; everything that is wrong is in `problems`."""
        self.problems.extend(self.identity_problems)
        self._check_top_keys()
        top = self._read_top()
        stages: list[Settings] = []
        for draft in self.drafts:
            if draft.kind is None:
                continue
            stage, broken = self._build_stage(draft, bool(top.get("models")))
            stages.append(stage)
            found = [*check_stage(stage, draft.path, processes=processes), *_find_missing(draft, stage)]
            if check_machine:
                found += find_machine_problems(stage, draft.path, Path(self.origin).parent, device=check_device)
            self._add_located(found, draft, broken)
        self.notes.extend(self.describe_files())
        complete = [d for d in self.drafts if d.kind is not None]
        if len(complete) == len(stages) and stages:
            self._add_located(check_stages(stages, [d.name for d in self.drafts]), None, set())
            if need_model:
                self._add_located(check_models(stages, bool(top.get("models"))), None, set())
        if not stages:
            return None
        self._note_starts(stages)
        top.setdefault("name", self.default_name)
        recipe = build_settings(Recipe, {**top, "stages": stages}, "", self.origin, self.problems)
        assert isinstance(recipe, Recipe)
        if not self.problems:
            try:
                for model in recipe.model_list():
                    build_run_name(recipe, model)
            except ConfigError as error:
                self.problems.append(Problem("run_name", error.message, error.remedy, self._locate("run_name")))
        return recipe

    def describe_files(self) -> tuple[str, ...]:
        """What became of the lines of each `distributed.config`, one text a table."""
        return tuple(describe_tables(self.tables))

    def _note_starts(self, stages: Sequence[Settings]) -> None:
        """A stage after another that starts from the base model all the same may be a slip."""
        own_model = {draft.name for draft in self.drafts if draft.own("model") is not None}
        before = None
        for stage in stages:
            if not isinstance(stage, TrainSettings):
                continue
            if before and stage.init_from is None and stage.name not in own_model:
                self.notes.append(
                    f"{stage.name} starts from the base model; to continue {before}, set init_from: {before}"
                )
            before = before if find_method_spec(stage.kind).result.head == "score" else str(stage.name)

    def _check_top_keys(self) -> None:
        kinds = {d.kind for d in self.drafts if d.kind}
        for layer, nodes in self.top.items():
            for key, node in nodes.items():
                if key in RECIPE_KEYS:
                    continue
                if key in STAGE_ONLY:
                    self._problem(key, "belongs to a stage, not to the recipe", f"move {key}: into a stage", node.place)
                elif key not in all_setting_names():
                    self.problems.append(unknown_key("", node.key or key, node, _top_keys()))
                elif layer >= Layer.FILE and kinds and not any(inherits(kind, key) for kind in kinds):
                    owners = ", ".join(kinds_with(key))
                    message = f"no stage of this recipe has the setting {key} (value {format_value(node.plain())})"
                    self._problem(
                        key, message, f"it is a setting of {owners}; remove it, or add such a stage", node.place
                    )

    def _read_top(self) -> dict[str, Any]:
        merged: dict[str, Node] = {}
        for layer in sorted(self.top):
            nodes = {key: node for key, node in self.top[layer].items() if key in RECIPE_KEYS and key != "stages"}
            if _is_given(nodes.get("model")) and _is_given(nodes.get("models")):
                self._problem(
                    "models",
                    "both model and models are given",
                    "keep one: model for one, models for several",
                    nodes["models"].place,
                )
                nodes.pop("models")
            if _is_given(nodes.get("model")):
                merged.pop("models", None)
            if _is_given(nodes.get("models")):
                merged.pop("model", None)
            for key, node in nodes.items():
                if node.partial and key not in merged:
                    continue  # changes a part of what stages set themselves
                merged[key] = merge_nodes(merged.get(key), _expand_home(key, node))
        if "model" in merged and isinstance(merged["model"].value, list):
            node = merged.pop("model")
            self._problem("model", "is a list", "write models: […] to run the stages for several models", node.place)
        if "name" in merged and merged["name"].value is None:
            merged.pop("name")
        return SettingsReader("", self.problems, self.sources).read_fields(Recipe, merged)

    def _build_stage(self, draft: Draft, several: bool) -> tuple[Settings, set[str]]:
        """The stage's settings, and the names of those that could not be read (they have their defaults)."""
        assert draft.kind is not None
        cls = settings_class(draft.kind)
        nodes = self._merge_layers(draft, several)
        nodes, table = apply_file(nodes, draft.path, Path(self.origin).parent, self.problems)
        if table:
            self.tables.setdefault(table, []).append(draft.name)
        known: dict[str, Node] = {}
        for key, node in nodes.items():
            if key in cls.model_fields:
                known[key] = _expand_home(key, node)
            else:
                self.problems.append(self._unknown_in_stage(draft, cls, key, node))
        known.pop("kind", None)
        known.pop("name", None)
        before = len(self.problems)
        values = SettingsReader(draft.path, self.problems, self.sources).read_fields(cls, known)
        broken = known.keys() - values.keys() if len(self.problems) > before else set()
        values |= {"kind": draft.kind, "name": draft.name}
        return build_settings(cls, values, draft.path, str(draft.place), self.problems), broken

    def _merge_layers(self, draft: Draft, several: bool) -> dict[str, Node]:
        assert draft.kind is not None
        merged: dict[str, Node] = {}
        from_other = draft.own("init_from")
        for layer in Layer:
            general = {k: n for k, n in self.top.get(layer, {}).items() if inherits(draft.kind, k)}
            if several or (from_other is not None and from_other.value is not None):
                general.pop("model", None)
            own = draft.layers.get(layer, {})
            if layer == Layer.FILE:
                self._merge(merged, general)
                self._apply_alias(draft, merged)
                self._merge(merged, own)
            else:
                self._merge(merged, general)
                self._merge(merged, own)
        for key, value in draft.fixed.items():
            node = merged[key]
            if node.plain() != value:
                self._problem(
                    f"{draft.path}.{key}",
                    f"is {format_value(node.plain())}, but kind: {draft.label} means {key}: {_show(value)}",
                    f"remove {key}, or write kind: {draft.kind}",
                    node.place,
                )
        return merged

    def _merge(self, merged: dict[str, Node], nodes: dict[str, Node]) -> None:
        for key, node in nodes.items():
            try:
                merged[key] = merge_nodes(merged.get(key), node, deep=key in DEEP_KEYS)
            except ConfigError as error:
                self._problem(key, error.message, error.remedy, node.place)

    def _apply_alias(self, draft: Draft, merged: dict[str, Node]) -> None:
        kind = draft.own("kind")
        place = Place(Layer.FILE, f"{kind.place if kind else self.origin} (kind: {draft.label})")
        for key, value in draft.fixed.items():
            merged[key] = build_node(value, place) if isinstance(value, list) else Node(value, place, raw=str(value))

    def _unknown_in_stage(self, draft: Draft, cls: type[Settings], key: str, node: Node) -> Problem:
        elsewhere = ""
        if key in RECIPE_KEYS:
            elsewhere = f"{key} belongs to the recipe: write it at the top"
        elif key in all_setting_names():
            elsewhere = f"{key} is a setting of {', '.join(kinds_with(key))}, not of {draft.kind}"
        return unknown_key(draft.path, node.key or key, node, cls.model_fields, elsewhere=elsewhere)

    # Where things are

    def _problem(self, key: str, message: str, remedy: str, place: Place) -> None:
        self.problems.append(Problem(key, message, remedy, str(place)))

    def _locate(self, path: str, draft: Draft | None = None) -> str:
        """The place of a setting, else that of its stage, else the file."""
        parts = path
        while parts:
            if parts in self.sources:
                return self.sources[parts]
            parts = parts.rpartition(".")[0]
        if draft is None:
            draft = next((d for d in self.drafts if path == d.path or path.startswith(d.path + ".")), None)
        return str(draft.place) if draft else self.origin

    def _add_located(self, found: Sequence[Problem], draft: Draft | None, broken: set[str]) -> None:
        """Adds problems with their places; those that speak of a setting that could not be read are left out."""
        for problem in found:
            own = problem.key.removeprefix(draft.path + ".") if draft else problem.key
            if own.partition(".")[0] not in broken:
                where = self._locate(problem.key, draft)
                self.problems.append(Problem(problem.key, problem.message, problem.remedy, where))


def _find_missing(draft: Draft, stage: Settings) -> list[Problem]:
    """What the alias of a kind needs and the stage does not have."""
    return [
        Problem(
            f"{draft.path}.{name}",
            f"is missing: kind {draft.label} is kind {draft.kind} with it",
            "name an earlier stage, a folder or a hub id",
        )
        for name in draft.requires
        if getattr(stage, name) is None
    ]


def _top_keys() -> list[str]:
    return [*RECIPE_KEYS, *sorted(all_setting_names() - set(RECIPE_KEYS) - STAGE_ONLY)]


def _show(value: Any) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value)


def _fold(name: str) -> str:
    return name.lower().replace("-", "_")


def _is_given(node: Node | None) -> bool:
    return node is not None and node.value not in (None, [])


def _expand_home(key: str, node: Node) -> Node:
    if key not in _PATH_KEYS and key not in list_model_settings():
        return node
    if isinstance(node.value, str) and node.value.startswith("~/"):
        return Node(str(Path(node.value).expanduser()), node.place, key=node.key)
    if isinstance(node.value, list):
        return Node([_expand_home(key, item) for item in node.value], node.place, key=node.key)
    if isinstance(node.value, dict) and "source" in node.value:
        children = {**node.value, "source": _expand_home(key, node.value["source"])}
        return Node(children, node.place, key=node.key, partial=node.partial)
    return node
