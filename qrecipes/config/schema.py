"""The JSON Schema of a run's TOML file, for editors that complete and check as one types."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from qrecipes.config.run import Run
from qrecipes.transforms import REGISTRY


def schema() -> dict[str, Any]:
    """JSON Schema, draft 2020-12, of a file that holds a run or extends another file."""
    methods = sorted(REGISTRY)
    refs, document = TypeAdapter.json_schemas(
        [
            ("run", "validation", TypeAdapter(Run)),
            *((name, "validation", TypeAdapter(REGISTRY[name].Config)) for name in methods),
        ]
    )
    definitions = _clean(document)["$defs"]
    run = definitions.pop("Run")
    definitions.pop("TransformConfig")
    for name in methods:
        inherited = _inherited(REGISTRY[name].Config)
        definitions[name] = _method_table(name, definitions[_target(refs[name, "validation"])], inherited)
    for name in methods:
        definitions.pop(_target(refs[name, "validation"]), None)
    run["properties"]["transform"]["items"] = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"enum": methods, "description": "The method."}},
        "oneOf": [{"$ref": f"#/$defs/{name}"} for name in methods],
    }
    run["properties"]["extends"] = {
        "type": "string",
        "description": "The file this one is laid over, a path from here or a shipped name like tiny/llm: "
        "tables merge, lists and scalars replace. One level only.",
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "qrecipes run",
        **run,
        **_required_unless_extending(run, definitions),
        "$defs": definitions,
    }


def meanings(cls: type) -> dict[str, str]:
    """The keys of a section's or method's table, each with its choices or the first sentence of its
    documentation."""
    inherited = _inherited(cls)
    properties = {
        key: inherited.get(key, {}) | node
        for key, node in TypeAdapter(cls).json_schema()["properties"].items()
    }
    return {
        key: f"one of {', '.join(map(str, node['enum']))}"
        if "enum" in node
        else " ".join(node.get("description", "it has no default").split()).partition(". ")[0].rstrip(".")
        for key, node in properties.items()
    }


def _required_unless_extending(run: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """What a whole file must have, moved out of the definitions: a file that extends another may leave it
    there."""
    hints = get_type_hints(Run)
    sections = {
        field.name: {"required": required}
        for field in fields(Run)
        if isinstance(section := hints[field.name], type)
        and is_dataclass(section)
        and (required := definitions[section.__name__].pop("required", []))
    }
    return {
        "required": [],
        "if": {"required": ["extends"]},
        "else": {"required": run["required"], "properties": sections},
    }


def _inherited(cls: type) -> dict[str, dict[str, str]]:
    """Documentation of inherited keys: pydantic reads that of a class's own fields alone."""
    found: dict[str, dict[str, str]] = {}
    for base in reversed(cls.__mro__[1:]):
        if is_dataclass(base) and hasattr(base, "__pydantic_config__"):
            for key, node in TypeAdapter(base).json_schema()["properties"].items():
                if "description" in node:
                    found[key] = {"description": " ".join(node["description"].split())}
    return found


def _method_table(name: str, config: dict[str, Any], inherited: dict[str, dict[str, str]]) -> dict[str, Any]:
    properties = {key: {**inherited.get(key, {}), **node} for key, node in config["properties"].items()}
    return {
        **config,
        "properties": {"name": {"const": name}, **properties},
        "required": ["name", *config.get("required", [])],
    }


def _target(ref: dict[str, Any]) -> str:
    return ref["$ref"].rpartition("/")[2]


def _clean(node: Any) -> Any:
    """The schema without nulls, which TOML does not have, without titles, and with descriptions on one
    line."""
    if isinstance(node, list):
        return [_clean(item) for item in node]
    if not isinstance(node, dict):
        return node
    branches = [branch for branch in node.get("anyOf", []) if branch != {"type": "null"}]
    if len(branches) == 1:
        node = {**branches[0], **{key: value for key, value in node.items() if key != "anyOf"}}
    elif branches:
        node = {**node, "anyOf": branches}
    cleaned: dict[str, Any] = {}
    for key, value in node.items():
        if key in ("properties", "$defs"):  # here the keys are names, and may well be "title"
            cleaned[key] = {name: _clean(item) for name, item in value.items()}
        elif key == "description":
            cleaned[key] = " ".join(value.split())
        elif key != "title" and not (key == "default" and value is None):
            cleaned[key] = _clean(value)
    return cleaned
