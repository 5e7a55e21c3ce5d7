"""Text, tokens, datasets, conversations, images and synthetic data as endless, resumable micro-batches.

`build_data` gives training and held-out data together; `build_training_data` and `build_validation_data` give
one without reading the other's files. Tokens are read once, when the data is built.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from qrecipes.data.batch import IGNORE, Batch
from qrecipes.data.buckets import (
    BucketedTrainingData,
    BucketedValidationData,
    PaddedConversations,
    usual_buckets,
)
from qrecipes.data.conversations import Conversations, read_conversations, warn_of_losses
from qrecipes.data.conversations import hold_out as hold_out_conversations
from qrecipes.data.files import expand, locate
from qrecipes.data.images import ImageFolder, LabeledImages, hold_out, list_images
from qrecipes.data.order import IndexedTrainingData, Order, Share, Source, TrainingData, ValidationData
from qrecipes.data.packed import PackedConversations
from qrecipes.data.packing import pack
from qrecipes.data.rows import are_local
from qrecipes.data.sequences import Sequences, TokenStream, check_length, cut
from qrecipes.data.synthetic import SyntheticImages, SyntheticTokens
from qrecipes.data.text import SUFFIXES as TEXT_SUFFIXES
from qrecipes.data.text import documents
from qrecipes.data.tokenizers import Tokenizer, load_tokenizer
from qrecipes.data.tokens import open_tokens
from qrecipes.errors import ConfigError, DataError

if TYPE_CHECKING:
    from qrecipes.config.run import DataSection, TaskSection

__all__ = [
    "IGNORE",
    "Batch",
    "Tokenizer",
    "TrainingData",
    "ValidationData",
    "build_data",
    "build_training_data",
    "build_validation_data",
    "load_tokenizer",
    "read_tokens",
]


def build_data(
    data: DataSection, tokenizer: Tokenizer | None, *, task: TaskSection, seed: int, rank: int, world: int
) -> tuple[TrainingData, ValidationData | None]:
    """Training and held-out data of one rank; a corpus that both come from is read once.

    Raises:
        ConfigError: if the section asks for what does not go together.
        DataError: if the data is missing, damaged or too short.
    """
    builder = _Builder(data, tokenizer, task, seed, Share(data.batch_size, rank, world))
    return builder.training(), builder.validation()


def build_training_data(
    data: DataSection, tokenizer: Tokenizer | None, *, task: TaskSection, seed: int, rank: int, world: int
) -> TrainingData:
    """Training data of one rank; raises as `build_data`."""
    return _Builder(data, tokenizer, task, seed, Share(data.batch_size, rank, world)).training()


def build_validation_data(
    data: DataSection, tokenizer: Tokenizer | None, *, task: TaskSection, seed: int, rank: int, world: int
) -> ValidationData | None:
    """Held-out data of one rank, None where the section names none; raises as `build_data`."""
    return _Builder(data, tokenizer, task, seed, Share(data.batch_size, rank, world)).validation()


def read_tokens(
    data: DataSection, tokenizer: Tokenizer | None, *, task: TaskSection, seed: int = 0
) -> TokenStream:
    """All training tokens of a section with source `text`, `tokens` or `dataset`; raises as `build_data`."""
    return _Builder(data, tokenizer, task, seed, Share(data.batch_size, 0, 1)).training_stream()


class _Builder:
    """Sources of one data section; what training and held-out data share is read once."""

    def __init__(
        self,
        data: DataSection,
        tokenizer: Tokenizer | None,
        task: TaskSection,
        seed: int,
        share: Share,
    ) -> None:
        self.data = data
        self.tokenizer = tokenizer
        self.task = task
        self.seed = seed
        self.share = share
        self.held_out_apart = bool(data.validation_files or data.validation_split)
        self._stream: TokenStream | None = None
        self._images: LabeledImages | None = None
        self._conversations: Conversations | None = None
        self._check_task()

    def training(self) -> TrainingData:
        """Endless training data."""
        data = self.data
        if data.source == "dataset" and data.streaming:
            # Imported here: `datasets` takes a second, which other sources need not wait for.
            from qrecipes.data.hub import open_stream

            return open_stream(data, self._require_tokenizer(), share=self.share, seed=self.seed)
        if data.source == "conversations":
            return self._conversation_training()
        source = self._training_source()
        order = Order(source.num_items, seed=self.seed, shuffle=data.shuffle)
        return IndexedTrainingData(source, order, self.share, prefetch=data.source == "images")

    def validation(self) -> ValidationData | None:
        """Held-out data in a fixed order."""
        if self.data.source == "conversations":
            return self._conversation_validation()
        source = self._validation_source()
        if source is None:
            return None
        assert source.num_items is not None
        return ValidationData(source, source.num_items, self.share)

    def _conversation_training(self) -> TrainingData:
        data = self.data
        conversations = self._training_conversations()
        if data.validation_fraction and not self.held_out_apart:
            conversations, _ = hold_out_conversations(conversations, data.validation_fraction)
        if data.conversation.packing:
            seed = self.seed if data.shuffle else None
            source = PackedConversations(conversations, data.sequence_length, seed=seed)
            order = Order(source.num_items, seed=self.seed, shuffle=data.shuffle)
            return IndexedTrainingData(source, order, self.share)
        padded = self._padded(conversations)
        return BucketedTrainingData(padded, self.share, seed=self.seed, shuffle=data.shuffle)

    def _conversation_validation(self) -> ValidationData | None:
        data = self.data
        if self.held_out_apart:
            conversations = self._held_out_conversations()
        elif data.validation_fraction:
            _, conversations = hold_out_conversations(
                self._training_conversations(), data.validation_fraction
            )
        else:
            return None
        if data.conversation.packing:
            source = PackedConversations(conversations, data.sequence_length, seed=None)
            return ValidationData(source, source.num_items, self.share)
        return BucketedValidationData(self._padded(conversations), self.share)

    def _training_conversations(self) -> Conversations:
        if self._conversations is None:
            self._conversations = self._read_conversations(self.data.files, self.data.split, "data.files")
        return self._conversations

    def _held_out_conversations(self) -> Conversations:
        data = self.data
        self._warn_of_shared_files()
        if data.validation_split is not None and are_local(data.validation_files or data.files, "data.files"):
            raise ConfigError(
                "data.validation_split: files have no splits; name data.validation_files, or a share of the "
                "rows as data.validation_fraction"
            )
        key = "data.validation_files" if data.validation_files else "data.validation_split"
        files = data.validation_files or data.files
        return self._read_conversations(files, data.validation_split or data.split, key)

    def _read_conversations(self, files: tuple[str, ...], split: str, key: str) -> Conversations:
        read = read_conversations(files, split, self.data, self._require_tokenizer(), key)
        if self.share.rank == 0:
            warn_of_losses(read.report, key)
        return read

    def _padded(self, conversations: Conversations) -> PaddedConversations:
        buckets = self.data.conversation.length_buckets or usual_buckets(self.data.sequence_length)
        return PaddedConversations(conversations, buckets)

    def _warn_of_shared_files(self) -> None:
        shared = set(self.data.files) & set(self.data.validation_files)
        if shared and not self.data.validation_split:
            warnings.warn(f"data.validation_files: {shared} is also trained on", stacklevel=5)

    def _training_source(self) -> Source:
        data = self.data
        if data.source == "synthetic":
            return self._synthetic(held_out=False)
        if data.source == "images":
            images = self._training_images()
            return ImageFolder(images, size=data.image_size, augment_seed=self.seed if data.augment else None)
        stream = self.training_stream()
        if data.validation_fraction and not self.held_out_apart:
            stream, _ = cut(stream, data.sequence_length, data.validation_fraction)
        check_length(stream, data.sequence_length, "data.files")
        return Sequences(stream, data.sequence_length)

    def _validation_source(self) -> Source | None:
        data = self.data
        if data.source == "synthetic":
            return self._synthetic(held_out=True)
        if not self.held_out_apart and not data.validation_fraction:
            return None
        if data.source == "images":
            return ImageFolder(self._validation_images(), size=data.image_size, augment_seed=None)
        if self.held_out_apart:
            stream = self._validation_stream()
        else:
            _, stream = cut(self.training_stream(), data.sequence_length, data.validation_fraction)
        return Sequences(stream, data.sequence_length, keeps_rest=True)

    def _synthetic(self, *, held_out: bool) -> Source:
        data, seed = self.data, self.seed
        if self.task.kind == "classification":
            return SyntheticImages(
                num_classes=data.num_classes, size=data.image_size, seed=seed, held_out=held_out
            )
        return SyntheticTokens(
            vocab_size=data.vocab_size, length=data.sequence_length, seed=seed, held_out=held_out
        )

    def training_stream(self) -> TokenStream:
        """Training tokens, and held-out ones where they are a share of the same files."""
        if self._stream is None:
            self._stream = self._read(self.data.files, self.data.split, "data.files")
        return self._stream

    def _validation_stream(self) -> TokenStream:
        data = self.data
        shared = set(data.files) & set(data.validation_files)
        if shared and data.source != "dataset":
            warnings.warn(f"data.validation_files: {shared} is also trained on", stacklevel=4)
        files = data.validation_files or data.files
        stream = self._read(files, data.validation_split or data.split, "data.validation_files")
        if len(stream) < 2:
            raise DataError(
                f"data.validation_files: {len(stream)} tokens from {stream.origin}, and the first is never "
                "predicted; "
                "add text"
            )
        return stream

    def _read(self, files: tuple[str, ...], split: str, key: str) -> TokenStream:
        data = self.data
        if data.source == "tokens":
            return open_tokens(files, data.token_dtype, key=key, tokenizer=self.tokenizer)
        tokenizer = self._require_tokenizer()
        if data.source == "dataset":
            from qrecipes.data.hub import DatasetName, load_stream

            return load_stream(DatasetName.of(files, split, key), data, tokenizer, key)
        paths = expand(files, key=key, suffixes=TEXT_SUFFIXES)
        origin = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files"
        texts = documents(paths, column=data.text_column, separator=data.document_separator)
        return pack(texts, tokenizer, key=key, origin=origin)

    def _training_images(self) -> LabeledImages:
        images = self._all_images()
        if self.data.validation_fraction and not self.held_out_apart:
            images, _ = hold_out(images, self.data.validation_fraction)
        return images

    def _validation_images(self) -> LabeledImages:
        images = self._all_images()
        if not self.held_out_apart:
            return hold_out(images, self.data.validation_fraction)[1]
        key = "data.validation_files"
        return list_images(locate(_one(self.data.validation_files, key)), key, images.classes)

    def _all_images(self) -> LabeledImages:
        if self._images is None:
            self._images = list_images(locate(_one(self.data.files, "data.files")), "data.files")
        return self._images

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ConfigError(
                f'tokenizer: missing, and data.source = "{self.data.source}" is text; add a [tokenizer] '
                "table with a "
                'path, or with kind = "bytes"'
            )
        return self.tokenizer

    def _check_task(self) -> None:
        source, kind = self.data.source, self.task.kind
        if source == "synthetic" or (source == "images") == (kind == "classification"):
            return
        right = "classification" if source == "images" else "language_modeling"
        raise ConfigError(
            f'task.kind: "{kind}" does not go with data.source = "{source}"; set task.kind = "{right}"'
        )


def _one(names: tuple[str, ...], key: str) -> str:
    if len(names) != 1:
        raise ConfigError(f'{key}: {len(names)} entries; images take one folder: {key} = ["FOLDER"]')
    return names[0]
