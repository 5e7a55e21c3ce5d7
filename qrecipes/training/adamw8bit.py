"""AdamW with 8-bit moments in one kernel a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit

from qrecipes.quant.device import HAS_TRITON
from qrecipes.quant.sharded import local
from qrecipes.training.optimizer_verbs import loss_of

if HAS_TRITON:
    from qrecipes.training import adamw8bit_kernels


class FusedAdamW8bit(AdamW8bit):
    """torchao's AdamW8bit (arXiv 2110.02861), its state too, but for the time of a step on a GPU.

    torchao calls a compiled function for every parameter, 1 ms each, which is most of a step that trains the
    many small parameters of adapters. Here a parameter takes one Triton kernel; on the CPU the step is
    torchao's. With `bf16_stochastic_round` random numbers come from the device's default generator.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not all(_has_kernel(p) for p in trained) or any(g["amsgrad"] for g in self.param_groups):
            return super().step(closure)
        loss = loss_of(closure)
        seeds: dict[torch.device, Tensor] = {}
        taken = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                random = None
                if self.bf16_stochastic_round and p.dtype is torch.bfloat16:
                    if p.device not in seeds:
                        seeds[p.device] = torch.randint(2**62, (), device=p.device)
                    random = seeds[p.device], taken
                    taken += local(p).numel()
                self._update(p, p.grad, group, random)
        return loss

    def _update(
        self, p: Tensor, grad: Tensor, group: dict[str, Any], random: tuple[Tensor, int] | None
    ) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = self._new_buffer(p, True)
            state["exp_avg_sq"] = self._new_buffer(p, False)
        state["step"] += 1
        steps, lr, (beta1, beta2) = float(state["step"]), float(group["lr"]), group["betas"]
        numbers = (
            lr,
            1 - lr * group["weight_decay"],
            beta1,
            beta2,
            group["eps"],
            1 - beta1**steps,
            (1 - beta2**steps) ** 0.5,
        )
        update_by_kernel(local(p), local(grad), state["exp_avg"], state["exp_avg_sq"], numbers, random)


def update_by_kernel(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    numbers: tuple[float, ...],
    random: tuple[Tensor, int] | None = None,
) -> None:
    """One parameter's update in place, see `adamw8bit_kernels.launch`; on the CPU by Triton's interpreter."""
    if p.numel() == 0:
        return
    with torch.cuda.device_of(p):
        adamw8bit_kernels.launch(
            p.detach(), grad.contiguous(), _parts(exp_avg), _parts(exp_avg_sq), numbers, random
        )


def _has_kernel(p: Tensor) -> bool:
    return HAS_TRITON and p.is_cuda and local(p).is_contiguous()


def _parts(moment: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    moment = local(moment)
    if isinstance(moment, OptimState8bit):
        return moment.codes, moment.scale, moment.qmap
    return moment, None, None
