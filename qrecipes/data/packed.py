"""Several conversations in one sequence, none of which attends to another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qrecipes.data.batch import IGNORE, Batch
from qrecipes.data.conversations import Conversations
from qrecipes.data.order import Item


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in packs of at most `capacity` in sum; each index is in one pack.

    Each length in turn goes where it leaves the least room, so packs depend on nothing but the lengths and
    their order.

    Raises:
        ValueError: if a length is more than `capacity`.
    """
    packs: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # room -> packs with as much
    rooms = 0  # bit r is set where by_room[r] holds a pack
    for index, length in enumerate(lengths):
        if length > capacity:
            raise ValueError(f"length {length} is more than the {capacity} of a pack")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit
            pack = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(index)
        by_room[room - length].append(pack)
        rooms |= 1 << (room - length)
    return packs


class PackedConversations:
    """Sequences of `length` tokens, each of whole conversations and padding at its end.

    Conversations are packed once, in an order drawn from `seed`, or in their own where it is None. The last
    token of a conversation has no target, and padding is a document of its own.
    """

    def __init__(self, conversations: Conversations, length: int, *, seed: int | None) -> None:
        self.conversations = conversations
        self.length = length
        count = len(conversations)
        order = np.arange(count) if seed is None else np.random.default_rng([seed, count]).permutation(count)
        packs = best_fit(conversations.lengths[order].tolist(), length)
        self.packs = [order[pack].tolist() for pack in packs]
        self.num_items = len(self.packs)

    def read(self, items: Sequence[Item | None]) -> Batch:
        """The sequences as rows; None gives a row of padding."""
        shape = (len(items), self.length)
        inputs = np.zeros(shape, np.int64)
        targets = np.full(shape, IGNORE, np.int64)
        documents = np.zeros(shape, np.int32)
        positions = np.zeros(shape, np.int64)
        for row, item in enumerate(items):
            pack = [] if item is None else self.packs[item.index]
            end = 0
            for number, index in enumerate(pack):
                start, end = end, end + fill(self.conversations, index, inputs[row, end:], targets[row, end:])
                documents[row, start:end] = number
                positions[row, start:end] = np.arange(end - start)
            documents[row, end:] = len(pack)
            positions[row, end:] = np.arange(self.length - end)
        return Batch(*map(torch.from_numpy, (inputs, targets, documents, positions)))

    def max_token(self) -> int:
        """Largest token."""
        return self.conversations.max_token()

    def describe(self) -> str:
        """Counts of sequences and conversations, and how full the sequences are."""
        full = self.conversations.lengths.sum() / (self.num_items * self.length)
        return (
            f"{self.num_items:,} sequences of {self.length:,}, {full:.1%} full: "
            f"{self.conversations.describe()}"
        )


def fill(conversations: Conversations, index: int, inputs: np.ndarray, targets: np.ndarray) -> int:
    """Write a conversation and its targets at the beginning of `inputs` and `targets`; how long it is."""
    ids, trained = conversations.tokens(index)
    inputs[: len(ids)] = ids
    targets[: len(ids) - 1] = np.where(trained[1:], ids[1:].astype(np.int64), IGNORE)
    return len(ids)
