"""Parameter groups to an optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer

from qrecipes import compat
from qrecipes.errors import ConfigError
from qrecipes.training.in_backward import InBackward
from qrecipes.training.offload import Offloaded
from qrecipes.training.schedule_free_adamw import ScheduleFreeAdamW
from qrecipes.training.stochastic_adamw import StochasticAdamW
from qrecipes.training.stored_weights import is_stored_low, with_stored_weights
from qrecipes.transforms.base import ParamGroup

if TYPE_CHECKING:
    from qrecipes.config.run import OptimSection, ScheduleSection


def build_optimizer(groups: Sequence[ParamGroup], optim: OptimSection) -> Optimizer:
    """The optimizer of `groups`. Vectors (norms, biases) are never decayed, whatever the run's weight decay.

    Raises:
        ConfigError: if there is nothing to train, it is not where the optimizer can offload it from, or the
            optimizer cannot update a weight that is stored in low precision.
    """
    settings = [setting for group in groups for setting in _settings(group, optim)]
    if not settings:
        raise ConfigError("nothing trains: no transform owns a trainable parameter, and the rest is frozen")

    def construct(settings: list[dict[str, Any]]) -> Optimizer:
        return with_stored_weights(settings, lambda part: OPTIMIZERS[optim.name](part, optim))

    if optim.offload != "none":
        _check_offload(settings, optim)
        return Offloaded(settings, construct, gradients=optim.offload == "state_and_gradients")
    if optim.in_backward:
        return InBackward(settings, construct)
    return construct(settings)


def _check_offload(settings: list[dict[str, Any]], optim: OptimSection) -> None:
    params = [p for setting in settings for p in setting["params"]]
    if any(isinstance(p, DTensor) for p in params):
        raise ConfigError(
            f"optim.offload: {optim.offload!r} is for one GPU, and this run has several, over which FSDP2 "
            'shards the state; set offload = "none", or run one process'
        )
    if any(is_stored_low(p) for p in params):
        raise ConfigError(
            f"optim.offload: {optim.offload!r} keeps float32 weights on the CPU, but a transform stores "
            'weights in low precision; set offload = "none", or leave out that transform'
        )
    if not all(p.is_cuda for p in params):
        raise ConfigError(
            f"optim.offload: {optim.offload!r} moves the state from a GPU to the CPU, and this model is on "
            'the CPU; set offload = "none"'
        )


def _settings(group: ParamGroup, optim: OptimSection) -> list[dict[str, Any]]:
    common = {"lr": optim.lr * group.lr_scale, "lr_scale": group.lr_scale}
    if group.weight_decay is not None:
        return [{"params": group.params, "name": group.name, "weight_decay": group.weight_decay, **common}]
    matrices = [p for p in group.params if p.ndim >= 2]
    vectors = [p for p in group.params if p.ndim < 2]
    return [
        {"params": params, "name": name, "weight_decay": decay, **common}
        for params, name, decay in (
            (matrices, group.name, optim.weight_decay),
            (vectors, f"{group.name}/undecayed", 0.0),
        )
        if params
    ]


def _fused(settings: list[dict[str, Any]], optim: OptimSection) -> bool:
    # offloaded, the update runs on the CPU, and takes several passes over memory where it is not fused
    on_device = all(p.is_cuda for setting in settings for p in setting["params"])
    return optim.fused and (on_device or optim.offload != "none")


def _adamw(settings: list[dict[str, Any]], optim: OptimSection) -> Optimizer:
    fused = _fused(settings, optim)
    return AdamW(settings, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)


def _stochastic_adamw(settings: list[dict[str, Any]], optim: OptimSection) -> Optimizer:
    return StochasticAdamW(settings, lr=optim.lr, betas=optim.betas, eps=optim.eps)


def _schedule_free_adamw(settings: list[dict[str, Any]], optim: OptimSection) -> Optimizer:
    return ScheduleFreeAdamW(settings, lr=optim.lr, betas=optim.betas, eps=optim.eps)


def _torchao(name: str) -> Callable[[list[dict[str, Any]], OptimSection], Optimizer]:
    """torchao's optimizer of that name, whose moments are quantized in blocks."""

    def construct(settings: list[dict[str, Any]], optim: OptimSection) -> Optimizer:
        compat.repair_low_bit_optimizers()
        compat.disable_autograd_cache()
        import torchao.optim

        from qrecipes.training.adamw8bit import FusedAdamW8bit

        cls = FusedAdamW8bit if name == "AdamW8bit" else getattr(torchao.optim, name)
        for setting in settings:  # a tensor, so that a new learning rate does not compile the step anew
            setting["lr"] = torch.tensor(setting["lr"], dtype=torch.float32)
        return cls(
            settings,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            bf16_stochastic_round=optim.stochastic_rounding,
        )

    return construct


def _sgd(settings: list[dict[str, Any]], optim: OptimSection) -> Optimizer:
    sharded = any(isinstance(p, DTensor) for setting in settings for p in setting["params"])
    fused = _fused(settings, optim) and not sharded  # torch 2.11 has no fused SGD of DTensors
    return SGD(settings, lr=optim.lr, momentum=optim.betas[0], fused=fused)


OPTIMIZERS = {
    "adamw": _adamw,
    "stochastic_adamw": _stochastic_adamw,
    "schedule_free_adamw": _schedule_free_adamw,
    "adamw8bit": _torchao("AdamW8bit"),
    "adamw4bit": _torchao("AdamW4bit"),
    "adamw_fp8": _torchao("AdamWFp8"),
    "sgd": _sgd,
}


def lr_ratio(schedule: ScheduleSection, step: int, steps: int) -> float:
    """The learning rate of optimizer step `step`, from 0, of `steps`, as a share of the peak."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    final = schedule.final_ratio
    if schedule.kind == "constant":
        return 1.0
    start = steps - schedule.decay_steps if schedule.kind == "wsd" else schedule.warmup_steps
    if step < start:
        return 1.0
    progress = min((step - start + 1) / max(steps - start, 1), 1.0)
    if schedule.kind == "cosine":
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - (1 - final) * progress


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate `lr` times its own scale."""
    for group in optimizer.param_groups:
        value = lr * group["lr_scale"]
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value
