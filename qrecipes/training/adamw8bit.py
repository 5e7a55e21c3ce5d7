"""AdamW with 8-bit moments in one kernel for all parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit

from qrecipes.quant.device import HAS_TRITON, on_device_of
from qrecipes.quant.sharded import local
from qrecipes.training.optimizer_verbs import loss_of

if HAS_TRITON:
    from qrecipes.training import adamw8bit_kernels as kernels

Update = tuple[Tensor, Tensor, Tensor, Tensor]
"""A parameter, its gradient and its moments; this rank's parts."""


class FusedAdamW8bit(AdamW8bit):
    """torchao's AdamW8bit (arXiv 2110.02861), its state too, but for the time of a step on a GPU.

    torchao calls a compiled function for every parameter, 1 ms each, which is most of a step that trains the
    many small parameters of adapters. Here all parameters of a type take one Triton kernel; on the CPU the
    step is torchao's. With `bf16_stochastic_round` random numbers come from the device's default generator.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = loss_of(closure)  # which makes the gradients
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not self._suits_kernel() or not all(_has_kernel(p) for p in trained):
            super().step()
            return loss
        for group in self.param_groups:
            by_step: dict[float, list[Update]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    moments, steps = self._moments(p)
                    by_step.setdefault(steps, []).append((local(p), local(p.grad), *moments))
            for steps, updates in by_step.items():
                numbers = _numbers(group, steps)
                update_by_kernel(updates, numbers, stochastic_rounding=self.bf16_stochastic_round)
        return loss

    def _suits_kernel(self) -> bool:
        """Whether moments are as the kernel expects them; torchao's step takes any."""
        plain = not any(group["amsgrad"] for group in self.param_groups)
        return HAS_TRITON and plain and self.block_size == kernels.BLOCK

    def _moments(self, p: Tensor) -> tuple[tuple[Tensor, Tensor], float]:
        """This rank's parts of both moments, zeros at first, and how many steps there will have been."""
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = self._new_buffer(p, True)
            state["exp_avg_sq"] = self._new_buffer(p, False)
        state["step"] += 1
        return (local(state["exp_avg"]), local(state["exp_avg_sq"])), float(state["step"])


def _numbers(group: dict[str, Any], steps: float) -> tuple[float, ...]:
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    corrections = 1 - beta1**steps, (1 - beta2**steps) ** 0.5
    return lr, 1 - lr * group["weight_decay"], beta1, beta2, group["eps"], *corrections


def update_by_kernel(
    updates: Sequence[Update],
    numbers: tuple[float, ...],
    *,
    stochastic_rounding: bool = False,
) -> None:
    """Update parameters in place by one kernel for those of a type; on the CPU by Triton's interpreter.

    `numbers` are those of `adamw8bit_kernels.launch`. Parameters that are not bfloat16 are rounded to
    nearest.
    """
    alike: dict[tuple[object, ...], list[Update]] = {}
    for update in updates:
        p, grad, first, _ = update
        if p.numel() > 0:
            quantized = isinstance(first, OptimState8bit)
            key = p.device, p.dtype, grad.dtype, quantized, first.dtype, p.numel() % 8 == 0
            alike.setdefault(key, []).append(update)
    for part in alike.values():
        p, _, first, second = part[0]
        rounds = stochastic_rounding and p.dtype is torch.bfloat16
        seed = torch.randint(2**62, (), device=p.device) if rounds else None
        maps = None
        if isinstance(first, OptimState8bit) and isinstance(second, OptimState8bit):
            maps = first.qmap, second.qmap
        with on_device_of(p):
            kernels.launch(_jobs(part), maps, numbers, seed)


def _jobs(updates: Sequence[Update]) -> list[kernels.Job]:
    jobs, taken = [], 0
    for p, grad, first, second in updates:
        moments = kernels.Moments(*_tensors(first), *_tensors(second))
        jobs.append(kernels.Job(p, _aligned(grad.contiguous()), moments, taken))
        taken += p.numel()
    return jobs


def _tensors(moment: Tensor) -> tuple[Tensor, Tensor | None]:
    if isinstance(moment, OptimState8bit):
        return moment.codes, moment.scale
    return moment, None


def _aligned(t: Tensor) -> Tensor:
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _has_kernel(p: Tensor) -> bool:
    part = local(p)
    return part.is_cuda and part.is_contiguous() and part.data_ptr() % 16 == 0
