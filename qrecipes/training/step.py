"""One optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from qrecipes.data import Batch
from qrecipes.parallel.process import Process
from qrecipes.training.optimizer_verbs import norms_of_taken, taking_gradients
from qrecipes.training.passes import Passes
from qrecipes.training.task import Task
from qrecipes.transforms.base import StepContext
from qrecipes.transforms.chain import Chain


@dataclass
class StepReport:
    """What a step found. Tensors stay on the device: reading one waits for it."""

    loss: Tensor
    """Mean over the step's targets on all ranks, before the update."""
    grad_norm: Tensor
    """Norm of the gradient of all trained parameters together, before clipping."""
    targets: Tensor
    """Tokens or images that counted in the loss, on all ranks."""
    computed: Tensor
    """Tokens or images that went through the model, on all ranks, whether they counted or not."""
    skipped: bool
    """Whether a transform asked for no update."""


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    chain: Chain,
    batches: Sequence[Batch],
    task: Task,
    step: int,
    clip_norm: float,
    process: Process,
    passes: Passes | None = None,
) -> StepReport:
    """One optimizer step over `batches`, the micro-batches of this rank; `step` counts from 0.

    Every target weighs the same, however they are spread over micro-batches and ranks. `passes`, None for
    those that Python runs, are the same in every step of a run.
    """
    passes = passes or Passes(process.device)
    ctx = StepContext(step, model, optimizer)
    chain.before_step(ctx)
    ctx.apply_requests()  # now, since some optimizers update in the backward pass
    if ctx.passes_changed:
        passes.forget()
    counts = [(batch.count(), batch.targets.numel()) for batch in batches]
    targets, computed = process.sum(torch.tensor(counts).sum(0)).unbind()
    per_rank = (targets / process.world).clamp(min=1).float()  # FSDP2 averages gradients over ranks
    loss_sum = torch.zeros((), device=process.device)
    with taking_gradients(optimizer, wanted=not ctx.skip_update):
        for batch in batches:
            loss_sum += passes(model, task, batch, per_rank)
    chain.after_backward(ctx)
    taken = norms_of_taken(optimizer)
    grad_norm = total_norm(model, taken) if taken else clip_gradients(model, clip_norm)
    ctx.apply_requests()
    if not ctx.skip_update:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    mean_loss = process.sum(loss_sum) / targets.clamp(min=1)
    return StepReport(mean_loss, grad_norm, targets, computed, ctx.skip_update)


def clip_gradients(model: nn.Module, clip_norm: float) -> Tensor:
    """Scale the gradients down to a norm of `clip_norm` (0: leave them) and return the norm before, on every
    rank."""
    trained = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if clip_norm:
        nn.utils.clip_grads_with_norm_(trained, clip_norm, norm)
    return norm


def total_norm(model: nn.Module, norms: Mapping[Tensor, Tensor]) -> Tensor:
    """The norm of all gradients together from that of each, on every rank, summed in the model's order."""
    ordered = [norms[p] for p in model.parameters() if p in norms]
    norm = torch.linalg.vector_norm(torch.stack(ordered))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
