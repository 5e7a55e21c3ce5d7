"""What is learnt: the loss of a batch, and the metrics of held-out data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qrecipes.data import Batch
from qrecipes.errors import ConfigError
from qrecipes.models.view import vocab_size
from qrecipes.training.losses import (
    Head,
    chunked_cross_entropy,
    chunked_measure,
    cross_entropy_sum,
    in_place_of_logits,
    liger_cross_entropy,
)
from qrecipes.training.masks import document_mask

if TYPE_CHECKING:
    from qrecipes.config.run import TaskSection


class Task:
    """Language modeling (next token) or classification (class of an image), by cross-entropy in float32."""

    def __init__(self, section: TaskSection, *, compile: bool = False) -> None:
        self.section = section
        self.kind = section.kind
        self.label_smoothing = section.label_smoothing
        # compiled, the float32 copy of the logits is never written to memory
        self._cross_entropy = torch.compile(cross_entropy_sum) if compile else cross_entropy_sum

    def check_fits(
        self, model: nn.Module, vocabulary: int | None, largest: int | None, length: int | None = None
    ) -> None:
        """Raise ConfigError where the data holds more tokens or classes than the model, or longer sequences.

        `vocabulary` is the tokenizer's, `largest` the largest token or class that occurs, `length` that of a
        sequence; None where not known.
        """
        if self.kind == "classification":
            classes = getattr(model, "num_classes", None)
            if largest is not None and classes is not None and largest >= classes:
                raise ConfigError(
                    f"data.files: hold {largest + 1} classes, but the model tells {classes} apart; "
                    "set model.args.num_classes"
                )
            return
        size = vocab_size(model)
        if size is None:
            raise ConfigError(
                f"task.kind: 'language_modeling' needs a model that takes tokens; "
                f"{type(model).__name__} does not; "
                "set task.kind = 'classification', or another model.source"
            )
        longest = getattr(model, "max_seq_len", None)
        if length is not None and longest is not None and length > longest:
            raise ConfigError(
                f"data.sequence_length: {length} is more than the {longest} tokens that the model takes; "
                "lower it, or raise model.args.max_seq_len"
            )
        if vocabulary is not None and vocabulary > size:
            raise ConfigError(
                f"tokenizer: has {vocabulary} tokens, but the model's vocabulary holds {size}; "
                f"use the model's own "
                "tokenizer, or a model with as large a vocabulary"
            )
        if largest is not None and largest >= size:
            raise ConfigError(
                f"data.files: hold token {largest}, but the model's vocabulary ends at {size - 1}; "
                f"use the tokenizer "
                "that the model was made for"
            )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy summed over the targets of a batch on the model's device, a float32 scalar."""
        smoothing = self.label_smoothing if model.training else 0.0
        if self.kind == "classification" or self.section.loss == "plain":
            return self._cross_entropy(forward_batch(model, batch), batch.targets, smoothing)

        def compute(hidden: Tensor, head: Head) -> Tensor:
            if self.section.loss == "liger":
                return liger_cross_entropy(hidden, batch.targets, head, label_smoothing=smoothing)
            return chunked_cross_entropy(
                hidden,
                batch.targets,
                head,
                chunk_tokens=self.section.chunk_tokens,
                label_smoothing=smoothing,
                loss=self._cross_entropy,
            )

        with in_place_of_logits(model, compute):
            return forward_batch(model, batch)

    @torch.no_grad()
    def measure(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy, and how many targets are the likeliest class or token; ignored targets count
        in neither."""
        if self.kind == "classification" or self.section.loss == "plain":
            logits = forward_batch(model, batch)
            correct = (logits.argmax(-1) == batch.targets).sum()
            return cross_entropy_sum(logits, batch.targets), correct
        size = self.section.chunk_tokens
        with in_place_of_logits(
            model, lambda hidden, head: chunked_measure(hidden, batch.targets, head, size)
        ):
            return forward_batch(model, batch)

    def summarize(self, loss: float, accuracy: float, targets: int) -> dict[str, float]:
        """Metrics of an evaluation, from means over `targets` held-out tokens or images."""
        metrics: dict[str, float] = {"val_loss": loss, "val_accuracy": accuracy, "val_targets": targets}
        if self.kind == "language_modeling":
            metrics["val_perplexity"] = math.exp(min(loss, 700.0))  # float64 ends at exp(709)
        return metrics


def forward_batch(model: nn.Module, batch: Batch) -> Any:
    """The model's output on a batch that is on its device; images are cast to the type of its parameters."""
    inputs = batch.inputs
    if inputs.is_floating_point():
        inputs = inputs.to(next(model.parameters()).dtype)
    if batch.documents is None:
        return model(inputs)
    return model(inputs, mask=document_mask(model, batch.documents), input_pos=batch.positions)
