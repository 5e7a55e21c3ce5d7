"""Post-training quantization of a built model: its linear layers become `QuantLinear`, by rounding to nearest
in a range that a method chooses, or by GPTQ."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qrecipes.errors import ConfigError
from qrecipes.models.sequential import Forward, replace_in_order
from qrecipes.quant.affine import AffineGrid
from qrecipes.quant.formats import AffineFormat, NF4Format, WeightFormat, bits_per_weight, format_to_json
from qrecipes.quant.gptq import (
    GPTQSettings,
    Ranges,
    gptq,
    relative_output_error,
    relative_weight_error,
)
from qrecipes.quant.linear import QuantLinear
from qrecipes.quant.ranges import GREATEST_POWER, LEAST_POWER, RANGES

METHODS = ("rtn", "lp", "mse", "hqq", "gptq")


@dataclass(frozen=True, kw_only=True)
class PostTraining:
    """How weights become low-bit ones."""

    format: WeightFormat = field(default_factory=AffineFormat)
    method: str = "rtn"
    """A range method of `ranges.RANGES`, which rounds to nearest, or `gptq`. NF4 has `rtn` only."""
    ranges: str = "rtn"
    """The range method that `gptq` uses for its groups."""
    p: float = 4.0
    """Exponent of the range method `lp`."""
    gptq: GPTQSettings = field(default_factory=GPTQSettings)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method: {self.method!r}; use one of {', '.join(METHODS)}")
        if self.range_method not in RANGES:
            raise ConfigError(f"ranges: {self.range_method!r}; use one of {', '.join(RANGES)}")
        if not LEAST_POWER <= self.p <= GREATEST_POWER:
            raise ConfigError(f"p: {self.p:g}; use {LEAST_POWER:g} to {GREATEST_POWER:g}")
        if isinstance(self.format, NF4Format):
            if self.method != "rtn":
                raise ConfigError(f"method: {self.method!r}, but NF4 has fixed levels; use 'rtn'")
        elif self.range_method == "hqq" and not self.format.has_offset:
            raise ConfigError(
                "ranges: 'hqq' optimizes float zero points, which the format lacks; make it asymmetric, with "
                "a float zero point"
            )

    @property
    def range_method(self) -> str:
        """The name of the function that chooses ranges."""
        return self.ranges if self.method == "gptq" else self.method

    @property
    def choose_range(self) -> Ranges:
        """The function that chooses ranges."""
        function: Callable[..., AffineGrid] = RANGES[self.range_method]
        return partial(function, p=self.p) if self.range_method == "lp" else function

    def to_json(self) -> dict[str, Any]:
        """What of this has a meaning for the method, as a JSON object."""
        described: dict[str, Any] = {"method": self.method, "format": format_to_json(self.format)}
        if self.method == "gptq":
            described |= {"ranges": self.ranges, **asdict(self.gptq)}
        if self.range_method == "lp":
            described["p"] = self.p
        return described


@dataclass(frozen=True)
class LayerError:
    """What became of one layer."""

    name: str
    out_features: int
    in_features: int
    bits_per_weight: float
    """Of the whole payload, scales and zero points included."""
    weight_error: float
    """|W - W_hat| / |W|, Frobenius norms."""
    output_error: float | None
    """|X (W - W_hat)^T| / |X W^T| over the calibration inputs that reached the layer; None without any."""
    damping: float | None
    """GPTQ's, where it was used."""
    seconds: float
    """Of the layer, or its share of the time of the layers that were quantized together with it."""


def linear_layers(
    model: nn.Module, reason_to_skip: Callable[[str], str | None]
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The plain linear layers to quantize, by name, and why each other linear layer is left alone.

    Left alone is what `reason_to_skip` gives a reason for, and layers whose weight is also another module's,
    which would keep it in full precision.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    chosen: dict[str, nn.Linear] = {}
    left: dict[str, str] = {}
    for fqn, module in model.named_modules():
        if isinstance(module, QuantLinear):
            left[fqn] = f"is low-bit already, {module.format.kind} of {module.format.bits} bits"
        if not isinstance(module, nn.Linear):
            continue
        others = [name for name in owners[id(module.weight)] if name != f"{fqn}.weight"]
        reason = reason_to_skip(fqn)
        if reason is None and others:
            reason = f"its weight is also {others[0]}"
        if reason is None and type(module) is not nn.Linear:
            reason = f"{type(module).__name__} is no plain nn.Linear"
        if reason is None:
            chosen[fqn] = module
        else:
            left[fqn] = reason
    return chosen, left


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    settings: PostTraining,
    *,
    forwards: Sequence[Forward] = (),
    device: torch.device | str | None = None,
    activations: torch.device | str = "cpu",
    done: Callable[[LayerError], None] = lambda error: None,
) -> list[LayerError]:
    """Replace `layers` of `model` in place by low-bit ones; what became of each, in the order of the work.

    With `forwards`, the calibration samples, `replace_in_order` brings the layers up one after the other,
    with the inputs that the low-bit layers before them produce; `gptq` needs them, and other methods measure
    `output_error` on them. `done` is called after each layer.

    Raises:
        ConfigError: if there is no layer, a group size does not divide one, or GPTQ has no samples or meets a
        Hessian without an inverse.
    """
    if not layers:
        raise ConfigError("quantize: no plain linear layer is left to quantize; see what `skip` matches")
    try:
        for fqn, layer in layers.items():
            settings.format.check_width(layer.in_features, fqn)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if settings.method == "gptq" and not forwards:
        raise ConfigError("method: 'gptq' needs calibration samples, and there are none; give a text")
    found: list[LayerError] = []

    def replacement(group: dict[str, nn.Linear], hessian: Tensor | None) -> dict[str, nn.Module]:
        replaced, errors = _quantize_group(group, hessian, settings)
        for error in errors:
            found.append(error)
            done(error)
        return replaced

    if forwards:
        replace_in_order(model, layers, forwards, replacement, device=device, activations=activations)
        return found
    for fqn, layer in layers.items():
        home = layer.weight.device
        for name, module in replacement({fqn: layer.to(device or home)}, None).items():
            model.set_submodule(name, module.to(home).train(layer.training))
    return found


def _quantize_group(
    group: dict[str, nn.Linear], hessian: Tensor | None, settings: PostTraining
) -> tuple[dict[str, nn.Module], list[LayerError]]:
    """Low-bit layers in place of those of one input."""
    began = time.monotonic()
    damping = None
    quantized: dict[str, QuantLinear]
    if settings.method == "gptq":
        assert hessian is not None, list(group)
        quantized, damping = _by_gptq(group, hessian, settings)
    else:
        quantized = {
            fqn: QuantLinear.from_linear(layer, settings.format, ranges=settings.choose_range, name=fqn)
            for fqn, layer in group.items()
        }
    measured = [_measure(fqn, layer, quantized[fqn], hessian) for fqn, layer in group.items()]
    _synchronize(next(iter(group.values())).weight.device)
    weights = sum(layer.weight.numel() for layer in group.values())
    seconds = (time.monotonic() - began) / weights
    errors = [
        LayerError(
            fqn,
            layer.out_features,
            layer.in_features,
            *errors,
            damping=damping,
            seconds=seconds * layer.weight.numel(),
        )
        for (fqn, layer), errors in zip(group.items(), measured, strict=True)
    ]
    return dict(quantized), errors


def _by_gptq(
    group: dict[str, nn.Linear], hessian: Tensor, settings: PostTraining
) -> tuple[dict[str, QuantLinear], float]:
    """All layers of one input at once, their rows stacked."""
    format = settings.format
    assert isinstance(format, AffineFormat), format
    rows = [layer.out_features for layer in group.values()]
    try:
        stacked = gptq(
            torch.cat([layer.weight for layer in group.values()]),
            hessian,
            format,
            ranges=settings.choose_range,
            settings=settings.gptq,
            name=", ".join(group),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    parts = [stacked.q.split(rows), *(None if t is None else t.split(rows) for t in stacked.grid)]
    quantized = {}
    for index, (fqn, layer) in enumerate(group.items()):
        q_NK, *grid = (None if part is None else part[index] for part in parts)
        assert q_NK is not None
        quantized[fqn] = QuantLinear.from_integers(
            q_NK,
            AffineGrid(*grid),  # type: ignore[arg-type]
            format,
            layer.bias,
            layer.weight.dtype,
        )
    return quantized, stacked.damping


def _measure(
    fqn: str, layer: nn.Linear, quantized: QuantLinear, hessian: Tensor | None
) -> tuple[float, float, float | None]:
    """Bits a weight, and the two errors."""
    w_NK, w_hat_NK = layer.weight, quantized.dequantize(torch.float32)
    weight_error = relative_weight_error(w_NK, w_hat_NK)
    if weight_error != weight_error:
        raise ConfigError(f"{fqn}: the weight is not finite; leave the layer out, or repair the model")
    output_error = None if hessian is None else relative_output_error(w_NK, w_hat_NK, hessian)
    return bits_per_weight(quantized.format, *w_NK.shape), weight_error, output_error


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
