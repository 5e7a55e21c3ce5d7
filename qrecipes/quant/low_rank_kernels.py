"""Triton kernels of weights with a low-rank correction inside their rounding, and their launches; imported
only where Triton is installed.

N output features (rows), K input features, G groups of a row, R rank. All kernels cut a weight into the
same tiles, of BLOCK_N rows and of columns of one group, and form Z there by the same instructions, so that
they round the same bits. What is summed over several tiles is written in parts, which torch adds up in
their order: there are no atomics, and results repeat bit for bit. Products and sums are rounded by
themselves (`enable_fp_fusion=False`); tensor cores add up A B in float32.
"""

# mypy: disable-error-code="assignment,has-type,var-annotated"

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrecipes.quant.low_rank_storage import LowRankRounding

BLOCK_N, MOST_BLOCK_K, NUM_WARPS = 64, 128, 8
LEAST_BLOCK, MOST_BLOCK_R = 16, 64
"""Tensor cores take 16 at least. A higher rank than the second is cut into blocks."""
GRADIENT_PROGRAMS = 512
"""Programs that the gradients are divided among, about; the same on every device, since it orders sums."""
# 2**23 as a float32 has every integer below 2**23 in its last bits: an addition of integers and a subtraction
# convert exactly, at the rate of additions, where the conversion instruction has a fraction of it
MAGIC_BITS = tl.constexpr(0x4B000000)
MAGIC = tl.constexpr(8388608.0)
ROUND = tl.constexpr(12_582_912.0)  # 1.5 * 2**23: adding it leaves no bit for a fraction, half goes to even


class Parts(NamedTuple):
    """Gradients in parts, float32; B is one of a tile of columns, the others of a tile of rows or a row."""

    a: Tensor | None
    """[tiles of a row, N, R], without the factors of A B."""
    b: Tensor | None
    """[splits of the rows, K, R]."""
    scale: Tensor
    """[N, tiles of a row]."""
    sum: Tensor | None
    """Sums of dL/dW_hat, [N, tiles of a row]; only where there are zero points."""


class _Tiles(NamedTuple):
    """How a weight is cut up."""

    block_k: int
    per_group: int
    per_row: int


def tiles_of(rounding: LowRankRounding) -> _Tiles:
    """Tiles of a weight's rows; none holds columns of two groups."""
    width = rounding.in_features if rounding.group_size is None else rounding.group_size
    block_k = min(MOST_BLOCK_K, max(LEAST_BLOCK, triton.next_power_of_2(width)))
    per_group = triton.cdiv(width, block_k)
    return _Tiles(block_k, per_group, per_group * rounding.num_groups)


def launch_weight(
    phi: Tensor,
    a_NR: Tensor | None,
    b_RK: Tensor | None,
    scale_NG: Tensor | None,
    zero_NG: Tensor | None,
    out: Tensor,
    rounding: LowRankRounding,
    *,
    transposed: bool = False,
) -> None:
    """Fill `out` with weights, or with integers where there are no scales. Every tensor is contiguous."""
    tiles, N = tiles_of(rounding), phi.shape[0]
    _weight_kernel[(triton.cdiv(N, BLOCK_N) * tiles.per_row,)](
        phi,
        a_NR,
        b_RK,
        scale_NG,
        zero_NG,
        out,
        N,
        rounding.in_features,
        _rank(a_NR),
        phi.shape[1],
        rounding.scaling,
        TRANSPOSED=transposed,
        **_constants(rounding, a_NR, tiles),
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


def launch_grads(
    grad_NK: Tensor,
    phi: Tensor,
    a_NR: Tensor | None,
    b_RK: Tensor | None,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    rounding: LowRankRounding,
) -> Parts:
    """The parts of all gradients. Every tensor is contiguous."""
    tiles, (N, K) = tiles_of(rounding), grad_NK.shape
    R = _rank(a_NR)
    constants = _constants(rounding, a_NR, tiles)
    blocks = triton.cdiv(N, BLOCK_N)
    splits = min(blocks, triton.cdiv(GRADIENT_PROGRAMS, tiles.per_row))
    per_split = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, per_split)
    empty = partial(torch.empty, dtype=torch.float32, device=grad_NK.device)
    parts = Parts(
        empty(tiles.per_row, N, R) if R else None,
        empty(splits, K, R) if R else None,
        empty(N, tiles.per_row),
        None if zero_NG is None else empty(N, tiles.per_row),
    )
    rank_blocks = max(constants["RANK_BLOCKS"], 1)
    _grads_kernel[(tiles.per_row, splits, rank_blocks)](
        grad_NK,
        phi,
        a_NR,
        b_RK,
        scale_NG,
        zero_NG,
        *parts,
        N,
        K,
        R,
        phi.shape[1],
        rounding.scaling,
        per_split,
        **constants,
        num_warps=NUM_WARPS,
        num_stages=2,
        enable_fp_fusion=False,
    )
    return parts


def _rank(a_NR: Tensor | None) -> int:
    return 0 if a_NR is None else a_NR.shape[1]


def _constants(rounding: LowRankRounding, a_NR: Tensor | None, tiles: _Tiles) -> dict[str, Any]:
    """What the kernels are compiled for."""
    R = _rank(a_NR)
    block_r = min(MOST_BLOCK_R, max(LEAST_BLOCK, triton.next_power_of_2(max(R, 1))))
    return {
        "STORAGE": rounding.storage,
        "BITS": rounding.bits,
        "GROUP": rounding.group_size or 0,
        "TILES_OF_GROUP": tiles.per_group,
        "TILES_OF_ROW": tiles.per_row,
        "RANK_BLOCKS": triton.cdiv(R, block_r),
        "BLOCK_R": block_r,
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": tiles.block_k,
    }


@triton.jit
def _columns(tile, K, GROUP: tl.constexpr, TILES_OF_GROUP: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first column of a tile of a row, the first one behind its group, and the group."""
    if GROUP == 0:
        first = tile * BLOCK_K
        end = K
        group = tile * 0
    else:
        group = tile // TILES_OF_GROUP
        first = group * GROUP + tile % TILES_OF_GROUP * BLOCK_K
        end = group * GROUP + GROUP
    return first, end, group


@triton.jit
def _levels(  # type: ignore[no-untyped-def]
    phi_ptr,
    rows,
    first,
    end,
    N,
    phi_stride,
    STORAGE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What phi stands for in a tile, float32; anything outside."""
    phi_rows = phi_ptr + rows.to(tl.int64)[:, None] * phi_stride
    if STORAGE == "int4":
        at = tl.arange(0, BLOCK_K // 2)
        inside = (rows < N)[:, None] & (first + at * 2 < end)[None, :]
        pairs = tl.load(phi_rows + (first // 2 + at)[None, :], mask=inside, other=0).to(tl.int32)
        codes = tl.interleave(pairs & 15, pairs >> 4)
        return (codes + MAGIC_BITS).to(tl.float32, bitcast=True) - (MAGIC + 8)
    else:  # noqa: RET505 - Triton compiles one branch only if the other is in an else
        cols = first + tl.arange(0, BLOCK_K)
        inside = (rows < N)[:, None] & (cols < end)[None, :]
        phi = tl.load(phi_rows + cols[None, :], mask=inside, other=0)
        if STORAGE == "fixed_point8":
            numbers = (phi.to(tl.int32) + (MAGIC_BITS + 128)).to(tl.float32, bitcast=True) - (MAGIC + 128)
            return numbers * (1.0 / 2 ** (8 - BITS))
        else:  # noqa: RET505 - as above
            return phi.to(tl.float32)


@triton.jit
def _load_a(a_ptr, rows, rank_block, N, R, BLOCK_R: tl.constexpr):  # type: ignore[no-untyped-def]
    ranks = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (rows < N)[:, None] & (ranks < R)[None, :]
    return tl.load(a_ptr + rows.to(tl.int64)[:, None] * R + ranks[None, :], mask=inside, other=0.0)


@triton.jit
def _load_b(b_ptr, cols, end, rank_block, K, R, BLOCK_R: tl.constexpr):  # type: ignore[no-untyped-def]
    ranks = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (ranks < R)[:, None] & (cols < end)[None, :]
    return tl.load(b_ptr + ranks.to(tl.int64)[:, None] * K + cols[None, :], mask=inside, other=0.0)


@triton.jit
def _round(z, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Half to even; what lies beyond the levels stays beyond them, and NaN stays."""
    z = tl.maximum(z, -(2.0 ** (BITS - 1)) - 1, propagate_nan=tl.PropagateNan.ALL)
    z = tl.minimum(z, 2.0 ** (BITS - 1), propagate_nan=tl.PropagateNan.ALL)
    return (z + ROUND) - ROUND


@triton.jit
def _clip(rounded, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    rounded = tl.maximum(rounded, -(2.0 ** (BITS - 1)), propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(rounded, 2.0 ** (BITS - 1) - 1, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _rounded_tile(  # type: ignore[no-untyped-def]
    phi_ptr,
    a_ptr,
    b_ptr,
    rows,
    first,
    end,
    N,
    K,
    R,
    phi_stride,
    scaling,
    STORAGE: tl.constexpr,
    BITS: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """rnd(Z) of a tile, not clipped."""
    z = _levels(phi_ptr, rows, first, end, N, phi_stride, STORAGE, BITS, BLOCK_K)
    if RANK_BLOCKS > 0:
        cols = first + tl.arange(0, BLOCK_K)
        product = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        for block in tl.static_range(RANK_BLOCKS):
            a = _load_a(a_ptr, rows, block, N, R, BLOCK_R)
            b = _load_b(b_ptr, cols, end, block, K, R, BLOCK_R)
            product = tl.dot(a, b, product, input_precision="ieee")
        z += product * scaling
    return _round(z, BITS)


@triton.jit
def _load_grid(grid_ptr, rows, group, N, G):  # type: ignore[no-untyped-def]
    return tl.load(grid_ptr + rows.to(tl.int64) * G + group, mask=rows < N, other=0.0).to(tl.float32)


@triton.jit
def _weight_kernel(  # type: ignore[no-untyped-def]
    phi_ptr,
    a_ptr,
    b_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    N,
    K,
    R,
    phi_stride,
    scaling,
    TRANSPOSED: tl.constexpr,
    STORAGE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TILES_OF_GROUP: tl.constexpr,
    TILES_OF_ROW: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of W_hat, or of Q where there is no scale."""
    tile = tl.program_id(0) % TILES_OF_ROW
    rows = tl.program_id(0) // TILES_OF_ROW * BLOCK_N + tl.arange(0, BLOCK_N)
    first, end, group = _columns(tile, K, GROUP, TILES_OF_GROUP, BLOCK_K)
    rounded = _rounded_tile(
        phi_ptr,
        a_ptr,
        b_ptr,
        rows,
        first,
        end,
        N,
        K,
        R,
        phi_stride,
        scaling,
        STORAGE,
        BITS,
        RANK_BLOCKS,
        BLOCK_R,
        BLOCK_N,
        BLOCK_K,
    )
    q = _clip(rounded, BITS)
    cols = first + tl.arange(0, BLOCK_K)
    if scale_ptr is None:
        q = tl.where(q == q, q, 0.0).to(tl.int8)
    else:
        G: tl.constexpr = TILES_OF_ROW // TILES_OF_GROUP
        if zero_ptr is not None:
            q -= _clip(_round(_load_grid(zero_ptr, rows, group, N, G), BITS), BITS)[:, None]
        q *= _load_grid(scale_ptr, rows, group, N, G)[:, None]
    if TRANSPOSED:
        inside = (cols < end)[:, None] & (rows < N)[None, :]
        out_ptrs = out_ptr + cols.to(tl.int64)[:, None] * N + rows[None, :]
        tl.store(out_ptrs, tl.trans(q.to(out_ptr.dtype.element_ty)), mask=inside)
    else:
        inside = (rows < N)[:, None] & (cols < end)[None, :]
        out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :]
        tl.store(out_ptrs, q.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dot(exact, x):  # type: ignore[no-untyped-def]
    """A product of what is exact in its type with float32 `x`, or with one of the same type.

    bfloat16 is multiplied by the leading 16 bits of `x`, in two parts: within 2**-16 of `x`, on tensor cores.
    """
    if exact.dtype == x.dtype:
        return tl.dot(exact, x, input_precision="ieee")
    elif exact.dtype == tl.bfloat16:  # noqa: RET505 - as above
        high = x.to(tl.bfloat16)
        low = (x.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(exact, low, tl.dot(exact, high))
    else:
        return tl.dot(exact.to(tl.float32), x.to(tl.float32), input_precision="ieee")


@triton.jit
def _grads_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    phi_ptr,
    a_ptr,
    b_ptr,
    scale_ptr,
    zero_ptr,
    parts_a_ptr,
    parts_b_ptr,
    parts_scale_ptr,
    parts_sum_ptr,
    N,
    K,
    R,
    phi_stride,
    scaling,
    blocks_of_split,
    STORAGE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TILES_OF_GROUP: tl.constexpr,
    TILES_OF_ROW: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Down a split of the rows in one tile of columns, for one block of the rank: dL/dW_hat is read once.

    dB is summed in registers; dA is written for every tile.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    rank_block = tl.program_id(2)
    G: tl.constexpr = TILES_OF_ROW // TILES_OF_GROUP
    first, end, group = _columns(tile, K, GROUP, TILES_OF_GROUP, BLOCK_K)
    cols = first + tl.arange(0, BLOCK_K)
    ranks = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    sum_b = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    last = tl.minimum((split + 1) * blocks_of_split, tl.cdiv(N, BLOCK_N))
    for block in range(split * blocks_of_split, last):
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (rows < N)[:, None] & (cols < end)[None, :]
        grad_ptrs = grad_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :]
        grad = tl.load(grad_ptrs, mask=inside, other=0.0)
        rounded = _rounded_tile(
            phi_ptr,
            a_ptr,
            b_ptr,
            rows,
            first,
            end,
            N,
            K,
            R,
            phi_stride,
            scaling,
            STORAGE,
            BITS,
            RANK_BLOCKS,
            BLOCK_R,
            BLOCK_N,
            BLOCK_K,
        )
        scale = _load_grid(scale_ptr, rows, group, N, G)
        if rank_block == 0:
            at = rows.to(tl.int64) * TILES_OF_ROW + tile
            level = _clip(rounded, BITS)
            if zero_ptr is not None:
                level -= _clip(_round(_load_grid(zero_ptr, rows, group, N, G), BITS), BITS)[:, None]
                tl.store(parts_sum_ptr + at, tl.sum(grad.to(tl.float32), 1), mask=rows < N)
            products = tl.where(inside, grad.to(tl.float32) * level, 0.0)
            tl.store(parts_scale_ptr + at, tl.sum(products, 1), mask=rows < N)
        if RANK_BLOCKS > 0:
            passed = (rounded >= -(2.0 ** (BITS - 1))) & (rounded <= 2.0 ** (BITS - 1) - 1)
            grad = tl.where(passed, grad, tl.zeros_like(grad))
            a = _load_a(a_ptr, rows, rank_block, N, R, BLOCK_R).to(tl.float32)
            b = _load_b(b_ptr, cols, end, rank_block, K, R, BLOCK_R)
            grad_a = _dot(grad, tl.trans(b)) * (scale * scaling)[:, None]
            a_ptrs = parts_a_ptr + (tile.to(tl.int64) * N + rows[:, None]) * R + ranks[None, :]
            tl.store(a_ptrs, grad_a, mask=(rows < N)[:, None] & (ranks < R)[None, :])
            sum_b += _dot(tl.trans(grad), a * (scale * scaling)[:, None])
    if RANK_BLOCKS > 0:
        b_ptrs = parts_b_ptr + (split.to(tl.int64) * K + cols[:, None]) * R + ranks[None, :]
        tl.store(b_ptrs, sum_b, mask=(cols < end)[:, None] & (ranks < R)[None, :])
