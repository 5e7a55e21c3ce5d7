"""Cross-entropy of a language model, whole or without ever holding the logits of all tokens.

The logits of 16,384 tokens over a vocabulary of 128,256 take 4.2 GB in bfloat16, 8.4 GB more in float32, and
as much again for their gradient. `chunked_cross_entropy` makes those of a few tokens at a time, takes their
gradient at once and drops them. It runs inside the model's forward (`in_place_of_logits`), where FSDP2 has
the head's weight gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qrecipes.data import IGNORE
from qrecipes.errors import ConfigError

Head = Callable[[Tensor], Tensor]
"""Hidden states [..., D] to logits [..., V]: a module, or torchtune's head that is tied to the embedding."""
SumLoss = Callable[[Tensor, Tensor, float], Tensor]
"""(logits [T, V], targets [T], label smoothing) -> the sum over targets that count, a float32 scalar."""


def cross_entropy_sum(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of logits [..., V] against targets [...], summed, in float32; targets of IGNORE count
    nothing."""
    return F.cross_entropy(
        logits.float().flatten(0, -2),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def shows_head(model: Any) -> bool:
    """Whether a model is a torchtune decoder, whose head can be applied by others."""
    return all(hasattr(model, name) for name in ("unembed", "norm", "output"))


@contextmanager
def in_place_of_logits(model: Any, compute: Callable[[Tensor, Head], Any]) -> Iterator[None]:
    """Within, a torchtune decoder returns `compute(hidden, head)` where it would return logits.

    `hidden` [B, S, D] is what its head would be given. Computing inside the forward matters under FSDP2,
    which may free the head's weight afterwards.

    Raises:
        ConfigError: if the model is no torchtune decoder.
    """
    if not shows_head(model):
        raise ConfigError(
            f"task.loss: {type(model).__name__} does not show its head; only torchtune's decoders compute "
            'the loss without whole logits; set task.loss = "plain"'
        )
    model.unembed = lambda hidden: compute(model.norm(hidden), model.output)
    try:
        yield
    finally:
        del model.unembed


def chunked_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    *,
    chunk_tokens: int,
    label_smoothing: float = 0.0,
    loss: SumLoss = cross_entropy_sum,
) -> Tensor:
    """`loss(head(hidden), targets)` with the logits of at most `chunk_tokens` tokens alive at a time.

    hidden [..., D], targets [...]. Gradients, of `hidden` and of the head's parameters, are computed in the
    forward pass while the logits are there, so nothing is computed twice; those of parameters are summed over
    chunks in float32. Equal to the plain loss but for the order of summation.
    """
    parameters = [p for p in _parameters(head) if p.requires_grad] if torch.is_grad_enabled() else []
    return _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, -2), targets.flatten(), head, chunk_tokens, label_smoothing, loss, *parameters
    )


@torch.no_grad()
def chunked_measure(hidden: Tensor, targets: Tensor, head: Head, chunk_tokens: int) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy, and how many targets are the likeliest token, chunk by chunk; float32 scalars."""
    total = torch.zeros((), device=hidden.device)
    correct = torch.zeros((), device=hidden.device)
    for rows, wanted in _chunks(hidden.flatten(0, -2), targets.flatten(), chunk_tokens):
        logits = head(rows)
        total += cross_entropy_sum(logits, wanted)
        correct += (logits.argmax(-1) == wanted).sum()
    return total, correct


def liger_cross_entropy(
    hidden: Tensor, targets: Tensor, head: Head, *, label_smoothing: float = 0.0
) -> Tensor:
    """The same by Liger's fused Triton kernel (arXiv 2410.10989); the head must be a plain linear layer.

    Raises:
        ConfigError: if liger-kernel is missing, the head is not plain, or the model is not on a GPU.
    """
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise ConfigError(
            f'task.loss: "liger" needs liger-kernel ({error}); install qrecipes[liger], or set '
            'task.loss = "chunked"'
        ) from error
    from torchtune.modules import TiedLinear

    if type(head) not in (nn.Linear, TiedLinear):
        raise ConfigError(
            f'task.loss: "liger" takes a plain linear head, and this one is {type(head).__name__}; '
            'set task.loss = "chunked"'
        )
    if hidden.device.type != "cuda":
        raise ConfigError(
            f'task.loss: "liger" runs on a GPU, the model is on {hidden.device.type}; '
            'set task.loss = "chunked"'
        )
    parameters = list(_parameters(head))
    return liger_fused_linear_cross_entropy(
        hidden.flatten(0, -2),
        parameters[0],
        targets.flatten(),
        bias=parameters[1] if len(parameters) > 1 else None,
        ignore_index=IGNORE,
        label_smoothing=label_smoothing,
        reduction="sum",
    ).float()


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the chunks' losses; its gradients are taken in the forward pass and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        chunk_tokens: int,
        label_smoothing: float,
        loss: SumLoss,
        *parameters: nn.Parameter,
    ) -> Tensor:
        wants_hidden = ctx.needs_input_grad[0]
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        sums = [torch.zeros(p.shape, device=p.device) for p in parameters]
        start = 0
        for rows, wanted in _chunks(hidden, targets, chunk_tokens):
            with torch.enable_grad():
                leaf = rows.detach().requires_grad_(wants_hidden)
                part = loss(head(leaf), wanted, label_smoothing)
            total += part.detach()
            inputs = [*([leaf] if wants_hidden else []), *parameters]
            if not inputs:
                continue
            gradients = list(torch.autograd.grad(part, inputs))
            if grad_hidden is not None:
                grad_hidden[start : start + len(rows)] = gradients.pop(0)
            for known, new in zip(sums, gradients, strict=True):
                known += new
            start += len(rows)
        ctx.gradients = [grad_hidden, *sums]
        ctx.dtypes = [hidden.dtype, *(p.dtype for p in parameters)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("chunked_cross_entropy: its gradients were used up; it has one backward pass")
        # Scaled in float32: rounding the one factor to bfloat16 would scale every gradient wrongly. In place
        # where it can be: the sums of a large head take gigabytes.
        scaled = [
            None if g is None else g.float().mul_(upstream).to(dtype)
            for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return scaled[0], None, None, None, None, None, *scaled[1:]


def _chunks(hidden: Tensor, targets: Tensor, chunk_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and their targets, in parts of equal size but for the last, none above `chunk_tokens`."""
    number = max(1, -(-len(hidden) // chunk_tokens))
    yield from zip(hidden.chunk(number), targets.chunk(number), strict=True)


def _parameters(head: Head) -> Iterator[nn.Parameter]:
    """What a head computes with: a module's parameters, or the weight of the embedding it is tied to."""
    if isinstance(head, nn.Module):
        yield from head.parameters()
        return
    tied = getattr(head, "tied_module", None)
    if not isinstance(tied, nn.Module):
        raise ConfigError(
            f"task.loss: the parameters of a head of type {type(head).__name__} are not known; "
            'set task.loss = "plain"'
        )
    yield tied.weight  # type: ignore[misc]
