"""Tokenized `.bin` shards: plain little-endian integers on disk, memory-mapped, perhaps with an index beside.

`NAME.json` beside `NAME.bin` holds {"dtype": "uint16" or "uint32", "tokens": count}; without it the run's
`data.token_dtype` says how the file is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from qrecipes.data.files import open_file
from qrecipes.data.sequences import TokenStream
from qrecipes.errors import DataError

SUFFIXES = (".bin",)
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def open_shards(paths: Iterable[Path], token_dtype: str) -> TokenStream:
    """All shards, in order, as one stream.

    Raises:
        DataError: if a file's size does not fit its integers or its index, or an index cannot be read.
    """
    shards = [_open_shard(path, token_dtype) for path in paths]
    counted = "1 shard" if len(shards) == 1 else f"{len(shards):,} shards"
    return TokenStream(shards, counted)


def write_shard(path: Path, tokens: np.ndarray, dtype: str = "uint16") -> None:
    """Write `tokens` to `path` and their index beside it.

    Raises:
        ValueError: if a token does not fit `dtype`.
    """
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) <= np.iinfo(DTYPES[dtype]).max:
        raise ValueError(f"tokens from {tokens.min()} to {tokens.max()} do not fit {dtype}")
    tokens.astype(DTYPES[dtype]).tofile(path)
    path.with_suffix(".json").write_text(json.dumps({"dtype": dtype, "tokens": len(tokens)}) + "\n", "utf-8")


def _open_shard(path: Path, token_dtype: str) -> np.ndarray:
    if path.suffix != ".bin":
        raise DataError(f"{path}: cannot be mapped while compressed; decompress it")
    index = _read_index(path)
    name = index.get("dtype", token_dtype)
    if name not in DTYPES:
        raise DataError(f"{path.with_suffix('.json')}: dtype {name!r}; expected {' or '.join(DTYPES)}")
    dtype, size = DTYPES[name], path.stat().st_size
    if size % dtype.itemsize:
        raise DataError(
            f"{path}: {size} bytes is no multiple of {dtype.itemsize} ({name}): the file is cut short, or "
            "data.token_dtype is not its type"
        )
    count = index.get("tokens", size // dtype.itemsize)
    if count != size // dtype.itemsize:
        raise DataError(
            f"{path}: holds {size // dtype.itemsize} tokens of {name}, its index says {count}; copy both "
            "files again"
        )
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r") if size else np.empty(0, dtype)


def _read_index(path: Path) -> dict[str, Any]:
    index_path = path.with_suffix(".json")
    if not index_path.exists():
        return {}
    with open_file(index_path) as file:
        try:
            index = json.load(file)
        except ValueError as error:
            raise DataError(f"{index_path}: not JSON ({error}); write it again or remove it") from error
    if not isinstance(index, dict):
        raise DataError(
            f"{index_path}: holds {type(index).__name__}, not an object with 'dtype' and 'tokens'"
        )
    return index
