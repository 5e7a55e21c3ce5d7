"""Products with a low-bit weight whose offsets a low-rank product changes: those of the layer that the change
is merged into, bit for bit.

T tokens, N output features, K input features, G groups of a row, R rank. Over W = s * q + b, with offsets b
[N, G], the weight is s * q + (b + scaling * B A), A [R, G], B [N, R]: every weight of a group moves alike.
Offsets are formed inside of the operators, so that `torch.compile` cannot keep them for the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qrecipes.quant.formats import AffineFormat, Payload, WeightFormat
from qrecipes.quant.operators import define_operator


def low_rank_offset_mm(
    x_TK: Tensor,
    payload: Payload,
    a_RG: Tensor,
    b_NR: Tensor,
    scaling: float,
    format: WeightFormat,
    bias_N: Tensor | None = None,
) -> Tensor:
    """`x W^T + b`, [T, N], in the type of `x_TK`. It has no gradient.

    Raises:
        ValueError: if the format has no offsets.
    """
    _check_offsets("low_rank_offset_mm", format)
    operator = torch.ops.qrecipes.low_rank_offset_mm.default
    return operator(x_TK, list(payload), a_RG, b_NR, scaling, format.key, bias_N)


def low_rank_offset_mm_grad_input(
    dy_TN: Tensor,
    payload: Payload,
    a_RG: Tensor,
    b_NR: Tensor,
    scaling: float,
    format: WeightFormat,
    in_features: int,
) -> Tensor:
    """`dy W`, [T, K]: the gradient of the input of `low_rank_offset_mm`, in the type of `dy_TN`.

    Raises:
        ValueError: if the format has no offsets.
    """
    _check_offsets("low_rank_offset_mm_grad_input", format)
    operator = torch.ops.qrecipes.low_rank_offset_mm_grad_input.default
    return operator(dy_TN, list(payload), a_RG, b_NR, scaling, format.key, in_features)


def changed_offset(
    offset_NG: Tensor, a_RG: Tensor, b_NR: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    """b + scaling * B A, [N, G], computed and returned in `dtype`: what products use, and merges keep."""
    return torch.addmm(offset_NG.to(dtype), b_NR.to(dtype), a_RG.to(dtype), alpha=scaling)


def _check_offsets(where: str, format: WeightFormat) -> None:
    if not (isinstance(format, AffineFormat) and format.has_offset):
        raise ValueError(f'{where}.format: {format} has no offsets; use one with zero_point="float"')


def _changed(
    payload: list[Tensor], a_RG: Tensor, b_NR: Tensor, scaling: float, dtype: torch.dtype
) -> list[Tensor]:
    """The payload with its changed offsets, in float32, or float64 where the product is."""
    packed, scale, offset = payload
    work = torch.promote_types(dtype, torch.float32)
    return [packed, scale, changed_offset(offset, a_RG, b_NR, scaling, work)]


def _mm(
    x_TK: Tensor,
    payload: list[Tensor],
    a_RG: Tensor,
    b_NR: Tensor,
    scaling: float,
    key: str,
    bias_N: Tensor | None = None,
) -> Tensor:
    changed = _changed(payload, a_RG, b_NR, scaling, x_TK.dtype)
    return torch.ops.qrecipes.dequantize_mm.default(x_TK, changed, key, bias_N)


def _mm_grad_input(
    dy_TN: Tensor,
    payload: list[Tensor],
    a_RG: Tensor,
    b_NR: Tensor,
    scaling: float,
    key: str,
    in_features: int,
) -> Tensor:
    changed = _changed(payload, a_RG, b_NR, scaling, dy_TN.dtype)
    return torch.ops.qrecipes.dequantize_mm_grad_input.default(dy_TN, changed, key, in_features)


def _mm_fake(
    x_TK: Tensor,
    payload: list[Tensor],
    a_RG: Tensor,
    b_NR: Tensor,
    scaling: float,
    key: str,
    bias_N: Tensor | None = None,
) -> Tensor:
    return x_TK.new_empty((x_TK.shape[0], payload[0].shape[0]))


def _mm_grad_input_fake(
    dy_TN: Tensor,
    payload: list[Tensor],
    a_RG: Tensor,
    b_NR: Tensor,
    scaling: float,
    key: str,
    in_features: int,
) -> Tensor:
    return dy_TN.new_empty((dy_TN.shape[0], in_features))


define_operator(
    "low_rank_offset_mm(Tensor x_TK, Tensor[] payload, Tensor a_RG, Tensor b_NR, float scaling, "
    "str format, Tensor? bias_N=None) -> Tensor",
    _mm_fake,
    CompositeExplicitAutograd=_mm,
)
define_operator(
    "low_rank_offset_mm_grad_input(Tensor dy_TN, Tensor[] payload, Tensor a_RG, Tensor b_NR, "
    "float scaling, str format, SymInt in_features) -> Tensor",
    _mm_grad_input_fake,
    CompositeExplicitAutograd=_mm_grad_input,
)
