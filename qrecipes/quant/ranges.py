"""Which range of its weights a group's levels span: all of it, or the part that loses least.

N rows, K columns, G groups of a row, S columns of a group. Every function takes a weight [N, K] and an
`AffineFormat` and gives its grid; all work in float32, and in bounded memory, rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qrecipes.quant.affine import AffineGrid, affine_grid, with_offset
from qrecipes.quant.formats import AffineFormat
from qrecipes.quant.packing import signed_range

CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
"""Weights searched at once, by kind of device: some five float32 tensors of this size are alive. On a CPU
they stay in its cache."""
LEAST_POWER, GREATEST_POWER = 2.0, 5.0


def minmax_grid(w_NK: Tensor, format: AffineFormat, *, per_tensor: bool = False) -> AffineGrid:
    """Round to nearest over each group's whole range, or over the tensor's, repeated for every group.

    Raises:
        ValueError: if the groups do not divide the rows.
    """
    low_NG, high_NG = _range(_groups(w_NK, format))
    if per_tensor:
        low_NG, high_NG = low_NG.amin().expand_as(low_NG), high_NG.amax().expand_as(high_NG)
    return affine_grid(low_NG, high_NG, format)


def mse_grid(w_NK: Tensor, format: AffineFormat, *, candidates: int = 100, margin: float = 0.0) -> AffineGrid:
    """The range of least squared error: `lp_grid` with p = 2."""
    return lp_grid(w_NK, format, p=2.0, candidates=candidates, margin=margin)


def lp_grid(
    w_NK: Tensor, format: AffineFormat, *, p: float = 4.0, candidates: int = 100, margin: float = 0.0
) -> AffineGrid:
    """The range that minimizes the sum of |W - W_hat|**p over a group, of fractions of its whole range.

    LR-QAT (arXiv 2406.06385), which takes p from 2 to 5. Symmetric: thresholds k / `candidates` of the
    greatest magnitude (plus `margin`, in units of W). Asymmetric: both ends shrink together, towards 0 with
    an integer zero point and towards the middle of the range with a float one; then the low end alone is
    searched, then the high end. Of equal errors the smaller range wins. A group that is not finite gets its
    whole range.

    Raises:
        ValueError: if the groups do not divide the rows, or p or the candidates are out of their range.
    """
    if not LEAST_POWER <= p <= GREATEST_POWER:
        raise ValueError(f"lp_grid.p: {p}; use {LEAST_POWER:g} to {GREATEST_POWER:g}")
    if candidates < 1:
        raise ValueError(f"lp_grid.candidates: {candidates}; use at least 1, such as 100")
    found = [
        _search(part_NGS, format, p, candidates, margin) for part_NGS in _row_chunks(_groups(w_NK, format))
    ]
    return affine_grid(torch.cat([low for low, _ in found]), torch.cat([high for _, high in found]), format)


def hqq_grid(
    w_NK: Tensor,
    format: AffineFormat,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
    iterations: int = 20,
) -> AffineGrid:
    """Offsets of least |W - W_hat|**p, p < 1, by HQQ's half-quadratic splitting; scales are min-max.

    Each iteration shrinks the error, |e| -> max(|e| - |e|**(p - 1) / beta, 0), which leaves the outliers, and
    moves the offset to the mean of what is left of W without them; beta grows by `growth`. It starts from the
    group's range and again from the range and rounded zero point of an integer format, and the best of all
    iterations of each group is kept. HQQ (Badri and Shaji, 2023) states it for zero points z = -b / s; the
    iterates are the same.

    Raises:
        ValueError: if the format has no float zero point, or p is not between 0 and 1.
    """
    if not format.has_offset:
        raise ValueError(
            f"hqq_grid.format: {format} has no float zero point to optimize; set symmetric=False and "
            "zero_point='float'"
        )
    if not 0 < p < 1:
        raise ValueError(f"hqq_grid.p: {p}; use a number between 0 and 1, such as 0.7")
    found = [
        _half_quadratic(part_NGS, format, p, beta, growth, iterations)
        for part_NGS in _row_chunks(_groups(w_NK, format))
    ]
    return AffineGrid(torch.cat([g.scale for g in found]), offset=torch.cat([_offset(g) for g in found]))


def _groups(w_NK: Tensor, format: AffineFormat) -> Tensor:
    N, K = w_NK.shape
    format.check_width(K, "ranges.w_NK")
    G = format.num_groups(K)
    return w_NK.detach().reshape(N, G, K // G)


def _row_chunks(w_NGS: Tensor) -> tuple[Tensor, ...]:
    elements = CHUNK_ELEMENTS.get(w_NGS.device.type, CHUNK_ELEMENTS["cpu"])
    rows = max(1, elements // (w_NGS.shape[1] * w_NGS.shape[2]))
    return w_NGS.split(rows)


def _range(w_NGS: Tensor) -> tuple[Tensor, Tensor]:
    return w_NGS.amin(-1).float(), w_NGS.amax(-1).float()


def _search(
    w_NGS: Tensor, format: AffineFormat, p: float, candidates: int, margin: float
) -> tuple[Tensor, Tensor]:
    """The ends of the best range of each group, [N, G] each."""
    w_NGS = w_NGS.float()
    low, high = _range(w_NGS)
    if format.symmetric:
        high = torch.maximum(low.abs(), high.abs())
        low = -high
    elif format.has_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    low, high = low - margin, high + margin
    center = (low + high) / 2 if format.has_offset else torch.zeros_like(low)
    best = _Best(w_NGS, format, p, low, high)
    fractions = [k / candidates for k in range(1, candidates + 1)]
    for fraction in fractions:
        best.consider(center + fraction * (low - center), center + fraction * (high - center))
    if not format.symmetric:
        kept = best.high
        for fraction in fractions:
            best.consider(center + fraction * (low - center), kept)
        kept = best.low
        for fraction in fractions:
            best.consider(kept, center + fraction * (high - center))
    return best.low, best.high


class _Best:
    """The best range of each group so far."""

    def __init__(self, w_NGS: Tensor, format: AffineFormat, p: float, low: Tensor, high: Tensor) -> None:
        self.w_NGS, self.format, self.p = w_NGS, format, p
        self.low, self.high = low, high
        self.error = torch.full_like(low, torch.inf)

    def consider(self, low: Tensor, high: Tensor) -> None:
        """Take a range where its error is less; NaN is not."""
        grid = affine_grid(low, high, self.format)
        error = _error(self.w_NGS, grid, self.format.bits)
        total = _power(error.abs_(), self.p).sum(-1)
        better = total < self.error
        self.error = torch.where(better, total, self.error)
        self.low, self.high = torch.where(better, low, self.low), torch.where(better, high, self.high)


def _error(w_NGS: Tensor, grid: AffineGrid, bits: int) -> Tensor:
    """Float32 weights less what `quantize_affine` and `dequantize_affine` make of them, bit for bit.

    Fused by hand, in place and without integers, since a search does nothing else.
    """
    scale, zero, offset = (None if t is None else t.float().unsqueeze(-1) for t in grid)
    assert scale is not None, grid
    divisor = torch.where(scale == 0, 1.0, scale)
    w_hat = w_NGS / divisor if offset is None else (w_NGS - offset).div_(divisor)
    w_hat.round_()
    if zero is not None:
        w_hat.add_(zero)
    w_hat.clamp_(*signed_range(bits))
    if zero is not None:
        w_hat.sub_(zero)
    w_hat.mul_(scale)
    if offset is not None:
        w_hat.add_(offset)
    return torch.sub(w_NGS, w_hat, out=w_hat)


def _power(magnitude: Tensor, p: float) -> Tensor:
    if p == 2:
        return magnitude.square_()
    return magnitude.square_().square_() if p == 4 else magnitude.pow_(p)


def _half_quadratic(
    w_NGS: Tensor, format: AffineFormat, p: float, beta: float, growth: float, iterations: int
) -> AffineGrid:
    w_NGS = w_NGS.float()
    low, high = _range(w_NGS)
    with_zero = with_offset(affine_grid(low, high, replace(format, zero_point="integer")))
    kept, least = affine_grid(low, high, format), torch.full_like(low, torch.inf)
    for grid in (kept, with_zero._replace(offset=_offset(with_zero).to(_offset(kept).dtype))):
        strength = beta
        for _ in range(iterations + 1):
            error_NGS = _error(w_NGS, grid, format.bits)
            magnitude = error_NGS.abs()
            total = magnitude.pow(p).sum(-1)
            better = total < least
            least = torch.where(better, total, least)
            kept = AffineGrid(
                torch.where(better, grid.scale, kept.scale),
                offset=torch.where(better, _offset(grid), _offset(kept)),
            )
            shrunk = (magnitude - magnitude.clamp(min=1e-12).pow(p - 1) / strength).clamp(min=0)
            moved = _offset(grid).float() + (error_NGS - error_NGS.sign() * shrunk).mean(-1)
            grid = grid._replace(offset=moved.to(_offset(kept).dtype))
            strength *= growth
    return kept


def _offset(grid: AffineGrid) -> Tensor:
    assert grid.offset is not None, grid
    return grid.offset


RANGES: dict[str, Callable[..., AffineGrid]] = {
    "rtn": minmax_grid,
    "mse": mse_grid,
    "lp": lp_grid,
    "hqq": hqq_grid,
}
"""Range methods by the names that a command line or a recipe uses."""
