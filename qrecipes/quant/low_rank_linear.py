"""The product of a linear layer whose weight has a low-rank correction inside its rounding, with gradients.

T tokens, N output features, K input features, G groups of a row, R rank; formulas in `low_rank_rounding.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qrecipes.quant.low_rank_rounding import (
    LowRankRounding,
    check_parts,
    low_rank_linear_grads,
    low_rank_mm,
    low_rank_mm_grad_input,
)
from qrecipes.quant.primitives import as_matrix, bias_gradient


def low_rank_linear(
    x: Tensor,
    phi: Tensor,
    a_NR: Tensor | None,
    b_RK: Tensor | None,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    bias_N: Tensor | None,
    rounding: LowRankRounding,
) -> Tensor:
    """`x W_hat^T + b`, [..., K] -> [..., N], with gradients of all but `phi`.

    Raises:
        ValueError: if a shape or type does not fit.
    """
    check_parts("low_rank_linear", phi, a_NR, b_RK, scale_NG, zero_NG, rounding)
    if x.shape[-1] != rounding.in_features:
        raise ValueError(
            f"low_rank_linear.x: shape {tuple(x.shape)}; its last dimension is that of the weight, "
            f"{rounding.in_features}"
        )
    return LowRankRoundedLinear.apply(x, phi, a_NR, b_RK, scale_NG, zero_NG, bias_N, rounding)


class LowRankRoundedLinear(torch.autograd.Function):
    """Keeps x and the given tensors themselves for the backward pass. W_hat is computed in both passes and
    dies in each; dL/dW_hat exists by parts."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        phi: Tensor,
        a_NR: Tensor | None,
        b_RK: Tensor | None,
        scale_NG: Tensor,
        zero_NG: Tensor | None,
        bias_N: Tensor | None,
        rounding: LowRankRounding,
    ) -> Tensor:
        """The product."""
        ctx.save_for_backward(x, phi, a_NR, b_RK, scale_NG, zero_NG)
        ctx.rounding = rounding
        y_TN = low_rank_mm(as_matrix(x), phi, a_NR, b_RK, scale_NG, zero_NG, bias_N, rounding)
        return y_TN.reshape(*x.shape[:-1], y_TN.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A, B, scales, zero points and bias, of those that need one."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "LowRankRoundedLinear: a gradient is taken with create_graph, but what passes straight "
                "through a rounding has no second derivative; leave the layer out"
            )
        x, phi, a_NR, b_RK, scale_NG, zero_NG = ctx.saved_tensors
        parts = phi, a_NR, b_RK, scale_NG, zero_NG, ctx.rounding
        needs_x, _, needs_a, needs_b, needs_scale, needs_zero, needs_bias, _ = ctx.needs_input_grad
        dy_TN = as_matrix(grad_y)
        grad_x = d_a = d_b = d_scale = d_zero = grad_bias_N = None
        if needs_x:
            grad_x = low_rank_mm_grad_input(dy_TN, *parts).reshape(x.shape)
        if needs_a or needs_b or needs_scale or needs_zero:
            grads = low_rank_linear_grads(dy_TN, as_matrix(x), *parts)
            d_a, d_b, d_scale, d_zero = (
                None if grad is None else grad.to(part.dtype)
                for grad, part in zip(grads, (a_NR, b_RK, scale_NG, zero_NG), strict=True)
            )
        if needs_bias:
            grad_bias_N = bias_gradient(dy_TN)
        return grad_x, None, d_a, d_b, d_scale, d_zero, grad_bias_N, None
