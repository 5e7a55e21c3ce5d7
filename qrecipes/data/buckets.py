"""Conversations one a row, padded to one of a few lengths, so that a compiled model sees few shapes.

A micro-batch of all ranks is as long as the bucket of its longest row. For its rows to be of one bucket, an
epoch's order is made of blocks of CHUNK rows of one bucket, or of the next multiple of a micro-batch's rows;
blocks and the rows in them are drawn from (seed, epoch). What a bucket has over, fewer rows than a block,
is read around the blocks, bucket by bucket: there, and there alone, a micro-batch may hold rows of several
buckets. Every row comes once an epoch. The order is the same for all micro-batches whose rows divide CHUNK,
however they are spread over ranks and accumulated; others have blocks, and so an order, of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from qrecipes.data.batch import IGNORE, Batch
from qrecipes.data.conversations import Conversations
from qrecipes.data.order import IndexedTrainingData, Item, Order, Share, ValidationData
from qrecipes.data.packed import fill
from qrecipes.errors import CheckpointError

CHUNK = 64
"""Rows of one bucket that follow one another."""
SMALLEST = 64
"""The smallest of the usual buckets, in tokens."""


def usual_buckets(length: int) -> tuple[int, ...]:
    """Powers of two from SMALLEST, then `length` itself."""
    powers = (SMALLEST << i for i in range(length.bit_length()))
    return (*(power for power in powers if power < length), length)


class PaddedConversations:
    """One conversation a row; `buckets` ascend to at least the longest."""

    def __init__(self, conversations: Conversations, buckets: Sequence[int]) -> None:
        self.conversations = conversations
        self.buckets = np.array(buckets)
        self.num_items = len(conversations)
        self.bucket_of = np.searchsorted(self.buckets, conversations.lengths)
        """Number of each conversation's bucket."""
        assert self.bucket_of.max() < len(buckets), (conversations.lengths.max(), buckets)

    def read(self, items: Sequence[Item | None]) -> Batch:
        """The conversations as rows as long as the bucket of the longest; None gives a row of padding."""
        return self.read_padded(items, self.length_for(items))

    def read_padded(self, items: Sequence[Item | None], length: int) -> Batch:
        """The conversations as rows of `length`."""
        inputs = np.zeros((len(items), length), np.int64)
        targets = np.full_like(inputs, IGNORE)
        for row, item in enumerate(items):
            if item is not None:
                fill(self.conversations, item.index, inputs[row], targets[row])
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def length_for(self, items: Sequence[Item | None]) -> int:
        """Length of the bucket that the longest of `items` needs."""
        return int(self.buckets[max(self.bucket_of[item.index] for item in items if item is not None)])

    def max_token(self) -> int:
        """Largest token."""
        return self.conversations.max_token()

    def describe(self) -> str:
        """Counts of rows in each bucket, and how full they are."""
        counts = np.bincount(self.bucket_of, minlength=len(self.buckets))
        full = self.conversations.lengths.sum() / (counts * self.buckets).sum()
        listed = ", ".join(f"{n:,} of {b:,}" for n, b in zip(counts, self.buckets, strict=True) if n)
        return f"rows padded to their bucket ({listed}), {full:.1%} full: {self.conversations.describe()}"


class BucketOrder(Order):
    """An order in which `block` rows of one bucket follow one another, at multiples of `block`."""

    def __init__(self, bucket_of: np.ndarray, block: int, *, seed: int, shuffle: bool) -> None:
        super().__init__(len(bucket_of), seed=seed, shuffle=shuffle)
        self.bucket_of = bucket_of
        self.block = block

    def item(self, position: int) -> Item:
        """The item at `position`; unshuffled, rows of one bucket stay in their order."""
        epoch, offset = divmod(position, len(self.bucket_of))
        return Item(epoch, int(self._permutation(epoch)[offset]))

    def _draw(self, epoch: int) -> np.ndarray:
        count = len(self.bucket_of)
        random = np.random.default_rng([self.seed, epoch])
        rows = random.permutation(count) if self.shuffle else np.arange(count)
        blocks: list[np.ndarray] = []
        rests: list[np.ndarray] = []
        for bucket in np.unique(self.bucket_of):
            members = rows[self.bucket_of[rows] == bucket]
            whole = len(members) - len(members) % self.block
            blocks += np.split(members[:whole], whole // self.block) if whole else []
            rests.append(members[whole:])
        if self.shuffle:
            blocks = [blocks[i] for i in random.permutation(len(blocks))]
        # The epoch may begin inside a micro-batch: rests come first up to where a block may begin.
        ahead = -epoch * count % self.block
        while blocks and sum(map(len, rests)) < ahead:
            rests.append(blocks.pop())
        rest = np.concatenate(rests)
        return np.concatenate([rest[:ahead], *blocks, rest[ahead:]])


class BucketedTrainingData(IndexedTrainingData):
    """Micro-batches of one length on every rank."""

    source: PaddedConversations
    order: BucketOrder

    def __init__(self, source: PaddedConversations, share: Share, *, seed: int, shuffle: bool) -> None:
        block = -(-CHUNK // share.stride) * share.stride
        super().__init__(source, BucketOrder(source.bucket_of, block, seed=seed, shuffle=shuffle), share)

    def state_dict(self) -> dict[str, Any]:
        """The global position, and the rows of a block, which the order depends on."""
        return super().state_dict() | {"block": self.order.block}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the position in `state`.

        Raises:
            CheckpointError: if the state belongs to other data, or to blocks of another size.
        """
        if state.get("block") != self.order.block:
            raise CheckpointError(
                f"data: the checkpoint's order has blocks of {state.get('block')} rows, now they have "
                f"{self.order.block}; resume with data.conversation.packing as it was, and with as many "
                "rows a micro-batch (data.batch_size times ranks)"
            )
        super().load_state_dict(state)

    def _read(self, first: int) -> Batch:
        everyone = [self.order.item(position) for position in range(first, first + self.share.stride)]
        own = [self.order.item(position) for position in self.share.positions(first)]
        return self.source.read_padded(own, self.source.length_for(everyone))


class BucketedValidationData(ValidationData):
    """Held-out conversations, each micro-batch of all ranks as far as can be of one bucket.

    Micro-batches come in an order that is drawn once and for all, so that the first few are a sample.
    """

    source: PaddedConversations

    def __init__(self, source: PaddedConversations, share: Share) -> None:
        super().__init__(source, source.num_items, share)
        self._sorted = np.argsort(source.bucket_of, kind="stable")

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the first; rows past the end are padding in which no target counts."""
        for number in np.random.default_rng(0).permutation(len(self)).tolist():
            first = number * self.share.stride
            everyone = [self._item(position) for position in range(first, first + self.share.stride)]
            own = [self._item(position) for position in self.share.positions(first)]
            yield self.source.read_padded(own, self.source.length_for(everyone))

    def _item(self, position: int) -> Item | None:
        return Item(0, int(self._sorted[position])) if position < self.num_sequences else None
