"""Linear layers of many sizes, forward and backward in bf16 and INT8: which are too small to gain.

    tools/bench_layers.py [--tokens 8192 16384] [--output FILE.json]

Prints the time of both, and the `size` K N / (K + N) that `int8_mixed_precision.min_size` is compared with. A
layer's calls are captured in a CUDA graph and replayed, so that launches from Python are not measured. Last
come, for each number of tokens, the largest size that lost and the smallest that won; the two overlap where
the size alone does not decide.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qrecipes.parallel.process import Process, pick_device
from qrecipes.training.metrics import environment
from qrecipes.transforms.int8_mixed_precision import Int8MixedPrecisionConfig, Int8MixedPrecisionLinear

WIDTHS = (512, 1024, 1408, 2048, 4096, 8192)


def main() -> int:
    """Measure every pair of widths, and print the table last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = pick_device("cuda")
    results = []
    for tokens in args.tokens:
        for K in args.widths:
            for N in args.widths:
                linear = nn.Linear(K, N, bias=False, dtype=torch.bfloat16, device=device)
                int8 = Int8MixedPrecisionLinear.from_linear(linear, Int8MixedPrecisionConfig())
                bf16_ms, int8_ms = (milliseconds(layer, tokens, args.repeats) for layer in (linear, int8))
                sizes = {"tokens": tokens, "in_features": K, "out_features": N, "size": K * N / (K + N)}
                results.append(sizes | {"bf16_ms": bf16_ms, "int8_ms": int8_ms})
    if args.output:
        found = {
            "command": " ".join(["tools/bench_layers.py", *sys.argv[1:]]),
            "results": results,
            "environment": environment(Process(0, 1, device, None)),
        }
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(table(results))
    return 0


def milliseconds(layer: nn.Linear, tokens: int, repeats: int) -> float:
    """Median time of the layer's three products on random data."""
    x = torch.randn(tokens, layer.in_features, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    grad_y = torch.randn(tokens, layer.out_features, dtype=torch.bfloat16, device="cuda")

    def step() -> None:
        torch.autograd.grad(layer(x), [x, layer.weight], grad_y)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times), 4)


def table(results: list[dict[str, Any]]) -> str:
    """By size, with the gain, and where gains begin."""
    lines = [f"{'tokens':>8}{'in':>7}{'out':>7}{'size':>8}{'bf16 ms':>10}{'INT8 ms':>10}{'x':>7}"]
    ordered = sorted(results, key=lambda r: (r["tokens"], r["size"]))
    for r in ordered:
        lines.append(
            f"{r['tokens']:8}{r['in_features']:7}{r['out_features']:7}{r['size']:8.0f}{r['bf16_ms']:10.3f}"
            f"{r['int8_ms']:10.3f}{r['bf16_ms'] / r['int8_ms']:7.2f}"
        )
    for tokens in dict.fromkeys(r["tokens"] for r in ordered):
        lost = [r["size"] for r in ordered if r["tokens"] == tokens and r["int8_ms"] >= r["bf16_ms"]]
        won = [r["size"] for r in ordered if r["tokens"] == tokens and r["int8_ms"] < r["bf16_ms"]]
        lines.append(
            f"{tokens} tokens: largest size that lost {max(lost, default=0):.0f}, "
            f"smallest that won {min(won, default=float('nan')):.0f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
