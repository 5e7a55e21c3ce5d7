"""AdamW for bfloat16 weights: stochastic rounding of the weight, a second moment in float32.

A bfloat16 weight has 8 significant bits: an update smaller than 1/512 of it vanishes when rounded to nearest,
and with a learning rate of 1e-4 most are. Rounded stochastically they arrive on average (arXiv 2010.06192).
The second moment changes by 1 - beta2 a step, 0.001 of itself for beta2 = 0.999, which bfloat16 cannot hold
either; the first by 1 - beta1, which it holds on average only: rounded to nearest, a first moment with
beta1 = 0.99 comes to rest a fifth below a constant gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from qrecipes.quant.sharded import flat_locals
from qrecipes.training.exact_state import load_exactly
from qrecipes.training.optimizer_verbs import loss_of

Update = Callable[..., None]


class StochasticAdamW(Optimizer):
    """AdamW (arXiv 1711.05101, algorithm 2) that computes in float32 and rounds bfloat16 weights at random.

    State for each weight: `exp_avg` in the weight's type, rounded as weights are, `exp_avg_sq` in float32 and
    `step`; 6 bytes a bfloat16 weight, where AdamW over float32 copies takes 12. float32 weights are updated
    as AdamW does.
    Under FSDP2 each rank updates its own part with its own random numbers, from the device's default
    generator.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self._compiled: Update | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
                state["step"] += 1
                steps = float(state["step"])
                lr = float(group["lr"])
                scale = torch.tensor(
                    [lr, 1 - lr * group["weight_decay"], 1 - beta1**steps, 1 - beta2**steps],
                    dtype=torch.float32,
                )
                self._update_for(p)(
                    *flat_locals(p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"]),
                    scale.to(p.device, non_blocking=True),
                    beta1,
                    beta2,
                    group["eps"],
                )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state as it is: torch would cast the second moment to the weights' type."""
        super().load_state_dict(state_dict)
        load_exactly(self, state_dict)

    def _update_for(self, p: Tensor) -> Update:
        """The update, compiled into one kernel on a GPU."""
        if p.device.type != "cuda":
            return update_
        if self._compiled is None:
            self._compiled = torch.compile(update_, fullgraph=True, dynamic=True)
        return self._compiled


def update_(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scale: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """AdamW's update in place, in float32; `scale` is [learning rate, what decay leaves of a weight, first
    and second bias correction]."""
    lr, kept, correction1, correction2 = scale.unbind()
    g = grad.float()
    m = exp_avg.float().lerp(g, 1 - beta1)
    v = exp_avg_sq.lerp(g.square(), 1 - beta2)
    _store_(exp_avg, m)
    exp_avg_sq.copy_(v)
    new = p.float() * kept - lr * (m / correction1) / ((v / correction2).sqrt() + eps)
    _store_(p, new)


def _store_(target: Tensor, value: Tensor) -> None:
    """Overwrite `target` by a float32 value, which a bfloat16 one holds on average."""
    target.copy_(round_to_bfloat16_stochastically(value) if target.dtype is torch.bfloat16 else value)


def round_to_bfloat16_stochastically(x: Tensor) -> Tensor:
    """bfloat16 of a float32 tensor: one of the two neighbours, and `x` on average.

    16 random bits are added below the last bit that bfloat16 keeps, and the rest is cut off. What bfloat16
    holds exactly stays, NaN and infinities included; a finite value may become infinite only where it lies
    between the largest bfloat16 and infinity.
    """
    noise = torch.randint_like(x, 1 << 16, dtype=torch.int32)
    bits = (x.view(torch.int32) + noise) & -(1 << 16)
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)
