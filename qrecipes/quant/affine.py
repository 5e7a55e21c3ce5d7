"""Affine quantization of a matrix by groups along its rows, and its inverse.

N rows, K columns, G groups of a row, S = K // G columns of a group. The three forms of a grid, over signed q:

    symmetric            W = s * q
    integer zero point   W = s * (q - z)      z in units of q
    float zero point     W = s * q + b        b in units of W

With unsigned levels u = q + 2**(bits - 1), as GPTQ stores them, z_u = z + 2**(bits - 1) and s * (u - z_u)
is the same weight. Rounding is half to even. All arithmetic is in float32, or float64 where a tensor or the
wanted type is, and is rounded to the wanted type once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qrecipes.quant.formats import AffineFormat
from qrecipes.quant.packing import signed_range
from qrecipes.quant.primitives import _round_up_to_bfloat16


class AffineGrid(NamedTuple):
    """What the integers of each group stand for; at most one of `zero` and `offset` is there."""

    scale: Tensor
    """s, [N, G], floating, >= 0. A group of scale 0 holds one value: 0, or its offset."""
    zero: Tensor | None = None
    """z, int8 [N, G], in units of signed q."""
    offset: Tensor | None = None
    """b, [N, G], floating, in units of W."""


def affine_grid(low_NG: Tensor, high_NG: Tensor, format: AffineFormat) -> AffineGrid:
    """The grid of `format` whose levels span `low_NG` to `high_NG`.

    Symmetric: s = max(|low|, |high|) / (2**(bits-1) - 1), so the range is reached by the highest level and
    its negative, and the lowest level -2**(bits-1) lies one step beyond. Otherwise s = (high - low) /
    (2**bits - 1); with an integer zero point the range is first widened to hold 0, which z then gives
    exactly, and the ends may lie up to half a step beyond the levels. Scales are rounded to their type
    upwards, before anything is divided by them. A range that is not finite gives a grid that is not.
    """
    dtype = _arithmetic(low_NG, high_NG)
    low, high = low_NG.to(dtype), high_NG.to(dtype)
    least, greatest = signed_range(format.bits)
    if format.symmetric:
        return AffineGrid(_stored_scale(torch.maximum(low.abs(), high.abs()) / greatest, format))
    if format.has_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _stored_scale((high - low) / (greatest - least), format)
    step = scale.to(dtype)
    if format.has_offset:
        return AffineGrid(scale, offset=(low - step * least).to(getattr(torch, format.offset_dtype)))
    zero = torch.round(-low / _divisor(step)) + least
    return AffineGrid(scale, zero=_integers(zero, format.bits))


def quantize_affine(w_NK: Tensor, grid: AffineGrid, bits: int) -> Tensor:
    """Signed integers int8 [N, K]: the nearest level to each weight, half to even, clipped to the grid.

    Groups of scale 0 get the level that is theirs. What is not finite gets level 0; it shows after
    dequantization where the grid was taken from these weights.

    Raises:
        ValueError: if the grid's groups do not divide the rows.
    """
    w_NGS = _grouped("quantize_affine.w_NK", w_NK, grid)
    dtype = _arithmetic(w_NK, grid.scale, grid.offset)
    w, scale = w_NGS.to(dtype), _divisor(grid.scale.to(dtype)).unsqueeze(-1)
    if grid.offset is not None:
        w = w - grid.offset.to(dtype).unsqueeze(-1)
    levels = torch.round(w / scale)
    if grid.zero is not None:
        levels = levels + grid.zero.to(dtype).unsqueeze(-1)
    return _integers(levels, bits).reshape(w_NK.shape)


def dequantize_affine(q_NK: Tensor, grid: AffineGrid, dtype: torch.dtype) -> Tensor:
    """The weights of integers [N, K] on a grid, in `dtype`.

    Raises:
        ValueError: if the grid's groups do not divide the rows.
    """
    q_NGS = _grouped("dequantize_affine.q_NK", q_NK, grid)
    work = _arithmetic(grid.scale, grid.offset, dtype)
    q, scale = q_NGS.to(work), grid.scale.to(work).unsqueeze(-1)
    if grid.zero is not None:
        q = q - grid.zero.to(work).unsqueeze(-1)
    w_NGS = q * scale
    if grid.offset is not None:
        w_NGS = w_NGS + grid.offset.to(work).unsqueeze(-1)
    return w_NGS.reshape(q_NK.shape).to(dtype)


def with_offset(grid: AffineGrid, offset_dtype: torch.dtype = torch.float32) -> AffineGrid:
    """The same grid as W = s * q + b: b = -s * z, and 0 where it was symmetric.

    s * q + b then differs from s * (q - z) by roundings of the last bit.
    """
    if grid.offset is not None:
        return grid._replace(offset=grid.offset.to(offset_dtype))
    work = _arithmetic(grid.scale, offset_dtype)
    if grid.zero is None:
        offset = torch.zeros_like(grid.scale, dtype=work)
    else:
        offset = -grid.scale.to(work) * grid.zero.to(work)
    return AffineGrid(grid.scale, offset=offset.to(offset_dtype))


def float_zeros(grid: AffineGrid) -> Tensor:
    """Zero points z of W = s * (q - z) in units of signed q, [N, G], as floats: -b / s of a float offset.

    Raises:
        ValueError: if a group has an offset and scale 0: no zero point gives that. Reads the tensors.
    """
    if grid.offset is None:
        return torch.zeros_like(grid.scale) if grid.zero is None else grid.zero.to(grid.scale.dtype)
    if ((grid.scale == 0) & (grid.offset != 0)).any():
        raise ValueError(
            "float_zeros.grid: a group of scale 0 has an offset, and no zero point z gives s * (q - z) = b; "
            "keep the offsets, or give the group a scale"
        )
    work = _arithmetic(grid.scale, grid.offset)
    return -grid.offset.to(work) / _divisor(grid.scale.to(work))


def offset_of_zeros(scale_NG: Tensor, zero_NG: Tensor) -> Tensor:
    """Offsets b = -s * z, [N, G], of zero points in units of signed q, of any type: W = s * q + b."""
    work = _arithmetic(scale_NG, zero_NG)
    return -scale_NG.to(work) * zero_NG.to(work)


def unsigned_zeros(zero_NG: Tensor, bits: int) -> Tensor:
    """Zero points for unsigned levels u = q + 2**(bits - 1), as GPTQ counts them: z + 2**(bits - 1).

    Integer zeros as int16, since those of 8 bits reach 255. GPTQ's v1 files store 1 less.
    """
    return (zero_NG if zero_NG.is_floating_point() else zero_NG.to(torch.int16)) + 2 ** (bits - 1)


def signed_zeros(zero_NG: Tensor, bits: int) -> Tensor:
    """The inverse of `unsigned_zeros`; integer zeros as int8."""
    if zero_NG.is_floating_point():
        return zero_NG - 2 ** (bits - 1)
    return (zero_NG.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def _arithmetic(*operands: Tensor | torch.dtype | None) -> torch.dtype:
    """float64 where any operand is, float32 otherwise."""
    types = {o if isinstance(o, torch.dtype) else o.dtype for o in operands if o is not None}
    return torch.float64 if torch.float64 in types else torch.float32


def _stored_scale(scale: Tensor, format: AffineFormat) -> Tensor:
    """The scale in its type, not below the exact one, so that no value of the range leaves the grid."""
    if format.scale_dtype == "bfloat16":
        return _round_up_to_bfloat16(scale.float()).to(torch.bfloat16)
    return scale.to(getattr(torch, format.scale_dtype))


def _divisor(scale: Tensor) -> Tensor:
    """The scale, and 1 where it is 0."""
    return torch.where(scale == 0, 1.0, scale)


def _integers(levels: Tensor, bits: int) -> Tensor:
    """int8 of levels clipped to the signed range; converting NaN to an integer is undefined, so it gets 0."""
    least, greatest = signed_range(bits)
    return torch.where(torch.isnan(levels), 0.0, levels).clamp(least, greatest).to(torch.int8)


def _grouped(where: str, matrix_NK: Tensor, grid: AffineGrid) -> Tensor:
    N, K = matrix_NK.shape
    G = grid.scale.shape[1]
    if grid.scale.shape[0] != N or G == 0 or K % G:
        raise ValueError(
            f"{where}: shape {(N, K)} and scales of shape {tuple(grid.scale.shape)}; scales are [N, G], and "
            "G divides K"
        )
    return matrix_NK.reshape(N, G, K // G)
