"""INT8 mixed precision: a linear layer's three products in INT8, its weights in high precision.

T tokens, K input features, N output features. Each operand is quantized on the fly, with one scale for every
slice along the contraction:

| product                | contraction | scales                              |
|------------------------|-------------|-------------------------------------|
| output      = X W^T    | K           | token and output channel            |
| grad_input  = dY W     | N           | token and input channel             |
| grad_weight = dY^T X   | T           | output channel and input channel    |

SwitchBack (arXiv 2304.13013) keeps grad_weight in high precision, Jetfire (arXiv 2403.12422) does not; here
each product has a switch.

Quantization costs a pass over the operands, whatever a product saves by it: small layers keep all their
products in high precision (`min_size`), larger ones only grad_weight (`min_size_grad_weight`), both of whose
operands are to be quantized along the tokens and transposed for nothing else.

Under `torch.compile` layers that read one input share its INT8 forms, as the compiler merges equal operators
(with stochastic rounding each draws its own). Rows are quantized in the kernel that makes them, and its
partitioner keeps the INT8 of an input for the backward pass where that saves memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, TypeAlias, TypeVar

import torch
from annotated_types import Ge
from torch import Tensor, nn

from qrecipes.errors import ConfigError
from qrecipes.quant.int8_gathered import gathered_as_int8, int8_rows
from qrecipes.quant.int8_matmul import scaled_int8_mm
from qrecipes.quant.int8_quantize import quantize_columns, quantize_rows
from qrecipes.quant.primitives import as_matrix, bias_gradient, dequantize_int8
from qrecipes.transforms.base import Bounds, LinearTransform, TransformConfig, register
from qrecipes.transforms.int8_devices import check_int8_device

AnyLinear = TypeVar("AnyLinear", bound=nn.Linear)
Quantized: TypeAlias = tuple[Tensor, Tensor]
"""INT8 values and the scale of each row."""

# Least SQNR of one layer's product, in dB. Least seen in SmolLM2-135M on GSM8K: output 18 (a v_proj, whose
# input has channels far larger than the others). In the pretrained 260K story Llama on Shakespeare: output
# 30, grad_input 21 (a k_proj), grad_weight 30; on activations and gradients from Student's t with 1.5 to 3
# degrees of freedom, or with a few channels 100 times the others: 30, 31, 26. A token 300 times the others
# brings grad_weight down to 5: that is the case for switching it off, so the bound does not admit it.
OUTPUT_FLOOR_DB = 16.0
GRADIENT_FLOOR_DB = 12.0
STOCHASTIC_ROUNDING_DB = 3.0
"""Cost of stochastic rounding: its error has a variance of 1/6 step^2 on average, to nearest 1/12."""


@dataclass(frozen=True, kw_only=True)
class Int8MixedPrecisionConfig(TransformConfig):
    """Which products of a linear layer are computed in INT8, and how their operands are rounded."""

    free_on_resume: ClassVar[tuple[str, ...]] = ("int8_all_gather", "emulate")
    output: bool = True
    """Compute the output in INT8."""
    grad_input: bool = True
    """Compute the gradient of the input in INT8."""
    grad_weight: bool = True
    """Compute the gradient of the weight in INT8. Its scales are over the tokens of a micro-batch. Where
    training is unstable, switch this off first, then `grad_input`."""
    stochastic_rounding: bool = False
    """Round operands up or down at random: each product is then right on average, with 3 dB more noise."""
    save_int8_input: bool = False
    """Keep the input for the backward pass as the INT8 that grad_weight multiplies, in half the bytes of
    bfloat16. The gradients are those of `false`: grad_weight quantizes its input along the tokens either way,
    here in the forward pass. Where several layers read one input, `false` keeps it once for all, and `true`
    once for each."""
    int8_all_gather: bool = False
    """Under FSDP2, gather the weights as the INT8 rows that the output multiplies, in half the bytes of
    bfloat16 and a quarter of float32's; biases are gathered as they are. Weights train in high precision,
    each part on its rank. The output is that of `false`. grad_input multiplies the weight that those rows
    stand for: on the weights of a pretrained model it is 38 dB from that of `false`, and 1 to 3 dB further
    from the exact one; more where few input channels hold the largest values of every row. With
    `stochastic_rounding` every gather draws anew. A run of one process computes the same, and saves nothing
    by it."""

    min_size: Annotated[float, Ge(0)] = 700.0
    """Layers whose in_features * out_features / (in_features + out_features) is smaller are left alone: what
    their products save, quantization costs. On an H100 a layer by itself gains from about 1,650 on at 8,192
    tokens, and from 1,400 on at 16,384 (tools/bench_layers.py). Compiled, with rows quantized in passing and
    inputs shared, it gains earlier: the default is an estimate for that. 0 takes every layer."""
    min_size_grad_weight: Annotated[float, Ge(0)] = 800.0
    """Layers of a smaller size, by the same measure, compute grad_weight in high precision, whose operands
    would both be quantized along the tokens for it alone; the receipt says which. 0 takes every layer. 1300
    makes a ViT-g's step on an H100 2% faster, and takes 13% more memory, since inputs are then kept in high
    precision; steps of Llama shapes become 1% slower (tools/bench_step.py)."""
    emulate: bool = False
    """Where there are no INT8 tensor cores (CPU, GPUs before Ampere) compute the same numbers in plain
    PyTorch, slowly, rather than refuse. It changes nothing where there are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.int8_all_gather and not self.output:
            raise ConfigError(
                "int8_mixed_precision.int8_all_gather: true, but output is false and needs the weight in "
                "high precision; set output to true or int8_all_gather to false"
            )
        if self.save_int8_input and not self.grad_weight:
            raise ConfigError(
                "int8_mixed_precision.save_int8_input: true, but grad_weight is false and needs the input in "
                "high precision; set grad_weight to true or save_int8_input to false"
            )
        if not (self.output or self.grad_input or self.grad_weight):
            raise ConfigError(
                "int8_mixed_precision: output, grad_input and grad_weight are all false, which leaves every "
                "layer as it was; set at least one to true, or remove the transform"
            )


class Int8MixedPrecisionLinear(nn.Linear):
    """A linear layer with the parameters of a plain one, and INT8 products where `config` says so."""

    config: Int8MixedPrecisionConfig

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: Int8MixedPrecisionConfig) -> Int8MixedPrecisionLinear:
        """A layer that holds the same Parameter objects as `linear`.

        Raises:
            ConfigError: if the weight is neither bfloat16 nor float32.
        """
        if linear.weight.dtype not in (torch.bfloat16, torch.float32):
            raise ConfigError(
                f"int8_mixed_precision: a layer of {linear.weight.dtype} weights; the products are scaled in "
                "float32 and given in bfloat16 or float32; use one of these as model.dtype"
            )
        layer = _with_parameters_of(cls, linear)
        layer.config = config
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the weight's dtype."""
        autocast = not input.is_meta and torch.is_autocast_enabled(input.device.type)
        if input.dtype is not self.weight.dtype or autocast:
            raise ValueError(
                f"Int8MixedPrecisionLinear.input: {input.dtype}, the weight is {self.weight.dtype}, and "
                f"autocast is {'on' if autocast else 'off'}; INT8 products come in the weight's type, so use "
                "one dtype for both, and no autocast"
            )
        if not input.is_cuda:
            check_int8_device("int8_mixed_precision", input.device, emulate=self.config.emulate)
        keeps_int8 = self.config.save_int8_input and self.weight.requires_grad and torch.is_grad_enabled()
        q_NK, scale_N1 = int8_rows(self.weight)
        return _Int8Linear.apply(input, self.weight, self.bias, self.config, keeps_int8, q_NK, scale_N1)

    def merged(self) -> nn.Linear:
        """The plain linear layer with the same Parameter objects."""
        return _with_parameters_of(nn.Linear, self)

    def extra_repr(self) -> str:
        """The linear layer's, and the products in INT8."""
        products = [name for name in ("output", "grad_input", "grad_weight") if getattr(self.config, name)]
        return f"{super().extra_repr()}, int8={'+'.join(products)}"


@register("int8_mixed_precision")
class Int8MixedPrecision(LinearTransform[Int8MixedPrecisionConfig]):
    """INT8 matmuls over high-precision weights, which train as they would without it."""

    Config = Int8MixedPrecisionConfig
    Layer = Int8MixedPrecisionLinear
    sqnr_floor_db = 20.0  # least of 20 seeds on tiny decoders and ViTs: 30.5; with stochastic rounding 27
    finalize_floor_db = (
        20.0  # as after swap: the weights are equal, but the plain layer does not round its input
    )
    parity_rtol = 1e-2  # scales of grad_weight are over a micro-batch's tokens; most seen in 12 steps: 6e-3

    @property
    def freezes_rest(self) -> bool:
        """No: it owns no parameters, and changes only how products are computed."""
        return False

    def check_device(self, device: torch.device) -> None:
        """Raise ConfigError where `device` has no INT8 tensor cores, and none are to be emulated."""
        check_int8_device("int8_mixed_precision", device, emulate=self.config.emulate)

    def reason_to_leave(self, fqn: str, module: nn.Module) -> str | None:
        """A name that is not selected, or a size that INT8 would slow down."""
        if (reason := super().reason_to_leave(fqn, module)) or not isinstance(module, nn.Linear):
            return reason
        config, size = self.config, _size(module)
        too_small = f"{module.out_features} x {module.in_features} is too small to gain: {size:.0f} < "
        if size < config.min_size:
            return f"{too_small}min_size {config.min_size:g}"
        if size < config.min_size_grad_weight and not (config.output or config.grad_input):
            return f"{too_small}min_size_grad_weight {config.min_size_grad_weight:g}"
        return None

    def reason_in_part(self, fqn: str, module: nn.Module) -> str | None:
        """A size at which INT8 would slow grad_weight down."""
        least, size = self.config.min_size_grad_weight, _size(module)
        if not self.config.grad_weight or size >= least:
            return None
        return f"not grad_weight: size {size:.0f} < min_size_grad_weight {least:g}"

    def swap(self, model: nn.Module) -> nn.Module:
        """Replace every site, and leave grad_weight of the small ones in high precision."""
        model = super().swap(model)
        for fqn, layer in self.layers(model).items():
            assert isinstance(layer, Int8MixedPrecisionLinear), type(layer)
            if self.reason_in_part(fqn, layer):
                layer.config = replace(layer.config, grad_weight=False, save_int8_input=False)
        return model

    def before_shard(self, model: nn.Module) -> None:
        """With `int8_all_gather`, make FSDP2 gather the weights of this method's layers as INT8 rows.

        Raises:
            ConfigError: if a weight is also a parameter of another module, which could not read it.
        """
        if not self.config.int8_all_gather:
            return
        layers = self.layers(model)
        ours = {id(layer.weight): fqn for fqn, layer in layers.items()}
        for fqn, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in ours and fqn not in layers:
                    layer_fqn = ours[id(parameter)]
                    raise ConfigError(
                        f"int8_mixed_precision.int8_all_gather: true, but {layer_fqn}.weight is also "
                        f"{fqn}.{name}, which cannot read INT8; add {layer_fqn!r} to skip"
                    )
        gathered: dict[int, nn.Parameter] = {}
        for layer in layers.values():  # layers that shared a Parameter share the new one
            weight = layer.weight
            assert isinstance(weight, nn.Parameter), type(weight)
            if id(weight) not in gathered:
                gathered[id(weight)] = gathered_as_int8(
                    weight, stochastic_rounding=self.config.stochastic_rounding
                )
            layer.weight = gathered[id(weight)]

    def bounds(self) -> Bounds:
        """A floor for each product in INT8."""
        return _bounds(self.config)

    def layer_bounds(self, layer: nn.Module) -> Bounds:
        """A floor for each product that this layer computes in INT8."""
        assert isinstance(layer, Int8MixedPrecisionLinear), type(layer)
        return _bounds(layer.config)


def _bounds(config: Int8MixedPrecisionConfig) -> Bounds:
    cost = STOCHASTIC_ROUNDING_DB if config.stochastic_rounding else 0.0
    return Bounds(
        output=OUTPUT_FLOOR_DB - cost if config.output else None,
        grad_input=GRADIENT_FLOOR_DB - cost if config.grad_input else None,
        grad_weight=GRADIENT_FLOOR_DB - cost if config.grad_weight else None,
    )


def _size(linear: nn.Module) -> float:
    """K N / (K + N): multiplications of its products for each element of their operands that is quantized."""
    assert isinstance(linear, nn.Linear), type(linear)
    sides = linear.in_features, linear.out_features
    return math.prod(sides) / max(1, sum(sides))


class _Int8Linear(torch.autograd.Function):
    """Y = X W^T + b and its gradients; keeps W, and X as it came or as INT8 of its transpose."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        config: Int8MixedPrecisionConfig,
        keeps_int8: bool,
        q_NK: Tensor | None,
        scale_N1: Tensor | None,
    ) -> Tensor:
        ctx.config, ctx.shape, ctx.keeps_int8 = config, x.shape, keeps_int8
        x_TK, rounding = as_matrix(x), config.stochastic_rounding
        by_rows, by_columns = _quantize(x_TK, config.output, keeps_int8, rounding)
        gathered = None if q_NK is None or scale_N1 is None else (q_NK, scale_N1)
        held = gathered or (weight_NK,)
        ctx.num_held = len(held)
        ctx.save_for_backward(*held, *(by_columns if by_columns is not None else (x,)))
        if by_rows is None:
            return nn.functional.linear(x, weight_NK, bias_N)
        by_channel = gathered or quantize_rows(weight_NK, stochastic_rounding=rounding)
        y_TN = _product(by_rows, by_channel, x.dtype, bias_N)
        return y_TN.reshape(*x.shape[:-1], weight_NK.shape[0])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "Int8MixedPrecisionLinear: a gradient is taken with create_graph, but INT8 products have no "
                "second derivative; add the layer to the transform's skip"
            )
        config, rounding = ctx.config, ctx.config.stochastic_rounding
        saved = ctx.saved_tensors  # once: under activation checkpointing a second read is an error
        held, kept = saved[: ctx.num_held], saved[ctx.num_held :]
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dy_TN = as_matrix(grad_y)
        grad_x = grad_weight_NK = grad_bias_N = None
        by_rows, by_columns = _quantize(
            dy_TN, needs_x and config.grad_input, needs_weight and config.grad_weight, rounding
        )
        if needs_x:
            weight_NK = _known_weight(held, config, dy_TN.dtype)
            if by_rows is not None:
                by_channel = quantize_columns(weight_NK, stochastic_rounding=rounding)
                grad_x_TK = _product(by_rows, by_channel, dy_TN.dtype)
            else:
                grad_x_TK = dy_TN @ weight_NK
            grad_x = grad_x_TK.reshape(ctx.shape)
        if needs_weight:
            if by_columns is not None:
                if not ctx.keeps_int8:
                    kept = quantize_columns(as_matrix(kept[0]), stochastic_rounding=rounding)
                grad_weight_NK = _product(by_columns, tuple(kept), dy_TN.dtype)
            else:
                grad_weight_NK = dy_TN.t() @ as_matrix(kept[0])
        if needs_bias:
            grad_bias_N = bias_gradient(dy_TN)
        return grad_x, grad_weight_NK, grad_bias_N, None, None, None, None


def _known_weight(held: tuple[Tensor, ...], config: Int8MixedPrecisionConfig, dtype: torch.dtype) -> Tensor:
    """The weight for grad_input, of what the forward pass kept: the weight itself, or its INT8 rows.

    Where it is to be known by its rows alone, they are dequantized into a copy that lives as long as the
    product: to bfloat16, since float32 would gain 0.1 dB.
    """
    if not config.int8_all_gather:
        return held[0]
    is_rows = len(held) == 2
    q_NK, scale_N1 = (
        held if is_rows else quantize_rows(held[0], stochastic_rounding=config.stochastic_rounding)
    )
    return dequantize_int8(q_NK, scale_N1, dtype)


def _quantize(
    matrix: Tensor, rows: bool, columns: bool, stochastic_rounding: bool
) -> tuple[Quantized | None, Quantized | None]:
    """INT8 by rows and, transposed, by columns, each None where it is not wanted."""
    by_rows = quantize_rows(matrix, stochastic_rounding=stochastic_rounding) if rows else None
    by_columns = quantize_columns(matrix, stochastic_rounding=stochastic_rounding) if columns else None
    return by_rows, by_columns


def _product(a: Quantized, b: Quantized, dtype: torch.dtype, bias_N: Tensor | None = None) -> Tensor:
    """A B^T of two quantized matrices with a scale a row each, [M, K] and [N, K], plus the bias."""
    (a_MK, scale_M1), (b_NK, scale_N1) = a, b
    return scaled_int8_mm(a_MK, b_NK.t(), scale_M1, scale_N1.t(), bias_N=bias_N, out_dtype=dtype)


def _with_parameters_of(cls: type[AnyLinear], linear: nn.Linear) -> AnyLinear:
    """A `cls` that holds the Parameter objects of `linear`; no memory is allocated for its own."""
    layer = cls(linear.in_features, linear.out_features, bias=False, device="meta", dtype=linear.weight.dtype)
    layer.weight = linear.weight
    layer.bias = linear.bias
    return layer
