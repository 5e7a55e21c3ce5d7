"""Size and time of the checkpoints of a 7B QLoRA run, with the frozen base saved once, or rebuilt.

    tools/bench_checkpoint.py [--shape 7b] [--case NAME] [--modes once rebuild] [--output FILE.json]

`7b` is Llama 2 7B's shape, all 32 layers, with random weights and adapters of rank 64 on every linear layer
of the blocks, as in tools/bench_finetune.py, whose `--case` of a method it takes; `tiny` shows on a CPU that
the tool works. For each of `checkpoint.frozen`'s modes, in a process of its own: a training step, the first
save, another step, the second save, and `restore` of the second into the same model.

`prints` is the part of the second save in which fingerprints of the frozen parameters are computed.
`trained` is the size of the second checkpoint's folder, `frozen` that of the file beside it, in 10**9 bytes.
Saves end when everything is synced to disk, and restoring reads files that are still in memory: the disk is
that of the folder given by --folder, or of temporary files.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_finetune import ADAPTERS, METHODS, SHAPES, Options, Ours, Training, our_training
from step_timing import each_in_own_process, report

from qrecipes.config.run import CheckpointSection, DataSection, ParallelSection, Run
from qrecipes.parallel.process import pick_device
from qrecipes.training import checkpoint, constants
from qrecipes.training.metrics import peak_memory

MODES: tuple[Any, ...] = ("once", "rebuild")
CASES = [name for name, method in METHODS.items() if isinstance(method, Ours)]
DATA_STATE = {"position": 0}
"""Stands for the position in the data, some hundred bytes."""


def main() -> int:
    """Measure every mode, and print the table last."""
    args = arguments()
    if args.worker:
        report(measure(args, args.modes[0]))
        return 0
    common = ["--shape", args.shape, "--case", args.case]
    common += ["--layers", str(args.layers)] if args.layers else []
    common += ["--folder", str(args.folder)] if args.folder else []
    modes = [({"mode": mode}, ["--modes", mode, *common]) for mode in args.modes]
    return each_in_own_process(__file__, modes, args.timeout, table, args.output)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="7b")
    add("--case", choices=CASES, default="QLoRA", metavar="NAME", help=f"of: {', '.join(CASES)}")
    add("--modes", nargs="+", choices=MODES, default=MODES)
    add("--layers", type=int, help="fewer layers, for a quick look")
    add("--folder", type=Path, help="where checkpoints are written, and deleted (default: a temporary one)")
    add("--output", type=Path)
    add("--timeout", type=float, default=300, help="seconds for one mode")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(args: argparse.Namespace, mode: Any) -> dict[str, Any]:
    """Train two steps in this process, save after each, and restore."""
    device, shape, method = pick_device("auto"), SHAPES[args.shape], METHODS[args.case]
    assert isinstance(method, Ours), method
    shape = replace(shape, layers=args.layers or shape.layers)
    torch.manual_seed(0)
    # what steps cost is not measured here, and compiling would take most of the time
    options = Options("adamw8bit", "float32", "chunked", ParallelSection(compile=False, checkpointing="full"))
    training = our_training(shape, ADAPTERS[args.shape], device, method, options)
    with tempfile.TemporaryDirectory(dir=args.folder) as output:
        run = run_of(training, mode, output)
        return {"layers": shape.layers} | saved_and_restored(training, run)


def run_of(training: Training, mode: Any, output: str) -> Run:
    """The run that the checkpoints belong to."""
    return Run(
        steps=2,
        output=output,
        model=training.section,
        data=DataSection(source="synthetic"),
        optim=training.optim,
        checkpoint=CheckpointSection(frozen=mode),
        transform=(training.config,),
    )


def saved_and_restored(training: Training, run: Run) -> dict[str, Any]:
    """Seconds and sizes of two checkpoints, and seconds of restoring the second."""
    model, optimizer, process = training.model, training.optimizer, training.process
    seconds, folders = [], []
    for step in (1, 2):
        training.step()
        took, folder = timed(
            lambda step=step: checkpoint.save(run, step, model, optimizer, DATA_STATE, process)  # type: ignore[misc]
        )
        seconds.append(took)
        folders.append(folder)
    second = folders[1]
    names = constants.constant_names(run, model, process)
    printing, described = timed(lambda: constants.keep(run, model, names, second.parent, process))
    restoring, (finished, _) = timed(lambda: checkpoint.restore(second, run, model, optimizer, process))
    assert finished == 2, finished
    beside = second.parent / described["file"] if described else None
    return {
        "first_save_seconds": round(seconds[0], 2),
        "second_save_seconds": round(seconds[1], 2),
        "fingerprint_seconds": round(printing, 2),
        "restore_seconds": round(restoring, 2),
        "frozen_parameters": len(names),
        "frozen_bytes": beside.stat().st_size if beside and beside.is_file() else 0,
        "files": {path.name: path.stat().st_size for path in sorted(second.iterdir())},
        "peak_host_gb": round(peak_memory(torch.device("cpu")) / 1e9, 3),
    }


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that an action took, the device's work before it left out, and its result."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def table(results: Sequence[dict[str, Any]]) -> str:
    """Times and sizes of every mode."""
    lines = [
        f"{'frozen':10}{'first save s':>14}{'second s':>10}{'prints s':>10}{'restore s':>11}"
        f"{'trained GB':>12}{'frozen GB':>11}{'host GB':>9}"
    ]
    for r in results:
        if "failed" in r:
            lines.append(f"{r['mode']:10} failed: {r['failed'].strip().splitlines()[-1][:120]}")
            continue
        lines.append(
            f"{r['mode']:10}{r['first_save_seconds']:14.2f}{r['second_save_seconds']:10.2f}"
            f"{r['fingerprint_seconds']:10.2f}{r['restore_seconds']:11.2f}"
            f"{sum(r['files'].values()) / 1e9:12.3f}{r['frozen_bytes'] / 1e9:11.3f}{r['peak_host_gb']:9.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
