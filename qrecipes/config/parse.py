"""TOML and overrides into a typed Run, strictly, and back.

`load` reads a file, lays it over the one it extends, applies overrides, decodes every section and holds the
run to the rules that need no model. All that is wrong comes out in one ConfigError, a line each: `FILE:LINE:
KEY: what, rule; remedy`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import tomli_w
from pydantic import TypeAdapter, ValidationError

from qrecipes import locate
from qrecipes.config.lines import KeyPath, dotted, literal, read_toml, split_key
from qrecipes.config.problems import Problem, attribute, dates_in, did_you_mean, explain, unknown_key
from qrecipes.config.rules import check
from qrecipes.config.run import Run
from qrecipes.config.schema import meanings, schema
from qrecipes.errors import ConfigError
from qrecipes.models.build import check_source
from qrecipes.transforms import REGISTRY, TransformConfig
from qrecipes.transforms.base import transform_for

__all__ = ["check", "dump", "load", "resolve_path", "schema"]


@dataclass
class _Source:
    """A TOML table, and where each of its keys was set."""

    table: dict[str, Any]
    default_place: str
    """Where what nobody set would have to be."""
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Where the value at `path`, or else the nearest table around it, was set."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return self.default_place

    def error(self, problems: Sequence[Problem]) -> ConfigError:
        """One line for each problem, with its place."""
        return ConfigError("\n".join(f"{self.place(problem.path)}: {problem}" for problem in problems))


def load(name_or_path: str, overrides: Sequence[str] = (), *, check_model: bool = False) -> Run:
    """The run that a file, or a shipped name, and overrides describe.

    An override is `section.key=value` with a TOML literal: `optim.lr=3e-4`, `data.files=["a", "b"]`,
    `transform.0.rank=64`. What is no literal is a string, so that `output=runs/mine` needs no quotes, unless
    it opens like one (a quote or a bracket). `transform.1.name=...` adds a table where there is one already,
    and `transform=[]` removes them all. `check_model` also asks the model's library whether it has
    the builder and takes the arguments, which imports it.

    Raises:
        ConfigError: with a line for each problem.
    """
    source = _read(resolve_path(name_or_path))
    problems = []
    for override in overrides:
        try:
            _set(source, override)
        except ValueError as error:
            problems.append(f"command line: {override}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return _decode(source, check_model)


def resolve_path(name_or_path: str) -> Path:
    """The file that a path, or the name of a shipped configuration such as "tiny/llm", means.

    Raises:
        ConfigError: if there is none; it names what is close.
    """
    return locate.find("configs", name_or_path)


def dump(run: Run) -> str:
    """The whole run as TOML, defaults included; `load` of it gives an equal run."""
    table = _without_none(asdict(run))
    table.pop("transform")
    text = tomli_w.dumps(table)
    for config in run.transform:
        keys = _without_none(asdict(config))
        inner = {key: keys.pop(key) for key in list(keys) if isinstance(keys[key], dict)}
        text += "\n[[transform]]\n" + tomli_w.dumps({"name": transform_for(config).name, **keys})
        text += "".join("\n" + tomli_w.dumps({"transform": {key: value}}) for key, value in inner.items())
    return text


def _read(path: Path) -> _Source:
    """A file, laid over the one it extends."""
    source = _read_one(path)
    if "extends" not in source.table:
        return source
    extends = source.table.pop("extends")
    place = source.places.pop(("extends",))
    if not isinstance(extends, str):
        raise ConfigError(
            f'{place}: extends: expected one file\'s path or name, a string; write extends = "tiny/llm"'
        )
    try:
        base = _read_one(locate.find_base(path, extends))
    except ConfigError as error:
        raise ConfigError(f"{place}: extends: {error}") from error
    if "extends" in base.table:
        raise ConfigError(
            f"{place}: extends: {extends!r} itself extends {base.table['extends']!r}, and only one level "
            "is read; extend that one, or copy its keys"
        )
    replaced: set[KeyPath] = set()
    table = _merge(base.table, source.table, (), replaced)
    kept = {
        path: where
        for path, where in base.places.items()
        if not any(path[:length] in replaced for length in range(len(path) + 1))
    }
    return _Source(table, source.default_place, kept | source.places)


def _read_one(path: Path) -> _Source:
    table, lines = read_toml(path)
    return _Source(table, f"{path}:1", {key: f"{path}:{line}" for key, line in lines.items()})


def _merge(
    base: dict[str, Any], over: dict[str, Any], path: KeyPath, replaced: set[KeyPath]
) -> dict[str, Any]:
    """`base` with `over` laid over it; paths of the values that `over` replaced are added to `replaced`."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merged[key] = _merge(base[key], value, (*path, key), replaced)
        else:
            merged[key] = value
            replaced.add((*path, key))
    return merged


def _set(source: _Source, override: str) -> None:
    """Apply one override.

    Raises:
        ValueError: if it is not `KEY=VALUE`, or the key leads nowhere.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError("expected KEY=VALUE, such as optim.lr=3e-4")
    parts = split_key(key)
    if parts[0] == "extends":
        raise ValueError("only a file can extend another")
    node: Any = source.table
    path: KeyPath = ()
    for part in parts[:-1]:
        step = _step(node, part, path)
        path = (*path, step)
        if isinstance(node, list):
            if step == len(node):
                node.append({})
            node = node[step]  # type: ignore[index]
        else:
            node = node.setdefault(part, [] if path == ("transform",) else {})
    last = _step(node, parts[-1], path)
    path = (*path, last)
    value = _override_value(text)
    if isinstance(node, list) and last == len(node):
        node.append(value)
    else:
        node[last] = value
    source.places = {place: where for place, where in source.places.items() if place[: len(path)] != path}
    source.places[path] = f"command line: {override}"


def _step(node: Any, part: str, path: KeyPath) -> str | int:
    """`part` as a key of a table or an index of an array, at most one past its end."""
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise ValueError(f"{dotted(path)} is neither a table nor an array, so it has no {part!r}")
    if not part.isdigit() or int(part) > len(node):
        held = (
            f"0 to {len(node) - 1}, and {len(node)} adds one" if node else "no values yet, 0 adds the first"
        )
        raise ValueError(f"{dotted(path)} is an array and {part!r} is not in it; it has {held}")
    return int(part)


def _override_value(text: str) -> Any:
    """The value of an override: a TOML literal, or else a bare word, which is a string."""
    if not text.strip():
        raise ValueError("no value; write '' for an empty string, in quotes that the shell leaves alone")
    try:
        return literal(text)
    except ValueError as error:
        if text.lstrip()[0] in "\"'[{":
            raise ValueError(f"{text!r} opens like a TOML value and is none: {error}") from error
    return text


def _decode(source: _Source, check_model: bool) -> Run:
    hints = get_type_hints(Run, include_extras=True)
    problems = [Problem((key,), _unknown_run_key(key)) for key in source.table if key not in hints]
    values: dict[str, Any] = {}
    for run_field in fields(Run):
        name = run_field.name
        if name not in source.table:
            if run_field.default is MISSING and run_field.default_factory is MISSING:
                problems.append(Problem((name,), f"missing; required: {meanings(Run)[name]}"))
            continue
        if name == "transform":
            values[name], wrong = _transforms(source.table[name])
        else:
            values[name], wrong = _value(hints[name], source.table[name], (name,))
        problems += wrong
    if problems:
        raise source.error(problems)
    try:
        run = Run(**values)
        check(run)
        if check_model:
            check_source(run.model)
    except ConfigError as error:
        raise source.error([attribute(line, (), list(hints)) for line in str(error).splitlines()]) from error
    return run


def _transforms(tables: Any) -> tuple[tuple[TransformConfig, ...], list[Problem]]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        return (), [Problem(("transform",), "expected an array of tables; write [[transform]]")]
    configs, problems = [], []
    for index, table in enumerate(tables):
        path: KeyPath = ("transform", index)
        name = table.get("name")
        if not isinstance(name, str) or name not in REGISTRY:
            problems.append(Problem((*path, "name"), _unknown_transform(name)))
            continue
        keys = {key: value for key, value in table.items() if key != "name"}
        config, wrong = _value(REGISTRY[name].Config, keys, path, name)
        configs.append(config)
        problems += wrong
    return tuple(configs), problems


def _value(hint: Any, value: Any, path: KeyPath, name: str = "") -> tuple[Any, list[Problem]]:
    """`value` as the type `hint`, and what is wrong with it; `name` is that of a transform's table."""
    if dates := list(dates_in(value, path)):
        return None, dates
    try:
        # JSON, because strict validation of Python objects refuses dicts for dataclasses, lists for tuples.
        return _adapter(hint).validate_json(json.dumps(value), strict=True), []
    except ValidationError as error:
        return None, explain(error, value, path, _keys(hint), name)
    except ConfigError as error:
        return None, [attribute(line, path, _keys(hint), name) for line in str(error).splitlines()]


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    """What decodes the type `hint`, once a type: building it reads the source of its class for the fields'
    documentation."""
    return TypeAdapter(hint)


def _keys(hint: Any) -> dict[str, str]:
    """The keys of a table, and what they mean; none for other values."""
    section = next(
        (cls for cls in (hint, *get_args(hint)) if isinstance(cls, type) and is_dataclass(cls)), None
    )
    return meanings(section) if section else {}


def _unknown_run_key(key: str) -> str:
    hints = get_type_hints(Run)
    for section, hint in hints.items():
        if section != "transform" and key in _keys(hint):
            return f"unknown key; did you mean '{section}.{key}'?"
    return unknown_key(key, list(hints))


def _unknown_transform(name: Any) -> str:
    registered = ", ".join(sorted(REGISTRY))
    if name is None:
        return f"missing; required: one of {registered}"
    hint = did_you_mean(name, sorted(REGISTRY)) if isinstance(name, str) else ""
    return f"unknown transform {name!r}; registered: {registered}" + (hint and f"; {hint}")


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }
