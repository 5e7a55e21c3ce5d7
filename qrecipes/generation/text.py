"""From tokens to text as they come: whole characters only, and never part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix

from qrecipes.data.tokenizers import Tokenizer

_INCOMPLETE = "\ufffd"


class TextStream:
    """The text that each new token adds to a prompt's.

    A token alone does not say its text: sentencepiece drops the first space of what it decodes, and one
    character may take several tokens. So tokens are decoded together with those of the last text that was
    given out, and what ends within a character waits for the next token.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = list(prompt)
        self._known = tokenizer.decode(self._context)
        self._waiting: list[int] = []

    def feed(self, token: int) -> str:
        """Text that is certain now; may be empty."""
        self._waiting.append(token)
        text = self._tokenizer.decode(self._context + self._waiting)
        return "" if text.endswith(_INCOMPLETE) else self._give(text)

    def end(self) -> str:
        """What was still waiting: the bytes of an unfinished character as U+FFFD."""
        return self._give(self._tokenizer.decode(self._context + self._waiting))

    def _give(self, text: str) -> str:
        # The two differ before their end only where the prompt itself ended within a character.
        new = text[len(commonprefix([self._known, text])) :]
        if new:
            self._context, self._waiting = self._waiting, []
            self._known = self._tokenizer.decode(self._context)
        return new


class StopStrings:
    """Text up to the first stop string, which is the one that is complete first.

    Where several are complete with the same character, the one that began first counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text, once there is one."""

    def feed(self, text: str) -> str:
        """Text that no stop string can take back any more; nothing after a stop string."""
        if self.found is not None:
            return ""
        held = self._held + text
        places = [(held.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in held]
        if places:
            end, _, self.found = min(places)
            self._held = ""
            return held[: end - len(self.found)]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def end(self) -> str:
        """What might have become a stop string and did not."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
