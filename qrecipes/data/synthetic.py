"""Random but learnable data: every item is a function of the seed and its index, and never runs out.

Tokens: a few frequent tokens follow one another around a fixed circle; now and then any token of the
vocabulary comes in, and the circle goes on from where that token leads. A model first learns which tokens are
frequent, then their order. Images: a fixed coarse pattern for each class under noise. Chain and patterns do
not depend on the seed, so held-out data has the same distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qrecipes.data.batch import IGNORE, Batch
from qrecipes.data.order import Item

NUM_HELD_OUT = 64
"""Sequences or images that are held out."""
NUM_FREQUENT = 16
"""Tokens of the circle."""
SURPRISE = 0.1
"""Share of tokens drawn from the whole vocabulary."""
PATTERN_CELLS = 4
"""Cells of a class's pattern along each side of an image."""
NOISE = 0.5
"""Standard deviation of the noise on an image, whose pattern has 1."""

# First words of the generators' entropy: streams that never meet, whatever seed and index are.
_TRAINING, _HELD_OUT, _CHAIN, _PATTERNS = 1, 2, 3, 4


class _Draws:
    """Generators of the items, other ones where they are held out."""

    def __init__(self, seed: int, held_out: bool) -> None:
        self._key = (_HELD_OUT if held_out else _TRAINING, seed)
        self.num_items = NUM_HELD_OUT if held_out else None

    def generator(self, item: Item) -> np.random.Generator:
        """Randomness of one item."""
        return np.random.default_rng([*self._key, item.index])


class SyntheticTokens(_Draws):
    """Sequences of `length` tokens below `vocab_size`."""

    def __init__(self, *, vocab_size: int, length: int, seed: int, held_out: bool) -> None:
        super().__init__(seed, held_out)
        self.vocab_size = vocab_size
        self.length = length
        self.circle = np.random.default_rng([_CHAIN, vocab_size]).permutation(vocab_size)[:NUM_FREQUENT]

    def read(self, items: Sequence[Item | None]) -> Batch:
        """The sequences as rows."""
        inputs = torch.zeros(len(items), self.length, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORE)
        for row, item in enumerate(items):
            if item is not None:
                tokens = torch.from_numpy(self._sequence(self.generator(item)))
                inputs[row], targets[row] = tokens[:-1], tokens[1:]
        return Batch(inputs, targets)

    def max_token(self) -> int:
        """Largest token that can occur."""
        return self.vocab_size - 1

    def describe(self) -> str:
        """What is made up."""
        return f"synthetic sequences of {self.length:,}, {self.vocab_size:,} tokens in the vocabulary"

    def _sequence(self, generator: np.random.Generator) -> np.ndarray:
        """[length + 1]: after a surprise x, the circle goes on from place x + 1."""
        places = np.arange(self.length + 1)
        surprising = generator.random(self.length + 1) < SURPRISE
        surprising[0] = True
        surprises = generator.integers(self.vocab_size, size=self.length + 1)
        last = np.maximum.accumulate(np.where(surprising, places, 0))
        return np.where(
            surprising, surprises, self.circle[(surprises[last] + places - last) % len(self.circle)]
        )


class SyntheticImages(_Draws):
    """Images of `size` x `size` pixels in `num_classes` classes."""

    def __init__(self, *, num_classes: int, size: int, seed: int, held_out: bool) -> None:
        super().__init__(seed, held_out)
        self.num_classes = num_classes
        self.size = size
        cells = (num_classes, 3, PATTERN_CELLS, PATTERN_CELLS)
        self.patterns = np.random.default_rng([_PATTERNS, num_classes]).standard_normal(cells, np.float32)

    def read(self, items: Sequence[Item | None]) -> Batch:
        """The images and their classes."""
        inputs = torch.zeros(len(items), 3, self.size, self.size)
        targets = torch.full((len(items),), IGNORE, dtype=torch.int64)
        cell = np.arange(self.size) * PATTERN_CELLS // self.size
        for row, item in enumerate(items):
            if item is None:
                continue
            generator = self.generator(item)
            label = int(generator.integers(self.num_classes))
            noise = generator.standard_normal((3, self.size, self.size), np.float32)
            inputs[row] = torch.from_numpy(self.patterns[label][:, cell[:, None], cell] + NOISE * noise)
            targets[row] = label
        return Batch(inputs, targets)

    def max_token(self) -> int:
        """Largest number of a class."""
        return self.num_classes - 1

    def describe(self) -> str:
        """What is made up."""
        return f"synthetic images of {self.size} x {self.size} pixels, {self.num_classes:,} classes"
