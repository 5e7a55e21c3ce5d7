"""Products with a frozen low-bit weight and a trained low-rank product as one weight: the one that merging
both gives, formed anew in each pass and never kept.

T tokens, K input features, N output features, G groups of a row, R rank. y = x V^T + bias, with V = W + kappa
* B A; by offsets, A has a column for each group of the weight, and sees the sum of the group's inputs. The
output takes no product over the tokens but that with V. With I the input of A, [T, K] or [T, G]:

    dx = dy V        dB = kappa * dy^T (I A^T)        dA = kappa * (dy B)^T I
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from qrecipes.quant.dequantize_low_rank import dequantize_low_rank_mm, dequantize_low_rank_mm_grad_input
from qrecipes.quant.formats import WeightFormat
from qrecipes.quant.linear import QuantLinear
from qrecipes.quant.low_rank_offset import low_rank_offset_mm, low_rank_offset_mm_grad_input
from qrecipes.quant.primitives import as_matrix, bias_gradient


def merged_low_rank_linear(
    input: Tensor, layer: QuantLinear, a_RK: Tensor, b_NR: Tensor, scaling: float
) -> Tensor:
    """[..., K] -> [..., N]: the layer with the weight W + scaling * B A, rounded to the layer's type once.

    Gradients of the input, A, B and, where it is trained, the bias; A and B are rounded to the layer's type
    before they are multiplied, and what they see and give is in that type. The input is kept for them.

    Raises:
        ValueError: as of `QuantLinear.forward`.
    """
    layer.check_types(input)
    return _MergedLinear.apply(
        input, input.detach(), a_RK, b_NR, layer.bias, scaling, False, layer.format, *layer.payload
    )


def merged_offset_linear(
    input: Tensor, layer: QuantLinear, a_RG: Tensor, b_NR: Tensor, scaling: float
) -> Tensor:
    """[..., K] -> [..., N]: the layer with the offsets b + scaling * B A, which stay in float32.

    Gradients of the input, A, B and, where it is trained, the bias; those of A and B are computed in the
    layer's type, from the sums of each group's inputs, which are kept for them.

    Raises:
        ValueError: as of `QuantLinear.forward`, or if the layer has no offsets.
    """
    layer.check_types(input)
    group_size = input.shape[-1] // a_RG.shape[1]
    pooled = input.detach().unflatten(-1, (a_RG.shape[1], group_size)).sum(-1)
    return _MergedLinear.apply(
        input, pooled, a_RG, b_NR, layer.bias, scaling, True, layer.format, *layer.payload
    )


class _MergedLinear(torch.autograd.Function):
    """Keeps the input of A, A, B and the payload of W themselves."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        input_of_a: Tensor,
        a: Tensor,
        b_NR: Tensor,
        bias_N: Tensor | None,
        scaling: float,
        by_offsets: bool,
        format: WeightFormat,
        *payload: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(input_of_a, a, b_NR, *payload)
        ctx.scaling, ctx.by_offsets, ctx.format, ctx.shape = scaling, by_offsets, format, x.shape
        if by_offsets:
            y_TN = low_rank_offset_mm(as_matrix(x), payload, a, b_NR, scaling, format, bias_N)
        else:
            a, b_NR = a.to(x.dtype), b_NR.to(x.dtype)
            y_TN = dequantize_low_rank_mm(as_matrix(x), payload, a, b_NR, scaling, format, bias_N)
        return y_TN.reshape(*x.shape[:-1], y_TN.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "merged linear layer: a gradient is taken with create_graph, but its products have no second "
                "derivative; compute the low-rank product beside the layer"
            )
        input_of_a, a, b_NR, *payload = ctx.saved_tensors
        needs_x, _, needs_a, needs_b, needs_bias, *rest = ctx.needs_input_grad
        scaling, dtype, dy_TN, i = ctx.scaling, grad_y.dtype, as_matrix(grad_y), as_matrix(input_of_a)
        low_a, low_b_NR = a.to(dtype), b_NR.to(dtype)
        grad_x = grad_a = grad_b = grad_bias_N = None
        if needs_x:
            grad_input = (
                low_rank_offset_mm_grad_input if ctx.by_offsets else dequantize_low_rank_mm_grad_input
            )
            factors = (a, b_NR) if ctx.by_offsets else (low_a, low_b_NR)
            grad_x_TK = grad_input(dy_TN, tuple(payload), *factors, scaling, ctx.format, ctx.shape[-1])
            grad_x = grad_x_TK.reshape(ctx.shape)
        if needs_b:
            grad_b = (dy_TN.t() @ (linear(i, low_a) * scaling)).to(b_NR.dtype)
        if needs_a:
            grad_a = (((dy_TN @ low_b_NR) * scaling).t() @ i).to(a.dtype)
        if needs_bias:
            grad_bias_N = bias_gradient(dy_TN)
        return grad_x, None, grad_a, grad_b, grad_bias_N, *[None] * len(rest)
