"""Quantization grids that are trained: where they start, how parameters stand for scales, how they fail.

N rows, G groups of a row. Scales and zero points are float32 whatever the model's type: steps of a learning
rate for scales, such as 1e-5, are lost in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from qrecipes.quant.affine import AffineGrid
from qrecipes.quant.formats import AffineFormat
from qrecipes.quant.packing import BITS, signed_range
from qrecipes.quant.ranges import lp_grid, minmax_grid, mse_grid

LEAST_BITS, GREATEST_BITS = 2, 8
SCALE_FLOOR = 1e-8
"""Least scale; a parameter that asks for less gets this, and no gradient."""

Domain: TypeAlias = Literal["linear", "log"]
RangeMethod: TypeAlias = Literal["rtn", "mse", "lp"]


@dataclass(frozen=True, kw_only=True)
class TrainedFormat(AffineFormat):
    """An `AffineFormat` of 2 to 8 bits, which grids are searched for; `stored` is how it is packed."""

    def __post_init__(self) -> None:
        assert self.zero_point == "integer", self.zero_point
        if not LEAST_BITS <= self.bits <= GREATEST_BITS:
            raise ValueError(f"bits: {self.bits!r}; use {LEAST_BITS} to {GREATEST_BITS}")
        object.__setattr__(self, "key", self.stored.key)

    @property
    def stored(self) -> AffineFormat:
        """The format of the merged layer: integers of 5, 6 and 7 bits take a byte each."""
        return AffineFormat(
            bits=self.bits if self.bits in BITS else 8,
            group_size=self.group_size,
            symmetric=self.symmetric,
        )


class TrainedGrid(NamedTuple):
    """W_hat = scale * (q - rnd(zero)) over signed q, float32 [N, G] each; no zero where it is symmetric."""

    scale: Tensor
    zero: Tensor | None = None


def initial_grid(
    w_NK: Tensor, format: TrainedFormat, ranges: RangeMethod, p: float, where: str
) -> TrainedGrid:
    """The grid that training starts from: over each group's whole range, or the part that loses least.

    Groups without a range (zeros, in a layer that starts at zero) get the mean scale of the others, or one
    for weights up to 1 / sqrt(K) where there are no others: a scale of zero would never leave it.

    Raises:
        ValueError: if a weight is not finite, naming `where`. Reads the tensor.
    """
    if w_NK.is_meta:  # a place for stored tensors
        empty = w_NK.new_empty(w_NK.shape[0], format.num_groups(w_NK.shape[1]), dtype=torch.float32)
        return TrainedGrid(empty, None if format.symmetric else torch.empty_like(empty))
    if not torch.isfinite(w_NK).all():
        raise ValueError(f"{where}: holds weights that are not finite; load other weights, or skip the layer")
    if ranges == "lp":
        grid = lp_grid(w_NK, format, p=p)
    else:
        grid = (minmax_grid if ranges == "rtn" else mse_grid)(w_NK, format)
    return trained_grid(grid, format, w_NK.shape[1])


def trained_grid(grid: AffineGrid, format: TrainedFormat, in_features: int) -> TrainedGrid:
    """A stored grid as one to train; its empty scales are replaced as in `initial_grid`."""
    scale = grid.scale.float()
    used = scale > SCALE_FLOOR
    _, greatest = signed_range(format.bits)
    typical = (scale * used).sum() / used.sum().clamp(min=1)
    typical = torch.where(used.any(), typical, 1 / (greatest * in_features**0.5))
    scale = torch.where(used, scale, typical)
    if format.symmetric:
        return TrainedGrid(scale)
    return TrainedGrid(scale, torch.zeros_like(scale) if grid.zero is None else grid.zero.float())


def to_parameter(scale_NG: Tensor, domain: Domain) -> Tensor:
    """The number that is trained for each scale."""
    return scale_NG.log() if domain == "log" else scale_NG.clone()


def to_scale(parameter_NG: Tensor, domain: Domain, gradient_factor: float = 1.0) -> Tensor:
    """The scales that parameters stand for, at least `SCALE_FLOOR`; their gradients times a factor.

    Exponentials are taken in float64 and rounded once, so that all devices, and compiled code, give the same.
    """
    scale = parameter_NG.double().exp().to(parameter_NG.dtype) if domain == "log" else parameter_NG
    scale = torch.where(scale <= SCALE_FLOOR, SCALE_FLOOR, scale)  # NaN stays
    if gradient_factor != 1.0:
        # the difference is exactly zero: only the gradient is scaled
        scale = scale.detach() + (scale - scale.detach()) * gradient_factor
    return scale


def lsq_factor(bits: int, weights_per_scale: int) -> float:
    """LSQ's factor of a scale's gradient, 1 / sqrt(weights * q_max) (arXiv 1902.08153, section 2.2)."""
    _, greatest = signed_range(bits)
    return (weights_per_scale * greatest) ** -0.5


def round_zero(zero_NG: Tensor, bits: int) -> Tensor:
    """Zero points rounded to the integers that the bits hold; the gradient passes through the rounding, but
    not where it was clipped."""
    least, greatest = signed_range(bits)
    rounded = zero_NG.detach().round()
    # by hand, since torch.clamp's gradient at a bound is 1 in some versions and 0 in others
    inside = (rounded >= least) & (rounded <= greatest)
    return rounded.clamp(least, greatest) + torch.where(inside, zero_NG - zero_NG.detach(), 0.0)


def collapsed_scales(parameter_NG: Tensor, domain: Domain) -> Tensor:
    """How many scales are at their floor or not finite, as a tensor."""
    scale = to_scale(parameter_NG.detach(), domain)
    return (~torch.isfinite(scale) | (scale <= SCALE_FLOOR)).sum()
