"""Schedule-Free AdamW (arXiv 2405.15682): an average of the weights in place of a learning rate that falls.

Written here because the authors' package keeps its sequences in the weights' own type and derives the average
from them. In bfloat16 the average stops: a step moves it by 1/t of a distance, which a bfloat16 cannot hold
after some hundred steps. And going to the average and back is not exact, in float32 neither, so that an
evaluation would change what is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from qrecipes.quant.sharded import flat_locals, local
from qrecipes.training.exact_state import load_exactly
from qrecipes.training.optimizer_verbs import loss_of

Kernel = Callable[..., None]


class ScheduleFreeAdamW(Optimizer):
    """Schedule-Free AdamW (arXiv 2405.15682, section 4.1 and equations 3 to 5), with the paper's symbols.

    The weights hold y, where gradients are taken, while training; `eval()` puts the average x in their place,
    which is judged and exported, and `train()` puts y back, both to the bit, since neither is derived from
    the weights: state for each weight is x, z and `exp_avg_sq`, 12 bytes in float32. `betas[0]` is the share
    of x in y; there is no first moment. The rate may rise (warm-up) and must not fall: a step counts in the
    average by the square of the largest rate so far.

    Running statistics of batch norm follow y, not x. What is written into the weights between steps is lost
    unless the parameter's state is forgotten, too.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.evaluating = False
        """Whether the weights hold the average x."""
        self._compiled: tuple[Kernel, Kernel] | None = None

    @torch.no_grad()
    def eval(self) -> None:
        """Put the average x into the weights, rounded to their type."""
        for _, p, state in self._begun():
            local(p.detach()).copy_(local(state["x"]))
        self.evaluating = True

    @torch.no_grad()
    def train(self) -> None:
        """Put y into the weights: to the bit what the last step left there."""
        for group, p, state in self._begun():
            _, interpolate = self._kernels_for(p)
            interpolate(*flat_locals(p.detach(), state["x"], state["z"]), group["betas"][0])
        self.evaluating = False

    def _begun(self) -> Iterable[tuple[dict[str, Any], Tensor, dict[str, Tensor]]]:
        """Every weight that has had a step, with its group and state."""
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.state:
                    yield group, p, self.state[p]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every weight that has a gradient.

        Raises:
            RuntimeError: between `eval()` and `train()`, when a gradient would be that of the average.
        """
        if self.evaluating:
            raise RuntimeError("ScheduleFreeAdamW: the weights hold the average; call train() before a step")
        loss = loss_of(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, group)
        return loss

    def _step_one(self, p: Tensor, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        if p not in self.state:
            self.state[p] = _fresh_state(p)
        state = self.state[p]
        share = _advance(state, float(group["lr"]))
        correction = 1 - beta2 ** float(state["step"])
        scale = torch.tensor(
            [float(group["lr"]), group["weight_decay"], correction, share], dtype=torch.float32
        )
        update, interpolate = self._kernels_for(p)
        assert p.grad is not None
        tensors = flat_locals(p.detach(), state["x"], state["z"], p.grad, state["exp_avg_sq"])
        update(*tensors, scale.to(p.device, non_blocking=True), beta2, group["eps"])
        interpolate(*flat_locals(p.detach(), state["x"], state["z"]), beta1)

    def _kernels_for(self, p: Tensor) -> tuple[Kernel, Kernel]:
        """`update_` and `interpolate_`, each compiled into one kernel on a GPU."""
        if p.device.type != "cuda":
            return update_, interpolate_
        if self._compiled is None:
            # two: a multiplication and addition fused with the update would round y otherwise than train()
            self._compiled = (
                torch.compile(update_, fullgraph=True, dynamic=True),
                torch.compile(interpolate_, fullgraph=True, dynamic=True),
            )
        return self._compiled

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state as it is: torch would cast it to the weights' type. Weights must hold y."""
        super().load_state_dict(state_dict)
        load_exactly(self, state_dict)


def _fresh_state(p: Tensor) -> dict[str, Tensor]:
    """x and z begin at the weights; scalars on the CPU in float64, since sums of small squares go on long."""
    return {
        "step": torch.zeros((), dtype=torch.float32),
        "lr_max": torch.zeros((), dtype=torch.float64),
        "weight_sum": torch.zeros((), dtype=torch.float64),
        "x": p.detach().to(torch.float32, copy=True),
        "z": p.detach().to(torch.float32, copy=True),
        "exp_avg_sq": torch.zeros_like(p, dtype=torch.float32),
    }


def _advance(state: dict[str, Tensor], lr: float) -> float:
    """Count a step, and give the share c of the new z in the average (equation 5, weights lr_max squared)."""
    state["step"] += 1
    state["lr_max"].clamp_(min=lr)
    weight = float(state["lr_max"]) ** 2
    state["weight_sum"] += weight
    return weight / float(state["weight_sum"]) if weight else 0.0


def update_(
    y: Tensor,
    x: Tensor,
    z: Tensor,
    grad: Tensor,
    exp_avg_sq: Tensor,
    scale: Tensor,
    beta2: float,
    eps: float,
) -> None:
    """z steps along the normalized gradient, x moves towards it, in place in float32; `scale` is [learning
    rate, weight decay, second bias correction, share of z in x]. Decay is taken at y."""
    lr, weight_decay, correction2, share = scale.unbind()
    g = grad.float()
    v = exp_avg_sq.lerp(g.square(), 1 - beta2)
    exp_avg_sq.copy_(v)
    moved = z - lr * (g / ((v / correction2).sqrt() + eps) + weight_decay * y.float())
    z.copy_(moved)
    x.copy_(x + share * (moved - x))


def interpolate_(y: Tensor, x: Tensor, z: Tensor, beta1: float) -> None:
    """y = beta1 x + (1 - beta1) z, rounded to the weights' type."""
    y.copy_(x.lerp(z, 1 - beta1))
