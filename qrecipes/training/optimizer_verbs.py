"""What the loop asks of any optimizer, so that it need not know which it has; most have nothing to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

from qrecipes.errors import TrainingError


@runtime_checkable
class AveragesWeights(Protocol):
    """An optimizer that trains at other weights than those that are judged, saved and exported."""

    evaluating: bool

    def eval(self) -> None:
        """Put the weights in place that are judged."""

    def train(self) -> None:
        """Put the weights in place that are trained, as a function of the optimizer's state alone."""


class FixedParameters(Optimizer):
    """An optimizer made of others, whose parameters are those that it was made with."""

    _is_made = False

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._is_made = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not supported: what is added would never train.

        Raises:
            NotImplementedError: once the optimizer is made.
        """
        if self._is_made:
            raise NotImplementedError(
                f"{type(self).__name__}.add_param_group: it updates what it was made with, and nothing else; "
                "make a new optimizer of all parameters with build_optimizer"
            )
        super().add_param_group(param_group)


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What `step(closure)` returns: the closure's loss, computed with gradients, or None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


@contextmanager
def evaluation_weights(optimizer: Optimizer) -> Iterator[None]:
    """While entered, the model has the weights that are judged, saved and exported; afterwards those that
    are trained are back, to the bit."""
    if not isinstance(optimizer, AveragesWeights) or optimizer.evaluating:
        yield
        return
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()


def training_weights_(optimizer: Optimizer) -> None:
    """Give the model the weights that its optimizer's state was saved with: a checkpoint's model holds the
    weights that are judged."""
    if isinstance(optimizer, AveragesWeights):
        optimizer.train()


class GradientTap:
    """Calls `use(parameter)` as soon as a parameter's gradient is complete, and drops the gradient then.

    Only while `flowing`: a backward pass outside of a training step leaves its gradients where they are.
    """

    def __init__(self, params: Iterable[Tensor], use: Callable[[Tensor], None]) -> None:
        self._use = use
        self._flowing = False
        self._norms: dict[Tensor, Tensor] = {}
        for p in params:
            p.register_post_accumulate_grad_hook(self._arrive)

    @contextmanager
    def flowing(self) -> Iterator[None]:
        """Take the gradients of the backward pass inside."""
        self._flowing = True
        try:
            yield
        finally:
            self._flowing = False

    def take_norms(self) -> dict[Tensor, Tensor]:
        """The norm of each gradient taken since the last call; of a sharded one, not yet summed over
        ranks."""
        norms, self._norms = self._norms, {}
        return norms

    @torch.no_grad()
    def _arrive(self, p: Tensor) -> None:
        if not self._flowing or p.grad is None:
            return
        if p in self._norms:
            raise TrainingError(
                f"the gradient of a parameter of shape {tuple(p.shape)} came in two parts, and the first was "
                'already used; set optim.in_backward = false, or optim.offload = "state"'
            )
        self._norms[p] = torch.linalg.vector_norm(p.grad)
        self._use(p)
        p.grad = None


def gradient_tap(optimizer: Optimizer) -> GradientTap | None:
    """What takes gradients away during the backward pass, where the optimizer does."""
    return getattr(optimizer, "gradient_tap", None)


@contextmanager
def taking_gradients(optimizer: Optimizer, *, wanted: bool = True) -> Iterator[None]:
    """Around the backward passes of a step: an optimizer that uses gradients at once may do so."""
    tap = gradient_tap(optimizer)
    if tap is None or not wanted:
        yield
        return
    with tap.flowing():
        yield


def norms_of_taken(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """The norms of this step's gradients that are gone already, by parameter."""
    tap = gradient_tap(optimizer)
    return {} if tap is None else tap.take_norms()
