"""Text corpora: .txt, .jsonl and .parquet files, whole or compressed -> documents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from qrecipes.data.files import content_suffix, open_file
from qrecipes.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".parquet")


def documents(paths: Iterable[Path], *, column: str, separator: str | None) -> Iterator[str]:
    """The documents of all files, in order.

    A .txt file is one document, unless lines equal to `separator` divide it; .jsonl and .parquet files hold
    one document a row, in `column`.

    Raises:
        DataError: naming the file, and the line, row or byte that is wrong.
    """
    for path in paths:
        with open_file(path) as file:
            match content_suffix(path):
                case ".txt":
                    yield from _plain(file, path, separator)
                case ".jsonl":
                    yield from _json_lines(file, path, column)
                case ".parquet":
                    yield from _parquet(file, path, column)


def decode(data: bytes, path: Path, offset: int, line: int | None = None) -> str:
    """UTF-8 `data`, which begins at byte `offset` of the (decompressed) file, and is its `line`-th line.

    Raises:
        DataError: naming the byte that is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = path if line is None else f"{path}: line {line}"
        raise DataError(
            f"{where}: not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}); convert the "
            "file, such as with `iconv -f LATIN1 -t UTF-8`"
        ) from error


def text_of(row: dict[str, Any], column: str, where: str) -> str:
    """The document in one row; `where` names the row in messages.

    Raises:
        DataError: if the row has no such column, or it holds no text.
    """
    if column not in row:
        raise DataError(
            f"{where}: no column {column!r}; there are {', '.join(row) or 'none'}; set data.text_column"
        )
    text = row[column]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: column {column!r} holds {type(text).__name__}, not text; set data.text_column"
        )
    return text


def _lines(file: IO[bytes], path: Path) -> Iterator[str]:
    offset = 0
    for line in file:
        text = decode(line, path, offset)
        yield text.removeprefix("\ufeff") if offset == 0 else text
        offset += len(line)


def _plain(file: IO[bytes], path: Path, separator: str | None) -> Iterator[str]:
    """The file; or its parts, without the line break before a separator, which belongs to the form."""
    if separator is None:
        yield decode(file.read(), path, 0).removeprefix("\ufeff")
        return
    lines: list[str] = []
    for line in _lines(file, path):
        if line.rstrip("\r\n") == separator:
            yield "".join(lines).removesuffix("\n")
            lines = []
        else:
            lines.append(line)
    yield "".join(lines).removesuffix("\n")


def _json_lines(file: IO[bytes], path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(file, path), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not JSON at column {error.colno}: {error.msg.removesuffix(' at')}"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: holds {type(row).__name__}, not an object with a key {column!r}")
        text = text_of(row, column, where)
        # JSON can spell half of a character pair, which no tokenizer takes.
        if "\\u" in line and any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(f"{where}: {column!r} holds half of a surrogate pair, which is no character")
        yield text


def _parquet(file: IO[bytes], path: Path, column: str) -> Iterator[str]:
    try:
        # Parquet is read from its end, which a decompressing file cannot seek to cheaply.
        table = pq.ParquetFile(file if path.suffix.lower() == ".parquet" else BytesIO(file.read()))
        names = table.schema_arrow.names
        if column not in names:
            raise DataError(
                f"{path}: no column {column!r}; there are {', '.join(names)}; set data.text_column"
            )
        number = 0
        for batch in table.iter_batches(columns=[column]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield text_of({column: text}, column, f"{path}: row {number}")
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: damaged or no Parquet file ({error}); copy or download it again") from error
