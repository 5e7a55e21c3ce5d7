"""Activations on low-bit grids, a grid a token: what W4A8 and W4A8KV4 add to low-bit weights.

x_hat = dequantize(quantize(x)) of the activations that a pattern names, with the straight-through gradient
(quant/activations.py). The presets are LR-QAT's (arXiv 2406.06385, a8, a8kv4 and a4 of the released code),
which go with any method of weights: this table comes after its.

Where conventions differ, ours is the default: outputs of the norms, and so the inputs of query, key, value,
gate and up projections, are quantized (`norm_outputs`); zero points are integers (`zero_point`); keys and
values have a grid a head, as a cache stores them, and the input of the output projection one a token, as a
product of integers needs it (`per_head`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qrecipes.errors import ConfigError
from qrecipes.models.activation_points import activation_points
from qrecipes.models.activation_quantizers import (
    ActivationScheme,
    Preset,
    bits_of,
    insert_activation_quantizers,
    measured,
    quantized_modules,
    remove_activation_quantizers,
)
from qrecipes.quant.activations import ZeroPoint
from qrecipes.transforms.base import Bounds, MergeBounds, Transform, TransformConfig, register

MIN_SQNR_DB = 0.0
"""Least SQNR of a quantized activation: below it the noise is larger than the signal."""


@dataclass(frozen=True, kw_only=True)
class ActivationQuantizationConfig(TransformConfig):
    """Which activations are quantized, and how. `targets` and `skip` are matched with the names of the
    modules that give or take them."""

    pattern: Preset | dict[str, int] = "a8"
    """a8, a8kv4, a4, or bits (2 to 8) by activation: na, nm (outputs of norms), q, k, v, o, g, u, d (of
    projections), qe, ke (queries and keys as attention multiplies them), ao, mm (inputs of o and d)."""
    norm_outputs: bool = True
    """False takes na and nm out of a preset, as the W4A8 and W4A4 runs of LR-QAT's README do."""
    symmetric: bool = False
    """Whether grids are symmetric around 0, without a zero point."""
    zero_point: ZeroPoint = "integer"
    """Of asymmetric grids: integer, or float as in LR-QAT's released code, which no integer product uses."""
    per_head: tuple[str, ...] = ("k", "v")
    """Which of q, k, v and ao have a grid a head instead of one a token; LR-QAT's code has ao alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.scheme  # noqa: B018 - raises where keys contradict each other
        except ConfigError as error:
            raise ConfigError(f"activation_quantization.{error}") from error

    @property
    def scheme(self) -> ActivationScheme:
        """What is inserted into a model."""
        return ActivationScheme(
            pattern=bits_of(self.pattern, norm_outputs=self.norm_outputs),
            symmetric=self.symmetric,
            zero_point=self.zero_point,
            per_head=self.per_head,
        )


@register("activation_quantization")
class ActivationQuantization(Transform[ActivationQuantizationConfig]):
    """Hooks on the modules that give or take the activations; nothing is replaced or trained.

    The finalized model computes with activations as they are.
    """

    Config = ActivationQuantizationConfig
    sqnr_floor_db = 20.0  # a8: least of 12 seeds on tiny decoders and ViTs: 38; a4 11
    finalize_floor_db = 20.0  # what a8 costs: the finalized model has no quantizers
    parity_rtol = 2e-2  # a sum in another order can move a value to its grid's next level
    compares_layers = False
    freezes_rest = False

    def sites(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that give or take an activation of the pattern, by the activation's name."""
        points = activation_points(model, self.config.scheme.pattern, self._left_alone)
        return {point.name: point.module for point in points}

    def swap(self, model: nn.Module) -> nn.Module:
        """Insert the quantizers; raises ConfigError as `insert_activation_quantizers`."""
        return insert_activation_quantizers(model, self.config.scheme, self._left_alone)

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that have a quantizer, by the activation's name."""
        return quantized_modules(model, self.config.scheme.pattern)

    def bounds(self) -> Bounds:
        """One bound for 2 bits and for 8; a bit is worth about 6 dB, and outliers take from it."""
        return Bounds(output=MIN_SQNR_DB, grad_input=None, grad_weight=None)

    def measure(self, model: nn.Module, run: Callable[[], Any]) -> dict[str, float]:
        """SQNR of each activation against its quantized values."""
        return measured(model, run)

    def merge_bounds(self) -> MergeBounds:
        """Without its quantizers the model is another: differences are reported, and none is too large."""
        return MergeBounds(float64=math.inf)

    def finalize(self, model: nn.Module, device: torch.device | None = None) -> nn.Module:
        """Take the quantizers out."""
        return remove_activation_quantizers(model, self.config.scheme.pattern)

    def _left_alone(self, fqn: str) -> bool:
        return self.config.reason_to_skip(fqn) is not None
