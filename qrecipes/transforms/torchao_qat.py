"""torchao's own quantization-aware training, as a baseline: its fake quantizers, and what they end as here.

    int4_weight    Int4WeightOnlyConfig: 4 bits over each group's whole range, with a float zero point
    8da4w          Int8DynamicActivationIntxWeightConfig: symmetric 4 bits, and inputs of asymmetric 8 bits

Both train all weights and learn no scale. torchao converts the first to kernels of certain GPUs and the
second to a tensor subclass; `merged` gives the same integers and grid as a low-bit layer of this library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torchao.quantization import (
    Int4WeightOnlyConfig,
    Int8DynamicActivationIntxWeightConfig,
    PerGroup,
    quantize_,
)
from torchao.quantization.qat import FakeQuantizedLinear, QATConfig

from qrecipes.errors import ConfigError, TrainingError
from qrecipes.quant.affine import AffineGrid
from qrecipes.quant.formats import AffineFormat
from qrecipes.quant.input_linear import InputFormat, QuantInputLinear
from qrecipes.quant.linear import QuantLinear
from qrecipes.transforms.base import Bounds, LinearTransform, MergeBounds, TransformConfig, register
from qrecipes.transforms.frozen import check_width

BITS = 4
LEVELS = 2**BITS - 1
LEAST_RANGE = 1e-6
"""torchao's int4_weight widens a smaller range to this."""
GRID_RTOL = 1e-4
"""Largest difference of a merged weight from the trained one, in steps of its grid."""


@dataclass(frozen=True, kw_only=True)
class TorchaoQATConfig(TransformConfig):
    """torchao's fake quantization of linear layers."""

    scheme: Literal["int4_weight", "8da4w"] = "int4_weight"
    """Weights alone in 4 bits, or weights in 4 bits and inputs in 8."""
    group_size: int = 128
    """Inputs of a row that share a scale."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.format  # noqa: B018 - raises where the size is not allowed
        except ValueError as error:
            raise ConfigError(f"torchao_qat.group_size: {error}") from error

    @property
    def format(self) -> AffineFormat:
        """What a merged layer is."""
        symmetric = self.scheme == "8da4w"
        return AffineFormat(
            bits=BITS,
            group_size=self.group_size,
            symmetric=symmetric,
            zero_point="integer" if symmetric else "float",
        )

    def torchao_config(self) -> QATConfig:
        """torchao's configuration of its prepare step."""
        if self.scheme == "int4_weight":
            return QATConfig(Int4WeightOnlyConfig(group_size=self.group_size), step="prepare")
        base = Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            weight_granularity=PerGroup(self.group_size),
        )
        return QATConfig(base, step="prepare")


class TorchaoQATLinear(nn.Module):
    """torchao's layer with this library's verbs."""

    def __init__(self, fake: FakeQuantizedLinear, config: TorchaoQATConfig) -> None:
        super().__init__()
        self.config = config
        self.in_features, self.out_features = fake.in_features, fake.out_features
        self.weight, self.bias = fake.weight, fake.bias
        self.weight_fake_quantizer = fake.weight_fake_quantizer
        self.activation_fake_quantizer = fake.activation_fake_quantizer

    @classmethod
    def from_linear(cls, layer: nn.Linear, config: TorchaoQATConfig) -> TorchaoQATLinear:
        """The layer that torchao's prepare step makes, with the Parameters of `layer`."""
        holder = nn.Sequential(layer)
        quantize_(holder, config.torchao_config())
        fake = holder[0]
        assert isinstance(fake, FakeQuantizedLinear), type(fake)
        # where these are on the meta device, torchao makes others
        fake.weight, fake.bias = layer.weight, layer.bias
        return cls(fake, config)

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the input's type."""
        x = input if self.activation_fake_quantizer is None else self.activation_fake_quantizer(input)
        return nn.functional.linear(x, self.weight_fake_quantizer(self.weight), self.bias)

    @torch.no_grad()
    def merged(self) -> QuantLinear:
        """The integers that the forward pass multiplies, with its quantized input, if any.

        Raises:
            TrainingError: if they do not give the trained weight, as when torchao's rule has changed.
        """
        config, dtype = self.config, self.weight.dtype
        q_NGS, grid = self._symmetric_integers() if config.scheme == "8da4w" else self._ranged_integers()
        layer = QuantLinear.from_integers(
            q_NGS.flatten(1).to(torch.int8), grid, config.format, self.bias, dtype
        )
        self._check(layer, grid.scale)
        if self.activation_fake_quantizer is None:
            return layer
        return QuantInputLinear.of(layer, InputFormat(bits=8, symmetric=False))

    def _grouped(self, weight_NK: Tensor) -> Tensor:
        size = self.config.group_size
        work = torch.promote_types(weight_NK.dtype, torch.float32)
        return weight_NK.detach().to(work).unflatten(1, (self.in_features // size, size))

    def _ranged_integers(self) -> tuple[Tensor, AffineGrid]:
        """Levels over each group's range, as torchao's int4_weight rounds them."""
        w_NGS, half = self._grouped(self.weight), 2 ** (BITS - 1)
        low, high = w_NGS.amin(-1, keepdim=True), w_NGS.amax(-1, keepdim=True)
        scale = (high - low).clamp(min=LEAST_RANGE) / LEVELS
        q_NGS = ((w_NGS - low) / scale).round().clamp(0, LEVELS) - half
        return q_NGS, AffineGrid(scale.squeeze(-1), offset=(low + scale * half).squeeze(-1))

    def _symmetric_integers(self) -> tuple[Tensor, AffineGrid]:
        """What torchao's 8da4w rounded: its quantizer keeps the scales that it used, in the model's type."""
        trained_NGS = self._grouped(self.weight_fake_quantizer(self.weight))
        scale_NG = self.weight_fake_quantizer.scale.detach().reshape(trained_NGS.shape[:2])
        scale_NG = scale_NG.to(trained_NGS.dtype)
        return (trained_NGS / scale_NG.unsqueeze(-1)).round(), AffineGrid(scale_NG.float())

    def _check(self, layer: QuantLinear, scale_NG: Tensor) -> None:
        if scale_NG.is_meta:
            return
        trained = self.weight_fake_quantizer(self.weight).float()
        off = (layer.dequantize(torch.float32) - trained).abs()
        steps = scale_NG.repeat_interleave(self.config.group_size, 1).float()
        # torchao's weight is in the model's type
        rounding = trained.abs() * torch.finfo(self.weight.dtype).eps
        if not (off <= steps * GRID_RTOL + rounding).all():
            raise TrainingError(
                "torchao_qat: the merged weight differs from the trained one by up to "
                f"{float(off.max()):.2g}; this version of torchao quantizes otherwise, so use the one "
                "that the project names, or another method"
            )


@register("torchao_qat")
class TorchaoQAT(LinearTransform[TorchaoQATConfig]):
    """torchao's fake quantizers; every weight of the model trains."""

    Config = TorchaoQATConfig
    Layer = TorchaoQATLinear
    sqnr_floor_db = 8.0
    finalize_floor_db = 40.0  # inputs divided, not multiplied by a reciprocal, can round to a neighbour
    parity_rtol = 1e-2  # one 8-bit input on the other side of a half; most seen in 4 steps: 4e-3

    @property
    def freezes_rest(self) -> bool:
        """No: it owns no parameters, and changes only how products are computed."""
        return False

    def check_site(self, fqn: str, module: nn.Module) -> None:
        """Refuse widths that groups do not divide."""
        assert isinstance(module, nn.Linear), type(module)
        check_width(self.config.format, module.in_features, f"torchao_qat: {fqn}")

    def bounds(self) -> Bounds:
        """As far off as 4 bits are."""
        return Bounds(6.0, 0.0, 0.0)

    def merge_bounds(self) -> MergeBounds:
        """Weights alone are equal but for the last bit; quantized inputs round otherwise now and then."""
        perplexity = 1e-3 if self.config.scheme == "int4_weight" else 5e-3
        return MergeBounds(None, perplexity=perplexity)
