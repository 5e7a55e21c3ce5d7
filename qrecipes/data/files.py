"""Names in a run's `data` section -> files that exist, opened whether or not they are compressed."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import glob, has_magic
from pathlib import Path
from typing import IO, cast

from qrecipes.errors import DataError

COMPRESSED = (".xz", ".gz")


def locate(name: str) -> Path:
    """The path a run names: `asset:NAME` is a file that ships with qrecipes, anything else a path."""
    if name.startswith("asset:"):
        # Imported here: a run that names no asset does not look for them.
        from qrecipes.assets import resolve

        return resolve(name)
    return Path(name).expanduser()


def expand(names: Iterable[str], *, key: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Files that `names` stand for, globs sorted, each file once; `key` is the setting that messages name.

    Raises:
        ConfigError: if a name is that of an asset that does not exist.
        DataError: if a name matches nothing, is a folder, or ends in none of `suffixes`.
    """
    found: dict[Path, None] = {}
    missing = []
    for name in names:
        path = locate(name)
        matches = [path] if path.exists() or not has_magic(str(path)) else _sorted_glob(path)
        if not matches or not matches[0].exists():
            missing.append(name)
        else:
            found.update(dict.fromkeys(matches))
    if missing:
        listed = ", ".join(repr(name) for name in missing)
        raise DataError(
            f"{key}: nothing matches {listed} (from {Path.cwd()}); correct the name or the folder to start in"
        )
    for path in found:
        _check_file(path, key, suffixes)
    return list(found)


def content_suffix(path: Path) -> str:
    """Ending that says what is inside: `.jsonl` of both a.jsonl and a.jsonl.xz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def open_file(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed where its name ends in .xz or .gz.

    Raises:
        DataError: if it cannot be opened, or turns out damaged while it is read.
    """
    try:
        with _open(path) as file:
            yield file
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: damaged or cut short ({error}); copy or download it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".xz":
        return cast(IO[bytes], lzma.open(path, "rb"))
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _sorted_glob(pattern: Path) -> list[Path]:
    return sorted(Path(match) for match in glob(str(pattern), recursive=True))


def _check_file(path: Path, key: str, suffixes: tuple[str, ...]) -> None:
    if path.is_dir():
        raise DataError(f"{key}: {path} is a folder; name its files, such as '{path / ('*' + suffixes[0])}'")
    if content_suffix(path) not in suffixes:
        compressed = f", each also as {' or '.join(COMPRESSED)}" if suffixes != (".bin",) else ""
        raise DataError(f"{path}: unknown kind of file; {key} takes {', '.join(suffixes)}{compressed}")
