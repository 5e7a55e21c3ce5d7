"""Conversations of a run's data section, read, written out and tokenized once, with a count of what was not
kept."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from qrecipes.data.chat import Encoded, UnstableTemplateError, Writer, Written, with_system
from qrecipes.data.formats import Conversation, Format, MalformedError, detect
from qrecipes.data.packing import separators
from qrecipes.data.rows import Row, read_rows
from qrecipes.data.templates import find_template
from qrecipes.data.tokenizers import Tokenizer
from qrecipes.errors import DataError

if TYPE_CHECKING:
    from qrecipes.config.run import DataSection

BATCH = 1024
"""Conversations that are tokenized together."""


@dataclass(frozen=True)
class Report:
    """Where conversations come from, and what became of the rows."""

    origin: str
    read_as: str
    """The format with its columns, and the template."""
    rows: int = 0
    malformed: int = 0
    """Dropped: no conversation."""
    blank: int = 0
    """Dropped: an answer without text."""
    too_long: int = 0
    """Dropped: more tokens than a sequence has."""
    truncated: int = 0
    """Kept, without the tokens past the end of a sequence."""
    unanswered: int = 0
    """Dropped: nothing in them, or in what truncation left of them, would be learnt."""

    @property
    def kept(self) -> int:
        """Rows that became conversations."""
        return self.rows - self.malformed - self.blank - self.too_long - self.unanswered

    def losses(self) -> list[str]:
        """What was not taken as it is, in words with counts; empty where all was."""
        counts = [
            (self.malformed, "malformed dropped"),
            (self.blank, "with an empty answer dropped"),
            (self.too_long, "too long dropped"),
            (self.unanswered, "with no answer in the tokens that fit dropped"),
            (self.truncated, "truncated"),
        ]
        return [f"{count:,} {what}" for count, what in counts if count]

    def describe(self) -> str:
        """Rows read and kept, and why not the others."""
        losses = f" ({', '.join(self.losses())})" if self.losses() else ""
        return f"{self.kept:,} of {self.rows:,} rows{losses} from {self.origin} as {self.read_as}"


@dataclass(frozen=True)
class Conversations:
    """Tokenized conversations, one after the other; a part of them shares the arrays."""

    ids: np.ndarray
    """Tokens of all conversations, one after the other."""
    trained: np.ndarray
    """bool, as long: whether a token counts in the loss, as a target."""
    starts: np.ndarray
    """Where each conversation begins, and where the last one ends."""
    report: Report

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each conversation."""
        return np.diff(self.starts)

    def tokens(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of one conversation, and which are trained, as views."""
        part = slice(self.starts[index], self.starts[index + 1])
        return self.ids[part], self.trained[part]

    def part(self, start: int, stop: int) -> Conversations:
        """Conversations [start, stop)."""
        return replace(self, starts=self.starts[start : stop + 1])

    def max_token(self) -> int:
        """Largest token."""
        return int(self.ids[self.starts[0] : self.starts[-1]].max())

    def describe(self) -> str:
        """Counts of conversations and tokens, the share that is learnt, and lengths."""
        total = int(self.starts[-1] - self.starts[0])
        trained = self._num_targets()
        lengths = self.lengths
        return (
            f"{len(self):,} conversations of {lengths.min():,} to {lengths.max():,} tokens (median "
            f"{int(np.median(lengths)):,}), {total:,} tokens, {trained:,} of them learnt "
            f"({trained / total:.1%}); {self.report.describe()}"
        )

    def _num_targets(self) -> int:
        """Trained tokens; a conversation's first is nobody's target."""
        inside = self.trained[self.starts[0] : self.starts[-1]]
        return int(inside.sum()) - int(self.trained[self.starts[:-1]].sum())


def hold_out(conversations: Conversations, fraction: float) -> tuple[Conversations, Conversations]:
    """Training and held-out part: the last `fraction` of the conversations, at least one, is held out.

    Raises:
        DataError: if nothing would be left to train on.
    """
    held_out = max(1, round(len(conversations) * fraction))
    boundary = len(conversations) - held_out
    if boundary < 1:
        raise DataError(
            f"data.validation_fraction: {fraction} of {len(conversations)} conversations leaves none to "
            "train on; add rows, or name data.validation_files"
        )
    return conversations.part(0, boundary), conversations.part(boundary, len(conversations))


def read_conversations(
    files: tuple[str, ...], split: str, data: DataSection, tokenizer: Tokenizer, key: str
) -> Conversations:
    """All conversations of `files`; `key` is the setting that named them.

    A conversation with an answer that is blank is dropped and counted, with a warning.

    Raises:
        ConfigError: if the template does not exist.
        DataError: naming the row that is no conversation, that the template refuses, or that is too long
            where `data.conversation` says "error"; or if nothing is left.
    """
    rows, origin = read_rows(files, split, key)
    reading = _Reading(data, tokenizer, rows, origin, key)
    ids = array("I")
    trained = array("B")
    lengths = [0]
    for encoded in reading:
        ids.extend(encoded.ids)
        trained.frombytes(bytes(encoded.trained))
        lengths.append(len(encoded.ids))
    report = reading.report()
    if len(lengths) == 1:
        raise DataError(
            f"{key}: no conversation to learn from: {report.describe()}; look at the files, at "
            "data.sequence_length and at data.conversation"
        )
    starts = np.cumsum(lengths)
    return Conversations(np.frombuffer(ids, np.uint32), np.frombuffer(trained, np.bool_), starts, report)


class _Reading:
    """Rows -> encoded conversations that fit, counting those that do not."""

    def __init__(
        self, data: DataSection, tokenizer: Tokenizer, rows: Iterator[Row], origin: str, key: str
    ) -> None:
        self.section = data.conversation
        self.length = data.sequence_length
        self.tokenizer = tokenizer
        self.rows = rows
        self.origin = origin
        self.key = key
        self.format: Format | None = None
        self.writer: Writer | None = None
        self.counts = dict.fromkeys(("rows", "malformed", "blank", "too_long", "truncated", "unanswered"), 0)

    def __iter__(self) -> Iterator[Encoded]:
        readable = self._written()
        while batch := list(islice(readable, BATCH)):
            for (conversation, _), encoded in zip(batch, self._encode(batch), strict=True):
                fitted = self._fit(encoded, conversation.where)
                if fitted is not None:
                    yield fitted

    def report(self) -> Report:
        """What was read so far."""
        template = f", template {self.writer.template.name}" if self.writer is not None else ""
        read_as = f"{self.format.describe()}{template}" if self.format is not None else "nothing"
        return Report(self.origin, read_as, **self.counts)

    def _written(self) -> Iterator[tuple[Conversation, Written | None]]:
        for row in self.rows:
            self.counts["rows"] += 1
            try:
                conversation = self._read(row)
                if conversation.lacks_an_answer:
                    self.counts["blank"] += 1
                    continue
                written = self._write(conversation)
            except MalformedError as error:
                if self.section.malformed == "error":
                    raise DataError(
                        f"{row.where}: {error}; correct the row, or set data.conversation.malformed = "
                        '"drop" to leave such rows out'
                    ) from error
                self.counts["malformed"] += 1
            else:
                yield conversation, written

    def _read(self, row: Row) -> Conversation:
        if self.format is None:
            self.format = detect(row, self.section)
        return self.format.conversation(row)

    def _write(self, conversation: Conversation) -> Written | None:
        """The conversation by the template; None where it is text."""
        if conversation.text is not None:
            return None
        if self.writer is None:
            template = find_template(self.section.template, self.tokenizer)
            self.writer = Writer(self.tokenizer, template, self.section.train_on)
        try:
            return self.writer.write(with_system(conversation.messages, self.section.system))
        except UnstableTemplateError as error:
            raise DataError(f"{conversation.where}: {error}") from error
        except DataError as error:
            raise MalformedError(str(error)) from error

    def _encode(self, batch: list[tuple[Conversation, Written | None]]) -> list[Encoded]:
        written = [each for _, each in batch if each is not None]
        if written:
            assert self.writer is not None
            return self.writer.encode(written)
        before, after = separators(self.tokenizer)
        texts = self.tokenizer.encode_batch([conversation.text or "" for conversation, _ in batch])
        whole = [[*before, *ids, *after] for ids in texts]
        return [Encoded(ids, [True] * len(ids)) for ids in whole]

    def _fit(self, encoded: Encoded, where: str) -> Encoded | None:
        """The conversation as it goes into a sequence; None where it does not."""
        excess = len(encoded.ids) - self.length
        if excess > 0:
            if self.section.too_long == "error":
                raise DataError(
                    f"{where}: {len(encoded.ids):,} tokens, {excess:,} more than data.sequence_length; raise "
                    'it, or set data.conversation.too_long to "truncate" or "drop"'
                )
            if self.section.too_long == "drop":
                self.counts["too_long"] += 1
                return None
            encoded = Encoded(encoded.ids[: self.length], encoded.trained[: self.length])
        if not any(encoded.trained[1:]):
            self.counts["unanswered"] += 1
            return None
        self.counts["truncated"] += excess > 0
        return encoded


def warn_of_losses(report: Report, key: str) -> None:
    """Warn where rows were dropped, with counts."""
    if report.kept < report.rows:
        warnings.warn(f"{key}: of {report.rows:,} rows {', '.join(report.losses())}", stacklevel=5)
