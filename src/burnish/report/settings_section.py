"""Settings (what differs from the defaults first) and the environment."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from burnish.config.keys import settings_class
from burnish.config.registry import find_known
from burnish.disk import format_bytes
from burnish.report.read import RunFiles, StageFiles, as_dict, as_number

_TOLD_ELSEWHERE = {"kind", "name"}


def render_settings(run: RunFiles) -> str:
    """A table a stage of the settings that differ from burnish's defaults, then everything as resolved."""
    parts = ['<p class="soft">What differs from the defaults. Everything, as it held, is below.</p>']
    first = run.models[0]
    for stage in run.stages:
        if stage.model == first:
            rows = changed_settings(stage)
            if rows:
                body = "".join(
                    f"<tr><td><code>{escape(k)}</code></td><td><code>{escape(_text(v))}</code></td>"
                    f'<td class="soft">{_default(d)}</td></tr>'
                    for k, v, d in rows
                )
                parts.append(
                    f'<h3>{escape(stage.name)}</h3><div class="wide"><table class="settings">'
                    f"<tr><th>setting</th><th>value</th><th>default</th></tr>{body}</table></div>"
                )
    if run.resolved_text:
        parts.append(
            f"<details><summary>All settings, as resolved</summary><pre>{escape(run.resolved_text)}</pre></details>"
        )
    return "\n".join(parts) if len(parts) > 1 else ""


_UNKNOWN = object()


def changed_settings(stage: StageFiles) -> list[tuple[str, Any, Any]]:
    """(setting, value, default) for each setting of a stage that differs from its default."""
    settings = as_dict(stage.record.get("settings"))
    defaults = _load_defaults(stage.kind)
    return [
        (key, value, defaults.get(key, _UNKNOWN))
        for key, value in settings.items()
        if key not in _TOLD_ELSEWHERE and value != defaults.get(key, _UNKNOWN)
    ]


def _load_defaults(kind: str) -> dict[str, Any]:
    """Defaults of a kind's settings as plain JSON; empty for a kind that is not known here."""
    if find_known(kind) is None:
        return {}
    out: dict[str, Any] = {}
    for name, field in settings_class(kind).model_fields.items():
        value = field.get_default(call_default_factory=True)
        if hasattr(value, "model_dump"):
            value = value.model_dump(mode="json")
        out[name] = value
    return json.loads(json.dumps(out, default=lambda value: None))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):  # of a section, what is given
        value = {k: v for k, v in value.items() if v is not None}
    return json.dumps(value, ensure_ascii=False)


def _default(value: Any) -> str:
    if value is _UNKNOWN:
        return ""
    return "–" if value is None else f"<code>{escape(_text(value))}</code>"


def render_environment(run: RunFiles) -> str:
    """Versions and machine."""
    env = run.environment
    if not env:
        return ""
    memory = as_number(env.get("memory_bytes"))
    rows = [
        ("burnish", env.get("burnish")),
        ("Python", env.get("python")),
        ("Platform", env.get("platform")),
        ("Processor", env.get("processor")),
        ("CPUs", env.get("cpus")),
        ("Memory", format_bytes(memory) if memory else None),
        ("Device", env.get("device")),
        ("Threads", env.get("threads")),
        ("Processes", env.get("processes")),
        ("Commit", env.get("commit")),
    ]
    known = {"burnish", "python", "platform", "processor", "cpus", "memory_bytes", "device", "threads", "processes"}
    known |= {"commit", "packages", "variables", "machine"}
    rows += [(key, value) for key, value in env.items() if key not in known]
    rows += [(name, version) for name, version in as_dict(env.get("packages")).items()]
    rows += [(name, value) for name, value in as_dict(env.get("variables")).items()]
    body = "".join(
        f"<div><dt>{escape(str(k))}</dt><dd>{escape(_text(v))}</dd></div>"
        for k, v in rows
        if v not in (None, "", {}, [])
    )
    return f'<dl class="facts small">{body}</dl>'
