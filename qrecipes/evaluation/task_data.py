"""Rows of the tasks that ship, from files in a user's folder; task definitions name these functions."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from qrecipes.data.files import COMPRESSED, open_file
from qrecipes.data.text import decode
from qrecipes.errors import ConfigError, DataError

LAYOUT = "qrecipes/evaluation/tasks/README.md"
"""Where the files and their columns are listed."""

_TITLE = re.compile(r"^ = [^=].*[^=] = $", re.MULTILINE)


def load(
    *,
    files: dict[str, str],
    columns: list[str],
    data_folder: str | None = None,
    where: dict[str, str] | None = None,
    **metadata: Any,
) -> DatasetDict:
    """Splits of a task: name -> rows of a .jsonl file below the folder, those that match `where`.

    Raises:
        ConfigError: if no folder was given.
        DataError: naming the missing file, or the line that is no row of the task.
    """
    splits = {}
    for split, name in files.items():
        path = find(data_folder, name)
        rows = [row for row in read_rows(path, tuple(columns)) if _matches(row, where)]
        if not rows:
            raise DataError(f"{path}: no row has {where}; see {LAYOUT}")
        splits[split] = Dataset.from_list(rows)
    return DatasetDict(splits)


def load_wikitext(*, files: dict[str, str], data_folder: str | None = None, **metadata: Any) -> DatasetDict:
    """Articles of a WikiText file, a row each in the column `page`; its title, ` = TITLE = `, begins each.

    Raises:
        ConfigError, DataError: as `load`.
    """
    return DatasetDict(
        {
            split: Dataset.from_list([{"page": page} for page in _pages(find(data_folder, name))])
            for split, name in files.items()
        }
    )


def find(folder: str | None, name: str) -> Path:
    """The file `name` below `folder`, plain or compressed.

    Raises:
        ConfigError: if no folder was given.
        DataError: if there is no such file.
    """
    if folder is None:
        raise ConfigError(f"--data: the task reads {name} in a folder of task files; name the folder")
    for suffix in ("", *COMPRESSED):
        path = Path(folder) / f"{name}{suffix}"
        if path.is_file():
            return path
    raise DataError(
        f"--data: {folder} has no {name} (nor {' or '.join(name + suffix for suffix in COMPRESSED)}); put it "
        f"there, as {LAYOUT} says, or leave --data out to take the task from the hub"
    )


@lru_cache(maxsize=8)  # MMLU reads one file for 57 tasks
def read_rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of a .jsonl file, each with all of `columns`.

    Raises:
        DataError: naming the line that is no JSON, or the column that it lacks.
    """
    rows = []
    with open_file(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}: line {number}: not JSON: {error}") from error
            missing = [name for name in columns if not isinstance(row, dict) or name not in row]
            if missing:
                raise DataError(f"{path}: line {number}: no {missing[0]!r}; see {LAYOUT}")
            rows.append({name: row[name] for name in columns})
    return rows


def _matches(row: dict[str, Any], where: dict[str, str] | None) -> bool:
    return all(row[name] == value for name, value in (where or {}).items())


def _pages(path: Path) -> list[str]:
    with open_file(path) as file:
        text = decode(file.read(), path, 0)
    starts = [match.start() for match in _TITLE.finditer(text)]
    if not starts:
        raise DataError(
            f"{path}: no line ` = TITLE = ` begins an article; is it a WikiText file? see {LAYOUT}"
        )
    starts[0] = 0
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
