"""Hugging Face `datasets`: whole or streamed, from the hub, a local folder, or what `save_to_disk` wrote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetsError

from qrecipes.data.batch import Batch
from qrecipes.data.order import Share
from qrecipes.data.packing import pack, require_separator, separators
from qrecipes.data.sequences import TokenStream
from qrecipes.data.text import text_of
from qrecipes.data.tokenizers import Tokenizer
from qrecipes.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from qrecipes.config.run import DataSection

READ_DOCUMENTS = 32
"""Documents of a stream that are tokenized together."""
BLOCK_SEQUENCES = 256
"""Sequences of a stream among which the order is drawn."""


@dataclass(frozen=True)
class DatasetName:
    """What is loaded: a hub name or local folder, its configuration if it has several, and a split."""

    path: str
    config: str | None
    split: str

    @classmethod
    def of(cls, files: tuple[str, ...], split: str, key: str) -> DatasetName:
        """The name in a run's `files`.

        Raises:
            ConfigError: if there are more than a name and a configuration.
        """
        if len(files) > 2:
            raise ConfigError(
                f"{key}: {len(files)} entries; a dataset takes its name or folder, and optionally its "
                f'configuration: {key} = ["OWNER/NAME", "CONFIGURATION"]'
            )
        return cls(files[0], files[1] if len(files) == 2 else None, split)

    def __str__(self) -> str:
        return f"{self.path}{f' ({self.config})' if self.config else ''}, split {self.split}"

    def load(self, *, streaming: bool) -> Dataset | IterableDataset:
        """The split.

        Raises:
            DataError: if it is not there, or there is no network to fetch it.
        """
        try:
            if _was_saved_to_disk(Path(self.path)):
                dataset = self._from_disk()
                return dataset.to_iterable_dataset() if streaming else dataset
            return load_dataset(self.path, self.config, split=self.split, streaming=streaming)
        except (OSError, ValueError, DatasetsError) as error:
            remedy = (
                "check the split, and that the folder holds .parquet, .jsonl, .csv or .txt files"
                if Path(self.path).exists()
                else "it is no local folder: check the name and the network, or name a folder with the files"
            )
            raise DataError(
                f"data.files: dataset {self} cannot be loaded: {_reason(error)}; {remedy}"
            ) from error

    def _from_disk(self) -> Dataset:
        saved = load_from_disk(self.path)
        # A dataset saved without its split counts as training data: it must not be held out as well.
        splits = saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}
        if self.split not in splits:
            raise DataError(
                f"data.files: dataset {self} cannot be loaded: no such split; there are {', '.join(splits)}"
            )
        return splits[self.split]


def _was_saved_to_disk(path: Path) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_stream(name: DatasetName, data: DataSection, tokenizer: Tokenizer, key: str) -> TokenStream:
    """All documents of a split, tokenized.

    Raises:
        DataError: if the column is not there or holds no text.
    """
    dataset = name.load(streaming=data.streaming)
    _check_column(dataset, data.text_column, name)
    rows = enumerate(dataset.select_columns([data.text_column]), start=1)
    texts = (text_of(row, data.text_column, f"dataset {name}: row {number}") for number, row in rows)
    return pack(texts, tokenizer, key=key, origin=f"dataset {name}")


def _check_column(dataset: Dataset | IterableDataset, column: str, name: DatasetName) -> None:
    # A stream may not know its columns before its first row, where `text_of` looks again.
    if dataset.column_names is not None and column not in dataset.column_names:
        raise DataError(
            f"dataset {name}: no column {column!r}; there are {', '.join(dataset.column_names)}; set "
            "data.text_column"
        )


class TokenReader:
    """The tokens of a stream's documents, epoch after epoch; its state is exact to the token."""

    def __init__(
        self, stream: IterableDataset, tokenizer: Tokenizer, data: DataSection, name: DatasetName
    ) -> None:
        self.stream = stream
        self.tokenizer = tokenizer
        self.column = data.text_column
        self.reorders = data.shuffle
        self.name = name
        self.epoch = 0
        self._buffer = np.empty(0, np.int64)
        self._rows: Iterator[dict[str, Any]] | None = None
        self._gave_text = False

    def window(self, count: int) -> np.ndarray:
        """The next `count` tokens and the one after them, which the next window begins with."""
        parts, available = [self._buffer], len(self._buffer)
        while available <= count:
            parts.append(self._next_documents())
            available += len(parts[-1])
        tokens = np.concatenate(parts)
        self._buffer = tokens[count:]
        return tokens[: count + 1]

    def state_dict(self) -> dict[str, Any]:
        """The stream's own position, and the tokens read from it but not used yet."""
        position = None if self._rows is None else self.stream.state_dict()
        return {"epoch": self.epoch, "dataset": position, "rest": self._buffer.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._open(state["epoch"], state["dataset"] or {})
        self._buffer = np.array(state["rest"], np.int64)

    def _open(self, epoch: int, position: dict[str, Any]) -> None:
        self.epoch = epoch
        # Another epoch makes `datasets` draw another order of the shards.
        self.stream.set_epoch(epoch if self.reorders else 0)
        self.stream.load_state_dict(position)
        self._rows = iter(self.stream)

    def _next_rows(self) -> list[dict[str, Any]]:
        assert self._rows is not None
        try:
            return list(islice(self._rows, READ_DOCUMENTS))
        except (OSError, ValueError, DatasetsError) as error:
            raise DataError(
                f"dataset {self.name}: reading the stream failed: {_reason(error)}; resume from the last "
                "checkpoint when it can be read again"
            ) from error

    def _next_documents(self) -> np.ndarray:
        if self._rows is None:
            self._open(self.epoch, {})
        rows = self._next_rows()
        if not rows:
            if not self._gave_text:
                raise DataError(
                    f"dataset {self.name}: no text for this rank; use fewer ranks or a larger split"
                )
            self._open(self.epoch + 1, {})
            rows = self._next_rows()
        texts = [text_of(row, self.column, f"dataset {self.name}: a row of the stream") for row in rows]
        before, after = separators(self.tokenizer)
        documents = self.tokenizer.encode_batch([text for text in texts if text.strip()])
        self._gave_text = self._gave_text or bool(documents)
        return np.array([token for ids in documents for token in (*before, *ids, *after)], np.int64)


class StreamedTrainingData:
    """Training data read from a stream: each rank tokenizes its own documents.

    The order is drawn among BLOCK_SEQUENCES sequences at a time. A run resumes only on as many ranks, each of
    which reads the block it had begun again.
    """

    num_sequences = None

    def __init__(self, reader: TokenReader, data: DataSection, share: Share, seed: int) -> None:
        self.reader = reader
        self.length = data.sequence_length
        self.shuffle = data.shuffle
        self.share = share
        self.seed = seed
        self._num_blocks = 0
        self._taken = BLOCK_SEQUENCES
        self._block = np.empty((BLOCK_SEQUENCES, self.length + 1), np.int64)
        self._before_block = reader.state_dict()

    @property
    def epoch(self) -> int:
        """Epoch of the documents that this rank read last."""
        return self.reader.epoch

    def next_batch(self) -> Batch:
        """The next micro-batch of this rank."""
        rows = torch.from_numpy(np.stack([self._next_sequence() for _ in range(self.share.batch_size)]))
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    def state_dict(self) -> dict[str, Any]:
        """The positions of all ranks, which every rank must ask for at the same time."""
        own = self._own_state()
        states = [own]
        if self.share.world > 1 and dist.is_initialized():
            states = [own] * self.share.world
            dist.all_gather_object(states, own)
        return {"world": self.share.world, "ranks": {str(state["rank"]): state for state in states}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last micro-batch drawn before `state_dict`.

        Raises:
            CheckpointError: if the world had another size, or the state is not that of a stream.
        """
        own = state.get("ranks", {}).get(str(self.share.rank))
        if own is None or state["world"] != self.share.world:
            made = f"on {state['world']} ranks" if "world" in state else "with data that was not streamed"
            raise CheckpointError(
                f"data: the checkpoint was made {made}, this is a stream on {self.share.world}; resume with "
                "the same data on as many ranks"
            )
        self.reader.load_state_dict(own["reader"])
        self._num_blocks, self._taken = own["num_blocks"], own["taken"]
        if self._taken < BLOCK_SEQUENCES:
            self._num_blocks -= 1
            self._read_block()
            self._taken = own["taken"]

    def max_token(self) -> int | None:
        """None: a stream is not known before it is read."""
        return None

    def describe(self) -> str:
        """Where the stream comes from."""
        return f"stream of sequences of {self.length:,} from dataset {self.reader.name}"

    def _own_state(self) -> dict[str, Any]:
        """The reader before the begun block, and how much of the block was taken."""
        between_blocks = self._taken == BLOCK_SEQUENCES
        return {
            "rank": self.share.rank,
            "num_blocks": self._num_blocks,
            "taken": self._taken,
            "reader": self.reader.state_dict() if between_blocks else self._before_block,
        }

    def _next_sequence(self) -> np.ndarray:
        if self._taken == BLOCK_SEQUENCES:
            self._read_block()
        self._taken += 1
        return self._block[self._taken - 1]

    def _read_block(self) -> None:
        self._before_block = self.reader.state_dict()
        window = self.reader.window(BLOCK_SEQUENCES * self.length)
        order = np.arange(BLOCK_SEQUENCES)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self._num_blocks]).permutation(BLOCK_SEQUENCES)
        self._block = window[(order * self.length)[:, None] + np.arange(self.length + 1)]
        self._num_blocks += 1
        self._taken = 0


def open_stream(data: DataSection, tokenizer: Tokenizer, *, share: Share, seed: int) -> StreamedTrainingData:
    """Training data streamed from the dataset that `data` names.

    Raises:
        DataError: if the dataset or its column is not there, or the tokenizer cannot separate documents.
    """
    require_separator(tokenizer, "data.files")
    name = DatasetName.of(data.files, data.split, "data.files")
    stream = name.load(streaming=True)
    _check_column(stream, data.text_column, name)
    part = split_dataset_by_node(stream, rank=share.rank, world_size=share.world)
    return StreamedTrainingData(TokenReader(part, tokenizer, data, name), data, share, seed)
