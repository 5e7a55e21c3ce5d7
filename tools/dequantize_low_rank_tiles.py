"""Forming a low-bit weight with a low-rank product in it: `bench_dequantize.py --low-rank`.

Microseconds of single calls with a cold L2 cache: a `copy` of as many bytes, `dequantize` without a product,
and `with product`; `offsets`, for formats that have them, is what changing them takes. Then T tokens through
a layer: `beside` multiplies by A and B beside the base and adds, uncompiled, and `merged` multiplies by the
one weight. With `--tiles` other tiles of the kernel are tried; A and B are whole numbers over 8, of which
every sum is exact: each choice must have the reference's bits. The best are best for the layers of a block
of Llama 2 7B.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import linear

from qrecipes.quant import dequantize_low_rank as operators
from qrecipes.quant.dequantize import dequantize, dequantize_mm
from qrecipes.quant.dequantize_low_rank import (
    dequantize_low_rank,
    dequantize_low_rank_mm,
    dequantize_low_rank_reference,
)
from qrecipes.quant.formats import AffineFormat, Payload, WeightFormat
from qrecipes.quant.low_rank_offset import changed_offset, low_rank_offset_mm

CHOICES = (
    *((n, k, w, 1, 1) for n, k, w in ((64, 128, 8), (64, 128, 4), (64, 64, 4), (64, 64, 8), (32, 128, 4))),
    *((n, k, w, 1, 1) for n, k, w in ((128, 64, 4), (128, 64, 8), (128, 128, 8), (64, 256, 8), (32, 256, 8))),
    *((n, k, w, 4, 2) for n, k, w in ((64, 128, 8), (64, 64, 4), (64, 64, 8))),
    *((n, k, w, 4, 3) for n, k, w in ((64, 128, 8), (64, 64, 4))),
)
"""Arguments of `LowRankBlocks`."""
LAYERS = {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1}
"""How often a block of Llama 2 7B has a shape; other shapes count once."""
SCALING = 0.25
Clock = Callable[[Callable[[], object]], float]


def compare(
    payload: Payload, format: WeightFormat, N: int, K: int, rank: int, T: int, clock: Clock
) -> dict[str, float]:
    """Microseconds by what is done."""
    a, b = factors(N, K, rank, payload[0].device)
    x = torch.randn(T, K, device=a.device).bfloat16()
    moved = sum(t.numel() * t.element_size() for t in payload) + 2 * N * K
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=a.device)
    target = torch.empty_like(source)

    def beside() -> Tensor:
        return dequantize_mm(x, payload, format) + linear(linear(x, a) * SCALING, b)

    cases: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "dequantize": lambda: dequantize(payload, format, K, torch.bfloat16),
        "with product": lambda: dequantize_low_rank(payload, a, b, SCALING, format, K, torch.bfloat16),
        "beside": beside,
        "merged": lambda: dequantize_low_rank_mm(x, payload, a, b, SCALING, format),
    }
    if isinstance(format, AffineFormat) and format.has_offset:
        of_groups = a[:, : payload[2].shape[1]].float().contiguous()
        wide_b = b.float()
        cases["offsets"] = lambda: changed_offset(payload[2], of_groups, wide_b, SCALING, torch.float32)
        cases["merged by offsets"] = lambda: low_rank_offset_mm(
            x, payload, of_groups, wide_b, SCALING, format
        )
    return {name: clock(case) for name, case in cases.items()}


def factors(N: int, K: int, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A and B whose products' sums are exact in float32."""
    shapes = (rank, K), (N, rank)
    a, b = ((torch.randint(-3, 4, shape, device=device) / 8).bfloat16() for shape in shapes)
    return a, b


def time_choices(
    payload: Payload, format: WeightFormat, N: int, K: int, rank: int, clock: Clock
) -> dict[str, float | str]:
    """Microseconds of the kernel with each of CHOICES, "WRONG", or an error; it must be on a device."""
    a, b = factors(N, K, rank, payload[0].device)
    parts: Any = (payload, a, b, SCALING, format, K, torch.bfloat16)
    wanted = dequantize_low_rank_reference(*parts)
    found: dict[str, float | str] = {}
    for choice in CHOICES:
        blocks = operators.kernels.LowRankBlocks(*choice)
        with mock.patch.object(operators.kernels, "BLOCKS", blocks):
            try:
                is_right = torch.equal(dequantize_low_rank(*parts), wanted)
                found[_name(blocks)] = clock(lambda: dequantize_low_rank(*parts)) if is_right else "WRONG"
            except Exception as error:  # what Triton raises has no common class
                found[_name(blocks)] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def _name(blocks: tuple[int, ...]) -> str:
    return f"LowRankBlocks({', '.join(map(str, blocks))})"


def comparison_table(results: list[dict[str, Any]]) -> str:
    """Microseconds, of other tiles the best three for each weight, and the best for all."""
    names = list(dict.fromkeys(name for r in results for name in r["us"]))
    lines = [f"{'N x K':16}{'format':18}{'rank':>5}{'T':>6}" + "".join(f"{name:>19}" for name in names)]
    for r in results:
        times = "".join(f"{r['us'][n]:19.1f}" if n in r["us"] else f"{'-':>19}" for n in names)
        lines.append(f"{r['N']} x {r['K']}".ljust(16) + f"{r['format']:18}{r['rank']:5}{r['T']:6}{times}")
        timed = sorted((us, name) for name, us in r["tiles"].items() if isinstance(us, float))
        lines.extend(f"{'':45}{us:19.1f}  {name}" for us, name in timed[:3])
        lines.extend(f"{'':45}{us[:80]}  {n}" for n, us in r["tiles"].items() if isinstance(us, str))
    return "\n".join([*lines, *best_choice(results)])


def best_choice(results: list[dict[str, Any]]) -> list[str]:
    """The constant to set, and what it gains in the layers of a block; nothing where no tiles were timed."""
    totals = {}
    for name in {name for r in results for name in r["tiles"]}:
        times = [r["tiles"].get(name) for r in results]
        if all(isinstance(us, float) for us in times):
            layers = [LAYERS.get((r["N"], r["K"]), 1) for r in results]
            totals[name] = sum(us * count for us, count in zip(times, layers, strict=True))
    if not totals:
        return []
    best, default = min(totals, key=totals.__getitem__), _name(operators.kernels.BLOCKS)
    now = sum(r["us"]["with product"] * LAYERS.get((r["N"], r["K"]), 1) for r in results)
    return [f"BLOCKS = {best}: {totals[best]:.1f} us a block, all formats; default {default}: {now:.1f}"]
