"""Weights with a low-rank correction inside their rounding, and their gradients, in plain PyTorch.

T tokens, N output features (rows), K input features, G groups of a row, S columns of a group, R rank;
formulas in `low_rank_rounding.py`.

Z is formed in float32, products rounded by themselves and added in the order of the rank, so that the bits of
an element do not depend on the shape of what it is computed with. The rest is in float32, too, or in float64
where scales, gradients or the result are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qrecipes.quant.affine import _arithmetic
from qrecipes.quant.low_rank_storage import LowRankRounding, decode, grouped, integer_zeros

CHUNK_ELEMENTS = 2**18
"""Weights that are worked on at once."""
GRADIENT_BYTES = 3 * 2**26
"""Most bytes of dL/dW_hat and of the parts of dA that exist at once in `linear_grads`, unless GRADIENT_ROWS
take more. All of the gradient of Llama 2 7B's largest layer, which takes what W_hat took before it."""
GRADIENT_ROWS = 128
"""Rows of dL/dW_hat are worked on in multiples of these."""
PART_COLUMNS = 128
"""Columns of dL/dW_hat whose part of dA is kept in memory until the parts are added up."""


class LowRankGrads(NamedTuple):
    """Gradients in float32 (float64 of float64 weights); None where there is no such tensor."""

    a: Tensor | None
    b: Tensor | None
    scale: Tensor
    zero: Tensor | None


def low_rank_weight_reference(
    phi: Tensor,
    a_NR: Tensor | None,
    b_RK: Tensor | None,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    rounding: LowRankRounding,
    dtype: torch.dtype,
) -> Tensor:
    """`low_rank_weight` in plain PyTorch."""
    w_NK = phi.new_empty((phi.shape[0], rounding.in_features), dtype=dtype)
    zero_NG = None if zero_NG is None else integer_zeros(zero_NG, rounding)
    for rows in _row_slices(phi.shape[0], rounding.in_features, CHUNK_ELEMENTS):
        rounded_NK = _rounded(phi[rows], _rows_of(a_NR, rows), b_RK, rounding)
        scale_NG1 = scale_NG[rows].to(_arithmetic(scale_NG, dtype)).unsqueeze(-1)
        q_NGS = grouped(rounded_NK.clamp(*rounding.levels), rounding)
        levels_NGS = q_NGS if zero_NG is None else q_NGS - zero_NG[rows].unsqueeze(-1)
        w_NK[rows] = (levels_NGS * scale_NG1).reshape(rounded_NK.shape).to(dtype)
    return w_NK


def low_rank_integers_reference(
    phi: Tensor,
    a_NR: Tensor | None,
    b_RK: Tensor | None,
    rounding: LowRankRounding,
    *,
    transposed: bool = False,
) -> Tensor:
    """`low_rank_integers` in plain PyTorch."""
    q_NK = phi.new_empty((phi.shape[0], rounding.in_features), dtype=torch.int8)
    for rows in _row_slices(phi.shape[0], rounding.in_features, CHUNK_ELEMENTS):
        rounded_NK = _rounded(phi[rows], _rows_of(a_NR, rows), b_RK, rounding)
        numbers_NK = torch.where(rounded_NK.isnan(), 0.0, rounded_NK)
        q_NK[rows] = numbers_NK.clamp(*rounding.levels).to(torch.int8)
    return q_NK.t().contiguous() if transposed else q_NK


def low_rank_weight_grads_reference(
    grad_NK: Tensor,
    phi: Tensor,
    a_NR: Tensor | None,
    b_RK: Tensor | None,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    rounding: LowRankRounding,
) -> LowRankGrads:
    """`low_rank_weight_grads` in plain PyTorch, all rows at once."""
    work = _arithmetic(grad_NK, scale_NG)
    least, greatest = rounding.levels
    rounded_NK = _rounded(phi, a_NR, b_RK, rounding).to(work)
    grad_NGS = grouped(grad_NK.to(work), rounding)
    levels_NGS = grouped(rounded_NK.clamp(least, greatest), rounding)
    d_zero = None
    if zero_NG is not None:
        levels_NGS = levels_NGS - integer_zeros(zero_NG, rounding).to(work).unsqueeze(-1)
        rounded_zero = torch.round(zero_NG)
        is_trained = (rounded_zero >= least) & (rounded_zero <= greatest)
        d_zero = torch.where(is_trained, -scale_NG.to(work) * grad_NGS.sum(-1), 0.0)
    d_scale = (grad_NGS * levels_NGS).sum(-1)
    if a_NR is None or b_RK is None:
        return LowRankGrads(None, None, d_scale, d_zero)
    inside_NK = (rounded_NK >= least) & (rounded_NK <= greatest)
    h_NK = (grad_NGS * scale_NG.to(work).unsqueeze(-1)).reshape(rounded_NK.shape)
    h_NK = torch.where(inside_NK, h_NK, 0.0) * rounding.scaling
    return LowRankGrads(h_NK @ b_RK.to(work).t(), a_NR.to(work).t() @ h_NK, d_scale, d_zero)


def low_rank_linear_grads_reference(
    dy_TN: Tensor,
    x_TK: Tensor,
    phi: Tensor,
    a_NR: Tensor | None,
    b_RK: Tensor | None,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    rounding: LowRankRounding,
) -> LowRankGrads:
    """`low_rank_linear_grads` in plain PyTorch."""
    return linear_grads(
        low_rank_weight_grads_reference, dy_TN, x_TK, phi, a_NR, b_RK, scale_NG, zero_NG, rounding
    )


def linear_grads(
    weight_grads: Callable[..., LowRankGrads],
    dy_TN: Tensor,
    x_TK: Tensor,
    phi: Tensor,
    a_NR: Tensor | None,
    b_RK: Tensor | None,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    rounding: LowRankRounding,
) -> LowRankGrads:
    """By rows of dL/dW_hat, one part after the other; the parts of dB are added up in their order."""
    N, K = phi.shape[0], rounding.in_features
    rank = 0 if a_NR is None else a_NR.shape[1]
    row_bytes = K * x_TK.element_size() + 4 * rank * -(-K // PART_COLUMNS)
    if N * row_bytes <= GRADIENT_BYTES:
        return weight_grads(dy_TN.t() @ x_TK, phi, a_NR, b_RK, scale_NG, zero_NG, rounding)
    parts = []
    d_b = None
    for rows in _row_slices(N, row_bytes, GRADIENT_BYTES, multiple=GRADIENT_ROWS):
        part = weight_grads(
            dy_TN[:, rows].t() @ x_TK,
            phi[rows],
            _rows_of(a_NR, rows),
            b_RK,
            scale_NG[rows],
            _rows_of(zero_NG, rows),
            rounding,
        )
        if part.b is not None:
            d_b = part.b if d_b is None else d_b.add_(part.b)
        parts.append(part)
    d_scale = torch.cat([part.scale for part in parts])
    d_a = None if a_NR is None else torch.cat([part.a for part in parts if part.a is not None])
    d_zero = None if zero_NG is None else torch.cat([part.zero for part in parts if part.zero is not None])
    return LowRankGrads(d_a, d_b, d_scale, d_zero)


def _rounded(phi: Tensor, a_NR: Tensor | None, b_RK: Tensor | None, rounding: LowRankRounding) -> Tensor:
    """rnd(Z) [N, K], not clipped, float32."""
    z_NK = decode(phi, rounding)
    if a_NR is not None and b_RK is not None:
        sum_NK = torch.zeros_like(z_NK)
        for a_N, b_K in zip(a_NR.float().unbind(1), b_RK.float().unbind(0), strict=True):
            sum_NK += a_N[:, None] * b_K  # apart, since one operation might or might not use an FMA
        z_NK = z_NK + sum_NK * rounding.scaling
    return torch.round(z_NK)


def _row_slices(N: int, row_size: int, size: int, multiple: int = 1) -> Iterator[slice]:
    """All rows, in slices of `size` at most, but of `multiple` rows at least; one slice of no rows."""
    rows = max(size // row_size // multiple, 1) * multiple
    return (slice(first, min(first + rows, N)) for first in range(0, max(N, 1), rows))


def _rows_of(a_NR: Tensor | None, rows: slice) -> Tensor | None:
    return None if a_NR is None else a_NR[rows]
