"""Weights with a low-rank correction inside their rounding: against bandwidth and against eager torch.

    tools/bench_low_rank.py [--shapes NxK ...] [--storages NAME ...] [--rank R] [--bits B] [--group-size G]
                            [--tokens T] [--asymmetric] [--float32] [--tiles [KERNEL ...]]
                            [--output FILE.json]

N output features, K input features, T tokens. Microseconds of the weight in bf16, of its integers and their
transpose, and of the gradients of A, B and scales from a given dL/dW_hat, each with the fraction of a
copy's bandwidth at which it reads and writes what it must. Eager is the same composed of torch's
operations, A B and all. Then whole products of T tokens that form the weight inside: forward, input's
gradient, gradients of what trains; beside bf16 products of these shapes, with the memory that they take
beside their operands. Random data, medians; on a GPU of single calls with a cold L2 cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_dequantize import Timer
from torch import Tensor

from qrecipes.parallel.process import Process, pick_device
from qrecipes.quant.low_rank_rounding import (
    low_rank_integers,
    low_rank_linear_grads,
    low_rank_mm,
    low_rank_mm_grad_input,
    low_rank_weight,
    low_rank_weight_grads,
)
from qrecipes.quant.low_rank_storage import MOST_BITS, LowRankRounding, decode, encode
from qrecipes.training.metrics import environment

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
"""The linear layers of Llama 2 7B."""
COPIED_BYTES = {"cuda": 2**28, "cpu": 2**22}
"""What a copy's bandwidth is measured with."""
KERNELS = ("weight", "integers", "transposed", "grads")
TILED_STORAGES = ("fixed_point8", "int4")
PRODUCTS = ("forward", "grad input", "grad trained")


class Weight(NamedTuple):
    """The tensors of a weight, in the order in which functions take them."""

    phi: Tensor
    a: Tensor | None
    b: Tensor | None
    scale: Tensor
    zero: Tensor | None
    rounding: LowRankRounding


def main() -> int:
    """Time every case and print the tables last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", metavar="NxK", help="default: Llama 2 7B's")
    parser.add_argument("--storages", nargs="+", choices=MOST_BITS, help="default: all, or those of --tiles")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, help="default: a scale a row")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--float32", action="store_true", help="A and B in float32 instead of bfloat16")
    parser.add_argument(
        "--tiles",
        nargs="*",
        choices=("weight", "grads"),
        help="time other tiles of these kernels, or of both",
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    shapes: list[tuple[int, int]] = [tuple(map(int, text.split("x"))) for text in args.shapes or []]  # type: ignore[misc]
    shapes = shapes or list(SHAPES)
    device = pick_device("auto")
    meter = Meter(device, args.repeats)
    dtype = torch.float32 if args.float32 else torch.bfloat16
    if args.tiles is not None:
        return report_tiles(shapes, dtype, args, meter)
    results = []
    storages: Any = args.storages or MOST_BITS
    for N, K in shapes:
        for storage in storages:
            rounding = LowRankRounding(
                bits=args.bits,
                in_features=K,
                group_size=args.group_size,
                storage=storage,
                scaling=1 / max(args.rank, 1),
            )
            weight = random_weight(N, rounding, args.rank, dtype, not args.asymmetric, device)
            results.append(measure(weight, args.tokens, meter))
    save(args.output, meter, {"results": results})
    print(f"copy {meter.copied_per_us / 1e6:.2f} TB/s", table(results), sep="\n")
    return 0


def report_tiles(
    shapes: list[tuple[int, int]], dtype: torch.dtype, args: argparse.Namespace, meter: Meter
) -> int:
    """Time other tiles and print what is best; there is a scale a row."""
    from low_rank_tiles import TABLES, Kind, sweep, sweep_table  # needs Triton

    storages: Any = args.storages or TILED_STORAGES
    kinds = [Kind(storage, args.rank, args.bits, dtype) for storage in storages]
    found = sweep(shapes, kinds, args.tiles or list(TABLES), args.repeats, meter.device)
    floors: dict[str, dict[str, float]] = {"weight": {}, "grads": {}}
    for N, K in shapes:
        for storage in storages:
            rounding = LowRankRounding(bits=args.bits, in_features=K, storage=storage)
            phi = encode(torch.zeros(1, K), rounding)
            # phi, W_hat or its gradient, A and B; gradients of these in float32
            read = N * phi.numel() * phi.element_size() + 2 * N * K + dtype.itemsize * (N + K) * args.rank
            floors["weight"][f"{N}x{K} {storage}"] = meter.floor_us(read)
            floors["grads"][f"{N}x{K} {storage}"] = meter.floor_us(read + 4 * (N + K) * args.rank)
    save(args.output, meter, {"tiles": found, "copy_us": floors})
    print(f"copy {meter.copied_per_us / 1e6:.2f} TB/s", sweep_table(found, floors), sep="\n")
    return 0


def save(path: Path | None, meter: Meter, found: dict[str, Any]) -> None:
    """Results and where they were found, as JSON."""
    if path is not None:
        about = environment(Process(0, 1, meter.device, None))
        head = {
            "command": " ".join(["tools/bench_low_rank.py", *sys.argv[1:]]),
            "copy_tb_per_s": meter.copied_per_us / 1e6,
        }
        path.write_text(json.dumps(head | found | {"environment": about}, indent=1) + "\n")


class Meter(Timer):
    """Also the bandwidth of a copy, and peak memory."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        super().__init__(device, repeats)
        source = torch.zeros(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        self.copied_per_us = 2 * source.numel() / self.microseconds(lambda: target.copy_(source))

    def floor_us(self, num_bytes: int) -> float:
        """Microseconds in which a copy reads and writes as many bytes in sum."""
        return round(num_bytes / self.copied_per_us, 2)

    def peak_mb(self, case: Callable[[], object]) -> float | None:
        """Memory that a call takes beside what is there, its result included; None on a CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case()
        return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def random_weight(
    N: int, rounding: LowRankRounding, rank: int, dtype: torch.dtype, symmetric: bool, device: torch.device
) -> Weight:
    """Normal levels, A and B, and scales of about 0.01."""
    K, G = rounding.in_features, rounding.num_groups
    phi = encode(torch.randn(N, K, device=device) * 2 ** (rounding.bits - 2), rounding)
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((N, rank), (rank, K)))
    scale = torch.rand(N, G, device=device) * 0.01 + 0.005
    zero = None if symmetric else torch.randn(N, G, device=device)
    return Weight(phi, a if rank else None, b if rank else None, scale, zero, rounding)


def measure(weight: Weight, T: int, meter: Meter) -> dict[str, Any]:
    """Times, floors and peak memory of one weight."""
    N, K = weight.phi.shape[0], weight.rounding.in_features
    x, dy, grad, plain = (
        torch.randn(shape, device=meter.device).bfloat16() for shape in ((T, K), (T, N), (N, K), (N, K))
    )
    small = [t for t in (weight.a, weight.b, weight.scale, weight.zero) if t is not None]
    read = sum(t.numel() * t.element_size() for t in (weight.phi, *small))
    parts = (*weight[:3], weight.rounding)
    cases: dict[str, Callable[[], object]] = {
        "weight": lambda: low_rank_weight(*weight, torch.bfloat16),
        "integers": lambda: low_rank_integers(*parts),
        "transposed": lambda: low_rank_integers(*parts, transposed=True),
        "grads": lambda: low_rank_weight_grads(grad, *weight),
        "eager weight": lambda: eager_weight(weight),
        "eager grads": lambda: eager_grads(weight, grad),
        "forward": lambda: low_rank_mm(x, *weight[:5], None, weight.rounding),
        "grad input": lambda: low_rank_mm_grad_input(dy, *weight),
        "grad trained": lambda: low_rank_linear_grads(dy, x, *weight),
        "bf16 forward": lambda: x @ plain.t(),
        "bf16 grad input": lambda: dy @ plain,
        "bf16 grad trained": lambda: dy.t() @ x,
    }
    written = {"weight": 2 * N * K, "integers": N * K, "transposed": N * K}
    written["grads"] = 2 * N * K + 4 * sum(t.numel() for t in small)  # dL/dW_hat is read
    return {
        "N": N,
        "K": K,
        "T": T,
        "storage": weight.rounding.storage,
        "bits": weight.rounding.bits,
        "rank": 0 if weight.a is None else weight.a.shape[1],
        "group_size": weight.rounding.group_size,
        "us": {name: meter.microseconds(case) for name, case in cases.items()},
        "floor_us": {name: meter.floor_us(read + more) for name, more in written.items()},
        "peak_mb": {name: meter.peak_mb(case) for name, case in cases.items()},
    }


def eager_weight(weight: Weight) -> Tensor:
    """W_hat in bf16 by torch's operations, each of which reads and writes memory."""
    z = decode(weight.phi, weight.rounding)
    if weight.a is not None and weight.b is not None:
        z = z + weight.rounding.scaling * (weight.a @ weight.b)
    rounded = (z + (torch.round(z) - z).detach()).clamp(*weight.rounding.levels)
    q = rounded.unflatten(1, (weight.rounding.num_groups, -1))
    if weight.zero is not None:
        q = q - weight.zero.unsqueeze(-1)
    return (q * weight.scale.unsqueeze(-1)).flatten(1).bfloat16()


def eager_grads(weight: Weight, grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients by autograd through `eager_weight`, the forward pass included, as checkpointing has it."""
    scale = weight.scale.detach().requires_grad_()
    a, b, zero = (
        None if t is None else t.detach().requires_grad_() for t in (weight.a, weight.b, weight.zero)
    )
    leaves = weight._replace(a=a, b=b, scale=scale, zero=zero)
    return torch.autograd.grad(eager_weight(leaves), [t for t in (a, b, scale, zero) if t is not None], grad)


def table(results: list[dict[str, Any]]) -> str:
    """Microseconds: of each kernel with its fraction of a copy's bandwidth, then of products."""
    head = f"{'N x K':14}{'phi':14}"
    lines = [
        head + "".join(f"{name:>11}{'of copy':>8}" for name in KERNELS) + f"{'eager':>11}{'eager grads':>12}"
    ]
    for r in results:
        us, floors = r["us"], r["floor_us"]
        line = f"{r['N']}x{r['K']}".ljust(14) + f"{r['storage']:14}"
        line += "".join(f"{us[name]:11.1f}{floors[name] / max(us[name], 1e-9):8.2f}" for name in KERNELS)
        lines.append(line + f"{us['eager weight']:11.1f}{us['eager grads']:12.1f}")
    lines += ["", head + "".join(f"{name:>14}{'bf16':>10}{'peak MB':>10}" for name in PRODUCTS)]
    for r in results:
        us, peaks = r["us"], r["peak_mb"]
        line = f"{r['N']}x{r['K']}".ljust(14) + f"{r['storage']:14}"
        for name in PRODUCTS:
            peak = "-" if peaks[name] is None else f"{peaks[name]:.0f}"
            line += f"{us[name]:14.1f}{us[f'bf16 {name}']:10.1f}{peak:>10}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
