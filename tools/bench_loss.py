"""Peak memory and time of the last layer and its loss, plain, chunked and Liger's, forward and backward.

    tools/bench_loss.py [--tokens T] [--width D] [--vocabulary V] [--output FILE.json]

Each case runs in a process of its own, on a GPU where there is one; random data, bfloat16 on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qrecipes.parallel.process import Process, pick_device
from qrecipes.training.losses import chunked_cross_entropy, cross_entropy_sum, liger_cross_entropy
from qrecipes.training.metrics import environment

CASES = ("plain", "plain, compiled", "chunked", "chunked, compiled", "liger")


def main() -> int:
    """Run every case and print the table last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--chunk-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args)))
        return 0
    shape = [f"--{key}={getattr(args, key)}" for key in ("tokens", "width", "vocabulary", "repeats")]
    shape.append(f"--chunk-tokens={args.chunk_tokens}")
    results = []
    for case in CASES:
        command = [sys.executable, __file__, *shape, "--case", case]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        last = (done.stderr if done.returncode else done.stdout).strip().splitlines()[-1]
        results.append({"case": case} | ({"failed": last} if done.returncode else json.loads(last)))
    device = pick_device("auto")
    found = {
        "command": " ".join(["tools/bench_loss.py", *shape]),
        "results": results,
        "environment": environment(Process(0, 1, device, None)),
    }
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'case':20}{'ms':>10}{'peak GB above inputs':>22}{'loss a token':>14}")
    for r in results:
        if "failed" in r:
            print(f"{r['case']:20}  failed: {r['failed']}")
            continue
        memory = "-" if r["peak_gb"] is None else f"{r['peak_gb']:.3f}"
        print(f"{r['case']:20}{r['ms']:10.2f}{memory:>22}{r['loss']:14.6f}")
    return int(any("failed" in r for r in results))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One case: median time of forward and backward, and the memory they take beside inputs and weight."""
    device = pick_device("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    head = nn.Linear(args.width, args.vocabulary, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(args.tokens, args.width, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(args.vocabulary, (args.tokens,), device=device)
    name, _, compiled = args.case.partition(", ")
    loss = torch.compile(cross_entropy_sum) if compiled else cross_entropy_sum

    def step() -> torch.Tensor:
        hidden.grad = head.weight.grad = None
        if name == "plain":
            value = loss(head(hidden), targets, 0.0)
        elif name == "chunked":
            value = chunked_cross_entropy(hidden, targets, head, chunk_tokens=args.chunk_tokens, loss=loss)
        else:
            value = liger_cross_entropy(hidden, targets, head)
        (value / args.tokens).backward()
        return value.detach() / args.tokens

    for _ in range(2):
        value = step()
    hidden.grad = head.weight.grad = None
    synchronize(device)
    before = reset_peak(device)
    times = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return {
        "ms": round(1e3 * statistics.median(times), 3),
        "peak_gb": round((torch.cuda.max_memory_allocated() - before) / 1e9, 3)
        if device.type == "cuda"
        else None,
        "loss": value.item(),
    }


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: torch.device) -> int:
    """Bytes in use on a GPU, whose peak counts from now."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


if __name__ == "__main__":
    sys.exit(main())
