"""The shards of one split, written one after the other so that a killed process leaves nothing half written.

Tokens go to `NNNNN.bin.part`; a full shard is renamed to `NNNNN.bin`. `state` is a promise about what is on
disk when it is called after `flush`: a writer made from it cuts away whatever was written later.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from qrecipes.data.tokens import DTYPES
from qrecipes.errors import DataError

DIGITS = 5
"""Digits of a shard's number, so that names sort as numbers up to 100,000 shards of a split."""
_OWN_NAME = re.compile(rf"(\d{{{DIGITS},}})\.(bin|json)(\.part)?")


class ShardWriter:
    """Appends tokens of whole documents, and cuts the run of them every `shard_tokens` tokens."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        shard_tokens: int,
        labels: Mapping[str, Any],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """`labels` go into the index beside every shard; `state` is what an earlier writer promised."""
        self.folder = folder
        self.dtype = dtype
        self.shard_tokens = shard_tokens
        self.labels = labels
        state = state or {"shards": [], "part_tokens": 0, "part_documents": 0, "text_bytes": 0}
        self.shards: list[dict[str, Any]] = list(state["shards"])
        """What the index says of each finished shard."""
        self.text_bytes: int = state["text_bytes"]
        """UTF-8 bytes of the documents."""
        self._part_tokens: int = state["part_tokens"]
        self._part_documents: int = state["part_documents"]
        self._part: IO[bytes] | None = None
        self._sha256 = hashlib.sha256()
        self._cut_back()

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return sum(shard["tokens"] for shard in self.shards) + self._part_tokens

    @property
    def documents(self) -> int:
        """Documents so far."""
        return sum(shard["documents"] for shard in self.shards) + self._part_documents

    def append(self, tokens: np.ndarray, ends: np.ndarray, text_bytes: int) -> None:
        """Add the tokens of documents that end before the offsets `ends`; a document belongs to the shard
        that its last token is in."""
        start = 0
        while start < len(tokens):
            stop = min(len(tokens), start + self.shard_tokens - self._part_tokens)
            self._write(tokens[start:stop].tobytes())
            self._part_tokens += stop - start
            self._part_documents += int(np.searchsorted(ends, [start, stop], "right") @ [-1, 1])
            if self._part_tokens == self.shard_tokens:
                self._finish_shard()
            start = stop
        self.text_bytes += text_bytes

    def flush(self) -> None:
        """Have the disk hold all that was appended."""
        if self._part is not None:
            self._part.flush()
            os.fsync(self._part.fileno())

    def state(self) -> dict[str, Any]:
        """What was appended, for a writer that goes on from here; fit for JSON."""
        return {
            "shards": self.shards,
            "part_tokens": self._part_tokens,
            "part_documents": self._part_documents,
            "text_bytes": self.text_bytes,
        }

    def finish(self) -> None:
        """Turn what is left into the last shard."""
        if self._part_tokens:
            self._finish_shard()

    def close(self) -> None:
        """Close the file that is being written; it stays for another writer."""
        if self._part is not None:
            self._part.close()
            self._part = None

    def _write(self, data: bytes) -> None:
        if self._part is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._part = self._part_path().open("ab")
        self._part.write(data)
        self._sha256.update(data)

    def _finish_shard(self) -> None:
        self.flush()
        self.close()
        described = {
            "tokens": self._part_tokens,
            "documents": self._part_documents,
            "sha256": self._sha256.hexdigest(),
        }
        path = self._shard_path()
        write_json(path.with_suffix(".json"), {"dtype": self.dtype} | described | dict(self.labels))
        os.replace(self._part_path(), path)
        self.shards.append({"file": f"{self.folder.name}/{path.name}"} | described)
        self._part_tokens = self._part_documents = 0
        self._sha256 = hashlib.sha256()

    def _shard_path(self) -> Path:
        return self.folder / f"{len(self.shards):0{DIGITS}}.bin"

    def _part_path(self) -> Path:
        return self._shard_path().with_suffix(".bin.part")

    def _cut_back(self) -> None:
        """Leave on disk what the state promises, and nothing else."""
        path, part = self._shard_path(), self._part_path()
        if self._part_tokens and path.exists() and not part.exists():
            os.replace(path, part)  # finished after the promise was made
        kept = {Path(shard["file"]).stem for shard in self.shards}
        for other in self.folder.glob("*"):
            ours = _OWN_NAME.fullmatch(other.name)
            if ours and ours[1] not in kept and not (self._part_tokens and other == part):
                other.unlink()
        if self._part_tokens:
            self._take_up(part, self._part_tokens * DTYPES[self.dtype].itemsize)

    def _take_up(self, part: Path, size: int) -> None:
        found = part.stat().st_size if part.exists() else 0
        if found < size:
            raise DataError(
                f"{part}: holds {found} of the {size} bytes that were written before; start again with "
                "--overwrite"
            )
        os.truncate(part, size)
        with part.open("rb") as file:
            self._sha256 = hashlib.file_digest(file, "sha256")


@contextmanager
def replaced(path: Path) -> Iterator[IO[str]]:
    """A text file that takes the place of `path` when it is complete and on disk."""
    temporary = path.with_name(f"{path.name}.part")
    with temporary.open("w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` so that `path` holds either what it held before, or all of it."""
    with replaced(path) as file:
        json.dump(content, file, indent=1)
        file.write("\n")
