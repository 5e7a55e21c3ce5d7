"""Low-bit weights: dequantization against a copy, and products against bf16's, by the number of tokens.

    tools/bench_dequantize.py [--shapes NxK ...] [--tokens T ...] [--formats NAME ...] [--tiles]
                              [--low-rank RANK] [--output FILE.json]

N output features, K input features, T tokens. Dequantization to bf16 is given in bytes read and written a
second, beside a copy that moves as many. Products are given in microseconds: with a bf16 weight, by our
operator, which fuses few tokens, by dequantizing first whatever T, and both gradients of the input. `--tiles`
also times the fused kernels with other tiles: what the constants of `qrecipes.quant.dequantize_tiles` are to
be chosen by. Random data, medians; on a GPU of single calls with a cold L2 cache.

`--low-rank` times something else: weights with a low-rank product in them, see dequantize_low_rank_tiles.py.
With `--tiles` it tries other tiles of that kernel, and prints the constant to set.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dequantize_low_rank_tiles import compare, comparison_table, time_choices

from qrecipes.parallel.process import Process, pick_device
from qrecipes.quant.dequantize import (
    dequantize,
    dequantize_mm,
    dequantize_mm_grad_input,
    dequantize_mm_triton,
    quantize_to_affine,
    quantize_to_nf4,
)
from qrecipes.quant.dequantize_tiles import MatrixTiles, Tiles, VectorTiles
from qrecipes.quant.formats import AffineFormat, NF4Format, Payload, WeightFormat
from qrecipes.quant.ranges import minmax_grid
from qrecipes.training.metrics import environment

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
"""The linear layers of Llama 2 7B."""
TOKENS = (1, 4, 16, 64, 512, 4096)
FORMATS: dict[str, WeightFormat] = {
    "int2 g32 offset": AffineFormat(bits=2, group_size=32, symmetric=False, zero_point="float"),
    "int3 g32 zero": AffineFormat(bits=3, group_size=32, symmetric=False),
    "int4 g32 offset": AffineFormat(bits=4, group_size=32, symmetric=False, zero_point="float"),
    "int4 g128 zero": AffineFormat(bits=4, group_size=128, symmetric=False),
    "int8 row": AffineFormat(bits=8),
    "nf4": NF4Format(double_quantized=False),
    "nf4 double": NF4Format(),
}
CACHE_BYTES = 2**28
"""What is written between two calls on a GPU, so that no operand is left in its L2 cache."""
Case = Callable[[], object]
Shapes = list[tuple[int, int]]


def main() -> int:
    """Time every case and print the tables last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", metavar="NxK", help="default: Llama 2 7B's")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="T", default=TOKENS)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--tiles", action="store_true", help="time other tiles of the fused kernels, too")
    parser.add_argument("--low-rank", type=int, metavar="RANK", help="time weights with such a product alone")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    shapes = [shape_of(text) for text in args.shapes or []] or list(SHAPES)
    device = pick_device("auto")
    timer = Timer(device, args.repeats)
    timed = time_low_rank(args, shapes, timer) if args.low_rank else time_plain(args, shapes, timer)
    found = {
        "command": " ".join(["tools/bench_dequantize.py", *sys.argv[1:]]),
        **timed,
        "environment": environment(Process(0, 1, device, None)),
    }
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    if args.low_rank:
        print(comparison_table(timed["low_rank"]))
    else:
        print(bandwidth_table(timed["dequantization"]), product_table(timed["products"]), sep="\n\n")
    return 0


def time_plain(args: argparse.Namespace, shapes: Shapes, timer: Timer) -> dict[str, list[dict[str, Any]]]:
    """Dequantization and products of every weight."""
    bandwidths, products = [], []
    for N, K in shapes:
        for name in args.formats:
            payload = random_payload(N, K, FORMATS[name], timer.device)
            bandwidths.append(bandwidth(payload, name, N, K, timer))
            for T in args.tokens:
                cases = product_cases(payload, FORMATS[name], T, N, K)
                times = {case: timer.microseconds(run) for case, run in cases.items()}
                if args.tiles:
                    times |= time_tiles(payload, FORMATS[name], T, N, K, timer)
                products.append({"N": N, "K": K, "format": name, "T": T, "us": times})
    return {"dequantization": bandwidths, "products": products}


def time_low_rank(args: argparse.Namespace, shapes: Shapes, timer: Timer) -> dict[str, list[dict[str, Any]]]:
    """Weights with a low-rank product, and the largest number of tokens through a layer of each."""
    results, T = [], max(args.tokens)
    for N, K in shapes:
        for name in args.formats:
            payload, format = random_payload(N, K, FORMATS[name], timer.device), FORMATS[name]
            times = compare(payload, format, N, K, args.low_rank, T, timer.microseconds)
            is_swept = args.tiles and timer.device.type == "cuda"
            tiles = time_choices(payload, format, N, K, args.low_rank, timer.microseconds) if is_swept else {}
            row = {"N": N, "K": K, "format": name, "rank": args.low_rank, "T": T}
            results.append(row | {"us": times, "tiles": tiles})
    return {"low_rank": results}


def shape_of(text: str) -> tuple[int, int]:
    """N and K of "NxK"."""
    N, K = text.split("x")
    return int(N), int(K)


class Timer:
    """Median times of single calls on a device."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        size = CACHE_BYTES if device.type == "cuda" else 0
        self._cache = torch.empty(size, dtype=torch.uint8, device=device)

    def microseconds(self, case: Case) -> float:
        """Median after three calls that compile and warm up."""
        for _ in range(3):
            case()
        clock = self._on_gpu if self.device.type == "cuda" else self._on_cpu
        return round(statistics.median(clock(case) for _ in range(self.repeats)) * 1e6, 2)

    def _on_cpu(self, case: Case) -> float:
        start = time.perf_counter()
        case()
        return time.perf_counter() - start

    def _on_gpu(self, case: Case) -> float:
        """The cache is emptied meanwhile, which takes the device longer than the host needs to launch."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._cache.zero_()
        begin.record()
        case()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def random_payload(N: int, K: int, format: WeightFormat, device: torch.device) -> Payload:
    """The payload of a normal weight."""
    w = torch.randn(N, K, device=device)
    if isinstance(format, NF4Format):
        return quantize_to_nf4(w, format)
    return quantize_to_affine(w, minmax_grid(w, format), format)


def bandwidth(payload: Payload, name: str, N: int, K: int, timer: Timer) -> dict[str, Any]:
    """Bytes a second of dequantization to bf16, and of a copy that reads and writes as many in sum."""
    moved = sum(t.numel() * t.element_size() for t in payload) + 2 * N * K
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=payload[0].device)
    target = torch.empty_like(source)
    ours = timer.microseconds(lambda: dequantize(payload, FORMATS[name], K, torch.bfloat16))
    copy = timer.microseconds(lambda: target.copy_(source))
    rates = {"dequantize_tb_per_s": moved / ours / 1e6, "copy_tb_per_s": moved / copy / 1e6}
    return {"N": N, "K": K, "format": name, "us": ours} | {k: round(v, 3) for k, v in rates.items()}


def product_cases(payload: Payload, format: WeightFormat, T: int, N: int, K: int) -> dict[str, Case]:
    """What multiplies T tokens by a weight, or T gradients, by name."""
    x, dy, w = (torch.randn(s, device=payload[0].device).bfloat16() for s in ((T, K), (T, N), (N, K)))
    return {
        "bf16": lambda: x @ w.t(),
        "ours": lambda: dequantize_mm(x, payload, format),
        "unfused": lambda: x @ dequantize(payload, format, K, torch.bfloat16).t(),
        "bf16 grad": lambda: dy @ w,
        "ours grad": lambda: dequantize_mm_grad_input(dy, payload, format, K),
    }


def time_tiles(
    payload: Payload, format: WeightFormat, T: int, N: int, K: int, timer: Timer
) -> dict[str, float]:
    """Microseconds of the fused kernels with other tiles, those that fit the device; it must have Triton."""
    from triton.runtime.errors import OutOfResources

    times = {}
    x = torch.randn(T, K, device=timer.device).bfloat16()
    for tiles in other_tiles(T):
        product = partial(dequantize_mm_triton, x, payload, format, None, tiles)
        with suppress(OutOfResources):
            times[str(tiles)] = timer.microseconds(product)
    return times


def other_tiles(T: int) -> Iterator[Tiles]:
    """Tiles worth a try for T tokens, 128 of them at most."""
    if T == 1:
        for block_n, num_warps, repeats in ((1, 1, 4), (2, 1, 4), (4, 1, 2), (4, 1, 4), (2, 4, 2), (4, 4, 2)):
            for splits in (1, 2, 4):
                yield VectorTiles(block_n, num_warps, repeats, splits)
    if T > 128:
        return
    block_t = max(16, 1 << (T - 1).bit_length())
    for block_n, block_k, num_warps in ((64, 128, 4), (64, 128, 8), (64, 64, 4), (32, 128, 4), (128, 128, 8)):
        for num_stages in (3, 5):
            for splits in (1, 2, 4, 8):
                yield MatrixTiles(block_t, block_n, block_k, num_warps, num_stages, splits)


def bandwidth_table(results: list[dict[str, Any]]) -> str:
    """Terabytes a second, and the fraction of a copy's."""
    lines = [f"{'N x K':16}{'format':18}{'us':>10}{'TB/s':>8}{'copy TB/s':>11}{'ratio':>7}"]
    for r in results:
        ours, copy = r["dequantize_tb_per_s"], r["copy_tb_per_s"]
        shape = f"{r['N']} x {r['K']}"
        lines.append(
            f"{shape:16}{r['format']:18}{r['us']:10.1f}{ours:8.2f}{copy:11.2f}{ours / max(copy, 1e-9):7.2f}"
        )
    return "\n".join(lines)


def product_table(results: list[dict[str, Any]]) -> str:
    """Microseconds, and of other tiles the best three."""
    names = ("bf16", "ours", "unfused", "bf16 grad", "ours grad")
    lines = [f"{'N x K':16}{'format':18}{'T':>6}" + "".join(f"{name:>12}" for name in names)]
    for r in results:
        shape, times = f"{r['N']} x {r['K']}", r["us"]
        lines.append(f"{shape:16}{r['format']:18}{r['T']:6}" + "".join(f"{times[n]:12.1f}" for n in names))
        tiles = sorted((us, name) for name, us in times.items() if name not in names)
        lines.extend(f"{'':34}{us:12.1f}  {name}" for us, name in tiles[:3])
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
