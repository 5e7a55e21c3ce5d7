"""Triton kernels that dequantize low-bit weights, alone or inside a product with few tokens, and their
launches; imported only where Triton is installed.

T tokens, N output features (rows), K input features, G groups of a row. What is worked on is the unit: 8
weights of a row, `bits` bytes, one group (sizes of groups are multiples of 8), and 16 bytes when stored in 16
bits. A thread reads a unit at once and stores it at once.

Weights get the bits of the reference: every product and sum is rounded by itself (`enable_fp_fusion=False`).
"""

# ruff: noqa: RUF005 - Triton knows + for tuples, not unpacking
# mypy: disable-error-code="assignment,has-type,var-annotated"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrecipes.quant.dequantize_tiles import UNIT, MatrixTiles, VectorTiles
from qrecipes.quant.formats import NF4Format, Payload, WeightFormat
from qrecipes.quant.nf4 import NF4_LEVELS
from qrecipes.quant.triton_launch import Launchers

UNITS_PER_THREAD = 8
"""Units that a thread of the dequantization reads before it stores the first."""
SUM_BLOCK = 512
"""Outputs of a program that adds up the parts of a product."""
LEVELS = tl.constexpr(NF4_LEVELS)
# 2**23 as a float32 has every integer below 2**23 in its last bits: | and a subtraction convert exactly, at
# the rate of additions, where the conversion instruction has a fraction of it
MAGIC_BITS = tl.constexpr(0x4B000000)
MAGIC = tl.constexpr(8388608.0)


class StoredWeight(NamedTuple):
    """A payload as the kernels take it."""

    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    """Packed bytes, seen as words of a unit where they are aligned; scales or magnitudes; zeros, offsets or
    scales of the magnitudes; the mean of the magnitudes."""
    row_stride: int
    """Elements of the first tensor from row to row."""
    num_groups: int
    constants: Mapping[str, Any]
    """What the kernels are compiled for."""


def stored_weight(payload: Payload, format: WeightFormat, in_features: int) -> StoredWeight:
    """`payload` as the kernels take it; no tensor is copied if each is contiguous."""
    packed_NB, *rest = (t.contiguous() for t in payload)
    words = _as_words(packed_NB, format.bits)
    if isinstance(format, NF4Format):
        kind, group_size = "nf4 twice" if format.double_quantized else "nf4", format.block_size
        scale_block = format.scale_block_size
    else:
        kind = "zero" if format.has_zero else "offset" if format.has_offset else "symmetric"
        group_size, scale_block = format.group_size or 0, 1
    scale, extra, mean = rest[0], *(*rest[1:], None, None)[:2]
    return StoredWeight(
        (words, scale, extra, mean),
        words.shape[1],
        format.num_groups(in_features),
        {
            "KIND": kind,
            "BITS": format.bits,
            "ALIGNED": words.dtype is not torch.uint8,
            "GROUP": group_size,
            "SCALE_BLOCK": scale_block,
        },
    )


def launch_dequantize(weight: StoredWeight, out_NK: Tensor) -> None:
    """Fill the contiguous `out_NK`, of 32 or 16 bits."""
    N, K = out_NK.shape
    units = -(-K // UNIT)
    per_thread = min(UNITS_PER_THREAD, triton.next_power_of_2(-(-units // 32)))
    constants = {**weight.constants, "UNITS": 32, "REPEATS": per_thread}
    _dequantize_launchers(constants, num_warps=1, enable_fp_fusion=False)(
        N * -(-units // (32 * per_thread)), *weight.tensors, out_NK, K, weight.row_stride, weight.num_groups
    )


def launch_vector(
    x_K: Tensor, weight: StoredWeight, bias_N: Tensor | None, out_N: Tensor, tiles: VectorTiles
) -> None:
    """Fill the contiguous `out_N` with the product of one contiguous token."""
    N, K = out_N.numel(), x_K.numel()
    splits, parts = _parts(out_N, tiles.splits)
    constants = {
        **weight.constants,
        "ROWS": tiles.block_n,
        "UNITS": 32 * tiles.num_warps,
        "REPEATS": tiles.repeats,
        "RAGGED": K % UNIT != 0,
    }
    _vector_launchers(constants, num_warps=tiles.num_warps, enable_fp_fusion=False)(
        (-(-N // tiles.block_n), splits),
        x_K,
        *weight.tensors,
        bias_N if splits == 1 else None,
        parts,
        N,
        K,
        weight.row_stride,
        weight.num_groups,
        _per_split(K, tiles.block_k, splits),
    )
    if splits > 1:
        _launch_sum(parts, bias_N, out_N, N)


def launch_matrix(
    x_TK: Tensor, weight: StoredWeight, bias_N: Tensor | None, out_TN: Tensor, tiles: MatrixTiles
) -> None:
    """Fill the contiguous `out_TN` with the product of at most `tiles.block_t` contiguous tokens."""
    (T, N), K = out_TN.shape, x_TK.shape[1]
    assert tiles.block_t >= T, (T, tiles)
    splits, parts = _parts(out_TN, tiles.splits)
    constants = {
        **weight.constants,
        "BLOCK_T": tiles.block_t,
        "BLOCK_N": tiles.block_n,
        "UNITS": tiles.block_k // UNIT,
        "RAGGED": K % UNIT != 0,
    }
    _matrix_launchers(
        constants, num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=False
    )(
        (-(-N // tiles.block_n), splits),
        x_TK,
        *weight.tensors,
        bias_N if splits == 1 else None,
        parts,
        T,
        N,
        K,
        weight.row_stride,
        weight.num_groups,
        _per_split(K, tiles.block_k, splits),
    )
    if splits > 1:
        _launch_sum(parts, bias_N, out_TN, N)


def _as_words(packed_NB: Tensor, bits: int) -> Tensor:
    """The bytes as integers of a unit each, where rows are whole units and start at multiples of them."""
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(bits)
    if word is None or packed_NB.shape[1] % bits or packed_NB.data_ptr() % bits:
        return packed_NB
    return packed_NB.view(word)


def _parts(out: Tensor, splits: int) -> tuple[int, Tensor]:
    """The output itself for one split, or room for the float32 sums of each."""
    return splits, out if splits == 1 else out.new_empty((splits, out.numel()), dtype=torch.float32)


def _per_split(K: int, block_k: int, splits: int) -> int:
    """Units of a split, whole blocks."""
    blocks = -(-K // block_k)
    return -(-blocks // splits) * block_k // UNIT


def _launch_sum(parts: Tensor, bias_N: Tensor | None, out: Tensor, N: int) -> None:
    size, constants = out.numel(), {"SPLITS": parts.shape[0], "BLOCK": SUM_BLOCK}
    launcher = _sum_launchers(constants, num_warps=4, enable_fp_fusion=False)
    launcher(-(-size // SUM_BLOCK), parts, bias_N, out, size, N)


@triton.jit
def _load_words(packed_ptr, rows, units, inside, row_stride, BITS: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Units as integers whose lowest bits are the first weight: int32, at 8 bits int64.

    Unaligned units are read byte by byte, which is how 3 bits always are.
    """
    if ALIGNED:
        words = tl.load(packed_ptr + rows * row_stride + units, mask=inside, other=0)
        return words if BITS == 8 else words.to(tl.int32)
    else:  # noqa: RET505 - Triton compiles one branch only if the other is in an else
        word_type: tl.constexpr = tl.int64 if BITS == 8 else tl.int32
        words = (units * 0).to(word_type)
        for i in tl.static_range(BITS):
            at = units * BITS + i
            byte = tl.load(packed_ptr + rows * row_stride + at, mask=inside & (at < row_stride), other=0)
            words |= byte.to(word_type) << (8 * i)
        return words


@triton.jit
def _load_scales(  # type: ignore[no-untyped-def]
    scale_ptr,
    extra_ptr,
    mean_ptr,
    rows,
    units,
    inside,
    G,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
):
    """The factor of each unit's group, and what `_weights` subtracts before or adds after it."""
    groups = units * 0 if GROUP == 0 else units // (GROUP // 8)
    factor = tl.load(scale_ptr + rows * G + groups, mask=inside, other=0).to(tl.float32)
    shift = factor
    if KIND == "nf4 twice":
        of_block = tl.load(extra_ptr + (rows * G + groups) // SCALE_BLOCK, mask=inside, other=0)
        factor = factor * of_block + tl.load(mean_ptr)
    elif KIND == "zero":
        zero = tl.load(extra_ptr + rows * G + groups, mask=inside, other=0).to(tl.float32)
        shift = zero + (MAGIC + 2 ** (BITS - 1))
    elif KIND == "offset":
        shift = tl.load(extra_ptr + rows * G + groups, mask=inside, other=0).to(tl.float32)
    return factor, shift


@triton.jit
def _levels():  # type: ignore[no-untyped-def]
    """The 16 levels of NF4."""
    index = tl.arange(0, 16)
    levels = tl.zeros((16,), dtype=tl.float32)
    for i in tl.static_range(16):
        levels = tl.where(index == i, LEVELS[i], levels)
    return levels


@triton.jit
def _code(words, PLACE: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The unsigned level of one weight of every unit, int32."""
    code = ((words >> (PLACE * BITS)) & (2**BITS - 1)).to(tl.int32)
    return code ^ 128 if BITS == 8 else code  # at 8 bits the signed integer itself is stored


@triton.jit
def _weight(words, factor, shift, PLACE: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One weight of every unit of an affine format, float32."""
    number = (_code(words, PLACE, BITS) | MAGIC_BITS).to(tl.float32, bitcast=True)
    center = shift if KIND == "zero" else MAGIC + 2 ** (BITS - 1)
    weight = (number - center) * factor
    return weight + shift if KIND == "offset" else weight


@triton.jit
def _in_order(v0, v1, v2, v3, v4, v5, v6, v7):  # type: ignore[no-untyped-def]
    """Eight tensors as one with a last dimension of 8, which a thread has whole: no value moves."""
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.reshape(tl.join(even, odd), v0.shape + (8,))


@triton.jit
def _weights(words, factor, shift, KIND: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 of COUNT units: one dimension more, of 8.

    Levels of NF4 are gathered from a table: by shuffles if the program has one warp, otherwise from 64 bytes
    of shared memory, which lie in 16 banks, so that lanes never wait for each other.
    """
    if KIND == "nf4" or KIND == "nf4 twice":
        codes = _in_order(
            _code(words, 0, 4),
            _code(words, 1, 4),
            _code(words, 2, 4),
            _code(words, 3, 4),
            _code(words, 4, 4),
            _code(words, 5, 4),
            _code(words, 6, 4),
            _code(words, 7, 4),
        )
        levels = tl.gather(_levels(), tl.reshape(codes, (COUNT * 8,)), 0)
        return tl.reshape(levels, codes.shape) * tl.expand_dims(factor, -1)
    else:  # noqa: RET505 - as above
        return _in_order(
            _weight(words, factor, shift, 0, KIND, BITS),
            _weight(words, factor, shift, 1, KIND, BITS),
            _weight(words, factor, shift, 2, KIND, BITS),
            _weight(words, factor, shift, 3, KIND, BITS),
            _weight(words, factor, shift, 4, KIND, BITS),
            _weight(words, factor, shift, 5, KIND, BITS),
            _weight(words, factor, shift, 6, KIND, BITS),
            _weight(words, factor, shift, 7, KIND, BITS),
        )


@triton.jit
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    packed_ptr,
    scale_ptr,
    extra_ptr,
    mean_ptr,
    out_ptr,
    K,
    row_stride,
    G,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
    REPEATS: tl.constexpr,
):
    """REPEATS times UNITS units of a row: all are read, then all are stored."""
    units_of_row = tl.cdiv(K, 8)
    programs_of_row = tl.cdiv(units_of_row, UNITS * REPEATS)
    row = (tl.program_id(0) // programs_of_row).to(tl.int64)
    first = (tl.program_id(0) % programs_of_row * (UNITS * REPEATS)).to(tl.uint32)
    words = ()
    factors = ()
    shifts = ()
    for i in tl.static_range(REPEATS):
        units = first + (i * UNITS + tl.arange(0, UNITS)).to(tl.uint32)
        inside = units < units_of_row
        words = words + (_load_words(packed_ptr, row, units, inside, row_stride, BITS, ALIGNED),)
        factor, shift = _load_scales(
            scale_ptr, extra_ptr, mean_ptr, row, units, inside, G, KIND, BITS, GROUP, SCALE_BLOCK
        )
        factors = factors + (factor,)
        shifts = shifts + (shift,)
    for i in tl.static_range(REPEATS):
        units = first + (i * UNITS + tl.arange(0, UNITS)).to(tl.uint32)
        weights = _weights(words[i], factors[i], shifts[i], KIND, BITS, UNITS)
        cols = units[:, None] * 8 + tl.arange(0, 8).to(tl.uint32)[None, :]
        tl.store(out_ptr + row * K + cols, weights.to(out_ptr.dtype.element_ty), mask=cols < K)


@triton.jit
def _vector_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    packed_ptr,
    scale_ptr,
    extra_ptr,
    mean_ptr,
    bias_ptr,
    out_ptr,
    N,
    K,
    row_stride,
    G,
    units_of_split,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    REPEATS: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """ROWS outputs of one token, or the part of them that a split of K gives.

    A step reads REPEATS times UNITS units of each row, and as many weights' inputs, before it multiplies.
    """
    first_row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    units_of_row = tl.cdiv(K, 8)
    begin = split * units_of_split
    accs = ()
    for _ in tl.static_range(ROWS):
        accs = accs + (tl.zeros((UNITS, 8), dtype=tl.float32),)
    for first in range(begin, tl.minimum(begin + units_of_split, units_of_row), UNITS * REPEATS):
        xs = ()
        words = ()
        factors = ()
        shifts = ()
        for i in tl.static_range(REPEATS):
            units = (first + i * UNITS + tl.arange(0, UNITS)).to(tl.uint32)
            inside = units < units_of_row
            cols = units[:, None] * 8 + tl.arange(0, 8).to(tl.uint32)[None, :]
            xs = xs + (tl.load(x_ptr + cols, mask=cols < K, other=0.0),)
            for r in tl.static_range(ROWS):
                # rows past the end wrap around: they are read from inside, and never stored
                row = ((first_row + r) % N).to(tl.int64)
                words = words + (_load_words(packed_ptr, row, units, inside, row_stride, BITS, ALIGNED),)
                factor, shift = _load_scales(
                    scale_ptr, extra_ptr, mean_ptr, row, units, inside, G, KIND, BITS, GROUP, SCALE_BLOCK
                )
                factors = factors + (factor,)
                shifts = shifts + (shift,)
        sums = ()
        for r in tl.static_range(ROWS):
            acc = accs[r]
            for i in tl.static_range(REPEATS):
                weights = _weights(
                    words[i * ROWS + r], factors[i * ROWS + r], shifts[i * ROWS + r], KIND, BITS, UNITS
                ).to(x_ptr.dtype.element_ty)
                if RAGGED:  # past the end of a row there may be inf, and 0 * inf is NaN
                    units = (first + i * UNITS + tl.arange(0, UNITS)).to(tl.uint32)
                    cols = units[:, None] * 8 + tl.arange(0, 8).to(tl.uint32)[None, :]
                    weights = tl.where(cols < K, weights, 0.0)
                acc = tl.fma(weights.to(tl.float32), xs[i].to(tl.float32), acc)
            sums = sums + (acc,)
        accs = sums
    for r in tl.static_range(ROWS):
        if first_row + r < N:
            total = tl.sum(tl.sum(accs[r], 1), 0)
            if bias_ptr is not None:
                total += tl.load(bias_ptr + first_row + r).to(tl.float32)
            tl.store(out_ptr + split.to(tl.int64) * N + first_row + r, total.to(out_ptr.dtype.element_ty))


@triton.jit
def _matrix_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    packed_ptr,
    scale_ptr,
    extra_ptr,
    mean_ptr,
    bias_ptr,
    out_ptr,
    T,
    N,
    K,
    row_stride,
    G,
    units_of_split,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """BLOCK_N outputs of all tokens, or the part of them that a split of K gives.

    The weights are the left operand: as the right one, transposed, triton 3.6 stored them two bytes at a
    time.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    inner = (rows % N).to(tl.int64)[:, None]
    tokens = tl.arange(0, BLOCK_T)
    x_ptrs = x_ptr + tokens.to(tl.int64)[None, :] * K
    units_of_row = tl.cdiv(K, 8)
    begin = split * units_of_split
    acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    for first in range(begin, tl.minimum(begin + units_of_split, units_of_row), UNITS):
        units = first + tl.arange(0, UNITS)[None, :]
        inside = units < units_of_row
        words = _load_words(packed_ptr, inner, units, inside, row_stride, BITS, ALIGNED)
        factor, shift = _load_scales(
            scale_ptr, extra_ptr, mean_ptr, inner, units, inside, G, KIND, BITS, GROUP, SCALE_BLOCK
        )
        cols = first * 8 + tl.arange(0, UNITS * 8)
        x = tl.load(x_ptrs + cols[:, None], mask=(tokens < T)[None, :] & (cols < K)[:, None], other=0.0)
        weights = _weights(words, factor, shift, KIND, BITS, BLOCK_N * UNITS).to(x.dtype)
        weights = tl.reshape(weights, (BLOCK_N, UNITS * 8))
        if RAGGED:
            weights = tl.where((cols < K)[None, :], weights, 0.0)
        acc = tl.dot(weights, x, acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    outputs = (split * T + tokens).to(tl.int64)[None, :] * N + rows[:, None]
    stored = (tokens < T)[None, :] & (rows < N)[:, None]
    tl.store(out_ptr + outputs, acc.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _sum_kernel(parts_ptr, bias_ptr, out_ptr, SIZE, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Parts added up in their order, whatever order they were made in, and the bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + at, mask=at < SIZE, other=0.0)
        parts_ptr += SIZE
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % N, mask=at < SIZE, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < SIZE)


_dequantize_launchers = Launchers(_dequantize_kernel)
_vector_launchers = Launchers(_vector_kernel)
_matrix_launchers = Launchers(_matrix_kernel)
_sum_launchers = Launchers(_sum_kernel)
