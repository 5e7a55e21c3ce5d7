"""What is wrong with a value, in words: errors of validation as paths and messages."""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qrecipes.config.lines import KeyPath, dotted, from_dotted, literal
from qrecipes.config.run import Run

_EXPECTED = {
    "bool_type": "true or false",
    "dataclass_type": "a table",
    "dict_type": "a table",
    "float_type": "a number",
    "int_from_float": "an integer",
    "int_type": "an integer",
    "list_type": "an array",
    "string_type": "a string",
    "tuple_type": "an array",
}
_LIMITS = {
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "finite_number": "finite",
}


_RUN_KEYS = frozenset(field.name for field in fields(Run))


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a run: where, and what."""

    path: KeyPath
    message: str

    def __str__(self) -> str:
        return f"{dotted(self.path)}: {self.message}" if self.path else self.message


def explain(
    error: ValidationError, value: Any, path: KeyPath, keys: dict[str, str], name: str = ""
) -> list[Problem]:
    """What pydantic found wrong with `value`, which stands at `path` and has the keys `keys`, with their
    meaning."""
    grouped: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        grouped.setdefault(_path_within(value, details), []).append(details)
    # Of a union's branches, the one that got furthest is the one that was meant.
    shallow = {inner[:length] for inner in grouped for length in range(len(inner))}
    problems = []
    for inner, group in grouped.items():
        if inner in shallow:
            continue
        if group[0]["type"] in ("value_error", "assertion_error"):
            problems.append(attribute(str(group[0]["ctx"]["error"]), path, keys, name))
        else:
            problems.append(Problem(path + inner, _describe(group, _at(value, inner), inner, keys)))
    return problems


def attribute(message: str, path: KeyPath, keys: Sequence[str] | dict[str, str], name: str = "") -> Problem:
    """The problem that `message` tells of the table at `path`.

    A message that opens with `KEY: ` is about that key: one of the table's own `keys`, with or without the
    table's `name` before it, or else a key of the run such as `optim.fused`. Any other is about the table.
    """
    head, colon, rest = message.partition(": ")
    if colon and re.fullmatch(r"\w[\w.\[\]]*", head):
        named = from_dotted(head)
        if named[0] in keys:
            return Problem(path + named, rest)
        if named[0] == name and len(named) > 1:
            return Problem(path + named[1:], rest)
        if named[0] in _RUN_KEYS:
            return Problem(named, rest)
    return Problem(path, message)


def unknown_key(key: str, keys: Sequence[str] | dict[str, str]) -> str:
    """The message about a key that nobody reads."""
    return f"unknown key; {did_you_mean(key, list(keys)) or 'the keys here are ' + ', '.join(keys)}"


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """A question naming the closest choice, or nothing where none is close."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""


def dates_in(value: Any, path: KeyPath) -> Iterator[Problem]:
    """TOML has dates and times, a run has none."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from dates_in(item, (*path, key))
    elif isinstance(value, datetime.date | datetime.time):
        yield Problem(path, f"{value.isoformat()} is a date or a time, which no key takes; put it in quotes")


def _path_within(value: Any, details: ErrorDetails) -> KeyPath:
    """The error's location without the names of union branches, which stand in it beside keys."""
    path: KeyPath = ()
    for part in details["loc"]:
        held = range(len(value)) if isinstance(value, list) else value
        if isinstance(held, dict | range) and part in held:
            path, value = (*path, part), value[part]
    if details["type"] == "missing" and isinstance(value, dict):
        path = (*path, details["loc"][-1])
    return path


def _describe(group: list[ErrorDetails], value: Any, path: KeyPath, keys: dict[str, str]) -> str:
    kind, context = group[0]["type"], group[0].get("ctx", {})
    if kind in _EXPECTED:
        expected = list(dict.fromkeys(_EXPECTED.get(details["type"], "") for details in group))
        return f"expected {_listed(expected)}, got {_shown(value)}{_remedy(expected, value)}"
    if kind in _LIMITS:
        return f"{_literal(value)} is out of range; must be {_LIMITS[kind].format(**context)}"
    if kind == "unexpected_keyword_argument":
        return unknown_key(str(path[-1]), keys if len(path) == 1 else ())
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        return f"{_literal(value)} is not one of {', '.join(choices) or context['expected']}" + (
            hint and f"; {hint}"
        )
    if kind == "missing" and isinstance(value, list):
        return f"expected {int(group[-1]['loc'][-1]) + 1} values, got {len(value)}"
    if kind == "too_long":
        return f"expected {context['max_length']} values, got {context['actual_length']}"
    if kind == "missing":
        return f"missing; required: {keys.get(str(path[-1]), 'it has no default')}"
    return f"{group[0]['msg']}, got {_shown(value)}"


def _at(value: Any, path: KeyPath) -> Any:
    for part in path[:-1]:
        value = value[part]
    if path and isinstance(value, dict):
        return value.get(path[-1])  # None where the key is the one that is missing
    return value[path[-1]] if path else value


def _remedy(expected: list[str], value: Any) -> str:
    if expected == ["a string"] and isinstance(value, bool | int | float):
        return f'; write "{_literal(value)}"'
    if expected == ["an integer"] and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if expected == ["an array"] and isinstance(value, str):
        return f'; write ["{value}"]'
    if isinstance(value, str) and _unquoted(value) in expected:
        return f"; write {value.lower()}"
    return ""


def _unquoted(text: str) -> str | None:
    """What a string would be without its quotes, in the words of `_EXPECTED`; Python's True counts."""
    try:
        value = literal(text.lower())
    except ValueError:
        return None
    return {bool: "true or false", int: "an integer", float: "a number"}.get(type(value))


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "an array"
    kinds = {bool: "boolean", int: "integer", float: "float", str: "string"}
    return f"{_literal(value)} ({kinds[type(value)]})"


def _literal(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _listed(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
