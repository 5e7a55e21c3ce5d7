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
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qrecipes.errors import ConfigError
from qrecipes.quant.int8_matmul import scaled_int8_mm
from qrecipes.quant.primitives import quantize_int8
from qrecipes.transforms.base import Bounds, LinearTransform, TransformConfig, register

AnyLinear = TypeVar("AnyLinear", bound=nn.Linear)

# Least SQNR of one layer's product, in dB. Least seen in the pretrained 260K story Llama on Shakespeare:
# output 30, grad_input 21 (a k_proj), grad_weight 30; on activations and gradients from Student's t with 1.5
# to 3 degrees of freedom, or with a few channels 100 times the others: 30, 31, 26. A token 300 times the
# others brings grad_weight down to 5: that is the case for switching it off, so the bound does not admit it.
OUTPUT_FLOOR_DB = 20.0
GRADIENT_FLOOR_DB = 12.0
STOCHASTIC_ROUNDING_DB = 3.0
"""Cost of stochastic rounding: its error has a variance of 1/6 step^2 on average, to nearest 1/12."""


@dataclass(frozen=True, kw_only=True)
class Int8MixedPrecisionConfig(TransformConfig):
    """Which products of a linear layer are computed in INT8, and how their operands are rounded."""

    output: bool = True
    """Compute the output in INT8."""
    grad_input: bool = True
    """Compute the gradient of the input in INT8."""
    grad_weight: bool = True
    """Compute the gradient of the weight in INT8. Its scales are over the tokens of a micro-batch. Where
    training is unstable, switch this off first, then `grad_input`."""
    stochastic_rounding: bool = False
    """Round operands up or down at random: each product is then right on average, with 3 dB more noise."""

    def __post_init__(self) -> None:
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
        if input.dtype is not self.weight.dtype:
            raise ValueError(
                f"Int8MixedPrecisionLinear.input: {input.dtype}, but the weight is {self.weight.dtype}; "
                "use one dtype for both, and no autocast"
            )
        return _Int8Linear.apply(input, self.weight, self.bias, self.config)

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

    def bounds(self) -> Bounds:
        """A floor for each product in INT8."""
        config = self.config
        cost = STOCHASTIC_ROUNDING_DB if config.stochastic_rounding else 0.0
        return Bounds(
            output=OUTPUT_FLOOR_DB - cost if config.output else None,
            grad_input=GRADIENT_FLOOR_DB - cost if config.grad_input else None,
            grad_weight=GRADIENT_FLOOR_DB - cost if config.grad_weight else None,
        )


class _Int8Linear(torch.autograd.Function):
    """Y = X W^T + b and its gradients; keeps X and W for the backward pass, nothing quantized."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, config: Int8MixedPrecisionConfig
    ) -> Tensor:
        ctx.save_for_backward(x, weight_NK)
        ctx.config = config
        if not config.output:
            return nn.functional.linear(x, weight_NK, bias_N)
        y_TN = _int8_product(_matrix(x), 1, weight_NK, 1, config.stochastic_rounding)
        y = y_TN.reshape(*x.shape[:-1], weight_NK.shape[0])
        return y if bias_N is None else y + bias_N

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight_NK = ctx.saved_tensors
        config = ctx.config
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dy_TN = _matrix(grad_y)
        grad_x = grad_weight_NK = grad_bias_N = None
        if needs_x:
            if config.grad_input:
                grad_x_TK = _int8_product(dy_TN, 1, weight_NK, 0, config.stochastic_rounding)
            else:
                grad_x_TK = dy_TN @ weight_NK
            grad_x = grad_x_TK.reshape(x.shape)
        if needs_weight:
            if config.grad_weight:
                grad_weight_NK = _int8_product(dy_TN, 0, _matrix(x), 0, config.stochastic_rounding)
            else:
                grad_weight_NK = dy_TN.t() @ _matrix(x)
        if needs_bias:
            grad_bias_N = dy_TN.sum(0, dtype=torch.float32).to(dy_TN.dtype)
        return grad_x, grad_weight_NK, grad_bias_N, None


def _int8_product(a: Tensor, a_dim: int, b: Tensor, b_dim: int, stochastic_rounding: bool) -> Tensor:
    """Product in INT8 of two matrices, summed over `a_dim` of one and `b_dim` of the other, in a's dtype."""
    a_MK, row_scale_M1 = _quantize_along(a, a_dim, stochastic_rounding)
    b_NK, col_scale_N1 = _quantize_along(b, b_dim, stochastic_rounding)
    return scaled_int8_mm(a_MK, b_NK.t(), row_scale_M1, col_scale_N1.t(), out_dtype=a.dtype)


def _quantize_along(matrix: Tensor, dim: int, stochastic_rounding: bool) -> tuple[Tensor, Tensor]:
    """INT8 of a matrix with `dim` moved last and contiguous, as fast matmuls want it, and a scale a row."""
    q, scale = quantize_int8(matrix, dim, stochastic_rounding=stochastic_rounding)
    if dim == 0:  # transposed after quantization, when it is one byte an element
        q, scale = q.t(), scale.t()
    return q.contiguous(), scale


def _matrix(x: Tensor) -> Tensor:
    """Leading dimensions flattened, by number: -1 would be ambiguous for an empty tensor."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _with_parameters_of(cls: type[AnyLinear], linear: nn.Linear) -> AnyLinear:
    """A `cls` that holds the Parameter objects of `linear`; no memory is allocated for its own."""
    layer = cls(linear.in_features, linear.out_features, bias=False, device="meta", dtype=linear.weight.dtype)
    layer.weight = linear.weight
    layer.bias = linear.bias
    return layer
