"""Low-bit weights with a low-rank product added, and the two products of a layer whose weight is one.

T tokens, N output features, K input features, R rank. The weight is W + scaling * B A, [N, K], of a payload W
and A [R, K], B [N, R], summed in float32 and rounded once. As in `dequantize.py`, each product is one
operator, so that `torch.compile` cannot keep the weight of the forward pass for the backward pass;
`*_reference` are the same in plain PyTorch; on CUDA a Triton kernel forms the weight. It rounds as the
reference does, but adds up B A on tensor cores, in an order of its own. float64, devices that the kernel does
not run on, and an environment without Triton get the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from qrecipes.quant.dequantize import dequantize_reference, has_kernel
from qrecipes.quant.device import HAS_TRITON, on_device_of
from qrecipes.quant.formats import Payload, WeightFormat, format_of_key
from qrecipes.quant.operators import define_operator

if HAS_TRITON:
    from qrecipes.quant import dequantize_low_rank_kernels as kernels
    from qrecipes.quant.dequantize_kernels import stored_weight


def dequantize_low_rank(
    payload: Payload,
    a_RK: Tensor,
    b_NR: Tensor,
    scaling: float,
    format: WeightFormat,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [N, K], rounded to `dtype` once. It has no gradient.

    A and B are rounded to `dtype` first, multiplied and added in float32, or in float64 where a scale, an
    offset or `dtype` is.
    """
    operator = torch.ops.qrecipes.dequantize_low_rank.default
    return operator(list(payload), a_RK, b_NR, scaling, format.key, in_features, dtype)


def dequantize_low_rank_mm(
    x_TK: Tensor,
    payload: Payload,
    a_RK: Tensor,
    b_NR: Tensor,
    scaling: float,
    format: WeightFormat,
    bias_N: Tensor | None = None,
) -> Tensor:
    """`x W^T + b`, [T, N], with the weight in the type of `x_TK`. It has no gradient."""
    operator = torch.ops.qrecipes.dequantize_low_rank_mm.default
    return operator(x_TK, list(payload), a_RK, b_NR, scaling, format.key, bias_N)


def dequantize_low_rank_mm_grad_input(
    dy_TN: Tensor,
    payload: Payload,
    a_RK: Tensor,
    b_NR: Tensor,
    scaling: float,
    format: WeightFormat,
    in_features: int,
) -> Tensor:
    """`dy W`, [T, K]: the gradient of the input of `dequantize_low_rank_mm`, in the type of `dy_TN`."""
    operator = torch.ops.qrecipes.dequantize_low_rank_mm_grad_input.default
    return operator(dy_TN, list(payload), a_RK, b_NR, scaling, format.key, in_features)


def dequantize_low_rank_reference(
    payload: Payload,
    a_RK: Tensor,
    b_NR: Tensor,
    scaling: float,
    format: WeightFormat,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """`dequantize_low_rank` in plain PyTorch."""
    wide = torch.float64 in (dtype, *(t.dtype for t in payload))
    work = torch.float64 if wide else torch.float32
    weight = dequantize_reference(payload, format, in_features, work)
    return (weight + scaling * (b_NR.to(dtype).to(work) @ a_RK.to(dtype).to(work))).to(dtype)


def dequantize_low_rank_triton(
    payload: Payload,
    a_RK: Tensor,
    b_NR: Tensor,
    scaling: float,
    format: WeightFormat,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """`dequantize_low_rank` by its kernel, which Triton's interpreter runs on the CPU; for no float64."""
    out_NK = payload[0].new_empty((payload[0].shape[0], in_features), dtype=dtype)
    if out_NK.numel() > 0:
        with on_device_of(out_NK):
            weight = stored_weight(payload, format, in_features)
            a_RK, b_NR = a_RK.to(dtype).contiguous(), b_NR.to(dtype).contiguous()
            kernels.launch_dequantize_low_rank(weight, a_RK, b_NR, scaling, out_NK)
    return out_NK


def _dequantize(
    payload: list[Tensor],
    a_RK: Tensor,
    b_NR: Tensor,
    scaling: float,
    key: str,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return dequantize_low_rank_reference(
        tuple(payload), a_RK, b_NR, scaling, format_of_key(key), in_features, dtype
    )


def _dequantize_cuda(
    payload: list[Tensor],
    a_RK: Tensor,
    b_NR: Tensor,
    scaling: float,
    key: str,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    formed = dequantize_low_rank_triton if has_kernel(payload, dtype) else dequantize_low_rank_reference
    return formed(tuple(payload), a_RK, b_NR, scaling, format_of_key(key), in_features, dtype)


def _mm(
    x_TK: Tensor,
    payload: list[Tensor],
    a_RK: Tensor,
    b_NR: Tensor,
    scaling: float,
    key: str,
    bias_N: Tensor | None = None,
) -> Tensor:
    form = torch.ops.qrecipes.dequantize_low_rank.default
    return linear(x_TK, form(payload, a_RK, b_NR, scaling, key, x_TK.shape[1], x_TK.dtype), bias_N)


def _mm_grad_input(
    dy_TN: Tensor,
    payload: list[Tensor],
    a_RK: Tensor,
    b_NR: Tensor,
    scaling: float,
    key: str,
    in_features: int,
) -> Tensor:
    form = torch.ops.qrecipes.dequantize_low_rank.default
    return dy_TN @ form(payload, a_RK, b_NR, scaling, key, in_features, dy_TN.dtype)


def _dequantize_fake(
    payload: list[Tensor],
    a_RK: Tensor,
    b_NR: Tensor,
    scaling: float,
    key: str,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return payload[0].new_empty((payload[0].shape[0], in_features), dtype=dtype)


def _mm_fake(
    x_TK: Tensor,
    payload: list[Tensor],
    a_RK: Tensor,
    b_NR: Tensor,
    scaling: float,
    key: str,
    bias_N: Tensor | None = None,
) -> Tensor:
    return x_TK.new_empty((x_TK.shape[0], payload[0].shape[0]))


def _mm_grad_input_fake(
    dy_TN: Tensor,
    payload: list[Tensor],
    a_RK: Tensor,
    b_NR: Tensor,
    scaling: float,
    key: str,
    in_features: int,
) -> Tensor:
    return dy_TN.new_empty((dy_TN.shape[0], in_features))


_OPERANDS = "Tensor[] payload, Tensor a_RK, Tensor b_NR, float scaling, str format"
define_operator(
    f"dequantize_low_rank({_OPERANDS}, SymInt in_features, ScalarType dtype) -> Tensor",
    _dequantize_fake,
    CompositeExplicitAutograd=_dequantize,
    CUDA=_dequantize_cuda,
)
define_operator(
    f"dequantize_low_rank_mm(Tensor x_TK, {_OPERANDS}, Tensor? bias_N=None) -> Tensor",
    _mm_fake,
    CompositeExplicitAutograd=_mm,
)
define_operator(
    f"dequantize_low_rank_mm_grad_input(Tensor dy_TN, {_OPERANDS}, SymInt in_features) -> Tensor",
    _mm_grad_input_fake,
    CompositeExplicitAutograd=_mm_grad_input,
)
