"""Rows of the usual shapes -> conversations: which columns hold what is told once, by the first row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qrecipes.data.rows import Row
from qrecipes.data.templates import Message
from qrecipes.errors import DataError

if TYPE_CHECKING:
    from qrecipes.config.run import ConversationSection

USUAL: Mapping[str, tuple[str, ...]] = {
    "instruction": ("instruction", "prompt", "question", "query", "request"),
    "input": ("input", "context"),
    "output": ("output", "response", "answer", "completion"),
    "system": ("system", "system_prompt"),
    "messages": ("messages", "conversations", "conversation"),
    "text": ("text",),
}
"""Our name of a column -> the names it goes by."""
ROLES: Mapping[str, str] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""A speaker as data sets call it -> role."""
OPTIONAL = ("input", "system")
"""Columns that a row may lack or leave empty."""


class MalformedError(DataError):
    """A row that is no conversation; the message is without its place."""


@dataclass(frozen=True)
class Conversation:
    """What one row says: messages, or text."""

    where: str
    messages: tuple[Message, ...] = ()
    text: str | None = None

    @property
    def lacks_an_answer(self) -> bool:
        """Whether a turn of the assistant, or a text, is blank."""
        if self.text is not None:
            return not self.text.strip()
        answers = (message["content"] for message in self.messages if message["role"] == "assistant")
        return not all(answer.strip() for answer in answers)


@dataclass(frozen=True)
class Format:
    """How rows become conversations: the format, and the data's column for each of ours."""

    kind: str
    columns: Mapping[str, str]

    def conversation(self, row: Row) -> Conversation:
        """What the row says.

        Raises:
            MalformedError: if it lacks a column, holds something else there, or nobody answers in it.
        """
        return _READERS[self.kind](self, row)

    def describe(self) -> str:
        """The format with its columns."""
        named = ", ".join(ours if ours == its else f"{ours} = {its}" for ours, its in self.columns.items())
        return f"{self.kind} ({named})"


def detect(row: Row, section: ConversationSection) -> Format:
    """The format that `section` names, or that the columns of the data's first row tell.

    Raises:
        DataError: if the columns tell none, or more than one column could be meant.
    """
    kind = section.format if section.format != "auto" else _kind(row, section)
    columns = {}
    for ours in _COLUMNS[kind]:
        found = _column(ours, row, section.columns)
        if found is not None:
            columns[ours] = found
        elif ours not in OPTIONAL:
            raise _lacking(row, kind, ours)
    return Format(kind, columns)


_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "instruction": ("instruction", "input", "output", "system"),
    "messages": ("messages", "system"),
    "sharegpt": ("messages", "system"),
    "text": ("text",),
}


def _kind(row: Row, section: ConversationSection) -> str:
    """Turns before instructions before text: data sets often carry the same again, joined, as text."""
    own = section.columns
    turns = _column("messages", row, own)
    if turns is not None:
        first = next(iter(_list(row.values[turns], turns)), None)
        return "sharegpt" if isinstance(first, Mapping) and "from" in first else "messages"
    if _column("output", row, own) is not None and _column("instruction", row, own) is not None:
        return "instruction"
    if _column("text", row, own) is not None:
        return "text"
    raise DataError(
        f"{row.where}: its columns, {_listed(row)}, tell no format: expected a request and an answer (such "
        "as instruction and output, or question and answer), messages, conversations or text; name them in "
        'data.conversation.columns, such as { instruction = "query", output = "response" }'
    )


def _column(ours: str, row: Row, own: Mapping[str, str]) -> str | None:
    """The data's column for `ours`; None where there is none."""
    if ours in own:
        if own[ours] not in row.values:
            raise DataError(
                f"{row.where}: no column {own[ours]!r}, which data.conversation.columns.{ours} names; there "
                f"are {_listed(row)}"
            )
        return own[ours]
    taken = set(own.values())
    found = [name for name in USUAL[ours] if name in row.values and name not in taken]
    if len(found) > 1:
        raise DataError(
            f"{row.where}: columns {' and '.join(map(repr, found))} could each be the {ours}; say which in "
            f'data.conversation.columns, such as {{ {ours} = "{found[0]}" }}'
        )
    return found[0] if found else None


def _lacking(row: Row, kind: str, ours: str) -> DataError:
    return DataError(
        f"{row.where}: no column for {ours}, which the format {kind!r} needs; there are {_listed(row)}; name "
        f'it as data.conversation.columns.{ours} = "COLUMN"'
    )


def _listed(row: Row) -> str:
    return ", ".join(row.values) or "none"


def _text(row: Row, column: str, *, optional: bool = False) -> str:
    if optional and row.values.get(column) is None:
        return ""
    if column not in row.values:
        raise MalformedError(f"no column {column!r}; there are {_listed(row)}")
    return _checked(row.values[column], f"column {column!r}")


def _checked(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise MalformedError(
            f"{place} holds {'nothing' if value is None else type(value).__name__}, not text"
        )
    # JSON can spell half of a character pair, which no tokenizer takes.
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MalformedError(f"{place} holds half of a surrogate pair, which is no character") from error
    return value


def _instruction(form: Format, row: Row) -> Conversation:
    columns = form.columns
    request = Message(role="user", content=_text(row, columns["instruction"]))
    extra = _text(row, columns["input"], optional=True) if "input" in columns else ""
    if extra.strip():
        joined = f"{request['content']}\n\n{extra}"
        request = Message(role="user", content=joined, instruction=request["content"], input=extra)
    answer = Message(role="assistant", content=_text(row, columns["output"]))
    return Conversation(row.where, (*_system(form, row), request, answer))


def _system(form: Format, row: Row) -> Iterator[Message]:
    if "system" in form.columns:
        text = _text(row, form.columns["system"], optional=True)
        if text.strip():
            yield Message(role="system", content=text)


def _turns(form: Format, row: Row, speaker: str, said: str) -> Conversation:
    column = form.columns["messages"]
    if column not in row.values:
        raise MalformedError(f"no column {column!r}; there are {_listed(row)}")
    messages = [
        _message(turn, speaker, said, f"column {column!r}, message {number}")
        for number, turn in enumerate(_list(row.values[column], column), start=1)
    ]
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages) or "no messages"
        raise MalformedError(
            f"column {column!r}: the assistant says nothing ({roles}), so there is no answer"
        )
    if all(message["role"] != "system" for message in messages):
        messages = [*_system(form, row), *messages]
    return Conversation(row.where, tuple(messages))


def _message(turn: Any, speaker: str, said: str, place: str) -> Message:
    if not isinstance(turn, Mapping):
        raise MalformedError(f"{place} is {type(turn).__name__}, not an object with {speaker!r} and {said!r}")
    for key in (speaker, said):
        if key not in turn:
            raise MalformedError(f"{place}: no {key!r}; there are {', '.join(map(str, turn)) or 'none'}")
    role = ROLES.get(turn[speaker]) if isinstance(turn[speaker], str) else None
    if role is None:
        raise MalformedError(f"{place}: {speaker} {turn[speaker]!r} is not one of {', '.join(ROLES)}")
    return Message(role=role, content=_content(turn[said], f"{place}, {said!r}"))


def _content(value: Any, place: str) -> str:
    """Text, or the parts of one: [{"type": "text", "text": ...}, ...]."""
    if not isinstance(value, list):
        return _checked(value, place)
    parts = []
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise MalformedError(f"{place} holds a part that is not text")
        parts.append(_checked(part.get("text"), place))
    return "".join(parts)


def _list(value: Any, column: str) -> Sequence[Any]:
    """A list, or what spells one in JSON, as .csv files have to."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise MalformedError(f"column {column!r} holds text that is no JSON list: {error}") from error
    if not isinstance(value, list):
        kind = "nothing" if value is None else type(value).__name__
        raise MalformedError(f"column {column!r} holds {kind}, not a list of messages")
    return value


_READERS: Mapping[str, Callable[[Format, Row], Conversation]] = {
    "instruction": _instruction,
    "messages": lambda form, row: _turns(form, row, "role", "content"),
    "sharegpt": lambda form, row: _turns(form, row, "from", "value"),
    "text": lambda form, row: Conversation(row.where, text=_text(row, form.columns["text"])),
}
