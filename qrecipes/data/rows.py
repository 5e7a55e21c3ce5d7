"""Rows of a table or a list of objects: .json, .jsonl, .csv and .parquet files, or a Hugging Face dataset.

An entry of a run's `files` is a local file where it begins with `asset:` or ends in one of SUFFIXES, perhaps
with .xz or .gz after it, and may be a glob. Anything else names a dataset: a local folder if there is one of
that name, else one of the hub; then a second entry is its configuration.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from qrecipes.data.files import content_suffix, expand, open_file
from qrecipes.data.text import decode
from qrecipes.errors import ConfigError, DataError

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
MAX_FIELD = 1 << 30
"""Most characters of a field of a .csv file."""


@dataclass(frozen=True)
class Row:
    """One row, and where it stands, for messages."""

    where: str
    values: Mapping[str, Any]


def are_local(files: Iterable[str], key: str) -> bool:
    """Whether `files` are local files rather than the name of a dataset.

    Raises:
        ConfigError: if they are both.
    """
    kinds = {name: name.startswith("asset:") or content_suffix(Path(name)) in SUFFIXES for name in files}
    if len(set(kinds.values())) > 1:
        datasets = ", ".join(repr(name) for name, local in kinds.items() if not local)
        raise ConfigError(
            f"{key}: {datasets} names a dataset, and the other entries are files, which end in "
            f"{', '.join(SUFFIXES)}; name either files or one dataset"
        )
    return all(kinds.values())


def read_rows(files: tuple[str, ...], split: str, key: str) -> tuple[Iterator[Row], str]:
    """The rows of all files in order, or of one split of a dataset, read as they are asked for; and whence.

    Raises:
        ConfigError: if `files` are neither files nor one dataset.
        DataError: if nothing is there; later, naming the file with the line, row or byte that is wrong.
    """
    if not are_local(files, key):
        # Imported here: `datasets` takes a second, which local files need not wait for.
        from qrecipes.data.hub import DatasetName

        name = DatasetName.of(files, split, key)
        dataset = name.load(streaming=False)
        return (Row(f"dataset {name}: row {i}", row) for i, row in enumerate(dataset, 1)), f"dataset {name}"
    if split != "train":
        raise ConfigError(f"data.split: {split!r}, but files have no splits; name the files of that split")
    paths = expand(files, key=key, suffixes=SUFFIXES)
    origin = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files"
    return (row for path in paths for row in _read_file(path)), origin


def _read_file(path: Path) -> Iterator[Row]:
    with open_file(path) as file:
        match content_suffix(path):
            case ".json":
                yield from _json_array(file, path)
            case ".jsonl":
                yield from _json_lines(file, path)
            case ".csv":
                yield from _csv(file, path)
            case ".parquet":
                yield from _parquet(file, path)


def _json_lines(file: IO[bytes], path: Path) -> Iterator[Row]:
    offset = 0
    for number, line in enumerate(file, start=1):
        text = decode(line, path, offset, number)
        offset += len(line)
        if number == 1:
            text = text.removeprefix("\ufeff")
        if text.strip():
            where = f"{path}: line {number}"
            yield _object(_load(text, where), where)


def _json_array(file: IO[bytes], path: Path) -> Iterator[Row]:
    content = _load(decode(file.read(), path, 0).removeprefix("\ufeff"), str(path))
    if not isinstance(content, list):
        raise DataError(
            f"{path}: holds {_kind(content)}, not an array of objects; write one object a line into a .jsonl "
            "file, or an array"
        )
    for number, value in enumerate(content, start=1):
        yield _object(value, f"{path}: row {number}")


def _load(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = "" if ": line " in where else f" in line {error.lineno}"
        raise DataError(
            f"{where}: not JSON{line} at column {error.colno}: {error.msg.removesuffix(' at')}"
        ) from error
    except RecursionError as error:
        raise DataError(f"{where}: not JSON that can be read: nested too deeply") from error


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: holds {_kind(value)}, not an object with named columns")
    return Row(where, value)


def _csv(file: IO[bytes], path: Path) -> Iterator[Row]:
    text = decode(file.read(), path, 0).removeprefix("\ufeff")
    before = csv.field_size_limit(MAX_FIELD)
    reader = csv.reader(StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            raise DataError(f"{path}: empty; a .csv file begins with a line of column names")
        number = 0
        for fields in reader:
            if not fields:
                continue
            number += 1
            where = f"{path}: row {number} (line {reader.line_num})"
            if len(fields) != len(header):
                raise DataError(
                    f"{where}: {len(fields)} fields, and the header names {len(header)} columns; put fields "
                    "that hold commas, quotes or line breaks in double quotes"
                )
            yield Row(where, dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: not CSV: {error}") from error
    finally:
        csv.field_size_limit(before)


def _parquet(file: IO[bytes], path: Path) -> Iterator[Row]:
    try:
        # Parquet is read from its end, which a decompressing file cannot seek to cheaply.
        table = pq.ParquetFile(file if path.suffix.lower() == ".parquet" else BytesIO(file.read()))
        number = 0
        for batch in table.iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path}: row {number}", values)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: damaged or no Parquet file ({error}); copy or download it again") from error


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
