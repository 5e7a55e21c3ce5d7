"""AdamW with 8-bit moments in one kernel for all parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    many small parameters of adapters. Here all parameters of a type take one Triton kernel, and what that
    needs to know of them is kept from step to step; on the CPU the step is torchao's. With
    `bf16_stochastic_round` random numbers come from the device's default generator.
    """

    _plan: _Plan | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = loss_of(closure)  # which makes the gradients
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not self._suits_kernel() or not all(_has_kernel(p) for p in trained):
            super().step()
            return loss
        if self._plan is None or not self._plan.holds(trained, self.state):
            self._plan = self._new_plan()
        self._plan.update(self.param_groups, stochastic_rounding=self.bf16_stochastic_round)
        return loss

    def _suits_kernel(self) -> bool:
        """Whether moments are as the kernel expects them; torchao's step takes any."""
        plain = not any(group["amsgrad"] for group in self.param_groups)
        return HAS_TRITON and plain and self.block_size == kernels.BLOCK

    def _new_plan(self) -> _Plan:
        known: list[_Known] = []
        members: dict[tuple[int, float], list[_Known]] = {}
        for place, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    known.append(_Known.of(p, self._begun(p)))
                    members.setdefault((place, float(known[-1].step)), []).append(known[-1])
        parts = []
        for (place, _), together in members.items():
            updates = [one.update for one in together]
            for alike in of_one_kind(updates):
                jobs = jobs_of([updates[i] for i in alike])
                parts.append(_Part(place, [together[i] for i in alike], jobs))
        return _Plan(known, parts)

    def _begun(self, p: Tensor) -> dict[str, Any]:
        """A parameter's state, zeros at first."""
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = self._new_buffer(p, True)
            state["exp_avg_sq"] = self._new_buffer(p, False)
        return state


@dataclass(frozen=True)
class _Known:
    """A parameter and its state as a plan found them."""

    p: Tensor
    step: Tensor
    """How many there have been."""
    moments: tuple[Tensor, Tensor]
    grad_type: torch.dtype
    addresses: tuple[int, ...]

    @classmethod
    def of(cls, p: Tensor, state: Mapping[str, Any]) -> _Known:
        assert p.grad is not None
        moments = state["exp_avg"], state["exp_avg_sq"]
        return cls(p, state["step"], moments, local(p.grad).dtype, _addresses(p, moments))

    def holds(self, p: Tensor, state: Mapping[str, Any]) -> bool:
        """Whether a parameter is this one, whose state no other has, and nothing of it was replaced."""
        return (
            p.grad is not None
            and local(p.grad).dtype is self.grad_type
            and state.get("step") is self.step
            and state.get("exp_avg") is self.moments[0]
            and state.get("exp_avg_sq") is self.moments[1]
            and _addresses(p, self.moments) == self.addresses
        )

    @property
    def update(self) -> Update:
        """This rank's parts."""
        assert self.p.grad is not None
        return local(self.p), local(self.p.grad), local(self.moments[0]), local(self.moments[1])


@dataclass(frozen=True)
class _Part:
    """Parameters that one launch updates."""

    place: int
    """Of their group."""
    members: Sequence[_Known]
    jobs: kernels.Jobs


@dataclass(frozen=True)
class _Plan:
    """The launches of a step, as long as parameters and moments stay where they are."""

    known: Sequence[_Known]
    parts: Sequence[_Part]

    def holds(self, trained: Sequence[Tensor], state: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        """Whether it is that of these parameters, which have a gradient."""
        return len(trained) == len(self.known) and all(
            known.holds(p, state[p]) for p, known in zip(trained, self.known, strict=True)
        )

    def update(self, groups: Sequence[Mapping[str, Any]], *, stochastic_rounding: bool) -> None:
        """One step."""
        if self.known:
            torch._foreach_add_([known.step for known in self.known], 1.0)
        for part in self.parts:
            numbers = _numbers(groups[part.place], float(part.members[0].step))
            grads = [known.p.grad for known in part.members]
            launch(part.jobs, [local(g) for g in grads if g is not None], numbers, stochastic_rounding)


def _addresses(p: Tensor, moments: Sequence[Tensor]) -> tuple[int, ...]:
    return local(p).data_ptr(), *(_tensors(local(moment))[0].data_ptr() for moment in moments)


def _numbers(group: Mapping[str, Any], steps: float) -> tuple[float, ...]:
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    corrections = 1 - beta1**steps, (1 - beta2**steps) ** 0.5
    return lr, 1 - lr * group["weight_decay"], beta1, beta2, group["eps"], *corrections


def of_one_kind(updates: Sequence[Update]) -> list[list[int]]:
    """Places of those that one launch can take together; empty parameters are left out."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, (p, grad, first, _) in enumerate(updates):
        if p.numel() > 0:
            quantized = isinstance(first, OptimState8bit)
            key = p.device, p.dtype, grad.dtype, quantized, first.dtype, p.numel() % 8 == 0
            alike.setdefault(key, []).append(i)
    return list(alike.values())


def jobs_of(updates: Sequence[Update]) -> kernels.Jobs:
    """What updates of one kind are launched by."""
    jobs, taken = [], 0
    for p, _, first, second in updates:
        jobs.append(kernels.Job(p, kernels.Moments(*_tensors(first), *_tensors(second)), taken))
        taken += p.numel()
    _, _, first, second = updates[0]
    maps = None
    if isinstance(first, OptimState8bit) and isinstance(second, OptimState8bit):
        maps = first.qmap, second.qmap
    return kernels.prepare(jobs, maps)


def launch(
    jobs: kernels.Jobs, grads: Sequence[Tensor], numbers: tuple[float, ...], stochastic_rounding: bool
) -> None:
    """Update parameters in place; on the CPU by Triton's interpreter.

    `grads` are in the order of the jobs, `numbers` those of `adamw8bit_kernels.launch`. Parameters that are
    not bfloat16 are rounded to nearest.
    """
    rounds = stochastic_rounding and jobs.p_type is torch.bfloat16
    seed = torch.randint(2**62, (), device=jobs.device) if rounds else None
    with on_device_of(jobs.owners):
        kernels.launch(jobs, [_aligned(grad.contiguous()) for grad in grads], numbers, seed)


def _tensors(moment: Tensor) -> tuple[Tensor, Tensor | None]:
    if isinstance(moment, OptimState8bit):
        return moment.codes, moment.scale
    return moment, None


def _aligned(t: Tensor) -> Tensor:
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _has_kernel(p: Tensor) -> bool:
    part = local(p)
    return part.is_cuda and part.is_contiguous() and part.data_ptr() % 16 == 0
