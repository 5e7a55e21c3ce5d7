"""What is learnt: the loss of a batch, and the metrics of held-out data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qrecipes.data import IGNORE, Batch
from qrecipes.errors import ConfigError
from qrecipes.models.view import vocab_size

if TYPE_CHECKING:
    from qrecipes.config.run import TaskSection


class Task:
    """Language modeling (next token) or classification (class of an image), by cross-entropy in float32."""

    def __init__(self, section: TaskSection, *, compile: bool = False) -> None:
        self.kind = section.kind
        self.label_smoothing = section.label_smoothing
        # compiled, the float32 copy of the logits is never written to memory
        self._cross_entropy = torch.compile(cross_entropy_sum) if compile else cross_entropy_sum

    def check_fits(self, model: nn.Module, vocabulary: int | None, largest: int | None) -> None:
        """Raise ConfigError where the data holds more tokens or classes than the model.

        `vocabulary` is the tokenizer's, `largest` the largest token or class that occurs; None where not
        known.
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

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's output on a batch that is on its device; images are cast to the type of its
        parameters."""
        inputs = batch.inputs
        if inputs.is_floating_point():
            inputs = inputs.to(next(model.parameters()).dtype)
        return model(inputs)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy summed over the targets of a batch on the model's device, a float32 scalar."""
        smoothing = self.label_smoothing if model.training else 0.0
        return self._cross_entropy(self.logits(model, batch), batch.targets, smoothing)

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """How many targets are the likeliest class or token; ignored targets never are."""
        return (logits.argmax(-1) == targets).sum()

    def summarize(self, loss: float, accuracy: float, targets: int) -> dict[str, float]:
        """Metrics of an evaluation, from means over `targets` held-out tokens or images."""
        metrics: dict[str, float] = {"val_loss": loss, "val_accuracy": accuracy, "val_targets": targets}
        if self.kind == "language_modeling":
            metrics["val_perplexity"] = math.exp(min(loss, 700.0))  # float64 ends at exp(709)
        return metrics


def cross_entropy_sum(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of logits [..., C] against targets [...], summed; targets of IGNORE count nothing."""
    return F.cross_entropy(
        logits.float().flatten(0, -2),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
