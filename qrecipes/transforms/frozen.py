"""What adapters stand on: a frozen layer, plain or low-bit, and parameters that keep their own type."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from qrecipes.errors import ConfigError
from qrecipes.quant.affine import with_offset
from qrecipes.quant.dequantize import linear_with_addend
from qrecipes.quant.formats import AffineFormat, WeightFormat
from qrecipes.quant.frozen_int8 import frozen_int8_linear
from qrecipes.quant.linear import QuantLinear, moving_only
from qrecipes.quant.primitives import as_matrix
from qrecipes.transforms.base import Adapter, Bounds, LinearTransform, MergeBounds, TransformConfig
from qrecipes.transforms.int8_devices import check_int8_device

ADAPTER_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Least SQNR of one layer's output and grad_input, in dB, by the bits of its weight. Least seen in the
# pretrained 260K story Llama on Shakespeare, groups of 32: INT8 42 and 35, INT4 18 and 12, INT3 12 and 5,
# INT2 4 and -4, NF4 18 and 9; the second of each is a k_proj, whose gradients nearly cancel.
FLOORS_DB = {8: (36.0, 28.0), 4: (12.0, 5.0), 3: (6.0, -2.0), 2: (-2.0, -10.0)}
NF4_FLOORS_DB = (12.0, 2.0)
# The same with products in INT8, against those in the model's type. Least seen there, over its own
# weights: 30.8 and 22.6; in SmolLM2-135M-Instruct on GSM8K 18.2 (the v_proj of layer 12, whose input has
# channels far larger than the others) and 23. An output may have as much noise as with a 4-bit weight.
INT8_FLOORS_DB = 12.0, 12.0
INT8_FINALIZE_FLOOR_DB = 30.0
"""Least SQNR of a tiny model's output after `finalize`, which leaves INT8; least of 20 seeds: 43.9."""
INT8_PERPLEXITY = 0.02
"""Largest relative change of held-out perplexity that an export accepts where the merged model computes in
the model's type, and the trained one did in INT8."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(TransformConfig):
    """Keys of every method whose layers are adapted, frozen ones."""

    free_on_resume: ClassVar[tuple[str, ...]] = ("emulate",)
    base_compute: Literal["model", "int8"] = "model"
    """What the frozen weight is multiplied in. `model`: the model's type. `int8`: INT8 tensor cores, for the
    output and for the gradient of the input; both operands are rounded to 8 bits with a scale a token and a
    channel, dynamically. The adapter's own products stay in the model's type, as do their gradients, but for
    what they inherit: its inputs and the gradients that reach it come from layers in INT8. Merged and
    exported layers compute in the model's type. It is for wide layers: quantizing a narrow one, and what it
    reads, costs more than its products save."""
    emulate: bool = False
    """Where `base_compute` is `int8` and there are no INT8 tensor cores (CPU, GPUs before Ampere) compute the
    same numbers in plain PyTorch, slowly, rather than refuse. It changes nothing where there are."""
    merged_forward: bool = False
    """Multiply by the weight that the layer would be merged to, formed anew in each pass and never kept, in
    place of adding the adapter's product to the base's: the adapter costs no products over the tokens in the
    forward pass. It is for steps of many tokens, not for generation, which would form the weight for every
    token. The base must be low-bit. The sum of base and adapter is rounded to the model's type once, as the
    merged weight is in an export. That is as much noise as rounding the dequantized weight alone makes; a
    change below a step of that type moves only the weights that it takes over a boundary of rounding."""

    def _check_merged_forward(self, where: str, conflicts: Mapping[str, tuple[Any, str]]) -> None:
        """Raise ConfigError, naming `where`, if `merged_forward` is set and a key of `conflicts` is not the
        value that is given there, with the reason why it must be."""
        if not self.merged_forward:
            return
        in_model = ("model", "a merged weight is multiplied in the model's type")
        for key, (wanted, why) in {"base_compute": in_model, **conflicts}.items():
            value = getattr(self, key)
            if value != wanted:
                raise ConfigError(
                    f"{where}.merged_forward: true, and {key} is {value!r}: {why}; set {key} to {wanted!r}, "
                    "or merged_forward to false"
                )

    def check_device(self, device: torch.device, where: str = "transform") -> None:
        """Raise ConfigError, naming `where`, if INT8 products are wanted, not emulated, and `device` has
        none."""
        if self.base_compute == "int8":
            instead = 'set base_compute = "model"'
            check_int8_device(f"{where}.base_compute", device, emulate=self.emulate, instead=instead)


AC = TypeVar("AC", bound=AdapterConfig)


class AdaptedLinear(nn.Module):
    """A frozen `base`, and parameters beside it that `to`, `bfloat16` and the like move, not convert."""

    base: nn.Linear | QuantLinear
    config: AdapterConfig

    def __init__(self, base: nn.Linear | QuantLinear, config: AdapterConfig) -> None:
        super().__init__()
        self.base, self.config = base, config
        self.in_features, self.out_features = base.in_features, base.out_features
        for parameter in base.parameters():
            parameter.requires_grad_(False)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of the base's input and output."""
        return self.base.compute_dtype if isinstance(self.base, QuantLinear) else self.base.weight.dtype

    @property
    def work_dtype(self) -> torch.dtype:
        """The type that merging computes in: float32, or float64 where the base does."""
        return torch.promote_types(self.compute_dtype, torch.float32)

    def base_output(self, input: Tensor) -> Tensor:
        """What the base makes of [..., K], computed as `config.base_compute` says: [..., N]."""
        if self.config.base_compute == "model":
            return self.base(input)
        if not input.is_cuda:
            self.config.check_device(input.device)
        return frozen_int8_linear(input, self.base)

    def base_output_with(self, input: Tensor, product: Tensor) -> Tensor:
        """`base_output` plus an adapter's `product` [..., N], rounded once, where the base computes in the
        model's type.

        Of a base's output in bfloat16, which lies on the type's grid, a sum with a product of less than half
        a unit in the last place gives the output again, and an adapter that starts at zero learns late.
        Compiled, the sum goes unrounded into whatever reads it, which costs less.
        """
        if self.config.base_compute != "model" or torch.compiler.is_compiling():
            return self.base_output(input) + product
        if isinstance(self.base, QuantLinear):
            return self.base(input, product)
        weight, bias = self.base.weight, self.base.bias
        y_TN = linear_with_addend(as_matrix(input), weight, bias, as_matrix(product))
        return y_TN.reshape(product.shape)

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        """The base's weight [N, K] in `dtype`."""
        if isinstance(self.base, QuantLinear):
            return self.base.dequantize(dtype)
        return self.base.weight.detach().to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLinear:
        super()._apply(moving_only(self.parameters(recurse=False), fn), recurse)
        return self


class AdapterTransform(LinearTransform[AC]):
    """A method whose `Layer` is an `AdaptedLinear` with an `adapter()`, over plain or low-bit layers.

    A subclass gives `base_bounds` and `base_merge_bounds`, which hold where the base computes in the model's
    type.
    """

    kinds = (nn.Linear, QuantLinear)

    def __init__(self, config: AC) -> None:
        super().__init__(config)
        if config.base_compute == "int8":
            self.finalize_floor_db = INT8_FINALIZE_FLOOR_DB

    def base_bounds(self) -> Bounds:
        """What the probe holds layers to."""
        raise NotImplementedError

    def base_merge_bounds(self) -> MergeBounds:
        """What an export holds `finalize` to."""
        raise NotImplementedError

    def check_device(self, device: torch.device) -> None:
        """Raise ConfigError if INT8 products are wanted, not emulated, and `device` has none."""
        self.config.check_device(device, self.name)

    def bounds(self) -> Bounds:
        """`base_bounds`, and where the base computes in INT8 the noise of that, too."""
        bounds = self.base_bounds()
        if self.config.base_compute == "model":
            return bounds
        assert bounds.output is not None, bounds
        assert bounds.grad_input is not None, bounds
        output, grad_input = INT8_FLOORS_DB
        # and no layer may be bit-equal: where the weight is the model's own, INT8 is all that can differ
        return Bounds(
            noise_of_both(bounds.output, output), noise_of_both(bounds.grad_input, grad_input), None
        )

    def merge_bounds(self) -> MergeBounds:
        """`base_merge_bounds`, and where the base computes in INT8 what leaving that changes."""
        bounds = self.base_merge_bounds()
        if self.config.base_compute == "model":
            return bounds
        return MergeBounds(None, math.inf, math.inf, bounds.perplexity + INT8_PERPLEXITY)

    def detach_adapters(self, model: nn.Module) -> dict[str, Adapter]:
        """Put the bases in the layers' place."""
        layers: dict[str, Any] = dict(self.layers(model))
        for fqn, layer in layers.items():
            model.set_submodule(fqn, layer.base)
        return {fqn: layer.adapter() for fqn, layer in layers.items()}

    @torch.no_grad()
    def load_adapters(self, model: nn.Module, adapters: Mapping[str, Adapter]) -> list[str]:
        """Overwrite the layers' adapters, once all were found to fit: each layer's `check_adapter` raises,
        and `load_adapter` copies."""
        layers: dict[str, Any] = self.layers(model)
        taken = [fqn for fqn in adapters if fqn in layers]
        for fqn in taken:
            layers[fqn].check_adapter(adapters[fqn], f"adapter of {fqn}")
        for fqn in taken:
            layers[fqn].load_adapter(adapters[fqn])
        return taken


def low_bit_bounds(format: WeightFormat) -> Bounds:
    """What the probe holds a frozen layer to whose weight was just rounded to `format`: as far off as that
    is."""
    floors = FLOORS_DB[format.bits] if isinstance(format, AffineFormat) else NF4_FLOORS_DB
    return Bounds(*floors, None)


def noise_of_both(one_db: float, other_db: float) -> float:
    """SQNR of a product with two independent errors of these, in dB."""
    return -10 * math.log10(10 ** (-one_db / 10) + 10 ** (-other_db / 10))


def in_format(layer: QuantLinear, format: WeightFormat, where: str) -> QuantLinear:
    """A low-bit layer as `format`: itself, or the same integers and scales with zero points as offsets.

    Raises:
        ConfigError: if that would need other integers or scales.
    """
    if layer.format == format:
        return layer
    given = layer.format
    if (
        isinstance(given, AffineFormat)
        and isinstance(format, AffineFormat)
        and (given.bits, given.group_size, given.scale_dtype)
        == (format.bits, format.group_size, format.scale_dtype)
        and format.has_offset
    ):
        return layer.with_grid(with_offset(layer.grid), format)
    raise ConfigError(
        f"{where}: is quantized already, as {given}; the transform asks for {format}; give the transform the "
        "layer's own settings, or skip the layer"
    )


NO_GROUPS = "no group_size (one scale a row)"
"""How `check_width` is told of methods that take a whole row where `group_size` is left out."""


def check_width(format: WeightFormat, in_features: int, where: str, row: str = "") -> None:
    """Raise ConfigError, naming `where`, if the format's groups do not divide a row; `row` as of
    `AffineFormat.check_width`."""
    try:
        if isinstance(format, AffineFormat):
            format.check_width(in_features, where, row)
        else:
            format.check_width(in_features, where)
    except ValueError as error:
        raise ConfigError(f"{error}: add it to skip") from error


def plain_linear(weight_NK: Tensor, like: nn.Linear | QuantLinear, dtype: torch.dtype) -> nn.Linear:
    """A frozen plain layer with this weight in `dtype` and the bias Parameter of `like`."""
    linear = nn.Linear(like.in_features, like.out_features, bias=False, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(weight_NK.detach().to(dtype), requires_grad=False)
    linear.bias = like.bias  # type: ignore[assignment]
    return linear


def check_scaling(where: str, given: Adapter, scaling: float, keys: str) -> None:
    """Raise ConfigError where an adapter's product is multiplied by another number than its layer's, which
    the transform's `keys` make."""
    if not math.isclose(given.scaling, scaling):
        raise ConfigError(
            f"{where}: is scaled by {given.scaling:g}, and the layer's by {scaling:g}; set the transform's "
            f"{keys} to the adapter's"
        )


def check_shapes(where: str, given: Any, wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise ConfigError where a tensor of an adapter has another shape than its layer's."""
    for name, shape in wanted.items():
        found = tuple(getattr(given, name).shape)
        if found != shape:
            raise ConfigError(
                f"{where}.{name}: has shape {found}, and the layer's has {shape}; it is of another model, or "
                "of another rank: set the transform's rank to the adapter's"
            )
