"""Dynamic quantization of activations: every token gets its own grid, over the last dimension.

A token is a vector of D values, [..., D]; L = 2**bits - 1 is the highest of its levels counted from 0. The
grids, with scale s >= SCALE_FLOOR and rounding half to even:

    symmetric            s = max|x| / (2**(bits-1) - 1)     x_hat = s * q             q = round(x / s)
    integer zero point   s = (max - min) / L                x_hat = s * (q - z)       q = round(x / s) + z
    float zero point     s = (max - min) / L                x_hat = s * (clip(round(x / s) + z, 0, L) - z)

The integer zero point is z = round(-min / s), of a range that is first widened to hold 0, so that 0 is a
level and the products of a linear layer are those of integers: s * (int - int). The float zero point,
z = -min / s of the range as it is, is what LR-QAT's released code computes (arXiv 2406.06385). There a value
that is rounded beyond an end becomes the exact min or max, which no integer stands for: it can be trained
with, not stored.

Integers are signed, -2**(bits-1) to 2**(bits-1) - 1, and z counts in their units. All arithmetic is in
float32, or float64 where the input is, and is rounded to the input's type once. A token with a NaN or an
infinity has a scale that is not finite, and none of its values is finite afterwards.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qrecipes.quant.packing import signed_range

SCALE_FLOOR = 1e-8
"""Least scale of a token: one of zeros, or of float zero point and equal values, would divide by 0."""

ZeroPoint = Literal["integer", "float"]
"""How an asymmetric grid counts its zero: rounded, as integer arithmetic wants it, or as LR-QAT's does."""

MIN_BITS, MAX_BITS = 2, 8


class QuantizedTokens(NamedTuple):
    """Integers of tokens, and what they stand for: scale * (codes - zero)."""

    codes: Tensor
    """int8 [..., D]."""
    scale: Tensor
    """[..., 1], float32, or float64 of a float64 input."""
    zero: Tensor | None
    """int8 [..., 1] in units of the codes; None of a symmetric grid."""


def fake_quantize(
    x: Tensor, bits: int, *, symmetric: bool = False, zero_point: ZeroPoint = "integer"
) -> Tensor:
    """The value of the level that each value of `x` gets, [..., D] in the type of `x`.

    The gradient passes unchanged where a value was not clipped, and is zero where it was; scale and zero
    point count as constants. Symmetric grids clip nothing.

    Raises:
        ValueError: if `bits` is not 2 to 8, `x` is not of a floating type, or `zero_point` is unknown.
    """
    _check("fake_quantize", x, bits, zero_point)
    return _FakeQuantize.apply(x, bits, symmetric, zero_point)


def quantize(
    x: Tensor, bits: int, *, symmetric: bool = False, zero_point: ZeroPoint = "integer"
) -> QuantizedTokens:
    """The integers of `x`; `dequantize` makes of them what `fake_quantize` gives, bit for bit.

    Values that are not finite get integers that mean nothing, under a scale that is not finite.

    Raises:
        ValueError: as `fake_quantize`, and of an asymmetric float zero point, which has no integers.
    """
    _check("quantize", x, bits, zero_point)
    if not symmetric and zero_point == "float":
        raise ValueError(
            "quantize.zero_point: 'float' has ends that no integer stands for; use 'integer', or "
            "symmetric=True"
        )
    exact = _arithmetic(x)
    if symmetric:
        scale = symmetric_scale(x, bits)
        return QuantizedTokens(_integers(torch.round(exact / scale), bits), scale, None)
    scale, zero = _affine(exact, bits, "integer")
    least, _ = signed_range(bits)
    codes = torch.round(exact / scale) + (zero + least)
    return QuantizedTokens(_integers(codes, bits), scale, _integers(zero + least, bits))


def dequantize(tokens: QuantizedTokens, dtype: torch.dtype) -> Tensor:
    """The values of integers, [..., D], in `dtype`."""
    q = tokens.codes.to(tokens.scale.dtype)
    if tokens.zero is not None:
        q = q - tokens.zero.to(q.dtype)
    return (q * tokens.scale).to(dtype)


def clipped(
    x: Tensor, bits: int, *, symmetric: bool = False, zero_point: ZeroPoint = "integer"
) -> Tensor | None:
    """Where `fake_quantize` clips, bool [..., D], and so gives no gradient; None of grids that clip nothing.

    Of an integer zero point only the top of a range can be clipped, where both of its ends were rounded up.
    """
    _check("clipped", x, bits, zero_point)
    if symmetric:
        return None
    exact = _arithmetic(x)
    scale, zero = _affine(exact, bits, zero_point)
    return _outside(torch.round(exact / scale) + zero, bits)


def symmetric_scale(x: Tensor, bits: int) -> Tensor:
    """Scale of each token of a symmetric grid, [..., 1], in float32, or float64 where `x` is."""
    _, greatest = signed_range(bits)
    largest = _arithmetic(x).abs().amax(-1, keepdim=True)
    return (largest / greatest).clamp(min=SCALE_FLOOR)


class _FakeQuantize(torch.autograd.Function):
    """What is saved is the mask of what was clipped, and nothing where nothing can be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, symmetric: bool, zero_point: ZeroPoint) -> Tensor:
        exact = _arithmetic(x)
        ctx.symmetric = symmetric
        if symmetric:
            scale = symmetric_scale(x, bits)
            least, greatest = signed_range(bits)
            return (torch.round(exact / scale).clamp(least, greatest) * scale).to(x.dtype)
        scale, zero = _affine(exact, bits, zero_point)
        levels = torch.round(exact / scale) + zero
        ctx.save_for_backward(_outside(levels, bits))
        return ((levels.clamp(0, 2**bits - 1) - zero) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        if ctx.symmetric:
            return grad, None, None, None
        (outside,) = ctx.saved_tensors
        return grad.masked_fill(outside, 0), None, None, None


def _affine(exact: Tensor, bits: int, zero_point: ZeroPoint) -> tuple[Tensor, Tensor]:
    """Scale and zero point [..., 1] of asymmetric grids, the zero point in levels counted from 0."""
    low, high = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
    if zero_point == "integer":
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=SCALE_FLOOR)
    zero = -low / scale
    return scale, torch.round(zero) if zero_point == "integer" else zero


def _outside(levels: Tensor, bits: int) -> Tensor:
    return (levels < 0) | (levels > 2**bits - 1)


def _integers(levels: Tensor, bits: int) -> Tensor:
    """int8 of signed levels, clipped; converting NaN to an integer is undefined, so it gets 0."""
    least, greatest = signed_range(bits)
    return torch.where(torch.isnan(levels), 0.0, levels).clamp(least, greatest).to(torch.int8)


def _arithmetic(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _check(where: str, x: Tensor, bits: int, zero_point: ZeroPoint) -> None:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{where}.bits: {bits} is out of range; use {MIN_BITS} to {MAX_BITS}")
    if not x.is_floating_point():
        raise ValueError(f"{where}.x: {x.dtype} is not a floating type; convert it with x.float()")
    if zero_point not in ("integer", "float"):
        raise ValueError(f"{where}.zero_point: {zero_point!r} is unknown; use 'integer' or 'float'")
