"""Documents -> one compact array of tokens, each document ending with the tokenizer's end of text."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from qrecipes.data.sequences import TokenStream
from qrecipes.data.tokenizers import Tokenizer
from qrecipes.errors import DataError

BATCH_CHARACTERS = 1 << 21
"""Characters of documents that are tokenized together: enough to keep every core busy, small beside the
model."""
BATCH_DOCUMENTS = 1024
"""Most documents that are tokenized together."""


def separators(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokens before and after each document: [beginning?], [end?].

    A tokenizer whose beginning and end are the same token, as GPT-2's, gets it once, after the document.
    """
    before = [] if tokenizer.bos_id in (None, tokenizer.eos_id) else [tokenizer.bos_id]
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return [token for token in before if token is not None], after


def require_separator(tokenizer: Tokenizer, key: str) -> None:
    """Refuse a tokenizer that cannot tell one document from the next.

    Raises:
        DataError: if it has neither a beginning nor an end of text.
    """
    if not any(separators(tokenizer)):
        raise DataError(
            f"{key}: there are several documents, and the tokenizer has neither a beginning nor an end of "
            "text to put "
            "between them; name its eos_token in tokenizer_config.json beside it, or join the text into one "
            "document"
        )


def pack(documents: Iterable[str], tokenizer: Tokenizer, *, key: str, origin: str) -> TokenStream:
    """All documents as one stream: [beginning?] tokens [end?], one after the other.

    Takes two bytes a token where the vocabulary allows it, else four. `key` and `origin` name the data in
    messages.

    Raises:
        DataError: if there is no text, or there are several documents and nothing to put between them.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    packed = array("H" if dtype.itemsize == 2 else "I")
    before, after = separators(tokenizer)
    num_documents = 0
    for batch in _batches(documents):
        num_documents += len(batch)
        if num_documents > 1:
            require_separator(tokenizer, key)
        for ids in tokenizer.encode_batch(batch):
            packed.frombytes(np.array([*before, *ids, *after], dtype).tobytes())
    if not num_documents:
        raise DataError(f"{key}: no text in {origin}; every document is empty or blank")
    counted = "1 document" if num_documents == 1 else f"{num_documents:,} documents"
    return TokenStream([np.frombuffer(packed, dtype)], f"{counted} in {origin}")


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        if not document.strip():
            continue
        batch.append(document)
        characters += len(document)
        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
