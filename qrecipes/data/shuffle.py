"""A permutation of N numbers that is computed where it is asked for: no memory, whatever N.

A Feistel network over the cells of an a x b table, a * b >= N: each round shifts one coordinate by a hash of
the other, which can be undone, so that rounds are a bijection of the table; a number that lands on one of the
at most a cells behind the N-th is sent on until it lands before it (cycle walking; Black and Rogaway, 2002).
"""

from __future__ import annotations

from math import isqrt

import numpy as np

ROUNDS = 8
"""Shifts of each coordinate; three make a network hard to tell from chance (Luby and Rackoff, 1988)."""
_MASK = (1 << 64) - 1


class Shuffle:
    """The permutation of range(num_items) that belongs to (seed, epoch)."""

    def __init__(self, num_items: int, seed: int, epoch: int) -> None:
        self.num_items = num_items
        self._height = max(1, isqrt(num_items - 1) + 1)
        self._width = -(-num_items // self._height)
        keys = np.random.SeedSequence([seed, epoch]).generate_state(2 * ROUNDS, np.uint64)
        self._keys = [int(key) for key in keys]

    def __getitem__(self, position: int) -> int:
        """The number at `position`, both from 0 to num_items - 1."""
        number = self._round_trip(position)
        while number >= self.num_items:
            number = self._round_trip(number)
        return number

    def _round_trip(self, number: int) -> int:
        row, column = divmod(number, self._width)
        keys = iter(self._keys)
        for row_key, column_key in zip(keys, keys, strict=True):
            row = (row + _hash(column, row_key)) % self._height
            column = (column + _hash(row, column_key)) % self._width
        return row * self._width + column


def _hash(number: int, key: int) -> int:
    """64 well-mixed bits: the output function of SplitMix64 (Steele, Lea and Flood, 2014)."""
    z = (number + key) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
