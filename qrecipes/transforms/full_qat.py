"""Full quantization-aware training with learned step sizes: LSQ (arXiv 1902.08153).

K input features, N output features, T tokens, G groups of a row. All weights train, and are rounded in every
forward pass, with v = W / s and signed levels from q_min to q_max:

    q      = clip(rnd(v) + z, q_min, q_max)        z = 0 where symmetric
    W_hat  = s * (q - z)
    y      = x W_hat^T + bias

With g = dL/dW_hat and M = [q_min <= rnd(v) + z <= q_max], rnd passed straight through:

    dW = g * M      ds = sum of g * (q - z - M * v)      dz = -s * sum of g * (1 - M)

over the scale's group. The weight is kept in the model's type, and what has its size is made anew in the
backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from qrecipes.quant.activations import fake_quantize
from qrecipes.quant.input_linear import (
    InputFormat,
    bias_gradient,
    integer_product,
    integer_tokens,
    matrix,
)
from qrecipes.quant.learned_grid import TrainedGrid, round_zero
from qrecipes.quant.packing import signed_range
from qrecipes.transforms.base import ParamGroup, register
from qrecipes.transforms.qat import QATConfig, QATLinear, QATTransform


@dataclass(frozen=True, kw_only=True)
class FullQATConfig(QATConfig):
    """All weights train through their rounding, with the scales: the baseline that needs the most memory."""

    train_rest: bool = True
    """Train what is not swapped, too: norms, embeddings, skipped layers."""

    @property
    def where(self) -> str:
        """The method's name."""
        return "full_qat"


class _Rounded(NamedTuple):
    """A weight on its grid, by groups, [N, G, S]."""

    v: Tensor
    """W / s."""
    levels: Tensor
    """rnd(v) + z, not clipped."""
    q: Tensor
    zero: Tensor | None
    """z, [N, G, 1]."""
    scale: Tensor
    """[N, G, 1]."""

    def weight(self) -> Tensor:
        """W_hat, [N, K]."""
        return (self.centered() * self.scale).flatten(1)

    def centered(self) -> Tensor:
        """q - z."""
        return self.q if self.zero is None else self.q - self.zero


def _rounded(weight_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int) -> _Rounded:
    work = torch.promote_types(weight_NK.dtype, torch.float32)
    scale = scale_NG.to(work).unsqueeze(-1)
    v_NGS = weight_NK.to(work).unflatten(1, (scale_NG.shape[1], -1)) / scale
    zero = None if zero_NG is None else round_zero(zero_NG, bits).to(work).unsqueeze(-1)
    levels = v_NGS.round() if zero is None else v_NGS.round() + zero
    return _Rounded(v_NGS, levels, levels.clamp(*signed_range(bits)), zero, scale)


class FullQATLinear(QATLinear):
    """A trained weight that is rounded in every forward pass, on a trained grid."""

    weight: nn.Parameter

    def __init__(self, config: FullQATConfig, layer: nn.Linear, grid: TrainedGrid) -> None:
        super().__init__(config, layer, grid, layer.weight.dtype)
        self.weight = cast(nn.Parameter, layer.weight)

    @classmethod
    def from_linear(cls, layer: nn.Linear, config: FullQATConfig) -> FullQATLinear:
        """The layer with the Parameters of `layer`.

        Raises:
            ConfigError: if its weights are not finite, or the groups do not divide the input features.
        """
        config.check_width(layer, "a layer")
        return cls(config, layer, config.start(layer.weight.detach()))

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the input's type."""
        wanted = self.input_format
        if wanted is not None and not wanted.integer:
            input = fake_quantize(input, wanted.bits, symmetric=wanted.symmetric)
        zero = None if self.zero is None else round_zero(self.zero, self.qat.bits)
        scale = self.effective_scale()
        return _FullQATLinear.apply(input, self.weight, scale, zero, self.bias, self.qat.bits, wanted)

    @torch.no_grad()
    def integers(self) -> Tensor:
        """q, int8 [N, K]."""
        rounded = _rounded(self.weight, self.effective_scale(), self.zero, self.qat.bits)
        return rounded.q.flatten(1).to(torch.int8)


class _FullQATLinear(torch.autograd.Function):
    """Y = X W_hat^T + b and its gradients; keeps X, or its integers, and the parameters. In a compiled block
    that is not checkpointed the compiler keeps W_hat, too."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_NK: Tensor,
        scale_NG: Tensor,
        zero_NG: Tensor | None,
        bias_N: Tensor | None,
        bits: int,
        input_format: InputFormat | None,
    ) -> Tensor:
        ctx.bits, ctx.shape, ctx.dtype = bits, x.shape, x.dtype
        rounded = _rounded(weight_NK, scale_NG, zero_NG, bits)
        if input_format is None or not input_format.integer:
            ctx.save_for_backward(weight_NK, scale_NG, zero_NG, x)
            return linear(x, rounded.weight().to(x.dtype), bias_N)
        tokens = integer_tokens(matrix(x), input_format.bits)
        ctx.save_for_backward(weight_NK, scale_NG, zero_NG, *tokens)
        q_NK = rounded.q.flatten(1).to(torch.int8)
        y_TN = integer_product(tokens, q_NK, scale_NG, bias_N, x.dtype)
        return y_TN.reshape(*x.shape[:-1], y_TN.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight_NK, scale_NG, zero_NG, *x = ctx.saved_tensors
        dy_TN = matrix(grad_y)
        rounded = _rounded(weight_NK, scale_NG, zero_NG, ctx.bits)
        x_TK = matrix(x[0]) if len(x) == 1 else (x[0].float() * x[1]).to(ctx.dtype)
        grad_x = grad_bias_N = None
        if ctx.needs_input_grad[0]:
            grad_x = (dy_TN @ rounded.weight().to(dy_TN.dtype)).reshape(ctx.shape)
        grad_NGS = (dy_TN.t() @ x_TK).to(rounded.v.dtype).unflatten(1, (scale_NG.shape[1], -1))
        outside = rounded.levels != rounded.q
        grad_scale = (grad_NGS * (rounded.centered() - rounded.v.masked_fill(outside, 0))).sum(-1)
        grad_zero = None
        if zero_NG is not None:
            grad_zero = -(grad_NGS * outside).sum(-1) * scale_NG
        if ctx.needs_input_grad[4]:
            grad_bias_N = bias_gradient(dy_TN)
        grad_weight_NK = grad_NGS.masked_fill(outside, 0).flatten(1).to(weight_NK.dtype)
        return grad_x, grad_weight_NK, grad_scale, grad_zero, grad_bias_N, None, None


@register("full_qat")
class FullQAT(QATTransform):
    """Weights and scales train together."""

    Config = FullQATConfig
    Layer = FullQATLinear
    sqnr_floor_db = 8.0

    @property
    def freezes_rest(self) -> bool:
        """As `train_rest` says."""
        return not self.config.train_rest

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        """Weights and biases, and what the grid has."""
        layers = cast("list[FullQATLinear]", list(self.layers(model).values()))
        weights: list[nn.Parameter] = [layer.weight for layer in layers]
        trained = weights + [layer.bias for layer in layers if layer.bias is not None]
        return [ParamGroup("weights", trained), *super().param_groups(model)]
