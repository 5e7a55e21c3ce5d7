"""The decoding loop: prompts in batches, one pass over them, then a token a step until all have ended."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Generator as Stream
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qrecipes.data.beginnings import begins_with_bos
from qrecipes.data.tokenizers import Tokenizer
from qrecipes.errors import ConfigError, GenerationError
from qrecipes.generation.cache import CachedDecoder, forward
from qrecipes.generation.quantized_cache import KVBits
from qrecipes.generation.sampling import NO_TOKEN, Sampling, choose, uniforms
from qrecipes.generation.text import StopStrings, TextStream
from qrecipes.models.view import vocab_size

Prompt = str | Sequence[int]
"""Text, which begins as transformers lets it begin, or tokens, which are taken as they are."""
FinishReason = Literal["stop_token", "stop_string", "length"]

READ_COLUMNS = 128
"""Attention reads a multiple of this many columns, since cuDNN plans each length anew: on an H100 a batch of
8 decodes 299 tokens/s with it, and 69 without (Llama 3.2 1B, torch 2.11)."""
COMPILED_COLUMNS = 256
"""Fewest columns of a compiled cache; above it powers of two, so that few lengths are compiled for."""

WARM_UP_STEPS = 3
"""Compiled steps of one cache size that are slow: one compiles, and CUDA graphs warm up and record."""


@dataclass(frozen=True)
class Generation:
    """What was added to one prompt."""

    text: str
    """Without the prompt, and without the stop string that ended it."""
    token_ids: tuple[int, ...]
    """Every token that was added, those of a stop string among them, but not the stop token."""
    finish_reason: FinishReason
    prompt_tokens: int
    """Length of the prompt."""


@dataclass(frozen=True)
class Piece:
    """More text of one of the prompts."""

    index: int
    """Which prompt, from 0 on."""
    text: str
    generation: Generation | None = None
    """The whole, with a prompt's last piece."""


@dataclass
class Speed:
    """Tokens and seconds so far, those of prompts apart from those that were added one at a time."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    compile_s: float = 0.0
    """Of steps that had to be compiled first; their tokens count nowhere."""

    def __str__(self) -> str:
        text = (
            f"{self.prefill_tokens} tokens of prompts at {_rate(self.prefill_tokens, self.prefill_s)}, "
            f"{self.decode_tokens} decoded at {_rate(self.decode_tokens, self.decode_s)}"
        )
        return text + (f", after {self.compile_s:.1f} s of compiling" if self.compile_s else "")


class Generator:
    """Generates with one model, which is left as it was after each call.

    `max_length` bounds prompt and added tokens together (None: the model's own bound). `compile` compiles the
    step that adds one token, for `batch_size` rows and few lengths; it pays over many tokens. `kv_bits`
    stores keys and values in so many bits, or in those that the model computes with ("model"). `speed` counts
    over all calls.

    Raises:
        ConfigError: if the model is no torchtune decoder of text, or a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        batch_size: int = 8,
        compile: bool = False,
        kv_bits: KVBits | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size: {batch_size} is out of range; must be at least 1")
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.speed = Speed()
        self._decoder = CachedDecoder(model, kv_bits)
        bounds = [bound for bound in (max_length, self._decoder.model.max_seq_len) if bound is not None]
        self.max_length: int = min(bounds)
        self._vocabulary = vocab_size(model)
        bos = tokenizer.bos_id
        self._beginning = [bos] if bos is not None and begins_with_bos(tokenizer) else []
        self._compiled = compile
        self._warm: Counter[int] = Counter()
        self._step = self._compile() if compile else forward

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        stop: Sequence[str] = (),
        stop_tokens: Sequence[int] | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Generation]:
        """What is added to each prompt, in their order; `on_text(index, piece)` gets text as it comes.

        `stop_tokens` of None are those after which the tokenizer's model says no more.

        Raises:
            ConfigError: if a prompt is empty, has tokens that the model does not know, or leaves no room for
                `max_tokens`; the message counts prompts from 1.
            GenerationError: if the model's logits are no numbers.
        """
        found: dict[int, Generation] = {}
        for piece in self.stream(prompts, sampling, stop=stop, stop_tokens=stop_tokens):
            if on_text is not None and piece.text:
                on_text(piece.index, piece.text)
            if piece.generation is not None:
                found[piece.index] = piece.generation
        return [found[index] for index in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        stop: Sequence[str] = (),
        stop_tokens: Sequence[int] | None = None,
    ) -> Stream[Piece, None, None]:
        """`generate` piece by piece. The model is in use until the iterator ends or is closed."""
        rows = self._rows(prompts, sampling, stop, stop_tokens)
        # Rows of like length together, the longest first: should memory not do, it shows at once.
        rows.sort(key=lambda row: -len(row.prompt))
        for start in range(0, len(rows), self.batch_size):
            yield from self._run(rows[start : start + self.batch_size], sampling)

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens."""
        if not isinstance(prompt, str):
            return list(prompt)
        return self._beginning + self.tokenizer.encode(prompt)

    def check(self, ids: Sequence[int], max_tokens: int, where: str = "prompt") -> None:
        """Raise ConfigError, which begins with `where`, if a prompt cannot be continued by `max_tokens`."""
        if not ids:
            raise ConfigError(
                f"{where}: is empty, and the tokenizer has no beginning-of-text token; give some text"
            )
        if self._vocabulary is not None and not 0 <= min(ids) <= max(ids) < self._vocabulary:
            raise ConfigError(
                f"{where}: has token {max(ids) if min(ids) >= 0 else min(ids)}, but the model's go from 0 to "
                f"{self._vocabulary - 1}; use the tokenizer that the model was made for"
            )
        room = self.max_length - len(ids)
        if room < 1:
            raise ConfigError(
                f"{where}: has {len(ids)} tokens and the model takes {self.max_length}, those it adds among "
                "them; shorten it"
            )
        if max_tokens > room:
            raise ConfigError(
                f"{where}: its {len(ids)} tokens and max_tokens = {max_tokens} exceed the model's "
                f"{self.max_length}; use at most {room}"
            )

    def _rows(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        stop: Sequence[str],
        stop_tokens: Sequence[int] | None,
    ) -> list[_Row]:
        if stop_tokens is None:
            stop_tokens = self.tokenizer.end_ids
        seen: Counter[tuple[int, ...]] = Counter()
        rows = []
        for index, prompt in enumerate(prompts):
            ids = self.encode(prompt)
            self.check(ids, sampling.max_tokens, f"prompt {index + 1}" if len(prompts) > 1 else "prompt")
            rows.append(
                _Row(
                    index,
                    ids,
                    sampling.max_tokens,
                    frozenset(stop_tokens),
                    TextStream(self.tokenizer, ids),
                    StopStrings(stop),
                    uniforms(sampling.seed, ids, seen[tuple(ids)], sampling.max_tokens),
                )
            )
            seen[tuple(ids)] += 1
        return rows

    @torch.no_grad()
    def _run(self, rows: list[_Row], sampling: Sampling) -> Iterator[Piece]:
        """One batch from beginning to end."""
        device = self._decoder.device
        width = max(len(row.prompt) for row in rows)
        # compiled code is for one number of rows: the last one is repeated, and what comes of it dropped
        given = rows + [rows[-1]] * (self.batch_size - len(rows) if self._compiled else 0)
        padding_B = torch.tensor([width - len(row.prompt) for row in given], device=device)
        tokens_BS = torch.tensor(
            [[0] * (width - len(row.prompt)) + row.prompt for row in given], device=device
        )
        uniform_TB = torch.stack([row.uniforms for row in given], dim=1).to(device)
        capacity = self._capacity(width + sampling.max_tokens)
        with self._decoder.installed(len(given), capacity, keep=self._compiled):
            started = time.perf_counter()
            token_B = choose(self._decoder.prefill(tokens_BS, padding_B), uniform_TB[0], sampling)
            numbers = token_B.tolist()  # waits for the device
            self.speed.prefill_s += time.perf_counter() - started
            self.speed.prefill_tokens += sum(len(row.prompt) for row in rows)
            yield from _take(rows, numbers)
            cursor = self._decoder.cursor
            cursor.columns = torch.tensor([width - 1], device=device)
            for step in range(1, sampling.max_tokens):
                running = sum(row.finish_reason is None for row in rows)
                if not running:
                    return
                started = time.perf_counter()
                cursor.columns += 1
                cursor.end = capacity if self._compiled else _round_up(width + step)
                logits_BV = self._next(token_B, padding_B)
                token_B = choose(logits_BV, uniform_TB[step], sampling)
                numbers = token_B.tolist()
                self._count(time.perf_counter() - started, running, capacity)
                yield from _take(rows, numbers)

    def _count(self, seconds: float, tokens: int, capacity: int) -> None:
        """Book a step; the first compiled ones of each capacity compile, and on a GPU record."""
        if self._compiled and self._warm[capacity] < WARM_UP_STEPS:
            self._warm[capacity] += 1
            self.speed.compile_s += seconds
        else:
            self.speed.decode_s += seconds
            self.speed.decode_tokens += tokens

    def _next(self, token_B: Tensor, padding_B: Tensor) -> Tensor:
        if self._compiled and token_B.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        return self._step(self._decoder.model, self._decoder.cursor, token_B[:, None], padding_B)

    def _compile(self) -> Any:
        mode = "reduce-overhead" if self._decoder.device.type == "cuda" else None
        return torch.compile(forward, dynamic=False, mode=mode)

    def _capacity(self, needed: int) -> int:
        if not self._compiled:
            return _round_up(needed)
        columns = COMPILED_COLUMNS
        while columns < needed:
            columns *= 2
        return min(columns, self.max_length)


def generate_batch(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    kv_bits: KVBits | None = None,
) -> list[Generation]:
    """What is added to each prompt, in their order, until the end of a document, a stop string or
    `sampling.max_tokens`.

    Raises:
        ConfigError, GenerationError: as `Generator.generate`.
    """
    generator = Generator(model, tokenizer, batch_size=batch_size, kv_bits=kv_bits)
    return generator.generate(prompts, sampling, stop=stop)


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> str:
    """The prompt's continuation, without the prompt, at most `max_tokens` tokens or until the end of text.

    Raises:
        ConfigError, GenerationError: as `Generator.generate`.
    """
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed)
    return generate_batch(model, tokenizer, [prompt], sampling, batch_size=1)[0].text


@dataclass
class _Row:
    """A prompt on its way."""

    index: int
    prompt: list[int]
    max_tokens: int
    stop_tokens: frozenset[int]
    stream: TextStream
    stops: StopStrings
    uniforms: Tensor
    added: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def take(self, token: int) -> Piece | None:
        """The text that a token brings; None where there is none yet."""
        if token == NO_TOKEN:
            given = len(self.prompt) + len(self.added)
            raise GenerationError(
                f"prompt {self.index + 1}: the model's logits after {given} tokens "
                "are NaN or infinite; its weights or its number type are at fault"
            )
        text = ""
        if token in self.stop_tokens:
            self.finish_reason = "stop_token"
        else:
            self.added.append(token)
            text = self.stops.feed(self.stream.feed(token))
            if self.stops.found is None and len(self.added) == self.max_tokens:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self.stops.feed(self.stream.end()) + self.stops.end()
        if self.stops.found is not None:
            self.finish_reason = "stop_string"
        self.pieces.append(text)
        if self.finish_reason is None:
            return Piece(self.index, text) if text else None
        whole = Generation("".join(self.pieces), tuple(self.added), self.finish_reason, len(self.prompt))
        return Piece(self.index, text, whole)


def _take(rows: Sequence[_Row], tokens: Sequence[int]) -> Iterator[Piece]:
    for row, token in zip(rows, tokens, strict=False):  # rows that only fill a compiled batch come last
        if row.finish_reason is None:
            piece = row.take(token)
            if piece is not None:
                yield piece


def _round_up(columns: int) -> int:
    return -(-columns // READ_COLUMNS) * READ_COLUMNS


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:,.1f} tokens/s" if seconds else "- tokens/s"
