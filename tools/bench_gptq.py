"""Time and memory of quantizing a 7B model after training, by GPTQ and by rounding to nearest, in one run.

    tools/bench_gptq.py [--shape 7b] [--cases NAME ...] [--layers N] [--output FILE.json]

`7b` is Llama 2 7B's shape, all 32 layers, with random weights in bfloat16; `tiny` shows on a CPU that the
tool works. Calibration is 128 samples of 2048 random tokens, as GPTQ's authors take them of text: the work is
the same, but random weights over random inputs say nothing of the quality that GPTQ gains.

What is timed is the library's own `quantize_model`, as `qrecipes quantize` calls it, from a model in host
memory to its low-bit layers there; making the weights is `build`, and nothing is loaded or saved. Blocks go
to the GPU one at a time, true-sequential, with columns in blocks of 128 and damping 0.01.

    GPTQ              the blocks' inputs, Hessians, and every column's rounding made good
    RTN               round to nearest, without calibration: the least that quantizing takes
    RTN, calibrated   the same inputs and Hessians as GPTQ's, to measure the error of each layer's output

Each case is a process of its own. `solving` is the part of the time in which weights become integers and
errors are measured; the rest is the blocks' forward passes, Hessians and copies. `GPU` is the CUDA
allocator's peak while quantizing, `host` the most that the process held in memory, both in 10**9 bytes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from bench_finetune import SHAPES, random_model
from finetune_peers import LlamaShape
from step_timing import each_in_own_process, gigabytes, random_tokens, report

from qrecipes.models.post_training import LayerError, PostTraining, linear_layers, quantize_model
from qrecipes.models.sequential import Forward
from qrecipes.parallel.process import pick_device
from qrecipes.quant.formats import AffineFormat
from qrecipes.quant.gptq import GPTQSettings
from qrecipes.training.metrics import peak_memory
from qrecipes.transforms.base import TransformConfig

GPTQ, RTN, CALIBRATED = CASES = ("GPTQ", "RTN", "RTN, calibrated")


def main() -> int:
    """Measure every case, and print the table last."""
    args = arguments()
    if args.worker:
        report(measure(args, args.cases[0]))
        return 0
    cases = [({"case": case}, ["--cases", case, *passed_on(args)]) for case in args.cases]
    return each_in_own_process(__file__, cases, args.timeout, table, args.output)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="7b")
    add("--cases", nargs="+", choices=CASES, default=CASES, metavar="NAME", help=f"of: {'; '.join(CASES)}")
    add("--layers", type=int, help="fewer layers, for a quick look")
    add("--bits", type=int, choices=(2, 3, 4, 8), default=4, help="default: %(default)s")
    add("--group-size", type=int, default=32, help="default: %(default)s")
    add("--zero-point", choices=("none", "integer", "float"), default="float", help="default: %(default)s")
    add("--static-groups", action="store_true", help="choose all ranges before the first column")
    add("--samples", type=int, default=128, help="default: %(default)s")
    add("--length", type=int, default=2048, help="tokens of a sample (default: %(default)s)")
    add("--activations", choices=("cpu", "device"), default="device", help="where they wait")
    add("--output", type=Path)
    add("--timeout", type=float, default=360, help="seconds for one case")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def passed_on(args: argparse.Namespace) -> list[str]:
    """The arguments that hold for every case."""
    names = ("shape", "layers", "bits", "group_size", "zero_point", "samples", "length", "activations")
    given = {name: getattr(args, name) for name in names}
    passed = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    return [*passed, *(["--static-groups"] if args.static_groups else [])]


def settings_of(args: argparse.Namespace, case: str) -> PostTraining:
    """How a case's weights become low-bit ones."""
    zero_point: Any = "integer" if args.zero_point == "none" else args.zero_point
    format = AffineFormat(
        bits=args.bits,
        group_size=args.group_size,
        symmetric=args.zero_point == "none",
        zero_point=zero_point,
    )
    method = "gptq" if case == GPTQ else "rtn"
    return PostTraining(format=format, method=method, gptq=GPTQSettings(static_groups=args.static_groups))


def measure(args: argparse.Namespace, case: str) -> dict[str, Any]:
    """Make a model, quantize it, and say what the latter took."""
    device, shape, settings = pick_device("auto"), SHAPES[args.shape], settings_of(args, case)
    shape = replace(shape, layers=args.layers or shape.layers, length=args.length)
    torch.manual_seed(0)
    began = time.perf_counter()
    model = random_model(shape, device).to("cpu")  # random numbers take a minute on a CPU
    build_seconds = time.perf_counter() - began
    forwards = [] if case == RTN else [sample(shape) for _ in range(args.samples)]
    layers, _ = linear_layers(model, TransformConfig().reason_to_skip)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ended: list[tuple[str, float]] = []
    began = time.perf_counter()
    errors = quantize_model(
        model,
        layers,
        settings,
        forwards=forwards,
        device=device,
        activations=device if args.activations == "device" else "cpu",
        done=lambda error: ended.append((block_of(error.name), time.perf_counter())),
    )
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return {
        "settings": settings.to_json(),
        "layers": shape.layers,
        "samples": [len(forwards), shape.length],
        "build_seconds": round(build_seconds, 1),
        "seconds": round(seconds, 2),
        "solving_seconds": round(sum(error.seconds for error in errors), 2),
        "block_seconds": [round(each, 3) for each in block_seconds(ended, began)],
        "peak_gpu_gb": gigabytes(torch.cuda.max_memory_allocated) if device.type == "cuda" else None,
        "peak_host_gb": round(peak_memory(torch.device("cpu")) / 1e9, 3),
    } | losses(errors)


def sample(shape: LlamaShape) -> Forward:
    """A forward pass over random tokens."""
    tokens = random_tokens(1, shape.length, shape.vocabulary).inputs
    return lambda model: model(tokens.to(next(model.parameters()).device))


def block_of(fqn: str) -> str:
    """The block that a layer is in: `layers.3` of `layers.3.attn.q_proj`."""
    return ".".join(fqn.split(".")[:2])


def block_seconds(ended: Sequence[tuple[str, float]], began: float) -> list[float]:
    """Seconds from one block's last layer to the next one's, given when each layer ended and the start.

    A block's share is thus its own passes and those that give it its inputs.
    """
    last = dict(ended)  # of equal blocks, the latest
    times = [began, *last.values()]
    return [stop - start for start, stop in pairwise(times)]


def losses(errors: Sequence[LayerError]) -> dict[str, float | None]:
    """Means over layers: relative errors of weights and outputs, bits of a weight."""
    outputs = [error.output_error for error in errors if error.output_error is not None]
    return {
        "weight_error": statistics.fmean(error.weight_error for error in errors),
        "output_error": statistics.fmean(outputs) if outputs else None,
        "bits_per_weight": statistics.fmean(error.bits_per_weight for error in errors),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Time and memory of every case."""
    lines = [
        f"{'case':18}{'minutes':>9}{'s':>8}{'s/block':>9}{'solving s':>11}{'GPU GB':>8}{'host GB':>9}"
        f"{'weight err':>12}{'output err':>12}{'build s':>9}"
    ]
    for r in results:
        if "failed" in r:
            lines.append(f"{r['case']:18} failed: {r['failed'].strip().splitlines()[-1][:120]}")
            continue
        gpu, output = (float("nan") if r[key] is None else r[key] for key in ("peak_gpu_gb", "output_error"))
        lines.append(
            f"{r['case']:18}{r['seconds'] / 60:9.2f}{r['seconds']:8.1f}"
            f"{statistics.median(r['block_seconds']):9.2f}{r['solving_seconds']:11.1f}{gpu:8.2f}"
            f"{r['peak_host_gb']:9.2f}{r['weight_error']:12.4f}{output:12.4f}{r['build_seconds']:9.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
