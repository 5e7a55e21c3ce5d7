"""A corpus as numbered chunks of documents that can be read again from any of them.

The pieces of a corpus (files, or a dataset's split) come one after the other, and no chunk spans two. So the
place after a chunk is the number of its piece and how many of its documents were read, whoever tokenizes the
chunk and when.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qrecipes.data.files import expand
from qrecipes.data.text import SUFFIXES, documents, text_of
from qrecipes.errors import DataError

if TYPE_CHECKING:
    from qrecipes.config.tokenization import Tokenization
    from qrecipes.data.hub import DatasetName

CHUNK_CHARACTERS = 1 << 20
"""Characters of documents after which a chunk ends: some tenths of a second of work for a tokenizer."""
CHUNK_DOCUMENTS = 4096
"""Most documents of a chunk."""


@dataclass(frozen=True)
class Cursor:
    """A place in a corpus: `documents` of piece number `piece` are read."""

    piece: int = 0
    documents: int = 0
    crc: int = 0
    """CRC-32 of those documents, to notice that a file has changed before reading on in it."""

    def after(self, text: str) -> Cursor:
        """The place one document further."""
        return Cursor(self.piece, self.documents + 1, zlib.crc32(text.encode(), self.crc))


class Piece(Protocol):
    """A part of a corpus that is read from its beginning."""

    @property
    def split(self) -> str:
        """Where its documents go: "train" or "validation"."""

    def identity(self) -> dict[str, Any]:
        """What says that it is still the same, fit for JSON."""

    def read(self, start: Cursor) -> Iterator[str]:
        """The documents after `start`.

        Raises:
            DataError: if the piece cannot be read, or its documents before `start` are not what they were.
        """


@dataclass(frozen=True)
class FilePiece:
    """One file of documents."""

    path: Path
    split: str
    column: str
    separator: str | None

    def identity(self) -> dict[str, Any]:
        """Name and size; not the folder, so that a corpus may be moved."""
        return {"name": self.path.name, "bytes": self.path.stat().st_size}

    def read(self, start: Cursor) -> Iterator[str]:
        """The documents after `start`, those before it read again and compared."""
        texts = documents([self.path], column=self.column, separator=self.separator)
        passed = Cursor(start.piece)
        for text in islice(texts, start.documents):
            passed = passed.after(text)
        if passed != start:
            raise DataError(
                f"{self.path}: its first {start.documents:,} documents are not those that were tokenized "
                "before; put the old file back, or start again with --overwrite"
            )
        yield from texts


@dataclass(frozen=True)
class DatasetPiece:
    """One split of a Hugging Face dataset."""

    name: DatasetName
    split: str
    column: str
    streaming: bool

    def identity(self) -> dict[str, Any]:
        """Name, configuration and split."""
        return {"name": str(self.name)}

    def read(self, start: Cursor) -> Iterator[str]:
        """The documents after `start`; those before it are skipped by number."""
        from datasets.exceptions import DatasetsError

        dataset = self.name.load(streaming=self.streaming)
        known = dataset.column_names  # None of a stream that has not looked at its first row
        if known is not None and self.column not in known:
            raise DataError(
                f"dataset {self.name}: no column {self.column!r}; there are {', '.join(known)}; set "
                "text_column"
            )
        number = start.documents
        try:
            for row in dataset.select_columns([self.column]).skip(start.documents):
                number += 1
                yield text_of(row, self.column, f"dataset {self.name}: row {number}")
        except (OSError, ValueError, DatasetsError) as error:
            raise DataError(
                f"dataset {self.name}: reading failed after row {number}: {error}; run the same command "
                "again to go on from there"
            ) from error


@dataclass(frozen=True)
class Chunk:
    """Documents that are tokenized together."""

    split: str
    texts: list[str]
    after: Cursor
    """The place in the corpus after it."""
    blank: int
    """Documents left out because they hold nothing but blanks."""
    finished: dict[str, Any] | None = None
    """What the piece that ends with this chunk was, with its number of documents."""


@dataclass
class _Gathering:
    """The documents of the next chunk."""

    texts: list[str] = field(default_factory=list)
    characters: int = 0
    blank: int = 0

    def add(self, text: str) -> None:
        if text.strip():
            self.texts.append(text)
            self.characters += len(text)
        else:
            self.blank += 1

    def is_full(self) -> bool:
        return self.characters >= CHUNK_CHARACTERS or len(self.texts) + self.blank >= CHUNK_DOCUMENTS


def chunks(pieces: Sequence[Piece], start: Cursor) -> Iterator[Chunk]:
    """The chunks of the corpus after `start`; a piece's last may be empty.

    Raises as `Piece.read`.
    """
    for number in range(start.piece, len(pieces)):
        piece, cursor = pieces[number], start if number == start.piece else Cursor(number)
        gathering = _Gathering()
        for text in piece.read(cursor):
            cursor = cursor.after(text)
            gathering.add(text)
            if gathering.is_full():
                yield Chunk(piece.split, gathering.texts, cursor, gathering.blank)
                gathering = _Gathering()
        source = piece.identity() | {"split": piece.split, "documents": cursor.documents}
        yield Chunk(piece.split, gathering.texts, Cursor(number + 1), gathering.blank, source)


def pieces_of(config: Tokenization) -> list[Piece]:
    """The corpus that `config` names: what is trained on first, then what is held out.

    Raises:
        ConfigError, DataError: if a file does not exist or is of no known kind.
    """
    if config.source == "dataset":
        return list(_dataset_pieces(config))
    column, separator = config.text_column, config.document_separator
    training = expand(config.files, key="files", suffixes=SUFFIXES)
    held_out = expand(config.validation_files, key="validation_files", suffixes=SUFFIXES)
    _check_apart(training, held_out)
    return [
        *(FilePiece(path, "train", column, separator) for path in training),
        *(FilePiece(path, "validation", column, separator) for path in held_out),
    ]


def _dataset_pieces(config: Tokenization) -> Iterator[Piece]:
    # Imported here: `datasets` takes a second, which files need not wait for.
    from qrecipes.data.hub import DatasetName

    def piece(files: tuple[str, ...], split: str, becomes: str) -> Piece:
        name = DatasetName.of(files, split, "files")
        return DatasetPiece(name, becomes, config.text_column, config.streaming)

    yield piece(config.files, config.split, "train")
    if config.validation_files or config.validation_split:
        files = config.validation_files or config.files
        yield piece(files, config.validation_split or config.split, "validation")


def _check_apart(training: Iterable[Path], held_out: Iterable[Path]) -> None:
    shared = set(training) & set(held_out)
    if shared:
        raise DataError(f"validation_files: {min(shared)} is also in files; hold out other files")
