"""Triton kernels that quantize a matrix to INT8, and their launches; imported only where Triton is installed.

M rows, K columns. Absolute values are compared as the bits of float32, which order as the numbers do and put
NaN on top, so that no maximum loses one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LONGEST_ROW = 16_384
"""Longest row that a program holds in registers; a longer one is read twice."""
PROGRAMS_PER_PROCESSOR = 4
"""Programs that share the rows where each also collects the maxima of columns."""
COLUMN_BLOCK = 128
"""Width and height of the blocks that are transposed."""
ROUND = tl.constexpr(12_582_912.0)  # 1.5 * 2**23: adding it leaves no bit for a fraction, half goes to even
PHILOX_ROUNDS = tl.constexpr(7)  # the fewest that pass BigCrush (Salmon et al. 2011)


def launch_rows(
    x_MK: Tensor,
    q_MK: Tensor,
    scale_M1: Tensor,
    column_bits_K: Tensor | None,
    seed: Tensor | None,
    processors: int,
) -> None:
    """Fill `q_MK` and `scale_M1`; raise `column_bits_K` to the absmax of columns, for K up to LONGEST_ROW."""
    M, K = x_MK.shape
    block = min(LONGEST_ROW, max(16, 1 << (K - 1).bit_length()))
    rows_of_program = 1 if column_bits_K is None else -(-M // (PROGRAMS_PER_PROCESSOR * processors))
    _rows_kernel[(-(-M // rows_of_program),)](
        x_MK,
        q_MK,
        scale_M1,
        column_bits_K,
        seed,
        M,
        K,
        x_MK.stride(0),
        q_MK.stride(0),
        rows_of_program,
        WHOLE=block >= K,
        BLOCK=block,
        num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16,
        enable_fp_fusion=False,
    )


def launch_column_absmax(x_MK: Tensor, column_bits_K: Tensor) -> None:
    """Raise `column_bits_K`, zeros at first, to the bits of the absmax of each column."""
    M, K = x_MK.shape
    rows_of_program = 512
    grid = (-(-M // rows_of_program), -(-K // COLUMN_BLOCK))
    _column_absmax_kernel[grid](
        x_MK,
        column_bits_K,
        M,
        K,
        x_MK.stride(0),
        rows_of_program,
        BLOCK_M=32,
        BLOCK_K=COLUMN_BLOCK,
        num_warps=4,
    )


def launch_columns(
    x_MK: Tensor, q_KM: Tensor, scale_K1: Tensor, column_bits_K: Tensor, seed: Tensor | None
) -> None:
    """Fill `q_KM`, transposed, and `scale_K1`, from the absmax in `column_bits_K`."""
    M, K = x_MK.shape
    _columns_kernel[(-(-M // COLUMN_BLOCK), -(-K // COLUMN_BLOCK))](
        x_MK,
        q_KM,
        scale_K1,
        column_bits_K,
        seed,
        M,
        K,
        x_MK.stride(0),
        q_KM.stride(0),
        BLOCK=COLUMN_BLOCK,
        num_warps=8,
        enable_fp_fusion=False,
    )


@triton.jit
def _magnitude_bits(x):  # type: ignore[no-untyped-def]
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_of(absmax_bits):  # type: ignore[no-untyped-def]
    return tl.div_rn(absmax_bits.to(tl.float32, bitcast=True), 127.0)


@triton.jit
def _philox(seed_ptr, row, quad, stream):  # type: ignore[no-untyped-def]
    """Four random words for each element of `quad` in a row: no counter occurs twice under a seed."""
    column = quad + row * 0
    return tl.philox(
        tl.load(seed_ptr), column, row + column * 0, column * 0 + stream, column * 0, PHILOX_ROUNDS
    )


@triton.jit
def _uniform(words):  # type: ignore[no-untyped-def]
    """[0, 1) in steps of 2**-24, all of which float32 has."""
    return (words >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _quantize(x, scale, uniform):  # type: ignore[no-untyped-def]
    """INT8 of x / scale, to nearest or, given uniform numbers, stochastically; 0 for a scale of 0 or NaN."""
    usable = (scale > 0) & (scale < float("inf"))
    grid = tl.div_rn(x, tl.where(usable, scale, 1.0))
    if uniform is None:
        rounded = (grid + ROUND) - ROUND
    else:
        low = tl.floor(grid)
        rounded = low + tl.where(uniform < grid - low, 1.0, 0.0)
    rounded = tl.where(usable, rounded, 0.0)
    return tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int8)


@triton.jit
def _quantize_row(x, scale, seed_ptr, row, first_col, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    if seed_ptr is None:
        return _quantize(x, scale, None)
    else:  # noqa: RET505 - Triton compiles one branch only if the other is in an else
        a, b, c, d = _philox(seed_ptr, row, first_col // 4 + tl.arange(0, BLOCK // 4), 0)
        words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK,))
        return _quantize(x, scale, _uniform(words))


@triton.jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    q_ptr,
    scale_ptr,
    column_bits_ptr,
    seed_ptr,
    M,
    K,
    stride_xm,
    stride_qm,
    rows_of_program,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some rows, one after the other, with the maxima of columns collected on the way."""
    cols = tl.arange(0, BLOCK)
    if column_bits_ptr is not None:
        column_bits = tl.zeros((BLOCK,), dtype=tl.int32)
    first_row = tl.program_id(0) * rows_of_program
    for row in range(first_row, tl.minimum(first_row + rows_of_program, M)):
        x_row = x_ptr + tl.cast(row, tl.int64) * stride_xm
        q_row = q_ptr + tl.cast(row, tl.int64) * stride_qm
        if WHOLE:
            x = tl.load(x_row + cols, mask=cols < K, other=0.0).to(tl.float32)
            bits = _magnitude_bits(x)
            if column_bits_ptr is not None:
                column_bits = tl.maximum(column_bits, bits)
            scale = _scale_of(tl.max(bits, 0))
            tl.store(q_row + cols, _quantize_row(x, scale, seed_ptr, row, 0, BLOCK), mask=cols < K)
        else:
            bits = tl.zeros((BLOCK,), dtype=tl.int32)
            for first_col in range(0, K, BLOCK):
                x = tl.load(x_row + first_col + cols, mask=first_col + cols < K, other=0.0).to(tl.float32)
                bits = tl.maximum(bits, _magnitude_bits(x))
            scale = _scale_of(tl.max(bits, 0))
            for first_col in range(0, K, BLOCK):
                inside = first_col + cols < K
                x = tl.load(x_row + first_col + cols, mask=inside, other=0.0).to(tl.float32)
                q = _quantize_row(x, scale, seed_ptr, row, first_col, BLOCK)
                tl.store(q_row + first_col + cols, q, mask=inside)
        tl.store(scale_ptr + row, scale)
    if column_bits_ptr is not None:
        tl.atomic_max(column_bits_ptr + cols, column_bits, mask=cols < K, sem="relaxed")


@triton.jit
def _column_absmax_kernel(  # type: ignore[no-untyped-def]
    x_ptr, column_bits_ptr, M, K, stride_xm, rows_of_program, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Some rows of a block of columns."""
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    first_row = tl.program_id(0) * rows_of_program
    bits = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.int32)
    for row in range(first_row, tl.minimum(first_row + rows_of_program, M), BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        inside = (rows < M)[:, None] & (cols < K)[None, :]
        x = tl.load(x_ptr + rows[:, None].to(tl.int64) * stride_xm + cols[None, :], mask=inside, other=0.0)
        bits = tl.maximum(bits, _magnitude_bits(x.to(tl.float32)))
    tl.atomic_max(column_bits_ptr + cols, tl.max(bits, 0), mask=cols < K, sem="relaxed")


@triton.jit
def _columns_kernel(  # type: ignore[no-untyped-def]
    x_ptr, q_ptr, scale_ptr, column_bits_ptr, seed_ptr, M, K, stride_xm, stride_qk, BLOCK: tl.constexpr
):
    """One square block, transposed after quantization, when it is one byte an element."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < M)[:, None] & (cols < K)[None, :]
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * stride_xm + cols[None, :], mask=inside, other=0.0)
    scale = _scale_of(tl.load(column_bits_ptr + cols, mask=cols < K, other=0))
    if seed_ptr is None:
        q = _quantize(x.to(tl.float32), scale[None, :], None)
    else:
        quad = tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        a, b, c, d = _philox(seed_ptr, rows[:, None], quad[None, :], 1)
        words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK, BLOCK))
        q = _quantize(x.to(tl.float32), scale[None, :], _uniform(words))
    q_ptrs = q_ptr + cols[:, None].to(tl.int64) * stride_qk + rows[None, :]
    tl.store(q_ptrs, tl.trans(q), mask=(cols < K)[:, None] & (rows < M)[None, :])
    if tl.program_id(0) == 0:
        tl.store(scale_ptr + cols, scale, mask=cols < K)
