"""INT8 of a matrix along its rows or its columns, laid out as the fast INT8 matmuls want it.

M rows, K columns. What a product sums over is contiguous in the result, from a multiple of 16 bytes on, so
columns come transposed. On CUDA the matrix is read from memory once, but for what does not stay in the L2
cache; random numbers for stochastic rounding are made inside the kernels and take no memory. Under
`torch.compile` rows are rounded to nearest in plain PyTorch, which Inductor puts into the kernel that makes
them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qrecipes.quant.device import (
    HAS_TRITON,
    device_limits,
    has_int8_tensor_cores,
    on_device_of,
    require_triton,
)
from qrecipes.quant.operators import define_operator
from qrecipes.quant.primitives import quantize_int8

if HAS_TRITON:
    from qrecipes.quant import int8_quantize_kernels as kernels


def quantize_rows(x_MK: Tensor, *, stochastic_rounding: bool = False) -> tuple[Tensor, Tensor]:
    """INT8 [M, K] and a float32 scale a row [M, 1], as `quantize_int8` of dimension 1, bit for bit.

    Rounding is half to even or stochastic, seeded by the default generator of the matrix's device. Rows of
    the result start at multiples of 16 bytes. It has no gradient. Compiled, a division may be off by the last
    bit, and rounding by it.

    Raises:
        ValueError: if `x_MK` is not a floating matrix.
    """
    _check("quantize_rows", x_MK)
    # random numbers made by Inductor take a round of Philox each, the kernel's a quarter of one
    if torch.compiler.is_compiling() and x_MK.shape[1] % 16 == 0 and not stochastic_rounding:
        return quantize_int8(x_MK, 1)
    return torch.ops.qrecipes.quantize_rows.default(x_MK, _seed(x_MK, stochastic_rounding))


def quantize_columns(x_MK: Tensor, *, stochastic_rounding: bool = False) -> tuple[Tensor, Tensor]:
    """INT8 of the transpose, [K, M], and a float32 scale a column of `x_MK`, [K, 1].

    As `quantize_int8` of dimension 0, transposed; otherwise as `quantize_rows`.
    """
    _check("quantize_columns", x_MK)
    return torch.ops.qrecipes.quantize_columns.default(x_MK, _seed(x_MK, stochastic_rounding))


def quantize_rows_triton(x_MK: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`quantize_rows` by its kernel, which Triton's interpreter runs on the CPU; stochastic with a seed.

    `seed` is an int64 scalar on the device of `x_MK`.
    """
    x_MK = _rows_contiguous(x_MK)
    q_MK, scale_M1 = _rows_fake(x_MK)
    if 0 in x_MK.shape:
        return q_MK, scale_M1.zero_()
    with on_device_of(x_MK):
        kernels.launch_rows(x_MK, q_MK, scale_M1, seed)
    return q_MK, scale_M1


def quantize_columns_triton(x_MK: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`quantize_columns` by its kernels, as `quantize_rows_triton`."""
    x_MK = _rows_contiguous(x_MK)
    M, K = x_MK.shape
    words_Km = x_MK.new_empty((K, -(-M // 16) * 4), dtype=torch.int32)
    scale_K1 = x_MK.new_empty((K, 1), dtype=torch.float32)
    if M == 0 or K == 0:
        scale_K1.zero_()
    else:
        with on_device_of(x_MK):
            kernels.launch_columns(x_MK, words_Km, scale_K1, seed, device_limits(x_MK.device).num_processors)
    q_KM = words_Km.view(torch.int8)
    return q_KM if M % 16 == 0 else q_KM[:, :M], scale_K1


def _check(where: str, x_MK: Tensor) -> None:
    if x_MK.ndim != 2 or not x_MK.is_floating_point():
        raise ValueError(
            f"{where}.x_MK: {x_MK.dtype} of shape {tuple(x_MK.shape)}, where a floating matrix is needed; "
            "flatten leading dimensions, or convert it with x.float()"
        )
    if x_MK.is_cuda and has_int8_tensor_cores(x_MK.device):
        require_triton(where)


def _seed(x_MK: Tensor, stochastic_rounding: bool) -> Tensor | None:
    """A seed from the default generator of the device, kept there: reading it would synchronize."""
    return torch.randint(2**62, (), device=x_MK.device) if stochastic_rounding else None


def _rows_contiguous(x_MK: Tensor) -> Tensor:
    return x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()


def _int8_like(x: Tensor, rows: int, width: int) -> Tensor:
    """An empty INT8 matrix whose rows, the last one too, have room up to a multiple of 16 bytes."""
    room = -(-width // 16) * 16
    matrix = x.new_empty((rows, room), dtype=torch.int8)
    return matrix if room == width else matrix[:, :width]


def _rows_fake(x_MK: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    M, K = x_MK.shape
    return _int8_like(x_MK, M, K), x_MK.new_empty((M, 1), dtype=torch.float32)


def _columns_fake(x_MK: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    M, K = x_MK.shape
    return _int8_like(x_MK, K, M), x_MK.new_empty((K, 1), dtype=torch.float32)


def _rows_in_torch(x_MK: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    q_MK, scale_M1 = _rows_fake(x_MK)
    q, scale = _seeded(x_MK, 1, seed)
    return q_MK.copy_(q), scale_M1.copy_(scale)


def _columns_in_torch(x_MK: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    q_KM, scale_K1 = _columns_fake(x_MK)
    q, scale = _seeded(x_MK, 0, None if seed is None else seed + 1)
    return q_KM.copy_(q.t()), scale_K1.copy_(scale.t())


def _seeded(x_MK: Tensor, dim: int, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    if seed is None:
        return quantize_int8(x_MK, dim)
    devices = [x_MK.device] if x_MK.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(seed))
        return quantize_int8(x_MK, dim, stochastic_rounding=True)


def _rows_on_cuda(x_MK: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return (quantize_rows_triton if has_int8_tensor_cores(x_MK.device) else _rows_in_torch)(x_MK, seed)


def _columns_on_cuda(x_MK: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return (quantize_columns_triton if has_int8_tensor_cores(x_MK.device) else _columns_in_torch)(x_MK, seed)


define_operator(
    "quantize_rows(Tensor x_MK, Tensor? seed=None) -> (Tensor, Tensor)",
    _rows_fake,
    CPU=_rows_in_torch,
    CUDA=_rows_on_cuda,
)
define_operator(
    "quantize_columns(Tensor x_MK, Tensor? seed=None) -> (Tensor, Tensor)",
    _columns_fake,
    CPU=_columns_in_torch,
    CUDA=_columns_on_cuda,
)
