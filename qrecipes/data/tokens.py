"""Tokenized `.bin` shards: plain little-endian integers on disk, memory-mapped and checked before use.

A shard may stand alone, with `NAME.json` beside `NAME.bin` holding {"dtype": "uint16" or "uint32", "tokens":
count} and perhaps "sha256" and "tokenizer"; without that index the run's `data.token_dtype` says how the file
is read. Or it belongs to a folder that `qrecipes.data.tokenize` wrote, whose `index.json` lists every shard
of every split: then a missing shard is noticed too, and one file is read instead of one a shard.
"""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qrecipes.data.files import expand, locate, open_file
from qrecipes.data.sequences import TokenStream
from qrecipes.data.tokenizers import Tokenizer
from qrecipes.data.vocabulary import fingerprint
from qrecipes.errors import DataError

SUFFIXES = (".bin",)
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
INDEX = "index.json"
"""What lists a folder's shards, once all are there."""
PROGRESS = "progress.json"
"""What lies in the folder instead while it is being written."""
SPARE_FILES = 512
"""Open files that a run needs beside its shards."""
VERIFY_BYTES = 1 << 24
"""Largest shard whose checksum is computed unasked: reading it takes some 10 ms."""


@dataclass(frozen=True)
class Shard:
    """One file, and what its index says of it; None where it says nothing."""

    path: Path
    index: Path
    """The file that says it, for messages."""
    dtype: str | None = None
    tokens: int | None = None
    sha256: str | None = None
    vocabulary: str | None = None
    """Fingerprint of the vocabulary that the tokens belong to."""


def open_tokens(
    names: Iterable[str],
    token_dtype: str,
    *,
    key: str,
    tokenizer: Tokenizer | None = None,
    verify: bool | None = None,
) -> TokenStream:
    """All shards that `names` stand for, in order, as one stream.

    A name is a `.bin` file, a glob of them, a folder of tokens or its `index.json`, or one split of such a
    folder, FOLDER/SPLIT. Sizes and types are always checked; checksums of shards up to VERIFY_BYTES by
    default, of all with `verify=True`, of none with False. `key` is the setting that messages name.

    Raises:
        DataError: if a shard is missing or damaged, an index cannot be read, or `tokenizer`, where given, has
            another vocabulary than the one that made the shards.
    """
    shards = list(find_shards(names, key))
    _check_vocabulary(shards, tokenizer)
    _allow_open_files(len(shards), key)
    arrays = [open_shard(shard, token_dtype, verify=verify) for shard in shards]
    counted = "1 shard" if len(arrays) == 1 else f"{len(arrays):,} shards"
    return TokenStream(arrays, counted)


def find_shards(names: Iterable[str], key: str) -> Iterator[Shard]:
    """The shards that `names` stand for, as `open_tokens` takes them, none of them opened."""
    for name in names:
        path = locate(name)
        if path.name == INDEX:
            yield from _shards_of_folder(path.parent, key)
        elif path.is_dir() or (not path.suffix and (path.parent / INDEX).exists()):
            yield from _shards_of_folder(path, key)
        else:
            yield from map(_shard_alone, expand([name], key=key, suffixes=SUFFIXES))


def open_shard(shard: Shard, token_dtype: str, *, verify: bool | None = None) -> np.ndarray:
    """The shard's tokens, mapped; `token_dtype` is its type where its index gives none.

    Raises:
        DataError: if it is missing, or its size or checksum is not what its index says.
    """
    path = shard.path
    if path.suffix != ".bin":
        raise DataError(f"{path}: cannot be mapped while compressed; decompress it")
    if not path.is_file():
        raise DataError(f"{path}: missing, and {shard.index} lists it; copy the folder again")
    name = shard.dtype or token_dtype
    dtype, size = DTYPES[name], path.stat().st_size
    if size % dtype.itemsize:
        raise DataError(
            f"{path}: {size} bytes is no multiple of {dtype.itemsize} ({name}): the file is cut short, or "
            "data.token_dtype is not its type"
        )
    if shard.tokens not in (None, size // dtype.itemsize):
        raise DataError(
            f"{path}: holds {size // dtype.itemsize} tokens of {name}, its index says {shard.tokens}; copy "
            "both files again"
        )
    if verify or (verify is None and size <= VERIFY_BYTES):
        check_sum(shard)
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r") if size else np.empty(0, dtype)


def check_sum(shard: Shard) -> None:
    """Read the whole shard and compare its SHA-256 with the index, where that has one.

    Raises:
        DataError: if they differ.
    """
    if shard.sha256 is None:
        return
    found = file_sha256(shard.path)
    if found != shard.sha256:
        raise DataError(
            f"{shard.path}: damaged: its SHA-256 is {found[:12]}..., {shard.index} says "
            f"{shard.sha256[:12]}...; copy it again, or tokenize again"
        )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def write_shard(path: Path, tokens: np.ndarray, dtype: str = "uint16") -> None:
    """Write `tokens` to `path` and their index beside it.

    Raises:
        ValueError: if a token does not fit `dtype`.
    """
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) <= np.iinfo(DTYPES[dtype]).max:
        raise ValueError(f"tokens from {tokens.min()} to {tokens.max()} do not fit {dtype}")
    data = tokens.astype(DTYPES[dtype]).tobytes()
    path.write_bytes(data)
    index = {"dtype": dtype, "tokens": len(tokens), "sha256": hashlib.sha256(data).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(index) + "\n", "utf-8")


def read_index(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DataError: if it is not JSON, or no object.
    """
    with open_file(path) as file:
        try:
            index = json.load(file)
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error}); write it again or remove it") from error
    if not isinstance(index, dict):
        raise DataError(f"{path}: holds {type(index).__name__}, not an object with 'dtype' and 'tokens'")
    return index


def _allow_open_files(count: int, key: str) -> None:
    """Raise the process's limit where it is too low: every mapping holds its file open."""
    needed = count + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise DataError(
            f"{key}: {count:,} shards, and this process may open {hard:,} files (`ulimit -Hn`), of which it "
            f"needs {SPARE_FILES} for other things; raise the limit, or tokenize into larger shards"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _shard_alone(path: Path) -> Shard:
    beside = path.with_suffix(".json")
    shard = Shard(path, beside)
    return _described(shard, read_index(beside)) if beside.exists() else shard


def _shards_of_folder(folder: Path, key: str) -> list[Shard]:
    """The shards of FOLDER, which holds the index, or of FOLDER/SPLIT, whose parent does."""
    root, wanted = (folder, None) if (folder / INDEX).exists() else (folder.parent, folder.name)
    index_path = root / INDEX
    if not index_path.exists():
        for place in (folder, root):
            if (place / PROGRESS).exists():
                raise DataError(
                    f"{place}: not all of its shards are written, {PROGRESS} is still there; run the "
                    "tokenization again to finish it"
                )
        raise DataError(
            f"{key}: {folder} is a folder without {INDEX}; name its files, such as '{folder / '*.bin'}'"
        )
    index = read_index(index_path)
    try:
        splits = {name: split["shards"] for name, split in index["splits"].items()}
        chosen = wanted or _only(splits, folder, key)
        if chosen not in splits:
            raise DataError(
                f"{key}: {index_path} has no split {chosen!r}; it has {', '.join(splits) or 'none'}"
            )
        shared = {"dtype": index["dtype"], "tokenizer": index["tokenizer"]}
        return [
            _described(Shard(root / entry["file"], index_path), shared | entry) for entry in splits[chosen]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{index_path}: not the index of tokenized data ({type(error).__name__}: {error}); tokenize again"
        ) from error


def _only(splits: dict[str, Any], folder: Path, key: str) -> str:
    if len(splits) != 1:
        raise DataError(
            f"{key}: {folder} holds the splits {' and '.join(splits) or '(none)'}; name one, such as "
            f"'{folder / next(iter(splits), 'train')}'"
        )
    return next(iter(splits))


def _described(shard: Shard, index: dict[str, Any]) -> Shard:
    dtype, tokens = index.get("dtype"), index.get("tokens")
    if dtype is not None and dtype not in DTYPES:
        raise DataError(f"{shard.index}: dtype {dtype!r}; expected {' or '.join(DTYPES)}")
    made_with = index.get("tokenizer")
    vocabulary = made_with.get("fingerprint") if isinstance(made_with, dict) else None
    return replace(shard, dtype=dtype, tokens=tokens, sha256=index.get("sha256"), vocabulary=vocabulary)


def _check_vocabulary(shards: list[Shard], tokenizer: Tokenizer | None) -> None:
    """Hold all shards to one vocabulary, which is that of the run's tokenizer where it names one."""
    known = [shard for shard in shards if shard.vocabulary is not None]
    if not known:
        return
    first = known[0]
    for other in known:
        if other.vocabulary != first.vocabulary:
            raise DataError(
                f"{other.path}: was made with another vocabulary than {first.path}; train on one of them, or "
                "tokenize both with the same tokenizer"
            )
    if tokenizer is not None and fingerprint(tokenizer) != first.vocabulary:
        raise DataError(
            f"{first.path}: its tokens belong to another vocabulary than the tokenizer of the run, its "
            "[tokenizer] or the model's own; tokenize the text with that one, or, for a model made for these "
            "tokens, set tokenizer.path to the one that made them (the folder `tokenizer` beside index.json)"
        )
