"""The JSON Schema of recipes, for editors."""

from __future__ import annotations

from typing import Any

from burnish.config.example import get_fixed
from burnish.config.keys import inherits, settings_class
from burnish.config.recipe import Recipe
from burnish.config.registry import ALIASES, KINDS

SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"


def build_schema() -> dict[str, Any]:
    """The JSON Schema of recipes as people write them: aliases of kinds, and stage settings at the top."""
    definitions: dict[str, Any] = {}
    stages, top = [], {}
    for name, kind in [(k, k) for k in KINDS] + [(a, alias.kind) for a, alias in ALIASES.items()]:
        cls = settings_class(kind)
        schema = cls.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(schema.pop("$defs", {}))
        properties = {key: value for key, value in schema["properties"].items() if key not in get_fixed(name)}
        properties["kind"] = {"const": name, "description": KINDS[kind].summary}
        top.update({key: value for key, value in properties.items() if inherits(kind, key)})
        definitions[f"stage-{name}"] = {
            "type": "object",
            "description": (cls.__doc__ or "").strip(),
            "properties": properties,
            "required": ["kind"],
            "additionalProperties": False,
        }
        stages.append({"$ref": f"#/$defs/stage-{name}"})
    recipe = Recipe.model_json_schema(ref_template="#/$defs/{model}")
    definitions.update({k: v for k, v in recipe.pop("$defs", {}).items() if k != "Settings"})
    properties = {**top, **recipe["properties"]}
    properties["stages"] = {
        "type": "array",
        "minItems": 1,
        "description": Recipe.model_fields["stages"].description,
        "items": {"oneOf": stages},
    }
    return {
        "$schema": SCHEMA_ID,
        "title": "burnish recipe",
        "type": "object",
        "properties": properties,
        "required": ["stages"],
        "additionalProperties": False,
        "$defs": definitions,
    }
