"""The Triton kernel of `FusedAdamW8bit`; imported only where Triton is installed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrecipes.quant.triton_launch import Launcher

BLOCK = 256
"""Values that share a scale."""
ROWS = 4
"""Blocks of a program."""
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_FIELDS = tl.constexpr(8)
_GRADIENT = 1
"""Which of them is the gradient's address."""


class Moments(NamedTuple):
    """Both moments of a parameter: codes, or values where `maps` of a job is None."""

    first: Tensor
    first_scale: Tensor | None
    second: Tensor
    second_scale: Tensor | None


class Job(NamedTuple):
    """One parameter and its moments, contiguous, from multiples of 16 bytes on."""

    p: Tensor
    moments: Moments
    taken: int
    """How many random numbers the parameters before it take."""


class Jobs(NamedTuple):
    """Parameters of one type, with moments of one kind, as `launch` takes them: for many steps, as long as
    all stay where they are."""

    table: Tensor
    """int64 [jobs, 8] on the host: what the kernel reads of a job, the gradient's address left out."""
    owners: Tensor
    firsts: Tensor
    maps: tuple[Tensor, Tensor] | None
    device: torch.device
    p_type: torch.dtype
    moment_type: torch.dtype
    unit: int


def prepare(jobs: Sequence[Job], maps: tuple[Tensor, Tensor] | None) -> Jobs:
    """Parameters to update. `maps` are the values of the codes of both moments, None where they are not
    quantized."""
    p, moments, _ = jobs[0]
    owners, firsts = _programs(tuple(job.p.numel() for job in jobs), p.device)
    table = torch.tensor([_row(job) for job in jobs], dtype=torch.int64)
    moment_type = (p if maps else moments.first).dtype
    unit = 8 if all(job.p.numel() % 8 == 0 for job in jobs) else 1
    return Jobs(table, owners, firsts, maps, p.device, p.dtype, moment_type, unit)


def launch(jobs: Jobs, grads: Sequence[Tensor], numbers: tuple[float, ...], seed: Tensor | None) -> None:
    """Update the parameters in place.

    `grads` are their gradients in the same order, of one type, contiguous, from multiples of 16 bytes on.
    `numbers` are the learning rate, what decay leaves of a weight, beta1, beta2, epsilon, and what the first
    and the root of the second moment are divided by. With `seed`, on the device, weights are rounded
    stochastically.
    """
    table = jobs.table.clone()  # the last step's may still be on its way to the device
    table[:, _GRADIENT] = torch.tensor([grad.data_ptr() for grad in grads])
    if jobs.device.type == "cuda":  # without waiting for the device
        table = table.pin_memory().to(jobs.device, non_blocking=True)
    types = tuple(TYPES[dtype] for dtype in (jobs.p_type, grads[0].dtype, jobs.moment_type))
    first_map, second_map = jobs.maps or (None, None)
    arguments = (table, jobs.owners, jobs.firsts, first_map, second_map, seed, *numbers)
    _launcher(*types, jobs.unit)(jobs.owners.numel(), *arguments)


def _row(job: Job) -> list[int]:
    """What the kernel reads of a job, `_FIELDS` integers."""
    moments = (0 if t is None else t.data_ptr() for t in job.moments)
    return [job.p.data_ptr(), 0, *moments, job.p.numel(), job.taken]


@lru_cache(maxsize=64)
def _programs(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """For each program the parameter that it works on; for each parameter its first program."""
    counts = torch.tensor([-(-size // (BLOCK * ROWS)) for size in sizes])
    owners = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), counts)
    firsts = (counts.cumsum(0) - counts).to(torch.int32)
    return owners.to(device), firsts.to(device)


@cache
def _launcher(p_type: Any, grad_type: Any, moment_type: Any, unit: int) -> Launcher:
    types = {"P_TYPE": p_type, "GRAD_TYPE": grad_type, "MOMENT_TYPE": moment_type}
    sizes = {"UNIT": unit, "SIZE": BLOCK, "ROWS": ROWS}
    return Launcher(_adamw8bit_kernel, types | sizes, num_warps=4)


@triton.jit
def _adamw8bit_kernel(  # type: ignore[no-untyped-def]
    table_ptr,
    owners_ptr,
    firsts_ptr,
    m_map_ptr,
    v_map_ptr,
    seed_ptr,
    lr,
    kept,
    beta1,
    beta2,
    eps,
    correction1,
    root_correction2,
    P_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    MOMENT_TYPE: tl.constexpr,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS blocks of SIZE values of one parameter, whose size is a multiple of UNIT."""
    owner = tl.load(owners_ptr + tl.program_id(0))
    part = tl.program_id(0) - tl.load(firsts_ptr + owner)
    table_ptr += owner * _FIELDS
    p_ptr = _pointer(table_ptr, P_TYPE)
    grad_ptr = _pointer(table_ptr + 1, GRAD_TYPE)
    size = tl.multiple_of(tl.load(table_ptr + 6), UNIT)
    rows = part.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = rows[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = index < size
    g = tl.load(grad_ptr + index, mask=inside, other=0.0).to(tl.float32)
    m = _moment(table_ptr + 2, m_map_ptr, rows, index, inside, size, MOMENT_TYPE, SIZE)
    v = _moment(table_ptr + 4, v_map_ptr, rows, index, inside, size, MOMENT_TYPE, SIZE)
    m = m + (1.0 - beta1) * (g - m)
    v = v + (1.0 - beta2) * (g * g - v)
    _store_moment(table_ptr + 2, m_map_ptr, m, rows, index, inside, size, MOMENT_TYPE, SIZE)
    _store_moment(table_ptr + 4, v_map_ptr, v, rows, index, inside, size, MOMENT_TYPE, SIZE)
    p = tl.load(p_ptr + index, mask=inside, other=0.0).to(tl.float32)
    p = p * kept - lr * (m / correction1) / (tl.sqrt(v) / root_correction2 + eps)
    if seed_ptr is not None:
        # 16 random bits below the last that bfloat16 keeps; what is not finite stays
        at = (tl.load(table_ptr + 7) + index).to(tl.int32)
        noise = tl.randint(tl.load(seed_ptr), at).to(tl.int32, bitcast=True) & 0xFFFF
        bits = (p.to(tl.int32, bitcast=True) + noise) & -65536
        finite = tl.abs(p) < float("inf")
        p = tl.where(finite, bits.to(tl.float32, bitcast=True), p)
    tl.store(p_ptr + index, p.to(P_TYPE), mask=inside)


@triton.jit
def _pointer(field_ptr, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A pointer of the table, which is aligned."""
    return tl.multiple_of(tl.load(field_ptr).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def _moment(field_ptr, map_ptr, rows, index, inside, size, TYPE: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    if map_ptr is None:
        return tl.load(_pointer(field_ptr, TYPE) + index, mask=inside, other=0.0).to(tl.float32)
    else:  # noqa: RET505 - Triton compiles one branch only if the other is in an else
        codes = tl.load(_pointer(field_ptr, tl.uint8) + index, mask=inside, other=0).to(tl.int32)
        scale_ptr = _pointer(field_ptr + 1, tl.float32)
        scale = tl.load(scale_ptr + rows, mask=rows * SIZE < size, other=0.0)
        return tl.load(map_ptr + codes) * scale[:, None]


@triton.jit
def _store_moment(field_ptr, map_ptr, x, rows, index, inside, size, TYPE: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    if map_ptr is None:
        tl.store(_pointer(field_ptr, TYPE) + index, x.to(TYPE), mask=inside)
    else:
        scale = tl.maximum(tl.max(tl.abs(x), 1), 1e-12)
        tl.store(_pointer(field_ptr + 1, tl.float32) + rows, scale, mask=rows * SIZE < size)
        codes = _nearest(map_ptr, x / scale[:, None]).to(tl.uint8)
        tl.store(_pointer(field_ptr, tl.uint8) + index, codes, mask=inside)


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
