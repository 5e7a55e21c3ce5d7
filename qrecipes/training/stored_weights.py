"""Updates of weights that are stored in low precision, by any optimizer.

The optimizer owns a float32 stand-in for each such weight, whose memory exists only while it is updated: it
is filled with the dequantized weight, updated, and rounded back stochastically, with fresh scales. Weights go
in buckets, so that few stand-ins have memory at a time. What an optimizer knows of a weight (decay, momentum,
quantized moments) works as ever, and nothing here names a format: a stored weight is whatever can be
dequantized and requantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from qrecipes.errors import ConfigError
from qrecipes.quant.sharded import is_composite, local
from qrecipes.training.exact_state import load_exactly
from qrecipes.training.optimizer_verbs import FixedParameters, loss_of
from qrecipes.training.stochastic_adamw import round_to_bfloat16_stochastically

BUCKET_WEIGHTS = 1 << 24
"""Weights of this rank that are updated together. A larger parameter is updated alone, and whole: it sets the
size of what an update needs for a moment, 8 bytes a weight for the stand-in and its gradient, and the
optimizer's states where they are raised to float32."""

Construct = Callable[[list[dict[str, Any]]], Optimizer]
State = dict[str, Any]


@runtime_checkable
class StoredLow(Protocol):
    """What a tensor class has whose values are stored in low precision."""

    def dequantize(self, *, out: Tensor | None = None) -> Tensor:
        """The values in float32, written into `out` where it is given."""

    def requantize_(self, value: Tensor, *, stochastic: bool) -> None:
        """Take over a float32 value. What is equal to the stored value keeps its bits."""


def is_stored_low(parameter: Tensor) -> bool:
    """Whether this rank's part of a parameter is stored in low precision."""
    return isinstance(local(parameter.detach()), StoredLow)


def with_stored_weights(settings: Sequence[dict[str, Any]], construct: Construct) -> Optimizer:
    """`construct(settings)`, wrapped where a parameter of these groups is stored in low precision.

    `construct` makes an optimizer of a list of parameter groups; it is called for a part of them at a time.

    Raises:
        ConfigError: if the optimizer keeps weights of its own.
    """
    if any(is_stored_low(p) for setting in settings for p in setting["params"]):
        return StoredWeightOptimizer(settings, construct)
    return construct(list(settings))


class StoredWeightOptimizer(FixedParameters):
    """Several optimizers, one for the plain parameters and one for each bucket of stored ones, as one.

    `param_groups` are those of `settings`, with the parameters themselves: what is set there, such as a
    learning rate, holds for the next step. `state` is keyed by the parameters, too, and holds each state in
    the type in which the optimizer would keep it for a parameter of that type; where that is bfloat16, it is
    rounded stochastically after each update, so that a slow second moment does not stall.
    """

    def __init__(self, settings: Sequence[dict[str, Any]], construct: Construct) -> None:
        super().__init__([dict(setting) for setting in settings], {})
        self._parts = [*_plain_part(self.param_groups, construct), *_buckets(self.param_groups, construct)]
        for part in self._parts:
            if hasattr(part.inner, "eval"):
                raise ConfigError(
                    f"optim.name: {type(part.inner).__name__} keeps weights of its own in float32 and writes "
                    "them back, which gains nothing for weights stored in low precision; use another "
                    "optimizer, or leave out the transform that stores them"
                )
            for group, inner_group in part.paired(self.param_groups):
                group.update({key: inner_group[key] for key in inner_group if key not in group})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        loss = loss_of(closure)
        for part in self._parts:
            for group, inner_group in part.paired(self.param_groups):
                _take_settings_(inner_group, group)
            part.step(self.state)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; every part of it keeps its own type."""
        super().load_state_dict(state_dict)
        load_exactly(self, state_dict)


@dataclass(eq=False)
class _StandIn:
    """A stored weight, and the float32 Parameter that an optimizer updates for it."""

    stored: nn.Parameter
    value: nn.Parameter

    @classmethod
    def of(cls, stored: nn.Parameter) -> _StandIn:
        value = torch.empty_like(local(stored.detach()), dtype=torch.float32)
        stand_in = cls(stored, nn.Parameter(_sharded_as(stored, value)))
        local(stand_in.value.detach()).untyped_storage().resize_(0)
        return stand_in

    @contextmanager
    def materialized(self) -> Iterator[None]:
        """While entered, the value has memory, and is the stored weight's to begin with."""
        value = local(self.value.detach())
        storage = value.untyped_storage()
        storage.resize_(value.numel() * value.itemsize)
        _stored_low(self.stored).dequantize(out=value)
        try:
            yield
        finally:
            storage.resize_(0)


@dataclass(eq=False)
class _Part:
    """An inner optimizer, which of the outer groups its groups stand for, and its stand-ins, if any."""

    inner: Optimizer
    places: Sequence[int]
    stand_ins: Sequence[_StandIn] = ()
    kept_types: Mapping[str, torch.dtype] = field(default_factory=dict)
    """The type of each weight-shaped state between steps, by key."""

    def paired(self, groups: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Each outer group that this part has parameters of, and the inner group that stands for it."""
        for place, inner_group in zip(self.places, self.inner.param_groups, strict=True):
            yield groups[place], inner_group

    def step(self, state: Any) -> None:
        """Update what has a gradient; `state` is the outer optimizer's."""
        if not self.stand_ins:
            self.inner.state = state
            self.inner.step()
            return
        moving = [stand_in for stand_in in self.stand_ins if stand_in.stored.grad is not None]
        if moving:
            with ExitStack() as stack:
                for stand_in in moving:
                    stack.enter_context(stand_in.materialized())
                self._update(moving, state)

    def _update(self, moving: Sequence[_StandIn], state: Any) -> None:
        for stand_in in moving:
            stored, value = stand_in.stored, stand_in.value
            value.grad = stored.grad.to(torch.float32)  # type: ignore[union-attr]
            if stored in state:
                self.inner.state[value] = _raised(state[stored], value)
        self.inner.step()
        for stand_in in moving:
            stored, value = stand_in.stored, stand_in.value
            value.grad = None
            _stored_low(stored).requantize_(local(value), stochastic=True)
            state[stored] = _lowered(self.inner.state.pop(value, {}), value, self.kept_types)


def _plain_part(groups: Sequence[dict[str, Any]], construct: Construct) -> Iterator[_Part]:
    """One inner optimizer for the parameters that are not stored low, if there are any."""
    plain = [[p for p in group["params"] if not is_stored_low(p)] for group in groups]
    places = [place for place, params in enumerate(plain) if params]
    if places:
        yield _Part(construct([{**groups[place], "params": plain[place]} for place in places]), places)


def _buckets(groups: Sequence[dict[str, Any]], construct: Construct) -> Iterator[_Part]:
    """An inner optimizer for each bucket of stored weights; a bucket has one group and one type."""
    for place, group in enumerate(groups):
        stored = [p for p in group["params"] if is_stored_low(p)]
        for dtype in dict.fromkeys(p.dtype for p in stored):
            kept_types = _types_of_state(group, construct, dtype)
            for bucket in _cut([p for p in stored if p.dtype is dtype]):
                stand_ins = [_StandIn.of(p) for p in bucket]
                with ExitStack() as stack:  # an optimizer may look at its parameters when it is made
                    for stand_in in stand_ins:
                        stack.enter_context(stand_in.materialized())
                    inner = construct([{**group, "params": [stand_in.value for stand_in in stand_ins]}])
                yield _Part(inner, [place], stand_ins, kept_types)


def _cut(params: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in order, in lists of at most BUCKET_WEIGHTS weights on this rank, or of one."""
    bucket: list[nn.Parameter] = []
    weights = 0
    for p in params:
        size = local(p.detach()).numel()
        if bucket and weights + size > BUCKET_WEIGHTS:
            yield bucket
            bucket, weights = [], 0
        bucket.append(p)
        weights += size
    if bucket:
        yield bucket


def _types_of_state(
    group: Mapping[str, Any], construct: Construct, dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """In which type the optimizer keeps each weight-shaped state of a `dtype` parameter: found on a small
    one. Quantized states are not asked for, since they are the same for every type."""
    small = nn.Parameter(torch.zeros(2, 2, dtype=dtype))
    small.grad = torch.zeros_like(small)
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        inner = construct([{**group, "params": [small]}])
        inner.step()
    return {
        key: value.dtype
        for key, value in inner.state[small].items()
        if isinstance(value, Tensor) and value.shape == small.shape
    }


def _take_settings_(inner_group: dict[str, Any], group: Mapping[str, Any]) -> None:
    for key, value in group.items():
        if key == "params":
            continue
        if isinstance(inner_group.get(key), Tensor):  # compiled steps want the same tensor
            inner_group[key].fill_(value)
        else:
            inner_group[key] = value


def _raised(state: State, value: Tensor) -> State:
    return {key: v.to(torch.float32) if _is_like(v, value) else v for key, v in state.items()}


def _lowered(state: State, value: Tensor, kept_types: Mapping[str, torch.dtype]) -> State:
    return {
        key: _rounded(v) if _is_like(v, value) and kept_types.get(key) is torch.bfloat16 else v
        for key, v in state.items()
    }


def _is_like(state: Any, value: Tensor) -> bool:
    """Whether a state is a plain tensor of one number a weight."""
    return (
        isinstance(state, Tensor)
        and state.is_floating_point()
        and state.shape == value.shape
        and not is_composite(state)
    )


def _rounded(tensor: Tensor) -> Tensor:
    """bfloat16 of a float32 tensor, rounded stochastically, sharded as it is."""
    part = local(tensor)
    return _sharded_as(tensor, _rounding(part.device.type)(part))


@cache
def _rounding(device_type: str) -> Callable[[Tensor], Tensor]:
    """`round_to_bfloat16_stochastically`, compiled into one kernel on a GPU."""
    if device_type != "cuda":
        return round_to_bfloat16_stochastically
    return torch.compile(round_to_bfloat16_stochastically, fullgraph=True, dynamic=True)


def _stored_low(parameter: Tensor) -> StoredLow:
    part = local(parameter.detach())
    assert isinstance(part, StoredLow), type(part)
    return part


def _sharded_as(tensor: Tensor, part: Tensor) -> Tensor:
    """This rank's `part` of a tensor that is sharded as `tensor` is; `part` itself where that is not."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(
        part,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
