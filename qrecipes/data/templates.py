"""Chat templates: jinja2 in a sandbox, the tokenizer's own or one that ships, and what they write.

A template is somebody's program, so it runs in jinja2's immutable sandbox, with what the templates of the
Hugging Face hub expect: `raise_exception`, `strftime_now`, `tojson` that leaves "<" alone, `break` and
`continue`, and `{% generation %}` around what the model is to learn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TypedDict

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qrecipes.data.files import locate, open_file
from qrecipes.data.tokenizers import Tokenizer
from qrecipes.errors import ConfigError, DataError

SHIPPED = ("alpaca", "plain", "question")
"""Templates that come with qrecipes, for models that have none."""
CUT, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
"""Marks inside a rendered text; Unicode keeps these noncharacters for such private use, so no text has
them."""

_FOLDER = Path(__file__).parent / "chat_templates"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class _Said(TypedDict):
    role: str
    content: str


class Message(_Said, total=False):
    """One turn: `role` is system, user, assistant or tool.

    A user's message from columns of their own also has `instruction` and `input`, which `content` joins.
    """

    instruction: str
    input: str


@dataclass(frozen=True)
class Rendered:
    """What a template wrote."""

    text: str
    cuts: tuple[int, ...]
    """Characters before which the text is cut, inside a special token's spelling that a message holds."""
    generated: tuple[tuple[int, int], ...]
    """Characters [start, stop) that the template's generation blocks wrote."""


@dataclass(frozen=True)
class Template:
    """A chat template with the spellings it may use."""

    name: str
    source: str = field(repr=False)
    names: Mapping[str, str] = field(repr=False)

    @property
    def marks_answers(self) -> bool:
        """Whether the template itself says what the model learns."""
        return _GENERATION.search(self.source) is not None

    def standalone(self) -> str:
        """The source with its own spelling of what begins and ends a document, for programs that would put
        in the tokenizer's."""
        named = {name: self.names.get(name, "") for name in ("bos_token", "eos_token")}
        return "".join(f"{{%- set {k} = {json.dumps(v)} -%}}\n" for k, v in named.items()) + self.source

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> Rendered:
        """The messages, in which CUT may stand, written out.

        Raises:
            DataError: with the template's own words where it refuses them.
        """
        try:
            marked = _compile(self.source).render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.names,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"data.conversation.template: {self.name}: line {error.lineno}: {error.message}; correct the "
                "template"
            ) from error
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            roles = ", ".join(message["role"] for message in messages) or "no messages"
            raise DataError(f"the chat template ({self.name}) refuses {roles}: {error}") from error
        return _unmark(marked)


def find_template(name: str, tokenizer: Tokenizer) -> Template:
    """The template that `data.conversation.template` means, for this tokenizer.

    "auto" is the tokenizer's own if it has one, else alpaca.

    Raises:
        ConfigError: if the tokenizer has none, or `name` is neither a template that ships nor a file.
        DataError: if the file cannot be read, or the tokenizer has nothing to end an answer with.
    """
    if name == "auto":
        name = "alpaca" if tokenizer.chat_template is None else "chat"
    if name == "chat":
        if tokenizer.chat_template is None:
            raise ConfigError(
                "data.conversation.template: 'chat', but the tokenizer has no chat template; choose "
                f"{', '.join(SHIPPED)}, or name a jinja2 file"
            )
        return Template("the tokenizer's own", tokenizer.chat_template, tokenizer.template_names)
    if name in SHIPPED:
        return Template(name, (_FOLDER / f"{name}.jinja").read_text("utf-8"), _ends(name, tokenizer))
    path = locate(name)
    if not path.is_file():
        raise ConfigError(
            f"data.conversation.template: {name!r} is no file (from {Path.cwd()}), and not one of auto, "
            f"chat, {', '.join(SHIPPED)}"
        )
    with open_file(path) as file:
        try:
            source = file.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 at byte {error.start}; save the template as UTF-8") from error
    return Template(str(path), source, tokenizer.template_names)


def _ends(name: str, tokenizer: Tokenizer) -> dict[str, str]:
    """How the tokenizer spells the beginning and end of a document; nothing for a beginning it lacks."""
    spelled = {number: text for text, number in tokenizer.special_tokens.items()}
    if tokenizer.eos_id not in spelled:
        raise DataError(
            f"data.conversation.template: {name!r} ends an answer with the tokenizer's end of text, and it "
            "has none; name its eos_token in tokenizer_config.json beside it, or write a template of your own"
        )
    begins = tokenizer.bos_id not in (None, tokenizer.eos_id)
    return {
        "bos_token": spelled.get(tokenizer.bos_id, "") if begins else "",  # type: ignore[arg-type]
        "eos_token": spelled[tokenizer.eos_id],  # type: ignore[index]
    }


def _unmark(marked: str) -> Rendered:
    parts: list[str] = []
    cuts: list[int] = []
    opened: list[int] = []
    generated: list[tuple[int, int]] = []
    place = 0
    for part in re.split(f"([{CUT}{OPEN}{CLOSE}])", marked):
        if part == CUT:
            cuts.append(place)
        elif part == OPEN:
            opened.append(place)
        elif part == CLOSE:
            generated.append((opened.pop(), place))
        else:
            parts.append(part)
            place += len(part)
    return Rendered("".join(parts), tuple(cuts), tuple(generated))


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` writes its body between OPEN and CLOSE."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        """The block as a call that gets the body as its caller."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


@lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, **how: Any) -> str:
    """JSON as it is, where jinja2's own would escape what HTML reads."""
    return json.dumps(value, ensure_ascii=how.pop("ensure_ascii", False), **how)
