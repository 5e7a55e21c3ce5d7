"""Quantize a model's weights to 2, 3, 4 or 8 bits after training, and write it as an export.

qrecipes quantize MODEL --method rtn|lp|mse|hqq --bits B --group-size G [--asymmetric] --output FOLDER
qrecipes quantize MODEL --method gptq --bits B --group-size G --calibration FILE_OR_DATASET --output FOLDER
qrecipes quantize MODEL --format nf4 --output FOLDER
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from qrecipes import __version__, locate
from qrecipes.cli.report import run_main
from qrecipes.config import parse
from qrecipes.config.run import TaskSection
from qrecipes.data import Batch
from qrecipes.data.calibration import calibration_batches, calibration_section, windows_of_text
from qrecipes.errors import ConfigError, ExportError
from qrecipes.evaluation import read_text
from qrecipes.export.opened import OpenedModel, open_model
from qrecipes.export.store import check_destination, load_export, save_model
from qrecipes.models.post_training import METHODS, LayerError, PostTraining, linear_layers, quantize_model
from qrecipes.models.sequential import Forward
from qrecipes.models.view import vocab_size
from qrecipes.models.weights import save_huggingface, source_folder
from qrecipes.parallel.process import pick_device
from qrecipes.quant.formats import AffineFormat, NF4Format, WeightFormat, nearest_group_size
from qrecipes.quant.gptq import GPTQSettings
from qrecipes.quant.ranges import RANGES
from qrecipes.training.task import forward_batch
from qrecipes.transforms.base import TransformConfig

REPORT = "quantization.json"
SAY_EVERY = 15.0
"""Seconds between lines of progress where there is no terminal."""


def main(argv: list[str]) -> int:
    """Quantize, write, check that it reloads, and say what was lost."""
    args = _parser().parse_args(argv)
    settings = settings_of(args)
    check_destination(args.output)
    began = time.monotonic()
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.init()  # nothing was allocated yet, and torch 2.11 has no statistics to reset until then
        torch.cuda.reset_peak_memory_stats(device)
    dtype = ("bfloat16" if device.type == "cuda" else "float32") if args.dtype == "auto" else args.dtype
    opened = open_model(args.model, device="cpu", dtype=dtype)
    if args.huggingface:
        huggingface_source(opened)
    batches = samples_of(args, opened)
    layers, left = linear_layers(opened.model, selection_of(args).reason_to_skip)
    check_widths(layers, settings.format)
    before = stored_bytes(opened.model)
    weights = sum(layer.weight.numel() for layer in layers.values())
    with Progress(len(layers)) as progress:
        errors = quantize_model(
            opened.model,
            layers,
            settings,
            forwards=[forward_of(batch) for batch in batches],
            device=device,
            activations=device if args.activations == "device" else "cpu",
            done=progress.step,
        )
    report = {
        "command": shlex.join(["qrecipes", "quantize", *argv]),
        "versions": f"qrecipes {__version__}, torch {torch.__version__}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "settings": settings.to_json(),
        "calibration": calibration_of(args, batches),
        "quantized_weights": weights,
        "bits_per_weight": sum(e.bits_per_weight * e.out_features * e.in_features for e in errors) / weights,
        "bytes_before": before,
        "bytes_after": stored_bytes(opened.model),
        "seconds": time.monotonic() - began,
        "peak_memory_bytes": peak_memory(device),
        "layers": [asdict(error) for error in errors],
        "left_alone": left,
    }
    write(opened, report, args)
    print(args.output)
    print(summary(errors, report))
    return 0


def settings_of(args: argparse.Namespace) -> PostTraining:
    """How the arguments say that weights become low-bit ones.

    Raises:
        ConfigError: if two of them do not go together.
    """
    if args.method == "gptq" and args.calibration is None:
        raise ConfigError("--method: 'gptq' needs text to calibrate on; add --calibration FILE_OR_DATASET")
    if args.method != "gptq":
        for name in ("ranges", "damping", "block_size"):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')}: is of --method gptq; leave it out")
        if args.static_groups:
            raise ConfigError("--static-groups: is of --method gptq; leave it out")
    ranges = args.ranges or "rtn"
    if args.p is not None and "lp" not in (args.method, ranges):
        raise ConfigError("--p: is the exponent of --method lp, or of --ranges lp; leave it out")
    given = {"damping": args.damping, "block_size": args.block_size}
    try:
        return PostTraining(
            format=format_of(args, args.method if args.method != "gptq" else ranges),
            method=args.method,
            ranges=ranges,
            p=4.0 if args.p is None else args.p,
            gptq=GPTQSettings(
                static_groups=args.static_groups, **{k: v for k, v in given.items() if v is not None}
            ),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def format_of(args: argparse.Namespace, ranges: str) -> WeightFormat:
    """The format that the arguments describe; `ranges` is the method that chooses ranges."""
    if args.format == "nf4":
        for name in ("bits", "asymmetric", "zero_point"):
            if getattr(args, name):
                raise ConfigError(f"--{name.replace('_', '-')}: NF4 has its own 16 levels; leave it out")
        return NF4Format() if args.group_size is None else NF4Format(block_size=group_size(args.group_size))  # type: ignore[arg-type]
    if args.bits is None:
        raise ConfigError("--bits: missing; use 2, 3, 4 or 8, or --format nf4")
    if args.zero_point is not None and not args.asymmetric:
        raise ConfigError("--zero-point: a symmetric format has none; add --asymmetric")
    if ranges == "hqq" and not args.asymmetric:
        raise ConfigError("--asymmetric: missing, and 'hqq' optimizes zero points; add it")
    try:
        return AffineFormat(
            bits=args.bits,
            group_size=group_size(args.group_size or "128"),
            symmetric=not args.asymmetric,
            zero_point=args.zero_point or ("float" if ranges == "hqq" and args.asymmetric else "integer"),
        )
    except ValueError as error:  # of the size: the rest was checked
        raise ConfigError(f"--group-size: {str(error).partition(': ')[2]}, 'row'") from error


def group_size(text: str) -> int | None:
    """A number, or None for `row`.

    Raises:
        ConfigError: if it is neither.
    """
    if text == "row":
        return None
    if not text.isdigit():
        raise ConfigError(f"--group-size: {text!r}; use a number, or 'row' for one scale a row")
    return int(text)


def check_widths(layers: Mapping[str, nn.Linear], format: WeightFormat) -> None:
    """Raise ConfigError, in the command line's words, if groups do not divide a layer's inputs."""
    size = format.group_size if isinstance(format, AffineFormat) else None
    wide: dict[int, list[str]] = {}
    for fqn, layer in layers.items():
        if size is not None and layer.in_features % size:
            wide.setdefault(layer.in_features, []).append(fqn)
    if size is None or not wide:
        return
    parts = (
        f"{width} input features of {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} "
        f"(use {nearest_group_size(width, size) or 'row'})"
        for width, names in wide.items()
    )
    raise ConfigError(
        f"--group-size: {size} does not divide {', nor '.join(parts)}; choose another, or leave layers alone "
        "with --skip, which replaces the default, the heads"
    )


def selection_of(args: argparse.Namespace) -> TransformConfig:
    """Which layers are quantized."""
    given = {"targets": args.target, "skip": args.skip}
    return TransformConfig(**{name: tuple(value) for name, value in given.items() if value is not None})


def samples_of(args: argparse.Namespace, opened: OpenedModel) -> list[Batch]:
    """The calibration samples, none where none were asked for.

    Raises:
        ConfigError, DataError: if there are too few, or the model does not take them.
    """
    if args.calibration is None:
        return []
    longest = opened.max_length
    if longest is not None and args.length > longest:
        raise ConfigError(f"--length: {args.length} is more than the {longest} tokens that the model takes")
    batches = draw(args, opened)
    size = vocab_size(opened.model)
    if size is not None and batches[0].inputs.is_floating_point():
        raise ConfigError(f"--calibration: {args.calibration} holds images, and the model takes tokens")
    if size is None and not batches[0].inputs.is_floating_point():
        raise ConfigError(f"--calibration: {args.calibration} holds tokens, and the model takes images")
    largest = max(int(batch.inputs.max()) for batch in batches)
    if size is not None and largest >= size:
        raise ConfigError(
            f"--calibration: {args.calibration} holds token {largest}, and the model's vocabulary ends at "
            f"{size - 1}; use text, or tokens of the model's own tokenizer"
        )
    return batches


def draw(args: argparse.Namespace, opened: OpenedModel) -> list[Batch]:
    """Samples of a configuration's data, by its name or path, or else of a file or dataset."""
    name = args.calibration
    wanted = {"samples": args.samples, "length": args.length, "seed": args.seed}
    if name.endswith(".toml") or any(config.name == name for config in locate.list_configs()):
        run = parse.load(name)
        return calibration_batches(run.data, opened.tokenizer, task=run.task, **wanted)
    data = calibration_section(name)
    if data is None:  # a text by any other name, such as wiki.train.raw
        return windows_of_text(read_text(name), opened.require_tokenizer(), name=name, **wanted)
    return calibration_batches(data, opened.require_tokenizer(), task=TaskSection(), **wanted)


def forward_of(batch: Batch) -> Forward:
    """One forward pass over a batch."""

    def forward(model: nn.Module) -> Any:
        return forward_batch(model, batch.to(next(model.parameters()).device))

    return forward


def write(opened: OpenedModel, report: dict[str, Any], args: argparse.Namespace) -> None:
    """The export with its report, checked to reload bit for bit, and the Hugging Face folder if asked for."""
    origin = opened.origin
    notes = {key: report[key] for key in ("settings", "calibration", "bits_per_weight")}
    origin = type(origin)(
        model=origin.model, run=origin.run, tokenizer=origin.tokenizer, notes={"quantization": notes}
    )
    folder = save_model(opened.model, origin, args.output)
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    reloaded = load_export(folder).state_dict()
    for name, tensor in opened.model.state_dict().items():
        if not torch.equal(reloaded[name], tensor):
            raise ExportError(f"{folder}: {name} differs after reloading; this is a fault of the exporter")
    if args.huggingface:
        source = huggingface_source(opened)
        save_huggingface(opened.model, source, folder / "huggingface", args=origin.model.args)


def huggingface_source(opened: OpenedModel) -> Path:
    """The Hugging Face folder that the model came from.

    Raises:
        ConfigError: if it came from none.
    """
    source = source_folder(opened.origin.model)
    if source is None:
        raise ConfigError("--huggingface: the model came from no Hugging Face folder; leave it out")
    return source


def calibration_of(args: argparse.Namespace, batches: Sequence[Batch]) -> dict[str, Any] | None:
    """What the report says of the samples."""
    if not batches:
        return None
    shape = list(batches[0].inputs.shape[1:])
    return {"data": args.calibration, "samples": len(batches), "sample_shape": shape, "seed": args.seed}


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most that this process has held in memory, and that its tensors have held on a GPU."""
    unit = 1 if sys.platform == "darwin" else 1024  # of Linux's ru_maxrss
    found = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        found["device"] = torch.cuda.max_memory_allocated(device)
    return found


def summary(errors: Sequence[LayerError], report: dict[str, Any]) -> str:
    """What was quantized and what it cost, in a few lines."""
    worst = max(errors, key=lambda e: e.weight_error if e.output_error is None else e.output_error)
    mean = sum(e.weight_error for e in errors) / len(errors)
    lines = [
        f"{len(errors)} layers, {report['quantized_weights']:,} weights at {report['bits_per_weight']:.3f} "
        f"bits; model {report['bytes_before'] / 1e6:.1f} MB -> {report['bytes_after'] / 1e6:.1f} MB",
        f"relative error of a layer's weight, mean: {mean:.4f}",
    ]
    outputs = [e.output_error for e in errors if e.output_error is not None]
    if outputs:
        lines.append(f"relative error of a layer's output, mean: {sum(outputs) / len(outputs):.4f}")
    shown = worst.weight_error if worst.output_error is None else worst.output_error
    lines.append(f"worst layer: {worst.name}, {shown:.4f}")
    if report["left_alone"]:
        first = next(iter(report["left_alone"].items()))
        lines.append(f"left alone: {len(report['left_alone'])}, such as {first[0]} ({first[1]})")
    peak = ", ".join(
        f"{size / 1e9:.2f} GB of the {what}" for what, size in report["peak_memory_bytes"].items()
    )
    lines.append(f"{report['seconds']:.1f} s, peak memory {peak}; errors of every layer in {REPORT}")
    return "\n".join(lines)


@dataclass
class Progress:
    """A bar on a terminal, elsewhere a line from time to time; on stderr."""

    total: int
    done: int = 0
    said: float = 0.0

    def __enter__(self) -> Progress:
        self.bar = tqdm(total=self.total, desc="quantizing", unit="layer", disable=not sys.stderr.isatty())
        self.began = self.said = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def step(self, layer: LayerError) -> None:
        """Count a layer."""
        self.done += 1
        self.bar.update()
        now = time.monotonic()
        if self.bar.disable and (now - self.said > SAY_EVERY or self.done == self.total):
            self.said = now
            print(
                f"quantized {self.done} of {self.total} layers, {now - self.began:.0f} s: {layer.name}",
                file=sys.stderr,
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qrecipes quantize",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"""methods:
  rtn   round to nearest over each group's whole range
  lp    the range of least sum of |error|**p (--p), mse the same with p = 2
  hqq   half-quadratic offsets; needs --asymmetric, zero points are floats
  gptq  each column's rounding error is made good by the columns after it (arXiv 2210.17323)

With --calibration, every method measures each layer's output error, on the inputs that the layers
quantized before it give. FOLDER/{REPORT} has the errors of every layer.

examples:
  qrecipes quantize hf:models/SmolLM2-135M --method rtn --bits 4 --group-size 32 --output w4
  qrecipes quantize hf:models/SmolLM2-135M --method gptq --bits 3 --group-size 32 --asymmetric \\
      --calibration wiki.train.txt --samples 128 --length 2048 --output w3""",
    )
    parser.add_argument(
        "model", help="hf:FOLDER or hf:OWNER/NAME, or the folder of a run or of an earlier export"
    )
    add = parser.add_argument
    add("--output", required=True, metavar="FOLDER", help="export to write; an earlier one is replaced")
    add("--method", choices=METHODS, default="rtn", help="default: %(default)s")
    add("--format", choices=("affine", "nf4"), default="affine", help="levels (default: %(default)s)")
    add("--bits", type=int, choices=(2, 3, 4, 8))
    add(
        "--group-size",
        metavar="G",
        help="inputs of a row that share a scale, or 'row' (default: 128; NF4: 64)",
    )
    add("--asymmetric", action="store_true", help="give each group a zero point")
    add("--zero-point", choices=("integer", "float"), help="default: integer; float with hqq")
    add("--p", type=float, help="exponent of lp, 2 to 5 (default: 4)")
    add("--target", action="append", metavar="PATTERN", help="layers to quantize; repeatable (default: all)")
    add(
        "--skip",
        action="append",
        metavar="PATTERN",
        help="layers to leave alone, instead of the heads; repeatable",
    )
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibration",
        metavar="DATA",
        help="a file of text (also .jsonl, .parquet, .xz, .gz) or of tokens (.bin); a dataset, NAME or "
        "NAME,CONFIGURATION; or a configuration, whose [data] is meant",
    )
    calibration.add_argument("--samples", type=int, default=128, help="default: %(default)s")
    calibration.add_argument("--length", type=int, default=2048, help="tokens of each (default: %(default)s)")
    calibration.add_argument("--seed", type=int, default=0, help="of their choice (default: %(default)s)")
    calibration.add_argument(
        "--activations",
        choices=("cpu", "device"),
        default="cpu",
        help="where they wait (default: %(default)s)",
    )
    gptq = parser.add_argument_group("gptq")
    gptq.add_argument("--ranges", choices=tuple(RANGES), help="how ranges are chosen (default: rtn)")
    gptq.add_argument(
        "--static-groups", action="store_true", help="choose all ranges before the first column"
    )
    gptq.add_argument("--damping", type=float, help="share of the Hessian's mean diagonal (default: 0.01)")
    gptq.add_argument("--block-size", type=int, help="columns between updates of the rest (default: 128)")
    add("--huggingface", action="store_true", help="also write a Hugging Face folder, dequantized")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of an hf: model")
    return parser


if __name__ == "__main__":
    run_main(main)
