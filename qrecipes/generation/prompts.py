"""Files of prompts: one a line, as text or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qrecipes.data.chat import Message
from qrecipes.data.files import content_suffix, expand, open_file
from qrecipes.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class PromptLine:
    """A prompt, and where it stands: text to continue, or a conversation to answer."""

    where: str
    prompt: str | list[Message]


def read_prompts(name: str) -> list[PromptLine]:
    """The prompts of `.txt`, a line each, or `.jsonl`, objects with `prompt` or `messages`; also .gz and .xz.

    Raises:
        DataError: if there is no such file, it holds no prompt, or a line is none; it names the line.
    """
    (path,) = expand([name], key="--prompts", suffixes=(".txt", ".jsonl"))[:1]
    parse = _from_json if content_suffix(path) == ".jsonl" else _from_text
    prompts = []
    with open_file(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}: line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
            if not text.strip():
                raise DataError(f"{where}: is empty, and a prompt needs text; remove the line")
            prompts.append(PromptLine(where, parse(text, where)))
    if not prompts:
        raise DataError(f"{path}: is empty; write one prompt a line")
    return prompts


def _from_text(line: str, where: str) -> str:
    return line


def _from_json(line: str, where: str) -> str | list[Message]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict) or len(row.keys() & {"prompt", "messages"}) != 1:
        raise DataError(f'{where}: expected an object with either "prompt" or "messages"')
    if "messages" in row:
        return list(_messages(row["messages"], where))
    if not isinstance(row["prompt"], str) or not row["prompt"]:
        raise DataError(f'{where}: "prompt" must be a text that is not empty, got {row["prompt"]!r}')
    return row["prompt"]


def _messages(messages: Any, where: str) -> Iterator[Message]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{where}: "messages" must be a list that is not empty')
    for number, message in enumerate(messages, start=1):
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise DataError(
                f'{where}: message {number}: expected "role" ({", ".join(ROLES)}) and "content", a text'
            )
        yield Message(role=role, content=content)
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{where}: the last message is the assistant's; end with one to answer")
