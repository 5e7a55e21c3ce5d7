"""Weights with a low-rank correction inside their rounding (LR-QAT, arXiv 2406.06385, equations 5 to 8).

T tokens, N output features (rows), K input features, G groups of a row with a scale each, R rank.

    Z     = decode(phi) + scaling * (A B)            phi frozen, A [N, R], B [R, K]
    Q     = clip(rnd(Z), -2**(bits-1), 2**(bits-1) - 1)
    W_hat = s * (Q - z)                              s, z [N, G]; z = 0 where symmetric

rnd rounds half to even, then is clipped. Levels are signed also where a grid is asymmetric: the unsigned
ones, 0 to 2**bits - 1, are u = Q + 2**(bits-1). The zero point is a float that is trained, and rounded and
clipped as Z is whenever it is used, so that Q, s and rnd(z) are an affine payload of `AffineFormat`, bit
for bit (5 to 7 bits in one of 8). phi is W / s0 + rnd(z0), of a scale and zero point frozen at the start.
Without A and B (rank 0) only scales and zero points train, as in PEQA (arXiv 2305.14152).

Gradients, for g = dL/dW_hat and M = [rnd(Z) within the levels], with rnd passed straight through:

    dA = scaling * H B^T     dB = scaling * A^T H     H = s * g * M
    ds = sum of g * (Q - z)  dz = -s * sum of g, over the scale's group; dz is 0 where rnd(z) is clipped

On CUDA Triton kernels compute all of this, with one division into tiles: W_hat, Q and M come from the same
bits of Z. Those can differ from the reference's in `low_rank_reference.py` by how A B is summed alone, which
tensor cores do in an order and with roundings of their generation; the products, sums and roundings around it
are the same float32 operations. So Q differs where Z is within a few units in its last place of a half: at
rank 32 at none or one of four million weights. Where A B is 0, nothing differs. Weights are fused on the kind
of device that trained them (`Transform.merge_differs`): a sum in one order for all, without tensor cores,
would take some 64 instructions a weight at rank 32, in each of four passes of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from torch.nn.functional import linear

from qrecipes.quant.affine import _arithmetic
from qrecipes.quant.device import HAS_TRITON, LEAST_CAPABILITY, device_limits, on_device_of
from qrecipes.quant.low_rank_reference import (
    LowRankGrads,
    linear_grads,
    low_rank_integers_reference,
    low_rank_weight_grads_reference,
    low_rank_weight_reference,
)
from qrecipes.quant.low_rank_storage import LowRankRounding, check_parts, rounding_of_key
from qrecipes.quant.operators import define_operator

if HAS_TRITON:
    from qrecipes.quant import low_rank_kernels as kernels


def low_rank_weight(
    phi: Tensor,
    a_NR: Tensor | None,
    b_RK: Tensor | None,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    rounding: LowRankRounding,
    dtype: torch.dtype,
) -> Tensor:
    """W_hat [N, K], rounded to `dtype` once. It has no gradient: see `LowRankRoundedLinear`.

    `a_NR` and `b_RK` are both None, or both bfloat16 or both float32; scales and zero points are float32.

    Raises:
        ValueError: if a shape or type does not fit.
    """
    check_parts("low_rank_weight", phi, a_NR, b_RK, scale_NG, zero_NG, rounding)
    return torch.ops.qrecipes.low_rank_weight.default(phi, a_NR, b_RK, scale_NG, zero_NG, rounding.key, dtype)


def low_rank_integers(
    phi: Tensor,
    a_NR: Tensor | None,
    b_RK: Tensor | None,
    rounding: LowRankRounding,
    *,
    transposed: bool = False,
) -> Tensor:
    """Q, int8 [N, K], those that `low_rank_weight` scales, bit for bit; or [K, N] where `transposed`.

    An integer product with the weight sums over K and wants [N, K]; one of the input's gradient sums over N
    and wants [K, N]. What is not a number becomes 0 here; `low_rank_weight` lets it through.

    Raises:
        ValueError: if a shape or type does not fit.
    """
    check_parts("low_rank_integers", phi, a_NR, b_RK, None, None, rounding)
    return torch.ops.qrecipes.low_rank_integers.default(phi, a_NR, b_RK, rounding.key, transposed)


def low_rank_weight_grads(
    grad_NK: Tensor,
    phi: Tensor,
    a_NR: Tensor | None,
    b_RK: Tensor | None,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    rounding: LowRankRounding,
) -> LowRankGrads:
    """The gradients of all that trains from dL/dW_hat [N, K], in float32 sums of one order.

    Raises:
        ValueError: if a shape or type does not fit.
    """
    check_parts("low_rank_weight_grads", phi, a_NR, b_RK, scale_NG, zero_NG, rounding)
    grads = torch.ops.qrecipes.low_rank_weight_grads.default(
        grad_NK, phi, a_NR, b_RK, scale_NG, zero_NG, rounding.key
    )
    return _present(grads, a_NR, zero_NG)


def low_rank_linear_grads(
    dy_TN: Tensor,
    x_TK: Tensor,
    phi: Tensor,
    a_NR: Tensor | None,
    b_RK: Tensor | None,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    rounding: LowRankRounding,
) -> LowRankGrads:
    """`low_rank_weight_grads` of dL/dW_hat = dy^T x, of which GRADIENT_BYTES exist at once.

    dL/dW_hat is rounded to the type of `x_TK`, as a plain layer's gradient is.

    Raises:
        ValueError: if a shape or type does not fit.
    """
    check_parts("low_rank_linear_grads", phi, a_NR, b_RK, scale_NG, zero_NG, rounding)
    grads = torch.ops.qrecipes.low_rank_linear_grads.default(
        dy_TN, x_TK, phi, a_NR, b_RK, scale_NG, zero_NG, rounding.key
    )
    return _present(grads, a_NR, zero_NG)


def low_rank_mm(
    x_TK: Tensor,
    phi: Tensor,
    a_NR: Tensor | None,
    b_RK: Tensor | None,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    bias_N: Tensor | None,
    rounding: LowRankRounding,
) -> Tensor:
    """`x W_hat^T + b`, [T, N], with W_hat in the type of `x_TK`. It has no gradient.

    One operator, so that `torch.compile` cannot keep W_hat for the backward pass.
    """
    return torch.ops.qrecipes.low_rank_mm.default(
        x_TK, phi, a_NR, b_RK, scale_NG, zero_NG, bias_N, rounding.key
    )


def low_rank_mm_grad_input(
    dy_TN: Tensor,
    phi: Tensor,
    a_NR: Tensor | None,
    b_RK: Tensor | None,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    rounding: LowRankRounding,
) -> Tensor:
    """`dy W_hat`, [T, K]: the gradient of the input of `low_rank_mm`, in the type of `dy_TN`."""
    return torch.ops.qrecipes.low_rank_mm_grad_input.default(
        dy_TN, phi, a_NR, b_RK, scale_NG, zero_NG, rounding.key
    )


def low_rank_weight_triton(
    phi: Tensor,
    a_NR: Tensor | None,
    b_RK: Tensor | None,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    rounding: LowRankRounding,
    dtype: torch.dtype,
) -> Tensor:
    """`low_rank_weight` by its kernel, which Triton's interpreter runs on the CPU; for no float64."""
    w_NK = phi.new_empty((phi.shape[0], rounding.in_features), dtype=dtype)
    if w_NK.numel() > 0:
        with on_device_of(phi):
            kernels.launch_weight(kernels.operands(phi, a_NR, b_RK, scale_NG, zero_NG), w_NK, rounding)
    return w_NK


def low_rank_integers_triton(
    phi: Tensor,
    a_NR: Tensor | None,
    b_RK: Tensor | None,
    rounding: LowRankRounding,
    *,
    transposed: bool = False,
) -> Tensor:
    """`low_rank_integers` by its kernel, as `low_rank_weight_triton`."""
    N, K = phi.shape[0], rounding.in_features
    q = phi.new_empty((K, N) if transposed else (N, K), dtype=torch.int8)
    if q.numel() > 0:
        with on_device_of(phi):
            weight = kernels.operands(phi, a_NR, b_RK, None, None)
            kernels.launch_weight(weight, q, rounding, transposed=transposed)
    return q


def low_rank_weight_grads_triton(
    grad_NK: Tensor,
    phi: Tensor,
    a_NR: Tensor | None,
    b_RK: Tensor | None,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    rounding: LowRankRounding,
) -> LowRankGrads:
    """`low_rank_weight_grads` by its kernels, as `low_rank_weight_triton`."""
    if grad_NK.numel() == 0:
        return low_rank_weight_grads_reference(grad_NK, phi, a_NR, b_RK, scale_NG, zero_NG, rounding)
    found = LowRankGrads(_grad_like(a_NR), _grad_like(b_RK), _grad_like(scale_NG), _grad_like(zero_NG))
    with on_device_of(phi):
        weight = kernels.operands(phi, a_NR, b_RK, scale_NG, zero_NG)
        shared_bytes = device_limits(phi.device).shared_bytes
        kernels.launch_grads(grad_NK.contiguous(), weight, found, rounding, shared_bytes)
    return found


@overload
def _grad_like(t: Tensor) -> Tensor: ...
@overload
def _grad_like(t: Tensor | None) -> Tensor | None: ...
def _grad_like(t: Tensor | None) -> Tensor | None:
    """An empty contiguous float32 tensor of a shape."""
    return None if t is None else torch.empty(t.shape, dtype=torch.float32, device=t.device)


def _has_kernel(*tensors: Tensor | None, dtype: torch.dtype = torch.float32) -> bool:
    wide = torch.float64 in (dtype, *(t.dtype for t in tensors if t is not None))
    device = next(t.device for t in tensors if t is not None)
    return HAS_TRITON and not wide and device_limits(device).capability >= LEAST_CAPABILITY


def _weight_on_cuda(
    phi: Tensor,
    a_NR: Tensor | None,
    b_RK: Tensor | None,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    rounding: LowRankRounding,
    dtype: torch.dtype,
) -> Tensor:
    has_kernel = _has_kernel(phi, a_NR, scale_NG, zero_NG, dtype=dtype)
    weight = low_rank_weight_triton if has_kernel else low_rank_weight_reference
    return weight(phi, a_NR, b_RK, scale_NG, zero_NG, rounding, dtype)


def _integers_on_cuda(
    phi: Tensor, a_NR: Tensor | None, b_RK: Tensor | None, rounding: LowRankRounding, *, transposed: bool
) -> Tensor:
    integers = low_rank_integers_triton if _has_kernel(phi, a_NR) else low_rank_integers_reference
    return integers(phi, a_NR, b_RK, rounding, transposed=transposed)


def _weight_grads_on_cuda(
    grad_NK: Tensor,
    phi: Tensor,
    a_NR: Tensor | None,
    b_RK: Tensor | None,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    rounding: LowRankRounding,
) -> LowRankGrads:
    has_kernel = _has_kernel(phi, grad_NK, a_NR, scale_NG, zero_NG)
    grads = low_rank_weight_grads_triton if has_kernel else low_rank_weight_grads_reference
    return grads(grad_NK, phi, a_NR, b_RK, scale_NG, zero_NG, rounding)


def _present(
    grads: tuple[Tensor, Tensor, Tensor, Tensor], a_NR: Tensor | None, zero_NG: Tensor | None
) -> LowRankGrads:
    """What an operator gave, less the empty tensors that stand for None there."""
    d_a, d_b, d_scale, d_zero = grads
    return LowRankGrads(
        None if a_NR is None else d_a,
        None if a_NR is None else d_b,
        d_scale,
        None if zero_NG is None else d_zero,
    )


class _Functions(NamedTuple):
    """What computes for the operators of a device."""

    weight: Callable[..., Tensor]
    integers: Callable[..., Tensor]
    weight_grads: Callable[..., LowRankGrads]


Tensors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
Maybe: TypeAlias = Tensor | None


def _weight(
    on: _Functions, phi: Tensor, a: Maybe, b: Maybe, scale: Tensor, zero: Maybe, key: str, dtype: torch.dtype
) -> Tensor:
    return on.weight(phi, a, b, scale, zero, rounding_of_key(key), dtype)


def _integers(on: _Functions, phi: Tensor, a: Maybe, b: Maybe, key: str, transposed: bool) -> Tensor:
    return on.integers(phi, a, b, rounding_of_key(key), transposed=transposed)


def _mm(
    on: _Functions,
    x: Tensor,
    phi: Tensor,
    a: Maybe,
    b: Maybe,
    scale: Tensor,
    zero: Maybe,
    bias: Maybe,
    key: str,
) -> Tensor:
    return linear(x, on.weight(phi, a, b, scale, zero, rounding_of_key(key), x.dtype), bias)


def _mm_grad_input(
    on: _Functions, dy: Tensor, phi: Tensor, a: Maybe, b: Maybe, scale: Tensor, zero: Maybe, key: str
) -> Tensor:
    return dy @ on.weight(phi, a, b, scale, zero, rounding_of_key(key), dy.dtype)


def _weight_grads_op(
    on: _Functions, grad: Tensor, phi: Tensor, a: Maybe, b: Maybe, scale: Tensor, zero: Maybe, key: str
) -> Tensors:
    return _filled(on.weight_grads(grad, phi, a, b, scale, zero, rounding_of_key(key)))


def _linear_grads_op(
    on: _Functions,
    dy: Tensor,
    x: Tensor,
    phi: Tensor,
    a: Maybe,
    b: Maybe,
    scale: Tensor,
    zero: Maybe,
    key: str,
) -> Tensors:
    return _filled(linear_grads(on.weight_grads, dy, x, phi, a, b, scale, zero, rounding_of_key(key)))


def _filled(grads: LowRankGrads) -> Tensors:
    """Empty tensors for None, which operators cannot return."""
    d_a, d_b, d_scale, d_zero = (grads.scale.new_empty(0) if t is None else t for t in grads)
    return d_a, d_b, d_scale, d_zero


def _weight_fake(
    phi: Tensor, a: Maybe, b: Maybe, scale: Tensor, zero: Maybe, key: str, dtype: torch.dtype
) -> Tensor:
    return phi.new_empty((phi.shape[0], rounding_of_key(key).in_features), dtype=dtype)


def _integers_fake(phi: Tensor, a: Maybe, b: Maybe, key: str, transposed: bool) -> Tensor:
    N, K = phi.shape[0], rounding_of_key(key).in_features
    return phi.new_empty((K, N) if transposed else (N, K), dtype=torch.int8)


def _mm_fake(
    x: Tensor, phi: Tensor, a: Maybe, b: Maybe, scale: Tensor, zero: Maybe, bias: Maybe, key: str
) -> Tensor:
    return x.new_empty((x.shape[0], phi.shape[0]))


def _mm_grad_input_fake(
    dy: Tensor, phi: Tensor, a: Maybe, b: Maybe, scale: Tensor, zero: Maybe, key: str
) -> Tensor:
    return dy.new_empty((dy.shape[0], rounding_of_key(key).in_features))


def _weight_grads_fake(
    grad: Tensor, phi: Tensor, a: Maybe, b: Maybe, scale: Tensor, zero: Maybe, key: str
) -> Tensors:
    work = _arithmetic(grad, scale)
    d_a, d_b, d_scale, d_zero = (
        scale.new_empty(0 if t is None else t.shape, dtype=work) for t in (a, b, scale, zero)
    )
    return d_a, d_b, d_scale, d_zero


def _linear_grads_fake(
    dy: Tensor, x: Tensor, phi: Tensor, a: Maybe, b: Maybe, scale: Tensor, zero: Maybe, key: str
) -> Tensors:
    return _weight_grads_fake(x, phi, a, b, scale, zero, key)


_REFERENCE = _Functions(
    low_rank_weight_reference, low_rank_integers_reference, low_rank_weight_grads_reference
)
_ON_CUDA = _Functions(_weight_on_cuda, _integers_on_cuda, _weight_grads_on_cuda)
_WEIGHT = "Tensor phi, Tensor? a_NR, Tensor? b_RK"
_GRID = "Tensor scale_NG, Tensor? zero_NG"
_GRADS = "(Tensor, Tensor, Tensor, Tensor)"
for _schema, _implementation, _fake in (
    (
        f"low_rank_weight({_WEIGHT}, {_GRID}, str rounding, ScalarType dtype) -> Tensor",
        _weight,
        _weight_fake,
    ),
    (f"low_rank_integers({_WEIGHT}, str rounding, bool transposed) -> Tensor", _integers, _integers_fake),
    (
        f"low_rank_mm(Tensor x_TK, {_WEIGHT}, {_GRID}, Tensor? bias_N, str rounding) -> Tensor",
        _mm,
        _mm_fake,
    ),
    (
        f"low_rank_mm_grad_input(Tensor dy_TN, {_WEIGHT}, {_GRID}, str rounding) -> Tensor",
        _mm_grad_input,
        _mm_grad_input_fake,
    ),
    (
        f"low_rank_weight_grads(Tensor grad_NK, {_WEIGHT}, {_GRID}, str rounding) -> {_GRADS}",
        _weight_grads_op,
        _weight_grads_fake,
    ),
    (
        f"low_rank_linear_grads(Tensor dy_TN, Tensor x_TK, {_WEIGHT}, {_GRID}, str rounding) -> {_GRADS}",
        _linear_grads_op,
        _linear_grads_fake,
    ),
):
    define_operator(
        _schema,
        _fake,
        CompositeExplicitAutograd=partial(_implementation, _REFERENCE),
        CUDA=partial(_implementation, _ON_CUDA),
    )
