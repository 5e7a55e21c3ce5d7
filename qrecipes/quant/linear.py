"""`QuantLinear`, a linear layer with a frozen low-bit weight: what low-bit layers are while others train, and
what they become for export.

T tokens, K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qrecipes.quant.affine import AffineGrid
from qrecipes.quant.dequantize import (
    affine_grid_of,
    affine_payload,
    dequantize,
    dequantize_mm,
    dequantize_mm_grad_input,
    grid_payload,
    quantize_to_affine,
    quantize_to_nf4,
)
from qrecipes.quant.formats import AffineFormat, NF4Format, Payload, WeightFormat
from qrecipes.quant.packing import unpack
from qrecipes.quant.primitives import as_matrix, bias_gradient
from qrecipes.quant.ranges import minmax_grid


class QuantLinear(nn.Module):
    """`x W^T + b` with W stored as `format` says, dequantized whenever it is multiplied, in both passes.

    The payload's tensors are Parameters without gradient, named as in `format.payload_spec`: `packed` uint8
    [N, ceil(K * bits / 8)], `scale` [N, G], `zero` or `offset` [N, G]; for NF4 `packed`, `absmax` [N, G],
    `absmax_scale` and `absmax_mean`. FSDP2 shards each along its first dimension. Only the payload is kept
    for the backward pass, which gives the gradients of the input and, where it is trained, of the bias.

    `compute_dtype` is the type of input, output, bias and dequantized weight. `to`, `bfloat16`, `float` and
    the like change it and the bias, and move the payload to another device, but never convert the payload:
    `with_grid` does.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: WeightFormat,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A layer of zero bytes, to be filled from a state dict.

        Raises:
            ValueError: if the format's groups do not divide `in_features`.
        """
        super().__init__()
        format.check_width(in_features, "QuantLinear")
        self.in_features, self.out_features, self.format = in_features, out_features, format
        self.compute_dtype = torch.get_default_dtype() if dtype is None else dtype
        self._names = tuple(format.payload_spec(out_features, in_features))
        for name, (shape, stored) in format.payload_spec(out_features, in_features).items():
            empty = torch.zeros(shape, dtype=stored, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        empty_bias = torch.zeros(out_features, dtype=self.compute_dtype, device=device) if bias else None
        self.register_parameter("bias", None if empty_bias is None else nn.Parameter(empty_bias))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        format: WeightFormat,
        *,
        ranges: Callable[[Tensor, AffineFormat], AffineGrid] = minmax_grid,
        name: str = "QuantLinear.from_linear",
    ) -> QuantLinear:
        """The layer with `linear`'s weight rounded to nearest; it takes over its bias Parameter.

        `ranges` chooses the grid of an affine format from the weight, such as the functions of `ranges.py`.
        Weights that are not finite give outputs that are not. `name` is what an error calls the layer.

        Raises:
            ValueError: if the format's groups do not divide the input features; the nearest size that does is
            named.
        """
        weight = linear.weight.detach()
        format.check_width(linear.in_features, name)
        if weight.is_meta:
            layer = cls(
                linear.in_features, linear.out_features, format, bias=False, device="meta", dtype=weight.dtype
            )
            layer.bias = linear.bias
            return layer
        if isinstance(format, NF4Format):
            payload = quantize_to_nf4(weight, format)
        else:
            payload = quantize_to_affine(weight, ranges(weight, format), format)
        return cls.from_payload(payload, format, linear.in_features, linear.bias, weight.dtype)

    @classmethod
    def from_integers(
        cls,
        q_NK: Tensor,
        grid: AffineGrid,
        format: AffineFormat,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> QuantLinear:
        """The layer of signed integers on a grid, which are kept as they are.

        Raises:
            ValueError: if an integer does not fit, or the grid is not of this format.
        """
        return cls.from_payload(affine_payload(q_NK, grid, format), format, q_NK.shape[1], bias, dtype)

    @classmethod
    def from_payload(
        cls,
        payload: Payload,
        format: WeightFormat,
        in_features: int,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> QuantLinear:
        """The layer that holds these tensors themselves, computing in `dtype`.

        Raises:
            ValueError: if a tensor has another shape or type than the format says.
        """
        out_features = payload[0].shape[0]
        layer = cls(in_features, out_features, format, bias=False, device="meta", dtype=dtype)
        spec = format.payload_spec(out_features, in_features)
        for (name, (shape, stored)), tensor in zip(spec.items(), payload, strict=True):
            if tuple(tensor.shape) != shape or tensor.dtype is not stored:
                raise ValueError(
                    f"QuantLinear.{name}: {tensor.dtype} of shape {tuple(tensor.shape)}; {format} of "
                    f"{out_features} x {in_features} stores {stored} of shape {shape}"
                )
            layer.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
        layer.bias = bias
        return layer

    @property
    def payload(self) -> Payload:
        """The weight's tensors, in the order of the format's `payload_spec`."""
        return tuple(getattr(self, name) for name in self._names)

    @property
    def grid(self) -> AffineGrid:
        """The scales and zero points of an affine weight.

        Raises:
            ValueError: if the weight is NF4.
        """
        return affine_grid_of(self.payload, self._affine_format("grid"))

    def integers(self) -> Tensor:
        """The signed integers of an affine weight, int8 [N, K].

        Raises:
            ValueError: if the weight is NF4.
        """
        return unpack(self.packed, self._affine_format("integers").bits, self.in_features)  # type: ignore[arg-type]

    def _affine_format(self, what: str) -> AffineFormat:
        if not isinstance(self.format, AffineFormat):
            raise ValueError(f"QuantLinear.{what}: the weight is {self.format}, which has no affine grid")
        return self.format

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K], in `compute_dtype` or in `dtype`."""
        return dequantize(self.payload, self.format, self.in_features, dtype or self.compute_dtype)

    def forward(self, input: Tensor, addend: Tensor | None = None) -> Tensor:
        """[..., K] -> [..., N], in `compute_dtype`; `addend` [..., N] is added before the product is rounded,
        as `dequantize_mm` does it.

        Raises:
            ValueError: if the input is of another type, or something converted the payload.
        """
        self.check_types(input)
        return _QuantLinear.apply(input, self.bias, addend, self.format, self.in_features, *self.payload)

    def check_types(self, input: Tensor) -> None:
        """Raise ValueError if the input is of another type than `compute_dtype`, or something converted the
        payload."""
        if input.dtype is not self.compute_dtype:
            raise ValueError(
                f"QuantLinear.input: {input.dtype}, but the layer computes in {self.compute_dtype}; use one "
                "type for both, and no autocast"
            )
        spec = self.format.payload_spec(self.out_features, self.in_features)
        for tensor, (name, (_, stored)) in zip(self.payload, spec.items(), strict=True):
            if tensor.dtype is not stored:
                raise ValueError(
                    f"QuantLinear.{name}: {tensor.dtype}, but {self.format} stores {stored}; leave "
                    "param_dtype out of FSDP2's MixedPrecisionPolicy, which converts frozen scales, too"
                )

    def with_grid(self, grid: AffineGrid, format: AffineFormat) -> QuantLinear:
        """A layer with the same integers, bias and computing type on another grid, stored as `format`.

        Raises:
            ValueError: if the bits or groups differ, the grid is not of that format, or the weight is NF4.
        """
        bits = self._affine_format("with_grid").bits
        if format.bits != bits:
            raise ValueError(f"QuantLinear.with_grid.format: {format.bits} bits; the integers have {bits}")
        payload = grid_payload(self.packed, grid, format, self.in_features)  # type: ignore[arg-type]
        return type(self).from_payload(payload, format, self.in_features, self.bias, self.compute_dtype)

    def to_linear(self) -> nn.Linear:
        """A plain layer with the dequantized weight in `compute_dtype` and the same bias Parameter."""
        linear = nn.Linear(
            self.in_features, self.out_features, bias=False, device="meta", dtype=self.compute_dtype
        )
        linear.weight = nn.Parameter(self.dequantize(), requires_grad=False)
        linear.bias = self.bias  # type: ignore[assignment]
        return linear

    def extra_repr(self) -> str:
        """Sizes and format."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, compute_dtype={self.compute_dtype}, {self.format}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """What `to` and its kin call for every tensor: the payload follows to devices, not to types."""
        super()._apply(moving_only(self.payload, fn), recurse)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As of every module, but a payload's tensor of another type is an error: copying would convert
        it."""
        for name, tensor in zip(self._names, self.payload, strict=True):
            given = state_dict.get(prefix + name)
            if given is not None and given.dtype is not tensor.dtype:
                error_msgs.append(
                    f"{prefix}{name} is {given.dtype} there, {tensor.dtype} here: the weight has another "
                    "format"
                )
        if not error_msgs:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )


def dequantized_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that `model` would have with a plain layer in place of each `QuantLinear`, detached."""
    state_dict = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for fqn, module in model.named_modules():
        if isinstance(module, QuantLinear):
            prefix = f"{fqn}." if fqn else ""
            for name in module.format.payload_spec(module.out_features, module.in_features):
                del state_dict[prefix + name]
            state_dict[f"{prefix}weight"] = module.dequantize()
    return state_dict


class _QuantLinear(torch.autograd.Function):
    """Y = X W^T + addend + b and the gradients of X, b and the addend; keeps the payload of W, and neither X
    nor W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias_N: Tensor | None,
        addend: Tensor | None,
        format: WeightFormat,
        in_features: int,
        *payload: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*payload)
        ctx.format, ctx.shape = format, x.shape
        addend_TN = None if addend is None else as_matrix(addend)
        y_TN = dequantize_mm(as_matrix(x), payload, format, bias_N, addend_TN)
        return y_TN.reshape(*x.shape[:-1], y_TN.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "QuantLinear: a gradient is taken with create_graph, but dequantize_mm has no second "
                "derivative; leave the layer out, or use layer.to_linear()"
            )
        payload = ctx.saved_tensors
        needs_x, needs_bias, needs_addend, *rest = ctx.needs_input_grad
        dy_TN = as_matrix(grad_y)
        grad_x = grad_bias_N = None
        if needs_x:
            grad_x_TK = dequantize_mm_grad_input(dy_TN, payload, ctx.format, ctx.shape[-1])
            grad_x = grad_x_TK.reshape(ctx.shape)
        if needs_bias:
            grad_bias_N = bias_gradient(dy_TN)
        return grad_x, grad_bias_N, grad_y if needs_addend else None, *[None] * len(rest)


def moving_only(tensors: Iterable[Tensor], fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn`, which `Module._apply` calls for every tensor, but for `tensors` without a change of type."""
    kept = {id(tensor) for tensor in tensors}

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if id(tensor) in kept and moved.dtype is not tensor.dtype:
            return tensor.to(moved.device)
        return moved

    return move
