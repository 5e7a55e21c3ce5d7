"""QA-LoRA (arXiv 2309.14717): an adapter that sees one number for each quantization group, and so merges into
the groups' offsets exactly.

T tokens, K input features, N output features, R rank, G groups of S = K / G inputs. Over a frozen base
W = s * q + b, with scales s and offsets b [N, G], and A [R, G], B [N, R], kappa = alpha / R:

    forward    y = x W^T + kappa * drop(pool(x)) A^T B^T + bias,     pool: [T, K] -> [T, G]
    merge      b' = b + kappa * B A             with pool = sum (the paper's)
               b' = b + kappa * B A / S         with pool = mean (the reference code's)

q and s stay as they are, bit for bit. A of the one form is A of the other times or divided by S. The paper
states the merge for zero points z = -b / s, z' = z - kappa * B A / s: rounded to integers, those lose the
adapter wherever |kappa * B A / s| < 1/2. `with_integer_zeros` measures what a runtime would compute that
takes only such.

With `merged_forward` a pass forms b' and multiplies by s * q + b': what the merged layer gives, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from qrecipes.errors import ConfigError
from qrecipes.quant.formats import AffineFormat
from qrecipes.quant.linear import QuantLinear
from qrecipes.quant.low_rank_offset import changed_offset
from qrecipes.quant.merged_linear import merged_offset_linear
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
)

Pool: TypeAlias = Literal["sum", "mean"]


@dataclass(frozen=True, kw_only=True)
class QALoRAConfig(AdapterConfig):
    """A group-pooled adapter over frozen integers, which merges into their offsets without loss."""

    bits: int = 4
    """Bits of the frozen integers: 2, 3, 4 or 8."""
    group_size: int = 32
    """Inputs of a row that share a scale and an offset, and that the adapter sees as one."""
    rank: int = 64
    """Columns of B and rows of A."""
    alpha: float = 16.0
    """The product is multiplied by alpha / rank."""
    quantizer: Literal["rtn", "mse", "lp", "hqq", "gptq"] = "rtn"
    """How a plain layer becomes the base: over each group's whole range, the range of least squared error or
    of least fourth power, or with half-quadratic offsets. `gptq` takes only layers that are quantized
    already. Those are a base under any name here, if their bits and groups are these."""
    pool: Pool = "sum"
    """How a group's inputs become one number: `sum`, the paper's, or `mean`, the reference code's, whose A
    is `group_size` times as large for the same adapter. A starts alike in both, so they want other learning
    rates."""
    dropout: float = 0.0
    """Share of pooled inputs that is dropped in training."""
    scale_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the scales."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that A and B are kept and trained in. They are multiplied in the input's type."""

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "qa_lora"
        if self.rank < 1:
            raise ConfigError(f"{where}.rank: {self.rank} is not positive; use 1 or more, such as 64")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"{where}.alpha: {self.alpha} is not positive; use a number such as 16")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{where}.dropout: {self.dropout}; use at least 0 and less than 1")
        no_product = "there is no product of the adapter's own whose inputs could be dropped"
        self._check_merged_forward(where, {"dropout": (0.0, no_product)})
        try:
            self.format()
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error

    @property
    def scaling(self) -> float:
        """kappa."""
        return self.alpha / self.rank

    @property
    def offset_scaling(self) -> float:
        """What B A is multiplied by to be a change of offsets."""
        return self.scaling if self.pool == "sum" else self.scaling / self.group_size

    def format(self, offset_dtype: Literal["float32", "float64"] = "float32") -> AffineFormat:
        """How the base is stored, and what a merged layer is."""
        return AffineFormat(
            bits=self.bits,
            group_size=self.group_size,
            symmetric=False,
            zero_point="float",
            scale_dtype=self.scale_dtype,
            offset_dtype=offset_dtype,
        )


def pooled_input(x: Tensor, group_size: int, pool: Pool) -> Tensor:
    """[..., K] -> [..., K / group_size]."""
    groups = x.unflatten(-1, (x.shape[-1] // group_size, group_size))
    return groups.sum(-1) if pool == "sum" else groups.mean(-1)


def convert_pool(a_RG: Tensor, group_size: int, given: Pool, wanted: Pool) -> Tensor:
    """A of the same adapter in the other form: the sum is `group_size` means."""
    if given == wanted:
        return a_RG
    return a_RG * group_size if wanted == "mean" else a_RG / group_size


class QALoRALinear(AdaptedLinear):
    """Frozen integers with A and B beside them. Neither pass keeps a dequantized weight."""

    base: QuantLinear
    config: QALoRAConfig

    def __init__(self, base: QuantLinear, config: QALoRAConfig) -> None:
        super().__init__(base, config)
        G, device = base.in_features // config.group_size, base.payload[0].device
        dtype = ADAPTER_TYPES[config.adapter_dtype]
        a = torch.empty(config.rank, G, device=device)
        nn.init.xavier_uniform_(a)
        self.lora_a = nn.Parameter(a.to(dtype))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device, dtype=dtype))
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    @classmethod
    def from_linear(cls, layer: nn.Linear | QuantLinear, config: QALoRAConfig) -> QALoRALinear:
        """The adapted layer, which freezes the parameters of `layer`; A is drawn from the global random
        state.

        Raises:
            ConfigError: if the layer is low-bit already and has other bits or groups, or is plain and
            `config.quantizer` needs more than its weight.
            ValueError: if the groups do not divide the input features.
        """
        format = config.format()
        if isinstance(layer, QuantLinear):
            return cls(in_format(layer, format, "qa_lora"), config)
        if layer.weight.is_meta:  # a place for stored tensors, whatever made them
            return cls(QuantLinear.from_linear(layer, format, name="qa_lora"), config)
        _check_quantizer(config, "a plain layer")
        ranges = RANGES[config.quantizer]
        return cls(QuantLinear.from_linear(layer, format, ranges=ranges, name="qa_lora"), config)

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the input's type."""
        if self.config.merged_forward:
            return merged_offset_linear(
                input, self.base, self.lora_a, self.lora_b, self.config.offset_scaling
            )
        p = self.dropout(pooled_input(input, self.config.group_size, self.config.pool))
        hidden = linear(p, self.lora_a.to(p.dtype)) * self.config.scaling
        return self.base_output_with(input, linear(hidden, self.lora_b.to(p.dtype)))

    @torch.no_grad()
    def offset_change(self) -> Tensor:
        """What the adapter adds to each group's weights, [N, G], in float32 or wider."""
        a, b = self.lora_a.to(self.work_dtype), self.lora_b.to(self.work_dtype)
        return self.config.offset_scaling * (b @ a)

    @torch.no_grad()
    def merged(self) -> QuantLinear:
        """The base with the adapter in its offsets: the same integers and scales."""
        grid = self.base.grid
        assert grid.offset is not None, self.base.format
        wide = self.work_dtype is torch.float64  # a model in float64 checks the arithmetic
        offset = changed_offset(
            grid.offset, self.lora_a, self.lora_b, self.config.offset_scaling, self.work_dtype
        )
        return self.base.with_grid(
            grid._replace(offset=offset), self.config.format("float64" if wide else "float32")
        )

    def adapter(self) -> Adapter:
        """The adapter in LoRA's terms, which knows no groups: A repeated over each group's inputs."""
        size = self.config.group_size
        a = convert_pool(self.lora_a.detach(), size, self.config.pool, "sum")
        return Adapter(a.repeat_interleave(size, 1), self.lora_b.detach(), self.config.scaling)

    def check_adapter(self, given: Adapter, where: str) -> None:
        """Raise ConfigError, naming `where`, if an adapter has another shape or scaling, or A is not the same
        for all inputs of a group."""
        config = self.config
        wide = {"a": (config.rank, self.in_features), "b": tuple(self.lora_b.shape)}
        check_shapes(where, given, wide)
        groups = given.a.unflatten(1, (-1, config.group_size))
        if given.magnitude is not None or (groups != groups[..., :1]).any():
            raise ConfigError(
                f"{where}: is no group-pooled adapter of groups of {config.group_size}: its A differs within "
                "a group, or it has magnitudes; load it with the transform that trained it"
            )
        check_scaling(where, given, config.scaling, "alpha and rank")

    def load_adapter(self, given: Adapter) -> None:
        """Overwrite A and B."""
        size = self.config.group_size
        self.lora_a.copy_(convert_pool(given.a[:, ::size], size, "sum", self.config.pool))
        self.lora_b.copy_(given.b)

    def extra_repr(self) -> str:
        """Rank, scaling and pooling."""
        return f"rank={self.config.rank}, scaling={self.config.scaling:g}, pool={self.config.pool}"


def _check_quantizer(config: QALoRAConfig, what: str) -> None:
    if config.quantizer not in RANGES:
        raise ConfigError(
            f"qa_lora.quantizer: {config.quantizer!r} needs calibration text and the whole model, and {what} "
            "is not quantized yet; quantize the model first with `qrecipes quantize`, or use one of "
            f"{', '.join(RANGES)}"
        )


@register("qa_lora")
class QALoRA(AdapterTransform[QALoRAConfig]):
    """Group-pooled adapters over frozen integers; all else is frozen."""

    Config = QALoRAConfig
    Layer = QALoRALinear
    sqnr_floor_db = 8.0  # least of 20 seeds on tiny decoders and ViTs, 4 bits: 13.2; fewer bits lie below it

    def check_site(self, fqn: str, module: nn.Module) -> None:
        """Refuse widths that groups do not divide, and bases of other bits or groups."""
        format = self.config.format()
        site = cast("nn.Linear | QuantLinear", module)
        if not isinstance(site, QuantLinear):
            check_width(format, site.in_features, f"qa_lora: {fqn}")
            if not site.weight.is_meta:
                _check_quantizer(self.config, fqn)
            return
        given = site.format
        if isinstance(given, AffineFormat) and given.group_size != format.group_size:
            has, remedy = f"in groups of {given.group_size}", "set group_size to the layer's"
            if given.group_size is None:
                has, remedy = "with one scale a row", "quantize the model in groups, or skip the layer"
            raise ConfigError(
                f"qa_lora.group_size: {format.group_size}, but {fqn} is quantized {has}; an adapter merges "
                f"only into groups that it pools; {remedy}"
            )
        in_format(site, format, f"qa_lora: {fqn}")

    def base_bounds(self) -> Bounds:
        """As far off as the format is."""
        return low_bit_bounds(self.config.format())

    def base_merge_bounds(self) -> MergeBounds:
        """Exact but for rounding; held-out perplexity within half a unit of a fourth digit, in whatever type.
        What bfloat16 rounds differently moved it by up to 3.4e-4 on 1,024 targets of tiny decoders."""
        return MergeBounds(1e-12, 1e-5, math.inf, 5e-4)

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        """A and B."""
        layers = cast("list[QALoRALinear]", list(self.layers(model).values()))
        return [ParamGroup("adapters", [p for layer in layers for p in (layer.lora_a, layer.lora_b)])]
