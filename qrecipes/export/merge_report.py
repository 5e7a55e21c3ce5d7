"""What `finalize` costs: a model before it and after it, on the same tokens, in several types.

Errors of logits are measured in copies of the model converted to float64, float32 and bfloat16, and finalized
there, which tells arithmetic from rounding: in float64 nothing but a wrong merge is left. Perplexity and the
Kullback-Leibler divergence are of the model as it is exported, on held-out data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qrecipes.data import IGNORE, Batch
from qrecipes.errors import ExportError
from qrecipes.export.integer_zeros import has_float_zeros, round_zeros_
from qrecipes.models.modes import evaluation_mode
from qrecipes.training.task import forward_batch
from qrecipes.transforms.base import MergeBounds, named_linears
from qrecipes.transforms.chain import Chain

HELD_OUT_BATCHES = 8
"""Most batches of held-out data that are read."""
ROWS, TOKENS = 2, 256
"""Most rows, and tokens of each, that errors of logits are measured on."""
TYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
_COPIES = 3
"""Weights alive at once, in units of the model's: those it has, a copy's, and what those merge into."""


@dataclass(frozen=True)
class LogitError:
    """Largest difference of a logit over the largest logit before, in one type."""

    relative_error: float | None
    bound: float
    """None and infinite values are written as null."""
    not_measured: str | None = None
    """Why there is no error."""


@dataclass(frozen=True)
class HeldOut:
    """Loss of one model on held-out data."""

    loss: float
    """Mean over targets, in nats."""
    perplexity: float
    kl: float
    """Mean over targets of KL(before || this), in nats."""


@dataclass(frozen=True)
class MergeReport:
    """What `finalize` changed."""

    methods: list[str]
    dtype: str
    """Type of the model's parameters, in which held-out data were measured."""
    logits: dict[str, LogitError]
    targets: int
    """Held-out targets."""
    before: HeldOut
    after: HeldOut
    perplexity_change: float
    """Relative, with its sign."""
    perplexity_bound: float
    integer_zeros: HeldOut | None
    """What a runtime would measure that takes only integer zero points; None where no layer has others."""
    note: str | None = None
    """What may differ from the model that trained, since it was merged on another kind of device."""

    def faults(self) -> list[str]:
        """What is worse than its bound."""
        found = [
            f"in {name}, logits differ by {error.relative_error:.2g} of the largest; at most {error.bound:g}"
            for name, error in self.logits.items()
            if error.relative_error is not None and not error.relative_error <= error.bound
        ]
        if not abs(self.perplexity_change) <= self.perplexity_bound:
            found.append(
                f"held-out perplexity went from {self.before.perplexity:.6g} to {self.after.perplexity:.6g}, "
                f"by {self.perplexity_change:+.2g} of it; at most {self.perplexity_bound:g}"
            )
        return found

    def check(self, where: Path) -> None:
        """Raise ExportError where the merge is worse than its bound."""
        faults = self.faults()
        if faults:
            raise ExportError(
                f"{where}: the merge of {', '.join(self.methods)} is worse than it may be: "
                f"{'; '.join(faults)}; raise the transform's tolerance where it has one, or export with "
                "--no-merge-check, which writes the report and lets it pass"
            )

    def to_json(self) -> dict[str, Any]:
        """JSON values; what is not finite is null."""
        return _finite(asdict(self))

    def summary(self) -> str:
        """One line."""
        errors = ", ".join(
            f"{name} {error.relative_error:.1e}"
            for name, error in self.logits.items()
            if error.relative_error is not None
        )
        line = (
            f"merge of {', '.join(self.methods)}: relative logit error {errors}; held-out perplexity "
            f"{self.before.perplexity:.6g} -> {self.after.perplexity:.6g}, KL {self.after.kl:.2e} nats"
        )
        if self.integer_zeros is not None:
            line += f"; with integer zero points it would be {self.integer_zeros.perplexity:.6g}"
        return line


def merge_report(
    model: nn.Module, chain: Chain, batches: Iterable[Batch], device: torch.device | None = None
) -> MergeReport:
    """Compare `model`, swapped and trained, with what `chain.finalize` makes of it; it is left as it is.

    On held-out data the finalized model is that which layers become on `device`; None: where they are.

    Raises:
        ExportError: if there is no batch with a target.
    """
    home = next(model.parameters()).device
    held_out = [batch for batch in islice(batches, HELD_OUT_BATCHES) if batch.count()]
    if not held_out:
        raise ExportError(
            "merge report: there is no held-out batch with a target; give the run held-out data"
        )
    sample = held_out[0].head(ROWS, TOKENS).to(home)
    bounds = chain.merge_bounds()
    with evaluation_mode(model), torch.no_grad():
        logits = {
            field.name: _logit_error(model, chain, sample, field.name, bound)
            for field, bound in zip(fields(MergeBounds), astuple(bounds), strict=True)
            if field.name in TYPES
        }
        merged = chain.finalize(sharing_parameters(model), device).eval()
        models = [model, merged]
        if any(has_float_zeros(module) for module in merged.modules()):
            rounded = sharing_parameters(merged)
            round_zeros_(rounded)
            models.append(rounded)
        targets, found = _held_out(models, held_out, home)
    before, after = found[:2]
    return MergeReport(
        methods=[transform.name for transform in chain.transforms],
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        logits=logits,
        targets=targets,
        before=before,
        after=after,
        perplexity_change=math.expm1(min(after.loss - before.loss, 700.0)),
        perplexity_bound=bounds.perplexity,
        integer_zeros=found[2] if len(found) > 2 else None,
    )


def _logit_error(model: nn.Module, chain: Chain, batch: Batch, name: str, bound: float | None) -> LogitError:
    if bound is None:
        return LogitError(None, math.inf, f"the method does not compute in {name}")
    dtype = TYPES[name]
    needed, free = _COPIES * _weights(model) * dtype.itemsize, _free_memory(next(model.parameters()).device)
    if free is not None and needed > free:
        return LogitError(
            None,
            bound,
            f"copies of the model in {name} need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free",
        )
    copied = copy.deepcopy(model).to(dtype)
    before = _in_type(copied, batch, dtype)
    after = _in_type(chain.finalize(copied).eval(), batch, dtype)
    largest = before.abs().max()
    return LogitError(float((after - before).abs().max() / largest) if largest else 0.0, bound)


def _in_type(model: nn.Module, batch: Batch, dtype: torch.dtype) -> Tensor:
    if dtype is not torch.float64:
        return forward_batch(model, batch).double()
    with _Wide():
        return forward_batch(model, batch)


class _Wide(TorchFunctionMode):
    """Makes `tensor.float()`, which norms and rotary embeddings call for precision, keep float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float and args[0].dtype is torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def _held_out(
    models: Sequence[nn.Module], batches: Iterable[Batch], device: torch.device
) -> tuple[int, list[HeldOut]]:
    """How many targets there are, and what each model measures; divergences are from the first."""
    losses, divergences = ([0.0] * len(models) for _ in range(2))
    targets = 0
    for batch in batches:
        for row in batch.rows():  # one at a time: logits are wide
            moved = row.to(device)
            targets += row.count()
            counted = (moved.targets != IGNORE).flatten()
            wanted = moved.targets.flatten()[counted].unsqueeze(-1)
            first: Tensor | None = None
            for i, model in enumerate(models):
                logprobs = forward_batch(model, moved).flatten(0, -2)[counted].double().log_softmax(-1)
                losses[i] -= float(logprobs.gather(-1, wanted).sum())
                first = logprobs if first is None else first
                divergences[i] += float((first.exp() * (first - logprobs)).sum())
    means = [(loss / targets, kl / targets) for loss, kl in zip(losses, divergences, strict=True)]
    return targets, [HeldOut(loss, math.exp(min(loss, 700.0)), kl) for loss, kl in means]


def sharing_parameters(model: nn.Module) -> nn.Module:
    """A copy of the modules with the same Parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _weights(model: nn.Module) -> int:
    """Numbers that a plain model of these layers holds."""
    linears = [module for _, module in named_linears(model)]
    inside = {id(p) for module in linears for p in module.parameters()}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return rest + sum(module.in_features * module.out_features for module in linears)


def _free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had, None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    told = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    return int(told["MemAvailable"][0]) * 1024 if "MemAvailable" in told else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
