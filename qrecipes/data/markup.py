"""Text in which special tokens are spelled out -> token numbers, each with the characters it stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple


@dataclass(frozen=True)
class Markup:
    """Text whose special tokens, where they are spelled out, are meant; except across a cut."""

    text: str
    cuts: tuple[int, ...] = ()
    """Characters before which the text is cut, ascending: inside what spells a special token but is only
    text."""

    def pieces(self) -> Iterator[tuple[int, str]]:
        """The parts between cuts, each with its place in the text."""
        for start, stop in pairwise((0, *self.cuts, len(self.text))):
            yield start, self.text[start:stop]


class Marked(NamedTuple):
    """Tokens of a markup."""

    ids: list[int]
    spans: list[tuple[int, int]]
    """Characters [start, stop) of the text that each token stands for; tokens of one character share it."""


def encode_pieces(
    markups: Sequence[Markup], encode: Callable[[list[str], list[bool]], list[Marked]]
) -> list[Marked]:
    """Tokens of each markup, given `encode` for pieces of text and whether each begins its text."""
    pieces = [
        (index, start, piece)
        for index, markup in enumerate(markups)
        for start, piece in markup.pieces()
        if piece
    ]
    encoded = encode([piece for _, _, piece in pieces], [start == 0 for _, start, _ in pieces])
    whole = [Marked([], []) for _ in markups]
    for (index, start, _), (ids, spans) in zip(pieces, encoded, strict=True):
        whole[index].ids.extend(ids)
        whole[index].spans.extend(((a + start, b + start) for a, b in spans) if start else spans)
    return whole


def encode_runs(text: str, special: Mapping[str, int], encode: Callable[[str], Marked]) -> Marked:
    """Tokens of `text`: what `special` spells are its tokens, and `encode` does the rest."""
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    end = 0
    for match in (*spelling(special).finditer(text), None):
        start, stop = match.span() if match else (len(text), len(text))
        if start > end:
            run = encode(text[end:start])
            ids += run.ids
            spans += ((a + end, b + end) for a, b in run.spans)
        if match:
            ids.append(special[match[0]])
            spans.append((start, stop))
        end = stop
    return Marked(ids, spans)


def spelling(special: Mapping[str, int]) -> re.Pattern[str]:
    """What matches the spelling of any special token, the longest first."""
    longest_first = sorted(filter(None, special), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
