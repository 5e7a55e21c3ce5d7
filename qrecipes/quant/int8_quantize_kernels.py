"""Triton kernels that quantize a matrix to INT8, and their launches; imported only where Triton is installed.

M rows, K columns. Absolute values are compared as the bits of float32, which order as the numbers do and put
NaN on top, so that no maximum loses one.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from qrecipes.quant.triton_launch import Launcher

LONGEST_ROW = 16_384
"""Longest row that a program holds in registers; a longer one is read twice."""
BLOCK_M, BLOCK_K = 128, 64
"""Rows and columns of the blocks that are transposed."""
LAG_PER_PROCESSOR = 4
"""Blocks for each processor that are looked at before the first is quantized: enough for the maxima of a
column to be complete when they are wanted, and few enough for a block still to be in the L2 cache."""
ROUND = tl.constexpr(12_582_912.0)  # 1.5 * 2**23: adding it leaves no bit for a fraction, half goes to even
PHILOX_ROUNDS = tl.constexpr(7)  # the fewest that pass BigCrush (Salmon et al. 2011)
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


def launch_rows(x_MK: Tensor, q_MK: Tensor, scale_M1: Tensor, seed: Tensor | None) -> None:
    """Fill `q_MK` and `scale_M1`."""
    M, K = x_MK.shape
    block = min(LONGEST_ROW, max(16, 1 << (K - 1).bit_length()))
    _rows_launcher(block, block >= K)(M, x_MK, q_MK, scale_M1, seed, K, x_MK.stride(0), q_MK.stride(0))


def launch_columns(
    x_MK: Tensor, words_Km: Tensor, scale_K1: Tensor, seed: Tensor | None, num_processors: int
) -> None:
    """Fill `words_Km`, the transpose with four rows of `x_MK` packed in an int32, and `scale_K1`."""
    M, K = x_MK.shape
    blocks_of_M, strips = -(-M // BLOCK_M), -(-K // BLOCK_K)
    lag = max(blocks_of_M, min(LAG_PER_PROCESSOR * num_processors, blocks_of_M * strips))
    _columns_launcher()(
        blocks_of_M * strips + lag,
        x_MK,
        words_Km,
        scale_K1,
        x_MK.new_zeros(K + strips + 1, dtype=torch.int32),
        seed,
        M,
        K,
        lag,
        x_MK.stride(0),
        words_Km.stride(0),
    )


@cache
def _rows_launcher(block: int, whole: bool) -> Launcher:
    num_warps = 4 if block <= 2048 else 8 if block <= 8192 else 16
    constants = {"WHOLE": whole, "BLOCK": block}
    return Launcher(_rows_kernel, constants, num_warps=num_warps, enable_fp_fusion=False)


@cache
def _columns_launcher() -> Launcher:
    constants = {"BLOCK_M": BLOCK_M, "BLOCK_K": BLOCK_K}
    return Launcher(_columns_kernel, constants, num_warps=2, enable_fp_fusion=False)


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
def _divide(x, divisor):  # type: ignore[no-untyped-def]
    """x / divisor, rounded to nearest, where the quotient is 0 or from 2**-20 to 2**20; divisor > 0.

    A product with the reciprocal, corrected once (Markstein 1990, theorem 1): a third of the time of div_rn.
    Both are made large first where the remainder could underflow.
    """
    if INTERPRETED:  # whose fma rounds twice
        return tl.div_rn(x, divisor)
    else:  # noqa: RET505 - Triton compiles one branch only if the other is in an else
        larger = tl.where(divisor < 8.673617379884035e-19, 18446744073709551616.0, 1.0)  # 2**-60, 2**64
        divisor = divisor * larger
        x = x * larger
        reciprocal = tl.div_rn(1.0, divisor)
        quotient = x * reciprocal
        return tl.fma(tl.fma(-divisor, quotient, x), reciprocal, quotient)


@triton.jit
def _quantize(x, scale, uniform):  # type: ignore[no-untyped-def]
    """INT8 of x / scale, to nearest or, given uniform numbers, stochastically; 0 for a scale of 0 or NaN."""
    usable = (scale > 0) & (scale < float("inf"))
    grid = _divide(x, tl.where(usable, scale, 1.0))
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
    else:  # noqa: RET505 - as above
        a, b, c, d = _philox(seed_ptr, row, first_col // 4 + tl.arange(0, BLOCK // 4), 0)
        words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK,))
        return _quantize(x, scale, _uniform(words))


@triton.jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr, q_ptr, scale_ptr, seed_ptr, K, stride_xm, stride_qm, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):
    """One row."""
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    x_row = x_ptr + tl.cast(row, tl.int64) * stride_xm
    q_row = q_ptr + tl.cast(row, tl.int64) * stride_qm
    if WHOLE:
        x = tl.load(x_row + cols, mask=cols < K, other=0.0).to(tl.float32)
        scale = _scale_of(tl.max(_magnitude_bits(x), 0))
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


@triton.jit
def _columns_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    words_ptr,
    scale_ptr,
    work_ptr,
    seed_ptr,
    M,
    K,
    LAG,
    stride_xm,
    stride_words,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Maxima of the columns of one block, then the quantization of the block LAG before it.

    `work`, zeros at first, holds the bits of the columns' maxima, for each strip of columns the number of
    blocks that are in them, and the number of programs that have started. Blocks are counted down a strip,
    then right, and programs number themselves as they start. So the blocks of the strip that a program waits
    for belong to programs that run already and wait for nothing before they are done with them: whatever the
    device runs when, the wait ends. By then the second block is in the L2 cache, if it fits, and memory was
    read once.

    Four rows are loaded apart and packed into words, as words are transposed without bank conflicts.
    """
    blocks_of_M = tl.cdiv(M, BLOCK_M)
    strips = tl.cdiv(K, BLOCK_K)
    number = tl.atomic_add(work_ptr + K + strips, 1, sem="relaxed")
    older = tl.maximum(number - LAG, 0)
    older_row = older % blocks_of_M * BLOCK_M
    older_cols = older // blocks_of_M * BLOCK_K + tl.arange(0, BLOCK_K)
    rows_to_load = tl.where(number >= LAG, M, 0)  # at once, before anything waits
    x0 = _load_part(x_ptr, older_row, older_cols, rows_to_load, K, stride_xm, "evict_first", BLOCK_M)
    x1 = _load_part(x_ptr, older_row + 1, older_cols, rows_to_load, K, stride_xm, "evict_first", BLOCK_M)
    x2 = _load_part(x_ptr, older_row + 2, older_cols, rows_to_load, K, stride_xm, "evict_first", BLOCK_M)
    x3 = _load_part(x_ptr, older_row + 3, older_cols, rows_to_load, K, stride_xm, "evict_first", BLOCK_M)
    if number < strips * blocks_of_M:
        first_row = number % blocks_of_M * BLOCK_M
        cols = number // blocks_of_M * BLOCK_K + tl.arange(0, BLOCK_K)
        bits = tl.zeros((BLOCK_M // 4, BLOCK_K), dtype=tl.int32)
        for part in tl.static_range(4):
            x = _load_part(x_ptr, first_row + part, cols, M, K, stride_xm, "evict_last", BLOCK_M)
            bits = tl.maximum(bits, _magnitude_bits(x.to(tl.float32)))
        tl.atomic_max(work_ptr + cols, tl.max(bits, 0), mask=cols < K, sem="relaxed")
        tl.debug_barrier()  # all of the block's maxima before its count
        tl.atomic_add(work_ptr + K + number // blocks_of_M, 1, sem="release")
    if number >= LAG:
        done_ptr = work_ptr + K + older // blocks_of_M
        done = tl.atomic_add(done_ptr, 0, sem="acquire")
        while done < blocks_of_M:
            done = tl.atomic_add(done_ptr, 0, sem="acquire")
        tl.debug_barrier()
        scale = _scale_of(tl.load(work_ptr + older_cols, mask=older_cols < K, other=0, volatile=True))
        words = _byte_of_part(x0, scale, seed_ptr, older_row, older_cols, BLOCK_M, BLOCK_K)
        words |= _byte_of_part(x1, scale, seed_ptr, older_row + 1, older_cols, BLOCK_M, BLOCK_K) << 8
        words |= _byte_of_part(x2, scale, seed_ptr, older_row + 2, older_cols, BLOCK_M, BLOCK_K) << 16
        words |= _byte_of_part(x3, scale, seed_ptr, older_row + 3, older_cols, BLOCK_M, BLOCK_K) << 24
        down = older_row // 4 + tl.arange(0, BLOCK_M // 4)
        words_ptrs = words_ptr + older_cols[:, None].to(tl.int64) * stride_words + down[None, :]
        tl.store(words_ptrs, tl.trans(words), mask=(older_cols < K)[:, None] & (down * 4 < M)[None, :])
        if older_row == 0:
            tl.store(scale_ptr + older_cols, scale, mask=older_cols < K)


@triton.jit
def _load_part(  # type: ignore[no-untyped-def]
    x_ptr, first_row, cols, M, K, stride_xm, eviction: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Every fourth row of a block; zeros outside the matrix."""
    rows = first_row + tl.arange(0, BLOCK_M // 4) * 4
    ptrs = x_ptr + rows[:, None].to(tl.int64) * stride_xm + cols[None, :]
    inside = (rows < M)[:, None] & (cols < K)[None, :]
    return tl.load(ptrs, mask=inside, other=0.0, eviction_policy=eviction)


@triton.jit
def _byte_of_part(  # type: ignore[no-untyped-def]
    x, scale, seed_ptr, first_row, cols, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """INT8 of every fourth row, in the lowest byte of a word; as `_quantize`, in fewer instructions."""
    usable = (scale > 0) & (scale < float("inf"))
    grid = _divide(x.to(tl.float32), tl.where(usable, scale, 1.0)[None, :])
    if seed_ptr is not None:
        rows = first_row + tl.arange(0, BLOCK_M // 4) * 4
        quad = tl.min(cols, 0) // 4 + tl.arange(0, BLOCK_K // 4)
        a, b, c, d = _philox(seed_ptr, rows[:, None], quad[None, :], 1)
        noise = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK_M // 4, BLOCK_K))
        low = tl.floor(grid)
        grid = low + tl.where(_uniform(noise) < grid - low, 1.0, 0.0)
    grid = tl.minimum(tl.maximum(grid, -127.0), 127.0)
    byte = tl.where(usable, 255, 0)  # of the sum below, whose last bits are the integer's
    return (grid + ROUND).to(tl.int32, bitcast=True) & byte[None, :]
