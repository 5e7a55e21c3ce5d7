"""LoRA: a trained low-rank product beside a frozen linear layer, whose weight may be low-bit.

T tokens, K input features, N output features, R rank. With A [R, K], B [N, R] and kappa = alpha / R
(LoRA, arXiv 2106.09685), or alpha / sqrt(R) (rsLoRA, arXiv 2312.03732):

    forward    y = x W^T + kappa * drop(x) A^T B^T + bias
    merge      W + kappa * B A

W stays as it is, or is NF4 (QLoRA, arXiv 2305.14314) or INT2 to INT8. With DoRA (arXiv 2402.09353), rows are
scaled to trained magnitudes m, and the norm has no gradient:

    forward    y = g * (x W^T + kappa * x A^T B^T) + bias,    g = m / ||W + kappa * B A||
    merge      g * (W + kappa * B A)

||W + kappa B A||^2 = ||W||^2 + 2 kappa sum_R B o (W A^T) + kappa^2 sum_R B o (B A A^T), row by row, so that
nothing of size N x K is formed.

With `merged_forward`, a pass forms V = W + kappa * B A, of A and B in the model's type, rounds the sum to it
once, and multiplies by V: y = x V^T + bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from qrecipes.errors import ConfigError
from qrecipes.quant.formats import AffineFormat, NF4Format, WeightFormat
from qrecipes.quant.linear import QuantLinear
from qrecipes.quant.merged_linear import merged_low_rank_linear
from qrecipes.quant.ranges import RANGES
from qrecipes.transforms.base import (
    Adapter,
    Bounds,
    MergeBounds,
    ParamGroup,
    register,
)
from qrecipes.transforms.frozen import (
    ADAPTER_TYPES,
    AdaptedLinear,
    AdapterConfig,
    AdapterTransform,
    check_scaling,
    check_shapes,
    check_width,
    in_format,
    low_bit_bounds,
    plain_linear,
)

Base: TypeAlias = Literal["bf16", "nf4", "int8", "int4", "int3", "int2"]
LOFTQ_ITERATIONS = 5
"""Alternations of LoftQ (arXiv 2310.08659), which uses 1 to 10 of them; the best is kept."""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    """A trained low-rank product beside each frozen linear layer."""

    rank: int = 64
    """Columns of B and rows of A."""
    alpha: float = 16.0
    """The product is multiplied by alpha / rank."""
    base: Base = "bf16"
    """What the frozen weight is kept in. `bf16`: as the model has it, in the model's type. `nf4`: 4-bit
    NormalFloat in blocks of 64 (QLoRA). `int8` to `int2`: that many bits, with a scale and a float offset
    for each `group_size` inputs. A layer that is low-bit already must be of this kind."""
    group_size: int = 64
    """Inputs of a row that share a scale, with an integer base; 0: the whole row."""
    symmetric: bool = False
    """An integer base has no offsets."""
    quantizer: Literal["rtn", "mse", "lp", "hqq"] = "rtn"
    """How an integer base's ranges are chosen: the whole range, of least squared error, of least fourth
    power, or with half-quadratic offsets."""
    double_quantized: bool = True
    """Keep the magnitudes of an NF4 base's blocks in 8 bits, too."""
    dropout: float = 0.0
    """Share of inputs of the product that is dropped in training."""
    use_dora: bool = False
    """Train the magnitude of each output's weights apart from their direction (DoRA)."""
    use_rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA)."""
    init: Literal["default", "loftq"] = "default"
    """`default`: A uniform, B zero, so training starts at the base. `loftq`: base and product together
    approximate the weight, by alternating quantization and SVD."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that A, B and magnitudes are kept and trained in. They are multiplied in the input's type."""
    merge: Literal["plain", "requantize"] = "plain"
    """What a merged layer is: a plain one in the model's type, or, with a low-bit base, rounded to its
    format again, which loses what the merge report of the export tells."""
    merge_tolerance: float = 0.02
    """Largest relative change of held-out perplexity that an export accepts of the merge."""

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "lora"
        if self.rank < 1:
            raise ConfigError(f"{where}.rank: {self.rank} is not positive; use 1 or more, such as 64")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"{where}.alpha: {self.alpha} is not positive; use a number such as 16")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{where}.dropout: {self.dropout}; use at least 0 and less than 1")
        if not self.merge_tolerance >= 0:
            raise ConfigError(
                f"{where}.merge_tolerance: {self.merge_tolerance} is negative, or no number; use 0 or more"
            )
        if self.base == "bf16":
            for key, default in (
                ("init", "default"),
                ("merge", "plain"),
                ("quantizer", "rtn"),
                ("symmetric", False),
            ):
                if getattr(self, key) != default:
                    raise ConfigError(
                        f"{where}.{key}: {getattr(self, key)!r} is for a low-bit base, and base is 'bf16'; "
                        f"set base to 'nf4' or 'int4', or {key} to {default!r}"
                    )
        self._check_merged_forward(
            where,
            {
                "dropout": (0.0, "there is no product of the adapter's own whose inputs could be dropped"),
                "use_dora": (False, "magnitudes scale the outputs of base and adapter apart"),
            },
        )
        if self.merged_forward and self.base == "bf16":
            raise ConfigError(
                f"{where}.merged_forward: true, and base is 'bf16', whose weights lie on the model's grid: "
                "an adapter below half of its steps would vanish in the sum; set base to 'nf4' or 'int4', or "
                "merged_forward to false"
            )
        for key, default, what in (
            ("quantizer", "rtn", "chooses ranges of integers"),
            ("symmetric", False, "is for integers"),
        ):
            if self.base == "nf4" and getattr(self, key) != default:
                raise ConfigError(
                    f"{where}.{key}: {getattr(self, key)!r} {what}, and base is 'nf4'; leave it out, or "
                    "set base to 'int4'"
                )
        try:
            self.format()
        except ValueError as error:
            raise ConfigError(f"{where}.group_size: {error}") from error

    @property
    def scaling(self) -> float:
        """kappa."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def format(self) -> WeightFormat | None:
        """How the base is stored; None where it stays as it is."""
        if self.base == "bf16":
            return None
        if self.base == "nf4":
            return NF4Format(double_quantized=self.double_quantized)
        return AffineFormat(
            bits=int(self.base.removeprefix("int")),
            group_size=self.group_size or None,
            symmetric=self.symmetric,
            zero_point="integer" if self.symmetric else "float",
        )

    def quantize(self, layer: nn.Linear, format: WeightFormat) -> QuantLinear:
        """The base of a plain layer."""
        return QuantLinear.from_linear(layer, format, ranges=RANGES[self.quantizer], name="lora")


class LoRALinear(AdaptedLinear):
    """A frozen base, plain or low-bit, with A and B beside it. Neither pass keeps a dequantized weight."""

    config: LoRAConfig
    magnitude: nn.Parameter | None
    row_norm_squared: nn.Parameter | None

    def __init__(self, base: nn.Linear | QuantLinear, config: LoRAConfig, a: Tensor, b: Tensor) -> None:
        super().__init__(base, config)
        self.scaling = config.scaling
        dtype = ADAPTER_TYPES[config.adapter_dtype]
        # contiguous, as FSDP2 wants them: what an SVD gives is not
        self.lora_a = nn.Parameter(a.to(dtype).contiguous())
        self.lora_b = nn.Parameter(b.to(dtype).contiguous())
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.magnitude = self.row_norm_squared = None
        if config.use_dora:
            squared = self.base_weight(torch.float32).square().sum(1)
            self.row_norm_squared = nn.Parameter(squared, requires_grad=False)
            self.magnitude = nn.Parameter(self.row_norms().to(dtype))

    @classmethod
    def from_linear(cls, layer: nn.Linear | QuantLinear, config: LoRAConfig) -> LoRALinear:
        """The adapted layer, which freezes the parameters of `layer`; A and B are drawn from the global
        random state.

        Raises:
            ConfigError: if a layer is low-bit already and of another format than `config` says.
            ValueError: if the format's groups do not divide the input features.
        """
        format = config.format()
        base: nn.Linear | QuantLinear = layer
        device = next(layer.parameters()).device
        a = torch.empty(config.rank, layer.in_features, device=device)
        b = torch.zeros(layer.out_features, config.rank, device=device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if isinstance(layer, QuantLinear):
            base = in_format(layer, _low_bit(format), "lora")
        elif format is not None and config.init == "loftq" and not layer.weight.is_meta:
            base, a, b = loftq(layer, lambda part: config.quantize(part, format), config.rank, config.scaling)
        elif format is not None:
            base = config.quantize(layer, format)
        return cls(base, config, a, b)

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the input's type."""
        if self.config.merged_forward:
            assert isinstance(self.base, QuantLinear), self.config
            return merged_low_rank_linear(input, self.base, self.lora_a, self.lora_b, self.scaling)
        x = self.dropout(input)
        product = linear(linear(x, self.lora_a.to(x.dtype)) * self.scaling, self.lora_b.to(x.dtype))
        if self.magnitude is None:
            return self.base_output_with(input, product)
        y = self.base_output(input)
        norms = self.row_norms()
        g = (self.magnitude.to(norms.dtype) / norms).to(y.dtype)
        unbiased = self._unbiased(y)
        if x is not input:  # peft's: what the magnitude adds sees the dropped input, the base does not
            unbiased = self._unbiased(self.base_output(x))
        return y + (g - 1) * unbiased + g * product

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """||W + kappa B A|| of each row, [N], in float32 or wider."""
        assert self.row_norm_squared is not None, self.config
        a, b = self.lora_a.detach().to(self.work_dtype), self.lora_b.detach().to(self.work_dtype)
        cross_NR = self._unbiased(self.base(a.to(self.compute_dtype))).to(self.work_dtype).t()
        squared = self.row_norm_squared + 2 * self.scaling * (b * cross_NR).sum(1)
        squared = squared + self.scaling**2 * (b * (b @ (a @ a.t()))).sum(1)
        return squared.clamp(min=torch.finfo(torch.float32).tiny).sqrt()

    def _unbiased(self, y: Tensor) -> Tensor:
        return y if self.base.bias is None else y - self.base.bias

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight [N, K] that the layer has become, in float32 or wider."""
        dtype = self.work_dtype
        weight = self.base_weight(dtype)
        weight = torch.addmm(weight, self.lora_b.to(dtype), self.lora_a.to(dtype), alpha=self.scaling)
        if self.magnitude is not None:
            weight = weight * (self.magnitude.to(dtype) / self.row_norms()).unsqueeze(1)
        return weight

    def merged(self) -> nn.Linear | QuantLinear:
        """A plain layer in the model's type, or a low-bit one where `config.merge` says so."""
        dtype = self.compute_dtype if self.config.merge == "plain" else self.work_dtype
        plain = plain_linear(self.merged_weight(), self.base, dtype)
        if self.config.merge == "plain":
            return plain
        rounded = self.config.quantize(plain, _low_bit(self.config.format()))
        rounded.compute_dtype = self.compute_dtype
        return rounded

    def adapter(self) -> Adapter:
        """A, B and the magnitudes."""
        magnitude = None if self.magnitude is None else self.magnitude.detach()
        return Adapter(self.lora_a.detach(), self.lora_b.detach(), self.scaling, magnitude)

    def check_adapter(self, given: Adapter, where: str) -> None:
        """Raise ConfigError, naming `where`, if an adapter has another shape, scaling or kind."""
        wanted = {"a": tuple(self.lora_a.shape), "b": tuple(self.lora_b.shape)}
        if self.magnitude is not None and given.magnitude is not None:
            wanted |= {"magnitude": tuple(self.magnitude.shape)}
        check_shapes(where, given, wanted)
        check_scaling(where, given, self.scaling, "alpha, rank and use_rslora")
        if (given.magnitude is None) is not (self.magnitude is None):
            has, lacks = ("has", "lacks") if self.magnitude is None else ("lacks", "has")
            raise ConfigError(
                f"{where}: {has} DoRA's magnitudes, and the layer {lacks} them; set use_dora to what the "
                "adapter was trained with"
            )

    def load_adapter(self, given: Adapter) -> None:
        """Overwrite A, B and the magnitudes."""
        self.lora_a.copy_(given.a)
        self.lora_b.copy_(given.b)
        if self.magnitude is not None:
            self.magnitude.copy_(cast(Tensor, given.magnitude))

    def extra_repr(self) -> str:
        """Rank and scaling."""
        return f"rank={self.config.rank}, scaling={self.scaling:g}, dora={self.config.use_dora}"


def _low_bit(format: WeightFormat | None) -> WeightFormat:
    if format is None:
        raise ConfigError(
            "lora.base: 'bf16', but a selected layer is low-bit already; set base to its kind, or skip it"
        )
    return format


@torch.no_grad()
def loftq(
    layer: nn.Linear,
    quantize: Callable[[nn.Linear], QuantLinear],
    rank: int,
    scaling: float,
    iterations: int = LOFTQ_ITERATIONS,
) -> tuple[QuantLinear, Tensor, Tensor]:
    """The low-bit base Q, A and B of least ||W - Q - scaling * B A|| among `iterations` alternations of
    Q = quantize(W - scaling * B A) and the SVD of W - Q, in float32 (LoftQ, arXiv 2310.08659, algorithm 1).

    The singular values are shared evenly by A and B.
    """
    weight = layer.weight.detach().float()
    low_rank, least = torch.zeros_like(weight), math.inf
    best: tuple[QuantLinear, Tensor, Tensor] | None = None
    for _ in range(iterations):
        base = quantize(plain_linear(weight - low_rank, layer, torch.float32))
        residual = weight - base.dequantize(torch.float32)
        u, s, vh = torch.linalg.svd(residual, full_matrices=False)
        root = (s[:rank] / scaling).sqrt()
        b, a = u[:, :rank] * root, root.unsqueeze(1) * vh[:rank]
        low_rank = scaling * b @ a
        error = float((residual - low_rank).norm())
        if best is None or error < least:
            best, least = (base, a, b), error
    assert best is not None, iterations
    best[0].compute_dtype = layer.weight.dtype
    return best


@register("lora")
class LoRA(AdapterTransform[LoRAConfig]):
    """Low-rank adapters over frozen layers; all else is frozen."""

    Config = LoRAConfig
    Layer = LoRALinear
    sqnr_floor_db = (
        8.0  # least of 20 seeds on tiny decoders and ViTs, 4 bits: 13.2, NF4 13.6; fewer bits lie below it
    )

    def check_site(self, fqn: str, module: nn.Module) -> None:
        """Refuse widths that groups do not divide, low-bit layers of another kind, and ranks beyond LoftQ."""
        config, format = self.config, self.config.format()
        site = cast("nn.Linear | QuantLinear", module)
        if isinstance(site, QuantLinear):
            if config.init == "loftq":
                raise ConfigError(
                    f"lora.init: 'loftq' needs the weight that {fqn} had before it was quantized; give the "
                    "transform the plain model, or set init to 'default'"
                )
            in_format(site, _low_bit(format), f"lora: {fqn}")
        elif format is not None:
            check_width(format, site.in_features, f"lora: {fqn}", row="group_size 0 (one scale a row)")
        if config.init == "loftq" and config.rank > min(site.in_features, site.out_features):
            raise ConfigError(
                f"lora.rank: {config.rank} is more than {fqn}'s {min(site.in_features, site.out_features)} "
                "singular values; lower it, or skip the layer"
            )

    def base_bounds(self) -> Bounds:
        """A plain base starts bit-equal; a low-bit one as far off as its format is."""
        format = self.config.format()
        if format is None:
            # DoRA multiplies by magnitudes over norms, which are 1 but for rounding
            return Bounds(30.0, 30.0, None, may_equal=True)
        return low_bit_bounds(format)

    def base_merge_bounds(self) -> MergeBounds:
        """A plain merge is exact but for the type's rounding; rounding again costs what it costs."""
        tolerance = self.config.merge_tolerance
        if self.config.merge == "requantize":
            return MergeBounds(math.inf, math.inf, math.inf, tolerance)
        return MergeBounds(1e-10, 1e-4, math.inf, tolerance)

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        """A and B, and the magnitudes."""
        layers = cast("list[LoRALinear]", list(self.layers(model).values()))
        adapters = [p for layer in layers for p in (layer.lora_a, layer.lora_b)]
        magnitudes = [layer.magnitude for layer in layers if layer.magnitude is not None]
        groups = [ParamGroup("adapters", adapters)]
        return [*groups, ParamGroup("magnitudes", magnitudes)] if magnitudes else groups
