"""Linear layers that quantize their input, token by token: in floating point, or in integers throughout.

T tokens, K input features, N output features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qrecipes.quant.activations import MAX_BITS, MIN_BITS, QuantizedTokens, fake_quantize, quantize
from qrecipes.quant.affine import AffineGrid
from qrecipes.quant.dequantize import dequantize_mm_grad_input
from qrecipes.quant.formats import AffineFormat, WeightFormat
from qrecipes.quant.int8_matmul import scaled_int8_mm
from qrecipes.quant.int8_quantize import quantize_rows
from qrecipes.quant.linear import QuantLinear
from qrecipes.quant.packing import unpack


@dataclass(frozen=True, kw_only=True)
class InputFormat:
    """How a layer's input is quantized: every token on a grid of its own."""

    bits: int = 8
    """2 to 8."""
    symmetric: bool = True
    """No zero point."""
    integer: bool = False
    """Multiply integers by integers, exactly, and scale the sums. Otherwise what the integers stand for is
    rounded to the input's type and multiplied there."""

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"InputFormat.bits: {self.bits!r}; use {MIN_BITS} to {MAX_BITS}")
        if self.integer and not self.symmetric:
            raise ValueError(
                "InputFormat.integer: true, but an asymmetric input has a zero point, which the integer "
                "product does not subtract; set symmetric=True, or integer=False"
            )


def check_integer_weight(format: AffineFormat, where: str) -> None:
    """Raise ValueError, naming `where`, if weights of this format have no integer product."""
    if not format.symmetric or format.group_size is not None:
        raise ValueError(
            f"{where}: integer products scale whole rows of symmetric integers, and the weight is "
            f"{format}; set symmetric=True and group_size=None, or leave the integer forward off"
        )


def integer_tokens(x_TK: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric integers int8 [T, K] and the float32 scale [T, 1] of each row.

    At 8 bits the INT8 kernels make them.
    """
    if bits == MAX_BITS:
        return quantize_rows(x_TK)
    tokens = quantize(x_TK, bits, symmetric=True)
    return tokens.codes, tokens.scale.float()


def integer_product(
    tokens: tuple[Tensor, Tensor] | QuantizedTokens,
    q_NK: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """X W^T + b, [T, N]: the sum of integer products is exact, and is scaled and rounded to `dtype` once."""
    codes_TK, scale_T1 = tokens[0], tokens[1]
    return scaled_int8_mm(codes_TK, q_NK.t(), scale_T1, scale_N1.t(), bias_N=bias_N, out_dtype=dtype)


class QuantInputLinear(QuantLinear):
    """A `QuantLinear` that quantizes its input as `input_format` says, straight through to the gradient."""

    input_format: InputFormat = InputFormat()

    @classmethod
    def of(cls, layer: QuantLinear, input_format: InputFormat) -> QuantInputLinear:
        """The layer with the payload and bias of `layer`.

        Raises:
            ValueError: if its weight has no integer product, and one is asked for.
        """
        if input_format.integer:
            if not isinstance(layer.format, AffineFormat):
                raise ValueError(f"QuantInputLinear: the weight is {layer.format}, which has no integers")
            check_integer_weight(layer.format, "QuantInputLinear")
        made = cls.from_payload(
            layer.payload, layer.format, layer.in_features, layer.bias, layer.compute_dtype
        )
        assert isinstance(made, QuantInputLinear), type(made)
        made.input_format = input_format
        return made

    def forward(self, input: Tensor, addend: Tensor | None = None) -> Tensor:
        """[..., K] -> [..., N], in `compute_dtype`, raising as `QuantLinear.forward`; an addend is added to
        what integer products give."""
        wanted = self.input_format
        if not wanted.integer:
            return super().forward(fake_quantize(input, wanted.bits, symmetric=wanted.symmetric), addend)
        self.check_types(input)
        y = _IntegerQuantLinear.apply(
            input, self.bias, wanted.bits, self.format, self.in_features, *self.payload
        )
        return y if addend is None else y + addend

    def with_grid(self, grid: AffineGrid, format: AffineFormat) -> QuantLinear:
        """As of `QuantLinear`, with the same input."""
        return self.of(super().with_grid(grid, format), self.input_format)

    def extra_repr(self) -> str:
        """Sizes and formats."""
        return f"{super().extra_repr()}, {self.input_format}"


class _IntegerQuantLinear(torch.autograd.Function):
    """The output in integers, the input's gradient by the dequantized weight; keeps the payload alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias_N: Tensor | None,
        bits: int,
        format: WeightFormat,
        in_features: int,
        *payload: Tensor,
    ) -> Tensor:
        assert isinstance(format, AffineFormat), format
        ctx.save_for_backward(*payload)
        ctx.format, ctx.shape = format, x.shape
        packed, scale_N1 = payload
        x_TK = matrix(x)
        q_NK = unpack(packed, format.bits, in_features)
        y_TN = integer_product(integer_tokens(x_TK, bits), q_NK, scale_N1, bias_N, x.dtype)
        return y_TN.reshape(*x.shape[:-1], y_TN.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        payload = ctx.saved_tensors
        needs_x, needs_bias, *rest = ctx.needs_input_grad
        dy_TN = matrix(grad_y)
        grad_x = grad_bias_N = None
        if needs_x:
            grad_x = dequantize_mm_grad_input(dy_TN, payload, ctx.format, ctx.shape[-1]).reshape(ctx.shape)
        if needs_bias:
            grad_bias_N = bias_gradient(dy_TN)
        return grad_x, grad_bias_N, *[None] * len(rest)


def matrix(x: Tensor) -> Tensor:
    """Leading dimensions flattened, by number: -1 would be ambiguous for an empty tensor."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def bias_gradient(dy_TN: Tensor) -> Tensor:
    """Sum over tokens, in float32 or wider, in the type of `dy_TN`."""
    return dy_TN.sum(0, dtype=torch.promote_types(dy_TN.dtype, torch.float32)).to(dy_TN.dtype)
