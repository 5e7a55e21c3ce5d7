"""Held-out loss of a model as it is, with its adapters merged, and brought to few bits after that.

    tools/judge_merge.py MODEL --config RUN.toml --output ROWS.json [--methods gptq,rtn --bits 3,2]

MODEL is a run, an export or an `hf:` folder. RUN.toml, a run's configuration, has the held-out data and the
training data, from which GPTQ's calibration samples are drawn; every row is measured by the evaluation of
training, on all held-out data, uncompiled. ROWS.json lists the rows: `weights` is "as it is", "merged"
(where the run has transforms), "gptq" or "rtn", the latter with their `bits`.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from qrecipes.cli.report import run_main
from qrecipes.config import parse
from qrecipes.config.run import Run
from qrecipes.data import Batch, build_validation_data
from qrecipes.data.calibration import calibration_batches
from qrecipes.data.tokenizers import Tokenizer, tokenizer_of
from qrecipes.errors import ConfigError
from qrecipes.export.opened import open_model
from qrecipes.export.store import load_swapped
from qrecipes.models.post_training import PostTraining, linear_layers, quantize_model
from qrecipes.parallel import process as processes
from qrecipes.parallel.process import Process
from qrecipes.quant.formats import AffineFormat
from qrecipes.quant.gptq import GPTQSettings
from qrecipes.training.evaluate import evaluate
from qrecipes.training.output import RUN_FILE
from qrecipes.training.task import Task, forward_batch
from qrecipes.transforms.base import TransformConfig

Row = dict[str, Any]


def main(argv: list[str]) -> int:
    """Measure every row and write them."""
    args = _parser().parse_args(argv)
    run = parse.load(args.config)
    process = processes.start(run.device)
    try:
        rows = list(judge(args, run, process))
    finally:
        processes.stop()
    args.output.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(f"{row['weights']} {row.get('bits', '')}: {row['val_loss']:.4f}")
    return 0


def judge(args: argparse.Namespace, run: Run, process: Process) -> Iterator[Row]:
    """The rows, one after the other."""
    tokenizer = tokenizer_of(run)
    held_out = build_validation_data(run.data, tokenizer, task=run.task, seed=run.seed, rank=0, world=1)
    if held_out is None:
        raise ConfigError(f"{args.config}: names no held-out data; set data.validation_files")

    def measured(model: nn.Module) -> Row:
        return evaluate(model.eval(), held_out, Task(run.task), process)

    if (Path(args.model) / RUN_FILE).is_file():
        model, chain, _ = load_swapped(args.model, device=process.device)
        yield {"weights": "as it is", **measured(model)}
        model = chain.finalize(model)
        if chain.transforms:
            yield {"weights": "merged", **measured(model)}
    else:
        model = open_model(args.model, device=process.device, dtype=run.model.dtype).model
        yield {"weights": "as it is", **measured(model)}
    if not args.methods:
        return
    samples = calibration(args, run, tokenizer)
    for method in args.methods:
        for bits in args.bits:
            yield {
                "weights": method,
                "bits": bits,
                **requantized(args, copy.deepcopy(model), method, bits, samples, measured),
            }


def requantized(
    args: argparse.Namespace,
    model: nn.Module,
    method: str,
    bits: int,
    samples: Sequence[Batch],
    measured: Any,
) -> Row:
    """What `model`, quantized in place, measures."""
    selection = TransformConfig() if args.skip is None else TransformConfig(skip=tuple(args.skip))
    layers, _ = linear_layers(model, selection.reason_to_skip)
    device = next(model.parameters()).device
    settings = settings_of(method, bits, args.group_size, args.ranges, args.static_groups)
    errors = quantize_model(
        model,
        layers,
        settings,
        forwards=[partial(_forward, batch.to(device)) for batch in samples] if method == "gptq" else [],
        activations=device,
    )
    weights = sum(e.out_features * e.in_features for e in errors)
    used = sum(e.bits_per_weight * e.out_features * e.in_features for e in errors) / weights
    return {"bits_per_weight": used, "settings": settings.to_json(), **measured(model)}


def settings_of(method: str, bits: int, group_size: int, ranges: str, static_groups: bool) -> PostTraining:
    """One format for all methods, which is also what a merge into offsets gives: float offsets."""
    return PostTraining(
        format=AffineFormat(bits=bits, group_size=group_size, symmetric=False, zero_point="float"),
        method=method,
        ranges=ranges,
        gptq=GPTQSettings(static_groups=static_groups),
    )


def calibration(args: argparse.Namespace, run: Run, tokenizer: Tokenizer | None) -> list[Batch]:
    """The samples that `qrecipes quantize --calibration RUN.toml` draws."""
    return calibration_batches(
        run.data, tokenizer, task=run.task, samples=args.samples, length=run.data.sequence_length
    )


def _forward(batch: Batch, model: nn.Module) -> Any:
    return forward_batch(model, batch)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/judge_merge.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--config", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=[], metavar="gptq,rtn")
    parser.add_argument("--bits", type=_numbers, default=[3, 2])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--ranges", default="rtn", help="of gptq's groups (default: %(default)s)")
    parser.add_argument("--static-groups", action="store_true", help="of gptq")
    parser.add_argument("--samples", type=int, default=128, help="for gptq (default: %(default)s)")
    parser.add_argument("--skip", action="append", metavar="PATTERN", help="layers to leave alone")
    return parser


if __name__ == "__main__":
    run_main(main)
