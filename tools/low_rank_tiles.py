"""Tiles of the low-rank kernels: `bench_low_rank.py --tiles`, by which the constants of
`qrecipes.quant.low_rank_kernels` are chosen.

Whole numbers and powers of two, of which every sum is exact: each choice must have the reference's bits.
Device time of single calls with a cold L2 cache. The best are best for the layers of a block of Llama 2 7B.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from qrecipes.quant import low_rank_kernels as kernels
from qrecipes.quant.low_rank_kernels import Blocks
from qrecipes.quant.low_rank_reference import low_rank_weight_grads_reference, low_rank_weight_reference
from qrecipes.quant.low_rank_rounding import low_rank_weight_grads_triton, low_rank_weight_triton
from qrecipes.quant.low_rank_storage import LowRankRounding, encode

WEIGHT_CHOICES = (
    *(Blocks(n, k, w, 1) for n, k, w in ((64, 128, 8), (64, 128, 4), (64, 64, 4), (128, 128, 8))),
    *(Blocks(n, k, w, 2) for n, k, w in ((64, 128, 8), (64, 64, 4))),
    *(Blocks(n, k, w, 4) for n, k, w in ((64, 128, 8), (64, 128, 4), (64, 64, 4), (64, 256, 8))),
    *(Blocks(n, k, w, 8) for n, k, w in ((64, 128, 8), (64, 128, 4), (64, 64, 4))),
    *(Blocks(n, k, w, 8, 3) for n, k, w in ((64, 128, 8), (64, 128, 4), (64, 64, 4))),
)
GRADS_CHOICES = tuple(
    Blocks(n, k, w, num_stages=stages)
    for n, k, w in (
        (32, 128, 4),
        (64, 64, 4),
        (64, 128, 4),
        (64, 256, 4),
        (64, 256, 8),
        (128, 128, 4),
        (128, 128, 8),
    )
    for stages in (1, 2)  # as many as `kernels.num_stages` allows; less where memory is short
)
PROGRAMS = (256, 384, 768, 1024)
"""Tried in place of GRADIENT_PROGRAMS with the gradients' best tiles."""
LAYERS = {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1}
"""How often a block of Llama 2 7B has a shape; other shapes count once."""
CACHE_BYTES = 2**28
TABLES = {"weight": ("WEIGHT_BLOCKS", WEIGHT_CHOICES), "grads": ("GRADS_BLOCKS", GRADS_CHOICES)}
COMPILING_ROWS = 512


class Exact(NamedTuple):
    """A weight, dL/dW_hat, and what the reference makes of them."""

    grad: Tensor
    parts: Any
    """What the kernels' functions take: phi, A, B, scales, no zero points, the rounding."""
    wanted: dict[str, list[Tensor]]


class Kind(NamedTuple):
    """What tiles may depend on, beside a weight's sizes."""

    storage: Any
    """Of phi."""
    rank: int
    bits: int
    dtype: torch.dtype
    """Of A and B."""


def exact_case(N: int, K: int, kind: Kind, device: torch.device) -> Exact:
    """Z has fractions, halves among them; sums of gradients are whole numbers times a power of two."""
    torch.manual_seed(0)
    weight = LowRankRounding(bits=kind.bits, in_features=K, storage=kind.storage, scaling=1 / 32)
    phi = encode(torch.randn(N, K, device=device) * 2 ** (kind.bits - 2), weight)
    whole = partial(torch.randint, device=device)
    a, b = (whole(-2, 3, shape).to(kind.dtype) for shape in ((N, kind.rank), (kind.rank, K)))
    scale = 2.0 ** whole(-8, -6, (N, 1))
    grad = whole(-2, 3, (N, K)).bfloat16()
    parts = (phi, a, b, scale, None, weight)
    wanted = {
        "weight": [low_rank_weight_reference(*parts, torch.bfloat16)],
        "grads": [t for t in low_rank_weight_grads_reference(grad, *parts) if t is not None],
    }
    return Exact(grad, parts, wanted)


def call_of(kernel: str, case: Exact) -> Callable[[], list[Tensor]]:
    """The kernel by itself."""
    if kernel == "weight":
        phi, a, b, scale, zero, weight = case.parts
        return lambda: [low_rank_weight_triton(phi, a, b, scale, zero, weight, torch.bfloat16)]
    return lambda: [t for t in low_rank_weight_grads_triton(case.grad, *case.parts) if t is not None]


def chosen(kernel: str, blocks: Blocks) -> Any:
    """A context in which a kernel has these tiles for every storage."""
    return mock.patch.object(kernels, TABLES[kernel][0], {"": blocks})


def compile_choice(kernel: str, blocks: Blocks, K: int, kind: Kind) -> str | None:
    """Leave the kernel in Triton's cache, from a process of its own; an error in words."""
    case = _compiling_case(K, kind)
    try:
        with chosen(kernel, blocks):
            call_of(kernel, case)()
    except Exception as error:  # what Triton raises has no common class
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


@cache
def _compiling_case(K: int, kind: Kind) -> Exact:
    return exact_case(COMPILING_ROWS, K, kind, torch.device("cuda"))


def compile_all(Ks: set[int], kinds: list[Kind], swept: Sequence[str]) -> dict[tuple[Any, ...], str]:
    """Every choice in parallel; the errors of those that cannot be."""
    tasks = [
        (kernel, blocks, K, kind)
        for K in sorted(Ks)
        for kind in kinds
        for kernel in swept
        for blocks in TABLES[kernel][1]
    ]
    workers = max(min(16, os.cpu_count() or 1, len(tasks)), 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        errors = pool.map(compile_choice, *zip(*tasks, strict=True))
        return {task: error for task, error in zip(tasks, errors, strict=True) if error is not None}


def device_us(case: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of single calls, all enqueued before the first ends: emptying the cache takes the device longer
    than a call takes the host."""
    if device.type != "cuda":
        return 0.0
    empty = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)
    case()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        empty.zero_()
        begin.record()
        case()
        end.record()
    torch.cuda.synchronize()
    return round(statistics.median(begin.elapsed_time(end) for begin, end in events) * 1e3, 1)


def sweep(
    shapes: list[tuple[int, int]],
    kinds: list[Kind],
    swept: Sequence[str],
    repeats: int,
    device: torch.device,
) -> dict[str, Any]:
    """Microseconds by kernel, choice and column, which is a shape and storage; and the best choices.

    `swept` are keys of TABLES.
    """
    errors = compile_all({K for _, K in shapes}, kinds, swept) if device.type == "cuda" else {}
    times: dict[str, dict[str, dict[str, float | str]]] = {kernel: {} for kernel in swept}
    best: dict[str, dict[str, dict[str, Any]]] = {kernel: {} for kernel in swept}
    for kind in kinds:
        storage = kind.storage
        cases = {shape: exact_case(*shape, kind, device) for shape in shapes}
        for kernel in swept:
            table, choices = TABLES[kernel]
            found = {}
            for blocks in choices:
                row = {}
                for shape, case in cases.items():
                    error = errors.get((kernel, blocks, shape[1], kind))
                    with chosen(kernel, blocks):
                        row[shape] = error or _checked_us(kernel, case, device, repeats)
                _enter(times[kernel], _name(blocks), storage, row)
                if all(isinstance(us, float) for us in row.values()):
                    found[blocks] = _of_a_block(row)
            if not found:
                continue
            first = min(found, key=found.__getitem__)
            _, a_NR, *_, weight = cases[shapes[0]].parts
            default = kernels.blocks_of(getattr(kernels, table), weight, a_NR)
            best[kernel][storage] = {
                "entry": "float32" if kind.dtype is torch.float32 else storage,
                "blocks": _name(first),
                "us": found[first],
                "default": _name(default),
                "default_us": found.get(default),
            }
            if kernel == "grads":
                for programs in PROGRAMS:
                    with mock.patch.object(kernels, "GRADIENT_PROGRAMS", programs), chosen(kernel, first):
                        row = {
                            shape: _checked_us(kernel, case, device, repeats) for shape, case in cases.items()
                        }
                    _enter(times[kernel], f"best, {programs} programs", storage, row)
    return {"us": times, "best": best}


def _checked_us(kernel: str, case: Exact, device: torch.device, repeats: int) -> float | str:
    call = call_of(kernel, case)
    if not all(torch.equal(a, b) for a, b in zip(call(), case.wanted[kernel], strict=True)):
        return "WRONG"
    return device_us(call, device, repeats)


def _name(blocks: Blocks) -> str:
    return f"Blocks({', '.join(map(str, blocks))})"


def _enter(table: dict[str, dict[str, float | str]], name: str, storage: str, row: dict[Any, Any]) -> None:
    table.setdefault(name, {}).update({f"{N}x{K} {storage}": us for (N, K), us in row.items()})


def _of_a_block(row: dict[tuple[int, int], Any]) -> float:
    return round(sum(us * LAYERS.get(shape, 1) for shape, us in row.items()), 1)


def sweep_table(found: dict[str, Any], floors: dict[str, dict[str, float]]) -> str:
    """A row of microseconds a choice; what a copy of as many bytes takes; then the best."""
    lines = []
    for kernel, rows in found["us"].items():
        columns = list(next(iter(rows.values())))
        lines.append(f"{kernel:32}" + "".join(f"{c.replace('fixed_point8', 'fix8'):>17}" for c in columns))
        lines.append(f"{'copy of as many bytes':32}" + "".join(f"{floors[kernel][c]:17.1f}" for c in columns))
        for name, row in rows.items():
            lines.append(f"{name:32}" + "".join(f"{str(row.get(c, '-'))[:16]:>17}" for c in columns))
    for kernel, by_storage in found["best"].items():
        for storage, best in by_storage.items():
            lines.append(
                f"{TABLES[kernel][0]}[{best['entry']!r}] = {best['blocks']}: {best['us']} us a block of "
                f"layers in {storage}; default {best['default']}: {best['default_us']}"
            )
    return "\n".join(lines)
