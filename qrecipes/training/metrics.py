"""What a run says while it runs: metrics.jsonl, a progress bar, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qrecipes import __version__
from qrecipes.errors import ConfigError, TrainingError
from qrecipes.models.view import ModelView
from qrecipes.parallel.process import Process
from qrecipes.quant.linear import QuantLinear

if TYPE_CHECKING:
    from qrecipes.config.run import Run
    from qrecipes.training.step import StepReport

PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "A10G": 70.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
"""Dense bf16 rate of tensor cores with float32 accumulation, from the makers' data sheets, by part of the
device's name; the first match counts."""

PLAIN_LINE_S = 10.0
"""Seconds between progress lines where the output is not a terminal."""


def peak_tflops(device: torch.device, stated: float | None = None) -> float | None:
    """Peak bf16 TFLOP/s of a device: as stated in the run, else by its name, else None."""
    if stated is not None:
        return stated
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def training_flops(model: nn.Module, sequence_length: int) -> float | None:
    """Floating-point operations of forward and backward for one target: a token, or an image.

    Six a token for each weight of a matrix that multiplies it, four where it is frozen and has no gradient,
    and 12 x width x length for each block's attention, halved where it is causal (PaLM, arXiv 2204.02311,
    appendix B). Embedding look-ups count nothing, tied heads count. None where the model tells neither its
    blocks nor, for images, its patches.
    """
    try:
        view = ModelView.of(model)
    except ConfigError:
        return None
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    products = _products(model, embeddings)
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    if patches is None:
        head = getattr(model, "output", None)
        if head is not None and not isinstance(head, nn.Module):  # tied to the embedding
            tied = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
            products += sum(_passes(weight) * weight.numel() for weight in tied)
        return products + 6.0 * sequence_length * view.width * len(view.blocks)
    tokens = patches + getattr(model, "num_prefix_tokens", 0)
    return tokens * (products + 12.0 * tokens * view.width * len(view.blocks))


def _passes(weight: Tensor) -> float:
    """Floating-point operations of a weight and a token: two in the forward pass, two for the gradient of the
    input, and two for its own, if it has one."""
    return 6.0 if weight.requires_grad else 4.0


def _products(model: nn.Module, embeddings: set[int]) -> float:
    """Floating-point operations of all matrices but `embeddings`, for one token."""
    low_bit = [module for module in model.modules() if isinstance(module, QuantLinear)]
    payloads = {id(p) for module in low_bit for p in module.payload}
    total = sum(4.0 * module.in_features * module.out_features for module in low_bit)
    for parameter in model.parameters():
        if parameter.ndim >= 2 and id(parameter) not in embeddings | payloads:
            total += _passes(parameter) * parameter.numel()
    return total


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the CUDA allocator on a GPU, else the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def environment(process: Process) -> dict[str, Any]:
    """Versions and device: what a number of this process needs to be understood."""
    versions = {"qrecipes": __version__}
    for name in ("torch", "torchao", "torchtune", "triton", "timm"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    cuda = process.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(process.device)
        if cuda
        else platform.processor() or platform.machine(),
        "ranks": process.world,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


class Log:
    """Writes one JSON line a step, and tells the other sinks.

    On a GPU a step's tensors are read only when the next step has been queued, so that the device never waits
    for the log. The time of a step is that between two such reads, or between queuing it and the step before,
    whichever is longer: the last one is read right after the one before it. Only rank 0 writes. Use it as a
    context manager: everything given to it is written on the way out, whatever the reason.
    """

    def __init__(self, run: Run, process: Process, first_step: int, flops_per_item: float | None) -> None:
        self.process = process
        self.flops_per_item = flops_per_item or math.nan
        self.peak_flops = (
            (peak_tflops(process.device, run.log.peak_tflops) or math.nan) * 1e12 * process.world
        )
        self._pending: tuple[int, float, StepReport, float] | None = None
        self._last_read = self._last_queued = time.perf_counter()
        self.confirmed_step = first_step
        """The last step whose loss and gradient were found finite: checkpoints of earlier steps are good."""
        self._file = None
        self._sinks: list[Callable[[dict[str, Any]], None]] = []
        self._closers: list[Callable[[], None]] = []
        if not process.is_main:
            return
        output = Path(run.output)
        path = output / "metrics.jsonl"
        keep_until(path, first_step if first_step else -1)
        self._file = path.open("a", encoding="utf-8")
        self._closers.append(self._file.close)
        if run.log.progress:
            self._progress = _progress(run.steps, first_step)
            self._sinks.append(self._progress.show)
            self._closers.append(self._progress.close)
        for sink in run.log.sinks:
            write, close = SINKS[sink](run, output)
            self._sinks.append(write)
            self._closers.append(close)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        try:
            if exception_type is None:
                self.flush()
            else:  # the run is ending for another reason; do not hide it behind this step's own
                with suppress(TrainingError):
                    self.flush()
        finally:
            for close in reversed(self._closers):
                close()

    def restart_clock(self) -> None:
        """Leave what happened since the last step (an evaluation, a save) out of the next step's time."""
        self._last_read = self._last_queued = time.perf_counter()

    def step(self, step: int, lr: float, report: StepReport) -> None:
        """Take the report of optimizer step `step`, counted from 1; on a GPU, write the one before it.

        Raises:
            TrainingError: if the loss or the gradient's norm of the step written is NaN or infinite.
        """
        now = time.perf_counter()
        queuing, self._last_queued = now - self._last_queued, now
        self._pending, previous = (step, lr, report, queuing), self._pending
        if self.process.device.type == "cpu":  # nothing is queued there: this step is done
            self.flush()
        elif previous is not None:
            self._write_step(*previous)

    def flush(self) -> None:
        """Write the step that is still held back. Waits for the device."""
        previous, self._pending = self._pending, None
        if previous is not None:
            self._write_step(*previous)

    def _write_step(self, step: int, lr: float, report: StepReport, queuing: float) -> None:
        loss, grad_norm, items = float(report.loss), float(report.grad_norm), int(report.computed)
        now = time.perf_counter()
        seconds, self._last_read = max(now - self._last_read, queuing, 1e-9), now
        rate = items / seconds
        line = {
            "step": step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_s": rate,
            "step_s": seconds,
            "peak_memory_bytes": peak_memory(self.process.device),
        }
        utilization = rate * self.flops_per_item / self.peak_flops
        if not math.isnan(utilization):
            line["mfu"] = utilization
        if report.skipped:
            line["skipped"] = True
        self.write(line)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingError(f"step {step}: loss is {loss}, gradient norm {grad_norm}")
        self.confirmed_step = step

    def write(self, line: dict[str, Any]) -> None:
        """Write one line of metrics to every sink."""
        if self._file is None:
            return
        # JSON has no NaN; a reader that does not know it should still read the line
        clean = {k: (str(v) if isinstance(v, float) and not math.isfinite(v) else v) for k, v in line.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink(line)


def keep_until(path: Path, step: int) -> None:
    """Drop lines of steps after `step` from a metrics file: a resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # a line cut short by a crash
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


class _Bar:
    """A live bar on a terminal."""

    def __init__(self, steps: int, first_step: int) -> None:
        self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def show(self, line: dict[str, Any]) -> None:
        if "loss" in line:
            self._bar.set_postfix_str(_headline(line), refresh=False)
            self._bar.update()
        else:
            self._bar.write(f"step {line['step']}: {_evaluation(line)}", file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """A line from time to time, for logs that a terminal's control characters would spoil."""

    def __init__(self, steps: int, first_step: int) -> None:
        self._steps, self._next = steps, 0.0

    def show(self, line: dict[str, Any]) -> None:
        if "loss" not in line:
            print(f"step {line['step']}/{self._steps}: {_evaluation(line)}", file=sys.stderr, flush=True)
        elif time.monotonic() >= self._next or line["step"] == self._steps:
            self._next = time.monotonic() + PLAIN_LINE_S
            print(f"step {line['step']}/{self._steps}: {_headline(line)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


def _progress(steps: int, first_step: int) -> _Bar | _Lines:
    return (_Bar if sys.stderr.isatty() else _Lines)(steps, first_step)


def _headline(line: dict[str, Any]) -> str:
    text = f"loss {line['loss']:.4f}, lr {line['lr']:.2e}, norm {line['grad_norm']:.2f}, "
    text += f"{line['tokens_per_s']:,.0f}/s, {line['peak_memory_bytes'] / 1e9:.2f} GB"
    return text + (f", MFU {line['mfu']:.1%}" if "mfu" in line else "")


def _evaluation(line: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:,.4f}" if isinstance(value, float) else f"{key} {value:,}"
        for key, value in line.items()
        if key != "step"
    )


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in line.items() if key != "step" and isinstance(value, int | float)}


def _tensorboard(run: Run, output: Path) -> tuple[Callable[[dict[str, Any]], None], Callable[[], None]]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "log.sinks: 'tensorboard' needs a package that is missing; pip install 'qrecipes[tensorboard]'"
        ) from error
    writer = SummaryWriter(str(output / "tensorboard"))

    def write(line: dict[str, Any]) -> None:
        for key, value in _numbers(line).items():
            writer.add_scalar(key, value, line["step"])

    return write, writer.close


def _wandb(run: Run, output: Path) -> tuple[Callable[[dict[str, Any]], None], Callable[[], None]]:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "log.sinks: 'wandb' needs a package that is missing; pip install 'qrecipes[wandb]'"
        ) from error
    session = wandb.init(project=run.log.wandb_project, dir=str(output), name=output.name)

    def write(line: dict[str, Any]) -> None:
        session.log(_numbers(line), step=line["step"])

    return write, session.finish


SINKS = {"tensorboard": _tensorboard, "wandb": _wandb}
