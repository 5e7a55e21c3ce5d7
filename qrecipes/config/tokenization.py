"""What is tokenized, with what, into which folder: the TOML file and the flags of a tokenization."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qrecipes.config.lines import KeyPath, read_toml
from qrecipes.config.problems import Problem, attribute, dates_in, explain
from qrecipes.config.run import STRICT, Fraction, PositiveInt, TokenizerSection
from qrecipes.config.schema import meanings
from qrecipes.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """One folder of tokenized shards; the keys that a run's `[data]` has too mean the same here."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    output: str
    """Folder that the shards, their index and a copy of the tokenizer are written to."""
    files: tuple[str, ...]
    """Files, globs or `asset:` names of text: .txt, .jsonl or .parquet, each also as .xz or .gz. For a
    dataset its name, then optionally its configuration's name."""
    tokenizer: TokenizerSection
    """The tokenizer."""
    source: Literal["text", "dataset"] = "text"
    """`text`: files of documents. `dataset`: the name of a Hugging Face dataset, or a local folder of
    .parquet, .jsonl, .csv or .txt files or of what `save_to_disk` wrote."""
    validation_files: tuple[str, ...] = ()
    """The same for held-out data, which becomes the split `validation`."""
    split: str = "train"
    """Split of a dataset that becomes the split `train`."""
    validation_split: str | None = None
    """Split of a dataset that becomes the split `validation`."""
    validation_fraction: Fraction = 0.0
    """Share of the documents that is held out, drawn by a hash of each document's text: equal documents fall
    on the same side, and the choice does not change when documents are added."""
    text_column: str = "text"
    """Column or JSON key that holds a document."""
    document_separator: str | None = None
    """Line that separates documents in .txt files; absent, a .txt file is one document."""
    streaming: bool = False
    """Read a dataset as a stream, without downloading it whole."""
    shard_tokens: PositiveInt = 100_000_000
    """Tokens a shard; the last of a split is shorter."""
    dtype: Literal["auto", "uint16", "uint32"] = "auto"
    """Integer type of a token; `auto` is the smallest that holds the vocabulary."""

    def __post_init__(self) -> None:
        if not self.files:
            raise ConfigError("files: missing, and there is nothing to tokenize; name at least one")
        if not self.output.strip():
            raise ConfigError("output: '' is no folder; name one, such as data/mine")
        if self.source == "dataset":
            for key in ("files", "validation_files"):
                if len(getattr(self, key)) > 2:
                    raise ConfigError(
                        f"{key}: {len(getattr(self, key))} values; source 'dataset' takes a name and at most "
                        "one configuration's name"
                    )
            if self.document_separator is not None:
                raise ConfigError("document_separator: only source 'text' has it, not 'dataset'; remove it")
        elif self.streaming or self.validation_split is not None or self.split != "train":
            key = "streaming" if self.streaming else "split" if self.split != "train" else "validation_split"
            raise ConfigError(f"{key}: only source 'dataset' has it, not 'text'; remove it")
        if self.validation_fraction and (self.validation_files or self.validation_split):
            raise ConfigError(
                f"validation_fraction: {self.validation_fraction}, and held-out data is named as well; "
                "choose one"
            )


def load(path: Path | None, flags: Mapping[str, Any]) -> Tokenization:
    """The tokenization that a TOML file describes, with `flags` laid over it; tables merge.

    Raises:
        ConfigError: with a line for each problem, `FILE:LINE: KEY: ...`, or `command line: KEY: ...`.
    """
    table, places = ({}, {}) if path is None else _read(path)
    for key, value in flags.items():
        both = isinstance(value, dict) and isinstance(table.get(key), dict)
        table[key] = table[key] | value if both else value
        places |= {(key,): "command line"}
        if isinstance(value, dict):
            places |= {(key, inner): "command line" for inner in value}
    problems = list(dates_in(table, ()))
    try:
        if not problems:
            # JSON, because strict validation of Python objects refuses dicts for dataclasses.
            return TypeAdapter(Tokenization).validate_json(json.dumps(table), strict=True)
    except ValidationError as error:
        problems = explain(error, table, (), meanings(Tokenization))
    except ConfigError as error:
        problems = [attribute(line, (), meanings(Tokenization)) for line in str(error).splitlines()]
    default = "command line" if path is None else f"{path}:1"
    raise ConfigError("\n".join(f"{_place(problem, places, default)}: {problem}" for problem in problems))


def _read(path: Path) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    table, lines = read_toml(path)
    return table, {key: f"{path}:{line}" for key, line in lines.items()}


def _place(problem: Problem, places: Mapping[KeyPath, str], default: str) -> str:
    """Where what is wrong, or else the nearest table around it, was set."""
    for length in range(len(problem.path), 0, -1):
        if problem.path[:length] in places:
            return places[problem.path[:length]]
    return default
