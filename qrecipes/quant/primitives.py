"""Symmetric INT8 quantization along one dimension, its inverse, and the measure of what it loses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

INT8_MAX = 127
"""Largest magnitude that `quantize_int8` gives; -128 is not used, so that the grid is symmetric."""


def quantize_int8(
    x: Tensor, dim: int = -1, *, scale_dtype: torch.dtype = torch.float32, stochastic_rounding: bool = False
) -> tuple[Tensor, Tensor]:
    """INT8 values and the scale of each slice along `dim`: `x` is about `q * scale`.

    The scale is absmax / INT8_MAX in float32, with `dim` kept at size 1. It is rounded to `scale_dtype`
    first, upwards so that no value leaves the grid, and only then divided by: stochastic rounding is
    therefore unbiased with respect to the scale that is stored. Rounding is half to even, or stochastic with
    the default generator of `x`'s device. Slices of zeros, and empty ones, have scale 0. A slice that holds
    NaN or Inf has a scale that is not finite, so that none of its values is finite once dequantized.

    Raises:
        ValueError: if `x` is not of a floating type or `scale_dtype` is neither float32 nor bfloat16.
    """
    if not x.is_floating_point():
        raise ValueError(f"quantize_int8.x: {x.dtype} is not a floating type; convert it with x.float()")
    if scale_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"quantize_int8.scale_dtype: {scale_dtype} is not float32 or bfloat16; use one of them"
        )
    exact = x.float()
    scale = _absmax(exact, dim) / INT8_MAX
    if scale_dtype is torch.bfloat16:
        scale = _round_up_to_bfloat16(scale)
    usable = (scale > 0) & torch.isfinite(scale)
    grid = exact / torch.where(usable, scale, 1.0)
    rounded = _round_stochastically(grid) if stochastic_rounding else torch.round(grid)
    # converting NaN to an integer is undefined, so such slices get zeros: 0 * NaN and 0 * Inf are both NaN
    q = torch.where(usable, rounded, 0.0).clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return q, scale.to(scale_dtype)


def dequantize_int8(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`q * scale`, computed in float32 and converted to `dtype`."""
    return (q.float() * scale.float()).to(dtype)


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise, 10 log10(sum(reference^2) / sum((reference - approximation)^2)), in dB.

    Computed in float64. It is inf where both are equal; -inf where they differ and the reference is all
    zeros, or the approximation is not finite; and NaN, which meets no floor, where the reference itself is
    not finite. Reads the tensors, so it synchronizes.

    Raises:
        ValueError: if the shapes differ.
    """
    if reference.shape != approximation.shape:
        raise ValueError(
            f"sqnr_db.approximation: shape {tuple(approximation.shape)} is not the reference's "
            f"{tuple(reference.shape)}; compare tensors of one shape"
        )
    signal = reference.detach().double()
    noise = signal - approximation.detach().double()
    signal_energy, noise_energy = signal.square().sum().item(), noise.square().sum().item()
    if not math.isfinite(signal_energy):
        return math.nan
    if noise_energy == 0:
        return math.inf
    if signal_energy == 0 or not math.isfinite(noise_energy):
        return -math.inf
    return 10 * math.log10(signal_energy / noise_energy)


def as_matrix(x: Tensor) -> Tensor:
    """Leading dimensions flattened, by number: -1 would be ambiguous for an empty tensor."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def bias_gradient(dy_TN: Tensor) -> Tensor:
    """The gradient of a linear layer's bias, [N], summed over tokens in float32 or wider."""
    return dy_TN.sum(0, dtype=torch.promote_types(dy_TN.dtype, torch.float32)).to(dy_TN.dtype)


def _absmax(x: Tensor, dim: int) -> Tensor:
    if x.shape[dim] == 0:  # amax has no value for it
        shape = list(x.shape)
        shape[dim] = 1
        return x.new_zeros(shape)
    return x.abs().amax(dim, keepdim=True)


def _round_up_to_bfloat16(scale: Tensor) -> Tensor:
    """Smallest bfloat16 value that is not below `scale` >= 0, still stored as float32.

    On the bits: a compiler that fuses may leave out a conversion there and back, and with it the rounding.
    """
    bits = scale.view(torch.int32)
    rounded = ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)
    return torch.where(torch.isfinite(scale), rounded, scale)  # adding turns some NaNs into numbers


def _round_stochastically(x: Tensor) -> Tensor:
    """Floor of x + u, u uniform in [0, 1), without the rounding of that sum: integers stay what they are."""
    low = torch.floor(x)
    return low + (torch.rand_like(x) < x - low)
