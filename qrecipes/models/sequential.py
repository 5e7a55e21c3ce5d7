"""A model's layers replaced in the order in which they run, each told the inputs that the layers already
replaced before it produce, with one block of the model on the device at a time.

This is what GPTQ calls true-sequential. The hidden states of all calibration samples pass from block to
block; within a block, layers that are given the same tensor (the projections of queries, keys and values)
share one pass and one Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qrecipes.errors import ConfigError
from qrecipes.models.view import ModelView
from qrecipes.quant.gptq import Hessian

Forward = Callable[[nn.Module], Any]
"""One forward pass of a model, over one calibration sample."""
Replace = Callable[[dict[str, nn.Linear], Tensor], Mapping[str, nn.Module]]
"""(layers that have the same inputs, by name, and those inputs' X^T X / T) -> what replaces each."""


class _Stop(Exception):  # noqa: N818 - no error
    """What was wanted of a forward pass is known."""


@dataclass(frozen=True)
class _Call:
    """The arguments of a block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device | str) -> _Call:
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(device), (self.args, self.kwargs))
        return _Call(args, kwargs)


@torch.no_grad()
def replace_in_order(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    forwards: Sequence[Forward],
    replacement: Replace,
    *,
    device: torch.device | str | None = None,
    activations: torch.device | str = "cpu",
) -> None:
    """Replace `layers` of `model`, by fully qualified name, in place and in the order in which they run.

    Each of `forwards` is run up to the first block, where the model is. Then block after block goes to
    `device` (default: where it is) and back, with the hidden states kept on `activations`. Selected layers
    outside the blocks come last, with the whole model on `device`. The model computes in evaluation mode.

    Raises:
        ConfigError: if there are no samples, the model's blocks do not follow one another, or a layer is not
        reached by the first sample.
    """
    if not forwards:
        raise ConfigError("calibration: no samples; give at least one")
    blocks = ModelView.of(model).blocks
    was_training = model.training
    model.eval()
    try:
        left = dict(layers)
        calls = [call.to(activations) for call in _first_calls(model, blocks, forwards)]
        for block in blocks:
            inside = {id(module) for module in block.modules()}
            own = {fqn: layer for fqn, layer in left.items() if id(layer) in inside}
            left = {fqn: layer for fqn, layer in left.items() if fqn not in own}
            with _at(block, device) as here:
                passes = [_block_pass(block, call, here) for call in calls]
                _replace_stage(model, own, passes, replacement)
                if left or block is not blocks[-1]:
                    for index, call in enumerate(calls):
                        calls[index] = _next_call(block, call, here, activations)
        calls.clear()
        if left:
            with _at(model, device):
                passes = [lambda forward=forward: forward(model) for forward in forwards]  # type: ignore[misc]
                _replace_stage(model, left, passes, replacement)
    finally:
        model.train(was_training)


def _first_calls(
    model: nn.Module, blocks: Sequence[nn.Module], forwards: Sequence[Forward]
) -> Iterator[_Call]:
    """What each sample gives the first block; the first sample goes one block further, to see that the blocks
    follow one another."""
    for index, forward in enumerate(forwards):
        seen: list[_Call] = []
        outputs: list[Any] = []
        last = 1 if index == 0 and len(blocks) > 1 else 0

        def arrive(
            module: nn.Module, args: Any, kwargs: Any, seen: list[_Call] = seen, last: int = last
        ) -> None:
            seen.append(_Call(args, kwargs))
            if len(seen) > last:
                raise _Stop

        def leave(module: nn.Module, args: Any, output: Any, outputs: list[Any] = outputs) -> None:
            outputs.append(output)

        hooks = [block.register_forward_pre_hook(arrive, with_kwargs=True) for block in blocks[: last + 1]]
        hooks.append(blocks[0].register_forward_hook(leave))
        try:
            _run(lambda forward=forward: forward(model))  # type: ignore[misc]
        finally:
            for hook in hooks:
                hook.remove()
        if len(seen) <= last or not seen[0].args or (last and not _follows(seen, outputs[0])):
            raise ConfigError(
                f"model: the blocks of {type(model).__name__} do not follow one another, each given the "
                "hidden state of the one before and otherwise the same; calibration goes block by block"
            )
        yield seen[0]


def _follows(seen: list[_Call], output: Any) -> bool:
    first, second = seen
    others = [*zip(first.args[1:], second.args[1:], strict=False)]
    others += [(value, second.kwargs.get(key)) for key, value in first.kwargs.items()]
    return (
        second.args[0] is output
        and len(first.args) == len(second.args)
        and first.kwargs.keys() == second.kwargs.keys()
        and all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in others)
    )


def _block_pass(block: nn.Module, call: _Call, device: torch.device) -> Callable[[], Any]:
    def run() -> Any:
        here = call.to(device)
        return block(*here.args, **here.kwargs)

    return run


def _next_call(block: nn.Module, call: _Call, device: torch.device, store: torch.device | str) -> _Call:
    hidden = _block_pass(block, call, device)()
    return replace(call, args=(hidden.to(store), *call.args[1:]))


def _replace_stage(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    passes: Sequence[Callable[[], Any]],
    replacement: Replace,
) -> None:
    """Replace the layers that `passes` run, group by group."""
    for names, once in _groups(layers, passes[0]) if layers else ():
        group = {fqn: layers[fqn] for fqn in names}
        first = group[names[0]]
        hessian = Hessian(first.in_features, first.weight.device)

        def count(module: nn.Module, args: Any, hessian: Hessian = hessian, once: bool = once) -> None:
            hessian.add(args[0])
            if once:
                raise _Stop

        hook = first.register_forward_pre_hook(count)
        try:
            for run in passes:
                _run(run)
        finally:
            hook.remove()
        for fqn, module in replacement(group, hessian.matrix).items():
            model.set_submodule(fqn, module.train(layers[fqn].training))


def _groups(layers: Mapping[str, nn.Linear], run: Callable[[], Any]) -> list[tuple[list[str], bool]]:
    """Names of layers that one pass gives the same tensor, in the order in which they run, and whether each
    is called once."""
    calls: list[tuple[str, Tensor, int]] = []  # holds the tensors, so that no two have one identity

    def note(fqn: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: calls.append((fqn, args[0], args[0]._version))

    hooks = [layer.register_forward_pre_hook(note(fqn)) for fqn, layer in layers.items()]
    try:
        _run(run)
    finally:
        for hook in hooks:
            hook.remove()
    names = [fqn for fqn, _, _ in calls]
    missing = [fqn for fqn in layers if fqn not in names]
    if missing:
        raise ConfigError(
            f"{missing[0]}: is not called by the first calibration sample, so its inputs are not known; add "
            f"{missing[0]!r} to skip"
        )
    groups: list[tuple[list[str], bool]] = []
    shared: tuple[int, int] | None = None
    for fqn, tensor, version in calls:
        if names.count(fqn) > 1:
            if not any(fqn in group for group, _ in groups):
                groups.append(([fqn], False))
            shared = None
        elif shared == (id(tensor), version):
            groups[-1][0].append(fqn)
        else:
            groups.append(([fqn], True))
            shared = id(tensor), version
    return groups


def _run(call: Callable[[], Any]) -> None:
    with suppress(_Stop):
        call()


@contextmanager
def _at(module: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """The module on `device`, and back after."""
    home = next((p.device for p in module.parameters()), torch.device("cpu"))
    here = home if device is None else torch.device(device)
    module.to(here)
    try:
        yield here
    finally:
        module.to(home)
