"""The Triton kernel of `FusedAdamW8bit`; imported only where Triton is installed."""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from qrecipes.quant.triton_launch import Launcher

BLOCK = 256
"""Values that share a scale."""
ROWS = 4
"""Blocks of a program."""


def launch(
    p: Tensor,
    grad: Tensor,
    first: tuple[Tensor, Tensor | None, Tensor | None],
    second: tuple[Tensor, Tensor | None, Tensor | None],
    numbers: tuple[float, ...],
    random: tuple[Tensor, int] | None,
) -> None:
    """Update `p` and its moments in place, all contiguous.

    A moment is (codes, scales, map) or (values, None, None); `numbers` are the learning rate, what decay
    leaves of a weight, beta1, beta2, epsilon, and what the first and the root of the second moment are
    divided by. `random` is a seed on the device and how many random numbers others took under it.
    """
    seed, taken = (None, 0) if random is None else random
    size = p.numel()
    programs = -(-size // (BLOCK * ROWS))
    _launcher()(programs, p, grad, *first, *second, seed, size, taken, *numbers)


@cache
def _launcher() -> Launcher:
    return Launcher(_adamw8bit_kernel, {"SIZE": BLOCK, "ROWS": ROWS}, num_warps=4)


@triton.jit
def _adamw8bit_kernel(  # type: ignore[no-untyped-def]
    p_ptr,
    grad_ptr,
    m_ptr,
    m_scale_ptr,
    m_map_ptr,
    v_ptr,
    v_scale_ptr,
    v_map_ptr,
    seed_ptr,
    size,
    taken,
    lr,
    kept,
    beta1,
    beta2,
    eps,
    correction1,
    root_correction2,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS blocks of SIZE values."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = rows[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = index < size
    g = tl.load(grad_ptr + index, mask=inside, other=0.0).to(tl.float32)
    m = _moment(m_ptr, m_scale_ptr, m_map_ptr, rows, index, inside, size, SIZE)
    v = _moment(v_ptr, v_scale_ptr, v_map_ptr, rows, index, inside, size, SIZE)
    m = m + (1.0 - beta1) * (g - m)
    v = v + (1.0 - beta2) * (g * g - v)
    _store_moment(m_ptr, m_scale_ptr, m_map_ptr, m, rows, index, inside, size, SIZE)
    _store_moment(v_ptr, v_scale_ptr, v_map_ptr, v, rows, index, inside, size, SIZE)
    p = tl.load(p_ptr + index, mask=inside, other=0.0).to(tl.float32)
    p = p * kept - lr * (m / correction1) / (tl.sqrt(v) / root_correction2 + eps)
    if seed_ptr is not None:
        # 16 random bits below the last that bfloat16 keeps; what is not finite stays
        noise = tl.randint(tl.load(seed_ptr), taken + index).to(tl.int32, bitcast=True) & 0xFFFF
        bits = (p.to(tl.int32, bitcast=True) + noise) & -65536
        finite = tl.abs(p) < float("inf")
        p = tl.where(finite, bits.to(tl.float32, bitcast=True), p)
    tl.store(p_ptr + index, p.to(p_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _moment(ptr, scale_ptr, map_ptr, rows, index, inside, size, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    if scale_ptr is None:
        return tl.load(ptr + index, mask=inside, other=0.0).to(tl.float32)
    else:  # noqa: RET505 - Triton compiles one branch only if the other is in an else
        codes = tl.load(ptr + index, mask=inside, other=0).to(tl.int32)
        scale = tl.load(scale_ptr + rows, mask=rows * SIZE < size, other=0.0)
        return tl.load(map_ptr + codes) * scale[:, None]


@triton.jit
def _store_moment(ptr, scale_ptr, map_ptr, x, rows, index, inside, size, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    if scale_ptr is None:
        tl.store(ptr + index, x.to(ptr.dtype.element_ty), mask=inside)
    else:
        scale = tl.maximum(tl.max(tl.abs(x), 1), 1e-12)
        tl.store(scale_ptr + rows, scale, mask=rows * SIZE < size)
        tl.store(ptr + index, _nearest(map_ptr, x / scale[:, None]).to(tl.uint8), mask=inside)


@triton.jit
def _nearest(map_ptr, x):  # type: ignore[no-untyped-def]
    """Index of the value nearest to x among 256 that ascend; of two as near, the upper."""
    code = tl.zeros_like(x).to(tl.int32)
    for bit in tl.static_range(8):
        step = 128 >> bit
        code += tl.where(x >= tl.load(map_ptr + code + step), step, 0)
    above = tl.minimum(code + 1, 255)
    low = tl.load(map_ptr + code)
    high = tl.load(map_ptr + above)
    return tl.where(x - low >= (high - low) * 0.5, above, code)
