"""The Triton kernel of GPTQ's column loop, and its launch; imported only where Triton is installed.

N rows (outputs), S columns. A program keeps its rows of all S columns in registers and goes through them.
Every product and sum is rounded by itself (`enable_fp_fusion=False`).
"""

# mypy: disable-error-code="assignment,has-type,union-attr,var-annotated"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qrecipes.quant.triton_launch import Launchers

ROWS = 32
"""Rows of a program of one warp: the 4,096 of a narrow layer are then 128 programs, which wait for nobody."""
LEAST_COLUMNS = 16
ROUND = tl.constexpr(12_582_912.0)  # 1.5 * 2**23: adding it leaves no bit for a fraction, half goes to even


def launch_round_columns(
    w_SN: Tensor,
    factor_SS: Tensor,
    q_SN: Tensor,
    error_SN: Tensor,
    scale_N: Tensor,
    zero_N: Tensor | None,
    offset_N: Tensor | None,
    least: int,
    greatest: int,
) -> None:
    """Fill `q_SN` and `error_SN`; `w_SN` is only read."""
    S, N = w_SN.shape
    assert factor_SS.stride(1) == 1, factor_SS.stride()
    constants = {"COLUMNS": max(LEAST_COLUMNS, triton.next_power_of_2(S)), "ROWS": ROWS}
    _launchers(constants, num_warps=1, enable_fp_fusion=False)(
        triton.cdiv(N, ROWS),
        w_SN,
        factor_SS,
        q_SN,
        error_SN,
        scale_N,
        zero_N,
        offset_N,
        S,
        N,
        factor_SS.stride(0),
        float(least),  # Triton makes a constant of an integer that is 1, but of no float
        float(greatest),
    )


@triton.jit
def _round_columns_kernel(  # type: ignore[no-untyped-def]
    w_ptr,
    factor_ptr,
    q_ptr,
    error_ptr,
    scale_ptr,
    zero_ptr,
    offset_ptr,
    S,
    N,
    factor_stride,
    least,
    greatest,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    inside = n < N
    w = tl.load(w_ptr + k[:, None] * N + n[None, :], mask=(k < S)[:, None] & inside[None, :], other=0.0)
    scale = tl.load(scale_ptr + n, mask=inside, other=1.0)
    divisor = tl.where(scale == 0, 1.0, scale)
    for j in range(S):
        column = tl.sum(tl.where((k == j)[:, None], w, 0.0), 0)
        level = column
        if offset_ptr is not None:
            offset = tl.load(offset_ptr + n, mask=inside, other=0.0)
            level = level - offset
        level = tl.div_rn(level, divisor)
        level = (level + ROUND) - ROUND  # past 2**22 it is not exact, nor need be: it is clipped
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + n, mask=inside, other=0.0)
            level = level + zero
        level = tl.minimum(tl.maximum(level, least), greatest)
        tl.store(q_ptr + j * N + n, level.to(tl.int8), mask=inside)
        if zero_ptr is not None:
            level = level - zero
        value = level * scale
        if offset_ptr is not None:
            value = value + offset
        row_ptr = factor_ptr + j * factor_stride
        error = tl.div_rn(column - value, tl.load(row_ptr + j) + tl.zeros_like(column))
        tl.store(error_ptr + j * N + n, error, mask=inside)
        following = tl.load(row_ptr + k, mask=(k > j) & (k < S), other=0.0)
        w = w - following[:, None] * error[None, :]


_launchers = Launchers(_round_columns_kernel)
