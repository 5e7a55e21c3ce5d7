"""The two products of a linear layer with a frozen weight, in INT8; the weight stays stored as it is.

T tokens, K input features, N output features. Both operands of a product are quantized when it is taken,
with one scale for every slice along the contraction:

| product             | contraction | scales                   |
|---------------------|-------------|--------------------------|
| output     = X W^T  | K           | token and output channel |
| grad_input = dY W   | N           | token and input channel  |

W, low-bit or plain, is dequantized to the type of X before it is quantized, into copies that live as long as
the product. Each product is one operator, so that `torch.compile` cannot keep such a copy of the forward pass
for the backward pass; X and dY are quantized outside of it, where Inductor puts that into the kernel that
makes them, once for layers that share an input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qrecipes.quant.formats import Payload
from qrecipes.quant.int8_quantize import quantize_rows
from qrecipes.quant.linear import QuantLinear
from qrecipes.quant.operators import define_operator
from qrecipes.quant.primitives import as_matrix, bias_gradient

_PLAIN = ""
"""What stands for a format where the weight is one plain tensor [N, K]."""


def frozen_int8_linear(input: Tensor, layer: nn.Linear | QuantLinear) -> Tensor:
    """`layer(input)`, [..., K] -> [..., N], with the output and the gradient of the input in INT8.

    The bias may train; the weight gets no gradient. Only what the weight is stored as is kept for the
    backward pass. Computed on INT8 tensor cores where `has_int8_tensor_cores` says so, elsewhere to the same
    numbers in plain PyTorch.

    Raises:
        ValueError: if the input is of another type than the layer computes in, or that is float64.
    """
    if isinstance(layer, QuantLinear):
        compute, key, payload = layer.compute_dtype, layer.format.key, layer.payload
    else:
        compute, key, payload = layer.weight.dtype, _PLAIN, (layer.weight.detach(),)
    if input.dtype is not compute or compute not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"frozen_int8_linear.input: {input.dtype}, and the layer computes in {compute}; use bfloat16 or "
            "float32 for both, and no autocast"
        )
    return _FrozenInt8Linear.apply(input, layer.bias, key, *payload)


class _FrozenInt8Linear(torch.autograd.Function):
    """Y = X W^T + b and the gradients of X and b; keeps what W is stored as, and neither X nor W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias_N: Tensor | None, key: str, *payload: Tensor) -> Tensor:
        ctx.save_for_backward(*payload)
        ctx.key, ctx.shape = key, x.shape
        q_TK, scale_T1 = quantize_rows(as_matrix(x))
        y_TN = torch.ops.qrecipes.frozen_int8_mm.default(q_TK, scale_T1, list(payload), key, x.dtype, bias_N)
        return y_TN.reshape(*x.shape[:-1], y_TN.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "frozen_int8_linear: a gradient is taken with create_graph, but INT8 products have no second "
                "derivative; compute the base in the model's type"
            )
        payload = ctx.saved_tensors
        needs_x, needs_bias, *rest = ctx.needs_input_grad
        dy_TN = as_matrix(grad_y)
        grad_x = grad_bias_N = None
        if needs_x:
            q_TN, scale_T1 = quantize_rows(dy_TN)
            grad_x_TK = torch.ops.qrecipes.frozen_int8_mm_grad_input.default(
                q_TN, scale_T1, list(payload), ctx.key, ctx.shape[-1], dy_TN.dtype
            )
            grad_x = grad_x_TK.reshape(ctx.shape)
        if needs_bias:
            grad_bias_N = bias_gradient(dy_TN)
        return grad_x, grad_bias_N, *[None] * len(rest)


def _weight(payload: Payload | list[Tensor], key: str, in_features: int, dtype: torch.dtype) -> Tensor:
    if key == _PLAIN:
        return payload[0]
    return torch.ops.qrecipes.dequantize.default(list(payload), key, in_features, dtype)


def _mm(
    q_TK: Tensor,
    scale_T1: Tensor,
    payload: list[Tensor],
    key: str,
    dtype: torch.dtype,
    bias_N: Tensor | None = None,
) -> Tensor:
    weight_NK = _weight(payload, key, q_TK.shape[1], dtype)
    q_NK, scale_N1 = torch.ops.qrecipes.quantize_rows.default(weight_NK, None)
    return torch.ops.qrecipes.scaled_int8_mm.default(q_TK, q_NK.t(), scale_T1, scale_N1.t(), dtype, bias_N)


def _mm_grad_input(
    q_TN: Tensor, scale_T1: Tensor, payload: list[Tensor], key: str, in_features: int, dtype: torch.dtype
) -> Tensor:
    weight_NK = _weight(payload, key, in_features, dtype)
    q_KN, scale_K1 = torch.ops.qrecipes.quantize_columns.default(weight_NK, None)
    return torch.ops.qrecipes.scaled_int8_mm.default(q_TN, q_KN.t(), scale_T1, scale_K1.t(), dtype, None)


def _mm_fake(
    q_TK: Tensor,
    scale_T1: Tensor,
    payload: list[Tensor],
    key: str,
    dtype: torch.dtype,
    bias_N: Tensor | None = None,
) -> Tensor:
    return q_TK.new_empty((q_TK.shape[0], payload[0].shape[0]), dtype=dtype)


def _mm_grad_input_fake(
    q_TN: Tensor, scale_T1: Tensor, payload: list[Tensor], key: str, in_features: int, dtype: torch.dtype
) -> Tensor:
    return q_TN.new_empty((q_TN.shape[0], in_features), dtype=dtype)


define_operator(
    "frozen_int8_mm(Tensor q_TK, Tensor scale_T1, Tensor[] payload, str format, ScalarType dtype, "
    "Tensor? bias_N=None) -> Tensor",
    _mm_fake,
    CompositeExplicitAutograd=_mm,
)
define_operator(
    "frozen_int8_mm_grad_input(Tensor q_TN, Tensor scale_T1, Tensor[] payload, str format, "
    "SymInt in_features, ScalarType dtype) -> Tensor",
    _mm_grad_input_fake,
    CompositeExplicitAutograd=_mm_grad_input,
)
