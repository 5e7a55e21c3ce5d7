"""A conversation at the terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qrecipes.data.chat import Message, encode_conversation, stop_ids
from qrecipes.data.tokenizers import Tokenizer
from qrecipes.errors import QRecipesError
from qrecipes.generation.generator import Generator
from qrecipes.generation.sampling import Sampling

_COMMAND = re.compile(r"/[a-z]+\s*")
_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"


@dataclass(frozen=True)
class ChatFormat:
    """How a conversation is written for the model; see `encode_conversation`."""

    tokenizer: Tokenizer
    template: str = "auto"
    system: str | None = None

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Tokens up to where the assistant's next turn begins."""
        return encode_conversation(
            self.tokenizer, messages, template=self.template, system=self.system, add_generation_prompt=True
        ).ids

    def stop_tokens(self) -> list[int]:
        """Tokens that end the assistant's turn."""
        return stop_ids(self.tokenizer, self.template)


def chat(
    generator: Generator,
    format: ChatFormat,
    sampling: Sampling,
    *,
    stop: Sequence[str] = (),
    read: Callable[[], str] = input,
    write: Callable[[str], object] = sys.stdout.write,
    note: Callable[[str], object] = lambda text: print(text, file=sys.stderr),
) -> None:
    """Answer line after line until `read` raises EOFError or gives "/exit".

    `write` gets the answers as they come and a line break after each; `note` gets what is no answer. A line
    that cannot be answered, because the conversation has grown too long for instance, is taken back.
    """
    stop_tokens = format.stop_tokens()
    history: list[Message] = []
    note(_HELP)
    while True:
        try:
            line = read()
        except EOFError:
            return
        except KeyboardInterrupt:
            note(f"\n{_HELP}")
            continue
        if _COMMAND.fullmatch(line):
            if line.strip() == "/exit":
                return
            if line.strip() == "/reset":
                history = []
                note("the conversation is forgotten")
            else:
                note(f"{line.strip()}: no such command; {_HELP}")
            continue
        if not line.strip():
            continue
        asked = [*history, Message(role="user", content=line)]
        try:
            ids = format.encode(asked)
            generator.check(ids, 1, "the conversation")
        except QRecipesError as error:
            note(f"error: {error}; /reset forgets what was said before")
            continue
        room = min(sampling.max_tokens, generator.max_length - len(ids))
        answer = _answer(generator, ids, replace(sampling, max_tokens=room), stop, stop_tokens, write)
        history = [*asked, Message(role="assistant", content=answer)]


def _answer(
    generator: Generator,
    ids: list[int],
    sampling: Sampling,
    stop: Sequence[str],
    stop_tokens: Sequence[int],
    write: Callable[[str], object],
) -> str:
    """The answer, as far as it came before Ctrl-C."""
    said: list[str] = []
    pieces = generator.stream([ids], sampling, stop=stop, stop_tokens=stop_tokens)
    try:
        for piece in pieces:
            said.append(piece.text)
            write(piece.text)
    except KeyboardInterrupt:
        pass  # as asked: this answer ends, the program goes on
    finally:
        pieces.close()
    write("\n")
    return "".join(said)
