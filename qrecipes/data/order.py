"""Which item comes when: one global order that knows nothing of ranks, batch sizes or accumulation.

Positions count the items drawn by all ranks since the start of the run. Micro-batch n of `world` ranks with
`batch_size` rows each takes positions [n * batch_size * world, (n + 1) * batch_size * world), rank r the r-th
part. So two ranks of B rows see what one rank of 2 B sees, two micro-batches of B what one of 2 B sees, and
the whole state of the data is one number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from qrecipes.data.batch import Batch
from qrecipes.data.shuffle import Shuffle
from qrecipes.errors import CheckpointError

MOST_DRAWN = 1 << 24
"""Most items of an epoch whose order is drawn as an array: 134 MB on every rank, and a second an epoch."""


@dataclass(frozen=True)
class Item:
    """The `index`-th item of a source, as it is read in an epoch."""

    epoch: int
    index: int


class Source(Protocol):
    """Items that can be read in any order: sequences of tokens, or images."""

    @property
    def num_items(self) -> int | None:
        """Items of one epoch; None where the source is endless."""

    def read(self, items: Sequence[Item | None]) -> Batch:
        """A batch with one row for each item; None gives a row in which no target counts."""

    def max_token(self) -> int:
        """Largest token, or number of a class, that occurs."""

    def describe(self) -> str:
        """What there is, in a few words with counts."""


class TrainingData(Protocol):
    """Endless micro-batches of one rank, resumable at any of them."""

    @property
    def num_sequences(self) -> int | None:
        """Sequences or images of one epoch over all ranks; None where the data is endless or streamed."""

    @property
    def epoch(self) -> int:
        """Epoch of the next micro-batch's first row, from 0."""

    def next_batch(self) -> Batch:
        """The next micro-batch of this rank."""

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, fit for JSON, the same on every rank; all ask for it together."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last micro-batch drawn before `state_dict`.

        Raises:
            CheckpointError: if the state belongs to other data.
        """

    def max_token(self) -> int | None:
        """Largest token, or number of a class; of a sample where there is much, None of a stream."""

    def describe(self) -> str:
        """What there is, in a few words with counts."""


@dataclass(frozen=True)
class Share:
    """The part of each micro-batch that one rank reads."""

    batch_size: int
    rank: int
    world: int

    @property
    def stride(self) -> int:
        """Positions that one micro-batch of all ranks takes."""
        return self.batch_size * self.world

    def positions(self, first: int) -> range:
        """Positions of this rank in the micro-batch that begins at `first`."""
        start = first + self.rank * self.batch_size
        return range(start, start + self.batch_size)


class Order:
    """Position -> item: epoch after epoch, each a permutation drawn from (seed, epoch)."""

    def __init__(self, num_items: int | None, *, seed: int, shuffle: bool) -> None:
        self.num_items = num_items
        self.seed = seed
        self.shuffle = shuffle
        self._drawn: tuple[int, np.ndarray | Shuffle] | None = None

    def item(self, position: int) -> Item:
        """The item at `position`; an endless source has one epoch, in its own order."""
        if self.num_items is None:
            return Item(0, position)
        epoch, offset = divmod(position, self.num_items)
        return Item(epoch, int(self._permutation(epoch)[offset]) if self.shuffle else offset)

    def _permutation(self, epoch: int) -> np.ndarray | Shuffle:
        drawn = self._drawn  # read once: a prefetching thread may replace it
        if drawn is None or drawn[0] != epoch:
            drawn = (epoch, self._draw(epoch))
            self._drawn = drawn
        return drawn[1]

    def _draw(self, epoch: int) -> np.ndarray | Shuffle:
        """All items in the order of an epoch."""
        assert self.num_items is not None
        if self.num_items > MOST_DRAWN:
            return Shuffle(self.num_items, self.seed, epoch)
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_items)


class IndexedTrainingData:
    """Training data over a source that can be read in any order; its state is the global position."""

    def __init__(self, source: Source, order: Order, share: Share, *, prefetch: bool = False) -> None:
        self.source = source
        self.order = order
        self.share = share
        self._position = 0
        self._pool = ThreadPoolExecutor(1, "prefetch") if prefetch else None
        self._ahead: Future[Batch] | None = None

    @property
    def num_sequences(self) -> int | None:
        """Items of one epoch over all ranks; None where the source is endless."""
        return self.order.num_items

    @property
    def epoch(self) -> int:
        """Epoch of the next micro-batch's first row, from 0."""
        return self.order.item(self._position).epoch

    def next_batch(self) -> Batch:
        """The next micro-batch of this rank; with `prefetch`, the one after it is read meanwhile."""
        batch = self._ahead.result() if self._ahead is not None else self._read(self._position)
        self._position += self.share.stride
        if self._pool is not None:
            self._ahead = self._pool.submit(self._read, self._position)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The global position: equal on every rank, and valid for any world and batch size."""
        return {"position": self._position, "num_sequences": self.num_sequences}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the position in `state`.

        Raises:
            CheckpointError: if the state was made with another number of sequences.
        """
        if "position" not in state:
            raise CheckpointError(
                f"data: the checkpoint's data position has {', '.join(state) or 'nothing'}, not 'position': "
                "it was "
                "made with streamed data; resume with the data it was made with"
            )
        if state["num_sequences"] != self.num_sequences:
            raise CheckpointError(
                f"data: the checkpoint was made with {state['num_sequences']} sequences an epoch, now there "
                "are "
                f"{self.num_sequences}; resume with the same files, tokenizer, data.sequence_length and "
                "data.validation_fraction, or start afresh in another output folder"
            )
        self._position = int(state["position"])
        self._ahead = None

    def max_token(self) -> int | None:
        """Largest token, or number of a class, that occurs, of a sample where the data is huge."""
        return self.source.max_token()

    def describe(self) -> str:
        """What there is, in a few words with counts."""
        return self.source.describe()

    def _read(self, first: int) -> Batch:
        return self.source.read([self.order.item(position) for position in self.share.positions(first)])


class ValidationData:
    """Held-out data in a fixed order: every item once over all ranks, and as many batches on each rank."""

    def __init__(self, source: Source, num_items: int, share: Share) -> None:
        self.source = source
        self.num_sequences = num_items
        self.share = share

    def __len__(self) -> int:
        """Batches of this rank, the same on every rank."""
        return -(-self.num_sequences // self.share.stride)

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the first; rows past the end are padding in which no target counts."""
        for first in range(0, self.num_sequences, self.share.stride):
            positions = self.share.positions(first)
            yield self.source.read([Item(0, p) if p < self.num_sequences else None for p in positions])

    def max_token(self) -> int | None:
        """Largest token, or number of a class, that occurs, of a sample where the data is huge."""
        return self.source.max_token()

    def describe(self) -> str:
        """What there is, in a few words with counts."""
        return self.source.describe()
