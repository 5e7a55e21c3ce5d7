"""Chunks of documents -> their tokens, in several processes, in the chunks' order.

What comes out depends on the chunks alone, so the number of processes changes nothing but the time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import cycle
from multiprocessing.connection import Connection
from queue import SimpleQueue

import numpy as np

from qrecipes.config.run import TokenizerSection
from qrecipes.data.corpus import Chunk
from qrecipes.data.packing import separators
from qrecipes.data.tokenizers import Tokenizer, load_tokenizer
from qrecipes.data.tokens import DTYPES
from qrecipes.errors import QRecipesError

AHEAD = 3
"""Chunks in the making for each process, so that none waits for a chunk to be read or written."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of a chunk's documents that go to one split."""

    tokens: np.ndarray
    """[beginning?] tokens [end?] of each document, one after the other, in the shards' type."""
    ends: np.ndarray
    """For each document the offset after its last token, int64."""
    text_bytes: int
    """Length of the documents in UTF-8."""


@dataclass(frozen=True)
class Result:
    """What became of a chunk."""

    parts: dict[str, Encoded]
    """By split: the chunk's own or, of held-out documents, "validation"."""
    cpu_s: float
    """Processor time that it took."""


@dataclass(frozen=True)
class Encoder:
    """What makes tokens of a chunk."""

    tokenizer: Tokenizer
    dtype: str
    validation_fraction: float
    threads: bool = False
    """Let the library use all cores; a process among several must not."""

    def __call__(self, split: str, texts: list[str]) -> Result:
        """The tokens of the documents of a chunk."""
        start = time.process_time()
        parts = self._encode(split, texts) if texts else {}
        return Result(parts, time.process_time() - start)

    def _encode(self, split: str, texts: list[str]) -> dict[str, Encoded]:
        encode = self.tokenizer.encode
        encoded = self.tokenizer.encode_batch(texts) if self.threads else map(encode, texts)
        before, after = separators(self.tokenizer)
        runs: dict[str, _Run] = {}
        for text, ids in zip(texts, encoded, strict=True):
            data = text.encode()
            held_out = self.validation_fraction and is_held_out(data, self.validation_fraction)
            name = "validation" if held_out else split
            if name not in runs:
                runs[name] = _Run(array("H" if self.dtype == "uint16" else "I"), array("q"))
            run = runs[name]
            run.tokens.fromlist([*before, *ids, *after])
            run.ends.append(len(run.tokens))
            run.text_bytes += len(data)
        return {name: run.encoded(DTYPES[self.dtype]) for name, run in runs.items()}


@dataclass
class _Run:
    tokens: array[int]
    ends: array[int]
    text_bytes: int = 0

    def encoded(self, dtype: np.dtype) -> Encoded:
        tokens = np.frombuffer(self.tokens, dtype.newbyteorder("=")).astype(dtype, copy=False)
        return Encoded(tokens, np.frombuffer(self.ends, np.int64), self.text_bytes)


def is_held_out(text: bytes, fraction: float) -> bool:
    """Whether a document is held out: its hash as a number in [0, 1) is below `fraction`."""
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") < fraction * 2**64


def encode_in_order(
    chunks: Iterable[Chunk],
    section: TokenizerSection,
    *,
    dtype: str,
    validation_fraction: float,
    workers: int,
) -> Iterator[tuple[Chunk, Result]]:
    """Each chunk with its tokens, in order, by `workers` processes; 0 works in this one.

    Each process loads the tokenizer and uses one core.

    Raises:
        QRecipesError: if a process dies.
    """
    if not workers:
        encoder = Encoder(load_tokenizer(section), dtype, validation_fraction, threads=True)
        for chunk in chunks:
            yield chunk, encoder(chunk.split, chunk.texts)
        return
    with _started(workers, (section, dtype, validation_fraction)) as connections:
        yield from _in_turn(chunks, connections)


def _in_turn(chunks: Iterable[Chunk], connections: list[Connection]) -> Iterator[tuple[Chunk, Result]]:
    """Chunk n is process n's, counted around; so the n-th answer is taken from the n-th process."""
    turns, answers = cycle(connections), cycle(connections)
    pending: deque[Chunk] = deque()
    for chunk in chunks:
        with _noticing_death():
            next(turns).send((chunk.split, chunk.texts))
        pending.append(chunk)
        if len(pending) > AHEAD * len(connections):
            yield pending.popleft(), _answer(next(answers))
    while pending:
        yield pending.popleft(), _answer(next(answers))


def _answer(connection: Connection) -> Result:
    with _noticing_death():
        answer = connection.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer


@contextmanager
def _noticing_death() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise QRecipesError(
            "tokenizing: a worker process was killed, perhaps for want of memory; run the same command again "
            "to go on, with fewer workers"
        ) from error


@contextmanager
def _started(workers: int, arguments: tuple[TokenizerSection, str, float]) -> Iterator[list[Connection]]:
    """Processes that answer (split, texts) with a Result, or with the exception that it raised, in order.

    Each has a connection that no other process holds, so that the death of either end is noticed at the
    other, be it in the middle of a message. (ProcessPoolExecutor can wait for ever for the rest of one.)
    """
    # A fork of this process could stop at a lock that one of its threads holds; a fork server has none.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes, connections = [], []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, *arguments), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            connections.append(ours)
        yield connections
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join()


def _work(connection: Connection, section: TokenizerSection, dtype: str, validation_fraction: float) -> None:
    """What a worker process does until the other end of its connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one decides
    tasks: SimpleQueue[tuple[str, list[str]]] = SimpleQueue()
    # Tasks are received while answers are sent: else both ends could be sending, and neither receiving.
    threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()
    encoder = Encoder(load_tokenizer(section), dtype, validation_fraction)
    while True:
        task = tasks.get()
        try:
            answer: Result | Exception = encoder(*task)
        except Exception as error:
            answer = error
        connection.send(answer)


def _receive(connection: Connection, tasks: SimpleQueue[tuple[str, list[str]]]) -> None:
    try:
        while True:
            tasks.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)  # nobody is left who would take an answer
