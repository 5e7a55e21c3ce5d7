"""What methods of quantization-aware training share: trained grids, quantized inputs, and their merge.

T tokens, K input features, N output features, G groups of a row. A layer computes with

    W_hat = s * (q - rnd(z))        q signed integers [N, K]; s, z float32 [N, G]; z = 0 where symmetric

where methods differ in what q is rounded from, and ends as a `QuantLinear` with the same q, s and rnd(z),
so that the merged layer multiplies the weight that was trained with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from qrecipes.errors import ConfigError, TrainingError
from qrecipes.models.activation_quantizers import (
    ActivationScheme,
    insert_activation_quantizers,
    remove_activation_quantizers,
)
from qrecipes.quant.activations import MAX_BITS, MIN_BITS
from qrecipes.quant.affine import AffineGrid
from qrecipes.quant.input_linear import InputFormat, QuantInputLinear, check_integer_weight
from qrecipes.quant.learned_grid import (
    SCALE_FLOOR,
    Domain,
    RangeMethod,
    TrainedFormat,
    TrainedGrid,
    collapsed_scales,
    initial_grid,
    lsq_factor,
    round_zero,
    to_parameter,
    to_scale,
)
from qrecipes.quant.linear import QuantLinear, moving_only
from qrecipes.quant.ranges import GREATEST_POWER, LEAST_POWER
from qrecipes.quant.sharded import local
from qrecipes.transforms.base import (
    Bounds,
    LinearTransform,
    MergeBounds,
    ParamGroup,
    StepContext,
    TransformConfig,
)
from qrecipes.transforms.frozen import NO_GROUPS, check_width

CHECK_EVERY = 100
"""Optimizer steps between looks at all scales, which wait for the device."""
# Least SQNR of one layer's output and grad_input, in dB, by bits. Least seen in the pretrained 260K story
# Llama on Shakespeare, a scale a row: 8 bits 40 and 35, 7 32 and 26, 6 28 and 22, 5 22 and 17, 4 16 and 10
# (9 over the whole range), 3 10 and 4, 2 4 and -2 (-1 and -7 over the whole range); the second is a k_proj,
# whose gradients nearly cancel.
FLOORS_DB = {
    8: (34.0, 28.0),
    7: (26.0, 20.0),
    6: (21.0, 15.0),
    5: (15.0, 10.0),
    4: (9.0, 3.0),
    3: (3.0, -3.0),
    2: (-6.0, -13.0),
}
# The same of the output where only inputs are quantized, symmetrically: 31, 25, 19, 13, 8, 4, 0.
INPUT_FLOORS_DB = {8: 24.0, 7: 18.0, 6: 12.0, 5: 6.0, 4: 0.0, 3: -4.0, 2: -7.0}


@dataclass(frozen=True, kw_only=True)
class QATConfig(TransformConfig):
    """Keys that every method of quantization-aware training has."""

    bits: int = 4
    """Bits of a weight, 2 to 8. 5 to 7 train as such, and are exported in bytes."""
    group_size: int | None = None
    """Inputs of a row that share a scale; left out: the whole row (per channel)."""
    symmetric: bool = True
    """No zero point. With `false` each scale has one, which is trained, and rounded whenever it is used."""
    ranges: RangeMethod = "lp"
    """Where scales start: over the whole range (`rtn`), or over that of least squared error (`mse`) or of
    least error to the power `p`. A layer that is quantized already keeps its own."""
    p: float = 4.0
    """The power of `lp`, 2 to 5."""
    scale_lr: float = 0.01
    """Learning rate of the scales, times the run's; 0 leaves them as they start."""
    zero_lr: float = 0.01
    """Learning rate of the zero points, times the run's; they count levels."""
    scale_domain: Domain = "linear"
    """Train a scale itself, never below 1e-8, or its logarithm."""
    scale_gradient: Literal["plain", "lsq"] = "plain"
    """`lsq`: times 1 / sqrt(weights of a scale * highest level), as LSQ has it. AdamW sees only the effect on
    clipping."""
    activation_bits: int | None = None
    """Quantize every layer's input, token by token, to so many bits, 2 to 8; left out: not at all."""
    activation_symmetric: bool = True
    """Inputs of linear layers have no zero point; otherwise a rounded one, as all that `kv_bits` quantizes
    has either way."""
    activation_skip: tuple[str, ...] = ()
    """Layers whose input is left alone, as patterns of names. The released code of LR-QAT quantizes only what
    attention and the gate give, so skips what reads a norm: `["*.q_proj", "*.k_proj", "*.v_proj", "*.w1",
    "*.w3"]`."""
    integer_forward: bool = False
    """Multiply the integers of input and weight, exactly and in INT8 where the GPU can, and scale the sums:
    the arithmetic of integer hardware. Needs symmetric inputs and weights, and one scale a row."""
    kv_bits: int | None = None
    """Quantize what the key and value projections give to so many bits, 2 to 8, a grid a head and token, as
    a cache of keys and values stores it; with `activation_bits`, also queries and keys as attention
    multiplies them, to those. Left out: not at all. For other activations add the transform that is made
    for them."""

    @property
    def where(self) -> str:
        """How errors call the method."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        super().__post_init__()
        where = self.where
        try:
            format = self.format
        except ValueError as error:
            raise ConfigError(f"{where}.{str(error).removeprefix('AffineFormat.')}") from error
        if not LEAST_POWER <= self.p <= GREATEST_POWER:
            raise ConfigError(f"{where}.p: {self.p}; use {LEAST_POWER:g} to {GREATEST_POWER:g}")
        for key in ("scale_lr", "zero_lr"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{where}.{key}: {value}; use a number of at least 0, such as 0.01")
        try:
            self.kv_scheme()
        except ConfigError as error:
            raise ConfigError(f"{where}.kv_bits: {error}") from error
        if self.activation_bits is None:
            without = (("integer_forward", False), ("activation_skip", ()), ("activation_symmetric", True))
            for key, default in without:
                if getattr(self, key) != default:
                    raise ConfigError(
                        f"{where}.{key}: {getattr(self, key)!r}, but inputs are not quantized; set "
                        f"activation_bits, such as 8, or leave {key} out"
                    )
            return
        if not MIN_BITS <= self.activation_bits <= MAX_BITS:
            raise ConfigError(
                f"{where}.activation_bits: {self.activation_bits}; use {MIN_BITS} to {MAX_BITS}"
            )
        if not self.integer_forward:
            return
        if not self.activation_symmetric:
            raise ConfigError(
                f"{where}.integer_forward: true, but asymmetric inputs have a zero point, which the integer "
                "product does not subtract; set activation_symmetric = true, or leave integer_forward out"
            )
        try:
            check_integer_weight(format, f"{where}.integer_forward")
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @property
    def format(self) -> TrainedFormat:
        """The grid of the weights."""
        return TrainedFormat(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)

    def check_width(self, layer: nn.Linear | QuantLinear, fqn: str) -> None:
        """Raise ConfigError where groups do not divide the layer's inputs."""
        check_width(self.format, layer.in_features, f"{self.where}: {fqn}", NO_GROUPS)

    def start(self, w_NK: Tensor) -> TrainedGrid:
        """The grid that training starts from.

        Raises:
            ConfigError: if the weights are not finite, or the groups do not divide a row.
        """
        try:
            return initial_grid(w_NK, self.format, self.ranges, self.p, self.where)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def kv_scheme(self) -> ActivationScheme | None:
        """What of attention is quantized."""
        if self.kv_bits is None:
            return None
        multiplied = {} if self.activation_bits is None else dict.fromkeys(("qe", "ke"), self.activation_bits)
        return ActivationScheme(pattern=dict.fromkeys(("k", "v"), self.kv_bits) | multiplied)

    def input_format(self, fqn: str = "") -> InputFormat | None:
        """How the input of the layer `fqn` is quantized."""
        if self.activation_bits is None or any(fnmatchcase(fqn, pattern) for pattern in self.activation_skip):
            return None
        return InputFormat(
            bits=self.activation_bits, symmetric=self.activation_symmetric, integer=self.integer_forward
        )


class QATLinear(nn.Module):
    """A linear layer on a trained grid; `to`, `bfloat16` and the like never convert what `kept()` names."""

    bias: nn.Parameter | None
    zero: nn.Parameter | None
    input_format: InputFormat | None

    def __init__(
        self, config: QATConfig, layer: nn.Linear | QuantLinear, grid: TrainedGrid, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.qat, self.compute_dtype = config, dtype
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias  # type: ignore[assignment]
        self.input_format = config.input_format()
        raw = to_parameter(grid.scale, config.scale_domain)
        self.scale = nn.Parameter(raw, requires_grad=config.scale_lr > 0)
        self.zero = None if grid.zero is None else nn.Parameter(grid.zero, requires_grad=config.zero_lr > 0)

    def effective_scale(self) -> Tensor:
        """s, [N, G]."""
        config = self.qat
        factor = 1.0
        if config.scale_gradient == "lsq":
            factor = lsq_factor(config.bits, self.in_features // self.scale.shape[1])
        return to_scale(self.scale, config.scale_domain, factor)

    def integers(self) -> Tensor:
        """q, int8 [N, K]: those that the forward pass multiplies."""
        raise NotImplementedError

    @torch.no_grad()
    def merged(self) -> QuantLinear:
        """The integers and the grid of the forward pass, and its quantized input, to stay.

        Raises:
            TrainingError: if a scale has collapsed, or what is rounded is not finite.
        """
        config = self.qat
        check_mergeable({"a layer": self})
        zero = None if self.zero is None else round_zero(self.zero, config.bits).to(torch.int8)
        grid = AffineGrid(self.effective_scale().detach(), zero=zero)
        layer = QuantLinear.from_integers(
            self.integers(), grid, config.format.stored, self.bias, self.compute_dtype
        )
        return layer if self.input_format is None else QuantInputLinear.of(layer, self.input_format)

    def kept(self) -> list[Tensor]:
        """Parameters whose type stays."""
        return [self.scale] if self.zero is None else [self.scale, self.zero]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QATLinear:
        super()._apply(moving_only(self.kept(), fn), recurse)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return self

    def extra_repr(self) -> str:
        """Sizes and formats."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, compute_dtype={self.compute_dtype}, {self.qat.format}, "
            f"input={self.input_format}"
        )


def check_scales(layers: Mapping[str, QATLinear]) -> None:
    """Raise TrainingError where scales of one of the layers, given by name, are at their floor or not finite.
    Waits once for the device."""
    scales = {fqn: local(layer.scale) for fqn, layer in layers.items() if not layer.scale.is_meta}
    if not scales:
        return
    counts = [collapsed_scales(scale, layers[fqn].qat.scale_domain) for fqn, scale in scales.items()]
    for (fqn, scale), bad in zip(scales.items(), torch.stack(counts).tolist(), strict=True):
        config = layers[fqn].qat
        if bad:
            raise TrainingError(
                f"{config.where}: {bad} of {scale.numel()} scales of {fqn} are not finite or have fallen to "
                f"{SCALE_FLOOR:g}, where they stand for no weights; lower scale_lr (now "
                f"{config.scale_lr:g}) or optim.lr, or"
                ' train logarithms with scale_domain = "log"'
            )


def check_mergeable(layers: Mapping[str, QATLinear]) -> None:
    """`check_scales`, and TrainingError where anything else that is rounded is not finite: an integer cannot
    show it, so that the merged layer would compute with other, finite weights."""
    check_scales(layers)
    rounded = {
        (fqn, name): local(p.detach())
        for fqn, layer in layers.items()
        for name, p in layer.named_parameters()
        if name not in ("scale", "bias") and p.is_floating_point() and not p.is_meta
    }
    if not rounded:
        return
    finite = torch.stack([torch.isfinite(t).all() for t in rounded.values()]).tolist()
    for (fqn, name), is_finite in zip(rounded, finite, strict=True):
        if not is_finite:
            raise TrainingError(
                f"{layers[fqn].qat.where}: {name} of {fqn} is not finite, and integers cannot say so; go "
                "back to an earlier checkpoint, or lower optim.lr"
            )


class QATTransform(LinearTransform[Any]):
    """A method whose `Layer` is a `QATLinear`; `param_groups` are the grid's, to be added to."""

    config: QATConfig

    @property
    def hooks(self) -> frozenset[str]:
        """None that change a parameter: `before_step` looks at the scales."""
        return frozenset()

    def check_site(self, fqn: str, module: nn.Module) -> None:
        """Refuse widths that groups do not divide."""
        self.config.check_width(cast("nn.Linear | QuantLinear", module), fqn)

    @classmethod
    def check_alone(cls, config: QATConfig) -> None:
        """Refuse what needs the names of layers, or attention."""
        for key, default in (("kv_bits", None), ("activation_skip", ())):
            if getattr(config, key) != default:
                raise ConfigError(
                    f"{config.where}.{key}: {getattr(config, key)!r} is about named parts of a model, and "
                    "torchao's quantize_ gives a method layers alone; use Chain.from_configs([config])"
                    f".swap(model), or leave {key} out"
                )

    def swap(self, model: nn.Module) -> nn.Module:
        """As of every method; only here are the names known that `activation_skip` has patterns of.

        Raises:
            ConfigError: if such a pattern matches no layer.
        """
        model = super().swap(model)
        layers = cast("dict[str, QATLinear]", self.layers(model))
        for pattern in self.config.activation_skip:
            if not any(fnmatchcase(fqn, pattern) for fqn in layers):
                raise ConfigError(
                    f"{self.name}.activation_skip: {pattern!r} matches none of the {len(layers)} layers, "
                    f"such as {next(iter(layers))!r}; correct it, or leave it out"
                )
        for fqn, layer in layers.items():
            layer.input_format = self.config.input_format(fqn)
        return self._quantize_attention(model)

    def _quantize_attention(self, model: nn.Module) -> nn.Module:
        scheme = self.config.kv_scheme()
        if scheme is None:
            return model
        try:
            return insert_activation_quantizers(model, scheme)
        except ConfigError as error:
            reason, _, _ = str(error).partition(";")  # the rest tells of keys that are not here
            raise ConfigError(
                f"{self.name}.kv_bits: {reason}; leave kv_bits out, and add the transform "
                "of activations, with a pattern that this model has"
            ) from error

    def bounds(self) -> Bounds:
        """As far off as the grid of the weights is, or that of the inputs where it is coarser. A weight that
        trains may get the gradient of a plain layer: where the grid clips nothing, it does."""
        output, grad_input = FLOORS_DB[self.config.bits]
        if self.config.activation_bits is not None:
            output = min(output, INPUT_FLOORS_DB[self.config.activation_bits])
        return Bounds(output, grad_input, None)

    def merge_bounds(self) -> MergeBounds:
        """The weights are equal. Sums are not, where another kernel adds them up, and then a quantized
        input can be rounded to its other neighbour."""
        if self.config.activation_bits is None and self.config.kv_bits is None:
            return MergeBounds(1e-10, 1e-4, math.inf, 1e-3)
        return MergeBounds(None if self.config.integer_forward else math.inf, math.inf, math.inf, 5e-3)

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        """Scales and zero points, never decayed."""
        layers = cast("list[QATLinear]", list(self.layers(model).values()))
        config = self.config
        groups = []
        if config.scale_lr:
            scales = [layer.scale for layer in layers]
            groups.append(ParamGroup("scales", scales, lr_scale=config.scale_lr, weight_decay=0.0))
        zeros = [layer.zero for layer in layers if layer.zero is not None]
        if zeros and config.zero_lr:
            groups.append(ParamGroup("zeros", zeros, lr_scale=config.zero_lr, weight_decay=0.0))
        return groups

    def before_step(self, ctx: StepContext) -> None:
        """Look at all scales now and then.

        Raises:
            TrainingError: if one has collapsed or is not finite.
        """
        if ctx.step % CHECK_EVERY == 0:
            check_scales(cast("dict[str, QATLinear]", self.layers(ctx.model)))

    def finalize(self, model: nn.Module, device: torch.device | None = None) -> nn.Module:
        """As of every method; keys and values stay quantized, as they were in training.

        Raises:
            TrainingError: if a scale has collapsed, or what is rounded is not finite, naming the layer.
        """
        layers = self.layers(model)
        check_mergeable({fqn or "the layer": cast(QATLinear, layer) for fqn, layer in layers.items()})
        scheme = self.config.kv_scheme()
        if not layers or scheme is None:
            return super().finalize(model, device)
        remove_activation_quantizers(model, tuple(scheme.pattern))  # some are on layers that are replaced
        return self._quantize_attention(super().finalize(model, device))
