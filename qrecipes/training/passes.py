"""Forward and backward pass of a micro-batch: run by Python, or recorded once as a CUDA graph and replayed.

Python takes 10 to 100 microseconds to launch a kernel, a graph one or two: where the GPU waits for Python, as
with many small kernels, a replayed step takes no longer than its kernels do.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qrecipes.data import Batch
from qrecipes.errors import ConfigError, TrainingError
from qrecipes.training.optimizer_verbs import gradient_tap

if TYPE_CHECKING:
    from qrecipes.config.run import ParallelSection
    from qrecipes.parallel.process import Process
    from qrecipes.training.task import Task

WARMUP = 2
"""Micro-batches of a shape that Python runs before one is recorded: they compile, and fill caches."""
MOST_GRAPHS = 16
"""Shapes of micro-batches that are recorded; Python runs further ones."""
Action: TypeAlias = Callable[[], None]
Shape: TypeAlias = tuple[Any, ...]
"""What batches of one recording have in common."""


class Passes:
    """Forward and backward pass, run by Python."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, model: nn.Module, task: Task, batch: Batch, divisor: Tensor) -> Tensor:
        """Add the gradients of loss / `divisor`, a scalar, to the parameters'; the loss, summed over the
        batch's targets, without a gradient."""
        return _run(model, task, batch.to(self.device), divisor)

    def forget(self) -> None:
        """Assume nothing of the model that earlier passes found."""


def passes_for(parallel: ParallelSection, process: Process, optimizer: Optimizer) -> Passes:
    """The passes that a run asks for.

    Raises:
        ConfigError: if CUDA graphs are asked for where they cannot be recorded.
    """
    if not parallel.cuda_graphs:
        return Passes(process.device)
    reason = None
    if process.device.type != "cuda":
        reason = f"the device is {process.device.type}"
    elif process.mesh is not None:
        reason = f"{process.world} processes train together, and what they exchange is not recorded"
    elif gradient_tap(optimizer) is not None:
        reason = "the optimizer updates in the backward pass"
    if reason is not None:
        raise ConfigError(f"parallel.cuda_graphs: true, but {reason}; set it to false")
    return RecordedPasses(CUDAGraphs(process.device))


class Recorder(Protocol):
    """Notes what a device is told to do."""

    device: torch.device

    def run(self, action: Action) -> None:
        """Do it, in the way in which it would be recorded."""

    def record(self, action: Action) -> Action:
        """Note what an action has the device do, without doing it; what does it, as often as called."""

    def finish(self) -> None:
        """Return when the device has done all that was replayed, so that recordings may go."""


class RecordedPasses(Passes):
    """The same, of each shape of batches recorded after WARMUP of them, and replayed from then on.

    What recordings use has to stay where it is. Batches are copied to tensors of their own; gradients are
    kept, and zeroed where the optimizer has dropped them; and if a parameter or buffer is another than it
    was, all is recorded anew. Recordings share their memory: none runs beside another, and no result is in
    it. What the model's Python code reads is recorded as it was: whoever changes that calls `forget`.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder.device)
        self._recorder = recorder
        self._seen: Counter[Shape] = Counter()
        self._recordings: dict[Shape, _Recording] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._used: list[_Used] = []

    def __call__(self, model: nn.Module, task: Task, batch: Batch, divisor: Tensor) -> Tensor:
        """As of `Passes`.

        Raises:
            TrainingError: if the passes do what cannot be recorded, such as wait for the device.
        """
        if not all(used.is_unchanged() for used in self._used):
            self.forget()
        self._attach_gradients()
        shape: Shape = (model.training, *map(_traits, batch.tensors()))
        recording = self._recordings.get(shape)
        if recording is None and self._must_run(shape):
            return self._run_by_python(model, task, batch, divisor)
        if recording is None:
            self._used = list(_used_by(model))
            recording = self._recordings[shape] = self._recorded(model, task, batch)
        _copy(batch.tensors(), recording.batch.tensors())
        recording.divisor.copy_(divisor, non_blocking=True)
        recording.replay()
        return recording.loss.clone()

    def forget(self) -> None:
        """Record everything anew."""
        if self._recordings:
            self._recorder.finish()
        for kept in self._seen, self._recordings, self._gradients, self._used:
            kept.clear()

    def _must_run(self, shape: Shape) -> bool:
        self._seen[shape] += 1
        is_full = len(self._recordings) >= MOST_GRAPHS
        if is_full and self._seen[shape] == WARMUP + 1:
            warnings.warn(
                f"parallel.cuda_graphs: {MOST_GRAPHS} shapes of micro-batches are recorded, and {shape} is "
                "one more, which is not; use fewer lengths",
                stacklevel=3,
            )
        return is_full or self._seen[shape] <= WARMUP

    def _run_by_python(self, model: nn.Module, task: Task, batch: Batch, divisor: Tensor) -> Tensor:
        losses: list[Tensor] = []
        self._recorder.run(lambda: losses.append(_run(model, task, batch.to(self.device), divisor)))
        for p in model.parameters():
            if p.grad is not None:
                self._gradients.setdefault(p, p.grad)
        return losses[0]

    def _recorded(self, model: nn.Module, task: Task, batch: Batch) -> _Recording:
        own, loss = batch.empty_on(self.device), torch.zeros((), device=self.device)
        divisor = torch.ones((), device=self.device)

        def run() -> None:
            loss.copy_(_run(model, task, own, divisor))

        return _Recording(own, divisor, loss, self._recorder.record(run))

    def _attach_gradients(self) -> None:
        """Give the parameters the gradients that are kept, with the values of what they have now."""
        dropped = [kept for p, kept in self._gradients.items() if p.grad is None]
        if dropped:
            torch._foreach_zero_(dropped)
        for p, kept in self._gradients.items():
            if p.grad is not None and p.grad is not kept:
                kept.copy_(p.grad)
            p.grad = kept


class CUDAGraphs:
    """Records CUDA graphs on a stream of their own, in memory that they share."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, action: Action) -> None:
        """Do it on the graphs' stream, where libraries then have their workspaces; others wait for it."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            action()
        current.wait_stream(self._stream)

    def record(self, action: Action) -> Action:
        """A graph's `replay`.

        Raises:
            TrainingError: if the action cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                action()
        except RuntimeError as error:
            first = error.__context__ or error  # ending a recording that has failed fails, too
            raise TrainingError(
                "parallel.cuda_graphs: the forward and backward pass cannot be recorded: "
                f"{str(first).partition(chr(10))[0]}; set it to false"
            ) from error
        return graph.replay

    def finish(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class _Recording:
    batch: Batch
    divisor: Tensor
    loss: Tensor
    replay: Action


@dataclass(frozen=True)
class _Used:
    """A parameter or buffer as a recording found it."""

    owner: dict[str, Any]
    name: str
    tensor: Tensor
    place: tuple[Any, ...]

    def is_unchanged(self) -> bool:
        return self.owner.get(self.name) is self.tensor and _place(self.tensor) == self.place


def _used_by(model: nn.Module) -> Iterator[_Used]:
    for module in model.modules():
        for owner in (module._parameters, module._buffers):
            for name, t in owner.items():
                if t is not None:
                    yield _Used(owner, name, t, _place(t))


def _place(t: Tensor) -> tuple[Any, ...]:
    """Whether it is trained, and where it is stored, or what it is made of."""
    if not is_traceable_wrapper_subclass(t):
        return t.requires_grad, t.data_ptr()
    names, _ = t.__tensor_flatten__()
    return t.requires_grad, *(_place(getattr(t, name)) for name in names)


def _run(model: nn.Module, task: Task, batch: Batch, divisor: Tensor) -> Tensor:
    loss = task.loss(model, batch)
    (loss / divisor).backward()
    return loss.detach()


def _traits(t: Tensor | None) -> object:
    return None if t is None else (tuple(t.shape), t.dtype)


def _copy(given: tuple[Tensor | None, ...], own: tuple[Tensor | None, ...]) -> None:
    for source, target in zip(given, own, strict=True):
        if source is not None and target is not None:
            target.copy_(source, non_blocking=True)
