"""Log-probability of given tokens under a decoder, without ever holding the logits of all tokens.

B rows of S tokens, T places in them whose next token is scored, D hidden features, V tokens in the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qrecipes.errors import ConfigError
from qrecipes.models.view import vocab_size
from qrecipes.training.losses import in_place_of_logits

CHUNK_LOGITS = 2**26
"""Most logits alive at once: 256 MiB in float32, 523 tokens of a vocabulary of 128,256."""


@torch.no_grad()
def score_targets(
    model: nn.Module, inputs: Tensor, rows: Tensor, columns: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probability in nats, float32 [T], of `targets` [T] after `inputs[rows, columns]`; and whether each
    is the likeliest token, bool [T].

    inputs [B, S]; a row may be padded on the right. Places may repeat. The head runs on the T places alone,
    a few at a time, and its logits are normalized in float32 whatever their type.

    Raises:
        ConfigError: if the model is no torchtune decoder.
    """
    if len(targets) == 0:
        return torch.zeros(0, device=inputs.device), torch.zeros(0, dtype=torch.bool, device=inputs.device)
    found: list[tuple[Tensor, Tensor]] = []

    def score(hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        number = -(-len(targets) * vocabulary // CHUNK_LOGITS)
        chosen = hidden[rows, columns]  # [T, D]
        for part, wanted in zip(chosen.chunk(number), targets.chunk(number), strict=True):
            logits = head(part.unsqueeze(0)).squeeze(0).float()  # [chunk, V]
            found.append((-F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1) == wanted))
        return hidden

    vocabulary = require_decoder(model)
    with in_place_of_logits(model, score):
        model(inputs)
    return torch.cat([part[0] for part in found]), torch.cat([part[1] for part in found])


def require_decoder(model: nn.Module) -> int:
    """Size of the model's vocabulary.

    Raises:
        ConfigError: if the model is no torchtune decoder.
    """
    size = vocab_size(model)
    if size is None or not all(hasattr(model, name) for name in ("unembed", "norm", "output")):
        raise ConfigError(
            f"model: {type(model).__name__} predicts no text; evaluation takes torchtune's decoders"
        )
    return size


def check_tokens(tokens: Iterable[int], vocabulary: int) -> None:
    """Raise ConfigError where a token has no row in the model's embedding."""
    largest = max(tokens, default=0)
    if largest >= vocabulary:
        raise ConfigError(
            f"tokenizer: gives token {largest}, and the model knows tokens 0 to {vocabulary - 1}; "
            "evaluate the model with the tokenizer that it was trained with"
        )


def max_length(model: Any) -> int | None:
    """Most tokens that the model takes in a row, None where it says nothing."""
    return getattr(model, "max_seq_len", None)
