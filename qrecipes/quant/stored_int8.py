"""A weight that exists only as INT8 values and scales, and that FSDP2 shards, gathers and saves as such.

N output features, K input features, G groups along K with a scale each. FSDP2 cuts a weight by rows, and each
row has scales of its own, so a rank's rows are a part of the whole weight's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from qrecipes.quant.int8_gathered import padded_rows
from qrecipes.quant.int8_quantize import quantize_rows
from qrecipes.quant.primitives import dequantize_int8

aten = torch.ops.aten
DTYPES = (torch.bfloat16, torch.float32)
"""Types that a stored weight may pass for, and takes its gradient in."""


class StoredInt8(torch.Tensor):
    """A matrix [N, K] held as INT8 `q`, [N, K], and float32 `scale`, [N, G]: q * scale, group by group.

    It passes for a matrix of `dtype` and takes a gradient of that type. What only reads it computes on a
    dequantized copy, and so do its views, but for whole rows. It is written by `requantize_`, or by `copy_`,
    which rounds to nearest; every other write, of many tensors at once, as `out` or into a view, is refused,
    since it would change that copy: the steps of torch's own optimizers, too. What shards, copies, moves and
    saves a parameter works on the two parts. `num_rows` is N over all ranks.
    """

    q: Tensor
    scale: Tensor
    num_rows: int
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, q_NK: Tensor, scale_NG: Tensor, dtype: torch.dtype, num_rows: int | None = None
    ) -> StoredInt8:
        """A matrix on the memory of its parts.

        Raises:
            ValueError: if a shape or a type does not fit.
        """
        if dtype not in DTYPES:
            raise ValueError(f"StoredInt8.dtype: {dtype} is not bfloat16 or float32; use one of them")
        N, K = q_NK.shape
        G = scale_NG.shape[1]
        if scale_NG.shape[0] != N or G == 0 or K % G:
            raise ValueError(
                f"StoredInt8.scale_NG: shape {tuple(scale_NG.shape)} for values of {(N, K)}; give a scale "
                "for each row, or for each of several equal parts of it"
            )
        stored = torch.Tensor._make_wrapper_subclass(cls, q_NK.shape, dtype=dtype, device=q_NK.device)
        stored.q, stored.scale, stored.num_rows = q_NK, scale_NG, N if num_rows is None else num_rows
        return stored

    @classmethod
    def of(cls, weight_NK: Tensor, group_size: int | None = None) -> StoredInt8:
        """A weight rounded to nearest, with a scale a row or for each `group_size` of its inputs.

        Raises:
            ValueError: if the weight is no bfloat16 or float32 matrix, or `group_size` does not divide K.
        """
        if weight_NK.ndim != 2:
            raise ValueError(
                f"StoredInt8.of: shape {tuple(weight_NK.shape)}, where a matrix is needed; leave it as it is"
            )
        K = weight_NK.shape[1]
        if group_size is not None and (group_size < 1 or K % group_size):
            raise ValueError(
                f"StoredInt8.of: group_size {group_size} does not divide {K} inputs; use a divisor"
            )
        groups = 1 if group_size is None else max(K // group_size, 1)
        q_NK, scale_NG = _quantize(weight_NK.detach(), groups, stochastic=False)
        return cls(q_NK, scale_NG, weight_NK.dtype)

    def dequantize(self, *, out: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """q * scale in float32, [N, K]; written into `out`, contiguous and float32, where it is given."""
        if out is None:
            return dequantize_groups(self.q, self.scale, torch.float32)
        shape = (*self.scale.shape, self.shape[1] // self.scale.shape[1])
        torch.mul(self.q.view(shape), self.scale.unsqueeze(-1), out=out.view(shape))
        return out

    @torch.no_grad()
    def requantize_(self, value_NK: Tensor, *, stochastic: bool) -> None:
        """Take over a float32 value, with fresh scales; stochastic rounding draws from the device's default
        generator and is right on average.

        A group whose values are those that it stands for keeps its bits, and so does an entry where the scale
        stays: in float32, q * scale divided by the scale is not always q, and rounding alone could move it.
        """
        new_q, new_scale = _quantize(value_NK, self.scale.shape[1], stochastic=stochastic)
        _replacement(self.device.type)(self.q, self.scale, new_q, new_scale, value_NK)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.dtype, int]]:
        return ["q", "scale"], (self.dtype, self.num_rows)

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor],
        settings: tuple[torch.dtype, int],
        outer_size: torch.Size,
        outer_stride: Sequence[int],
    ) -> StoredInt8:
        return StoredInt8(parts["q"], parts["scale"], *settings)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is not None and isinstance(args[0], cls):
            result = handler(func, *args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return _on_copies(func, args, kwargs or {}, cls, lambda stored: stored.dequantize().to(stored.dtype))

    def fsdp_pre_all_gather(self, mesh: DeviceMesh) -> tuple[tuple[Tensor, Tensor], None]:
        """INT8 values and scales of this rank's rows, filled up to as many rows as the first rank has.

        With this signature FSDP2 leaves the filling to the tensor; with its longer one it wants all that is
        gathered in the weight's own shape where rows are left over, and the scales have another.
        """
        return (padded_rows(self.q, self.num_rows, mesh), padded_rows(self.scale, self.num_rows, mesh)), None

    def fsdp_post_all_gather(
        self,
        gathered: tuple[Tensor, ...],
        metadata: None,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[StoredInt8, tuple[Tensor, ...]] | None:
        """The whole weight, in the memory that was gathered into, which FSDP2 frees and fills again.

        From the second time on `out` is the same weight, on the same memory.
        """
        if out is not None:
            return None
        q_NK, scale_NG = (part[: self.num_rows] for part in gathered)
        return StoredInt8(q_NK, scale_NG, param_dtype, self.num_rows), ()

    def __repr__(self) -> str:  # type: ignore[override]
        shape, groups = tuple(self.shape), self.scale.shape[1]
        return f"StoredInt8(shape={shape}, groups={groups}, dtype={self.dtype}, device={self.device})"


class DequantizedView(torch.Tensor):
    """What a view of a stored weight reads, a copy, which refuses to be written: that would be lost."""

    value: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, value: Tensor) -> DequantizedView:
        """The copy itself, as a view."""
        view = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=value.device
        )
        view.value = value
        return view

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["value"], None

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], settings: None, outer_size: torch.Size, outer_stride: Sequence[int]
    ) -> DequantizedView:
        return DequantizedView(parts["value"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _on_copies(func, args, kwargs or {}, cls, lambda view: view.value)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DequantizedView({self.value})"


def _on_copies(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cls: type, copy: Callable[[Any], Tensor]
) -> Any:
    """What an operator gives of copies of the `cls` among its arguments; views as `DequantizedView`.

    Raises:
        NotImplementedError: if it writes into one.
    """
    aliased: dict[bool, list[Any]] = {False: [], True: []}
    for place, declared in enumerate(func._schema.arguments):
        if declared.alias_info is not None:
            given = args[place] if place < len(args) else kwargs.get(declared.name)
            several = given if isinstance(given, list | tuple) else [given]
            aliased[declared.alias_info.is_write] += [tensor for tensor in several if isinstance(tensor, cls)]
    if aliased[True]:
        raise NotImplementedError(
            f"StoredInt8: {func} would write into a dequantized copy, and be lost; train the weight with an "
            "optimizer of qrecipes.training.optim.build_optimizer, or compute the new value and give it to "
            "requantize_"
        )
    result = func(*tree_map_only(cls, copy, args), **tree_map_only(cls, copy, kwargs))
    return tree_map_only(Tensor, DequantizedView, result) if aliased[False] else result


def dequantize_groups(q_NK: Tensor, scale_NG: Tensor, dtype: torch.dtype) -> Tensor:
    """q * scale, each scale for its K / G columns, [N, K], in float32 and rounded to `dtype` once."""
    (N, K), G = q_NK.shape, scale_NG.shape[1]
    return dequantize_int8(q_NK.view(N, G, K // G), scale_NG.view(N, G, 1), dtype).view(N, K)


def plain_parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 values [N, K] and scales [N, G] of a stored weight, on its memory, and sharded where it is."""
    weight = weight.detach()
    part = weight.to_local() if isinstance(weight, DTensor) else weight
    assert isinstance(part, StoredInt8), type(part)
    if not isinstance(weight, DTensor):
        return part.q, part.scale
    q, scale = (
        DTensor.from_local(
            tensor,
            weight.device_mesh,
            weight.placements,
            run_check=False,
            shape=torch.Size((weight.shape[0], tensor.shape[1])),
            stride=(tensor.shape[1], 1),
        )
        for tensor in (part.q, part.scale)
    )
    return q, scale


def _quantize(value_NK: Tensor, groups: int, *, stochastic: bool) -> tuple[Tensor, Tensor]:
    N, K = value_NK.shape
    rows = value_NK.reshape(N * groups, K // groups)
    q, scale = quantize_rows(rows, stochastic_rounding=stochastic)
    return q.reshape(N, K).contiguous(), scale.view(N, groups)


def _replace_moved_(
    q_NK: Tensor, scale_NG: Tensor, new_q_NK: Tensor, new_scale_NG: Tensor, value_NK: Tensor
) -> None:
    """Overwrite what a value has moved: groups that it is equal to, and of groups whose scale stays the
    entries that it is equal to, keep their bits. NaN is equal to nothing."""
    (N, K), G = q_NK.shape, scale_NG.shape[1]
    shape, scale_NG1, new_scale_NG1 = (N, G, K // G), scale_NG.unsqueeze(-1), new_scale_NG.unsqueeze(-1)
    same = value_NK.reshape(shape) == q_NK.view(shape) * scale_NG1
    same_NG1 = same.all(-1, keepdim=True)
    keep = same_NG1 | (same & (new_scale_NG1 == scale_NG1))
    q_NK.copy_(torch.where(keep, q_NK.view(shape), new_q_NK.view(shape)).view(N, K))
    scale_NG.copy_(torch.where(same_NG1.squeeze(-1), scale_NG, new_scale_NG))


@cache
def _replacement(device_type: str) -> Callable[..., None]:
    """`_replace_moved_`, compiled where it would otherwise make weight-sized float32 tensors of its own."""
    return (
        torch.compile(_replace_moved_, fullgraph=True, dynamic=True)
        if device_type == "cuda"
        else _replace_moved_
    )


Handler = Callable[..., Any]
_HANDLERS: dict[Any, Handler] = {}


def _handles(*operators: Any) -> Callable[[Handler], Handler]:
    """Decorator: `handler(func, stored, ...)` stands for these operators, where it does not return
    NotImplemented."""

    def keep(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(operators, handler))
        return handler

    return keep


def _with_parts(stored: StoredInt8, change: Callable[[Tensor], Tensor]) -> StoredInt8:
    return StoredInt8(change(stored.q), change(stored.scale), stored.dtype, stored.num_rows)


@_handles(aten.detach.default, aten.alias.default)
def _alias(func: Any, stored: StoredInt8) -> StoredInt8:
    return _with_parts(stored, func)


@_handles(aten.clone.default)
def _clone(func: Any, stored: StoredInt8, *, memory_format: Any = None) -> StoredInt8:
    return _with_parts(stored, lambda part: part.clone(memory_format=torch.contiguous_format))


@_handles(aten._to_copy.default)
def _to(func: Any, stored: StoredInt8, *, dtype: torch.dtype | None = None, **kwargs: Any) -> StoredInt8:
    """To another device; another type is only what the weight passes for."""
    kwargs.pop("memory_format", None)
    q, scale = func(stored.q, **kwargs), func(stored.scale, **kwargs)
    return StoredInt8(q, scale, dtype or stored.dtype, stored.num_rows)


@_handles(aten.zeros_like.default, aten.empty_like.default, aten.new_empty.default)
def _plain_like(func: Any, stored: StoredInt8, *args: Any, **kwargs: Any) -> Tensor:
    """Plain tensors: optimizer states and gradients."""
    kwargs["dtype"] = kwargs.get("dtype") or stored.dtype
    return func(stored.q, *args, **kwargs)


@_handles(aten.new_zeros.default)
def _new_zeros(func: Any, stored: StoredInt8, size: Sequence[int], **kwargs: Any) -> Any:
    """A stored weight of other rows, which FSDP2 makes a rank's part of; else plain."""
    if kwargs.get("dtype") is not None or len(size) != 2 or size[1] != stored.shape[1]:
        return _plain_like(func, stored, size, **kwargs)
    q, scale = (part.new_zeros(size[0], part.shape[1]) for part in (stored.q, stored.scale))
    return StoredInt8(q, scale, stored.dtype, stored.num_rows)


@_handles(aten.slice.Tensor, aten.split.Tensor)
def _cut(func: Any, stored: StoredInt8, *args: Any, **kwargs: Any) -> Any:
    """Some rows, on the same memory."""
    dim = kwargs.get("dim", args[_DIM[func]] if len(args) > _DIM[func] else 0)
    if dim not in (0, -2):
        return NotImplemented
    q, scale = func(stored.q, *args, **kwargs), func(stored.scale, *args, **kwargs)
    if isinstance(q, Tensor):
        return StoredInt8(q, scale, stored.dtype, stored.num_rows)
    return [StoredInt8(*both, stored.dtype, stored.num_rows) for both in zip(q, scale, strict=True)]


_DIM = {aten.slice.Tensor: 0, aten.split.Tensor: 1}
"""Where `dim` is among the arguments after the tensor."""


@_handles(aten.view.default)
def _view(func: Any, stored: StoredInt8, size: Sequence[int]) -> Any:
    """Itself, also where FSDP2 asks for a flat view of a rank's part: it is kept to hold memory, not read."""
    if tuple(size) in (tuple(stored.shape), (-1,)):
        return _alias(aten.detach.default, stored)
    return NotImplemented


@_handles(aten.as_strided.default)
def _as_strided(
    func: Any,
    stored: StoredInt8,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> Any:
    """The whole, which FSDP2 asks for around what it gathered."""
    if tuple(size) == stored.shape and tuple(stride) == stored.stride() and not storage_offset:
        return _alias(aten.detach.default, stored)
    return NotImplemented


@_handles(aten.copy_.default)
def _copy(func: Any, stored: StoredInt8, source: Tensor, non_blocking: bool = False) -> StoredInt8:
    if isinstance(source, StoredInt8) and source.scale.shape == stored.scale.shape:
        stored.q.copy_(source.q, non_blocking)
        stored.scale.copy_(source.scale, non_blocking)
    else:
        value = source.dequantize() if isinstance(source, StoredInt8) else source
        value = value.to(device=stored.device, dtype=torch.float32).expand(stored.shape).contiguous()
        stored.requantize_(value, stochastic=False)
    return stored
