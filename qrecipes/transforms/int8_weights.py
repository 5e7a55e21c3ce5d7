"""INT8 weights: linear layers whose weights are stored, gathered and updated as INT8.

T tokens, K input features, N output features, W = q * scale the weight that INT8 values and float32 scales
stand for. There is no other copy of it: the forward and the backward pass each make one for as long as their
product takes, inside one operator, since `torch.compile` would keep that of the forward pass for the backward
pass otherwise. An optimizer's update is added in float32 and rounded back stochastically, so that updates
much smaller than a step of the grid arrive on average.

| product                | operands                                                                  |
|------------------------|---------------------------------------------------------------------------|
| output      = X W^T    | W dequantized; with `int8_forward` rows of X in INT8 and q itself          |
| grad_input  = dY W     | W dequantized: its scales lie along the contraction                        |
| grad_weight = dY^T X   | high precision, in the type that the model computes in                     |

Q-GaLore (arXiv 2407.08296) stores and updates its weights so, with asymmetric groups, and under a projection.
How they are written is the optimizer's business: qrecipes.training.stored_weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from qrecipes.errors import ConfigError
from qrecipes.quant.dequantize import dequantize_mm, dequantize_mm_grad_input
from qrecipes.quant.formats import AffineFormat, Payload
from qrecipes.quant.int8_matmul import scaled_int8_mm
from qrecipes.quant.int8_quantize import quantize_rows
from qrecipes.quant.primitives import as_matrix, bias_gradient
from qrecipes.quant.stored_int8 import DTYPES, StoredInt8, dequantize_groups, plain_parts
from qrecipes.transforms.base import Bounds, LinearTransform, TransformConfig, register
from qrecipes.transforms.frozen import NO_GROUPS, check_width
from qrecipes.transforms.int8_devices import check_int8_device

if TYPE_CHECKING:
    from qrecipes.config.run import Run

AnyLinear = TypeVar("AnyLinear", bound=nn.Linear)

# Least SQNR of one layer's product, in dB. Least seen in the pretrained 260K story Llama on Shakespeare:
# output 39, with `int8_forward` 30, grad_input 32; with weights from Student's t with 1.5 degrees of freedom
# and an input channel 100 times the others 22, 15 and 34: that is a case for doing without `int8_forward`, so
# the bound does not admit it.
OUTPUT_FLOOR_DB = 20.0
INT8_INPUT_FLOOR_DB = 16.0
"""Of the output with `int8_forward`: in SmolLM2-135M on GSM8K the least is 18."""
GRAD_INPUT_FLOOR_DB = 20.0
SCALE = "weight_scale"
"""Name of the scales in a state dict, beside the INT8 `weight`."""


@dataclass(frozen=True, kw_only=True)
class Int8WeightConfig(TransformConfig):
    """How weights are stored, and whether the output is computed in INT8."""

    free_on_resume: ClassVar[tuple[str, ...]] = ("emulate",)
    group_size: int | None = None
    """Input features that share a scale: a multiple of 8 from 16 to 256 that divides every layer's. Absent:
    one scale a row. Groups cost 4 bytes each, and less rounding where a row holds a few large weights."""
    int8_forward: bool = False
    """Compute the output from INT8 rows of the input and the weights as they are stored, on INT8 tensor
    cores. Needs one scale a row."""
    emulate: bool = False
    """With `int8_forward`, where there are no INT8 tensor cores (CPU, GPUs before Ampere) compute the same
    numbers in plain PyTorch, slowly, rather than refuse. It changes nothing where there are."""

    def check_device(self, device: torch.device) -> None:
        """Raise ConfigError where the output is to be computed in INT8, not emulated, and `device` cannot."""
        if self.int8_forward:
            where, instead = "int8_weights.int8_forward", "set int8_forward = false"
            check_int8_device(where, device, emulate=self.emulate, instead=instead)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.int8_forward and self.group_size is not None:
            raise ConfigError(
                f"int8_weights.int8_forward: true, but group_size is {self.group_size}, and an INT8 product "
                "sums a whole row under one scale; remove group_size, or set int8_forward to false"
            )
        try:
            self.format()
        except ValueError as error:
            message = str(error).removeprefix("AffineFormat.group_size: ")
            raise ConfigError(f"int8_weights.group_size: {message} (leave it out)") from error

    def format(self) -> AffineFormat:
        """The format whose payload the INT8 values, seen as bytes, and their scales are."""
        return AffineFormat(bits=8, group_size=self.group_size)


class Int8WeightLinear(nn.Linear):
    """A linear layer whose weight is a `StoredInt8`; its state dict holds plain tensors, `weight` in INT8 and
    `weight_scale`."""

    weight: StoredInt8  # type: ignore[assignment] # a Parameter, too
    config: Int8WeightConfig
    format: AffineFormat

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: Int8WeightConfig) -> Int8WeightLinear:
        """A layer with the weight of `linear` rounded to nearest, and its bias.

        Raises:
            ConfigError: if the weight is neither bfloat16 nor float32, or the group size does not divide the
            input features.
        """
        _check_linear(linear, config, "a layer")
        layer = cls(
            linear.in_features, linear.out_features, bias=False, device="meta", dtype=linear.weight.dtype
        )
        layer.config, layer.format = config, config.format()
        stored = StoredInt8.of(linear.weight, config.group_size)
        layer.weight = nn.Parameter(stored, requires_grad=linear.weight.requires_grad)  # type: ignore[assignment]
        layer.bias = linear.bias
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the type that the weight passes for."""
        weight = self.weight
        if input.dtype is not weight.dtype:
            raise ValueError(
                f"Int8WeightLinear.input: {input.dtype}, but the weight passes for {weight.dtype}; "
                "use one dtype for both, and no autocast"
            )
        if not input.is_meta and torch.is_autocast_enabled(input.device.type):
            raise ValueError(
                "Int8WeightLinear: called under autocast, which would compute the products in a type of its "
                "own; leave autocast out, and choose the type by model.dtype"
            )
        if not input.is_cuda:
            self.config.check_device(input.device)
        int8_forward = self.config.int8_forward
        return _StoredLinear.apply(
            input, weight, weight.q, weight.scale, self.bias, self.format, int8_forward
        )

    def merged(self) -> nn.Linear:
        """The plain linear layer with the weight that the INT8 values stand for, and the same bias."""
        weight = self.weight
        linear = _empty(nn.Linear, self)
        plain = dequantize_groups(weight.q, weight.scale, weight.dtype)
        linear.weight = nn.Parameter(plain, requires_grad=weight.requires_grad)
        linear.bias = self.bias
        return linear

    def extra_repr(self) -> str:
        """The linear layer's, and how the weight is stored."""
        config = self.config
        return f"{super().extra_repr()}, group_size={config.group_size}, int8_forward={config.int8_forward}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"], destination[f"{prefix}{SCALE}"] = plain_parts(self.weight)

    def _load_from_state_dict(  # type: ignore[override]
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Copies the INT8 values and the scales; an empty layer, or `assign=True`, takes them over."""
        names = (f"{prefix}weight", f"{prefix}{SCALE}")
        found = {name: state_dict.pop(name) for name in names if name in state_dict}
        missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys += [key for key in missing if key != names[0]]
        missing_keys += [name for name in names if name not in found]
        if len(found) < len(names):
            return
        parts = plain_parts(self.weight)
        wrong = [
            f"{name}: {value.dtype} of shape {tuple(value.shape)}, where {part.dtype} of shape "
            f"{tuple(part.shape)} is needed"
            for (name, value), part in zip(found.items(), parts, strict=True)
            if value.shape != part.shape or value.dtype is not part.dtype
        ]
        error_msgs += wrong
        if wrong:
            return
        if local_metadata.get("assign_to_params_buffers", False):
            stored = StoredInt8(found[names[0]], found[names[1]], self.weight.dtype)
            self.weight = nn.Parameter(stored, requires_grad=self.weight.requires_grad)  # type: ignore[assignment]
            return
        with torch.no_grad():
            for part, value in zip(parts, found.values(), strict=True):
                part.copy_(value)


@register("int8_weights")
class Int8Weights(LinearTransform[Int8WeightConfig]):
    """Weights stored as INT8, which train, with an update that any optimizer computes."""

    Config = Int8WeightConfig
    Layer = Int8WeightLinear
    sqnr_floor_db = 20.0  # least of 20 seeds on tiny decoders and ViTs: 35; with `int8_forward` 32
    parity_rtol = (
        2e-2  # ranks round with numbers of their own; most seen in 6 steps: 5e-3, of a gradient's norm
    )

    @property
    def freezes_rest(self) -> bool:
        """No: it changes how the weights of its layers are stored, and everything trains as before."""
        return False

    def check(self, run: Run) -> None:
        """Refuse optimizers that keep the weights in high precision, too."""
        optim = run.optim
        if optim.copies_weights:
            key, other = ("offload", '"none"') if optim.offload != "none" else ("name", "another optimizer")
            raise ConfigError(
                f"optim.{key}: {getattr(optim, key)!r} keeps float32 weights of its own, which gains nothing "
                f"beside weights stored in INT8; set {key} to {other}, or remove int8_weights"
            )

    def check_device(self, device: torch.device) -> None:
        """Raise ConfigError where the output is to be computed in INT8, not emulated, and `device` cannot."""
        self.config.check_device(device)

    def swap(self, model: nn.Module) -> nn.Module:
        """Replace every site.

        Raises:
            ConfigError: if a weight is held by another module, too, or a layer cannot be stored as asked.
        """
        holders: dict[int, list[str]] = {}
        for fqn, module in model.named_modules(remove_duplicate=False):
            for name, parameter in module.named_parameters(recurse=False):
                holders.setdefault(id(parameter), []).append(f"{fqn}.{name}".removeprefix("."))
        for fqn, linear in self.sites(model).items():
            assert isinstance(linear, nn.Linear), type(linear)
            _check_linear(linear, self.config, fqn or "the model")
            held = holders[id(linear.weight)]
            if len(held) > 1:
                raise ConfigError(
                    f"int8_weights: {held[0]} is also {held[1]}; a weight stored as INT8 belongs to one "
                    f"layer, and the other would keep the old one; add {fqn!r} to skip"
                )
        return super().swap(model)

    def bounds(self) -> Bounds:
        """A floor for the products that the weight enters; grad_weight is left as it is."""
        output = INT8_INPUT_FLOOR_DB if self.config.int8_forward else OUTPUT_FLOOR_DB
        return Bounds(output=output, grad_input=GRAD_INPUT_FLOOR_DB, grad_weight=None)


class _StoredLinear(torch.autograd.Function):
    """Y = X W^T + b and its gradients; keeps X and the weight's INT8 values and scales, no copy of W.

    The weight comes twice: as its parts, which are read, and as itself, which the gradient goes to.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        q_NK: Tensor,
        scale_NG: Tensor,
        bias_N: Tensor | None,
        format: AffineFormat,
        int8_forward: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, q_NK, scale_NG)
        ctx.format = format
        x_TK = as_matrix(x)
        if int8_forward:
            x_q, x_scale = quantize_rows(x_TK)
            y_TN = scaled_int8_mm(x_q, q_NK.t(), x_scale, scale_NG.t(), bias_N=bias_N, out_dtype=x.dtype)
        else:
            y_TN = dequantize_mm(x_TK, _payload(q_NK, scale_NG), format, bias_N)
        return y_TN.reshape(*x.shape[:-1], q_NK.shape[0])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "Int8WeightLinear: a gradient is taken with create_graph, but the layer has no second "
                "derivative; add it to the transform's skip"
            )
        x, q_NK, scale_NG = ctx.saved_tensors
        needs_x, needs_weight, _, _, needs_bias, *_ = ctx.needs_input_grad
        dy_TN = as_matrix(grad_y)
        grad_x = grad_weight_NK = grad_bias_N = None
        if needs_x:
            payload = _payload(q_NK, scale_NG)
            grad_x_TK = dequantize_mm_grad_input(dy_TN, payload, ctx.format, x.shape[-1])
            grad_x = grad_x_TK.reshape(x.shape)
        if needs_weight:
            grad_weight_NK = dy_TN.t() @ as_matrix(x)
        if needs_bias:
            grad_bias_N = bias_gradient(dy_TN)
        return grad_x, grad_weight_NK, None, None, grad_bias_N, None, None


def _empty(cls: type[AnyLinear], linear: nn.Linear) -> AnyLinear:
    """A `cls` of the shape of `linear` without parameters' memory and without bias."""
    dtype = linear.weight.dtype
    return cls(linear.in_features, linear.out_features, bias=False, device="meta", dtype=dtype)


def _payload(q_NK: Tensor, scale_NG: Tensor) -> Payload:
    """The weight as its format has it, on the same memory."""
    return q_NK.view(torch.uint8), scale_NG


def _check_linear(linear: nn.Linear, config: Int8WeightConfig, name: str) -> None:
    if linear.weight.dtype not in DTYPES:
        raise ConfigError(
            f"int8_weights: {name} has {linear.weight.dtype} weights; a stored weight passes for bfloat16 or "
            "float32; use one of these as model.dtype"
        )
    if config.group_size is not None:
        check_width(config.format(), linear.in_features, f"int8_weights: {name}", NO_GROUPS)
