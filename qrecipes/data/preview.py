"""Rows of a batch as text, with the tokens that are learnt marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from qrecipes.data.batch import IGNORE, Batch
from qrecipes.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Marks:
    """What stands before and after a run of learnt tokens."""

    before: str
    after: str


COLOR = Marks("\033[32m", "\033[0m")
"""Green, on a terminal."""
BRACKETS = Marks("[[", "]]")
"""Where there is no color."""


@dataclass(frozen=True)
class Document:
    """Tokens of one document in a row, and which of them are targets that count."""

    ids: list[int]
    learnt: list[bool]


def documents_of(batch: Batch, row: int) -> tuple[list[Document], int]:
    """The documents of a row, and how much padding follows them.

    A token is learnt if it is the target of the one before it. Where the row's last target lies beyond its
    inputs, that token is shown too.
    """
    ids, targets = batch.inputs[row].tolist(), batch.targets[row].tolist()
    numbers = [0] * len(ids) if batch.documents is None else batch.documents[row].tolist()
    if targets[-1] != IGNORE:
        ids, numbers = [*ids, targets[-1]], [*numbers, numbers[-1]]
    learnt = [False, *(target != IGNORE for target in targets)][: len(ids)]
    documents = []
    for _, places in groupby(range(len(ids)), key=numbers.__getitem__):
        part = list(places)
        documents.append(Document([ids[i] for i in part], [learnt[i] for i in part]))
    return _without_padding(documents)


def render(document: Document, tokenizer: Tokenizer | None, marks: Marks) -> str:
    """The document's text, special tokens spelled out, learnt runs between `marks`; numbers without a
    tokenizer."""
    parts = []
    for learnt, text in _runs(document, tokenizer):
        # Line by line: pagers forget a color at the end of a line.
        lines = text.split("\n") if learnt and marks == COLOR else [text]
        parts.append("\n".join(marks.before + line + marks.after if learnt else line for line in lines))
    return "".join(parts)


def count(documents: Sequence[Document]) -> tuple[int, int]:
    """Tokens, and how many of them are learnt."""
    return sum(len(d.ids) for d in documents), sum(sum(d.learnt) for d in documents)


def _without_padding(documents: list[Document]) -> tuple[list[Document], int]:
    """Padding is zeros at the end, which nobody learns."""
    last = documents[-1]
    end = len(last.ids)
    while end and not last.ids[end - 1] and not last.learnt[end - 1]:
        end -= 1
    kept = [Document(last.ids[:end], last.learnt[:end])] if end else []
    return [*documents[:-1], *kept], len(last.ids) - end


def _runs(document: Document, tokenizer: Tokenizer | None) -> Iterator[tuple[bool, str]]:
    """Runs of tokens that are learnt or not, as text."""
    pieces = _spelled(document.ids, tokenizer)
    for learnt, places in groupby(range(len(document.ids)), key=document.learnt.__getitem__):
        yield learnt, "".join(pieces[place] for place in places)


def _spelled(ids: Sequence[int], tokenizer: Tokenizer | None) -> list[str]:
    """The text that each token adds; of a character of several tokens, the last has it."""
    if tokenizer is None:
        return [f"{token} " for token in ids]
    special = {number: text for text, number in tokenizer.special_tokens.items()}
    pieces: list[str] = []
    begun: list[int] = []  # tokens since the last special one
    done = ""
    for token in ids:
        if token in special:
            pieces.append(special[token])
            begun, done = [], ""
            continue
        begun.append(token)
        text = tokenizer.decode(begun)
        if text.endswith("\ufffd"):
            pieces.append("")  # part of a character
            continue
        pieces.append(text[len(done) :])
        done = text
    return pieces
