"""A weight that trains in high precision and that FSDP2 all-gathers as INT8, with a scale a row.

N output features, K input features. FSDP2 shards a weight by rows, so that a rank's own rows, quantized, are
a part of what `quantize_rows` of the whole weight gives, bit for bit, and no rank needs another's. FSDP2 asks
the local tensor what to gather by `fsdp_pre_all_gather`, and what came of it by `fsdp_post_all_gather`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map_only

from qrecipes.quant.int8_quantize import quantize_rows

aten = torch.ops.aten


class Int8Rows(torch.Tensor):
    """A matrix of which only INT8 values `q`, [N, K], and a float32 scale a row, `scale`, [N, 1], exist.

    It has the type of the high-precision weight, and takes a gradient of that type, so that it can stand in
    the weight's place; a layer reads its two parts. Every computation on it is refused: a dequantized copy
    would take back what was saved.
    """

    q: Tensor
    scale: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, q_NK: Tensor, scale_N1: Tensor, dtype: torch.dtype) -> Int8Rows:
        """A matrix of `dtype` about equal to `q_NK * scale_N1`."""
        rows = torch.Tensor._make_wrapper_subclass(cls, q_NK.shape, dtype=dtype, device=q_NK.device)
        rows.q, rows.scale = q_NK, scale_N1
        return rows

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["q", "scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], dtype: torch.dtype, outer_size: torch.Size, outer_stride: Sequence[int]
    ) -> Int8Rows:
        return Int8Rows(parts["q"], parts["scale"], dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rows = args[0]
        if func is aten.detach.default:
            return cls(rows.q, rows.scale, rows.dtype)
        if func is aten.as_strided.default and _is_whole(rows, *args[1:]):  # FSDP2, around what was gathered
            return cls(rows.q, rows.scale, rows.dtype)
        if func is aten.zeros_like.default:  # FSDP2, for the gradient of a layer that was not called
            return torch.zeros(rows.shape, dtype=rows.dtype, device=rows.device)
        raise NotImplementedError(
            f"Int8Rows: {func}, but the weight was gathered as INT8 and is nowhere in high precision; only "
            "layers that multiply INT8 can read it, so gather the weight of other modules as it is"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Int8Rows(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


class GatheredAsInt8(torch.Tensor):
    """A high-precision tensor, `plain`, that FSDP2 gathers as `Int8Rows`; everything else sees `plain`.

    Operations compute on `plain`, those in place included, and give plain tensors. Only what cuts, copies and
    moves a parameter while it is sharded, saved and loaded keeps the class. `num_rows` is N, the rows of all
    ranks together: the last ranks may have fewer rows than the others, or none, and fill up with zeros.

    With `stochastic_rounding` a rank draws once each gather, from its device's default generator: a weight
    that is gathered again for the backward pass is rounded anew.
    """

    plain: Tensor
    num_rows: int
    stochastic_rounding: bool
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, plain: Tensor, num_rows: int, stochastic_rounding: bool) -> GatheredAsInt8:
        """A tensor on the memory of `plain`."""
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            plain.shape,
            strides=plain.stride(),
            storage_offset=plain.storage_offset(),
            dtype=plain.dtype,
            device=plain.device,
        )
        tensor.plain, tensor.num_rows, tensor.stochastic_rounding = plain, num_rows, stochastic_rounding
        return tensor

    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, bool]]:
        return ["plain"], (self.num_rows, self.stochastic_rounding)

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor],
        settings: tuple[int, bool],
        outer_size: torch.Size,
        outer_stride: Sequence[int],
    ) -> GatheredAsInt8:
        return GatheredAsInt8(parts["plain"], *settings)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        plain_args, plain_kwargs = tree_map_only(cls, lambda tensor: tensor.plain, (args, kwargs or {}))
        result = func(*plain_args, **plain_kwargs)
        if func in _KEEP_THE_CLASS:
            settings = args[0].num_rows, args[0].stochastic_rounding
            return tree_map_only(Tensor, lambda plain: cls(plain, *settings), result)
        return result

    def fsdp_pre_all_gather(self, mesh: DeviceMesh) -> tuple[tuple[Tensor, Tensor], None]:
        """INT8 values and scales of this rank's rows, as many rows as the largest part has.

        With this signature FSDP2 lets the extension pad; with its longer one it wants every tensor to have
        the weight's own shape where rows are left over, and scales are narrower.
        """
        q, scale = quantize_rows(self.plain, stochastic_rounding=self.stochastic_rounding)
        return (padded_rows(q, self.num_rows, mesh), padded_rows(scale, self.num_rows, mesh)), None

    def fsdp_post_all_gather(
        self,
        gathered: tuple[Tensor, ...],
        metadata: None,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Int8Rows, tuple[Tensor, ...]] | None:
        """The whole weight as `Int8Rows`, in the memory that was gathered into, which FSDP2 frees.

        From the second gather on FSDP2 fills the same memory, to which `out` refers already.
        """
        if out is not None:
            return None
        q_NK, scale_N1 = (part[: self.num_rows] for part in gathered)
        return Int8Rows(q_NK, scale_N1, param_dtype), ()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GatheredAsInt8({self.plain}, num_rows={self.num_rows})"


_KEEP_THE_CLASS = {
    aten.detach.default,
    aten.clone.default,
    aten._to_copy.default,
    aten.new_zeros.default,
    aten.view.default,
    aten.slice.Tensor,
    aten.split.Tensor,
}
"""What FSDP2 makes a rank's part of, and what `Module.to` and `nn.Parameter` do with it."""


def gathered_as_int8(weight_NK: nn.Parameter, *, stochastic_rounding: bool = False) -> nn.Parameter:
    """A Parameter on the same memory that FSDP2, applied next, will gather as `Int8Rows`.

    Raises:
        ValueError: if the weight is no matrix.
    """
    if weight_NK.ndim != 2:
        raise ValueError(
            f"gathered_as_int8.weight_NK: shape {tuple(weight_NK.shape)}, where a matrix is needed for a "
            "scale a row; leave it as it is"
        )
    shard = GatheredAsInt8(weight_NK.detach(), weight_NK.shape[0], stochastic_rounding)
    return nn.Parameter(shard, requires_grad=weight_NK.requires_grad)


def int8_rows(weight_NK: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """INT8 values [N, K] and scales [N, 1] of a weight that was gathered as INT8; of another, neither."""
    return (weight_NK.q, weight_NK.scale) if isinstance(weight_NK, Int8Rows) else (None, None)


def _is_whole(rows: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> bool:
    return tuple(size) == rows.shape and tuple(stride) == rows.stride() and not offset


def padded_rows(part: Tensor, num_rows: int, mesh: DeviceMesh) -> Tensor:
    """This rank's rows of a matrix of `num_rows`, contiguous, with zeros up to as many as the first
    rank has."""
    missing = -(-num_rows // mesh.size()) - part.shape[0]
    return nn.functional.pad(part, (0, 0, 0, missing)).contiguous() if missing else part.contiguous()
