"""Perplexity of a text: the text as one line of tokens, cut into blocks or read through a sliding window.

*Blocks* (no stride): consecutive blocks of `block` tokens, each scored on its own. The first token of a block
has nothing before it and is not predicted, so a block predicts `block - 1` tokens; a last block that is not
full is left out. This is how WikiText-2 is quoted for quantized models.

*Sliding window* (a stride): windows of `block` tokens begin every `stride` tokens; each predicts only what no
window before it has, so every token but the first is predicted once, and from the second window on with at
least `block - stride` tokens before it.

With `bos` every block or window begins with the beginning-of-text token, which takes one of its `block`
places; then the first token of the text, or of each block, is predicted too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qrecipes.data.tokenizers import Tokenizer
from qrecipes.errors import ConfigError, DataError, WeightsError
from qrecipes.evaluation.scoring import check_tokens, max_length, require_decoder, score_targets
from qrecipes.models.modes import evaluation_mode

_ANCHOR = 16
"""Tokens decoded before a span, so that its first characters are whole and keep their space."""


@dataclass(frozen=True)
class Perplexity:
    """What a text measured, and how."""

    perplexity: float
    """exp of `loss`."""
    loss: float
    """Mean over predicted tokens, in nats."""
    bits_per_byte: float
    """Nats of all predicted tokens / ln 2 / `bytes`."""
    tokens: int
    """Predicted tokens: what `loss` is the mean of."""
    bytes: int
    """UTF-8 bytes of the text that the predicted tokens decode to; a character cut by a border counts where
    it ends."""
    block: int
    stride: int | None
    bos: bool
    tokens_read: int
    """Tokens of the text, `--tokens` at most."""
    tokens_left_out: int
    """Tokens at the end that fill no block."""
    decodes_exactly: bool
    """Whether the tokens decode to the text; if not, `bytes` are those of another text."""
    seconds: float


@dataclass(frozen=True)
class Window:
    """Tokens [start, stop) of the text, of which [first, stop) are predicted."""

    start: int
    first: int
    stop: int


def perplexity(
    model: nn.Module,
    tokenizer: Tokenizer,
    text: str,
    *,
    block: int,
    stride: int | None = None,
    tokens: int | None = None,
    bos: bool = False,
    batch_size: int = 8,
    progress: bool = False,
) -> Perplexity:
    """Perplexity of `text`, or of its first `tokens` tokens; every predicted token weighs the same.

    The model is put into evaluation mode while it is measured. Its precision is its own; logits are
    normalized in float32 and the sum is kept in float64.

    Raises:
        ConfigError: if a number is out of range, the block is longer than the model takes, or the tokenizer
            does not go with the model.
        DataError: if the text is shorter than a block.
        WeightsError: if the model's loss is no number.
    """
    prefix = _prefix(tokenizer, bos)
    _check(model, block, stride, tokens, batch_size)
    vocabulary = require_decoder(model)
    ids = tokenizer.encode(text)
    decodes_exactly = tokenizer.decode(ids) == text
    ids = ids[:tokens]
    if len(ids) + len(prefix) < block:
        raise DataError(
            f"text: its {len(ids)} tokens do not fill one block of {block}; use --block "
            f"{len(ids) + len(prefix)} or less, or a longer text"
        )
    check_tokens([*prefix, *ids], vocabulary)
    content = block - len(prefix)
    windows = list(
        _blocks(len(ids), content, bos) if stride is None else _sliding(len(ids), content, stride, bos)
    )
    began = time.monotonic()
    nats = _nats(model, ids, prefix, windows, batch_size, progress)
    count = sum(window.stop - window.first for window in windows)
    size = sum(
        decoded_bytes(tokenizer, ids, start, stop)
        for start, stop in _joined([(window.first, window.stop) for window in windows])
    )
    if not math.isfinite(nats):
        raise WeightsError(f"model: its loss on the text is {nats}; its weights are damaged, or diverged")
    return Perplexity(
        perplexity=math.exp(min(nats / count, 700.0)),  # the largest float64 is e^709
        loss=nats / count,
        bits_per_byte=nats / math.log(2) / max(size, 1),
        tokens=count,
        bytes=size,
        block=block,
        stride=stride,
        bos=bos,
        tokens_read=len(ids),
        tokens_left_out=len(ids) - windows[-1].stop,
        decodes_exactly=decodes_exactly,
        seconds=time.monotonic() - began,
    )


def decoded_bytes(tokenizer: Tokenizer, ids: Sequence[int], start: int, stop: int) -> int:
    """UTF-8 bytes of what `ids[start:stop]` add to the text; a character that a border cuts counts with the
    token that completes it."""
    anchor = max(0, start - _ANCHOR)

    def complete(end: int) -> int:
        return len(tokenizer.decode(ids[anchor:end]).rstrip("\ufffd").encode("utf-8"))

    return complete(stop) - complete(start)


def _prefix(tokenizer: Tokenizer, bos: bool) -> list[int]:
    if not bos:
        return []
    if tokenizer.bos_id is None:
        raise ConfigError("--bos: the tokenizer has no beginning-of-text token; leave the option out")
    return [tokenizer.bos_id]


def _check(model: nn.Module, block: int, stride: int | None, tokens: int | None, batch_size: int) -> None:
    for name, value, least in (
        ("--block", block, 2),
        ("--tokens", tokens, 2),
        ("--batch-size", batch_size, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name}: {value} is out of range; must be at least {least}")
    longest = max_length(model)
    if longest is not None and block > longest:
        raise ConfigError(
            f"--block: {block} tokens are more than the model takes; use at most {longest} (its max_seq_len)"
        )
    if stride is not None and not 1 <= stride < block:
        raise ConfigError(
            f"--stride: {stride} is out of range; must be 1 to {block - 1}, less than a block, so that each "
            "token has some before it; without --stride, blocks are scored one by one"
        )


def _blocks(length: int, content: int, bos: bool) -> Iterator[Window]:
    for start in range(0, length - content + 1, content):
        yield Window(start, start if bos else start + 1, start + content)


def _sliding(length: int, content: int, stride: int, bos: bool) -> Iterator[Window]:
    predicted = 0 if bos else 1
    for start in range(0, length, stride):
        stop = min(start + content, length)
        yield Window(start, predicted, stop)
        predicted = stop
        if stop == length:
            return


def _nats(
    model: nn.Module,
    ids: list[int],
    prefix: list[int],
    windows: list[Window],
    batch_size: int,
    progress: bool,
) -> float:
    """Minus the sum of log-probabilities of what the windows predict."""
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    with evaluation_mode(model):
        bar = tqdm(total=len(windows), desc="perplexity", unit="block", disable=not progress)
        for first in range(0, len(windows), batch_size):
            group = windows[first : first + batch_size]
            tensors = _batch(ids, prefix, group)
            logprobs, _ = score_targets(model, *(tensor.to(device) for tensor in tensors))
            total -= logprobs.double().sum()
            bar.update(len(group))
        bar.close()
    return float(total)


def _batch(
    ids: list[int], prefix: list[int], windows: Sequence[Window]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs [B, S] padded on the right, which no token before sees; rows, columns, targets [T] as
    `score_targets` takes them."""
    lengths = [len(prefix) + window.stop - window.start - 1 for window in windows]
    inputs = torch.zeros(len(windows), max(lengths), dtype=torch.int64)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, (window, length) in enumerate(zip(windows, lengths, strict=True)):
        inputs[row, :length] = torch.tensor([*prefix, *ids[window.start : window.stop]][:-1])
        predicted = ids[window.first : window.stop]
        rows += [row] * len(predicted)
        columns += range(length - len(predicted), length)
        targets += predicted
    return inputs, torch.tensor(rows), torch.tensor(columns), torch.tensor(targets)


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans with those that touch made one."""
    joined = [spans[0]]
    for start, stop in spans[1:]:
        if start == joined[-1][1]:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
