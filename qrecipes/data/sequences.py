"""One long run of tokens, in memory or memory-mapped, cut into sequences."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from qrecipes.data.batch import IGNORE, Batch
from qrecipes.data.order import Item
from qrecipes.errors import DataError

SAMPLE_TOKENS = 1 << 26
"""Most tokens that `max_token` looks at, spread evenly."""


class TokenStream:
    """Arrays of unsigned integers read as if they were one; nothing is copied until it is read."""

    def __init__(self, pieces: Sequence[np.ndarray], origin: str) -> None:
        self.pieces = [piece for piece in pieces if len(piece)]
        self.origin = origin
        self._starts = np.cumsum([0, *map(len, self.pieces)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64."""
        parts = self.part(start, stop).pieces
        return np.concatenate(parts, dtype=np.int64) if parts else np.empty(0, np.int64)

    def part(self, start: int, stop: int) -> TokenStream:
        """Tokens [start, stop) as a stream of views."""
        first = max(0, int(np.searchsorted(self._starts, start, "right")) - 1)
        last = int(np.searchsorted(self._starts, stop, "left"))
        offsets = self._starts[first:last]
        views = [
            piece[max(0, start - offset) : stop - offset]
            for piece, offset in zip(self.pieces[first:last], offsets, strict=False)
        ]
        return TokenStream(views, self.origin)

    def max_token(self) -> int:
        """Largest token: of all where there are at most SAMPLE_TOKENS, else of evenly spread runs."""
        runs = 1 if len(self) <= SAMPLE_TOKENS else 1024
        bounds = np.linspace(0, len(self), runs + 1).astype(np.int64)
        return max(
            int(piece.max())
            for start, stop in pairwise(bounds.tolist())
            for piece in self.part(start, min(stop, start + SAMPLE_TOKENS // runs)).pieces
        )


class Sequences:
    """A stream cut into sequences of `length` tokens with stride `length`; the last target is one further.

    With `keeps_rest` (held-out data) the shorter last sequence is padded with targets that do not count, so
    that every token but the first is predicted exactly once. Without it (training) the last, incomplete
    sequence is left out.
    """

    def __init__(self, stream: TokenStream, length: int, *, keeps_rest: bool = False) -> None:
        self.stream = stream
        self.length = length
        predicted = max(0, len(stream) - 1)
        self.num_items = -(-predicted // length) if keeps_rest else predicted // length

    def read(self, items: Sequence[Item | None]) -> Batch:
        """The sequences as rows."""
        inputs = torch.zeros(len(items), self.length, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORE)
        for row, item in enumerate(items):
            if item is None:
                continue
            start = item.index * self.length
            tokens = torch.from_numpy(self.stream.read(start, min(start + self.length + 1, len(self.stream))))
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, : len(tokens) - 1] = tokens[1:]
        return Batch(inputs, targets)

    def max_token(self) -> int:
        """Largest token, of a sample where the stream is huge."""
        return self.stream.max_token()

    def describe(self) -> str:
        """Counts of sequences and tokens, and where they come from."""
        counts = f"{self.num_items:,} sequences of {self.length:,}, {len(self.stream):,} tokens"
        return f"{counts} from {self.stream.origin}"


def cut(stream: TokenStream, length: int, fraction: float) -> tuple[TokenStream, TokenStream]:
    """Training and held-out part of a stream; the parts share no token.

    The last `fraction` of the stream's sequences is held out, with what is left after the last whole
    sequence.

    Raises:
        DataError: if either part would have no sequence.
    """
    check_length(stream, length, "data.files")
    num_sequences = (len(stream) - 1) // length
    held_out = max(1, round(num_sequences * fraction))
    boundary = (num_sequences - held_out) * length + 1
    # The held-out part's own first token is context only, so it needs two.
    if held_out >= num_sequences or len(stream) - boundary < 2:
        raise DataError(
            f"data.validation_fraction: {fraction} of {num_sequences} sequences of {length} tokens leaves "
            "nothing to "
            "train on or nothing to hold out; lower data.sequence_length, add text, or name "
            "data.validation_files"
        )
    return stream.part(0, boundary), stream.part(boundary, len(stream))


def check_length(stream: TokenStream, length: int, key: str) -> None:
    """Refuse a stream that is shorter than one training sequence.

    Raises:
        DataError: with the two numbers and what to change.
    """
    if len(stream) < length + 1:
        remedy = f"lower data.sequence_length to {len(stream) - 1} or less, or " if len(stream) > 1 else ""
        raise DataError(
            f"{key}: {len(stream)} tokens from {stream.origin} are fewer than one sequence of {length} and "
            "its last "
            f"target ({length + 1}); {remedy}add text"
        )
