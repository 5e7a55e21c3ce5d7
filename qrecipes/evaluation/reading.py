"""A text to measure, from a file of any kind that holds one."""

from __future__ import annotations

from pathlib import Path

from qrecipes.data.files import content_suffix, locate, open_file
from qrecipes.data.text import decode, documents
from qrecipes.errors import DataError

BETWEEN = "\n\n"
"""What stands between the rows of a .jsonl or .parquet file, as the field joins the rows of WikiText-2."""


def read_text(name: str, *, column: str = "text") -> str:
    """The text in a file, a path or `asset:NAME/FILE`, whole or compressed (.xz, .gz).

    The rows of a .jsonl or .parquet file, in `column`, are joined with `BETWEEN`; any other file is UTF-8 as
    it stands.

    Raises:
        ConfigError: if there is no such asset.
        DataError: if the file cannot be read, holds no text, or a row of it is wrong.
    """
    path = locate(name)
    if path.is_dir():
        raise DataError(f"--text: {name} is a folder; name a file")
    if content_suffix(path) in (".jsonl", ".parquet"):
        text = _joined_rows(path, column)
    else:
        with open_file(path) as file:
            text = decode(file.read(), path, 0).removeprefix("\ufeff")
    if not text.strip():
        raise DataError(f"--text: {name} holds no text; name another file")
    return text


def _joined_rows(path: Path, column: str) -> str:
    try:
        return BETWEEN.join(documents([path], column=column, separator=None))
    except DataError as error:  # whose remedy is that of a run's configuration
        raise DataError(str(error).replace("set data.text_column", "give --column")) from error
