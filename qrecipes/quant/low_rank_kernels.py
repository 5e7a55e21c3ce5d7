"""Triton kernels of weights with a low-rank correction inside their rounding, and their launches; imported
only where Triton is installed.

N output features (rows), K input features, G groups of a row, R rank. All kernels cut a weight into the
same tiles, of BLOCK_N rows and of columns of one group, and form Z there by the same instructions, so that
they round the same bits, whatever the tiles. What is summed over several tiles is written in parts, which a
last kernel adds up one after the other: there are no atomics, and results repeat bit for bit. Products and
sums are rounded by themselves (`enable_fp_fusion=False`); tensor cores add up A B in float32.
"""

# mypy: disable-error-code="assignment,has-type,union-attr,var-annotated"

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from qrecipes.quant.low_rank_reference import LowRankGrads
from qrecipes.quant.low_rank_storage import LowRankRounding
from qrecipes.quant.triton_launch import Launchers


class Blocks(NamedTuple):
    """How a kernel cuts up a weight."""

    n: int
    """Rows of a tile."""
    most_k: int
    """Columns of a tile, where a group has as many."""
    num_warps: int
    repeats: int = 1
    """Tiles that a program of the weights' kernel works on, one below the other."""
    num_stages: int = 2
    """Tiles that are loaded at once, at most."""


WEIGHT_BLOCKS = {
    "": Blocks(64, 128, 8),
    "fixed_point8": Blocks(64, 128, 4, repeats=8, num_stages=3),
    "int4": Blocks(64, 64, 4, repeats=8, num_stages=3),
    "float32": Blocks(64, 64, 4, repeats=8, num_stages=3),
}
GRADS_BLOCKS = {
    "": Blocks(64, 128, 8),
    "fixed_point8": Blocks(64, 128, 4),
    "int4": Blocks(64, 128, 4),
    "float32": Blocks(64, 64, 4),
}
"""By the storage of phi, or where A is in float32 by that; the first for all others. Whatever is chosen here,
bits differ by the order of sums of gradients alone: see tools/bench_low_rank.py --tiles."""
LEAST_BLOCK, RANK_BYTES = 16, 128
"""Tensor cores take blocks of 16 at least. A rank of more bytes than the second is cut into blocks."""
SCRATCH_BYTES = 2**14
"""Shared memory of the gradients' kernel that does not grow with the number of stages, about."""
SUMS_BLOCK = 512
"""Sums of a program that adds up parts."""
GRADIENT_PROGRAMS = 512
"""Programs that the gradients are divided among, about; the same on every device, since it orders sums."""
# 2**23 as a float32 has every integer below 2**23 in its last bits: an addition of integers and a subtraction
# convert exactly, at the rate of additions, where the conversion instruction has a fraction of it
MAGIC_BITS = tl.constexpr(0x4B000000)
MAGIC = tl.constexpr(8388608.0)
INTERPRETED = tl.constexpr(knobs.runtime.interpret)
ROUND = tl.constexpr(12_582_912.0)  # 1.5 * 2**23: adding it leaves no bit for a fraction, half goes to even


class Operands(NamedTuple):
    """The contiguous tensors of a weight; integers need no scales."""

    phi: Tensor
    a: Tensor | None
    b: Tensor | None
    scale: Tensor | None
    zero: Tensor | None


class _Tiles(NamedTuple):
    """How a weight is cut up."""

    block_k: int
    per_group: int
    per_row: int


def blocks_of(table: Mapping[str, Blocks], rounding: LowRankRounding, a_NR: Tensor | None) -> Blocks:
    """The entry of WEIGHT_BLOCKS or GRADS_BLOCKS for a weight."""
    is_wide = a_NR is not None and a_NR.dtype == torch.float32
    return table.get("float32" if is_wide else rounding.storage, table[""])


def tiles_of(rounding: LowRankRounding, most_block_k: int) -> _Tiles:
    """Tiles of a weight's rows; none holds columns of two groups."""
    width = rounding.in_features if rounding.group_size is None else rounding.group_size
    block_k = min(most_block_k, max(LEAST_BLOCK, triton.next_power_of_2(width)))
    per_group = triton.cdiv(width, block_k)
    return _Tiles(block_k, per_group, per_group * rounding.num_groups)


def operands(
    phi: Tensor, a_NR: Tensor | None, b_RK: Tensor | None, scale_NG: Tensor | None, zero_NG: Tensor | None
) -> Operands:
    """A weight as the kernels take it; nothing that is contiguous is copied."""
    others = (None if t is None else t.contiguous() for t in (a_NR, b_RK, scale_NG, zero_NG))
    return Operands(phi.contiguous(), *others)


def launch_weight(
    weight: Operands,
    out: Tensor,
    rounding: LowRankRounding,
    *,
    transposed: bool = False,
    is_rounded: bool = False,
) -> None:
    """Fill the contiguous `out` with weights, or with integers where there are no scales; or, where
    `is_rounded`, with rnd(Z), one beyond the levels where it is clipped."""
    blocks, N = blocks_of(WEIGHT_BLOCKS, rounding, weight.a), weight.phi.shape[0]
    constants = weight_constants(rounding, weight.a, transposed=transposed, is_rounded=is_rounded)
    _weight_launchers(
        constants, num_warps=blocks.num_warps, num_stages=blocks.num_stages, enable_fp_fusion=False
    )(
        triton.cdiv(N, blocks.n * constants["REPEATS"]) * constants["TILES_OF_ROW"],
        *weight,
        out,
        N,
        rounding.in_features,
        _rank(weight.a),
        weight.phi.shape[1],
        rounding.scaling,
    )


def launch_grads(
    grad_NK: Tensor, weight: Operands, out: LowRankGrads, rounding: LowRankRounding, shared_bytes: int
) -> None:
    """Fill `out`, contiguous and float32, from a contiguous dL/dW_hat; `shared_bytes` are what a block can
    have."""
    N, K = grad_NK.shape
    R = _rank(weight.a)
    blocks = blocks_of(GRADS_BLOCKS, rounding, weight.a)
    constants = grads_constants(rounding, weight.a)
    rounded = _rounded(weight, rounding) if constants["ROUNDED"] else weight
    tiles = constants["TILES_OF_ROW"]
    blocks_of_rows = triton.cdiv(N, blocks.n)
    splits = min(blocks_of_rows, triton.cdiv(GRADIENT_PROGRAMS, tiles))
    per_split = triton.cdiv(blocks_of_rows, splits)
    splits = triton.cdiv(blocks_of_rows, per_split)
    sums = 1 if weight.zero is None else 2
    parts = grad_NK.new_empty((tiles * N + splits * K) * R + sums * tiles * N, dtype=torch.float32)
    stages = min(blocks.num_stages, num_stages(grad_NK, rounded, constants, shared_bytes))
    _grads_launchers(constants, num_warps=blocks.num_warps, num_stages=stages, enable_fp_fusion=False)(
        (tiles, splits, max(constants["RANK_BLOCKS"], 1)),
        grad_NK,
        *rounded,
        parts,
        N,
        K,
        R,
        rounded.phi.shape[1],
        rounding.scaling,
        per_split,
    )
    of_sums = {name: constants[name] for name in ("BITS", "TILES_OF_GROUP", "TILES_OF_ROW")}
    elements = (N * R, R * K, out.scale.numel())
    _sums_launchers(of_sums | {"BLOCK": SUMS_BLOCK}, num_warps=4, enable_fp_fusion=False)(
        sum(triton.cdiv(number, SUMS_BLOCK) for number in elements),
        parts,
        weight.scale,
        weight.zero,
        *out,
        N,
        K,
        R,
        splits,
    )


def rounds_first(rank_blocks: int) -> bool:
    """Whether the gradients' kernel reads rnd(Z) rather than phi.

    It has a program for every block of the rank: with several, each would sum up the whole of A B again.
    """
    return rank_blocks > 1


def _rounded(weight: Operands, rounding: LowRankRounding) -> Operands:
    """The same weight with rnd(Z) in place of phi, in bfloat16: all of -129 to 128, and NaN, is exact."""
    phi = weight.phi.new_empty((weight.phi.shape[0], rounding.in_features), dtype=torch.bfloat16)
    launch_weight(weight._replace(scale=None, zero=None), phi, rounding, is_rounded=True)
    return weight._replace(phi=phi)


def num_stages(grad_NK: Tensor, weight: Operands, constants: Mapping[str, Any], shared_bytes: int) -> int:
    """2 where the gradients' kernel has the shared memory to load the next block while it works on one."""
    block_n, block_k = constants["BLOCK_N"], constants["BLOCK_K"]
    loaded = block_k * (grad_NK.element_size() + weight.phi.element_size()) * block_n
    if weight.a is not None:
        loaded += (block_n + block_k) * constants["BLOCK_R"] * weight.a.element_size()
    return 2 if 2 * loaded + SCRATCH_BYTES <= shared_bytes else 1


def weight_constants(
    rounding: LowRankRounding, a_NR: Tensor | None, *, transposed: bool = False, is_rounded: bool = False
) -> dict[str, Any]:
    """What the weights' kernel is compiled for; not to be changed."""
    blocks = blocks_of(WEIGHT_BLOCKS, rounding, a_NR)
    return _weight_constants(rounding, _kind(a_NR), blocks, transposed, is_rounded)


def grads_constants(rounding: LowRankRounding, a_NR: Tensor | None) -> dict[str, Any]:
    """What the gradients' kernel is compiled for; not to be changed."""
    return _grads_constants(rounding, _kind(a_NR), blocks_of(GRADS_BLOCKS, rounding, a_NR))


class _Kind(NamedTuple):
    """What kernels depend on of A and B."""

    rank: int
    itemsize: int


def _kind(a_NR: Tensor | None) -> _Kind:
    return _Kind(0, 2) if a_NR is None else _Kind(a_NR.shape[1], a_NR.element_size())


def _rank(a_NR: Tensor | None) -> int:
    return 0 if a_NR is None else a_NR.shape[1]


@cache  # the host of a training step is nearly as busy as the device
def _weight_constants(
    rounding: LowRankRounding, kind: _Kind, blocks: Blocks, transposed: bool, is_rounded: bool
) -> dict[str, Any]:
    constants = _constants(rounding, kind, blocks)
    # a rank of several blocks has its own loop; Triton 3.6 has been wrong about such a one inside another
    repeats = blocks.repeats if constants["RANK_BLOCKS"] <= 1 else 1
    loop = {"REPEATS": repeats, "NUM_STAGES": blocks.num_stages}
    return constants | {"TRANSPOSED": transposed, "ROUNDED": is_rounded} | loop


@cache
def _grads_constants(rounding: LowRankRounding, kind: _Kind, blocks: Blocks) -> dict[str, Any]:
    constants = _constants(rounding, kind, blocks)
    is_rounded = rounds_first(constants["RANK_BLOCKS"])
    return constants | {"ROUNDED": is_rounded, "STORAGE": "bf16" if is_rounded else rounding.storage}


def _constants(rounding: LowRankRounding, kind: _Kind, blocks: Blocks) -> dict[str, Any]:
    """What both kernels are compiled for."""
    tiles = tiles_of(rounding, blocks.most_k)
    most_block_r = RANK_BYTES // kind.itemsize
    block_r = min(most_block_r, max(LEAST_BLOCK, triton.next_power_of_2(max(kind.rank, 1))))
    return {
        "STORAGE": rounding.storage,
        "BITS": rounding.bits,
        "GROUP": rounding.group_size or 0,
        "TILES_OF_GROUP": tiles.per_group,
        "TILES_OF_ROW": tiles.per_row,
        "RANK_BLOCKS": triton.cdiv(kind.rank, block_r),
        "BLOCK_R": block_r,
        "BLOCK_N": blocks.n,
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
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What phi stands for in a tile, float32; anything outside."""
    phi_rows = phi_ptr + rows.to(tl.int64)[:, None] * phi_stride
    if STORAGE == "int4":
        at = first // 2 + tl.arange(0, BLOCK_K // 2)
        # groups are even; the last pair of an odd row is one number. Numbers whose factors Triton knows make
        # for wide loads
        inside = (rows < N)[:, None] & (at < (phi_stride if GROUP == 0 else end // 2))[None, :]
        pairs = tl.load(phi_rows + at[None, :], mask=inside, other=0)
        codes = tl.interleave(pairs & 15, pairs >> 4)  # of 8 bits still: threads exchange them
        return (codes.to(tl.int32) + MAGIC_BITS).to(tl.float32, bitcast=True) - (MAGIC + 8)
    else:  # noqa: RET505 - Triton compiles one branch only if the other is in an else
        cols = first + tl.arange(0, BLOCK_K)
        inside = (rows < N)[:, None] & (cols < end)[None, :]
        phi = tl.load(phi_rows + cols[None, :], mask=inside, other=0)
        if STORAGE == "fixed_point8":
            # a smaller exponent divides by 2**(8 - BITS)
            bits: tl.constexpr = MAGIC_BITS + 128 - (8 - BITS) * 2**23
            return (phi.to(tl.int32) + bits).to(tl.float32, bitcast=True) - (MAGIC + 128) / 2 ** (8 - BITS)
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
def _round(z):  # type: ignore[no-untyped-def]
    """Half to even below 2**22. What lies beyond is not exact, but stays beyond all levels; NaN stays."""
    return (z + ROUND) - ROUND


@triton.jit
def _clip(rounded, BITS: tl.constexpr, BEYOND: tl.constexpr = 0):  # type: ignore[no-untyped-def]
    """To the levels, or to some more."""
    rounded = tl.maximum(rounded, -(2.0 ** (BITS - 1)) - BEYOND, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(rounded, 2.0 ** (BITS - 1) - 1 + BEYOND, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _add_dot(total, x, y):  # type: ignore[no-untyped-def]
    """A product of two matrices of one type, added to `total`; never in TF32."""
    if INTERPRETED:  # it takes bfloat16 for integers
        return tl.dot(x.to(tl.float32), y.to(tl.float32), total, input_precision="ieee")
    else:  # noqa: RET505 - as above
        return tl.dot(x, y, total, input_precision="ieee")


@triton.jit
def _split(x):  # type: ignore[no-untyped-def]
    """float32 as a sum of three bfloat16, exact but for the smallest numbers."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _add_product(total, a, b):  # type: ignore[no-untyped-def]
    """A B, added to `total`. float32 is multiplied in parts, on tensor cores: what is left out of a product
    is 2**-24 of it, as much as float32 rounds."""
    if a.dtype == tl.float32:
        a0, a1, a2 = _split(a)
        b0, b1, b2 = _split(b)
        total = _add_dot(total, a1, b1)
        total = _add_dot(total, a0, b2)
        total = _add_dot(total, a2, b0)
        total = _add_dot(total, a0, b1)
        total = _add_dot(total, a1, b0)
        return _add_dot(total, a0, b0)
    else:  # noqa: RET505 - as above
        return _add_dot(total, a, b)


@triton.jit
def _rounded_tile(  # type: ignore[no-untyped-def]
    phi_ptr,
    a,
    b,
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
    GROUP: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """rnd(Z) of a tile, not clipped; `a` and `b` are used where the rank has one block."""
    z = _levels(phi_ptr, rows, first, end, N, phi_stride, STORAGE, BITS, GROUP, BLOCK_K)
    if RANK_BLOCKS > 0:
        product = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        if RANK_BLOCKS == 1:
            product = _add_product(product, a, b)
        else:
            cols = first + tl.arange(0, BLOCK_K)
            for block in range(RANK_BLOCKS):
                a_block = _load_a(a_ptr, rows, block, N, R, BLOCK_R)
                b_block = _load_b(b_ptr, cols, end, block, K, R, BLOCK_R)
                product = _add_product(product, a_block, b_block)
        z += product * scaling
    return _round(z)


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
    ROUNDED: tl.constexpr,
    STORAGE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TILES_OF_GROUP: tl.constexpr,
    TILES_OF_ROW: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    REPEATS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Tiles, one below the other, of W_hat, or of Q where there is no scale, or of rnd(Z) if it is what is
    asked for."""
    tile = tl.program_id(0) % TILES_OF_ROW
    first, end, group = _columns(tile, K, GROUP, TILES_OF_GROUP, BLOCK_K)
    cols = first + tl.arange(0, BLOCK_K)
    b = _load_b(b_ptr, cols, end, 0, K, R, BLOCK_R) if RANK_BLOCKS == 1 else None
    for repeat in tl.range(0, REPEATS, num_stages=NUM_STAGES):
        block = tl.program_id(0) // TILES_OF_ROW * REPEATS + repeat
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        a = _load_a(a_ptr, rows, 0, N, R, BLOCK_R) if RANK_BLOCKS == 1 else None
        rounded = _rounded_tile(
            phi_ptr,
            a,
            b,
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
            GROUP,
            RANK_BLOCKS,
            BLOCK_R,
            BLOCK_N,
            BLOCK_K,
        )
        if ROUNDED:
            q = _clip(rounded, BITS, 1)
        else:
            q = _clip(rounded, BITS)
            if scale_ptr is None:
                q = tl.where(q == q, q, 0.0).to(tl.int8)
            else:
                G: tl.constexpr = TILES_OF_ROW // TILES_OF_GROUP
                if zero_ptr is not None:
                    q -= _clip(_round(_load_grid(zero_ptr, rows, group, N, G)), BITS)[:, None]
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
def _add_grad_dot(total, grad, x):  # type: ignore[no-untyped-def]
    """A product of gradients with `x`, added to `total`, on tensor cores.

    What is not in one type of 16 bits is multiplied by its leading 16 bits, in two parts of bfloat16: within
    2**-16 of it.
    """
    if grad.dtype == x.dtype and grad.dtype != tl.float32:
        return _add_dot(total, grad, x)
    else:  # noqa: RET505 - as above
        x0 = x.to(tl.bfloat16)
        x1 = (x.to(tl.float32) - x0.to(tl.float32)).to(tl.bfloat16)
        if grad.dtype == tl.bfloat16:
            return _add_dot(_add_dot(total, grad, x1), grad, x0)
        else:  # noqa: RET505 - as above
            grad0 = grad.to(tl.bfloat16)
            grad1 = (grad.to(tl.float32) - grad0.to(tl.float32)).to(tl.bfloat16)
            return _add_dot(_add_dot(_add_dot(total, grad0, x1), grad1, x0), grad0, x0)


@triton.jit(do_not_specialize=["blocks_of_split"])
def _grads_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    phi_ptr,
    a_ptr,
    b_ptr,
    scale_ptr,
    zero_ptr,
    parts_ptr,
    N,
    K,
    R,
    phi_stride,
    scaling,
    blocks_of_split,
    ROUNDED: tl.constexpr,
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

    dB is summed in registers; dA is written for every tile. Where ROUNDED, phi is rnd(Z). Parts, float32, one
    behind the other: dA [tiles of a row, N, R], dB [splits, R, K], ds [tiles of a row, N], and where there
    are zero points sums of dL/dW_hat, shaped alike.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    parts_b_ptr = parts_ptr + tl.cast(N, tl.int64) * R * TILES_OF_ROW
    parts_scale_ptr = parts_b_ptr + tl.cast(K, tl.int64) * R * tl.num_programs(1)
    parts_sum_ptr = parts_scale_ptr + tl.cast(N, tl.int64) * TILES_OF_ROW
    rank_block = tl.program_id(2)
    G: tl.constexpr = TILES_OF_ROW // TILES_OF_GROUP
    first, end, group = _columns(tile, K, GROUP, TILES_OF_GROUP, BLOCK_K)
    cols = first + tl.arange(0, BLOCK_K)
    ranks = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    b = _load_b(b_ptr, cols, end, rank_block, K, R, BLOCK_R) if RANK_BLOCKS > 0 else None
    sum_b = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    last = tl.minimum((split + 1) * blocks_of_split, tl.cdiv(N, BLOCK_N))
    for block in range(split * blocks_of_split, last):
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (rows < N)[:, None] & (cols < end)[None, :]
        grad_ptrs = grad_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :]
        grad = tl.load(grad_ptrs, mask=inside, other=0.0)
        a = _load_a(a_ptr, rows, rank_block, N, R, BLOCK_R) if RANK_BLOCKS > 0 else None
        rounded = _rounded_tile(
            phi_ptr,
            a,
            b,
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
            GROUP,
            0 if ROUNDED else RANK_BLOCKS,
            BLOCK_R,
            BLOCK_N,
            BLOCK_K,
        )
        scale = _load_grid(scale_ptr, rows, group, N, G)
        level = _clip(rounded, BITS)
        passed = level == rounded
        if rank_block == 0:
            at = tile.to(tl.int64) * N + rows
            if zero_ptr is not None:
                level -= _clip(_round(_load_grid(zero_ptr, rows, group, N, G)), BITS)[:, None]
                tl.store(parts_sum_ptr + at, tl.sum(grad.to(tl.float32), 1), mask=rows < N)
            tl.store(parts_scale_ptr + at, tl.sum(grad.to(tl.float32) * level, 1), mask=rows < N)
        if RANK_BLOCKS > 0:
            grad = tl.where(passed, grad, tl.zeros_like(grad))
            nothing = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
            grad_a = _add_grad_dot(nothing, grad, tl.trans(b)) * (scale * scaling)[:, None]
            a_ptrs = parts_ptr + (tile.to(tl.int64) * N + rows[:, None]) * R + ranks[None, :]
            tl.store(a_ptrs, grad_a, mask=(rows < N)[:, None] & (ranks < R)[None, :])
            sum_b = _add_grad_dot(sum_b, tl.trans(grad), a.to(tl.float32) * (scale * scaling)[:, None])
    if RANK_BLOCKS > 0:
        b_ptrs = parts_b_ptr + (tl.cast(split, tl.int64) * R + ranks[None, :]) * K + cols[:, None]
        tl.store(b_ptrs, sum_b, mask=(cols < end)[:, None] & (ranks < R)[None, :])


@triton.jit
def _sum_of_parts(parts_ptr, at, inside, stride, number, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """What stands at `at` in each part, added up in their order; several are loaded at once."""
    AT_ONCE: tl.constexpr = 8
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, number, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            part = parts_ptr + tl.cast(first + i, tl.int64) * stride
            total += tl.load(part + at, mask=inside & (first + i < number), other=0.0)
    return total


@triton.jit(do_not_specialize=["splits"])
def _sums_kernel(  # type: ignore[no-untyped-def]
    parts_ptr,
    scale_ptr,
    zero_ptr,
    grad_a_ptr,
    grad_b_ptr,
    grad_scale_ptr,
    grad_zero_ptr,
    N,
    K,
    R,
    splits,
    BITS: tl.constexpr,
    TILES_OF_GROUP: tl.constexpr,
    TILES_OF_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of dA, or of dB, or of ds and dz, from the parts that `_grads_kernel` wrote."""
    G: tl.constexpr = TILES_OF_ROW // TILES_OF_GROUP
    block = tl.program_id(0)
    parts_b_ptr = parts_ptr + tl.cast(N, tl.int64) * R * TILES_OF_ROW
    parts_scale_ptr = parts_b_ptr + tl.cast(K, tl.int64) * R * splits
    first_b = tl.cdiv(N * R, BLOCK)
    first_scale = first_b + tl.cdiv(R * K, BLOCK)
    if block < first_b:
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < N * R
        total = _sum_of_parts(parts_ptr, at, inside, N * R, TILES_OF_ROW, BLOCK)
        if grad_a_ptr is not None:
            tl.store(grad_a_ptr + at, total, mask=inside)
    elif block < first_scale:
        at = (block - first_b) * BLOCK + tl.arange(0, BLOCK)
        inside = at < R * K
        total = _sum_of_parts(parts_b_ptr, at, inside, R * K, splits, BLOCK)
        if grad_b_ptr is not None:
            tl.store(grad_b_ptr + at, total, mask=inside)
    else:
        at = (block - first_scale) * BLOCK + tl.arange(0, BLOCK)
        inside = at < N * G
        first = (at % G * TILES_OF_GROUP).to(tl.int64) * N + at // G
        total = _sum_of_parts(parts_scale_ptr, first, inside, N, TILES_OF_GROUP, BLOCK)
        tl.store(grad_scale_ptr + at, total, mask=inside)
        if zero_ptr is not None:
            parts_sum_ptr = parts_scale_ptr + tl.cast(N, tl.int64) * TILES_OF_ROW
            total = _sum_of_parts(parts_sum_ptr, first, inside, N, TILES_OF_GROUP, BLOCK)
            zero = _round(tl.load(zero_ptr + at, mask=inside, other=0.0).to(tl.float32))
            scale = tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
            total = tl.where(zero == _clip(zero, BITS), -scale * total, 0.0)
            tl.store(grad_zero_ptr + at, total, mask=inside)


_weight_launchers = Launchers(_weight_kernel)
_grads_launchers = Launchers(_grads_kernel)
_sums_launchers = Launchers(_sums_kernel)
