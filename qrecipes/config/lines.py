"""On which line of a TOML text each key is set.

A scanner for text that `tomli` has already accepted, so it need not look for mistakes. Keys inside an array
or an inline table have no entry: they fall back to the line of the key that holds them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tomli

from qrecipes.errors import ConfigError

KeyPath = tuple[str | int, ...]

_TOKEN = re.compile(
    r"""
      \"{3} (?: \\. | [^\\] )*? \"{3,5}      # multi-line basic string; may end in two quotes of its own
    | '{3} .*? '{3,5}                        # multi-line literal string
    | " (?: \\. | [^"\\\n] )* "
    | ' [^'\n]* '
    | \# [^\n]*
    | [A-Za-z0-9_-]+
    | \n
    | .
    """,
    re.VERBOSE | re.DOTALL,
)


class _Token(NamedTuple):
    text: str
    line: int


def key_lines(text: str) -> dict[KeyPath, int]:
    """Line, from 1, of every table and key of valid TOML; tables of an array have their index in the path."""
    lines: dict[KeyPath, int] = {}
    newest: dict[KeyPath, int] = {}  # index of the last table of each array of tables
    table: KeyPath = ()
    for statement in _statements(text):
        line = statement[0].line
        if statement[0].text == "[":
            is_array = statement[1].text == "["
            closing = next(i for i, token in enumerate(statement) if token.text == "]")
            table = _within_newest(_key(statement[1 + is_array : closing]), newest, is_array)
            path = table
        else:
            equals = next(i for i, token in enumerate(statement) if token.text == "=")
            path = table + _key(statement[:equals])
        for length in range(1, len(path) + 1):
            lines.setdefault(path[:length], line)
    return lines


def split_key(text: str) -> tuple[str, ...]:
    """The parts of a dotted key: `a."b.c"` is a, then b.c.

    Raises:
        ValueError: if it is not a TOML key.
    """
    try:
        tomli.loads(f"{text} = 0")
    except tomli.TOMLDecodeError as error:
        raise ValueError(f"{text!r} is not a key") from error
    return _key([token for token in _tokens(text) if token.text.strip()])


def literal(text: str) -> Any:
    """The value that `text` is in TOML.

    Raises:
        ValueError: if it is none, or more than one.
    """
    # Within an inline table a comment or a second line cannot end the value unseen.
    table = tomli.loads(f"all = {{ value = {text} }}")["all"]
    if table.keys() != {"value"}:
        raise ValueError("more than one value")
    return table["value"]


def dotted(path: KeyPath) -> str:
    """A path as messages spell it: `transform[0].rank`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def from_dotted(text: str) -> KeyPath:
    """The path that `dotted` spelled."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"[.\[\]]+", text) if part)


def _within_newest(key: tuple[str, ...], newest: dict[KeyPath, int], is_array: bool) -> KeyPath:
    """The path of a table header: an array on the way means its newest table, and `[[key]]` adds one to its
    own."""
    path: KeyPath = ()
    for part in key[:-1]:
        path = (*path, part)
        if path in newest:
            path = (*path, newest[path])
    path = (*path, key[-1])
    if is_array:
        newest[path] = newest.get(path, -1) + 1
        path = (*path, newest[path])
    return path


def _key(tokens: list[_Token]) -> tuple[str, ...]:
    return tuple(
        tomli.loads(f"key = {token.text}")["key"] if token.text[0] in "\"'" else token.text
        for token in tokens
        if token.text != "."
    )


def _statements(text: str) -> Iterator[list[_Token]]:
    """Headers and assignments, each as its tokens without comments and white space."""
    statement: list[_Token] = []
    depth = 0
    for token in _tokens(text):
        if token.text == "\n" and depth == 0:
            if statement:
                yield statement
            statement = []
        elif token.text.strip() and not token.text.startswith("#"):
            depth += (token.text in ("[", "{")) - (token.text in ("]", "}"))
            statement.append(token)
    if statement:
        yield statement


def _tokens(text: str) -> Iterator[_Token]:
    line = 1
    for match in _TOKEN.finditer(text):
        yield _Token(match.group(), line)
        line += match.group().count("\n")


def read_toml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """A file's table, and the line on which each of its keys is set.

    Raises:
        ConfigError: if it cannot be read, naming the line that is not UTF-8 or not TOML.
    """
    try:
        text = path.read_bytes().decode().replace("\r\n", "\n")
        table = tomli.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8, which TOML is; save the file as UTF-8") from error
    except tomli.TOMLDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not TOML: {error.msg}, at column {error.colno}") from error
    return table, key_lines(text)
