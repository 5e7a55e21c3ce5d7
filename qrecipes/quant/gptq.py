"""GPTQ (arXiv 2210.17323): a weight is rounded column by column, and the columns still to come make good what
the rounding of each did to the layer's output.

T tokens, N rows (outputs), K columns (inputs), B columns of a block, S columns of a group. With inputs X
[T, K] the loss of a weight is tr((W - W_hat) H (W - W_hat)^T), H = X^T X / T, the layer's mean squared output
error. With H^-1 = U^T U, U upper triangular, column j is rounded as it has become, and then, with

    e = (w_j - w_hat_j) / U_jj,    w_k -= e * U_jk    for all k > j.

Columns go in their own order (no act-order), so that groups stay contiguous.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qrecipes.quant.affine import AffineGrid
from qrecipes.quant.formats import AffineFormat
from qrecipes.quant.gptq_columns import MOST_COLUMNS, Columns, Levels, round_columns
from qrecipes.quant.ranges import minmax_grid

Ranges = Callable[[Tensor, AffineFormat], AffineGrid]
"""A function of `ranges.py`."""

RAISED_DAMPING = (0.01, 0.1, 1.0)
"""What `inverse_factor` tries in turn, above the damping that it was given, where there is no inverse."""


@dataclass(frozen=True, kw_only=True)
class GPTQSettings:
    """How `gptq` works; the defaults are the paper's."""

    damping: float = 0.01
    """Added to the Hessian's diagonal, as a share of its mean."""
    block_size: int = 128
    """Columns after which the rest of the weight is updated at once, aligned with the groups. It changes the
    speed, and the result by roundings only."""
    static_groups: bool = False
    """Take every group's range from the weight as it was, not as it is when the group's turn comes. With
    min-max ranges of 2 bits this is the better choice: what compensation adds would widen them."""

    def __post_init__(self) -> None:
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"GPTQSettings.damping: {self.damping}; use a number from 0, such as 0.01")
        if self.block_size < 1:
            raise ValueError(f"GPTQSettings.block_size: {self.block_size}; use at least 1, such as 128")


class GPTQWeight(NamedTuple):
    """What `gptq` gives; `QuantLinear.from_integers` takes the first two."""

    q: Tensor
    """Signed integers, int8 [N, K]."""
    grid: AffineGrid
    damping: float
    """The damping with which the Hessian had an inverse."""


class Hessian:
    """X^T X / T of a layer's inputs X [T, K], summed in float32."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self._sum_KK = torch.zeros(in_features, in_features, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Count inputs [..., K]."""
        x_TK = x.detach().reshape(-1, x.shape[-1])
        if x_TK.is_cuda and x_TK.dtype in (torch.bfloat16, torch.float16):
            # tensor cores multiply these types exactly, and sum in float32: a tenth of float32's time
            self._sum_KK += torch.mm(x_TK.t(), x_TK, out_dtype=torch.float32)
        else:
            x_TK = x_TK.float()
            self._sum_KK.addmm_(x_TK.t(), x_TK)
        self.tokens += x_TK.shape[0]

    @property
    def matrix(self) -> Tensor:
        """The mean over tokens, [K, K].

        Raises:
            ValueError: if nothing was counted.
        """
        if not self.tokens:
            raise ValueError("Hessian.matrix: no inputs were counted; `add` some first")
        return self._sum_KK / self.tokens


def gptq(
    w_NK: Tensor,
    hessian_KK: Tensor,
    format: AffineFormat,
    *,
    ranges: Ranges = minmax_grid,
    settings: GPTQSettings | None = None,
    name: str = "gptq",
) -> GPTQWeight:
    """Integers and grid of a weight, of little output error for inputs of this Hessian.

    `ranges` chooses each group's range when its first column's turn comes, from the group as the columns
    before have changed it; a whole row's (`group_size` None) is chosen at the start. Rows do not depend on
    each other, so weights of several layers with the same inputs may be stacked. Columns that were zero in
    all inputs are rounded to nearest. Computed in float32, or in float64 where the weight is; `name` is what
    errors and warnings call the layer. Reads the tensors.

    Raises:
        ValueError: if the groups do not divide the row, a tensor is not finite or of another shape, or the
        Hessian has no inverse whatever the damping.
    """
    settings = settings or GPTQSettings()
    K = w_NK.shape[1]
    format.check_width(K, name)
    if tuple(hessian_KK.shape) != (K, K):
        raise ValueError(
            f"{name}: a Hessian of shape {tuple(hessian_KK.shape)} for {K} input features; use [{K}, {K}]"
        )
    if not w_NK.isfinite().all():
        raise ValueError(f"{name}: the weight is not finite; leave the layer out, or repair the model")
    work = torch.float64 if w_NK.dtype is torch.float64 else torch.float32
    factor_KK, damping = inverse_factor(hessian_KK.to(work), settings.damping, name)
    # transposed, so that a column of the weight is contiguous
    w_KN = w_NK.detach().to(work).t().contiguous().clone()
    fixed = ranges(w_NK.detach(), format) if settings.static_groups or format.group_size is None else None
    q_KN, grid = _columns(
        w_KN, factor_KK, format, ranges, fixed, _aligned(settings.block_size, format, fixed)
    )
    return GPTQWeight(q_KN.t().contiguous(), grid, damping)


def inverse_factor(hessian_KK: Tensor, damping: float, name: str = "gptq") -> tuple[Tensor, float]:
    """Upper triangular U with U^T U = (H + d I)^-1, and the damping that gave it, d as a share of H's mean.

    Inputs that were always zero get the mean diagonal of the others, and so neither give nor receive
    compensation. Factorized in the Hessian's type, else in float64; where both fail the damping is raised in
    the steps of `RAISED_DAMPING`, with a warning.

    Raises:
        ValueError: if the Hessian is not finite, or has no inverse even so.
    """
    if not hessian_KK.isfinite().all():
        raise ValueError(
            f"{name}: the Hessian is not finite, so the layer's inputs were not; check the model on the "
            "calibration data"
        )
    diagonal = hessian_KK.diagonal()
    live = diagonal != 0
    mean = diagonal[live].mean() if live.any() else diagonal.new_ones(())
    filled_K = torch.where(live, 0.0, mean)
    for tried in (damping, *(step for step in RAISED_DAMPING if step > damping)):
        damped_KK = hessian_KK.clone()
        damped_KK.diagonal().add_(filled_K + tried * mean)
        for dtype in dict.fromkeys((hessian_KK.dtype, torch.float64)):
            factor_KK = _upper_factor(damped_KK.to(dtype))
            if factor_KK is not None:
                if tried != damping:
                    warnings.warn(
                        f"{name}: the Hessian has no inverse with damping {damping:g}; used {tried:g}",
                        stacklevel=3,
                    )
                return factor_KK.to(hessian_KK.dtype), tried
    raise ValueError(
        f"{name}: the Hessian has no inverse, even with its diagonal raised by {RAISED_DAMPING[-1]:g} of its "
        "mean; it is no X^T X: check the model on the calibration data, or leave the layer out"
    )


def relative_output_error(w_NK: Tensor, w_hat_NK: Tensor, hessian_KK: Tensor) -> float:
    """|X (W - W_hat)^T| / |X W^T|, Frobenius norms, over the inputs that the Hessian was taken from."""
    lost, whole = (_energy(m.float(), hessian_KK.float()) for m in (w_NK.float() - w_hat_NK.float(), w_NK))
    return 0.0 if lost == 0 else math.sqrt(lost / whole) if whole > 0 else math.inf


def relative_weight_error(w_NK: Tensor, w_hat_NK: Tensor) -> float:
    """|W - W_hat| / |W|, Frobenius norms."""
    lost, whole = (w_NK.float() - w_hat_NK.float()).norm(), w_NK.float().norm()
    return 0.0 if lost == 0 else float(lost / whole)


def _energy(m_NK: Tensor, hessian_KK: Tensor) -> float:
    return max(0.0, float(((m_NK @ hessian_KK) * m_NK).sum(dtype=torch.float64)))


def _upper_factor(h_KK: Tensor) -> Tensor | None:
    """Upper triangular U with U^T U = H^-1; None where H is not positive definite.

    Its rows are contiguous. H^-1 is never formed: with H = R R^T, R upper triangular, U is R^-1, and R is the
    ordinary Cholesky factor of H with both orders reversed, reversed again.
    """
    lower, info = torch.linalg.cholesky_ex(h_KK.flip(0, 1))
    if int(info) != 0:
        return None
    eye = torch.eye(len(h_KK), device=h_KK.device, dtype=h_KK.dtype)
    factor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
    return factor.contiguous() if factor.isfinite().all() else None  # LAPACK's order is by columns


def _aligned(block_size: int, format: AffineFormat, fixed: AffineGrid | None) -> int:
    """A block that ends where a group ends: a group's range is taken from columns that are all up to date."""
    if fixed is not None or format.group_size is None:
        return block_size
    return format.group_size * max(1, block_size // format.group_size)


def _columns(
    w_KN: Tensor,
    factor_KK: Tensor,
    format: AffineFormat,
    ranges: Ranges,
    fixed: AffineGrid | None,
    block_size: int,
) -> tuple[Tensor, AffineGrid]:
    """Integers [K, N] and the grid; `w_KN` is used up."""
    K = w_KN.shape[0]
    size = format.group_size or K
    q_KN = torch.empty_like(w_KN, dtype=torch.int8)
    grids: list[AffineGrid] = []
    for start in range(0, K, block_size):
        stop = min(start + block_size, K)
        error_BN = torch.empty_like(w_KN[start:stop])
        for first, last in _runs(start, stop, size):
            if first % size == 0:
                grids.append(
                    ranges(w_KN[first : first + size].t(), format)
                    if fixed is None
                    else _group(fixed, first // size)
                )
                levels = Levels.of(grids[-1], format.bits, w_KN.dtype)
            error_SN = error_BN[first - start : last - start]
            factor_SS = factor_KK[first:last, first:last]
            round_columns(Columns(w_KN[first:last], factor_SS, q_KN[first:last], error_SN), levels)
            w_KN[last:stop].addmm_(factor_KK[first:last, last:stop].t(), error_SN, alpha=-1)
        w_KN[stop:].addmm_(factor_KK[start:stop, stop:].t(), error_BN, alpha=-1)
    return q_KN, fixed if fixed is not None else _joined(grids)


def _runs(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """The columns from `start` to `stop` in runs of one group each, none too long for `round_columns`."""
    while start < stop:
        last = min(stop, start + MOST_COLUMNS, (start // size + 1) * size)
        yield start, last
        start = last


def _group(grid: AffineGrid, index: int) -> AffineGrid:
    return AffineGrid(*(None if t is None else t[:, index : index + 1] for t in grid))  # type: ignore[arg-type]


def _joined(grids: list[AffineGrid]) -> AffineGrid:
    return AffineGrid(
        *(None if parts[0] is None else torch.cat(parts, 1) for parts in zip(*grids, strict=True))  # type: ignore[arg-type]
    )
