"""Triton kernels of the INT8 matmuls, and their launches; imported only where Triton is installed.

M rows of A, N columns of B, K their contraction.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qrecipes.quant.int8_tiles import GROUP_M, Tiles
from qrecipes.quant.triton_launch import Launcher


class Epilogue(NamedTuple):
    """What the sums are multiplied by and what is added: floating, of any strides, [1, 1] for a scalar."""

    row_scale: Tensor
    """[M, 1]"""
    col_scale: Tensor
    """[1, N]"""
    bias: Tensor | None
    """[N]"""


def launch_pointers(
    a_MK: Tensor, b_KN: Tensor, epilogue: Epilogue | None, out_MN: Tensor, tiles: Tiles
) -> None:
    """Fill the contiguous `out_MN` by the kernel that takes any strides; bare sums without an epilogue."""
    (M, K), N = a_MK.shape, b_KN.shape[1]
    _pointer_launcher(tiles, K % tiles.block_k != 0, epilogue is not None)(
        tiles.blocks(M, N),
        a_MK,
        b_KN,
        out_MN,
        M,
        N,
        K,
        *a_MK.stride(),
        *b_KN.stride(),
        *_epilogue_arguments(epilogue, out_MN),
    )


def launch_tma(
    a_MK: Tensor,
    b_KN: Tensor,
    epilogue: Epilogue | None,
    out_MN: Tensor,
    tiles: Tiles,
    num_processors: int,
) -> None:
    """The same by the kernel that reads blocks with TMA; both operands as `tma_can_read` wants them."""
    (M, K), N = a_MK.shape, b_KN.shape[1]
    blocks, persistent = tiles.blocks(M, N), tiles.per_processor * num_processors
    _tma_launcher(tiles, persistent, epilogue is not None)(
        min(blocks, persistent) if persistent else blocks,
        _descriptor(a_MK, (M, K), a_MK.stride(0), [tiles.block_m, tiles.block_k]),
        _descriptor(b_KN, (N, K), b_KN.stride(1), [tiles.block_n, tiles.block_k]),
        out_MN,
        M,
        N,
        K,
        *_epilogue_arguments(epilogue, out_MN),
    )


def launch_tile_scaled(a_MK: Tensor, b_KN: Tensor, a_scale: Tensor, b_scale: Tensor, out_MN: Tensor) -> None:
    """Fill the contiguous `out_MN` with the product of tile-scaled operands, see `tile_scaled_int8_mm`."""
    (M, K), N = a_MK.shape, b_KN.shape[1]
    block_m = 64
    _tile_scaled_launcher(block_m)(
        -(-M // block_m) * -(-N // 128),
        a_MK,
        b_KN,
        a_scale,
        b_scale,
        out_MN,
        M,
        N,
        K,
        *a_MK.stride(),
        *b_KN.stride(),
        *a_scale.stride(),
        *b_scale.stride(),
    )


@cache
def _pointer_launcher(tiles: Tiles, ragged_k: bool, scaled: bool) -> Launcher:
    constants = {"RAGGED_K": ragged_k, "SCALED": scaled, "GROUP_M": GROUP_M}
    return _launcher(_pointer_kernel, constants, tiles)


@cache
def _tma_launcher(tiles: Tiles, programs: int, scaled: bool) -> Launcher:
    return _launcher(_tma_kernel, {"SCALED": scaled, "PROGRAMS": programs, "GROUP_M": GROUP_M}, tiles)


@cache
def _tile_scaled_launcher(block_m: int) -> Launcher:
    constants = {"GROUP_M": GROUP_M, "BLOCK_M": block_m, "TILE": 128}
    return Launcher(_tile_scaled_kernel, constants, num_stages=3, num_warps=8, enable_fp_fusion=False)


def _launcher(kernel: Any, constants: dict[str, Any], tiles: Tiles) -> Launcher:
    return Launcher(
        kernel,
        constants | {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k},
        num_stages=tiles.num_stages,
        num_warps=tiles.num_warps,
        enable_fp_fusion=False,  # scaling and bias round separately, as in the reference
    )


def tma_can_read(matrix: Tensor, rows_dim: int) -> bool:
    """Whether rows, counted by `rows_dim`, are contiguous and start at multiples of 16 bytes for TMA."""
    strides = matrix.stride()
    row_stride = strides[rows_dim]
    contiguous = strides[1 - rows_dim] == 1
    return contiguous and row_stride > 0 and row_stride % 16 == 0 and matrix.data_ptr() % 16 == 0


def _descriptor(
    base: Tensor, shape: tuple[int, int], row_stride: int, block_shape: list[int]
) -> TensorDescriptor:
    """A TensorDescriptor without its checks, which `tma_can_read` made, in half the time."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.base = base
    descriptor.shape = shape
    descriptor.strides = (row_stride, 1)
    descriptor.block_shape = block_shape
    return descriptor


def _epilogue_arguments(
    epilogue: Epilogue | None, unused: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, int, int, int]:
    """Row scales, column scales, bias and the stride of each; a scalar has stride 0."""
    if epilogue is None:
        return unused, unused, None, 0, 0, 0
    row, col, bias = epilogue
    row_stride = row.stride(0) if row.shape[0] > 1 else 0
    col_stride = col.stride(1) if col.shape[1] > 1 else 0
    return row, col, bias, row_stride, col_stride, 0 if bias is None else bias.stride(0)


@triton.jit
def _block_of(tile, M, N, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and column of a block: down GROUP_M rows of blocks, then right."""
    blocks_of_M = tl.cdiv(M, BLOCK_M)
    blocks_of_N = tl.cdiv(N, BLOCK_N)
    first_block_m = tile // (GROUP_M * blocks_of_N) * GROUP_M
    height = tl.minimum(blocks_of_M - first_block_m, GROUP_M)
    in_group = tile % (GROUP_M * blocks_of_N)
    return first_block_m + in_group % height, in_group // height


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    acc,
    rows,
    cols,
    out_ptr,
    M,
    N,
    row_ptr,
    col_ptr,
    bias_ptr,
    row_stride,
    col_stride,
    bias_stride,
    SCALED: tl.constexpr,
):
    """Scale a block of sums, add the bias, round once to the output's type and store what is inside."""
    out_ptrs = out_ptr + rows[:, None].to(tl.int64) * N + cols[None, :]
    stored = (rows < M)[:, None] & (cols < N)[None, :]
    if SCALED:
        row_scale = tl.load(row_ptr + rows.to(tl.int64) * row_stride, mask=rows < M, other=0.0)
        col_scale = tl.load(col_ptr + cols.to(tl.int64) * col_stride, mask=cols < N, other=0.0)
        scaled = acc.to(tl.float32) * row_scale.to(tl.float32)[:, None] * col_scale.to(tl.float32)[None, :]
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + cols.to(tl.int64) * bias_stride, mask=cols < N, other=0.0)
            scaled = scaled + bias.to(tl.float32)[None, :]
        tl.store(out_ptrs, scaled.to(out_ptr.dtype.element_ty), mask=stored)
    else:
        tl.store(out_ptrs, acc, mask=stored)


@triton.jit
def _pointer_kernel(  # type: ignore[no-untyped-def]
    a_ptr,
    b_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    row_ptr,
    col_ptr,
    bias_ptr,
    row_stride,
    col_stride,
    bias_stride,
    RAGGED_K: tl.constexpr,
    SCALED: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One block of the contiguous output."""
    block_m, block_n = _block_of(tl.program_id(0), M, N, GROUP_M, BLOCK_M, BLOCK_N)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)

    # Rows and columns past the end wrap around: they are read from inside the operand, and never stored.
    # Offsets are 64 bits wide, since an operand may have more than 2**31 elements.
    a_rows = (rows % M).to(tl.int64) * stride_am
    b_cols = (cols % N).to(tl.int64) * stride_bn
    a_ptrs = a_ptr + a_rows[:, None] + depth[None, :].to(tl.int64) * stride_ak
    b_ptrs = b_ptr + depth[:, None].to(tl.int64) * stride_bk + b_cols[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for _ in range(K // BLOCK_K):
        acc = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), acc, out_dtype=tl.int32)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    if RAGGED_K:
        inside = depth < K % BLOCK_K
        a = tl.load(a_ptrs, mask=inside[None, :], other=0)
        b = tl.load(b_ptrs, mask=inside[:, None], other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    _store(
        acc,
        rows,
        cols,
        out_ptr,
        M,
        N,
        row_ptr,
        col_ptr,
        bias_ptr,
        row_stride,
        col_stride,
        bias_stride,
        SCALED,
    )


@triton.jit
def _tma_kernel(  # type: ignore[no-untyped-def]
    a_desc,
    b_desc,
    out_ptr,
    M,
    N,
    K,
    row_ptr,
    col_ptr,
    bias_ptr,
    row_stride,
    col_stride,
    bias_stride,
    SCALED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One block of the contiguous output or, persistent, every PROGRAMS-th; TMA reads zeros outside."""
    if PROGRAMS > 0:
        blocks = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), blocks, PROGRAMS, flatten=True):
            block_m, block_n = _block_of(tile, M, N, GROUP_M, BLOCK_M, BLOCK_N)
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
            for block_k in range(tl.cdiv(K, BLOCK_K)):
                a = a_desc.load([block_m * BLOCK_M, block_k * BLOCK_K])
                b = b_desc.load([block_n * BLOCK_N, block_k * BLOCK_K])
                acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
            rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
            cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
            _store(
                acc,
                rows,
                cols,
                out_ptr,
                M,
                N,
                row_ptr,
                col_ptr,
                bias_ptr,
                row_stride,
                col_stride,
                bias_stride,
                SCALED,
            )
    else:
        block_m, block_n = _block_of(tl.program_id(0), M, N, GROUP_M, BLOCK_M, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        for block_k in range(tl.cdiv(K, BLOCK_K)):
            a = a_desc.load([block_m * BLOCK_M, block_k * BLOCK_K])
            b = b_desc.load([block_n * BLOCK_N, block_k * BLOCK_K])
            acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
        rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        _store(
            acc,
            rows,
            cols,
            out_ptr,
            M,
            N,
            row_ptr,
            col_ptr,
            bias_ptr,
            row_stride,
            col_stride,
            bias_stride,
            SCALED,
        )


@triton.jit
def _tile_scaled_kernel(  # type: ignore[no-untyped-def]
    a_ptr,
    b_ptr,
    a_scale_ptr,
    b_scale_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_sam,
    stride_sak,
    stride_sbk,
    stride_sbn,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
):
    """One block of the output, TILE columns wide: exact sums of TILE products, scaled, summed in float32."""
    block_m, block_n = _block_of(tl.program_id(0), M, N, GROUP_M, BLOCK_M, TILE)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = block_n * TILE + tl.arange(0, TILE)
    depth = tl.arange(0, TILE)
    a_ptrs = a_ptr + (rows % M).to(tl.int64)[:, None] * stride_am + depth[None, :].to(tl.int64) * stride_ak
    b_ptrs = b_ptr + depth[:, None].to(tl.int64) * stride_bk + (cols % N).to(tl.int64)[None, :] * stride_bn
    a_scale_ptrs = a_scale_ptr + (rows % M).to(tl.int64) * stride_sam
    b_scale_ptr += block_n.to(tl.int64) * stride_sbn
    acc = tl.zeros((BLOCK_M, TILE), dtype=tl.float32)
    for tile_k in range(tl.cdiv(K, TILE)):
        inside = tile_k * TILE + depth < K
        a = tl.load(a_ptrs, mask=inside[None, :], other=0)
        b = tl.load(b_ptrs, mask=inside[:, None], other=0)
        sums = tl.dot(a, b, out_dtype=tl.int32).to(tl.float32)
        scale = tl.load(a_scale_ptrs).to(tl.float32) * tl.load(b_scale_ptr).to(tl.float32)
        acc += sums * scale[:, None]
        a_ptrs += TILE * stride_ak
        b_ptrs += TILE * stride_bk
        a_scale_ptrs += stride_sak
        b_scale_ptr += stride_sbk
    out_ptrs = out_ptr + rows[:, None].to(tl.int64) * N + cols[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])
