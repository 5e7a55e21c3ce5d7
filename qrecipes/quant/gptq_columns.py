"""Columns of GPTQ that share a grid, rounded one after the other, each error made good by those that follow.

N rows (outputs), S columns that are rounded. On CUDA a Triton kernel does all S in one launch: column by
column in PyTorch is ten launches each, and a 7B model has 745,000 columns. `round_columns_reference` is the
same in plain PyTorch. float64, devices that the kernel does not run on, and an environment without Triton
get the reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qrecipes.quant.affine import AffineGrid
from qrecipes.quant.device import HAS_TRITON, has_int8_tensor_cores, on_device_of
from qrecipes.quant.packing import signed_range

if HAS_TRITON:
    from qrecipes.quant import gptq_kernels as kernels

MOST_COLUMNS = 64
"""Columns that `round_columns` takes at most; a program of the kernel keeps them in registers."""


class Columns(NamedTuple):
    """What is rounded and what comes of it; rows of contiguous matrices, or a part of one's columns."""

    w: Tensor
    """Weights [S, N], transposed, so that a column is contiguous; used up."""
    factor: Tensor
    """Upper triangular, [S, S]; its rows are contiguous."""
    q: Tensor
    """The integers, int8 [S, N]; filled."""
    error: Tensor
    """Errors of the rounding [S, N], each divided by the factor's diagonal; filled."""


class Levels(NamedTuple):
    """One group's grid in the weights' type, [N] each."""

    scale: Tensor
    zero: Tensor | None
    offset: Tensor | None
    bits: int

    @classmethod
    def of(cls, grid: AffineGrid, bits: int, dtype: torch.dtype) -> Levels:
        """Those of a grid [N, 1]."""
        scale, zero, offset = (None if t is None else t[:, 0].to(dtype).contiguous() for t in grid)
        assert scale is not None, grid
        return cls(scale, zero, offset, bits)


def round_columns(columns: Columns, levels: Levels) -> None:
    """Fill integers and errors of S columns; column j is rounded as those before it have left it."""
    w_SN = columns.w
    assert len(w_SN) <= MOST_COLUMNS, w_SN.shape
    if HAS_TRITON and w_SN.dtype is torch.float32 and has_int8_tensor_cores(w_SN.device):
        round_columns_triton(columns, levels)
    else:
        round_columns_reference(columns, levels)


def round_columns_triton(columns: Columns, levels: Levels) -> None:
    """`round_columns` by its kernel, which Triton's interpreter runs on the CPU; for float32."""
    with on_device_of(columns.w):
        kernels.launch_round_columns(*columns, *levels[:3], *signed_range(levels.bits))


def round_columns_reference(columns: Columns, levels: Levels) -> None:
    """`round_columns` in plain PyTorch, as `quantize_affine` and `dequantize_affine` round."""
    w_SN, factor_SS, q_SN, error_SN = columns
    scale, zero, offset, bits = levels
    divisor = torch.where(scale == 0, 1.0, scale)
    diagonal_S = factor_SS.diagonal()
    for j in range(len(w_SN)):
        level_N = (w_SN[j] if offset is None else w_SN[j] - offset) / divisor
        level_N.round_()
        if zero is not None:
            level_N += zero
        q_SN[j] = level_N.clamp_(*signed_range(bits))
        value_N = (level_N if zero is None else level_N - zero) * scale
        if offset is not None:
            value_N = value_N + offset
        error_N = torch.div(w_SN[j] - value_N, diagonal_S[j], out=error_SN[j])
        w_SN[j + 1 :].addr_(factor_SS[j, j + 1 :], error_N, alpha=-1)
