"""Scaled INT8 matmul: an exact integer product times a scale a row and a scale a column.

M rows of A, N columns of B, K their contraction. Fastest where K is contiguous in both operands: A as [M, K],
B as the transpose of a contiguous [N, K].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

INT32_SAFE_K = 131_071
"""Longest contraction whose sum of INT8 products fits int32 whatever the values, -128 included."""
SPLIT_K = 65_536
"""Longer contractions are summed in parts of this length, and the parts in int64."""
FLOAT32_SAFE_K = 1_024
"""Longest contraction whose sum of INT8 products is exact in float32: 1024 * 128 * 128 = 2**24."""
HAS_TRITON = find_spec("triton") is not None


def scaled_int8_mm(
    a_MK: Tensor,
    b_KN: Tensor,
    row_scale_M1: Tensor,
    col_scale_1N: Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`(a @ b) * row_scale * col_scale`, [M, N]: the sum exact in integers, the scaling in float32.

    Takes every M, N and K, 0 included, and any strides. On CUDA a Triton kernel computes it; every path is
    bit-equal to `scaled_int8_mm_reference`. `torch.compile` sees one operator.

    Raises:
        ValueError: if a type, a shape or a device does not fit.
    """
    _check("scaled_int8_mm", a_MK, b_KN, row_scale_M1, col_scale_1N, out_dtype)
    return _scaled_int8_mm(a_MK, b_KN, row_scale_M1, col_scale_1N, out_dtype)


def scaled_int8_mm_reference(
    a_MK: Tensor,
    b_KN: Tensor,
    row_scale_M1: Tensor,
    col_scale_1N: Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The same in plain PyTorch, slowly: float64 holds every sum of INT8 products exactly up to K = 2**39."""
    _check("scaled_int8_mm_reference", a_MK, b_KN, row_scale_M1, col_scale_1N, out_dtype)
    return _scale(a_MK.double() @ b_KN.double(), row_scale_M1, col_scale_1N, out_dtype)


def scaled_int8_mm_triton(
    a_MK: Tensor,
    b_KN: Tensor,
    row_scale_M1: Tensor,
    col_scale_1N: Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    tiles: Tiles | None = None,
) -> Tensor:
    """The same by the Triton kernel, with `tiles` or those that `choose_tiles` gives for the tensors' device.

    Takes tensors on the CPU under Triton's interpreter (TRITON_INTERPRET=1, set before this module is
    imported), which truncates to bfloat16 where a device rounds.

    Raises:
        ValueError: as `scaled_int8_mm`.
        RuntimeError: if Triton is not installed.
    """
    _check("scaled_int8_mm_triton", a_MK, b_KN, row_scale_M1, col_scale_1N, out_dtype)
    if tiles is None:
        tiles = choose_tiles(a_MK.shape[0], b_KN.shape[1], *_device_limits(a_MK.device))
    return _by_kernel(a_MK, b_KN, row_scale_M1, col_scale_1N, out_dtype, tiles)


@dataclass(frozen=True)
class Tiles:
    """How the kernel cuts the product up; block sizes are powers of two."""

    block_m: int
    block_n: int
    block_k: int
    num_stages: int
    """Blocks of K in flight."""
    num_warps: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the operands' blocks in flight."""
        return (self.block_m + self.block_n) * self.block_k * self.num_stages

    def blocks(self, M: int, N: int) -> int:
        """Number of blocks that cover [M, N]."""
        return -(-M // self.block_m) * -(-N // self.block_n)


# The first pair was the best of a search on H100; the rest serve smaller products and shared memories.
TILES = (
    (Tiles(128, 256, 128, 3, 8), Tiles(256, 128, 128, 3, 8)),
    (Tiles(128, 256, 64, 4, 8), Tiles(256, 128, 64, 4, 8)),
    (Tiles(128, 128, 128, 4, 8),),
    (Tiles(128, 128, 64, 4, 8),),
    (Tiles(64, 128, 128, 4, 4), Tiles(128, 64, 128, 4, 4)),
    (Tiles(64, 128, 64, 4, 4), Tiles(128, 64, 64, 4, 4)),
    (Tiles(64, 64, 64, 4, 4),),
)
GROUP_M = 8
"""Rows of blocks that are worked through together, so that their blocks of B stay in the L2 cache."""


def choose_tiles(M: int, N: int, shared_bytes: int, num_processors: int) -> Tiles:
    """The largest tiles that fit `shared_bytes` and give three quarters of the processors a block.

    A fixed rule rather than a search: nothing is tuned at run time, whatever the number of shapes. Of a wide
    and a tall tile of one size, the one that needs fewer blocks is taken.
    """
    for alternatives in TILES:
        tiles = min(alternatives, key=lambda t: t.blocks(M, N))
        if tiles.shared_bytes <= shared_bytes and 4 * tiles.blocks(M, N) >= 3 * num_processors:
            return tiles
    return TILES[-1][0]


@cache
def _device_limits(device: torch.device) -> tuple[int, int]:
    """Bytes of shared memory a block can have, and number of processors."""
    if device.type != "cuda":  # the interpreter
        return TILES[-1][0].shared_bytes, 1
    _require_triton()
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return properties["max_shared_mem"], properties["multiprocessor_count"]


def _require_triton() -> None:
    if not HAS_TRITON:
        raise RuntimeError(
            "scaled_int8_mm: Triton is not installed, and the CUDA kernel is written in it; "
            "install the triton package that this torch names, or train on the CPU"
        )


def _check(
    where: str, a_MK: Tensor, b_KN: Tensor, row_scale_M1: Tensor, col_scale_1N: Tensor, out_dtype: torch.dtype
) -> None:
    for name, t in (("a_MK", a_MK), ("b_KN", b_KN)):
        if t.dtype is not torch.int8 or t.ndim != 2:
            raise ValueError(
                f"{where}.{name}: {t.dtype} of shape {tuple(t.shape)}, where an int8 matrix is needed; "
                "quantize it with quantize_int8 and flatten leading dimensions"
            )
    (M, K), (K_of_b, N) = a_MK.shape, b_KN.shape
    if K_of_b != K:
        raise ValueError(
            f"{where}.b_KN: {K_of_b} rows, where a_MK has {K} columns and both are summed over; transpose one"
        )
    for name, t, shape in (("row_scale_M1", row_scale_M1, (M, 1)), ("col_scale_1N", col_scale_1N, (1, N))):
        if tuple(t.shape) != shape or not t.is_floating_point():
            raise ValueError(
                f"{where}.{name}: {t.dtype} of shape {tuple(t.shape)}, where floating scales of shape "
                f"{shape} are needed; reshape or convert them"
            )
    for name, t in (("b_KN", b_KN), ("row_scale_M1", row_scale_M1), ("col_scale_1N", col_scale_1N)):
        if t.device != a_MK.device:
            raise ValueError(f"{where}.{name}: on {t.device}, but a_MK is on {a_MK.device}; move it there")
    if not out_dtype.is_floating_point:
        raise ValueError(f"{where}.out_dtype: {out_dtype} cannot hold scaled sums; use a floating type")


def _scale(sum_MN: Tensor, row_scale_M1: Tensor, col_scale_1N: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The epilogue that the reference, the CPU path and the kernel share, step for step."""
    return (sum_MN.float() * row_scale_M1.float() * col_scale_1N.float()).to(out_dtype)


@torch.library.custom_op("qrecipes::scaled_int8_mm", mutates_args=())
def _scaled_int8_mm(
    a_MK: Tensor, b_KN: Tensor, row_scale_M1: Tensor, col_scale_1N: Tensor, out_dtype: torch.dtype
) -> Tensor:
    if a_MK.is_cuda:
        tiles = choose_tiles(a_MK.shape[0], b_KN.shape[1], *_device_limits(a_MK.device))
        return _by_kernel(a_MK, b_KN, row_scale_M1, col_scale_1N, out_dtype, tiles)
    fits = a_MK.shape[1] <= INT32_SAFE_K
    sum_MN = _int32_mm(a_MK, b_KN) if fits else _sum_of_parts(a_MK, b_KN, _int32_mm)
    return _scale(sum_MN, row_scale_M1, col_scale_1N, out_dtype)


@_scaled_int8_mm.register_fake
def _(
    a_MK: Tensor, b_KN: Tensor, row_scale_M1: Tensor, col_scale_1N: Tensor, out_dtype: torch.dtype
) -> Tensor:
    return a_MK.new_empty(a_MK.shape[0], b_KN.shape[1], dtype=out_dtype)


def _sum_of_parts(a_MK: Tensor, b_KN: Tensor, int32_mm: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Exact product in int64 of operands whose K is too long for int32."""
    sum_MN = a_MK.new_zeros(a_MK.shape[0], b_KN.shape[1], dtype=torch.int64)
    for a_Mk, b_kN in zip(a_MK.split(SPLIT_K, 1), b_KN.split(SPLIT_K, 0), strict=True):
        sum_MN += int32_mm(a_Mk, b_kN)
    return sum_MN


def _int32_mm(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Exact product in int32 without Triton, for K up to INT32_SAFE_K."""
    # torch._int_mm reads wrong elements where a size of 1 leaves the order of the strides open, and where a
    # stride is 0 (torch 2.14.1); without VNNI instructions it may saturate inside a sum
    if min(a_MK.shape[0], *b_KN.shape) > 1 and a_MK.device.type == "cpu" and torch.cpu._is_vnni_supported():
        return torch._int_mm(_dense(a_MK), _dense(b_KN))
    sum_MN = a_MK.new_zeros(a_MK.shape[0], b_KN.shape[1], dtype=torch.int32)
    for a_Mk, b_kN in zip(a_MK.split(FLOAT32_SAFE_K, 1), b_KN.split(FLOAT32_SAFE_K, 0), strict=True):
        sum_MN += (a_Mk.float() @ b_kN.float()).to(torch.int32)
    return sum_MN


def _dense(matrix: Tensor) -> Tensor:
    return matrix if matrix.t().is_contiguous() else matrix.contiguous()


def _by_kernel(
    a_MK: Tensor,
    b_KN: Tensor,
    row_scale_M1: Tensor,
    col_scale_1N: Tensor,
    out_dtype: torch.dtype,
    tiles: Tiles,
) -> Tensor:
    if a_MK.shape[1] <= INT32_SAFE_K:
        scales = (row_scale_M1.float().contiguous(), col_scale_1N.float().contiguous())
        return _launch(a_MK, b_KN, scales, out_dtype, tiles)
    sum_MN = _sum_of_parts(a_MK, b_KN, lambda a, b: _launch(a, b, None, torch.int32, tiles))
    return _scale(sum_MN, row_scale_M1, col_scale_1N, out_dtype)


def _launch(
    a_MK: Tensor, b_KN: Tensor, scales: tuple[Tensor, Tensor] | None, out_dtype: torch.dtype, tiles: Tiles
) -> Tensor:
    """Run the kernel: scaled into `out_dtype`, or the sums alone in int32 where `scales` is None."""
    _require_triton()
    (M, K), N = a_MK.shape, b_KN.shape[1]
    out_MN = a_MK.new_empty(M, N, dtype=out_dtype)
    if out_MN.numel() == 0:
        return out_MN
    row_scale, col_scale = scales if scales is not None else (out_MN, out_MN)  # not read where there are none
    with torch.cuda.device_of(a_MK):  # Triton launches on the current device
        _kernel[(tiles.blocks(M, N),)](
            a_MK,
            b_KN,
            row_scale,
            col_scale,
            out_MN,
            M,
            N,
            K,
            *a_MK.stride(),
            *b_KN.stride(),
            SCALED=scales is not None,
            RAGGED_K=K % tiles.block_k != 0,
            GROUP_M=GROUP_M,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            num_stages=tiles.num_stages,
            num_warps=tiles.num_warps,
        )
    return out_MN


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _kernel(  # type: ignore[no-untyped-def]
        a_ptr,
        b_ptr,
        row_scale_ptr,
        col_scale_ptr,
        out_ptr,
        M,
        N,
        K,
        stride_am,
        stride_ak,
        stride_bk,
        stride_bn,
        SCALED: tl.constexpr,
        RAGGED_K: tl.constexpr,
        GROUP_M: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        """One block of the contiguous output. Programs go down GROUP_M rows of blocks, then right."""
        pid = tl.program_id(0)
        blocks_of_M = tl.cdiv(M, BLOCK_M)
        blocks_of_N = tl.cdiv(N, BLOCK_N)
        group = pid // (GROUP_M * blocks_of_N)
        first_block_m = group * GROUP_M
        height = tl.minimum(blocks_of_M - first_block_m, GROUP_M)
        in_group = pid % (GROUP_M * blocks_of_N)
        rows = (first_block_m + in_group % height) * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = (in_group // height) * BLOCK_N + tl.arange(0, BLOCK_N)
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

        out_ptrs = out_ptr + rows[:, None].to(tl.int64) * N + cols[None, :]
        stored = (rows < M)[:, None] & (cols < N)[None, :]
        if SCALED:
            row_scale = tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)
            col_scale = tl.load(col_scale_ptr + cols, mask=cols < N, other=0.0)
            scaled = acc.to(tl.float32) * row_scale[:, None] * col_scale[None, :]
            tl.store(out_ptrs, scaled.to(out_ptr.dtype.element_ty), mask=stored)
        else:
            tl.store(out_ptrs, acc, mask=stored)
