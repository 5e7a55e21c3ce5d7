"""Files that ship with qrecipes: a small pretrained model and a small corpus, with sources and licences."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from qrecipes.errors import ConfigError

PREFIX = "asset:"
_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The assets there are."""
    return sorted(folder.name for folder in _FOLDER.iterdir() if (folder / "README.md").is_file())


def resolve(name: str) -> Path:
    """Where `name` lies: "asset:NAME" or "asset:NAME/FILE" in the package, anything else as the path it is.

    Raises:
        ConfigError: if there is no such asset, or no such file in it.
    """
    if not name.startswith(PREFIX):
        return Path(name)
    asset, *inner = PurePosixPath(name.removeprefix(PREFIX)).parts or ("",)
    if asset not in names():
        raise ConfigError(f"{name}: no such asset{_hint(asset, names())}; there are: {', '.join(names())}")
    folder = _FOLDER / asset
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    path = folder.joinpath(*inner)
    if not path.exists() or ".." in inner:
        there = ", ".join(files)
        raise ConfigError(
            f"{name}: no such file in {asset}{_hint('/'.join(inner), files)}; there are: {there}"
        )
    return path


def _hint(name: str, known: list[str]) -> str:
    matches = get_close_matches(name, known, n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
