"""The Triton kernel that dequantizes a low-bit weight and adds a low-rank product, and its launch; imported
only where Triton is installed.

N output features (rows), K input features, G groups of a row, R rank. Units as in `dequantize_kernels.py`,
whose functions it unpacks by. Weights and sums are rounded by themselves (`enable_fp_fusion=False`); tensor
cores add up B A in float32.
"""

# mypy: disable-error-code="assignment,has-type,var-annotated"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrecipes.quant.dequantize_kernels import StoredWeight, _load_scales, _load_words, _weights
from qrecipes.quant.dequantize_tiles import UNIT
from qrecipes.quant.low_rank_kernels import LEAST_BLOCK, RANK_BYTES, _add_dot
from qrecipes.quant.triton_launch import Launchers


class LowRankBlocks(NamedTuple):
    """How the kernel cuts up a weight; numbers are powers of two."""

    n: int
    """Rows of a tile."""
    k: int
    """Columns of a tile."""
    num_warps: int
    repeats: int = 1
    """Tiles that a program works on, one below the other."""
    num_stages: int = 2
    """Tiles that are loaded at once, at most."""


BLOCKS = LowRankBlocks(64, 64, 8, num_stages=1)
"""The best for NF4 at rank 64 on an H100 of those that tools/bench_dequantize.py --low-rank tries."""


def launch_dequantize_low_rank(
    weight: StoredWeight, a_RK: Tensor, b_NR: Tensor, scaling: float, out_NK: Tensor
) -> None:
    """Fill the contiguous `out_NK`, of 32 or 16 bits, the type of A and B, which are contiguous, too."""
    (N, K), R = out_NK.shape, a_RK.shape[0]
    blocks, constants = BLOCKS, low_rank_constants(weight, R, out_NK.dtype, BLOCKS)
    _low_rank_launchers(
        constants, num_warps=blocks.num_warps, num_stages=blocks.num_stages, enable_fp_fusion=False
    )(
        triton.cdiv(N, blocks.n * blocks.repeats) * triton.cdiv(K, constants["UNITS"] * UNIT),
        *weight.tensors,
        a_RK,
        b_NR,
        out_NK,
        N,
        K,
        R,
        weight.row_stride,
        weight.num_groups,
        scaling,
    )


def low_rank_constants(
    weight: StoredWeight, rank: int, dtype: torch.dtype, blocks: LowRankBlocks
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    most_block_r = RANK_BYTES // dtype.itemsize
    block_r = min(most_block_r, max(LEAST_BLOCK, triton.next_power_of_2(rank)))
    return {
        **weight.constants,
        "BLOCK_R": block_r,
        "RANK_BLOCKS": triton.cdiv(rank, block_r),
        "BLOCK_N": blocks.n,
        "UNITS": blocks.k // UNIT,
        "REPEATS": blocks.repeats,
        "NUM_STAGES": blocks.num_stages,
    }


@triton.jit
def _load_a(a_ptr, cols, ranks, K, R):  # type: ignore[no-untyped-def]
    inside = (ranks < R)[:, None] & (cols < K)[None, :]
    return tl.load(a_ptr + ranks.to(tl.int64)[:, None] * K + cols[None, :], mask=inside, other=0.0)


@triton.jit
def _dequantize_low_rank_kernel(  # type: ignore[no-untyped-def]
    packed_ptr,
    scale_ptr,
    extra_ptr,
    mean_ptr,
    a_ptr,
    b_ptr,
    out_ptr,
    N,
    K,
    R,
    row_stride,
    G,
    scaling,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr,
    REPEATS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """REPEATS tiles of BLOCK_N rows and UNITS units, one below the other.

    Blocks of the rank are unrolled: Triton 3.6 has been wrong about a product in a loop inside another.
    """
    tiles_of_row = tl.cdiv(K, UNITS * 8)
    units = (tl.program_id(0) % tiles_of_row * UNITS + tl.arange(0, UNITS))[None, :]
    cols = tl.program_id(0) % tiles_of_row * (UNITS * 8) + tl.arange(0, UNITS * 8)
    for repeat in tl.range(0, REPEATS, num_stages=NUM_STAGES):
        block = tl.program_id(0) // tiles_of_row * REPEATS + repeat
        rows = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        inside = (rows < N) & (units * 8 < K)
        words = _load_words(packed_ptr, rows, units, inside, row_stride, BITS, ALIGNED)
        factor, shift = _load_scales(
            scale_ptr, extra_ptr, mean_ptr, rows, units, inside, G, KIND, BITS, GROUP, SCALE_BLOCK
        )
        product = tl.zeros((BLOCK_N, UNITS * 8), dtype=tl.float32)
        for rank_block in tl.static_range(RANK_BLOCKS):
            ranks = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
            b = tl.load(b_ptr + rows * R + ranks[None, :], mask=(rows < N) & (ranks < R)[None, :], other=0.0)
            product = _add_dot(product, b, _load_a(a_ptr, cols, ranks, K, R))
        weights = _weights(words, factor, shift, KIND, BITS, BLOCK_N * UNITS)
        weights = tl.reshape(weights, (BLOCK_N, UNITS * 8)) + product * scaling
        stored = (rows < N) & (cols < K)[None, :]
        tl.store(out_ptr + rows * K + cols[None, :], weights.to(out_ptr.dtype.element_ty), mask=stored)


_low_rank_launchers = Launchers(_dequantize_low_rank_kernel)
