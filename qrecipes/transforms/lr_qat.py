"""LR-QAT: a low-rank correction inside the rounding of a frozen weight, which ends as one integer matrix.

arXiv 2406.06385. K input features, N output features, R rank, G groups of a row; kappa = alpha / R, s0 and
z0 the grid at the start:

    phi    = encode(W / s0 + z0)                            frozen, in few bits
    q      = clip(rnd(decode(phi) + kappa * A B), q_min, q_max)
    W_hat  = s * (q - rnd(z)),   y = x W_hat^T + bias       A [N, R], B [R, K], s and z [N, G] train

`quant/low_rank_rounding.py` has the arithmetic and the gradients. phi is made once, from the weight, and is
what a checkpoint holds: it is not made again when a run resumes. With rank 0 only scales train, as in PEQA
(arXiv 2305.14152).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from qrecipes.errors import ConfigError
from qrecipes.quant.activations import fake_quantize
from qrecipes.quant.affine import AffineGrid
from qrecipes.quant.formats import AffineFormat
from qrecipes.quant.input_linear import bias_gradient, integer_product, integer_tokens, matrix
from qrecipes.quant.learned_grid import TrainedGrid, trained_grid
from qrecipes.quant.linear import QuantLinear
from qrecipes.quant.low_rank_linear import low_rank_linear
from qrecipes.quant.low_rank_rounding import (
    low_rank_integers,
    low_rank_linear_grads,
    low_rank_mm_grad_input,
)
from qrecipes.quant.low_rank_storage import LowRankRounding, Storage, decode, encode
from qrecipes.transforms.base import ParamGroup, register
from qrecipes.transforms.frozen import ADAPTER_TYPES
from qrecipes.transforms.qat import QATConfig, QATLinear, QATTransform

LOFTQ_ITERATIONS = 5
"""Alternations of LoftQ (arXiv 2310.08659), which uses 1 to 10 of them; the best is kept."""


@dataclass(frozen=True, kw_only=True)
class LRQATConfig(QATConfig):
    """A low-rank correction inside the rounding of each linear layer's frozen weight."""

    rank: int = 32
    """Columns of A and rows of B; 0 trains scales only (PEQA)."""
    alpha: float = 1.0
    """The product is multiplied by alpha / rank. It counts levels of the grid."""
    storage: Storage = "fixed_point8"
    """What the frozen weight is kept in: a byte of `bits` integer and 8 - `bits` fractional bits (up to 7
    bits), integers, two to a byte (up to 4 bits), or a floating type (any). Of integers none moves before the
    product of A and B reaches half a level: with `int4` start by `init = "loftq"`, or take an alpha near the
    rank and a higher rate; else little but scales trains."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that A and B are kept and trained in."""
    init: Literal["zero", "loftq"] = "zero"
    """`zero`: A zero and B uniform, so training starts at the rounded weight. `loftq`: what integers lose of
    the weight starts in A and B, by alternating rounding and SVD; needs storage `int4`, where something is
    lost. It is nearer to the weight before A B is rounded with it, and no nearer after."""

    @property
    def where(self) -> str:
        """The method's name."""
        return "lr_qat"

    def __post_init__(self) -> None:
        super().__post_init__()
        where = self.where
        if self.rank < 0:
            raise ConfigError(f"{where}.rank: {self.rank} is negative; use 32, or 0 for scales only")
        if self.rank == 0 and self.scale_lr == 0 and (self.symmetric or self.zero_lr == 0):
            raise ConfigError(
                f"{where}.rank: 0 trains scales only, and scale_lr is 0, so nothing would train; set a rank, "
                "such as 32, or a scale_lr, such as 0.01"
            )
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"{where}.alpha: {self.alpha} is not positive; use a number such as 1")
        try:
            self.rounding(self.group_size or 1)
        except ValueError as error:
            raise ConfigError(f"{where}.storage: {str(error).removeprefix('LowRankRounding.')}") from error
        if self.init == "loftq" and (self.storage != "int4" or self.rank == 0):
            raise ConfigError(
                f"{where}.init: 'loftq' puts into A and B what integers lose, and storage is "
                f'{self.storage!r} at rank {self.rank}; set storage = "int4" and a rank, or init = "zero"'
            )

    def rounding(self, in_features: int) -> LowRankRounding:
        """What is fixed about the weights of a layer."""
        scaling = self.alpha / self.rank if self.rank else 1.0
        return LowRankRounding(
            bits=self.bits,
            in_features=in_features,
            group_size=self.group_size,
            storage=self.storage,
            scaling=scaling,
        )


class LRQATLinear(QATLinear):
    """phi, A, B, scales and zero points. Nothing of the weight's size is kept for the backward pass."""

    low_rank_a: nn.Parameter | None
    low_rank_b: nn.Parameter | None

    def __init__(
        self,
        config: LRQATConfig,
        layer: nn.Linear | QuantLinear,
        grid: TrainedGrid,
        phi: Tensor,
        factors: tuple[Tensor, Tensor] | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(config, layer, grid, dtype)
        self.rounding = config.rounding(layer.in_features)
        self.phi = nn.Parameter(phi, requires_grad=False)
        kept = ADAPTER_TYPES[config.adapter_dtype]
        # contiguous, as FSDP2 wants them: what an SVD gives is not
        a, b = (None, None) if factors is None else (nn.Parameter(t.to(kept).contiguous()) for t in factors)
        self.register_parameter("low_rank_a", a)
        self.register_parameter("low_rank_b", b)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    @classmethod
    def from_linear(cls, layer: nn.Linear | QuantLinear, config: LRQATConfig) -> LRQATLinear:
        """The layer on the grid of `layer`, if it is quantized already, or on one that is searched for.

        B is drawn from the global random state.

        Raises:
            ConfigError: if its weights are not finite, the groups do not divide the input features, the rank
            is more than the layer's, or it is quantized in another format.
        """
        config.check_width(layer, "a layer")
        check_rank(config, layer, "a layer")
        rounding = config.rounding(layer.in_features)
        if isinstance(layer, QuantLinear):
            levels, grid, dtype = *_levels_of(layer, config, "a layer"), layer.compute_dtype
        else:
            weight, dtype = layer.weight.detach(), layer.weight.dtype
            grid = config.start(weight)
            levels = _divided(weight, grid)
        factors = _start(config, layer, levels.device)
        if levels.is_meta:
            shape, stored = rounding.phi_spec(layer.out_features)
            return cls(config, layer, grid, levels.new_empty(shape, dtype=stored), factors, dtype)
        if config.init == "loftq":
            phi, factors = loftq_levels(levels, grid.scale, rounding, config.rank)
        else:
            phi = encode(levels, rounding)
        return cls(config, layer, grid, phi, factors, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the input's type."""
        wanted, scale = self.input_format, self.effective_scale()
        parts = self.phi, self.low_rank_a, self.low_rank_b, scale, self.zero, self.bias, self.rounding
        if wanted is None:
            return low_rank_linear(input, *parts)
        if not wanted.integer:
            quantized = fake_quantize(input, wanted.bits, symmetric=wanted.symmetric)
            return low_rank_linear(quantized, *parts)
        return _IntegerLowRankLinear.apply(input, wanted.bits, *parts)

    @torch.no_grad()
    def integers(self) -> Tensor:
        """q, int8 [N, K]."""
        if self.phi.is_meta:
            return torch.empty(self.out_features, self.in_features, dtype=torch.int8, device="meta")
        return low_rank_integers(self.phi, self.low_rank_a, self.low_rank_b, self.rounding)

    def kept(self) -> list[Tensor]:
        """All but the bias."""
        return [p for name, p in self.named_parameters() if name != "bias"]

    def extra_repr(self) -> str:
        """Sizes, formats and rank."""
        config = cast(LRQATConfig, self.qat)
        return f"{super().extra_repr()}, rank={config.rank}, storage={config.storage}"


class _IntegerLowRankLinear(torch.autograd.Function):
    """Y = s_x s (X_q Q^T) + b in integers, with the gradients of x_hat W_hat^T + b.

    Keeps the integers of x and the given tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bits: int,
        phi: Tensor,
        a_NR: Tensor | None,
        b_RK: Tensor | None,
        scale_N1: Tensor,
        zero: None,
        bias_N: Tensor | None,
        rounding: LowRankRounding,
    ) -> Tensor:
        tokens = integer_tokens(matrix(x), bits)
        ctx.save_for_backward(*tokens, phi, a_NR, b_RK, scale_N1)
        ctx.rounding, ctx.shape, ctx.dtype = rounding, x.shape, x.dtype
        q_NK = low_rank_integers(phi, a_NR, b_RK, rounding)
        y_TN = integer_product(tokens, q_NK, scale_N1, bias_N, x.dtype)
        return y_TN.reshape(*x.shape[:-1], y_TN.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        codes_TK, scale_T1, phi, a_NR, b_RK, scale_N1 = ctx.saved_tensors
        parts = phi, a_NR, b_RK, scale_N1, None, ctx.rounding
        needs_x, _, _, needs_a, needs_b, needs_scale, _, needs_bias, _ = ctx.needs_input_grad
        dy_TN = matrix(grad_y)
        grad_x = d_a = d_b = d_scale = grad_bias_N = None
        if needs_x:
            grad_x = low_rank_mm_grad_input(dy_TN, *parts).reshape(ctx.shape)
        if needs_a or needs_b or needs_scale:
            x_hat_TK = (codes_TK.to(scale_T1.dtype) * scale_T1).to(ctx.dtype)
            grads = low_rank_linear_grads(dy_TN, x_hat_TK, *parts)
            d_a, d_b, d_scale = (
                None if grad is None or part is None else grad.to(part.dtype)
                for grad, part in zip(grads[:3], (a_NR, b_RK, scale_N1), strict=True)
            )
        if needs_bias:
            grad_bias_N = bias_gradient(dy_TN)
        return grad_x, None, None, d_a, d_b, d_scale, None, grad_bias_N, None


def _divided(weight_NK: Tensor, grid: TrainedGrid) -> Tensor:
    """W / s0 + z0, [N, K], in float32 or wider."""
    work = torch.promote_types(weight_NK.dtype, torch.float32)
    levels_NGS = weight_NK.to(work).unflatten(1, (grid.scale.shape[1], -1)) / grid.scale.unsqueeze(-1)
    if grid.zero is not None:
        levels_NGS = levels_NGS + grid.zero.unsqueeze(-1)
    return levels_NGS.flatten(1)


def _levels_of(layer: QuantLinear, config: LRQATConfig, where: str) -> tuple[Tensor, TrainedGrid]:
    """The integers of a low-bit layer, as floats, and its grid."""
    check_base(layer, config, where)
    if layer.packed.is_meta:  # type: ignore[union-attr]
        empty = torch.empty(layer.out_features, layer.in_features, device="meta")
        return empty, config.start(empty)
    grid: AffineGrid = layer.grid
    return layer.integers().float(), trained_grid(grid, config.format, layer.in_features)


def check_base(layer: QuantLinear, config: LRQATConfig, where: str) -> None:
    """Raise ConfigError where a low-bit layer cannot keep its integers and scales."""
    given, wanted = layer.format, config.format
    fits = (
        isinstance(given, AffineFormat)
        and (given.bits, given.group_size) == (wanted.bits, wanted.group_size)
        and not given.has_offset
        and (given.symmetric or not wanted.symmetric)
    )
    if not fits:
        raise ConfigError(
            f"lr_qat: {where}: is quantized already, as {given}; the transform asks for {wanted.stored}, "
            "with integer zero points if any; give it the layer's own bits, group_size and symmetric, or "
            "skip the layer"
        )
    if config.init == "loftq":
        raise ConfigError(
            f"lr_qat.init: 'loftq' needs the weight that {where} had before it was quantized; give the "
            'transform the plain model, or set init = "zero"'
        )


def check_rank(config: LRQATConfig, layer: nn.Linear | QuantLinear, fqn: str) -> None:
    """Raise ConfigError where the rank is more than a layer's."""
    most = min(layer.in_features, layer.out_features)
    if config.rank > most:
        raise ConfigError(
            f"lr_qat.rank: {config.rank} is more than {fqn} of {layer.out_features} x {layer.in_features} "
            f"can have; use at most {most}, or add {fqn!r} to skip"
        )


def _start(
    config: LRQATConfig, layer: nn.Linear | QuantLinear, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """A of zeros and B of Kaiming's uniform distribution, as LoRA starts; None at rank 0."""
    if not config.rank:
        return None
    b = torch.empty(config.rank, layer.in_features, device=device)
    nn.init.kaiming_uniform_(b, a=math.sqrt(5))
    return torch.zeros(layer.out_features, config.rank, device=device), b


@torch.no_grad()
def loftq_levels(
    levels_NK: Tensor,
    scale_NG: Tensor,
    rounding: LowRankRounding,
    rank: int,
    iterations: int = LOFTQ_ITERATIONS,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """phi, A and B that give exact levels U best, of `iterations` alternations (LoftQ, arXiv 2310.08659).

    Each sets phi = encode(U - kappa A B), and A B to the SVD of rank R of what is left, in float32; best is
    the least ||S (U - phi - kappa A B)||.

    S holds one number a row, the root mean square of its scales, so that errors of W count, not of levels;
    with one scale a row this is exact. Scales belong to rows, so A alone is divided by them: B has columns.
    """
    row_N1 = scale_NG.square().mean(1, keepdim=True).sqrt()
    exact = levels_NK.float()
    low_rank, least = torch.zeros_like(exact), math.inf
    best: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
    for _ in range(iterations):
        phi = encode(exact - low_rank, rounding)
        residual = (exact - decode(phi, rounding)) * row_N1
        u, singular, vh = torch.linalg.svd(residual, full_matrices=False)
        root = (singular[:rank] / rounding.scaling).sqrt()
        a, b = u[:, :rank] * root, root.unsqueeze(1) * vh[:rank]
        error = float((residual - rounding.scaling * a @ b).norm())
        low_rank = rounding.scaling * (a / row_N1) @ b
        if error < least:
            best, least = (phi, (a / row_N1, b)), error
    assert best is not None, iterations
    return best


@register("lr_qat")
class LRQAT(QATTransform):
    """Low-rank corrections and grids train; all else is frozen."""

    Config = LRQATConfig
    Layer = LRQATLinear
    kinds = (nn.Linear, QuantLinear)
    sqnr_floor_db = 8.0

    def check_site(self, fqn: str, module: nn.Module) -> None:
        """Refuse widths that groups do not divide, bases of another format, and ranks beyond the layer's."""
        config, site = cast(LRQATConfig, self.config), cast("nn.Linear | QuantLinear", module)
        super().check_site(fqn, module)
        if isinstance(site, QuantLinear):
            check_base(site, config, fqn)
        check_rank(config, site, fqn)

    @property
    def merge_differs(self) -> str | None:
        """The product A B, by the order in which it is summed."""
        rank = cast(LRQATConfig, self.config).rank
        return "integers next to a half may differ by a level from those of training" if rank else None

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        """A and B, and what the grid has."""
        layers = cast("list[LRQATLinear]", list(self.layers(model).values()))
        factors = [p for layer in layers for p in (layer.low_rank_a, layer.low_rank_b) if p is not None]
        groups = super().param_groups(model)
        return [ParamGroup("low_rank", factors), *groups] if factors else groups
