"""The products of a linear layer in INT8, against bf16, torch._int_mm, float8 and torchao's INT8, in one run.

    tools/bench_matmul.py [--shapes MxNxK ...] [--tiles] [--output FILE.json]

M tokens, N output features, K input features. Operands are normal numbers, the same for all, quantized
beforehand, and lie as each library wants them; what is timed is the product with its scaling. `A B^T` is the
layer's output, `A B` the gradient of its input, `A^T B` that of its weight; the last two are given as they
come (strided) and, for ours, also copied so that both operands are contiguous along the sum, as
`int8_mixed_precision` quantizes them. Medians; on a GPU a burst of calls is captured in a CUDA graph, so that
no product waits for its launch, and cases take turns, so that a clock that falls as the device warms up falls
for all. torchao's kernel, as its INT8 training calls it, tunes itself for each shape before, which takes
seconds. With --tiles our product is timed with each of the tiles that the rule chooses among, and the rule's
choice.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qrecipes.parallel.process import Process, pick_device
from qrecipes.quant.int8_matmul import scaled_int8_mm, scaled_int8_mm_triton
from qrecipes.quant.int8_quantize import quantize_rows
from qrecipes.quant.int8_tiles import TMA_TILES
from qrecipes.training.metrics import environment

SHAPES = (
    (4096, 4096, 4096),
    (8192, 8192, 8192),
    (8192, 14336, 4096),
    (8192, 4096, 14336),
    (8192, 4096, 4096),
    (8192, 1024, 4096),
    (16384, 2048, 2048),
    (16384, 8192, 2048),
    (16448, 1408, 1408),
    (16448, 4224, 1408),
    (16448, 8192, 1408),
    (16448, 1408, 4096),
)
"""Cubes, Llama 3 8B's layers at 8192 tokens, 1B layers at 16,384, and ViT-g's at 64 images of 257 tokens."""
BURST = 5
"""Calls in a graph, between two readings of a GPU's clock."""
Case = Callable[[], Tensor]


def main() -> int:
    """Time every case of every shape and print the table last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", nargs="+", metavar="MxNxK", help="default: the reference's and Llama 8B's"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tiles", action="store_true", help="each of our tiles, on a GPU with TMA")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    given = [tuple(map(int, text.split("x"))) for text in args.shapes or []]
    device = pick_device("auto")
    results = []
    for M, N, K in given or SHAPES:
        for product, cases in products(M, N, K, device, args.tiles).items():
            rates = measure(cases, 2 * M * N * K, args.repeats, device)
            results.append({"M": M, "N": N, "K": K, "product": product, "tera_per_s": rates})
    found = {
        "command": " ".join(["tools/bench_matmul.py", *sys.argv[1:]]),
        "results": results,
        "environment": environment(Process(0, 1, device, None)),
    }
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(table(results))
    return 0


def products(M: int, N: int, K: int, device: torch.device, tiles: bool = False) -> dict[str, dict[str, Case]]:
    """The cases of each of a linear layer's products, [T=M, N], [M, K] and [N, K]."""
    x, w, dy = (torch.randn(shape, device=device).bfloat16() for shape in ((M, K), (N, K), (M, N)))
    xq, wq, dyq = (quantize_rows(t)[0] for t in (x, w, dy))
    make = tile_cases if tiles else cases
    return {
        "A B^T": make(x, w.t(), xq, wq.t()),
        "A B": make(dy, w, dyq, wq),
        "A^T B": make(dy.t(), x, dyq.t(), xq),
    }


def tile_cases(a: Tensor, b: Tensor, aq: Tensor, bq: Tensor) -> dict[str, Case]:
    """Our product of operands that TMA reads, with each of its tiles and with those of the rule."""
    row = torch.rand(a.shape[0], 1, device=a.device)
    col = torch.rand(1, b.shape[1], device=a.device)
    (rows_a, _), (rows_b, _) = quantize_rows(a.contiguous()), quantize_rows(b.t().contiguous())
    found: dict[str, Case] = {"bf16": lambda: a @ b}
    for tiles in (None, *TMA_TILES):
        name = "the rule's" if tiles is None else "x".join(map(str, astuple(tiles)))
        found[name] = partial(
            scaled_int8_mm_triton,
            rows_a,
            rows_b.t(),
            row,
            col,
            out_dtype=torch.bfloat16,
            tiles=tiles,
            tma=True,
        )
    return found


def cases(a: Tensor, b: Tensor, aq: Tensor, bq: Tensor) -> dict[str, Case]:
    """What computes a [M, K] times b [K, N], by name."""
    row = torch.rand(a.shape[0], 1, device=a.device)
    col = torch.rand(1, b.shape[1], device=a.device)
    rows_a, rows_b = aq.contiguous(), bq.t().contiguous()
    found: dict[str, Case] = {
        "bf16": lambda: a @ b,
        "torch._int_mm": lambda: torch._int_mm(aq, bq),
        "ours, strided": lambda: scaled_int8_mm(aq, bq, row, col, out_dtype=torch.bfloat16),
        "ours, K-major": lambda: scaled_int8_mm(rows_a, rows_b.t(), row, col, out_dtype=torch.bfloat16),
    }
    if a.is_cuda:  # its operator has no other implementation
        from torchao.prototype.quantized_training.int8_mm import scaled_int8_mm as torchao_mm

        scales = row.bfloat16(), col.bfloat16()  # the output takes their type
        found["torchao INT8"] = lambda: torchao_mm(rows_a, rows_b.t(), *scales)
    if a.is_cuda and torch.cuda.get_device_capability(a.device) >= (8, 9):
        a8 = a.contiguous().to(torch.float8_e4m3fn)
        b8 = b.t().contiguous().to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=a.device)
        found["float8 rowwise"] = lambda: torch._scaled_mm(
            a8, b8, scale_a=row, scale_b=col, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        found["float8 tensorwise"] = lambda: torch._scaled_mm(
            a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return found


def measure(
    cases: dict[str, Case], operations: int, repeats: int, device: torch.device
) -> dict[str, float | None]:
    """Tera-operations a second, by the median time; None where a library refuses the shape or layout."""
    timed: dict[str, Callable[[], float]] = {}
    for name, case in cases.items():
        try:
            timed[name] = timer(case, device)
        except (RuntimeError, ValueError):
            continue
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(repeats):
        for name, seconds in timed.items():
            times[name].append(seconds())
    return {
        name: round(operations / statistics.median(times[name]) / 1e12, 2) if name in times else None
        for name in cases
    }


def timer(case: Case, device: torch.device) -> Callable[[], float]:
    """What measures the time of one call, in seconds; on a GPU the mean of a burst."""
    for _ in range(3):
        case()
    if device.type != "cuda":

        def once() -> float:
            start = time.perf_counter()
            case()
            return time.perf_counter() - start

        return once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(BURST):
            case()
    graph.replay()

    def burst() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / BURST

    return burst


def table(results: list[dict[str, Any]]) -> str:
    """Rates, and in brackets times bf16."""
    names = list(dict.fromkeys(name for r in results for name in r["tera_per_s"]))
    lines = [f"{'M x N x K':22}{'product':>8}" + "".join(f"{name:>20}" for name in names)]
    for r in results:
        rates = r["tera_per_s"]
        line = f"{r['M']} x {r['N']} x {r['K']}"
        cells = [f"{line:22}{r['product']:>8}"]
        for name in names:
            value = rates.get(name)
            cells.append(
                f"{'-':>20}"
                if value is None
                else f"{value:12,.1f} ({value / (rates['bf16'] or math.nan):4.2f})"
            )
        lines.append("".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
