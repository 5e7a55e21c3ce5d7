"""Tokenizers of four kinds behind one small interface: text <-> token numbers, and no special token unasked.

Special tokens in a user's text are text: a document that spells out "</s>" does not end there. Only
`encode_markup`, which chat templates are written in, takes them at their word. Decoding leaves special tokens
out, and numbers that the tokenizer does not know, such as the padding of a model's
vocabulary.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import tiktoken
from huggingface_hub import snapshot_download
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as TokenizersTokenizer

from qrecipes.data.files import locate, open_file
from qrecipes.data.markup import Marked, Markup, encode_pieces, encode_runs
from qrecipes.errors import DataError
from qrecipes.models.sources import source_folder

if TYPE_CHECKING:
    from qrecipes.config.run import Run, TokenizerSection

Kind = Literal["hf", "tiktoken", "sentencepiece", "bytes"]

_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS: Mapping[str, str] = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": _CL100K,
    "llama3": _CL100K,
    "qwen2": _CL100K.replace(r"\p{N}{1,3}", r"\p{N}"),  # one digit a token
}
"""How text is split before byte-pair encoding, as published with each tokenizer."""

_LLAMA3_NAMES = (
    "begin_of_text",
    "end_of_text",
    "reserved_special_token_0",
    "reserved_special_token_1",
    "finetune_right_pad_id",
    "step_id",
    "start_header_id",
    "end_header_id",
    "eom_id",
    "eot_id",
    "python_tag",
    *(f"reserved_special_token_{i}" for i in range(2, 247)),
)
SPECIAL_TOKENS: Mapping[str, Mapping[str, int]] = {
    "gpt2": {"<|endoftext|>": 0},
    "cl100k": {
        "<|endoftext|>": 1,
        "<|fim_prefix|>": 2,
        "<|fim_middle|>": 3,
        "<|fim_suffix|>": 4,
        "<|endofprompt|>": 20,
    },
    "llama3": {f"<|{name}|>": i for i, name in enumerate(_LLAMA3_NAMES)},
    "qwen2": {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2},
}
"""Special tokens that go with each pattern: name -> distance of its number from the number of ranks."""

_BEGINNINGS = ("<|begin_of_text|>", "<s>", "<bos>")
_ENDS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>")

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
    "*.model",
    "*.tiktoken",
)


class Tokenizer(Protocol):
    """Text <-> token numbers."""

    vocab_size: int
    """Largest token number + 1."""
    bos_id: int | None
    """Token that begins a document, None where documents begin with their first word."""
    eos_id: int | None
    """Token that ends a document."""
    files: tuple[Path, ...]
    """What must be copied for the tokenizer to be loaded elsewhere."""
    special_tokens: Mapping[str, int]
    """Spelling -> number of the tokens that no text gives."""
    template_names: Mapping[str, str]
    """What chat templates know by name: spelling of bos_token, eos_token and the like."""
    chat_template: str | None
    """The tokenizer's own chat template, jinja2; None where it has none."""
    end_ids: tuple[int, ...]
    """Tokens after which its model says no more, as its files tell."""

    def encode(self, text: str) -> list[int]:
        """Tokens of `text`, none of them special."""

    def encode_markup(self, markups: Sequence[Markup]) -> list[Marked]:
        """Tokens of each text, where what spells a special token is that token."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, on several cores where the library can."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""


class BytesTokenizer:
    """UTF-8 itself: 256 values, and 256 for the end of a document."""

    vocab_size = 257
    bos_id: int | None = None
    eos_id: int | None = 256
    files: tuple[Path, ...] = ()
    special_tokens: Mapping[str, int] = MappingProxyType({"<|endoftext|>": 256})
    template_names: Mapping[str, str] = MappingProxyType({"eos_token": "<|endoftext|>"})
    chat_template: str | None = None
    end_ids: tuple[int, ...] = (256,)

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`."""
        return list(text.encode("utf-8"))

    def encode_markup(self, markups: Sequence[Markup]) -> list[Marked]:
        """The bytes of each text, and 256 for "<|endoftext|>"."""

        def encode(texts: list[str], first: list[bool]) -> list[Marked]:
            return [encode_runs(text, self.special_tokens, _characters) for text in texts]

        return encode_pieces(markups, encode)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The bytes of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text that the bytes spell."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class HFTokenizer:
    """A `tokenizer.json`, with what the JSON files beside it say about beginning and end.

    tokenizer_config.json comes first, then generation_config.json, then config.json; where none of them says
    a word, the usual names are tried. Documents begin with that token only where the tokenizer's
    post-processor puts it there, as transformers does, and tokenizer_config.json does not say
    `add_bos_token: false`.

    Raises:
        DataError: if the file is no tokenizer of the `tokenizers` library.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = TokenizersTokenizer.from_file(str(path))
        except Exception as error:  # the library's own type is Exception itself
            raise DataError(f"{path}: not a tokenizer.json that `tokenizers` can read: {error}") from error
        self._tokenizer.encode_special_tokens = True  # that is, as the text they are spelled with
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self._path = path
        beside = [path, *(path.with_name(name) for name in _BESIDE)]
        self.files = tuple(file for file in beside if file.exists())
        configs = [
            _read_json(path.with_name(name))
            for name in ("tokenizer_config.json", "generation_config.json", "config.json")
        ]
        beginning = self._special("bos_token", configs, _BEGINNINGS)
        put_first = next(iter(self._tokenizer.encode("", add_special_tokens=True).ids), None)
        self.first_id = put_first
        """What the post-processor puts before every text, whatever add_bos_token says."""
        begins = put_first == beginning and configs[0].get("add_bos_token", True)
        self.bos_id = beginning if begins else None
        self.eos_id = self._special("eos_token", configs, _ENDS)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens: Mapping[str, int] = {
            token.content: number for number, token in added.items() if token.special
        }
        found = {"bos_token": beginning, "eos_token": self.eos_id}
        names = {key: self._tokenizer.id_to_token(i) or "" for key, i in found.items() if i is not None}
        told = _read_json(path.with_name("special_tokens_map.json")) | configs[0]
        self.template_names: Mapping[str, str] = names | _template_names(told)
        self.chat_template = _chat_template(path, configs[0])
        ends = [
            self.eos_id,
            *_as_list(configs[1].get("eos_token_id")),
            *_as_list(configs[2].get("eos_token_id")),
        ]
        self.end_ids = tuple(dict.fromkeys(i for i in ends if i is not None))

    def encode(self, text: str) -> list[int]:
        """Tokens of `text`."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, on all cores unless TOKENIZERS_PARALLELISM says otherwise."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_markup(self, markups: Sequence[Markup]) -> list[Marked]:
        """Tokens of each text with its special tokens, as `transformers` gives them."""
        return encode_pieces(markups, self._encode_markup)

    def _encode_markup(self, texts: list[str], first: list[bool]) -> list[Marked]:
        # Some tokenizers put a space before what begins a text: a piece from its middle follows a token.
        guard = self._guard
        guarded = [text if begins else guard + text for text, begins in zip(texts, first, strict=True)]
        marked = []
        for encoding, begins in zip(
            self._marker.encode_batch(guarded, add_special_tokens=False), first, strict=True
        ):
            ids, spans = encoding.ids, encoding.offsets
            if not begins and guard:
                ids, spans = ids[1:], [(a - len(guard), b - len(guard)) for a, b in spans[1:]]
            marked.append(Marked(ids, spans))
        return marked

    @cached_property
    def _marker(self) -> TokenizersTokenizer:
        """The tokenizer, taking special tokens at their word; loaded again, for it is another state."""
        marker = TokenizersTokenizer.from_file(str(self._path))
        marker.encode_special_tokens = False
        marker.no_truncation()
        marker.no_padding()
        marker.post_processor = None  # some trim the spaces off the offsets
        return marker

    @cached_property
    def _guard(self) -> str:
        """A special token that leaves the text after it alone; nothing where there is none."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return next((token.content for token in added if token.special and not token.rstrip), "")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens."""
        return self._tokenizer.decode([i for i in ids if i < self.vocab_size], skip_special_tokens=True)

    def _special(self, key: str, configs: Sequence[dict[str, Any]], usual: Sequence[str]) -> int | None:
        for config in configs:
            if key in config:
                token = config[key]
                content = token.get("content") if isinstance(token, dict) else token
                return None if content is None else self._tokenizer.token_to_id(content)
            token_id = config.get(f"{key}_id")
            if token_id is not None:
                return token_id[0] if isinstance(token_id, list) else token_id
        known = (self._tokenizer.token_to_id(name) for name in usual)
        return next((i for i in known if i is not None), None)


class TiktokenTokenizer:
    """A file of byte-pair ranks, one `BASE64 RANK` a line, and the pattern that splits the text.

    The special tokens are those published with the pattern, numbered from the number of ranks.

    Raises:
        DataError: naming the line that is no rank.
    """

    def __init__(self, path: Path, pattern: str) -> None:
        # tiktoken's own loader caches by path and goes on giving a file that has been replaced.
        ranks = _read_ranks(path)
        special = {name: len(ranks) + distance for name, distance in SPECIAL_TOKENS[pattern].items()}
        self._encoding = tiktoken.Encoding(
            pattern, pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens=special
        )
        self._num_ranks = len(ranks)
        self.vocab_size = max(special.values()) + 1
        self.bos_id = special.get("<|begin_of_text|>")
        self.eos_id: int | None = special.get("<|endoftext|>", special.get("<|end_of_text|>"))
        self.special_tokens: Mapping[str, int] = special
        ends = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        spelled = {number: name for name, number in special.items()}
        config = _read_json(path.with_name("tokenizer_config.json"))
        own = {key: spelled[number] for key, number in ends.items() if number is not None}
        self.template_names: Mapping[str, str] = own | _template_names(config)
        self.chat_template = _chat_template(path, config)
        self.end_ids: tuple[int, ...] = () if self.eos_id is None else (self.eos_id,)
        self.files = (path, *(file for file in _beside_others(path) if file.exists()))

    def encode(self, text: str) -> list[int]:
        """Tokens of `text`."""
        return self._encoding.encode_ordinary(text)

    def encode_markup(self, markups: Sequence[Markup]) -> list[Marked]:
        """Tokens of each text with its special tokens."""

        def encode(texts: list[str], first: list[bool]) -> list[Marked]:
            batch = self._encoding.encode_batch(texts, allowed_special="all", num_threads=os.cpu_count() or 1)
            return [self._spans(ids, text) for ids, text in zip(batch, texts, strict=True)]

        return encode_pieces(markups, encode)

    def _spans(self, ids: list[int], text: str) -> Marked:
        starts = self._encoding.decode_with_offsets(ids)[1]
        return Marked(ids, [(a, max(a + 1, b)) for a, b in pairwise((*starts, len(text)))])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, on all cores."""
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens."""
        return self._encoding.decode([i for i in ids if i < self._num_ranks])


class SentencePieceTokenizer:
    """A sentencepiece `.model`.

    Raises:
        DataError: if the file is no sentencepiece model.
    """

    def __init__(self, path: Path) -> None:
        with open_file(path) as file:
            model = file.read()
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"{path}: not a sentencepiece model: {error}") from error
        self.vocab_size = self._processor.get_piece_size()
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        self.bos_id = bos if bos >= 0 else None
        self.eos_id = eos if eos >= 0 else None
        numbers = range(self.vocab_size)
        self.special_tokens: Mapping[str, int] = {
            self._processor.id_to_piece(i): i for i in numbers if self._processor.is_control(i)
        }
        ends = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        own = {key: self._processor.id_to_piece(i) for key, i in ends.items() if i is not None}
        config = _read_json(path.with_name("tokenizer_config.json"))
        self.template_names: Mapping[str, str] = own | _template_names(config)
        self.chat_template = _chat_template(path, config)
        self.end_ids: tuple[int, ...] = () if self.eos_id is None else (self.eos_id,)
        self.files = (path, *(file for file in _beside_others(path) if file.exists()))

    def encode(self, text: str) -> list[int]:
        """Tokens of `text`."""
        return self._processor.encode(text, out_type=int)

    def encode_markup(self, markups: Sequence[Markup]) -> list[Marked]:
        """Tokens of each text with its control symbols."""

        def encode(texts: list[str], first: list[bool]) -> list[Marked]:
            return [self._piece(text, begins) for text, begins in zip(texts, first, strict=True)]

        return encode_pieces(markups, encode)

    def _piece(self, text: str, begins: bool) -> Marked:
        if begins:
            return encode_runs(text, self.special_tokens, self._run)
        # A space is put before what begins a text: a piece from its middle follows a line break.
        guard, guarded = self._run("\n"), encode_runs("\n" + text, self.special_tokens, self._run)
        known = len(guard.ids) if guarded.ids[: len(guard.ids)] == guard.ids else 0
        return Marked(guarded.ids[known:], [(max(a - 1, 0), b - 1) for a, b in guarded.spans[known:]])

    def _run(self, text: str) -> Marked:
        found = self._processor.encode(text, return_type="offset_mapping")
        return Marked(found["ids"], found["offsets"])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, on all cores."""
        return self._processor.encode(list(texts), out_type=int)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control symbols have none."""
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size])


def load_tokenizer(section: TokenizerSection) -> Tokenizer:
    """The tokenizer that a run's `[tokenizer]` asks for.

    Raises:
        ConfigError: if the path names an asset that does not exist.
        DataError: if nothing that can be read is there.
    """
    if section.kind == "bytes":
        return BytesTokenizer()
    assert section.path is not None, section
    return _load(_find(section.path), section.kind, section.pattern)


def load_own_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in the folder of a Hugging Face model; None where there is none.

    Raises:
        DataError: if it cannot be read.
    """
    there = [file for pattern in ("tokenizer.json", "*.model", "*.tiktoken") for file in folder.glob(pattern)]
    return _load(folder, "auto", "llama3") if there else None


def tokenizer_of(run: Run) -> Tokenizer | None:
    """The tokenizer of a run; without `[tokenizer]`, that of an `hf:` model's own folder. None where there is
    neither, or the data, synthetic or images, has no text.

    Raises as `load_tokenizer`.
    """
    if run.data.source in ("synthetic", "images"):
        return None
    if run.tokenizer is not None:
        return load_tokenizer(run.tokenizer)
    folder = source_folder(run.model) if run.model.source.startswith("hf:") else None
    return None if folder is None else load_own_tokenizer(folder)


def _load(path: Path, kind: str, pattern: str) -> Tokenizer:
    """The tokenizer at `path`, a file or a folder."""
    found, file = _choose(path, kind)
    if found == "hf":
        return HFTokenizer(file)
    if found == "tiktoken":
        return TiktokenTokenizer(file, pattern)
    return SentencePieceTokenizer(file)


def _find(name: str) -> Path:
    """An existing file or folder; a hub repository is downloaded, or taken from the hub's cache."""
    path = locate(name)
    if path.exists():
        return path
    if not _HUB_NAME.fullmatch(name):
        raise DataError(
            f"tokenizer.path: {name!r} does not exist (from {Path.cwd()}); name a tokenizer.json, a tiktoken "
            "or "
            "sentencepiece file, or a folder that holds one"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (OSError, ValueError) as error:
        raise DataError(
            f"tokenizer.path: {name!r} is no local file or folder, and as a repository of the Hugging Face "
            "hub it "
            f"cannot be had: {_first_line(error)}; check the name and the network, or name a local folder"
        ) from error


def _choose(path: Path, kind: str) -> tuple[str, Path]:
    """Kind and file of the tokenizer at `path`, a file or a folder."""
    if path.is_dir():
        candidates = {
            "hf": sorted(path.glob("tokenizer.json")),
            "tiktoken": [*sorted(path.glob("tokenizer.model")), *sorted(path.glob("*.tiktoken"))],
            "sentencepiece": sorted(path.glob("*.model")),
        }
        wanted = list(candidates) if kind == "auto" else [kind]
        files = [file for name in wanted for file in candidates[name]]
        if not files:
            looked_for = {
                "hf": "tokenizer.json",
                "tiktoken": "tokenizer.model or *.tiktoken",
                "sentencepiece": "*.model",
            }
            raise DataError(
                f"tokenizer.path: {path} holds no tokenizer; looked for "
                f"{', '.join(looked_for[name] for name in wanted)}; name the file itself, or another folder"
            )
        path = files[0]
    return (kind if kind != "auto" else _sniff(path)), path


def _sniff(path: Path) -> str:
    if path.suffix == ".json":
        return "hf"
    if path.suffix == ".tiktoken":
        return "tiktoken"
    with open_file(path) as file:
        first = file.readline(1024)
    # Llama 3's tokenizer.model is a tiktoken file, Llama 2's a sentencepiece one.
    if re.fullmatch(rb"[A-Za-z0-9+/=]+ \d+\s*", first):
        return "tiktoken"
    if path.suffix == ".model":
        return "sentencepiece"
    raise DataError(
        f"tokenizer.path: cannot tell what {path} is; expected tokenizer.json, NAME.tiktoken or NAME.model, "
        "or set "
        "tokenizer.kind"
    )


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    with open_file(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise DataError(
                    f"{path}: line {number}: not `BASE64 RANK`; is it a tiktoken file?"
                ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise DataError(f"{path}: its {len(ranks)} ranks are not 0 to {len(ranks) - 1}; copy the file again")
    lacking = [value for value in range(256) if bytes([value]) not in ranks]
    if lacking:
        raise DataError(
            f"{path}: no rank for {len(lacking)} of the 256 bytes, such as 0x{lacking[0]:02x}; copy the file "
            "again"
        )
    return ranks


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    with open_file(path) as file:
        try:
            content = json.load(file)
        except ValueError as error:
            raise DataError(f"{path}: not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _template_names(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a tokenizer_config.json or special_tokens_map.json names, as spelled."""
    told = {key: config.get(key) for key in _NAMED_TOKENS}
    spelled = {key: token["content"] if isinstance(token, dict) else token for key, token in told.items()}
    return {key: token for key, token in spelled.items() if isinstance(token, str)}


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template in or beside a tokenizer's files; of several, the one called default."""
    file = path.with_name("chat_template.jinja")
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 at byte {error.start}; copy the file again") from error
    told = config.get("chat_template")
    if isinstance(told, list):
        told = {entry.get("name"): entry.get("template") for entry in told if isinstance(entry, dict)}
        told = told.get("default")
    return told if isinstance(told, str) else None


def _beside_others(path: Path) -> list[Path]:
    return [path.with_name(name) for name in ("tokenizer_config.json", "chat_template.jinja")]


def _characters(text: str) -> Marked:
    spread = [(byte, place) for place, letter in enumerate(text) for byte in letter.encode("utf-8")]
    return Marked([byte for byte, _ in spread], [(place, place + 1) for _, place in spread])


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
