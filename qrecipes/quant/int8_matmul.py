"""Scaled INT8 matmul: an exact integer product times a scale a row and a scale a column, plus a bias.

M rows of A, N columns of B, K their contraction. Fastest where K is contiguous in both operands: A as [M, K],
B as the transpose of a contiguous [N, K]. On Hopper and later such operands are read with TMA, and others are
first copied into that layout where the product is large; elsewhere a kernel reads through pointers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from qrecipes.quant import int8_tune
from qrecipes.quant.device import (
    HAS_TRITON,
    device_limits,
    has_int8_tensor_cores,
    on_device_of,
    require_triton,
)
from qrecipes.quant.int8_tiles import (
    GROUP_M,
    TILES,
    TMA_TILES,
    Tiles,
    choose_tiles,
    choose_tma_tiles,
    fits_tma,
)
from qrecipes.quant.operators import define_operator

__all__ = [
    "GROUP_M",
    "INT32_SAFE_K",
    "SPLIT_K",
    "TILES",
    "Tiles",
    "choose_tiles",
    "scaled_int8_mm",
    "scaled_int8_mm_reference",
    "scaled_int8_mm_triton",
    "tile_scaled_int8_mm",
    "tile_scaled_int8_mm_reference",
    "tune",
]

INT32_SAFE_K = 131_071
"""Longest contraction whose sum of INT8 products fits int32 whatever the values, -128 included."""
SPLIT_K = 65_536
"""Longer contractions are summed in parts of this length, and the parts in int64."""
FLOAT32_SAFE_K = 1_024
"""Longest contraction whose sum of INT8 products is exact in float32: 1024 * 128 * 128 = 2**24."""
COPY_WORK, COPY_WIDTH = 2**31, 256
"""M * N * K, and M and N each, from which on an operand in another layout is copied for TMA to read. On H100
the pointer kernel does 110 to 300 TOPS on such layouts and TMA 1200: they save more than a copy costs."""
SCALE_TILE = 128
"""Elements that share a scale along each tiled dimension of `tile_scaled_int8_mm`."""

if HAS_TRITON:
    from qrecipes.quant import int8_kernels


def scaled_int8_mm(
    a_MK: Tensor,
    b_KN: Tensor,
    row_scale_M1: Tensor,
    col_scale_1N: Tensor,
    *,
    bias_N: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`(a @ b) * row_scale * col_scale + bias`, [M, N]: the sum exact in integers, the rest in float32.

    Either scale may be [1, 1] for the whole matrix. The result is rounded to `out_dtype` once. Takes every M,
    N and K, 0 included, and any strides. On CUDA a Triton kernel computes it; every path is bit-equal to
    `scaled_int8_mm_reference`. `torch.compile` sees one operator, which has no gradient.

    Raises:
        ValueError: if a type, a shape or a device does not fit.
    """
    _check("scaled_int8_mm", a_MK, b_KN, row_scale_M1, col_scale_1N, bias_N, out_dtype)
    return torch.ops.qrecipes.scaled_int8_mm.default(
        a_MK, b_KN, row_scale_M1, col_scale_1N, out_dtype, bias_N
    )


def scaled_int8_mm_reference(
    a_MK: Tensor,
    b_KN: Tensor,
    row_scale_M1: Tensor,
    col_scale_1N: Tensor,
    *,
    bias_N: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The same in plain PyTorch, slowly: float64 holds every sum of INT8 products exactly up to K = 2**39."""
    _check("scaled_int8_mm_reference", a_MK, b_KN, row_scale_M1, col_scale_1N, bias_N, out_dtype)
    return _scale(a_MK.double() @ b_KN.double(), row_scale_M1, col_scale_1N, bias_N, out_dtype)


def scaled_int8_mm_triton(
    a_MK: Tensor,
    b_KN: Tensor,
    row_scale_M1: Tensor,
    col_scale_1N: Tensor,
    *,
    bias_N: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    tiles: Tiles | None = None,
    tma: bool = False,
) -> Tensor:
    """The same by one Triton kernel, with `tiles` or those that a fixed rule gives for the tensors' device.

    With `tma` operands that TMA cannot read are copied, whatever their size. Takes tensors on the CPU under
    Triton's interpreter (TRITON_INTERPRET=1, set before this module is imported), which truncates to bfloat16
    where a device rounds.

    Raises:
        ValueError: as `scaled_int8_mm`.
        RuntimeError: if Triton is not installed.
    """
    _check("scaled_int8_mm_triton", a_MK, b_KN, row_scale_M1, col_scale_1N, bias_N, out_dtype)
    require_triton("scaled_int8_mm")
    (M, K), N = a_MK.shape, b_KN.shape[1]
    _, num_processors, shared_bytes = device_limits(a_MK.device)
    if not tma or 0 in (M, N, K):
        plan = _Plan(tiles or choose_tiles(M, N, shared_bytes, num_processors))
    else:
        fitting = choose_tma_tiles(M, N, K, shared_bytes, num_processors, _output_bytes(K, out_dtype))
        tiles = tiles or fitting or next(iter(TMA_TILES))
        plan = _Plan(tiles, num_processors)
        a_MK, b_KN = _readable_by_tma(a_MK), _readable_by_tma(b_KN.t()).t()
    return _by_kernel(a_MK, b_KN, row_scale_M1, col_scale_1N, bias_N, out_dtype, plan)


def tile_scaled_int8_mm(
    a_MK: Tensor, b_KN: Tensor, a_scale: Tensor, b_scale: Tensor, *, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Product of operands with a scale for each 1 x 128 of A and each 128 x 128 of B, [M, N].

    `a_scale` is [M, ceil(K / 128)], `b_scale` [ceil(K / 128), ceil(N / 128)]; the last tiles may be smaller.
    Sums of 128 products are exact, and then scaled and summed in float32, in order of K, on every path.

    Raises:
        ValueError: if a type, a shape or a device does not fit.
    """
    _check_tiles("tile_scaled_int8_mm", a_MK, b_KN, a_scale, b_scale, out_dtype)
    return torch.ops.qrecipes.tile_scaled_int8_mm.default(a_MK, b_KN, a_scale, b_scale, out_dtype)


def tile_scaled_int8_mm_reference(
    a_MK: Tensor, b_KN: Tensor, a_scale: Tensor, b_scale: Tensor, *, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """The same in plain PyTorch, one tile of K after the other."""
    _check_tiles("tile_scaled_int8_mm_reference", a_MK, b_KN, a_scale, b_scale, out_dtype)
    return _tile_scaled_in_torch(a_MK, b_KN, a_scale, b_scale, out_dtype)


def tile_scaled_int8_mm_triton(
    a_MK: Tensor, b_KN: Tensor, a_scale: Tensor, b_scale: Tensor, *, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """The same by the Triton kernel, which also runs in the interpreter, as `scaled_int8_mm_triton` does."""
    _check_tiles("tile_scaled_int8_mm_triton", a_MK, b_KN, a_scale, b_scale, out_dtype)
    require_triton("scaled_int8_mm")
    out_MN = a_MK.new_empty(a_MK.shape[0], b_KN.shape[1], dtype=out_dtype)
    if out_MN.numel() > 0:
        with torch.cuda.device_of(a_MK):
            int8_kernels.launch_tile_scaled(a_MK, b_KN, a_scale, b_scale, out_MN)
    return out_MN


def tune(M: int, N: int, K: int, device: torch.device | str = "cuda") -> Tiles:
    """Measure the candidates of TMA_TILES on products of this size, and keep the fastest on disk.

    Products of about this size use it from now on, in this run and in later ones. With QRECIPES_INT8_TUNE=1
    shapes are tuned when they are first met, int8_tune.MAX_SHAPES of them at most. The choice changes no
    result. Takes some seconds, most of them for compiling.

    Raises:
        RuntimeError: if the device has no TMA, or a CUDA graph is being captured.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise RuntimeError(
            f"tune.device: {device} has no TMA; only kernels on a CUDA device have tiles to choose; use one"
        )
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    limits = device_limits(device)
    if not limits.has_tma:
        raise RuntimeError(
            f"tune.device: {torch.cuda.get_device_name(device)} has no TMA; its kernel takes its tiles by "
            "a rule alone, so do not tune there"
        )
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune: a CUDA graph is being captured, which timing would spoil; tune before that")
    a_MK, b_NK = (
        _readable_by_tma(torch.randint(-127, 128, (rows, K), dtype=torch.int8, device=device))
        for rows in (M, N)
    )
    ones = torch.ones(1, 1, device=device)

    def measure_ms(tiles: Tiles) -> float:
        plan = _Plan(tiles, limits.num_processors)
        return int8_tune.median_ms(
            partial(_by_kernel, a_MK, b_NK.t(), ones, ones, None, torch.bfloat16, plan)
        )

    with torch.cuda.device(device):
        candidates = [tiles for tiles in TMA_TILES if fits_tma(tiles, limits.shared_bytes, 2)]
        tiles = int8_tune.table(device).add(M, N, K, candidates, measure_ms)
    _plan.cache_clear()
    return tiles


class _Plan(NamedTuple):
    """How one product is computed on a device."""

    tiles: Tiles
    tma_processors: int = 0
    """Number of processors for the kernel that uses TMA; 0 for the one that does not."""


@lru_cache(maxsize=4096)
def _plan(device: torch.device, M: int, N: int, K: int, readable: bool, output_bytes: int) -> _Plan:
    """The kernel and its tiles for operands that TMA can read, or for others; none of the sizes is 0."""
    limits = device_limits(device)
    _, num_processors, shared_bytes = limits
    large = M * N * K >= COPY_WORK and min(M, N) >= COPY_WIDTH
    if limits.has_tma and (readable or large):
        if int8_tune.is_wanted():
            _tune_unless_known(device, M, N, K)
        tiles = int8_tune.table(device).get(M, N, K)
        if tiles is None or not fits_tma(tiles, shared_bytes, output_bytes):
            tiles = choose_tma_tiles(M, N, K, shared_bytes, num_processors, output_bytes)
        if tiles is not None:
            return _Plan(tiles, num_processors)
    return _Plan(choose_tiles(M, N, shared_bytes, num_processors))


def _output_bytes(K: int, out_dtype: torch.dtype) -> int:
    """Size of an element that the kernel writes: a long K is summed in int32, float64 made of float32."""
    return 4 if K > INT32_SAFE_K else min(4, out_dtype.itemsize)


def _tune_unless_known(device: torch.device, M: int, N: int, K: int) -> None:
    table = int8_tune.table(device)
    may_tune = table.added < int8_tune.MAX_SHAPES and not torch.cuda.is_current_stream_capturing()
    if may_tune and table.get(M, N, K) is None:
        tune(M, N, K, device)


def _readable_by_tma(matrix: Tensor) -> Tensor:
    """The matrix, or a copy with contiguous rows that start at multiples of 16 bytes."""
    if int8_kernels.tma_can_read(matrix, 0):
        return matrix
    rows, width = matrix.shape
    copy = matrix.new_empty_strided((rows, width), (-(-width // 16) * 16, 1))
    return copy.copy_(matrix)


def _check_operands(where: str, a_MK: Tensor, b_KN: Tensor, out_dtype: torch.dtype) -> None:
    for name, t in (("a_MK", a_MK), ("b_KN", b_KN)):
        if t.dtype is not torch.int8 or t.ndim != 2:
            raise ValueError(
                f"{where}.{name}: {t.dtype} of shape {tuple(t.shape)}, where an int8 matrix is needed; "
                "quantize it with quantize_int8 and flatten leading dimensions"
            )
    K, K_of_b = a_MK.shape[1], b_KN.shape[0]
    if K_of_b != K:
        raise ValueError(
            f"{where}.b_KN: {K_of_b} rows, where a_MK has {K} columns and both are summed over; transpose one"
        )
    if not out_dtype.is_floating_point:
        raise ValueError(f"{where}.out_dtype: {out_dtype} cannot hold scaled sums; use a floating type")


def _check(
    where: str,
    a_MK: Tensor,
    b_KN: Tensor,
    row_scale_M1: Tensor,
    col_scale_1N: Tensor,
    bias_N: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    _check_operands(where, a_MK, b_KN, out_dtype)
    M, N = a_MK.shape[0], b_KN.shape[1]
    for name, t, shape in (("row_scale_M1", row_scale_M1, (M, 1)), ("col_scale_1N", col_scale_1N, (1, N))):
        if not isinstance(t, Tensor):
            raise ValueError(
                f"{where}.{name}: {t!r}, where a tensor of scales of shape (1, 1) or {shape} is needed; use "
                "torch.tensor([[scale]]) on the operands' device"
            )
        if (t.shape != shape and t.shape != (1, 1)) or not t.is_floating_point():
            raise ValueError(
                f"{where}.{name}: {t.dtype} of shape {tuple(t.shape)}, where floating scales of shape "
                f"(1, 1) or {shape} are needed; reshape or convert them"
            )
    if bias_N is not None and (bias_N.shape != (N,) or not bias_N.is_floating_point()):
        raise ValueError(
            f"{where}.bias_N: {bias_N.dtype} of shape {tuple(bias_N.shape)}, where floating values of shape "
            f"({N},) are needed; reshape or convert them"
        )
    others = (
        ("b_KN", b_KN),
        ("row_scale_M1", row_scale_M1),
        ("col_scale_1N", col_scale_1N),
        ("bias_N", bias_N),
    )
    _check_devices(where, a_MK, others)


def _check_tiles(
    where: str, a_MK: Tensor, b_KN: Tensor, a_scale: Tensor, b_scale: Tensor, out_dtype: torch.dtype
) -> None:
    _check_operands(where, a_MK, b_KN, out_dtype)
    (M, K), N = a_MK.shape, b_KN.shape[1]
    tiles_of_K, tiles_of_N = -(-K // SCALE_TILE), -(-N // SCALE_TILE)
    shapes = ("a_scale", a_scale, (M, tiles_of_K)), ("b_scale", b_scale, (tiles_of_K, tiles_of_N))
    for name, t, shape in shapes:
        if t.shape != shape or not t.is_floating_point():
            raise ValueError(
                f"{where}.{name}: {t.dtype} of shape {tuple(t.shape)}, where floating scales of shape "
                f"{shape} are needed, one for every {SCALE_TILE} of K; reshape or convert them"
            )
    _check_devices(where, a_MK, (("b_KN", b_KN), ("a_scale", a_scale), ("b_scale", b_scale)))


def _check_devices(where: str, a_MK: Tensor, others: tuple[tuple[str, Tensor | None], ...]) -> None:
    for name, t in others:
        if t is not None and t.device != a_MK.device:
            raise ValueError(f"{where}.{name}: on {t.device}, but a_MK is on {a_MK.device}; move it there")


def _scale(
    sum_MN: Tensor, row_scale_M1: Tensor, col_scale_1N: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """The epilogue that the reference, the CPU path and the kernels share, step for step."""
    scaled = sum_MN.float() * row_scale_M1.float() * col_scale_1N.float()
    return (scaled if bias_N is None else scaled + bias_N.float()).to(out_dtype)


def _scaled_int8_mm_cuda(
    a_MK: Tensor,
    b_KN: Tensor,
    row_scale_M1: Tensor,
    col_scale_1N: Tensor,
    out_dtype: torch.dtype,
    bias_N: Tensor | None = None,
) -> Tensor:
    """Called hundreds of times a step, so that every query of the driver would be felt."""
    M, K = a_MK.shape
    N, device = b_KN.shape[1], a_MK.device
    if not has_int8_tensor_cores(device):
        return _scaled_int8_mm_in_torch(a_MK, b_KN, row_scale_M1, col_scale_1N, out_dtype, bias_N)
    require_triton("scaled_int8_mm")
    if M == 0 or N == 0 or K == 0:
        plan = _Plan(TILES[-1][0])
    else:
        readable = int8_kernels.tma_can_read(a_MK, 0) and int8_kernels.tma_can_read(b_KN, 1)
        plan = _plan(device, M, N, K, readable, _output_bytes(K, out_dtype))
        if plan.tma_processors and not readable:
            a_MK, b_KN = _readable_by_tma(a_MK), _readable_by_tma(b_KN.t()).t()
    return _by_kernel(a_MK, b_KN, row_scale_M1, col_scale_1N, bias_N, out_dtype, plan)


def _scaled_int8_mm_in_torch(
    a_MK: Tensor,
    b_KN: Tensor,
    row_scale_M1: Tensor,
    col_scale_1N: Tensor,
    out_dtype: torch.dtype,
    bias_N: Tensor | None = None,
) -> Tensor:
    fits = a_MK.shape[1] <= INT32_SAFE_K
    sum_MN = _int32_mm(a_MK, b_KN) if fits else _sum_of_parts(a_MK, b_KN, _int32_mm)
    return _scale(sum_MN, row_scale_M1, col_scale_1N, bias_N, out_dtype)


def _scaled_int8_mm_fake(
    a_MK: Tensor,
    b_KN: Tensor,
    row_scale_M1: Tensor,
    col_scale_1N: Tensor,
    out_dtype: torch.dtype,
    bias_N: Tensor | None = None,
) -> Tensor:
    return a_MK.new_empty(a_MK.shape[0], b_KN.shape[1], dtype=out_dtype)


def _tile_scaled_on_cuda(
    a_MK: Tensor, b_KN: Tensor, a_scale: Tensor, b_scale: Tensor, out_dtype: torch.dtype
) -> Tensor:
    if not has_int8_tensor_cores(a_MK.device):
        return _tile_scaled_in_torch(a_MK, b_KN, a_scale, b_scale, out_dtype)
    return tile_scaled_int8_mm_triton(a_MK, b_KN, a_scale, b_scale, out_dtype=out_dtype)


def _tile_scaled_in_torch(
    a_MK: Tensor, b_KN: Tensor, a_scale: Tensor, b_scale: Tensor, out_dtype: torch.dtype
) -> Tensor:
    M, N = a_MK.shape[0], b_KN.shape[1]
    out_MN = torch.zeros(M, N, dtype=torch.float32, device=a_MK.device)
    if a_MK.shape[1] > 0:
        parts = zip(a_MK.split(SCALE_TILE, 1), b_KN.split(SCALE_TILE, 0), strict=True)
        for tile, (a_Mk, b_kN) in enumerate(parts):
            b_scale_N = b_scale[tile].float().repeat_interleave(SCALE_TILE)[:N]
            out_MN += (a_Mk.float() @ b_kN.float()) * (a_scale[:, tile, None].float() * b_scale_N)
    return out_MN.to(out_dtype)


def _tile_scaled_fake(
    a_MK: Tensor, b_KN: Tensor, a_scale: Tensor, b_scale: Tensor, out_dtype: torch.dtype
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
    bias_N: Tensor | None,
    out_dtype: torch.dtype,
    plan: _Plan,
) -> Tensor:
    if a_MK.shape[1] <= INT32_SAFE_K:
        epilogue = int8_kernels.Epilogue(row_scale_M1, col_scale_1N, bias_N)
        return _launch(a_MK, b_KN, epilogue, out_dtype, plan)
    sum_MN = _sum_of_parts(a_MK, b_KN, lambda a, b: _launch(a, b, None, torch.int32, plan))
    return _scale(sum_MN, row_scale_M1, col_scale_1N, bias_N, out_dtype)


def _launch(
    a_MK: Tensor, b_KN: Tensor, epilogue: int8_kernels.Epilogue | None, out_dtype: torch.dtype, plan: _Plan
) -> Tensor:
    """Run the kernel: scaled into `out_dtype`, or the sums alone in int32 without an epilogue."""
    if out_dtype is torch.float64:  # its blocks would take twice the shared memory, and hold float32 values
        return _launch(a_MK, b_KN, epilogue, torch.float32, plan).double()
    out_MN = a_MK.new_empty((a_MK.shape[0], b_KN.shape[1]), dtype=out_dtype)
    if out_MN.numel() == 0:
        return out_MN
    with on_device_of(a_MK):
        if plan.tma_processors:
            int8_kernels.launch_tma(a_MK, b_KN, epilogue, out_MN, plan.tiles, plan.tma_processors)
        else:
            int8_kernels.launch_pointers(a_MK, b_KN, epilogue, out_MN, plan.tiles)
    return out_MN


define_operator(
    "scaled_int8_mm(Tensor a_MK, Tensor b_KN, Tensor row_scale_M1, Tensor col_scale_1N, "
    "ScalarType out_dtype, Tensor? bias_N=None) -> Tensor",
    _scaled_int8_mm_fake,
    CPU=_scaled_int8_mm_in_torch,
    CUDA=_scaled_int8_mm_cuda,
)
define_operator(
    "tile_scaled_int8_mm(Tensor a_MK, Tensor b_KN, Tensor a_scale, Tensor b_scale, "
    "ScalarType out_dtype) -> Tensor",
    _tile_scaled_fake,
    CPU=_tile_scaled_in_torch,
    CUDA=_tile_scaled_on_cuda,
)
