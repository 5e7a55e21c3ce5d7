"""The optimizer on the CPU: float32 weights and moments in host memory, nothing of them on the GPU.

Written here because torchao's CPUOffloadOptimizer copies a gradient to the CPU in the backward pass, before
it is clipped, so that clipping changes nothing; steps in the weights' own type, where bfloat16 loses small
updates; and has neither a state by parameter nor a way to take over weights that a checkpoint loaded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qrecipes.training.in_backward import Construct
from qrecipes.training.optimizer_verbs import FixedParameters, GradientTap, loss_of

MOST_LEAVING = 2
"""Gradients on their way to the CPU. The backward pass is queued faster than it runs: without a limit every
gradient would be allocated before the first has left."""


class Offloaded(FixedParameters):
    """Steps on the CPU, on a float32 copy of each weight, and writes the result back, rounded to nearest.

    Nothing on the device but weights and gradients; with `gradients`, these leave it, too, as soon as they
    are complete (within `taking_gradients`). Host memory takes, for each weight, 4 bytes of it, the inner
    optimizer's float32 state (8 for AdamW), and a pinned buffer of the weight's type through which gradients
    come and weights go. Copies overlap with the steps of other parameters. `construct` makes the inner
    optimizer of a list of parameter groups; there is one a parameter.

    State for each weight, in host memory: the inner optimizer's, and `weight`, the float32 copy. It begins
    anew, with the weight that is on the device, where it was forgotten. What is written into weights between
    steps is lost otherwise.
    """

    def __init__(
        self, settings: Sequence[dict[str, Any]], construct: Construct, *, gradients: bool = False
    ) -> None:
        super().__init__([{**setting} for setting in settings], {})
        owned = [(p, group) for group in self.param_groups for p in group["params"]]
        self._hosts = {p: _Host.of(p, group, construct) for p, group in owned}
        self._copies = _Copies(owned[0][0].device)
        self._arrived: dict[Tensor, Callable[[], None]] = {}
        self._leaving: deque[Callable[[], None]] = deque()
        self.gradient_tap = GradientTap(self._hosts, self._send_away) if gradients else None

    def _send_away(self, p: Tensor) -> None:
        """Send a gradient to the CPU for good, once all but a few before it have arrived."""
        self._fetch(p)
        self._leaving.append(self._arrived[p])
        if len(self._leaving) > MOST_LEAVING:
            self._leaving.popleft()()

    def _fetch(self, p: Tensor) -> None:
        """Send a gradient to the CPU."""
        assert p.grad is not None
        self._arrived[p] = self._copies.start(self._hosts[p].buffer, p.grad)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every weight whose gradient is there or was taken."""
        loss = loss_of(closure)
        for p in self._hosts:
            if p.grad is not None:
                self._fetch(p)
        for p, arrival in self._arrived.items():
            arrival()
            self._step_one(p, self._hosts[p])
        self._arrived.clear()
        self._leaving.clear()
        self._copies.finish()
        return loss

    def _step_one(self, p: Tensor, host: _Host) -> None:
        if p not in self.state:
            host.begin(p)
        host.step()
        self.state[p] = {**host.inner.state[host.weight], "weight": host.weight.detach()}
        self._copies.start(p, host.buffer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Not supported.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "Offloaded.load_state_dict: torch would move the state to the GPU; "
            "use qrecipes.training.checkpoint.restore"
        )


@dataclass
class _Host:
    """What the CPU holds of one parameter."""

    weight: nn.Parameter
    """float32, the parameter's shape."""
    buffer: Tensor
    """A gradient on its way in, then the new weight on its way out, in the parameter's type."""
    group: dict[str, Any]
    """The device parameter's group, whose settings count."""
    inner: Optimizer

    @classmethod
    def of(cls, p: Tensor, group: dict[str, Any], construct: Construct) -> _Host:
        weight = nn.Parameter(torch.empty(p.shape, dtype=torch.float32))
        buffer = torch.empty(p.shape, dtype=p.dtype, pin_memory=p.is_cuda)
        return cls(weight, buffer, group, construct([{**group, "params": [weight]}]))

    def begin(self, p: Tensor) -> None:
        """Start anew from the weight on the device."""
        self.weight.data.copy_(p.detach())
        self.inner.state.pop(self.weight, None)

    def step(self) -> None:
        """Update from the gradient in the buffer, and leave the weight there."""
        (inner_group,) = self.inner.param_groups
        inner_group |= {key: value for key, value in self.group.items() if key != "params"}
        self.weight.grad = self.buffer.to(torch.float32, copy=True)
        self.inner.step()
        self.weight.grad = None
        self.buffer.copy_(self.weight.detach())


class _Copies:
    """Copies between a device and the CPU, beside the device's computation where it is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        """Begin a copy of what the device has computed so far; call the result to wait for it."""
        if self._stream is None:
            target.detach().copy_(source)
            return lambda: None
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with self._beside():
            target.detach().copy_(source, non_blocking=True)
            event = self._stream.record_event()
        if source.is_cuda:
            source.record_stream(self._stream)  # freed when copied, not before
        return event.synchronize

    def finish(self) -> None:
        """Let the device's computation wait for every copy."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def _beside(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
