"""Text -> a folder of tokenized shards, by several processes, whole again after any interruption.

    FOLDER/index.json           every shard with its checksum, the settings and what was read
    FOLDER/tokenizer/           the tokenizer's files; a run names this folder as its tokenizer.path
    FOLDER/train/00000.bin      a shard, with 00000.json beside it
    FOLDER/validation/...       held-out documents, where there are any

Until `index.json` is there, `progress.json` says up to where in the corpus the shards go; a run that finds it
cuts them back to that place and goes on. The folder is a function of the corpus, the tokenizer and the
settings: not of the number of processes, and not of how often the work was interrupted.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrecipes.data.corpus import Chunk, Cursor, Piece, chunks, pieces_of
from qrecipes.data.encoding import Result, encode_in_order
from qrecipes.data.files import COMPRESSED, open_file
from qrecipes.data.packing import require_separator, separators
from qrecipes.data.shards import ShardWriter, write_json
from qrecipes.data.tokenizers import Tokenizer, load_tokenizer
from qrecipes.data.tokens import DTYPES, INDEX, PROGRESS, read_index
from qrecipes.data.vocabulary import identity
from qrecipes.errors import ConfigError, DataError

if TYPE_CHECKING:
    from qrecipes.config.run import TokenizerSection
    from qrecipes.config.tokenization import Tokenization

SPLITS = ("train", "validation")
TOKENIZER = "tokenizer"
"""Folder that the tokenizer's files are copied to."""
VERSION = 1
"""Of the layout, in index.json."""
COMMIT_S = 5.0
"""Most seconds of work that are lost when the process is killed."""


@dataclass(frozen=True)
class Report:
    """What a folder holds, and how fast this process made its part of it."""

    folder: Path
    tokens: dict[str, int]
    """By split."""
    documents: dict[str, int]
    """By split."""
    text_bytes: dict[str, int]
    """UTF-8 bytes of the documents, by split."""
    blank_documents: int
    """Left out."""
    shards: int
    seconds: float
    """Wall time of this process, from before the first document is read to the last shard."""
    new_bytes: int
    """UTF-8 bytes that this process tokenized; less than all where it went on with an interrupted one."""
    encoding_cpu_s: float
    """Processor time of making tokens of them, over all processes."""
    reading_cpu_s: float
    """Processor time of reading documents and writing shards."""

    @property
    def mb_per_s(self) -> float:
        """10^6 bytes of text a second of wall time."""
        return self.new_bytes / 1e6 / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_byte(self) -> float:
        """Tokens, those between documents included, for each byte of text."""
        return sum(self.tokens.values()) / max(1, sum(self.text_bytes.values()))


Notify = Callable[[Report], None]


def tokenize(
    config: Tokenization, *, workers: int, overwrite: bool = False, notify: Notify | None = None
) -> Report:
    """Write the folder that `config` describes, or what is missing of it; `notify` hears of every chunk.

    `workers` processes tokenize while this one reads and writes; 0 does all in this one.

    Raises:
        ConfigError: if the type is too small for the vocabulary, or the folder was made with other settings.
        DataError: if the corpus cannot be read, has no text for a split, or has changed since it was begun.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    numbers = [*range(tokenizer.vocab_size)[-1:], *separators(tokenizer)[0], *separators(tokenizer)[1]]
    dtype = choose_dtype(config.dtype, max(numbers) + 1)
    pieces = pieces_of(config)
    made_with = {"dtype": dtype, "tokenizer": identity(tokenizer), "settings": settings(config)}
    folder = Path(config.output)
    with _alone(folder):
        if overwrite:
            remove(folder)
        index = _finished(folder, made_with)
        if index is None:
            job = _Job(config, tokenizer, pieces, made_with, folder)
            try:
                return job.run(workers, notify)
            except OSError as error:
                raise DataError(
                    f"{folder}: cannot be written: {error.strerror or error}; the same command goes on from "
                    "here"
                ) from error
    return _report(folder, index)


def choose_dtype(wanted: str, vocab_size: int) -> str:
    """The type that `wanted` names, or the smallest that holds a vocabulary of that size for "auto".

    Raises:
        ConfigError: if the type is too small.
    """
    fits = next(name for name, dtype in DTYPES.items() if vocab_size <= 1 << 8 * dtype.itemsize)
    if wanted == "uint16" and fits != "uint16":
        raise ConfigError(
            f"dtype: uint16 holds 65,536 values, the tokenizer has {vocab_size:,}; set it to uint32 or auto"
        )
    return fits if wanted == "auto" else wanted


def settings(config: Tokenization) -> dict[str, Any]:
    """The settings that decide what tokens come out, beside the tokenizer and the files themselves."""
    kept = asdict(config)
    for key in ("output", "tokenizer", "dtype", "streaming", "files", "validation_files"):
        del kept[key]
    if config.source == "dataset":
        kept |= {"files": list(config.files), "validation_files": list(config.validation_files)}
    return kept | {"pattern": config.tokenizer.pattern}


def remove(folder: Path) -> None:
    """Remove what `tokenize` wrote into `folder`, and nothing else."""
    if not any((folder / name).exists() for name in (INDEX, PROGRESS)):
        return
    # What says that the folder is ours goes last, so that an interrupted removal can be finished.
    for name in (*SPLITS, TOKENIZER):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (INDEX, PROGRESS):
        (folder / name).unlink(missing_ok=True)


class _Job:
    """One folder while it is being written."""

    def __init__(
        self,
        config: Tokenization,
        tokenizer: Tokenizer,
        pieces: list[Piece],
        made_with: dict[str, Any],
        folder: Path,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.pieces = pieces
        self.made_with = made_with
        self.folder = folder
        progress = self._begun() or {"cursor": {}, "blank": 0, "sources": [], "splits": {}}
        self.cursor = Cursor(**progress["cursor"])
        self.blank: int = progress["blank"]
        self.sources: list[dict[str, Any]] = progress["sources"]
        self._check_sources()
        labels = {
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": {
                key: made_with["tokenizer"][key] for key in ("files", "fingerprint", "bos_id", "eos_id")
            },
        }
        self.writers = {
            split: ShardWriter(
                folder / split,
                dtype=made_with["dtype"],
                shard_tokens=config.shard_tokens,
                labels=labels,
                state=progress["splits"].get(split),
            )
            for split in SPLITS
        }
        self.bytes_before = self._text_bytes()
        self.encoding_cpu_s = 0.0
        self.encodes_itself = False
        self.cpu_start = time.process_time()

    def run(self, workers: int, notify: Notify | None) -> Report:
        """Write what is missing."""
        start = committed = time.monotonic()
        self.cpu_start = time.process_time()
        self.encodes_itself = not workers
        if not (self.folder / PROGRESS).exists():
            self._commit()
        encoded = encode_in_order(
            chunks(self.pieces, self.cursor),
            self.config.tokenizer,
            dtype=self.made_with["dtype"],
            validation_fraction=self.config.validation_fraction,
            workers=workers,
        )
        try:
            for chunk, result in encoded:
                self._take(chunk, result)
                if time.monotonic() - committed >= COMMIT_S:
                    self._commit()
                    committed = time.monotonic()
                if notify is not None:
                    notify(self._report(time.monotonic() - start))
            self._finish()
        finally:
            for writer in self.writers.values():
                writer.close()
        return self._report(time.monotonic() - start)

    def _take(self, chunk: Chunk, result: Result) -> None:
        for split, part in result.parts.items():
            self.writers[split].append(part.tokens, part.ends, part.text_bytes)
        self.encoding_cpu_s += result.cpu_s
        self.blank += chunk.blank
        self.cursor = chunk.after
        if chunk.finished is not None:
            self.sources.append(chunk.finished)
        if sum(writer.documents for writer in self.writers.values()) > 1:
            require_separator(self.tokenizer, "files")

    def _commit(self) -> None:
        for writer in self.writers.values():
            writer.flush()
        progress = self.made_with | {
            "cursor": asdict(self.cursor),
            "blank": self.blank,
            "sources": self.sources,
            "splits": {split: writer.state() for split, writer in self.writers.items()},
        }
        write_json(self.folder / PROGRESS, progress)

    def _finish(self) -> None:
        self._check_not_empty()
        for writer in self.writers.values():
            writer.finish()
        copy_tokenizer(self.tokenizer, self.config.tokenizer, self.folder / TOKENIZER)
        index = {"version": VERSION} | self.made_with
        index |= {
            "vocab_size": self.tokenizer.vocab_size,
            "blank_documents": self.blank,
            "splits": {
                split: {
                    "tokens": writer.tokens,
                    "documents": writer.documents,
                    "text_bytes": writer.text_bytes,
                    "shards": writer.shards,
                }
                for split, writer in self.writers.items()
                if writer.tokens
            },
            "sources": self.sources,
        }
        write_json(self.folder / INDEX, index)
        (self.folder / PROGRESS).unlink()

    def _check_not_empty(self) -> None:
        read = f"{sum(source['documents'] for source in self.sources):,} documents, {self.blank:,} blank"
        if not self.writers["train"].tokens:
            raise DataError(f"files: no text to train on ({read}); name other files")
        if self._wants_validation() and not self.writers["validation"].tokens:
            raise DataError(
                f"validation_fraction: {self.config.validation_fraction} held out no document ({read}); "
                "raise it, or name validation_files"
            )

    def _wants_validation(self) -> bool:
        config = self.config
        return bool(config.validation_fraction or config.validation_files or config.validation_split)

    def _begun(self) -> dict[str, Any] | None:
        """What an earlier process wrote about its part of the work."""
        path = self.folder / PROGRESS
        if not path.exists():
            strangers = sorted(p.name for p in self.folder.iterdir() if p.name != f"{PROGRESS}.part")
            if strangers:
                raise ConfigError(
                    f"output: {self.folder} holds {strangers[0]!r} and is no folder of tokenized data; name "
                    "another, or empty it"
                )
            return None
        progress = read_index(path)
        _check_same(path, progress, self.made_with)
        return progress

    def _check_sources(self) -> None:
        """What was read before must still be there, in front of whatever was added."""
        for number, source in enumerate(self.sources):
            piece = self.pieces[number] if number < len(self.pieces) else None
            now = None if piece is None else piece.identity() | {"split": piece.split}
            before = {key: value for key, value in source.items() if key != "documents"}
            if now != before:
                raise ConfigError(
                    f"files: number {number + 1} was {before} when {self.folder} was begun, now it is "
                    f"{now or 'missing'}; name the same files, or start again with --overwrite"
                )

    def _text_bytes(self) -> int:
        return sum(writer.text_bytes for writer in self.writers.values())

    def _report(self, seconds: float) -> Report:
        own_cpu_s = time.process_time() - self.cpu_start
        writers = {split: writer for split, writer in self.writers.items() if writer.tokens}
        return Report(
            folder=self.folder,
            tokens={split: writer.tokens for split, writer in writers.items()},
            documents={split: writer.documents for split, writer in writers.items()},
            text_bytes={split: writer.text_bytes for split, writer in writers.items()},
            blank_documents=self.blank,
            shards=sum(len(writer.shards) for writer in writers.values()),
            seconds=seconds,
            new_bytes=self._text_bytes() - self.bytes_before,
            encoding_cpu_s=self.encoding_cpu_s,
            reading_cpu_s=own_cpu_s - (self.encoding_cpu_s if self.encodes_itself else 0.0),
        )


def copy_tokenizer(tokenizer: Tokenizer, section: TokenizerSection, folder: Path) -> None:
    """Copy the tokenizer's files, so that a tokenizer loaded from `folder` begins and ends documents alike.

    Raises:
        DataError: if it would not.
    """
    if not tokenizer.files:
        return
    folder.mkdir(exist_ok=True)
    # Beginning and end may be named by files that are no part of the tokenizer: copied where they matter.
    beside = [tokenizer.files[0].with_name(name) for name in ("generation_config.json", "config.json")]
    for files in (tokenizer.files, *([file] for file in beside if file.exists())):
        for file in files:
            _copy(file, folder)
        copied = load_tokenizer(replace(section, path=str(folder)))
        if (copied.bos_id, copied.eos_id) == (tokenizer.bos_id, tokenizer.eos_id):
            return
    raise DataError(
        f"{folder}: the copied tokenizer begins and ends documents with {copied.bos_id} and {copied.eos_id}, "
        f"not with {tokenizer.bos_id} and {tokenizer.eos_id}; name bos_token and eos_token in "
        "tokenizer_config.json beside the original"
    )


def _copy(file: Path, folder: Path) -> None:
    """Copy a file, decompressed: a folder is searched for tokenizers by their plain names."""
    name = file.stem if file.suffix in COMPRESSED else file.name
    with open_file(file) as source, (folder / name).open("wb") as copy:
        shutil.copyfileobj(source, copy)


def _finished(folder: Path, made_with: dict[str, Any]) -> dict[str, Any] | None:
    """The folder's index, where it is complete."""
    path = folder / INDEX
    if not path.exists():
        return None
    index = read_index(path)
    _check_same(path, index, made_with)
    (folder / PROGRESS).unlink(missing_ok=True)  # the process was killed in between
    return index


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key, value in now.items():
        if before.get(key) == value:
            continue
        was = before.get(key)
        if isinstance(value, dict) and isinstance(was, dict):
            key, was, value = next(
                (f"{key}.{inner}", was.get(inner), value.get(inner))
                for inner in value | was
                if was.get(inner) != value.get(inner)
            )
        raise ConfigError(
            f"output: {path} was made with {key} = {was!r}, now it is {value!r}; name another folder, or "
            "start again with --overwrite"
        )


def _report(folder: Path, index: dict[str, Any]) -> Report:
    splits = index["splits"]
    return Report(
        folder=folder,
        tokens={name: split["tokens"] for name, split in splits.items()},
        documents={name: split["documents"] for name, split in splits.items()},
        text_bytes={name: split["text_bytes"] for name, split in splits.items()},
        blank_documents=index["blank_documents"],
        shards=sum(len(split["shards"]) for split in splits.values()),
        seconds=0.0,
        new_bytes=0,
        encoding_cpu_s=0.0,
        reading_cpu_s=0.0,
    )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder against a second process, until this one ends, however it ends.

    Raises:
        ConfigError: if another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"output: {folder} cannot be written: {error.strerror}; name another") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"output: another process is writing {folder}; wait for it, or end it"
            ) from error
        yield
    finally:
        os.close(descriptor)
