"""Where recipes and configurations are, in a checkout or in an installed wheel."""

from __future__ import annotations

import ast
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qrecipes.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent

Kind = Literal["recipes", "configs"]

_SUFFIX: dict[Kind, str] = {"recipes": ".py", "configs": ".toml"}


@dataclass(frozen=True)
class Shipped:
    """A recipe or a configuration that ships with qrecipes."""

    name: str
    """Path below its folder, without suffix."""
    path: Path
    command: str | None
    """What runs it, from a configuration's first line, `# run: COMMAND`."""
    description: str
    """One line: the next comment of a configuration, the first line of a recipe's docstring."""


def shipped(kind: Kind) -> Path:
    """Directory of shipped recipes or configurations.

    Raises:
        FileNotFoundError: if the package was built without them.
    """
    packaged = _PACKAGE / f"_{kind}"
    if packaged.is_dir():
        return packaged
    # The test for pyproject.toml: beside a broken wheel lies torchtune's package `recipes`.
    if (_PACKAGE.parent / "pyproject.toml").is_file():
        return _PACKAGE.parent / kind
    raise FileNotFoundError(f"{packaged} is missing: this wheel was built without its {kind}")


def list_recipes() -> list[Shipped]:
    """Every shipped recipe, by name."""
    return [
        Shipped(_name(path, "recipes"), path, None, _docstring_line(path))
        for path in sorted(shipped("recipes").rglob("*.py"))
    ]


def list_configs() -> list[Shipped]:
    """Every shipped configuration, by name."""
    return [
        Shipped(_name(path, "configs"), path, *_opening_comments(path))
        for path in sorted(shipped("configs").rglob("*.toml"))
    ]


def find(kind: Kind, name_or_path: str) -> Path:
    """The file that a path or a shipped name means, the path winning; a name may leave out its suffix.

    Raises:
        ConfigError: if there is none; it names what is close.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    suffix = _SUFFIX[kind]
    name = name_or_path.removesuffix(suffix)
    candidate = shipped(kind) / f"{name}{suffix}"
    if candidate.is_file() and not path.is_absolute():
        return candidate
    noun = kind.removesuffix("s")
    names = [_name(file, kind) for file in sorted(shipped(kind).rglob(f"*{suffix}"))]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if Path(f"{name_or_path}{suffix}").is_file():
        close.insert(0, f"{name_or_path}{suffix}")
    remedy = f"did you mean {' or '.join(map(repr, close))}?" if close else "`qrecipes ls` lists what ships"
    raise ConfigError(f"{name_or_path}: neither a file nor the name of a shipped {noun}; {remedy}")


def find_base(config: Path, extends: str) -> Path:
    """The file that `extends` in `config` means: a path relative to the file, or else a shipped name.

    Raises:
        ConfigError: if there is none.
    """
    beside = config.parent / extends
    return beside if beside.is_file() else find("configs", extends)


def _name(path: Path, kind: Kind) -> str:
    return path.relative_to(shipped(kind)).with_suffix("").as_posix()


def _docstring_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return docstring.partition("\n")[0] if docstring else ""


def _opening_comments(path: Path) -> tuple[str | None, str]:
    command, description = None, ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment = line.lstrip("# ")
        if comment.startswith("run: "):
            command = comment.removeprefix("run: ")
        else:
            description = comment
            break
    return command, description
