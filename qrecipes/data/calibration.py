"""Calibration samples: windows of one length, drawn from a text or from any data that a run can train on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from qrecipes.config.run import DataSection
from qrecipes.data import Batch, build_training_data, read_tokens
from qrecipes.data.batch import IGNORE
from qrecipes.data.files import content_suffix, locate
from qrecipes.data.packing import pack
from qrecipes.data.sequences import TokenStream
from qrecipes.data.text import SUFFIXES as TEXT_SUFFIXES
from qrecipes.errors import ConfigError, DataError

if TYPE_CHECKING:
    from qrecipes.config.run import TaskSection
    from qrecipes.data.tokenizers import Tokenizer

_STREAMED = ("text", "tokens", "dataset")


def calibration_section(name: str) -> DataSection | None:
    """The data section that a name means; None for a file of an unknown kind.

    It is that of a file of text (.txt, .jsonl, .parquet, also as .xz or .gz) or of tokens (.bin), or else of
    a Hugging Face dataset or a folder, `NAME` or `NAME,CONFIGURATION`.

    Raises:
        ConfigError: if there is no such asset.
    """
    path = locate(name)
    if not path.is_file():
        return DataSection(source="dataset", files=tuple(part.strip() for part in name.split(",")))
    suffix = content_suffix(path)
    if suffix == ".bin":
        return DataSection(source="tokens", files=(name,))
    return DataSection(source="text", files=(name,)) if suffix in TEXT_SUFFIXES else None


def windows_of_text(
    text: str, tokenizer: Tokenizer, *, name: str, samples: int, length: int, seed: int = 0
) -> list[Batch]:
    """`calibration_batches` of a text in memory, which errors call `name`; raises as that."""
    _check_numbers(samples, length)
    stream = pack([text], tokenizer, key="calibration", origin=name)
    return _windows(stream, name, samples, length, seed)


def calibration_batches(
    data: DataSection,
    tokenizer: Tokenizer | None,
    *,
    task: TaskSection,
    samples: int,
    length: int,
    seed: int = 0,
) -> list[Batch]:
    """`samples` batches of one row, drawn without repetition, the same for the same seed.

    Of text, tokens and datasets, windows of `length` tokens that do not overlap. Of conversations, rows of
    `length` tokens as in training; images and synthetic data as they are.

    Raises:
        ConfigError: if a number is out of range.
        DataError: if there are fewer: with the tokens needed and found.
    """
    _check_numbers(samples, length)
    data = replace(data, sequence_length=length, batch_size=1, shuffle=True)
    if data.source in _STREAMED and not data.streaming:
        stream = read_tokens(data, tokenizer, task=task, seed=seed)
        return _windows(stream, _named(data), samples, length, seed)
    training = build_training_data(data, tokenizer, task=task, seed=seed, rank=0, world=1)
    if training.num_sequences is not None and training.num_sequences < samples:
        raise DataError(
            f"calibration: {samples} samples are needed, and {_named(data)} has {training.num_sequences}; "
            "take fewer, or add data"
        )
    return [training.next_batch() for _ in range(samples)]


def _check_numbers(samples: int, length: int) -> None:
    if samples < 1 or length < 1:
        raise ConfigError(f"calibration: {samples} samples of {length} tokens; use at least 1 of each")


def _windows(stream: TokenStream, name: str, samples: int, length: int, seed: int) -> list[Batch]:
    if len(stream) < samples * length:
        raise DataError(
            f"calibration: {samples} samples of {length} tokens need {samples * length:,} tokens, and "
            f"{name} has {len(stream):,}; take fewer or shorter ones, or a longer text"
        )
    chosen = np.random.default_rng(seed).permutation(len(stream) // length)[:samples]
    return [_batch(stream.read(index * length, (index + 1) * length)) for index in chosen.tolist()]


def _batch(tokens: np.ndarray) -> Batch:
    inputs = torch.from_numpy(tokens).unsqueeze(0)
    targets = torch.full_like(inputs, IGNORE)
    targets[:, :-1] = inputs[:, 1:]
    return Batch(inputs, targets)


def _named(data: DataSection) -> str:
    return ", ".join(data.files) or f"{data.source} data"
