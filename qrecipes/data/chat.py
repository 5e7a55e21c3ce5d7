"""Conversations -> tokens, and which of them the model learns.

The tokens are those that `transformers` gives for the same template, with one exception: what a message
spells out like a special token is text, so nobody can end another's turn by writing "<|im_end|>".
"""

from __future__ import annotations

import os.path
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from qrecipes.data.markup import Marked, Markup, spelling
from qrecipes.data.templates import CLOSE, CUT, OPEN, Message, Rendered, Template, find_template
from qrecipes.data.tokenizers import Tokenizer
from qrecipes.errors import DataError

__all__ = ["Encoded", "Message", "Writer", "encode_conversation", "stop_ids", "with_system"]


class UnstableTemplateError(DataError):
    """A template that writes a turn otherwise once the conversation goes on."""


@dataclass(frozen=True)
class Encoded:
    """Tokens, and which of them count in the loss as targets."""

    ids: list[int]
    trained: list[bool]


def encode_conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    template: str = "auto",
    system: str | None = None,
    add_generation_prompt: bool = False,
) -> Encoded:
    """The tokens of a conversation; the assistant's turns with what ends them are trained.

    `template` is as in `data.conversation`; `system` becomes the system message where there is none. With
    `add_generation_prompt` the assistant's next turn is opened for the model to go on; nothing is trained.

    Raises:
        DataError: if the template refuses the messages, or does not show what the assistant says.
        ConfigError: if there is no such template.
    """
    writer = Writer(tokenizer, find_template(template, tokenizer))
    written = writer.write(with_system(messages, system), add_generation_prompt=add_generation_prompt)
    return writer.encode([written])[0]


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The messages, after a system message where they have none."""
    if system is None or any(message["role"] == "system" for message in messages):
        return list(messages)
    return [Message(role="system", content=system), *messages]


def stop_ids(tokenizer: Tokenizer, template: str = "auto") -> list[int]:
    """Tokens that end the assistant's turn: the template's own, then those that the model's files name."""
    said = [Message(role="user", content="a"), Message(role="assistant", content="b")]
    text = find_template(template, tokenizer).render(said, add_generation_prompt=False).text
    tokens = tokenizer.encode_markup([Markup(text)])[0]
    special = frozenset(tokenizer.special_tokens.values())
    end = _end_of_turn(tokens, range(len(tokens.ids)), text, special)
    own = [token for token in tokens.ids[end - 1 : end] if token in special]
    return list(dict.fromkeys([*own, *tokenizer.end_ids]))


@dataclass(frozen=True)
class _Answer:
    """Characters [start, stop) of an assistant's turn."""

    start: int
    stop: int
    whole: bool = False
    """Learnt to its end, as a generation block says, rather than to the token that ends the turn."""


@dataclass(frozen=True)
class Written:
    """A conversation as a template wrote it, and where the answers that are learnt stand in it."""

    rendered: Rendered
    answers: tuple[_Answer, ...]


class Writer:
    """Conversations -> text -> tokens, with one tokenizer and template.

    `train_on` is "answers", "last_answer" or "all", as in `data.conversation`.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template, train_on: str = "answers") -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.train_on = train_on
        self._special = frozenset(tokenizer.special_tokens.values())
        self._spelling = spelling(tokenizer.special_tokens)

    def write(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> Written:
        """The conversation as text.

        Raises:
            DataError: if the template refuses it, or does not show which part of it is an answer.
        """
        guarded = [_guard(message, self._spelling) for message in messages]
        rendered = self.template.render(guarded, add_generation_prompt=add_generation_prompt)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if add_generation_prompt or self.train_on == "all" or not turns:
            return Written(rendered, ())
        if self.template.marks_answers:
            answers = [_Answer(start, stop, whole=True) for start, stop in rendered.generated]
            return Written(rendered, tuple(answers[-1:] if self.train_on == "last_answer" else answers))
        wanted = turns[-1:] if self.train_on == "last_answer" else turns
        located = (_locate(self.template, guarded, turn, rendered.text) for turn in wanted)
        return Written(rendered, tuple(located))

    def encode(self, written: Sequence[Written]) -> list[Encoded]:
        """The tokens of what was written, many conversations at once."""
        texts = [Markup(each.rendered.text, each.rendered.cuts) for each in written]
        return [
            Encoded(tokens.ids, self._trained(tokens, each))
            for tokens, each in zip(self.tokenizer.encode_markup(texts), written, strict=True)
        ]

    def _trained(self, tokens: Marked, written: Written) -> list[bool]:
        if self.train_on == "all":
            return [True] * len(tokens.ids)
        trained = [False] * len(tokens.ids)
        for answer in written.answers:
            inside = _inside(tokens.spans, answer)
            if not answer.whole:
                inside = inside[: _end_of_turn(tokens, inside, written.rendered.text, self._special)]
            trained[inside.start : inside.stop] = [True] * len(inside)
        return trained


def _locate(template: Template, messages: Sequence[Message], turn: int, text: str) -> _Answer:
    """Where `text` holds the answer that is message `turn`: after all that a model would be given before it.

    It ends where the text up to it and the whole text part ways: some templates end a conversation with more
    than they end a turn with.
    """
    before = template.render(messages[:turn], add_generation_prompt=True).text
    stop = len(text)
    if turn + 1 < len(messages):
        through = template.render(messages[: turn + 1], add_generation_prompt=False).text
        stop = len(os.path.commonprefix([through, text]))
    if not text.startswith(before) or stop <= len(before):
        raise UnstableTemplateError(
            f"the chat template ({template.name}) writes what comes before message {turn + 1}, an answer, "
            "otherwise when the answer follows, so which tokens to learn cannot be told; put "
            "{% generation %} and {% endgeneration %} around the answers in a copy of the template and name "
            'it as data.conversation.template, or set data.conversation.train_on = "all"'
        )
    return _Answer(len(before), stop)


def _guard(message: Message, special: re.Pattern[str]) -> Message:
    """The message with a CUT in all that spells a special token."""
    guarded = {}
    for key, text in message.items():
        assert isinstance(text, str), message
        for mark in (CUT, OPEN, CLOSE):
            if mark in text:
                raise DataError(
                    f"{key!r} holds U+{ord(mark):04X}, which Unicode reserves as no character; remove it"
                )
        guarded[key] = special.sub(lambda match: match[0][:1] + CUT + match[0][1:], text)
    return guarded  # type: ignore[return-value]


def _inside(spans: Sequence[tuple[int, int]], answer: _Answer) -> range:
    """Places of the tokens with a character of the answer and none after it; the first may begin before
    it."""

    def end(span: tuple[int, int]) -> int:
        return max(span[1], span[0] + 1)  # some tokens stand for no character

    return range(bisect_right(spans, answer.start, key=end), bisect_right(spans, answer.stop, key=end))


def _end_of_turn(tokens: Marked, inside: range, text: str, special: frozenset[int]) -> int:
    """How many of the tokens `inside` a turn are learnt: through the first special one of those that end it.

    Templates close a turn with a special token and perhaps a line break, which no model needs to say.
    """
    end = len(inside)
    for place in range(len(inside) - 1, -1, -1):
        token, (start, stop) = tokens.ids[inside[place]], tokens.spans[inside[place]]
        if token in special:
            end = place + 1
        elif text[start:stop].strip():
            break
    return end
